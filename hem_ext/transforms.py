"""HEM where torch.func transforms it, or tangents go forwards: autograd functions that are transformed themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hem_ext import _torch, arguments

# The ops are those of hem_ext.hem, which imports this: named when they are called.
_NONE = arguments.REDUCTION_CODES["none"]


class FunctionalHEM(_torch.Function):
    """Each sample's loss, and the mask, in the form that can be transformed; the rest is left to torch."""

    @staticmethod
    def forward(
        input: Tensor, target: Tensor, margins: Tensor | None, margin: float, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        input = input.contiguous()
        forward = torch.ops.hem_ext.hem_forward.default
        losses, mask, _ = forward(input, target, margins, margin, None, ignore_index, _NONE, _rows(target))
        return losses, mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        input, target, _, _, ignore_index = inputs
        losses, mask = output
        ctx.mark_non_differentiable(mask)
        ctx.save_for_backward(mask, target)
        ctx.save_for_forward(mask, target)
        num_classes = input.shape[arguments.class_dim(input.shape)]
        ctx.constants = (ignore_index, num_classes, input.dtype, losses.dtype)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        ignore_index, num_classes, dtype, _ = ctx.constants
        grad_input = FunctionalGradient.apply(grad_losses, *ctx.saved_tensors, ignore_index, num_classes, dtype)
        return grad_input, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, None]:
        return _slope(tangent, *ctx.saved_tensors, *ctx.constants), None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        input: Tensor,
        target: Tensor,
        margins: Tensor | None,
        margin: float,
        ignore_index: int,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        if in_dims[2] is not None:
            raise ValueError("margin is one for all that torch.vmap maps over, as a number or as a tensor per class")
        input, target = _mapped(info.batch_size, (input, target), in_dims)
        losses, mask = FunctionalHEM.apply(*_as_one((input, target)), margins, margin, ignore_index)
        mask = mask.unflatten(0, (info.batch_size, mask.shape[0] // info.batch_size))
        return (losses.view(target.shape), mask), (0, 0)


class FunctionalGradient(_torch.Function):
    """The gradient of the logits, in which `grad_losses` is linear; of `dtype`."""

    @staticmethod
    def forward(
        grad_losses: Tensor, mask: Tensor, target: Tensor, ignore_index: int, num_classes: int, dtype: torch.dtype
    ) -> Tensor:
        backward = torch.ops.hem_ext.hem_backward.default
        saved = (mask.contiguous(), target, None, grad_losses.new_ones(()))
        code = arguments.DTYPE_CODES[dtype]
        gradient: Tensor = backward(grad_losses, *saved, ignore_index, num_classes, code, _NONE, _rows(target))
        return gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad_losses, mask, target, *constants = inputs
        ctx.save_for_backward(mask, target)
        ctx.save_for_forward(mask, target)
        ctx.constants = (*constants, grad_losses.dtype)

    @staticmethod
    def backward(ctx: Any, grad_grad_input: Tensor) -> tuple[Tensor | None, ...]:
        return _slope(grad_grad_input, *ctx.saved_tensors, *ctx.constants), *[None] * 5

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        gradient: Tensor = FunctionalGradient.apply(tangent, *ctx.saved_tensors, *ctx.constants[:3])
        return gradient

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], grad_losses: Tensor, mask: Tensor, target: Tensor, *constants: Any
    ) -> tuple[Tensor, int]:
        grad_losses, mask, target = _mapped(info.batch_size, (grad_losses, mask, target), in_dims)
        mask = mask.flatten(0, 1)
        grad_losses, labels = _as_one((grad_losses, target))
        gradient = FunctionalGradient.apply(grad_losses, mask, labels, *constants)
        classes = constants[1]
        return gradient.reshape(*target.shape[:2], classes, *target.shape[2:]) if target.dim() > 1 else gradient, 0


def _slope(
    tangent: Tensor,
    mask: Tensor,
    target: Tensor,
    ignore_index: int,
    num_classes: int,
    _: torch.dtype,
    arithmetic: torch.dtype,
) -> Tensor:
    """How each sample's loss changes along `tangent`: by the gradient, not rounded to the dtype of the logits."""
    ones = torch.ones_like(target, dtype=arithmetic)
    unit: Tensor = FunctionalGradient.apply(ones, mask, target, ignore_index, num_classes, arithmetic)
    return (tangent * unit).sum(arguments.class_dim(unit.shape))


def _mapped(size: int, tensors: Sequence[Tensor], dims: Sequence[int | None]) -> list[Tensor]:
    """Tensors with what torch.vmap maps over in front."""
    dims = dims[: len(tensors)]
    return [x.expand(size, *x.shape) if d is None else x.movedim(d, 0) for x, d in zip(tensors, dims, strict=True)]


def _as_one(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The samples of all calls as those of one: a call of ``(C,)`` is a sample, another one has several."""
    several = tensors[-1].dim() > 1
    return [x.flatten(0, 1) if several else x for x in tensors]


def _rows(target: Tensor) -> bool:
    """The layout of contiguous logits (csrc/hem/hem_layout.h), from the shape of their targets."""
    return target.dim() < 2 or target.shape[1:].numel() == 1
