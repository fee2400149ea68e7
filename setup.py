"""Build the native library. Everything else about the package is in pyproject.toml."""

import os
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
]

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
]


def native_library() -> Extension:
    library_dir = os.path.join(os.path.dirname(torch.__file__), "lib")
    return Extension(
        "hem_ext._C",
        sources=SOURCES,
        include_dirs=[pybind11.get_include(), *cpp_extension.include_paths()],
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
            ("HEM_EXT_TORCH_VERSION", torch.__version__),
        ],
        library_dirs=[library_dir],
        libraries=["c10", "torch_cpu"],
        extra_compile_args=CXX_FLAGS,
        language="c++",
    )


print(f"hem_ext: building the CPU kernels against torch {torch.__version__}", file=sys.stderr)
setup(ext_modules=[native_library()], cmdclass={"build_ext": cpp_extension.BuildExtension})
