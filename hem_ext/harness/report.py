"""What a comparison came to: tables, a sentence for every task, and pictures, from the rows of its finished cells."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hem_ext.harness import metrics
from hem_ext.harness.losses import LOSSES
from hem_ext.harness.tasks import TASKS, Metric
from hem_ext.harness.training import write_whole

BASELINE = "ce"
HEM = ("hem", "hem+")
MISSING = "—"
PROTOCOL = """\
Every loss is given the same networks, initial weights, order of samples and schedule. The schedules that the tasks come
with were chosen by the test results of cross-entropy alone, which favours it. Nothing is stopped early. ± is the
standard error over seeds. p is that of Welch's two-sided t-test against `ce` on the first metric, not corrected for the
number of losses; it is left out where a side has one seed or the seeds do not differ. Bold is the best of its column,
with all that tie at the shown digits; ↓ marks metrics of which less is better. "In loss" is the share of the training
time that the loss and its gradient took; on a GPU, that launching them took.
"""


def write(output: Path, rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print a table and a sentence for every task; write `output`/report.md and the pictures that it shows.

    The report depends on the rows, and on the curves and pictures that :func:`hem_ext.harness.compare.run` left beside
    them, alone: the same files give the same bytes.

    Args:
        output: the folder of the comparison. Curves or pictures that are not there are not drawn.
        rows: of finished cells, one per cell and metric, as that function writes them.
        console: to print to.
    """
    parts = ["# Comparison\n", PROTOCOL]
    for task, results in _by_task(rows).items():
        console.print(_console_table(task, results, console.width))
        console.print(Text(_verdict(task, results).replace("`", "") + "\n"))
        parts += _section(task, results, _draw(output, task, results))
    text = "\n".join(parts)
    write_whole(output / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
    console.print(f"wrote {output / 'report.md'}", highlight=False, soft_wrap=True)


# --- numbers --------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """One loss, with its constants, on one task."""

    name: str  # as tables have it: "hem margin=0.5"
    loss: str  # "hem"
    constants: Mapping[str, float]  # those that were given
    cells: dict[int, Mapping[str, Any]] = field(default_factory=dict)  # seed -> one of the cell's rows
    by_seed: dict[str, dict[int, float]] = field(default_factory=dict)  # metric -> seed -> value

    def values(self, metric: str) -> list[float]:
        """One per seed, in their order; empty where the metric was not taken."""
        return [value for _, value in sorted(self.by_seed.get(metric, {}).items())]

    def finite(self, metric: str) -> bool:
        values = self.values(metric)
        return bool(values) and all(map(math.isfinite, values))

    def mean(self, metric: str) -> float:
        return metrics.mean(self.values(metric)).mean


Results = Sequence[Result]


def _by_task(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Result]]:
    """Task -> its results, tasks and losses in the order in which the harness lists them."""
    found: dict[str, dict[str, Result]] = {}
    for row in rows:
        settings = row["settings"]
        result = found.setdefault(row["task"], {}).setdefault(
            row["loss"], Result(row["loss"], settings["loss"], settings["constants"])
        )
        result.cells[row["seed"]] = row
        result.by_seed.setdefault(row["metric"], {})[row["seed"]] = row["value"]
    losses = list(LOSSES)
    return {
        task: sorted(found[task].values(), key=lambda r: (losses.index(r.loss), sorted(r.constants.items())))
        for task in TASKS
        if task in found
    }


def _declared(task: str) -> Mapping[str, Metric]:
    return TASKS[task].metrics


def _judged(task: str) -> str:
    return next(iter(_declared(task)))


def _baseline(results: Results) -> Result | None:
    return next((result for result in results if result.loss == BASELINE), None)


def _p(result: Result, baseline: Result | None, metric: str) -> float:
    """Welch's p; NaN where there is nothing to test."""
    if baseline is None or result is baseline or not (result.finite(metric) and baseline.finite(metric)):
        return math.nan
    sides = result.values(metric), baseline.values(metric)
    # Without any spread but rounding's, a test would be sure of itself, whatever the number of seeds.
    if min(map(len, sides)) < 2 or all(np.ptp(side) < 1e-9 for side in sides):
        return math.nan
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)  # of a side that does not vary
        return metrics.welch(*sides).p


