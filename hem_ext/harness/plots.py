"""Pictures of what was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use("Agg")  # files only: a machine without a screen is the usual one

from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap

from hem_ext.harness.training import Epoch

# Okabe and Ito's colours tell losses apart for every kind of colour vision.
COLORS = {"ce": "#D55E00", "hem": "#0072B2"}
TITLES = {"accuracy": "accuracy", "mean_iou": "mean IoU"}
NAMES = {"ce": "cross-entropy", "hem": "HEM"}


def learning_curves(
    path: Path, runs: Mapping[str, Mapping[str, Sequence[Sequence[Epoch]]]], metrics: Mapping[str, str]
) -> None:
    """One row per task: its metric on the test split, and the share of training samples with a gradient.

    Args:
        path: the PNG to write.
        runs: task -> loss -> one list of epochs per seed. A line is the mean over seeds, a band their range.
        metrics: task -> the name of the field of :class:`Epoch` to draw.
    """
    figure, axes = plt.subplots(len(runs), 2, figsize=(10, 3.4 * len(runs)), squeeze=False, layout="constrained")
    for (task, by_loss), (left, right) in zip(runs.items(), axes, strict=True):
        for axis, field, label in (
            (left, metrics[task], f"{TITLES[metrics[task]]} on test"),
            (right, "active", "training samples with a gradient"),
        ):
            for loss, histories in by_loss.items():
                values = np.array([[getattr(epoch, field) for epoch in history] for history in histories])
                epochs = np.arange(1, values.shape[1] + 1)
                axis.plot(epochs, values.mean(0), color=COLORS[loss], label=NAMES[loss], marker=".")
                axis.fill_between(epochs, values.min(0), values.max(0), color=COLORS[loss], alpha=0.2, linewidth=0)
            axis.set(xlabel="epoch", ylabel=label, title=task)
            axis.grid(alpha=0.3)
        left.legend()
        right.set_ylim(0, 1.05)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def segmentations(path: Path, images: Tensor, columns: Mapping[str, Tensor], class_names: Sequence[str]) -> None:
    """Images beside several label maps, one scene a row.

    Args:
        path: the PNG to write.
        images: ``(N, 1, H, W)`` in [0, 1].
        columns: title -> label maps ``(N, H, W)``, such as the truth and the predictions.
        class_names: of every class, in the order of the labels; the first is the background.
    """
    palette = ListedColormap(["#202020", *plt.get_cmap("tab10").colors][: len(class_names)])
    rows = len(images)
    figure, axes = plt.subplots(
        rows, 1 + len(columns), figsize=(2 * (1 + len(columns)), 2.05 * rows + 0.6), squeeze=False, layout="constrained"
    )
    for i, row in enumerate(axes):
        row[0].imshow(images[i, 0].numpy(), cmap="gray", vmin=0, vmax=1)
        for axis, labels in zip(row[1:], columns.values(), strict=True):
            axis.imshow(
                labels[i].numpy(), cmap=palette, vmin=-0.5, vmax=len(class_names) - 0.5, interpolation="nearest"
            )
        for axis, title in zip(row, ["image", *columns], strict=True):
            axis.set_axis_off()
            if i == 0:
                axis.set_title(title, fontsize=10)
    handles = [plt.Rectangle((0, 0), 1, 1, color=palette(c)) for c in range(len(class_names))]
    figure.legend(handles, class_names, loc="outside lower center", ncols=len(class_names), fontsize=8, handlelength=1)
    figure.savefig(path, dpi=120)
    plt.close(figure)
