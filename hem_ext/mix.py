"""The HEM loss of samples that mixup or CutMix made of two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hem_ext import arguments, reference
from hem_ext.hem import HEMLoss, hem_loss

# timm mixes float32 targets by a lam of the images' dtype: whatever that of the target is, a row may be off by the
# rounding of bfloat16.
_ROUNDING = 2**-6


def mixed_hem_loss(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: float | Tensor,
    *,
    margin: float | Sequence[float] | Tensor = 0.2,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""The HEM loss of samples that are mixed of two: `lam` of class `target_a` and the rest of `target_b`.

    .. math:: \lambda \, \mathrm{HEM}(y, a) + (1 - \lambda) \, \mathrm{HEM}(y, b)

    for each sample. A class has a share in it, :math:`s_a = \lambda` and :math:`s_b = 1 - \lambda`, times its `weight`;
    where both are one class it has all of it. What has no share, or is `ignore_index`, is as if it were not there.

    Args:
        input: logits, as in :func:`hem_ext.hem_loss`.
        target_a, target_b: class indices or `ignore_index`, of one shape, as `target` there.
        lam: in [0, 1]; a number or a tensor of one, of shape (), for the batch, or one for each sample ``(N,)`` or each
            target, of their shape. A constant: it gets no gradient.
        margin, weight, ignore_index, process_group, backend: as in :func:`hem_ext.hem_loss`.
        reduction: what becomes of the losses.

            - ``"mean"``: their sum over the sum of :math:`s_a [\mathrm{HEM}_a > 0] + s_b [\mathrm{HEM}_b > 0]`.
            - ``"batchmean"``: over the sum of :math:`s_a + s_b`, without what is ignored.
            - ``"sum"``: the sum.
            - ``"none"``: one for each sample, shaped like the targets.

    Returns:
        The loss in the arithmetic's dtype, as :func:`hem_ext.hem_loss`. It is that loss twice: backward makes two
        gradients of the size of the logits and adds them, in half precision each of the three is rounded.

    Raises:
        ValueError: targets of two shapes, a `lam` outside of [0, 1] or of another shape, and as
            :func:`hem_ext.hem_loss`. On a GPU a tensor's values are not checked: nothing waits for it.
        TypeError: a dtype that is not listed there; a `lam` that is no number.
        IndexError: a target that is neither a class nor `ignore_index` (on CUDA: a device-side assertion, where it has
            a share).
        RuntimeError: tensors on different devices.

    Source: ours, not the paper's. Zhang et al., *mixup*, arXiv 1710.09412, and Yun et al., *CutMix*, arXiv 1905.04899,
    mix cross-entropy so, which is the same as mixing its targets.

    Example::

        >>> import torch
        >>> from hem_ext.mix import mixed_hem_loss
        >>> logits = torch.tensor([[0.5, 0.25, 1.0]], requires_grad=True)
        >>> loss = mixed_hem_loss(logits, torch.tensor([0]), torch.tensor([2]), 0.75, margin=0.25)
        >>> loss  # 0.75 of 1.0 - 0.5 + 0.25; class 2 is finished
        tensor(0.7500, grad_fn=<DivBackward0>)
        >>> loss.backward()
        >>> logits.grad
        tensor([[-1.,  0.,  1.]])
    """
    for name, target in (("target_a", target_a), ("target_b", target_b)):
        arguments.check_dense(name, target)
    if target_a.shape != target_b.shape:
        given = f"{tuple(target_a.shape)} and {tuple(target_b.shape)}"
        raise ValueError(f"expected target_a and target_b of one shape, got {given}")
    a, b = (arguments.class_indices(input, target) for target in (target_a, target_b))
    args = arguments.check(input, a, margin, weight, ignore_index, reduction, backend, process_group)
    arguments.check(input, b)
    num_classes = input.shape[arguments.class_dim(input.shape)]
    # Here, for the loss is not shown the ones without a share.
    for name, target in (("target_a", a), ("target_b", b)):
        arguments.check_values(target, num_classes, args.ignore_index, name=name, weight=args.weight)
    lam = _of_targets(lam, a, arguments.ARITHMETIC[input.dtype])

    share = lam.masked_fill(a == b, 1.0)
    shares = torch.stack([share, 1 - share])
    targets = torch.stack([a.long(), b.long()]).masked_fill(shares == 0, args.ignore_index)
    ignored = targets == args.ignore_index
    losses = torch.stack(
        [
            hem_loss(input, t, margin=margin, ignore_index=args.ignore_index, reduction="none", backend=backend)
            for t in targets
        ]
    )
    weights = reference.weights_of(targets, ignored, args.weight)
    loss = reference.reduced(losses, shares if weights is None else shares * weights, ignored, args)
    return loss.sum(0) if reduction == "none" else loss


