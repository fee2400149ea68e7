"""The kernels by other compilers, for another processor, and watched: the same bits as the library's."""

from __future__ import annotations

import pytest
import torch
from cases import eighths, logits, targets
from cross import kernels
from cross.kernels import DTYPES, TARGET_DTYPES, TARGETS, Call

from hem_ext import _native, hem_loss

SHAPES = [
    *[(5, 1), (1, 2), (37, 10), (130, 33), (17, 64)],  # narrow rows
    *[(3, 65), (4, 130), (2, 1000), (1, 4099)],  # wide rows
    *[(2, 1, 5), (1, 3, 16), (2, 21, 45), (1, 33, 130), (3, 150, 7), (1, 70, 64)],  # pixels
]
AVAILABLE = _native.library.available_cpu_isas()
PROGRAMS = [
    (name, isa)
    for name, target in TARGETS.items()
    for isa in target.isas
    if isa in AVAILABLE or target.isas == ("baseline",)
]


def special(x):
    """With infinities, NaN and subnormals in some rows."""
    x = x.clone()
    flat = x.view(-1)
    tiny = torch.tensor(torch.finfo(x.dtype).smallest_normal / 4, dtype=x.dtype)
    largest = torch.finfo(x.dtype).max
    for value in (torch.inf, -torch.inf, torch.nan, tiny, -0.0, largest, -largest):
        flat[torch.randint(0, flat.numel(), (1 + flat.numel() // 200,))] = value
    return x


def calls():
    """Every shape and dtype, with what else there is to choose in turn."""
    found = []
    for n, shape in enumerate(SHAPES):
        for dtype in DTYPES:
            k = n + DTYPES.index(dtype)
            exact = logits(shape, dtype)
            t = targets(shape, TARGET_DTYPES[k % 3], ignore_index=None if k % 2 else 0)
            margin = eighths(shape[1]) if k % 4 == 0 else 0.25
            weight = eighths(shape[1]) if k % 3 == 0 else None
            grad = torch.randn(t.shape) if k % 2 else torch.ones(1)
            common = (margin, weight, -100 if k % 2 else 0, None if k % 2 else 3.0, 16 if k % 5 == 0 else 128)
            for x in (exact, torch.randn(shape).to(dtype), special(torch.randn(shape).to(dtype))):
                found.append(Call(x, t, grad, *common))
    return found


@pytest.fixture(scope="module")
def case():
    """Calls, and what the library makes of them."""
    torch.manual_seed(0)
    given = calls()
    expected = []
    for c in given:
        x = c.input.clone().requires_grad_()
        losses = hem_loss(x, c.target, margin=c.margin, weight=c.weight, ignore_index=c.ignore_index, reduction="none")
        losses.backward((c.grad_loss.to(losses.dtype) / (c.denominator or 1)).expand(c.target.shape))
        expected.append((losses.detach(), x.grad))
    return given, expected


def assert_same_bits(a, b):
    """NaN is NaN, whatever its bits say."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(a.signbit() | a.isnan(), b.signbit() | b.isnan())


@pytest.mark.parametrize(("name", "isa"), PROGRAMS)
def test_same_bits_as_the_library(case, name, isa):
    given, expected = case
    for found, (losses, gradient) in zip(kernels.run(name, isa, given), expected, strict=True):
        assert_same_bits(found.losses, losses)
        assert_same_bits(found.gradient, gradient)
