"""What a call to a loss may be given, in the same words for every op and backend."""

from __future__ import annotations

import contextlib
import math
import operator
import sys
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor, nn

REDUCTIONS = ("none", "mean", "sum", "batchmean")  # the position is the code the native ops take
REDUCTION_CODES = {name: code for code, name in enumerate(REDUCTIONS)}
BACKENDS = ("auto", "native", "reference")
BAD_VALUE = "must be finite and not negative"  # the words of hem_cpu.cpp
TARGET_DTYPES = (torch.int64, torch.int32, torch.uint8)
CONVERTED = {
    torch.bool: torch.uint8,
    torch.int8: torch.int32,
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
}
"""What the backends are given in the place of other class indices."""
ARITHMETIC = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
"""The dtype the loss is computed and returned in, by the dtype of the logits."""
DTYPES = tuple(ARITHMETIC)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
"""What the native ops take for the dtype of the logits, as InputType in csrc/hem/hem_layout.h: a torch.dtype would cost
a microsecond on its way into one."""


_LARGEST_MARGIN = torch.finfo(torch.float32).max
_TENSORS = (Tensor, nn.Parameter)


def class_dim(shape: Sequence[int]) -> int:
    """Of logits ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``."""
    return 0 if len(shape) == 1 else 1


class Arguments(NamedTuple):
    margin: float  # used where margins is None
    margins: Tensor | None  # (C,), contiguous, of the arithmetic's dtype
    weight: Tensor | None  # (C,), contiguous, of the arithmetic's dtype
    ignore_index: int
    reduction: int  # position in REDUCTIONS
    group: torch.distributed.ProcessGroup | None = None  # None where there is nothing to ask the others
    divisor: float | Tensor | None = None  # of the sum, which `reduction` then is


def check(
    input: Tensor,
    target: Tensor,
    margin: float | Sequence[float] | Tensor = 0.2,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
    process_group: torch.distributed.ProcessGroup | None = None,
    label_smoothing: float = 0.0,
    normalizer: float | Tensor | None = None,
    overwrite_input: bool = False,
) -> Arguments:
    """Raise for a wrong argument before anything is computed; return the rest as the backends take it.

    These are the arguments of :func:`hem_ext.hem_loss`, and what a function takes as ``**options`` it hands on to here;
    `target` is what :func:`class_indices` makes of it.
    Values inside a tensor are left to the backends: they are checked where they lie, without waiting for
    a device.
    """
    for name, value in (("input", input), ("target", target)):
        check_dense(name, value)
    arithmetic = ARITHMETIC.get(input.dtype)
    if arithmetic is None:
        raise TypeError(f"input must be float32, float64, float16 or bfloat16 logits, got {input.dtype}")
    shape = input.shape
    if target.dtype not in TARGET_DTYPES:
        raise _no_indices(target, shape)
    if not shape:
        raise ValueError(
            f"input must have shape (C,), (N, C) or (N, C, d1, ..., dk), got input of shape () and target of "
            f"shape {tuple(target.shape)}"
        )
    expected = shape[:0] if len(shape) == 1 else shape[:1] + shape[2:]
    if target.shape != expected:
        raise ValueError(
            f"expected target of shape {tuple(expected)} for input of shape {tuple(shape)} "
            f"((C,) -> (), (N, C) -> (N,), (N, C, d1, ..., dk) -> (N, d1, ..., dk)), "
            f"got target of shape {tuple(target.shape)}{_if_one_hot(target, shape)}"
        )
    num_classes = shape[class_dim(shape)]
    if num_classes == 0:
        raise ValueError(
            f"the class dimension is empty: got input of shape {tuple(shape)} and target of shape {tuple(target.shape)}"
        )
    if target.device != input.device:
        raise other_device("target", target, input)

    ignore_index = check_options(ignore_index, reduction, backend, process_group, label_smoothing, overwrite_input)
    given, margins = margin, None
    margin = margin_value(given)
    if isinstance(margin, Tensor):
        # A sequence is the host's and already checked; a tensor must lie where the input does.
        if not margin.dim():
            margin = margin.expand(num_classes)  # one number for all
            given = margin
        margins = margin if margin is given else margin.to(arithmetic).to(input.device, non_blocking=True)
        margins = class_tensor("margin", margins, input, num_classes, arithmetic)
        margin = 0.0
    elif margin > torch.finfo(arithmetic).max:
        raise ValueError(f"margin {BAD_VALUE} in {arithmetic}, got {margin:g}")
    if weight is not None:
        weight = class_tensor("weight", weight, input, num_classes, arithmetic)
    group = process_group
    if group is not None and (reduction in ("sum", "none") or group.size() == 1):
        group = None
    divisor = None
    if normalizer is not None:
        divisor = check_normalizer(normalizer, reduction, arithmetic=arithmetic)
        if isinstance(divisor, Tensor):
            if divisor.device not in (input.device, torch.device("cpu")):
                raise other_device("normalizer", divisor, input)
            divisor = divisor.to(arithmetic)
        if group is not None:
            divisor = or_one(divisor) / group.size()
        least = torch.finfo(arithmetic).tiny * torch.finfo(arithmetic).eps
        if not isinstance(divisor, Tensor) and divisor <= least / 2:
            divisor = 0.0  # it is rounded to that in the division
        divisor = or_one(divisor)
        reduction, group = "sum", None
    return Arguments(margin, margins, weight, ignore_index, REDUCTION_CODES[reduction], group, divisor)


