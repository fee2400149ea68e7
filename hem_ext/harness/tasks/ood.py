"""Rejection of images of unknown classes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from hem_ext.harness import data
from hem_ext.harness.metrics import SCORES, Rejection, rejection
from hem_ext.harness.tasks.base import Cell, Metric, Task, Workbench, accuracy, images_of, labels_of
from hem_ext.harness.tasks.classification import Classification

HELD_OUT = "held out"  # the near set of classes that were not trained, whose AUROC is the near one already
SCALES = (0.01, 0.1, 10, 100)  # of the logits, which MSP depends on: losses differ in it
TITLES = {"max_logit": "MLS", "msp": "MSP", "energy": "energy", "entropy": "entropy"}


class OOD(Task):
    """Tell images of the known classes from images of unknown ones.

    The network is trained on the first `known` classes alone. Near: images of the other classes that were held out.
    Far: images of no class, :func:`hem_ext.harness.data.unknown_sets` made after the known ones that were held out.
    What is far is the mean over the sets, each the same weight, as OpenOOD has it (arXiv 2306.09301), and so is its
    FPR95: the unknown are the positive class.

    It is judged by AUROC and FPR95, near and far, of each of :data:`hem_ext.harness.metrics.SCORES`: losses differ in
    the scale of their logits, and what suits one score does not suit another.

    Settings are chosen by the validation images of the known classes against those of the other classes, which are the
    same classes as in the test: that favours whatever has more to choose. What is far is not looked at.

    Options: `known`, how many classes, six tenths of them if None; `unknown_data`, the name of another data set whose
    test images are a far set too, read from `unknown_root` or, without, from the root of the data; or ``"openood"``,
    with which near and far are the sets of OpenOOD's benchmark, all classes are known, and `unknown_root` is OpenOOD's
    folder of data. With all classes known and without OpenOOD, what is near is NaN.
    """

    name = "ood"
    metrics = {
        **{
            f"{where}_{quantity} {score}": Metric(f"{where} {quantity.upper()}, {title}", quantity == "auroc")
            for quantity in ("auroc", "fpr95")
            for where in ("near", "far")
            for score, title in TITLES.items()
        },
        "accuracy": Metric("accuracy on known classes"),
    }
    judged_by = tuple(name for name in metrics if name != "accuracy")
    losses = ("ce", "ce-ls", "hem", "mm", "logitnorm", "focal", "ngl")
    schedule, quick_schedule = Classification.schedule, Classification.quick_schedule
    options = {"known": None, "unknown_data": None, "unknown_root": None}
    optional = {"known": int, "unknown_data": str, "unknown_root": str}

    def check(self, cell: Cell) -> None:
        super().check(cell)
        known, num_classes = _known(cell), cell.load_data().num_classes
        if not 2 <= known <= num_classes:
            raise ValueError(f"known must be 2 to {num_classes} classes, got {known}")
        if cell.options["unknown_data"] == "openood":
            if known < num_classes:
                raise ValueError(f"OpenOOD takes every class as known: known={num_classes}")
            if (cell.options["unknown_root"] or cell.data_root) is None:
                raise ValueError("unknown_root must name OpenOOD's folder of data")
        if cell.part == "test":
            _from_elsewhere(cell)
        elif known == num_classes:
            raise ValueError(f"settings are chosen by classes that are not known, but all {known} are")

    def notes(self, cell: Cell) -> list[str]:
        none = _known(cell) == cell.load_data().num_classes and cell.options["unknown_data"] != "openood"
        return ["every class is known: there is nothing near to reject"] * none

    def measure(self, bench: Workbench) -> dict[str, float]:
        known = _known(bench.cell)
        train, validation = (part.take(labels_of(part) < known) for part in (bench.data.train, bench.data.validation))
        model, criterion = bench.classifier(
            what=f"the first {known} classes", train=train, validation=validation, num_classes=known
        )
        is_known = labels_of(bench.held_out) < known
        judged = bench.held_out.take(is_known)
        unknown = _unknown(bench, judged, bench.held_out.take(~is_known))
        outputs = bench.outputs(model, criterion, judged)
        near, far = (
            {name: bench.outputs(model, criterion, images) for name, images in sets.items()} for sets in unknown
        )
        found = {
            (where, score): _mean_rejection(SCORES[score], outputs, list(sets.values()))
            for where, sets in (("near", near), ("far", far))
            for score in SCORES
        }
        every = {
            f"{where}_{quantity} {score}": getattr(rejection, quantity)
            for (where, score), rejection in found.items()
            for quantity in Rejection._fields
        }
        every["accuracy"] = accuracy(outputs, labels_of(judged))
        for scale in SCALES:
            measure = functools.partial(_scaled_msp, scale=scale)
            for where, sets in (("near", near), ("far", far)):
                rejection = _mean_rejection(measure, outputs, list(sets.values()))
                every[f"{where}_auroc msp of logits times {scale:g}"] = rejection.auroc
        declared = {name: every.pop(name) for name in self.metrics}
        by_set = {
            f"auroc {score}, {name}": _mean_rejection(SCORES[score], outputs, [images]).auroc
            for score in SCORES
            for name, images in {**near, **far}.items()
            if name != HELD_OUT
        }
        return {**declared, **every, **by_set}


def _known(cell: Cell) -> int:
    known = cell.options["known"]
    if known is not None:
        return known
    num_classes = cell.load_data().num_classes
    return num_classes if cell.options["unknown_data"] == "openood" else max(2, round(0.6 * num_classes))


def _scaled_msp(logits: Tensor, scale: float) -> Tensor:
    return SCORES["msp"](scale * logits)


def _mean_rejection(measure: Callable[[Tensor], Tensor], known: Tensor, unknown: Sequence[Tensor]) -> Rejection:
    """The mean over unknown sets, NaN if there is none, from the outputs of the network."""
    found = [rejection(measure(known), measure(outputs)) for outputs in unknown] or [[np.nan] * len(Rejection._fields)]
    return Rejection(*np.mean(found, axis=0).tolist())


Sets = Mapping[str, Dataset | Tensor]


def _unknown(bench: Workbench, known: Dataset, others: Dataset) -> tuple[Sets, Sets]:
    """What is near and what is far, by name."""
    near = {HELD_OUT: others} if len(others) else {}
    if bench.cell.part != "test":
        return near, {}
    elsewhere = _from_elsewhere(bench.cell)
    if bench.options["unknown_data"] == "openood":
        return elsewhere
    return near, {**data.unknown_sets(images_of(known)), **elsewhere[1]}


def _from_elsewhere(cell: Cell) -> tuple[Sets, Sets]:
    """What is near and what is far of other data sets than the cell's; errors where they are not as they should be."""
    name, shape = cell.options["unknown_data"], cell.load_data().train[0][0].shape
    if name is None:
        return {}, {}
    root = cell.options["unknown_root"] or cell.data_root
    if name == "openood":
        return data.openood(Path(root), cell.data, size=shape[-1])
    found = data.load(name, None if root is None else Path(root))
    other = found.train[0][0].shape
    if other != shape:
        raise ValueError(f"the images of {name} are {tuple(other)}, those of {cell.data} {tuple(shape)}")
    return {}, {name: found.test}
