"""What has to be so of every op, whatever the right answer is."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import ARITHMETIC, REDUCTIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import strategies as s
from properties.ops import OPS
from properties.pair import Pair

# There are many of these: a tenth of the cases each.
a_tenth = settings(max_examples=max(1, settings().max_examples // 10))
any_reduction = st.sampled_from(REDUCTIONS)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    processes = Pair(tmp_path_factory.mktemp("pair"))
    yield processes
    processes.close()


@pytest.fixture(scope="module", params=OPS)
def op(request, pair):
    """An op, to which `call` is bound."""
    found = OPS[request.param]
    return found._replace(call=partial(found.call, pair))


def assert_equal(found, expected):
    """Losses and gradients to the last bit."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_near(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2**-18, atol=1e-30, equal_nan=True)


@a_tenth
@given(data=st.data(), reduction=any_reduction)
def test_a_constant_added_to_a_row(op, data, reduction):
    batch = data.draw(s.batches(s.EXACT, **op.drawn))
    g = s.from_seed(data.draw(s.seeds))
    shape = (batch.x.shape[0], 1, *batch.x.shape[2:])
    moved = replace(batch, x=batch.x + (torch.randint(-16, 17, shape, generator=g) / 8).to(batch.x.dtype))
    assert_equal(moved.call(op.call, reduction), batch.call(op.call, reduction))


@a_tenth
@given(data=st.data(), reduction=any_reduction)
def test_permuted_classes(op, data, reduction):
    batch = data.draw(s.batches(s.EXACT, **op.drawn))
    order = torch.randperm(batch.num_classes, generator=s.from_seed(data.draw(s.seeds)))
    places = order.argsort()
    permuted = s.Batch(
        batch.x[:, order],
        tuple(torch.where(t >= 0, places[t.clamp(min=0)], t) for t in batch.labels),
        {name: v[order] if isinstance(v, torch.Tensor) else v for name, v in batch.options.items()},
    )
    loss, gradient = batch.call(op.call, reduction)
    assert_equal(permuted.call(op.call, reduction), (loss, gradient[:, order]))


@a_tenth
@given(data=st.data())
def test_permuted_samples(op, data):
    batch = data.draw(s.batches(op.kinds, **op.drawn))
    order = torch.randperm(len(batch.x), generator=s.from_seed(data.draw(s.seeds)))
    permuted = replace(batch, x=batch.x[order], labels=tuple(t[order] for t in batch.labels))
    loss, gradient = batch.call(op.call)
    assert_equal(permuted.call(op.call), (loss[order], gradient[order]))


@a_tenth
@given(data=st.data())
def test_pixels_are_rows(op, data):
    if op.is_coarse:
        return  # its pixels are not logits
    batch = data.draw(s.batches(s.EXACT, **op.drawn))
    of_rows = batch.x.movedim(1, -1)
    rows = replace(batch, x=of_rows.reshape(-1, batch.num_classes), labels=tuple(t.flatten() for t in batch.labels))
    loss, gradient = batch.call(op.call)
    found, of_found = rows.call(op.call)
    assert_equal((found.view(loss.shape), of_found.view(of_rows.shape).movedim(-1, 1)), (loss, gradient))
    for reduction in REDUCTIONS[:3]:
        assert_near(rows.call(op.call, reduction)[0], batch.call(op.call, reduction)[0])


@a_tenth
@given(data=st.data(), reduction=any_reduction)
def test_scaled_logits_and_margins(op, data, reduction):
    batch = data.draw(s.batches(op.finite(), **op.drawn))
    is_narrow = batch.x.dtype == torch.float16
    if is_narrow:
        batch = replace(batch, x=(batch.x * 8).round() / 8)
    scale = 2.0 ** data.draw(st.integers(-3, 3) if is_narrow else st.integers(-20, 20))
    scaled = replace(batch, x=batch.x * scale, options={**batch.options, "margin": batch.options["margin"] * scale})
    loss, gradient = batch.call(op.call, reduction)
    assert_equal(scaled.call(op.call, reduction), (loss * scale, gradient))


@a_tenth
@given(data=st.data(), reduction=any_reduction)
def test_weight_0_is_to_be_ignored(op, data, reduction):
    batch = data.draw(s.batches(op.finite(), **op.drawn))
    weight = batch.options.get("weight", torch.ones(batch.num_classes)).clone()
    c = data.draw(st.integers(0, batch.num_classes - 1))
    ignored = tuple(t.masked_fill(t == c, -100) for t in batch.labels)
    expected = replace(batch, labels=ignored).call(op.call, reduction, weight=weight)
    weight[c] = 0.0
    assert_equal(batch.call(op.call, reduction, weight=weight), expected)


