"""Calls of every op, and what they answer held against exact arithmetic."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from cases import ARITHMETIC
from hypothesis import event
from properties import exact
from properties.strategies import Case
from torch import Tensor

from hem_ext import _native

Outcome = tuple[Tensor, Tensor]


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    before = _native.library.cpu_isa()
    _native.library.select_cpu_isa(name)
    try:
        yield
    finally:
        _native.library.select_cpu_isa(before)


def outcome(loss: Tensor, x: Tensor, grad_loss: Tensor | None = None, keeps_format: bool = True) -> Outcome:
    """A loss and its gradient, which lies in memory as `x` does."""
    grad_loss = torch.ones_like(loss) if grad_loss is None else grad_loss
    (gradient,) = torch.autograd.grad(loss, x, grad_loss)
    check_gradient(gradient, x, keeps_format)
    assert loss.dtype == ARITHMETIC[x.dtype]
    return loss.detach(), gradient


def check_gradient(gradient: Tensor, x: Tensor, keeps_format: bool = True) -> None:
    """It is one of `x`, and lies as it does."""
    assert gradient.dtype == x.dtype
    assert gradient.shape == x.shape
    if keeps_format and x.is_contiguous():
        assert gradient.is_contiguous()
    elif keeps_format and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        assert gradient.is_contiguous(memory_format=torch.channels_last)


def as_rows(x: Tensor) -> list[list[float]]:
    """Of logits ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, the classes of each position."""
    x = x.detach().double()
    return x.movedim(0 if x.dim() == 1 else 1, -1).reshape(-1, x.shape[0 if x.dim() == 1 else 1]).tolist()


def rows_of(
    logits: Sequence[Sequence[Any]], case: Case, of: exact.Format, slack: Sequence[Sequence[Fraction]] | None = None
) -> list[exact.Row]:
    rows = [
        exact.IGNORED
        if t == case.ignore_index
        else exact.row(y, t, case.margins[t], of, None if slack is None else slack[i])
        for i, (y, t) in enumerate(zip(logits, case.labels.flatten().tolist(), strict=True))
    ]
    for kind, is_there in {
        "an error within rounding of the mean or of 0": any(r.must != r.may for r in rows),
        "an infinite sum of errors": any(r.overflows for r in rows),
        "a loss that is NaN": any(r.breaks for r in rows),
    }.items():
        if is_there:
            event(kind)
    return rows


def check(case: Case, call: Callable[..., Outcome], num_classes: int) -> None:
    """`call(grad_loss, **options)` has the loss and the gradient of the logits of a case."""
    arithmetic, dtype = ARITHMETIC[case.input.dtype], case.input.dtype
    of = exact.FORMATS[arithmetic]
    rows = rows_of(as_rows(case.input), case, of)
    # Once for each sample by itself, to see what is kept of it; then as it is meant.
    losses, gradient = call(None, **case.plain_options)
    kept = exact.kept_by_gradient(rows, as_rows(gradient), dtype)
    found = exact.check_rows(rows, losses.double().flatten().tolist(), kept, of)
    loss, gradient = call(case.grad_loss, **case.options)
    check_reduced(case, rows, found, loss, gradient, num_classes)


def check_reduced(
    case: Case, rows: list[exact.Row], found: list[exact.Found], loss: Tensor, gradient: Tensor, num_classes: int
) -> None:
    expected, coefficients = coefficients_of(case, rows, found, case.sample_weights)
    assert loss.shape == (case.labels.shape if case.reduction == "none" else ())
    exact.check_losses(loss, expected, exact.FORMATS[loss.dtype])
    expected_gradients = exact.gradients(rows, found, coefficients, num_classes)
    for i, (a, e) in enumerate(zip(as_rows(gradient), expected_gradients, strict=True)):
        exact.check_numbers(
            a, e, gradient.dtype, roundings=2 * len(rows) + num_classes + 8, what=f"gradient of sample {i}"
        )


def coefficients_of(
    case: Case, rows: list[exact.Row], found: list[exact.Found], weights: list[Fraction]
) -> tuple[exact.Reduced, list[Fraction]]:
    """The loss, and what each sample's own is multiplied by in backward."""
    of = exact.FORMATS[ARITHMETIC[case.input.dtype]]
    expected = exact.reduce(rows, found, weights, case.reduction, case.divisor, of)
    grads = [Fraction(g) for g in case.grad_loss.double().flatten().tolist()]
    grads = grads if case.reduction == "none" else grads * len(rows)
    return expected, [f * g for f, g in zip(expected.factors, grads, strict=True)]
