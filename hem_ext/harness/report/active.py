"""The share of active samples, those with a gradient, while HEM trains: a picture of all tasks, and what it shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from hem_ext.harness.report.results import HEM, Curves, Question, Result, Results, histories
from hem_ext.harness.report.style import by_epoch, few, legend, line, panels
from hem_ext.harness.report.words import digits, where
from hem_ext.harness.tasks import TASKS


class Panel(NamedTuple):
    """What one task shows."""

    title: str
    shares: dict[Result, list[list[float]]]  # of HEM's results -> of every seed, of every epoch
    results: Results  # of all losses


def draw(questions: Sequence[Question], curves: Curves) -> Figure | None:
    """The share by epoch, a panel for every task; None where HEM left no curves.

    It is of the first protocol that there are curves of.
    """
    found = list(_panels(questions, curves))
    if not found:
        return None
    figure, axes = panels(len(found))
    for axis, panel in zip(axes, found, strict=False):
        begins = set()
        for result, shares in panel.shares.items():
            begins |= by_epoch(axis, shares, result.settings["epochs"], result.name, line(result, panel.results))
        axis.set_title(panel.title, fontsize=11)
        axis.set_xlabel("epoch" + (", dotted: a new training" if len(begins) > 1 else ""))
        axis.set_ylim(0, 1.03)
    names = {result.name: result for panel in found for result in panel.shares}
    legend(figure, axes, list(names.values()))
    figure.suptitle("Share of training samples with a gradient: mean over seeds, and all of them", fontsize=11)
    return figure


def sentences(questions: Sequence[Question], curves: Curves) -> list[str]:
    """The mean share over all epochs, and that in the last epoch of each training; a line for every task."""
    found = []
    for title, shares, _ in _panels(questions, curves):
        said = []
        for result, of_seeds in shares.items():
            epochs = result.settings["epochs"]
            mean = np.mean([np.mean(of_seed) for of_seed in of_seeds])
            end = np.mean([np.mean(of_seed[epochs - 1 :: epochs]) for of_seed in of_seeds])
            said.append(f"`{result.name}` {digits(mean)} over the training, {digits(end)} at the end")
        found.append(f"**{title}**: {'; '.join(said)}")
    return found


def _panels(questions: Sequence[Question], curves: Curves) -> Iterator[Panel]:
    for question in questions:
        for protocol, results in question.protocols.items():
            shares = {}
            for result in few(question, results):
                of_seeds = histories(result, curves) if result.loss in HEM else []
                of_seeds = [[epoch["active"] for epoch in history] for history in of_seeds if history]
                if of_seeds:
                    shares[result] = of_seeds
            if shares:
                what = ", pixels" if TASKS[question.task].label_dims else ""
                yield Panel(question.name + where(question, protocol) + what, shares, results)
                break
