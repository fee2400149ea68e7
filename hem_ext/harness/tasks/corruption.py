"""Classification of corrupted images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hem_ext.harness.corruptions import CORRUPTIONS
from hem_ext.harness.data import Split, load_corrupted
from hem_ext.harness.tasks.base import Cell, Metric, Task, Workbench, accuracy, images_of, labels_of
from hem_ext.harness.tasks.classification import Classification

CLEAN = {"cifar10-c": "cifar10", "mnist-c": "mnist"}
"""Which data set each set of corrupted test images is of."""


class Corruption(Task):
    """Accuracy on corrupted images, the mean over corruptions and severities, of a network trained on clean ones.

    The network is that of :class:`Classification`. The corruptions are those of :mod:`hem_ext.harness.corruptions`,
    the same images for every loss and seed, or with `corrupted` those of CIFAR-10-C (Hendrycks & Dietterich,
    arXiv 1903.12261) or MNIST-C (Mu & Gilmer, arXiv 1906.02337), read from the root of the data. It is a plain mean:
    the mean corruption error would divide by published errors of a network that is none of ours.

    Options: `corrupted`, ``"cifar10-c"`` or ``"mnist-c"``; `severities`, of our own corruptions.
    """

    name = "corruption"
    metrics = {"mean_accuracy": Metric("mean corrupted accuracy"), "clean_accuracy": Metric("clean accuracy")}
    losses = ("ce", "ce-ls", "hem", "mm", "logitnorm", "focal", "ngl")
    schedule, quick_schedule = Classification.schedule, Classification.quick_schedule
    options = {"corrupted": None, "severities": [1, 2, 3, 4, 5]}
    optional = {"corrupted": str}
    quick_options = {"severities": [3]}

    def cell(self, loss: str, seed: int, *, quick: bool = False, **given: Any) -> Cell:
        corrupted = (given.get("options") or {}).get("corrupted")
        if corrupted is not None:
            if corrupted not in list(CLEAN):  # whatever it is
                raise ValueError(f"corrupted must be one of {', '.join(CLEAN)}, got {corrupted!r}")
            if given.get("data") not in (None, CLEAN[corrupted]):
                raise ValueError(f"{corrupted} holds images of {CLEAN[corrupted]}, not of {given['data']}")
            given["data"] = CLEAN[corrupted]
        return super().cell(loss, seed, quick=quick, **given)

    def check(self, cell: Cell) -> None:
        super().check(cell)
        if cell.options["corrupted"] is not None:
            if cell.part != "test":
                raise ValueError(f"{cell.options['corrupted']} is made of test images: nothing can be chosen by it")
            next(load_corrupted(cell.options["corrupted"], Path(cell.data_root)))
        severities = cell.options["severities"]
        if not severities or not all(type(s) is int and 1 <= s <= 5 for s in severities):
            raise ValueError(f"severities must be a list of some of 1 to 5, got {severities!r}")

    def measure(self, bench: Workbench) -> dict[str, float]:
        model, criterion = bench.classifier()
        clean = accuracy(bench.outputs(model, criterion, bench.held_out), labels_of(bench.held_out))
        found: dict[str, list[float]] = {}
        for name, split in _corrupted(bench):
            found.setdefault(name, []).append(accuracy(bench.outputs(model, criterion, split), split.labels))
        return {
            "mean_accuracy": float(np.mean(np.concatenate(list(found.values())))),
            "clean_accuracy": clean,
            **{f"accuracy {name}": float(np.mean(values)) for name, values in found.items()},
        }


def _corrupted(bench: Workbench) -> Iterator[tuple[str, Split]]:
    """The name of a corruption and the test set under it, once for every severity."""
    if bench.options["corrupted"] is not None:
        for name, _, split in load_corrupted(bench.options["corrupted"], Path(bench.cell.data_root)):
            if name != "identity":  # MNIST itself
                yield name, split
        return
    images, labels = images_of(bench.held_out), labels_of(bench.held_out)
    for number, (name, corrupt) in enumerate(CORRUPTIONS.items()):
        for severity in bench.options["severities"]:
            generator = torch.Generator().manual_seed(100 * number + severity)
            yield name, Split(corrupt(images, severity, generator), labels)
