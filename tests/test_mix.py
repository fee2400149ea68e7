"""Mixed targets against scalar loops, against the plain loss where nothing is mixed, and as libraries make them."""

from __future__ import annotations

import copy
import itertools
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import ARITHMETIC, DTYPES, LOSS_TOLERANCE, REDUCTIONS, eighths, logits, num_classes, targets
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hem_ext import HEMLoss, _native, hem_loss, mix
from hem_ext.mix import MixedHEMLoss, mixed_hem_loss, split_mixed

PAGE = Path(__file__).parents[1] / "docs" / "mix.md"
SHAPES = [(5,), (12, 7), (9, 40), (2, 5, 3, 4), (2, 3, 11), (6, 1), (0, 4), (3, 4, 0)]


# --- the rule in scalar loops ---------------------------------------------------------------------------------


def mixed(x, a, b, lam, *, margin=0.2, weight=None, ignore_index=-100, reduction="mean", grad_loss=None):
    """The loss, its gradient, and the sum of the sizes of what that is added up from; float64."""
    x, a, b = x.detach().cpu(), a.cpu(), b.cpu()
    lam = torch.as_tensor(lam, dtype=torch.float64).cpu()
    class_dim = 0 if x.dim() == 1 else 1
    rows = x.double().movedim(class_dim, -1)
    losses, gradients = torch.zeros(a.shape, dtype=torch.float64), torch.zeros(rows.shape, dtype=torch.float64)
    sizes, active, counted = torch.zeros_like(gradients), 0.0, 0.0
    for position in itertools.product(*map(range, a.shape)):
        share = lam[position[: lam.dim()]]
        for label, s in ((int(a[position]), float(share)), (int(b[position]), 1 - float(share))):
            if label == ignore_index:
                continue
            m = float(margin) if not isinstance(margin, torch.Tensor) else float(margin[label])
            s *= 1.0 if weight is None else float(weight[label])
            loss, gradient = oracle.sample(rows[position].tolist(), label, m)
            losses[position] += s * loss
            gradients[position] += s * torch.tensor(gradient, dtype=torch.float64)
            sizes[position] += s * torch.tensor(gradient, dtype=torch.float64).abs()
            active += s if loss > 0 else 0.0
            counted += s
    divisor = {"mean": active, "batchmean": counted, "sum": 1.0, "none": 1.0}[reduction] or 1.0
    scale = torch.ones(()) if grad_loss is None else grad_loss.cpu().double()
    scale = (scale.unsqueeze(-1) if reduction == "none" else scale) / divisor
    loss = losses if reduction == "none" else losses.sum() / divisor
    return loss, (gradients * scale).movedim(-1, class_dim), (sizes * scale.abs()).movedim(-1, class_dim)


def run(loss_of, x, *args, grad_loss=None, **options):
    x = x.detach().requires_grad_()
    loss = loss_of(x, *args, **options)
    loss.backward(torch.ones_like(loss) if grad_loss is None else grad_loss)
    return loss.detach(), x.grad


def check(x, a, b, lam, loss_of=mixed_hem_loss, given=None, grad_loss=None, **options):
    """`given` is what `loss_of` takes in the place of the targets and lam."""
    loss, gradient = run(loss_of, x, *((a, b, lam) if given is None else given), grad_loss=grad_loss, **options)
    options.pop("backend", None)
    with torch.device("cpu"):
        expected, expected_gradient, sizes = mixed(x, a, b, lam, grad_loss=grad_loss, **options)
    assert loss.dtype == ARITHMETIC[x.dtype]
    assert gradient.dtype == x.dtype
    torch.testing.assert_close(loss.double().cpu(), expected, **LOSS_TOLERANCE[loss.dtype])
    error = 2 * torch.finfo(x.dtype).eps * sizes + (1e-7 if x.dtype == torch.float16 else 1e-16)
    assert ((gradient.double().cpu() - expected_gradient).abs() <= error).all()


