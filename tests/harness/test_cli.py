import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from hem_ext.harness import cli, compare, training
from hem_ext.harness.cli import app
from hem_ext.harness.data.base import DataError
from hem_ext.harness.data.pictures import ImageFiles
from hem_ext.harness.report import SHARED, TUNED
from hem_ext.harness.tasks import TASKS
from hem_ext.harness.training import Epoch


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


@pytest.mark.parametrize("selective", [False, True])
def test_what_train_says_and_keeps(monkeypatch, tmp_path, selective):
    numbers = dict.fromkeys(("kept", "logit_gap", "logit_scale", "train_accuracy", "loss_seconds"), 9.0)
    epoch = Epoch(0.5, 0.25, seconds=1.26, metrics={"accuracy": 0.75}, selected=0.125, **numbers)
    seen, out = [], tmp_path / "a" / "b"

    def run(bench):
        seen.append(bench)
        bench.after_epoch(epoch)
        return {"accuracy": 0.125, "transfer": float("nan")}

    def accelerator(*, mixed_precision, **options):
        asked.append(mixed_precision)
        return make_accelerator(**options)  # there is one precision in a process

    asked, make_accelerator = [], training.make_accelerator
    monkeypatch.setattr(training, "make_accelerator", accelerator)
    monkeypatch.setattr(TASKS["classification"], "run", run)
    result = invoke(
        "train", "classification", "--quick", "--seed", 3, "--constant", "margin=0.5", "--num-workers", 3, "--timeout",
        7, "--model", "small-gn", "--mixed-precision", "bf16", "--output", out, *["--selective"] * selective,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    shown = ", selected 0.1250" if selective else ""
    assert result.output == (
        f"loss 0.5000, active 0.2500, accuracy 0.7500{shown}, 1.3 s\naccuracy: 0.1250\ntransfer: nan\n"
    )
    (bench,) = seen
    assert (bench.folder, bench.num_workers) == (out / "models", 3)
    assert bench.accelerator.init_handler.timeout == timedelta(seconds=7)
    assert asked == ["bf16"]
    given = {"constants": {"margin": 0.5}, "model": "small-gn", "mixed_precision": "bf16", "selective": selective}
    assert bench.cell == TASKS["classification"].cell("hem", 3, quick=True, **given)
    text = (out / "metrics.json").read_text()
    assert text.startswith('{\n "task": "classification",\n')
    kept = json.loads(text)
    assert math.isnan(kept["metrics"].pop("transfer"))
    assert kept == {**bench.cell.settings(), "metrics": {"accuracy": 0.125}}


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
    arguments = [
        "compare", "classification", "--losses", "ce,hem", "--seeds", 2, "--sweep", "margin=0.2,1", "--quick",
        "--set", "transfer=false", "--jobs", 1, "--output", tmp_path,
    ]  # fmt: skip
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    rows = compare.read_rows(tmp_path)
    assert {row["loss"] for row in rows} == {"ce", "hem margin=0.2", "hem margin=1"}
    assert "hem margin=0.2" in (tmp_path / "report.md").read_text()
    assert list(tmp_path.glob("*.png"))
    assert "…" not in result.output  # nothing is cut off
    assert "6 of 6 cells are in" in invoke(*arguments).output


@pytest.fixture
def asked(monkeypatch):
    """What a command would run: protocols, folder, and options."""
    found = []
    monkeypatch.setattr(compare, "run_and_report", lambda *arguments, **options: found.append((*arguments, options)))
    return found


def test_losses_are_compared_at_their_own_best_too(tmp_path):
    tuned = {"classification": {"hem": {"settings": {"margin": 0.5, "max_lr": 0.05}}}}
    (tmp_path / "tuned.json").write_text(json.dumps(tuned))
    result = invoke(
        "compare", "classification", "--losses", "ce,hem", "--seeds", 1, "--quick", "--epochs", 1, "--jobs", 1,
        "--set", "transfer=false", "--tuned", tmp_path / "tuned.json", "--output", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = [row for row in compare.read_rows(tmp_path) if row["metric"] == "accuracy"]
    assert {(row["loss"], row["settings"]["schedule"]["max_lr"]) for row in rows} == {
        ("ce", 0.1), ("hem", 0.1), ("hem margin=0.5", 0.05),
    }  # fmt: skip
    report = (tmp_path / "report.md").read_text().lower()
    assert SHARED in report
    assert TUNED in report


def test_commands_run_cells_side_by_side_unless_told_otherwise(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(compare, "side_by_side", lambda: 4)
    monkeypatch.setattr("hem_ext.harness.tune.tune", lambda *_, **options: given.append(options["jobs"]))
    monkeypatch.setattr(compare, "run", lambda *_, **options: given.append((options["jobs"], options["tracker"])))
    monkeypatch.setattr("hem_ext.harness.report.write", lambda *_: None)
    arguments = ["classification", "--losses", "ce", "--seeds", 1, "--quick", "--output", tmp_path]
    for more in (("tune", "--grid", "max_lr=1"), ("compare", "--tracker", "tensorboard"), ("compare",)):
        result = invoke(more[0], *arguments, *more[1:])
        assert result.exit_code == 0, result.output
    assert given == [4, (4, "tensorboard"), (4, None)]


# --- options --------------------------------------------------------------------------------------------------

TRAINING = ("train", "compare", "tune")


@pytest.mark.parametrize("command", TRAINING)
def test_every_option_is_shown_once(command):
    found = typer.main.get_command(app).commands[command].params
    names = [name for option in found for name in option.opts]
    assert len(names) == len(set(names))
    expected = {"--set" if f.name == "option" else "--" + f.name.replace("_", "-") for f in fields(cli.Settings)}
    assert expected < set(names)
    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    shown = re.findall(r"^\W*(--[a-z-]+)", text, re.MULTILINE)
    assert sorted(set(shown)) == sorted(shown)
    assert expected < set(shown)


@pytest.fixture
def cells(monkeypatch):
    """The cells that the commands compare or choose by, which are not run, and the other options."""
    found = []

    def compared(protocols, output, **options):
        found.append((protocols[SHARED], options))

    def tuned(tasks, grid, output, *, jobs, num_workers, **given):
        made = compare.make_cells(tasks, sweep=grid, part="validation", **given)
        found.append((made, {"jobs": jobs, "num_workers": num_workers}))

    monkeypatch.setattr(compare, "run_and_report", compared)
    monkeypatch.setattr("hem_ext.harness.tune.tune", tuned)
    return found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of 20 pictures to train and 4 to test."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 4)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("train", {"loss": "hem", "seed": 0, "num_workers": 0, "timeout": 1800, "output": Path("train")}),
        ("compare", {"seeds": 5, "num_workers": 0, "output": Path("comparison")}),
        ("tune", {"seeds": 2, "num_workers": 0, "output": Path("tuning")}),
        ("paper", {"output": Path("paper")}),
    ],
)
def test_what_is_not_given(command, expected):
    found = {option.name: option.default for option in typer.main.get_command(app).commands[command].params}
    assert {name: value for name, value in found.items() if not (value is None or value is False)} == expected


@pytest.mark.parametrize("command", ["compare", "tune"])
def test_options_reach_every_cell(cells, pictures, tmp_path, command):
    result = invoke(
        command, "corruption", "classification", "--losses", "ce,hem", "--seeds", 2, "--data", "image-folder",
        "--data-root", pictures, "--validation", 0.25, "--skip-broken", "--policy", "cosine", "--epochs", 3,
        "--batch-size", 7, "--max-lr", 0.2, "--optimizer", "adamw", "--model", "small-gn", "--mixed-precision",
        "bf16", "--jobs", 5, "--num-workers", 1, "--quick", "--output", tmp_path,
        "--sweep" if command == "compare" else "--grid", "margin=1,2.5",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    ((made, options),) = cells
    assert (options["jobs"], options["num_workers"]) == (5, 1)
    assert {(cell.task, cell.variant, cell.seed) for cell in made} == {
        (task, loss, seed)
        for task in ("corruption", "classification")
        for loss in ("ce", "hem margin=1", "hem margin=2.5")
        for seed in (0, 1)
    }
    for cell in made:
        schedule = cell.schedule
        assert (schedule.policy, schedule.epochs, schedule.batch_size, schedule.max_lr) == ("cosine", 3, 7, 0.2)
        assert schedule.optimizer == "adamw"
        assert not cell.selective
        assert (cell.data, cell.data_root, cell.validation) == ("image-folder", str(pictures), 0.25)
        assert (cell.model, cell.mixed_precision) == ("small-gn", "bf16")
        assert cell.options["data_options"] == {"skip_broken": True}
        assert cell.part == ("test" if command == "compare" else "validation")
    # What a task leaves out with two classes is said once, and before anything is trained.
    assert result.output.count("classification: linear transfer needs at least four classes") == 1


def test_options_reach_the_cell_that_is_trained(pictures, tmp_path):
    result = invoke(
        "train", "classification", "--loss", "ce", "--data", "image-folder", "--data-root", pictures, "--validation",
        0.25, "--skip-broken", "--policy", "multi-step", "--epochs", 1, "--set", 'data_options={"size": 8}',
        "--output", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert kept["validation"] == 0.25
    assert kept["schedule"]["policy"] == "multi-step"
    assert kept["options"]["data_options"] == {"size": 8, "skip_broken": True}
    assert kept["part"] == "test"
    assert "classification: linear transfer needs at least four classes" in result.output
    assert "transfer: nan" in result.output


def test_a_comparison_trains_selectively_too(cells):
    arguments = ["compare", "classification", "--losses", "ce,hem", "--seeds", 1, "--quick", "--model", "small-gn"]
    result = invoke(*arguments, "--selective")
    assert result.exit_code == 0, result.output
    assert [(cell.variant, cell.selective) for cell in cells.pop()[0]] == [
        ("ce", False), ("hem", False), ("hem selective", True),
    ]  # fmt: skip
    invoke(*arguments)
    assert [cell.variant for cell in cells.pop()[0]] == ["ce", "hem"]


def test_only_hem_takes_the_upsampling(cells):
    result = invoke("compare", "segmentation", "--losses", "ce,hem,hem+", "--seeds", 1, "--quick", "--fused-upsample")
    assert result.exit_code == 0, result.output
    assert [(cell.variant, cell.fused_upsample) for cell in cells.pop()[0]] == [
        ("ce", False), ("hem margin=0.5", True), ("hem+", True),
    ]  # fmt: skip


def test_segmentation_is_trained_with_fused_upsampling(tmp_path):
    arguments = ["train", "segmentation", "--loss", "hem", "--quick", "--epochs", 1, "--output", tmp_path]
    result = invoke(*arguments, "--set", 'data_options={"num_train": 10, "size": 24}', "--fused-upsample")
    assert result.exit_code == 0, result.output
    assert "mean_iou: " in result.output
    assert json.loads((tmp_path / "metrics.json").read_text())["fused_upsample"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "classification", "--loss", "hem"), "fused upsampling is for segmentation, not for classification"),
        (("train", "segmentation", "--loss", "ce"), "fused upsampling is for hem and hem+; ce is given"),
        (("train", "segmentation", "--model", "small-gn", "--selective"), "not for selective training"),
        (("compare", "segmentation", "--losses", "ce"), "nothing is upsampled by its loss without hem or hem+"),
    ],
)
def test_what_upsampling_cannot_be_fused_with(arguments, words):
    result = invoke(*arguments, "--quick", "--fused-upsample")
    assert result.exit_code == 2
    assert words in result.output


