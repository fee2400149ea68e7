"""Classes that are shared out over gloo processes, against the loss of all of them in one."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cases import REDUCTIONS, Calls, assert_gradient, assert_loss, eighths, logits, targets
from processes import Functions, Worlds
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from hem_ext import _native, arguments, hem_loss, reference
from hem_ext.parallel import _check_for_kernels, class_parallel_hem_loss

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
    backend: str = "auto"

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
        loss = class_parallel_hem_loss(local, t, backend=self.backend, **options)
        (gradient,) = torch.autograd.grad(loss, local, grad_loss.to(loss.dtype))
        return loss.detach(), gradient


# Classes of each process, narrow and wide; some have one, or none.
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
    for backend in ("native", "reference"):
        yield Case(SHARES[world][0], pixels=(3, 2), reduction="none", backend=backend)
        yield Case(tuple(20 * size for size in SHARES[world][0]), reduction="none", backend=backend)
        yield Case(SHARES[world][0], special="finished", ignore_index=1, reduction="none", backend=backend)
        # Whole words of bits.
        yield Case((32, 64, 96, 32)[:world], special="broken", reduction="none", backend=backend)
        yield Case(SHARES[world][-1], dtype=torch.bfloat16, special="broken", reduction="none", backend=backend)
    yield Case(tuple(70 + 33 * size for size in SHARES[world][0]), samples=130, reduction="none")


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


@in_processes(2)
def an_ignored_label_that_no_target_can_be(rank):
    x = torch.full((1, 100), torch.nan)
    return class_parallel_hem_loss(x, torch.tensor([156], dtype=torch.uint8))  # -100, to eight bits


def test_an_ignored_label_that_no_target_can_be(worlds):
    assert all(loss.isnan() for loss in worlds(2, "an_ignored_label_that_no_target_can_be"))


@in_processes(2)
def more_classes_than_float32_counts(rank):
    """2**24 + 4 of them: the errors that are kept are all but one, which float32 rounds up to all."""
    x = torch.zeros(1, 2**23 + 2, requires_grad=True)
    loss = class_parallel_hem_loss(x, torch.zeros(1, dtype=torch.long))
    return loss.detach(), torch.autograd.grad(loss, x)[0].isnan().any()


def test_a_count_that_is_rounded_to_all_classes(worlds):
    for loss, is_nan in worlds(2, "more_classes_than_float32_counts"):
        torch.testing.assert_close(loss, torch.tensor(0.2))
        assert not is_nan


@in_processes(2)
def in_plain_pytorch(rank):
    _native.warn_of_fallback.cache_clear()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(_native, "devices", frozenset())
        class_parallel_hem_loss(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))
    return [(str(w.message), w.filename) for w in caught if "plain PyTorch" in str(w.message)]


def test_a_device_without_kernels_is_told(worlds):
    for caught in worlds(2, "in_plain_pytorch"):
        words = "class_parallel_hem_loss runs in plain PyTorch: hem_ext was built without kernels for 'cpu' tensors"
        assert caught == [(words, __file__)]


@in_processes(2)
def one_class_of_one_process(rank):
    """One class of all, in one of them: its only errors are none, and a target that is NaN breaks it all the same."""
    found = []
    for backend in ("native", "reference"):
        x = torch.tensor([[torch.nan], [0.0], [0.0]])[:, rank:].requires_grad_()
        options = {"margin": [0.5], "reduction": "none", "backend": backend if rank == 0 else "auto"}
        loss = class_parallel_hem_loss(x, torch.tensor([0, 0, -100]), **options)
        found.append((loss.detach(), torch.autograd.grad(loss, x, torch.ones(3))[0]))
    return found


def test_one_class_of_all(worlds):
    for found, classes in zip(worlds(2, "one_class_of_one_process"), (1, 0), strict=True):
        for loss, gradient in found:
            assert loss.isnan().tolist() == [True, False, False]
            assert gradient.shape == (3, classes)
            assert gradient.isnan().sum(1).tolist() == [classes, 0, 0]


@in_processes(3)
def in_a_part_of_the_world(rank):
    group = torch.distributed.new_group([0, 2])
    if rank == 1:
        return None
    found = []
    for backend, reduction in itertools.product(("native", "reference"), REDUCTIONS):
        x, t, options, grad_loss = Case((4, 5), reduction=reduction).batch()
        local = x[:, :4] if rank == 0 else x[:, 4:]
        local.requires_grad_()
        loss = class_parallel_hem_loss(local, t, group=group, backend=backend, **options)
        found.append((loss.detach(), torch.autograd.grad(loss, local, grad_loss.to(loss.dtype))[0]))
    return found


def test_a_group_that_is_not_the_world(worlds):
    first, _, second = worlds(3, "in_a_part_of_the_world")
    for of_reduction, reduction in zip(zip(first, second, strict=True), 2 * REDUCTIONS, strict=True):
        x, t, options, grad_loss = Case((4, 5), reduction=reduction).batch()
        expected = hem_loss(x.requires_grad_(), t, **options)
        for loss, _ in of_reduction:
            torch.testing.assert_close(loss, expected)
        gradient = torch.cat([gradient for _, gradient in of_reduction], 1)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, x, grad_loss.to(expected.dtype))[0])


# --- what is wrong -----------------------------------------------------------------------------------------------


def told(local, target, **options):
    try:
        class_parallel_hem_loss(local, target, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def without_kernels(x, t, here):
    with pytest.MonkeyPatch.context() as patch:
        if here:
            patch.setattr(_native, "devices", frozenset())
        return told(x, t, backend="native")


def as_on_a_gpu(x, t):
    """Where values are not looked at before the others wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "check_values", lambda *_, **__: None)
        return told(x, t)