def _best(task: str, results: Results, metric: str) -> list[Result]:
    """Those with the best mean, as tables show it."""
    shown = {result.name: _digits(result.mean(metric)) for result in results if result.finite(metric)}
    if not shown:
        return []
    best = (max if _declared(task)[metric].higher_is_better else min)(shown.values(), key=float)
    return [result for result in results if shown.get(result.name) == best]


# --- words ----------------------------------------------------------------------------------------------------


def _digits(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # no -0.000


def _shown(values: Sequence[float]) -> str:
    """Mean and standard error; how many seeds have no number, where only some have one."""
    without = sum(not math.isfinite(value) for value in values)
    if without == len(values):
        return MISSING
    if without:
        return f"NaN in {without} of {len(values)}"
    mean, error = metrics.mean(values)
    return _digits(mean) if math.isnan(error) else f"{_digits(mean)} ± {_digits(error)}"


def _shown_p(p: float) -> str:
    if math.isnan(p):
        return MISSING
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _columns(task: str) -> list[str]:
    titles = [metric.title + ("" if metric.higher_is_better else " ↓") for metric in _declared(task).values()]
    return ["loss", *titles, "p", "seeds", "in loss"]


def _cells(task: str, results: Results, bold: Callable[[str], str]) -> list[list[str]]:
    """The rows of a task's table."""
    best = {metric: _best(task, results, metric) for metric in _declared(task)}
    table = []
    for result in results:
        shown = [_shown(result.values(metric)) for metric in best]
        marked = [bold(s) if result in best[metric] else s for s, metric in zip(shown, best, strict=True)]
        p = _p(result, _baseline(results), _judged(task))
        share = np.mean([row["loss_share"] for row in result.cells.values()])
        table.append([result.name, *marked, _shown_p(p), str(len(result.cells)), f"{share:.1%}"])
    return table


def _console_table(task: str, results: Results, width: int) -> Table:
    """As many of the metrics, in their order, as `width` shows without cutting a number off."""
    names = max(len(result.name) for result in results)
    most = max(1, (width - names - 24) // 15)  # "0.123 ± 0.045" and a gap, beside p, seeds and share
    left_out = max(0, len(_declared(task)) - most)
    table = Table(title=task, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    if left_out:
        table.caption = f"{left_out} more metric{'s' if left_out > 1 else ''} in report.md"

    def shown(row: list[str]) -> list[str]:
        return row[: len(row) - 3 - left_out] + row[-3:]

    for heading in shown(_columns(task)):
        table.add_column(heading, justify="left" if heading == "loss" else "right", no_wrap=heading == "loss")
    for cells in _cells(task, results, lambda text: f"[bold]{text}[/bold]"):
        table.add_row(*shown(cells))
    return table


def _markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, [":--", *["--:"] * (len(headings) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _verdict(task: str, results: Results) -> str:
    """Where HEM's best variant stands against cross-entropy: by the task's first metric, then by the others."""
    name, *others = _declared(task)
    metric, ce = _declared(task)[name], _baseline(results)
    tried = [result for result in results if result.loss in HEM]
    best = next(iter(_best(task, tried, name)), None)
    if ce is None or not ce.finite(name) or best is None:
        return f"HEM and `ce` cannot be compared by {metric.title}: both need a number for every seed."
    p = _p(best, ce, name)
    test = "" if math.isnan(p) else f", Welch's p {'' if p < 0.001 else '= '}{_shown_p(p).replace('<', '< ')}"
    chosen = f" (the best of {len(tried)} variants of HEM by this very number)" if len(tried) > 1 else ""
    stand = _stand(task, best, ce, name)
    stand += {"ahead": " of", "behind": "", "not told apart": " from", "not tested": " against"}[stand]
    text = (
        f"HEM is {stand} `ce` by {metric.title}"
        f"{'' if metric.higher_is_better else ' (less is better)'}: `{best.name}`{chosen} has "
        f"{_shown(best.values(name))}, `ce` {_shown(ce.values(name))}; the difference is "
        f"{best.mean(name) - ce.mean(name):+.3f}{test}, {len(best.cells)} and {len(ce.cells)} seeds."
    )
    by_stand: dict[str, list[str]] = {}
    for other in others:
        if best.finite(other) and ce.finite(other):
            by_stand.setdefault(_stand(task, best, ce, other), []).append(_declared(task)[other].title)
    by_stand.pop("not tested", None)
    said = "; ".join(f"{stand} by {', '.join(titles)}" for stand, titles in by_stand.items())
    return f"{text} Of the other metrics, it is {said}." if said else text


def _stand(task: str, result: Result, ce: Result, metric: str) -> str:
    p, difference = _p(result, ce, metric), result.mean(metric) - ce.mean(metric)
    if math.isnan(p):
        return "not tested"
    if p >= 0.05:
        return "not told apart"
    return "ahead" if (difference > 0) == _declared(task)[metric].higher_is_better else "behind"


def _section(task: str, results: Results, pictures: Iterable[str]) -> list[str]:
    """A task's part of the report."""
    parts = [f"## {task}\n", _markdown_table(_columns(task), _cells(task, results, lambda text: f"**{text}**"))]
    parts.append(_verdict(task, results) + "\n")
    parts += [f"![{Path(name).stem}]({name})\n" for name in pictures]
    extra = list(dict.fromkeys(name for result in results for name in result.by_seed if name not in _declared(task)))
    if extra:
        cells = [[name, *(_shown(result.values(name)) for result in results)] for name in extra]
        parts += [f"### {task}: every other value\n"]
        parts += [_markdown_table(["value", *(result.name for result in results)], cells)]
    return [*parts, f"### {task}: settings\n", _settings(results)]


def _settings(results: Results) -> str:
    rows = [row for result in results for _, row in sorted(result.cells.items())]
    lines = {
        name.replace("_", " "): _distinct(_flat(row["settings"].get(name)) for row in rows)
        for name in ("data", "data_root", "model", "mixed_precision", "schedule", "options")
    }
    lines = {name: text for name, text in lines.items() if text != "None"}
    lines["seeds"] = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    for result in results:
        constants = {**LOSSES[result.loss].constants(), **result.constants}
        # None stands for what the loss works out from the classes.
        known = {name: "by its rule" if value is None else value for name, value in constants.items()}
        lines[f"`{result.name}`"] = _flat(known) if known else "no constants"
    lines["run with"] = _distinct(
        f"torch {row['torch']}, hem_ext {row['hem_ext']}, on {row['device']} ({row['machine']})" for row in rows
    )
    return "".join(f"- {name}: {text}\n" for name, text in lines.items())


def _flat(value: Any) -> str:
    """``{"epochs": 2, "data_options": {"num_train": 3}}`` as "epochs 2, data_options (num_train 3)"."""
    if not isinstance(value, Mapping):
        return f"{value:g}" if isinstance(value, float) else str(value)
    items = ((name, f"({_flat(v)})" if isinstance(v, Mapping) else _flat(v)) for name, v in value.items())
    return ", ".join(f"{name} {text}" for name, text in items) or "none"


def _distinct(texts: Iterable[str]) -> str:
    return "; or ".join(dict.fromkeys(texts))


# --- pictures -------------------------------------------------------------------------------------------------

# Okabe and Ito's colours tell losses apart for every kind of colour vision; after the fourth, the dashes do.
COLORS = {"ce": "#D55E00", "hem": "#0072B2", "hem+": "#56B4E9"}
OTHER_COLORS = ("#009E73", "#CC79A7", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
# Petroff's ten colours, arXiv 2107.02270, after a dark one for the background.
CLASS_COLORS = (
    *("#202020", "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
WIDTH = 8.0  # inches: text of 10 points can be read where the picture is shown 800 pixels wide
LINES = 8  # more cannot be told apart in one picture
SCENES = 5


def _draw(output: Path, task: str, results: Results) -> list[str]:
    """Draw what there is to draw; the names of the files."""
    drawings = {
        f"{task}.png": _draw_values(task, results),
        f"{task}-eps.png": _draw_by_eps(task, results),
        f"{task}-sweep.png": _draw_sweep(task, results),
        f"{task}-curves.png": _draw_curves(output, task, results),
        f"{task}-pictures.png": _draw_scenes(output, task, results),
    }
    drawn = {name: figure for name, figure in drawings.items() if figure is not None}
    for name, figure in drawn.items():
        figure.savefig(output / name, dpi=150)
    return list(drawn)


def _style(result: Result, results: Results) -> dict[str, Any]:
    """Colour and dashes of a line: the same for a loss in every task."""
    variants = [other.name for other in results if other.loss == result.loss]
    dash = variants.index(result.name)
    if result.loss in COLORS:
        return {"color": COLORS[result.loss], "linestyle": DASHES[dash % len(DASHES)]}
    place = [loss for loss in LOSSES if loss not in COLORS].index(result.loss)
    dash += place // len(OTHER_COLORS)
    return {"color": OTHER_COLORS[place % len(OTHER_COLORS)], "linestyle": DASHES[dash % len(DASHES)]}


def _few(results: Results) -> list[Result]:
    """Not more than lines can be told apart: cross-entropy and HEM first."""
    return sorted(results, key=lambda result: result.loss not in COLORS)[:LINES]


def _axis_title(task: str, metric: str) -> str:
    found = _declared(task)[metric]
    return found.title if found.higher_is_better else f"{found.title} (less is better)"


def _draw_values(task: str, results: Results) -> Figure | None:
    """The judged metric of every loss: seeds as small dots, mean and standard error; far beside near."""
    judged = _judged(task)
    far = judged.replace("near", "far")
    names = list(dict.fromkeys(name for name in (judged, far) if name in _declared(task)))
    if not any(result.finite(name) for result in results for name in names):
        return None
    figure = Figure(figsize=(WIDTH, 1.2 + 0.32 * len(results)), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        for y, result in enumerate(results):
            if result.finite(name):
                color, values = _style(result, results)["color"], result.values(name)
                mean, error = metrics.mean(values)
                axis.plot(values, [y + 0.25] * len(values), ".", color=color, alpha=0.5, markeredgewidth=0)
                bar = None if math.isnan(error) else error
                axis.errorbar(mean, y, xerr=bar, fmt="o", color=color, capsize=4, markersize=6)
        baseline = _baseline(results)
        if baseline is not None and baseline.finite(name):
            axis.axvline(baseline.mean(name), color=COLORS[BASELINE], linewidth=0.8, linestyle="--", zorder=0)
        axis.set(xlabel=_axis_title(task, name), ylim=(len(results) - 0.5, -0.5))
        axis.set_yticks(range(len(results)), [result.name for result in results])
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle(f"{task}: mean and standard error, and every seed")
    return figure


def _draw_by_eps(task: str, results: Results) -> Figure | None:
    """Values that are given for several eps, such as ``"pgd eps=0.1"``, against eps."""
    groups: dict[str, dict[float, str]] = {}
    for metric in dict.fromkeys(metric for result in results for metric in result.by_seed):
        found = re.fullmatch(r"(.*?)[ _]?eps[ _=]?(\d+(?:\.\d+)?(?:/\d+)?)(.*)", metric)
        if found:
            groups.setdefault(f"{found[1]}{found[3]}".strip(), {})[float(Fraction(found[2]))] = metric
    groups = {title: dict(sorted(by_eps.items())) for title, by_eps in groups.items() if len(by_eps) > 1}
    if not groups:
        return None
    figure, axes = _panels(len(groups))
    for axis, (title, by_eps) in zip(axes, groups.items(), strict=False):
        for result in _few(results):
            points = [(eps, *metrics.mean(result.values(name))) for eps, name in by_eps.items() if result.finite(name)]
            if points:
                eps, mean, error = np.array(points).T
                style = _style(result, results)
                axis.errorbar(eps, mean, np.nan_to_num(error), label=result.name, marker=".", capsize=2, **style)
        axis.set(title=_declared(task)[title].title if title in _declared(task) else title, xlabel="eps")
        axis.grid(alpha=0.3)
    _legend(figure, axes, results)
    return figure


def _draw_sweep(task: str, results: Results) -> Figure | None:
    """The judged metric against a constant, for losses of which several variants differ in nothing else."""
    metric, sweeps = _judged(task), {}
    for loss in dict.fromkeys(result.loss for result in results):
        variants = [result for result in results if result.loss == loss and result.finite(metric)]
        names = {name for result in variants for name in result.constants}
        different = [name for name in names if len({result.constants.get(name) for result in variants}) > 1]
        if len(different) == 1:
            with_it = [result for result in variants if different[0] in result.constants]
            if len(with_it) > 1:
                sweeps.setdefault(different[0], {})[loss] = with_it
    if not sweeps:
        return None
    figure = Figure(figsize=(WIDTH, 4), layout="constrained")
    baseline = _baseline(results)
    for axis, (constant, by_loss) in zip(
        figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps.items(), strict=True
    ):
        for loss, variants in by_loss.items():
            x = [result.constants[constant] for result in variants]
            y = [metrics.mean(result.values(metric)) for result in variants]
            mean, error = np.array(y).T
            color = _style(variants[0], variants)["color"]
            axis.errorbar(x, mean, np.nan_to_num(error), label=loss, color=color, marker="o", capsize=3)
        if baseline is not None and baseline.finite(metric):
            mean, error = np.nan_to_num(metrics.mean(baseline.values(metric)))
            axis.axhline(mean, color=COLORS[BASELINE], label=baseline.name)
            axis.axhspan(mean - error, mean + error, color=COLORS[BASELINE], alpha=0.2, linewidth=0)
        swept = [result.constants[constant] for variants in by_loss.values() for result in variants]
        axis.set(xlabel=constant, ylabel=_axis_title(task, metric), xscale="log" if min(swept) > 0 else "linear")
        axis.set_xticks(sorted(set(swept)), [f"{value:g}" for value in sorted(set(swept))], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"{task}: mean and standard error")
    return figure


def _draw_curves(output: Path, task: str, results: Results) -> Figure | None:
    """The test metric, the share of samples with a gradient, and the logit gap after every epoch."""
    histories = {}
    for result in _few(results):
        paths = [output / "curves" / f"{row['cell']}.json" for row in result.cells.values()]
        found = [json.loads(path.read_text(encoding="utf-8"))["history"] for path in paths if path.exists()]
        if any(found):
            histories[result.name] = found
    if not histories:
        return None
    first = next(epoch for found in histories.values() for history in found for epoch in history)
    judged = _judged(task) if _judged(task) in first["metrics"] else next(iter(first["metrics"]), None)
    panels: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "training samples with a gradient": lambda epoch: epoch["active"],
        "logit gap in training": lambda epoch: epoch["logit_gap"],
    }
    if judged is not None:
        title = _declared(task)[judged].title if judged in _declared(task) else judged
        panels = {f"{title} on test": lambda epoch: epoch["metrics"][judged], **panels}
    figure, axes = _panels(len(panels))
    drawn = [result for result in results if result.name in histories]
    # Some tasks train one network after another.
    length = next(iter(drawn[0].cells.values()))["settings"]["schedule"]["epochs"]
    for axis, (title, value) in zip(axes, panels.items(), strict=False):
        for result in drawn:
            values = np.array([[value(epoch) for epoch in history] for history in histories[result.name]])
            epochs, style = np.arange(1, values.shape[1] + 1), _style(result, results)
            for begin in range(0, len(epochs), length):
                part = slice(begin, begin + length)
                y, label = values[:, part], result.name if begin == 0 else None
                axis.plot(epochs[part], y.mean(0), label=label, marker=".", **style)
                axis.fill_between(epochs[part], y.min(0), y.max(0), color=style["color"], alpha=0.15, linewidth=0)
        for begin in range(length, len(epochs), length):
            axis.axvline(begin + 0.5, color="gray", linestyle=":", linewidth=1)
        axis.set(title=title, xlabel="epoch" + (", dotted: a new training" if len(epochs) > length else ""))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    _legend(figure, axes, results)
    return figure


def _draw_scenes(output: Path, task: str, results: Results) -> Figure | None:
    """Images of the test set beside the truth and what networks of the first seed made of them."""
    paths = {r.name: output / "pictures" / f"{r.cells[min(r.cells)]['cell']}.pt" for r in results}
    there = [result for result in results if paths[result.name].exists()]
    wanted = sorted(dict.fromkeys(r.loss for r in there), key=lambda loss: loss not in (BASELINE, *HEM, "dice"))[:4]
    shown = {}
    for loss in wanted:
        variants = [result for result in there if result.loss == loss]
        best = (_best(task, variants, _judged(task)) or variants)[0].name
        shown[best] = torch.load(paths[best], weights_only=True)
    if not shown:
        return None
    images, labels = (next(iter(shown.values()))[name] for name in ("images", "labels"))
    columns = {"truth": labels, **{name: pictures["predicted"] for name, pictures in shown.items()}}
    names = [name.removeprefix("iou ") for name in results[0].by_seed if name.startswith("iou ")]
    classes = max(len(names), 1 + int(max(maps.where(maps < 255, 0).max() for maps in columns.values())))
    palette = _palette(classes)

    rows = min(len(images), SCENES)
    size = WIDTH / (1 + len(columns))
    height = size * images.shape[-2] / images.shape[-1]
    figure = Figure(figsize=(WIDTH, rows * height + 1), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for i, row in enumerate(figure.subplots(rows, 1 + len(columns), squeeze=False)):
        image = images[i].movedim(0, -1).clamp(0, 1).numpy()
        row[0].imshow(image.repeat(3, -1) if image.shape[-1] == 1 else image[..., :3])
        for axis, maps in zip(row[1:], columns.values(), strict=True):
            # Above the last class, what is ignored: white.
            axis.imshow(maps[i].numpy(), cmap=palette, vmin=-0.5, vmax=classes - 0.5, interpolation="nearest")
        for axis, title in zip(row, ["image", *columns], strict=True):
            axis.set_axis_off()
            if i == 0:
                axis.set_title(title, fontsize=10)
    if len(names) == classes and classes <= 24:
        handles = [Patch(color=palette(c), label=name) for c, name in enumerate(names)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(classes, 6), fontsize=9, handlelength=1)
    return figure


def _palette(classes: int) -> Colormap:
    few = classes <= len(CLASS_COLORS)
    palette = ListedColormap(CLASS_COLORS[:classes]) if few else colormaps["turbo"].resampled(classes)
    return palette.with_extremes(over="white")


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with two panels a row, and its panels: as many, and an empty one where their number is odd."""
    rows = math.ceil(count / 2)
    figure = Figure(figsize=(WIDTH, 3 * rows + 0.6 * (count % 2 == 0)), layout="constrained")
    return figure, list(figure.subplots(rows, 2).flat)


def _legend(figure: Figure, axes: Sequence[Axes], results: Results) -> None:
    """The names of the lines, in the empty panel or below all."""
    handles, labels = axes[0].get_legend_handles_labels()
    left_out = len(results) - len(labels)
    title = f"without {left_out} other{'s' if left_out > 1 else ''}" if left_out > 0 else None
    if axes[-1].has_data():
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, title=title, title_fontsize=9)
    else:
        axes[-1].set_axis_off()
        axes[-1].legend(handles, labels, loc="center", title=title)
