import json

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from hem_ext.harness.cli import app
from hem_ext.harness.lock import only_one

TRAIN = ("train", "classification", "--loss", "ce", "--quick", "--epochs", "1", "--set", "transfer=false")


def train(folder):
    return CliRunner().invoke(app, [*TRAIN, "--output", str(folder)])


def test_two_trainings_do_not_share_a_folder(tmp_path):
    with FileLock(tmp_path / "lock"):
        result = train(tmp_path)
    assert result.exit_code == 2
    assert result.output == (
        f"hem-ext: another process is at work in {tmp_path}: wait for it, or give another --output\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    result = train(tmp_path)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "metrics.json").read_text())["loss"] == "ce"


def test_processes_of_one_command_share_a_folder(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "folder"
    with only_one(folder):
        monkeypatch.setenv("RANK", "1")
        with only_one(folder):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(ValueError, match="another process is at work in"), only_one(folder):
            pass
