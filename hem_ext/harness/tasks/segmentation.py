"""Semantic segmentation."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from hem_ext.harness import metrics
from hem_ext.harness.data import ON_DISK, Data
from hem_ext.harness.losses import LOSSES, Loss
from hem_ext.harness.tasks.base import Cell, Metric, Task, Workbench
from hem_ext.harness.training import Schedule, confusion_matrix


class Segmentation(Task):
    """Mean intersection over union on the whole set that was held out, as mmsegmentation counts it.

    The paper's margin rule does not say what a sample of a class is here. ``hem`` gets one fixed margin; ``hem+``
    applies the rule to the number of images that hold the class, or to its pixels (`margin_counts`). Priors are shares
    of pixels. Data sets on disk are trained with the poly policy unless another is given.

    Options: `margin_counts`, ``"images"`` or ``"pixels"``.
    """

    name = "segmentation"
    metrics = {
        "mean_iou": Metric("mean IoU"),
        "mean_accuracy": Metric("mean accuracy"),
        "accuracy": Metric("pixel accuracy"),
        "boundary_f1": Metric("boundary F1"),
    }
    data, quick_data = "mnist-scenes", "digit-scenes"
    label_dims = 2
    losses = ("ce", "hem", "hem+", "logitnorm", "dice")
    schedule = Schedule(epochs=16, batch_size=4, max_lr=0.8)
    quick_schedule = Schedule(epochs=2, batch_size=10, max_lr=0.2)
    options = {"margin_counts": "images", "data_options": {}}
    quick_options = {"data_options": {"num_train": 60, "num_validation": 10, "num_test": 20}}
    constants = {"hem": {"margin": 0.5}}

    def cell(self, loss: str, seed: int, *, quick: bool = False, **given: Any) -> Cell:
        if given.get("data") in ON_DISK and given.get("policy") is None:
            given["policy"] = "poly"
        return super().cell(loss, seed, quick=quick, **given)

    def check(self, cell: Cell) -> None:
        super().check(cell)
        if cell.options["margin_counts"] not in ("images", "pixels"):
            raise ValueError(f"margin_counts must be 'images' or 'pixels', got {cell.options['margin_counts']!r}")

    def measure(self, bench: Workbench) -> dict[str, float]:
        found = bench.data
        counts = None
        if LOSSES[bench.cell.loss].needs_class_counts():
            images, pixels = class_presence(found.train, found.num_classes)
            by_images = bench.cell.loss == "hem+" and bench.options["margin_counts"] == "images"
            counts = [max(c, 1) for c in (images if by_images else pixels)]
        criterion = bench.criterion(found.num_classes, counts, found.ignore_index)
        model = bench.model(found.num_classes, criterion.head, segmentation=True)

        def confusion(model: nn.Module, images: Dataset) -> torch.Tensor:
            return confusion_matrix(
                model,
                images,
                found.num_classes,
                ignore_index=found.ignore_index,
                outputs=criterion.outputs,
                accelerator=bench.accelerator,
                batch_size=10 if isinstance(getattr(images, "images", None), torch.Tensor) else 1,
            )

        def evaluate(model: nn.Module) -> dict[str, float]:
            return {"mean_iou": metrics.segmentation(confusion(model, found.validation)).mean_iou}

        what = ["all of it", bench.options["margin_counts"]]
        bench.train(model, criterion, found.train, what=what, evaluate=evaluate)
        held_out = bench.held_out
        result = metrics.segmentation(confusion(model, held_out))
        shown = [held_out[i] for i in range(min(5, len(held_out)))]
        height, width = (min(labels.shape[d] for _, labels in shown) for d in (0, 1))
        pictures = {
            "images": [image for image, _ in shown],
            "labels": [labels for _, labels in shown],
            "predicted": [_predict(model, criterion, image)[0] for image, _ in shown],
        }
        # Pictures of several sizes are shown as far as they all reach.
        bench.pictures = {name: torch.stack([x[..., :height, :width] for x in xs]) for name, xs in pictures.items()}
        classes = {f"iou {name}": value for name, value in zip(found.classes, result.iou, strict=True)}
        return {
            "mean_iou": result.mean_iou,
            "mean_accuracy": result.mean_accuracy,
            "accuracy": result.accuracy,
            "boundary_f1": _boundary_f1(model, held_out, found, criterion),
            **classes,
        }


def _boundary_f1(model: nn.Module, images: Dataset, found: Data, criterion: Loss) -> float:
    """The mean over the images that have a boundary; NaN where labels ignore the outlines, as VOC's do."""
    items = range(len(images))
    about = {"num_classes": found.num_classes, "ignore_index": found.ignore_index}
    if not any(metrics.has_boundary(images[i][1].unsqueeze(0), **about) for i in items):
        return float("nan")
    scores = [
        metrics.boundary_f1(_predict(model, criterion, image), labels.unsqueeze(0), **about)
        for image, labels in (images[i] for i in items)
    ]
    return torch.cat(scores).nanmean().item()


@torch.no_grad()
def _predict(model: nn.Module, criterion: Loss, image: torch.Tensor) -> torch.Tensor:
    """The class of every pixel of one image, ``(1, H, W)``."""
    device = next(model.parameters()).device
    return criterion.outputs(model(image.unsqueeze(0).to(device))).argmax(1).cpu()


@functools.lru_cache(maxsize=4)
def class_presence(dataset: Dataset, num_classes: int) -> tuple[Sequence[int], Sequence[int]]:
    """Of each class, the images that hold it and its pixels, over a whole set as it lies on disk."""
    label_map = getattr(dataset, "label_map", lambda i: dataset[i][1])
    images = torch.zeros(num_classes, dtype=torch.int64)
    pixels = torch.zeros(num_classes, dtype=torch.int64)
    for i in range(len(dataset)):
        labels = label_map(i)
        found = labels[(labels >= 0) & (labels < num_classes)].bincount(minlength=num_classes)
        pixels += found
        images += found > 0
    return images.tolist(), pixels.tolist()
