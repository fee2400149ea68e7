r"""The losses a network can be trained with, by name: HEM, and those it is compared to.

In the formulas z are the logits of a sample (a pixel), y its target class, C the number of classes, p the
softmax of z, t the target as a one-hot vector, and CE the cross-entropy. Unless a loss says otherwise, its value is
the mean over the samples that are not ignored.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hem_ext.harness.losses.adjusted import LDAM, CosineSoftmax, LogitAdjusted, LogitNorm
from hem_ext.harness.losses.base import Loss
from hem_ext.harness.losses.cross_entropy import CrossEntropy, Dropout, FinalL2, Focal, LabelSmoothing, LogitPenalty
from hem_ext.harness.losses.hem import HEM, HEMPlus
from hem_ext.harness.losses.other import NGL, Dice, MultiMargin, Sigmoid, SquaredError

__all__ = [
    "HEM",
    "LDAM",
    "LOSSES",
    "NGL",
    "CosineSoftmax",
    "CrossEntropy",
    "Dice",
    "Dropout",
    "FinalL2",
    "Focal",
    "HEMPlus",
    "LabelSmoothing",
    "LogitAdjusted",
    "LogitNorm",
    "LogitPenalty",
    "Loss",
    "MultiMargin",
    "Sigmoid",
    "SquaredError",
    "make_loss",
]

LOSSES: dict[str, type[Loss]] = {
    loss.name: loss
    for loss in (
        CrossEntropy,
        LabelSmoothing,
        HEM,
        HEMPlus,
        MultiMargin,
        LogitNorm,
        LogitAdjusted,
        LDAM,
        Dice,
        Focal,
        NGL,
        LogitPenalty,
        CosineSoftmax,
        Sigmoid,
        SquaredError,
        Dropout,
        FinalL2,
    )
}
"""Every loss by the name that tables and commands use."""


def make_loss(
    name: str,
    *,
    num_classes: int,
    class_counts: Sequence[float] | Tensor | None = None,
    ignore_index: int = -100,
    **constants: Any,
) -> Loss:
    """The loss of that name, for logits ``(N, C)`` or ``(N, C, H, W)``.

    What it knows of each class is a buffer: move it to the device of the logits, like a network.

    Args:
        name: a key of :data:`LOSSES`.
        num_classes: the number of classes C.
        class_counts: training samples of each class ``(C,)``. ``"hem+"``, ``"logit-adjusted"`` and ``"ldam"`` need
            them; ``"hem"`` takes its margin from them; the others pay no heed.
        ignore_index: the target of the samples that are left out.
        constants: of that loss, such as ``margin`` for ``"hem"``: see its class.

    Raises:
        ValueError: an unknown name; `class_counts` that are missing, or they or margins not one per class; a constant
            out of range.
        TypeError: a constant that the loss does not have, or that is not a number.

    Example::

        >>> import torch
        >>> from hem_ext.harness.losses import make_loss
        >>> criterion = make_loss("focal", num_classes=10, gamma=3, ignore_index=255)
        >>> logits = torch.randn(2, 10, 8, 8, requires_grad=True)
        >>> criterion(logits, torch.randint(10, (2, 8, 8))).backward()
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}: one of {', '.join(LOSSES)}")
    known = LOSSES[name].constants()
    counts = inspect.signature(LOSSES[name]).parameters.get("class_counts")

    taken = ", ".join(f"{constant}={default}" for constant, default in known.items()) or "none"
    unknown = [constant for constant in constants if constant not in known]
    if unknown:
        raise TypeError(f"{name} has no constant {', '.join(unknown)}; its constants are: {taken}")
    if class_counts is not None and len(class_counts) != num_classes:
        raise ValueError(
            f"{name}: class_counts must be one number per class, got {len(class_counts)} for {num_classes} classes"
        )
    if counts is not None:
        if class_counts is None and LOSSES[name].needs_class_counts():
            raise ValueError(f"{name} needs class_counts, the training samples of each class")
        constants["class_counts"] = class_counts
    try:
        loss = LOSSES[name](ignore_index=ignore_index, **constants)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}; its constants are: {taken}") from error
    for buffer, values in loss.named_buffers():
        if len(values) != num_classes:
            wanted = f"{buffer.rpartition('.')[2]} must be a number or one number per class"
            raise ValueError(f"{name}: {wanted}, got {len(values)} for {num_classes} classes")
    return loss
