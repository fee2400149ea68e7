"""Build the native library. Everything else about the package is in pyproject.toml."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Distribution, Extension, setup

try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError:
    torch = None  # metadata and an sdist do without

# The oldest torch whose stable ABI the glue may use: the build then serves it and every later one.
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10
# Of CPython likewise, by its limited API (csrc/module.cpp), which free-threaded builds do not have.
LIMITED_API = "" if sysconfig.get_config_var("Py_GIL_DISABLED") else "cp310"

ON_MACOS = sys.platform == "darwin"

SOURCES = [
    "csrc/module.cpp",
    "csrc/common/cpu_isa.cpp",
    "csrc/hem/hem_cpu.cpp",
    "csrc/hem/hem_cpu_baseline.cpp",
    "csrc/hem/hem_cpu_avx2.cpp",
    "csrc/hem/hem_cpu_avx512.cpp",
    "csrc/parallel/parallel_cpu.cpp",
    "csrc/parallel/parallel_cpu_baseline.cpp",
    "csrc/parallel/parallel_cpu_avx2.cpp",
    "csrc/parallel/parallel_cpu_avx512.cpp",
    "csrc/upsample/upsample_cpu.cpp",
    "csrc/upsample/upsample_cpu_baseline.cpp",
    "csrc/upsample/upsample_cpu_avx2.cpp",
    "csrc/upsample/upsample_cpu_avx512.cpp",
]
CUDA_SOURCES = ["csrc/hem/hem_cuda.cu", "csrc/parallel/parallel_cuda.cu", "csrc/upsample/upsample_cuda.cu"]

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
    # GCC compiles a lambda that captures nothing a second time, as a function that nobody calls, for the baseline.
    "-Wno-psabi",
    # Clang does not know all of these.
    "-Wno-unknown-warning-option",
]
NVCC_FLAGS = ["-O3", "-std=c++17", "--fmad=false", "-Xcompiler", "-fvisibility=hidden"]


def switch(name: str, *values: str) -> str:
    """What an environment variable says, the first of its values where it is not set."""
    value = os.environ.get(name, values[0])
    if value not in values:
        sys.exit(f"{name} must be {', '.join(values[:-1])} or {values[-1]}, got {value!r}")
    return value


def with_native() -> bool:
    """Whether to build the library at all, as HEM_EXT_NATIVE says; one sentence where that would fail in pages."""
    if switch("HEM_EXT_NATIVE", "1", "0") == "0":
        if switch("HEM_EXT_CUDA", "auto", "0", "1") == "1":
            sys.exit("HEM_EXT_CUDA=1 asks for a part of the native library, which HEM_EXT_NATIVE=0 leaves out")
        print("hem_ext: native library left out by HEM_EXT_NATIVE=0", file=sys.stderr)
        return False
    missing = []
    if torch is None or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        found = "none is installed" if torch is None else f"this one is {torch.__version__}"
        missing.append(f"torch 2.10 or later ({found}: pip install 'torch>=2.10')")
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        cure = "xcode-select --install" if ON_MACOS else "apt-get install g++"
        missing.append(f"C++ compiler (looked for {compiler}: {cure}, or name one in CXX)")
    headers = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(headers, "Python.h")):
        cure = "the Python of python.org has it" if ON_MACOS else "apt-get install python3-dev"
        missing.append(f"Python.h (looked in {headers}: {cure})")
    if missing:
        sys.exit(
            f"hem_ext: the native library cannot be built, there is no {' and no '.join(missing)}; "
            "HEM_EXT_NATIVE=0 installs the package without it, in plain PyTorch"
        )
    print(f"hem_ext: building against torch {torch.__version__}", file=sys.stderr)
    os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # of an environment that is not activated
    if not cpp_extension.is_ninja_available():
        print("hem_ext: building one file at a time, as there is no ninja: pip install ninja", file=sys.stderr)
    return True


def with_cuda() -> bool:
    """Whether to build the CUDA kernels: as HEM_EXT_CUDA says. A visible GPU is not needed to build."""
    wanted = switch("HEM_EXT_CUDA", "auto", "0", "1")
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


def settle_macos() -> None:
    """Build for torch's architecture, where Python is of two, and for a macOS that has C++17's aligned memory."""
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
    versions = (sysconfig.get_config_var("MACOSX_DEPLOYMENT_TARGET") or "0", "11.0")
    newest = max(versions, key=lambda version: [int(part) for part in version.split(".")])
    os.environ.setdefault("MACOSX_DEPLOYMENT_TARGET", newest)


def native_library(cuda: bool) -> Extension:
    if ON_MACOS:
        settle_macos()
    device = "cuda" if cuda else "cpu"
    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("HEM_EXT_TORCH_VERSION", torch.__version__)]
    folders = cpp_extension.include_paths(device)
    # As the system's: what they are warned of is not ours.
    headers = [word for path in folders for word in ("-isystem", path)]
    # The names of files in messages without the folders that happen to hold them: the same library anywhere.
    relative = [f"-ffile-prefix-map={path}/=" for path in (os.getcwd(), *folders)]
    # CPython's own flags say -g. A debugger has to find the files.
    debug = ["-g"] if switch("HEM_EXT_DEBUG", "0", "1") == "1" else [*relative, "-g0"]
    strict = ["-Werror"] if switch("HEM_EXT_WERROR", "0", "1") == "1" else []
    if cuda and not torch.cuda.is_available():
        # torch would build for every card it knows; these, and newer ones through PTX.
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    return Extension(
        "hem_ext._C",
        sources=SOURCES + (CUDA_SOURCES if cuda else []),
        define_macros=macros + ([("HEM_EXT_WITH_CUDA", None), ("USE_CUDA", None)] if cuda else []),
        library_dirs=cpp_extension.library_paths(device),
        libraries=["c10", "torch_cpu", *(["torch_cuda", "cudart"] if cuda else [])],
        extra_compile_args={"cxx": CXX_FLAGS + headers + strict + debug, "nvcc": NVCC_FLAGS + headers},
        language="c++",
        py_limited_api=bool(LIMITED_API),
    )


class Package(Distribution):
    """Looks at torch and the compiler where a command builds: metadata and an sdist need neither."""

    def run_commands(self) -> None:
        if not {"egg_info", "dist_info", "sdist"}.issuperset(self.commands) and with_native():
            self.ext_modules = [native_library(with_cuda())]
            self.cmdclass["build_ext"] = cpp_extension.BuildExtension
        super().run_commands()


# Forced, as headers and switches may have changed.
setup(distclass=Package, options={"bdist_wheel": {"py_limited_api": LIMITED_API}, "build_ext": {"force": True}})
