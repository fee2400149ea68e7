"""upsampled_hem_loss against the two steps that it replaces, and against the oracle."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, GRADIENT_TOLERANCE, LOSS_TOLERANCE, REDUCTIONS, Calls, as_processes, eighths, logits, targets
from measure import allocated_at_once
from processes import Functions, Worlds
from torch.distributed.tensor import Shard, distribute_tensor
from torch.library import opcheck

from hem_ext import HEMLoss, UpsampledHEMLoss, _native, hem_loss, reference, upsample, upsampled_hem_loss
from hem_ext.arguments import DTYPE_CODES

# Logits and targets: enlarged by whole and other ratios, one way alone, not at all, and made smaller; more columns than
# a block, more rows than a band of backward.
SIZES = [
    ((3, 5), (12, 20)),
    ((4, 3), (7, 11)),
    ((3, 3), (3, 17)),
    ((5, 6), (5, 6)),
    ((9, 40), (4, 7)),
    ((1, 1), (5, 9)),
    ((6, 7), (1, 1)),
    ((2, 40), (3, 150)),
    ((33, 2), (40, 3)),
]


def two_steps(input, target, *, align_corners=False, loss=hem_loss, **options):
    full = F.interpolate(input, size=target.shape[1:], mode="bilinear", align_corners=align_corners)
    return loss(full, target, **options)


def outcome(call, x, grad_loss=None):
    """The loss, and the gradient of the logits."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = call(x)
    loss.backward(torch.ones_like(loss) if grad_loss is None else grad_loss.to(loss.dtype))
    return loss.detach(), x.grad


def assert_same(found, expected, dtype=torch.float64):
    """Loss and gradient, as far as they can be the same: sums are in another order."""
    (loss, gradient), (expected_loss, expected_gradient) = found, expected
    rtol = LOSS_TOLERANCE[loss.dtype]["rtol"] * 20
    torch.testing.assert_close(loss.double(), expected_loss.double(), rtol=rtol, atol=rtol)
    rtol = max(GRADIENT_TOLERANCE[dtype]["rtol"] * 2, rtol)
    atol = rtol * expected_gradient.abs().nan_to_num().amax(dim=(0, 2, 3), keepdim=True).amax().item()
    torch.testing.assert_close(gradient.double(), expected_gradient.double(), rtol=rtol, atol=atol)


# --- what it computes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_classes", "align_corners", "reduction"), [
    (1, False, "mean"), (2, True, "none"), (16, False, "sum"), (17, True, "batchmean"), (32, False, "none"),
    (33, True, "mean"), (70, False, "batchmean"),
])  # fmt: skip
def test_matches_the_oracle(kernels, dtype, num_classes, align_corners, reduction):
    """Logits are multiples of 1/8, and these ratios move them to multiples of 1/512: nothing is rounded."""
    shape, size = ((2, num_classes, 4, 9), (13, 65)) if align_corners else ((2, num_classes, 3, 10), (12, 80))
    x, t = logits(shape, dtype), targets((*shape[:2], *size), ignore_index=-100)
    options = {"reduction": reduction, "margin": eighths(num_classes), "weight": eighths(num_classes)}
    grad_loss = torch.randn(t.shape) if reduction == "none" else torch.tensor(1.5)
    found = outcome(lambda x: upsampled_hem_loss(x, t, align_corners=align_corners, **options), x, grad_loss)

    wide = x.double().cpu().requires_grad_()
    full = F.interpolate(wide, size=size, mode="bilinear", align_corners=align_corners)
    loss, gradient = oracle.hem(full.detach(), t, grad_loss=grad_loss, **options)
    full.backward(gradient)
    assert_same([v.cpu() for v in found], (loss, wide.grad), dtype)


