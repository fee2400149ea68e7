"""What PyTorch does with a function of tensors: per-sample gradients, tangents, exported and traced graphs."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from cases import DTYPES, REDUCTIONS, eighths, logits, targets
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from hem_ext import HEMLoss, hem_loss, linear_hem_loss, reference
from hem_ext.mix import mixed_hem_loss, split_mixed

SHAPES = [(5,), (4, 5), (2, 5, 2), (2, 5, 4, 3), (2, 5, 3, 1), (3, 5, 1, 1), (0, 5), (2, 5, 0, 3), (2, 70)]
SAMPLES = 3


def batch(shape, dtype=torch.float32):
    x = torch.stack([logits(shape, dtype) for _ in range(SAMPLES)])
    return x, torch.stack([targets(shape, ignore_index=-100) for _ in range(SAMPLES)])


def options_of(shape, reduction):
    classes = shape[min(1, len(shape) - 1)]
    return {"reduction": reduction, "weight": eighths(classes), "margin": eighths(classes)}


def gradient(x, t, **options):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(hem_loss(x, t, **options).sum(), x)[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("reduction", "dtype"), list(zip(REDUCTIONS, DTYPES, strict=True)))
def test_losses_and_gradients_of_each_sample(device, backend, shape, reduction, dtype):
    (x, t), options = batch(shape, dtype), options_of(shape, reduction)

    def loss(x, t):
        return hem_loss(x, t, **options, backend=backend)

    def total(x, t):
        return loss(x, t).sum()

    expected = torch.stack([hem_loss(*pair, **options) for pair in zip(x, t, strict=True)])
    torch.testing.assert_close(vmap(loss)(x, t), expected)
    expected = torch.stack([gradient(*pair, **options) for pair in zip(x, t, strict=True)])
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if dtype in (torch.float16, torch.bfloat16) else {}
    torch.testing.assert_close(vmap(grad(total))(x, t), expected, **tolerance)
    torch.testing.assert_close(grad(lambda x: vmap(total)(x, t).sum())(x), expected, **tolerance)
    # Mapped over another dimension, and over one of the two alone.
    moved = vmap(grad(total), in_dims=(-1, 0))(x.movedim(0, -1), t)
    torch.testing.assert_close(moved, expected, **tolerance)
    expected = torch.stack([gradient(x[i], t[0], **options) for i in range(SAMPLES)])
    torch.testing.assert_close(vmap(grad(total), in_dims=(0, None))(x, t[0]), expected, **tolerance)
    expected = torch.stack([gradient(x[0], t[i], **options) for i in range(SAMPLES)])
    torch.testing.assert_close(vmap(grad(total), in_dims=(None, 0))(x[0], t), expected, **tolerance)


def test_gradients_of_a_network_by_sample(device, backend):
    model, criterion = nn.Linear(3, 5), HEMLoss(margin=1.0, backend=backend)
    x, t = torch.randn(6, 3), torch.randint(0, 5, (6,))

    def loss(parameters, x, t):
        return criterion(functional_call(model, parameters, (x,)), t)

    found = vmap(grad(loss), in_dims=(None, 0, 0))(dict(model.named_parameters()), x, t)
    for i in range(6):
        model.zero_grad()
        criterion(model(x[i]), t[i]).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][i], parameter.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_tangents(device, backend, shape, reduction):
    x, t, v = logits(shape).double(), targets(shape, ignore_index=-100), torch.randn(shape, dtype=torch.float64)
    options = options_of(shape, reduction)

    def loss(x):
        return hem_loss(x, t, **options, backend=backend)

    def in_torch(x):
        return reference.hem_loss(x, t, **options)

    value, tangent = jvp(loss, (x,), (v,))
    expected_value, expected = jvp(in_torch, (x,), (v,))
    torch.testing.assert_close((value, tangent), (expected_value, expected))
    with fwAD.dual_level():
        dual = fwAD.unpack_dual(loss(fwAD.make_dual(x, v)))
    torch.testing.assert_close((dual.primal, dual.tangent), (expected_value, expected))
    if x.numel():
        jacobian = jacrev(loss)(x)
        torch.testing.assert_close((jacobian * v).flatten(-v.dim()).sum(-1), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_in_every_mode(device, backend, reduction):
    x, t = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.randint(0, 5, (4,))

    def loss(x):
        return hem_loss(x, t, reduction=reduction, backend=backend)

    modes = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(loss, x, **modes)
    assert torch.autograd.gradgradcheck(loss, x)
    assert not hessian(lambda x: loss(x).sum())(x).any()


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 5, 2, 3)])
@pytest.mark.parametrize("outer", [jacfwd, jacrev])
def test_second_derivatives_of_what_is_made_of_it(device, backend, shape, outer):
    x, t = logits(shape, torch.float64), targets(shape, ignore_index=2)

    def losses(x):
        return hem_loss(x, t, ignore_index=2, reduction="none", backend=backend)

    slopes = jacrev(losses)(x).reshape(-1, x.numel())
    found = outer(jacrev(lambda x: losses(x).square().sum()))(x)
    assert slopes.any()
    torch.testing.assert_close(found.reshape(x.numel(), x.numel()), 2 * slopes.T @ slopes)


def test_weights_that_are_mapped_over(device, backend):
    (x, t), weight = batch((4, 5)), torch.rand(SAMPLES, 5)
    expected = torch.stack([hem_loss(*one) for one in zip(x, t, weight, strict=True)])
    torch.testing.assert_close(vmap(lambda *one: hem_loss(*one, backend=backend))(x, t, weight), expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [("rows", {}), ("rows", {"reduction": "sum"}), ("pixels", {"reduction": "none"}), ("pixels", {"normalizer": 7.0})],
)
def test_a_classifier_with_its_loss(device, backend, name, options):
    """By sample, and along tangents."""
    weight, bias = torch.randn(5, 7), torch.randn(5)
    shape = (SAMPLES, 2, 7, 3, 4) if name == "pixels" else (SAMPLES, 4, 7)
    hidden, t = torch.randn(shape), torch.randint(-1, 5, shape[:2] + shape[3:] if name == "pixels" else shape[:2])
    weight = weight[..., None, None] if name == "pixels" else weight
    options = options | {"margin": eighths(5), "class_weight": eighths(5), "ignore_index": -1}

    def loss(hidden, weight, t, backend=backend):
        return linear_hem_loss(hidden, weight, bias, t, **options, backend=backend).sum()

    leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = torch.stack([loss(h, head, t, "auto") for h, t in zip(leaf, t, strict=True)])
    torch.testing.assert_close(vmap(loss, in_dims=(0, None, 0))(hidden, weight, t), expected)
    of_hidden, of_weight = vmap(grad(loss, argnums=(0, 1)), in_dims=(0, None, 0))(hidden, weight, t)
    expected = torch.autograd.grad(expected.sum(), (leaf, head))
    torch.testing.assert_close((of_hidden, of_weight.sum(0)), expected)
    tangents = torch.randn_like(hidden[0]), torch.randn_like(weight)
    _, slope = jvp(lambda *x: loss(*x, t[0]), (hidden[0], weight), tangents)
    expected = (tangents[0] * of_hidden[0]).sum() + (tangents[1] * of_weight[0]).sum()
    torch.testing.assert_close(slope, expected, check_dtype=False)  # torch's of a number divided by a float is float64


def test_mixed_targets_by_sample(device, backend):
    (x, a), share = batch((4, 5)), torch.rand(SAMPLES)
    b = a.flip(1)

    def loss(x, a, b, share):
        return mixed_hem_loss(x, a, b, share, ignore_index=-100, backend=backend)

    expected = torch.stack([loss(*one) for one in zip(x, a, b, share, strict=True)])
    torch.testing.assert_close(vmap(loss)(x, a, b, share), expected)


@pytest.mark.parametrize("options", [{"weight": -eighths(5) - 1}, {"margin": -eighths(5) - 1}])
def test_a_wrong_value_is_told_in_a_transform_too(device, backend, options):
    (x, t), name = batch((4, 5)), next(iter(options))
    with pytest.raises(ValueError, match=rf"{name} must be finite and not negative, but {name}\[0\] is"):
        grad(lambda x: hem_loss(x, t[0], **options, backend=backend))(x[0])
    with pytest.raises(IndexError, match=r"target\[0\] is 7, which is neither a class"):
        grad(lambda x: hem_loss(x, torch.full((4,), 7), backend=backend))(x[0])


def test_fake_tensors(device, backend):
    """Which have no values to look at."""
    (x, t), weight = batch((4, 5)), torch.rand(5)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y, labels, w = (mode.from_tensor(v) for v in (x[0], t[0], weight))
        calls = [
            hem_loss(y, labels, w, margin=w, normalizer=w.sum(), backend=backend),
            HEMLoss(w, margin=w, stats=True, backend=backend)(y, labels),
            linear_hem_loss(y, mode.from_tensor(torch.randn(3, 5)), None, labels, class_weight=w[:3], backend=backend),
            mixed_hem_loss(y, labels, labels, w.sum(), weight=w, backend=backend),
            *split_mixed(y),
        ]
        assert [tuple(found.shape) for found in calls] == [()] * 4 + [(4,)] * 3


def test_one_margin_for_all_that_is_mapped_over(device):
    x, t = torch.randn(3, 4, 5), torch.randint(0, 5, (3, 4))
    sentence = r"^margin is one for all that torch\.vmap maps over, as a number or as a tensor per class$"
    with pytest.raises(ValueError, match=sentence):
        vmap(lambda x, t, margin: hem_loss(x, t, margin=margin))(x, t, torch.rand(3, 5))


class Network(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.linear = nn.Linear(4, 5)
        self.criterion = HEMLoss(**options)

    def forward(self, x, t):
        return self.criterion(self.linear(x), t)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", [{}, {"weight": torch.rand(5), "margin": [0.1, 0.2, 0.3, 0.4, 0.5]}])
def test_an_exported_network_trains_on_any_batch(strict, options):
    network = Network(**options)
    x, t = torch.randn(6, 4), torch.randint(0, 5, (6,))
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(network, (x, t), dynamic_shapes=({0: batch}, {0: batch}), strict=strict)
    assert not any("hem_ext" in str(node.target) for node in program.graph.nodes)
    exported = program.module()
    for count in (1, 3, 6):
        network.zero_grad()
        network(x[:count], t[:count]).backward()
        exported.zero_grad()
        loss = exported(x[:count], t[:count])
        loss.backward()
        torch.testing.assert_close(loss, network(x[:count], t[:count]))
        torch.testing.assert_close(exported.linear.weight.grad, network.linear.weight.grad)


def test_a_symbolic_trace_holds_the_call():
    network = Network(margin=0.5)
    x, t = torch.randn(6, 4), torch.randint(0, 5, (6,))
    traced = torch.fx.symbolic_trace(network)
    assert hem_loss in [node.target for node in traced.graph.nodes]
    assert torch.equal(traced(x, t), network(x, t))
    traced(x, t).backward()
    assert network.linear.weight.grad is not None


def test_a_subclass_of_tensor_is_told_of_the_call():
    calls = []

    class Told(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            calls.append(function)
            return super().__torch_function__(function, types, args, kwargs)

    x, t = torch.randn(6, 5), torch.randint(0, 5, (6,))
    assert hem_loss(x.as_subclass(Told), t, margin=0.5) == hem_loss(x, t, margin=0.5)
    assert hem_loss in calls
