"""Where and with what a number was measured."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import cpuinfo
import torch

import hem_ext
from hem_ext import _native, info


def provenance(device: str) -> dict[str, Any]:
    """The fields that every result row begins with."""
    library = _native.library
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "csrc": info.sources_digest(),
        "device": device,
        "cpu": cpu_name(),
        "cpu_isa": library.cpu_isa(),
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hem_ext": hem_ext.__version__,
        "compiler": library.build["compiler"],
    }
    malloc = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    preloaded = [Path(library).name for library in os.environ.get("LD_PRELOAD", "").replace(":", " ").split()]
    if any("malloc" in name for name in preloaded):
        malloc["LD_PRELOAD"] = " ".join(preloaded)
    if malloc:  # the allocator and its settings, on which the price of fresh memory depends
        facts["malloc"] = malloc
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return facts


def results_path(facts: dict[str, Any]) -> Path:
    """The committed file that rows with these facts belong in."""
    device = facts["gpu"] if facts["device"] == "cuda" else facts["cpu"].split(" (")[0]
    name = "-".join([facts["date"][:10], device, facts["torch"], facts["commit"]])
    return Path(__file__).parent / "results" / f"{name.replace(' ', '_')}.jsonl"


def cpu_name() -> str:
    found = cpuinfo.get_cpu_info()
    brand = re.sub(r"\((R|TM)\)", "", found.get("brand_raw", platform.machine()))
    return f"{brand} (family {found.get('family')}, model {found.get('model')})"


def commit() -> str:
    """The checked out commit, with a plus sign where files differ from it."""
    found = _output("git", "-C", str(info.ROOT), "rev-parse", "--short=10", "HEAD")
    changed = _output(
        "git", "-C", str(info.ROOT), "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results"
    )
    return f"{found}+" if found and changed else found or "unknown"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
