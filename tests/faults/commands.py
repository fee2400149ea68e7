"""Commands that are started, killed, and looked at."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from hem_ext.harness.compare import read_rows
from hem_ext.harness.report.results import read_curves

LAUNCH = str(Path(__file__).with_name("launch.py"))
ROOT = Path(__file__).parents[2]
# One thread: torch's kernels give other bits on another number of them.
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
}
TIMES = ("seconds", "loss_seconds", "loss_share")


def start(arguments, folder, *launcher):
    """The command, in a group of its own."""
    return subprocess.Popen(
        [sys.executable, *launcher, LAUNCH, *arguments, "--output", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=ENVIRONMENT,
    )


def finish(arguments, folder, *launcher):
    """Run it to its end; what it printed."""
    process = start(arguments, folder, *launcher)
    try:
        printed, _ = process.communicate(timeout=1800)
    finally:
        kill(process)
    assert process.returncode == 0, printed
    return printed


def kill(process):
    """And all that it started, if it runs still."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def timeless(line):
    return {name: value for name, value in line.items() if name not in TIMES}


def left(folder):
    """Everything in a folder that must be the same however the command was run: every row and epoch, every file."""
    rows = sorted(repr(timeless(row)) for row in read_rows(folder))
    keys = [(row["cell"], row["metric"]) for row in read_rows(folder)]
    assert len(keys) == len(set(keys))
    lines = (folder / "results.jsonl").read_text().splitlines()
    assert len(lines) == len(rows)  # none is there twice
    curves = {key: repr([timeless(epoch) for epoch in line["history"]]) for key, line in read_curves(folder).items()}
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.parent.parent.name != "models" and path.suffix != ".jsonl"
    }
    if "report.md" in files:
        files["report.md"] = re.sub(rb"\d+\.\d%", b"", files["report.md"])  # of the time that is spent in a loss
    kept = sorted(str(path.relative_to(folder)) for path in folder.glob("models/*/*"))
    return {"rows": rows, "curves": curves, "files": files, "kept": kept}
