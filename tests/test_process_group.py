"""`process_group`: processes that share a batch, over gloo, against one that has all of it."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import oracle
import pytest
import torch
from cases import DTYPES, REDUCTIONS, assert_gradient, assert_loss, eighths, logits, targets
from processes import Functions, Worlds
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from hem_ext import HEMLoss, divide_gradients, hem_loss, reference

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"
BACKENDS = ("native", "reference")


# --- shares of a batch ----------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A batch and how it is shared. The processes and the test make the same one."""

    shares: tuple[int, ...]  # samples of each process
    shape: tuple[int, ...] = (6,)  # of one sample's logits
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    plain: bool = False  # one margin and no weights
    finished: tuple[int, ...] = ()  # processes none of whose samples is active
    ignored: tuple[int, ...] = ()  # processes whose targets are ignored
    broken: tuple[int, ...] = ()  # processes whose first sample is NaN
    reduction: str = "mean"
    backend: str = "native"

    def name(self):
        """What of it is not as usual."""
        given = {field: value for field, value in self._asdict().items() if value != self._field_defaults.get(field)}
        return " ".join(f"{field}={value}" for field, value in given.items())

    def batch(self):
        torch.manual_seed(0)
        shape = (sum(self.shares), *self.shape)
        x, t = logits(shape, self.dtype), targets(shape, ignore_index=-100)
        for rank in range(len(self.shares)):
            own = self.of(rank)
            if rank in self.finished:
                hit = nn.functional.one_hot(t[own].clamp(min=0), self.shape[0]).movedim(-1, 1)
                x[own] = 9.0 * hit.to(self.dtype)
            if rank in self.ignored:
                t[own] = -100
            if rank in self.broken:
                x[own][0, 1], t[own][0] = torch.nan, 2
        options = {"reduction": self.reduction}
        if not self.plain:
            options |= {"margin": eighths(self.shape[0]), "weight": eighths(self.shape[0]) + 0.125}
        return x, t, options

    def of(self, rank):
        return slice(sum(self.shares[:rank]), sum(self.shares[: rank + 1]))

    def run(self, rank):
        x, t, options = self.batch()
        x, t = x[self.of(rank)].clone(), t[self.of(rank)]
        if self.channels_last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        x.requires_grad_()
        loss = hem_loss(x, t, **options, process_group=torch.distributed.group.WORLD, backend=self.backend)
        loss.sum().backward()
        return loss.detach(), x.grad


def cases():
    for backend in BACKENDS:
        for shares in [(7, 3), (5, 1, 4)]:
            for reduction in REDUCTIONS:
                yield Case(shares, reduction=reduction, backend=backend)
            yield Case(shares, plain=True, backend=backend)
        for reduction in ("mean", "batchmean"):
            yield Case((3, 0, 5, 2), reduction=reduction, backend=backend)
            for special in [
                {"shares": (10, 0)},
                {"shares": (0, 0)},
                {"shares": (0, 4, 0)},
                {"shares": (6, 4), "finished": (0,)},
                {"shares": (6, 4), "finished": (0, 1)},
                {"shares": (6, 4), "ignored": (1,)},
                {"shares": (6, 4), "ignored": (0, 1)},
                {"shares": (6, 4), "broken": (0,)},
                {"shares": (1, 4), "broken": (0,), "finished": (1,)},
            ]:
                yield Case(**special, reduction=reduction, backend=backend)
        for channels_last in (False, True):
            yield Case((4, 2), (5, 4, 3), channels_last=channels_last, backend=backend)
        for dtype in DTYPES:
            yield Case((7, 3), (70,), dtype, backend=backend)


NAMES = {case.name(): case for case in dict.fromkeys(cases())}


in_processes = Functions({(name, len(case.shares)): case.run for name, case in NAMES.items()})


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return Worlds(in_processes, tmp_path_factory.mktemp("worlds"))


