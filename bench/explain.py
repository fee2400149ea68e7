"""The pictures and tables of the pages that explain the loss and its margin.

    python bench/explain.py [--docs docs]     draws loss.png and margin.png, writes the tables of loss.md and margin.md

loss.png is one row of logits. margin.png shows the validation rows of `hem-ext paper --tune` that lie in docs/paper.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from documents import markdown, replace
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hem_ext import hem_loss
from hem_ext.harness import compare, paper
from hem_ext.harness.compare import make_cells
from hem_ext.harness.report.results import Result, judged, make_results
from hem_ext.harness.report.style import COLORS, save
from hem_ext.harness.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 6.4  # inches: narrower than a report's, for a telephone shows these as well

# --- one row ------------------------------------------------------------------------------------------------------

LOGITS = (2.0, 2.9, 2.3, 1.6, 1.2, 0.4, -0.5, -1.2)  # of the target first
MARGIN = 0.5


class Row(NamedTuple):
    """What the losses make of one row of logits whose first is the target's; a number for each class."""

    logits: list[float]
    errors: list[float]
    threshold: float
    hem: float
    hem_gradient: list[float]
    ce: float
    ce_gradient: list[float]

    @property
    def kept(self) -> list[bool]:
        return [g > 0 for g in self.hem_gradient]


def one_row(logits: Sequence[float] = LOGITS, margin: float = MARGIN) -> Row:
    """The losses and gradients from the functions that train, the errors and their mean from the formula."""
    y, target = torch.tensor([logits], dtype=torch.float64, requires_grad=True), torch.tensor([0])
    losses = hem_loss(y, target, margin=margin), torch.nn.functional.cross_entropy(y, target)
    gradients = [torch.autograd.grad(loss, y)[0][0].tolist() for loss in losses]
    errors = [0.0, *(max(0.0, x - logits[0] + margin) for x in logits[1:])]
    threshold = sum(errors) / len(errors)
    return Row(list(logits), errors, threshold, losses[0].item(), gradients[0], losses[1].item(), gradients[1])


def row_table(row: Row) -> list[list[str]]:
    """A line for each class."""
    lines = [["class", "logit", "error", "", "HEM's gradient", "CE's"]]
    for j, y in enumerate(row.logits):
        state = "target" if j == 0 else "kept" if row.kept[j] else "below the mean" if row.errors[j] > 0 else "none"
        error = "" if j == 0 else f"{row.errors[j]:.1f}"
        lines.append([str(j), f"{y:.1f}", error, state, f"{row.hem_gradient[j]:+.2f}", f"{row.ce_gradient[j]:+.2f}"])
    return lines


def draw_row(row: Row) -> Figure:
    """Logits, errors and gradients of the row, HEM on the left and cross-entropy on the right."""
    figure = Figure(figsize=(WIDTH, 6.4), layout="constrained")
    grid = figure.add_gridspec(3, 2)
    logits = figure.add_subplot(grid[0, :])
    (errors, shares), (left, right) = [[figure.add_subplot(grid[i, j]) for j in (0, 1)] for i in (1, 2)]
    classes = range(len(row.logits))
    gray, green = "#BBBBBB", "#009E73"
    of_class = [COLORS["hem"] if kept else gray for kept in row.kept]
    of_class[0] = green

    logits.bar(classes, row.logits, color=of_class)
    line = row.logits[0] - MARGIN
    logits.axhline(line, color="black", linestyle="--", linewidth=1)
    logits.text(classes[-1] + 0.4, line + 0.08, "target - margin", ha="right", fontsize=8)
    logits.set_title("a row of logits: what is above the line has an error", fontsize=10)

    errors.bar(classes, row.errors, color=of_class)
    errors.axhline(row.threshold, color="black", linestyle=":", linewidth=1)
    errors.text(classes[-1] + 0.4, row.threshold + 0.03, f"mean {row.threshold:.2f}", ha="right", fontsize=8)
    errors.set_title(f"errors: the loss is the kept ones' mean, {row.hem:.2f}", fontsize=9)

    probabilities = [g + (j == 0) for j, g in enumerate(row.ce_gradient)]
    shares.bar(classes, probabilities, color=[green] + [COLORS["ce"]] * (len(classes) - 1))
    shares.set_title(f"softmax: the loss is -log(target's), {row.ce:.2f}", fontsize=9)
    left.bar(classes, row.hem_gradient, color=of_class)
    left.set_title("gradient of HEM", fontsize=10)
    right.bar(classes, row.ce_gradient, color=[green] + [COLORS["ce"]] * (len(classes) - 1))
    right.set_title("gradient of cross-entropy", fontsize=10)
    for axis in (left, right):
        axis.set_ylim(-1.1, 0.6)
    for axis in figure.axes:
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_xticks(classes, ["target", *map(str, classes[1:])])
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    return figure


# --- margins ------------------------------------------------------------------------------------------------------


