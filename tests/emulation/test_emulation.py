"""The CUDA kernels, run on the host, against the scalar oracle."""

import kernels
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import GRADIENT_TOLERANCE, assert_gradient, assert_loss, eighths, logits, targets

from hem_ext import upsampled_hem_loss

DTYPES = ["float32", "float64", "bfloat16", "float16"]


@pytest.fixture(scope="module")
def module():
    return kernels.load(kernels.build())


def stored(x):
    """The bits of a tensor as numpy has them."""
    return (x.view(torch.int16).numpy().view(np.uint16) if x.element_size() == 2 else x.numpy()).copy()


def restored(a, x):
    """A tensor like x with these bits."""
    return torch.from_numpy(a.view(np.int16) if x.element_size() == 2 else a).view(x.dtype)


def check(module, kernel, x, t, **options):
    arrays = {name: v.numpy() if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    name = str(x.dtype).removeprefix("torch.")
    loss, gradient, fine = kernels.run(module, kernel, name, stored(x), t.numpy(), **arrays)
    assert fine
    asked = {k: options[k] for k in ("margin", "weight", "ignore_index", "reduction", "grad_loss") if k in options}
    expected, expected_gradient = oracle.hem(x, t, **asked)
    assert_loss(torch.from_numpy(np.asarray(loss)), expected)
    assert_gradient(restored(gradient, x), expected_gradient)


ROWS = [
    ("narrow_rows", (5, 1)),
    ("narrow_rows", (130, 10)),
    ("narrow_rows", (3, 33)),
    ("narrow_rows", (300, 64)),
    ("warp_rows", (9, 65)),
    ("warp_rows", (4, 130)),
    ("warp_rows", (3, 257)),
    ("warp_rows", (2, 1001)),  # more than the registers keep: read twice
    ("block_rows", (8, 500)),
    ("block_rows", (2, 1029)),
    ("block_rows", (1, 4099)),
]
PIXELS = [
    ("pixels", (2, 3, 8)),
    ("pixels", (1, 16, 128)),
    ("pixels", (2, 21, 132)),
    ("pixels", (1, 33, 260)),
    ("pixels", (1, 150, 40)),
    ("many_class_pixels", (2, 70, 5)),
    ("many_class_pixels", (1, 513, 3)),
]


def threads_for(kernel, classes):
    """One block as small as the kernel allows: a thread of the host each."""
    return 32 * ((classes + 15) // 16) if kernel == "pixels" else 64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel", "shape"), ROWS + PIXELS)
def test_matches_the_oracle(module, kernel, shape, dtype):
    x, t = logits(shape, getattr(torch, dtype)), targets(shape, ignore_index=-100)
    threads = threads_for(kernel, shape[1])
    check(module, kernel, x, t, threads=threads, margin=0.5)
    check(module, kernel, x, t, threads=threads, margin=eighths(shape[1]), weight=eighths(shape[1]), reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize(("kernel", "shape"), [ROWS[1], ROWS[4], ROWS[8], PIXELS[2], PIXELS[5]])
def test_reductions_and_grids(module, kernel, shape, reduction):
    x, t = logits(shape), targets(shape, ignore_index=-100)
    x[0, 0] = 9.0  # some finished
    for blocks, threads in [(1, 1), (3, 2)]:
        check(
            module, kernel, x, t, blocks=blocks, threads=threads * threads_for(kernel, shape[1]),
            weight=eighths(shape[1]), reduction=reduction, grad_loss=torch.tensor(-1.5),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("offset", [1, 2, 3, 5])
@pytest.mark.parametrize(("kernel", "shape"), [ROWS[1], ROWS[5], ROWS[9]])
def test_misaligned_rows(module, kernel, shape, offset, dtype):
    x, t = logits(shape, getattr(torch, dtype)), targets(shape)
    check(module, kernel, x, t, offset=offset)
    check(module, kernel, x, t, offset=offset, pad=3)


@pytest.mark.parametrize("kernel", ["warp_rows", "block_rows"])
def test_rows_one_element_a_load(module, kernel):
    check(module, kernel, logits((3, 203)), targets((3, 203)), width=1, offset=1)


@pytest.mark.parametrize("shape", [(2, 21, 37), (1, 40, 1), (3, 5, 101)])
def test_pixels_one_element_a_load(module, shape):
    for dtype in (torch.float32, torch.float16):
        check(
            module, "pixels", logits(shape, dtype), targets(shape), width=1, offset=1, pad=2,
            threads=threads_for("pixels", shape[1]),
        )  # fmt: skip


@pytest.mark.parametrize(("kernel", "shape"), PIXELS[2:6])
def test_classes_that_lie_apart(module, kernel, shape):
    for dtype, apart in ((torch.float32, 16), (torch.bfloat16, 8)):
        check(
            module, kernel, logits(shape, dtype), targets(shape), apart=apart, pad=1,
            threads=threads_for(kernel, shape[1]),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize(("kernel", "shape"), [ROWS[1], ROWS[4], PIXELS[2]])
def test_target_dtypes(module, kernel, shape, dtype):
    t = targets(shape, dtype, ignore_index=255)
    check(module, kernel, logits(shape), t, ignore_index=255, threads=threads_for(kernel, shape[1]))


@pytest.mark.parametrize(("kernel", "shape"), [ROWS[1], ROWS[4], ROWS[8], PIXELS[2], PIXELS[5]])
def test_a_bad_target_fails_the_assertion(module, kernel, shape):
    threads = threads_for(kernel, shape[1])
    for value in (-1, shape[1], 2**40):
        t = targets(shape)
        t[0] = value
        _, _, fine = kernels.run(module, kernel, "float32", logits(shape).numpy(), t.numpy(), threads=threads)
        assert not fine


@pytest.mark.parametrize(("kernel", "shape"), [ROWS[1], ROWS[4], ROWS[8], PIXELS[2], PIXELS[5]])
def test_broken_and_ignored_rows(module, kernel, shape):
    inf, nan = float("inf"), float("nan")
    x, t = logits(shape), targets(shape)
    rows = x if x.dim() == 2 else x.movedim(1, -1).reshape(-1, shape[1])
    flat = t.flatten()
    flat[:7] = 0
    rows[0, 0], rows[1, 1] = nan, nan  # the target, a rival
    rows[2, 1] = inf
    rows[3, 0] = -inf
    rows[4], flat[4] = nan, -100
    rows[5, 0] = inf  # separated
    rows[6, 1:] = -inf  # masked
    x = rows if x.dim() == 2 else rows.view(shape[0], shape[2], shape[1]).movedim(-1, 1).contiguous()
    threads = threads_for(kernel, shape[1])
    loss, gradient, fine = kernels.run(
        module, kernel, "float32", x.numpy(), flat.view(t.shape).numpy(), threads=threads, reduction="none"
    )
    assert fine
    loss = loss.ravel()
    gradient = gradient if x.dim() == 2 else np.moveaxis(gradient, 1, -1).reshape(-1, shape[1])
    assert np.isnan(loss[:4]).all()
    assert np.isnan(gradient[:4]).all()
    assert (loss[4:7] == 0).all()
    assert (gradient[4:7] == 0).all()
    assert np.isfinite(gradient[4:]).all()
    expected, expected_gradient = oracle.hem(rows[7:], flat[7:], reduction="none")
    assert_loss(torch.from_numpy(loss[7:].copy()), expected)
    assert_gradient(torch.from_numpy(gradient[7:].copy()), expected_gradient)


@pytest.mark.parametrize(
    ("kernel", "shape"), [("narrow_rows", (5, 1)), ("pixels", (1, 1, 8)), ("many_class_pixels", (1, 1, 5))]
)
def test_one_class(module, kernel, shape):
    x, t = np.zeros(shape, dtype=np.float32), np.zeros((shape[0], *shape[2:]), dtype=np.int64)
    x.flat[:3] = np.nan, np.inf, -np.inf
    threads = threads_for(kernel, 1)
    loss, gradient, _ = kernels.run(module, kernel, "float32", x, t, threads=threads, reduction="none")
    for found in (loss.ravel(), gradient.ravel()):
        assert np.isnan(found[0])
        assert not found[1:].any()


@pytest.mark.parametrize(("kernel", "shape"), [ROWS[1], ROWS[4], ROWS[8], PIXELS[2], PIXELS[5]])
def test_nothing_that_is_counted(module, kernel, shape):
    x, t = logits(shape).numpy(), targets(shape).numpy()
    threads = threads_for(kernel, shape[1])
    for labels, weight in ((np.full_like(t, -100), None), (t, np.zeros(shape[1]))):
        loss, gradient, _ = kernels.run(module, kernel, "float32", x, labels, threads=threads, weight=weight)
        assert loss == 0
        assert not gradient.any()


# Threads that read a target's logit, and numbers that a logit is made of.
@pytest.mark.parametrize(("kernel", "shape", "size", "threads", "numbers"), [
    ("narrow_rows", (130, 10), (), 1, 1), ("warp_rows", (9, 65), (), 32, 1), ("block_rows", (3, 1029), (), 64, 1),
    ("many_class_pixels", (2, 70, 5), (5,), 1, 1), ("upsampled", (2, 40, 2, 3), (5, 7), 1, 4),
])  # fmt: skip
def test_what_is_finished_is_not_looked_at_twice(module, kernel, shape, size, threads, numbers):
    t = torch.randint(0, shape[1], (shape[0], *size))
    looks = []
    for finished in (False, True):
        x = torch.zeros(shape, dtype=torch.float16)
        if finished:
            t.zero_()
            x[:, 0] = 1.0
        module.take_widened()
        loss, gradient, _ = kernels.run(module, kernel, "float16", stored(x), t.numpy(), threads=64)
        looks.append(module.take_widened() / t.numel() / numbers)
        assert (loss == 0) == finished
        assert not (restored(gradient, x).any() and finished)
    rivals = shape[1] - 1
    assert looks == [threads + 2 * rivals, threads + rivals]


def test_a_misaligned_row_that_fills_its_words(module):
    # Its last word takes bits from the one behind it, which no vector of the row writes.
    check(module, "warp_rows", logits((2, 381)), targets((2, 381)), offset=3)


def test_rows_that_lie_far_apart(module):
    # What is not written takes no memory.
    check(module, "warp_rows", logits((3, 100), torch.bfloat16), targets((3, 100)), pad=2**30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gradient_is_rounded_as_torch_rounds(module, dtype):
    bits = torch.randint(0, 0x7A00, (1000,), dtype=torch.int32)
    low, high = (b.to(torch.int16).view(dtype).float() for b in (bits, bits + 1))
    half_way = low + (high - low) / 2
    x, t = torch.tensor([0.0, 1.0]).to(dtype).repeat(1000, 1), np.zeros(1000, dtype=np.int64)
    name = str(dtype).removeprefix("torch.")
    _, gradient, _ = kernels.run(
        module, "narrow_rows", name, stored(x), t, reduction="none", grad_loss=half_way.numpy()
    )
    assert torch.equal(restored(gradient, x)[:, 0], -half_way.to(dtype))


@pytest.mark.parametrize(
    ("kernel", "shape"), [("block_rows", (1, 40_000)), ("warp_rows", (1, 3000)), ("many_class_pixels", (1, 40_000, 1))]
)
def test_equal_errors_are_all_kept(module, kernel, shape):
    x, t = np.zeros(shape, dtype=np.float32), np.zeros((1, *shape[2:]), dtype=np.int64)
    loss, gradient, _ = kernels.run(module, kernel, "float32", x, t, margin=0.3)
    assert loss == pytest.approx(0.3, rel=1e-6)
    assert (gradient[:, 1:] == np.float32(1 / (shape[1] - 1))).all()
    assert (gradient[:, 0] == -1).all()


@pytest.mark.parametrize(
    ("kernel", "fours", "size"),
    [
        ("narrow_rows", 4, ()),
        ("warp_rows", 32, ()),
        ("block_rows", 256, ()),
        ("pixels", 4, (8,)),
        ("many_class_pixels", 32, (1,)),
    ],
)
def test_an_error_equal_to_the_mean_is_kept(module, kernel, fours, size):
    # Errors 0, 3, 1, 0 of every four classes: the mean is exactly 1.
    row = np.array([0.0, 2.0, 0.0, -1.0] + [-1.0, 2.0, 0.0, -1.0] * (fours - 1), dtype=np.float32)
    x = np.tile(row.reshape(1, -1, *[1] * len(size)), (1, 1, *size))
    loss, gradient, _ = kernels.run(
        module, kernel, "float32", x, np.zeros((1, *size), dtype=np.int64), margin=1.0, reduction="none",
        threads=threads_for(kernel, 4 * fours),
    )  # fmt: skip
    assert (loss == 2).all()
    share = 0.5 / fours
    expected = [-1.0, share, share, 0.0] + [0.0, share, share, 0.0] * (fours - 1)
    assert (gradient == np.array(expected).reshape(1, -1, *[1] * len(size))).all()


@pytest.mark.parametrize(("kernel", "shape"), [ROWS[1], ROWS[4], ROWS[8], PIXELS[2], PIXELS[5]])
def test_a_mean_that_underflows_keeps_no_class_without_an_error(module, kernel, shape):
    x, t = np.zeros(shape, dtype=np.float32), np.zeros((shape[0], *shape[2:]), dtype=np.int64)
    x[:, 1] = 2.0**-149  # the least number there is
    loss, gradient, _ = kernels.run(
        module, kernel, "float32", x, t, margin=0.0, reduction="none", threads=threads_for(kernel, shape[1])
    )
    assert (loss == np.float32(2.0**-149)).all()
    assert (gradient[:, 0] == -1).all()
    assert (gradient[:, 1] == 1).all()
    assert not gradient[:, 2:].any()


UPSAMPLED = [  # logits, size of the targets
    ((2, 3, 2, 3), (8, 12)),
    ((1, 40, 3, 5), (6, 7)),
    ((1, 21, 5, 4), (5, 4)),
    ((2, 5, 9, 7), (4, 2)),
    ((1, 2, 1, 1), (3, 5)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "size"), UPSAMPLED)
def test_upsampled(module, shape, size, dtype):
    x = logits(shape, getattr(torch, dtype))
    t = targets((*shape[:2], *size), ignore_index=-100)
    weight, margin = eighths(shape[1]) + 0.25, eighths(shape[1])
    for align_corners, channels_last, reduction in [(False, False, "mean"), (True, True, "none")]:
        wide = x.double().clone().requires_grad_()
        full = F.interpolate(wide, size=size, mode="bilinear", align_corners=align_corners)
        # Away from ties, which the rounding of an interpolation decides.
        options = {"margin": margin + 0.0123, "weight": weight, "reduction": reduction}
        expected, gradient = oracle.hem(full.detach(), t, **options)
        full.backward(gradient)
        loss, found, fine = kernels.run(
            module, "upsampled", dtype, stored(x), t.numpy(), align_corners=align_corners, channels_last=channels_last,
            **{k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()},
        )  # fmt: skip
        assert fine
        torch.testing.assert_close(torch.from_numpy(np.array(loss)).double(), expected, rtol=1e-5, atol=1e-6)
        tolerance = GRADIENT_TOLERANCE[x.dtype] | {"atol": 1e-6}
        tolerance["rtol"] = max(tolerance["rtol"], 1e-5)
        torch.testing.assert_close(restored(np.ascontiguousarray(found), x).double(), wide.grad, **tolerance)


@pytest.mark.parametrize("size", [(6, 4), (3, 8), (3, 4)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_an_axis_that_keeps_its_size_is_not_interpolated(module, size, align_corners):
    """What lies beside a logit counts for nothing there, and 0 times NaN is NaN."""
    x, t = torch.randn(1, 3, 3, 4), torch.zeros(1, *size, dtype=torch.long)
    x[0, 1, 1, 2] = torch.nan
    leaf = x.clone().requires_grad_()
    expected = upsampled_hem_loss(leaf, t, reduction="none", align_corners=align_corners, backend="reference")
    expected.sum().backward()
    loss, found, _ = kernels.run(
        module, "upsampled", "float32", stored(x), t.numpy(), reduction="none", align_corners=align_corners,
        channels_last=False,
    )  # fmt: skip
    torch.testing.assert_close(torch.from_numpy(np.array(loss)), expected.detach(), equal_nan=True)
    torch.testing.assert_close(restored(np.ascontiguousarray(found), x), leaf.grad, equal_nan=True)


# Of class_parallel_hem_loss: its kernels, that of backward, logits, the first class of each share, and the kernel that
# takes them all.
SHARES = [
    ("warp_rows", "narrow_rows", (9, 70), (0, 33), "warp_rows"),
    ("warp_rows", "narrow_rows", (8, 7), (0, 1, 6), "narrow_rows"),
    ("warp_rows", "warp_rows", (8, 257), (0, 130), "warp_rows"),
    ("block_rows", "block_rows", (8, 1029), (0, 500), "block_rows"),
    ("pixels", "pixels", (2, 40, 37), (0, 3), "many_class_pixels"),
    ("pixels", "many_class_pixels", (1, 70, 9), (0, 33), "many_class_pixels"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel", "backward", "shape", "begins", "of_all"), SHARES)
def test_classes_that_are_shared_out(module, kernel, backward, shape, begins, of_all, dtype):
    """No sum of multiples of 1/8 is rounded: the bits are those of all classes in one place."""
    x, t = logits(shape, getattr(torch, dtype)), targets(shape, ignore_index=-100)
    rows = x if x.dim() == 2 else x.movedim(1, -1).reshape(-1, shape[1])
    t.view(-1)[:7] = torch.tensor([0, shape[1] - 1, 1, 0, -100, 2, 3])
    rows[0, 0], rows[1, 0], rows[2, -1] = torch.nan, torch.nan, torch.inf  # the target, rivals
    rows[3, 0], rows[4], rows[5] = torch.inf, torch.nan, 0.0  # finished, ignored, all errors equal
    x = rows if x.dim() == 2 else rows.view(*t.shape, shape[1]).movedim(-1, 1).contiguous()
    own = x.gather(1, t.clamp(min=0).unsqueeze(1)).squeeze(1).double().numpy()
    for margin, grad_loss in ((0.5, None), (eighths(shape[1]).numpy(), torch.randn(t.shape).numpy())):
        options = {"threads": 64, "margin": margin, "grad_loss": grad_loss}
        found = kernels.run_shares(
            module, kernel, backward, dtype, stored(x), own, t.numpy(), begins, pad=1, offset=1, **options
        )
        expected = kernels.run(module, of_all, dtype, stored(x), t.numpy(), reduction="none", **options)
        np.testing.assert_array_equal(found[0], expected[0])
        gradients = (restored(np.ascontiguousarray(g), x) for g in (found[1], expected[1]))
        torch.testing.assert_close(*gradients, rtol=0, atol=0, equal_nan=True)
        assert found[2]
        assert np.isnan(found[0].flat[:3]).all()


@pytest.mark.parametrize(("kernel", "backward", "shape", "begins", "of_all"), SHARES)
def test_a_bad_target_fails_the_assertion_of_every_share(module, kernel, backward, shape, begins, of_all):
    for value in (-1, shape[1], 2**40):
        x, t = logits(shape).numpy(), targets(shape).numpy()
        own = np.zeros(t.shape)
        for labels in (t, np.where(np.arange(t.size).reshape(t.shape) == 1, value, t)):
            *_, fine = kernels.run_shares(module, kernel, backward, "float32", x, own, labels, begins)
            assert fine == (labels is t)


@pytest.mark.parametrize(("kernel", "backward", "shape", "begins", "of_all"), SHARES)
def test_a_share_of_what_is_finished_is_looked_at_once(module, kernel, backward, shape, begins, of_all):
    x, t = torch.zeros(shape, dtype=torch.float16), torch.zeros((shape[0], *shape[2:]), dtype=torch.long)
    looks = []
    for own in (0.0, 1.0):  # the target's logit: with the second one all are finished
        x[:, 0] = own
        module.take_widened()
        loss, gradient, _ = kernels.run_shares(
            module, kernel, backward, "float16", stored(x), np.full(t.shape, own), t.numpy(), begins
        )
        looks.append(module.take_widened() // t.numel())
        assert (loss == 0).all() == (own == 1.0)
        assert not (restored(np.ascontiguousarray(gradient), x).any() and own == 1.0)
    # The target's own logit is not looked at, but to be copied with those beside it.
    assert looks == [2 * shape[1], shape[1]]