@pytest.mark.parametrize(("size", "out"), SIZES)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("num_classes", [2, 21, 40])
def test_any_ratio(kernels, size, out, align_corners, num_classes):
    x = torch.randn(3, num_classes, *size, dtype=torch.float64)
    t = targets((3, num_classes, *out), ignore_index=-100)
    options = {"align_corners": align_corners, "margin": 0.7}
    found = outcome(lambda x: upsampled_hem_loss(x, t, **options), x)
    assert_same(found, outcome(lambda x: two_steps(x, t, **options), x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_at_the_same_size_it_is_hem_loss(kernels, dtype):
    x, t = torch.randn(2, 21, 6, 30).to(dtype), targets((2, 21, 6, 30))
    found = outcome(lambda x: upsampled_hem_loss(x, t, reduction="none"), x)
    for a, b in zip(found, outcome(lambda x: hem_loss(x, t, reduction="none"), x), strict=True):
        assert torch.equal(a, b)
    options = {"weight": eighths(21), "margin": eighths(21), "ignore_index": 3, "reduction": "batchmean"}
    assert torch.equal(upsampled_hem_loss(x, t, **options), hem_loss(x, t, **options))


def test_where_it_lies_is_where_torch_has_it():
    """Of a ramp interpolation gives back the place, to the last bit where torch's is exact to it."""
    for (size, out), align_corners in itertools.product([(65, 257), (100, 333), (512, 2047), (9, 4)], [False, True]):
        ramp = torch.zeros(1, 2, 1, size)
        ramp[0, 0, 0] = torch.arange(size)
        t = torch.ones(1, 1, out, dtype=torch.long)
        # One rival, whose error is its logit: the loss is what the ramp is there.
        options = {"margin": 0.0, "reduction": "none", "align_corners": align_corners}
        assert torch.equal(upsampled_hem_loss(ramp, t, **options), two_steps(ramp, t, **options))


def test_every_instruction_set_and_number_of_threads_gives_the_same_bits():
    before, threads = _native.library.cpu_isa(), torch.get_num_threads()
    try:
        for dtype, (size, out) in itertools.product(
            [torch.float32, torch.bfloat16], [((33, 40), (130, 161)), SIZES[4]]
        ):
            x, t = torch.randn(2, 37, *size).to(dtype), targets((2, 37, *out), ignore_index=-100)
            found = []
            for isa, count in itertools.product(_native.library.available_cpu_isas(), (1, 2, 3)):
                _native.library.select_cpu_isa(isa)
                torch.set_num_threads(count)
                found += [outcome(lambda x, t=t: upsampled_hem_loss(x, t), x)]
            for loss, gradient in found[1:]:
                assert torch.equal(loss, found[0][0])
                assert torch.equal(gradient, found[0][1])
    finally:
        _native.library.select_cpu_isa(before)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("size", "out", "align_corners"), [
    ((4, 5), (9, 14), False), ((4, 5), (10, 13), True), ((6, 7), (3, 3), False),
])  # fmt: skip
def test_what_a_broken_logit_reaches(kernels, value, size, out, align_corners):
    options = {"reduction": "none", "align_corners": align_corners}
    for c, i, k in itertools.product((0, 2), (0, 2, size[0] - 1), (0, 3, size[1] - 1)):
        x, t = torch.randn(1, 3, *size, dtype=torch.float64), torch.zeros(1, *out, dtype=torch.long)
        x[0, c, i, k] = value
        t[0, 0, 0] = -100
        loss, gradient = outcome(lambda x, t=t: upsampled_hem_loss(x, t, **options), x)
        expected = outcome(lambda x, t=t: two_steps(x, t, **options), x)
        torch.testing.assert_close(loss, expected[0], equal_nan=True)
        torch.testing.assert_close(gradient, expected[1], equal_nan=True)


def test_finished_pixels_have_no_loss_and_no_gradient(kernels):
    x = torch.full((2, 21, 5, 9), -3.0)
    x[:, 4] = 3.0
    t = torch.full((2, 20, 36), 4)
    loss, gradient = outcome(lambda x: upsampled_hem_loss(x, t), x)
    assert loss == 0
    assert not gradient.any()
    t[0, 7, 11] = 5  # and one that is not
    loss, gradient = outcome(lambda x: upsampled_hem_loss(x, t), x)
    assert_same((loss, gradient), outcome(lambda x: two_steps(x, t), x), torch.float32)
    assert gradient[0, :, 1:3, 2:4].any()
    assert not gradient[1].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_images_and_no_counted_pixels(device, backend, reduction):
    x, t = torch.randn(0, 3, 2, 2), torch.zeros(0, 4, 4, dtype=torch.long)
    loss, gradient = outcome(lambda x: upsampled_hem_loss(x, t, reduction=reduction, backend=backend), x)
    assert loss.shape == (t.shape if reduction == "none" else ())
    assert gradient.shape == x.shape
    assert not loss.sum()
    x, t = torch.randn(2, 3, 2, 2), torch.full((2, 4, 4), 255, dtype=torch.uint8)
    options = {"reduction": reduction, "backend": backend, "ignore_index": 255}
    loss, gradient = outcome(lambda x: upsampled_hem_loss(x, t, **options), x)
    assert not loss.sum()
    assert not gradient.any()


# --- what it is given ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int16, torch.bool])
def test_targets_of_other_dtypes_and_shapes(device, dtype):
    x, t = torch.randn(2, 2, 3, 4), targets((2, 2, 6, 9))
    expected = outcome(lambda x: upsampled_hem_loss(x, t), x)
    for other in (t.to(dtype), t.to(dtype).unsqueeze(1), t.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)):
        for a, b in zip(outcome(lambda x, t=other: upsampled_hem_loss(x, t), x), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("num_classes", [21, 40])
def test_memory_formats(device, num_classes):
    x, t = torch.randn(2, num_classes, 6, 7), targets((2, num_classes, 12, 21))
    loss, gradient = outcome(lambda x: upsampled_hem_loss(x, t), x)
    last = x.to(memory_format=torch.channels_last)
    wider = torch.randn(2, num_classes + 3, 6, 9)
    wider[:, 2:-1, :, 1:-1] = x
    for other in (last, wider[:, 2:-1, :, 1:-1]):
        leaf = other.detach().requires_grad_()
        found = upsampled_hem_loss(leaf, t)
        found.backward()
        assert torch.equal(found, loss)
        assert torch.equal(leaf.grad, gradient)


def test_the_gradient_lies_as_the_logits_do(device):
    x, t = torch.randn(2, 5, 6, 8, requires_grad=True), targets((2, 5, 12, 21))
    last = x.to(memory_format=torch.channels_last)
    for y, format in [
        (x, torch.contiguous_format),
        (last, torch.channels_last),
        (x[..., ::2], torch.contiguous_format),
    ]:
        (gradient,) = torch.autograd.grad(upsampled_hem_loss(y, t), y)
        assert gradient.stride() == torch.empty_like(y, memory_format=format).stride()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_options_mean_what_they_mean_to_hem_loss(device, backend, reduction, align_corners):
    x, t = torch.randn(2, 5, 3, 4, dtype=torch.float64), targets((2, 5, 7, 9), ignore_index=3)
    options = {"margin": [0.1, 0.2, 0.3, 0.4, 0.5], "weight": eighths(5).double(), "ignore_index": 3}
    options |= {"reduction": reduction, "align_corners": align_corners}
    if reduction == "mean":
        options["normalizer"] = 7.5
    found = outcome(lambda x: upsampled_hem_loss(x, t, backend=backend, **options), x)
    assert_same(found, outcome(lambda x: two_steps(x, t, loss=reference.hem_loss, **options), x))


def test_half_precision_is_interpolated_in_full(device, backend):
    x, t = torch.randn(2, 5, 3, 4).half(), targets((2, 5, 7, 9))
    options = {"reduction": "none", "backend": backend}
    loss, gradient = outcome(lambda x: upsampled_hem_loss(x, t, **options), x)
    assert gradient.dtype == torch.float16
    with torch.autocast(x.device.type, torch.bfloat16):
        assert torch.equal(outcome(lambda x: upsampled_hem_loss(x, t, **options), x)[0], loss)
    assert_same((loss, gradient), outcome(lambda x: two_steps(x.float(), t, reduction="none"), x), torch.float16)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"input": torch.zeros(3, 4, 4)}, ValueError, r"input of shape \(N, C, h, w\).*\(3, 4, 4\)"),
        ({"target": torch.zeros(2, 8, dtype=torch.long)}, ValueError, r"target of shape \(N, H, W\).*\(2, 8\)"),
        ({"target": torch.zeros(3, 8, 8, dtype=torch.long)}, ValueError, r"got input of shape \(2, 5,.*\(3,"),
        ({"input": torch.zeros(2, 5, 0, 4)}, ValueError, r"no pixels.*\(2, 5, 0, 4\)"),
        ({"target": torch.zeros(2, 8, 0, dtype=torch.long)}, ValueError, r"no pixels.*\(2, 8, 0\)"),
        ({"target": torch.zeros(2, 0, 8, dtype=torch.long)}, ValueError, r"no pixels.*\(2, 0, 8\)"),
        ({"input": torch.zeros(2, 0, 4, 4)}, ValueError, "class dimension is empty"),
        ({"input": torch.zeros(2, 5, 4, 4, dtype=torch.int32)}, TypeError, r"logits, got torch\.int32"),
        ({"target": torch.zeros(2, 8, 8)}, TypeError, r"class indices.*got torch\.float32"),
        ({"input": [0.0]}, TypeError, "^input must be a tensor, got list$"),
        ({"target": [0]}, TypeError, "^target must be a tensor, got list$"),
        ({"target": torch.full((2, 8, 8), 5)}, IndexError, r"target\[0, 0, 0\] is 5.*\[0, 5\)"),
        ({"align_corners": None}, ValueError, "align_corners must be True or False, got None"),
        ({"margin": -1.0}, ValueError, "margin must be finite and not negative, got -1"),
        ({"margin": torch.tensor([0.1, 0.2, -1.0, 0.1, 0.1])}, ValueError, r"margin\[2\] is -1"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \(C,\) = \(5,\)"),
        ({"weight": torch.tensor([1.0, torch.nan, 1.0, 1.0, 1.0])}, ValueError, r"weight\[1\] is nan"),
        ({"reduction": "average"}, ValueError, "reduction must be one of"),
        ({"target": torch.zeros(2, 8, 8, device="meta").long()}, RuntimeError, "target on the device of input"),
    ],
)  # fmt: skip
def test_what_does_not_fit(backend, given, error, words):
    options = {"input": torch.zeros(2, 5, 4, 4), "target": torch.zeros(2, 8, 8, dtype=torch.long), "backend": backend}
    options |= given
    with pytest.raises(error, match=words):
        upsampled_hem_loss(options.pop("input"), options.pop("target"), **options)


