"""HEM in plain PyTorch: the fallback where no kernel is built, and the oracle of the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hem_ext import arguments


def hem_loss(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    r"""The HEM loss, as :func:`hem_ext.hem_loss` defines it, written with PyTorch's own operators.

    It takes the same arguments, without `backend`.

    Runs on every device. It keeps several tensors of the size of `input` for backward, and takes many
    passes over memory: use :func:`hem_ext.hem_loss` to train.

    Example::

        >>> import torch
        >>> from hem_ext import reference
        >>> reference.hem_loss(torch.tensor([[0.5, 0.25, 1.0]]), torch.tensor([0]), margin=0.25)
        tensor(0.7500)
    """
    target = arguments.class_indices(input, target)
    return compute(input, target, arguments.check(input, target, weight=weight, backend="reference", **options))


def compute(input: Tensor, target: Tensor, args: arguments.Arguments) -> Tensor:
    """The loss of checked arguments."""
    losses, _ = of_samples(input, target, args)
    return of_batch(losses, target, args)


def of_batch(losses: Tensor, target: Tensor, args: arguments.Arguments) -> Tensor:
    """The loss from each sample's without its weight."""
    labels = target.long()
    ignored = labels == args.ignore_index
    return reduced(losses, weights_of(labels, ignored, args.weight), ignored, args)


def of_samples(input: Tensor, target: Tensor, args: arguments.Arguments) -> tuple[Tensor, Tensor]:
    """Each sample's loss, without its weight, and how many of its errors are kept: the rule for one."""
    class_dim = arguments.class_dim(input.shape)
    num_classes = input.shape[class_dim]
    arguments.check_values(target, num_classes, args.ignore_index, margin=args.margins, weight=args.weight)
    ignored = target.long() == args.ignore_index
    labels = target.long().masked_fill(ignored, 0).unsqueeze(class_dim)

    y = input.to(arguments.ARITHMETIC[input.dtype])
    y_target = y.gather(class_dim, labels)
    m = args.margin if args.margins is None else args.margins[labels]
    is_target = torch.arange(num_classes, device=y.device).view([-1] + [1] * (y.dim() - 1 - class_dim)) == labels

    # e_j = max(0, y_j - y_l + m), and 0 for the target itself.
    error = (y - y_target + m).clamp(min=0).masked_fill(is_target, 0.0)
    fixed = error.detach()
    # Rounding can put the mean above every error, and then nothing would be kept: the largest error bounds it.
    mean = fixed.sum(class_dim, keepdim=True) / num_classes
    kept = (fixed >= torch.minimum(mean, fixed.amax(class_dim, keepdim=True))) & (fixed > 0)
    count = kept.sum(class_dim)
    loss = error.masked_fill(~kept, 0.0).sum(class_dim) / count.clamp(min=1)

    # An ignored row is masked where its loss is: no gradient passes, whatever the row holds.
    # A row with a NaN, or whose loss is not finite, is NaN in the loss and in all of its gradient.
    nan = mean.isnan().squeeze(class_dim) | y_target.isnan().squeeze(class_dim)
    broken = (nan | ~loss.isfinite()) & ~ignored
    poison = y.sum(class_dim).masked_fill(~broken, 0.0) * torch.nan
    return torch.where(broken, poison, loss.masked_fill(ignored, 0.0)), count


def reduced(losses: Tensor, weights: Tensor | None, ignored: Tensor, args: arguments.Arguments) -> Tensor:
    """What becomes of the samples' losses, and what a mean of them divides by. `weights` are 0 of what is `ignored`."""
    weighted = losses if weights is None else weights * losses
    reduction = arguments.REDUCTIONS[args.reduction]
    if reduction == "none":
        return weighted
    total = weighted.sum()
    if reduction == "sum":
        return total if args.divisor is None else total / args.divisor
    return divided(total, denominator(losses, weights, ignored, reduction, args.group, total.dtype))


def weights_of(labels: Tensor, ignored: Tensor, weight: Tensor | None) -> Tensor | None:
    """Each sample's weight, 0 of what is `ignored`; None where all are 1."""
    if weight is None:
        return None
    # With a dimension more: torch.vmap cannot index by a scalar.
    return weight[labels.masked_fill(ignored, 0).unsqueeze(-1)].squeeze(-1).masked_fill(ignored, 0.0)


def denominator(
    losses: Tensor,
    weights: Tensor | None,
    ignored: Tensor,
    reduction: str,
    group: torch.distributed.ProcessGroup | None,
    dtype: torch.dtype,
) -> Tensor:
    """What ``"mean"`` or ``"batchmean"`` divides the sum by, a scalar of `dtype`.

    `losses` are those without their weight, with which a small one may be rounded to 0.
    """
    counted = ~ignored if reduction == "batchmean" else (losses.detach() > 0)
    total = (counted if weights is None else weights.masked_fill(~counted, 0.0)).sum(dtype=dtype)
    return total if group is None else over_group(total, group)


def divided(total: Tensor, denominator: Tensor) -> Tensor:
    """Nothing counted: the sum is 0, or NaN where the only losses are."""
    return total / arguments.or_one(denominator)


def over_group(denominator: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """What each process of `group` divides its sum by, so that the mean over them is the loss of all their samples."""
    total = denominator.clone()
    torch.distributed.all_reduce(total, group=group)
    return total / group.size()