def test_a_transformer_is_trained_selectively(tmp_path):
    result = invoke(
        "train", "classification", "--model", "small-vit", "--optimizer", "adamw", "--max-lr", 1e-3, "--selective",
        "--quick", "--epochs", 1, "--set", "transfer=false", "--output", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert (kept["model"], kept["selective"], kept["schedule"]["optimizer"]) == ("small-vit", True, "adamw")
    assert re.search(r"loss .*, active .*, selected 1\.0000, .* s\n", result.output)


# --- what is wrong --------------------------------------------------------------------------------------------


@pytest.fixture
def broken(pictures, tmp_path):
    """A copy of the pictures, in which one to train and one to test are cut short, and the names of both."""
    root = shutil.copytree(pictures, tmp_path / "broken")
    files = [root / "train" / "cat" / "7.png", root / "val" / "dog" / "2.png"]
    for file in files:
        file.write_bytes(file.read_bytes()[:60])
    return root, files


FOLDER = ("--data", "image-folder", "--epochs", 1, "--set", 'data_options={"size": 8}')
COMMANDS = {
    "train": ("train", "corruption"),
    "compare": ("compare", "corruption", "--losses", "ce", "--seeds", 1, "--jobs", 1),
    "compare side by side": ("compare", "corruption", "--losses", "ce", "--seeds", 2, "--jobs", 2),
    "tune": ("tune", "corruption", "--losses", "ce", "--grid", "max_lr=0.1,0.2", "--jobs", 1),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_broken_picture_is_named_in_a_sentence(broken, tmp_path, command):
    root, (to_train, _) = broken
    result = invoke(*COMMANDS[command], *FOLDER, "--data-root", root, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert f"hem-ext: {to_train} is broken, or no picture: " in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


def test_broken_pictures_are_left_out_where_that_is_asked_for(broken, tmp_path):
    root, files = broken
    with pytest.warns(UserWarning, match="2 of 48 samples are left out, since their pictures are broken: ") as found:
        result = invoke(*COMMANDS["train"], *FOLDER, "--data-root", root, "--skip-broken", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    said = [str(warning.message) for warning in found if "left out" in str(warning.message)]
    assert len(said) == 1
    assert all(str(file) in said[0] for file in files)


def test_what_a_process_that_loads_images_says_is_a_sentence_too(broken):
    _, (file, _) = broken
    images = ImageFiles(((str(file), 0),), size=8)
    with pytest.raises(ValueError, match="is broken") as plain:
        images[0]
    with pytest.raises(ValueError, match="Original Traceback") as loaded:
        list(DataLoader(images, num_workers=1))
    assert cli._sentence(plain.value) == cli._sentence(loaded.value) == str(plain.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "dreaming"), f"unknown task 'dreaming': one of {', '.join(TASKS)}"),
        (("train", "classification", "--constant", "margin"), "expected NAME=VALUE, got 'margin'"),
        (("train", "classification", "--constant", "gamma=1"), "hem has no constant gamma; it has margin, total"),
        (("train", "classification", "--loss", "hinge"), "unknown loss 'hinge'"),
        (("train", "classification", "--data", "mnist"), "mnist is read from disk: --data-root must name a folder"),
        (("train", "classification", "--data", "numbers"), "there is no data set 'numbers'; there are mnist-5k"),
        (("compare", "classification", "--losses", "ce,hinge"), "unknown loss 'hinge'"),
        (("compare", "classification", "--set", "colour=1"), "classification has no option colour"),
        (
            ("compare", "classification", "--losses", "ce", "--sweep", "margin=1"),
            "nor a loss of this comparison has margin",
        ),
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
        (("train", "adversarial", "--set", "eps=0.3"), "eps must be a list, got 0.3"),
        (("train", "adversarial", "--set", "eps=[-1]"), "eps a list of numbers, none below 0, got 0.05 and [-1]"),
        (
            ("train", "adversarial", "--set", "strong_seeds=-1"),
            "strong_seeds must be a whole number of at least 0, got",
        ),
        (
            ("train", "adversarial", "--set", "strong_losses=[[1]]"),
            "strong_losses must be a list of losses, some of ce",
        ),
        (("train", "classification", "--set", "transfer=no"), "transfer must be true or false, got 'no'"),
        (("train", "segmentation", "--set", "data_options=3"), 'must be a dictionary, such as {"seed": 1}, got 3'),
        (
            ("train", "segmentation", "--set", "data_options=null"),
            'must be a dictionary, such as {"seed": 1}, got None',
        ),
        (
            ("train", "segmentation", "--set", "data_options=3", "--data", "mask-folder", "--skip-broken"),
            'data_options must be a dictionary, such as {"seed": 1}, got 3',
        ),
        (
            ("train", "segmentation", "--set", 'data_options={"colour": 1}'),
            "mnist-scenes has no option colour; it has num_train, num_validation, num_test, size, seed",
        ),
        (("train", "segmentation", "--set", 'data_options={"seed": [1]}'), "seed must be a whole number, got [1]"),
        (
            ("train", "segmentation", "--set", 'data_options={"num_train": 0}'),
            "num_train must be from 1 to 1000000, got",
        ),
        (
            ("train", "segmentation", "--set", 'data_options={"num_test": 0}'),
            "num_test must be from 1 to 1000000, got 0",
        ),
        (("train", "segmentation", "--set", 'data_options={"size": 27}'), "a scene is 28 to 128 pixels large, got 27"),
        (
            (
                "train",
                "classification",
                "--data",
                "image-folder",
                "--data-root",
                ".",
                "--set",
                'data_options={"size": 1e9}',
            ),
            "size must be a whole number, got 1000000000.0",
        ),
        (
            (
                "train",
                "segmentation",
                "--data",
                "voc2012",
                "--data-root",
                ".",
                "--set",
                'data_options={"crop": 100000000}',
            ),
            "crop must be from 1 to 16384, got 100000000",
        ),
        (("train", "continual", "--set", "stages=5.0"), "stages must be a whole number, got 5.0"),
        (("train", "continual", "--set", "replay=-1"), "replay must be 0 samples or more, got -1"),
        (("train", "continual", "--set", "replay=abc"), "replay must be a whole number, got 'abc'"),
        (
            ("train", "classification", "--quick", "--batch-size", 1),
            "one image of (8, 8) pixels at a time: batch_size must be at least 2, got 1",
        ),
        (("train", "ood", "--set", "known=2.5"), "known must be a whole number, got 2.5"),
        (("train", "imbalanced", "--set", "factor=abc"), "factor must be a number, got 'abc'"),
        (("train", "corruption", "--set", "corrupted=[1]"), "corrupted must be one of cifar10-c, mnist-c, got [1]"),
        (("train", "corruption", "--set", "severities=[[1]]"), "must be a list of some of 1 to 5, got [[1]]"),
        (
            ("train", "classification", "--seed", "99999999999999999999"),
            "seed must be from -4294967296 to 4294967296, got",
        ),
        (("train", "classification", "--constant", "margin=abc"), "--constant margin must be a number, got 'abc'"),
        (
            ("compare", "classification", "--losses", "hem", "--sweep", "margin=null"),
            "hem: margin must be a number, got N",
        ),
        (("train", "adversarial", "--set", "at=-1"), "none below 0, got -1"),
        (("train", "corruption", "--set", "severities=[9]"), "severities must be a list of some of 1 to 5, got [9]"),
        (("train", "ood", "--set", "known=11"), "known must be 2 to 10 classes, got 11"),
        (("train", "classification", "--max-lr", "-1"), "max_lr must be a number above 0, got -1.0"),
        (
            ("train", "classification", "--policy", "step"),
            "must be one of one-cycle, cosine, multi-step, poly, got 'step'",
        ),
        (("train", "classification", "--optimizer", "adam"), "the optimizer must be one of sgd, adamw, got 'adam'"),
        (("train", "classification", "--model", "tiny"), "unknown model 'tiny': small, small-gn, small-vit"),
        (("compare", "segmentation", "--model", "small-vit"), "small-vit is for classification"),
        (
            ("train", "classification", "--loss", "ce", "--selective", "--model", "small-gn"),
            "selective training is for hem and hem+, which finish samples; ce does not",
        ),
        (("train", "segmentation", "--selective"), "small cannot be trained selectively: "),
        (("compare", "classification", "--losses", "ce,hem", "--selective"), "(--model small-gn has group normalis"),
        (("compare", "classification", "--losses", "ce,mm", "--selective"), "nothing is trained selectively without"),
        (("train", "classification", "--validation", "0.2"), "this set has a validation part of its own"),
        (("tune", "classification", "--grid", "colour=1,2"), "neither the schedule (epochs, batch_size, max_lr"),
        (
            ("tune", "ood", "--grid", "max_lr=1", "--set", "known=10"),
            "settings are chosen by classes that are not known",
        ),
        (("tune", "classification", "--losses", "ce,hinge", "--grid", "max_lr=1"), "unknown loss 'hinge'"),
        (("tune", "dreaming", "--grid", "max_lr=1"), f"unknown task 'dreaming': one of {', '.join(TASKS)}"),
        (
            ("tune", "classification", "--losses", "ce", "--grid", "max_lr=-1"),
            "max_lr must be a number above 0, got -1",
        ),
        (("tune", "corruption", "--losses", "hem", "--grid", "margin=0.5,-1", "--quick"), "hem: margin must be "),
        (("compare", "classification", "--losses", "ce", "--sweep", "margin"), "expected NAME=VALUE, got 'margin'"),
        (("compare", "classification", "--sweep", "epochs=2.5"), "must be whole and at least 1, got 2.5"),
        (("compare", "classification", "--sweep", "epochs=true"), "must be whole and at least 1, got True"),
        (("compare", "classification", "--sweep", "policy=cosine,linear"), "multi-step, poly, got 'linear'"),
        (("compare", "classification", "--sweep", "policy=[1]"), "multi-step, poly, got [1]"),
        (("compare", "classification", "--sweep", "optimizer={}"), "one of sgd, adamw, got {}"),
        (("compare", "classification", "--losses", "hem", "--sweep", "margin=large"), "hem: "),
        (("compare", "classification", "--tuned", "nowhere.json"), "No such file or directory: 'nowhere.json'"),
        (
            ("train", "classification", "--skip-broken"),
            "--skip-broken is for image-folder and mask-folder, got no --data",
        ),
        (("compare", "ood", "--skip-broken", "--data", "svhn"), "for image-folder and mask-folder, got svhn"),
        (("train", "classification", "--tracker", "wandb"), "unknown tracker 'wandb': there is tensorboard"),
        (("compare", "classification", "--tracker", "wandb"), "unknown tracker 'wandb': there is tensorboard"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(arguments, words, tmp_path):
    result = invoke(*arguments, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("hem-ext: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [ValueError, TypeError])
@pytest.mark.parametrize("jobs", [None, 1])
def test_an_error_in_a_training_is_no_matter_of_arguments(monkeypatch, tmp_path, jobs, kind):
    def broken(*_):
        raise kind("two shapes do not fit")

    monkeypatch.setattr(training, "_train_epoch", broken)
    command = ("train",) if jobs is None else ("compare", "--losses", "hem", "--seeds", 1, "--jobs", jobs)
    result = invoke(*command, "classification", "--quick", "--output", tmp_path)
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)
    assert str(result.exception) == "classification with hem, seed 0, broke off: two shapes do not fit"
    assert isinstance(result.exception.__cause__, kind)  # in the traceback that is shown
    assert "hem-ext: " not in result.output


def test_a_damaged_or_unwritable_output_is_told_in_a_sentence(tmp_path):
    command = ("train", "classification", "--loss", "ce", "--quick", "--epochs", 1, "--set", "transfer=false")
    out = tmp_path / "out"
    plain = invoke(*command, "--output", out)
    assert plain.exit_code == 0
    (model,) = out.glob("models/*/model.pt")
    model.write_bytes(b"garbage")
    (tmp_path / "file").touch()
    for folder, words in ((out, f"{model} is damaged ("), (tmp_path / "file" / "out", "[Errno 20] Not a directory: ")):
        result = invoke(*command, "--output", folder)
        assert result.exit_code == 2
        assert f"hem-ext: {words}" in result.output
        assert result.stderr.count("\n") == 1
        assert "Traceback" not in result.output
    shutil.rmtree(model.parent)
    assert numbers(invoke(*command, "--output", out)) == numbers(plain)


def numbers(result):
    """The metrics that a command has printed."""
    return [line for line in result.output.splitlines() if " s" not in line]


def test_settings_chosen_for_constants_that_there_are_not(tmp_path):
    tuned = {"classification": {"ce": {"settings": {"colour": 1}}}}
    (tmp_path / "tuned.json").write_text(json.dumps(tuned))
    result = invoke(
        "compare", "classification", "--losses", "ce", "--quick", "--tuned", tmp_path / "tuned.json", "--output",
        tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 2
    assert result.output.startswith("hem-ext: ce has no constant colour")
    assert not (tmp_path / "out").exists()


def test_settings_chosen_for_constants_that_are_no_numbers(tmp_path):
    tuned = {"classification": {"hem": {"settings": {"margin": None}}}}
    (tmp_path / "tuned.json").write_text(json.dumps(tuned))
    result = invoke(
        "compare", "classification", "--losses", "hem", "--quick", "--tuned", tmp_path / "tuned.json", "--output",
        tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 2
    assert result.output == "hem-ext: hem: margin must be a number, got None\n"
    assert not (tmp_path / "out").exists()


def test_no_command_shows_help():
    result = invoke()
    for name in ("train", "compare", "tune", "paper"):
        assert name in result.output


@pytest.mark.parametrize("kind", [ValueError, DataError])
def test_the_sentence_of_an_error_is_its_end_where_a_process_told_it(kind):
    name = kind.__name__ if kind is ValueError else f"{kind.__module__}.{kind.__name__}"
    there = "Caught it in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File a\n"
    told = f"{there}{name}: first\n\nThe above exception was the direct cause\n\n{name}: wrong\n"
    assert cli._sentence(kind(told)) == "wrong"
    for own in ("wrong ", f"wrong\n{name}: not its end"):
        assert cli._sentence(kind(own)) == own


def test_pairs_are_divided_at_the_first_sign():
    assert list(cli._pairs(["a=1", "b=c=2"])) == [("a", "1"), ("b", "c=2")]
    assert list(cli._pairs(None)) == []
    for text in ("=1", "a=", "a", "="):
        with pytest.raises(ValueError, match=f"^expected NAME=VALUE, got '{text}'$"):
            list(cli._pairs([text]))


def test_values_are_read_as_json_where_they_are():
    assert [cli._value(text) for text in ("3", "false", "images", "[0, 1]", '{"size": 32}')] == [
        3, False, "images", [0, 1], {"size": 32},
    ]  # fmt: skip