def class_indices(input: Tensor, target: Tensor) -> Tensor:
    """`target` as the backends read it: without the channel of a mask ``(N, 1, d1, ..., dk)``, of one of their dtypes.

    What cannot be made into class indices is left as it is, for :func:`check`.
    """
    if not isinstance(input, Tensor) or not isinstance(target, Tensor) or input.is_nested or target.is_nested:
        return target
    target = converted(target)
    shape = input.shape
    if len(shape) > 1 and target.shape == (shape[0], 1, *shape[2:]) and not target.is_floating_point():
        target = target.squeeze(1)
    return target


def converted(target: Tensor) -> Tensor:
    """Class indices of a dtype that the backends read."""
    if target.dtype not in CONVERTED:
        return target
    check_memory("target", target)
    return target.to(CONVERTED[target.dtype])


def _no_indices(target: Tensor, shape: torch.Size) -> TypeError:
    """Of targets of another dtype, for logits of `shape`: with the cure where there is one."""
    cure = ""
    if target.is_floating_point():
        cure = ": use .long() where they are class indices"
        if target.shape == shape:
            cure = ": use .argmax(1) where they are one-hot, hem_ext.mix where they mix two classes"
            if len(shape) == 1:
                cure = cure.replace("argmax(1)", "argmax(0)")
    expected = "int64, int32 or uint8 class indices (or bool, int8, int16 or uint16)"
    return TypeError(f"target must be {expected}, got {target.dtype} of shape {tuple(target.shape)}{cure}")


def _if_one_hot(target: Tensor, shape: torch.Size) -> str:
    if target.shape != shape:
        return ""
    return f"; use .argmax({class_dim(shape)}) where they are one-hot"


def check_normalizer(
    normalizer: float | Tensor,
    reduction: str = "mean",
    name: str = "normalizer",
    arithmetic: torch.dtype = torch.float64,
) -> float | Tensor:
    """Raise for what nothing can be divided by; return it as a float or a tensor of shape ()."""
    if reduction not in ("mean", "batchmean"):
        raise ValueError(f"{name} is what 'mean' and 'batchmean' divide by, got it with reduction {reduction!r}")
    if not isinstance(normalizer, Tensor):
        try:
            normalizer = as_float(normalizer)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} must be a number or a tensor of one, got {normalizer!r}") from error
        _check_count(name, normalizer, arithmetic)
        return normalizer
    check_memory(name, normalizer)
    if normalizer.dim() or normalizer.is_complex() or normalizer.dtype == torch.bool:
        given = f"{normalizer.dtype} of shape {tuple(normalizer.shape)}"
        raise ValueError(f"{name} must be a number or a tensor of one, of shape (), got {given}")
    if normalizer.requires_grad:
        raise ValueError(f"{name} is a constant of the loss and gets no gradient, but it requires one: detach it")
    if normalizer.device.type == "cpu" and not torch.compiler.is_compiling():
        # torch.vmap may map over it, or it is a fake one: then there is no value to look at.
        with contextlib.suppress(RuntimeError):
            _check_count(name, normalizer.item(), arithmetic)
    return normalizer


