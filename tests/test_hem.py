import copy
import functools
import io
import re

import oracle
import pytest
import torch
import torch._dynamo
from cases import (
    ARITHMETIC,
    DTYPES,
    REDUCTIONS,
    Calls,
    as_processes,
    assert_gradient,
    assert_loss,
    eighths,
    logits,
    num_classes,
    target_shape,
    targets,
)
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from hem_ext import HEMLoss, _native, hem_loss, reference, sharded
from hem_ext.hem import _DTYPE_CODES, _backward, _forward
from hem_ext.stats import loss_and_stats

# Around the widths that matter: 16 lanes, 32 bits a word, 64 narrow classes, 512 a branch, 128 positions a block.
SHAPES = [
    (7,),
    (1,),
    (1, 1),
    (5, 1),
    (3, 2),
    (17, 10),
    (33, 16),
    (16, 31),
    (15, 33),
    (70, 64),
    (9, 65),
    (5, 129),
    (3, 512),
    (2, 1100),
    (300, 3),
    (2, 5, 3),
    (1, 3, 257),
    (2, 21, 5, 7),
    (1, 33, 16, 17),
    (3, 70, 2, 9),
    (2, 4, 1, 1),
    (2, 3, 2, 3, 4),
]


def as_contiguous(x):
    return x


