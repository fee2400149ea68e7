import json
import subprocess
import sys
import warnings

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


def checkout(root):
    (root / "csrc" / "hem").mkdir(parents=True)
    (root / "csrc" / "hem" / "a.cu").write_text("first")
    (root / "bench" / "results").mkdir(parents=True)
    return root


def test_the_digest_sees_names_and_contents(tmp_path):
    source = checkout(tmp_path) / "csrc" / "hem" / "a.cu"
    first = info.sources_digest(tmp_path)
    assert first == info.sources_digest(tmp_path)
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
        json.dumps({**row, "csrc": "old", "date": "2026-01-01T00:00:00Z"}) + "\n" + json.dumps(row) + "\n"
    )
    assert info.cuda_evidence(root) == "NVIDIA H200, 2026-03-04 (bench/results/gpu.jsonl); csrc/ is the same"
    (root / "csrc" / "hem" / "a.cu").write_text("second")
    assert info.cuda_evidence(root).endswith("csrc/ has changed since")


def test_the_evidence_of_this_checkout():
    # A warning and not a failure: a change to the kernels must be possible without a GPU.
    found = info.cuda_evidence()
    assert found == info.describe()["CUDA evidence"]
    if not found.endswith("is the same"):
        warnings.warn(f"CUDA evidence: {found}", stacklevel=1)
