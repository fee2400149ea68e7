"""linear_hem_loss against scalar loops, against the classifier and the loss one after the other, and what it costs."""

from __future__ import annotations

import copy
import itertools
import re
from collections import Counter
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import ARITHMETIC, DTYPES, REDUCTIONS, Calls, assert_loss, eighths
from measure import allocated_at_once
from processes import Functions, Worlds
from torch import nn
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from hem_ext import HEMLoss, _native, arguments, hem_loss, linear
from hem_ext.linear import LinearHEMLoss, linear_hem_loss

PAGE = Path(__file__).parents[1] / "docs" / "linear.md"
D = 6  # features


def transposed(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def wider(x):
    return torch.cat([x, x], -1)


# How hidden lies in memory, from contiguous values; those of a convolution have features in dimension 1.
LAYOUTS = {
    "rows": ((37, D), lambda x: x),
    "one row": ((D,), lambda x: x),
    "transposed": ((1100, D), transposed),
    "few transposed": ((37, D), transposed),
    "features of wider rows": ((37, D), lambda x: wider(x)[:, :D]),
    "every other feature": ((37, D), lambda x: x.repeat_interleave(2, -1)[:, ::2]),
    "sequences": ((3, 13, D), lambda x: x),
    "all but the last": ((3, 12, D), lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1]),
    "the last alone": ((9, 1, D), lambda x: torch.cat([x, x], 1)[:, 1:]),
    "expanded": ((3, 12, D), lambda x: x[:1].expand(3, 12, D)),
    "time first": ((3, 12, D), lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
    "four dimensions": ((2, 3, 4, D), lambda x: x[:, :, 1:]),
    "pixels": ((2, D, 5, 7), lambda x: x),
    "pixels, channels_last": ((2, D, 5, 7), lambda x: x.to(memory_format=torch.channels_last)),
    "large pixels": ((2, D, 32, 33), lambda x: x),
    "cropped pixels": ((2, D, 5, 7), lambda x: x[..., 1:, :-2]),
    "features of wider pixels": ((2, D, 5, 7), lambda x: torch.cat([x, x], 1)[:, :D]),
    "one dimension": ((3, D, 11), lambda x: x),
}
CONVOLUTIONS = [name for name in LAYOUTS if "pixels" in name or name == "one dimension"]


def make(layout="rows", num_classes=40, dtype=torch.float32, share=0.5, ignored=0.1, bias=True, values="exact"):
    """Hidden, weight, bias and target. "exact": logits are multiples of 1/8 below 8 and in every dtype as they are."""
    shape, lay = LAYOUTS[layout] if isinstance(layout, str) else (layout, lambda x: x)
    if values == "exact":
        hidden, weight = torch.randint(-2, 3, shape) / 2, torch.randint(-4, 5, (num_classes, D)) / 4
        offset = torch.randint(-8, 9, (num_classes,)) / 8
    else:
        hidden, weight, offset = torch.randn(shape), torch.randn(num_classes, shape[-1] if len(shape) < 3 else D), None
        offset = torch.randn(num_classes)
    hidden, weight = lay(hidden.to(dtype)), weight.to(dtype)
    if layout in CONVOLUTIONS:
        weight = weight.view(*weight.shape, *[1] * (len(shape) - 2))
    offset = offset.to(dtype) if bias else None
    y = logits_of(hidden.double(), weight.double(), None if offset is None else offset.double())
    right = y.argmax(1 if layout in CONVOLUTIONS else -1)
    target = torch.where(torch.rand(right.shape) < share, (right + 1) % num_classes, right)
    return hidden, weight, offset, torch.where(torch.rand(right.shape) < ignored, -100, target)


def logits_of(hidden, weight, bias):
    """As the classifier makes them, with the classes where it puts them."""
    if weight.dim() == 2:
        return F.linear(hidden, weight, bias)
    return F.linear(hidden.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


def unfused(hidden, weight, bias, target, *, class_weight=None, chunk_size=None, skip_finished=True, **options):
    y = logits_of(hidden, weight, bias)
    y = y.movedim(-1, 1) if weight.dim() == 2 and y.dim() > 1 else y
    return hem_loss(y, target, weight=class_weight, **options)


def leaf(x, needed=True):
    """A leaf with the strides of x, and nothing of it."""
    return None if x is None else x.detach().requires_grad_(needed)


def gradients(loss_of, hidden, weight, bias, target, grad_loss=None, **options):
    """The loss and the gradients of hidden, weight and bias."""
    leaves = [leaf(hidden), leaf(weight), leaf(bias)]
    loss = loss_of(*leaves, target, **options)
    loss.backward(torch.ones_like(loss) if grad_loss is None else grad_loss)
    return loss.detach(), *(None if x is None else x.grad for x in leaves)


def equal(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, **tolerance)


EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, in another order


class Ops(TorchDispatchMode):
    """Notes the products that run, as (rows, depth, columns), and every new tensor's shape."""

    def __init__(self):
        super().__init__()
        self.products, self.made = [], Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").split(".")[0].rstrip("_")
        if name in ("mm", "addmm", "bmm", "baddbmm", "linear"):
            left, right = args[-2:] if name in ("addmm", "baddbmm") else args[:2]
            self.products.append((*left.shape, right.shape[-1]))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and not func.is_view:
                self.made[tuple(x.shape)] += 1
        return result


def backward_ops(hidden, weight, bias, target, needed=(True, True, True), **options):
    """What backward does, and the gradients."""
    leaves = [leaf(x, need) for x, need in zip((hidden, weight, bias), needed, strict=True)]
    loss = linear_hem_loss(*leaves, target, **options)
    with Ops() as seen:
        loss.sum().backward()
    return seen, [None if x is None else x.grad for x in leaves]


# --- values ---------------------------------------------------------------------------------------------------


def check_against_oracle(hidden, weight, bias, target, grad_loss=None, **options):
    found = gradients(linear_hem_loss, hidden, weight, bias, target, grad_loss, **options)
    class_dim = 1 if weight.dim() > 2 else -1
    h, w = hidden.double().movedim(class_dim, -1).reshape(-1, D), weight.double().flatten(1)
    y = h @ w.t() + (0 if bias is None else bias.double())
    given = {k: v for k, v in options.items() if k not in ("chunk_size", "class_weight", "skip_finished")}
    flat = None if grad_loss is None else grad_loss.reshape(-1) if grad_loss.dim() else grad_loss
    loss, g = oracle.hem(y, target.reshape(-1), weight=options.get("class_weight"), grad_loss=flat, **given)
    assert found[0].dtype == ARITHMETIC[hidden.dtype]
    assert_loss(found[0], loss.view(target.shape) if loss.dim() else loss)
    # An entry of G is rounded to the dtype of the products, and their sum once more: of half types that is all.
    error = (2 if hidden.dtype.itemsize == 2 else 8) * torch.finfo(hidden.dtype).eps
    shape = hidden.movedim(class_dim, -1).shape
    expected = [(g @ w).view(shape).movedim(-1, class_dim), (g.t() @ h).view(weight.shape), g.sum(0)]
    bounds = [(g.abs() @ w.abs()).view(shape).movedim(-1, class_dim), (g.abs().t() @ h.abs()).view(weight.shape)]
    bounds.append(g.abs().sum(0))
    for a, b, bound in zip(found[1:], expected, bounds, strict=True):
        if a is not None:
            assert a.dtype == hidden.dtype
            assert ((a.double() - b).abs() <= error * bound + 1e-7).all()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_classes", "bias"), [(3, True), (40, False), (70, True), (130, False)])
def test_matches_the_oracle(device, dtype, num_classes, bias):
    for reduction, chunk_size in zip(REDUCTIONS, (None, 8, 1, 30), strict=True):
        x = make(num_classes=num_classes, dtype=dtype, bias=bias)
        check_against_oracle(*x, reduction=reduction, margin=0.25, chunk_size=chunk_size)
        options = {"margin": eighths(num_classes), "class_weight": eighths(num_classes), "chunk_size": chunk_size}
        check_against_oracle(*x, reduction=reduction, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(device, layout):
    for reduction, (chunk_size, skip) in zip(
        REDUCTIONS, [(None, True), (9, True), (500, False), (2000, True)], strict=True
    ):
        x = make(layout, 5, torch.float64)
        grad_loss = torch.randn(x[3].shape if reduction == "none" else ())
        options = {"reduction": reduction, "chunk_size": chunk_size, "skip_finished": skip}
        check_against_oracle(*x, grad_loss.double(), **options)


@pytest.mark.parametrize("layout", ["rows", "pixels", "pixels, channels_last", "large pixels", "every other feature"])
def test_the_gradient_lies_as_hidden_does(device, layout):
    hidden, weight, bias, target = make(layout, 5)
    hidden = leaf(hidden)
    (gradient,) = torch.autograd.grad(linear_hem_loss(hidden, weight, bias, target), hidden)
    assert gradient.stride() == torch.empty_like(hidden).stride()


@pytest.mark.parametrize("lay", [lambda x: x, transposed], ids=["rows", "transposed"])
@pytest.mark.parametrize("shape", [(1100, D), (2, D), (37, 1), (2, 13, D), (2, 13, 1)])
def test_the_gradient_of_rows_lies_as_they_do(device, shape, lay):
    hidden = leaf(lay(torch.randn(shape)))
    loss = linear_hem_loss(hidden, torch.randn(5, shape[-1]), None, torch.zeros(shape[:-1], dtype=torch.long))
    assert torch.autograd.grad(loss, hidden)[0].stride() == hidden.stride()


@pytest.mark.parametrize("layout", ["rows", "all but the last", "large pixels"])
@pytest.mark.parametrize("target_dtype", [torch.int32, torch.uint8])
def test_targets_of_other_dtypes_and_strides(device, layout, target_dtype):
    hidden, weight, bias, target = make(layout, 5)
    target = target.masked_fill(target == -100, 255).to(target_dtype)
    target = torch.stack([target, target], -1)[..., 0]
    for reduction in ("mean", "batchmean"):
        class_weight = eighths(5)
        check_against_oracle(
            hidden, weight, bias, target, ignore_index=255, reduction=reduction, class_weight=class_weight
        )


@pytest.mark.parametrize("layout", ["rows", "sequences", "large pixels"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_values_of_any_size(device, layout, reduction):
    x = make(layout, 70, torch.float64, values="normal")
    options = {"reduction": reduction, "margin": 0.5, "class_weight": torch.rand(70), "chunk_size": 11}
    shape = x[3].shape if reduction == "none" else ()
    # As none, a step of two, and one that is the same everywhere.
    for grad_loss in (torch.randn(shape), torch.randn(*shape, 2)[..., 0], torch.tensor(0.7).expand(shape)):
        grad_loss = grad_loss.double()
        equal(
            gradients(linear_hem_loss, *x, grad_loss, **options), gradients(unfused, *x, grad_loss, **options), **EXACT
        )


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_losses_are_summed_up_in_float64(device, reduction):
    for _ in range(10):
        *x, target = make((3000, D), 5, values="normal")
        weight = torch.rand(5)
        losses = linear_hem_loss(*x, target, reduction="none", class_weight=weight)
        weights = weight[target.clamp(min=0)] * (target != -100)
        counted = losses > 0 if reduction == "mean" else torch.full((3000,), reduction == "batchmean")
        count = (weights * counted).double().sum() if reduction != "sum" else 1.0
        loss = linear_hem_loss(*x, target, reduction=reduction, class_weight=weight)
        assert loss == (losses.double().sum() / count).float()


@pytest.mark.parametrize("layout", [(3000, 48), "large pixels"])
def test_every_run_gives_the_same_bits(device, layout):
    given = make(layout, 130, values="normal", share=0.5)
    first, *others = (gradients(linear_hem_loss, *given, chunk_size=512) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_weight_of_one_class_and_no_feature(device):
    hidden, weight = torch.randn(4, 3), torch.randn(1, 3)
    loss, *found = gradients(linear_hem_loss, hidden, weight, torch.randn(1), torch.zeros(4, dtype=torch.long))
    assert loss == 0
    assert not any(x.any() for x in found)
    # Without a feature the bias is all there is.
    x = torch.randn(4, 0), torch.randn(5, 0), torch.randn(5), torch.tensor([0, 1, 2, 3])
    equal(gradients(linear_hem_loss, *x), gradients(unfused, *x))


# --- rows that have no gradient -------------------------------------------------------------------------------


def finished_but(active, layout="rows", num_classes=40):
    """All finished but for a number of rows, spread."""
    hidden, weight, bias, target = make(layout, num_classes, torch.float64, share=0, ignored=0, values="normal")
    wrong = torch.randperm(target.numel())[:active]
    target.view(-1)[wrong] = (target.view(-1)[wrong] + 1) % num_classes
    return hidden, weight, bias, target


def rows_multiplied(seen, num_classes=40):
    """Rows that backward multiplied for the gradients of hidden and of the weight."""
    over_classes = [p for p in seen.products if p[1] == num_classes]
    over_rows = [p for p in seen.products if p[1] != num_classes]
    assert all({p[0], p[2]} == {D, num_classes} for p in over_rows)
    return sum(p[0] * p[2] // D for p in over_classes), sum(p[1] for p in over_rows)


@pytest.mark.parametrize("layout", ["rows", "sequences", "all but the last", "pixels", "large pixels"])
def test_finished_rows_are_in_no_product(layout):
    active = 9
    x = finished_but(active, layout)
    rows, images = x[3].numel(), len(x[0]) if layout == "large pixels" else 1
    for reduction in REDUCTIONS:
        options = {"margin": 1e-6, "reduction": reduction, "chunk_size": 2000}
        seen, found = backward_ops(*x, **options)
        # For each group of rows that lies together in memory: one over its rows, and one over the classes.
        assert len(seen.products) == 2 * images
        assert rows_multiplied(seen) == (active, active)
        expected = gradients(lambda *a, **k: unfused(*a, **k).sum(), *x, **options)[1:]
        equal(found, expected, **EXACT)
        everything, _ = backward_ops(*x, **options, skip_finished=False)
        assert rows_multiplied(everything) == (rows, rows)


@pytest.mark.parametrize(
    ("layout", "num_classes", "active", "chunk_size", "expected"),
    [
        # 37 rows in eight chunks of forward, of which most have an active one: five of at most two in backward.
        ("rows", 40, 9, 5, [2, 2, 2, 2, 1]),
        ("rows", 40, 9, 1, [1] * 9),
        ("rows", 40, 9, 3, [1] * 9),
        ("all but the last", 9, 12, 40, [12]),  # of all sequences
        ("rows", 9, 36, 40, [18, 18]),
        ("rows", 9, 37, 40, [20, 17]),  # all of them, where they lie
    ],
)
def test_active_rows_are_brought_together(layout, num_classes, active, chunk_size, expected):
    x = finished_but(active, layout, num_classes)
    seen, _ = backward_ops(*x, margin=1e-6, chunk_size=chunk_size)
    assert [p[1] for p in seen.products if p[1] != num_classes] == expected


@pytest.mark.parametrize(
    ("layout", "features_first"),
    [("rows", False), ("all but the last", False), ("few transposed", True), ("large pixels", True)],
)
def test_the_gradient_of_active_rows_is_made_in_the_order_of_the_memory(layout, features_first):
    seen, _ = backward_ops(*finished_but(12, layout, 5), margin=1e-6)
    over_classes = [p for p in seen.products if p[1] == 5]
    assert over_classes
    assert all(p[0 if features_first else 2] == D for p in over_classes)


@pytest.mark.parametrize("layout", ["rows", "sequences", "all but the last", "few transposed", "time first"])
@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_some_classes_of_all_rows_at_a_time(layout, share, reduction):
    # Of fewer rows than classes: what is summed up over chunks is the gradient of hidden.
    x = make(layout, 200, torch.float64, share=share, ignored=0.1 * (share < 1), values="normal")
    options = {
        "reduction": reduction,
        "class_weight": torch.rand(200),
        "chunk_size": 24 if share < 1 else 64,
        "margin": 1e-6,
    }
    grad_loss = torch.randn(x[3].shape if reduction == "none" else ()).double()
    active = int((unfused(*x, **options | {"reduction": "none"}) > 0).sum())
    seen, _ = backward_ops(*x, **options)
    of_weight = [classes for classes, rows, _ in seen.products if rows == active]
    assert len(of_weight) >= 2
    assert sum(of_weight) == 200
    equal(gradients(linear_hem_loss, *x, grad_loss, **options), gradients(unfused, *x, grad_loss, **options), **EXACT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", [0, 1], ids=["none", "mean"])
def test_the_gradient_of_some_classes_is_a_part_of_that_of_all(dtype, reduction):
    rows, num_classes, arithmetic = 37, 133, ARITHMETIC[dtype]
    logits, target = torch.randn(rows, num_classes, dtype=arithmetic).to(dtype), torch.randint(num_classes, (rows,))
    target[::5] = -100
    logits[3, 7] = torch.nan
    weight = torch.rand(num_classes, dtype=arithmetic)
    grad_loss = torch.randn(() if reduction else rows, dtype=arithmetic)
    given = (target, None, 0.2, weight, -100, reduction, True)
    _, mask, denominator = torch.ops.hem_ext.hem_forward(logits, *given)
    counts = torch.ops.hem_ext.hem_count(mask)
    assert torch.equal(counts, sum(mask >> bit & 1 for bit in range(32)).sum(1, dtype=torch.int32))
    saved = (target, weight, denominator, -100)
    whole = torch.ops.hem_ext.hem_backward(
        grad_loss, mask, *saved, num_classes, arguments.DTYPE_CODES[dtype], reduction, True
    )
    before = _native.library.cpu_isa()
    try:
        for isa in _native.library.available_cpu_isas():
            _native.library.select_cpu_isa(isa)
            for first, size in [(0, 133), (0, 32), (32, 32), (64, 69), (96, 37), (128, 5)]:
                part = torch.full((rows, size), 7.0, dtype=dtype)
                torch.ops.hem_ext.hem_backward_range(
                    part, grad_loss, mask, counts, *saved, num_classes, first, reduction
                )
                torch.testing.assert_close(part, whole[:, first : first + size], rtol=0, atol=0, equal_nan=True)
    finally:
        _native.library.select_cpu_isa(before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"first": 16}, "3 classes from class 16 on are no range of 35"),
        ({"first": -32}, "3 classes from class -32 on are no range of 35"),
        ({"first": 64}, "3 classes from class 64 on are no range of 35"),
        ({"grad_input": torch.empty(5, 2)}, "2 classes from class 32 on are no range of 35 in whole words of the mask"),
        ({"grad_input": torch.empty(5, 9)}, "9 classes from class 32 on are no range of 35"),
        ({"grad_input": torch.empty(5, 6)[:, ::2]}, "do not lie in memory as rows"),
        ({"grad_input": torch.empty(5, 6)[:, :3]}, "memory of its own without gaps"),
        ({"counts": torch.zeros(4, dtype=torch.int32)}, "counts must be contiguous int32, one for each row"),
        ({"counts": torch.zeros(5)}, "counts must be contiguous int32, one for each row"),
        ({"mask": torch.zeros(5, 1, dtype=torch.int32)}, "the mask must be contiguous int32 of sizes"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, "expected targets of sizes"),
    ],
)
def test_no_range_of_classes(change, words):
    given = {
        "grad_input": torch.empty(5, 3),
        "grad_loss": torch.ones(()),
        "mask": torch.zeros(5, 2, dtype=torch.int32),
        "counts": torch.zeros(5, dtype=torch.int32),
        "target": torch.zeros(5, dtype=torch.int64),
        "weight": None,
        "denominator": torch.ones(()),
        "ignore_index": -100,
        "num_classes": 35,
        "first": 32,
        "reduction": 1,
    }
    torch.ops.hem_ext.hem_backward_range(**given)
    with pytest.raises(RuntimeError, match=words):
        torch.ops.hem_ext.hem_backward_range(**given | change)


@pytest.mark.parametrize(
    ("layout", "chunk_size", "expected"),
    [
        ("rows", 20, [20, 17]),
        ("transposed", 1000, [560, 540]),  # of nearly one size
        ("sequences", 20, [20, 19]),  # rows that are one stride apart are one sequence
        ((2, 13, D), 20, [16, 10]),
        ("all but the last", 30, [24, 12]),  # whole ones, copied
        ("all but the last", 10, [10, 2] * 3),
        ("pixels", 70, [70]),
        ("large pixels", 5000, [1056, 1056]),  # in place
    ],
)
def test_chunks_of_forward(layout, chunk_size, expected):
    x = make(layout)
    with Ops() as seen:
        linear_hem_loss(*x, chunk_size=chunk_size)
    assert [p[2] if layout in ("transposed", "large pixels") else p[0] for p in seen.products] == expected


@pytest.mark.parametrize("layout", ["rows", "all but the last", "pixels, channels_last", "large pixels"])
@pytest.mark.parametrize("kind", ["finished", "ignored", "no class weight"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_an_active_row(device, layout, kind, reduction):
    hidden, weight, bias, target = make(layout, share=0 if kind == "finished" else 1, ignored=0, values="normal")
    options = {"reduction": reduction, "margin": 0.0}
    if kind == "ignored":
        target.fill_(-100)
        hidden = hidden.fill_(torch.nan) if layout == "rows" else hidden  # it is not even looked at
    elif kind == "no class weight":
        options["class_weight"] = torch.zeros(40)
    seen, found = backward_ops(hidden, weight, bias, target, **options)
    assert seen.products == []
    assert not any(x.any() for x in found)
    loss = linear_hem_loss(hidden, weight, bias, target, **options)
    assert loss.shape == (target.shape if reduction == "none" else ())
    assert not loss.any()


@pytest.mark.parametrize("shape", [(0, D), (2, 0, D), (0, 3, D), (0, D, 3, 3), (2, D, 0, 3)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows_at_all(device, backend, shape, reduction):
    hidden, weight, bias = torch.randn(shape), torch.randn(7, D, *[1] * (len(shape) - 2 if len(shape) > 3 else 0)), None
    target = torch.zeros(shape[:-1] if len(shape) < 4 else (shape[0], *shape[2:]), dtype=torch.long)
    loss, *found = gradients(linear_hem_loss, hidden, weight, bias, target, reduction=reduction, backend=backend)
    assert loss.shape == (target.shape if reduction == "none" else ())
    assert not loss.any()
    assert found[0].shape == shape
    assert torch.equal(found[1], torch.zeros_like(weight))


@pytest.mark.parametrize("layout", ["rows", "large pixels"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_broken_row_reaches_every_gradient(device, layout, reduction):
    hidden, weight, bias, target = make(layout, values="normal")
    hidden[1].view(-1)[0] = torch.nan
    target.view(-1)[:] = target.view(-1).clamp(min=0)
    found = gradients(linear_hem_loss, hidden, weight, bias, target, reduction=reduction)
    equal(found, gradients(unfused, hidden, weight, bias, target, reduction=reduction), equal_nan=True)
    assert all(x.isnan().any() for x in found)
    assert found[1][0].isfinite().all()


# --- what needs no gradient -----------------------------------------------------------------------------------


def test_a_weighted_loss_that_is_rounded_to_0_is_counted(device):
    weight = torch.tensor([[0.0], [2**-24]])
    options = {"margin": 0.0, "class_weight": torch.tensor([2**-126, 1.0])}
    x = torch.ones(2, 1), weight, None, torch.tensor([0, 0])
    found = gradients(linear_hem_loss, *x, **options)
    equal(found, gradients(unfused, *x, **options), rtol=0, atol=0)
    assert torch.equal(found[2], torch.tensor([[-1.0], [1.0]]))


@pytest.mark.parametrize("layout", ["rows", "large pixels"])
@pytest.mark.parametrize("needed", list(itertools.product([True, False], repeat=3))[:-1])
def test_no_product_and_no_buffer_for_what_is_frozen(layout, needed):
    hidden, weight, bias, target = make(layout, 50, torch.float64, values="normal")
    expected = gradients(unfused, hidden, weight, bias, target, chunk_size=2000)[1:]
    seen, found = backward_ops(hidden, weight, bias, target, needed, chunk_size=4000)
    equal(found, [x if need else None for x, need in zip(expected, needed, strict=True)], **EXACT)
    images = 2 if layout == "large pixels" else 1
    assert len(seen.products) == images * (needed[0] + needed[1])
    assert bool(seen.made[50, D] + seen.made[50, D, 1, 1]) == needed[1]
    of_hidden = [shape for shape in seen.made if sum(shape) and torch.Size(shape).numel() == hidden.numel()]
    assert bool(of_hidden) == needed[0]
    assert bool(seen.made[(50,)]) == needed[2]


def saved(call):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        call()
    return kept


@pytest.mark.parametrize("layout", ["rows", "all but the last", "pixels", "pixels, channels_last", "large pixels"])
def test_what_is_kept_for_backward(layout):
    hidden, weight, bias, target = make(layout, 70)
    for needs_hidden, needs_weight in [(True, True), (True, False), (False, True)]:
        h, w = leaf(hidden, needs_hidden), leaf(weight, needs_weight)
        kept = {x.data_ptr(): x.nbytes for x in saved(lambda h=h, w=w: linear_hem_loss(h, w, bias, target))}
        # Both are kept as they are, not as copies, and only for the other's gradient.
        assert (hidden.data_ptr() in kept) == needs_weight
        assert (weight.data_ptr() in kept) == needs_hidden
        own = sum(n for at, n in kept.items() if at not in (hidden.data_ptr(), weight.data_ptr(), target.data_ptr()))
        bits, active, denominator = target.numel() * 3 * 4, target.numel(), 4
        assert own <= bits + active + denominator


def test_nothing_is_kept_without_a_gradient():
    x = make(values="normal")
    with torch.no_grad():
        assert saved(lambda: linear_hem_loss(leaf(x[0]), *x[1:])) == []
    with Ops() as seen:
        loss = linear_hem_loss(*x, chunk_size=10)
    assert not loss.requires_grad
    assert (37, 2) not in seen.made  # the bits of all rows


# --- products of forward --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_classes", [160, 173])
def test_some_columns_at_a_time(monkeypatch, bias, num_classes):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(linear, "_COLUMNS", 10)
    x = make(num_classes=num_classes, bias=bias, values="normal")
    options = {"chunk_size": 20, "class_weight": torch.rand(num_classes)}
    for features, columns in ((D + 1, [num_classes]), (D, [20] * 8 + [13] * (num_classes > 160))):
        monkeypatch.setattr(linear, "_FEWEST_FEATURES", features)
        for dtype in (torch.float32, torch.float64):
            given = [t if t is None or not t.is_floating_point() else t.to(dtype) for t in x]
            with Ops() as seen:
                linear_hem_loss(*given, **options)
            widths = columns if dtype == torch.float32 else [num_classes]
            assert seen.products == [(rows, D, width) for rows in (20, 17) for width in widths]
            tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else EXACT
            equal(gradients(linear_hem_loss, *given, **options), gradients(unfused, *given, **options), **tolerance)
    # Too few classes to be cut.
    with Ops() as seen:
        linear_hem_loss(*make(num_classes=159, bias=bias), chunk_size=20)
    assert {columns for *_, columns in seen.products} == {159}


@pytest.mark.parametrize(
    ("length", "apart"), [(21, 21), (63, 63), (64, 64), (150, 160), (1000, 1008), (1024, 1040), (8192, 8208)]
)
def test_rows_that_a_product_writes(device, length, apart):
    memory = linear._empty_apart(torch.empty(0), (3, length), torch.float32)
    assert (memory.shape, memory.stride()) == ((3, length), (apart, 1))
    # Of rows the classes, of pixels the positions.
    for layout, num_classes in (((40, D), length), ((2, D, length), 5)):
        hidden = torch.randn(layout)
        shape = (num_classes, D) if len(layout) == 2 else (num_classes, D, 1)
        target = torch.randint(num_classes, (hidden.shape[0], *hidden.shape[2:]))
        given = hidden.double(), torch.randn(shape).double(), torch.randn(num_classes).double(), target
        equal(gradients(linear_hem_loss, *given), gradients(unfused, *given), **EXACT)


# --- memory ---------------------------------------------------------------------------------------------------


def test_memory_of_the_shape_that_is_measured():
    """(4096 x 256) x 32000, all of it by an eighth."""
    rows, features, num_classes, chunk_size = 512, 32, 4000, 48
    hidden, weight, bias = torch.randn(rows, features), torch.randn(num_classes, features), torch.randn(num_classes)
    target = torch.randint(num_classes, (rows,))

    def peak(loss_of, **options):
        leaves = [leaf(hidden), leaf(weight), leaf(bias)]
        return allocated_at_once(lambda: loss_of(*leaves, target, **options).backward())

    # The logits are gone when the unfused backward makes their gradient.
    assert 8 * peak(linear_hem_loss, chunk_size=chunk_size) < peak(unfused)


@pytest.mark.parametrize("layout", ["rows", "sequences", "large pixels", "pixels, channels_last"])
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_the_logits_are_never_held(layout, share):
    hidden, weight, bias, target = make(layout, 50, share=share, values="normal")
    rows = target.numel()
    leaves = [leaf(hidden), leaf(weight), leaf(bias)]
    with Ops() as seen:
        linear_hem_loss(*leaves, target, chunk_size=rows // 5).backward()
    assert max(torch.Size(s).numel() for s in seen.made) < max(rows * 50 // 4, hidden.numel() + 1)


def constants(rows, num_classes, features=D, dtype=torch.float32, chunk_size=0, transposed=False, skip_finished=True):
    code = arguments.DTYPE_CODES[dtype]
    return linear._Constants(
        (1, rows, features), num_classes, -100, code, 1, chunk_size, transposed, True, skip_finished
    )


def most(rows, num_classes, features, dtype=torch.float32, device="cpu", chunk_size=0):
    return constants(rows, num_classes, features, dtype, chunk_size).most(torch.device(device))


def test_how_many_rows_there_are_at_once():
    # 8 MiB on a CPU, of logits or of hidden; 32 on a GPU, or a sixteenth of all rows; never fewer than 384, or 224.
    assert most(10**6, 1000, 512) == (8 << 20) // 4000 // 16 * 16
    assert most(10**6, 21, 256) == 8192
    assert most(10**6, 1000, 512, torch.bfloat16) == (8 << 20) // 2000 // 16 * 16
    assert most(4096, 32000, 256) == most(4096, 128256, 4096) == 384
    assert most(4096, 32000, 256, device="cuda") == 256
    assert most(16385, 128256, 4096, device="cuda") == 1025
    assert most(4096, 32000, 256, device="xpu") == 256
    assert most(4096, 128256, 4096, device="xpu") == most(4096, 128256, 4096, device="cuda") == 256
    assert most(10**6, 32000, 256, chunk_size=5) == 5


@pytest.mark.parametrize(
    ("active", "rows", "chunk_size", "expected", "options"),
    [
        (25, 25, 24, 32, {}),  # a third of 24 rows of all 100 classes are 32 classes of 25 rows
        (25, 25, 23, 0, {}),
        (50, 50, 1, 0, {}),
        (2, 2, 1, 32, {}),  # of one row at least
        (2, 2, 3, 32, {"num_classes": 64}),
        # Of some rows their hidden, its gradient and the bits, four words each, are there too.
        (1, 200, 12, 384, {}),
        (1, 200, 6, 160, {}),
        (50, 200, 6, 0, {}),
        # As many rows as classes and more are taken by rows.
        (99, 99, 3000, 992, {}),
        (100, 100, 3000, 0, {}),
        (100, 200, 3000, 0, {}),
        (0, 200, 3000, 0, {}),
        (10, 200, 3000, 0, {"skip_finished": False}),
        (10, 50, 24, 0, {"skip_finished": False}),
        (10, 25, 24, 32, {"skip_finished": False}),
        (10, 2000, 3000, 0, {"transposed": True}),
        (10, 200, 3000, 0, {"dtype": torch.bfloat16}),
    ],
)
def test_how_many_classes_there_are_at_once(active, rows, chunk_size, expected, options):
    call = constants(rows, **{"num_classes": 100, "chunk_size": chunk_size} | options)
    assert call.classes_at_once(torch.arange(rows) < active) == expected


def test_a_gpu_is_waited_for_once_or_not_at_all(monkeypatch):
    calls, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: calls.append(x.shape) or tolist(x))
    for layout in ("rows", "large pixels"):
        for skip_finished in (True, False):
            leaves = [leaf(x) for x in make(layout, values="normal")[:3]]
            loss = linear_hem_loss(*leaves, make(layout)[3], chunk_size=8, skip_finished=skip_finished)
            calls.clear()
            with Ops():
                loss.backward()
            assert len(calls) == int(skip_finished)


# --- autograd -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", ["rows", "all but the last", "pixels"])
def test_gradients_are_the_derivatives(layout, reduction):
    shape = {"rows": (7, D), "all but the last": (2, 3, D), "pixels": (2, D, 1, 3)}[layout]
    hidden, weight = torch.randn(shape).double(), torch.randn(5, D).double()
    weight = weight[:, :, None, None] if layout == "pixels" else weight
    target = torch.randint(5, shape[:-1] if layout != "pixels" else (2, 1, 3))
    target.view(-1)[1] = -100
    options = {"reduction": reduction, "chunk_size": 4, "class_weight": torch.rand(5)}

    def loss(hidden, weight, bias):
        return linear_hem_loss(hidden, weight, bias, target, **options)

    inputs = [leaf(hidden), leaf(weight), leaf(torch.randn(5).double())]
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)
    for frozen in range(3):
        some = [x.detach() if i == frozen else x for i, x in enumerate(inputs)]
        assert torch.autograd.gradgradcheck(loss, some, fast_mode=True)


def test_a_large_pixel_map_has_second_derivatives():
    hidden, weight, bias, target = make("large pixels", 5, torch.float64, values="normal")
    found = []
    for loss_of in (linear_hem_loss, unfused):
        leaves = [leaf(hidden), leaf(weight), leaf(bias)]
        loss = loss_of(*leaves, target, chunk_size=700)
        first = torch.autograd.grad(loss.square(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.sin().sum() for x in first), leaves)
        found.append([*first, *second])
    equal(*found, **EXACT)


def test_second_derivatives_need_no_product_for_what_is_frozen():
    hidden, weight, bias, target = make(values="normal")
    for frozen, products in ((0, 2), (1, 2), (2, 6)):
        leaves = [leaf(x, i != frozen) for i, x in enumerate((hidden, weight, bias))]
        inputs = [x for x in leaves[:2] if x.requires_grad]
        loss = linear_hem_loss(*leaves, target).square()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        with Ops() as seen:
            sum(x.sum() for x in first).backward()
        # Each gradient by grad_loss, and each by the other's factor; then, for the square, the first derivative again.
        assert len(seen.products) == products


def test_third_derivatives_are_refused():
    leaves = [leaf(x) for x in make(dtype=torch.float64, values="normal")[:3]]
    loss = linear_hem_loss(*leaves, make()[3])
    first = torch.autograd.grad(loss, leaves[:2], create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves[:2], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(x.sum() for x in second).backward()


def test_backward_twice(device):
    leaves = [leaf(x) for x in make(values="normal")[:3]]
    loss = linear_hem_loss(*leaves, make()[3], chunk_size=8)
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in leaves]
    loss.backward(torch.tensor(3.0))
    for x, grad in zip(leaves, once, strict=True):
        torch.testing.assert_close(x.grad, 4 * grad)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_weight_that_is_tied_to_an_embedding(device):
    tokens = torch.randint(50, (3, 9))
    found = []
    for loss_of in (linear_hem_loss, unfused):
        torch.manual_seed(1)
        embedding, mix = nn.Embedding(50, D).double(), nn.Linear(D, D).double()
        hidden = mix(embedding(tokens)).tanh()
        loss_of(hidden[:, :-1], embedding.weight, None, tokens[:, 1:], chunk_size=8).backward()
        found.append([embedding.weight.grad, mix.weight.grad])
    equal(*found, **EXACT)


def test_a_weight_that_was_changed_is_noticed():
    hidden, weight, bias, target = make(values="normal")
    weight = leaf(weight)
    loss = linear_hem_loss(leaf(hidden), weight, bias, target)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- half types -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_the_weight_is_rounded_once(device, dtype):
    rows, num_classes = 1000, 3
    hidden = (1 + torch.rand(rows, D)).to(dtype)
    weight, target = torch.zeros(num_classes, D, dtype=dtype), torch.zeros(rows, dtype=torch.long)
    # Every row adds 1/2 of itself to two classes and takes itself from the third.
    options = {"reduction": "sum", "chunk_size": 4}
    _, _, gradient, offset = gradients(
        linear_hem_loss, hidden, weight, torch.zeros(num_classes, dtype=dtype), target, **options
    )
    share = torch.tensor([-1.0, 0.5, 0.5])
    expected = share.double().outer(hidden.double().sum(0))
    assert torch.equal(gradient, expected.float().to(dtype))
    assert torch.equal(offset, (rows * share).to(dtype))
    # What it would be if chunks were added up in the half type: the test could tell.
    drifting = torch.zeros(num_classes, D, dtype=dtype)
    for chunk in hidden.split(2):
        drifting += share.to(dtype).outer(chunk.float().sum(0).to(dtype))
    assert (drifting != gradient).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_the_bias_is_rounded_once(device, dtype):
    # Of two rows at a time, what the second adds would be less than half a step of the half type.
    small = 7 / 16 * torch.finfo(dtype).eps
    given = torch.zeros(1000, D, dtype=dtype), torch.zeros(3, D, dtype=dtype), torch.zeros(3, dtype=dtype)
    target, class_weight = torch.tensor([1, 2] * 500), torch.tensor([0.0, 1.0, small])
    options = {"reduction": "sum", "chunk_size": 4, "class_weight": class_weight}
    *_, found = gradients(linear_hem_loss, *given, target, **options)
    assert torch.equal(found, (500 * torch.tensor([(1 + small) / 2, small / 2 - 1, 1 / 2 - small])).to(dtype))
    assert found[0] != 250


class OnAGPU(torch.Tensor):
    """A tensor that says so."""

    is_cuda = True


def test_a_gpu_adds_up_products_of_half_types_in_float32(monkeypatch):
    """It has a product for that."""
    g, h = torch.randn(40, 5).bfloat16(), torch.randn(40, D).bfloat16()
    product, dtypes = torch.mm, []

    def mm(left, right, *, out_dtype):
        dtypes.append((left.dtype, right.dtype))
        return product(left.to(out_dtype), right.to(out_dtype)).as_subclass(torch.Tensor)

    monkeypatch.setattr(torch, "mm", mm)
    before = torch.randn(5, D)
    total = before.clone()
    linear._accumulate(total, g.as_subclass(OnAGPU), h)
    assert dtypes == [(torch.bfloat16, torch.bfloat16)]
    torch.testing.assert_close(total, before + g.float().t() @ h.float())


@pytest.mark.parametrize("dtypes", [("float32", "half"), ("half", "float32"), ("float32", "float32")])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["rows", "large pixels"])
def test_autocast(device, layout, half, dtypes):
    dtypes = [half if dtype == "half" else torch.float32 for dtype in dtypes]
    hidden, weight, bias, target = make(layout)
    hidden, weight, bias = hidden.to(dtypes[0]), weight.to(dtypes[-1]), bias.to(dtypes[-1])
    found = []
    for loss_of in (linear_hem_loss, unfused):
        leaves = [leaf(hidden), leaf(weight), leaf(bias)]
        with torch.autocast(device, dtype=half):
            loss = loss_of(*leaves, target)
        loss.backward()
        found.append([loss.detach(), *(x.grad for x in leaves)])
    # A sum of products of two half numbers, rounded in another place.
    equal(*found, rtol=2**-6, atol=2**-9)
    products = linear_hem_loss(*(x.to(half) for x in (hidden, weight, bias)), target)
    assert torch.equal(found[0][0], products)
    if dtypes[-1] == torch.float32:  # it was summed up in it
        assert not torch.equal(found[0][2], found[0][2].to(half).float())
    if dtypes[0] == half:
        assert found[0][1].dtype == half


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["rows", "large pixels"])
def test_autocast_rounds_what_it_multiplies_and_no_sum(layout, half):
    x = make(layout, values="normal")
    rounded = [t.to(half) for t in x[:3]]
    with torch.autocast("cpu", dtype=half):
        found = gradients(linear_hem_loss, *x)
        equal(found, gradients(linear_hem_loss, *(t.float() for t in rounded), x[3]), rtol=0, atol=0)
    expected = gradients(linear_hem_loss, *rounded, x[3])
    equal([found[0], *(t.to(half) for t in found[1:])], expected, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=half):
        mixed = gradients(linear_hem_loss, x[0], rounded[1], *x[2:])
    equal(mixed, [*found[:2], found[2].to(half), found[3]], rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["rows", "large pixels"])
def test_second_derivatives_under_autocast(layout):
    hidden, weight, bias, target = make(layout, 5, values="normal")

    def derivatives(enabled, rounded):
        leaves = [leaf(x) for x in (hidden, weight, bias)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = linear_hem_loss(*map(rounded, leaves), target)
        first = torch.autograd.grad(loss.square(), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(x.sin().sum() for x in first), leaves)]

    found = derivatives(True, lambda x: x)
    assert {x.dtype for x in found} == {torch.float32}
    expected = derivatives(False, lambda x: x.bfloat16())
    equal(found, expected, rtol=2**-5, atol=2**-6 * max(x.abs().max().item() for x in expected))


def test_scaled_gradients_of_float16(device):
    """A scale keeps those that are smaller than float16 holds."""
    hidden, weight, bias, target = make("rows", 5)
    steps = []
    for scale, is_half in ((1.0, False), (1.0, True), (2.0**16, True)):
        head = LinearHEMLoss(D, 5, reduction="sum")
        head.load_state_dict({"weight": weight, "bias": bias})
        optimizer = torch.optim.SGD(head.parameters(), lr=2.0**26)
        scaler = torch.amp.GradScaler(device, init_scale=scale)
        with torch.autocast(device, dtype=torch.float16, enabled=is_half):
            loss = head(hidden, target) * 2.0**-26
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        steps.append(head.weight.detach() - weight)
    exact, without, scaled = steps
    assert not without.any()
    torch.testing.assert_close(scaled, exact, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("layout", ["rows", "large pixels"])
def test_backward_does_not_see_autocast(device, layout):
    leaves = [leaf(x) for x in make(layout)[:3]]
    loss = linear_hem_loss(*leaves, make(layout)[3])
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = torch.autograd.grad(loss, leaves)
    equal(found, expected, rtol=0, atol=0)


def test_autocast_leaves_float64_alone(device):
    x = make(dtype=torch.float64, values="normal")
    expected = gradients(linear_hem_loss, *x)
    with torch.autocast(device, dtype=torch.bfloat16):
        equal(gradients(linear_hem_loss, *x), expected, rtol=0, atol=0)


# --- other ways to run it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "all but the last", "large pixels"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_plain_pytorch(device, layout, dtype):
    x = make(layout, 5, dtype)
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "class_weight": torch.rand(5), "margin": [0.0, 0.25, 0.5, 0.25, 1.0]}
        with Calls() as calls:
            found = gradients(linear_hem_loss, *x, backend="reference", **options)
        assert not calls.names
        tolerance = EXACT if dtype == torch.float64 else {"rtol": 2**-6, "atol": 2**-8}
        equal(found, gradients(linear_hem_loss, *x, backend="native", **options), **tolerance)


def test_without_kernels(monkeypatch):
    x = make(values="normal")
    expected = gradients(linear_hem_loss, *x)
    linear._native.warn_of_fallback.cache_clear()
    monkeypatch.setattr(linear._native, "devices", frozenset())
    reason = "hem_ext was built without kernels for 'cpu' tensors"
    words = re.escape(f"linear_hem_loss(backend='native'): {reason}")
    with pytest.raises(RuntimeError, match=f"^{words}$"):
        linear_hem_loss(*x, backend="native")
    with pytest.warns(RuntimeWarning, match=f"^linear_hem_loss runs in plain PyTorch: {reason}$"), Calls() as calls:
        equal(gradients(linear_hem_loss, *x), expected)
    assert not calls.names


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_transformed_it_is_the_two_steps(device, backend, reduction):
    hidden, weight, bias, target = make("sequences", 5, torch.float64, values="normal")
    options = {"class_weight": torch.rand(5), "margin": [0.0, 0.25, 0.5, 0.25, 1.0], "reduction": reduction}

    def loss(hidden, target):
        return linear_hem_loss(hidden, weight, bias, target, **options, backend=backend).sum()

    def two_steps(hidden, weight, bias, target):
        return unfused(hidden, weight, bias, target, **options).sum()

    expected = [gradients(two_steps, h, weight, bias, t)[1] for h, t in zip(hidden, target, strict=True)]
    found = torch.func.vmap(torch.func.grad(loss))(hidden, target)
    torch.testing.assert_close(found, torch.stack(expected), **EXACT)
    tangent = torch.randn_like(hidden[0])
    with Calls() as calls:
        _, slope = torch.func.jvp(lambda h: loss(h, target[0]), (hidden[0],), (tangent,))
    torch.testing.assert_close(slope, (tangent * expected[0]).sum(), **EXACT)
    assert set(calls.names) == ({"hem_ext::hem_forward", "hem_ext::hem_backward"} if backend == "auto" else set())


@pytest.mark.parametrize("skip_finished", [True, False])
@pytest.mark.parametrize(("layout", "num_classes"), [("rows", 5), ("rows", 100), ("large pixels", 5)])
def test_a_weight_that_is_no_number_reaches_no_row_without_a_loss(device, layout, num_classes, skip_finished):
    """By rows and by classes: an ignored row beside NaN, a finished one beside a class that is masked by -inf."""
    hidden, weight, bias, target = make(layout, num_classes)
    hidden = leaf(hidden.abs() + 1)
    with torch.no_grad():
        weight[0] = -torch.inf
        target[:] = 1
        bias[1] = 1e4  # finished
        losses = linear_hem_loss(hidden, weight, bias, target, reduction="none")
        assert not losses.any()
        target.view(-1)[::2] = -100
        weight[2] = torch.nan
    loss = linear_hem_loss(hidden, weight, bias, target, reduction="none", skip_finished=skip_finished)
    loss.nansum().backward()
    gradient = hidden.grad if layout == "rows" else hidden.grad.movedim(1, -1)
    ignored = target == -100
    assert loss[~ignored].isnan().all()  # all of theirs is broken
    assert gradient[~ignored].isnan().all()
    assert not gradient[ignored].any()
    hidden.grad = None
    with torch.no_grad():
        weight[2] = 0.0
    linear_hem_loss(hidden, weight, bias, target, skip_finished=skip_finished).backward()
    assert not hidden.grad.any()


@pytest.mark.parametrize("skip_finished", [True, False])
@pytest.mark.parametrize(("layout", "num_classes"), [("rows", 5), ("rows", 100), ("large pixels", 5)])
def test_what_an_ignored_row_holds_reaches_no_gradient(device, layout, num_classes, skip_finished):
    hidden, weight, bias, target = make(layout, num_classes)
    target.view(-1)[::3] = -100
    found = []
    for value in (torch.nan, torch.inf, 0.0):
        rows = hidden if layout == "rows" else hidden.movedim(1, -1)
        rows[target == -100] = value
        found.append(gradients(linear_hem_loss, hidden, weight, bias, target, skip_finished=skip_finished))
    equal(found[0], found[2], rtol=0, atol=0)
    equal(found[1], found[2], rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["one dimension", "large pixels"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masks_with_a_channel(device, reduction, layout):
    hidden, weight, bias, target = make(layout, 5)
    expected = linear_hem_loss(hidden, weight, bias, target, reduction=reduction)
    assert torch.equal(linear_hem_loss(hidden, weight, bias, target.unsqueeze(1), reduction=reduction), expected)
    with pytest.raises(ValueError, match="expected target of shape"):  # rows have no channel
        linear_hem_loss(hidden.movedim(1, -1), weight.flatten(1), bias, target.unsqueeze(1))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("layout", ["rows", "large pixels"])
def test_exported_it_needs_no_library(layout, strict):
    hidden, *_, target = make(layout, 5)
    head = LinearHEMLoss(D, 5, margin=eighths(5), spatial_dims=2 * (layout != "rows"))
    program = torch.export.export(head, (leaf(hidden), target), strict=strict)
    assert "hem_ext" not in str(program.graph)
    found = []
    for module in (program.module(), head):
        h = leaf(hidden)
        loss = module(h, target)
        loss.backward()
        found.append([loss.detach(), h.grad])
    equal(*found)


@pytest.mark.parametrize("layout", ["rows", "large pixels"])
def test_compiled(device, layout):
    """Without a break in the graph: the ops are opaque to the compiler."""
    torch._dynamo.reset()
    head = LinearHEMLoss(D, 5, margin=eighths(5), class_weight=eighths(5), spatial_dims=2 * (layout != "rows"))

    def step(hidden, target, head):
        return 2 * head(hidden.sin(), target)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (40, 30):
        hidden, _, _, target = make(layout, 5)
        hidden, target = (hidden[:rows], target[:rows]) if layout == "rows" else (hidden[..., 1:], target[..., 1:])
        results = []
        for call in (step, compiled):
            h = leaf(hidden)
            head.zero_grad()
            loss = call(h, target, head)
            loss.backward()
            results.append([loss.detach(), h.grad, *(p.grad.clone() for p in head.parameters())])
        equal(*results)
        with torch.no_grad():
            assert compiled(hidden, target, head) == results[0][0]


def test_compiled_under_autocast(device):
    torch._dynamo.reset()
    x = make(values="normal")

    def step(*leaves):
        with torch.autocast(device, dtype=torch.bfloat16):
            return linear_hem_loss(*leaves, x[3])

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = [gradients(lambda *a, call=call: call(*a[:3]), *x) for call in (step, compiled)]
    equal(*results)


def test_the_ops_are_what_they_say(device):
    hidden, weight, bias, target = (x.contiguous() for x in make(dtype=torch.bfloat16))
    constants = ((1, 37, D), 40, -100, 2, 1, 8, False, True, True)
    given = (hidden[None], weight, bias, target, None, 0.2, None, True, *constants)
    checks = ("test_schema", "test_faketensor")
    opcheck(torch.ops.hem_ext.linear_hem_forward.default, given, test_utils=checks)
    losses, mask = torch.ops.hem_ext.linear_hem_forward(*given)
    with pytest.raises(RuntimeError, match=r"has no gradient of its own: call hem_ext\.linear_hem_loss"):
        torch.ops.hem_ext.linear_hem_forward(leaf(given[0]), *given[1:])
    one = torch.ones(())
    for h, w in itertools.product((hidden[None], None), (weight, None)):
        given = (one, mask, losses != 0, target, None, one, h, w, *constants)
        opcheck(torch.ops.hem_ext.linear_hem_backward.default, given, test_utils=checks)


def test_shares_add_up_to_the_batch(monkeypatch):
    """As two processes have it; what they exchange is tested below, in real ones."""
    hidden, weight, bias, target = make(dtype=torch.float64)
    group, parts = torch.distributed.ProcessGroup(0, 2), [slice(0, 30), slice(30, 37)]
    for reduction in ("mean", "batchmean"):
        options = {"reduction": reduction, "process_group": group}
        own = []
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda count, group, own=own: own.append(count.clone()))
        for part in parts:
            linear_hem_loss(hidden[part], weight, bias, target[part], **options)
        total = sum(own)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda count, group, total=total: count.copy_(total))
        first, second = (gradients(linear_hem_loss, hidden[p], weight, bias, target[p], **options) for p in parts)
        loss, h, w, b = gradients(unfused, hidden, weight, bias, target, reduction=reduction)
        found = [first[0] + second[0], torch.cat([first[1], second[1]]), first[2] + second[2], first[3] + second[3]]
        equal(found, [2 * x for x in (loss, h, w, b)], **EXACT)


in_processes = Functions()


@in_processes(2)
def shares_of_a_batch(rank):
    found = []
    for reduction in ("mean", "batchmean", "sum"):
        hidden, weight, bias, target = make(dtype=torch.float64)
        own = slice(0, 30) if rank == 0 else slice(30, 37)
        group = torch.distributed.group.WORLD
        options = {"reduction": reduction, "process_group": group, "chunk_size": 4}
        found.append(gradients(linear_hem_loss, hidden[own], weight, bias, target[own], **options))
        torch.manual_seed(0)
    return found


def test_shares_of_a_batch(tmp_path):
    worlds = Worlds(in_processes, tmp_path)
    for reduction, *found in zip(("mean", "batchmean", "sum"), *worlds(2, "shares_of_a_batch"), strict=True):
        torch.manual_seed(0)
        scale = 1 if reduction == "sum" else 2  # what an average over processes halves
        loss, h, w, b = gradients(unfused, *make(dtype=torch.float64), reduction=reduction)
        (loss_0, h_0, w_0, b_0), (loss_1, h_1, w_1, b_1) = found
        found = [loss_0 + loss_1, torch.cat([h_0, h_1]), w_0 + w_1, b_0 + b_1]
        equal(found, [scale * x for x in (loss, h, w, b)], **EXACT)


# --- the module -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_layer", "spatial_dims", "shape"),
    [
        (nn.Linear, 0, (4, 3, D)),
        (lambda *sizes: nn.Conv1d(*sizes, 1), 1, (2, D, 4)),
        (lambda *sizes: nn.Conv2d(*sizes, 1), 2, (2, D, 4, 3)),
    ],
)
def test_the_module_takes_the_place_of_a_layer_and_the_loss(device, make_layer, spatial_dims, shape):
    torch.manual_seed(3)
    layer = make_layer(D, 9)
    torch.manual_seed(3)
    head = LinearHEMLoss(D, 9, spatial_dims=spatial_dims, margin=0.5, ignore_index=0)
    assert head.state_dict().keys() == layer.state_dict().keys()
    for name, value in layer.state_dict().items():
        assert torch.equal(head.state_dict()[name], value)
    head.load_state_dict(layer.state_dict())
    hidden = torch.randn(shape)
    y = layer(hidden)
    torch.testing.assert_close(head.logits(hidden), y)
    target = torch.randint(9, shape[:-1] if not spatial_dims else (shape[0], *shape[2:]))
    expected = hem_loss(y if spatial_dims else y.movedim(-1, 1), target, margin=0.5, ignore_index=0)
    torch.testing.assert_close(head(hidden, target), expected)


@pytest.mark.parametrize("spatial_dims", [0, 2])
def test_the_module_is_made_on_its_device(spatial_dims):
    head = LinearHEMLoss(D, 9, spatial_dims=spatial_dims, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in head.parameters()} == {("meta", torch.bfloat16)}


def test_what_the_module_hands_on(monkeypatch):
    given = {
        "margin": 0.5,
        "ignore_index": 3,
        "reduction": "batchmean",
        "normalizer": 5.5,
        "chunk_size": 2,
        "skip_finished": False,
        "process_group": torch.distributed.ProcessGroup(0, 2),
        "backend": "reference",
    }
    class_weight, hidden, target = eighths(9), torch.randn(7, D), torch.arange(7)
    head = LinearHEMLoss(D, 9, class_weight=class_weight, **given)
    calls = []
    monkeypatch.setattr(linear, "linear_hem_loss", lambda *tensors, **options: calls.append((tensors, options)))
    head(hidden, target)
    head(hidden, target, normalizer=2.5)
    for (tensors, options), normalizer in zip(calls, (5.5, 2.5), strict=True):
        assert all(a is b for a, b in zip(tensors, (hidden, head.weight, head.bias, target), strict=True))
        assert torch.equal(options.pop("class_weight"), class_weight)
        assert options == given | {"normalizer": normalizer}


def test_options_of_the_module(device):
    options = {"margin": eighths(9), "class_weight": eighths(9), "ignore_index": 3, "reduction": "none"}
    head = LinearHEMLoss(D, 9, False, **options, chunk_size=2, skip_finished=False, dtype=torch.float64)
    hidden, target = torch.randn(7, D).double(), torch.randint(9, (7,))
    expected = unfused(hidden, head.weight, None, target, **options)
    for module in (head, copy.deepcopy(head), copy.deepcopy(nn.Sequential(head))[0]):
        torch.testing.assert_close(module(hidden, target), expected, **EXACT)
    assert set(head.state_dict()) == {"weight", "criterion.margin", "criterion.weight"}
    assert head.bias is None
    with Ops() as seen:
        head(hidden, target)
    assert len(seen.products) == 4
    assert repr(head).startswith(
        "LinearHEMLoss(\n  in_features=6, num_classes=9, bias=False, chunk_size=2, skip_finished=False\n  (criterion): "
        "HEMLoss(margin=(9 classes)"
    )
    plain = LinearHEMLoss(D, 9, spatial_dims=1)
    assert repr(plain).startswith("LinearHEMLoss(\n  in_features=6, num_classes=9, bias=True, spatial_dims=1\n")
    assert (plain.criterion.margin, plain.skip_finished, plain.chunk_size) == (0.2, True, None)
    with pytest.raises(ValueError, match="chunk_size must be a number of rows, at least 1, or None, got 0"):
        LinearHEMLoss(D, 9, chunk_size=0)
    assert isinstance(head.criterion, HEMLoss)


@pytest.mark.parametrize("skip_finished", [True, False])
def test_a_normalizer_takes_the_place_of_the_count(device, backend, skip_finished):
    torch.manual_seed(0)
    hidden, target = torch.randn(7, D).double(), torch.randint(9, (7,))
    head = LinearHEMLoss(D, 9, normalizer=5.5, skip_finished=skip_finished, backend=backend, dtype=torch.float64)
    for given in (5.5, torch.tensor(2.5)):
        expected = gradients(unfused, hidden, head.weight, head.bias, target, normalizer=given)
        options = {"normalizer": given, "skip_finished": skip_finished, "backend": backend}
        found = gradients(linear_hem_loss, hidden, head.weight, head.bias, target, **options)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, **EXACT)
        call = head(hidden, target) if given == 5.5 else head(hidden, target, normalizer=given)
        torch.testing.assert_close(call, expected[0], **EXACT)


@pytest.mark.parametrize("heading", ["A language model", "A segmentation head"])
def test_examples_of_the_page(heading, monkeypatch):
    _, _, section = PAGE.read_text("utf-8").partition(f"\n## {heading}\n")
    (code,) = re.findall(r"^```python\n(.*?)^```$", section.partition("\n## ")[0], re.M | re.S)
    # Two of the package's names, wherever it has them.
    monkeypatch.setattr("hem_ext.linear_hem_loss", linear_hem_loss, raising=False)
    monkeypatch.setattr("hem_ext.LinearHEMLoss", LinearHEMLoss, raising=False)
    embedding, features = nn.Embedding(30, D), torch.randn(2, D, 4, 5, requires_grad=True)
    names = {"backbone": nn.Linear(D, D), "embedding": embedding, "tokens": torch.randint(30, (2, 9)), "padding": 0}
    names |= {"features": features, "labels": torch.randint(21, (2, 4, 5))}
    exec(code, names)
    assert names["loss"] > 0
    assert (embedding.weight.grad if heading == "A language model" else features.grad).any()


# --- errors ---------------------------------------------------------------------------------------------------

H, W, B, T = torch.zeros(4, D), torch.zeros(3, D), torch.zeros(3), torch.zeros(4, dtype=torch.long)
P, W4, T4 = torch.zeros(2, D, 4, 5), torch.zeros(3, D, 1, 1), torch.zeros(2, 4, 5, dtype=torch.long)
OF_ROWS = "hidden must have shape (..., D) for weight (C, D)"
HINT = "; for features in dimension 1 give the weight of a convolution, (C, D, 1, ..., 1)"


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ((H.numpy(), W, B, T), TypeError, "hidden must be a tensor, got ndarray"),
        ((H, W, [0.0] * 3, T), TypeError, "bias must be a tensor, got list"),
        ((H, W.to_sparse(), B, T), TypeError, "weight must be a dense tensor, got a torch.sparse_coo one"),
        ((H.long(), W, B, T), TypeError, "hidden must be float32, float64, float16 or bfloat16, got torch.int64"),
        ((H, W, B.int(), T), TypeError, "bias must be float32, float64, float16 or bfloat16, got torch.int32"),
        ((H, W.half(), B, T), TypeError, "hidden, weight and bias must have one dtype, or be under autocast, got "
         "hidden torch.float32, weight torch.float16, bias torch.float32"),
        ((H, W, B, T.float()), TypeError, "target must be int64, int32 or uint8 class indices (or bool, int8, int16 or "
         "uint16), got torch.float32 of shape (4,): use .long() where they are class indices"),
        ((H, W[0], B, T), ValueError, "weight must have shape (C, D), or (C, D, 1, ..., 1) as that of a 1 x 1 "
         "convolution, got hidden of shape (4, 6) and weight of shape (6,)"),
        ((P, torch.zeros(3, D, 3, 3), B, T4), ValueError, "weight must have shape (C, D), or (C, D, 1, ..., 1) as that "
         "of a 1 x 1 convolution, got hidden of shape (2, 6, 4, 5) and weight of shape (3, 6, 3, 3)"),
        ((P[..., 0], torch.zeros(3, D, 3), B, T4[..., 0]), ValueError, "weight must have shape (C, D), or (C, D, 1, "
         "..., 1) as that of a 1 x 1 convolution, got hidden of shape (2, 6, 4) and weight of shape (3, 6, 3)"),
        ((H, W[:, :5], B, T), ValueError, f"{OF_ROWS}, got hidden of shape (4, 6) and weight of shape (3, 5)"),
        ((H[0, 0], W, B, T), ValueError, f"{OF_ROWS}, got hidden of shape () and weight of shape (3, 6)"),
        ((H[0, :5], W, B, T[0]), ValueError, f"{OF_ROWS}, got hidden of shape (5,) and weight of shape (3, 6)"),
        ((P[:, 0], W, B, T4[:, 0]), ValueError, f"{OF_ROWS}, got hidden of shape (2, 4, 5) and weight of shape (3, 6)"),
        ((P, W, B, T4), ValueError, f"{OF_ROWS}, got hidden of shape (2, 6, 4, 5) and weight of shape (3, 6){HINT}"),
        ((P[..., 0], W, B, T4[..., 0]), ValueError, f"{OF_ROWS}, got hidden of shape (2, 6, 4) and weight of shape "
         f"(3, 6){HINT}"),
        ((P.movedim(1, -1), W4, B, T4), ValueError, "hidden must have shape (N, D, d1, ..., dk) for weight "
         "(C, D, 1, ..., 1), got hidden of shape (2, 4, 5, 6) and weight of shape (3, 6, 1, 1)"),
        ((H, W4, B, T), ValueError, "a weight of shape (C, D, 1, ..., 1) needs hidden of as many dimensions, got "
         "hidden of shape (4, 6) and weight of shape (3, 6, 1, 1)"),
        ((H, W[:0], B[:0], T), ValueError, "the class dimension of weight is empty: got hidden of shape (4, 6) and "
         "weight of shape (0, 6)"),
        ((H, W, B[:2], T), ValueError, "bias must have shape (C,) = (3,) for weight of shape (3, 6), got bias of "
         "shape (2,)"),
        ((H, W, B, T[:3]), ValueError, "expected target of shape (4,) for hidden of shape (4, 6) and weight of shape "
         "(3, 6), got target of shape (3,)"),
        ((P, W4, B, T4[:, :, None]), ValueError, "expected target of shape (2, 4, 5) for hidden of shape (2, 6, 4, 5) "
         "and weight of shape (3, 6, 1, 1), got target of shape (2, 4, 1, 5)"),
        # Rows have no channel.
        ((torch.zeros(4, D, D), W, B, T[:, None, None].expand(4, 1, D)), ValueError, "expected target of shape (4, 6) "
         "for hidden of shape (4, 6, 6) and weight of shape (3, 6), got target of shape (4, 1, 6)"),
        ((H, W.to("meta"), B, T), RuntimeError, "expected weight on the device of hidden, cpu, got weight on meta"),
        ((H, W, B, T.to("meta")), RuntimeError, "expected target on the device of hidden, cpu, got target on meta"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(backend, given, error, words):
    with pytest.raises(error, match=f"^{re.escape(words)}$"):
        linear_hem_loss(*given, backend=backend)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"margin": -1.0}, ValueError, "margin must be finite and not negative, got -1"),
        (
            {"margin": torch.tensor([0.0, -1.0, 0.0])},
            ValueError,
            "margin must be finite and not negative, but margin[1]",
        ),
        ({"margin": torch.zeros(2)}, ValueError, "margin must have shape (C,) = (3,)"),
        ({"class_weight": torch.zeros(2)}, ValueError, "class_weight must have shape (C,) = (3,)"),
        ({"class_weight": torch.tensor([0.0, -1.0, 0.0])}, ValueError, "class_weight must be finite and not negative"),
        ({"class_weight": torch.ones(3, requires_grad=True)}, ValueError, "class_weight is a constant of the loss"),
        ({"class_weight": torch.ones(3, device="meta")}, RuntimeError, "expected class_weight on the device"),
        ({"class_weight": [1.0, 1.0, 1.0]}, TypeError, "class_weight must be a tensor of shape (C,), got list"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be a number of rows, at least 1, or None, got 0"),
        ({"chunk_size": True}, ValueError, "chunk_size must be a number of rows, at least 1, or None, got True"),
        ({"skip_finished": None}, TypeError, "skip_finished must be True or False, got None"),
        ({"process_group": "WORLD"}, TypeError, "process_group must be"),
    ],
)
def test_options_that_do_not_fit(backend, options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        linear_hem_loss(H, W, B, T, backend=backend, **options)
    of_shape = "(C,) = (3,)" in words or "on the device" in words  # the module has no classes to compare with
    if not of_shape:
        with pytest.raises(error, match=re.escape(words)):
            LinearHEMLoss(D, 3, backend=backend, **options)(H, T)


def test_other_options_that_do_not_fit():
    with pytest.raises(ValueError, match="backend must be one of"):
        linear_hem_loss(H, W, B, T, backend="triton")
    for wrong in (-1, True, 1.0):
        words = f"^spatial_dims must be a number of dimensions, at least 0, got {wrong}$"
        with pytest.raises(ValueError, match=words):
            LinearHEMLoss(D, 3, spatial_dims=wrong)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_target_that_is_no_class_is_named_with_its_place(backend, compiled):
    hidden, target = torch.zeros(5, 8, D), torch.zeros(5, 8, dtype=torch.long)
    target[3, 7] = 3
    call = linear_hem_loss
    if compiled and backend == "native":
        torch._dynamo.reset()
        call = torch.compile(linear_hem_loss, backend="aot_eager")
    words = re.escape("target[3, 7] is 3, which is neither a class in [0, 3) nor ignore_index (-100)")
    with pytest.raises(IndexError, match=words):
        call(hidden, W, B, target, chunk_size=4, backend=backend)