def as_channels_last(x):
    """Classes innermost, for any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x


def as_transposed(x):
    return x.t().contiguous().t() if x.dim() == 2 else x


def as_class_slice(x):
    """The first classes of wider logits."""
    if x.dim() == 1:
        return torch.cat([x, x])[: len(x)]
    return torch.cat([x, x], dim=1)[:, : x.shape[1]]


def as_class_slice_channels_last(x):
    if x.dim() <= 2:
        return x
    return as_channels_last(torch.cat([x, x], dim=1))[:, : x.shape[1]]


def as_every_other(x):
    """A step of two in the last dimension: no layout the kernels read in place."""
    return torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2]


def as_spatially_transposed(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 3 else x


def as_crop(x):
    """All but the first column of wider logits."""
    return torch.cat([x[..., :1], x], dim=-1)[..., 1:]


def as_crop_channels_last(x):
    return as_channels_last(torch.cat([x[..., :1], x], dim=-1))[..., 1:] if x.dim() > 2 else x


LAYOUTS = [
    as_crop,
    as_crop_channels_last,
    as_contiguous,
    as_channels_last,
    as_transposed,
    as_class_slice,
    as_class_slice_channels_last,
    as_every_other,
    as_spatially_transposed,
]


INF, NAN = float("inf"), float("nan")


def place(rows, wide, pixels):
    """Rows of a few classes: as they are, with 96 masked ones behind, or as pixels."""
    x = torch.tensor(rows)
    if wide:
        x = torch.cat([x, torch.full((len(x), 96), -INF)], dim=1)
    return x.t()[None].contiguous() if pixels else x


def check_against_oracle(x, t, grad_loss=None, backend="native", **options):
    x = x.detach().requires_grad_()
    loss = hem_loss(x, t, backend=backend, **options)
    expected, gradient = oracle.hem(x, t, grad_loss=grad_loss, **options)
    assert loss.dtype == ARITHMETIC[x.dtype]
    assert loss.shape == expected.shape
    assert_loss(loss.detach(), expected)
    loss.backward(torch.ones_like(loss) if grad_loss is None else grad_loss.to(loss.dtype))
    assert x.grad.dtype == x.dtype
    assert_gradient(x.grad, gradient)


# --- values ---------------------------------------------------------------------------------------------------


def test_a_sample_worked_by_hand(device, backend):
    # Errors 0.25, 1.25, 0 of three rivals: mean over four classes 0.375, so only the second is kept.
    x = torch.tensor([[1.0, 1.0, 2.0, -1.0]], requires_grad=True)
    loss = hem_loss(x, torch.tensor([0]), margin=0.25, backend=backend)
    loss.backward()
    assert loss.item() == 1.25
    assert x.grad.tolist() == [[-1.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize("size", [(), (1,)])
@pytest.mark.parametrize("fours", [1, 8, 32, 256])
def test_an_error_equal_to_the_mean_is_kept(device, backend, fours, size):
    # Errors 0, 3, 1, 0 of every four classes: the mean is exactly 1.
    x = torch.tensor([0.0, 2.0, 0.0, -1.0] + [-1.0, 2.0, 0.0, -1.0] * (fours - 1)).view(1, -1, *size)
    x.requires_grad_()
    loss = hem_loss(x, torch.zeros(1, *size, dtype=torch.long), margin=1.0, backend=backend)
    loss.backward()
    assert loss.item() == 2.0
    share = 0.5 / fours
    expected = [-1.0, share, share, 0.0] + [0.0, share, share, 0.0] * (fours - 1)
    assert x.grad.flatten().tolist() == expected


def test_an_error_of_0_is_not_kept(device, backend):
    # At the margin to the bit: finished, though 0 is not below a mean of 0.
    x = torch.tensor([[0.0, -0.25, -1.0]], requires_grad=True)
    hem_loss(x, torch.tensor([0]), margin=0.25, backend=backend, reduction="sum").backward()
    assert x.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_the_mean_counts_the_target_and_the_finished_rivals(device, backend):
    # Errors 2, 1, 0, 0 over five classes: mean 0.6, both kept. Over the two or four others it would be 1.5 or 0.75.
    x = torch.tensor([[0.0, 1.0, 0.0, -2.0, -2.0]], requires_grad=True)
    hem_loss(x, torch.tensor([0]), margin=1.0, backend=backend).backward()
    assert x.grad.tolist() == [[-1.0, 0.5, 0.5, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_oracle(kernels, shape, dtype):
    count = num_classes(shape)
    x = logits(shape, dtype)
    for reduction in REDUCTIONS:
        check_against_oracle(x, targets(shape), reduction=reduction, margin=0.5)
        check_against_oracle(
            x,
            targets(shape, ignore_index=-100),
            reduction=reduction,
            margin=eighths(count),
            weight=eighths(count),
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(17, 10), (5, 129), (6, 2, 9), (2, 21, 5, 7), (3, 70, 4, 6), (2, 3, 2, 3, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(kernels, layout, shape, dtype):
    x = layout(logits(shape, dtype))
    check_against_oracle(x, targets(shape, ignore_index=-100), reduction="none", margin=0.5)
    check_against_oracle(x, targets(shape), margin=eighths(num_classes(shape)))


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((6, 2), (4, 2)),  # every other of four classes
        ((6, 1), (3, 7)),
        ((2, 5, 4, 3), (120, 1, 15, 5)),  # every other image, its classes innermost
        ((2, 5, 4, 3), (65, 1, 15, 5)),
        ((2, 5, 4, 1), (40, 8, 2, 1)),  # the first of two columns
        ((2, 1, 4, 3), (48, 24, 6, 2)),
    ],
)
def test_strides_that_are_nearly_those_of_a_layout(device, shape, stride):
    x = logits((300,)).as_strided(shape, stride)
    check_against_oracle(x, targets(shape, ignore_index=-100), margin=0.5, reduction="none")


@pytest.mark.parametrize("shape", [(4, 6), (4, 70), (2, 6, 3, 5)])
def test_expanded_logits(device, backend, shape):
    x = logits(shape[1:])[None].expand(shape)
    check_against_oracle(x, targets(shape), backend=backend)


@pytest.mark.parametrize("shape", [(7,), (9, 6), (3, 65), (2, 5, 4, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_matches_the_oracle(device, shape, dtype):
    count = num_classes(shape)
    for reduction in REDUCTIONS:
        common = {"backend": "reference", "reduction": reduction}
        check_against_oracle(logits(shape, dtype), targets(shape), **common)
        for options in ({}, {"margin": eighths(count), "weight": eighths(count)}):
            check_against_oracle(logits(shape, dtype), targets(shape, ignore_index=-100), **common, **options)


def test_continuous_logits_in_float64(kernels):
    for shape in [(50, 10), (20, 200), (2, 21, 9, 11)]:
        check_against_oracle(torch.randn(shape, dtype=torch.float64), targets(shape), reduction="none")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("ignore_index", [255, 0])
def test_target_dtypes(kernels, backend, dtype, ignore_index):
    # ignore_index may also be a class.
    for shape in [(12, 10), (4, 100), (2, 5, 4, 9)]:
        t = targets(shape, dtype, ignore_index)
        check_against_oracle(logits(shape), t, backend=backend, ignore_index=ignore_index)


def test_targets_that_are_not_contiguous(device, backend):
    x, t = logits((2, 5, 4, 6)), targets((2, 5, 6, 4)).transpose(1, 2)
    check_against_oracle(x, t, backend=backend)


def test_the_default_ignore_index_is_no_uint8(device, backend):
    x, t = logits((4, 200)), torch.tensor([156, 0, 1, 2], dtype=torch.uint8)  # 156 == -100 modulo 256
    check_against_oracle(x, t, backend=backend)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_gradient_scales_with_grad_loss(kernels, backend, reduction):
    for shape in [(6, 10), (6, 100), (2, 5, 3, 4), (1, 3, 37)]:
        t = targets(shape)
        grad_loss = torch.randn(t.shape if reduction == "none" else ())
        check_against_oracle(logits(shape), t, grad_loss, backend, reduction=reduction)


def test_strides_of_grad_loss(device, backend):
    x, t = logits((4, 5, 6)).requires_grad_(), targets((4, 5, 6))
    losses = hem_loss(x, t, margin=5.0, reduction="none", backend=backend)
    for grad_loss in (torch.randn(6, 4).t(), torch.tensor([[2.0], [-1.0], [0.5], [3.0]]).expand(4, 6)):
        found, expected = (
            torch.autograd.grad(losses, x, g, retain_graph=True)[0] for g in (grad_loss, grad_loss.contiguous())
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("margin", [1, 0.5, torch.tensor([0.5] * 4, dtype=torch.float64), [0.5, 0.25, 1, 0]])
def test_forms_of_the_margin(device, backend, margin):
    x, t = logits((8, 4)), targets((8, 4))
    margin = margin.to(device) if isinstance(margin, torch.Tensor) else margin
    given = torch.tensor(margin) if isinstance(margin, list) else margin
    expected, _ = oracle.hem(x, t, margin=given)
    assert_loss(hem_loss(x, t, margin=margin, backend=backend), expected)


def test_the_default_margin_is_the_rule_at_the_size_of_cifar(device, backend):
    x, t = torch.tensor([[0.0, 0.0]]), torch.tensor([0])
    assert_loss(hem_loss(x, t, backend=backend), torch.tensor(0.2, dtype=torch.float64))


# --- rounding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 128256), (1, 128256, 2)])
def test_equal_errors_are_all_kept(kernels, backend, shape, dtype):
    # A serial float32 sum puts the mean of 128k equal errors above every one of them.
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    t = torch.zeros(1, *shape[2:], dtype=torch.int64)
    loss = hem_loss(x, t, margin=0.3, backend=backend, reduction="sum")
    loss.backward()
    assert loss.item() == pytest.approx(0.3 * t.numel(), rel=1e-6)
    kept = x.grad[:, 1:]
    assert torch.all(kept == torch.tensor(1 / 128255, dtype=dtype))
    assert torch.all(x.grad[:, 0] == -1)


@pytest.mark.parametrize("more", [1e-4, 1e-5])
def test_the_mean_is_a_tree_sum(kernels, more):
    # 0.3 for half, a little more for the others: a drifting mean would drop or keep the wrong ones.
    x = torch.zeros(1, 100_000)
    x[0, 1:50_000] += more
    expected = torch.zeros_like(x)
    expected[0, 1:50_000] = 1 / 49_999
    expected[0, 0] = -1
    for layout in (x, x[..., None].expand(-1, -1, 3).contiguous()):
        y = layout.clone().requires_grad_()
        hem_loss(y, torch.zeros(1, *y.shape[2:], dtype=torch.int64), margin=0.3, reduction="sum").backward()
        assert torch.equal(y.grad, expected.view(1, -1, *[1] * (y.dim() - 2)).expand_as(y))


@pytest.mark.parametrize("rivals", [4, 100])
def test_a_mean_above_every_error_still_keeps_the_largest(kernels, backend, rivals):
    # The sum of the errors overflows, and so does their mean.
    x = torch.zeros(1, rivals)
    x[0, 1:4] = torch.tensor([3e38, 2e38, 2e38])
    for layout in (x, x[..., None].expand(-1, -1, 3)):
        y = layout.clone().requires_grad_()
        t = torch.zeros(1, *y.shape[2:], dtype=torch.int64)
        loss = hem_loss(y, t, reduction="none", backend=backend)
        loss.sum().backward()
        assert torch.all(loss == torch.tensor(3e38))
        assert y.grad[0, :2].flatten().tolist() == [-1.0] * t.numel() + [1.0] * t.numel()
        assert y.grad[0, 2:].count_nonzero() == 0


@pytest.mark.parametrize("shape", [(1, 5), (1, 100), (1, 5, 3)])
def test_a_mean_that_underflows_keeps_no_class_without_an_error(kernels, backend, shape):
    x = torch.zeros(shape)
    x[:, 1] = 2.0**-149  # the least number there is
    x.requires_grad_()
    t = torch.zeros(1, *shape[2:], dtype=torch.int64)
    loss = hem_loss(x, t, margin=0.0, reduction="none", backend=backend)
    loss.sum().backward()
    assert torch.all(loss == 2.0**-149)
    assert torch.all(x.grad[:, 0] == -1)
    assert torch.all(x.grad[:, 1] == 1)
    assert not x.grad[:, 2:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gradient_is_rounded_as_torch_rounds(kernels, dtype):
    # Half way between two numbers of this dtype: subnormal ones of float16 among them, none near the largest.
    bits = torch.randint(0, 0x7A00, (1000,), dtype=torch.int32)
    low, high = (b.to(torch.int16).view(dtype).float() for b in (bits, bits + 1))
    half_way = low + (high - low) / 2
    x, t = torch.tensor([0.0, 1.0]).to(dtype).repeat(1000, 1), torch.zeros(1000, dtype=torch.int64)
    for y, labels in ((x, t), (x.t()[None].contiguous(), t[None])):
        y.requires_grad_()
        losses = hem_loss(y, labels, reduction="none")
        (gradient,) = torch.autograd.grad(losses, y, half_way.view(labels.shape))
        assert torch.equal(gradient[:, 0] if y is x else gradient[0, 0], -half_way.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_its_logits(kernels, dtype):
    # The loss of the rounded logits, in float32: no more error than float32 arithmetic makes.
    x = torch.randn(64, 100).to(dtype)
    t = targets((64, 100))
    expected, _ = oracle.hem(x, t, reduction="none")
    assert_loss(hem_loss(x, t, reduction="none"), expected)


def test_subnormal_and_extreme_half_logits(kernels):
    values = torch.tensor([2**-24, -(2**-24), 2**-15, 65504.0, -65504.0, 0.0, 1.0, -1.0]).to(torch.float16)
    for shape in [(16, 8), (2, 8, 9)]:
        x = values[torch.randint(0, 8, shape)]
        check_against_oracle(x, targets(shape), reduction="none", margin=0.5)
    # A gradient below the smallest subnormal rounds to 0, one in their range to the nearest.
    x = torch.zeros(1, 3000, dtype=torch.float16, requires_grad=True)
    hem_loss(x, torch.tensor([0])).backward(torch.tensor(2.0**-10))
    assert torch.all(x.grad[0, 1:] == torch.tensor(2.0**-10 / 2999).half())
    assert x.grad[0, 0] == -(2.0**-10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_and_thread_count_gives_the_same_bits(dtype):
    threads, before = torch.get_num_threads(), _native.library.cpu_isa()
    cases = [(as_contiguous, (700, 10)), (as_contiguous, (64, 1000)), (as_transposed, (300, 33))]
    cases += [(as_contiguous, (2, 21, 64, 65)), (as_channels_last, (2, 21, 64, 65)), (as_contiguous, (3, 2000, 40))]
    cases += [(as_contiguous, (1, 150, 140))]  # many classes in as many pixels as there are registers for
    try:
        for layout, shape in cases:
            x, t = layout(torch.randn(shape).to(dtype)), targets(shape)
            weight = torch.rand(shape[1])
            results = []
            for isa in _native.library.available_cpu_isas():
                _native.library.select_cpu_isa(isa)
                for n in (1, 2, 5):
                    torch.set_num_threads(n)
                    y = x.detach().requires_grad_()
                    loss = hem_loss(y, t, weight=weight, reduction="batchmean")
                    results.append((loss.detach(), *torch.autograd.grad(loss, y)))
            assert all(torch.equal(a, results[0][0]) and torch.equal(b, results[0][1]) for a, b in results[1:])
    finally:
        torch.set_num_threads(threads)
        _native.library.select_cpu_isa(before)


def test_every_half_precision_number_is_read_exactly(kernels):
    # Two classes: the loss is the difference to a target of 0.
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype)
        x = torch.stack([torch.zeros_like(values), values], dim=1)
        for y in (x, x.t().contiguous()[None]):
            t = torch.zeros(1, len(bits), dtype=torch.int64) if y.dim() == 3 else torch.zeros(len(bits)).long()
            loss = hem_loss(y, t, margin=0.0, reduction="none").flatten()
            wide = values.float()
            expected = torch.where(wide.isfinite() | (wide < 0), wide.clamp(min=0), torch.nan)
            assert torch.equal(loss.nan_to_num(-1), expected.nan_to_num(-1))


# --- nothing to do --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 100), (2, 3, 0, 4), (0, 3, 2, 2)])
def test_empty_batches(device, backend, shape, reduction):
    x = torch.zeros(shape, requires_grad=True)
    loss = hem_loss(x, targets(shape), reduction=reduction, backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert x.grad.shape == shape
    assert hem_loss(x, targets(shape), reduction="none", backend=backend).shape == (shape[0], *shape[2:])


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("shape", [(5, 4), (5, 70), (2, 4, 3)])
def test_finished_and_ignored_samples_give_zero_not_nan(kernels, backend, shape, reduction):
    finished = torch.full(shape, -9.0)
    finished[:, 1] = 9.0
    label = torch.ones(targets(shape).shape, dtype=torch.int64)
    for t, weight in [(label, None), (label * 0 - 100, None), (label * 0, torch.zeros(shape[1]))]:
        x = finished.clone().requires_grad_()
        loss = hem_loss(x, t, reduction=reduction, weight=weight, backend=backend)
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(x.grad, torch.zeros(shape))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("pixels", [False, True])
def test_finished_samples_do_not_pull_the_mean_down(kernels, backend, wide, pixels):
    x = place([[0.0, 1.0], [9.0, 0.0], [9.0, 0.0], [9.0, 0.0]], wide, pixels).requires_grad_()
    t = torch.zeros(1, 4, dtype=torch.int64) if pixels else torch.zeros(4, dtype=torch.int64)
    for reduction, expected in [("mean", 1.5), ("batchmean", 1.5 / 4)]:
        loss = hem_loss(x, t, margin=0.5, reduction=reduction, backend=backend)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss.item() == expected
        assert gradient.abs().sum().item() == 2 * expected / 1.5


def test_a_weighted_loss_that_is_rounded_to_0_is_counted(device, backend):
    x = torch.tensor([[0.0, torch.finfo(torch.float32).smallest_normal * 2**-23], [0.0, 1.0]])
    t, weight = torch.tensor([0, 0]), torch.tensor([0.25, 1.0])
    assert hem_loss(x, t, weight, margin=0.0, backend=backend) == 0.5
    criterion = HEMLoss(weight, margin=0.0, backend=backend, stats=True)
    assert criterion(x, t) == 0.5
    assert criterion.stats.active == 0.5
    assert criterion.stats.active_share == 1.0


def test_finished_pixels_beside_others(kernels):
    """Any of four times sixteen, which are looked at together."""
    x, t = logits((16, 40, 64)), torch.zeros(16, 64, dtype=torch.int64)
    for n in range(16):
        for k in range(4):
            x[n, 0, 16 * k : 16 * k + 16] = 9.0 if n >> k & 1 else 0.0
    check_against_oracle(x, t, margin=0.5)


@pytest.mark.parametrize("num_classes", [5, 21, 70])
def test_finished_rows_between_others(kernels, num_classes):
    """From all to none of sixteen rows, whose gradient goes to memory that holds something else."""
    x, t = logits((17 * 16, num_classes)), torch.zeros(17 * 16, dtype=torch.int64)
    row = torch.arange(17 * 16)
    x[:, 0] = torch.where(row % 16 < row // 16, 9.0, 0.0)
    x.requires_grad_()
    loss = hem_loss(x, t, margin=0.5, backend="reference")
    (expected,) = torch.autograd.grad(loss, x)
    hem_loss(x * 1, t, margin=0.5, overwrite_input=True).backward()
    assert_gradient(x.grad, expected.double())


def test_more_classes_than_float32_can_count(kernels):
    num_classes = 2**24 + 1
    x = torch.zeros(1, num_classes, requires_grad=True)
    loss = hem_loss(x, torch.tensor([5]), margin=0.5)
    loss.backward()
    assert loss == 0.5
    assert x.grad[0, 5] == -1
    assert (x.grad[0, 6:] == 2**-24).all()


# --- not a number ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize(
    "broken",
    [
        [NAN, 0.0, 0.0, 0.0],  # the target
        [0.0, NAN, 0.0, 0.0],
        [0.0, 0.0, 5.0, NAN],
        [0.0, INF, 0.0, 0.0],
        [-INF, 0.0, 0.0, 0.0],
        [INF, INF, 0.0, 0.0],
        [NAN, NAN, NAN, NAN],
    ],
)
def test_a_broken_row_is_nan_and_alone(kernels, backend, broken, wide, pixels):
    x = place([[1.0, 2.0, 3.0, 0.0], broken, [0.0, -5.0, 0.0, 0.5]], wide, pixels)
    t = torch.zeros(1, 3, dtype=torch.int64) if pixels else torch.zeros(3, dtype=torch.int64)
    for reduction in REDUCTIONS:
        y = x.clone().requires_grad_()
        loss = hem_loss(y, t, reduction=reduction, backend=backend)
        loss.sum().backward()
        rows = y.grad[0].t() if pixels else y.grad
        assert torch.all(rows[1].isnan())
        assert torch.all(rows[[0, 2]].isfinite())
        assert rows[0, 0] < 0
        if reduction == "none":
            assert loss.isfinite().flatten().tolist() == [True, False, True]
        else:
            assert not loss.isfinite()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("pixels", [False, True])
def test_infinite_logits_that_are_fine(kernels, backend, wide, pixels):
    # A separated target, masked rivals, and both.
    x = place([[INF, 1.0, 2.0, 3.0], [0.0, -INF, 1.0, -INF], [INF, -INF, 0.0, 0.0]], wide, pixels).requires_grad_()
    t = torch.zeros(1, 3, dtype=torch.int64) if pixels else torch.zeros(3, dtype=torch.int64)
    loss = hem_loss(x, t, margin=0.5, reduction="none", backend=backend)
    loss.sum().backward()
    assert loss.flatten().tolist() == [0.0, 1.5, 0.0]
    rows = x.grad[0].t() if pixels else x.grad
    assert rows[:, :4].tolist() == [[0.0] * 4, [-1.0, 0.0, 1.0, 0.0], [0.0] * 4]


@pytest.mark.parametrize("shape", [(6, 5), (6, 70), (2, 5, 3)])
@pytest.mark.parametrize("fill", [NAN, INF, -INF])
def test_an_ignored_row_is_never_looked_at(kernels, backend, shape, fill):
    x, t = logits(shape), targets(shape)
    x[0], t[0] = fill, -100
    x.requires_grad_()
    loss = hem_loss(x, t, backend=backend)
    loss.backward()
    expected, gradient = oracle.hem(x[1:], t[1:])
    assert_loss(loss.detach(), expected)
    assert torch.equal(x.grad[0], torch.zeros(shape[1:]))
    assert_gradient(x.grad[1:], gradient)


def test_one_class(kernels, backend):
    x = torch.tensor([[3.0], [INF], [-INF], [NAN]], requires_grad=True)
    loss = hem_loss(x, torch.zeros(4, dtype=torch.int64), reduction="none", backend=backend)
    loss.sum().backward()
    assert loss[:3].tolist() == [0.0, 0.0, 0.0]
    assert x.grad[:3].tolist() == [[0.0]] * 3
    assert loss[3].isnan()
    assert x.grad[3].isnan()


def test_a_nan_row_makes_grad_scaler_skip_the_step(device, backend):
    for broken, scale in [(False, 4.0), (True, 2.0)]:
        model = nn.Linear(3, 4)
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device, init_scale=4.0)
        x = torch.randn(5, 3)
        if broken:
            x[2, 0] = NAN
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = hem_loss(model(x), targets((5, 4)), margin=2.0, backend=backend)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
        assert torch.equal(model.weight, before["weight"]) == broken


# --- memory ---------------------------------------------------------------------------------------------------


def saved_bytes(f):
    seen = {}

    def pack(tensor):
        seen[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        f()
    return sum(seen.values())


@pytest.mark.parametrize(
    ("shape", "mask_bytes"),
    [((64, 1000), 64 * 32 * 4), ((2, 21, 32, 32), 2 * 32 * 32 * 4), ((2, 150, 16, 16), 2 * 5 * 256 * 4)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_one_bit_per_logit(device, shape, mask_bytes, dtype):
    x, t = torch.randn(shape).to(dtype).requires_grad_(), targets(shape)
    assert saved_bytes(lambda: hem_loss(x, t)) == mask_bytes + t.nbytes + 4  # and the denominator


@pytest.mark.parametrize("layout", [as_contiguous, as_channels_last, as_class_slice])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_copies_no_logits(device, layout, dtype):
    x, t = layout(torch.randn(2, 21, 128, 128).to(dtype)).requires_grad_(), targets((2, 21, 128, 128))
    mask = 2 * 128 * 128 * 4
    with torch.autocast(device, dtype=torch.bfloat16):
        if device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            hem_loss(x, t)
            allocated = torch.cuda.max_memory_allocated() - before
            assert mask < allocated < mask + 2**17  # and two sums a block
            return
        with torch.profiler.profile(profile_memory=True) as profile:
            hem_loss(x, t)
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
    assert mask < allocated < mask + 1024  # and a few numbers


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((2, 10), (2**31, 1)),
        ((17, 10), (2**27, 1)),
        ((2, 100), (2**31, 1)),
        ((1, 2, 20), (2**32, 2**31, 1)),
        ((2, 2, 20), (2**31, 20, 1)),
    ],
)
def test_logits_that_lie_far_apart(kernels, shape, stride):
    # What is not written takes no memory.
    far, x, t = torch.empty(2**31 + 100, dtype=torch.bfloat16), logits(shape, torch.bfloat16), targets(shape)
    apart = far.as_strided(shape, stride).copy_(x)
    assert torch.equal(hem_loss(apart, t, reduction="none"), hem_loss(x, t, reduction="none"))


@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 4), (2, 5, 4, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_has_the_memory_format_of_the_logits(device, layout, shape):
    x = layout(logits(shape)).requires_grad_()
    (gradient,) = torch.autograd.grad(hem_loss(x, targets(shape)), x)
    if layout is as_spatially_transposed:
        assert gradient.is_contiguous()  # no layout the kernels know: such logits were copied
    else:
        assert gradient.stride() == torch.empty_like(x).stride()


def test_more_than_two_to_the_31_elements(device):
    # Zero pages cost no memory until they are written: 4.5 GB of gradient is what this takes.
    x = torch.zeros(70_000, 32_000, dtype=torch.bfloat16)
    t = torch.full((70_000,), -100)
    x[-1, 7], t[-1] = 1.0, 31_999
    x[3, 31_999], t[3] = 1.0, 5
    x.requires_grad_()
    loss = hem_loss(x, t, margin=0.5)
    loss.backward()
    assert loss.item() == 1.5
    assert x.grad[-1].nonzero().flatten().tolist() == [7, 31_999]
    assert x.grad[3].nonzero().flatten().tolist() == [5, 31_999]
    assert x.grad[40_000].count_nonzero() == 0


def test_more_than_two_to_the_31_elements_in_pixels(device):
    pixels = 2**24 + 5
    x = torch.zeros(2, 64, pixels, dtype=torch.bfloat16)
    t = torch.full((2, pixels), 255, dtype=torch.uint8)
    x[1, 63, -1], t[1, -1] = 1.0, 2
    x.requires_grad_()
    loss = hem_loss(x, t, margin=0.5, ignore_index=255)
    loss.backward()
    assert loss.item() == 1.5
    assert x.grad[1, :, -1].nonzero().flatten().tolist() == [2, 63]
    assert x.grad[0, :, -1].count_nonzero() == 0


# --- autograd -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", [as_contiguous, as_channels_last, as_transposed])
def test_gradcheck(device, backend, reduction, layout):
    for shape in [(6,), (5, 7), (3, 70), (2, 4, 3, 2)]:
        # Normal draws in float64 lie far from every kink, by gradcheck's step of 1e-6.
        x = layout(torch.randn(shape, dtype=torch.float64)) if len(shape) > 1 else torch.randn(6, dtype=torch.float64)
        x.requires_grad_()
        t = targets(shape, ignore_index=-100 if len(shape) > 1 else None)
        weight = torch.rand(num_classes(shape), dtype=torch.float64)

        def loss(x, t=t, weight=weight):
            return hem_loss(x, t, weight=weight, reduction=reduction, backend=backend)

        assert torch.autograd.gradcheck(loss, x)
        assert torch.autograd.gradgradcheck(loss, x)


def test_a_loss_of_the_gradient_trains(device, backend):
    # A gradient penalty: its own gradient comes through the double backward.
    model = nn.Linear(4, 3, dtype=torch.float64)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    loss = hem_loss(model(x), targets((6, 3)), margin=5.0, backend=backend)
    (gx,) = torch.autograd.grad(loss, x, create_graph=True)
    gx.square().sum().backward()
    assert model.weight.grad.abs().sum() > 0


def test_the_double_backward_is_not_rounded_to_the_logits(device, backend):
    # Three kept rivals: 1/3 has no bfloat16.
    x = torch.tensor([[0.0, 1.0, 1.0, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    scale = torch.ones((), requires_grad=True)
    loss = hem_loss(x, torch.tensor([0]), backend=backend)
    (gradient,) = torch.autograd.grad(scale * loss, x, create_graph=True)
    (slope,) = torch.autograd.grad(gradient[0, 1].float(), scale)
    assert slope.item() == pytest.approx(1 / 3, rel=1e-6)


def test_a_raw_op_refuses_to_lose_a_gradient(device):
    x, t = logits((4, 5)), targets((4, 5))
    call = (t, None, 0.2, None, -100, 1, True)
    assert _forward(x, *call)[0] == hem_loss(x, t)
    with pytest.raises(RuntimeError, match=r"hem_forward.*call hem_ext\.hem_loss"):
        _forward(x.requires_grad_(), *call)
    with torch.no_grad():
        assert _forward(x, *call)[0] == hem_loss(x, t)


def test_a_target_changed_before_backward_is_an_error(device):
    x, t = logits((4, 5)).requires_grad_(), targets((4, 5))
    loss = hem_loss(x, t)
    t.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_twice(device, backend):
    x = logits((4, 5)).requires_grad_()
    loss = hem_loss(x, targets((4, 5)), backend=backend)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once)


def test_inference_mode_and_deterministic_algorithms(device, backend):
    x, t = logits((4, 5)), targets((4, 5))
    expected = hem_loss(x, t, backend=backend)
    with torch.inference_mode():
        assert hem_loss(x, t, backend=backend) == expected
        assert hem_loss(x + 0, t, backend=backend) == expected
    torch.use_deterministic_algorithms(True)
    try:
        y = x.clone().requires_grad_()
        hem_loss(y, t, backend=backend).backward()
    finally:
        torch.use_deterministic_algorithms(False)


# --- ops, compile, autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [as_contiguous, as_channels_last, as_transposed])
@pytest.mark.parametrize("shape", [(7,), (4, 70), (2, 5, 3, 4)])
@pytest.mark.parametrize("reduction", range(4))
def test_opcheck(device, shape, layout, reduction):
    x, t = logits(shape, torch.bfloat16), targets(shape)
    x = layout(x) if len(shape) > 1 else x
    rows = len(shape) == 1 or (layout is as_channels_last if len(shape) > 2 else layout is not as_transposed)
    margins, weight = eighths(num_classes(shape)), eighths(num_classes(shape))
    opcheck(_forward, (x, t, margins, 0.0, weight, -100, reduction, rows))
    opcheck(_forward, (x, t, None, 0.5, None, -100, reduction, rows))
    loss, mask, denominator = _forward(x, t, margins, 0.0, weight, -100, reduction, rows)
    saved = (mask, t, weight, denominator, -100, num_classes(shape))
    opcheck(_backward, (torch.ones_like(loss), *saved, _DTYPE_CODES[x.dtype], reduction, rows))


@pytest.mark.parametrize("num_classes", [1, 31, 32, 33, 64, 65])
@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (lambda c: logits((c,)), True),
        (lambda c: logits((5, c)), True),
        (lambda c: as_class_slice(logits((5, c))), True),
        (lambda c: logits((c,)).expand(5, c), True),
        (lambda c: as_transposed(logits((5, c))), False),
        (lambda c: logits((2, c, 3)), False),
        (lambda c: as_channels_last(logits((2, c, 3))), True),
        (lambda c: logits((3, c, 2, 4)), False),
        (lambda c: as_class_slice(logits((3, c, 2, 4))), False),
        (lambda c: as_channels_last(logits((3, c, 2, 4))), True),
    ],
)
def test_the_ops_make_the_same_without_values(num_classes, make, rows):
    """Outputs of the same shapes, strides and dtypes, of fake tensors."""
    x = make(num_classes)
    t, weight = targets(x.shape), eighths(num_classes)
    for dtype, reduction in zip(DTYPES, range(4), strict=True):
        given = (x.to(dtype), t, weight.to(ARITHMETIC[dtype]), 0.0, None, -100, reduction, rows)
        loss, mask, denominator = _forward(*given)
        constants = (-100, num_classes, _DTYPE_CODES[dtype], reduction, rows)
        gradient = _backward(loss, mask, t, None, denominator, *constants)
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in given]
            of_fake = _forward(*fake)
            of_fake += (_backward(of_fake[0], of_fake[1], fake[1], None, of_fake[2], *constants),)
        for a, b in zip((loss, mask, denominator, gradient), of_fake, strict=True):
            assert (b.shape, b.stride(), b.dtype, b.device) == (a.shape, a.stride(), a.dtype, a.device)


@pytest.mark.parametrize("elsewhere", ["target", "margins", "weight"])
def test_without_values_too_there_is_one_device(elsewhere):
    options = {"target": targets((4, 5)), "margins": eighths(5), "weight": eighths(5)}
    call = {name: value if name == elsewhere else value.to("meta") for name, value in options.items()}
    call |= {"margin": 0.0, "ignore_index": -100, "reduction": 1, "rows": True}
    with pytest.raises(RuntimeError, match=r"^hem_ext: every tensor must be on the device of the logits$"):
        _forward(logits((4, 5)).to("meta"), **call)


def test_a_dispatch_mode_sees_both_ops(device):
    x, t = logits((4, 5)).requires_grad_(), targets((4, 5))
    with Calls() as calls:
        hem_loss(x, t).backward()
    assert calls.names == ["hem_ext::hem_forward", "hem_ext::hem_backward"]


@pytest.mark.parametrize(
    "call",
    [
        hem_loss,
        lambda x, t, **options: HEMLoss(**options)(x, t),
        lambda x, t, **options: HEMLoss(stats=True, **options)(x, t),
        lambda x, t, **options: torch.func.grad(lambda x: hem_loss(x, t, **options))(x),
    ],
)
def test_the_backend_is_the_one_that_was_asked_for(device, call):
    x, t = logits((4, 5)), targets((4, 5))
    for backend in ("auto", "native", "reference"):
        with Calls() as calls:
            call(x, t, backend=backend)
        assert ("hem_ext::hem_forward" in calls.names) == (backend != "reference")
    words = r"^hem_loss\(backend='native'\): hem_ext was built without kernels for 'meta' tensors$"
    with pytest.raises(RuntimeError, match=words):
        call(x.to("meta"), t.to("meta"), backend="native")


def test_a_profiler_sees_both_ops(device):
    x, t = logits((4, 5)).requires_grad_(), targets((4, 5))
    with torch.profiler.profile() as profile:
        hem_loss(x, t).backward()
    assert {"hem_ext::hem_forward", "hem_ext::hem_backward"} <= {event.name for event in profile.events()}


def test_traced_graphs_hold_the_op(device):
    x, t = logits((4, 5)), targets((4, 5))
    traced = torch.jit.trace(lambda x, t: hem_loss(x, t), (x, t), check_trace=False)
    assert traced(2 * x, t) == hem_loss(2 * x, t)
    (function,) = (node for node in traced.graph.nodes() if node.kind() == "prim::PythonOp")
    assert "hem_ext::hem_forward" in str(function.g("Subgraph"))
    graph = make_fx(lambda x, t: hem_loss(x, t))(x, t)
    assert graph(2 * x, t) == hem_loss(2 * x, t)


def test_vectorized_gradients(device):
    x, t = logits((4, 5)).requires_grad_(), targets((4, 5))
    losses = hem_loss(x, t, margin=5.0, reduction="none")

    def gradient(grad_losses, **options):
        return torch.autograd.grad(losses, x, grad_losses, retain_graph=True, **options)[0]

    expected = torch.stack([gradient(row) for row in torch.eye(4)])
    assert torch.equal(gradient(torch.eye(4), is_grads_batched=True), expected)
    assert torch.equal(torch.vmap(gradient)(torch.eye(4)), expected)


def test_tensors_that_are_not_what_they_hold(device):
    x, t = logits((4, 5)), targets((4, 5))
    assert hem_loss(torch._neg_view(x), t) == hem_loss(-x, t)
    x.requires_grad_()
    for grad in (torch._neg_view(torch.tensor(2.0)), torch._efficientzerotensor(())):
        loss = hem_loss(x, t)
        (expected,) = torch.autograd.grad(loss, x, torch.tensor(grad.item()), retain_graph=True)
        assert torch.equal(torch.autograd.grad(loss, x, grad)[0], expected)


def test_logits_that_are_shared_until_written_stay_so(device):
    x, t = logits((4, 5)), targets((4, 5))
    shared = torch._lazy_clone(x)
    hem_loss(shared, t)
    assert torch._C._is_cow_tensor(shared)


@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 3, 4)])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(device, backend, shape, use_reentrant):
    x, t = logits(shape).requires_grad_(), targets(shape)

    def loss(x):
        return hem_loss(x.sin(), t, backend=backend)

    (expected,) = torch.autograd.grad(loss(x), x)
    checkpoint(loss, x, use_reentrant=use_reentrant).backward()
    assert torch.equal(x.grad, expected)


def test_what_a_hook_raises_is_passed_on(device):
    calls = []

    def refuse(tensor):
        calls.append(tensor)
        raise MemoryError("no room")

    x, t = logits((4, 5)).requires_grad_(), targets((4, 5))
    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda x: x), pytest.raises(MemoryError, match="no room"):
        hem_loss(x, t)
    assert len(calls) == 1


def test_hooks_on_what_is_saved(device):
    x, t = logits((4, 5)).requires_grad_(), targets((4, 5))
    (expected,) = torch.autograd.grad(hem_loss(x, t), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.tolist(), torch.tensor):
        loss = hem_loss(x, t)
    with pytest.raises(RuntimeError, match="the mask must be contiguous int32"):
        loss.backward()  # what came back is int64
    with torch.autograd.graph.save_on_cpu():
        loss = hem_loss(x, t)
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.parametrize("layout", [as_contiguous, as_channels_last, as_transposed, as_every_other])
@pytest.mark.parametrize("shape", [(6, 7), (2, 5, 3, 4)])
def test_compile_without_graph_breaks(device, backend, layout, shape):
    torch._dynamo.reset()
    count = num_classes(shape)
    criterion = HEMLoss(margin=eighths(count), weight=eighths(count), backend=backend)
    values, t = logits(shape), targets(shape, ignore_index=-100)
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True)):
        x = layout(values.clone()).requires_grad_()
        loss = wrap(lambda x, t: criterion(2 * x, t))(x, t)
        loss.backward()
        results.append((loss.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0])


def test_compile_with_dynamic_shapes(device, backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, t: hem_loss(x, t, backend=backend), fullgraph=True, dynamic=True)
    for shape in [(4, 7), (9, 7), (2, 5, 4, 6), (3, 5, 6, 2)]:
        x, t = logits(shape).requires_grad_(), targets(shape)
        loss = compiled(x, t)
        loss.backward()
        expected, gradient = oracle.hem(x, t)
        assert_loss(loss.detach(), expected)
        assert_gradient(x.grad, gradient)


def test_a_compiled_call_still_checks_its_targets():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, t: hem_loss(x, t), fullgraph=True)
    with pytest.raises(IndexError, match=r"target\[1\] is 5"):
        compiled(logits((2, 5)), torch.tensor([0, 5]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_reads_half_logits_as_they_are(device, backend, dtype):
    model = nn.Linear(3, 5)
    x, t = torch.randn(6, 3), targets((6, 5))
    with torch.autocast(device, dtype=dtype):
        y = model(x)
        y.retain_grad()
        loss = hem_loss(y, t, backend=backend)
    loss.backward()
    assert y.dtype == dtype
    assert loss.dtype == torch.float32
    assert y.grad.dtype == dtype
    assert model.weight.grad.dtype == torch.float32
    expected, gradient = oracle.hem(y, t)
    assert_loss(loss.detach(), expected)
    assert_gradient(y.grad, gradient)


# --- the module -----------------------------------------------------------------------------------------------


def test_module_defaults_are_those_of_the_function():
    x, t = logits((6, 5)), targets((6, 5), ignore_index=-100)
    assert HEMLoss()(x, t) == hem_loss(x, t)
    assert list(HEMLoss().state_dict()) == []
    assert repr(HEMLoss()) == "HEMLoss(margin=0.2, ignore_index=-100, reduction='mean')"
    assert HEMLoss().label_smoothing == 0
    assert HEMLoss(stats=True).stats is None  # before the first call


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weight": torch.tensor([1.0, -1.0])}, "weight must be finite and not negative, but weight[1] is -1"),
        (
            {"process_group": "WORLD"},
            "process_group must be a torch.distributed.ProcessGroup or None, got str",
        ),
        (
            {"normalizer": 3, "reduction": "sum"},
            "normalizer is what 'mean' and 'batchmean' divide by, got it with reduction 'sum'",
        ),
        ({"stats": 1}, "stats must be True or False, got 1"),
        (
            {"stats": True, "overwrite_input": True},
            "stats=True and overwrite_input=True are not for one call: each takes a way of its own",
        ),
        ({"overwrite_input": "yes"}, "overwrite_input must be True or False, got 'yes'"),
    ],
)
def test_what_no_module_can_be_built_of(options, sentence):
    with pytest.raises((TypeError, ValueError)) as told:
        HEMLoss(**options)
    assert str(told.value) == sentence


def test_module_passes_every_option_on():
    x, t = logits((6, 5)), targets((6, 5), ignore_index=2)
    options = {"margin": eighths(5), "weight": eighths(5), "ignore_index": 2, "reduction": "none"}
    module = HEMLoss(**options, backend="reference")
    assert torch.equal(module(x, t), hem_loss(x, t, **options))
    assert repr(module) == "HEMLoss(margin=(5 classes), ignore_index=2, reduction='none', backend='reference')"


def test_class_tensors_are_buffers():
    module = HEMLoss(margin=[0.5, 1, 2], weight=torch.tensor([1.0, 2.0, 3.0]))
    assert set(module.state_dict()) == {"margin", "weight"}
    assert module.margin.dtype == torch.float32
    assert HEMLoss(margin=torch.ones(3, dtype=torch.float64)).margin.dtype == torch.float64
    assert module.to(torch.float64).margin.dtype == torch.float64
    assert module.to("meta").margin.device.type == "meta"
    buffer = io.BytesIO()
    torch.save(HEMLoss(margin=[0.5, 1, 2]).state_dict(), buffer)
    buffer.seek(0)
    other = HEMLoss(margin=[0.0, 0, 0])
    other.load_state_dict(torch.load(buffer))
    assert other.margin.tolist() == [0.5, 1, 2]
    assert copy.deepcopy(module).margin is not module.margin


def test_a_state_that_does_not_fit():
    number, classes = HEMLoss(), HEMLoss(margin=[0.5, 1, 2])
    number.load_state_dict({})
    with pytest.raises(RuntimeError, match=r'Unexpected key.* "margin"'):
        number.load_state_dict(classes.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.* "margin"'):
        classes.load_state_dict({})
    with pytest.raises(RuntimeError, match="size mismatch for margin"):
        classes.load_state_dict(HEMLoss(margin=[0.5, 1]).state_dict())
    assert classes.margin.tolist() == [0.5, 1, 2]


def test_copies_share_a_process_group():
    group = torch.distributed.ProcessGroup(0, 2)
    module = HEMLoss(margin=[0.5, 1], process_group=group, backend="native")
    module.holders = [module]  # as a hook of its own would
    copied = copy.deepcopy(module)
    assert copied.process_group is group
    assert copied.holders[0] is copied
    assert copied.stats is None
    assert copied.margin is not module.margin
    options = "margin=(2 classes), ignore_index=-100, reduction='mean', process_group=(2 processes), backend='native'"
    assert repr(copied) == repr(module) == f"HEMLoss({options})"


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
@pytest.mark.parametrize("ignored", [slice(5, 7), slice(7)])
def test_shares_add_up_to_the_batch(monkeypatch, reduction, backend, ignored):
    """As three processes have it, one or all with nothing to count; what they exchange is tested in real ones."""
    x, t, parts = logits((7, 5)).requires_grad_(), targets((7, 5)), (slice(4), slice(4, 5), slice(5, 7))
    t[ignored] = -100
    group = torch.distributed.ProcessGroup(0, 3)
    for options in ({"margin": 0.5}, {"margin": eighths(5), "weight": eighths(5)}):
        options |= {"reduction": reduction, "backend": backend}
        criterion = HEMLoss(**options, process_group=group)
        for call in (criterion, lambda x, t, options=options: hem_loss(x, t, **options, process_group=group)):
            calls = [functools.partial(call, x[part], t[part]) for part in parts]
            found = sum(as_processes(monkeypatch, calls)) / 3
            expected = hem_loss(x, t, **options)
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (found, expected)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_tensors_that_are_sharded(mesh, reduction):
    """What several processes make of them is tested in real ones."""
    x, t = logits((6, 5)), targets((6, 5), ignore_index=2)
    options = {"weight": eighths(5), "margin": eighths(5), "ignore_index": 2, "reduction": reduction}
    y, labels = (distribute_tensor(v, mesh, [Shard(0)]) for v in (x, t))
    losses = hem_loss(y.requires_grad_(), labels, **options).full_tensor()
    expected = hem_loss(x.requires_grad_(), t, **options)
    torch.testing.assert_close(losses, expected)
    (gradient,) = torch.autograd.grad(losses.sum(), y)
    torch.testing.assert_close(gradient.full_tensor(), torch.autograd.grad(expected.sum(), x)[0])


def test_what_a_tensor_that_is_sharded_cannot_be(mesh, monkeypatch):
    x, t = logits((4, 6)), targets((4, 6))
    y, labels = (distribute_tensor(v, mesh, [Shard(0)]) for v in (x, t))
    group = torch.distributed.group.WORLD
    other = DeviceMesh("cpu", torch.tensor([[0]]))
    elsewhere = distribute_tensor(t, other, [Shard(0), Shard(0)])
    parts = DTensor.from_local(x, mesh, [Partial()])
    for error, words, given, of_given, options in (
        (TypeError, "target must be a DTensor where input is one, got Tensor", y, t, {}),
        (ValueError, f"input and target must be on one device mesh, got {mesh} and {other}", y, elsewhere, {}),
        (ValueError, f"input must be a DTensor that is sharded or replicated, got {Partial()}", parts, labels, {}),
        (ValueError, "input is a DTensor that is sharded over its classes; over samples or pixels they can be",
         distribute_tensor(x, mesh, [Shard(1)]), labels, {}),
        (ValueError, "process_group is not for a DTensor, which knows its device mesh", y, labels,
         {"process_group": group}),
        (ValueError, "overwrite_input=True is not for a DTensor, whose memory is not its own", y, labels,
         {"overwrite_input": True}),
        (ValueError, "normalizer must be finite and not negative, got -1", y, labels, {"normalizer": -1.0}),
    ):  # fmt: skip
        with pytest.raises(error, match=f"^{re.escape(words)}$"):
            hem_loss(given, of_given, **options)
    with pytest.raises(ValueError, match="normalizer"):
        hem_loss(y, labels, reduction="sum", normalizer=2.0)
    monkeypatch.setattr(_native, "devices", frozenset())
    with pytest.raises(RuntimeError, match=r"^hem_loss\(backend='native'\): "):
        hem_loss(y, labels, backend="native")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_backend_of_a_tensor_that_is_sharded(mesh, monkeypatch, backend):
    taken = []

    def see(logits, target, args, native):
        taken.append(native)
        return loss_and_stats(logits, target, args, native)

    monkeypatch.setattr(sharded, "loss_and_stats", see)
    hem_loss(*(distribute_tensor(v, mesh, [Shard(0)]) for v in (logits((4, 6)), targets((4, 6)))), backend=backend)
    assert taken == [backend == "native"]


def test_module_from_class_counts():
    module = HEMLoss.from_class_counts([5000, 50], ignore_index=255, reduction="sum")
    assert module.margin.tolist() == pytest.approx([0.2 * 5**0.5, 2 * 5**0.5])
    assert (module.ignore_index, module.reduction) == (255, "sum")
    assert HEMLoss.from_class_counts([1, 1], total=8.0).margin.tolist() == [2.0, 2.0]


def test_a_module_trains_a_network(device, backend):
    # Two well separated clouds: after a few steps every sample is finished.
    x = torch.cat([torch.randn(50, 2) + 4, torch.randn(50, 2) - 4])
    t = torch.arange(2).repeat_interleave(50)
    model, criterion = nn.Linear(2, 2), HEMLoss(margin=1.0, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        loss = criterion(model(x), t)
        loss.backward()
        optimizer.step()
    assert loss == 0
    assert (model(x).argmax(1) == t).all()


# --- what users of other losses give --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int16, torch.uint16, torch.uint8, torch.int32])
@pytest.mark.parametrize("shape", [(7,), (6, 5), (2, 5, 4, 3), (2, 1, 4, 3), (6, 1)])
def test_masks_with_a_channel_and_every_integer(device, backend, shape, dtype):
    x = logits(shape).requires_grad_()
    t = torch.randint(0, min(num_classes(shape), 2), target_shape(shape))
    expected = hem_loss(x, t, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    for given in (t.to(dtype), t.to(dtype).unsqueeze(1)) if len(shape) > 1 else (t.to(dtype),):
        losses = hem_loss(x, given, reduction="none", backend="auto" if backend == "native" else backend)
        assert torch.equal(losses, expected)
        assert torch.equal(torch.autograd.grad(losses.sum(), x)[0], gradient)


def test_the_ignore_index_of_converted_targets(device, backend):
    x, t = logits((6, 5)), torch.tensor([0, 1, 255, 3, 4, 255])
    expected = hem_loss(x, t, ignore_index=255)
    assert hem_loss(x, t.to(torch.uint16), ignore_index=255, backend=backend) == expected
    assert hem_loss(x, t.to(torch.int16), ignore_index=255, backend=backend) == expected
    t = t.where(t < 5, -100)
    assert hem_loss(x, t.to(torch.int8), backend=backend) == expected


def test_what_is_counted_of_masks(device, backend):
    x, t = logits((2, 2, 4, 3)), torch.randint(0, 2, (2, 4, 3))
    criterion, converted = (HEMLoss(backend=backend, stats=True) for _ in range(2))
    assert criterion(x, t.to(torch.int8).unsqueeze(1)) == converted(x, t)
    assert criterion.stats == converted.stats


def test_a_margin_without_dimensions(device, backend):
    x, t = logits((6, 5)), targets((6, 5))
    expected = hem_loss(x, t, margin=0.5)
    assert hem_loss(x, t, margin=torch.tensor(0.5), backend=backend) == expected
    module = HEMLoss(margin=torch.tensor(0.5), backend=backend)
    assert module(x, t) == expected
    assert "margin=0.5," in repr(module)
    # One for all, and one for each, take each other's place.
    classes = HEMLoss(margin=[0.25] * 5)
    classes.load_state_dict(module.state_dict())
    assert classes(x, t) == expected
    module.load_state_dict(HEMLoss(margin=[0.25] * 5).state_dict())
    assert module(x, t) == hem_loss(x, t, margin=0.25)


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
@pytest.mark.parametrize("form", [float, torch.tensor, lambda n: torch.tensor(n, dtype=torch.int64)])
def test_a_normalizer_makes_parts_of_a_batch_add_up(device, backend, reduction, form):
    x, t = logits((12, 5)).requires_grad_(), targets((12, 5), ignore_index=-100)
    weight = torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0])
    whole = hem_loss(x, t, weight, reduction=reduction, backend=backend)
    (expected,) = torch.autograd.grad(whole, x)
    losses = hem_loss(x, t, reduction="none")
    counted = losses > 0 if reduction == "mean" else t != -100
    normalizer = form(weight[t.clamp(min=0)][counted].sum().item())
    module = HEMLoss(weight, reduction=reduction, backend=backend)
    parts = [module(x[i : i + 4], t[i : i + 4], normalizer=normalizer) for i in (0, 4, 8)]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), x)[0], expected)
    for stats in (False, True):
        options = {"reduction": reduction, "backend": backend, "stats": stats}
        fixed, other = (HEMLoss(weight, **options, normalizer=number) for number in (normalizer, normalizer + 1))
        torch.testing.assert_close(fixed(x[:4], t[:4]), parts[0])
        torch.testing.assert_close(other(x[:4], t[:4], normalizer=normalizer), parts[0])


def test_a_call_without_weights_has_its_normalizer(device):
    x, t = logits((6, 5)), targets((6, 5))
    for normalizer in (2, 2.5, torch.tensor(2.5)):
        assert hem_loss(x, t, normalizer=normalizer) == hem_loss(x, t, reduction="sum") / normalizer


@pytest.mark.parametrize("smoothing", [0.1, 1, None])
def test_nothing_is_smoothed(smoothing):
    words = rf"^label_smoothing must be 0, for HEM has nothing to smooth, got {smoothing}$"
    for call in (lambda **options: hem_loss(logits((6, 5)), targets((6, 5)), **options), HEMLoss):
        with pytest.raises(ValueError, match=words):
            call(label_smoothing=smoothing)


def test_a_normalizer_of_nothing(device, backend):
    x, t = torch.zeros(3, 4, requires_grad=True), torch.full((3,), -100)
    for normalizer in (0, torch.zeros(()), 1e-46, torch.tensor(1e-46, dtype=torch.float64)):  # 0 in float32
        loss = hem_loss(x, t, normalizer=normalizer, backend=backend)
        assert loss == 0
        assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros(3, 4))
        # Given with samples that are counted it divides by nothing, as a number and as a tensor.
        active = hem_loss(x, torch.zeros(3).long(), normalizer=normalizer, backend=backend)
        assert active == hem_loss(x, torch.zeros(3).long(), reduction="sum", backend=backend) > 0


def test_margins_of_a_list_are_float64(device, backend):
    x, t = torch.randn(6, 5, dtype=torch.float64), targets((6, 5))
    for margins in ([0.1] * 5, (0.1,) * 5):
        assert hem_loss(x, t, margin=margins, backend=backend) == hem_loss(x, t, margin=0.1, backend=backend)


def test_a_normalizer_in_a_compiled_graph(device):
    """A number and a tensor, without a break."""
    torch._dynamo.reset()
    compiled = torch.compile(hem_loss, backend="eager", fullgraph=True)
    x, t = torch.randn(6, 5), targets((6, 5))
    for normalizer in (4.0, 3, 0, 1e-46, torch.tensor(2.5)):
        torch.testing.assert_close(compiled(x, t, normalizer=normalizer), hem_loss(x, t, normalizer=normalizer))


def test_the_largest_normalizer(device, backend):
    x, t = torch.full((3, 4), 1e4, dtype=torch.float64), torch.zeros(3).long()
    x[:, 0] = 0.0
    for dtype in (torch.float32, torch.float64):
        largest = torch.finfo(dtype).max
        for normalizer in (largest, torch.tensor(largest, dtype=dtype)):
            loss = hem_loss(x.to(dtype), t, normalizer=normalizer, backend=backend)
            assert loss == hem_loss(x.to(dtype), t, reduction="sum", backend=backend) / largest


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_that_is_written_past_the_caches(kernels, dtype):
    """One of 16 MiB or more, in pixels; an image of it alone is smaller, and written through them."""
    side = {8: 208, 4: 288, 2: 400}[dtype.itemsize]
    x, t = torch.randn(2, 33, side, side).to(dtype), targets((2, 33, side, side), torch.uint8, ignore_index=255)
    x[:, :, 64:128] = 0.0
    x[:, 5, 64:128] = 9.0
    t[:, 64:128] = 5  # finished
    x[1, 7, -1, -1], t[1, -1, -1] = torch.nan, 0

    def gradient(x, t):
        x = x.clone().requires_grad_()
        hem_loss(x, t, ignore_index=255, reduction="sum").backward()
        return x.grad

    whole = gradient(x, t)
    assert whole.nbytes >= 16 << 20
    each = torch.cat([gradient(x[i : i + 1], t[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(whole, each, rtol=0, atol=0, equal_nan=True)
    assert whole[1, :, -1, -1].isnan().all()
    assert not whole[:, :, 64:128].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "share"), [(80, 0.9), (80, 0.3), (1200, 0.9), (40000, 0.9), (40000, 0.3)])
def test_rows_that_are_written_past_the_caches(kernels, dtype, size, share):
    """Long rows, and many short ones that follow each other, of a gradient of 16 MiB or more: over what lies there."""
    classes = size // dtype.itemsize + 1
    rows = (16 << 20) // (classes * dtype.itemsize) + 5
    x, t = torch.randn(rows, classes).to(dtype), targets((rows, classes), ignore_index=-100)
    finished = torch.rand(rows) < share
    finished[100:200] = True
    x[finished, 3], t[finished] = 99.0, 3

    def gradient(x, t):
        leaf = x.clone().requires_grad_()
        hem_loss(leaf + 0, t, reduction="sum", overwrite_input=True).backward()
        return leaf.grad

    whole = gradient(x, t)
    assert whole.nbytes >= 16 << 20
    assert torch.equal(whole, torch.cat([gradient(*part) for part in zip(x.chunk(3), t.chunk(3), strict=True)]))
    assert not whole[finished].any()
    assert whole[~finished].any()


def test_a_large_gradient_that_is_not_aligned(kernels):
    """Its rows of pixels begin where nothing can be written past the caches."""
    x, t = torch.randn(1, 17, 500, 501), targets((1, 17, 500, 501))
    found = []
    for layout in (as_contiguous, as_channels_last):
        y = layout(x).detach().requires_grad_()
        found += torch.autograd.grad(hem_loss(y, t, reduction="sum"), y)
    assert found[0].nbytes >= 16 << 20
    assert torch.equal(*found)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_reference_by_itself_is_the_backend(reduction):
    x, t = logits((2, 5, 3, 4)), targets((2, 5, 3, 4), ignore_index=2)
    options = {"weight": eighths(5), "margin": eighths(5), "ignore_index": 2, "reduction": reduction}
    expected = hem_loss(x, t, backend="reference", **options)
    for labels in (t, t[:, None], t.to(torch.uint8)):
        assert torch.equal(reference.hem_loss(x, labels, **options), expected)
    with pytest.raises(ValueError, match=r"^overwrite_input is for the native kernels"):
        reference.hem_loss(x, t, overwrite_input=True, **options)
