"""Copies of the checkout, to break, and tests that run in one."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.mutants.mutants import ROOT

LONGEST = 900  # seconds of one selection of tests; a mutant that hangs is noticed too


def copy_of_checkout(folder: Path, *left_out: str) -> None:
    """Into a folder, which there may be; without what matches a pattern, and what is large or made by a run."""
    made = (".*", "__pycache__", "build", "demo", "dist", "mutants", "paper")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*made, *left_out), dirs_exist_ok=True)


def check_without_mutant(folder: Path, tests: Iterable[str]) -> None:
    """End where the tests fail as it is."""
    if is_noticed(folder, tests):
        sys.exit(f"the tests fail without a mutant\n{(folder / 'log.txt').read_text('utf-8')}")


def is_noticed(folder: Path, tests: Iterable[str]) -> bool:
    """Whether a test fails in a copy, cannot be run, or never ends."""
    log = folder / "log.txt"
    # A fork of this process, which has torch: to import it takes longer than most of the tests.
    child = multiprocessing.get_context("fork").Process(target=_run_pytest, args=(folder, log, list(tests)))
    child.start()
    child.join(LONGEST)
    if child.is_alive():
        child.kill()
        child.join()
        return True
    return child.exitcode != 0


def _run_pytest(folder: Path, log: Path, tests: list[str]) -> None:
    with open(log, "w", encoding="utf-8") as out:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(out.fileno(), stream.fileno())
    os.chdir(folder)
    sys.path[:0] = [str(folder)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # of the checkout
    # What was compiled of one mutant may be as long, and as old to the second, as the next. Also in what tests start.
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    import pytest

    sys.exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests])))