def lams(target):
    """Of every form, in eighths: no sum of shares is rounded."""
    shape = target.shape
    found = [0.375, torch.tensor(0.625), torch.randint(0, 9, shape) / 8, 1.0, 0.0]
    if shape:
        found.append((torch.randint(0, 9, shape[:1]) / 8).double())
    return found


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_oracle(device, shape, dtype, reduction):
    count = num_classes(shape)
    target_dtypes = itertools.cycle([torch.int64, torch.int32, torch.uint8])
    layouts = itertools.cycle([lambda x: x, lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1)])
    for i, lam in enumerate(lams(targets(shape))):
        x, ignore_index = next(layouts)(logits(shape, dtype)), 255 if i % 2 else -100
        a, b = (targets(shape, ignore_index=ignore_index) for _ in range(2))
        if ignore_index == 255:
            a, b = a.to(next(target_dtypes)), b.to(next(target_dtypes))
        options = {"ignore_index": ignore_index, "reduction": reduction, "backend": ("native", "reference")[i // 2 % 2]}
        if i % 3:
            options |= {"margin": eighths(count), "weight": eighths(count)}
        grad_loss = (torch.randint(-4, 5, a.shape if reduction == "none" else ()) / 2).to(ARITHMETIC[dtype])
        check(x, a, b, lam, grad_loss=grad_loss, **options)


def test_no_lam_is_rounded_more_than_the_logits(device):
    x, a, b = logits((12, 7), torch.float64), targets((12, 7)), targets((12, 7))
    for lam in (1 / 3, torch.full((12,), 1 / 3, dtype=torch.float64)):
        check(x, a, b, lam)


def test_targets_of_every_form_that_the_loss_takes(device):
    x, a, b = logits((2, 2, 3, 4)), targets((2, 2, 3, 4)), targets((2, 2, 3, 4))
    expected = run(mixed_hem_loss, x, a, b, 0.375)
    for form in (torch.Tensor.bool, torch.Tensor.char, torch.Tensor.short, lambda target: target.unsqueeze(1)):
        torch.testing.assert_close(run(mixed_hem_loss, x, form(a), form(b), 0.375), expected, rtol=0, atol=0)


def test_every_instruction_set_and_number_of_threads_gives_a_sample_the_same_bits():
    before, threads = _native.library.cpu_isa(), torch.get_num_threads()
    try:
        for shape in [(5000, 10), (2, 21, 40, 41)]:
            x, a, b = torch.randn(shape), targets(shape, ignore_index=-100), targets(shape)
            lam, found = torch.rand(a.shape), []
            for isa, count in itertools.product(_native.library.available_cpu_isas(), (1, 2, 3)):
                _native.library.select_cpu_isa(isa)
                torch.set_num_threads(count)
                found.append(run(mixed_hem_loss, x, a, b, lam, reduction="none"))
            for loss, gradient in found[1:]:
                assert torch.equal(loss, found[0][0])
                assert torch.equal(gradient, found[0][1])
    finally:
        _native.library.select_cpu_isa(before)
        torch.set_num_threads(threads)


# --- where nothing is mixed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_class_alone_is_the_plain_loss(device, backend, reduction):
    x, a, b = logits((40, 6), torch.float64), targets((40, 6), ignore_index=-100), targets((40, 6), ignore_index=-100)
    # What b would make of these rows must reach nothing: infinite, finished for b alone, broken and ignored.
    x[0, 3], a[0], b[0] = torch.inf, 3, 1
    x[1], a[1], b[1] = torch.tensor([0.0, 9, 0, 0, 0, 0]), 0, 1
    x[2], a[2], b[2] = torch.nan, -100, 2
    options = {"reduction": reduction, "margin": eighths(6), "weight": eighths(6) + 0.125, "backend": backend}
    expected = run(hem_loss, x, a, **options)
    assert expected[0].isfinite().all()
    shares, halves = torch.rand(40), torch.full((40,), 0.3)
    for given in [(a, b, 1.0), (b, a, 0), (a, b, torch.ones(40)), (b, a, torch.tensor(0.0)), (a, a, 0.3)]:
        found = run(mixed_hem_loss, x, *given, **options)
        if reduction == "none":
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)
    # By the sample: some of one class, some mixed, with shares that do not sum up exactly.
    for lam in (shares, halves):
        is_a = torch.rand(40) < 0.5
        loss, gradient = run(mixed_hem_loss, x, a, torch.where(is_a, a, b), lam, **{**options, "reduction": "none"})
        alone, alone_gradient = run(hem_loss, x, a, **{**options, "reduction": "none"})
        assert torch.equal(loss[is_a], alone[is_a])
        assert torch.equal(gradient[is_a], alone_gradient[is_a])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_class_alone_may_have_the_largest_loss(device, backend, reduction):
    x, a = torch.tensor([[0.0, torch.finfo(torch.float32).max, 0.0]]), torch.tensor([0])
    expected = run(hem_loss, x, a, reduction=reduction, backend=backend)
    assert expected[0].isfinite().all()
    found = run(mixed_hem_loss, x, a, a, 0.25, reduction=reduction, backend=backend)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_row_reaches_the_loss_and_its_own_gradient(device, backend, lam, value):
    x, a, b = logits((5, 4)), targets((5, 4)), targets((5, 4))
    x[2, 3], a[2], b[2] = value, 0, 1
    for reduction in REDUCTIONS:
        loss, gradient = run(mixed_hem_loss, x, a, b, lam, reduction=reduction, backend=backend)
        assert gradient[2].isnan().all()
        assert gradient[[0, 1, 3, 4]].isfinite().all()
        assert loss.isnan()[2] if reduction == "none" else loss.isnan()
    for reduction in REDUCTIONS:  # not where both are ignored
        a[2] = b[2] = -100
        loss, gradient = run(mixed_hem_loss, x, a, b, lam, reduction=reduction, backend=backend)
        assert loss.isfinite().all()
        assert not gradient[2].any()
        assert gradient.isfinite().all()


def test_no_active_sample(device, backend):
    x, a = 9.0 * F.one_hot(torch.arange(4), 4), torch.arange(4)
    for reduction in REDUCTIONS:
        loss, gradient = run(mixed_hem_loss, x, a, a.flip(0), 1.0, reduction=reduction, backend=backend)
        assert not loss.any()
        assert not gradient.any()


def test_a_share_of_a_loss_that_is_rounded_to_0_is_counted(device, backend):
    x = torch.tensor([[0.0, torch.finfo(torch.float32).smallest_normal * 2**-23, -1.0], [0.0, 1.0, 0.0]])
    a, b = torch.tensor([0, 0]), torch.tensor([2, 0])
    # A quarter of the least number above 0, and three quarters of 1; 1.
    assert mixed_hem_loss(x, a, b, 0.25, margin=0.0, backend=backend) == (0.75 + 1.0) / 2


def test_a_mixed_sample_is_never_finished_and_ends_one_margin_ahead():
    y = torch.randn(200, 6) * 5
    a, b = torch.zeros(200, dtype=torch.long), torch.ones(200, dtype=torch.long)
    loss = mixed_hem_loss(y, a, b, torch.rand(200), margin=0.25, reduction="none")
    assert (loss > 0).all()
    y = torch.zeros(1, 6, dtype=torch.float64)
    for _ in range(50):
        y -= 0.02 * run(mixed_hem_loss, y, a[:1], b[:1], 0.6, margin=0.25)[1]
    assert 0.2 < (y[0, 0] - y[0, 1]).item() < 0.3


# --- soft targets, as libraries make them -----------------------------------------------------------------------


class TorchvisionMix:
    """What v2.MixUp and v2.CutMix document of their targets: those of the batch and of it rolled by one, mixed."""

    def __init__(self, *, num_classes):
        self.num_classes = num_classes

    def __call__(self, images, labels):
        lam = float(torch.rand(()))
        one_hot = F.one_hot(labels, self.num_classes).float()
        return lam * images + (1 - lam) * images.roll(1, 0), (1 - lam) * one_hot.roll(1, 0) + lam * one_hot


class TimmMix:
    """What timm's Mixup documents: each image has its own lam, of the images' dtype; mixed with the batch reversed."""

    def __init__(self, *, num_classes, label_smoothing=0.1, **options):
        self.num_classes, self.smoothing = num_classes, label_smoothing
        assert options == {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mode": "elem"}

    def __call__(self, images, labels):
        lam = torch.rand(len(images), 1).to(images.dtype)
        off = self.smoothing / self.num_classes
        one_hot = F.one_hot(labels, self.num_classes) * (1.0 - self.smoothing) + off
        share = lam.view(-1, *[1] * (images.dim() - 1))
        return share * images + (1 - share) * images.flip(0), lam * one_hot + (1 - lam) * one_hot.flip(0)


TIMM = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mode": "elem", "num_classes": 7}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("images", DTYPES)
def test_soft_targets_of_libraries(device, dtype, images):
    for make in (TorchvisionMix(num_classes=7), TimmMix(label_smoothing=0.0, **TIMM)):
        _, soft = make(torch.zeros(64, 2, dtype=images), torch.randint(7, (64,)))
        soft = soft.to(dtype)
        a, b, lam = split_mixed(soft)
        assert a.dtype == b.dtype == torch.int64
        assert lam.dtype == ARITHMETIC[dtype]
        assert ((lam >= 0.49) & (lam <= 1)).all()
        hit = F.one_hot(a, 7).T * lam + F.one_hot(b, 7).T * (1 - lam)
        torch.testing.assert_close(hit.T, soft.to(lam.dtype), rtol=0, atol=2**-6)
        for reduction in REDUCTIONS:
            x, criterion = logits((64, 7), dtype), MixedHEMLoss(reduction=reduction)
            expected = run(mixed_hem_loss, x, a, b, lam, reduction=reduction)
            torch.testing.assert_close(run(criterion, x, soft), expected, rtol=0, atol=0)
        smoothed = TimmMix(**TIMM)(torch.zeros(64, 2), torch.randint(7, (64,)))[1]
        if device == "cpu":
            with pytest.raises(ValueError, match=r"soft_target\[0\] has 7 classes .* use label_smoothing=0 \(in timm"):
                criterion(x, smoothed)


def test_nothing_waits_for_the_device(device):
    x, a, b, soft = logits((6, 5)), targets((6, 5)), targets((6, 5)), F.one_hot(targets((6, 5)), 5).float()
    criterion = MixedHEMLoss(margin=eighths(5), weight=eighths(5))
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for given in [(a, b, 0.25), (a, b, torch.rand(6)), (a, b, torch.tensor(0.25, device="cpu")), (soft,)]:
            run(criterion, x, *given)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


class NoWaits(TorchDispatchMode):
    """Where a device would be waited for: for a value that lies there, or until a copy has come."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op is torch.ops.aten._local_scalar_dense.default:
            assert args[0].device.type == "cpu"
        if op is torch.ops.aten._to_copy.default and kwargs.get("device", args[0].device) != args[0].device:
            assert kwargs.get("non_blocking")
        return op(*args, **kwargs)


def test_no_device_but_the_host_is_waited_for():
    """On meta, which is not the default device."""
    x, target, shares = logits((6, 5)).to("meta"), targets((6, 5)).to("meta"), torch.rand(6, device="meta")
    with NoWaits():
        for lam in (0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64), shares[0], shares):
            assert mixed_hem_loss(x, target, target, lam).device.type == "meta"
        assert MixedHEMLoss()(x, x.softmax(1)).device.type == "meta"
        assert all(found.device.type == "meta" for found in split_mixed(x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_soft_targets_of_any_shape(device, shape):
    class_dim = 0 if len(shape) == 1 else 1
    a, b = targets(shape), targets(shape)
    lam = torch.randint(0, 9, a.shape) / 8
    hits = [F.one_hot(t, num_classes(shape)).movedim(-1, class_dim) for t in (a, b)]
    soft = lam.unsqueeze(class_dim) * hits[0] + (1 - lam).unsqueeze(class_dim) * hits[1]
    for reduction in REDUCTIONS:
        criterion = MixedHEMLoss(reduction=reduction)
        check(logits(shape), a, b, lam, lambda x, soft, criterion=criterion, **_: criterion(x, soft), [soft],
              reduction=reduction)  # fmt: skip


def test_how_far_from_1_a_row_may_be():
    for dtype in DTYPES:
        for off in (0.0, 2**-6, -(2**-6)):
            a, b, lam = split_mixed(torch.tensor([[0.0, 0.375 + off, 0.625]], dtype=dtype))
            assert (a, b, lam) == (2, 1, torch.tensor([0.625], dtype=ARITHMETIC[dtype]) / (1 + off))
            assert lam.dtype == ARITHMETIC[dtype]
        for off in (2**-6 + 2**-9, -(2**-6) - 2**-9):
            with pytest.raises(ValueError, match=f"sum to 1, got {0.375 + off:g} and 0.625$"):
                split_mixed(torch.tensor([[0.0, 0.375 + off, 0.625]], dtype=dtype))


X, T, HALF = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), torch.full((4, 3), 0.5)
HALF[:, 1] = 0
PIXELS = torch.zeros(2, 3, 4, 5)


def changed(x, position, value):
    x = x.clone()
    x[position] = value
    return x


SHARES = " must hold shares of one or two classes that sum to 1, got"
MANY = (
    " has 3 classes that are not 0, expected the two that were mixed: HEM has nothing to smooth, "
    "use label_smoothing=0 (in timm's Mixup; --smoothing 0 of its train.py)"
)
DETACH = "is a constant of the loss and gets no gradient, but it requires one: detach it"
CLASS_INDICES = "target must be int64, int32 or uint8 class indices (or bool, int8, int16 or uint16)"
ON_DEVICE = "expected lam on the device of the targets"
ONE_LAM = "lam must be one number or one for each sample, of shape"
ONE_OF_4 = f"{ONE_LAM} () or (4,) for targets of shape (4,), got lam of shape"


@pytest.mark.parametrize(
    ("soft", "error", "words"),
    [
        (changed(HALF, (1, 1), 0.1), ValueError, f"soft_target[1]{MANY}"),
        (torch.full((1, 3, 2, 2), 0.25), ValueError, f"soft_target[0, :, 0, 0]{MANY}"),
        (torch.full((3,), 1 / 3), ValueError, f"soft_target{MANY}"),
        (changed(HALF, (1, 0), 0.4), ValueError, f"soft_target[1]{SHARES} 0.4 and 0.5"),
        (changed(HALF, 2, 0.0), ValueError, f"soft_target[2]{SHARES} 0"),
        (changed(HALF, 3, torch.tensor([-0.5, 0, 1.5])), ValueError, f"soft_target[3]{SHARES} -0.5 and 1.5"),
        (changed(HALF, (0, 0), torch.nan), ValueError, f"soft_target[0]{SHARES} nan and 0.5"),
        (torch.tensor([0.5, 0.25]), ValueError, f"soft_target{SHARES} 0.5 and 0.25"),
        (torch.zeros(4, 0), ValueError, "soft_target must have shape (C,), (N, C) or (N, C, d1, ..., dk), got (4, 0)"),
        (torch.tensor(1.0), ValueError, "soft_target must have shape (C,), (N, C) or (N, C, d1, ..., dk), got ()"),
        (HALF.clone().requires_grad_(), ValueError, f"soft_target {DETACH}"),
        (T, TypeError, "soft_target must be float32, float64, float16 or bfloat16, got torch.int64"),
        ([0.5, 0.5], TypeError, "soft_target must be a tensor, got list"),
    ],
)
def test_what_is_no_mixture(soft, error, words):
    with pytest.raises(error, match=f"^{re.escape(words)}$"):
        split_mixed(soft)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"target_a": [0, 1, 2, 0]}, TypeError, "target_a must be a tensor, got list"),
        ({"target_b": None}, TypeError, "target_b must be a tensor, got NoneType"),
        ({"target_b": T[:3]}, ValueError, "expected target_a and target_b of one shape, got (4,) and (3,)"),
        ({"target_a": T[:3], "target_b": T[:3]}, ValueError, "expected target of shape (4,) for input of shape (4, 3)"),
        ({"target_b": T.float()}, TypeError, f"{CLASS_INDICES}, got torch.float32 of shape (4,)"),
        ({"target_a": T + 1}, IndexError, "target_a[2] is 3"),
        ({"target_b": T - 1}, IndexError, "target_b[0] is -1"),
        ({"target_b": T + 1, "lam": 1.0}, IndexError, "target_b[2] is 3"),
        ({"lam": 1.5}, ValueError, "lam must be in [0, 1], got 1.5"),
        ({"lam": torch.nan}, ValueError, "lam must be in [0, 1], got nan"),
        ({"lam": torch.tensor(-0.5)}, ValueError, "lam must be in [0, 1], got -0.5"),
        ({"lam": torch.tensor([0.5, 1, 2, 0])}, ValueError, "lam must be in [0, 1], but lam[2] is 2"),
        ({"lam": torch.rand(3)}, ValueError, f"{ONE_OF_4} (3,)"),
        ({"lam": torch.rand(4, 1)}, ValueError, f"{ONE_OF_4} (4, 1)"),
        (
            {"input": PIXELS, "target_a": PIXELS[:, 0].long(), "target_b": PIXELS[:, 0].long(), "lam": torch.rand(4)},
            ValueError,
            f"{ONE_LAM} () or (2,) or (2, 4, 5) for targets of shape (2, 4, 5), got lam of shape (4,)",
        ),
        ({"lam": torch.rand(4).requires_grad_()}, ValueError, f"lam {DETACH}"),
        ({"lam": T == 0}, TypeError, "lam must hold real numbers, got torch.bool"),
        ({"lam": None}, TypeError, "lam must be a number, or a tensor of one for each sample, got None"),
        ({"lam": torch.rand((), device="meta")}, RuntimeError, f"{ON_DEVICE}, cpu, got lam on meta"),
        ({"lam": torch.rand(4, device="meta")}, RuntimeError, f"{ON_DEVICE}, cpu, got lam on meta"),
        (
            {"input": X.to("meta"), "target_a": T.to("meta"), "target_b": T.to("meta"), "lam": torch.rand(4)},
            RuntimeError,
            f"{ON_DEVICE}, meta, got lam on cpu",
        ),
        ({"weight": torch.tensor([1.0, -1, 1])}, ValueError, "weight must be finite and not negative"),
        ({"margin": torch.tensor([1.0, -1, 1])}, ValueError, "margin must be finite and not negative"),
        ({"reduction": "average"}, ValueError, "reduction must be one of"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ({"process_group": 2}, TypeError, "process_group must be"),
        ({"input": X.long()}, TypeError, "input must be float32, float64, float16 or bfloat16 logits"),
        ({"input": X.numpy()}, TypeError, "input must be a tensor"),
    ],
)  # fmt: skip
def test_errors(given, error, words):
    arguments = {"input": X, "target_a": T, "target_b": T.flip(0), "lam": 0.5} | given
    with pytest.raises(error, match=f"^{re.escape(words)}"):
        mixed_hem_loss(**arguments)


def test_a_lam_whose_memory_was_given_back():
    lam = torch.rand(4)
    lam.untyped_storage().resize_(15)
    words = "the memory of lam is not allocated: its storage was resized to 15 bytes, and 16 are needed"
    with pytest.raises(RuntimeError, match=f"^{words}$"):
        mixed_hem_loss(X, T, T, lam)


# --- the module -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ((X, T, T), TypeError, "two targets are mixed by their lam, got no lam"),
        ((X, T, None, 0.5), TypeError, "two targets are mixed by their lam, got no target_b"),
        ((X, HALF[:, :2]), ValueError, "a soft target must have the shape of the logits, (4, 3), got (4, 2)"),
        (
            (X, T.float()),
            TypeError,
            f"{CLASS_INDICES}, got torch.float32 of shape (4,): use .long() where they are class indices",
        ),
        ((X, [0, 1, 2, 0]), TypeError, "target must be a tensor, got list"),
        ((X.tolist(), T), TypeError, "input must be a tensor, got list"),
        ((X.tolist(), HALF), TypeError, "input must be a tensor, got list"),
    ],
)
def test_errors_of_the_module(given, error, words):
    with pytest.raises(error, match=f"^{re.escape(words)}$"):
        MixedHEMLoss()(*given)


def test_module(monkeypatch):
    options = {"margin": eighths(4), "weight": eighths(4), "reduction": "batchmean", "ignore_index": 3}
    x, a, b = logits((9, 4)), targets((9, 4)), targets((9, 4))
    criterion = MixedHEMLoss(**options, backend="reference")
    plain = HEMLoss(**options)
    assert criterion.state_dict().keys() == plain.state_dict().keys()
    for module in (criterion, copy.deepcopy(criterion)):
        expected = mixed_hem_loss(x, a, b, 0.25, **options, backend="reference")
        torch.testing.assert_close(module(x, a, b, 0.25), expected, rtol=0, atol=0)
        torch.testing.assert_close(module(x, a), plain(x, a))
    backends = []
    monkeypatch.setattr(mix, "hem_loss", lambda *_, backend, **__: backends.append(backend) or torch.zeros(9))
    criterion(x, a, b, 0.25)
    assert backends == ["reference"] * 2
    assert (
        repr(criterion)
        == "MixedHEMLoss(margin=(4 classes), ignore_index=3, reduction='batchmean', backend='reference')"
    )
    assert torch.equal(MixedHEMLoss.from_class_counts([5, 10]).margin, HEMLoss.from_class_counts([5, 10]).margin)


# --- what autograd, the compiler and processes make of it -------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(backend, reduction):
    x = torch.randn(5, 6, dtype=torch.float64).requires_grad_()
    a, b, lam = targets((5, 6)), targets((5, 6)), torch.rand(5)
    options = {"weight": eighths(6) + 0.125, "reduction": reduction, "backend": backend}

    def loss(x):
        return mixed_hem_loss(x, a, b, lam, **options)

    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(lambda x: loss(x) ** 2, x)


def test_compiled_without_graph_breaks(device):
    torch._dynamo.reset()
    criterion = MixedHEMLoss(weight=eighths(7))
    # The graphs and their gradients; what the compiler makes of a loss is tested with the plain one.
    a, b, x = targets((6, 7), ignore_index=-100), targets((6, 7)), logits((6, 7))
    soft = (F.one_hot(b, 7) + F.one_hot(b.flip(0), 7)) / 2

    def loss(x, lam):
        return criterion(2 * x, a, b, lam) + criterion(x, soft)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for lam in (0.25, torch.rand(6)):
        torch.testing.assert_close(run(compiled, x, lam), run(loss, x, lam))


def test_autocast(device):
    x, a, b = logits((8, 5), torch.bfloat16), targets((8, 5)), targets((8, 5))
    with torch.autocast(device, torch.bfloat16):
        found = run(MixedHEMLoss(), x, a, b, 0.25)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found, run(mixed_hem_loss, x, a, b, 0.25), rtol=0, atol=0)


def test_shares_add_up_to_the_batch(monkeypatch):
    """As two processes have it; what they exchange is tested with the plain loss, in real ones."""
    x, a, b, lam = (
        logits((10, 6)),
        targets((10, 6), ignore_index=-100),
        targets((10, 6)),
        torch.randint(0, 9, (10,)) / 8,
    )
    group = torch.distributed.ProcessGroup(0, 2)
    for reduction in ("mean", "batchmean"):
        own = []
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda total, group, own=own: own.append(total.clone()))
        options = {"reduction": reduction, "process_group": group}
        parts = [tuple(t[part] for t in (x, a, b, lam)) for part in (slice(0, 7), slice(7, 10))]
        for part in parts:
            run(mixed_hem_loss, *part, **options)
        total = sum(own)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda found, group, total=total: found.copy_(total))
        losses, gradients = zip(*(run(MixedHEMLoss(**options), *part) for part in parts), strict=True)
        loss, gradient, _ = mixed(x, a, b, lam, reduction=reduction)
        torch.testing.assert_close(torch.stack(losses).mean().double(), loss)
        torch.testing.assert_close(torch.cat(gradients).double() / 2, gradient)
    for reduction in ("sum", "none"):
        found = mixed_hem_loss(x, a, b, lam, reduction=reduction, process_group=group)
        torch.testing.assert_close(found, mixed_hem_loss(x, a, b, lam, reduction=reduction), rtol=0, atol=0)


# --- the page ---------------------------------------------------------------------------------------------------


def test_examples_of_the_page(monkeypatch):
    v2 = SimpleNamespace(MixUp=TorchvisionMix, CutMix=TorchvisionMix, RandomChoice=lambda choices: choices[0])
    for name, module in {"torchvision": None, "torchvision.transforms": SimpleNamespace(v2=v2), "timm": None,
                         "timm.data": SimpleNamespace(Mixup=TimmMix)}.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module or SimpleNamespace())
    examples = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    assert len(examples) == 3
    for code in examples:
        model, images = nn.Linear(4, 10), torch.randn(8, 4)
        labels = torch.randint(10, (8,))
        names = {"model": model, "batches": [(images, labels)], "labels": labels, "logits": model(images), "lam": 0.3}
        exec(compile(code, str(PAGE), "exec"), names)
        assert names["loss"] > 0
        assert model.weight.grad.any()
