"""What nobody means to give, to every op: the loss it has by definition, or a sentence about what is wrong with it.

Kinds of memory, numbers and upstream gradients are drawn in test_exact.py; these are the rest.
"""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial

import guard_pages
import pytest
import torch
from cases import REDUCTIONS, targets
from properties.ops import OPS
from properties.pair import Pair

from hem_ext import hem_loss, linear_hem_loss, parallel, reference, upsampled_hem_loss
from hem_ext.mix import mixed_hem_loss

LEAST, MOST = -(2**63), 2**63 - 1
WITH_BACKENDS = [(name, backend) for name, op in OPS.items() for backend in op.backends or [None]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    processes = Pair(tmp_path_factory.mktemp("pair"))
    yield processes
    processes.close()


@pytest.fixture(params=WITH_BACKENDS, ids=lambda p: p[0] if p[1] is None else f"{p[0]}, {p[1]}")
def op(request, pair):
    """An op, with its backend bound to `call`."""
    name, backend = request.param
    bound = {} if backend is None else {"backend": backend}
    return OPS[name]._replace(call=partial(OPS[name].call, pair, **bound))


def batch(op, num_classes=3, images=2):
    """Logits, and the targets of all of them; multiples of 1/8."""
    x = torch.randint(-24, 25, (images, num_classes, 2, 2)) / 8
    size = (4, 4) if op.is_coarse else (2, 2)
    return x, tuple(torch.randint(0, num_classes, (images, *size)) for _ in range(op.targets))


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# --- targets and options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        *[(value, torch.int64) for value in (-1, 3, LEAST, MOST, 2**32, -(2**32) + 1)],
        *[(value, torch.int32) for value in (-(2**31), 2**31 - 1)],
        *[(255, torch.uint8), (-128, torch.int8), (-(2**15), torch.int16), (2**16 - 1, torch.uint16)],
    ],
)
def test_a_target_that_is_no_class(op, value, dtype):
    x, labels = batch(op)
    for t in labels:
        t[1, 0, 1] = value
    words = rf"target\w*\[1, 0, 1\] is {value}, which is neither a class in \[0, 3\) nor ignore_index \(-100\)"
    with pytest.raises(IndexError, match=words):
        op.call(x, *(t.to(dtype) for t in labels))


@pytest.mark.parametrize("ignore_index", [0, 2, -1, 3, LEAST, MOST])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_label_may_be_the_ignored_one(op, ignore_index, reduction):
    x, labels = batch(op)
    is_ignored = [torch.rand(t.shape) < 0.3 for t in labels]
    others = [torch.where(t == ignore_index, 1, t) for t in labels]
    found = []
    for label in (-100, ignore_index):
        labels = [t.masked_fill(i, label) for t, i in zip(others, is_ignored, strict=True)]
        found.append(op.call(x, *labels, ignore_index=label, reduction=reduction))
    assert_equal(*found)


@pytest.mark.parametrize("ignore_index", [2**63, LEAST - 1, 10**30])
def test_an_ignore_index_that_no_target_can_be(op, ignore_index):
    x, labels = batch(op)
    with pytest.raises(ValueError, match=f"ignore_index must fit into an int64, got {ignore_index}"):
        op.call(x, *labels, ignore_index=ignore_index)


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf, 1e39])
@pytest.mark.parametrize("form", [float, partial(torch.tensor, dtype=torch.float64)])
def test_a_normalizer_that_is_no_count(op, value, form):
    if not op.takes_normalizer:
        return
    x, labels = batch(op)
    words = "normalizer must be finite and not negative" + (r" in torch\.float32" if value == 1e39 else "")
    with pytest.raises(ValueError, match=f"{words}, got {re.escape(f'{value:g}')}"):
        op.call(x, *labels, normalizer=form(value))


# --- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("margin", [0.0, 0.2, 3e38])
def test_one_class(op, reduction, margin):
    x, labels = batch(op, num_classes=1)
    loss, gradient = op.call(x, *labels, margin=margin, reduction=reduction)
    assert not loss.any()
    assert not gradient.any()
    loss, gradient = op.call(x * torch.nan, *labels, margin=margin, reduction=reduction)
    assert loss.isnan().all()
    assert gradient.isnan().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_pixel(op, reduction):
    x = torch.tensor([0.5, 0.25, 1.0]).view(1, 3, 1, 1)
    size = (2, 1) if op.is_coarse else (1, 1)
    labels = [torch.zeros(1, *size, dtype=torch.long)] * op.targets
    loss, gradient = op.call(x, *labels, margin=0.25, reduction=reduction)
    pixels = size[0] if reduction in ("sum", "none") else 1
    assert loss.sum() == 0.75 * pixels
    assert gradient.flatten().tolist() == [-pixels, 0, pixels]