# --- autograd -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("size", "out", "align_corners"), [((2, 3), (5, 7), False), ((4, 5), (3, 2), True)])
def test_gradients_are_the_derivatives(reduction, size, out, align_corners):
    x, t = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True), targets((2, 4, *out), ignore_index=-100)
    weight = eighths(4).double() + 0.125

    def call(x):
        return upsampled_hem_loss(x, t, weight, margin=0.7, align_corners=align_corners, reduction=reduction)

    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)
    # Where the second derivative is not 0: of a function of the loss.
    assert torch.autograd.gradgradcheck(lambda x: call(x).square(), x)


def test_second_derivatives_keep_their_accuracy_in_half_precision(device):
    x, t = torch.randn(2, 4, 3, 3), targets((2, 4, 6, 6))
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        y = x.bfloat16().to(dtype).requires_grad_()
        (g,) = torch.autograd.grad(upsampled_hem_loss(y, t).square(), y, create_graph=True)
        found.append(torch.autograd.grad(g.float().square().sum(), y)[0].double())
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.02 * found[0].abs().max().item())


def test_how_the_gradient_moves_with_grad_loss_is_not_rounded_to_half_precision(device):
    x, t, direction = torch.randn(2, 4, 3, 3), targets((2, 4, 6, 6)), torch.randn(2, 4, 3, 3)
    grad_loss = torch.ones(2, 6, 6, requires_grad=True)
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        y, along = (v.bfloat16().to(dtype) for v in (x, direction))
        loss = upsampled_hem_loss(y.requires_grad_(), t, reduction="none")
        (g,) = torch.autograd.grad(loss, y, grad_loss.to(loss.dtype), create_graph=True)
        found += torch.autograd.grad(g, grad_loss, along)
    torch.testing.assert_close(found[1], found[0])


