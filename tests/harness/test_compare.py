import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console

from hem_ext.harness import compare
from hem_ext.harness.compare import finished, make_cells, read_rows, run

QUIET = {"console": Console(quiet=True)}
OPTIONS = {"quick": True, "epochs": 1, "options": {"transfer": False}}


def cells(losses=("ce", "hem"), seeds=2, **more):
    return make_cells(["classification"], losses=losses, seeds=seeds, **{**OPTIONS, **more})


def numbers(folder):
    """What must be the same however the matrix was run."""
    return sorted((r["task"], r["loss"], r["seed"], r["metric"], repr(r["value"])) for r in read_rows(folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(cells(), folder, **QUIET)
    return folder


def test_cells_are_the_matrix():
    found = cells(sweep={"margin": [0.1, 0.5]})
    variants = ["ce", "hem margin=0.1", "hem margin=0.5"]
    assert [(c.variant, c.seed) for c in found] == [(v, seed) for v in variants for seed in (0, 1)]
    assert len({c.key for c in found}) == 6
    assert [c.key for c in found] == [c.key for c in cells(sweep={"margin": [0.1, 0.5]})]
    assert found[0].schedule.epochs == 1
    longer = make_cells(["classification"], losses=["ce"], seeds=1)[0]
    assert longer.schedule.epochs > found[0].schedule.epochs
    assert longer.key != found[0].key


@pytest.mark.parametrize(
    ("tasks", "options", "words"),
    [
        (["dreaming"], {}, "unknown task 'dreaming': one of classification"),
        (["classification"], {"losses": ["hinge"]}, "unknown loss 'hinge': one of ce"),
        (
            ["classification"],
            {"losses": ["ce"], "sweep": {"margin": [1.0]}},
            "no loss of this comparison has a constant margin",
        ),
        (["classification"], {"options": {"colour": 1}}, "classification has no option colour; it has transfer"),
    ],
)
def test_what_cannot_be_compared(tasks, options, words):
    with pytest.raises(ValueError, match=words):
        make_cells(tasks, **options)


def test_results_say_everything(whole):
    rows = read_rows(whole)
    assert {(r["loss"], r["seed"]) for r in rows} == {("ce", 0), ("ce", 1), ("hem", 0), ("hem", 1)}
    row = next(r for r in rows if r["metric"] == "accuracy")
    assert 0.15 < row["value"] <= 1
    assert row["settings"]["schedule"]["epochs"] == 1
    assert row["settings"]["options"] == {"transfer": False}
    assert row["of"] == len([r for r in rows if r["cell"] == row["cell"]])
    assert 0 < row["loss_share"] < 1
    assert (whole / "report.md").exists()
    curves = json.loads((whole / "curves" / f"{row['cell']}.json").read_text())
    assert len(curves["history"]) == 1


def test_a_finished_cell_is_never_run_again(whole, monkeypatch):
    before = (whole / "results.jsonl").read_bytes()
    monkeypatch.setattr(compare, "_run_cell", lambda *_: pytest.fail("ran a finished cell"))
    run(cells(), whole, **QUIET)
    assert (whole / "results.jsonl").read_bytes() == before


def test_a_line_that_was_cut_off_costs_its_cell_alone(whole, tmp_path):
    lines = (whole / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    assert len(finished(tmp_path)) == 3
    run(cells(), tmp_path, **QUIET)
    assert numbers(tmp_path) == numbers(whole)


def test_more_seeds_join_what_is_there(whole, tmp_path):
    (tmp_path / "results.jsonl").write_bytes((whole / "results.jsonl").read_bytes())
    run(cells(seeds=3), tmp_path, **QUIET)
    assert {r["seed"] for r in read_rows(tmp_path)} == {0, 1, 2}
    assert set(numbers(whole)) < set(numbers(tmp_path))


def command(folder, *launcher):
    arguments = ["compare", "classification", "--losses", "ce,hem", "--seeds", "2", "--quick", "--epochs", "1"]
    return [
        sys.executable,
        *launcher,
        "-m",
        "hem_ext.command",
        *arguments,
        "--set",
        "transfer=false",
        "--output",
        str(folder),
    ]


def test_killed_at_any_moment_the_same_command_ends_with_the_same_table(whole, tmp_path):
    for pause in (0.0, 0.3, 0.9):
        process = subprocess.Popen(
            command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("models/*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)  # until it trains
        time.sleep(pause)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert numbers(tmp_path) == numbers(whole)


def test_two_processes_give_the_table_of_one(whole, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    # torch's own kernels give other bits on another number of threads, and torchrun would choose one.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command(tmp_path, *launcher), capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert numbers(tmp_path) == numbers(whole)
    assert sorted(p.name for p in tmp_path.glob("results*")) == ["results.jsonl"]


def test_processes_never_train_the_same_network():
    cells = compare.make_cells(["classification", "corruption", "ood"], losses=["ce", "hem", "mm"], seeds=3)
    shares = [compare._deal(cells, rank, 2) for rank in range(2)]
    assert sorted(cell.key for share in shares for cell in share) == sorted(cell.key for cell in cells)
    networks = [{(cell.loss, cell.seed) for cell in share} for share in shares]
    assert not networks[0] & networks[1]
    assert abs(len(shares[0]) - len(shares[1])) <= 3


def test_another_precision_is_another_cell():
    (plain,), (half,) = (
        compare.make_cells(["classification"], losses=["ce"], seeds=1, mixed_precision=p) for p in (None, "bf16")
    )
    assert plain.key != half.key