def test_the_largest_margin(op):
    largest = torch.finfo(torch.float32).max
    x = torch.zeros(1, 2, 1, 1)
    labels = [torch.zeros(1, *((1, 2) if op.is_coarse else (1, 1)), dtype=torch.long)] * op.targets
    loss, gradient = op.call(x, *labels, margin=largest, reduction="none")
    assert (loss == largest).all()
    assert gradient.flatten().tolist() == [-float(loss.numel()), float(loss.numel())]
    # Of two rivals the sum of errors is infinite: not a number, and told.
    loss, gradient = op.call(torch.zeros(1, 3, 1, 1), *labels, margin=largest, reduction="none")
    assert loss.isnan().all()
    assert gradient.isnan().all()


def test_the_largest_half(op):
    most = torch.finfo(torch.float16).max
    x = torch.tensor([-most, most, 0.0, most]).view(1, 4, 1, 1).half()
    labels = [torch.zeros(1, *((1, 2) if op.is_coarse else (1, 1)), dtype=torch.long)] * op.targets
    loss, gradient = op.call(x, *labels, margin=16.0, reduction="mean")
    assert loss == 2 * most + 16  # the third error is below their mean
    assert gradient.flatten().tolist() == [-1, 0.5, 0, 0.5]


# --- memory -----------------------------------------------------------------------------------------------------

CALLS = {
    "hem_loss": lambda x, t, **options: hem_loss(x, t, **options),
    "linear_hem_loss": lambda x, t, **options: linear_hem_loss(x, torch.eye(3)[..., None, None], None, t, **options),
    "upsampled_hem_loss": lambda x, t, **options: upsampled_hem_loss(x, t, **options),
    "mixed_hem_loss": lambda x, t, **options: mixed_hem_loss(x, t, t.flip(0), 0.25, **options),
}


@pytest.fixture(params=CALLS)
def call(request, backend):
    return partial(CALLS[request.param], backend=backend)


def labels_of(call):
    return torch.randint(0, 3, (4, 4, 6) if call.func is CALLS["upsampled_hem_loss"] else (4, 2, 3))


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((1, 3, 2, 3), lambda x: x.expand(4, 3, 2, 3)),
        ((4, 3, 2, 1), lambda x: x.expand(4, 3, 2, 3)),
        ((4, 5, 2, 3), lambda x: x.unfold(1, 3, 2)[:, 1].movedim(-1, 1)),
        ((4, 2, 5), lambda x: x.unfold(2, 3, 1).movedim(-1, 1)),
        ((20,), lambda x: x.as_strided((4, 3, 2, 3), (2, 1, 2, 0))),
    ],
)
def test_gradients_of_a_leaf_that_is_seen_several_times(call, shape, view):
    t, numbers = labels_of(call), torch.randint(-24, 25, shape) / 8
    gradients = []
    for of_memory in (lambda x: x, torch.Tensor.contiguous):
        leaf = numbers.clone().requires_grad_()
        call(of_memory(view(leaf)), t).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_numbers_that_are_negated_when_they_are_read(call):
    t = labels_of(call)
    x = torch.complex(torch.zeros(4, 3, 2, 3), torch.randn(4, 3, 2, 3)).conj().imag
    assert x.is_neg()
    assert torch.equal(call(x, t), call(x.resolve_neg(), t))
    g = torch.complex(torch.zeros(t.shape), torch.randn(t.shape)).conj().imag
    found = []
    for upstream in (g, g.resolve_neg()):
        leaf = x.detach().clone().requires_grad_()
        found.append(torch.autograd.grad(call(leaf, t, reduction="none"), leaf, upstream)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["hem_loss", "linear_hem_loss", "upsampled_hem_loss"])
