"""Why it is so: pictures of what HEM does in training, and of what rejection depends on, from a finished comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hem_ext.harness import metrics
from hem_ext.harness.report.results import Result, histories, make_results, read_curves
from hem_ext.harness.report.style import WIDTH, line, save
from hem_ext.harness.tasks.ood import SCALES, TITLES

Row = Mapping[str, Any]

SHOWN = ("ce", "hem", "hem+")


def draw(output: Path, rows: Sequence[Row], margins: Sequence[Row]) -> list[str]:
    """Draw `output`/why-training.png and `output`/why-rejection.png; the names of those that there is data for.

    Args:
        output: the folder of the comparison, with the curves of its cells.
        rows: of its cells with one schedule for all losses.
        margins: of cells of ``ood`` with HEM at several values of the constant `total` of its rule.
    """
    figures = {"why-training.png": _draw_training(output, rows), "why-rejection.png": _draw_rejection(rows, margins)}
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        save(figure, output / name)
    return list(drawn)


def _draw_training(output: Path, rows: Sequence[Row]) -> Figure | None:
    """What had a gradient and how large logits were, epoch by epoch, mean over seeds; a column for every task."""
    tasks = [task for task in ("classification", "imbalanced", "segmentation") if any(r["task"] == task for r in rows)]
    curves = read_curves(output)
    found = {task: _first_trainings(curves, [row for row in rows if row["task"] == task]) for task in tasks}
    tasks = [task for task in tasks if found[task]]
    if not tasks:
        return None
    quantities = {
        "active": "with a gradient, share",
        "kept": "other classes with one,\nmean over these",
        "logit_gap": "logit gap, mean",
        "logit_scale": "deviation of a sample's\nlogits, mean",
    }
    figure = Figure(figsize=(WIDTH, 1.9 * len(quantities)), layout="constrained")
    for row, (name, title) in zip(
        figure.subplots(len(quantities), len(tasks), squeeze=False, sharex="col"), quantities.items(), strict=True
    ):
        for axis, task in zip(row, tasks, strict=True):
            for result, trainings in found[task]:
                mean = np.mean([[epoch[name] for epoch in history] for history in trainings], axis=0)
                axis.plot(np.arange(1, len(mean) + 1), mean, label=result.name, **line(result, [result]))
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            if name == "active":
                axis.set_title(f"{task}: {'pixels' if task == 'segmentation' else 'samples'}", fontsize=10)
        row[0].set_ylabel(title, fontsize=9)
    for axis in row:
        axis.set_xlabel("epoch")
    handles = {label: handle for axis in row for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    return figure


def _first_trainings(curves: Mapping[str, Row], rows: Iterable[Row]) -> list[tuple[Result, list[Any]]]:
    """The first training of every seed, for the losses that are shown."""
    found = []
    for result in make_results(rows):
        of_seeds = histories(result, curves) if result.loss in SHOWN else []
        if of_seeds and len(of_seeds) == len(result.cells):
            found.append((result, [history[: result.settings["epochs"]] for history in of_seeds]))
    return found


def _draw_rejection(rows: Sequence[Row], margins: Sequence[Row]) -> Figure | None:
    """AUROC near and far: of HEM by its margin, for every score; of every loss by the scale of the logits, for MSP."""
    by_margin = [result for result in make_results(margins) if result.constants.get("total")]
    by_loss = make_results(row for row in rows if row["task"] == "ood")
    if not by_margin or not by_loss:
        return None
    figure = Figure(figsize=(WIDTH, 7), layout="constrained")
    (near, far), (near_scale, far_scale) = figure.subplots(2, 2, sharey="col")
    for where, axis in (("near", near), ("far", far)):
        for score, title in TITLES.items():
            points = [(result.constants["total"], result) for result in by_margin]
            # The margin is the root of the total: this many times the margin of the paper's rule.
            x = [(total / 2000) ** 0.5 for total, _ in points]
            _errorbar(axis, x, [result.values(f"{where}_auroc {score}") for _, result in points], title)
        _finish(axis, f"{where}: HEM by its margin", "margin over the rule's", x)
    near.legend(fontsize=8, loc="lower center", ncols=2)
    for where, axis in (("near", near_scale), ("far", far_scale)):
        names = {1.0: f"{where}_auroc msp", **{s: f"{where}_auroc msp of logits times {s:g}" for s in SCALES}}
        x = sorted(names)
        for result in by_loss:
            _errorbar(axis, x, [result.values(names[scale]) for scale in x], result.name, **line(result, by_loss))
        _finish(axis, f"{where}: MSP by the scale of the logits", "logits times", x)
    figure.legend(*far_scale.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=9)
    return figure


def _errorbar(axis: Axes, x: Sequence[float], values: Sequence[Sequence[float]], label: str, **style: Any) -> None:
    mean, error = np.array([metrics.mean(of_one) for of_one in values]).T
    axis.errorbar(x, mean, np.nan_to_num(error), label=label, marker=".", capsize=2, **style)


def _finish(axis: Axes, title: str, xlabel: str, ticks: Sequence[float]) -> None:
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_title(title, fontsize=10)
    axis.set(xlabel=xlabel, ylabel="AUROC")
    axis.grid(alpha=0.3)
