"""Bilinear upsampling of a segmentation head's logits and their HEM loss in one: it never holds them at full size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from hem_ext import _native, _torch, arguments, reference
from hem_ext.hem import HEMLoss, _over_group, empty_outputs, hem_loss

# --- the native ops -----------------------------------------------------------------------------------------

# The logits are contiguous. The mask is that of hem_ext.hem_loss, for logits of full size with positions side by side.


def _fake_forward(
    input: Tensor,
    target: Tensor,
    margins: Tensor | None,
    margin: float,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    words = (input.shape[1] + 31) // 32
    mask = input.new_empty((input.shape[0], words, target.shape[1] * target.shape[2]), dtype=torch.int32)
    return empty_outputs(input, target, (margins, weight), reduction, mask)


def _fake_backward(
    grad_loss: Tensor,
    mask: Tensor,
    target: Tensor,
    weight: Tensor | None,
    denominator: Tensor,
    ignore_index: int,
    num_classes: int,
    height: int,
    width: int,
    dtype_code: int,
    reduction: int,
    align_corners: bool,
    channels_last: bool,
) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    size, dtype = (target.shape[0], num_classes, height, width), arguments.DTYPES[dtype_code]
    return torch.empty(size, dtype=dtype, device=mask.device, memory_format=memory_format)


_forward = _native.define(
    "upsampled_hem_forward(Tensor input, Tensor target, Tensor? margins, float margin, Tensor? weight, "
    "int ignore_index, int reduction, bool align_corners) -> (Tensor loss, Tensor mask, Tensor denominator)",
    _fake_forward,
    "hem_ext.upsampled_hem_loss",
)
_backward = _native.define(
    "upsampled_hem_backward(Tensor grad_loss, Tensor mask, Tensor target, Tensor? weight, Tensor denominator, "
    "int ignore_index, SymInt num_classes, SymInt height, SymInt width, int dtype, int reduction, bool align_corners, "
    "bool channels_last) -> Tensor",
    _fake_backward,
    "hem_ext.upsampled_hem_loss",
)
_call_forward, _call_backward = _torch.from_autograd(_forward), _torch.from_autograd(_backward)
# Of hem_ext.hem: what backward makes of the mask at full size.
_full_gradient = torch.ops.hem_ext.hem_backward.default


# --- autograd -----------------------------------------------------------------------------------------------


class UpsampledHEM(_torch.Function):
    """Saves a bit for each upsampled logit, the targets and one number.

    `constants` is (margin, ignore_index, reduction, align_corners, channels_last, group).
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        margins: Tensor | None,
        weight: Tensor | None,
        constants: tuple[Any, ...],
    ) -> Tensor:
        margin, ignore_index, reduction, align_corners, channels_last, group = constants
        loss: Tensor
        loss, mask, denominator = _call_forward(
            input.contiguous(), target, margins, margin, weight, ignore_index, reduction, align_corners
        )
        if group is not None:
            loss, denominator = _over_group(loss, denominator, group)
        ctx.save_for_backward(mask, target, weight, denominator)
        size, dtype_code = input.shape[1:], arguments.DTYPE_CODES[input.dtype]
        ctx.constants = (ignore_index, *size, dtype_code, reduction, align_corners, channels_last)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        call: Callable[..., Tensor] = UpsampledHEMGradient.apply if torch.is_grad_enabled() else _call_backward
        return call(grad_loss, *ctx.saved_tensors, *ctx.constants), None, None, None, None


class UpsampledHEMGradient(_torch.Function):
    """The backward of `UpsampledHEM` as a function of `grad_loss`, in which it is linear."""

    @staticmethod
    def forward(ctx: Any, grad_loss: Tensor, *saved: Any) -> Tensor:
        mask, target, weight, denominator, *ctx.constants = saved
        ctx.save_for_backward(grad_loss, mask, target, weight, denominator)
        gradient: Tensor = _call_backward(grad_loss, *saved)
        return gradient

    @staticmethod
    def backward(ctx: Any, grad_grad_input: Tensor) -> tuple[Tensor | None, ...]:
        grad_loss, mask, target, weight, denominator = ctx.saved_tensors
        ignore_index, num_classes, _, _, _, reduction, align_corners, _ = ctx.constants
        # As `HEMGradient` has it, at full size: how the upsampled logits move, by where their loss grows.
        with torch.no_grad():
            ones, dtype_code = torch.ones_like(grad_loss), arguments.DTYPE_CODES[grad_loss.dtype]
            of_mask = (mask, target, weight, denominator, ignore_index, num_classes, dtype_code, reduction, False)
            unit = _full_gradient(ones, *of_mask)
        tangent = _upsampled(grad_grad_input.to(grad_loss.dtype), target.shape[1:], align_corners)
        slope = (tangent * unit).sum(1)
        return slope.sum_to_size(grad_loss.shape), *[None] * 12