def test_targets_that_change_behind_the_back_of_autograd(name):
    call = CALLS[name]
    for value in (MOST, LEAST, 3, -1):
        t = labels_of(partial(call))
        x = torch.randn(4, 3, 2, 3, requires_grad=True)
        loss = call(x, t)
        t.data.fill_(value)
        loss.backward()  # reads nothing that is not there
        assert not x.grad.any()


@pytest.mark.parametrize("name", ["hem_loss", "upsampled_hem_loss"])
@pytest.mark.parametrize("what", ["input", "target", "margin", "weight", "the mask"])
def test_memory_that_was_given_back(name, what):
    """In a process of its own, as it ended that."""
    program = f"""
import torch
from hem_ext import {name}
given = {{
    "input": torch.randn(2, 3, 4, 4),
    "target": torch.zeros(2, 4, 4, dtype=torch.long),
    "margin": torch.ones(3),
    "weight": torch.ones(3),
}}
given["input"].requires_grad_()
call = lambda: {name}(given["input"], given["target"], margin=given["margin"], weight=given["weight"])
try:
    if {what!r} == "the mask":
        loss = call()
        masks = [t for t in loss.grad_fn.saved_tensors if t.dtype == torch.int32]
        masks[0].untyped_storage().resize_(0)
        loss.backward()
    given[{what!r}].detach().untyped_storage().resize_(0)
    call()
except RuntimeError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"the memory of {what} is not allocated" in result.stdout


# Calls of `free(t)`, t made of what its name says, in which torch's own operators would read it first.
FREED = [
    "linear_hem_loss(free(torch.randn(9, 7)), head, None, labels)",
    "linear_hem_loss(torch.randn(9, 7), free(head), None, labels)",
    "linear_hem_loss(torch.randn(9, 7), head, None, free(labels))",
    "linear_hem_loss(torch.randn(9, 7), head, None, labels, class_weight=free(torch.rand(5)))",
    "mixed_hem_loss(logits, free(labels.clone()), labels, 0.5)",
    "mixed_hem_loss(logits, labels, free(labels.clone()), 0.5)",
    "mixed_hem_loss(logits, labels, labels.flip(0), free(torch.rand(9)))",
    "mixed_hem_loss(logits, labels, labels.flip(0), 0.5, weight=free(torch.rand(5)))",
    "split_mixed(free(torch.eye(5)))",
    "hem_loss(logits, free(labels.short()))",
    "hem_loss(logits, free(labels.bool()))",
    "hem_loss(logits, labels, margin=free(torch.rand(5).double()))",
    "hem_loss(logits, labels, free(torch.rand(5).half()))",
    "hem_loss(logits, labels, normalizer=free(torch.tensor(2.0)))",
    "HEMLoss(weight=free(torch.rand(5)))",
    "HEMLoss(margin=free(torch.rand(5)))",
    "HEMLoss(stats=True)(logits, free(labels))",
    "HEMLoss(stats=True)(free(logits), labels)",
    "reference.hem_loss(free(logits), labels)",
    "upsampled_hem_loss(torch.randn(1, 5, 4, 4), free(torch.zeros(1, 8, 8).char()))",
    "class_margins(free(torch.rand(5)))",
]


def test_memory_that_torch_would_read():
    """In a process of its own, as each of them ended that."""
    program = """
import sys
import torch
from hem_ext import *
from hem_ext import reference
from hem_ext.mix import *
def free(t):
    t.untyped_storage().resize_(0)
    return t
for call in sys.argv[1:]:
    logits, labels, head = torch.randn(9, 5), torch.zeros(9, dtype=torch.long), torch.randn(5, 7)
    try:
        print(call, eval(call))
    except RuntimeError as error:
        print("storage was resized to 0 bytes" in str(error) or f"{call}: {error}")
