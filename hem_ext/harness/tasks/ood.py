"""Rejection of images of unknown classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from hem_ext.harness import data
from hem_ext.harness.metrics import SCORES, Rejection, rejection
from hem_ext.harness.tasks.base import PAPER_LOSSES, Cell, Metric, Task, Workbench, accuracy, images_of, labels_of
from hem_ext.harness.tasks.classification import Classification

HELD_OUT = "held out"  # the near set of classes that were not trained, whose AUROC is the near one already


class OOD(Task):
    """Tell test images of the known classes from images of unknown ones, by the largest logit (MLS).

    The network is trained on the first `known` classes alone. Near: test images of the other classes. Far: images of
    no class, :func:`hem_ext.harness.data.unknown_sets` made after the known test images. What is far is the mean over
    the sets, each the same weight, as OpenOOD has it (arXiv 2306.09301), and so is its FPR95: the unknown are the
    positive class. The other scores are given as values of their own: ``near_auroc msp`` ...

    It is judged by the AUROC near, and as much by that far: losses that gain at one lose at the other.

    Options: `known`, how many classes; `unknown_data`, the name of another data set whose test images are a far set
    too, read from `unknown_root` or, without, from the root of the data; or ``"openood"``, with which near and far are
    the sets of OpenOOD's benchmark, all classes are known, and `unknown_root` is OpenOOD's folder of data. With all
    classes known and without OpenOOD, what is near is NaN.
    """

    name = "ood"
    metrics = {
        "near_auroc": Metric("near AUROC"),
        "far_auroc": Metric("far AUROC"),
        "near_fpr95": Metric("near FPR95, OOD positive", higher_is_better=False),
        "far_fpr95": Metric("far FPR95, OOD positive", higher_is_better=False),
        "near_aupr_known": Metric("near AUPR, known positive"),
        "far_aupr_known": Metric("far AUPR, known positive"),
        "near_aupr_unknown": Metric("near AUPR, OOD positive"),
        "far_aupr_unknown": Metric("far AUPR, OOD positive"),
        "accuracy": Metric("accuracy on known classes"),
    }
    losses = PAPER_LOSSES
    schedule, quick_schedule = Classification.schedule, Classification.quick_schedule
    options = {"known": 6, "unknown_data": None, "unknown_root": None}

    def check(self, cell: Cell) -> None:
        super().check(cell)
        known, num_classes = cell.options["known"], cell.load_data().num_classes
        if not 2 <= known <= num_classes:
            raise ValueError(f"known must be 2 to {num_classes} classes, got {known}")
        if cell.options["unknown_data"] == "openood":
            if known < num_classes:
                raise ValueError(f"OpenOOD takes every class as known: known={num_classes}")
            if (cell.options["unknown_root"] or cell.data_root) is None:
                raise ValueError("unknown_root must name OpenOOD's folder of data")

    def measure(self, bench: Workbench) -> dict[str, float]:
        known = bench.options["known"]
        train, test = bench.data.train, bench.data.test
        is_known = labels_of(test) < known
        known_test = test.take(is_known)
        unknown = _unknown(bench, known_test, test.take(~is_known))
        model, criterion = bench.classifier(
            what=f"the first {known} classes",
            train=train.take(labels_of(train) < known),
            test=known_test,
            num_classes=known,
        )

        outputs = bench.outputs(model, criterion, known_test)
        near, far = (
            {name: bench.outputs(model, criterion, images) for name, images in sets.items()} for sets in unknown
        )
        by_score = {
            score: tuple(_mean_rejection(score, outputs, list(sets.values())) for sets in (near, far))
            for score in SCORES
        }
        near_mls, far_mls = by_score.pop("max_logit")
        return {
            "near_auroc": near_mls.auroc,
            "far_auroc": far_mls.auroc,
            "near_fpr95": near_mls.fpr95,
            "far_fpr95": far_mls.fpr95,
            "near_aupr_known": near_mls.aupr_known,
            "far_aupr_known": far_mls.aupr_known,
            "near_aupr_unknown": near_mls.aupr_unknown,
            "far_aupr_unknown": far_mls.aupr_unknown,
            "accuracy": accuracy(outputs, labels_of(known_test)),
            **{f"near_auroc {score}": of_near.auroc for score, (of_near, _) in by_score.items()},
            **{f"far_auroc {score}": of_far.auroc for score, (_, of_far) in by_score.items()},
            **{
                f"auroc {name}": _mean_rejection("max_logit", outputs, [found]).auroc
                for name, found in {**near, **far}.items()
                if name != HELD_OUT
            },
        }


def _mean_rejection(score: str, known: Tensor, unknown: Sequence[Tensor]) -> Rejection:
    """The mean over unknown sets, NaN if there is none, from the outputs of the network."""
    measure = SCORES[score]
    found = [rejection(measure(known), measure(outputs)) for outputs in unknown] or [[np.nan] * len(Rejection._fields)]
    return Rejection(*np.mean(found, axis=0).tolist())


Sets = Mapping[str, Dataset | Tensor]


def _unknown(bench: Workbench, known_test: Dataset, held_out: Dataset) -> tuple[Sets, Sets]:
    """What is near and what is far, by name."""
    name, shape = bench.options["unknown_data"], known_test[0][0].shape
    root = bench.options["unknown_root"] or bench.cell.data_root
    if name == "openood":
        return data.openood(Path(root), bench.cell.data, size=shape[-1])
    near = {HELD_OUT: held_out} if len(held_out) else {}
    far: dict[str, Dataset | Tensor] = dict(data.unknown_sets(images_of(known_test)))
    if name is not None:
        far[name] = data.load(name, None if root is None else Path(root)).test
        found = far[name][0][0].shape
        if found != shape:
            raise ValueError(f"the images of {name} are {tuple(found)}, those of {bench.cell.data} {tuple(shape)}")
    return near, far
