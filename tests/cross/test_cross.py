"""The kernels by other compilers, for another processor, and watched: the same bits as the library's."""

from __future__ import annotations

import itertools
import random
import struct

import pytest
import torch
from cases import eighths, logits, targets
from cross import kernels
from cross.kernels import DTYPES, TARGET_DTYPES, TARGETS, Call

from hem_ext import _native, hem_loss, parallel, upsampled_hem_loss
from hem_ext.parallel import Share

SHAPES = [
    *[(5, 1), (1, 2), (37, 10), (130, 33), (17, 64)],  # narrow rows
    *[(3, 65), (4, 130), (2, 1000), (1, 4099)],  # wide rows
    *[(2, 1, 5), (1, 3, 16), (2, 21, 45), (1, 33, 130), (3, 150, 7), (1, 70, 64)],  # pixels
]
SIZES = [  # of logits and targets: enlarged, in whole ratios and others, one way alone, made smaller
    *[((3, 5), (12, 20)), ((4, 3), (7, 11)), ((1, 1), (5, 9)), ((5, 7), (5, 17)), ((3, 19), (9, 19))],
    *[((9, 40), (4, 7)), ((6, 7), (1, 1)), ((6, 9), (6, 4)), ((7, 3), (3, 16))],
    *[((2, 40), (3, 150)), ((33, 2), (40, 3))],  # more columns than a block, more rows than a band of backward
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
                found.append(Call(x, t, grad, *common, past_caches=len(found) % 3 if x.dim() == 2 else 0))
    return found


def finished_rows():
    """Most of them, so that their zeros fill lines, and long runs of them more than that."""
    found = []
    for n, shape in enumerate([(400, 10), (130, 33), (300, 65), (90, 1030), (20, 2500)]):
        for dtype in DTYPES:
            x, t = torch.randn(shape).to(dtype), targets(shape)
            finished = torch.rand(shape[0]) < 0.7
            finished[shape[0] // 3 : shape[0] * 2 // 3] = True
            x[finished, t[finished]] = 99.0
            grad = torch.randn(t.shape)
            found += [Call(x, t, grad, past_caches=past, block=16 if n % 2 else 128) for past in (0, 1, 2)]
    return found


def pairwise(*choices):
    """Few cases in which any two choices of two arguments meet."""
    every = list(itertools.product(*choices))
    random.Random(0).shuffle(every)
    found, met = [], set()
    for case in every:
        pairs = set(itertools.combinations(enumerate(map(str, case)), 2))
        if not pairs <= met:
            found.append(case)
            met |= pairs
    return found


def upsampled_calls():
    found = []
    for (size, out), dtype, classes, kind, align_corners, channels_last, target_dtype, extras, mean in pairwise(
        SIZES, DTYPES, (1, 2, 16, 21, 33, 70), ("exact", "normal", "special"), (False, True), (False, True),
        TARGET_DTYPES, ("", "margins", "weight", "ignored", "margins, weight, ignored"), (False, True),
    ):  # fmt: skip
        shape = (2, classes, *size)
        x = logits(shape, dtype) if kind == "exact" else torch.randn(shape).to(dtype)
        ignore_index = 0 if "ignored" in extras else -100
        t = targets((2, classes, *out), target_dtype, ignore_index=0 if "ignored" in extras else None)
        found.append(
            Call(
                special(x) if kind == "special" else x,
                t,
                torch.ones(1) if mean else torch.randn(t.shape),
                margin=eighths(classes) if "margins" in extras else 0.25,
                weight=eighths(classes) if "weight" in extras else None,
                ignore_index=ignore_index,
                denominator=3.0 if mean else None,
                align_corners=align_corners,
                channels_last=channels_last,
            )
        )
    return found


def shares():
    """Some of 200 classes, of every kind of layout."""
    found = []
    for n, (shape, first) in enumerate([
        *[((37, 10), 0), ((130, 33), 7), ((5, 1), 199), ((3, 100), 50), ((2, 199), 1)],
        *[((2, 1, 5), 3), ((2, 21, 45), 0), ((1, 33, 130), 167)],
    ]):  # fmt: skip
        for dtype in DTYPES:
            k = n + DTYPES.index(dtype)
            t = targets((shape[0], 200, *shape[2:]), TARGET_DTYPES[k % 3], ignore_index=None if k % 2 else 0)
            t = torch.where(torch.rand(t.shape) < 0.5, torch.full_like(t, first + shape[1] // 2), t)  # half are here
            of_share = {"target_logits": torch.randn(t.shape).to(dtype), "of": 200, "first": first}
            for x in (logits(shape, dtype), special(torch.randn(shape).to(dtype))):
                found.append(
                    Call(x, t, torch.randn(t.shape), eighths(200) if k % 2 else 0.25, ignore_index=-100 if k % 2 else 0,
                         block=16 if k % 5 == 0 else 128, **of_share)
                )  # fmt: skip
    return found


def share_of_library(c):
    dtype = kernels.arithmetic(c.input.dtype)
    margins, margin = (c.margin.to(dtype), 0.0) if isinstance(c.margin, torch.Tensor) else (None, c.margin)
    share = Share(margins, margin, c.ignore_index, c.of, c.first, c.input.dim() == 2)
    given = (c.input, c.target, c.target_logits.to(dtype))
    errors = parallel._errors(*given, *share)
    mask, kept = parallel._keep(*given, errors, *share)
    where = (c.ignore_index, c.of, c.first, c.input.shape[1], DTYPES.index(c.input.dtype), share.rows)
    return errors, mask, kept, parallel._backward(c.grad_loss.to(dtype), mask, kept[1].int(), c.target, *where)


def of_library(c):
    """Losses, gradient, and where the library cuts it as the driver does, the mean."""
    options = {"margin": c.margin, "weight": c.weight, "ignore_index": c.ignore_index}
    loss, x, mean = hem_loss, c.input, None
    if x.dim() == 4:
        loss, options["align_corners"] = upsampled_hem_loss, c.align_corners
        mean = loss(x, c.target, **options)
        x = x.to(memory_format=torch.channels_last if c.channels_last else torch.contiguous_format)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    losses = loss(x, c.target, reduction="none", **options)
    losses.backward((c.grad_loss.to(losses.dtype) / (c.denominator or 1)).expand(c.target.shape))
    return losses.detach(), x.grad, mean


@pytest.fixture(scope="module")
def case():
    """Calls, and what the library makes of them."""
    torch.manual_seed(0)
    given = calls() + finished_rows() + upsampled_calls()
    of_classes = shares()
    return given, [of_library(c) for c in given], of_classes, [share_of_library(c) for c in of_classes]


def mean_of(partials, dtype):
    loss = weight = 0.0
    for of_block in partials.tolist():  # in order, as the library adds them up
        loss, weight = loss + of_block[0], weight + of_block[1]
    return torch.tensor(loss / weight if weight > 0 else loss, dtype=dtype)


def assert_same_bits(a, b):
    """NaN is NaN, whatever its bits say."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(a.signbit() | a.isnan(), b.signbit() | b.isnan())


@pytest.mark.parametrize(("name", "isa"), PROGRAMS)
def test_same_bits_as_the_library(case, name, isa):
    given, expected, of_classes, of_share = case
    results = kernels.run(name, isa, given + of_classes)
    for found, (losses, gradient, mean) in zip(results[: len(given)], expected, strict=True):
        assert_same_bits(found.losses, losses)
        assert_same_bits(found.gradient, gradient)
        if mean is not None:
            assert_same_bits(mean_of(found.partials, mean.dtype), mean)
    for found, *share in zip(results[len(given) :], *zip(*of_share, strict=True), strict=True):
        for a, b in zip(found, share, strict=True):
            assert_same_bits(a, b)


# What a Mach-O file begins with, and the processor that it is for.
@pytest.mark.parametrize(("architecture", "cpu"), [("aarch64", 0x0100000C), ("x86_64", 0x01000007)])
def test_macos_has_what_the_sources_need(tmp_path, architecture, cpu):
    pytest.importorskip("ziglang")
    for path in kernels.objects_for_macos(architecture, tmp_path):
        assert struct.unpack("<2I", path.read_bytes()[:8]) == (0xFEEDFACF, cpu)
