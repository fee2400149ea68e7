"""Inputs that the tests share, and what they watch calls with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

REDUCTIONS = ("mean", "batchmean", "sum", "none")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# One table: relative and absolute error of a loss computed in float32 or float64, and of a gradient rounded
# once to the dtype of the logits.
LOSS_TOLERANCE = {
    torch.float32: {"rtol": 2e-6, "atol": 1e-6},
    torch.float64: {"rtol": 1e-14, "atol": 1e-14},
}
GRADIENT_TOLERANCE = {
    torch.float32: {"rtol": 1e-6, "atol": 1e-8},
    torch.float64: {"rtol": 1e-14, "atol": 1e-16},
    torch.float16: {"rtol": 2**-10, "atol": 1e-7},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-8},
}

ARITHMETIC = {torch.float64: torch.float64, torch.float32: torch.float32}
ARITHMETIC |= {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def num_classes(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 1 else shape[1]


def target_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return () if len(shape) == 1 else (shape[0], *shape[2:])


def logits(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiples of 1/8: every error is exact in every dtype, so no rounding can move one across the mean."""
    return (torch.randint(-24, 25, shape) / 8).to(dtype)


def targets(shape: tuple[int, ...], dtype: torch.dtype = torch.int64, ignore_index: int | None = None) -> Tensor:
    """Random classes; a quarter is `ignore_index` when one is given."""
    t = torch.randint(0, num_classes(shape), target_shape(shape))
    if ignore_index is not None:
        t = torch.where(torch.rand(t.shape) < 0.25, ignore_index, t)
    return t.to(dtype)


def eighths(count: int) -> Tensor:
    """One margin or weight per class, multiples of 1/8."""
    return torch.randint(0, 17, (count,)) / 8


def assert_gradient(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double().cpu(), expected.cpu(), **GRADIENT_TOLERANCE[actual.dtype])


def assert_loss(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double().cpu(), expected.cpu(), **LOSS_TOLERANCE[actual.dtype])


def as_processes(monkeypatch, calls):
    """What calls return that are one each of several processes, which add up a number of each."""
    own = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count, group: own.append(count.clone()))
    for call in calls:
        call()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count, group: count.copy_(sum(own)))
    return [call() for call in calls]


class Calls(TorchDispatchMode):
    """Notes the ops of hem_ext that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hem_ext":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))
