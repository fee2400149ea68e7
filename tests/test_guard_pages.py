"""What lies past a tensor is neither read nor written: there it is no memory at all."""

import ctypes
import faulthandler
import os
import signal
import subprocess
import sys

import guard_pages
import pytest
import torch


def test_every_op_stays_inside_its_tensors():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, guard_pages.__file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    last = result.stdout.splitlines()[-1:]
    assert result.returncode == 0, f"{result.returncode} after {last}\n{result.stderr}"


@pytest.mark.parametrize(("side", "past"), [("begin", -1), ("end", 20)])
def test_what_is_guarded(side, past):
    x = guard_pages.guarded(side, "numbers", torch.arange(5.0))
    assert x.tolist() == [0, 1, 2, 3, 4]
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # what is expected is no news
        ctypes.string_at(x.data_ptr() + past, 1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGSEGV
