"""The ops of class_parallel_hem_loss, and what stands in for them: shares of the classes, all in one process."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import ARITHMETIC, DTYPES, assert_gradient, assert_loss, eighths, logits, targets
from torch.library import opcheck

from hem_ext import _native, hem, hem_loss
from hem_ext.arguments import DTYPE_CODES
from hem_ext.parallel import _NATIVE, _PLAIN, Share, _backward, _errors, _keep, _with_every_bit


def as_given(x):
    return x


def as_channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def as_transposed(x):
    return x.t().contiguous().t()


def in_shares(x, t, begins, *, margin=0.2, ignore_index=-100, grad_loss=None, ops=_NATIVE, lie=as_given):
    """Each sample's loss and the gradient, of classes that are shared out from each of `begins` on."""
    look, keep, backward = ops
    arithmetic, num_classes = ARITHMETIC[x.dtype], x.shape[1]
    margins = margin.to(arithmetic) if isinstance(margin, torch.Tensor) else None
    ignored = t.long() == ignore_index
    own = x.gather(1, t.long().masked_fill(ignored, 0).unsqueeze(1)).squeeze(1).to(arithmetic).masked_fill(ignored, 0)
    shares = []
    for begin, part in zip(begins, torch.tensor_split(x, begins[1:], 1), strict=True):
        part, rows = hem.in_layout(lie(part))
        shares.append(
            (part, Share(margins, margin if margins is None else 0.0, ignore_index, num_classes, begin, rows))
        )

    of_shares = [look(part, t, own, *share) for part, share in shares]
    errors = torch.stack([sum(e[0] for e in of_shares), torch.stack([e[1] for e in of_shares]).amax(0)])
    kept_of_shares = [keep(part, t, own, errors, *share) for part, share in shares]
    kept = sum(kept for _, kept in kept_of_shares)
    losses = kept[0] / kept[1].clamp(min=1)
    broken = (errors[0].isnan() | own.isnan() | ~losses.isfinite()) & ~ignored
    counts = kept[1].int().masked_fill(broken, num_classes)
    grad_loss = torch.ones_like(losses) if grad_loss is None else grad_loss.to(arithmetic)
    gradients = []
    for (part, share), (mask, _) in zip(shares, kept_of_shares, strict=True):
        if ops is _NATIVE:
            mask = _with_every_bit(mask, broken, part.shape[1], share.rows)
        where = (ignore_index, num_classes, share.first, part.shape[1], DTYPE_CODES[x.dtype], share.rows)
        gradients.append(backward(grad_loss, mask, counts, t, *where))
        assert gradients[-1].stride() == hem.empty_gradient(part, t, *where[3:]).stride()
    return losses.masked_fill(broken, torch.nan), torch.cat(gradients, 1)


# Narrow rows and wide ones, more samples than a block, shares of one class and of a few words.
ROWS = [((37, 10), (0, 3)), ((130, 70), (0, 1, 34)), ((3, 200), (0, 65)), ((2, 1500), (0, 600, 700)), ((5, 1), (0,))]
PIXELS = [((2, 10, 7), (0, 3)), ((1, 40, 150), (0, 39)), ((2, 70, 64), (0, 33)), ((1, 150, 5, 13), (0, 75))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "begins"), ROWS + PIXELS)
@pytest.mark.parametrize("lie", [as_given, as_channels_last, as_transposed])
def test_matches_the_oracle(kernels, dtype, shape, begins, lie):
    if lie is not as_given and (len(shape) == 2) != (lie is as_transposed):
        lie = as_given
    x, t = logits(shape, dtype), targets(shape, ignore_index=-100)
    x[0, 0] = 9.0  # some finished
    for options in ({"margin": 0.5}, {"margin": eighths(shape[1]), "grad_loss": torch.randn(t.shape)}):
        loss, gradient = in_shares(x, t, begins, lie=lie, **options)
        expected, expected_gradient = oracle.hem(x, t, reduction="none", **options)
        assert_loss(loss, expected)
        assert_gradient(gradient, expected_gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "begins"), ROWS + PIXELS)
