"""What a call counts, and the loss by the way that can tell."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hem_ext import arguments, reference, transforms


class Stats(NamedTuple):
    """What a call of :class:`hem_ext.HEMLoss` counted: scalars on the device of the logits, read when asked for."""

    active: Tensor
    """The weight of the active samples, those whose loss is above 0: what ``"mean"`` divides by."""
    counted: Tensor
    """The weight of the samples that are not ignored: what ``"batchmean"`` divides by."""
    active_share: Tensor
    """Active samples, of those that are not ignored."""
    kept: Tensor
    """Logits beside the target that an active sample pushes down, the size of :math:`K`: mean."""
    violation: Tensor
    """Loss of an active sample, without its weight: mean."""


def loss_and_stats(input: Tensor, target: Tensor, args: arguments.Arguments, native: bool) -> tuple[Tensor, Stats]:
    """The loss from each sample's, with torch's operators, and what they tell."""
    labels = target.long()
    ignored = labels == args.ignore_index
    if native:
        arguments.check_weights(weight=args.weight)  # the op, which checks the rest, is not given it
        losses, mask = transforms.FunctionalHEM.apply(input, target, args.margins, args.margin, args.ignore_index)
        kept = _bits(mask).sum(1).view(losses.shape)
    else:
        losses, kept = reference.of_samples(input, target, args)
    weights = reference.weights_of(labels, ignored, args.weight)
    found = losses.detach()
    active = found > 0 if weights is None else (found > 0) & (weights > 0)
    count = active.sum(dtype=losses.dtype)
    stats = Stats(
        reference.denominator(found, weights, ignored, "mean", None, losses.dtype),
        reference.denominator(found, weights, ignored, "batchmean", None, losses.dtype),
        count / (~ignored).sum().clamp(min=1),
        kept.masked_fill(~active, 0).sum() / count.clamp(min=1),
        found.masked_fill(~active, 0.0).sum() / count.clamp(min=1),
    )
    return reference.reduced(losses, weights, ignored, args), stats


def _bits(words: Tensor) -> Tensor:
    """How many bits of each word are set."""
    x = words.long()  # the sign, in all bits above, is masked away
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0xFF