def test_what_is_kept_for_backward(device):
    x, t = torch.randn(2, 40, 8, 8, requires_grad=True), targets((2, 40, 32, 32), torch.uint8)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        upsampled_hem_loss(x, t)
    assert sorted(sizes) == sorted([4 * 2 * 2 * 32 * 32, t.nbytes, 4])  # a bit for each logit, targets, a number


def test_memory_of_the_shape_that_is_measured():
    """Less than a tenth of the two steps', at stride 4 and 150 classes."""
    x, t = torch.randn(1, 150, 64, 64, requires_grad=True), targets((1, 150, 256, 256))
    fused, unfused = (allocated_at_once(lambda f=f: f(x, t).backward()) for f in (upsampled_hem_loss, two_steps))
    assert fused < unfused / 10


# --- compiled, transformed, traced -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_ops_are_what_they_say(device, reduction, channels_last):
    x, t = torch.randn(2, 40, 3, 4), targets((2, 40, 6, 8))
    margins, weight = eighths(40), eighths(40)
    checks = ("test_schema", "test_faketensor")
    opcheck(upsample._forward, (x, t, margins, 0.0, weight, -100, reduction, True), test_utils=checks)
    loss, mask, denominator = upsample._forward(x, t, None, 0.5, None, -100, reduction, False)
    given = (torch.ones_like(loss), mask, t, None, denominator, -100, 40, 3, 4, 0, reduction, False, channels_last)
    opcheck(upsample._backward, given, test_utils=checks)
    with pytest.raises(RuntimeError, match=r"no gradient of its own: call hem_ext\.upsampled_hem_loss"):
        upsample._forward(x.requires_grad_(), t, None, 0.5, None, -100, reduction, False)


