"""The losses a network can be trained with, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from hem_ext import HEMLoss

LOSSES: dict[str, Callable[..., nn.Module]] = {
    "ce": nn.CrossEntropyLoss,  # the mean over samples, as torch has it
    "hem": HEMLoss,
}


def make_loss(name: str, *, ignore_index: int = -100, **constants) -> nn.Module:
    """A loss of logits ``(N, C)`` or ``(N, C, H, W)`` and class indices.

    Args:
        name: a key of :data:`LOSSES`.
        ignore_index: the target that is left out.
        constants: what that loss takes besides, such as ``margin`` for ``"hem"``.

    Raises:
        ValueError: an unknown name.

    Example::

        >>> from hem_ext.harness.losses import make_loss
        >>> make_loss("hem", margin=0.5)
        HEMLoss(margin=0.5, ignore_index=-100, reduction='mean')
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}: one of {', '.join(LOSSES)}")
    return LOSSES[name](ignore_index=ignore_index, **constants)
