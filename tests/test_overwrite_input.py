"""The gradient in the memory of the logits: the same values, and an error wherever somebody else needs them."""

import re

import pytest
import torch
import torch._dynamo
from cases import DTYPES, REDUCTIONS, eighths, logits, targets
from torch import nn
from torch.utils.checkpoint import checkpoint

from hem_ext import HEMLoss, Selective, hem_loss
from hem_ext.hem import _backward_into, _forward


def as_made(x):
    return x * 1


def as_channels_last(x):
    return as_made(x).movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else as_made(x)


def as_transposed(x):
    return as_made(x).t().contiguous().t() if x.dim() == 2 else as_made(x)


def as_view(x):
    return torch.stack([as_made(x), torch.zeros_like(x)])[0]


@pytest.mark.parametrize("make", [as_made, as_channels_last, as_transposed, as_view])
@pytest.mark.parametrize(("dtype", "reduction"), list(zip(DTYPES, REDUCTIONS, strict=True)))
@pytest.mark.parametrize("shape", [(7,), (6, 5), (3, 70), (2, 5, 4), (2, 5, 4, 3), (2, 5, 1, 1), (0, 5), (1, 5)])
def test_the_same_gradient_in_the_same_memory(device, shape, dtype, reduction, make):
    x, t = logits(shape, dtype).requires_grad_(), targets(shape, ignore_index=-100)
    options = {"reduction": reduction, "weight": eighths(shape[min(1, len(shape) - 1)])}
    found = []
    y = make(x)
    plain = y.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    expected_loss = hem_loss(plain, t, **options)
    grad_loss = torch.rand_like(expected_loss)
    (expected,) = torch.autograd.grad(expected_loss, plain, grad_loss)
    version = y._version
    y.register_hook(lambda grad: found.append((grad.data_ptr(), grad.stride())))
    loss = hem_loss(y, t, **options, overwrite_input=True)
    assert torch.equal(loss, expected_loss)
    assert y._version == version
    loss.backward(grad_loss)
    assert torch.equal(x.grad, expected)
    assert found == [(y.data_ptr(), y.stride())]
    assert torch.equal(y, expected)  # what the logits hold
    assert y._version > version


def test_one_image_has_no_stride(device):
    x, t = torch.randn(3, 5, 4, 3, requires_grad=True), targets((1, 5, 4, 3))
    y = as_channels_last(x)[::3]
    loss = hem_loss(y, t, overwrite_input=True)
    (expected,) = torch.autograd.grad(hem_loss(x[:1], t), x)
    loss.backward()
    assert torch.equal(x.grad, expected)
    assert torch.equal(y, expected[:1])


def test_a_module_trains_as_without(device):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    other.load_state_dict(plain.state_dict())
    x, t = torch.randn(20, 4), torch.randint(0, 3, (20,))
    for model, criterion in ((plain, HEMLoss()), (other, HEMLoss(overwrite_input=True))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            y = model(x)
            y.retain_grad()
            criterion(y, t).backward()
            assert torch.equal(y, y.grad) == (model is other)
            optimizer.step()
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "use",
    [
        lambda y: y.relu(),  # saves what it made: these logits
        lambda y: y.tanh(),
        lambda y: torch.sigmoid(y),
    ],
)
def test_logits_that_their_maker_needs(device, use):
    x, t = torch.randn(5, 4, requires_grad=True), torch.randint(0, 4, (5,))
    loss = hem_loss(use(x), t, margin=2.0, overwrite_input=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_that_another_loss_needs(device):
    x, t = torch.randn(5, 4, requires_grad=True), torch.randint(0, 4, (5,))
    y = x * 1
    penalty = (y**2).sum()  # saves the logits; backward comes to it after what was made later
    loss = hem_loss(y, t, margin=2.0, overwrite_input=True) + penalty
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_backward(device):
    y, t = torch.randn(5, 4, requires_grad=True) * 1, torch.randint(0, 4, (5,))
    loss = hem_loss(y, t, margin=2.0, overwrite_input=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_create_graph(device):
    x, t = torch.randn(5, 4, requires_grad=True), torch.randint(0, 4, (5,))
    y = x * 1
    before = y.detach().clone()
    words = "^overwrite_input=True leaves no graph behind: backward with create_graph=True needs False$"
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.grad(hem_loss(y, t, overwrite_input=True), x, create_graph=True)
    assert torch.equal(y, before)


class SavesWhatItReturns(torch.autograd.Function):
    """As compiled networks do."""

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


LEAF = "overwrite_input=True would put the gradient over a leaf that requires it: give logits made of it"
GAPS = "overwrite_input=True needs logits that are contiguous, channels_last or transposed, got shape"
SHARED = (
    "overwrite_input=True needs logits whose memory nobody else holds where a compiled network, or another Python "
    "function of autograd, made them: what it saved does perhaps, or a second view of them"
)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: x, LEAF),
        (lambda x: x.view(5, 4), LEAF),
        (lambda x: (x * 1)[:, :3], f"{GAPS} (5, 3) with strides (4, 1)"),
        (lambda x: (x * 1)[::2], f"{GAPS} (3, 4) with strides (8, 1)"),
        (lambda x: (x[:1] * 1).expand(5, 4), f"{GAPS} (5, 4) with strides (0, 1)"),
        (
            lambda x: (x * 1)[:, None].expand(5, 2, 4).transpose(1, 2),
            f"{GAPS} (5, 4, 2) with strides (4, 1, 0)",
        ),
        (lambda x: SavesWhatItReturns.apply(x), SHARED),
        (lambda x: SavesWhatItReturns.apply(x).view(5, 4), SHARED),
    ],
)
def test_logits_that_must_not_be_written(device, make, words):
    x = torch.randn(5, 4, requires_grad=True)
    y = make(x)
    t = torch.zeros(y.shape[:1] + y.shape[2:], dtype=torch.int64)
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        hem_loss(y, t, overwrite_input=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"overwrite_input": "yes"}, "overwrite_input must be True or False, got 'yes'"),
        ({"overwrite_input": None}, "overwrite_input must be True or False, got None"),
        (
            {"overwrite_input": True, "backend": "reference"},
            "overwrite_input is for the native kernels: the reference reads the logits in backward",
        ),
    ],
)
def test_calls_that_must_not_be_made(device, options, words):
    y, t = torch.randn(5, 4, requires_grad=True) * 1, torch.randint(0, 4, (5,))
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(words)}$"):
        hem_loss(y, t, **options)


