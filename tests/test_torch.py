"""Every private name of torch, taken away in turn."""

import ast
import operator
import re
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import logits, targets
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hem_ext import HEMLoss, Selective, _torch, hem, hem_loss, selective
from hem_ext.arguments import BAD_VALUE


def load(*missing, seen=None):
    """The module as it is in a torch without some names; those that it asks for are added to `seen`."""
    spec = util.spec_from_file_location("hem_ext._torch", _torch.__file__)
    module = util.module_from_spec(spec)

    def attrgetter(name, attrgetter=operator.attrgetter):
        if seen is not None:
            seen.append(name)
        return attrgetter("missing" if name in missing else name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "attrgetter", attrgetter)
        spec.loader.exec_module(module)
    return module


load(seen=(NAMES := []))
WITHOUT = [*((name,) for name in NAMES), tuple(NAMES)]


@pytest.fixture(params=WITHOUT, ids=lambda names: names[0] if len(names) == 1 else "all")
def lacking(request, monkeypatch):
    """The package in a torch without one name, or without any: the missing ones."""
    module = load(*request.param)
    monkeypatch.setattr(hem, "_torch", module)
    monkeypatch.setattr(hem, "_call_forward", module.from_autograd(hem._forward))
    monkeypatch.setattr(hem, "_call_backward", module.from_autograd(hem._backward))
    monkeypatch.setattr(hem, "_eager_apply", module.eager_apply(hem.HEM))
    monkeypatch.setattr(selective, "_torch", module)
    return request.param


class Op:
    """An op that says which way it was called."""

    def __call__(self, *args):
        return "by the dispatcher"

    def redispatch(self, keys, *args):
        return "directly"


OF_CALLS = {
    "_C._len_torch_dispatch_stack",
    "_C._get_tracing_state",
    "autograd._profiler_enabled",
    "_C._data_address",
    "_C.DispatchKey",
    "_C.DispatchKeySet",
}


def test_the_names_of_calls_are_among_those_that_are_asked_for():
    assert set(NAMES) >= OF_CALLS


@pytest.mark.parametrize("missing", WITHOUT)
def test_who_cannot_be_asked_is_told(missing):
    way = load(*missing).from_autograd(Op())(torch.ones(2), 1, 0.5, None, True)
    assert way == ("by the dispatcher" if OF_CALLS & set(missing) else "directly")


def test_an_op_that_has_no_other_way_is_called():
    assert _torch.from_autograd(lambda *args: args)(torch.ones(()), 3) == (torch.ones(()), 3)


def test_the_handle_of_an_op_is_called():
    op = Op()
    op._handle = SimpleNamespace(redispatch_boxed=lambda keys, *args: "by its handle")
    assert _torch.from_autograd(op)(torch.ones(2)) == "by its handle"


@pytest.mark.parametrize("device_type", ["CPU", "CUDA"])
def test_the_kernel_of_the_device_is_called(device_type):
    module = load()
    module._is_between_us = lambda args: True
    op = SimpleNamespace(redispatch=lambda keys, *args: keys)
    keys = module.from_autograd(op)(SimpleNamespace(is_cpu=device_type == "CPU"))
    assert keys.raw_repr() == module._key_set(getattr(module._keys, device_type)).raw_repr()


@pytest.mark.parametrize("missing", WITHOUT)
def test_what_cannot_be_asked_may_be_transformed(missing):
    module = load(*missing)
    asked = {"_C._are_functorch_transforms_active", "autograd.forward_ad"}
    assert module.is_eager() == asked.isdisjoint(missing)
    assert torch.func.vmap(lambda x: x + module.is_eager())(torch.zeros(1)) == 0


def test_what_is_compiled_is_not_eager():
    compiled = torch.compile(lambda x: x + _torch.is_eager(), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)) == 0


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def test_whoever_listens_is_told(device):
    call, x = _torch.from_autograd(Op()), torch.ones(3)
    ways = {"a mode": [], "a profiler": [], "a trace": [], "a transform": []}
    assert call(x) == call(nn.Parameter(x), None, x, 2) == "directly"
    with Mode():
        ways["a mode"].append(call(x))
    with torch.autograd.profiler.profile(use_kineto=False):
        ways["a profiler"].append(call(x))
    torch.jit.trace(lambda y: ways["a trace"].append(call(y)) or y, (x,), check_trace=False)
    torch.vmap(lambda y: ways["a transform"].append(call(x, y)) or y)(x)
    for what, y in {
        "negated": torch._neg_view(x),
        "zeros": torch._efficientzerotensor(3),
        "sparse": x.to_sparse(),
        "a subclass": x.as_subclass(Subclass),
        "meta": x.to("meta"),
        "a list": [x],
    }.items():
        ways[what] = [call(x, 1, y)]
    assert ways == {what: ["by the dispatcher"] for what in ways}
    assert call(x) == "directly"


