import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from hem_ext.harness import compare, report
from hem_ext.harness import tune as tuning
from hem_ext.harness.cli import app
from hem_ext.harness.tasks import TASKS
from hem_ext.harness.tune import _described, choose, read_tuned, tune, tune_grids

GRID = {"max_lr": [0.1, 0.3], "margin": [0.5, 1.0, 2.0]}


def row(value, seed=0, task="classification", loss="hem", metric="accuracy", max_lr=0.1, **constants):
    settings = {"loss": loss, "constants": constants, "schedule": {"epochs": 3, "max_lr": max_lr}}
    return {"task": task, "metric": metric, "seed": seed, "value": value, "settings": settings}


def test_the_best_mean_is_chosen():
    rows = [row(v, seed, margin=0.5) for seed, v in enumerate((0.9, 0.5))]
    rows += [row(v, seed, margin=1.0, max_lr=0.3) for seed, v in enumerate((0.75, 0.7))]
    rows += [row(v, seed, margin=2.0, metric="ece") for seed, v in enumerate((1.0, 1.0))]
    rows += [row(0.2, loss="ce"), row(0.1, loss="ce", max_lr=0.3)]
    for _ in range(5):
        random.shuffle(rows)
        found = choose(rows, GRID)
        assert found["hem"] == {
            "settings": {"max_lr": 0.3, "margin": 1.0},
            "metric": "accuracy",
            "validation": pytest.approx(0.725),
            "seeds": 2,
            "tried": 2,
        }
        assert found["ce"]["settings"] == {"max_lr": 0.1}


def test_of_settings_that_tie_the_first_of_the_grid_is_chosen():
    rows = [row(0.5, margin=margin, max_lr=lr) for margin in (2.0, 1.0) for lr in (0.3, 0.1)]
    assert choose(rows, GRID)["hem"]["settings"] == {"max_lr": 0.1, "margin": 1.0}
    backwards = {name: values[::-1] for name, values in GRID.items()}
    assert choose(rows, backwards)["hem"]["settings"] == {"max_lr": 0.3, "margin": 2.0}


def test_what_diverged_is_not_chosen_unless_all_did():
    rows = [row(0.99, 0, margin=0.5), row(math.nan, 1, margin=0.5), row(0.1, 0, margin=1.0), row(0.1, 1, margin=1.0)]
    assert choose(rows, GRID)["hem"]["settings"]["margin"] == 1.0
    assert choose(rows[:2], GRID)["hem"]["settings"]["margin"] == 0.5


def test_less_is_chosen_where_less_is_better(monkeypatch):
    metrics = {name: TASKS["classification"].metrics[name] for name in ("ece", "accuracy")}
    monkeypatch.setattr(TASKS["classification"], "metrics", metrics)
    rows = [row(value, metric="ece", margin=margin) for value, margin in ((0.3, 0.5), (0.1, 1.0), (math.nan, 2.0))]
    assert choose(rows, GRID)["hem"]["settings"]["margin"] == 1.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_lr": 0.1, "margin": 0.5}, "; at the end of the grid: margin)"),  # of two rates, both are at an end
        ({"max_lr": 0.1, "margin": 1.0}, "seeds each)"),
        (
            {"max_lr": 0.1, "margin": 2.0, "policy": "poly", "tau": 3, "alpha": 2},
            "max_lr 0.1, margin 2.0, policy poly, tau 3, alpha 2 (accuracy 0.5000 on validation, 7 tried with 2 seeds "
            "each; at the end of the grid: margin, tau)",
        ),
        ({}, "nothing to choose (accuracy 0.5000 on validation, 7 tried with 2 seeds each)"),
    ],
)
def test_a_best_value_at_an_end_of_the_grid_is_said_to_be_there(settings, words):
    found = {"settings": settings, "metric": "accuracy", "validation": 0.5, "seeds": 2, "tried": 7}
    more = {"policy": ["poly", "cosine", "one-cycle"], "tau": [3, 1, 2], "alpha": [1, 2, 3]}
    assert _described(found, {**GRID, **more}).endswith(words)


