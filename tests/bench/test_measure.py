import itertools
import time

import measure as measure_module
import pytest
import torch
import torch.nn.functional as F
import workloads
from measure import PHASES, Measurement, Run, measure, timed
from workloads import Peer, Workload

from hem_ext import _native, hem_loss

SMALL = Workload("small", (40, 96))
PIXELS = Workload("pixels", (2, 21, 16, 8), channels_last=True)


def buffers(workload, dtype=torch.float32):
    return [workload.inputs(dtype, "cpu", torch.Generator().manual_seed(0))]


def test_every_peer_is_measured_in_every_round(monkeypatch):
    monkeypatch.setattr(measure_module, "SLOW", 1e9)  # whatever else the machine does
    peers = [Peer("hem", hem_loss), Peer("ce", F.cross_entropy), Peer("hem", hem_loss, torch.bfloat16)]
    results = measure(SMALL, peers, "cpu", seconds=0, min_rounds=3)
    assert list(results) == ["hem", "ce", "hem, bfloat16", "copy"]
    for peer in peers:
        found = results[peer.key]
        assert all(len(found.seconds[phase]) == 3 for phase in PHASES)
        assert all(s > 0 for phase in PHASES for s in found.seconds[phase])
        for forward, backward, both in zip(*(found.seconds[p] for p in PHASES[:3]), strict=True):
            assert both == pytest.approx(forward + backward)
    assert len(results["copy"].seconds["both"]) == 3


def test_a_slow_peer_runs_in_one_round_of_four():
    def slow(x, t):
        time.sleep(0.3)
        return x.sum()

    results = measure(SMALL, [Peer("hem", hem_loss), Peer("slow", slow)], "cpu", seconds=0, min_rounds=6)
    assert [len(results[key].seconds["both"]) for key in ("hem", "slow", "copy")] == [6, 2, 6]


def test_saved_bytes_are_what_the_loss_keeps():
    # A bit a logit in words of 32, int64 targets, the denominator; cross-entropy: logits, targets and its own scalar.
    assert Run(Peer("hem", hem_loss), buffers(SMALL), "cpu").saved_bytes() == 40 * 3 * 4 + 40 * 8 + 4
    assert Run(Peer("ce", F.cross_entropy), buffers(SMALL), "cpu").saved_bytes() == 40 * 96 * 4 + 40 * 8 + 4


def test_peak_bytes_hold_the_gradient_and_what_is_saved():
    run = Run(Peer("hem", hem_loss), buffers(SMALL), "cpu")
    assert run.saved_bytes() - 40 * 8 + 40 * 96 * 4 <= run.peak_bytes() < 1.2 * 40 * 96 * 4
    hungry = Run(Peer("hungry", lambda x, t: (x * 2).exp().sum()), buffers(SMALL), "cpu")
    assert hungry.peak_bytes() >= 2 * 40 * 96 * 4


def test_a_peer_may_use_other_kernels_and_leaves_them():
    before, seen = _native.library.cpu_isa(), []

    def loss(x, t):
        seen.append(_native.library.cpu_isa())
        return hem_loss(x, t)

    Run(Peer("hem", loss, cpu_isa="baseline"), buffers(SMALL), "cpu").once(0)()
    assert seen == ["baseline", "baseline"]
    assert _native.library.cpu_isa() == before


def test_a_loss_that_overwrites_its_logits_spoils_nobody_elses():
    def loss(x, t):
        with torch.no_grad():
            x.zero_()
        return x.sum()

    given = buffers(SMALL)
    before = given[0][0].detach().clone()
    run = Run(Peer("in place", loss, overwrites_logits=True), given, "cpu")
    run.once(0)()
    run.saved_bytes()
    run.peak_bytes()
    kept = Run(Peer("ce", F.cross_entropy, overwrites_logits=True), given, "cpu").saved_bytes()
    assert kept == Run(Peer("ce", F.cross_entropy), given, "cpu").saved_bytes()
    assert torch.equal(given[0][0], before)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("too large"), "out of memory"),
        (RuntimeError("no such size"), "RuntimeError: no such size"),
    ],
)
def test_a_peer_that_fails_is_a_result(error, words):
    def loss(x, t):
        raise error

    results = measure(SMALL, [Peer("huge", loss), Peer("hem", hem_loss)], "cpu", seconds=0, min_rounds=1)
    assert results["huge"].error == words
    assert results["huge"].seconds["both"] == []
    assert len(results["hem"].seconds["both"]) == 1


def test_timed_takes_every_call_by_itself():
    clock = itertools.count()
    seconds = timed("cpu", [lambda: [next(clock) for _ in range(100_000)], lambda: None])()
    assert len(seconds) == 2
    assert seconds[0] > seconds[1] > 0


def test_quantiles():
    found = Measurement()
    found.seconds["both"] = [5.0, 1.0, 2.0, 3.0, 4.0]
    assert [found.quantile("both", q) for q in (0.25, 0.5, 1)] == [2.0, 3.0, 5.0]


def test_inputs_and_bytes_of_a_workload():
    x, t = PIXELS.inputs(torch.bfloat16, "cpu", torch.Generator().manual_seed(0))
    assert x.dtype == torch.bfloat16
    assert x.requires_grad
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert t.shape == (2, 16, 8)
    assert 0 <= t.min() <= t.max() < 21
    assert PIXELS.label == "pixels, channels_last"
    # Read once and written once; the word of each pixel and its target both ways.
    assert PIXELS.floor_bytes(torch.bfloat16) == 2 * 2 * (2 * 21 * 16 * 8)
    assert PIXELS.hem_bytes(torch.bfloat16) == PIXELS.floor_bytes(torch.bfloat16) + 2 * 256 * (4 + 8)


@pytest.mark.parametrize("workload", workloads.CPU + workloads.CUDA, ids=lambda w: w.label)
def test_every_workload_has_peers_of_its_own_names(workload):
    for device in ("cpu", "cuda"):
        keys = [peer.key for peer in workloads.peers(workload, device)]
        assert len(set(keys)) == len(keys)
        assert keys[0] == "hem"
        assert {"ce", "ce, compiled", "hem in torch", "hem in torch, compiled"} < set(keys)
        assert ("multi_margin_loss" in keys) == (len(workload.shape) == 2)


@pytest.mark.parametrize("shape", [(2000, 7), (2, 5, 100, 150), (1, 5, 160, 160)])
def test_targets_that_are_mostly_finished(shape):
    x, t = Workload("some", shape).inputs(torch.float32, "cpu", torch.Generator().manual_seed(0))
    found = workloads.mostly_finished(x, t, 0.25)
    share = (hem_loss(x, found, margin=1e-6, reduction="none") > 0).float().mean().item()
    assert share == pytest.approx(0.25 * (1 - 1 / shape[1]), abs=0.06)
    if len(shape) > 2:  # side by side
        active = (found != x.argmax(1)).float()
        assert (active[:, :, 1:] * active[:, :, :-1]).sum() > active.sum() / 2
