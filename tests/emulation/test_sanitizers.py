"""The CUDA kernels under sanitizers, and that these notice what they are there for.

Every test is a compilation and a program, of one thread most of the time: they go side by side.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import kernels
import pytest

RUNTIME = {"thread": "libtsan.so", "address": "libasan.so", "undefined": "libubsan.so"}


def run(sanitizer, **options):
    library = kernels.build(sanitizer, **options)
    found = subprocess.run(
        ["g++", f"-print-file-name={RUNTIME[sanitizer]}"], capture_output=True, text=True, check=True
    )
    return subprocess.run(
        [sys.executable, kernels.HERE / "run_under_sanitizer.py", library],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "LD_PRELOAD": found.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
            "TSAN_OPTIONS": "halt_on_error=1",
        },
    )


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """What is to come of each selected test, by its id."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def start(sanitizer, old=None, new=None, words=None):
            if words is None:
                return pool.submit(run, sanitizer)
            return pool.submit(run, sanitizer, edits=[(KERNELS, old, new)], folder=tmp_path_factory.mktemp("broken"))

        here = [item for item in request.session.items if item.path == request.path]
        yield {item.nodeid: start(**item.callspec.params) for item in here}


@pytest.mark.parametrize("sanitizer", RUNTIME)
def test_kernels_are_clean(runs, request, sanitizer):
    done = runs[request.node.nodeid].result()
    assert done.returncode == 0, done.stderr


KERNELS = "csrc/hem/hem_cuda_kernels.cuh"


@pytest.mark.parametrize(
    ("sanitizer", "old", "new", "words"),
    [
        # Rows are read before the block has brought them.
        (
            "thread",
            "    __syncthreads();\n\n    const int64_t position = first + threadIdx.x;",
            "    const int64_t position = first + threadIdx.x;",
            "data race",
        ),
        # A warp's sum is read before it is written.
        (
            "thread",
            "if (rank % kWarp == 0) scratch[rank / kWarp] = x;\n    sync();",
            "if (rank % kWarp == 0) scratch[rank / kWarp] = x;",
            "data race",
        ),
        # One element too many at the tail of a copy.
        (
            "address",
            "i = head + vectors * kWidth + threadIdx.x; i < n;",
            "i = head + vectors * kWidth + threadIdx.x; i <= n;",
            "heap-buffer-overflow",
        ),
    ],
    ids=["barrier of a block", "barrier of a reduction", "tail"],
)
def test_a_broken_kernel_is_caught(runs, request, sanitizer, old, new, words):
    done = runs[request.node.nodeid].result()
    assert done.returncode != 0
    assert words in done.stderr