"""
    result = subprocess.run([sys.executable, "-c", program, *FREED], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["True"] * len(FREED)


def shrink(t):
    """Takes the last byte from the memory of a tensor; what is then said of it."""
    storage = t.detach().untyped_storage()
    needed = storage.nbytes()
    storage.resize_(needed - 1)
    return f"is not allocated: its storage was resized to {needed - 1} bytes, and {needed} are needed"


@pytest.mark.parametrize("loss", [hem_loss, upsampled_hem_loss])
@pytest.mark.parametrize(
    "what",
    ["input", "target", "margin", "weight", "the mask", "the denominator", "grad_loss", "target, by backward"],
)
def test_memory_that_is_a_byte_short(loss, what):
    x, t = torch.randn(2, 3, 4, 4, requires_grad=True), torch.zeros(2, 4, 4, dtype=torch.long)
    given = {"input": x, "target": t, "margin": torch.ones(3), "weight": torch.ones(3)}

    def call():
        return loss(x, t, margin=given["margin"], weight=given["weight"])

    if what in given:
        words = shrink(given[what])
        with pytest.raises(RuntimeError, match=f"the memory of {what} {words}"):
            call()
        return
    found = call()
    mask, _, _, denominator = found.grad_fn.saved_tensors
    upstream = torch.ones(())
    saved = {"the mask": mask, "the denominator": denominator, "grad_loss": upstream, "target, by backward": t}
    words = shrink(saved[what])
    with pytest.raises(RuntimeError, match=f"the memory of {what.partition(',')[0]} {words}"):
        found.backward(upstream)


@pytest.mark.parametrize("layout", guard_pages.LAYOUTS)
@pytest.mark.parametrize("offset", [0, 3])
def test_logits_that_are_a_byte_short(layout, offset):
    shape, stride = guard_pages.LAYOUTS[layout](5, 7)
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    x = torch.zeros(offset + extent).as_strided(shape, stride, offset)
    t = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    hem_loss(x, t)
    words = shrink(x)
    with pytest.raises(RuntimeError, match=f"the memory of input {words}"):
        hem_loss(x, t)


def test_memory_for_the_gradient_that_is_a_byte_short():
    x = torch.randn(5, 4, requires_grad=True) * 1
    loss = hem_loss(x, torch.zeros(5, dtype=torch.long), overwrite_input=True)
    words = shrink(x)
    with pytest.raises(RuntimeError, match=f"the memory of the gradient {words}"):
        loss.backward()


@pytest.mark.parametrize("what", ["the gradient", "the mask", "counts"])
def test_memory_of_some_classes_that_is_a_byte_short(what):
    t, one = torch.zeros(5, dtype=torch.long), torch.ones(())
    given = {"the gradient": torch.empty(5, 3), "the mask": torch.ones(5, 2, dtype=torch.int32)}
    given["counts"] = torch.ops.hem_ext.hem_count(given["the mask"])
    words = shrink(given[what])
    gradient, mask, counts = given.values()
    with pytest.raises(RuntimeError, match=f"the memory of {what} {words}"):
        torch.ops.hem_ext.hem_backward_range(gradient, one, mask, counts, t, None, one, -100, 35, 32, 1)
    if what == "the mask":
        with pytest.raises(RuntimeError, match=f"the memory of {what} {words}"):
            torch.ops.hem_ext.hem_count(mask)


@pytest.mark.parametrize("what", ["input", "target", "target_logits", "margin", "the mask", "counts", "grad_loss"])
def test_memory_of_a_share_that_is_a_byte_short(what):
    own, t, margins = torch.zeros(5), torch.zeros(5, dtype=torch.long), torch.ones(60)
    x, errors = torch.randn(5, 40), torch.ones(2, 5)
    given = {"input": x, "target": t, "target_logits": own, "margin": margins}
    given |= {"the mask": torch.ones(5, 2, dtype=torch.int32), "counts": torch.ones(5, dtype=torch.int32)}
    given["grad_loss"] = torch.ones(5)
    words = shrink(given[what])
    share = (margins, 0.0, -100, 60, 20, True)
    if what in ("the mask", "counts", "grad_loss", "target"):
        with pytest.raises(RuntimeError, match=f"the memory of {what} {words}"):
            parallel._backward(*(given[n] for n in ("grad_loss", "the mask", "counts")), t, -100, 60, 20, 40, 0, True)
    if what in ("input", "target", "target_logits", "margin"):
        with pytest.raises(RuntimeError, match=f"the memory of {what} {words}"):
            parallel._errors(x, t, own, *share)
        with pytest.raises(RuntimeError, match=f"the memory of {what} {words}"):
            parallel._keep(x, t, own, errors, *share)


def test_errors_of_a_share_that_are_a_byte_short():
    errors = torch.ones(2, 5)
    words = shrink(errors)
    with pytest.raises(RuntimeError, match=f"the memory of errors {words}"):
        parallel._keep(torch.randn(5, 4), torch.zeros(5).long(), torch.zeros(5), errors, None, 0.2, -100, 4, 0, True)


def test_targets_with_gaps_that_are_a_byte_short():
    t = torch.zeros(5, 2, dtype=torch.long)[:, 1]
    words = shrink(t)
    with pytest.raises(RuntimeError, match=f"the memory of target {words}"):
        hem_loss(torch.randn(5, 4), t)


# --- what each op adds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip_finished", [True, False])
@pytest.mark.parametrize("shape", [(9, 4), (2, 4, 3, 3)])
def test_hidden_of_ignored_rows_is_in_no_gradient(backend, skip_finished, shape):
    """A classifier and a loss one after the other multiply it by 0, and NaN by 0 is NaN."""
    size = (shape[0], *shape[2:])
    t = targets((size[0], 3, *size[1:]), ignore_index=-100)
    clean = torch.randn(shape)
    given = {"hidden": clean, "weight": torch.randn(3, 4, *[1] * (len(shape) - 2)), "bias": torch.randn(3)}

    def gradients(hidden):
        leaves = [x.detach().requires_grad_() for x in {**given, "hidden": hidden}.values()]
        loss = linear_hem_loss(*leaves, t, skip_finished=skip_finished, backend=backend)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        # Of the squared loss there is a second derivative.
        again = linear_hem_loss(*leaves, t, skip_finished=skip_finished, backend=backend).square()
        second = torch.autograd.grad(
            sum(g.sum() for g in torch.autograd.grad(again, leaves, create_graph=True)), leaves
        )
        return [loss, *first, *second]

    ignored = (t == -100).unsqueeze(1).expand(shape)
    for garbage in (torch.nan, torch.inf, 3e38):
        for a, b in zip(gradients(clean.masked_fill(ignored, garbage)), gradients(clean), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_of_the_size_of_the_targets_are_not_interpolated(backend, value):
    x, t = torch.randn(1, 3, 3, 4), torch.zeros(1, 3, 4, dtype=torch.long)
    x[0, 1, 1, 2] = value
    found = []
    for loss in (partial(upsampled_hem_loss, backend=backend), reference.hem_loss):
        leaf = x.clone().requires_grad_()
        losses = loss(leaf, t, reduction="none")
        found.append((losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]))
    assert_equal(*found)


@pytest.mark.parametrize("size", [(6, 4), (3, 8), (3, 4)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_an_axis_that_keeps_its_size_is_not_interpolated(size, align_corners):
    """Nor is anything handed on there: 0 times NaN is NaN, in forward and in backward."""
    x, t = torch.randn(1, 3, 3, 4), torch.zeros(1, *size, dtype=torch.long)
    x[0, 1, 1, 2] = torch.nan
    found = []
    for backend in ("native", "reference"):
        leaf = x.clone().requires_grad_()
        loss = upsampled_hem_loss(leaf, t, reduction="none", align_corners=align_corners, backend=backend)
        loss.sum().backward()
        found.append((loss.detach(), leaf.grad))
    assert found[0][0].isnan().any()
    assert not found[0][0].isnan().all()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def misaligned(t):
    """The same numbers one byte further, as of a file whose header is odd: instructions may refuse to load them."""
    memory = bytearray(1 + t.nbytes)
    moved = torch.frombuffer(memory, dtype=t.dtype, offset=1).view(t.shape).copy_(t)
    assert moved.data_ptr() % t.element_size()
    return moved


@pytest.mark.parametrize("loss", [hem_loss, upsampled_hem_loss])
@pytest.mark.parametrize("what", ["input", "target", "margin", "weight", "grad_loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_that_is_not_aligned(loss, what, dtype):
    x, t = torch.randn(2, 3, 4, 4, dtype=dtype), torch.zeros(2, 4, 4, dtype=torch.long)
    given = {"input": x, "target": t, "margin": torch.ones(3), "weight": torch.ones(3)}
    given |= {name: given[name].to(dtype) for name in ("margin", "weight")}
    upstream = torch.ones((), dtype=dtype)
    if what in given:
        given[what] = misaligned(given[what])
    else:
        upstream = misaligned(upstream)
    leaf = given["input"].requires_grad_()
    size = 8 if what == "target" else dtype.itemsize
    with pytest.raises(ValueError, match=rf"the memory of {what} is not aligned to its elements of {size} bytes"):
        loss(leaf, given["target"], margin=given["margin"], weight=given["weight"]).backward(upstream)
