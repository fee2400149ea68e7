"""What an sdist and a wheel hold. `make wheels` audits the wheel with the native library."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import hem_ext
from hem_ext import _native

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ["bench", "csrc", "docs", "examples", "hem_ext", "tests"]
FILES = {
    *(".clang-format", ".clang-tidy", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE"),
    *("MANIFEST.in", "Makefile", "README.md", "build_backend.py", "pyproject.toml", "setup.py"),
}
IGNORED = ["__pycache__", "*.so", "models", "pictures", "lock"]


def run(hooks, source, **environment):
    """Hooks that pip and `python -m build` call, where there is neither torch nor a compiler; what each returns."""
    code = "import sys; sys.modules['torch'] = None; sys.path.insert(0, '.'); import build_backend, json\n"
    code += f"print(json.dumps([{', '.join(f'build_backend.{hook}' for hook in hooks)}]))"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HEM_EXT_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
        env={**inherited, **environment, "PATH": "/nowhere"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy, as building leaves files behind."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(*IGNORED))
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    """What was given, the sdist of it, and that unpacked."""
    given = files(checkout)
    made, folder = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("sdist")
    (name,) = run([f"build_sdist({str(made)!r})"], checkout, SOURCE_DATE_EPOCH="1700000000")
    with tarfile.open(made / name) as archive:
        archive.extractall(folder, filter="data")
    (top,) = folder.iterdir()
    assert top.name == f"hem_ext-{hem_ext.__version__}"
    return given, made / name, top


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Of Python alone, unpacked."""
    made, folder = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("wheel")
    (name,) = run([f"build_wheel({str(made)!r})"], sdist[2], HEM_EXT_NATIVE="0")
    assert name == f"hem_ext-{hem_ext.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(made / name) as archive:
        archive.extractall(folder)
    return folder


def test_an_sdist_holds_the_project(sdist):
    given, _, top = sdist
    added = {name for name in files(top) if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert files(top) - added == given


def test_an_sdist_has_the_same_bytes_anywhere(checkout, sdist, tmp_path):
    """Of files that somebody else wrote, at another time."""
    again = tmp_path / "again"
    shutil.copytree(checkout, again, ignore=shutil.ignore_patterns("*.egg-info"))
    for path in (again, *again.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
        os.utime(path, (1e9, 1e9))
    (name,) = run([f"build_sdist({str(tmp_path)!r})"], again, SOURCE_DATE_EPOCH="1700000000")
    assert (tmp_path / name).read_bytes() == sdist[1].read_bytes()
    with tarfile.open(tmp_path / name) as archive:
        assert {(member.mtime, member.uid, member.uname) for member in archive} == {(1700000000, 0, "")}


def test_a_wheel_holds_the_package_and_its_licence(checkout, wheel):
    information = f"hem_ext-{hem_ext.__version__}.dist-info"
    assert {path.name for path in wheel.iterdir()} == {"hem_ext", information}
    assert files(wheel / "hem_ext") == files(checkout / "hem_ext")
    assert {"py.typed", "_C.pyi", "harness/tuned.json"} <= files(wheel / "hem_ext")
    assert (wheel / information / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_the_native_library_left_out_on_purpose_is_no_warning(wheel):
    code = (
        # The finder of an editable installation would supply the library all the same.
        f"import sys; sys.path.insert(0, {str(wheel)!r})\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import torch, hem_ext.info; print(hem_ext.info.describe()['native library'])\n"
        "x, t = torch.zeros(2, 3), torch.tensor([0, 1]); print(hem_ext.hem_loss(x, t, margin=0.5).item())\n"
        "try: hem_ext.hem_loss(x, t, backend='native')\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    why = "hem_ext was installed without it, by HEM_EXT_NATIVE=0"
    assert done.stdout.splitlines() == [
        f"not loaded: {why}",
        "0.5",
        f"hem_loss(backend='native'): the native library did not load ({why})",
    ]


@pytest.mark.parametrize(
    ("environment", "expected"), [({}, ["torch>=2.10", "ninja"]), ({"HEM_EXT_NATIVE": "0"}, [])], ids=str
)
def test_torch_is_asked_for_where_there_is_a_library_to_build(checkout, environment, expected):
    hooks = [f"get_requires_for_build_{what}()" for what in ("wheel", "editable", "sdist")]
    assert run(hooks, checkout, **environment) == [expected, expected, []]


def test_the_library_is_for_every_python_and_older_systems():
    assert Path(_native.library.__file__).name == "_C.abi3.so"
    symbols = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", _native.library.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "PyModuleDef_Init" in symbols
    assert "__libc_single_threaded" not in symbols  # of glibc 2.32; torch's own wheels take 2.28


def test_the_library_names_no_folder_that_it_was_built_in():
    named = re.findall(rb"[\w./+-]+\.(?:cpp|h)\b", Path(_native.library.__file__).read_bytes())
    assert b"csrc/hem/hem_cpu.cpp" in named
    assert not [name for name in named if name.startswith(b"/")]


def test_the_changelog_and_the_citation_are_of_this_package():
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), flags=re.M)
    assert versions[0].rstrip(",") == hem_ext.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["license"] == "BSD-3-Clause"
    assert "version" not in citation  # the package is the one place that says it
    assert citation["preferred-citation"]["doi"] == "10.48550/arXiv.2501.12191"