def test_the_same_in_plain_pytorch(dtype, shape, begins):
    x, t = logits(shape, dtype), targets(shape, torch.int32, ignore_index=1)
    options = {"margin": eighths(shape[1]), "ignore_index": 1, "grad_loss": torch.randn(t.shape)}
    native, plain = (in_shares(x, t, begins, ops=ops, **options) for ops in (_NATIVE, _PLAIN))
    torch.testing.assert_close(native, plain, rtol=0, atol=0)


@pytest.mark.parametrize("ops", [_NATIVE, _PLAIN], ids=["native", "plain"])
@pytest.mark.parametrize("shape", [(7, 10), (7, 150), (7, 10, 1, 30)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_broken_samples(kernels, ops, shape, dtype):
    x, t = logits(shape, dtype), targets(shape)
    last = shape[1] - 1
    t[:7] = torch.tensor([0, last, 1, 0, -100, last, 2]).view(7, *[1] * (t.dim() - 1))
    x[0, 0], x[1, 0], x[2, -1] = torch.nan, torch.nan, torch.inf  # the target, rivals
    x[3, 0], x[4], x[5, :-1] = torch.inf, torch.nan, -torch.inf  # finished, ignored, finished
    loss, gradient = in_shares(x, t, (0, 3), ops=ops)
    for found in (loss[:3], gradient[:3]):
        assert found.isnan().all()
    for found in (loss[3:6], gradient[3:6]):
        assert not found.any()
    expected, expected_gradient = oracle.hem(x[6:], t[6:], reduction="none")
    assert_loss(loss[6:], expected)
    assert_gradient(gradient[6:], expected_gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(700, 10), (64, 1000), (2, 21, 64, 65)])
def test_every_instruction_set_and_thread_count_gives_the_same_bits(dtype, shape):
    threads, before = torch.get_num_threads(), _native.library.cpu_isa()
    x, t = torch.randn(shape).to(dtype), targets(shape)
    try:
        results = []
        for isa in _native.library.available_cpu_isas():
            _native.library.select_cpu_isa(isa)
            for n in (1, 2, 5):
                torch.set_num_threads(n)
                results.append(in_shares(x, t, (0, 3, 7)))
        assert all(torch.equal(a, results[0][0]) and torch.equal(b, results[0][1]) for a, b in results[1:])
    finally:
        torch.set_num_threads(threads)
        _native.library.select_cpu_isa(before)


@pytest.mark.parametrize("shape", [(37, 10), (37, 100), (1, 10, 200)])
def test_what_is_finished_is_not_looked_at_again(kernels, shape):
    x, t = logits(shape), targets(shape)
    finished = torch.zeros(t.shape, dtype=torch.bool)
    finished.view(-1)[: t.numel() * 9 // 10] = True  # others in the last tiles alone
    x.scatter_(1, t.unsqueeze(1), torch.where(finished, 9.0, 0.0).unsqueeze(1))
    own = torch.where(finished, 9.0, 0.0)
    x, rows = hem.in_layout(x)
    share = Share(None, 0.2, -100, shape[1], 0, rows)
    errors = _errors(x, t, own, *share)
    expected = _keep(x, t, own, errors, *share)
    tiles = finished.view(-1)[: t.numel() // 64 * 64].view(-1, 64).all(1).repeat_interleave(64)
    unseen = torch.zeros(t.numel(), dtype=torch.bool)
    unseen[: tiles.numel()] = tiles
    if rows:
        unseen = finished.view(-1) if shape[1] > 64 else finished.view(-1) & (torch.arange(t.numel()) < 32)
    assert unseen.any()
    x.movedim(1, -1)[unseen.view(t.shape)] = 99.0
    found = _keep(x, t, own, errors, *share)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("shape", [(6, 40), (2, 40, 3, 5)])
@pytest.mark.parametrize("rows", [True, False])
def test_the_ops_are_what_they_say(shape, rows):
    if len(shape) == 2:
        x = logits(shape) if rows else as_transposed(logits(shape))
    else:
        x = as_channels_last(logits(shape)) if rows else logits(shape)
    t, checks = targets((shape[0], 90, *shape[2:])), ("test_schema", "test_faketensor")
    share = (eighths(90), 0.0, -100, 90, 40, rows)
    own = torch.zeros(t.shape)
    opcheck(_errors, (x, t, own, *share), test_utils=checks)
    errors = _errors(x, t, own, *share)
    opcheck(_keep, (x, t, own, errors, *share), test_utils=checks)
    mask, kept = _keep(x, t, own, errors, *share)
    given = (torch.ones(t.shape), mask, kept[1].int(), t, -100, 90, 40, 40, 0, rows)
    opcheck(_backward, given, test_utils=checks)
    with pytest.raises(RuntimeError, match=r"no gradient of its own: call hem_ext\.parallel\.class_parallel_hem_loss"):
        _errors(x.requires_grad_(), t, own, *share)


def test_the_ops_stay_inside_their_memory():
    x, t, own = logits((6, 40)), targets((6, 90)), torch.zeros(6)
    errors = torch.zeros(2, 6)
    share = {"margins": None, "margin": 0.2, "ignore_index": -100, "num_classes": 90, "first": 40, "rows": True}
    given = {"input": x, "target": t, "target_logits": own, **share}
    mask, kept = _keep(**given, errors=errors)
    for change, words in [
        ({"first": 51}, "40 classes from class 51 on are no share of 90"),
        ({"first": -1}, "40 classes from class -1 on are no share of 90"),
        ({"num_classes": 39, "first": 0}, "40 classes from class 0 on are no share of 39"),
        ({"num_classes": 2**31}, "are no share of 2147483648"),
        ({"margins": torch.ones(40)}, r"margin must be contiguous, of shape \[90\]"),
        ({"target": t[:5]}, "expected targets of sizes"),
        ({"target_logits": own[:5]}, "target_logits must be contiguous, 1 for each sample"),
        ({"target_logits": own.double()}, "target_logits must be contiguous, 1 for each sample"),
        ({"rows": False}, "do not lie in memory as pixels"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            _errors(**given | change)
        with pytest.raises(RuntimeError, match=words):
            _keep(**given | change, errors=errors)
    for wrong in (torch.zeros(6), torch.zeros(2, 6).double(), torch.zeros(6, 2).t()):
        with pytest.raises(RuntimeError, match="errors must be contiguous, 2 for each sample"):
            _keep(**given, errors=wrong)
    given = {
        "grad_loss": torch.ones(6), "mask": mask, "counts": kept[1].int(), "target": t, "ignore_index": -100,
        "num_classes": 90, "first": 40, "num_here": 40, "dtype": 0, "rows": True,
    }  # fmt: skip
    _backward(**given)
    for change, words in [
        ({"first": 51}, "40 classes from class 51 on are no share of 90"),
        ({"num_here": 70, "first": 0}, "mask must be contiguous int32"),
        ({"counts": kept[1]}, "counts must be contiguous int32, one for each sample"),
        ({"counts": kept[1].int()[:5]}, "counts must be contiguous int32, one for each sample"),
        ({"mask": mask[:5]}, "mask must be contiguous int32"),
        ({"grad_loss": torch.ones(())}, "do not fit the loss"),
        ({"dtype": 9}, "no type of logits of code 9"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            _backward(**given | change)


@pytest.mark.parametrize("target", [-1, 90, 2**40, -(2**40)])
def test_a_bad_target_reads_nothing_that_is_not_there(target):
    """On a CPU, where it is told before: here it is as if it were ignored."""
    for shape in ((3, 40), (3, 70), (3, 40, 5)):
        x, t = logits(shape), torch.full((3, *shape[2:]), target)
        x, rows = hem.in_layout(x)
        share = Share(torch.ones(90), 0.0, -100, 90, 10, rows)
        errors = _errors(x, t, torch.zeros(t.shape), *share)
        assert not errors.any()
        mask, kept = _keep(x, t, torch.zeros(t.shape), errors + 1, *share)
        assert not mask.any()
        assert not kept.any()


def test_one_share_is_the_loss():
    x, t = torch.randn(50, 30), targets((50, 30))
    loss, gradient = in_shares(x, t, (0,))
    y = x.clone().requires_grad_()
    expected = hem_loss(y, t, reduction="none")
    expected.sum().backward()
    assert torch.equal(loss, expected.detach())
    assert torch.equal(gradient, y.grad)
