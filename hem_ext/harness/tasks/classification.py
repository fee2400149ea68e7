"""Plain classification, and what the features are like."""

from __future__ import annotations

from contextlib import suppress

from hem_ext.harness import metrics
from hem_ext.harness.data import Split
from hem_ext.harness.models import penultimate_features
from hem_ext.harness.tasks.base import Cell, DivergedError, Metric, Task, Workbench, accuracy, labels_of
from hem_ext.harness.training import Schedule


class Classification(Task):
    """Accuracy and calibration on images that were held out, and two properties of the penultimate features.

    Class separation and transfer are Kornblith et al.'s (arXiv 2010.16402): losses that separate the training classes
    further tend to transfer worse. Transfer is the accuracy of a linear probe that learns the second half of the
    classes from features of a network that was trained on the first half; with fewer than four classes it is NaN.

    Options: `transfer`, whether to train that second network.
    """

    name = "classification"
    metrics = {
        "accuracy": Metric("accuracy"),
        "ece": Metric("calibration error", higher_is_better=False),
        "separation": Metric("class separation"),
        "transfer": Metric("linear transfer"),
    }
    losses = ("ce", "ce-ls", "hem", "mm", "logitnorm", "focal", "ngl", "cosine-softmax", "sigmoid", "dropout")
    schedule = Schedule(epochs=16, batch_size=32, max_lr=0.3)
    quick_schedule = Schedule(epochs=2, batch_size=64, max_lr=0.1)
    options = {"transfer": True}

    def epochs(self, cell: Cell) -> int:
        return cell.schedule.epochs * (2 if self._transfers(cell) else 1)

    def notes(self, cell: Cell) -> list[str]:
        left_out = cell.options["transfer"] and not self._transfers(cell)
        return ["linear transfer needs at least four classes, two to learn and two to transfer to"] * left_out

    def _transfers(self, cell: Cell) -> bool:
        return cell.options["transfer"] and cell.load_data().num_classes >= 4

    def measure(self, bench: Workbench) -> dict[str, float]:
        model, criterion = bench.classifier()
        transfer = float("nan")
        if self._transfers(bench.cell):
            with suppress(DivergedError):
                transfer = _transfer(bench)
        outputs, labels = bench.outputs(model, criterion, bench.held_out), labels_of(bench.held_out)
        return {
            "accuracy": accuracy(outputs, labels),
            "ece": metrics.expected_calibration_error(outputs, labels),
            "separation": metrics.class_separation(penultimate_features(model, bench.held_out), labels),
            "transfer": transfer,
        }


def _transfer(bench: Workbench) -> float:
    half = bench.data.num_classes // 2
    first, train = _halves(bench.data.train, half)
    validation, _ = _halves(bench.data.validation, half)
    model, _ = bench.classifier(what=f"the first {half} classes", train=first, validation=validation, num_classes=half)
    _, judged = _halves(bench.held_out, half)
    features = [penultimate_features(model, part) for part in (train, judged)]
    return metrics.linear_probe(features[0], labels_of(train), features[1], labels_of(judged)).test


def _halves(split: Split, half: int) -> tuple[Split, Split]:
    first = labels_of(split) < half
    return split.take(first), split.take(~first)
