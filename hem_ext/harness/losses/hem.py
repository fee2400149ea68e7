"""HEM, with one margin or one per class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hem_ext import HEMLoss, class_margins, hem_loss, upsampled_hem_loss
from hem_ext.harness.losses.base import Loss, check_counts, check_positive


class HEM(Loss):
    r"""HEM with one margin for every class: :class:`hem_ext.HEMLoss`, the mean over active samples.

    Args:
        margin: None takes :math:`\sqrt{\mathrm{total} / N}` for N training samples, the authors' rule for balanced
            classes, or 0.2, which the rule gives at the size of CIFAR, if there are no `class_counts`.
        class_counts: training samples of each class ``(C,)``.
        total: the constant of the rule, a number of samples.

    Source: Spratling & Schütt, *A margin-based replacement for cross-entropy loss*, arXiv 2501.12191.

    Example::

        >>> from hem_ext.harness.losses import make_loss
        >>> make_loss("hem", num_classes=2, class_counts=[30_000, 20_000]).criterion
        HEMLoss(margin=0.2, ignore_index=-100, reduction='mean')
    """

    name = "hem"

    def __init__(
        self,
        *,
        margin: float | Sequence[float] | Tensor | None = None,
        class_counts: Sequence[float] | Tensor | None = None,
        total: float = 2000.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(ignore_index=ignore_index)
        check_positive(total=total)
        if margin is None:
            margin = 0.2 if class_counts is None else math.sqrt(total / check_counts(class_counts).sum().item())
        self.criterion = HEMLoss(margin=margin, ignore_index=ignore_index)

    def identity(self) -> list[Any]:
        """The margins in float32, which the loss of float32 logits is computed in; one if all are equal.

        So HEM+ on balanced classes is HEM with their margin.
        """
        margin = torch.as_tensor(self.criterion.margin, dtype=torch.float32)
        if margin.dim() and (margin == margin[0]).all():
            margin = margin[0]
        return [HEM.name, {"ignore_index": float(self.ignore_index), "margin": margin.tolist()}]

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.criterion(logits, target)

    def share(self, logits: Tensor, target: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        return hem_loss(
            logits, target, margin=self.criterion.margin, ignore_index=self.ignore_index, process_group=group
        )

    def upsampled(
        self,
        logits: Tensor,
        target: Tensor,
        align_corners: bool,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> Tensor:
        """Of logits ``(N, C, h, w)`` interpolated to the size of the target ``(N, H, W)``, without making them.

        With `group` as :meth:`share`.
        """
        return upsampled_hem_loss(
            logits,
            target,
            margin=self.criterion.margin,
            align_corners=align_corners,
            ignore_index=self.ignore_index,
            process_group=group,
        )


class HEMPlus(HEM):
    """HEM with a margin for each class, larger for rarer ones: :func:`hem_ext.class_margins`.

    Args:
        class_counts: training samples of each class ``(C,)``.
        total: the constant of the rule, a number of samples.

    Source: Spratling & Schütt, *A margin-based replacement for cross-entropy loss*, arXiv 2501.12191.

    Example::

        >>> from hem_ext.harness.losses import make_loss
        >>> make_loss("hem+", num_classes=2, class_counts=[100, 1000]).criterion.margin
        tensor([3.1623, 1.0000])
    """

    name = "hem+"

    def __init__(
        self, *, class_counts: Sequence[float] | Tensor, total: float = 2000.0, ignore_index: int = -100
    ) -> None:
        super().__init__(margin=class_margins(class_counts, total), ignore_index=ignore_index)
