"""Learning a few classes at a time."""

from __future__ import annotations

import numpy as np

from hem_ext.harness import metrics
from hem_ext.harness.data import subset_by_counts
from hem_ext.harness.tasks.base import (
    PAPER_LOSSES,
    Cell,
    DivergedError,
    Metric,
    Task,
    Workbench,
    class_counts,
    labels_of,
)
from hem_ext.harness.training import Schedule


class Continual(Task):
    """Class-incremental learning: a few classes at a stage, in their numbers' order, with one head for all of them.

    Twice: naive, on each stage's own classes alone, and with replay, on these and a buffer of `replay` samples of the
    classes before, the same number of each, drawn by the seed. At a stage's end the network is tested without being
    told of which stage a sample is. It is judged by the average over stages of the accuracies in the end, with replay;
    forgetting is from the best accuracy that a stage's classes ever had (Chaudhry et al.,
    arXiv 1801.10112) or from that right after learning them (Lopez-Paz & Ranzato, arXiv 1706.08840).

    A loss is told each stage's own class counts, 1 for classes without a sample. Every stage is trained with the
    whole schedule anew, from the weights that the last one left.

    Options: `stages`, with the same number of classes each; `replay`, the size of the buffer.
    """

    name = "continual"
    metrics = {
        "average_accuracy": Metric("average accuracy, replay"),
        "forgetting": Metric("forgetting, replay", higher_is_better=False),
        "forgetting_from_learned": Metric("forgetting from learned, replay", higher_is_better=False),
        "average_accuracy_naive": Metric("average accuracy, naive"),
        "forgetting_naive": Metric("forgetting, naive", higher_is_better=False),
        "forgetting_from_learned_naive": Metric("forgetting from learned, naive", higher_is_better=False),
    }
    losses = PAPER_LOSSES
    schedule = Schedule(epochs=10, batch_size=64, max_lr=0.03)
    quick_schedule = Schedule(epochs=1, batch_size=64, max_lr=0.03)
    options = {"stages": 5, "replay": 200}

    def epochs(self, cell: Cell) -> int:
        return 2 * cell.options["stages"] * cell.schedule.epochs

    def measure(self, bench: Workbench) -> dict[str, float]:
        stages, num_classes = bench.options["stages"], bench.data.num_classes
        if stages < 2 or num_classes % stages:
            raise ValueError(f"{num_classes} classes cannot be learned in {stages} stages of as many classes each")
        replay, naive = (_accuracies(bench, buffer) for buffer in (bench.options["replay"], 0))
        result = {}
        for suffix, found in (("", replay), ("_naive", naive)):
            values = metrics.continual(found)
            result[f"average_accuracy{suffix}"] = values.average_accuracy
            result[f"forgetting{suffix}"] = values.forgetting_from_best
            result[f"forgetting_from_learned{suffix}"] = values.forgetting_from_learned
        names = ["+".join(group) for group in np.reshape(bench.data.classes, (stages, -1))]
        return result | {f"accuracy {name}": float(value) for name, value in zip(names, replay[-1], strict=True)}


def _accuracies(bench: Workbench, buffer: int) -> np.ndarray:
    """The accuracy after each stage (row) on each stage's classes (column); NaN if the training diverged."""
    train, test, stages = bench.data.train, bench.data.test, bench.options["stages"]
    num_classes = bench.data.num_classes
    each = num_classes // stages
    available, labels = class_counts(train, num_classes), labels_of(test)
    result = np.full((stages, stages), np.nan)
    model = None
    for stage in range(stages):
        old = stage * each
        kept = buffer // max(old, 1)
        counts = [min(n, kept) if c < old else n if c < old + each else 0 for c, n in enumerate(available)]
        criterion = bench.criterion(num_classes, [max(count, 1) for count in counts])
        if model is None:
            model = bench.model(num_classes, bench.data.channels, criterion.head)
        # The draw is the same for every stage: what is kept of a class later is part of what was kept before.
        part = subset_by_counts(train, counts, bench.cell.seed)
        # The first stage has nothing to replay, and is the same with and without.
        what = ["class-incremental", stages, stage, buffer if stage else 0]
        try:
            bench.train(model, criterion, part, what=what)
            right = bench.outputs(model, criterion, test).argmax(1) == labels
        except DivergedError:
            return np.full_like(result, np.nan)
        for learned in range(stages):
            result[stage, learned] = right[labels // each == learned].double().mean().item()
    return result