@pytest.mark.parametrize(("num_classes", "dtype"), [(32, torch.float64), (33, torch.bfloat16)])
@pytest.mark.parametrize("reduction", [0, 1])
def test_the_ops_make_the_same_on_meta(num_classes, dtype, reduction):
    """Of the same shapes, strides and dtypes, without a value."""
    x, t = torch.randn(2, num_classes, 3, 4).to(dtype), targets((2, num_classes, 6, 8))
    given = (x, t, None, 0.5, None, -100, reduction, False)
    loss, mask, denominator = upsample._forward(*given)
    of_mask = (torch.ones_like(loss), mask, t, None, denominator, -100, num_classes, 3, 4)
    calls = [(upsample._forward, given)]
    calls += [(upsample._backward, (*of_mask, DTYPE_CODES[dtype], reduction, False, last)) for last in (False, True)]
    for op, given in calls:
        made, on_meta = op(*given), op(*(v.to("meta") if isinstance(v, torch.Tensor) else v for v in given))
        for a, b in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (made, on_meta)), strict=True):
            assert b.device.type == "meta"
            assert (b.shape, b.stride(), b.dtype) == (a.shape, a.stride(), a.dtype)


def test_the_ops_stay_inside_their_memory():
    x, t = torch.randn(2, 3, 4, 4), targets((2, 3, 8, 8))
    loss, mask, one = upsample._forward(x, t, None, 0.2, None, -100, 1, False)
    for given, words in [
        ((x[:, :, :, ::2], t, None, 0.2, None, -100, 1, False), "must be contiguous"),
        ((x[0], t, None, 0.2, None, -100, 1, False), r"expected logits \(N, C, h, w\)"),
        ((x, t[:1], None, 0.2, None, -100, 1, False), "expected targets of sizes|targets"),
        ((x[:, :, :0], t, None, 0.2, None, -100, 1, False), "cannot interpolate"),
        ((x, t, torch.ones(2), 0.2, None, -100, 1, False), "margin must be contiguous"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            upsample._forward(*given)
    for given, words in [
        ((loss, mask[:, :, 1:], t, None, one, -100, 3, 4, 4, 0, 1, False, False), "mask must be contiguous int32"),
        ((loss.double(), mask, t, None, one, -100, 3, 4, 4, 0, 1, False, False), "do not fit the loss"),
        ((loss, mask, t, None, one, -100, 3, 4, 4, 9, 1, False, False), "no type of logits of code 9"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            upsample._backward(*given)


def test_compiled(device):
    criterion = UpsampledHEMLoss(margin=0.5)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True)
    for shape, out in [((2, 5, 3, 4), (6, 9)), ((3, 5, 5, 2), (7, 7))]:
        x, t = torch.randn(shape), targets((*shape[:2], *out))
        for y in (x, x.to(memory_format=torch.channels_last)):
            found, expected = (outcome(lambda y, t=t, f=f: f(y, t), y) for f in (compiled, criterion))
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_transformed_it_is_the_two_steps(device, backend, align_corners):
    x, t = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64), targets((6, 4, 5, 7), ignore_index=2).view(3, 2, 5, 7)
    options = {"weight": eighths(4).double(), "margin": 0.7, "ignore_index": 2, "reduction": "batchmean"}
    options |= {"align_corners": align_corners}
    expected = [outcome(lambda x, t=t: two_steps(x, t, **options), x)[1] for x, t in zip(x, t, strict=True)]
    options["backend"] = backend
    gradient = torch.func.vmap(torch.func.grad(lambda x, t: upsampled_hem_loss(x, t, **options)))
    torch.testing.assert_close(gradient(x, t), torch.stack(expected))
    tangent = torch.randn_like(x[0])
    with Calls() as calls:
        _, slope = torch.func.jvp(lambda x: upsampled_hem_loss(x, t[0], **options), (x[0],), (tangent,))
    torch.testing.assert_close(slope, (tangent * expected[0]).sum())
    assert set(calls.names) == ({"hem_ext::hem_forward", "hem_ext::hem_backward"} if backend == "auto" else set())


def test_exported_it_needs_no_library():
    criterion = UpsampledHEMLoss()
    x, t = torch.randn(2, 4, 3, 3), targets((2, 4, 6, 6))
    program = torch.export.export(criterion, (x, t))
    assert "hem_ext" not in str(program.graph)
    torch.testing.assert_close(program.module()(x, t), criterion(x, t))


def test_a_symbolic_trace_holds_the_call():
    traced = torch.fx.symbolic_trace(UpsampledHEMLoss(align_corners=True))
    assert any(node.target is upsampled_hem_loss for node in traced.graph.nodes)
    x, t = torch.randn(2, 4, 3, 3), targets((2, 4, 6, 6))
    assert torch.equal(traced(x, t), upsampled_hem_loss(x, t, align_corners=True))


def test_without_kernels(monkeypatch):
    x, t = torch.randn(2, 4, 3, 3, dtype=torch.float64), targets((2, 4, 6, 7))
    expected = outcome(lambda x: upsampled_hem_loss(x, t), x)
    monkeypatch.setattr(_native, "library", None)
    monkeypatch.setattr(_native, "load_error", "no such file")
    assert_same(outcome(lambda x: upsampled_hem_loss(x, t), x), expected)
    with pytest.raises(RuntimeError, match=r"upsampled_hem_loss\(backend='native'\).*no such file"):
        upsampled_hem_loss(x, t, backend="native")
    with pytest.raises(RuntimeError, match=r"upsampled_hem_loss\(backend='native'\).*no such file"):
        UpsampledHEMLoss(backend="native")(x, t)


def test_a_device_without_kernels_is_told_of_once(monkeypatch):
    _native.warn_of_fallback.cache_clear()
    monkeypatch.setattr(_native, "devices", frozenset())
    x, t = torch.randn(2, 4, 3, 3), targets((2, 4, 6, 7))
    with pytest.warns(RuntimeWarning) as told:
        upsampled_hem_loss(x, t)
    words = "upsampled_hem_loss runs in plain PyTorch: hem_ext was built without kernels for 'cpu' tensors"
    assert [str(warning.message) for warning in told] == [words]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upsampled_hem_loss(x, t)


# --- many processes, and the module ---------------------------------------------------------------------------------

in_processes = Functions()


def shared_batch():
    torch.manual_seed(0)
    return torch.randn(3, 5, 3, 4, dtype=torch.float64), targets((3, 5, 7, 9), ignore_index=-100)


@in_processes(2)
def shares_of_a_batch(rank):
    x, t = shared_batch()
    own = slice(0, 1) if rank == 0 else slice(1, 3)
    group = torch.distributed.group.WORLD
    return outcome(lambda x: upsampled_hem_loss(x, t[own], process_group=group), x[own])


def test_shares_of_a_batch(tmp_path):
    x, t = shared_batch()
    loss, gradient = outcome(lambda x: upsampled_hem_loss(x, t), x)
    found = Worlds(in_processes, tmp_path)(2, "shares_of_a_batch")
    torch.testing.assert_close(sum(loss for loss, _ in found) / 2, loss)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in found]) / 2, gradient)