_eager_apply = _torch.eager_apply(UpsampledHEM)


def _upsampled(input: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    return F.interpolate(input, size=tuple(size), mode="bilinear", align_corners=align_corners)


# --- what users call ----------------------------------------------------------------------------------------


def upsampled_hem_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    margin: float | Sequence[float] | Tensor = 0.2,
    align_corners: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""The HEM loss of logits that are bilinearly interpolated to the size of the targets, without making them.

    What a segmentation head is usually trained with,

    .. code-block:: python

        logits = F.interpolate(input, size=target.shape[1:], mode="bilinear", align_corners=align_corners)
        loss = hem_loss(logits, target, ...)

    in one. The logits of full size, the largest tensors of such a training step, are there a few pixels at a time;
    backward reads one bit for each of them. The gradient is summed up in a fixed order: it is the same on every run.

    Args:
        input: logits ``(N, C, h, w)``, float32, float64, float16 or bfloat16, contiguous or channels_last (others are
            copied). Interpolated in float32 (float64 for float64), also under autocast.
        target: class indices ``(N, H, W)``, or a mask ``(N, 1, H, W)``, as in :func:`hem_ext.hem_loss`. Any size:
            larger or smaller than the logits', in any ratio, or the same, where it is :func:`hem_ext.hem_loss`.
        align_corners: as in :func:`torch.nn.functional.interpolate`.
        weight, margin, ignore_index, reduction, normalizer, process_group, backend: as in :func:`hem_ext.hem_loss`.

    Returns:
        The loss in the arithmetic's dtype, a scalar, or ``(N, H, W)`` with ``"none"``. Logits of half precision are
        interpolated without rounding the result to half precision, as `input.float()` would be. The interpolated
        numbers may differ from torch's in the last bit, which can decide otherwise where an error equals the mean, or
        0, to rounding. A pixel whose four logits hold a NaN, of any class, has loss NaN, and they gradient NaN.

    Raises:
        ValueError: shapes that do not fit, no classes, no pixels, an `align_corners` that is not a bool, and as
            :func:`hem_ext.hem_loss`.
        TypeError: dtypes that are not listed there.
        IndexError: a target that is neither a class nor `ignore_index` (on CUDA: a device-side assertion).
        RuntimeError: tensors on different devices; ``backend="native"`` without kernels for the device.

    Where torch.func transforms it, or tangents go forwards, and for a DTensor, it is the two steps above.

    Source: ours.

    Example::

        >>> import torch
        >>> from hem_ext import upsampled_hem_loss
        >>> logits = torch.tensor([[[[0.0, 1.0]], [[0.5, 0.0]]]], requires_grad=True)  # 2 classes, 1 x 2
        >>> target = torch.tensor([[[0, 0, 0, 0]]])  # 1 x 4
        >>> upsampled_hem_loss(logits, target, margin=0.25, reduction="none")
        tensor([[[0.7500, 0.3750, 0.0000, 0.0000]]], grad_fn=<UpsampledHEMBackward>)
        >>> upsampled_hem_loss(logits, target, margin=0.25).backward()
        >>> logits.grad
        tensor([[[[-0.8750, -0.1250]],
        <BLANKLINE>
                 [[ 0.8750,  0.1250]]]])
    """
    options: dict[str, Any] = {"margin": margin, "ignore_index": ignore_index, "reduction": reduction}
    options |= {"normalizer": normalizer, "process_group": process_group, "backend": backend}
    if has_torch_function((input, target)):
        options["align_corners"] = align_corners
        told: Tensor = handle_torch_function(upsampled_hem_loss, (input, target), input, target, weight, **options)
        return told
    target = _check(input, target, align_corners)
    if _torch.is_dtensor(input):
        if input.dtype in arguments.ARITHMETIC:  # others hem_loss refuses
            input = _upsampled(input.to(arguments.ARITHMETIC[input.dtype]), target.shape[1:], align_corners)
        return hem_loss(input, target, weight, **options)
    if input.shape[2:] == target.shape[1:]:  # as torch has it, no pixel is reached by the one beside it
        return hem_loss(input, target, weight, **options)
    # As the logits of full size would be, but for their memory.
    full = input.new_empty((1, 1, 1, 1)).expand(*input.shape[:2], *target.shape[1:])
    args = arguments.check(full, target, weight=weight, **options)
    exports = torch.compiler.is_exporting()
    native = not exports and _native.takes(backend, input.device, "upsampled_hem_loss")
    if native and (_torch.is_eager() or torch.compiler.is_compiling()):
        channels_last = not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)
        constants = (args.margin, args.ignore_index, args.reduction, align_corners, channels_last, args.group)
        apply = UpsampledHEM.apply if torch.compiler.is_compiling() else _eager_apply
        loss: Tensor = apply(input, target, args.margins, args.weight, constants)
        return loss if args.divisor is None else loss / args.divisor
    logits = _upsampled(input.to(arguments.ARITHMETIC[input.dtype]), target.shape[1:], align_corners)
    return hem_loss(logits, target, weight, **options) if native else reference.compute(logits, target, args)


def _check(input: Tensor, target: Tensor, align_corners: bool) -> Tensor:
    """Raise for shapes that do not fit together; return `target` as the backends read it."""
    for name, value in (("input", input), ("target", target)):
        arguments.check_dense(name, value)
    if not isinstance(align_corners, bool):
        raise ValueError(f"align_corners must be True or False, got {align_corners!r}")
    given = f"got input of shape {tuple(input.shape)} and target of shape {tuple(target.shape)}"
    target = arguments.converted(target)
    if target.dim() == 4 and target.shape[1] == 1 and not target.is_floating_point():
        target = target.squeeze(1)
    if input.dim() != 4 or target.dim() != 3 or input.shape[0] != target.shape[0]:
        raise ValueError(f"expected input of shape (N, C, h, w) and target of shape (N, H, W), {given}")
    if not input.shape[1]:
        raise ValueError(f"the class dimension is empty: {given}")
    if 0 in (*input.shape[2:], *target.shape[1:]):
        raise ValueError(f"there are no pixels to interpolate between, or none to interpolate to: {given}")
    return target


class UpsampledHEMLoss(HEMLoss):
    """:func:`upsampled_hem_loss` as a module: for a head that returns its logits as it makes them, without upsampling.

    Args:
        weight, margin, ignore_index, reduction, normalizer, process_group, backend: as in :class:`hem_ext.HEMLoss`,
            whose ``state_dict`` it has.
        align_corners: as in :func:`torch.nn.functional.interpolate`.

    Shape:
        - input: ``(N, C, h, w)``
        - target: ``(N, H, W)``
        - output: a scalar, or shaped like the target with ``reduction="none"``

    Example::

        >>> import torch
        >>> from hem_ext import UpsampledHEMLoss
        >>> criterion = UpsampledHEMLoss(ignore_index=255)
        >>> logits = torch.randn(2, 21, 16, 16, requires_grad=True)  # at stride 4
        >>> labels = torch.randint(0, 21, (2, 64, 64), dtype=torch.uint8)
        >>> criterion(logits, labels).backward()
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        margin: float | Sequence[float] | Tensor = 0.2,
        align_corners: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        normalizer: float | Tensor | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            weight,
            margin=margin,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            process_group=process_group,
            backend=backend,
        )
        if not isinstance(align_corners, bool):
            raise ValueError(f"align_corners must be True or False, got {align_corners!r}")
        self.align_corners = align_corners

    def forward(self, input: Tensor, target: Tensor, *, normalizer: float | Tensor | None = None) -> Tensor:
        """The loss; a `normalizer` that is given here takes the place of the module's own."""
        return upsampled_hem_loss(
            input,
            target,
            self.weight,
            margin=self.margin,
            align_corners=self.align_corners,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            normalizer=self.normalizer if normalizer is None else normalizer,
            process_group=self.process_group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (", align_corners=True" if self.align_corners else "")
