"""Plain classification, and what the features are like."""

from __future__ import annotations

from hem_ext.harness import metrics
from hem_ext.harness.data import Split
from hem_ext.harness.losses import LOSSES
from hem_ext.harness.models import penultimate_features
from hem_ext.harness.tasks.base import Cell, Metric, Task, Workbench, labels_of
from hem_ext.harness.training import Schedule, predict_logits


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
    schedule = Schedule(epochs=12, batch_size=64, max_lr=0.1)
    quick_schedule = Schedule(epochs=2, batch_size=64, max_lr=0.1)
    options = {"transfer": True}

    def epochs(self, cell: Cell) -> int:
        return cell.schedule.epochs * (2 if cell.options["transfer"] else 1)

    def run(self, bench: Workbench) -> dict[str, float]:
        model, criterion = bench.classifier()
        test, accelerator = bench.data.test, bench.accelerator
        logits = criterion.outputs(predict_logits(model, test, accelerator))
        labels = labels_of(test)
        result = {
            "accuracy": (logits.argmax(1) == labels).double().mean().item(),
            "ece": metrics.expected_calibration_error(logits, labels),
            "separation": metrics.class_separation(penultimate_features(model, test), labels),
            "transfer": float("nan"),
        }
        if bench.options["transfer"]:
            half = bench.data.num_classes // 2
            first, _ = _halves(bench.data.train, half)
            model, _ = bench.classifier(
                what=f"the first {half} classes", train=first, test=_halves(test, half)[0], num_classes=half
            )
            train, test = (_halves(split, half)[1] for split in (bench.data.train, bench.data.test))
            features = [penultimate_features(model, split) for split in (train, test)]
            result["transfer"] = metrics.linear_probe(features[0], train.labels, features[1], test.labels).test
        return result


def _halves(split: Split, half: int) -> tuple[Split, Split]:
    first = split.labels < half
    return split.take(first), split.take(~first)
