"""Every op on tensors that end, or begin, where no memory is: reading or writing past one ends the process.

``python tests/guard_pages.py`` prints each call before it is made. What an op allocates itself lies in torch's memory;
gradients are also written into the memory of logits.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from cases import ARITHMETIC, DTYPES, REDUCTIONS, target_shape
from torch import Tensor

from hem_ext import _native, hem_loss, linear_hem_loss, parallel, upsampled_hem_loss
from hem_ext.arguments import DTYPE_CODES, REDUCTION_CODES
from hem_ext.hem import _backward_into
from hem_ext.linear import _backward_range, _count
from hem_ext.mix import mixed_hem_loss

# Around sixteen lanes, the 32 bits of a word, four vectors, what counts as narrow, and what as predictable.
CLASSES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 79, 80, 81, 95, 97, 127, 128, 129, 513)
POSITIONS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 81, 127, 128, 129)
# Shape and strides of so many classes and positions.
LAYOUTS = {
    "rows": lambda c, n: ((n, c), (c, 1)),
    "rows with gaps": lambda c, n: ((n, c), (c + 3, 1)),
    "transposed": lambda c, n: ((n, c), (1, n)),
    "pixels": lambda c, n: ((2, c, n), (c * n, n, 1)),
    "pixels with gaps": lambda c, n: ((2, c, n), (c * (n + 5), n + 5, 1)),
    "channels_last": lambda c, n: ((2, c, 1, n), (c * n, 1, c * n, c)),
}
# The coarse grid and the fine one.
SIZES = (
    *[((1, 1), (1, 1)), ((1, 2), (3, 5)), ((2, 3), (4, 6)), ((3, 3), (3, 16)), ((2, 5), (7, 17)), ((3, 8), (2, 8))],
    *[((4, 15), (8, 31)), ((2, 16), (5, 64)), ((3, 17), (6, 65)), ((5, 33), (3, 32)), ((2, 40), (4, 129))],
)
TARGET_DTYPES = ((torch.int64, -100), (torch.int32, -1), (torch.uint8, 255))  # and what is ignored
SIDES = ("end", "begin")


class Pages:
    """Memory between two pages that cannot be touched."""

    def __init__(self, size: int) -> None:
        page = mmap.PAGESIZE
        size = -(-size // page) * page
        self._map = mmap.mmap(-1, size + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        libc = ctypes.CDLL(None, use_errno=True)
        for guard in (start, start + page + size):
            if libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        self._memory = torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=page)

    def place(self, numbers: Tensor, side: str) -> Tensor:
        """A copy, in one dimension, of which this side is next to a guard."""
        memory, count = self._memory.view(numbers.dtype), numbers.numel()
        return (memory[-count:] if side == "end" else memory[:count]).copy_(numbers.view(-1))


@cache
def pages(role: str, size: int = 4 << 20) -> Pages:
    return Pages(size)


def guarded(side: str, role: str, x: Tensor) -> Tensor:
    """A dense copy of `x`; those of one role lie in the same memory, one after the other."""
    return pages(role).place(x, side).view(x.shape)


@cache
def random_numbers(dtype: torch.dtype) -> Tensor:
    return (torch.randint(-24, 25, (1 << 19,)) / 8).to(dtype)


@cache
def random_labels(classes: int, dtype: torch.dtype, ignored: int) -> Tensor:
    """A fifth is ignored."""
    labels = torch.randint(0, classes if dtype.itemsize > 1 else min(classes, 255), (1 << 11,))
    return torch.where(torch.rand(labels.shape) < 0.2, ignored, labels).to(dtype)


def logits(side: str, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    return pages("logits").place(random_numbers(dtype)[:extent], side).as_strided(shape, stride)


def targets(side: str, shape: tuple[int, ...], classes: int, n: int, role: str = "target") -> Tensor:
    labels = random_labels(classes, *TARGET_DTYPES[n % 3])[: torch.Size(shape).numel()]
    return guarded(side, role, labels.view(shape))


def per_class(side: str, role: str, classes: int, dtype: torch.dtype) -> Tensor:
    return guarded(side, role, random_numbers(ARITHMETIC[dtype])[:classes].abs())


def options(side: str, classes: int, dtype: torch.dtype, n: int) -> dict[str, Any]:
    """What else there is to choose, in turn."""
    margin = per_class(side, "margin", classes, dtype) if n % 2 else 0.25
    return {"margin": margin, "ignore_index": TARGET_DTYPES[n % 3][1], "reduction": REDUCTIONS[n // 2 % 4]}


def upstream(side: str, loss: Tensor) -> Tensor:
    return guarded(side, "grad_output", random_numbers(loss.dtype)[: loss.numel()].view(loss.shape))


# --- the ops: `side` is that of all tensors, `n` chooses what is not said -----------------------------------------


def hem(n: int, side: str, dtype: torch.dtype, layout: str, classes: int, positions: int) -> None:
    shape, stride = LAYOUTS[layout](classes, positions)
    x = logits(side, dtype, shape, stride).requires_grad_()
    t = targets(side, target_shape(shape), classes, n)
    weight = per_class(side, "weight", classes, dtype) if n % 5 else None
    loss = hem_loss(x, t, weight, **options(side, classes, dtype, n))
    (gradient,) = torch.autograd.grad(loss, x, upstream(side, loss), retain_graph=True)
    # As overwrite_input writes it, from a mask that is guarded as well.
    mask, _, _, denominator = loss.grad_fn.saved_tensors
    ignore_index, _, _, reduction, rows = loss.grad_fn.constants
    memory = logits(side, dtype, tuple(gradient.shape), gradient.stride())
    saved = (guarded(side, "mask", mask), t, weight, guarded(side, "denominator", denominator))
    _backward_into(memory, upstream(side, loss), *saved, ignore_index, reduction, rows)
    assert torch.equal(memory, gradient)
    if rows and len(shape) == 2:  # and some of the classes, as linear_hem_loss has it written
        first = classes // 64 * 32
        part = guarded(side, "part", torch.zeros_like(gradient[:, first:]))
        counts = guarded(side, "counts", _count(saved[0]))
        _backward_range(
            part, upstream(side, loss), saved[0], counts, *saved[1:], ignore_index, classes, first, reduction
        )
        assert torch.equal(part, gradient[:, first:])


def hem_past_the_caches(dtype: torch.dtype) -> None:
    """A gradient of 16 MiB, which is written past them."""
    size = 16 << 20
    memory = pages("a large gradient", size).place(torch.zeros(size // dtype.itemsize, dtype=dtype), "end")
    memory = memory.view(1, 32, -1)
    positions = memory.shape[2]
    mask = guarded("end", "mask", torch.full((1, 1, positions), 2, dtype=torch.int32))  # class 1 is kept
    t, one = torch.zeros((1, positions), dtype=torch.int32), torch.ones((), dtype=ARITHMETIC[dtype])
    _backward_into(memory, one, mask, t, None, one, -100, REDUCTION_CODES["sum"], False)
    assert (memory[:, :2] == torch.tensor([-1, 1]).view(2, 1)).all()
    assert not memory[:, 2:].any()


def share(n: int, side: str, dtype: torch.dtype, layout: str, classes: int, positions: int) -> None:
    """Some of the classes, as if no others had an error."""
    shape, stride = LAYOUTS[layout](classes, positions)
    first, num_classes = n % 3 * 5, classes + n % 4 * 9 + 10
    x = logits(side, dtype, shape, stride)
    t = targets(side, target_shape(shape), num_classes, n)
    own = guarded(side, "own", random_numbers(ARITHMETIC[dtype])[: t.numel()].view(t.shape))
    margins = per_class(side, "margin", num_classes, dtype) if n % 2 else None
    ignore_index, rows = TARGET_DTYPES[n % 3][1], layout.startswith(("rows", "channels_last"))
    given = (margins, 0.25, ignore_index, num_classes, first, rows)
    errors = guarded(side, "errors", parallel._errors(x, t, own, *given))
    mask, kept = parallel._keep(x, t, own, errors, *given)
    mask, counts = guarded(side, "mask", mask), guarded(side, "counts", kept[1].int())
    where = (ignore_index, num_classes, first, classes, DTYPE_CODES[dtype], rows)
    parallel._backward(upstream(side, own), mask, counts, t, *where)


def upsampled(
    n: int, side: str, dtype: torch.dtype, classes: int, coarse: tuple[int, int], fine: tuple[int, int]
) -> None:
    shape = (2, classes, *coarse)
    format = torch.channels_last if n % 7 == 0 else torch.contiguous_format
    x = logits(side, dtype, shape, torch.empty(shape, device="meta", memory_format=format).stride()).requires_grad_()
    t = targets(side, (2, *fine), classes, n)
    weight = per_class(side, "weight", classes, dtype) if n % 5 else None
    loss = upsampled_hem_loss(x, t, weight=weight, align_corners=n % 8 > 3, **options(side, classes, dtype, n))
    torch.autograd.grad(loss, x, upstream(side, loss))


def linear(n: int, side: str, dtype: torch.dtype, classes: int, positions: int) -> None:
    leaves = [
        guarded(side, role, random_numbers(dtype)[: torch.Size(shape).numel()].view(shape)).requires_grad_()
        for role, shape in {"hidden": (positions, 5), "classifier": (classes, 5), "bias": (classes,)}.items()
    ]
    t = targets(side, (positions,), classes, n)
    weight = per_class(side, "weight", classes, dtype) if n % 5 else None
    chosen = {"class_weight": weight, "chunk_size": 16 if n % 4 else None, "skip_finished": n % 3 > 0}
    loss = linear_hem_loss(*leaves, t, **chosen, **options(side, classes, dtype, n))
    torch.autograd.grad(loss, leaves, upstream(side, loss))


def mixed(n: int, side: str, dtype: torch.dtype, layout: str, classes: int, positions: int) -> None:
    shape, stride = LAYOUTS[layout](classes, positions)
    x = logits(side, dtype, shape, stride).requires_grad_()
    labels = [targets(side, target_shape(shape), classes, n, role) for role in ("target_a", "target_b")]
    lam = guarded(side, "lam", torch.full((shape[0],), 0.375))
    weight = per_class(side, "weight", classes, dtype) if n % 5 else None
    loss = mixed_hem_loss(x, *labels, lam, weight=weight, **options(side, classes, dtype, n))
    torch.autograd.grad(loss, x, upstream(side, loss))


def pairwise(first: Sequence[Any], second: Sequence[Any], every: int, shift: int) -> Iterator[tuple[Any, Any]]:
    """One in so many pairs, other ones with another shift: each of the first and each of the second is in some."""
    for (i, a), (k, b) in itertools.product(enumerate(first), enumerate(second)):
        if (i + k + shift) % every == 0:
            yield a, b


def calls() -> Iterator[tuple[Any, ...]]:
    """What is called, and with what."""
    for shift, (side, dtype) in enumerate(itertools.product(SIDES, DTYPES)):
        for layout in LAYOUTS:
            for pair in pairwise(CLASSES, POSITIONS, 8, shift):
                yield hem, side, dtype, layout, *pair
            for pair in pairwise(CLASSES, POSITIONS, 16, shift):
                yield share, side, dtype, layout, *pair
        for classes, sizes in pairwise(CLASSES, SIZES, 6, shift):
            yield upsampled, side, dtype, classes, *sizes
        for pair in pairwise(CLASSES, POSITIONS, 40, shift):
            yield linear, side, dtype, *pair
        for layout in ("rows", "pixels"):
            for pair in pairwise(CLASSES, POSITIONS, 40, shift):
                yield mixed, side, dtype, layout, *pair


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    n = 0
    for isa in _native.library.available_cpu_isas():
        _native.library.select_cpu_isa(isa)
        for op, *given in calls():
            n += 1
            print(isa, op.__name__, n, *given, flush=True)
            op(n, *given)
        for dtype in DTYPES:
            print(isa, hem_past_the_caches.__name__, dtype, flush=True)
            hem_past_the_caches(dtype)


if __name__ == "__main__":
    main()
