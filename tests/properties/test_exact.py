"""Every op against exact arithmetic: `make fuzz` tries 10,000 cases of each."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from cases import ARITHMETIC
from hypothesis import given
from hypothesis import strategies as st
from properties import strategies as s
from properties.checks import as_rows, check, check_gradient, coefficients_of, instruction_set, outcome, rows_of
from properties.exact import (
    FORMATS,
    IGNORED,
    Range,
    check_losses,
    check_numbers,
    check_rows,
    gradients,
    kept_by_gradient,
    product,
    reduce,
)
from properties.interpolation import interpolated, pixels_of, touched
from properties.pair import Pair

from hem_ext import HEMLoss, UpsampledHEMLoss, hem_loss, linear_hem_loss, upsampled_hem_loss
from hem_ext.mix import MixedHEMLoss, mixed_hem_loss


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    processes = Pair(tmp_path_factory.mktemp("pair"))
    yield processes
    processes.close()


@given(case=s.of_logits(), form=st.sampled_from(["function", "module", "view of a leaf", "overwritten"]))
def test_hem_loss(case, form):
    x = case.input
    dim = 0 if x.dim() == 1 else 1

    def call(grad_loss, **options):
        leaf = x.detach().requires_grad_()
        if form == "view of a leaf":
            leaf = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).requires_grad_()
            leaf = leaf.as_strided(x.shape, x.stride(), x.storage_offset())
        if form == "overwritten" and options["backend"] != "reference":
            leaf = leaf.clone(memory_format=torch.contiguous_format)
            options["overwrite_input"] = True
        loss = hem_loss(leaf, case.target, **options) if form != "module" else HEMLoss(**options)(leaf, case.target)
        return outcome(loss, leaf, grad_loss)

    with instruction_set(case.isa):
        check(case, call, x.shape[dim])


# --- upsampled ----------------------------------------------------------------------------------------------------


def kept_by_mask(mask: torch.Tensor, labels: torch.Tensor, num_classes: int) -> list[set[int]]:
    """Of every pixel, from the bits that are saved for backward: (N, words, H * W)."""
    words = mask.movedim(1, -1).flatten(0, 1).tolist()
    return [
        {j for j in range(num_classes) if of_pixel[j // 32] >> (j % 32) & 1 and j != t}
        for of_pixel, t in zip(words, labels.flatten().tolist(), strict=True)
    ]


@given(drawn=s.of_coarse_logits(), as_module=st.booleans())
def test_upsampled_hem_loss(drawn, as_module):
    case, up = drawn
    x, num_classes, of = case.input, case.input.shape[1], FORMATS[ARITHMETIC[case.input.dtype]]
    saved = []

    def call(grad_loss, **options):
        leaf = x.detach().requires_grad_()
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            if as_module:
                loss = UpsampledHEMLoss(align_corners=up.align_corners, **options)(leaf, case.target)
            else:
                loss = upsampled_hem_loss(leaf, case.target, align_corners=up.align_corners, **options)
        return outcome(loss, leaf, grad_loss, keeps_format=case.backend != "reference")

    def kept_of_full_size():
        """In plain PyTorch nothing of it is saved; it is the two steps."""
        full = torch.nn.functional.interpolate(
            x.to(ARITHMETIC[x.dtype]), case.labels.shape[1:], mode="bilinear", align_corners=up.align_corners
        ).requires_grad_()
        _, gradient = outcome(hem_loss(full, case.target, **case.plain_options), full)
        return kept_by_gradient(rows, as_rows(gradient), full.dtype)

    logits, slack = interpolated(x, up.rows, up.columns, up.are_exact, of)
    rows = rows_of(logits, case, of, slack)
    with instruction_set(case.isa):
        losses, gradient = call(None, **case.plain_options)
        if x.shape[2:] == case.labels.shape[1:]:
            kept = kept_by_gradient(rows, as_rows(gradient), x.dtype)
        elif case.backend == "reference":
            kept = kept_of_full_size()
        else:
            kept = kept_by_mask(saved[0], case.labels, num_classes)
        loss, gradient = call(case.grad_loss, **case.options)
    found = check_rows(rows, losses.double().flatten().tolist(), kept, of)
    expected, coefficients = coefficients_of(case, rows, found, case.sample_weights)
    check_losses(loss, expected, of)
    check_coarse_gradient(gradient, gradients(rows, found, coefficients, num_classes), up, of)


def as_tensor(of_rows):
    return torch.tensor([[torch.nan if v is None else v for v in g] for g in of_rows], dtype=torch.float64)


def check_coarse_gradient(gradient, of_pixels, up, of):
    """`gradient` against that of the pixels, brought back to the logits they lie between."""
    images, num_classes, *size = gradient.shape
    full = as_tensor(of_pixels)
    full = full.view(images, len(up.rows.matrix), len(up.columns.matrix), num_classes)
    is_nan = torch.zeros(gradient.shape, dtype=torch.bool)
    for y, x in pixels_of(up.rows, up.columns):
        for i, k, _ in touched(up.rows, up.columns, (y, x)):
            is_nan[:, :, i, k] |= full[:, y, x].isnan()
    full = full.nan_to_num(nan=0.0)
    expected = torch.einsum("nyxc,yi,xk->ncik", full, up.rows.as_tensor(size[0]), up.columns.as_tensor(size[1]))
    # Rounding moves the share of each pixel, and what is added up for one logit.
    off = float(2 * (up.rows.off + up.columns.off) + (full[0, ..., 0].numel() + 32) * of.unit)
    off = (full.abs().sum((1, 2)) * off).view(images, num_classes, 1, 1).expand(gradient.shape)
    values = zip(expected.flatten().tolist(), is_nan.flatten().tolist(), strict=True)
    check_numbers(
        gradient.double().flatten().tolist(),
        [None if nan else v for v, nan in values],
        gradient.dtype,
        off=off.flatten().tolist(),
        what="gradient",
    )


# --- classifier and loss in one -------------------------------------------------------------------------------------


@given(drawn=s.of_hidden())
def test_linear_hem_loss(drawn):
    case, made_by = drawn
    num_classes, dtype, of = case.input.shape[1], case.input.dtype, FORMATS[ARITHMETIC[case.input.dtype]]
    features = made_by.weight.shape[1] - num_classes
    given = (made_by.hidden, made_by.weight, made_by.bias)

    def call(grad_loss, **options):
        leaves = [None if x is None else x.detach().requires_grad_() for x in given]
        options["class_weight"] = options.pop("weight", None)
        options |= {"chunk_size": made_by.chunk_size, "skip_finished": made_by.skip_finished}
        loss = linear_hem_loss(*leaves, case.target, **options)
        wanted = [x for x in leaves if x is not None]
        found = torch.autograd.grad(loss, wanted, torch.ones_like(loss) if grad_loss is None else grad_loss)
        for x, gradient in zip(wanted, found, strict=True):
            assert gradient.dtype == dtype
            assert gradient.shape == x.shape
        hidden = found[0].movedim(1, -1) if made_by.weight.dim() > 2 else found[0]
        return (
            loss.detach(),
            hidden.reshape(-1, hidden.shape[-1]),
            *(x.flatten(1) if x.dim() > 1 else x for x in found[1:]),
        )

    rows = rows_of(case.input.double().tolist(), case, of, made_by.slack)
    with instruction_set(case.isa):
        losses, of_hidden, *_ = call(None, **case.plain_options)
        kept = kept_by_gradient(rows, of_hidden[:, features:].double().tolist(), dtype)
        loss, *found = call(case.grad_loss, **case.options)
    checked = check_rows(rows, losses.double().flatten().tolist(), kept, of)
    expected, coefficients = coefficients_of(case, rows, checked, case.sample_weights)
    assert loss.shape == (case.labels.shape if case.reduction == "none" else ())
    check_losses(loss, expected, of)
    g = as_tensor(gradients(rows, checked, coefficients, num_classes)).view(-1, num_classes)
    is_nan = g.isnan().any(1, keepdim=True)
    g, h, w = (x.nan_to_num(0.0, 0.0, 0.0) for x in (g, made_by.rows, made_by.weight.flatten(1)))
    pairs = [(g, w, is_nan), (g.t(), h, is_nan.any()), (g.new_ones(1, len(g)), g, is_nan.any())]
    # The gradient of the logits is rounded to their dtype before it is multiplied.
    relative = 2 * float(FORMATS[dtype].unit) + (2 * len(rows) + 2 * num_classes + 16) * float(of.unit)
    for gradient, (left, right, nan) in zip(found, pairs, strict=False):
        expected_gradient, off = product(left, right, FORMATS[dtype], relative)
        values = zip(expected_gradient.flatten().tolist(), nan.expand_as(off).flatten().tolist(), strict=True)
        check_numbers(
            gradient.double().flatten().tolist(),
            [None if is_broken else v for v, is_broken in values],
            dtype,
            off=off.flatten().tolist(),
        )


# --- mixed targets --------------------------------------------------------------------------------------------------


@given(drawn=s.of_mixed(), as_module=st.booleans())
def test_mixed_hem_loss(drawn, as_module):
    case, target_b, labels_b, lam, lams = drawn
    x, dtype, of = case.input, case.input.dtype, FORMATS[ARITHMETIC[case.input.dtype]]
    num_classes = x.shape[0 if x.dim() == 1 else 1]
    share = torch.where(case.labels == labels_b, 1.0, lams).flatten().tolist()
    both = []  # each sample's first target, then each one's second
    for labels, target, of_target in (
        (case.labels, case.target, [Fraction(v) for v in share]),
        (labels_b, target_b, [1 - Fraction(v) for v in share]),
    ):
        # A sample without a share is ignored.
        single = replace(case, labels=labels, target=target)
        rows = [r if v else IGNORED for r, v in zip(rows_of(as_rows(x), single, of), of_target, strict=True)]
        with instruction_set(case.isa):
            leaf = x.detach().requires_grad_()
            losses, gradient = outcome(hem_loss(leaf, target, **case.plain_options), leaf)
        alone = list(zip(losses.double().flatten().tolist(), as_rows(gradient), of_target, strict=True))
        kept = kept_by_gradient(rows, [g if v else [] for _, g, v in alone], dtype)
        found = check_rows(rows, [loss if v else 0.0 for loss, _, v in alone], kept, of)
        both.append((rows, found, [a * b for a, b in zip(single.sample_weights, of_target, strict=True)]))
    rows, found, weights = (a + b for a, b in zip(*both, strict=True))

    with instruction_set(case.isa):
        leaf = x.detach().requires_grad_()
        if as_module:
            loss = MixedHEMLoss(**case.options)(leaf, case.target, target_b, lam)
        else:
            loss = mixed_hem_loss(leaf, case.target, target_b, lam, **case.options)
        loss, gradient = outcome(loss, leaf, case.grad_loss)
    expected = reduce(rows, found, weights, case.reduction, None, of)
    count = len(rows) // 2
    if case.reduction == "none":
        pairs = zip(expected.losses[:count], expected.losses[count:], strict=True)
        sums = [None if a is None or b is None else Range(a.low + b.low, a.high + b.high) for a, b in pairs]
        expected = expected._replace(losses=[r and r.widened(2 * of.unit) for r in sums])
    assert loss.shape == (case.labels.shape if case.reduction == "none" else ())
    check_losses(loss, expected, of)
    grads = [Fraction(g) for g in case.grad_loss.double().flatten().tolist()]
    grads = 2 * grads if case.reduction == "none" else 2 * count * grads
    coefficients = [f * g for f, g in zip(expected.factors, grads, strict=True)]
    parts = gradients(rows, found, coefficients, num_classes)
    unit = 2 * float(FORMATS[dtype].unit) + (4 * count + 8) * float(of.unit)
    for a, first, second in zip(as_rows(gradient), parts[:count], parts[count:], strict=True):
        pairs = list(zip(first, second, strict=True))
        sums = [None if None in pair else sum(pair) for pair in pairs]
        most = [0.0 if None in p else abs(p[0]) + abs(p[1]) for p in pairs]
        check_numbers(a, sums, dtype, off=[math.inf if m > FORMATS[dtype].largest else unit * m for m in most])


# --- classes that are shared out --------------------------------------------------------------------------------------


@given(drawn=s.of_shares())
def test_class_parallel_hem_loss(pair, drawn):
    case, parts = drawn

    def call(grad_loss, *, backend, **options):
        options |= {"backend": backend, "isa": case.isa}
        (loss, first), (again, second) = pair([(part, case.target, grad_loss, options) for part in parts])
        torch.testing.assert_close(again, loss, rtol=0, atol=0, equal_nan=True)
        for part, gradient in zip(parts, (first, second), strict=True):
            check_gradient(gradient, part)
        return loss, torch.cat([first, second], 1)

    check(case, call, case.input.shape[1])