def behind_a_header(x):
    return torch.frombuffer(bytearray(1 + x.nbytes), dtype=x.dtype, offset=1).view_as(x).copy_(x)


def without_memory(x):
    x = x.clone()
    x.untyped_storage().resize_(4)
    return x


@in_processes(3)
def wrong(rank):
    x, t = logits((4, 3)), targets((4, 9))
    bad = t.clone()
    bad[2] = 9
    everywhere = {
        "a target": told(x, bad),
        "an option": told(x, t, reduction="average"),
        "a backend": told(x, t, backend="fast"),
        "margins": told(x, t, margin=torch.ones(3)),
        "negative weights": told(x, t, weight=-torch.ones(9)),
        "negative margins": told(x, t, margin=-torch.ones(9)),
        "targets elsewhere": told(x, t.to("meta")),
    }
    alone = {
        (1, "a dtype"): told(x.long() if rank == 1 else x, t),
        (2, "a shape"): told(x[:2] if rank == 2 else x, t),
        (1, "dimensions"): told(x[:, 0] if rank == 1 else x, t),
        (0, "no tensor"): told(None if rank == 0 else x, t),
        (1, "a reduction"): told(x, t, reduction="average" if rank == 1 else "mean"),
        (0, "a number too large"): told(x, t, margin=10**400 if rank == 0 else 0.5),
        (1, "targets"): told(x, bad if rank == 1 else t),
        (2, "margins"): told(x, t, margin=torch.ones(8 if rank == 2 else 9)),
        (1, "kernels"): without_kernels(x, t, rank == 1),
        (2, "memory of logits"): told(behind_a_header(x) if rank == 2 else x, t),
        (1, "memory of targets"): told(x, behind_a_header(t) if rank == 1 else t),
        (0, "memory of margins"): told(x, t, margin=behind_a_header(torch.ones(9)) if rank == 0 else torch.ones(9)),
        (1, "no memory"): told(without_memory(x) if rank == 1 else x, t),
        (2, "classes"): told(x[:, :1].expand(4, 2**31 - 3), t, backend="native" if rank == 2 else "reference"),
    }
    for label in (-1, 9):
        bad[2] = label
        alone[1, f"a target on a GPU, {label}"] = as_on_a_gpu(x, bad if rank == 1 else t)
    mesh = init_device_mesh("cpu", (3,))
    placed, placed_t, half = (distribute_tensor(v, mesh, [Shard(0)]) for v in (torch.ones(9), t, torch.ones(9).half()))
    y = distribute_tensor(logits((4, 9)), mesh, [Shard(1)])
    whole = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    alone[2, "a placement"] = told(whole if rank == 2 else y, t)
    differing = {
        "the dtype of local_logits": told(x.double() if rank == 2 else x, t),
        "the type of device of local_logits": told(*((x.to("meta"), t.to("meta")) if rank == 1 else (x, t))),
        "the shape of target": told(*((x.view(2, 3, 2), t.view(2, 2)) if rank == 1 else (x, t))),
        "target": told(x, placed_t if rank == 1 else t),
        "margin": told(x, t, margin=0.5 if rank == 0 else 0.25),
        "weight": told(x, t, weight=(placed, torch.ones(9), half)[rank]),
        "ignore_index": told(x, t, ignore_index=255 if rank else -100),
        "reduction": told(x, t, reduction=("mean", "sum", "none")[rank]),
    }
    two = told(*((None, t) if rank == 0 else (x, None) if rank == 1 else (x, t)))
    # Ranks are those of all processes, whatever the group.
    group = torch.distributed.new_group([1, 2])
    in_group = told(x, t[:1] if rank == 2 else t, group=group) if rank else None
    assert told(x, t) is None  # nobody is left behind
    return everywhere, alone, differing, two, in_group


