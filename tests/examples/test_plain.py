"""The examples that need nothing but the extra `harness`, and what all of examples/ have in common."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("before", [False, True], ids=["HEM", "cross-entropy"])
def test_plain_loop(run, text_of, as_it_was, check_fell, before):
    name = "plain_loop.py"
    check_fell(run(name, text=as_it_was(text_of(name)) if before else None).losses)


def test_processes_train_as_one_does(check_fell):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    running = [
        subprocess.Popen(
            [sys.executable, *arguments, EXAMPLES / "accelerate_processes.py"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
        )
        for arguments in ([], launcher)
    ]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert [re.findall(r"^on (\d+) processes$", output, re.M) for output in outputs] == [["1"], ["2"]]
    one, two = ([float(x) for x in re.findall(r"loss ([\d.]+)$", output, re.M)] for output in outputs)
    check_fell(one)
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_example(name, text_of):
    text = text_of(name)
    assert text.count("\n") < 60
    assert "  # instead of: " in text or "  # added\n" in text
    assert f"[{name}]({name})" in text_of("README.md")
    tests = Path(__file__).parent.glob("test_*.py")
    assert len([path for path in tests if f'"{name}"' in path.read_text(encoding="utf-8")]) == 1