def _check_count(name: str, value: float, arithmetic: torch.dtype) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} {BAD_VALUE}, got {value:g}")
    if value > torch.finfo(arithmetic).max:
        raise ValueError(f"{name} {BAD_VALUE} in {arithmetic}, got {value:g}")


def or_one(count: float | Tensor) -> float | Tensor:
    """What to divide by: where nothing was counted, what is divided is 0."""
    return count.masked_fill(count == 0, 1) if isinstance(count, Tensor) else count or 1.0


def check_dense(name: str, value: Tensor) -> None:
    """Raise for what is no tensor, and for one that is not all of its memory."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else value.layout
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one")
    check_memory(name, value)


def check_memory(name: str, value: Tensor) -> None:
    """Raise where a storage was resized under a tensor: torch's own operators would read what is not there."""
    if torch.compiler.is_compiling() or type(value) not in _TENSORS or not value.numel():
        return
    try:
        held = value.untyped_storage().nbytes()
    except RuntimeError:  # torch.func's have none
        return
    last = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
    needed = (value.storage_offset() + last + 1) * value.element_size()
    if held < needed:
        raise RuntimeError(
            f"the memory of {name} is not allocated: its storage was resized to {held} bytes, and {needed} are needed"
        )


def as_float(number: float) -> float:
    """The same; infinity for an int that is larger than any float."""
    try:
        return float(number)
    except OverflowError:
        return math.copysign(math.inf, number > 0 or -1)


def is_plain(input: object, margin: object, weight: object, ignore_index: object) -> bool:
    """Whether `check` would hand these on as they are. What else does not fit, the native ops refuse themselves."""
    return (
        weight is None
        and type(margin) is float
        and 0.0 <= margin <= _LARGEST_MARGIN
        and type(ignore_index) is int
        and type(input) in _TENSORS
    )


def check_options(
    ignore_index: int,
    reduction: str,
    backend: str,
    process_group: torch.distributed.ProcessGroup | None,
    label_smoothing: float = 0.0,
    overwrite_input: bool = False,
) -> int:
    """Raise for an option that no call could take; return `ignore_index` as an int."""
    if type(ignore_index) is not int:
        try:
            ignore_index = operator.index(ignore_index)
        except TypeError as error:
            raise TypeError(f"ignore_index must be an int, got {ignore_index!r}") from error
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit into an int64, got {ignore_index}")
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of 'mean', 'batchmean', 'sum' or 'none', got {reduction!r}")
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be one of 'auto', 'native' or 'reference', got {backend!r}")
    check_group("process_group", process_group)
    if label_smoothing != 0:
        raise ValueError(f"label_smoothing must be 0, for HEM has nothing to smooth, got {label_smoothing!r}")
    if not isinstance(overwrite_input, bool):
        raise TypeError(f"overwrite_input must be True or False, got {overwrite_input!r}")
    if overwrite_input and backend == "reference":
        raise ValueError("overwrite_input is for the native kernels: the reference reads the logits in backward")
    return ignore_index


def check_group(name: str, group: torch.distributed.ProcessGroup | None) -> None:
    """Raise for what is neither None nor a group that this process is in."""
    # A torch without distributed has the class as well, and nothing is one.
    if group is None or isinstance(group, torch.distributed.ProcessGroup):
        return
    given = type(group).__name__
    if group is getattr(getattr(torch.distributed, "GroupMember", None), "NON_GROUP_MEMBER", None):
        given = "the answer of new_group to a process that is not in the group"
    elif hasattr(group, "get_group"):
        given += ": give its get_group()"
    raise TypeError(f"{name} must be a torch.distributed.ProcessGroup or None, got {given}")