def test_what_is_wrong_is_told_in_every_process(worlds):
    found = worlds(3, "wrong")
    for everywhere, *_ in found:
        assert everywhere["a target"] == (
            "IndexError",
            "target[2] is 9, which is neither a class in [0, 9) nor ignore_index (-100)",
        )
        assert everywhere["an option"][0] == "ValueError"
        assert everywhere["a backend"][1].startswith("backend must be one of 'auto', 'native' or 'reference'")
        assert everywhere["an option"][1].startswith("reduction must be one of")
        assert "margin must have shape (C,) = (9,)" in everywhere["margins"][1]
        assert everywhere["negative weights"][1] == "weight must be finite and not negative, but weight[0] is -1"
        assert everywhere["negative margins"][1] == "margin must be finite and not negative, but margin[0] is -1"
        assert everywhere["targets elsewhere"] == (
            "RuntimeError",
            "expected target on the device of local_logits, cpu, got target on meta",
        )
    errors = {"a dtype": "TypeError", "no tensor": "TypeError", "kernels": "RuntimeError", "no memory": "RuntimeError"}
    errors |= dict.fromkeys(("targets", "a target on a GPU, -1", "a target on a GPU, 9"), "IndexError")
    errors |= dict.fromkeys(("a shape", "dimensions", "a reduction", "a number too large", "margins"), "ValueError")
    errors |= dict.fromkeys((f"memory of {name}" for name in ("logits", "targets", "margins")), "ValueError")
    errors |= dict.fromkeys(("classes", "a placement"), "ValueError")
    assert {name for _, name in found[0][1]} == errors.keys()
    for culprit, name in found[0][1]:
        there, error = found[culprit][1][culprit, name], errors[name]
        assert there[0] == error, (name, there)
        for rank in {0, 1, 2} - {culprit}:
            assert found[rank][1][culprit, name] == (
                "RuntimeError",
                f"class_parallel_hem_loss was given something wrong in rank {culprit}: {error}: {there[1]}",
            )
    here = {name: found[culprit][1][culprit, name][1] for culprit, name in found[0][1]}
    assert here["a dtype"] == "local_logits must be float32, float64, float16 or bfloat16, got torch.int64"
    assert here["a shape"] == (
        "expected target of shape (2,) for local_logits of shape (2, 3), got target of shape (4,)"
    )
    assert here["dimensions"] == "local_logits must have shape (N, C_local) or (N, C_local, d1, ..., dk), got (4,)"
    assert here["no tensor"] == "local_logits must be a tensor, got NoneType"
    for label in (-1, 9):
        assert here[f"a target on a GPU, {label}"] == "a target is neither a class in [0, 9) nor ignore_index"
    assert here["classes"] == f"the kernels take at most 2**31 - 1 classes, got {3 * (2**31 - 3)} in all processes"
    _check_for_kernels(2**31 - 1)
    words = "class_parallel_hem_loss(backend='native'): hem_ext was built without kernels for 'cpu' tensors"
    assert here["kernels"] == words
    for name, of, size in (("local_logits", "logits", 4), ("target", "targets", 8), ("margin", "margins", 4)):
        words = f"the memory of {name} is not aligned to its elements of {size} bytes: give a copy, .clone()"
        assert here[f"memory of {of}"] == words
    two = [two for *_, two, _ in found]
    assert [kind for kind, _ in two] == ["TypeError", "TypeError", "RuntimeError"]
    assert two[1][1] == "target must be a tensor, got NoneType"
    assert two[2][1].endswith(f"wrong in rank 0: TypeError: {two[0][1]}; in rank 1: TypeError: {two[1][1]}")
    assert "something wrong in rank 2: ValueError: expected target of shape (4,)" in found[1][-1][1]


