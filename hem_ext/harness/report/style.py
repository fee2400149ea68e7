"""What the pictures of a report have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hem_ext.harness.losses import LOSSES
from hem_ext.harness.report.results import Question, Result, Results, hem_variants, judged
from hem_ext.harness.training import write_whole

# Okabe and Ito's colours tell losses apart for every kind of colour vision; after the fourth, the dashes do.
COLORS = {"ce": "#D55E00", "hem": "#0072B2", "hem+": "#56B4E9"}
OTHER_COLORS = ("#009E73", "#CC79A7", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
WIDTH = 8.0  # inches: text of 10 points can be read where the picture is shown 800 pixels wide
RIVALS = 3  # lines beside those of cross-entropy and HEM: more cannot be told apart in one picture


def save(figure: Figure, path: Path) -> None:
    """Write a picture whole or not at all; KeptError, which names it, where it cannot be written."""
    write_whole(path, lambda partial: figure.savefig(partial, dpi=150, format=path.suffix.removeprefix(".")))


def line(result: Result, results: Results) -> dict[str, Any]:
    """Colour and dashes of a line: the same for a loss in every task."""
    variants = [other.name for other in results if other.loss == result.loss]
    dash = variants.index(result.name) + result.selective
    if result.loss in COLORS:
        return {"color": COLORS[result.loss], "linestyle": DASHES[dash % len(DASHES)]}
    place = [loss for loss in LOSSES if loss not in COLORS].index(result.loss)
    dash += place // len(OTHER_COLORS)
    return {"color": OTHER_COLORS[place % len(OTHER_COLORS)], "linestyle": DASHES[dash % len(DASHES)]}


def few(question: Question, results: Results) -> list[Result]:
    """Not more than can be told apart as lines: those of cross-entropy and HEM, and the others with the best means.

    HEM+ is left out where it is the same network as HEM, whose line it would cover.
    """
    metric = judged(question.task)[0]
    covered = [name for _, twins in hem_variants(results) for name in twins]
    others = sorted(
        (result for result in results if result.loss not in COLORS and result.finite(metric)),
        key=lambda result: result.mean(metric),
        reverse=question.metrics[metric].higher_is_better,
    )
    known = [result for result in results if result.loss in COLORS and result.name not in covered]
    return [*known, *others[:RIVALS]][: len(COLORS) + RIVALS]


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with two panels a row, and its panels: as many, and an empty one where their number is odd."""
    rows = math.ceil(count / 2)
    figure = Figure(figsize=(WIDTH, 3 * rows + 0.6 * (count % 2 == 0)), layout="constrained")
    return figure, list(figure.subplots(rows, 2).flat)


def by_epoch(
    axis: Axes, values: Sequence[Sequence[float]], epochs: int, label: str, style: Mapping[str, Any]
) -> set[int]:
    """Draw what every seed had in every epoch, as mean and range; return where a training begins.

    Args:
        axis: to draw on; where another training begins than the first, it gets a dotted line, once.
        values: of every seed, of every epoch of its trainings, one after the other. NaN where nothing was measured; a
            seed that diverged has fewer.
        epochs: of one training.
        label, style: of the line.
    """
    y = np.full((len(values), max(map(len, values))), math.nan)
    for row, of_seed in zip(y, values, strict=True):
        row[: len(of_seed)] = of_seed
    x, begins = np.arange(1, y.shape[1] + 1), range(0, y.shape[1], epochs)
    marked = {line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == ":" and line.get_color() == "gray"}
    for begin in begins:
        part = np.arange(begin, min(begin + epochs, len(x)))
        part = part[~np.isnan(y[:, part]).all(0)]  # not every epoch is looked at
        axis.plot(x[part], np.nanmean(y[:, part], 0), label=label if begin == 0 else None, marker=".", **style)
        axis.fill_between(
            x[part],
            np.nanmin(y[:, part], 0),
            np.nanmax(y[:, part], 0),
            color=style["color"],
            alpha=0.15,
            linewidth=0,
        )
        if begin and begin + 0.5 not in marked:
            axis.axvline(begin + 0.5, color="gray", linestyle=":", linewidth=1)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    return set(begins)


def legend(figure: Figure, axes: Sequence[Axes], results: Results) -> None:
    """The names of the lines, in the empty panel or below all."""
    named: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    handles, labels = list(named.values()), list(named)
    left_out = len(results) - len(labels)
    title = f"without {left_out} other{'s' if left_out > 1 else ''}" if left_out > 0 else None
    if axes[-1].has_data():
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, title=title, title_fontsize=9)
    else:
        axes[-1].set_axis_off()
        axes[-1].legend(handles, labels, loc="center", title=title)
