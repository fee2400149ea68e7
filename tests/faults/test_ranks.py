"""``hem-ext`` under torchrun, of whose processes one dies or hangs."""

import json
import signal
import time

import psutil
import pytest
from faults.commands import finish, kill, left, start

from hem_ext.harness.compare import finished

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
TRAIN = ("train", "classification", "--quick", "--epochs", "40", "--set", "transfer=false", "--timeout", "20")
COMPARE = (
    *("compare", "classification", "--losses", "ce,hem", "--seeds", "3", "--quick"),
    *("--epochs", "6", "--jobs", "1"),
)
# torchrun gives processes 30 seconds to end; 20 are the command's own.
BOUND = 150


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    finish(TRAIN, folder, *LAUNCHER)
    return folder


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_end_and_the_next_run_goes_on(whole, tmp_path, signum, rank):
    hit(TRAIN, tmp_path, rank, signum, lambda: list(tmp_path.glob("models/*/checkpoint*")))
    assert not (tmp_path / "metrics.json").exists()
    finish(TRAIN, tmp_path, *LAUNCHER)
    found, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, whole))
    assert found == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_what_the_others_finished_is_kept(tmp_path, rank):
    finish(COMPARE, tmp_path / "whole")
    folder = tmp_path / "hit"
    hit(COMPARE, folder, rank, signal.SIGKILL, lambda: finished(folder))
    rows = finished(folder)
    assert rows
    printed = finish(COMPARE, folder, *LAUNCHER)
    assert f"{len(rows)} of 6 cells are in" in " ".join(printed.split())
    found, expected = left(folder), left(tmp_path / "whole")
    for what in expected:
        assert found[what] == expected[what], what


def hit(arguments, folder, rank, signum, begun):
    """Start the command, send one of its processes a signal once it has begun, and see all of them end."""
    process = start(arguments, folder, *LAUNCHER)
    try:
        end = time.monotonic() + 300
        while not begun() and time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
        ranks = psutil.Process(process.pid).children(recursive=True)
        (victim,) = (child for child in ranks if child.environ().get("RANK") == str(rank))
        victim.send_signal(signum)
        printed, _ = process.communicate(timeout=BOUND)
    finally:
        kill(process)
    assert process.returncode != 0, printed
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