def test_a_wrong_value_is_a_value_error_in_every_torch():
    def op(message):
        raise RuntimeError(message)

    call = _torch.from_autograd(op)
    with pytest.raises(ValueError, match=rf"^weight {BAD_VALUE}, but weight\[1\] is -1$"):
        call(f"weight {BAD_VALUE}, but weight[1] is -1\nException raised from hem_forward_cpu\nframe #0")
    with pytest.raises(RuntimeError, match=r"^something else\nraised from there$"):
        call("something else\nraised from there")


def test_a_torch_whose_functions_are_applied_in_one_layer(monkeypatch):
    class Function:
        @classmethod
        def apply(cls, *args):
            return cls, args

    class Loss(Function):
        pass

    monkeypatch.setattr(torch.autograd, "Function", Function)
    assert _torch.eager_apply(Loss)(1, 2) == (Loss, (1, 2))


def test_the_layer_of_transforms_is_left_out():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

    apply = _torch.eager_apply(Twice)
    assert apply != Twice.apply
    assert apply(torch.ones(())) == 2


# --- tensors --------------------------------------------------------------------------------------------------


def test_a_view_of_a_leaf():
    leaf, plain = torch.ones(3, requires_grad=True), torch.ones(3)
    assert _torch.is_view_of_leaf(leaf[:2])
    for x in (leaf, plain, plain[:2], (2 * leaf)[:2], object()):
        assert not _torch.is_view_of_leaf(x)


class Keeping(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, keep):
        y = x.clone()
        ctx.kept = y.detach() if keep else None
        return y


@pytest.mark.parametrize("keep", [False, True])
def test_what_a_function_of_python_keeps_unseen(keep):
    x = torch.ones(3, requires_grad=True)
    assert _torch.may_be_saved_unseen(Keeping.apply(x, keep)) == keep
    assert _torch.may_be_saved_unseen(Keeping.apply(x, keep)[:2]) == keep


def test_what_torch_keeps_is_seen():
    x = 2 * torch.ones(3, requires_grad=True)
    same = x.detach()
    assert not _torch.may_be_saved_unseen(x)
    assert not _torch.may_be_saved_unseen(same)
    alone = SimpleNamespace(grad_fn=None, untyped_storage=same.untyped_storage)  # in a torch without ``_base``
    assert not _torch.may_be_saved_unseen(alone)


def test_a_dtensor(mesh):
    assert _torch.is_dtensor(distribute_tensor(torch.ones(3), mesh))
    assert not _torch.is_dtensor(torch.ones(3))


# --- the loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3, 4)])
def test_the_loss_without(lacking, shape):
    x, t = logits(shape).double().requires_grad_(), targets(shape)
    for options in ({}, {"weight": torch.rand(5).double()}):
        loss, expected = (hem_loss(x, t, backend=backend, **options) for backend in ("auto", "reference"))
        torch.testing.assert_close(loss, expected)
        (gradient,) = torch.autograd.grad(2 * loss, x, retain_graph=True)
        torch.testing.assert_close(gradient, torch.autograd.grad(2 * expected, x)[0])
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        (again,) = torch.autograd.grad(scale * loss, x, create_graph=True)
        torch.testing.assert_close(torch.autograd.grad(again, scale, gradient)[0], gradient.square().sum() / 2)
    zero = torch._efficientzerotensor((), dtype=torch.float64)
    assert not torch.autograd.grad(loss, x, zero)[0].any()
    with pytest.raises(IndexError, match="is 9, which is neither a class"):
        hem_loss(x, torch.full_like(t, 9))
    with pytest.raises(ValueError, match=r"but weight\[1\] is -1"):
        hem_loss(x, t, weight=torch.tensor([1.0, -1, 1, 1, 1]))
    transformed = torch.func.grad(lambda x: hem_loss(x, t, **options))(x.detach())
    torch.testing.assert_close(transformed, torch.autograd.grad(hem_loss(x, t, **options), x)[0])


# --- networks -------------------------------------------------------------------------------------------------


