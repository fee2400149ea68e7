"""The package with, without and around its native library, each in a process of its own."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import REDUCTIONS, Calls

from hem_ext import HEMLoss, _native, arguments, hem_loss, linear_hem_loss, upsampled_hem_loss
from hem_ext.mix import mixed_hem_loss


def run(code, *, check=True, **environment):
    """Run Python code in a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def test_import_pulls_in_nothing_beyond_torch_and_numpy():
    done = run(
        "import sys, torch, numpy; before = set(sys.modules); import hem_ext;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    assert done.stdout.split() == ["hem_ext"]


@pytest.fixture(scope="module")
def unbuilt(tmp_path_factory):
    """Code that puts a copy of the package without its library first on the path."""
    folder = tmp_path_factory.mktemp("unbuilt")
    package = Path(_native.__file__).parent
    shutil.copytree(package, folder / "hem_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # The finder of an editable installation would supply the library all the same.
    return (
        f"import sys, warnings; sys.path.insert(0, {str(folder)!r});"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    )


def test_without_the_library_one_warning_and_the_reference(unbuilt):
    done = run(
        unbuilt + "import torch\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import hem_ext\n"
        "    x, t = torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1])\n"
        "    loss = hem_ext.HEMLoss(margin=0.5)(x, t)\n"
        "    loss.backward()\n"
        "    hem_ext.hem_loss(x, t)\n"
        "print(len(caught), caught[0].category.__name__, caught[0].message)\n"
        "print(hem_ext.__path__[0])\n"
        "print(loss.item(), x.grad.tolist())\n"
        "try: hem_ext.hem_loss(x, t, backend='native')\n"
        "except RuntimeError as error: print(error)\n"
    )
    warning, folder, loss, error = done.stdout.splitlines()
    assert warning.startswith("1 RuntimeWarning hem_ext runs in plain PyTorch: its native library did not load (")
    assert f"there is none in {folder}." in warning
    assert "pip install --no-build-isolation -e ." in warning
    assert loss == "0.5 [[-0.5, 0.25, 0.25], [0.25, -0.5, 0.25]]"
    assert error.startswith("hem_loss(backend='native'): the native library did not load (")


def cut_off(library):
    return library[: len(library) // 2]


def without_its_end(library):
    return library[:-10]


def of_another_version(library):
    assert library.count(b"interface") == 1
    return library.replace(b"interface", b"interfake")


def of_another_torch(library):
    name = b"aoti_torch_empty_strided"
    assert library.count(name) >= 1
    return library.replace(name, name[:-1] + b"_")


@pytest.mark.skipif(sys.platform != "linux", reason="the others have other formats")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(
            (cut, r"_C\.abi3\.so is cut off: it has \d+ bytes of \d+; build it with: pip install")
            for cut in (cut_off, without_its_end)
        ),
        (of_another_version, r"_C\.abi3\.so is of another version of hem_ext; build it with: pip install"),
        (of_another_torch, "undefined symbol: aoti_torch_empty_stride_"),
        (lambda library: b"", "file too short"),
        (lambda library: b"no library", "invalid ELF header|file too short"),
        (lambda library: b"no library, " * 9, "invalid ELF header"),
    ],
)
def test_a_library_that_is_not_this_one(unbuilt, tmp_path, change, words):
    """Plain PyTorch takes its place, with a warning, and nothing of it is called."""
    folder = Path(unbuilt.partition("insert(0, '")[2].partition("'")[0])
    shutil.copytree(folder / "hem_ext", tmp_path / "hem_ext")
    library = Path(_native.library.__file__)
    (tmp_path / "hem_ext" / library.name).write_bytes(change(library.read_bytes()))
    done = run(
        unbuilt.replace(str(folder), str(tmp_path)) + "import torch, hem_ext\n"
        "x, t = torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1])\n"
        "hem_ext.hem_loss(x, t, margin=0.5).backward()\n"
        "print(x.grad.tolist())\n"
        "hem_ext.hem_loss(x, t, backend='native')\n",
        check=False,
        LD_BIND_NOW="1",
    )
    assert done.stdout == "[[-0.5, 0.25, 0.25], [0.25, -0.5, 0.25]]\n", done.stderr
    assert re.search(
        "RuntimeWarning: hem_ext runs in plain PyTorch: its native library did not load .*" + words, done.stderr
    )
    assert re.search(r"RuntimeError: hem_loss\(backend='native'\): the native library did not load", done.stderr)


# Of a library that is changed with them: raise _native._INTERFACE and kInterface in csrc/module.cpp.
INTERFACE = {1: "9918915c585efcf0"}


def test_the_interface_has_another_number_where_it_is_another():
    schemas = run(  # by itself: other tests define ops of their own
        "import torch, hem_ext.parallel\n"
        "schemas = map(str, torch._C._jit_get_all_schemas())\n"
        "print(*sorted(s for s in schemas if s.startswith('hem_ext::')), sep='\\n')"
    ).stdout.splitlines()
    codes = (arguments.REDUCTIONS, arguments.DTYPES)
    found = hashlib.sha256(repr((schemas, codes)).encode()).hexdigest()[:16]
    assert {_native._INTERFACE: found} == INTERFACE
    assert _native.library.build["interface"] == _native._INTERFACE


def test_graphs_take_every_op_as_it_is():
    names = [schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("hem_ext::")]
    assert {"hem_ext::hem_forward", "hem_ext::upsampled_hem_backward"} <= set(names)
    for name in names:
        tags = _native._overload(name.removeprefix("hem_ext::")).tags
        assert {torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides} <= set(tags), name


def test_without_the_library_info_says_why(unbuilt):
    done = run(unbuilt + "import runpy; runpy.run_module('hem_ext.info', run_name='__main__')")
    assert "native library:  not loaded: ModuleNotFoundError" in done.stdout


@pytest.mark.parametrize("loss", [hem_loss, HEMLoss()])
def test_a_device_without_kernels_is_told_once(monkeypatch, loss):
    # Stands for a GPU beside a build without CUDA. Another test may have been told already.
    monkeypatch.setattr(_native, "devices", frozenset())
    _native.warn_of_fallback.cache_clear()
    x, t = torch.zeros(2, 3), torch.tensor([0, 1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Calls() as calls:
            first, second = loss(x, t), loss(x, t)
    words = "hem_ext was built without kernels for 'cpu' tensors"
    assert [str(w.message) for w in caught] == [f"hem_loss runs in plain PyTorch: {words}"]
    assert caught[0].filename == __file__
    assert caught[0].category is RuntimeWarning
    assert first == second
    assert calls.names == []
    with pytest.raises(RuntimeError, match=words):
        hem_loss(x, t, backend="native")


def test_where_there_are_kernels(monkeypatch):
    cpu, cuda, other = (SimpleNamespace(is_cpu=name == "cpu", is_cuda=name == "cuda") for name in ("cpu", "cuda", ""))
    for devices in ({"cpu"}, {"cpu", "cuda"}, set()):
        monkeypatch.setattr(_native, "devices", frozenset(devices))
        found = [_native.has_kernels(x) for x in (cpu, cuda, other)]
        assert found == ["cpu" in devices, "cuda" in devices, False]


def calls_that_may_not_wait():
    x, t = torch.randn(4, 3, 5, 5), torch.zeros(4, 5, 5, dtype=torch.int64)
    per_class = {"margin": torch.rand(3), "weight": torch.rand(3), "ignore_index": 0}
    for reduction in REDUCTIONS:
        yield f"hem_loss, {reduction}", [x], lambda x, r=reduction: hem_loss(x, t, **per_class, reduction=r)
    yield "hem_loss, normalizer", [x], lambda x: hem_loss(x, t, normalizer=torch.ones(()))
    yield "mixed_hem_loss", [x], lambda x: mixed_hem_loss(x, t, t, 0.3)
    larger = torch.zeros(4, 9, 9, dtype=torch.int64)
    yield "upsampled_hem_loss", [x], lambda x: upsampled_hem_loss(x, larger, **per_class)
    hidden, weight = torch.randn(4, 5, 5, 7), torch.randn(3, 7)
    yield "linear_hem_loss", [hidden, weight], lambda h, w: linear_hem_loss(h, w, None, t)


@pytest.mark.parametrize("name", [name for name, *_ in calls_that_may_not_wait()])
def test_a_device_without_kernels_is_not_waited_for(name):
    """On meta every look at a value is an error, as it is a wait on MPS or XPU."""
    with torch.device("meta"):
        _, inputs, call = next(c for c in calls_that_may_not_wait() if c[0] == name)
        for x in inputs:
            x.requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # who has no values is told of no kernels either
            loss = call(*inputs)
        loss.sum().backward()
    assert loss.device.type == "meta"
    assert all(x.grad.shape == x.shape for x in inputs)


USE = (
    "import torch; from hem_ext import hem_loss, info;"
    "print(info.describe()['CPU kernels'].split()[0],"
    "hem_loss(torch.zeros(1, 100), torch.tensor([1]), backend='native').item())"
)


@pytest.mark.parametrize("name", _native.library.available_cpu_isas())
def test_an_environment_variable_chooses_the_instruction_set(name):
    isa, loss = run(USE, HEM_EXT_CPU_ISA=name).stdout.split()
    assert isa == name
    assert float(loss) == pytest.approx(0.2)


def test_the_fastest_instruction_set_is_the_default():
    assert run(USE, HEM_EXT_CPU_ISA="").stdout.split()[0] == _native.library.available_cpu_isas()[-1]


def test_an_instruction_set_that_is_not_there():
    done = run("import hem_ext", HEM_EXT_CPU_ISA="mmx")
    assert "HEM_EXT_CPU_ISA='mmx' is not an instruction set of this processor; available: baseline" in done.stderr
    with pytest.raises(ValueError, match="'mmx' is not an instruction set"):
        _native.library.select_cpu_isa("mmx")


def test_the_library_needs_no_more_of_torch_than_its_stable_interface():
    needed = subprocess.run(
        ["readelf", "--dynamic", _native.library.__file__], capture_output=True, text=True, check=True
    ).stdout
    libraries = {line.split("[")[1].rstrip("]") for line in needed.splitlines() if "(NEEDED)" in line}
    allowed = {"libtorch_cpu.so", "libc10.so", *(["libtorch_cuda.so"] if _native.library.build["cuda"] else [])}
    assert {name for name in libraries if "torch" in name or "c10" in name} <= allowed
    symbols = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--demangle", _native.library.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # C functions keep their names: a C++ name of torch would tie the build to one version.
    assert [line for line in symbols.splitlines() if "at::" in line or "c10::" in line or "torch::" in line] == []
    assert "torch_library_impl" in symbols
