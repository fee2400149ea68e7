"""Classification after training with few samples of some classes."""

from __future__ import annotations

from hem_ext.harness.data import exponential_counts, step_counts, subset_by_counts
from hem_ext.harness.metrics import group_accuracies
from hem_ext.harness.tasks.base import (
    Cell,
    Metric,
    Task,
    Workbench,
    accuracy,
    class_counts,
    labels_of,
)
from hem_ext.harness.training import Schedule

PROFILES = {"exponential": exponential_counts, "step": step_counts}


class Imbalanced(Task):
    """Accuracy on the whole, balanced set that was held out, after training on a long tail of classes.

    The training set keeps `largest` samples of the first class and that times `factor` of the last, in between as
    LDAM-DRW has it (Cao et al., arXiv 1906.07413); which ones, the seed decides, the same for every loss. It is judged
    by the accuracy over all classes. Those of the classes with many (> 100), medium and few (< 20) training samples
    (Liu et al., arXiv 1904.05160) are NaN where a group is empty. The validation part that settings are chosen by is
    balanced too.

    Options: `factor`, the inverse of the imbalance ratio; `profile`, ``"exponential"`` or ``"step"``; `largest`, as
    many as there are of the rarest class if None.
    """

    name = "imbalanced"
    metrics = {
        "accuracy": Metric("accuracy"),
        "many": Metric("accuracy, many (> 100)"),
        "medium": Metric("accuracy, medium"),
        "few": Metric("accuracy, few (< 20)"),
    }
    losses = ("ce", "hem", "hem+", "mm", "logitnorm", "logit-adjusted", "ldam")
    schedule = Schedule(epochs=64, batch_size=32, max_lr=0.3)
    quick_schedule = Schedule(epochs=4, batch_size=64, max_lr=0.1)
    options = {"factor": 0.02, "profile": "exponential", "largest": None}
    optional = {"largest": int}

    def check(self, cell: Cell) -> None:
        super().check(cell)
        if cell.options["profile"] not in PROFILES:
            raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {cell.options['profile']!r}")
        _counts(cell)

    def measure(self, bench: Workbench) -> dict[str, float]:
        counts = _counts(bench.cell)
        model, criterion = bench.classifier(
            what=["long tail", counts], train=subset_by_counts(bench.data.train, counts, bench.cell.seed)
        )
        outputs, labels = bench.outputs(model, criterion, bench.held_out), labels_of(bench.held_out)
        groups = group_accuracies(outputs.argmax(1), labels, counts)
        return {"accuracy": accuracy(outputs, labels), **groups._asdict()}


def _counts(cell: Cell) -> list[int]:
    """Training samples of each class."""
    found, options = cell.load_data(), cell.options
    available = class_counts(found.train, found.num_classes)
    largest = options["largest"] or min(available)
    counts = PROFILES[options["profile"]](largest, found.num_classes, options["factor"])
    if any(wanted > have for wanted, have in zip(counts, available, strict=True)):
        raise ValueError(f"largest asks for classes of {counts} training samples, but they have {available}")
    return counts
