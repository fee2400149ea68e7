"""Selective steps in processes that share a batch, against plain ones in a single process."""

import copy
import functools

import pytest
import torch
from processes import Functions, Worlds
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hem_ext import HEMLoss, Selective

SHARES = {2: (10, 14), 3: (9, 0, 15)}
MARGIN = 1e-3
STEPS = 20  # looks at every eighth bring the share below 0.6 after the seventeenth
in_processes = Functions()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return Worlds(in_processes, tmp_path_factory.mktemp("worlds"))


def network():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5)).double()
    model.register_buffer("unused", torch.zeros(1))  # DistributedDataParallel sends buffers around in each forward
    return model


def batch(step):
    """The share of active samples falls with the steps; the last process is finished first."""
    torch.manual_seed(100 + step)
    x = torch.randn(24, 4, dtype=torch.float64)
    with torch.no_grad():
        t = network()(x).argmax(1)
    wrong = max(24 - 4 * step, 0)
    t[:wrong] = (t[:wrong] + 1) % 5
    return x, t


def share(rank, world, x, t):
    begin = sum(SHARES[world][:rank])
    own = slice(begin, begin + SHARES[world][rank])
    return x[own], t[own]


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def steps(rank, world, wrap, reduction="mean", **options):
    """The gradients of every step, and what was chosen."""
    model = wrap(network())
    group = torch.distributed.group.WORLD
    selective = Selective(model, HEMLoss(margin=MARGIN, reduction=reduction, process_group=group), **options)
    found, shares = [], []
    for number in range(STEPS):
        model.zero_grad()
        selective(*share(rank, world, *batch(number))).backward()
        found.append([g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients(model)])
        shares.append((selective.share, selective.pays_below))
    return found, shares


def fsdp(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return fully_shard(model, mesh=mesh)


WAYS = {
    ("DDP", 2): {"wrap": DistributedDataParallel, "pays_below": 1.0},
    ("DDP", 3): {"wrap": DistributedDataParallel, "pays_below": 1.0},
    ("DDP, batchmean", 3): {"wrap": DistributedDataParallel, "reduction": "batchmean", "pays_below": 1.0},
    ("DDP, choosing", 3): {"wrap": DistributedDataParallel, "pays_below": 0.6},
    ("DDP, measuring", 2): {"wrap": DistributedDataParallel},
    ("FSDP2, choosing", 2): {"wrap": fsdp, "pays_below": 0.6},
    ("FSDP2", 3): {"wrap": fsdp, "pays_below": 1.0},
}
for (name, world), options in WAYS.items():
    in_processes[name, world] = functools.partial(steps, world=world, **options)


@pytest.mark.parametrize(("name", "world"), WAYS)
def test_every_step_is_that_of_one_process(worlds, name, world):
    found = worlds(world, name)
    model = network()
    criterion = HEMLoss(margin=MARGIN, reduction=WAYS[name, world].get("reduction", "mean"))
    for number in range(STEPS):
        model.zero_grad()
        criterion(model(batch(number)[0]), batch(number)[1]).backward()
        for of_rank, _ in found:
            torch.testing.assert_close(of_rank[number], gradients(model))
    # The processes agree, whatever they have of the batch.
    assert all(shares == found[0][1] for _, shares in found)
    assert found[0][1][0][0] == 1.0
    assert found[0][1][-1][0] < 0.5


@in_processes(2)
def each_for_itself(rank):
    """One process has finished everything, and the other nothing: their calls of the wrapped network go in step."""
    model = DistributedDataParallel(network())
    selective = Selective(model, HEMLoss(margin=MARGIN), pays_below=0.6)
    x, t = batch(0)
    with torch.no_grad():
        right = copy.deepcopy(model.module)(x).argmax(1)
    shares = []
    for _ in range(10):
        model.zero_grad()
        selective(x, t if rank == 0 else right).backward()
        shares.append(selective.share)
    return shares


def test_without_a_group_each_process_chooses_for_itself(worlds):
    first, second = worlds(2, "each_for_itself")
    assert first != second
    assert min(first) > 0.6 > max(second)
