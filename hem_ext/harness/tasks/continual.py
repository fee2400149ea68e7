"""Learning a few classes at a time."""

from __future__ import annotations

import copy

import numpy as np
from torch import nn

from hem_ext.harness import metrics
from hem_ext.harness.data import subset_by_counts
from hem_ext.harness.losses import Loss
from hem_ext.harness.tasks.base import (
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

    Options: `stages`, with the same number of classes each, if None five or the divisor of the number of classes that
    is nearest, with two classes or more a stage where that is possible; `replay`, the size of the buffer.
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
    judged_by = ("average_accuracy", "forgetting")
    losses = ("ce", "hem", "hem+", "mm", "logitnorm")
    schedule = Schedule(epochs=10, batch_size=16, max_lr=0.1)
    quick_schedule = Schedule(epochs=1, batch_size=64, max_lr=0.03)
    options = {"stages": None, "replay": 200}
    optional = {"stages": int}

    def epochs(self, cell: Cell) -> int:
        return 2 * _stages(cell) * cell.schedule.epochs

    def check(self, cell: Cell) -> None:
        super().check(cell)
        if cell.options["replay"] < 0:
            raise ValueError(f"replay must be 0 samples or more, got {cell.options['replay']}")
        stages, num_classes = _stages(cell), cell.load_data().num_classes
        if stages < 2 or num_classes % stages:
            raise ValueError(f"{num_classes} classes cannot be learned in {stages} stages of as many classes each")

    def measure(self, bench: Workbench) -> dict[str, float]:
        stages = _stages(bench.cell)
        learned = [_train_stages(bench, buffer) for buffer in (bench.options["replay"], 0)]
        replay, naive = (_accuracies(bench, after_each) for after_each in learned)
        result = {}
        for suffix, found in (("", replay), ("_naive", naive)):
            values = metrics.continual(found)
            result[f"average_accuracy{suffix}"] = values.average_accuracy
            result[f"forgetting{suffix}"] = values.forgetting_from_best
            result[f"forgetting_from_learned{suffix}"] = values.forgetting_from_learned
        names = ["+".join(group) for group in np.reshape(bench.data.classes, (stages, -1))]
        return result | {f"accuracy {name}": float(value) for name, value in zip(names, replay[-1], strict=True)}


def _stages(cell: Cell) -> int:
    if cell.options["stages"] is not None:
        return cell.options["stages"]
    num_classes = cell.load_data().num_classes
    divisors = [d for d in range(2, num_classes // 2 + 1) if num_classes % d == 0] or [num_classes]
    return min(divisors, key=lambda d: abs(d - 5))


Learned = list[tuple[nn.Module, Loss]]  # the network as it was after each stage, and its loss


def _train_stages(bench: Workbench, buffer: int) -> Learned:
    """Empty if a training diverged."""
    train, stages, num_classes = bench.data.train, _stages(bench.cell), bench.data.num_classes
    each, available = num_classes // stages, class_counts(train, num_classes)
    learned: Learned = []
    for stage in range(stages):
        old = stage * each
        kept = buffer // max(old, 1)
        counts = [min(n, kept) if c < old else n if c < old + each else 0 for c, n in enumerate(available)]
        criterion = bench.criterion(num_classes, [max(count, 1) for count in counts])
        model = copy.deepcopy(learned[-1][0]) if learned else bench.model(num_classes, criterion.head)
        # The draw is the same for every stage: what is kept of a class later is part of what was kept before.
        part = subset_by_counts(train, counts, bench.cell.seed)
        try:
            # The first stage has nothing to replay, and is the same with and without.
            bench.train(model, criterion, part, what=["class-incremental", stages, stage, buffer if stage else 0])
        except DivergedError:
            return []
        learned.append((model, criterion))
    return learned


def _accuracies(bench: Workbench, learned: Learned) -> np.ndarray:
    """The accuracy after each stage (row) on each stage's classes (column); NaN if the training diverged."""
    stages, each = _stages(bench.cell), bench.data.num_classes // _stages(bench.cell)
    result = np.full((stages, stages), np.nan)
    labels = labels_of(bench.held_out)
    for stage, (model, criterion) in enumerate(learned):
        try:
            right = bench.outputs(model, criterion, bench.held_out).argmax(1) == labels
        except DivergedError:
            return np.full_like(result, np.nan)
        for seen in range(stages):
            result[stage, seen] = right[labels // each == seen].double().mean().item()
    return result