# --- values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_shares_add_up_to_the_batch(worlds, name):
    case = NAMES[name]
    world = len(case.shares)
    losses, gradients = zip(*worlds(world, name), strict=True)
    x, t, options = case.batch()
    if case.broken:  # the oracle knows finite logits only
        x.requires_grad_()
        expected = hem_loss(x, t, **options, backend=case.backend)
        expected.backward()
        expected, gradient = expected.detach(), x.grad
        assert expected.isnan()
        assert losses[0].isnan()
        assert losses[1].isfinite()
    else:
        expected, gradient = oracle.hem(x, t, **options)
    together = torch.cat(gradients)
    assert together.dtype == x.dtype
    if case.reduction in ("mean", "batchmean"):
        loss, gradient = torch.stack(losses).mean(), world * gradient  # what an average over processes halves
    else:
        loss = torch.cat(losses) if case.reduction == "none" else torch.stack(losses).sum()
    if case.broken:
        assert loss.isnan()
        torch.testing.assert_close(together, gradient, equal_nan=True)
    else:
        assert_loss(loss, expected)
        assert_gradient(together, gradient)
    # Uneven shares are what a mean in each process gets wrong.
    if case.shares == (7, 3) and case.reduction == "mean":
        alone = [hem_loss(x[case.of(rank)], t[case.of(rank)], **options) for rank in range(world)]
        assert abs(sum(alone) / world - expected) > 0.01 * abs(expected)


@in_processes(2)
def every_part_of_autograd(rank):
    """All processes take the numerical derivative in step: each moves its own logits, the count stays."""
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    t, weight = targets((4, 5), ignore_index=-100), torch.rand(5, dtype=torch.float64)
    x, t = (x, t) if rank == 0 else (x.detach().mul(0.5).requires_grad_(), t.flip(0))
    group = torch.distributed.group.WORLD
    checks = [torch.autograd.gradcheck, torch.autograd.gradgradcheck]
    for backend in BACKENDS:
        for reduction in ("mean", "batchmean"):
            loss = lambda x, b=backend, r=reduction: hem_loss(  # noqa: E731
                x, t, margin=2.0, weight=weight, reduction=r, process_group=group, backend=b
            )
            for check in checks:
                check(loss, x)
    expected = torch.autograd.grad(hem_loss(x, t, process_group=group), x)[0]
    found = torch.func.grad(lambda x: reference.hem_loss(x, t, process_group=group))(x.detach())
    torch.testing.assert_close(found, expected)
    return True


def test_every_part_of_autograd(worlds):
    assert worlds(2, "every_part_of_autograd") == [True, True]


