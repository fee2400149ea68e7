import hashlib
import json
import platform
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import hem_ext
from hem_ext import _native, info


def library(*, cuda):
    build = {"compiler": "gcc 12.2", "torch": "2.13.0", "cuda": cuda}
    isas = {"cpu_isa": lambda: "avx2", "available_cpu_isas": lambda: ["avx2", "baseline"]}
    return SimpleNamespace(**isas, build=build, __file__="/somewhere/_C.abi3.so")


@pytest.mark.parametrize(
    ("chosen", "cuda", "kernels"),
    [
        ("", True, "avx2 (the fastest here; this processor runs avx2, baseline)"),
        ("avx2", False, "avx2 (HEM_EXT_CPU_ISA; this processor runs avx2, baseline)"),
    ],
    ids=["by itself", "by its variable"],
)
def test_describe(monkeypatch, tmp_path, chosen, cuda, kernels):
    monkeypatch.setattr(_native, "library", library(cuda=cuda))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(info, "ROOT", tmp_path)  # no checkout
    monkeypatch.setenv("HEM_EXT_CPU_ISA", chosen)
    assert list(info.describe().items()) == [
        ("hem_ext", hem_ext.__version__),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("torch", torch.__version__),
        ("threads", "3"),
        ("native library", "/somewhere/_C.abi3.so"),
        ("built with", "gcc 12.2, torch 2.13.0"),
        ("CPU kernels", kernels),
        ("CUDA kernels", "built" if cuda else "not built"),
    ]


def test_describe_without_the_library(monkeypatch):
    monkeypatch.setattr(_native, "library", None)
    monkeypatch.setattr(_native, "load_error", "OSError: gone")
    facts = info.describe()
    assert list(facts) == ["hem_ext", "python", "torch", "threads", "native library", "instead", "CUDA evidence"]
    assert facts["native library"] == "not loaded: OSError: gone"
    assert facts["instead"] == "plain PyTorch (hem_ext.reference)"


def test_main_prints_the_facts(capsys, monkeypatch):
    monkeypatch.setattr(info, "describe", lambda: {"torch": "2.13.0", "native library": "/somewhere"})
    info.main()
    assert capsys.readouterr().out == "torch:           2.13.0\nnative library:  /somewhere\n"


def test_module_prints_the_facts():
    done = subprocess.run([sys.executable, "-m", "hem_ext.info"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    for name in info.describe():
        assert f"{name}:" in done.stdout
    assert f"native library:  {_native.library.__file__}\n" in done.stdout
    assert f"CUDA kernels:    {'built' if _native.library.build['cuda'] else 'not built'}\n" in done.stdout
    assert f"{_native.library.cpu_isa()} (" in done.stdout


def checkout(root):
    (root / "csrc" / "hem").mkdir(parents=True)
    (root / "csrc" / "hem" / "a.cu").write_text("first")
    (root / "bench" / "results").mkdir(parents=True)
    return root


def test_the_digest_sees_names_and_contents(tmp_path):
    source = checkout(tmp_path) / "csrc" / "hem" / "a.cu"
    first = info.sources_digest(tmp_path)
    assert first == hashlib.sha256(b"csrc/hem/a.cu\0first\0").hexdigest()[:16]
    renamed = source.rename(source.with_name("b.cu"))
    assert info.sources_digest(tmp_path) != first
    renamed.rename(source).write_text("second")
    assert info.sources_digest(tmp_path) != first


def test_evidence_is_the_newest_row_of_a_gpu(tmp_path):
    root = checkout(tmp_path)
    results = root / "bench" / "results"
    row = {"device": "cuda", "gpu": "NVIDIA H200", "csrc": info.sources_digest(root), "date": "2026-03-04T05:06:07Z"}
    assert info.cuda_evidence(root) == "none: these kernels have not been measured on a GPU"
    (results / "cpu.jsonl").write_text(json.dumps({**row, "device": "cpu", "date": "2027-01-01T00:00:00Z"}) + "\n")
    assert info.cuda_evidence(root).startswith("none")
    (results / "gpu.jsonl").write_text(
        f"{json.dumps({**row, 'csrc': 'old', 'date': '2026-01-01T00:00:00Z'})}\n"
        f"{json.dumps(row)}\n{json.dumps({**row, 'speed': 2.0})}\n"
    )
    assert info.cuda_evidence(root) == "NVIDIA H200, 2026-03-04 (bench/results/gpu.jsonl); csrc/ is the same"
    # Of one second, that of the file whose name is last.
    (results / "later.jsonl").write_text(json.dumps({**row, "gpu": "NVIDIA Ä"}, ensure_ascii=False) + "\n", "utf-8")
    assert info.cuda_evidence(root) == "NVIDIA Ä, 2026-03-04 (bench/results/later.jsonl); csrc/ is the same"
    (results / "later.jsonl").unlink()
    (root / "csrc" / "hem" / "a.cu").write_text("second")
    assert info.cuda_evidence(root).endswith("csrc/ has changed since")


def test_the_evidence_of_this_checkout():
    # A warning and not a failure: a change to the kernels must be possible without a GPU.
    found = info.cuda_evidence()
    assert found == info.describe()["CUDA evidence"]
    if not found.endswith("is the same"):
        warnings.warn(f"CUDA evidence: {found}", stacklevel=1)
