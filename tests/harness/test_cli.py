import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hem_ext.harness import cli, compare
from hem_ext.harness.cli import app
from hem_ext.harness.tasks import TASKS


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "100"})


def test_train_prints_its_metrics_and_keeps_them(tmp_path):
    result = invoke(
        "train", "classification", "--loss", "hem", "--constant", "margin=0.5", "--seed", 3, "--quick", "--epochs", 1,
        "--batch-size", 32, "--max-lr", 0.05, "--set", "transfer=false", "--output", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert kept["constants"] == {"margin": 0.5}
    assert kept["seed"] == 3
    assert kept["schedule"]["epochs"] == 1
    assert kept["schedule"]["batch_size"] == 32
    assert kept["schedule"]["max_lr"] == 0.05
    assert f"accuracy: {kept['metrics']['accuracy']:.4f}" in result.output
    assert len(list((tmp_path / "models").glob("*/model.pt"))) == 1


def test_train_follows_its_progress_in_tensorboard(tmp_path):
    invoke(
        "train",
        "classification",
        "--quick",
        "--set",
        "transfer=false",
        "--tracker",
        "tensorboard",
        "--output",
        tmp_path,
    )
    assert list(tmp_path.glob("tensorboard/**/events.out.tfevents.*"))


def test_train_under_two_processes(tmp_path):
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "hem_ext.command",
    ]
    arguments = ["train", "classification", "--quick", "--set", "transfer=false", "--output", str(tmp_path)]
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^accuracy: ", done.stdout, re.MULTILINE)) == 1
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"]["accuracy"] > 0.15


def test_compare_writes_results_a_report_and_pictures(tmp_path):
    result = invoke(
        "compare", "classification", "--losses", "ce,hem", "--seeds", 2, "--sweep", "margin=0.2,1", "--quick",
        "--set", "transfer=false", "--output", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = compare.read_rows(tmp_path)
    assert {row["loss"] for row in rows} == {"ce", "hem margin=0.2", "hem margin=1"}
    assert "hem margin=0.2" in (tmp_path / "report.md").read_text()
    assert list(tmp_path.glob("*.png"))
    assert "…" not in result.output  # nothing is cut off
    again = invoke(
        "compare", "classification", "--losses", "ce,hem", "--seeds", 2, "--sweep", "margin=0.2,1", "--quick",
        "--set", "transfer=false", "--output", tmp_path,
    )  # fmt: skip
    assert "6 of 6 cells are in" in again.output


def test_paper_is_every_task(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(compare, "run", lambda cells, output: asked.append((cells, output)))
    for arguments, seeds in (((), 5), (("--quick",), 2), (("--quick", "--seeds", 3), 3)):
        result = invoke("paper", *arguments, "--output", tmp_path)
        assert result.exit_code == 0, result.output
        cells, output = asked.pop()
        assert output == tmp_path
        assert {cell.task for cell in cells} == set(TASKS)
        assert {cell.seed for cell in cells} == set(range(seeds))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "dreaming"), "unknown task 'dreaming': one of classification"),
        (("train", "classification", "--constant", "margin"), "expected NAME=VALUE, got 'margin'"),
        (("train", "classification", "--constant", "gamma=1"), "hem has no constant gamma; it has margin, total"),
        (("train", "classification", "--loss", "hinge"), "unknown loss 'hinge'"),
        (("train", "classification", "--data", "mnist"), "mnist is read from disk: --data-root must name a folder"),
        (("train", "classification", "--data", "numbers"), "there is no data set 'numbers'; there are digits"),
        (("compare", "classification", "--losses", "ce,hinge"), "unknown loss 'hinge'"),
        (("compare", "classification", "--set", "colour=1"), "classification has no option colour"),
        (("compare", "classification", "--losses", "ce", "--sweep", "margin=1"), "no loss of this comparison has"),
        (
            ("compare", "classification", "--losses", "ce,hem", "--sweep", "margin=-1"),
            "margin must be finite and not neg",
        ),
        (
            ("compare", "classification", "segmentation", "--data", "digits"),
            "segmentation needs a label for every pixel",
        ),
        (("train", "classification", "--data", "digit-scenes"), "classification needs one label an image"),
        (("train", "segmentation", "--set", "margin_counts=classes"), "margin_counts must be 'images' or 'pixels'"),
        (("train", "adversarial", "--set", "eps=0.3"), "eps a list of numbers, none below 0, got 0.1 and 0.3"),
        (("train", "adversarial", "--set", "at=-1"), "none below 0, got -1"),
        (("train", "corruption", "--set", "severities=[9]"), "severities must be a list of some of 1 to 5, got [9]"),
        (("train", "ood", "--set", "known=11"), "known must be 2 to 10 classes, got 11"),
        (("train", "classification", "--max-lr", "-1"), "max_lr must be above 0, got -1.0"),
        (("train", "classification", "--policy", "cosine"), "must be 'one-cycle' or 'poly', got 'cosine'"),
        (("train", "classification", "--tracker", "wandb"), "unknown tracker 'wandb': there is tensorboard"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(arguments, words, tmp_path):
    result = invoke(*arguments, "--output", tmp_path)
    assert result.exit_code == 2
    assert result.output.startswith("hem-ext: ")
    assert words in result.output
    assert "Traceback" not in result.output


def test_no_command_shows_help():
    result = invoke()
    for name in ("train", "compare", "paper"):
        assert name in result.output


def test_values_are_read_as_json_where_they_are():
    assert [cli._value(text) for text in ("3", "false", "images", "[0, 1]", '{"size": 32}')] == [
        3, False, "images", [0, 1], {"size": 32},
    ]  # fmt: skip