def test_shares_add_up_to_the_batch(monkeypatch):
    """As two processes have it, by the module; what they exchange is tested above, in real ones."""
    x, t = shared_batch()
    parts = [slice(0, 1), slice(1, 3)]
    for reduction in ("mean", "batchmean"):
        criterion = UpsampledHEMLoss(reduction=reduction, process_group=torch.distributed.ProcessGroup(0, 2))
        calls = [functools.partial(outcome, functools.partial(criterion, target=t[part]), x[part]) for part in parts]
        found = as_processes(monkeypatch, calls)
        losses, gradients = zip(*found, strict=True)
        loss, gradient = outcome(functools.partial(upsampled_hem_loss, target=t, reduction=reduction), x)
        torch.testing.assert_close(sum(losses) / 2, loss)
        torch.testing.assert_close(torch.cat(gradients) / 2, gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("size", "align_corners"), [((5, 7), False), ((5, 7), True), ((3, 4), False)])
def test_tensors_that_are_sharded(mesh, dtype, size, align_corners):
    """What several processes make of the second step is tested with the plain loss."""
    x, t = torch.randn(2, 4, 3, 4).to(dtype), targets((2, 4, *size), ignore_index=3)
    options = {"weight": eighths(4), "margin": eighths(4), "ignore_index": 3, "align_corners": align_corners}
    for reduction in ("batchmean", "none"):
        options["reduction"] = reduction
        y, labels = (distribute_tensor(v, mesh, [Shard(0)]) for v in (x, t))
        loss, gradient = outcome(lambda x, t=labels: upsampled_hem_loss(x, t, **options).full_tensor(), y)
        expected = outcome(lambda x: upsampled_hem_loss(x, t, **options), x)
        assert_same((loss, gradient.full_tensor()), expected, dtype)
    with pytest.raises(
        TypeError, match=r"^input must be float32, float64, float16 or bfloat16 logits, got torch\.int32$"
    ):
        upsampled_hem_loss(y.int(), labels)
    with pytest.raises(ValueError, match="the class dimension is empty: got input of shape"):
        upsampled_hem_loss(y[:, :0], labels)