OPTIONS = {"losses": ["ce", "hem"], "seeds": 1, "quick": True, "epochs": 1, "options": {"transfer": False}}
SMALL = {"max_lr": [0.05, 0.1], "margin": [0.5, 1]}
ARGUMENTS = [
    "tune", "classification", "--losses", "ce,hem", "--seeds", "1", "--quick", "--epochs", "1", "--set",
    "transfer=false", "--grid", "max_lr=0.05,0.1", "--grid", "margin=0.5,1",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder, threads = tmp_path_factory.mktemp("tuning"), torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that run cells side by side: more would give other bits
    chosen = tune(["classification"], SMALL, folder, console=Console(quiet=True), **OPTIONS)
    torch.set_num_threads(threads)
    return folder, chosen


def test_what_is_written_is_what_was_chosen(whole):
    folder, chosen = whole
    assert read_tuned(folder / "tuned.json") == chosen
    assert (folder / "classification-grid.png").stat().st_size > 1000
    rows = [row for row in compare.read_rows(folder) if row["metric"] == "accuracy"]
    assert {row["settings"]["part"] for row in rows} == {"validation"}
    assert len(rows) == 6
    kept = json.loads((folder / "tuned.json").read_text())
    for loss, count in (("ce", 2), ("hem", 4)):
        of_loss = [row for row in rows if row["settings"]["loss"] == loss]
        best = max(of_loss, key=lambda row: row["value"])
        settings = {"max_lr": best["settings"]["schedule"]["max_lr"], **best["settings"]["constants"]}
        assert len(of_loss) == count
        assert kept["classification"][loss] == {
            "settings": settings,
            "metric": "accuracy",
            "validation": best["value"],
            "seeds": 1,
            "tried": count,
        }
    assert kept["classification"]["ce"]["settings"].keys() == {"max_lr"}


def test_the_command_chooses_the_same_and_runs_nothing_again(whole, tmp_path, monkeypatch):
    (tmp_path / "results.jsonl").write_bytes((whole[0] / "results.jsonl").read_bytes())
    monkeypatch.setattr(compare, "_run_cell", lambda *_: pytest.fail("ran a finished cell"))
    result = CliRunner().invoke(app, [*ARGUMENTS, "--jobs", "1", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "tuned.json").read_bytes() == (whole[0] / "tuned.json").read_bytes()
    assert (tmp_path / "classification-grid.png").exists()
    for loss, settings in whole[1]["classification"].items():
        assert f"classification, {loss}: max_lr {settings['max_lr']}" in result.output


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_process_says_and_writes_what_was_chosen(whole, tmp_path, monkeypatch, rank):
    folder = tmp_path / ("of a long name " * 12)
    folder.mkdir()
    (folder / "results.jsonl").write_bytes((whole[0] / "results.jsonl").read_bytes())
    console, asked = Console(file=io.StringIO(), force_terminal=True, width=200), []
    monkeypatch.setattr(tuning, "run", lambda cells, *given, **options: asked.append((len(cells), given, options)))
    monkeypatch.setenv("RANK", rank)
    assert tune(["classification"], SMALL, folder, console=console, jobs=3, num_workers=5, **OPTIONS) == whole[1]
    assert asked == [(6, (folder,), {"console": console, "jobs": 3, "num_workers": 5})]
    said, file = console.file.getvalue().splitlines(), folder / "tuned.json"
    if rank == "1":
        assert not said
        assert [path.name for path in folder.iterdir()] == ["results.jsonl"]
        return
    kept = json.loads(file.read_text())
    choices = kept["classification"].items()
    assert said == [
        *(f"classification, {loss}: {_described(found, SMALL)}" for loss, found in choices),
        f"wrote {file}",
    ]
    assert file.read_text() == (whole[0] / "tuned.json").read_text() == json.dumps(kept, indent=1) + "\n"


def test_two_seeds_are_tried_one_after_the_other_unless_told_otherwise(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(tuning, "tune_grids", lambda *given, **options: asked.append((given, options)))
    grid = {"max_lr": [0.1, 0.3]}
    tune(["classification"], grid, tmp_path, losses=["ce"], quick=True)
    ((([(cells, of_cells)], output), options),) = asked
    assert [(cell.schedule.max_lr, cell.seed) for cell in cells] == [(lr, seed) for lr in (0.1, 0.3) for seed in (0, 1)]
    assert (of_cells, output) == (grid, tmp_path)
    assert options == {"console": None, "jobs": 1, "num_workers": 0}


def test_what_was_chosen_for_others_stays(whole, tmp_path):
    before = {"ood": {"ce": {"settings": {"max_lr": 7}}}, "classification": {"mm": {"settings": {"max_lr": 8}}}}
    (tmp_path / "tuned.json").write_text(json.dumps(before))
    (tmp_path / "results.jsonl").write_bytes((whole[0] / "results.jsonl").read_bytes())
    found = tune(["classification"], SMALL, tmp_path, console=Console(quiet=True), **OPTIONS)
    assert found == {
        "ood": {"ce": {"max_lr": 7}},
        "classification": {"mm": {"max_lr": 8}, **whole[1]["classification"]},
    }


def test_a_killed_tuning_ends_with_the_same_choice(whole, tmp_path):
    command = [sys.executable, "-m", "hem_ext.command", *ARGUMENTS, "--jobs", "2", "--output", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 300
    results = tmp_path / "results.jsonl"
    while not (results.exists() and results.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)  # until a cell has ended
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "tuned.json").exists(), "it ended before it was killed"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "of 6 cells are in" in done.stdout
    assert (tmp_path / "tuned.json").read_bytes() == (whole[0] / "tuned.json").read_bytes()
    assert len(compare.finished(tmp_path)) == 6


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1]", "AttributeError: 'list' object has no attribute 'items'"),
        ("5 6", "JSONDecodeError: Extra data: line 1 column 3 (char 2)"),
    ],
)
def test_a_damaged_file_is_told_with_the_reason(tmp_path, text, reason):
    file = tmp_path / "tuned.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{file} is not a file that hem-ext tune has written: {reason}")):
        read_tuned(file)


