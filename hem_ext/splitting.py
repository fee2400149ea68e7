"""A step whose batch is split: over micro-batches, or over processes that average gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hem_ext import arguments


@torch.no_grad()
def divide_gradients(
    parameters: Iterable[Tensor],
    divisor: float | Tensor,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> None:
    """Make of the gradients of sums those of one mean: divide them by what was counted in all of the step.

    How many samples of a step are active is known when its last forward is done. So take ``reduction="sum"``, add up
    ``criterion.stats.active``, and divide before gradients are clipped. What is left is the gradient that one call with
    ``"mean"`` has for the whole batch, to rounding.

    Args:
        parameters: those whose ``grad`` is divided, in place; None is left alone.
        divisor: a number or a tensor of shape (). 0, where nothing was counted, divides by 1.
        process_group: the processes whose gradients ``DistributedDataParallel`` or FSDP2 has averaged. Divisors are
            summed over them, and the average becomes the sum again. Every process has to call.

    Raises:
        ValueError: a `divisor` that is negative, not finite, of another shape, or requires a gradient.
        TypeError: a `divisor` that is no number; a `process_group` that is neither None nor a group of this process.

    Example::

        >>> import torch
        >>> from hem_ext import HEMLoss, divide_gradients
        >>> model, criterion = torch.nn.Linear(4, 3), HEMLoss(reduction="sum", stats=True)
        >>> images, labels = torch.randn(12, 4), torch.randint(0, 3, (12,))
        >>> active = 0
        >>> for x, t in zip(images.split(5), labels.split(5)):
        ...     criterion(model(x), t).backward()
        ...     active = active + criterion.stats.active
        >>> divide_gradients(model.parameters(), active)
        >>> gradient = model.weight.grad.clone()
        >>> model.zero_grad()
        >>> HEMLoss()(model(images), labels).backward()
        >>> torch.allclose(model.weight.grad, gradient)
        True
    """
    arguments.check_group("process_group", process_group)
    divisor = arguments.check_normalizer(divisor, name="divisor")
    gradients = [p.grad for p in parameters if p.grad is not None]
    if process_group is not None:
        total = torch.as_tensor(divisor, dtype=torch.float64, device=gradients[0].device if gradients else None)
        torch.distributed.all_reduce(total, group=process_group)
        divisor = arguments.or_one(total) / process_group.size()
    divisor = arguments.or_one(divisor)
    for gradient in gradients:
        # A shard of FSDP2's is divided as what it is, for a tensor of every process does not go with it.
        getattr(gradient, "to_local", lambda gradient=gradient: gradient)().div_(divisor)