def test_the_module(device):
    x, t = torch.randn(2, 4, 3, 3), targets((2, 4, 6, 7), ignore_index=255)
    options = {"margin": [0.1, 0.2, 0.3, 0.4], "weight": eighths(4), "ignore_index": 255, "reduction": "sum"}
    criterion = UpsampledHEMLoss(align_corners=True, **options)
    expected = upsampled_hem_loss(x, t, align_corners=True, **options)
    assert torch.equal(criterion(x, t), expected)
    assert torch.equal(copy.deepcopy(criterion)(x, t), expected)
    other = UpsampledHEMLoss(
        margin=[0.0] * 4, weight=torch.ones(4), align_corners=True, ignore_index=255, reduction="sum"
    )
    other.load_state_dict(HEMLoss(**options).state_dict())
    assert torch.equal(other(x, t), expected)
    assert repr(criterion) == (
        "UpsampledHEMLoss(margin=(4 classes), ignore_index=255, reduction='sum', align_corners=True)"
    )
    assert repr(UpsampledHEMLoss()) == "UpsampledHEMLoss(margin=0.2, ignore_index=-100, reduction='mean')"
    shared = UpsampledHEMLoss(process_group=torch.distributed.ProcessGroup(0, 2), backend="native")
    assert repr(shared).endswith(", reduction='mean', process_group=(2 processes), backend='native')")
    expected = upsampled_hem_loss(x, t % 4, normalizer=3.0)
    assert torch.equal(UpsampledHEMLoss()(x, t % 4, normalizer=3.0), expected)
    assert torch.equal(UpsampledHEMLoss(normalizer=3.0)(x, t % 4), expected)
    assert torch.equal(UpsampledHEMLoss(normalizer=2.0)(x, t % 4, normalizer=3.0), expected)
    with pytest.raises(ValueError, match="align_corners must be True or False, got 1"):
        UpsampledHEMLoss(align_corners=1)


def test_the_example_of_the_page():
    page = (Path(__file__).parents[1] / "docs" / "upsample.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(code, names)
    logits, expected = (
        names["logits"],
        outcome(lambda x: two_steps(x, names["labels"], ignore_index=255), names["logits"]),
    )
    assert_same((names["loss"].detach(), logits.grad), expected, torch.float32)