class Collectives(TorchDispatchMode):
    """Notes what is sent between processes: the op, and the numbers of elements."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            self.seen.append((func.name(), [(x.numel(), str(x.dtype)) for x in args[0]]))
        return func(*args, **(kwargs or {}))


@in_processes(2)
def one_number_is_exchanged(rank):
    seen = {}
    for backend in BACKENDS:
        for reduction in REDUCTIONS:
            x, t = logits((2, 5), torch.bfloat16).requires_grad_(), targets((2, 5))
            group = torch.distributed.group.WORLD
            with Collectives() as forward:
                loss = hem_loss(x, t, reduction=reduction, process_group=group, backend=backend)
            with Collectives() as backward:
                loss.sum().backward()
            seen[backend, reduction] = (forward.seen, backward.seen)
    return seen


def test_one_number_is_exchanged(worlds):
    for seen in worlds(2, "one_number_is_exchanged"):
        for (_, reduction), found in seen.items():
            exchanged = [("c10d::allreduce_", [(1, "torch.float32")])] if reduction in ("mean", "batchmean") else []
            assert found == (exchanged, [])


@in_processes(3)
def groups_that_are_not_the_world(rank):
    """One of the first two processes, and one of each process alone."""
    pair = torch.distributed.new_group([0, 1])
    own = [torch.distributed.new_group([r]) for r in range(3)][rank]
    torch.manual_seed(rank)
    x, t = torch.randn(4, 5), targets((4, 5))
    alone = hem_loss(x, t)
    for backend in BACKENDS:
        for reduction in REDUCTIONS:
            given = {"reduction": reduction, "backend": backend}
            with Collectives() as exchanged:
                assert torch.equal(hem_loss(x, t, **given, process_group=own), hem_loss(x, t, **given))
            assert exchanged.seen == []
    if rank == 2:
        with pytest.raises(TypeError) as error:
            hem_loss(x, t, process_group=pair)
        return alone, str(error.value)
    return alone, hem_loss(x, t, process_group=pair)


def test_groups_that_are_not_the_world(worlds):
    (_, first), (_, second), (_, words) = worlds(3, "groups_that_are_not_the_world")
    batch = []
    for rank in range(2):
        torch.manual_seed(rank)
        batch.append((torch.randn(4, 5), targets((4, 5))))
    x, t = (torch.cat(tensors) for tensors in zip(*batch, strict=True))
    assert_loss((first + second) / 2, oracle.hem(x, t)[0])
    assert words == (
        "process_group must be a torch.distributed.ProcessGroup or None, got the answer of new_group to a process "
        "that is not in the group"
    )


@in_processes(2)
def compiled_without_graph_breaks(rank):
    found = []
    for backend in BACKENDS:
        criterion = HEMLoss(weight=eighths(5), process_group=torch.distributed.group.WORLD, backend=backend)
        x, t = logits((3 - rank, 5)), targets((3 - rank, 5))
        results = []
        # Not inductor: for half a minute of compiling it would show nothing of the loss that this does not.
        for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
            y = x.clone().requires_grad_()
            loss = wrap(lambda y, t, c=criterion: c(2 * y, t))(y, t)
            loss.backward()
            results.append((loss.detach(), y.grad))
        found.append(results)
    return found


def test_compiled_without_graph_breaks(worlds):
    for found in worlds(2, "compiled_without_graph_breaks"):
        for eager, compiled in found:
            torch.testing.assert_close(compiled, eager)


# --- the module and its arguments -----------------------------------------------------------------------------


@in_processes(2)
def a_module_keeps_its_group(rank):
    group = torch.distributed.group.WORLD
    module = HEMLoss(margin=[0.5, 1.0, 2.0], process_group=group)
    assert module.process_group is group
    module.holders = [module]  # as a hook of its own would
    copied = copy.deepcopy(nn.ModuleList([module, module]))
    assert copied[0] is copied[1] is copied[0].holders[0]
    assert copied[0].process_group is copy.copy(module).process_group is group
    assert copied[0].margin is not module.margin
    with pytest.raises(TypeError, match=r"cannot pickle .*ProcessGroup"):
        pickle.dumps(module)
    # One sample each, from the same draw: as one process that has it twice.
    x, t = torch.randn(3, requires_grad=True), torch.tensor(1)
    assert copied[0](x, t) == HEMLoss(margin=[0.5, 1.0, 2.0])(x, t)
    return repr(module), HEMLoss(reduction="sum", process_group=group, backend="reference").extra_repr()


def test_a_module_keeps_its_group(worlds):
    for words in worlds(2, "a_module_keeps_its_group"):
        assert words == (
            "HEMLoss(margin=(3 classes), ignore_index=-100, reduction='mean', process_group=(2 processes))",
            "margin=0.2, ignore_index=-100, reduction='sum', process_group=(2 processes), backend='reference'",
        )


def test_before_there_is_a_group():
    assert torch.distributed.group.WORLD is None
    x, t = logits((4, 5)), targets((4, 5))
    module = HEMLoss(process_group=torch.distributed.group.WORLD)
    assert module(x, t) == hem_loss(x, t, process_group=None) == hem_loss(x, t)
    assert repr(module) == repr(HEMLoss())
    assert pickle.loads(pickle.dumps(module))(x, t) == module(x, t)


class Mesh:
    def get_group(self):
        raise AssertionError


@pytest.mark.parametrize(
    ("group", "given"),
    [
        ("WORLD", "str"),
        (True, "bool"),
        ([0, 1], "list"),
        (torch.distributed.group, "_WorldMeta"),
        (Mesh(), "Mesh: give its get_group()"),
        (torch.distributed.GroupMember.NON_GROUP_MEMBER, "the answer of new_group to a process that is not in the"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_is_no_group(group, given, backend, reduction):
    words = re.escape(f"process_group must be a torch.distributed.ProcessGroup or None, got {given}")
    options = {"process_group": group, "backend": backend, "reduction": reduction}
    with pytest.raises(TypeError, match=words):
        hem_loss(logits((4, 5)), targets((4, 5)), **options)
    with pytest.raises(TypeError, match=words):
        HEMLoss(**options)
    with pytest.raises(TypeError, match=words):
        reference.hem_loss(logits((4, 5)), targets((4, 5)), process_group=group, reduction=reduction)


# --- DTensor ----------------------------------------------------------------------------------------------------


def of_tensors():
    """Name -> logits, targets, options, and the dimension that is sharded."""
    for shape, dim in (((7, 5), 0), ((3, 5, 4, 3), 0), ((3, 5, 4, 3), 2), ((1, 70), 0)):
        for reduction in REDUCTIONS:
            torch.manual_seed(0)
            options = {"reduction": reduction, "weight": eighths(shape[1]), "margin": eighths(shape[1])}
            yield f"{shape} over {dim}, {reduction}", logits(shape), targets(shape, ignore_index=-100), options, dim
    yield "normalizer", logits((6, 5)), targets((6, 5)), {"normalizer": 3.0}, 0
    for dim in (0, 2):
        mask = targets((4, 5, 3)).to(torch.int8).unsqueeze(1)
        yield f"a mask over {dim}", logits((4, 5, 3)), mask, {"margin": 0.5, "reduction": "none"}, dim


@in_processes(2)
def sharded(rank):
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name, x, t, options, dim in of_tensors():
        y = distribute_tensor(x, mesh, [Shard(dim)]).requires_grad_()
        loss = hem_loss(y, distribute_tensor(t, mesh, [Shard(0)]), **options)
        (loss.sum() if loss.dim() else loss).backward()
        found[name] = loss.detach().full_tensor(), y.grad.full_tensor()
    return found


def test_tensors_that_are_sharded(worlds):
    for found in worlds(2, "sharded"):
        for name, x, t, options, _ in of_tensors():
            x.requires_grad_()
            expected = hem_loss(x, t, **options)
            torch.testing.assert_close(found[name][0], expected)
            torch.testing.assert_close(found[name][1], torch.autograd.grad(expected.sum(), x)[0])


GRIDS = [(Shard(0), Replicate()), (Replicate(), Shard(2)), (Shard(0), Shard(0)), (Shard(0), Shard(2))]


def of_grids():
    """Where logits lie on a mesh of two dimensions, the reduction, and what several processes make one loss of."""
    for placements, reduction in itertools.product(GRIDS, ("mean", "batchmean")):
        torch.manual_seed(0)
        options = {"reduction": reduction, "weight": eighths(5), "margin": eighths(5)}
        yield placements, logits((4, 5, 6)), targets((4, 5, 6), ignore_index=-100), options


@in_processes(4)
def on_a_grid(rank):
    mesh = init_device_mesh("cpu", (2, 2))
    found = []
    for placements, x, t, options in of_grids():
        y = distribute_tensor(x, mesh, placements).requires_grad_()
        loss = hem_loss(y, distribute_tensor(t, mesh, [Replicate(), Replicate()]), **options)
        loss.backward()
        found.append((loss.detach().full_tensor(), y.grad.full_tensor()))
    return found


def test_tensors_that_are_sharded_over_a_grid(worlds):
    for found in worlds(4, "on_a_grid"):
        for (loss, gradient), (_, x, t, options) in zip(found, of_grids(), strict=True):
            expected = hem_loss(x.requires_grad_(), t, **options)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0])


# --- training: the examples of docs/distributed.md ------------------------------------------------------------


def example(heading: str) -> str:
    _, _, section = PAGE.read_text("utf-8").partition(f"\n## {heading}\n")
    (code,) = re.findall(r"^```python\n(.*?)^```$", section.partition("\n## ")[0], re.M | re.S)
    return code


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5)).double()


def data():
    """Two steps of twelve samples."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 5, (24,), generator=generator)


