"""Times and bytes of several losses on one workload, taken in turn."""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from workloads import Peer, Workload, mostly_finished

from hem_ext import _native

PHASES = ("forward", "backward", "both", "no grad")
LAST_LEVEL_CACHE = 64 << 20  # bytes that no cache of these machines holds
MAX_BUFFERS = 64
# A peer that takes this many times as long as the fastest runs in one round of four: a hypervisor takes memory back
# that lies unused for seconds, and would be charged to whoever touches it next.
SLOW = 10
SLOW_ROUNDS = 4


@dataclass
class Measurement:
    """What one peer took: seconds of every round by phase, and bytes."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    peak_bytes: int | None = None  # allocated at once beside the logits and targets, the gradient included
    saved_bytes: int | None = None  # kept from forward to backward
    error: str | None = None  # why there are no numbers, such as memory that ran out

    def quantile(self, phase: str, q: float) -> float:
        return torch.tensor(self.seconds[phase], dtype=torch.float64).quantile(q).item()


def timed(device: str, calls: list[Callable[[], object]]) -> Callable[[], list[float]]:
    """Run `calls` one after the other; what is returned gives the seconds of each, once the device has caught up."""
    if device == "cpu":
        moments = [time.perf_counter()]
        for call in calls:
            call()
            moments.append(time.perf_counter())
        return lambda: [b - a for a, b in itertools.pairwise(moments)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    events[0].record()
    for call, event in zip(calls, events[1:], strict=True):
        call()
        event.record()
    return lambda: [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def allocated_at_once(call: Callable[[], object]) -> int:
    """The most bytes that `call` has on the CPU at a time, beside those that were there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def allocated(call: Callable[[], object], device: str) -> int:
    """The same on ``"cpu"`` or ``"cuda"``."""
    if device == "cpu":
        return allocated_at_once(call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def interleaved(
    calls: Mapping[Any, Callable[[], None]], device: str, seconds: float, min_rounds: int = 9
) -> dict[Any, list[float]]:
    """Seconds of each call, round by round: in a round each takes its turn, in random order.

    No round begins after `seconds`, once there are `min_rounds`. A first one, for what is made once, does not count.
    """
    taken: dict[Any, list[float]] = {key: [] for key in calls}
    for call in calls.values():
        call()
    order, shuffler, begin = list(calls), random.Random(0), time.perf_counter()
    while len(taken[order[0]]) < min_rounds or time.perf_counter() - begin < seconds:
        shuffler.shuffle(order)
        found = [(key, timed(device, [calls[key]])) for key in order]
        if device == "cuda":
            torch.cuda.synchronize()
        for key, resolve in found:
            taken[key] += resolve()
    return taken


class Output(torch.autograd.Function):
    """A copy of the logits that is what a network made, not a leaf, and whose gradient nobody takes."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


class Run:
    """One peer on one workload."""

    def __init__(self, peer: Peer, buffers: list[tuple[Tensor, Tensor]], device: str) -> None:
        self.peer = peer
        self.buffers = buffers
        if peer.active is not None:
            self.buffers = [(x, mostly_finished(x, t, peer.active)) for x, t in buffers]
        self.device = device
        self.loss = torch.compile(peer.loss, dynamic=False) if peer.compiled else peer.loss
        x = buffers[0][0]
        # Made once: what a loss is handed is not what is measured.
        self.grad_output = None if peer.grad_output is None else torch.tensor(peer.grad_output, device=x.device)

    def inputs(self, turn: int = 0) -> tuple[Tensor, Tensor]:
        """Logits and targets, the logits a copy where the loss would spoil them for the others."""
        x, t = self.buffers[turn % len(self.buffers)]
        return (Output.apply(x) if self.peer.overwrites_logits else x), t

    def once(self, turn: int) -> Callable[[], dict[str, float]]:
        """One round: forward and backward, then forward without a gradient."""
        x, t = self.inputs(turn)
        if x.is_leaf:
            x.grad = None
        result: list[Tensor] = []

        def forward() -> None:
            result.append(self.loss(x, t))

        def backward() -> None:
            result[0].backward(self.grad_output)

        def forward_only() -> None:
            with torch.no_grad():
                self.loss(x, t)

        default = _native.library.cpu_isa()
        if self.peer.cpu_isa:
            _native.library.select_cpu_isa(self.peer.cpu_isa)
        trained = timed(self.device, [forward, backward])
        if x.is_leaf:
            x.grad = None
        result.clear()
        inferred = timed(self.device, [forward_only])
        if self.peer.cpu_isa:
            _native.library.select_cpu_isa(default)

        def seconds() -> dict[str, float]:
            forward, backward = trained()
            return dict(zip(PHASES, (forward, backward, forward + backward, *inferred()), strict=True))

        return seconds

    def saved_bytes(self) -> int:
        """Of the distinct tensors that autograd keeps."""
        x, t = self.inputs()
        seen = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.loss(x, t)
        return sum(seen.values())

    def peak_bytes(self) -> int:
        """Allocated at once by forward and backward together."""
        x, t = self.inputs()
        x = x if self.peer.overwrites_logits else x.detach().requires_grad_()
        return allocated(lambda: self.loss(x, t).backward(self.grad_output), self.device)


def measure(
    workload: Workload, peers: list[Peer], device: str, *, seconds: float, min_rounds: int = 17, seed: int = 0
) -> dict[str, Measurement]:
    """Every peer by its key, and under "copy" a plain copy of the float32 logits, the yardstick (phase "both").

    Args:
        workload, peers, device: what to measure, ``"cpu"`` or ``"cuda"``.
        seconds: after which no further round begins, once there are `min_rounds`. Compiling and warming up do
            not count.
        min_rounds: how many rounds there are at least. In a round every peer runs once, in random order; slow ones
            in every fourth.
        seed: of the logits, the targets and the order.
    """
    torch._dynamo.reset()
    generator = torch.Generator(device).manual_seed(seed)
    shuffler = random.Random(seed)
    results = {key: Measurement() for key in [*(peer.key for peer in peers), "copy"]}
    buffers: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    runs: dict[Run, float] = {}
    for peer in peers:
        if peer.dtype not in buffers:
            size = workload.numel * peer.dtype.itemsize
            # What fits a cache is taken from many places, as a training step would leave it.
            count = max(1, min(MAX_BUFFERS, LAST_LEVEL_CACHE // size))
            buffers[peer.dtype] = [workload.inputs(peer.dtype, device, generator) for _ in range(count)]
        run = Run(peer, buffers[peer.dtype], device)
        try:
            run.once(0)  # compiles, and touches what is allocated once
            results[peer.key].saved_bytes = run.saved_bytes()
            results[peer.key].peak_bytes = run.peak_bytes()
            begin = time.perf_counter()
            run.once(1)
            if device == "cuda":
                torch.cuda.synchronize()
            runs[run] = time.perf_counter() - begin
        except Exception as error:
            # A peer that cannot take a workload is a result; the others are measured all the same.
            memory = isinstance(error, torch.OutOfMemoryError)
            results[peer.key].error = "out of memory" if memory else f"{type(error).__name__}: {error}"[:500]
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()

    source = buffers[torch.float32][0][0].detach()
    target = torch.empty_like(source)
    target.copy_(source)
    begin = time.perf_counter()
    rounds = 0
    gc.collect()
    gc.disable()
    try:
        while rounds < min_rounds or time.perf_counter() - begin < seconds:
            fast = SLOW * min(runs.values(), default=0)
            turn = [run for run, took in runs.items() if took <= fast or rounds % SLOW_ROUNDS == 0]
            shuffler.shuffle(turn)
            taken = [(run.peer.key, run.once(rounds)) for run in turn]
            copy = timed(device, [lambda: target.copy_(source)])
            if device == "cuda":
                torch.cuda.synchronize()
            for key, resolve in taken:
                for phase, value in resolve().items():
                    results[key].seconds[phase].append(value)
            results["copy"].seconds["both"] += copy()
            rounds += 1
    finally:
        gc.enable()
    return results
