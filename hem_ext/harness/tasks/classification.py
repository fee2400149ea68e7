"""Plain classification, and what the features are like."""

from __future__ import annotations

from contextlib import suppress

from hem_ext.harness import metrics
from hem_ext.harness.data import Split
from hem_ext.harness.losses import LOSSES
from hem_ext.harness.models import penultimate_features
from hem_ext.harness.tasks.base import Cell, DivergedError, Metric, Task, Workbench, accuracy, labels_of
from hem_ext.harness.training import Schedule


class Classification(Task):
    """Accuracy and calibration on the test set, and two properties of the penultimate features.

    Class separation and transfer are Kornblith et al.'s (arXiv 2010.16402): losses that separate the training classes
    further tend to transfer worse. Transfer is the accuracy of a linear probe that learns the second half of the
    classes from features of a network that was trained on the first half.
    """

    name = "classification"
    metrics = {
        "accuracy": Metric("accuracy"),
        "ece": Metric("calibration error", higher_is_better=False),
        "separation": Metric("class separation"),
        "transfer": Metric("linear transfer"),
    }
    losses = tuple(name for name in LOSSES if name not in ("dice", "squared-error"))
    schedule = Schedule(epochs=20, batch_size=64, max_lr=0.1)
    quick_schedule = Schedule(epochs=2, batch_size=64, max_lr=0.1)
    options = {"transfer": True}

    def epochs(self, cell: Cell) -> int:
        return cell.schedule.epochs * (2 if cell.options["transfer"] else 1)

    def measure(self, bench: Workbench) -> dict[str, float]:
        model, criterion = bench.classifier()
        test = bench.data.test
        outputs, labels = bench.outputs(model, criterion, test), labels_of(test)
        result = {
            "accuracy": accuracy(outputs, labels),
            "ece": metrics.expected_calibration_error(outputs, labels),
            "separation": metrics.class_separation(penultimate_features(model, test), labels),
            "transfer": float("nan"),
        }
        if bench.options["transfer"]:
            with suppress(DivergedError):
                result["transfer"] = _transfer(bench)
        return result


def _transfer(bench: Workbench) -> float:
    train, test, half = bench.data.train, bench.data.test, bench.data.num_classes // 2
    first, second = zip(_halves(train, half), _halves(test, half), strict=True)
    model, _ = bench.classifier(what=f"the first {half} classes", train=first[0], test=first[1], num_classes=half)
    features = [penultimate_features(model, part) for part in second]
    return metrics.linear_probe(features[0], second[0].labels, features[1], second[1].labels).test


def _halves(split: Split, half: int) -> tuple[Split, Split]:
    first = split.labels < half
    return split.take(first), split.take(~first)
