"""The one picture that decides: HEM minus cross-entropy, everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hem_ext.harness.report.results import HEM, LEVEL, TUNED, Difference, Question, differences, hem_variants
from hem_ext.harness.report.style import COLORS, WIDTH
from hem_ext.harness.report.words import SHORT

LINEAR = 0.05  # where differences reach beyond twice that, the axis is logarithmic from there on


@dataclass(frozen=True)
class Line:
    """A line of the picture: a variant of HEM by one metric, or the heading above those of a task."""

    label: str
    loss: str = ""  # "" of a heading
    points: Sequence[tuple[str, Difference]] = ()  # protocol, and a difference that is above 0 where HEM is better


def make_lines(questions: Sequence[Question]) -> list[Line]:
    """From top to bottom. Left out are differences of fewer than two seeds, and HEM+ where it is the same network."""
    lines = []
    for question in questions:
        shown = {id(result) for results in question.protocols.values() for result, _ in hem_variants(results)}
        variants = {
            name: by_protocol
            for name, by_protocol in question.lines().items()
            if any(id(result) in shown for result in by_protocol.values())
        }
        found = []
        for quantity in question.quantities:
            for metric, short in quantity.metrics.items():
                compared = {name: differences(results, metric) for name, results in question.protocols.items()}
                title = ", ".join(part for part in (quantity.title, short) if part)
                for name, by_protocol in variants.items():
                    points = [
                        (protocol, _toward_better(compared[protocol][result.name], quantity.higher_is_better))
                        for protocol, result in by_protocol.items()
                        if result.name in compared[protocol]
                    ]
                    points = [(p, found) for p, found in points if found.seeds > 1 and not math.isnan(found.mean)]
                    label = title + ("" if quantity.higher_is_better else " ↓")
                    if points:
                        loss = next(iter(by_protocol.values())).loss
                        found.append(Line(label if list(variants) == [HEM[0]] else f"{label}, {name}", loss, points))
        if found:
            lines += [Line(f"{question.task}, {question.data}"), *found]
    return lines


def _toward_better(difference: Difference, higher_is_better: bool) -> Difference:
    if higher_is_better:
        return difference
    return difference._replace(mean=-difference.mean, low=-difference.high, high=-difference.low)


def draw(questions: Sequence[Question]) -> Figure | None:
    """A forest plot: a line for every task, data set, metric and variant of HEM, a mark for every protocol.

    Right is where HEM is better: a metric of which less is better has its sign turned. None where HEM and cross-entropy
    share two seeds nowhere.
    """
    lines = make_lines(questions)
    if not lines:
        return None
    figure = Figure(figsize=(WIDTH, 1.6 + 0.25 * len(lines)), layout="constrained")
    axis = figure.subplots()
    axis.axvspan(-LEVEL, LEVEL, color="#e4e4e4", zorder=0)
    axis.axvline(0, color="black", linewidth=1, zorder=1)
    protocols = list(dict.fromkeys(protocol for question in questions for protocol in question.protocols))
    for y, shown in enumerate(lines):
        if not shown.loss and y:
            axis.axhline(y - 0.5, color="#c8c8c8", linewidth=0.8, zorder=0)
        for protocol, found in shown.points:
            place = y + (0.22 if protocol == TUNED else -0.22) * (len(protocols) > 1)
            bars = None if math.isnan(found.low) else [[found.mean - found.low], [found.high - found.mean]]
            axis.errorbar(found.mean, place, xerr=bars, color=COLORS[shown.loss], capsize=2, **_marker(protocol))
    axis.set_yticks(range(len(lines)), [shown.label for shown in lines], fontsize=9)
    for label, shown in zip(axis.get_yticklabels(), lines, strict=True):
        label.set_weight("normal" if shown.loss else "bold")
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(lines) - 0.4, -0.6)
    notes = _scale(axis, [bound for shown in lines for _, d in shown.points for bound in (d.mean, d.low, d.high)])
    axis.grid(axis="x", alpha=0.3)
    if any("↓" in shown.label for shown in lines):
        notes.append("↓ less is better: the sign is turned, so that right is always better")
    heading = "← worse     HEM minus cross-entropy, mean and 95 % interval     better →"
    axis.set_xlabel("\n".join([heading, *notes]), fontsize=9)
    losses = dict.fromkeys(shown.loss for shown in lines if shown.loss)
    handles = [Line2D([], [], color=COLORS[loss], label=loss) for loss in losses] if len(losses) > 1 else []
    if len(protocols) > 1:
        handles += [Line2D([], [], color="#404040", label=SHORT.get(p, p), **_marker(p)) for p in protocols]
    handles.append(Patch(color="#e4e4e4", label=f"level, ± {LEVEL}"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9, frameon=False)
    return figure


def _marker(protocol: str) -> dict[str, Any]:
    """A full dot, or a hollow diamond for each loss's own best."""
    shape = {"marker": "D", "markerfacecolor": "white"} if protocol == TUNED else {"marker": "o"}
    return {"linestyle": "-", "linewidth": 1.5, "markersize": 5, **shape}


def _scale(axis: Axes, bounds: Sequence[float]) -> list[str]:
    """A linear axis, or where differences of a hundredth stand beside large ones, logarithmic outwards; says so."""
    reach = max(abs(bound) for bound in bounds if math.isfinite(bound))
    if reach <= 2 * LINEAR:
        reach = max(1.1 * reach, 2 * LEVEL)
        axis.set_xlim(-reach, reach)
        return []
    axis.set_xscale("symlog", linthresh=LINEAR, linscale=0.7)
    ticks = [tick for tick in (LINEAR, 0.1, 0.2, 0.5, 1.0) if tick < 1.2 * reach]
    places = [-tick for tick in reversed(ticks)] + [0.0] + ticks
    axis.set_xticks(places, [f"{place:+g}" if place else "0" for place in places], fontsize=9)
    axis.minorticks_off()
    axis.set_xlim(-1.2 * reach, 1.2 * reach)
    return [f"logarithmic beyond ± {LINEAR}"]
