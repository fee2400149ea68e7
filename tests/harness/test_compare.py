import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from filelock import FileLock
from rich.console import Console

from hem_ext.harness import compare
from hem_ext.harness.compare import finished, make_cells, read_rows, run, run_and_report, side_by_side, tuned_cells
from hem_ext.harness.report import SHARED, TUNED
from hem_ext.harness.tasks import TASKS

# Of commands that do not run cells side by side: torch's kernels give other bits on another number of threads.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
QUIET = {"console": Console(quiet=True)}
OPTIONS = {"quick": True, "epochs": 1, "options": {"transfer": False}}


def cells(losses=("ce", "hem"), seeds=2, **more):
    return make_cells(["classification"], losses=losses, seeds=seeds, **{**OPTIONS, **more})


def numbers(folder):
    """What must be the same however the matrix was run."""
    return sorted((r["task"], r["loss"], r["seed"], r["metric"], repr(r["value"])) for r in read_rows(folder))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """As in the processes that run cells side by side: another number of threads gives other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    assert all(c.part == "test" for c in found)
    longer = make_cells(["classification"], losses=["ce"], seeds=1)[0]
    assert longer.schedule.epochs > found[0].schedule.epochs
    assert longer.key != found[0].key


def test_a_sweep_is_of_the_schedule_and_of_constants():
    found = cells(seeds=1, sweep={"max_lr": [0.1, 0.3], "policy": ["one-cycle", "cosine"], "margin": [0.2, 1]})
    tried = {(c.loss, c.schedule.max_lr, c.schedule.policy, c.constants.get("margin")) for c in found}
    schedules = [(lr, policy) for lr in (0.1, 0.3) for policy in ("one-cycle", "cosine")]
    assert tried == {("ce", *s, None) for s in schedules} | {("hem", *s, m) for s in schedules for m in (0.2, 1)}
    assert len(found) == len({c.key for c in found}) == 12


def test_what_is_given_reaches_every_cell():
    given = {"part": "validation", "validation": 0.2, "policy": "poly", "data": "svhn", "data_root": "somewhere"}
    for cell in cells(sweep={"max_lr": [0.1, 0.3]}, **given):
        assert (cell.part, cell.validation, cell.schedule.policy, cell.data_root) == (
            "validation", 0.2, "poly", "somewhere",
        )  # fmt: skip


def test_tuned_cells_have_their_own_settings():
    tuned = {
        "classification": {"hem": {"max_lr": 0.3, "margin": 0.7}, "mm": {"max_lr": 5}},
        "ood": {"ce": {"max_lr": 7}},
    }
    ce, hem = tuned_cells(cells(seeds=1), tuned)
    assert [ce] == cells(losses=["ce"], seeds=1)
    assert (hem.schedule.max_lr, hem.constants) == (0.3, {"margin": 0.7})
    (plain,) = cells(losses=["hem"], seeds=1)
    assert hem.schedule.epochs == plain.schedule.epochs
    assert hem.key != plain.key
    assert tuned_cells([plain], {}) == [plain]


def test_cells_run_one_for_every_core(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7})
    assert side_by_side() == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert side_by_side() == 1
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert side_by_side() == 1


@pytest.mark.parametrize(
    ("tasks", "options", "words"),
    [
        (["dreaming"], {}, "unknown task 'dreaming': one of classification"),
        (["classification"], {"losses": ["hinge"]}, "unknown loss 'hinge': one of ce"),
        (
            ["classification"],
            {"losses": ["ce"], "sweep": {"margin": [1.0]}},
            r"neither the schedule \(epochs, .*, policy\) nor a loss of this comparison has margin",
        ),
        (
            ["classification"],
            {"losses": ["ce", "hem"], "sweep": {"margin": [1.0], "momentum": [0.9], "colour": [1]}},
            "nor a loss of this comparison has colour, momentum",
        ),
        (["classification"], {"losses": ["ce"], "sweep": {"max_lr": [0.1, -1]}}, "max_lr must be a number above 0"),
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


def command(folder, *launcher, jobs="1"):
    arguments = ["compare", "classification", "--losses", "ce,hem", "--seeds", "2", "--quick", "--epochs", "1"]
    arguments += ["--jobs", jobs]
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


def start(arguments):
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, env=ONE_THREAD
    )


def until(condition, process=None, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline and (process is None or process.poll() is None):
        time.sleep(0.05)
    return condition()


def test_killed_at_any_moment_the_same_command_ends_with_the_same_table(whole, tmp_path):
    for pause in (0.0, 0.7):
        process = start(command(tmp_path))
        assert until(lambda: list(tmp_path.glob("models/*")), process)  # until it trains
        time.sleep(pause)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, check=False, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert numbers(tmp_path) == numbers(whole)
    assert not list(tmp_path.glob("models/*/epoch-*"))


def workers(process):
    """Processes that run cells for another."""
    return [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]


def test_side_by_side_cells_give_the_numbers_of_one_process(whole, tmp_path):
    run(cells(), tmp_path, jobs=2, **QUIET)
    assert numbers(tmp_path) == numbers(whole)
    assert len(list(tmp_path.glob("curves/*.json"))) == 4
    assert not workers(psutil.Process())


def test_workers_end_with_the_process_that_they_work_for(whole, tmp_path):
    process = start(command(tmp_path, jobs="2"))
    assert until(lambda: len(list(tmp_path.glob("models/*"))) >= 2, process)  # until both train
    found = workers(psutil.Process(process.pid))
    assert len(found) == 2
    process.kill()  # itself alone
    process.wait()
    _, alive = psutil.wait_procs(found, timeout=60)
    for worker in alive:
        worker.kill()
    process.communicate()
    assert not alive
    run(cells(), tmp_path, **QUIET)
    assert numbers(tmp_path) == numbers(whole)


def test_an_error_beside_a_long_training_comes_out_at_once(tmp_path):
    endless = TASKS["classification"].cell("ce", 0, **{**OPTIONS, "epochs": 1_000_000})
    wrong = TASKS["ood"].cell("hem", 0, quick=True, options={"known": 11})
    with pytest.raises(ValueError, match="known must be 2 to 10 classes, got 11"):
        run([endless, wrong], tmp_path, jobs=2, **QUIET)
    assert not workers(psutil.Process())
    assert read_rows(tmp_path) == []


def test_a_report_has_both_protocols(whole, tmp_path):
    (tmp_path / "results.jsonl").write_bytes((whole / "results.jsonl").read_bytes())
    shared = cells()
    own = tuned_cells(shared, {"classification": {"hem": {"margin": 0.9}}})
    run_and_report({SHARED: shared, TUNED: own}, tmp_path, jobs=1, **QUIET)
    # Cells that belong to both are run once.
    assert len(finished(tmp_path)) == 6
    report = (tmp_path / "report.md").read_text().lower()
    assert SHARED in report
    assert TUNED in report
    rows = compare.rows_of(own, tmp_path)
    assert {(r["loss"], r["seed"]) for r in rows} == {
        (loss, seed) for loss in ("ce", "hem margin=0.9") for seed in (0, 1)
    }


def test_every_cell_of_a_sweep_has_its_own_curves_in_tensorboard(tmp_path):
    run(cells(losses=["ce"], seeds=1, sweep={"max_lr": [0.01, 0.1]}), tmp_path, tracker="tensorboard", **QUIET)
    folders = [file.parent for file in tmp_path.glob("tensorboard/**/events.out.tfevents.*")]
    assert len(folders) == len(set(folders)) == 2


def test_two_processes_give_the_table_of_one(whole, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = subprocess.run(command(tmp_path, *launcher), capture_output=True, text=True, check=False, env=ONE_THREAD)
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


def test_two_commands_never_write_to_one_folder(whole):
    with FileLock(whole / "lock"), pytest.raises(ValueError, match="another process is at work in"):
        run(cells(), whole, **QUIET)
    run(cells(), whole, **QUIET)