def test_selective_steps_without(lacking):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 5))
    x, t = torch.randn(12, 3), targets((12, 5))
    step = Selective(model, HEMLoss())
    while step.pays_below is None:
        (expected,) = torch.autograd.grad(HEMLoss()(model(x), t), [model[0].weight])
        step(x, t).backward()
        torch.testing.assert_close(model[0].weight.grad, expected)
        model.zero_grad()
    timed = "autograd.Variable._execution_engine.queue_callback" not in lacking
    assert ("backward" in step.state_dict()["times"]) == timed
    for layer, words in ((nn.BatchNorm1d(5), "normalises by the batch"), (nn.Dropout(), "would draw another mask")):
        with pytest.raises(ValueError, match=words):
            Selective(nn.Sequential(model, layer), HEMLoss(), pays_below=1)(x, t)


@pytest.mark.parametrize("name", ["BATCH_NORM", "DROPOUT"])
def test_torchs_own_layers_are_all_there_are(name):
    layers = [kind for kind in vars(nn).values() if isinstance(kind, type)]
    found = {kind for kind in layers if issubclass(kind, getattr(load(*NAMES), name))}
    assert found == {kind for kind in layers if issubclass(kind, getattr(_torch, name))}
    assert len(found) >= 5


def test_a_module_that_keeps_nothing_of_this():
    assert _torch.forward_hooks(object()) == []
    plain = nn.Linear(2, 2)
    assert not _torch.is_compiled(plain)
    assert not _torch.is_compiled(SimpleNamespace(modules=lambda: [object()]))
    plain.register_forward_hook(before := lambda *_: None)
    plain.register_forward_pre_hook(after := lambda *_: None)
    assert set(_torch.forward_hooks(plain)) == {before, after}
    assert _torch.is_compiled(nn.Sequential(torch.compile(plain)))
    plain.compile()
    assert _torch.is_compiled(nn.Sequential(plain))


def test_what_is_not_to_be_compiled_is_not():
    graphs = []

    def keep(graph, _):
        graphs.append([node.target for node in graph.graph.nodes if node.op.startswith("call")])
        return graph

    @_torch.uncompiled
    def inner(x, *, by):
        return torch.atan2(x, by)

    compiled = torch.compile(lambda x: inner(x.sin(), by=x).cos(), backend=keep)
    x = torch.randn(3)
    torch.testing.assert_close(compiled(x), torch.atan2(x.sin(), x).cos())
    assert graphs == [["sin"], ["cos"]]
    assert inner.__name__ == "inner"


# --- all of the package ---------------------------------------------------------------------------------------


def looked_up(path):
    """The dotted names in a file, without annotations, which nobody looks up."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for field in {"annotation", "returns"} & set(node._fields):
            setattr(node, field, None)
    return [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]


def test_every_private_name_of_torch_is_here():
    private = re.compile(r"(torch|nn|F)\.([\w.]+\.)?_(?!_)\w+")
    paths = sorted(Path(_torch.__file__).parent.glob("*.py"))
    assert {path.name: found for path in paths if (found := list(filter(private.fullmatch, looked_up(path))))} == {}


BARE = """
import operator, torch
from importlib.machinery import SourceFileLoader
load = SourceFileLoader.exec_module

def load_without(self, module):
    if module.__name__ != "hem_ext._torch":
        return load(self, module)
    taken = []
    for name in {names}:
        owner, _, last = name.removesuffix(".queue_callback").rpartition(".")
        owner = operator.attrgetter(owner)(torch)
        taken.append((owner, last, getattr(owner, last)))
        delattr(owner, last)
    load(self, module)
    for one in taken:  # torch itself needs them
        setattr(*one)
    print(len(taken))

SourceFileLoader.exec_module = load_without
import hem_ext
x, t = torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1])
for f in (hem_ext.hem_loss, torch.compile(hem_ext.hem_loss, backend="eager", fullgraph=True)):
    loss = f(x, t, margin=0.5)
    (gradient,) = torch.autograd.grad(loss, x)
    print(loss.item(), gradient.tolist())
hem_ext.selective_loss(torch.nn.Linear(3, 3), hem_ext.HEMLoss(), x.detach(), t).backward()
"""


def test_a_torch_without_any_of_them():
    done = subprocess.run([sys.executable, "-c", BARE.format(names=NAMES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(len(NAMES))] + ["0.5 [[-0.5, 0.25, 0.25], [0.25, -0.5, 0.25]]"] * 2
