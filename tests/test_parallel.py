"""Classes that are shared out over gloo processes, against the loss of all of them in one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cases import REDUCTIONS, assert_gradient, assert_loss, eighths, logits, targets
from processes import Functions, Worlds
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from hem_ext import hem_loss, reference
from hem_ext.parallel import class_parallel_hem_loss

in_processes = Functions()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return Worlds(in_processes, tmp_path_factory.mktemp("worlds"))


class Case(NamedTuple):
    """Logits and how their classes are shared out. The processes and the test make the same ones."""

    classes: tuple[int, ...]  # of each process
    samples: int = 6
    pixels: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    target_dtype: torch.dtype = torch.int64
    reduction: str = "mean"
    plain: bool = False  # one margin, no weights
    ignore_index: int = -100
    special: str = ""

    def batch(self):
        torch.manual_seed(0)
        shape = (self.samples, sum(self.classes), *self.pixels)
        x, t = logits(shape, self.dtype), targets(shape, ignore_index=self.ignore_index)
        if self.special == "far targets":  # none in the first process
            t = t.where(t == self.ignore_index, shape[1] - 1)
        if self.special == "all ignored":
            t = torch.full_like(t, self.ignore_index)
        if self.special == "finished":
            x.scatter_(1, t.clamp(min=0).unsqueeze(1), 99.0)
        if self.special == "broken":
            t[:] = torch.tensor([0, shape[1] - 1, 1, 0, self.ignore_index, shape[1] - 1])
            x[0, 0], x[1, 0], x[2, -1] = torch.nan, torch.nan, torch.inf  # target, rival, rival
            x[3, 0], x[4], x[5, :-1] = torch.inf, torch.nan, -torch.inf  # finished, ignored, finished
        options = {"reduction": self.reduction, "ignore_index": self.ignore_index}
        if not self.plain:
            options |= {"margin": eighths(shape[1]), "weight": eighths(shape[1]) + 0.125}
        grad_loss = torch.rand(t.shape if self.reduction == "none" else (), dtype=torch.float64)
        return x, t.to(self.target_dtype), options, grad_loss

    def run(self, rank):
        x, t, options, grad_loss = self.batch()
        begin = sum(self.classes[:rank])
        local = x[:, begin : begin + self.classes[rank]]
        local = (local.contiguous() if rank % 2 else local).detach().requires_grad_()  # also where they lie
        loss = class_parallel_hem_loss(local, t, **options)
        (gradient,) = torch.autograd.grad(loss, local, grad_loss.to(loss.dtype))
        return loss.detach(), gradient


SHARES = {2: [(3, 4), (1, 9), (40, 30), (5, 0)], 3: [(2, 3, 4), (1, 1, 1), (0, 33, 9)], 4: [(3, 3, 3, 1)]}
SPECIAL = ("far targets", "all ignored", "finished", "broken")


def cases(world):
    dtypes = itertools.cycle([torch.float32, torch.float64, torch.bfloat16, torch.float16])
    for classes in SHARES[world]:
        for reduction in REDUCTIONS:
            yield Case(classes, dtype=next(dtypes), reduction=reduction)
        next(dtypes)  # another one with each reduction
    for reduction, special in zip(REDUCTIONS, SPECIAL, strict=True):
        yield Case(SHARES[world][0], special=special, reduction=reduction)
        yield Case(SHARES[world][0], special=special, plain=True)
    yield Case(SHARES[world][0], pixels=(3, 2), target_dtype=torch.uint8, ignore_index=255)
    yield Case(SHARES[world][0], pixels=(3,), reduction="none", target_dtype=torch.int16, ignore_index=1)
    yield Case(SHARES[world][0], samples=0)


@in_processes(2)
def shared_by_two(rank):
    return [case.run(rank) for case in cases(2)]


@in_processes(3)
def shared_by_three(rank):
    return [case.run(rank) for case in cases(3)]


@in_processes(4)
def shared_by_four(rank):
    return [case.run(rank) for case in cases(4)]


@pytest.mark.parametrize(("world", "name"), [(2, "shared_by_two"), (3, "shared_by_three"), (4, "shared_by_four")])
def test_the_loss_of_all_classes(worlds, world, name):
    for case, *found in zip(cases(world), *worlds(world, name), strict=True):
        x, t, options, grad_loss = case.batch()
        x.requires_grad_()
        expected = reference.hem_loss(x, t, **options)
        (gradient,) = torch.autograd.grad(expected, x, grad_loss.to(expected.dtype))
        for loss, _ in found:
            assert loss.dtype == expected.dtype, case
            torch.testing.assert_close(loss, expected, equal_nan=True, msg=str(case))
        whole = torch.cat([gradient for _, gradient in found], 1)
        assert whole.dtype == x.dtype
        close = {"rtol": 2e-2, "atol": 1e-3} if case.dtype in (torch.float16, torch.bfloat16) else {}
        torch.testing.assert_close(whole, gradient, equal_nan=True, msg=str(case), **close)


# --- what is wrong -----------------------------------------------------------------------------------------------


@in_processes(3)
def wrong(rank):
    x, t = logits((4, 3)), targets((4, 9))

    def told(local=x, target=t, **options):
        try:
            class_parallel_hem_loss(local, target, **options)
        except Exception as error:
            return type(error).__name__, str(error)
        return None

    bad = t.clone()
    bad[2] = 9
    found = {
        "a target": told(target=bad),
        "an option": told(reduction="average"),
        "margins": told(margin=torch.ones(3)),
        "negative weights": told(weight=-torch.ones(9)),
        # Of one process alone.
        "a dtype": told(local=x.long() if rank == 1 else x),
        "a shape": told(local=x[:2] if rank == 2 else x),
        "no tensor": told(local=None if rank == 0 else x),
        "its targets": told(target=bad if rank == 1 else t),
        "its margins": told(margin=[0.5] * 8 if rank == 0 else 0.5),
        "another dtype": told(local=x.double() if rank == 2 else x),
        "a number too large": told(margin=10**400 if rank == 0 else 0.5),
        "more samples": told(*((logits((5, 3)), targets((5, 9))) if rank == 1 else (x, t))),
    }
    assert told() is None  # nobody is left behind
    return found


def test_what_is_wrong_is_told_in_every_process(worlds):
    found = worlds(3, "wrong")
    for told in found:
        assert told["a target"] == (
            "IndexError",
            "target[2] is 9, which is neither a class in [0, 9) nor ignore_index (-100)",
        )
        assert told["an option"][0] == "ValueError"
        assert told["an option"][1].startswith("reduction must be one of")
        assert "margin must have shape (C,) = (9,)" in told["margins"][1]
        assert told["negative weights"][1] == "weight must be finite and not negative, but weight[0] is -1"
        assert "got dtypes ['torch.float32', 'torch.float32', 'torch.float64']" in told["another dtype"][1]
        assert "got numbers of samples ['4', '5', '4']" in told["more samples"][1]
    alone = {"a dtype": (1, "TypeError"), "a shape": (2, "ValueError"), "no tensor": (0, "TypeError")}
    alone |= {"a number too large": (0, "OverflowError")}
    alone |= {"its targets": (1, "IndexError"), "its margins": (0, "ValueError")}
    for name, (culprit, error) in alone.items():
        for rank, told in enumerate(found):
            assert told[name][0] == (error if rank == culprit else "RuntimeError"), (name, rank, told[name])
    assert "the arguments of process 1 of 3 are wrong" in found[0]["a dtype"][1]
    assert "the arguments of another process are wrong" in found[0]["its targets"][1]


# --- with what comes before it -----------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU()).double(), nn.Linear(8, 10).double()


@in_processes(2)
def column_parallel(rank):
    """A classifier whose columns are shared out: its gradients, and that of what comes before."""
    mesh = init_device_mesh("cpu", (2,))
    body, head = network()
    x, t = torch.randn(6, 4).double(), targets((6, 10), ignore_index=-100)
    parallelize_module(head, mesh, ColwiseParallel(output_layouts=Shard(-1), use_local_output=False))
    loss = class_parallel_hem_loss(head(body(x)), t, margin=0.5)
    loss.backward()
    gradients = [p.grad for p in (*body.parameters(), *head.parameters())]
    return loss.detach(), [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]


def test_a_column_parallel_classifier(worlds):
    for loss, gradients in worlds(2, "column_parallel"):
        torch.manual_seed(0)
        body, head = network()
        x, t = torch.randn(6, 4).double(), targets((6, 10), ignore_index=-100)
        expected = hem_loss(head(body(x)), t, margin=0.5)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradients, [p.grad for p in (*body.parameters(), *head.parameters())])


@in_processes(2)
def as_documented(rank):
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text("utf-8")
    code = page.partition("\n## Classes shared out\n")[2].partition("```python\n")[2].partition("```")[0]
    model, classifier = network()
    x, t = torch.randn(12, 4).double(), targets((12, 10))
    exec(code, {"model": model, "classifier": classifier, "device": "cpu", "batches": [(x[:6], t[:6]), (x[6:], t[6:])]})
    weights = (*model.parameters(), *classifier.parameters())
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for p in weights]


def test_the_example_of_the_page(worlds):
    model, classifier = network()
    x, t = torch.randn(12, 4).double(), targets((12, 10))
    optimizer = torch.optim.SGD([*model.parameters(), *classifier.parameters()], lr=0.1)
    for part in (slice(0, 6), slice(6, 12)):
        optimizer.zero_grad()
        hem_loss(classifier(model(x[part])), t[part]).backward()
        optimizer.step()
    for found in worlds(2, "as_documented"):
        torch.testing.assert_close(found, [p.detach() for p in optimizer.param_groups[0]["params"]])


@in_processes(2)
def tensors_that_are_sharded(rank):
    mesh = init_device_mesh("cpu", (2,))
    x, t = logits((6, 7)), targets((6, 7))
    y = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
    loss = class_parallel_hem_loss(y, distribute_tensor(t, mesh, [Replicate()]))
    loss.backward()
    reversed_mesh = DeviceMesh("cpu", [1, 0])
    z = distribute_tensor(x, reversed_mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"in ascending order, got \[1, 0\]"):
        class_parallel_hem_loss(z, t)  # torch itself mixes up the shares of such a mesh
    told = []
    for placement in (Shard(0), Replicate()):
        try:
            class_parallel_hem_loss(distribute_tensor(x, mesh, [placement]), t)
        except ValueError as error:
            told.append(str(error))
    return loss.detach(), y.grad.full_tensor(), told


def test_tensors_that_are_sharded(worlds):
    for loss, gradient, told in worlds(2, "tensors_that_are_sharded"):
        torch.manual_seed(0)
        x, t = logits((6, 7)).requires_grad_(), targets((6, 7))
        expected = hem_loss(x, t)
        assert_loss(loss, expected.detach().double())
        assert_gradient(gradient, torch.autograd.grad(expected, x)[0].double())
        assert ["sharded over its classes" in words for words in told] == [True, True]


# --- what it costs -----------------------------------------------------------------------------------------------


@in_processes(2)
def costs(rank):
    """Bytes that are handed to collectives, and that are kept for backward."""
    sent = []

    def counting(name):
        function = getattr(torch.distributed, name)

        def call(*tensors, **options):
            sent.append(next(x for x in tensors[::-1] if isinstance(x, torch.Tensor)).nbytes)
            return function(*tensors, **options)

        return call

    patch = pytest.MonkeyPatch()
    for name in ("all_reduce", "all_gather"):
        patch.setattr(torch.distributed, name, counting(name))
    saved = []
    x, t = logits((100, 500)).requires_grad_(), targets((100, 1000))
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s.nbytes) or s, lambda s: s):
        loss = class_parallel_hem_loss(x, t)
    forward = sum(sent)
    loss.backward()
    patch.undo()
    return forward, sum(sent) - forward, sum(saved)


def test_the_logits_do_not_cross_the_wire(worlds):
    for forward, backward, saved in worlds(2, "costs"):
        assert forward == 5 * 4 * 100 + 4 + 4 * 8  # five numbers a sample, whether all is well, four a process
        assert backward == 0
        assert saved < 100 * 500 / 8 * 1.5  # a bit a logit, and some numbers a sample


@in_processes(2)
def twice(rank):
    x, t = logits((4, 3)).requires_grad_(), targets((4, 6))
    scale = torch.ones((), requires_grad=True)
    (gradient,) = torch.autograd.grad(scale * class_parallel_hem_loss(x, t), x, create_graph=True)
    try:
        gradient.sum().backward()
    except RuntimeError as error:
        return str(error)


def test_it_is_differentiated_once(worlds):
    assert all("once_differentiable" in words for words in worlds(2, "twice"))


def test_alone_it_is_the_loss():
    x, t = logits((6, 7)), targets((6, 7))
    assert class_parallel_hem_loss(x, t, margin=0.5) == hem_loss(x, t, margin=0.5)