def test_where_there_is_no_gradient_nothing_is_written(device):
    x, t = torch.randn(5, 4), torch.randint(0, 4, (5,))
    before = x.clone()
    hem_loss(x, t, overwrite_input=True)
    with torch.no_grad():
        hem_loss(x.requires_grad_(), t, overwrite_input=True)
    assert torch.equal(x, before)
    assert x._version == 0


def test_a_transformed_call(device):
    x, t = torch.randn(5, 4), torch.randint(0, 4, (5,))
    words = "^overwrite_input=True is for eager calls, not for what torch.func transforms$"
    with pytest.raises(RuntimeError, match=words):
        torch.func.grad(lambda x: hem_loss(x * 1, t, overwrite_input=True))(x)


def test_a_compiled_call_is_made_outside_of_the_graph(device):
    x, t = torch.randn(5, 4, requires_grad=True), torch.randint(0, 4, (5,))
    options = {"weight": eighths(4), "margin": 2.0, "reduction": "sum"}
    (expected,) = torch.autograd.grad(hem_loss(x, t, **options), x)
    made = []

    def loss(x):
        made.append(x * 1)
        return hem_loss(made[-1], t, **options, overwrite_input=True)

    assert torch.equal(torch.autograd.grad(torch.compile(loss, backend="eager")(x), x)[0], expected)
    assert torch.equal(made[-1], expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compiler\.disable"):
        torch.compile(loss, backend="eager", fullgraph=True)(x)


def returns_a_view(x):
    return x.sin().view(-1, 5)


def saves_what_it_returns(x):
    y = x * 2
    return y.exp()


def saves_what_it_returns_a_view_of(x):
    return (x * 2).exp().view(-1, 5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("network", [returns_a_view, saves_what_it_returns, saves_what_it_returns_a_view_of])
@pytest.mark.parametrize("view", [lambda y: y, lambda y: y.flatten(0, -2)])
def test_logits_of_a_compiled_network(network, backend, view):
    """Where it shares their memory with what it saved, autograd does not always notice that it was written to."""
    torch._dynamo.reset()
    compiled = torch.compile(network, backend=backend)
    x, t = torch.randn(4, 3, 5, requires_grad=True), torch.randint(0, 5, (12,))
    (expected,) = torch.autograd.grad(hem_loss(network(x).view(-1, 5), t), x)
    y = view(compiled(x)).view(-1, 5)
    if network is returns_a_view:
        loss = hem_loss(y, t, overwrite_input=True)
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)
    else:
        with pytest.raises(ValueError, match="needs logits whose memory nobody else holds"):
            hem_loss(y, t, overwrite_input=True)
    assert torch.equal(y.detach(), view(compiled(x)).view(-1, 5).detach()) == (network is not returns_a_view)


def test_hooks_that_move_what_is_saved(device):
    x, t = torch.randn(6, 5, requires_grad=True), torch.randint(0, 5, (6,))
    (expected,) = torch.autograd.grad(hem_loss(x, t), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        loss = hem_loss(x * 1, t, overwrite_input=True)
    loss.backward()
    assert torch.equal(x.grad, expected)
    x.grad = None
    checkpoint(lambda x: hem_loss(x * 1, t, overwrite_input=True), x, use_reentrant=False).backward()
    assert torch.equal(x.grad, expected)


def test_selective_steps(device):
    torch.manual_seed(0)
    model, x, t = nn.Linear(4, 3), torch.randn(16, 4), torch.randint(0, 3, (16,))
    HEMLoss()(model(x), t).backward()
    expected = model.weight.grad.clone()
    selective = Selective(model, HEMLoss(overwrite_input=True))
    for _ in range(3):
        model.zero_grad()
        selective(x, t).backward()
        torch.testing.assert_close(model.weight.grad, expected)
    with pytest.raises(ValueError, match="return_logits=True with overwrite_input=True"):
        selective(x, t, return_logits=True)


@pytest.mark.parametrize(
    "memory",
    [torch.empty(4, 8)[:, :3], torch.empty(1, 3).expand(4, 3), torch.empty(3, 4).t(), torch.empty(4, 3).half()],
)
def test_the_raw_op_stays_inside_its_memory(memory):
    x, t = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
    _, mask, denominator = _forward(x, t, None, 0.2, None, -100, 1, True)
    if memory.dtype == torch.float16:
        mask = mask[:2]
    with pytest.raises(RuntimeError, match=r"without gaps|the mask must be"):
        _backward_into(memory, torch.ones(()), mask, t, None, denominator, -100, 1, True)
