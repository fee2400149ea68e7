"""Build the native library. Everything else about the package is in pyproject.toml."""

import os
import re
import subprocess
import sys

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

# The oldest torch whose stable ABI the glue may use: the build then serves it and every later one.
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10

SOURCES = [
    "csrc/module.cpp",
    "csrc/common/cpu_isa.cpp",
    "csrc/hem/hem_cpu.cpp",
    "csrc/hem/hem_cpu_baseline.cpp",
    "csrc/hem/hem_cpu_avx2.cpp",
    "csrc/hem/hem_cpu_avx512.cpp",
    "csrc/upsample/upsample_cpu.cpp",
    "csrc/upsample/upsample_cpu_baseline.cpp",
    "csrc/upsample/upsample_cpu_avx2.cpp",
    "csrc/upsample/upsample_cpu_avx512.cpp",
]
CUDA_SOURCES = ["csrc/hem/hem_cuda.cu", "csrc/upsample/upsample_cuda.cu"]

CXX_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    # Without these GCC may not vectorise what could set errno or trap.
    "-fno-math-errno",
    "-fno-trapping-math",
    # No fused multiply-add: every instruction set gives the same bits.
    "-ffp-contract=off",
    # GCC 12's own AVX-512 intrinsics.
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
NVCC_FLAGS = ["-O3", "-std=c++17", "--fmad=false", "-Xcompiler", "-fvisibility=hidden"]


def with_cuda() -> bool:
    """Whether to build the CUDA kernels: as HEM_EXT_CUDA says. A visible GPU is not needed to build."""
    wanted = os.environ.get("HEM_EXT_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"HEM_EXT_CUDA must be auto, 0 or 1, got {wanted!r}")
    missing = []
    if torch.version.cuda is None:
        missing.append(f"CUDA build of torch (this one is {torch.__version__})")
    if cpp_extension.CUDA_HOME is None:
        missing.append("CUDA toolkit (looked for nvcc on PATH and for CUDA_HOME)")
    if not missing and toolkit_version().split(".")[0] != torch.version.cuda.split(".")[0]:
        missing.append(f"CUDA toolkit for torch's CUDA {torch.version.cuda} (nvcc is {toolkit_version()})")
    if wanted == "1" and missing:
        sys.exit(f"HEM_EXT_CUDA=1, but there is no {' and no '.join(missing)}")
    decision = "switched off by HEM_EXT_CUDA=0" if wanted == "0" else f"left out: no {' and no '.join(missing)}"
    build = wanted != "0" and not missing
    print(f"hem_ext: CUDA kernels {f'built with {cpp_extension.CUDA_HOME}' if build else decision}", file=sys.stderr)
    return build


def toolkit_version() -> str:
    """Of nvcc, as in "13.0"."""
    nvcc = os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc")
    return re.search(r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True))[1]


def native_library(cuda: bool) -> Extension:
    device = "cuda" if cuda else "cpu"
    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("HEM_EXT_TORCH_VERSION", torch.__version__)]
    if cuda and not torch.cuda.is_available():
        # torch would build for every card it knows; these, and newer ones through PTX.
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    return Extension(
        "hem_ext._C",
        sources=SOURCES + (CUDA_SOURCES if cuda else []),
        include_dirs=[pybind11.get_include(), *cpp_extension.include_paths(device)],
        define_macros=macros + ([("HEM_EXT_WITH_CUDA", None), ("USE_CUDA", None)] if cuda else []),
        library_dirs=cpp_extension.library_paths(device),
        libraries=["c10", "torch_cpu", *(["torch_cuda", "cudart"] if cuda else [])],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        language="c++",
    )


print(f"hem_ext: building against torch {torch.__version__}", file=sys.stderr)
setup(ext_modules=[native_library(with_cuda())], cmdclass={"build_ext": cpp_extension.BuildExtension})