@a_tenth
@given(data=st.data())
def test_reductions_of_none(op, data):
    batch = data.draw(s.batches(op.finite(), with_weight=op.targets == 1, **op.drawn))
    losses, gradient = batch.call(op.call)
    total, of_total = batch.call(op.call, "sum")
    assert_near(total, losses.double().sum())
    assert_equal([of_total], [gradient])
    if op.targets > 1:
        return  # a sample is counted in parts
    labels = batch.labels[0]
    weights = batch.options.get("weight", torch.ones(batch.num_classes))[labels.clamp(min=0)].double()
    weights = weights.masked_fill(labels == -100, 0.0)
    for reduction, counted in (("mean", losses > 0), ("batchmean", labels != -100)):
        count = weights[counted].sum()
        assert_near(batch.call(op.call, reduction)[0], losses.double().sum() / (count or 1.0))


@a_tenth
@given(data=st.data(), reduction=any_reduction)
def test_what_is_ignored_may_hold_anything(op, data, reduction):
    batch = data.draw(s.batches(op.finite(), **op.drawn))
    shape = batch.x[:, 0].shape
    garbage = torch.rand(shape, generator=s.from_seed(data.draw(s.seeds))) < data.draw(st.sampled_from([0.2, 0.9]))
    reached = garbage
    if op.is_coarse:
        # All pixels between which and it there is no other logit, also those that lie on the ones beside it.
        near = F.max_pool2d(garbage.float(), 3, stride=1, padding=1) if len(garbage) else garbage.float()
        reached = F.interpolate(near.unsqueeze(1), size=batch.labels[0].shape[1:], mode="bilinear").squeeze(1) > 0
    batch = replace(batch, labels=tuple(t.masked_fill(reached, -100) for t in batch.labels))
    loss, gradient = batch.call(op.call, reduction)
    kinds = ("broken", "the largest", "drawn")
    values = data.draw(s.numbers(batch.x.numel(), batch.x.dtype, kinds)).view(batch.x.shape)
    values = torch.where(torch.rand(values.shape) < 0.5, torch.nan, values) if data.draw(st.booleans()) else values
    found = replace(batch, x=torch.where(garbage.unsqueeze(1), values, batch.x)).call(op.call, reduction)
    assert_equal(found, (loss, gradient))
    assert not found[1][garbage.unsqueeze(1).expand_as(batch.x)].any()


@a_tenth
@given(data=st.data(), reduction=any_reduction)
def test_gradients_of_a_row_sum_to_0(op, data, reduction):
    batch = data.draw(s.batches(op.finite(), **op.drawn))
    _, gradient = batch.call(op.call, reduction)
    of_rows = gradient.double()
    unit = torch.finfo(gradient.dtype).eps
    least = torch.finfo(gradient.dtype).smallest_normal * unit * batch.num_classes
    assert (of_rows.sum(1).abs() <= 4 * unit * of_rows.abs().sum(1) + least).all()


@a_tenth
@given(data=st.data(), reduction=st.sampled_from(["mean", "batchmean"]), normalizer=st.sampled_from([1.0, 3.0, 0.7]))
def test_a_batch_in_two_parts(op, data, reduction, normalizer):
    batch = data.draw(s.batches(op.finite(), **op.drawn))
    options = {"normalizer": normalizer} if op.takes_normalizer else {}
    reduction = reduction if op.takes_normalizer else "sum"
    at = data.draw(st.integers(0, len(batch.x)))
    losses, gradients = zip(
        *[
            replace(batch, x=batch.x[part], labels=tuple(t[part] for t in batch.labels)).call(
                op.call, reduction, **options
            )
            for part in (slice(at), slice(at, None))
        ],
        strict=True,
    )
    loss, gradient = batch.call(op.call, reduction, **options)
    assert_near(sum(losses), loss)
    assert_equal([torch.cat(gradients)], [gradient])
    if op.takes_normalizer:
        # The normalizer of all is what it would count itself.
        counted = torch.ones_like(batch.labels[0], dtype=ARITHMETIC[batch.x.dtype])
        weight = batch.options.get("weight", torch.ones(batch.num_classes))
        counted *= weight[batch.labels[0].clamp(min=0)] * (batch.labels[0] != -100)
        if reduction == "mean":
            counted *= batch.call(op.call, weight=None)[0] > 0
        own = batch.call(op.call, reduction)[0]
        assert_near(batch.call(op.call, reduction, normalizer=counted.sum())[0], own)
