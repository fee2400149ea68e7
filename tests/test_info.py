import subprocess
import sys

import torch

import hem_ext
from hem_ext import _native, info


def test_describe():
    facts = info.describe()
    assert facts["hem_ext"] == hem_ext.__version__
    assert facts["torch"] == torch.__version__
    assert facts["native library"] == _native.library.__file__
    assert facts["CPU kernels"].startswith(_native.library.cpu_isa())
    assert facts["CUDA kernels"] == ("built" if _native.library.build["cuda"] else "not built")


def test_module_prints_the_facts():
    done = subprocess.run([sys.executable, "-m", "hem_ext.info"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    for name in info.describe():
        assert f"{name}:" in done.stdout
