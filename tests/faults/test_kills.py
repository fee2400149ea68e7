"""Commands that are killed at random moments, twenty times each, and end with the bits of one that was not."""

import random
import subprocess
import time

import pytest
from faults.commands import finish, kill, left, start

KILLS = 20
COMMANDS = {
    "compare": (
        *("compare", "classification", "segmentation", "--losses", "ce,hem", "--seeds", "2", "--quick"),
        *("--epochs", "6", "--jobs", "1"),
    ),
    "tune": (
        *("tune", "classification", "imbalanced", "--losses", "ce,hem", "--seeds", "2", "--quick", "--epochs", "6"),
        *("--grid", "max_lr=0.05,0.1", "--jobs", "2"),
    ),
    "paper": ("paper", "--quick", "--jobs", "2"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_twenty_times_a_command_ends_with_the_same_bits(tmp_path, command):
    arguments, seed = COMMANDS[command], time.time_ns()
    draw, begin = random.Random(seed), time.monotonic()
    finish(arguments, tmp_path / "whole")
    whole = time.monotonic() - begin
    longest = min(whole, 45)  # several times what it takes to start
    kills, number, progress = 0, 0, []
    while kills < KILLS:
        folder = tmp_path / f"killed-{number}"
        process = start(arguments, folder)
        try:
            printed, _ = process.communicate(timeout=draw.uniform(0, longest))
        except subprocess.TimeoutExpired:
            kill(process)
            kills += 1
            results = folder / "results.jsonl"
            progress.append(len(results.read_text().splitlines()) if results.exists() else 0)
        else:
            assert process.returncode == 0, f"seed {seed}: {printed}"
            number += 1  # it came to its end: another one is killed
        finally:
            kill(process)
    assert any(progress), f"seed {seed}: killed before anything was done"
    for i in range(number + 1):
        finish(arguments, tmp_path / f"killed-{i}")
        found, expected = left(tmp_path / f"killed-{i}"), left(tmp_path / "whole")
        for what in expected:
            assert found[what] == expected[what], f"seed {seed}: {what}"
    print(f"{command}: {kills} kills, after {progress} rows; seed {seed}")