def test_what_is_not_the_same_in_every_process_is_told(worlds):
    placed = "(Shard(dim=0),) over ranks [0, 1, 2]"
    of_four = f"a DTensor of torch.int64 and shape (4,), {placed}"
    of_nine = f"a DTensor of torch.float32 and shape (9,), {placed}"
    expected = {
        "the dtype of local_logits": "torch.float32 in ranks 0, 1; torch.float64 in rank 2",
        "the shape of target": "(4,) in ranks 0, 2; (2, 2) in rank 1",
        "the type of device of local_logits": "cpu in ranks 0, 2; meta in rank 1",
        "target": f"a tensor in ranks 0, 2; {of_four} in rank 1",
        "margin": "0.5 in rank 0; 0.25 in ranks 1, 2",
        "weight": f"{of_nine} in rank 0; a tensor in rank 1; {of_nine.replace('float32', 'float16')} in rank 2",
        "ignore_index": "-100 in rank 0; 255 in ranks 1, 2",
        "reduction": "mean in rank 0; sum in rank 1; none in rank 2",
    }
    for _, _, differing, *_ in worlds(3, "wrong"):
        for name, values in expected.items():
            assert differing[name] == ("ValueError", f"{name} must be the same in every process, got {values}")


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


@in_processes(2)
def constants_that_are_sharded(rank):
    mesh = init_device_mesh("cpu", (2,))
    x, t, margins, weights = logits((6, 7)), targets((6, 7)), eighths(7), eighths(7) + 0.125
    y = distribute_tensor(x, mesh, [Shard(1)])
    plain = class_parallel_hem_loss(y, t, margin=margins, weight=weights)
    found = []
    for placement in (Shard(0), Replicate()):
        shared = {"margin": distribute_tensor(margins, mesh, [placement])}
        shared["weight"] = distribute_tensor(weights, mesh, [placement])
        found.append(class_parallel_hem_loss(y, t, **shared))
        found.append(class_parallel_hem_loss(y.to_local(), distribute_tensor(t, mesh, [Shard(0)]), **shared))
    return plain, found


def test_constants_that_are_sharded(worlds):
    for plain, found in worlds(2, "constants_that_are_sharded"):
        assert all(torch.equal(loss, plain) for loss in found)


# --- what comes back ---------------------------------------------------------------------------------------------


def sliced(x):
    """Some of the classes of more."""
    whole = torch.cat([x, x], 1)
    return (whole if x.dim() == 2 else whole.contiguous(memory_format=torch.channels_last))[:, : x.shape[1]]


