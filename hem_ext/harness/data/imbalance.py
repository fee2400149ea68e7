"""Long-tailed training sets: how many samples of each class, and a subset that has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hem_ext.harness.data.base import Split


def exponential_counts(largest: int, num_classes: int, factor: float) -> list[int]:
    r"""The exponential profile, from `largest` down to `largest` times `factor`.

    .. math:: n_c = \lfloor n_{\max} \, f^{c / (C - 1)} \rfloor

    Args:
        largest: samples of the first class.
        num_classes: at least 2.
        factor: share of them that the last class keeps, in (0, 1]: the inverse of the imbalance ratio.

    Raises:
        ValueError: an argument outside these bounds, or a class that is left without a sample.

    Source: Cui et al., arXiv 1901.05555; Cao et al. (LDAM-DRW), arXiv 1906.07413.

    Example::

        >>> exponential_counts(5000, 10, 0.01)
        [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    """
    _check(largest, num_classes, factor)
    return [int(largest * factor ** (c / (num_classes - 1))) for c in range(num_classes)]


def step_counts(largest: int, num_classes: int, factor: float) -> list[int]:
    """The step profile: the first half of the classes keep `largest` samples, the others that times `factor`.

    Arguments and errors as in :func:`exponential_counts`; of an odd number of classes the middle one is rare.

    Source: Buda et al., arXiv 1710.05381.

    Example::

        >>> step_counts(100, 4, 0.1)
        [100, 100, 10, 10]
    """
    _check(largest, num_classes, factor)
    common = num_classes // 2
    return [largest] * common + [int(largest * factor)] * (num_classes - common)


def _check(largest: int, num_classes: int, factor: float) -> None:
    if num_classes < 2:
        raise ValueError(f"a profile needs at least 2 classes, got {num_classes}")
    if not 0 < factor <= 1:
        raise ValueError(f"factor is the rarest class's size over the largest's, in (0, 1], got {factor}")
    if int(largest * factor) < 1:
        raise ValueError(f"{largest} samples times {factor} leave the rarest class without a sample")


def subset_by_counts(split: Split, counts: Sequence[int], seed: int) -> Split:
    """`counts[c]` samples of each class c, drawn at random, in the order that they have in `split`.

    Args:
        split: labels ``(N,)``, from 0 to ``len(counts) - 1``.
        counts: of each class.
        seed: of the draw.

    Raises:
        ValueError: `split` has other classes, or fewer samples of one.

    Example::

        >>> from hem_ext.harness.data import mnist_5k
        >>> subset_by_counts(mnist_5k()[0], exponential_counts(100, 10, 0.1), seed=0).labels.bincount()
        tensor([100,  77,  59,  46,  35,  27,  21,  16,  12,  10])
    """
    have = split.labels.bincount(minlength=len(counts)).tolist()
    if len(have) > len(counts):
        raise ValueError(f"{len(counts)} counts were given, but there are labels up to {len(have) - 1}")
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for c, count in enumerate(counts):
        if not 0 <= count <= have[c]:
            raise ValueError(f"{count} samples of class {c} were asked for, but there are {have[c]}")
        order = torch.randperm(have[c], generator=generator)
        kept.append((split.labels == c).nonzero().squeeze(1)[order[:count]])
    return split.take(torch.cat(kept).sort().values)