class Sweep(NamedTuple):
    """What a task came to on validation, mean over seeds."""

    task: str
    metric: str
    setting: str  # "total" of the rule, or "margin"
    hem: list[Result]
    ce: Result  # at the rate that was best for it
    seeds: int

    def margin(self, result: Result) -> float:
        """In times of the rule's, or itself where there is no rule."""
        value: float = result.setting(self.setting)
        return value if self.setting == "margin" else math.sqrt(value / 2000)

    def means(self, key: Callable[[Result], float]) -> dict[float, list[float]]:
        """Of each margin, or each rate, as `key` says."""
        return {k: [r.mean(self.metric) for r in self.hem if key(r) == k] for k in sorted({key(r) for r in self.hem})}

    @property
    def margins(self) -> list[float]:
        return sorted({self.margin(r) for r in self.hem})


def sweeps(folder: Path) -> list[Sweep]:
    """Every task that HEM's margin was tried on, from the rows of a finished `hem-ext paper --tune`."""
    rows = compare.read_rows(folder)
    found = {}
    for task, loss, seeds, grid in paper.GRIDS:
        if loss in ("ce", "hem"):
            cells = {cell.key for cell in make_cells([task], losses=[loss], seeds=seeds, sweep=grid, part="validation")}
            found[task, loss] = make_results(row for row in rows if row["cell"] in cells), seeds
    return [
        Sweep(
            task,
            metric := judged(task)[0],
            "margin" if results[0].setting("total") is None else "total",
            list(results),
            max(found[task, "ce"][0], key=lambda result: result.mean(metric)),
            seeds,
        )
        for (task, loss), (results, seeds) in found.items()
        if loss == "hem"
    ]


def margin_table(found: Sequence[Sweep]) -> list[list[str]]:
    """A line for each task: what the margins came to, each at its best rate; how far margins and rates move it."""
    lines = [["task", "", "1/8 of the rule", "1/4", "1/2", "the rule", "cross-entropy", "over margins", "over rates"]]
    for sweep in found:
        best = [max(values) for values in sweep.means(sweep.margin).values()]
        at = [f"{value:.3f}" for value in best]
        if sweep.setting == "margin":
            at = [f"{value} at {m:g}" for m, value in zip(sweep.margins, at, strict=True)]
        by_rate = [max(values) for values in sweep.means(lambda r: r.setting("max_lr")).values()]
        spreads = [f"{max(values) - min(values):.3f}" for values in (best, by_rate)]
        title = TASKS[sweep.task].metrics[sweep.metric].title
        lines.append([sweep.task, title, *at, f"{sweep.ce.mean(sweep.metric):.3f}", *spreads])
    return lines


def draw_margins(found: Sequence[Sweep]) -> Figure:
    """A panel for each task: a line over margins for every learning rate, and cross-entropy at its best."""
    rows = math.ceil(len(found) / 2)
    figure = Figure(figsize=(WIDTH, 2.5 * rows + 0.8), layout="constrained")
    axes = list(figure.subplots(rows, 2, squeeze=False).flat)
    rates = sorted({r.setting("max_lr") for sweep in found for r in sweep.hem})
    shades = dict(zip(rates, colormaps["viridis"](torch.linspace(0, 0.95, len(rates)).tolist()), strict=True))
    for axis, sweep in zip(axes, found, strict=False):
        for rate in rates:
            line = sorted((r for r in sweep.hem if r.setting("max_lr") == rate), key=sweep.margin)
            x, y = [sweep.margin(r) for r in line], [r.mean(sweep.metric) for r in line]
            axis.plot(x, y, color=shades[rate], marker="o", markersize=4, label=f"rate {rate:g}")
        _finish(axis, sweep)
    for axis in axes[len(found) :]:
        axis.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _finish(axis: Axes, sweep: Sweep) -> None:
    level = sweep.ce.mean(sweep.metric)
    axis.axhline(level, color=COLORS["ce"], linestyle="--", label="ce, its best rate")
    values = sorted(r.mean(sweep.metric) for r in sweep.hem)
    low, high = values[len(values) // 5], max(values[-1], level)  # the worst fifth may lie below
    axis.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    axis.set_xscale("log")
    axis.set_xticks(sweep.margins, [f"{m:g}" for m in sweep.margins])
    axis.minorticks_off()
    axis.set_xlabel("margin" if sweep.setting == "margin" else "margin over the rule's", fontsize=9)
    axis.set_title(f"{sweep.task}: {TASKS[sweep.task].metrics[sweep.metric].title}", fontsize=10)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)


def write_pages(docs: Path, row: Row, found: Sequence[Sweep]) -> None:
    """Replace what stands between the markers of loss.md and margin.md."""
    for page, name, table in (("loss.md", "row", row_table(row)), ("margin.md", "margins", margin_table(found))):
        replace(docs / page, name, markdown(table))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    docs: Path = parser.parse_args().docs
    row, found = one_row(), sweeps(ROOT / "docs" / "paper")
    figures: dict[str, Any] = {"loss.png": draw_row(row), "margin.png": draw_margins(found)}
    for name, figure in figures.items():
        save(figure, docs / name)
        print(f"wrote {docs / name}")
    write_pages(docs, row, found)


if __name__ == "__main__":
    main()