# What each of two processes has of a step: uneven, and none in the second. With micro-batches, of each.
SHARES = [[slice(0, 9), slice(12, 24)], [slice(9, 12), slice(24, 24)]]
MICRO_SHARES = [
    [[slice(0, 6), slice(6, 7)], [slice(12, 16), slice(16, 20)]],
    [[slice(7, 9), slice(9, 12)], [slice(20, 20), slice(20, 24)]],
]


def batches_of(parts):
    x, t = data()
    return [(x[part], t[part]) for part in parts]


def trained(heading, **names):
    """The network's parameters after an example of the page."""
    names |= {"model": small_network(), "device": "cpu"}
    exec(compile(example(heading), f"{PAGE}: {heading}", "exec"), names)
    weights = names["model"].parameters()
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for p in weights]


def trained_alone(loss=hem_loss, steps=((slice(0, 12),), (slice(12, 24),)), wrap=lambda model: model):
    """The same in one process: each step the mean over its micro-batches."""
    model = small_network()
    network = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parts in steps:
        optimizer.zero_grad()
        for x, t in batches_of(parts):
            (loss(network(x), t) / len(parts)).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def assert_same(found, expected, rtol=1e-10):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-2 * rtol)


def distance(found, expected):
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


@in_processes(2)
def data_parallel(rank):
    return trained("DistributedDataParallel", batches=batches_of(SHARES[rank]))