@pytest.mark.parametrize(
    "text",
    [
        *("", '{"ood": {"ce"', "[1]", '{"ood": 3}', '{"ood": {"ce": {}}}', '{"ood": {"ce": {"settings": 5}}}'),
        *("\xff" * 300, "[" * 100_000),
    ],
)
def test_a_damaged_file_is_told_in_a_sentence_before_anything_is_run(tmp_path, text):
    file = tmp_path / "tuned.json"
    file.write_bytes(text.encode("latin-1"))
    words = f"^{re.escape(str(file))} is not a file that hem-ext tune has written: [^\n]{{,200}}$"
    with pytest.raises(ValueError, match=words):
        read_tuned(file)
    with pytest.raises(ValueError, match=words):
        tune(["classification"], SMALL, tmp_path, console=Console(quiet=True), **OPTIONS)
    compared = ["compare", "classification", "--tuned", str(file), "--output", str(tmp_path / "comparison")]
    for arguments in (compared, [*ARGUMENTS, "--output", str(tmp_path)]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert result.output.startswith(f"hem-ext: {file} is not a file that hem-ext tune has written")
        assert result.output.count("\n") == 1
    assert list(tmp_path.iterdir()) == [file]


def test_a_grid_of_what_there_is_not(tmp_path):
    with pytest.raises(ValueError, match="nor a loss of this comparison has colour"):
        tune(["classification"], {"colour": [1, 2]}, tmp_path, losses=["ce"])
    with pytest.raises(ValueError, match="unknown task 'dreaming'"):
        tune(["dreaming"], SMALL, tmp_path)
    assert not list(tmp_path.iterdir())


def test_grids_of_different_settings_share_a_task_s_picture(whole, tmp_path, monkeypatch):
    (tmp_path / "results.jsonl").write_bytes((whole[0] / "results.jsonl").read_bytes())
    monkeypatch.setattr(compare, "_run_cell", lambda *_: pytest.fail("ran a finished cell"))
    drawn = {}
    monkeypatch.setattr(report, "draw_grid", lambda output, task, rows, chosen: drawn.update({task: (rows, chosen)}))
    grids = []
    for loss, grid in (("ce", {"max_lr": SMALL["max_lr"]}), ("hem", SMALL)):
        options = {**OPTIONS, "losses": [loss]}
        grids.append((compare.make_cells(["classification"], sweep=grid, part="validation", **options), grid))
    assert tune_grids(grids, tmp_path, console=Console(quiet=True)) == whole[1]
    rows, chosen = drawn["classification"]
    assert {row["settings"]["loss"] for row in rows} == {"ce", "hem"}
    assert chosen == whole[1]["classification"]
    assert read_tuned(tmp_path / "tuned.json") == whole[1]
