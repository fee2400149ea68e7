"""Two processes that are connected over gloo and wait for calls of class_parallel_hem_loss."""

from __future__ import annotations

import faulthandler
import io
import multiprocessing
import os
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIMIT = 300  # seconds for a call, on a machine that may be busy


def send(to: Connection, value: Any) -> None:
    """Tensors as they lie in memory, also of dtypes that pickle cannot have."""
    torch.save(value, file := io.BytesIO())
    to.send_bytes(file.getbuffer())


def receive(connection: Connection) -> Any:
    return torch.load(io.BytesIO(connection.recv_bytes()), weights_only=False)


def serve(rank: int, folder: Path, calls: Connection) -> None:
    """What each process does: its part of one call after the other, until there are no more."""
    from hem_ext import _native
    from hem_ext.parallel import class_parallel_hem_loss

    torch.set_num_threads(1)
    limit = timedelta(seconds=LIMIT)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit
    )
    while shares := receive(calls):
        logits, target, grad_loss, options = shares[rank]
        _native.library.select_cpu_isa(options.pop("isa", _native.library.available_cpu_isas()[-1]))
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        try:
            x = logits.detach().requires_grad_()
            loss = class_parallel_hem_loss(x, target, **options)
            (gradient,) = torch.autograd.grad(loss, x, torch.ones_like(loss) if grad_loss is None else grad_loss)
            answer: Any = (loss.detach(), gradient)
        except Exception as error:
            answer = error
        faulthandler.cancel_dump_traceback_later()
        send(calls, answer)
    torch.distributed.destroy_process_group()


class Pair:
    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("spawn")
        self.connections: list[Connection] = []
        self.workers = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            worker = context.Process(target=serve, args=(rank, folder, theirs), daemon=True)
            worker.start()
            theirs.close()
            self.connections.append(ours)
            self.workers.append(worker)

    def __call__(self, shares: list[tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]]) -> list[Any]:
        """Each process's loss and gradient, or what it raised."""
        for connection in self.connections:
            send(connection, shares)
        return [receive(connection) for connection in self.connections]

    def close(self) -> None:
        for connection in self.connections:
            send(connection, None)
        for worker in self.workers:
            worker.join(LIMIT)
            worker.kill()
