"""What setup.py decides, and says, before it builds; the build itself is what every other test runs on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# In the place of torch, which takes seconds to import: what setup.py asks of it.
STAND_IN = """
import shutil, sys
from types import SimpleNamespace as Has
sys.modules["torch.utils"] = Has(cpp_extension=Has(
    CUDA_HOME={toolkit!r},
    include_paths=lambda device: [],
    library_paths=lambda device: [],
    is_ninja_available=lambda: {ninja} and shutil.which("ninja") is not None,
    BuildExtension=None,
))
sys.modules["torch"] = {torch!r} and Has(
    __version__={torch!r}, version=Has(cuda={cuda!r}), cuda=Has(is_available=lambda: False)
)
"""
NO_HEADERS = "import sysconfig; sysconfig.get_path = lambda name: '/nowhere'"


def decide(first="", *, torch="2.13.0+cpu", cuda=None, toolkit=None, ninja=True, then="", **environment):
    """Run setup.py with a command that builds nothing.

    Args:
        first: code to run before.
        torch: the version, None where there is none, "real" for the one that is here.
        cuda: what that torch was built for.
        toolkit: the folder that has nvcc.
        then: code to run afterwards; `found` has the names of setup.py.
    """
    code = "" if torch == "real" else STAND_IN.format(torch=torch, cuda=cuda, toolkit=toolkit, ninja=ninja)
    code += f"{first}\nimport sys, runpy; sys.argv = ['setup.py', 'build_scripts']\n"
    code += f"found = runpy.run_path('setup.py', run_name='__main__')\n{then}"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HEM_EXT_") and name != "CXX"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**inherited, **environment},
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
    done = decide(cuda="12.8", toolkit=str(tmp_path), HEM_EXT_CUDA="1")
    assert f"hem_ext: CUDA kernels built with {tmp_path}\n" in done.stderr


def test_cuda_can_be_switched_off():
    assert "CUDA kernels switched off by HEM_EXT_CUDA=0" in decide(HEM_EXT_CUDA="0").stderr


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"HEM_EXT_CUDA": "1"}, "HEM_EXT_CUDA=1, but there is no CUDA build of torch"),
        ({"HEM_EXT_CUDA": "yes"}, "HEM_EXT_CUDA must be auto, 0 or 1, got 'yes'"),
        ({"HEM_EXT_NATIVE": "no"}, "HEM_EXT_NATIVE must be 1 or 0, got 'no'"),
        ({"HEM_EXT_DEBUG": "yes"}, "HEM_EXT_DEBUG must be 0 or 1, got 'yes'"),
        ({"HEM_EXT_NATIVE": "0", "HEM_EXT_CUDA": "1"}, "HEM_EXT_CUDA=1 asks for a part of the native library"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_an_error(environment, words):
    done = decide(**environment)
    assert done.returncode == 1
    assert words in done.stderr


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"torch": None}, "no torch 2.10 or later (none is installed: pip install 'torch>=2.10')"),
        ({"torch": "2.9.1+cu128"}, "no torch 2.10 or later (this one is 2.9.1+cu128: pip install 'torch>=2.10')"),
        ({"PATH": "/nowhere"}, "no C++ compiler (looked for c++: apt-get install g++, or name one in CXX)"),
        ({"CXX": "ccache-12 g++"}, "no C++ compiler (looked for ccache-12: "),
        ({"first": NO_HEADERS}, "no Python.h (looked in /nowhere: apt-get install python3-dev)"),
        ({"torch": None, "PATH": "/nowhere"}, "'torch>=2.10') and no C++ compiler (looked for c++: "),
    ],
    ids=str,
)
def test_what_is_missing_is_one_sentence_with_the_cure(given, words):
    done = decide(**given)
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("hem_ext: the native library cannot be built, there is no ")
    assert words in sentence
    assert sentence.endswith("; HEM_EXT_NATIVE=0 installs the package without it, in plain PyTorch")


def test_ninja_is_found_in_an_environment_that_is_not_activated_and_not_needed(tmp_path):
    (tmp_path / "c++").symlink_to(shutil.which("c++"))
    words = "hem_ext: building one file at a time, as there is no ninja: pip install ninja"
    assert words not in decide(PATH=str(tmp_path)).stderr
    done = decide(ninja=False)
    assert done.returncode == 0, done.stderr
    assert words in done.stderr.splitlines()


def test_the_native_library_can_be_left_out_where_nothing_could_build_it():
    done = decide(NO_HEADERS, torch=None, HEM_EXT_NATIVE="0", PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "hem_ext: native library left out by HEM_EXT_NATIVE=0\n"


@pytest.mark.parametrize(("environment", "flag"), [({}, "-g0"), ({"HEM_EXT_DEBUG": "1"}, "-g")], ids=str)
def test_debugging_information_is_there_where_it_was_asked_for(environment, flag):
    # The last of the flags counts; CPython's own come first.
    print_flag = "print(found['native_library'](False).extra_compile_args['cxx'][-1])"
    done = decide(torch="real", then=print_flag, **environment)
    assert done.stdout.splitlines()[-1] == flag, done.stderr


@pytest.mark.parametrize(("environment", "expected"), [({}, False), ({"HEM_EXT_WERROR": "1"}, True)], ids=str)
def test_warnings_are_errors_where_that_was_asked_for(environment, expected):
    print_flags = "print('-Werror' in found['native_library'](False).extra_compile_args['cxx'])"
    done = decide(torch="real", then=print_flags, **environment)
    assert done.stdout.splitlines()[-1] == str(expected), done.stderr


# What the Python of python.org, which is of two architectures, was built with.
MACOS = """
import platform, setuptools, sys, sysconfig
variables = sysconfig.get_config_vars()  # of here, before it looks for a Mac's
sys.platform = "darwin"
platform.machine = lambda: {machine!r}
both = "-arch arm64 -arch x86_64 -g"
bundle = "-bundle -undefined dynamic_lookup "
variables.update(
    CC="clang", CXX="clang++", CFLAGS="-fno-common -dynamic -O3 -Wall " + both, CCSHARED="",
    LDSHARED="clang " + bundle + both, LDCXXSHARED="clang++ " + bundle,
    MACOSX_DEPLOYMENT_TARGET={oldest!r}, EXT_SUFFIX=".cpython-311-darwin.so",
)
"""
BUILD = """
import os, setuptools
extension = found["native_library"](False)
extension.extra_compile_args = extension.extra_compile_args["cxx"]
command = setuptools.Distribution({"ext_modules": [extension]}).get_command_obj("build_ext")
command.build_temp, command.build_lib, command.force = (os.environ["OUT"],) * 2 + (True,)
command.ensure_finalized()
command.run()
print("for macOS", os.environ["MACOSX_DEPLOYMENT_TARGET"])
"""


@pytest.mark.parametrize(("machine", "oldest", "expected"), [("arm64", "10.9", "11.0"), ("x86_64", "13.0", "13.0")])
def test_on_macos_it_is_built_for_the_architecture_of_torch(tmp_path, machine, oldest, expected):
    """The commands that setuptools gives, with a compiler that writes them down."""
    log = tmp_path / "log"
    for name in ("clang", "clang++", "c++"):
        (tmp_path / name).write_text(
            f'#!/bin/sh\necho "$0 $*" >> {log}\nwhile [ "$1" != -o ]; do shift; done; : > "$2"\n'
        )
        (tmp_path / name).chmod(0o755)
    first = MACOS.format(machine=machine, oldest=oldest)
    done = decide(first, then=BUILD, OUT=str(tmp_path), PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"for macOS {expected}"
    *compiled, linked = (line.split() for line in log.read_text().splitlines())
    assert [Path(words[words.index("-c") + 1]).suffix for words in compiled] == [".cpp"] * len(compiled)
    for words in (*compiled, linked):
        assert [words[n + 1] for n, word in enumerate(words) if word == "-arch"] == [machine]
        # What Apple's compiler and linker refuse.
        assert not [word for word in words if word.startswith(("-fopenmp", "-march", "-mavx", "-shared", "-Wl,"))]
    assert {"-bundle", "-undefined", "dynamic_lookup", "-lc10", "-ltorch_cpu"} <= set(linked)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"PATH": "/nowhere"}, "(looked for c++: xcode-select --install, or name one in CXX)"),
        ({"first": NO_HEADERS}, "(looked in /nowhere: the Python of python.org has it)"),
    ],
    ids=str,
)
def test_what_is_missing_on_macos_has_its_own_cure(given, words):
    first = MACOS.format(machine="arm64", oldest="11.0") + given.get("first", "")
    done = decide(**{**given, "first": first})
    assert done.returncode == 1
    assert words in done.stderr
