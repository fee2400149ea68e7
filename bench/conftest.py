"""Options of the benchmark, what it runs, and where its rows go."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import report
import torch
import workloads
from provenance import provenance, results_path


@dataclass
class Session:
    """One run of the benchmark."""

    device: str
    quick: bool
    deadline: float  # of time.monotonic(): no workload begins after it
    facts: dict[str, Any]
    rows: list[dict] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


KEY = pytest.StashKey[Session]()


def pytest_addoption(parser):
    group = parser.getgroup("hem_ext")
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu")
    group.addoption("--quick", action="store_true", help="fewer workloads, peers and rounds")
    group.addoption("--minutes", type=float, default=60.0, help="begin no workload after this long, and name it")
    group.addoption("--results", type=Path, help="file that the rows are appended to (default: in bench/results)")


def pytest_configure(config):
    device = config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda, but torch sees no GPU")
    deadline = time.monotonic() + 60 * config.getoption("--minutes")
    config.stash[KEY] = Session(device, config.getoption("--quick"), deadline, provenance(device))


def pytest_generate_tests(metafunc):
    session = metafunc.config.stash[KEY]
    pairs = [
        (workload, peer)
        for workload in getattr(workloads, session.device.upper())
        for peer in workloads.peers(workload, session.device)
        if not session.quick or (workload.quick and peer.quick)
    ]
    metafunc.parametrize(("workload", "peer"), pairs, ids=[f"{w.label}: {p.key}" for w, p in pairs])


@pytest.fixture
def session(request):
    return request.config.stash[KEY]


def pytest_terminal_summary(terminalreporter, config):
    session = config.stash[KEY]
    if not session.rows:
        return
    path = config.getoption("--results") or results_path(session.facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in session.rows)
    terminalreporter.section("hem_ext")
    terminalreporter.write_line(report.text(session.rows))
    for name in session.left_out:
        terminalreporter.write_line(f"not measured, out of time: {name}")
    terminalreporter.write_line(f"{len(session.rows)} rows appended to {path}")
