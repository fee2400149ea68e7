"""Everything that needs a GPU, in one command: ``python bench/gpu.py``, or ``make gpu``.

Builds the extension in place, runs the tests on the GPU with no skip allowed, runs the kernels under
compute-sanitizer, measures speed and memory against the peers, appends what was found to ``bench/results/`` and
prints it. It needs a GPU, nvcc, a CUDA build of torch, pytest, pytest-benchmark, pybind11 and ninja, and no network;
``--wheels FOLDER`` adds peers such as Liger's. A step that fails does not stop the next one; the exit status is 1 if
any did.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# What runs the same kernels on the host, trains networks or measures needs no GPU.
TESTS = [
    "tests",
    *(f"--ignore=tests/{part}" for part in ("emulation", "harness", "bench")),
    "--require-cuda",
    "--no-skips",
]
SANITIZED = [
    "tests/test_cuda.py",
    "--require-cuda",
    "--no-skips",
    "-k",
    "agrees and contiguous and (float32 or bfloat16)",
]
SANITIZERS = ("memcheck", "racecheck", "initcheck")


class Evidence:
    """Runs steps within a time, and remembers what became of them."""

    def __init__(self, folder: Path, minutes: float, environment: dict[str, str]) -> None:
        self.begin = time.monotonic()
        self.folder = folder
        self.minutes = minutes
        self.environment = environment
        self.rows: list[dict] = []

    def minutes_left(self) -> float:
        return self.minutes - (time.monotonic() - self.begin) / 60

    def step(self, name: str, command: list[str], *, minutes: float, **environment: str) -> bool:
        """Run a command for so long at most; its output goes to a file, the end of it to the screen."""
        begin, log = time.monotonic(), self.folder / f"{name}.log"
        with log.open("w", encoding="utf-8") as output:
            try:
                status = subprocess.run(
                    command,
                    cwd=ROOT,
                    env={**self.environment, **environment},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=60 * max(0.02, min(minutes, self.minutes_left())),
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                status = None
        lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
        outcome = "passed" if status == 0 else "out of time" if status is None else f"failed ({status})"
        row = {
            "check": name,
            "outcome": outcome,
            "seconds": round(time.monotonic() - begin),
            "last_line": (lines or [""])[-1],
        }
        self.rows.append(row)
        print(f"--- {name}: {outcome}, {row['seconds']} s", *lines[-5 if status == 0 else -40 :], sep="\n", flush=True)
        return status == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=7.5, help="end within this long; workloads left out are named")
    parser.add_argument("--results", type=Path, help="the file for the rows; in bench/results if not given")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "gpu", help="folder for the output of every step")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use beside what is installed")
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HEM_EXT_CUDA": "1"}
    evidence = Evidence(args.logs, args.minutes, environment)
    if args.wheels:
        target = args.logs / "wheels"
        wheels = [str(path) for path in sorted(args.wheels.glob("*.whl"))]
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        evidence.step("wheels", [*install, "--target", str(target), *wheels], minutes=1)
        environment["PYTHONPATH"] += f"{os.pathsep}{target}"

    if evidence.step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], minutes=4):
        parallel = ["-n", "6"] if importlib.util.find_spec("xdist") else []
        evidence.step("tests", [*PYTEST, *TESTS, *parallel], minutes=3)
        if shutil.which("compute-sanitizer"):
            with ThreadPoolExecutor() as pool:
                for tool in SANITIZERS:
                    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *PYTEST, *SANITIZED]
                    # Every tensor its own allocation: the caching allocator would hide what lies outside of one.
                    pool.submit(evidence.step, tool, command, minutes=2, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        else:
            evidence.rows.append({"check": "compute-sanitizer", "outcome": "failed (not on PATH)"})
        # The library is there now.
        sys.path.insert(0, str(ROOT))
        from provenance import provenance, results_path

        facts = provenance("cuda")
        results = args.results or results_path(facts)
        bench = [*PYTEST, "bench", "--device", "cuda", "--results", str(results)]
        evidence.step("benchmark", [*bench, "--minutes", f"{evidence.minutes_left() - 0.7:.2f}"], minutes=args.minutes)
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**facts, **row}) + "\n" for row in evidence.rows)
        print(f"rows are in {results}, the output of every step in {args.logs}")
    failed = [row["check"] for row in evidence.rows if row["outcome"] != "passed"]
    print(f"{', '.join(failed)}: not passed" if failed else "everything passed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
