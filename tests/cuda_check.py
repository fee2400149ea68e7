"""Compile the CUDA sources for several architectures and hold what ptxas reports against limits: ``make cuda-check``.

Needs nvcc, and no GPU: a CPU build of torch has the headers. Warnings are errors, and so is a register that spills
beyond what is listed here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["csrc/hem/hem_cuda.cu", "csrc/parallel/parallel_cuda.cu", "csrc/upsample/upsample_cuda.cu"]
ARCHITECTURES = ["sm_75", "sm_80", "sm_90", "sm_100"]

# The most registers a thread may take, by kernel. 128 let a block of 512 run, 168 one of 384.
REGISTERS = {
    "hem_forward_pixels": 168,
    "hem_forward_wide_rows": 128,
    "hem_forward_narrow_rows": 64,
    "hem_forward_many_class_pixels": 80,
    "hem_backward_pixels": 80,
    "hem_backward_wide_rows": 64,
    "hem_backward_narrow_rows": 40,
    "hem_reduce": 40,
    "parallel_errors_rows": 64,
    "parallel_keep_rows": 64,
    "parallel_errors_pixels": 64,
    "parallel_keep_pixels": 64,
    "upsampled_forward_pixels": 144,
    "upsampled_backward": 184,  # 32 sums of float64
}
# Turing gets the code that is cut for Ampere and later. Its compiler needs a few registers more, and blocks of 512
# leave it 128: less would be kept on chip for every architecture if that were to fit.
TURING_REGISTERS = {
    "hem_forward_wide_rows": 184,
    "hem_forward_many_class_pixels": 88,
    "hem_backward_pixels": 104,
    "upsampled_backward": 240,
}
TURING_SPILLED_BYTES = {"hem_forward_pixels": 4, "hem_forward_wide_rows": 164}

REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compile_for(architecture: str, source: str) -> str:
    """What ptxas says about every kernel of a source."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", f"-arch={architecture}", "-Werror=all-warnings", "-Xptxas=-v"]
        command += ["-Xcompiler=-fPIC", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        command += [f"-isystem={path}" for path in cpp_extension.include_paths()]
        command += ["-c", source, "-o", f"{folder}/object.o"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def main() -> None:
    if shutil.which("nvcc") is None:
        sys.exit("cuda-check needs nvcc on PATH")
    failures = []
    for architecture in ARCHITECTURES:
        turing = architecture == "sm_75"
        limits = REGISTERS | (TURING_REGISTERS if turing else {})
        allowed_spills = TURING_SPILLED_BYTES if turing else {}
        kernels = [found for source in SOURCES for found in REPORT.finditer(compile_for(architecture, source))]
        most = dict.fromkeys(REGISTERS, 0)
        for kernel in kernels:
            name = next((k for k in REGISTERS if k in kernel["name"]), None)
            if name is None:
                failures.append(f"{architecture}: {kernel['name']} has no limit in {Path(__file__).name}")
                continue
            most[name] = max(most[name], int(kernel["registers"]))
            spilled = max(int(kernel["stores"]), int(kernel["loads"]))
            if spilled > allowed_spills.get(name, 0):
                failures.append(f"{architecture}: {kernel['name']} spills {spilled} bytes")
        for name, registers in most.items():
            if not 0 < registers <= limits[name]:
                failures.append(f"{architecture}: {name} takes {registers} registers, limit {limits[name]}")
        print(f"{architecture}: {len(kernels)} kernels, at most " + ", ".join(f"{n} {r}" for n, r in most.items()))
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