LAYOUTS = {
    "rows": ((6, 4), lambda x: x),
    "transposed": ((6, 4), lambda x: x.t().contiguous().t()),
    "sliced rows": ((6, 4), sliced),
    "pixels": ((2, 4, 3, 5), lambda x: x),
    "channels_last": ((2, 4, 3, 5), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "sliced channels_last": ((2, 4, 3, 5), sliced),
}


@in_processes(2)
def as_the_logits_lie(rank):
    found = {}
    for name, (shape, lie) in LAYOUTS.items():
        x, t = logits((shape[0], 2 * shape[1], *shape[2:])), targets((shape[0], 2 * shape[1], *shape[2:]))
        local = lie(x.chunk(2, 1)[rank].contiguous()).requires_grad_()
        (gradient,) = torch.autograd.grad(class_parallel_hem_loss(local, t), local)
        (by_itself,) = torch.autograd.grad(hem_loss(local, t % shape[1]), local)
        found[name] = gradient, gradient.stride(), by_itself.stride(), x, t
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_gradient_lies_as_the_logits_do(worlds, name):
    found = [of_rank[name] for of_rank in worlds(2, "as_the_logits_lie")]
    for _, stride, expected, *_ in found:
        assert stride == expected
    *_, x, t = found[0]
    x.requires_grad_()
    expected = torch.autograd.grad(hem_loss(x, t), x)[0]
    torch.testing.assert_close(torch.cat([gradient for gradient, *_ in found], 1), expected)


class Shared(torch.autograd.Function):
    """Logits that every process has, each of which uses a part."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        torch.distributed.all_reduce(grad)
        return grad


@in_processes(2)
def numerically(rank):
    x, t = torch.randn(8, 7, dtype=torch.float64, requires_grad=True), targets((8, 7), ignore_index=-100)
    options = {"margin": eighths(7), "weight": eighths(7) + 0.125}
    shares = (slice(0, 3), slice(3, 7))
    return [
        torch.autograd.gradcheck(
            lambda x, r=reduction: class_parallel_hem_loss(Shared.apply(x)[:, shares[rank]], t, reduction=r, **options),
            x,
        )
        for reduction in REDUCTIONS
    ]


def test_gradcheck(worlds):
    assert all(all(passed) for passed in worlds(2, "numerically"))


@in_processes(2)
def compiled(rank):
    x, t = logits((6, 4)), targets((6, 8))
    graphs = []

    def step(x):
        return class_parallel_hem_loss(2 * x, t, margin=0.5) * 3

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    found = []
    for function in (step, torch.compile(step, backend=backend)):
        y = x.clone().requires_grad_()
        loss = function(y)
        found.append((loss.detach(), *torch.autograd.grad(loss, y)))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(step, backend=backend, fullgraph=True)(x)
    return *found, len(graphs)


def test_it_breaks_the_graph_and_stays_the_same(worlds):
    for eager, compiled, graphs in worlds(2, "compiled"):
        assert graphs == 2  # what comes before it, and after
        assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


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
        assert forward == 5 * 4 * 100 + 4 * 2 + 8 * 3  # five numbers a sample, one a process, three of each process
        assert backward == 0
        assert saved < 100 * 500 / 8 * 1.5  # a bit a logit, and some numbers a sample


@in_processes(2)
def kernels(rank):
    found = {}
    for backend in ("auto", "native", "reference"):
        x, t = logits((4, 3)).requires_grad_(), targets((4, 6))
        with Calls() as calls:
            class_parallel_hem_loss(x, t, backend=backend).backward()
        found[backend] = calls.names
    return found


def test_kernels_are_taken(worlds):
    ours = [f"hem_ext::class_parallel_hem_{name}" for name in ("errors", "keep", "backward")]
    for found in worlds(2, "kernels"):
        assert found == {"auto": ours, "native": ours, "reference": []}


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


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_alone_it_is_the_loss(monkeypatch, reduction):
    x, t = logits((6, 7)), targets((6, 7))
    options = {"margin": 0.5, "weight": eighths(7), "ignore_index": int(t[0]), "reduction": reduction}
    assert torch.equal(class_parallel_hem_loss(x, t, **options), hem_loss(x, t, **options))
    monkeypatch.setattr(_native, "devices", frozenset())
    with pytest.raises(RuntimeError, match="kernels for 'cpu' tensors"):
        class_parallel_hem_loss(x, t, backend="native", **options)


def test_no_telling_which_group_it_is(mesh):
    x, t = logits((4, 3)), targets((4, 3))
    other = DeviceMesh("cpu", torch.tensor([[0]]))
    y, z = distribute_tensor(x, mesh, [Shard(1)]), distribute_tensor(x, other, [Shard(1), Replicate()])
    assert told(x, t, group="gloo") == ("TypeError", "group must be a torch.distributed.ProcessGroup or None, got str")
    assert told(y, t, group=mesh.get_group()) == (
        "ValueError",
        "group is not for a DTensor, which knows its device mesh",
    )
    assert told(z, t) == (
        "ValueError",
        "local_logits must be a DTensor that is sharded over its classes, dimension 1, on a mesh of one dimension, got "
        f"{z.placements} on {other}",
    )


@in_processes(2)
def beside_another_default_device(rank):
    x, t, weights = logits((6, 8)), targets((6, 8)), eighths(8) + 0.125
    local = x.chunk(2, 1)[rank].requires_grad_()
    with torch.device("meta"):
        loss = class_parallel_hem_loss(local, t, margin=0.5, weight=weights)
        (gradient,) = torch.autograd.grad(loss, local)
    return x, t, weights, loss.detach(), gradient


def test_another_default_device(worlds):
    found = worlds(2, "beside_another_default_device")
    x, t, weights, loss, _ = found[0]
    x.requires_grad_()
    expected = hem_loss(x, t, margin=0.5, weight=weights)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(torch.cat([g for *_, g in found], 1), torch.autograd.grad(expected, x)[0])


@in_processes(1)
def alone(rank):
    mesh = init_device_mesh("cpu", (1,))
    x, t, margins = logits((6, 7)), targets((6, 7)), eighths(7)
    y, labels, shared = (distribute_tensor(v, mesh, [Shard(v.dim() - 1)]) for v in (x, t, margins))
    found = class_parallel_hem_loss(y, labels, margin=shared, weight=shared)
    return hem_loss(x, t, margins, margin=margins), found, told(distribute_tensor(x, mesh, [Replicate()]), t)


def test_alone_in_a_group(worlds):
    ((expected, found, (kind, words)),) = worlds(1, "alone")
    assert found == expected
    assert kind == "ValueError"
    assert words.startswith("local_logits must be a DTensor that is sharded over its classes, dimension 1, on a mesh")
