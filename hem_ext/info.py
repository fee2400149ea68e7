"""What is installed and in use: ``python -m hem_ext.info``."""

from __future__ import annotations

import os
import platform
import sys

import torch

import hem_ext
from hem_ext import _native


def describe() -> dict[str, str]:
    """Facts a bug report needs, in the order they are printed.

    Example::

        >>> from hem_ext import info
        >>> info.describe()["hem_ext"]
        '0.1.0'
    """
    facts = {
        "hem_ext": hem_ext.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }
    library = _native.library
    if library is None:
        facts["native library"] = f"not loaded: {_native.load_error}"
        facts["instead"] = "plain PyTorch (hem_ext.reference)"
    else:
        available = ", ".join(library.available_cpu_isas())
        chosen_by = "HEM_EXT_CPU_ISA" if os.environ.get("HEM_EXT_CPU_ISA") else "the fastest here"
        facts["native library"] = library.__file__
        facts["built with"] = f"{library.build['compiler']}, torch {library.build['torch']}"
        facts["CPU kernels"] = f"{library.cpu_isa()} ({chosen_by}; this processor runs {available})"
        facts["CUDA kernels"] = "built" if library.build["cuda"] else "not built"
    return facts


def main() -> None:
    for name, value in describe().items():
        print(f"{name + ':':16} {value}")


if __name__ == "__main__":
    main()
