"""The picture of a sweep or of a tuning: the judged metric against the settings that were tried."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from hem_ext.harness import metrics
from hem_ext.harness.report.results import BASELINE, Question, Result, Results, judged, swept, text
from hem_ext.harness.report.style import COLORS, WIDTH, line
from hem_ext.harness.tasks import Metric

Chosen = Mapping[str, Mapping[str, Any]]  # loss -> setting -> value


def draw(question: Question, results: Results, title: str, chosen: Chosen | None = None) -> Figure | None:
    """The judged metric: lines over the one setting of a loss that was swept, a heat map over two.

    Of a loss with more than two, it is those where all but the first two settings are as chosen; without a choice such
    a loss is left out. Nothing is drawn where no loss has several configurations.

    Args:
        question, results: of one protocol.
        title: of the figure.
        chosen: what to mark: loss -> setting -> value.
    """
    chosen = chosen or {}
    metric = judged(question.task)[0]
    lines: dict[str, dict[str, list[Result]]] = {}  # setting -> loss, or "hem selective" -> results
    maps: dict[str, tuple[str, str, list[Result]]] = {}  # the same -> two settings, results
    for loss in dict.fromkeys(result.variant for result in results):
        variants = [result for result in results if result.variant == loss]
        names = swept(variants)
        if len(names) > 2:
            rest = {name: chosen.get(loss, {}).get(name) for name in names[2:]}
            variants = [r for r in variants if all(r.setting(name) == value for name, value in rest.items())]
            names = names[:2] if variants else []
        if len(names) == 1:
            lines.setdefault(names[0], {})[loss] = variants
        elif len(names) == 2:
            maps[loss] = (*names, variants)
    count = len(lines) + len(maps)
    if not count:
        return None
    columns = min(count, 2)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, 0.4 + 3.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    declared = question.metrics[metric]
    for axis, (setting, by_loss) in zip(axes, lines.items(), strict=False):
        _lines(axis, setting, by_loss, metric, chosen)
        if BASELINE not in by_loss:
            _baseline(axis, results, metric)
        axis.legend(fontsize=9)
    colors = _colors([r.mean(metric) for *_, found in maps.values() for r in found if r.finite(metric)], declared)
    for axis, (loss, found) in zip(axes[len(lines) :], maps.items(), strict=False):
        _heat_map(axis, *found, metric, colors, chosen.get(loss))
    for axis in axes[count:]:
        axis.set_axis_off()
    part = next(iter(results[0].cells.values()))["settings"]["part"]
    arrow = "" if declared.higher_is_better else " (less is better)"
    star = ", star: chosen" if chosen else ""
    figure.suptitle(f"{title}: {declared.title}{arrow} on {part}, mean over seeds{star}", fontsize=11)
    return figure


def _colors(means: Sequence[float], metric: Metric) -> ScalarMappable:
    """Bright is best in all heat maps alike; the worst quarter is one colour, for a training that failed is far off."""
    ends, name = ([0.25, 1], "cividis") if metric.higher_is_better else ([0, 0.75], "cividis_r")
    return ScalarMappable(Normalize(*np.quantile(means, ends), clip=True) if means else None, name)


def _values(results: Results, setting: str) -> list[Any]:
    """The different values, in order."""
    found = {result.setting(setting) for result in results}
    return sorted(found, key=lambda value: (isinstance(value, str), value is None, value))


def _is_chosen(result: Result, chosen: Mapping[str, Any] | None) -> bool:
    return bool(chosen) and all(result.setting(name) == value for name, value in chosen.items())


def _lines(axis: Axes, setting: str, by_loss: Mapping[str, Results], metric: str, chosen: Chosen) -> None:
    """A line for each loss; settings that are no numbers are one step apart."""
    every = _values([result for results in by_loss.values() for result in results], setting)
    numbers = all(isinstance(value, int | float) for value in every)
    for loss, results in by_loss.items():
        results = sorted(
            (result for result in results if result.finite(metric)), key=lambda r: every.index(r.setting(setting))
        )
        if results:
            x = [result.setting(setting) if numbers else every.index(result.setting(setting)) for result in results]
            mean, error = np.array([metrics.mean(result.values(metric)) for result in results]).T
            style = line(results[0], results)
            axis.errorbar(x, mean, np.nan_to_num(error), label=loss, marker="o", markersize=4, capsize=3, **style)
            stars = [i for i, result in enumerate(results) if _is_chosen(result, chosen.get(loss))]
            axis.plot([x[i] for i in stars], mean[stars], "*", color=style["color"], markersize=15)
    axis.set_xlabel(setting)
    if numbers and min(every) > 0:
        axis.set_xscale("log")
    axis.set_xticks(every if numbers else range(len(every)), [text(value) for value in every])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _baseline(axis: Axes, results: Results, metric: str) -> None:
    """A cross-entropy that was not swept, as a level line."""
    found = [result for result in results if result.loss == BASELINE and result.finite(metric)]
    if len(found) == 1:
        mean, error = np.nan_to_num(metrics.mean(found[0].values(metric)))
        axis.axhline(mean, color=COLORS[BASELINE], label=BASELINE)
        axis.axhspan(mean - error, mean + error, color=COLORS[BASELINE], alpha=0.2, linewidth=0)


def _heat_map(
    axis: Axes,
    down: str,
    right: str,
    results: Results,
    metric: str,
    colors: ScalarMappable,
    chosen: Mapping[str, Any] | None,
) -> None:
    """A cell for every pair of values, with its number; what was not run or has no number stays empty."""
    y, x = _values(results, down), _values(results, right)
    cells = np.full((len(y), len(x)), math.nan)
    for result in results:
        if result.finite(metric):
            i, j = y.index(result.setting(down)), x.index(result.setting(right))
            cells[i, j] = result.mean(metric)
            red, green, blue, _ = colors.to_rgba(cells[i, j])
            star = "★ " if _is_chosen(result, chosen) else ""
            axis.text(
                j,
                i,
                f"{star}{cells[i, j]:.3f}",
                color="white" if red + green + blue < 1.6 else "black",
                weight="bold" if star else None,
                ha="center",
                va="center",
                fontsize=9,
            )
    axis.imshow(cells, aspect="auto", norm=colors.norm, cmap=colors.cmap)
    axis.set(xlabel=right, ylabel=down, title=results[0].variant)
    axis.set_xticks(range(len(x)), [text(value) for value in x])
    axis.set_yticks(range(len(y)), [text(value) for value in y])
