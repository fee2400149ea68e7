"""Processes that are connected over gloo, started once for all that a test module runs in them."""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

LIMIT = 120  # seconds that the processes of a world have
PRELOADED = ["torch._dynamo", "torch.distributed.fsdp", "accelerate"]

# Where pytest itself has one thread they are forked from it, as mutmut forks that.
START = os.environ.get("TEST_PROCESSES", "forkserver")
if START == "fork":
    for module in PRELOADED:
        importlib.import_module(module)


class Functions(dict[tuple[str, int], Callable[[int], Any]]):
    """(Name, processes) -> a function of the rank, which each of them runs."""

    def __call__(self, world: int) -> Callable[[Callable[[int], Any]], Callable[[int], Any]]:
        """Register a function; the test of its name gets the list of what it returns."""

        def register(function: Callable[[int], Any]) -> Callable[[int], Any]:
            self[function.__name__, world] = function
            return function

        return register


class Raised(str):
    """The traceback of a function."""


def run(rank: int, world: int, folder: Path, functions: Mapping[str, Callable[[int], Any]]) -> None:
    """What one process does: every function, each with what came of it or what it raised."""
    faulthandler.dump_traceback_later(LIMIT - 10, exit=True)
    torch.set_num_threads(1)
    # What torchrun says, and Accelerate reads. Nobody listens at the port: the processes meet in a file.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", OMP_NUM_THREADS="1")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    found = {}
    for name, function in functions.items():
        torch.manual_seed(0)
        try:
            found[name] = function(rank)
        except Exception:
            found[name] = Raised(traceback.format_exc())
    torch.save(found, folder / f"{rank}.pt")
    # A process that leaves takes its connections with it. Where one has failed, those who wait for it fail at once.
    if not any(isinstance(result, Raised) for result in found.values()):
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class Worlds:
    """Each is started once, for all of its functions; where that costs little, for each of them."""

    def __init__(self, functions: Functions, folder: Path) -> None:
        self.functions = functions
        self.folder = folder
        self.found: dict[tuple[int, tuple[str, ...]], dict[str, list[Any]] | str] = {}

    def __call__(self, world: int, name: str) -> list[Any]:
        """What the function returned, by rank."""
        names = tuple(one for one, of in self.functions if of == world and (START != "fork" or one == name))
        if (world, names) not in self.found:
            self.found[world, names] = self.start(world, names)
        found = self.found[world, names]
        if isinstance(found, str):
            pytest.fail(found)
        results = found[name]
        for rank, result in enumerate(results):
            assert not isinstance(result, Raised), f"in process {rank}: {result}"
        return results

    def start(self, world: int, names: tuple[str, ...]) -> dict[str, list[Any]] | str:
        folder = self.folder / f"{world}-{len(self.found)}"
        folder.mkdir()
        functions = {name: self.functions[name, world] for name in names}
        # Forked from a server that has imported everything once, and has no threads yet.
        context = multiprocessing.get_context(START)
        if START == "forkserver":
            context.set_forkserver_preload([*PRELOADED, "hem_ext"])
        workers = [
            context.Process(target=run, args=(rank, world, folder, functions), daemon=True) for rank in range(world)
        ]
        end = time.monotonic() + LIMIT
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(max(end - time.monotonic(), 0))
        codes = [worker.exitcode for worker in workers]
        for worker in workers:
            worker.kill()
            worker.join()
        if codes != [0] * world:
            return f"{world} processes ended with {codes} (None: killed after {LIMIT} s)"
        found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
        return {name: [of_rank[name] for of_rank in found] for name in found[0]}
