"""A mean over the active samples of a step whose batch is split, and what a call counts."""

import math
import re

import oracle
import pytest
import torch
from cases import DTYPES, REDUCTIONS, eighths, logits, targets
from torch import nn

from hem_ext import HEMLoss, divide_gradients, hem_loss


def counted(x, t, margin, ignore_index):
    """What the samples have, by scalar loops: loss and kept errors, without those that are ignored."""
    found = []
    samples = x.movedim(1, -1).reshape(-1, x.shape[1]).double().tolist()
    for y, label in zip(samples, t.flatten().tolist(), strict=True):
        if label == ignore_index:
            continue
        errors = [max(0.0, v - y[label] + margin[label]) if j != label else 0.0 for j, v in enumerate(y)]
        kept = [e for e in errors if e > 0 and e >= sum(errors) / len(errors)]
        found.append((label, sum(kept) / max(len(kept), 1), len(kept)))
    return found


@pytest.mark.parametrize("shape", [(9, 5), (3, 70), (2, 5, 4, 3), (4, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_call_counts(device, backend, shape, dtype):
    x, t = logits(shape, dtype), targets(shape, ignore_index=-100)
    margin, weight = eighths(shape[1]), eighths(shape[1])
    weight[0] = 0
    criterion = HEMLoss(weight, margin=margin, backend=backend, stats=True)
    assert criterion.stats is None
    criterion(x, t)
    found = counted(x, t, margin.tolist(), -100)
    active = [(weight[label].item(), loss, kept) for label, loss, kept in found if loss > 0 and weight[label] > 0]
    count = max(len(active), 1)
    expected = [sum(w for w, _, _ in active), sum(weight[label].item() for label, _, _ in found)]
    expected += [len(active) / max(len(found), 1)]
    expected += [sum(kept for _, _, kept in active) / count, sum(loss for _, loss, _ in active) / count]
    torch.testing.assert_close([s.item() for s in criterion.stats], list(map(float, expected)), rtol=1e-5, atol=1e-6)
    assert all(not s.requires_grad and s.shape == () for s in criterion.stats)
    assert {s.dtype for s in criterion.stats} == {torch.float64 if dtype == torch.float64 else torch.float32}


def test_what_one_sample_counts(device, backend):
    criterion = HEMLoss(margin=0.25, stats=True, backend=backend)
    for x, t in ([[0.0, 0.0, -1.0]], [0]), ([[0.0, 0.0, -1.0], [0.0, 9.0, 0.0]], [0, 1]):
        criterion(torch.tensor(x), torch.tensor(t))
        assert [s.item() for s in criterion.stats] == [1.0, len(t), 1 / len(t), 1.0, 0.25]
        assert {s.dtype for s in criterion.stats} == {torch.float32}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 4, 3)])
def test_the_loss_is_that_without(device, backend, shape, reduction):
    x, t = logits(shape).requires_grad_(), targets(shape, ignore_index=-100)
    options = {"weight": eighths(5), "margin": eighths(5), "reduction": reduction}
    expected = hem_loss(x, t, **options)
    grad_loss = torch.rand_like(expected)
    loss = HEMLoss(**options, stats=True, backend=backend)(x, t)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, x, grad_loss)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
    if reduction in ("mean", "batchmean"):
        module = HEMLoss(**options, stats=True, backend=backend)
        torch.testing.assert_close(module(x, t, normalizer=4.0), hem_loss(x, t, **options, normalizer=4.0))


def test_nothing_that_is_active(device, backend):
    criterion = HEMLoss(stats=True, backend=backend)
    for x, t in (
        (torch.zeros(3, 4), torch.full((3,), -100)),
        (torch.eye(3), torch.arange(3)),
        (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
    ):
        criterion(x, t)
        active, _, *rest = (s.item() for s in criterion.stats)
        assert [active, *rest] == [0.0, 0.0, 0.0, 0.0]


def test_stats_of_a_compiled_call(device, backend):
    x, t = logits((6, 5)), targets((6, 5))
    criterion = HEMLoss(stats=True, backend=backend)
    criterion(x, t)
    compiled = HEMLoss(stats=True, backend=backend)
    loss = torch.compile(compiled, backend="aot_eager", fullgraph=True)(x, t)
    torch.testing.assert_close(loss, criterion(x, t))
    torch.testing.assert_close(list(compiled.stats), list(criterion.stats))


def test_stats_check_what_the_loss_checks(device, backend):
    x, t = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
    criterion = HEMLoss(stats=True, backend=backend)
    with pytest.raises(ValueError, match=r"expected target of shape \(4,\)"):
        criterion(x, t[:3])
    if device == "cpu":
        with pytest.raises(IndexError, match=r"target\[2\] is 9"):
            criterion(x, t.where(t < 2, 9))
        weighted = HEMLoss(torch.ones(3), stats=True, backend=backend)
        weighted.weight[1] = -1
        with pytest.raises(ValueError, match=r"weight\[1\] is -1"):
            weighted(x, t)
    assert criterion.stats is None
    with pytest.raises(TypeError, match="stats must be True or False, got 1"):
        HEMLoss(stats=1)
    with pytest.raises(ValueError, match="stats=True and overwrite_input=True"):
        HEMLoss(stats=True, overwrite_input=True)


@pytest.mark.parametrize("weighted", [False, True])
def test_micro_batches_divide_as_one_batch(device, backend, weighted):
    torch.manual_seed(0)
    model = nn.Linear(4, 5).double()
    x, t = torch.randn(12, 4).double(), targets((12, 5), ignore_index=-100)
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5]).double() if weighted else None
    _, gradient = oracle.hem(model(x).detach(), t, weight=weight)
    expected = gradient.t().cpu() @ x.cpu()
    criterion = HEMLoss(weight, reduction="sum", stats=True, backend=backend)
    active = 0.0
    for part in (slice(0, 1), slice(1, 9), slice(9, 9), slice(9, 12)):
        criterion(model(x[part]), t[part]).backward()
        active = active + criterion.stats.active
    divide_gradients(model.parameters(), active)
    torch.testing.assert_close(model.weight.grad.cpu(), expected)
    before = model.weight.grad.clone()
    divide_gradients(model.parameters(), 0)
    divide_gradients([torch.zeros(1)], torch.tensor(2))  # without a gradient
    assert torch.equal(model.weight.grad, before)
    divide_gradients(iter(model.parameters()), 2)
    torch.testing.assert_close(model.weight.grad, before / 2)


@pytest.mark.parametrize(
    ("divisor", "error", "words"),
    [
        (-1, ValueError, "divisor must be finite and not negative, got -1"),
        (math.nan, ValueError, "got nan"),
        ("all", TypeError, "divisor must be a number or a tensor of one, got 'all'"),
        (torch.ones(2), ValueError, "of shape (2,)"),
        (torch.ones((), requires_grad=True), ValueError, "detach it"),
    ],
)
def test_what_nothing_is_divided_by(divisor, error, words):
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    with pytest.raises(error, match=re.escape(words)):
        divide_gradients([parameter], divisor)
    with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed\.ProcessGroup or None, got str"):
        divide_gradients([parameter], 1, process_group="world")
    assert parameter.grad == 1
