"""What is installed and in use: ``python -m hem_ext.info``."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from pathlib import Path

import torch

import hem_ext
from hem_ext import _native

ROOT = Path(__file__).resolve().parents[1]
"""The checkout, where the package is used from one."""


def sources_digest(root: Path = ROOT) -> str:
    """A hash of ``csrc/``: what was measured with one digest says nothing about another."""
    digest = hashlib.sha256()
    for path in sorted((root / "csrc").rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def cuda_evidence(root: Path = ROOT) -> str:
    """What the newest committed measurements on a GPU say about the CUDA kernels of today, in words."""
    rows = [
        (row["date"], path.name, row)
        for path in (root / "bench" / "results").glob("*.jsonl")
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())
        if row["device"] == "cuda"
    ]
    if not rows:
        return "none: these kernels have not been measured on a GPU"
    _, name, row = max(rows, key=lambda found: found[:2])
    state = "csrc/ is the same" if row["csrc"] == sources_digest(root) else "csrc/ has changed since"
    return f"{row['gpu']}, {row['date'][:10]} (bench/results/{name}); {state}"


def describe() -> dict[str, str]:
    """Facts a bug report needs, in the order they are printed.

    Example::

        >>> from hem_ext import info
        >>> info.describe()["torch"] == torch.__version__
        True
    """
    facts = {
        "hem_ext": hem_ext.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }
    library = _native.library
    if library is None:
        facts["native library"] = f"not loaded: {_native.load_error}"
        facts["instead"] = "plain PyTorch (hem_ext.reference)"
    else:
        available = ", ".join(library.available_cpu_isas())
        chosen_by = "HEM_EXT_CPU_ISA" if os.environ.get("HEM_EXT_CPU_ISA") else "the fastest here"
        facts["native library"] = str(library.__file__)
        facts["built with"] = f"{library.build['compiler']}, torch {library.build['torch']}"
        facts["CPU kernels"] = f"{library.cpu_isa()} ({chosen_by}; this processor runs {available})"
        facts["CUDA kernels"] = "built" if library.build["cuda"] else "not built"
    if (ROOT / "bench" / "results").is_dir():  # a checkout
        facts["CUDA evidence"] = cuda_evidence()
    return facts


def main() -> None:
    for name, value in describe().items():
        print(f"{name + ':':16} {value}")


if __name__ == "__main__":
    main()