@in_processes(2)
def data_parallel_without_a_group(rank):
    steps = [[part] for part in SHARES[rank]]
    return trained_alone(steps=steps, wrap=DistributedDataParallel)


@in_processes(2)
def fully_sharded(rank):
    return trained("FSDP2", batches=batches_of(SHARES[rank]))


@in_processes(2)
def accelerated(rank):
    return trained("Accelerate", batches=DataLoader(TensorDataset(*data()), batch_size=6))


@pytest.mark.parametrize("name", ["data_parallel", "fully_sharded", "accelerated"])
def test_processes_train_as_one(worlds, name):
    for found in worlds(2, name):
        assert_same(found, trained_alone())


def test_without_a_group_they_train_otherwise(worlds):
    for found in worlds(2, "data_parallel_without_a_group"):
        assert distance(found, trained_alone()) > 1e-3


@in_processes(2)
def accumulated(rank):
    return trained("Gradient accumulation", steps=[batches_of(parts) for parts in MICRO_SHARES[rank]])


@in_processes(2)
def accumulated_means(rank):
    """The mean of each micro-batch, over the processes of a group, the gradients sent with the last."""
    model = small_network()
    network = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = HEMLoss(process_group=torch.distributed.group.WORLD)
    for parts in MICRO_SHARES[rank]:
        optimizer.zero_grad()
        first, last = batches_of(parts)
        with network.no_sync():
            (criterion(network(first[0]), first[1]) / 2).backward()
        (criterion(network(last[0]), last[1]) / 2).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_gradient_accumulation(worlds):
    micro_batches = [
        [torch.cat([torch.arange(24)[part] for part in parts]) for parts in zip(*processes, strict=True)]
        for processes in zip(*MICRO_SHARES, strict=True)
    ]
    assert [len(part) for step in micro_batches for part in step] == [8, 4, 4, 8]
    means = trained_alone(steps=micro_batches)
    for found in worlds(2, "accumulated"):
        assert_same(found, trained_alone(), rtol=1e-6)  # one large batch; it is divided in float32
        assert distance(found, means) > 1e-3
    for found in worlds(2, "accumulated_means"):
        assert_same(found, means)


@in_processes(3)
def divided(rank):
    """Gradients of 6 in the first two processes, none, whole and as a shard."""
    group = torch.distributed.new_group([0, 1])
    if rank == 2:
        return None
    mesh = DeviceMesh.from_group(group, "cpu")
    ones = torch.ones(2, dtype=torch.float64)
    parameters = {"none": [], "whole": [ones], "a shard": [DTensor.from_local(ones, mesh, [Shard(0)])]}
    for of_kind in parameters.values():
        for parameter in of_kind:
            parameter.grad = 6 * parameter
        divide_gradients(of_kind, [0.1, 0.3][rank], process_group=group)
    return parameters["whole"][0].grad, parameters["a shard"][0].grad.to_local()


def test_what_averaged_gradients_are_divided_by(worlds):
    for found in worlds(3, "divided")[:2]:
        for gradient in found:
            torch.testing.assert_close(gradient, torch.full((2,), 30.0, dtype=torch.float64), rtol=1e-12, atol=0)


@in_processes(2)
def under_autocast(rank):
    """Half-precision logits are read as they are, and the loss is float32."""
    network = DistributedDataParallel(small_network().float())
    x, t = batches_of(SHARES[rank])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = network(x.float())
        loss = hem_loss(y, t, process_group=torch.distributed.group.WORLD)
    y.retain_grad()
    loss.backward()
    return y.detach(), y.grad, loss.detach()


def test_under_autocast(worlds):
    y, gradient, losses = zip(*worlds(2, "under_autocast"), strict=True)
    expected, expected_gradient = oracle.hem(torch.cat(y), data()[1][:12])
    assert torch.cat(y).dtype == torch.bfloat16
    assert_loss(torch.stack(losses).mean(), expected)
    assert_gradient(torch.cat(gradient), 2 * expected_gradient)
