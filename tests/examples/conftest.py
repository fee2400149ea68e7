"""How an example is run: as a reader would, in a folder of its own."""

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hem_ext.harness.data

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a script of examples/, which another text may stand in for; return what it defines."""

    def run(name, *arguments, text=None):
        path = EXAMPLES / name
        if text is not None:
            path = tmp_path / name
            path.write_text(text, encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        return SimpleNamespace(**runpy.run_path(str(path), run_name="__main__"))

    return run


@pytest.fixture
def text_of():
    return lambda name: (EXAMPLES / name).read_text(encoding="utf-8")


@pytest.fixture
def as_it_was():
    """A text with what stood in the place of each marked line."""

    def as_it_was(text):
        replaced = re.sub(r"^( *(?:[^=\n]+ = )?).*  # instead of: (.*)$", r"\1\2", text, flags=re.M)
        before = re.sub(r"^.*  # added\n", "", replaced, flags=re.M)
        assert before != text
        return before

    return as_it_was


@pytest.fixture
def double(monkeypatch):
    """Float64 wherever an example does not say otherwise, and 64 images of what it loads."""
    load = hem_ext.harness.data.load

    def load_double(*args, **options):
        torch.set_default_dtype(torch.float32)  # in which pictures are made
        train = load(*args, **options).train
        torch.set_default_dtype(torch.float64)
        return SimpleNamespace(train=[(image.double(), label) for image, label in train][:64])

    monkeypatch.setattr(hem_ext.harness.data, "load", load_double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def check_fell():
    def check_fell(losses):
        first, last = sum(losses[:5]), sum(losses[-5:])
        assert len(losses) >= 10
        assert last < 0.95 * first, losses

    return check_fell
