import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from hem_ext.harness import paper, report
from hem_ext.harness.losses import LOSSES
from hem_ext.harness.tasks import TASKS
from hem_ext.harness.tune import choose, read_tuned, tune

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


def test_what_diverged_is_not_chosen_unless_all_did():
    rows = [row(0.99, 0, margin=0.5), row(math.nan, 1, margin=0.5), row(0.1, 0, margin=1.0), row(0.1, 1, margin=1.0)]
    assert choose(rows, GRID)["hem"]["settings"]["margin"] == 1.0
    assert choose(rows[:2], GRID)["hem"]["settings"]["margin"] == 0.5


def test_less_is_chosen_where_less_is_better(monkeypatch):
    metrics = {name: TASKS["classification"].metrics[name] for name in ("ece", "accuracy")}
    monkeypatch.setattr(TASKS["classification"], "metrics", metrics)
    rows = [row(value, metric="ece", margin=margin) for value, margin in ((0.3, 0.5), (0.1, 1.0), (math.nan, 2.0))]
    assert choose(rows, GRID)["hem"]["settings"]["margin"] == 1.0


OPTIONS = {"losses": ["ce", "hem"], "seeds": 1, "quick": True, "epochs": 1, "options": {"transfer": False}}
SMALL = {"max_lr": [0.05, 0.1], "margin": [0.5, 1.0]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    chosen = tune(["classification"], SMALL, folder, console=Console(quiet=True), **OPTIONS)
    return folder, chosen


def test_what_is_written_is_what_was_chosen(whole):
    folder, chosen = whole
    assert read_tuned(folder / "tuned.json") == chosen
    assert chosen["classification"].keys() == {"ce", "hem"}
    assert chosen["classification"]["hem"]["margin"] in (0.5, 1.0)
    assert (folder / "classification-grid.png").exists()
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert {row["settings"]["part"] for row in rows} == {"validation"}


def test_what_was_chosen_for_others_stays(whole, tmp_path):
    before = {"ood": {"ce": {"settings": {"max_lr": 7}}}, "classification": {"mm": {"settings": {"max_lr": 8}}}}
    (tmp_path / "tuned.json").write_text(json.dumps(before))
    (tmp_path / "results.jsonl").write_bytes((whole[0] / "results.jsonl").read_bytes())
    found = tune(["classification"], SMALL, tmp_path, console=Console(quiet=True), **OPTIONS)
    assert found == {
        "ood": {"ce": {"max_lr": 7}},
        "classification": {"mm": {"max_lr": 8}, **whole[1]["classification"]},
    }


def test_a_killed_tuning_goes_on(whole, tmp_path):
    command = [
        *(
            sys.executable,
            "-m",
            "hem_ext.command",
            "tune",
            "classification",
            "--losses",
            "ce,hem",
            "--jobs",
            "2",
            "--seeds",
            "1",
        ),
        *("--grid", "max_lr=0.05,0.1", "--grid", "margin=0.5,1", "--quick", "--epochs", "1", "--set", "transfer=false"),
        *("--output", str(tmp_path)),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 120
    results = tmp_path / "results.jsonl"
    while not (results.exists() and results.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)  # until a cell has ended
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "tuned.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "of 6 cells are in" in done.stdout
    chosen = read_tuned(tmp_path / "tuned.json")["classification"]
    assert chosen.keys() == whole[1]["classification"].keys()
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert len({line["cell"] for line in lines}) == 6


def test_a_damaged_file_is_told(tmp_path):
    for text in ("", "[1]", '{"ood": {"ce": {}}}', '{"ood": 3}'):
        (tmp_path / "tuned.json").write_text(text)
        with pytest.raises(ValueError, match="is not a file that hem-ext tune has written"):
            read_tuned(tmp_path / "tuned.json")


def test_the_paper_has_both_protocols():
    tuned = {"ood": {"hem": {"max_lr": 0.7, "total": 5}, "ce": {"max_lr": 0.4}}}
    found = paper.protocols(tuned=tuned)
    shared, own = found[report.SHARED], found[report.TUNED]
    assert {(cell.task, cell.loss) for cell in own} == {("ood", "hem"), ("ood", "ce")}
    assert {cell.schedule.max_lr for cell in own} == {0.7, 0.4}
    for task, losses in paper.MAIN.items():
        for loss in losses:
            assert sum((cell.task, cell.loss) == (task, loss) for cell in shared) == paper.SEEDS
    others = {(cell.task, cell.loss) for cell in shared if cell.loss not in paper.MAIN[cell.task]}
    assert others
    for task, loss in others:
        assert sum((cell.task, cell.loss) == (task, loss) for cell in shared) == paper.FEWER
    assert len({cell.key for cell in shared}) == len(shared)


def test_what_the_paper_has_chosen_is_of_its_grids():
    for task, by_loss in read_tuned(paper.TUNED_FILE).items():
        for loss, settings in by_loss.items():
            (grid,) = [grid for of_task, of_loss, _, grid in paper.GRIDS if (of_task, of_loss) == (task, loss)]
            assert settings.keys() == grid.keys()
            assert all(value in grid[name] for name, value in settings.items())


@pytest.mark.parametrize(("task", "loss", "seeds", "grid"), paper.GRIDS)
def test_grids_are_of_settings_that_there_are(task, loss, seeds, grid):
    assert loss in paper.MAIN[task]
    assert seeds >= 1
    assert all(name == "max_lr" or name in LOSSES[loss].constants() for name in grid)
