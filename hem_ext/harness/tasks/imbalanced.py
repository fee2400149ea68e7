"""Classification after training with few samples of some classes."""

from __future__ import annotations

from typing import Any

from hem_ext.harness.data import exponential_counts, step_counts, subset_by_counts
from hem_ext.harness.metrics import group_accuracies
from hem_ext.harness.tasks.base import (
    PAPER_LOSSES,
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
    """Accuracy on the whole test set, after training on a long tail of classes.

    The training set keeps `largest` samples of the first class and that times `factor` of the last, in between as
    LDAM-DRW has it (Cao et al., arXiv 1906.07413); which ones, the seed decides, the same for every loss. It is judged
    by the accuracy over all classes. Those of the classes with many (> 100), medium and few (< 20) training samples
    (Liu et al., arXiv 1904.05160) are NaN where a group is empty.

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
    losses = (*PAPER_LOSSES, "ldam")
    schedule = Schedule(epochs=24, batch_size=64, max_lr=0.1)
    quick_schedule = Schedule(epochs=4, batch_size=64, max_lr=0.1)
    options = {"factor": 0.1, "profile": "exponential", "largest": 120}

    def cell(self, loss: str, seed: int, *, quick: bool = False, **given: Any) -> Cell:
        if given.get("data") not in (None, self.data):
            given["options"] = {"largest": None, **(given.get("options") or {})}  # 120 is for the digits
        return super().cell(loss, seed, quick=quick, **given)

    def measure(self, bench: Workbench) -> dict[str, float]:
        train, test, options = bench.data.train, bench.data.test, bench.options
        if options["profile"] not in PROFILES:
            raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {options['profile']!r}")
        largest = options["largest"] or min(class_counts(train, bench.data.num_classes))
        counts = PROFILES[options["profile"]](largest, bench.data.num_classes, options["factor"])
        model, criterion = bench.classifier(
            what=["long tail", counts], train=subset_by_counts(train, counts, bench.cell.seed)
        )
        outputs, labels = bench.outputs(model, criterion, test), labels_of(test)
        groups = group_accuracies(outputs.argmax(1), labels, counts)
        return {"accuracy": accuracy(outputs, labels), **groups._asdict()}
