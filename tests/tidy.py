"""clang-tidy over the C++ sources, with the checks of .clang-tidy and the flags of setup.py: ``make tidy``.

Headers of torch and of Python are the system's: only what is ours is judged. The kernels name their instruction set
themselves.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from multiprocessing.pool import ThreadPool
from pathlib import Path

from cross.kernels import ROOT, of_setup
from torch.utils import cpp_extension

SOURCES = sorted(ROOT.glob("csrc/**/*.cpp"))
MACROS = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DHEM_EXT_TORCH_VERSION=2.10", "-DPy_LIMITED_API=0x030a0000"]


def tidy(source: Path) -> bool:
    headers = [f"-isystem{path}" for path in (*cpp_extension.include_paths("cpu"), sysconfig.get_path("include"))]
    command = [f"{sysconfig.get_path('scripts')}/clang-tidy", "--quiet", str(source), "--"]
    command += [*of_setup("CXX_FLAGS"), *MACROS, *headers]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(f"{source.relative_to(ROOT)}: {'ok' if done.returncode == 0 else done.stdout + done.stderr}", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    with ThreadPool(os.cpu_count()) as pool:
        sys.exit(not all(pool.map(tidy, SOURCES)))
