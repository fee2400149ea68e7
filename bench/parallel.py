"""Bytes on the wire, and time, with the classes shared out: class_parallel_hem_loss, hem_loss of the gathered logits,
and cross_entropy under torch's loss_parallel.

    python bench/parallel.py measure [--results FILE]   some shapes, in 2, 3 and 4 processes on this machine
    python bench/parallel.py report FILE... [--page docs/distributed.md]   their tables

`measure` appends rows, to build/parallel.jsonl if no file is named. The processes are connected over gloo, and
Linux counts what each of them sends in forward and backward (TCP_INFO of its connections). What is timed takes turns,
in 2 processes of a thread each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from documents import append, conditions, markdown, read, replace
from provenance import provenance
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

from hem_ext import hem_loss
from hem_ext.parallel import class_parallel_hem_loss

WORLDS = (2, 3, 4)
SHAPES = {
    "CIFAR-100": (256, 100),
    "ImageNet-1k": (256, 1000),
    "ImageNet-21k": (256, 21841),
    "language model": (512, 32000),
    "ADE20K": (1, 150, 128, 128),
}
CALLS = 3
TIMED_WORLD = 2
ROUNDS = 25
ACTIVE = (1.0, 0.1)  # shares of the samples


def _cross_entropy(logits: DTensor, target: Tensor) -> None:
    with loss_parallel():
        F.cross_entropy(logits, target).backward()


WAYS: dict[str, Callable[[DTensor, Tensor], None]] = {
    "class parallel": lambda logits, target: class_parallel_hem_loss(logits, target).backward(),
    "gathered": lambda logits, target: hem_loss(logits.full_tensor(), target).backward(),
    "cross-entropy": _cross_entropy,
}
TIMED = WAYS | {
    "plain PyTorch": lambda logits, target: class_parallel_hem_loss(logits, target, backend="reference").backward()
}


# --- counting -------------------------------------------------------------------------------------------------


def sent() -> int:
    """Bytes that this process has put into its TCP connections, without the headers of TCP."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        file = f"/proc/self/fd/{name}"  # one of them is the list itself, and closed
        if not os.path.islink(file) or not os.readlink(file).startswith("socket:"):
            continue
        with socket.socket(fileno=os.dup(int(name))) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                total += _sent_on(connection)
    return total


def _sent_on(connection: socket.socket) -> int:
    # struct tcp_info of linux/tcp.h: tcpi_notsent_bytes, tcpi_bytes_sent, tcpi_bytes_retrans.
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    (waiting,), (on_the_wire, again) = struct.unpack_from("I", info, 144), struct.unpack_from("QQ", info, 200)
    return waiting + on_the_wire - again


def count(shapes: dict[str, Sequence[int]]) -> list[dict[str, Any]]:
    """A row for each shape and way, in every process of the default group the same one."""
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    rows = []
    for name, shape in shapes.items():
        torch.manual_seed(0)
        logits = distribute_tensor(torch.randn(shape), mesh, [Shard(1)]).requires_grad_()
        target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
        for way, step in WAYS.items():
            step(logits, target)  # connects, and plans
            calls = []
            for _ in range(CALLS):
                torch.distributed.barrier()
                before = sent()
                step(logits, target)
                calls.append(sent() - before)
            by_rank: list[Any] = [None] * world
            torch.distributed.all_gather_object(by_rank, calls)
            rows.append({"kind": "wire", "name": name, "shape": shape, "processes": world, "way": way, "sent": by_rank})
    return rows


