"""What setup.py decides about CUDA; the build itself is what every other test runs on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def decide(cuda=None, toolkit=None, **environment):
    """Run setup.py in a process that has a torch for that version of CUDA, and a toolkit in that folder."""
    code = (
        f"import sys, runpy, torch; torch.version.cuda = {cuda!r};"
        "from torch.utils import cpp_extension;"
        f"cpp_extension.CUDA_HOME = {toolkit!r} or cpp_extension.CUDA_HOME;"
        "sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py', run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_auto_says_what_it_left_out():
    done = decide(HEM_EXT_CUDA="auto")
    assert done.returncode == 0, done.stderr
    assert "hem_ext: CUDA kernels left out: no CUDA build of torch" in done.stderr


def test_a_toolkit_of_another_cuda_is_left_out(tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    words = "no CUDA toolkit for torch's CUDA 13.2 (nvcc is 12.4)"
    done = decide(cuda="13.2", toolkit=str(tmp_path), HEM_EXT_CUDA="auto")
    assert done.returncode == 0, done.stderr
    assert f"CUDA kernels left out: {words}" in done.stderr
    assert words in decide(cuda="13.2", toolkit=str(tmp_path), HEM_EXT_CUDA="1").stderr


def test_cuda_can_be_switched_off():
    assert "CUDA kernels switched off by HEM_EXT_CUDA=0" in decide(HEM_EXT_CUDA="0").stderr


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("1", "HEM_EXT_CUDA=1, but there is no CUDA build of torch"),
        ("yes", "HEM_EXT_CUDA must be auto, 0 or 1, got 'yes'"),
    ],
)
def test_what_cannot_be_built_is_an_error(value, words):
    done = decide(HEM_EXT_CUDA=value)
    assert done.returncode == 1
    assert words in done.stderr