def margin_value(margin: float | Sequence[float] | Tensor) -> float | Tensor:
    """`margin` as a float, or as a tensor of one margin per class. Its values are checked unless it was a tensor."""
    if isinstance(margin, Tensor):
        return margin
    if not isinstance(margin, (float, int)):
        try:
            if isinstance(margin, (str, bytes, Mapping, Set)):  # what they iterate over is something else
                raise TypeError(type(margin).__name__)
            margin = [as_float(m) for m in margin] if hasattr(margin, "__len__") else as_float(margin)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise TypeError(f"margin must be a number or one number per class, got {margin!r}") from error
    if not isinstance(margin, list):
        if not 0 <= margin <= sys.float_info.max:
            raise ValueError(f"margin {BAD_VALUE}, got {as_float(margin):g}")
        return float(margin)
    for c, m in enumerate(margin):
        if not 0 <= m < math.inf:
            raise _bad_value("margin", c, m)
    return torch.tensor(margin, dtype=torch.float64)


def check_class_values(name: str, values: Tensor) -> None:
    """Raise where a tensor cannot be one margin or weight per class. Waits for the device of `values`."""
    if not isinstance(values, Tensor):
        raise _no_tensor(name, values)
    check_memory(name, values)
    if values.dim() != 1 and (name != "margin" or values.dim()):
        raise ValueError(f"{name} must have shape (C,), got {name} of shape {tuple(values.shape)}")
    if values.dtype == torch.bool or values.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {values.dtype}")
    if values.requires_grad:
        raise ValueError(f"{name} is a constant of the loss and gets no gradient, but it requires one: detach it")
    if values.device.type == "meta":
        return  # no values to check
    bad = ~(values >= 0) | values.isinf()
    if any_of(bad):
        if not values.dim():
            raise ValueError(f"{name} {BAD_VALUE}, got {values.item():g}")
        c = int(bad.nonzero()[0])
        raise _bad_value(name, c, values[c].item())


def any_of(bad: Tensor) -> bool:
    """Whether any is set. None where there is no value to look at: torch.vmap maps over it, or it is a fake one."""
    try:
        return bool(bad.any())
    except RuntimeError:
        return False


def check_values(
    target: Tensor, num_classes: int, ignore_index: int, *, name: str = "target", **class_values: Tensor | None
) -> None:
    """Raise for a target that is no class, and for margins or weights, by their names, that cannot be.

    Not on a GPU, where it would wait for the device: there the kernels assert. Nor in a compiled graph, which cannot
    branch on values.
    """
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    labels = target.long()
    bad = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if any_of(bad):
        position = bad.nonzero()[0].tolist()
        raise IndexError(
            f"{name}{position} is {labels[tuple(position)].item()}, which is neither a class in "
            f"[0, {num_classes}) nor ignore_index ({ignore_index})"
        )
    check_weights(**class_values)


def check_weights(**class_values: Tensor | None) -> None:
    """Raise for margins or weights, by their names, that cannot be; where :func:`check_values` does."""
    for name, values in class_values.items():
        if values is not None and values.device.type == "cpu" and not torch.compiler.is_compiling():
            check_class_values(name, values)


def class_tensor(name: str, values: Tensor, input: Tensor, num_classes: int, arithmetic: torch.dtype) -> Tensor:
    """One margin or weight per class as the backends take it; raise for what is none for these logits."""
    if not isinstance(values, Tensor):
        raise _no_tensor(name, values)
    check_memory(name, values)
    if values.dtype == torch.bool or values.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {values.dtype}")
    if values.shape != (num_classes,):
        raise ValueError(
            f"{name} must have shape (C,) = ({num_classes},) for input of shape {tuple(input.shape)}, "
            f"got {name} of shape {tuple(values.shape)}"
        )
    if values.device != input.device:
        raise other_device(name, values, input)
    if values.requires_grad:
        raise ValueError(f"{name} is a constant of the loss and gets no gradient, but it requires one: detach it")
    return values.to(arithmetic).contiguous()


def _no_tensor(name: str, value: object) -> TypeError:
    """Of what stands in the place of a number per class."""
    hint = ""
    if name == "weight" and isinstance(value, (float, int)):
        hint = f" {value!r}; did you mean margin={value!r}?"
    return TypeError(f"{name} must be a tensor of shape (C,), got {type(value).__name__}{hint}")


def _bad_value(name: str, c: int, value: float) -> ValueError:
    return ValueError(f"{name} {BAD_VALUE}, but {name}[{c}] is {value:g}")


def other_device(name: str, value: Tensor, first: Tensor, of: str = "input") -> RuntimeError:
    return RuntimeError(f"expected {name} on the device of {of}, {first.device}, got {name} on {value.device}")
