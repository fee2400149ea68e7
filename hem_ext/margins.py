"""Margins from the sizes of the classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hem_ext import arguments


def class_margins(counts: Sequence[int] | Tensor, total: float = 2000.0) -> Tensor:
    r"""One margin per class, larger for rarer classes.

    .. math:: m_i = \sqrt{\mathrm{total} / (n \, s_i)}

    for ``n`` classes of which class ``i`` has :math:`s_i` training samples. With balanced classes this is
    one number, :math:`\sqrt{\mathrm{total} / N}` for ``N`` samples in all: 0.2 at the size of CIFAR.

    Args:
        counts: training samples of each class, shape ``(C,)``, every one above 0.
        total: the constant of the rule, a number of samples; 2000 in the authors' code.

    Returns:
        float32 tensor of shape ``(C,)`` on the CPU, the ``margin`` of :func:`hem_ext.hem_loss`.

    Raises:
        ValueError: a count or `total` that is not a positive number; counts that are not one number per class; a margin
            that float32 does not hold.
        TypeError: counts that are no numbers.

    Source: Spratling & Schütt, arXiv 2501.12191, and the reduction in its two public re-implementations.

    Example::

        >>> from hem_ext import class_margins
        >>> class_margins([5000, 500, 50])
        tensor([0.3651, 1.1547, 3.6515])
    """
    if not isinstance(counts, Tensor):
        try:
            counts = torch.as_tensor(counts, device="cpu")
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"counts must be one number per class, got {counts!r}") from error
    arguments.check_memory("counts", counts)
    s = counts.detach().cpu().double()
    if s.dim() != 1 or s.numel() == 0:
        raise ValueError(f"counts must be one number per class, of shape (C,), got shape {tuple(s.shape)}")
    bad = (~(s > 0) | s.isinf()).nonzero()
    if bad.numel():
        c = int(bad[0])
        raise ValueError(f"every class needs at least one sample, but counts[{c}] is {s[c].item():g}")
    if not 0 < total < math.inf:
        raise ValueError(f"total must be a positive number of samples, got {total}")
    margins = (total / (s.numel() * s)).sqrt().float()
    if margins.isinf().any():
        raise ValueError(f"total must give margins that float32 holds, got {total:g}")
    return margins
