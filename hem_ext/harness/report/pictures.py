"""The pictures of a report: values, accuracies over eps, learning curves, and what networks make of images."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hem_ext.harness import metrics
from hem_ext.harness.report import grid
from hem_ext.harness.report.results import BASELINE, HEM, TUNED, Curves, Question, Results, histories, judged
from hem_ext.harness.report.style import WIDTH, by_epoch, few, legend, line, panels, save
from hem_ext.harness.report.words import where
from hem_ext.harness.training import reading

# Petroff's ten colours, arXiv 2107.02270, after a dark one for the background.
CLASS_COLORS = (
    *("#202020", "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
SCENES = 5


def draw(output: Path, question: Question, protocol: str, curves: Curves) -> list[str]:
    """Draw what there is to draw of the results of a protocol; the names of the files."""
    results, title = question.protocols[protocol], question.name + where(question, protocol)
    drawings = {
        "": _draw_values(question, results, title),
        "-eps": _draw_by_eps(question, results, title),
        "-sweep": grid.draw(question, results, title),
        "-curves": _draw_curves(curves, question, results, title),
        "-pictures": _draw_scenes(output, results),
    }
    stem = f"{question.name}-own-best" if protocol == TUNED else question.name
    drawn = {f"{stem}{what}.png": figure for what, figure in drawings.items() if figure is not None}
    for name, figure in drawn.items():
        save(figure, output / name)
    return list(drawn)


def _draw_values(question: Question, results: Results, title: str) -> Figure | None:
    """The judged metrics of every loss: seeds as small dots, mean and standard error. A row for every quantity."""
    rows = [list(quantity.metrics) for quantity in question.quantities]
    if not any(result.finite(name) for result in results for names in rows for name in names):
        return None
    columns = max(map(len, rows))
    size = 0.32 if columns == 1 else 0.2
    figure = Figure(figsize=(WIDTH, 0.5 + (0.7 + size * len(results)) * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, sharey=True, squeeze=False)
    for row, quantity in zip(axes, question.quantities, strict=True):
        for axis in row[len(quantity.metrics) :]:
            axis.set_axis_off()
        for axis, (name, short) in zip(row, quantity.metrics.items(), strict=False):
            for y, result in enumerate(results):
                if result.finite(name):
                    color, values = line(result, results)["color"], result.values(name)
                    mean, error = metrics.mean(values)
                    axis.plot(values, [y + 0.25] * len(values), ".", color=color, alpha=0.5, markeredgewidth=0)
                    bar = None if math.isnan(error) else error
                    axis.errorbar(
                        mean, y, xerr=bar, fmt="o", color=color, capsize=4 if columns == 1 else 2, markersize=5
                    )
                    if result.loss == BASELINE:
                        axis.axvline(mean, color=color, linewidth=0.8, linestyle="--", zorder=0)
            axis.set(ylim=(len(results) - 0.5, -0.5))
            axis.set_xlabel(f"{quantity.title},\n{short}" if short else quantity.shown, fontsize=9 if short else 10)
            axis.set_yticks(range(len(results)), [result.name for result in results])
            axis.xaxis.get_major_locator().set_params(nbins=10 if columns == 1 else 3)
            axis.grid(axis="x", alpha=0.3)
    figure.suptitle(f"{title}: mean and standard error, and every seed", fontsize=11)
    return figure


def _draw_by_eps(question: Question, results: Results, title: str) -> Figure | None:
    """Values that are given for several eps, such as ``"pgd eps=0.1"``, against eps."""
    groups: dict[str, dict[float, str]] = {}
    for metric in dict.fromkeys(metric for result in results for metric in result.by_seed):
        found = re.fullmatch(r"(.*?)[ _]?eps[ _=]?(\d+(?:\.\d+)?(?:/\d+)?)(.*)", metric)
        if found:
            groups.setdefault(f"{found[1]}{found[3]}".strip(), {})[float(Fraction(found[2]))] = metric
    groups = {name: dict(sorted(by_eps.items())) for name, by_eps in groups.items() if len(by_eps) > 1}
    if not groups:
        return None
    figure, axes = panels(len(groups))
    for axis, (name, by_eps) in zip(axes, groups.items(), strict=False):
        for result in few(question, results):
            points = [(eps, *metrics.mean(result.values(key))) for eps, key in by_eps.items() if result.finite(key)]
            if points:
                eps, mean, error = np.array(points).T
                style = line(result, results)
                axis.errorbar(eps, mean, np.nan_to_num(error), label=result.name, marker=".", capsize=2, **style)
        axis.set(title=question.metrics[name].title if name in question.metrics else name, xlabel="eps")
        axis.grid(alpha=0.3)
    legend(figure, axes, results)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_curves(curves: Curves, question: Question, results: Results, title: str) -> Figure | None:
    """The metric on validation, the share of samples with a gradient, and the logit gap after every epoch."""
    found = {result.name: histories(result, curves) for result in results}
    found = {name: of_result for name, of_result in found.items() if any(of_result)}
    if not found:
        return None
    last = next(history[-1] for of_result in found.values() for history in of_result if history)
    names = [*judged(question.task), *last["metrics"]]
    name = next((name for name in names if name in last["metrics"]), None)
    shown: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "training samples with a gradient": lambda epoch: epoch["active"],
        "logit gap in training": lambda epoch: epoch["logit_gap"],
    }
    if name is not None:
        what = question.metrics[name].title if name in question.metrics else name
        shown = {f"{what} on validation": lambda epoch: epoch["metrics"].get(name, math.nan), **shown}
    figure, axes = panels(len(shown))
    drawn = few(question, [result for result in results if result.name in found])
    for axis, (what, value) in zip(axes, shown.items(), strict=False):
        again = set()  # where another training begins: some tasks train one network after another
        for result in drawn:
            values = [[value(epoch) for epoch in history] for history in found[result.name]]
            again |= by_epoch(axis, values, result.settings["epochs"], result.name, line(result, results))
        axis.set_title(what, fontsize=11)
        axis.set_xlabel("epoch" + (", dotted: a new training" if len(again) > 1 else ""))
    legend(figure, axes, results)
    figure.suptitle(f"{title}: mean over seeds, and all of them", fontsize=11)
    return figure


def _draw_scenes(output: Path, results: Results) -> Figure | None:
    """Images of the test set beside the truth and what networks of the first seed made of them."""
    paths = {r.name: output / "pictures" / f"{r.cells[min(r.cells)]['cell']}.pt" for r in results}
    there = [result for result in results if paths[result.name].exists()]
    wanted = sorted(dict.fromkeys(r.loss for r in there), key=lambda loss: loss not in (BASELINE, *HEM, "dice"))[:4]
    shown = {}
    for loss in wanted:
        first = next(result.name for result in there if result.loss == loss)
        with reading(paths[first], "the report has no scenes of this loss without it"):
            found = torch.load(paths[first], weights_only=True)
            shown[first] = {name: found[name] for name in ("images", "labels", "predicted")}
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