def time_turns(shapes: dict[str, Sequence[int]], rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """A row for each shape and share of active samples: seconds of each way, of the slower process, by round."""
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    rows = []
    for name, shape in shapes.items():
        for active in ACTIVE:
            torch.manual_seed(0)
            whole, target = torch.randn(shape), torch.randint(0, shape[1], (shape[0], *shape[2:]))
            finished = (torch.rand(target.shape) >= active).unsqueeze(1)
            whole = torch.where(finished & torch.zeros(shape).scatter_(1, target.unsqueeze(1), 1.0).bool(), 9.0, whole)
            logits = distribute_tensor(whole, mesh, [Shard(1)]).requires_grad_()
            seconds: dict[str, list[float]] = {way: [] for way in TIMED}
            for turn in range(1 + rounds):  # in the first one what is needed is connected, planned and allocated
                for way, step in TIMED.items():
                    logits.grad = None
                    torch.distributed.barrier()
                    start = time.perf_counter()
                    step(logits, target)
                    took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
                    torch.distributed.all_reduce(took, torch.distributed.ReduceOp.MAX)
                    seconds[way] += [took.item()] if turn else []
            row = {"kind": "time", "name": name, "shape": shape, "processes": world, "active": active}
            rows.append(row | {"seconds": seconds})
    return rows


def _measure_in(rank: int, world: int, folder: str, shapes: dict[str, Sequence[int]]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    rows = count(shapes)
    rows += time_turns(shapes) if world == TIMED_WORLD else []
    if rank == 0:
        Path(folder, "rows").write_text(json.dumps(rows), "utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measure(worlds: Sequence[int], shapes: dict[str, Sequence[int]]) -> list[dict[str, Any]]:
    # Forked from a server that has imported everything once.
    multiprocessing.set_forkserver_preload(["torch.distributed.tensor.parallel", "hem_ext"])
    rows = []
    for world in worlds:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(
                _measure_in, (world, folder, shapes), nprocs=world, start_method="forkserver"
            )
            rows += json.loads(Path(folder, "rows").read_text("utf-8"))
    return rows


# --- rows, table ----------------------------------------------------------------------------------------------


def wire_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What a process sends in a call, the mean of all; of its calls the median."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    shapes = {}
    for row in (row for row in rows if row["kind"] == "wire"):
        shapes[row["name"]] = tuple(row["shape"])
        of_call = np.median(row["sent"], axis=1).mean()
        found.setdefault((row["name"], row["processes"]), {})[row["way"]] = float(of_call)
    lines = [["", "shape", "processes", "`class_parallel_hem_loss`", "gathered logits", "of it", "cross-entropy"]]
    for name, processes in sorted(found, key=lambda key: (list(shapes).index(key[0]), key[1])):
        sizes = found[name, processes]
        ours, gathered, peer = (f"{sizes[way] / 1000:,.1f} kB" for way in WAYS)
        share = f"{sizes['class parallel'] / sizes['gathered']:.2%}"
        lines.append([name, str(shapes[name]), str(processes), ours, gathered, share, peer])
    return lines


def time_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """How many times the time of class_parallel_hem_loss each of the others takes, by the share of active samples."""
    found: dict[str, list[dict[str, float]]] = {}
    shapes = {}
    for row in (row for row in rows if row["kind"] == "time"):
        shapes[row["name"]] = tuple(row["shape"])
        found.setdefault(row["name"], []).append({way: float(np.median(s)) for way, s in row["seconds"].items()})
    ways = [way for way in TIMED if way != "class parallel"]
    lines = [["", "shape", *ways]]
    for name, of_shares in found.items():
        ratios = [[f"{seconds[way] / seconds['class parallel']:.2f}" for seconds in of_shares] for way in ways]
        lines.append([name, str(shapes[name]), *map(" / ".join, ratios)])
    return lines


def write_page(path: Path, rows: Sequence[dict[str, Any]], files: Sequence[Path]) -> None:
    """Replace what stands between the markers."""
    command = f"python bench/parallel.py report {' '.join(map(str, files))}"
    for name, table, left in (("wire", wire_table, 3), ("parallel time", time_table, 2)):
        replace(path, name, f"`{command}`: {conditions(rows)}\n\n{markdown(table(rows), left)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["measure", "report"])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--results", type=Path, default=Path("build/parallel.jsonl"))
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    if given.command == "measure":
        rows = measure(WORLDS, SHAPES)
        append(given.results, provenance("cpu"), rows)
    else:
        rows = read(given.files)
        if given.page:
            write_page(given.page, rows, given.files)
    print(markdown(wire_table(rows), 3))
    print(markdown(time_table(rows), 2))


if __name__ == "__main__":
    main()
