"""``hem_loss`` and its peers, a table per workload: ``make bench``.

pytest-benchmark runs one function after the other, while a shared machine changes its speed. So the peers of a
workload are measured in turn first (measure.py), and pytest-benchmark is shown the seconds that they took.
"""

from __future__ import annotations

import functools
import time

import pytest
from measure import PHASES, Measurement, measure
from workloads import Workload, peers


class Recorded:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


clock = Recorded()


@functools.lru_cache(maxsize=1)  # the tests of a workload follow one another
def measured(workload: Workload, device: str, quick: bool) -> dict[str, Measurement]:
    chosen = [peer for peer in peers(workload, device) if peer.quick or not quick]
    return measure(workload, chosen, device, seconds=2 if quick else 8, min_rounds=9 if quick else 17)


@pytest.mark.benchmark(timer=clock)
def test_speed(workload, peer, session, benchmark):
    benchmark.group = f"{workload.label} {workload.shape}, forward + backward"
    if workload.label in session.left_out or time.monotonic() > session.deadline:
        if workload.label not in session.left_out:
            session.left_out.append(workload.label)
        pytest.skip("out of time")
    is_hem = peer.name in ("hem", "hem, overwriting")
    results = measured(workload, session.device, session.quick)
    result, copy = results[peer.key], results["copy"]
    row = {
        **session.facts,
        "workload": workload.label,
        "shape": workload.shape,
        "peer": peer.key,
        "dtype": str(peer.dtype).removeprefix("torch."),
        "peak_bytes": result.peak_bytes,
        "saved_bytes": result.saved_bytes,
    }
    if result.error:
        session.rows.append({**row, "error": result.error})
        (pytest.fail if is_hem else pytest.skip)(result.error)
    bytes_moved = (workload.hem_bytes if is_hem else workload.floor_bytes)(peer.dtype)
    copy_rate = 2 * workload.numel * 4 / copy.quantile("both", 0.5)
    rate = bytes_moved / result.quantile("both", 0.5)
    row |= {
        "rounds": len(result.seconds["both"]),
        "seconds": {p: [result.quantile(p, q) for q in (0.2, 0.5, 0.8)] for p in PHASES},
        "bytes": bytes_moved,  # HEM: what it moves; its peers: the logits read and the gradient written once
        "gb_per_s": rate / 1e9,
        "copy_gb_per_s": copy_rate / 1e9,
        "of_roofline": rate / copy_rate,
    }
    session.rows.append(row)
    benchmark.extra_info.update(row)
    times = iter(result.seconds["both"])
    benchmark.pedantic(clock.advance, setup=lambda: ((next(times),), {}), rounds=len(result.seconds["both"]))