def _of_targets(lam: float | Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """`lam` with one number for each target; raise for what it cannot be."""
    if not isinstance(lam, Tensor):
        try:
            lam = arguments.as_float(lam)
        except (TypeError, ValueError) as error:
            raise TypeError(f"lam must be a number, or a tensor of one for each sample, got {lam!r}") from error
        if not 0 <= lam <= 1:
            raise ValueError(f"lam must be in [0, 1], got {lam:g}")
        return torch.full(target.shape, lam, dtype=dtype, device=target.device)
    arguments.check_memory("lam", lam)
    if lam.dtype == torch.bool or lam.is_complex():
        raise TypeError(f"lam must hold real numbers, got {lam.dtype}")
    shape = target.shape
    if lam.shape not in ((), shape[:1], shape):
        expected = dict.fromkeys(str(tuple(s)) for s in (shape[:0], shape[:1], shape))
        raise ValueError(
            f"lam must be one number or one for each sample, of shape {' or '.join(expected)} for targets of shape "
            f"{tuple(shape)}, got lam of shape {tuple(lam.shape)}"
        )
    if lam.requires_grad:
        raise ValueError("lam is a constant of the loss and gets no gradient, but it requires one: detach it")
    if lam.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~((lam >= 0) & (lam <= 1))
        if arguments.any_of(bad):
            position = bad.nonzero()[0].tolist()
            value = f"{lam[tuple(position)].item():g}"
            raise ValueError(f"lam must be in [0, 1], {f'but lam{position} is' if position else 'got'} {value}")
    if lam.device != target.device:
        if lam.dim() or lam.device.type != "cpu":
            raise arguments.other_device("lam", lam, target, "the targets")
        lam = lam.to(target.device, non_blocking=True)
    return lam.to(dtype).reshape(lam.shape + (1,) * (len(shape) - lam.dim())).expand(shape)


def split_mixed(soft_target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two classes of each row of a soft target, and the share of the first: what :func:`mixed_hem_loss` takes.

    Args:
        soft_target: shares of the classes, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``; float32, float64, float16
            or bfloat16. In each row at most two are not 0, and they sum to 1 within rounding (that of bfloat16,
            whatever the dtype): what mixup and CutMix make of one-hot targets.

    Returns:
        The class that has most of each row and the one that has the rest, int64, and the share of the former, float32
        (float64 of float64); ``()``, ``(N,)`` or ``(N, d1, ..., dk)``. Of a row with one class the second is any, and
        `lam` is 1.

    Raises:
        ValueError: another shape; a row that is none of two classes, such as one of smoothed labels. On a GPU, and in a
            compiled graph, values are not checked: the two largest count as if there were no others.
        TypeError: another dtype.

    Example::

        >>> import torch
        >>> from hem_ext.mix import split_mixed
        >>> split_mixed(torch.tensor([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0]]))[2]
        tensor([0.7500, 1.0000])
    """
    arguments.check_dense("soft_target", soft_target)
    if soft_target.dtype not in arguments.ARITHMETIC:
        raise TypeError(f"soft_target must be float32, float64, float16 or bfloat16, got {soft_target.dtype}")
    shape = soft_target.shape
    if not shape or not shape[arguments.class_dim(shape)]:
        raise ValueError(f"soft_target must have shape (C,), (N, C) or (N, C, d1, ..., dk), got {tuple(shape)}")
    if soft_target.requires_grad:
        raise ValueError("soft_target is a constant of the loss and gets no gradient, but it requires one: detach it")
    class_dim = arguments.class_dim(shape)
    if soft_target.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_shares(soft_target, class_dim)
    shares, classes = soft_target.topk(min(2, shape[class_dim]), class_dim)
    most, least = (shares.select(class_dim, i).to(arguments.ARITHMETIC[soft_target.dtype]) for i in (0, -1))
    return classes.select(class_dim, 0), classes.select(class_dim, -1), most / (most + least)


def _check_shares(soft_target: Tensor, class_dim: int) -> None:
    """Raise for a row that does not share 1 between two classes. Waits for the device."""
    counts = (soft_target != 0).sum(class_dim)
    if arguments.any_of(many := counts > 2):
        position = many.nonzero()[0].tolist()
        raise ValueError(
            f"{_row(position)} has {counts[tuple(position)].item()} classes that are not 0, expected the two that were "
            "mixed: HEM has nothing to smooth, use label_smoothing=0 (in timm's Mixup; --smoothing 0 of its train.py)"
        )
    sums = soft_target.sum(class_dim, dtype=arguments.ARITHMETIC[soft_target.dtype])
    if arguments.any_of(bad := ~((sums - 1).abs() <= _ROUNDING) | (soft_target < 0).any(class_dim)):
        position = bad.nonzero()[0].tolist()
        row = soft_target.movedim(class_dim, -1)[tuple(position)]
        given = " and ".join(f"{x:g}" for x in row[row != 0].tolist()) or "0"
        raise ValueError(f"{_row(position)} must hold shares of one or two classes that sum to 1, got {given}")


def _row(position: list[int]) -> str:
    """Of all classes at a position, in the indices of the soft target."""
    if not position:
        return "soft_target"
    n, *rest = map(str, position)
    return f"soft_target[{', '.join([n, ':', *rest] if rest else [n])}]"


class MixedHEMLoss(HEMLoss):
    """:func:`mixed_hem_loss` as a module, for both loops: mixed targets to train with, class indices to evaluate with.

    Args:
        weight, margin, ignore_index, reduction, process_group, backend: as in :class:`hem_ext.HEMLoss`, whose
            ``state_dict`` and ``from_class_counts`` it has as well.

    Shape:
        - input: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``
        - target: a soft target of the shape of the input, as :func:`split_mixed` takes it; or class indices, which give
          the loss of :class:`hem_ext.HEMLoss`; or, with `target_b` and `lam`, those of :func:`mixed_hem_loss`
        - output: a scalar, or shaped like class indices with ``reduction="none"``

    Example::

        >>> import torch
        >>> from hem_ext.mix import MixedHEMLoss
        >>> criterion = MixedHEMLoss(margin=0.25)
        >>> logits = torch.tensor([[0.5, 0.25, 1.0]])
        >>> criterion(logits, torch.tensor([[0.75, 0.0, 0.25]])), criterion(logits, torch.tensor([0]))
        (tensor(0.7500), tensor(0.7500))
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        margin: float | Sequence[float] | Tensor = 0.2,
        ignore_index: int = -100,
        reduction: str = "mean",
        process_group: torch.distributed.ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            weight,
            margin=margin,
            ignore_index=ignore_index,
            reduction=reduction,
            process_group=process_group,
            backend=backend,
        )

    def forward(  # type: ignore[override]  # it has no normalizer
        self, input: Tensor, target: Tensor, target_b: Tensor | None = None, lam: float | Tensor | None = None
    ) -> Tensor:
        if (target_b is None) != (lam is None):
            missing = "lam" if lam is None else "target_b"
            raise TypeError(f"two targets are mixed by their lam, got no {missing}")
        if target_b is None or lam is None:
            if not _is_soft(input, target):
                return super().forward(input, target)
            target, target_b, lam = split_mixed(target)
        return mixed_hem_loss(
            input,
            target,
            target_b,
            lam,
            margin=self.margin,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            process_group=self.process_group,
            backend=self.backend,
        )


def _is_soft(input: Tensor, target: Tensor) -> bool:
    """Whether a target has shares of the classes; raise where they are not those of the logits."""
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        return False  # told by the loss
    if not target.is_floating_point() or target.dim() != input.dim():
        return False
    if target.shape != input.shape:
        raise ValueError(
            f"a soft target must have the shape of the logits, {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    return True
