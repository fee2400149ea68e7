import io
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest
import torch
from damage import full_disk
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress
from threadpoolctl import threadpool_info

import hem_ext
from hem_ext.harness import compare
from hem_ext.harness.compare import finished, make_cells, read_rows, run, run_and_report, side_by_side, tuned_cells
from hem_ext.harness.losses import LOSSES
from hem_ext.harness.report import SHARED, TUNED
from hem_ext.harness.report.results import read_curves
from hem_ext.harness.tasks import TASKS
from hem_ext.harness.training import Epoch, KeptError, make_accelerator

# Of commands that do not run cells side by side: torch's kernels give other bits on another number of threads.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
QUIET = {"console": Console(quiet=True)}
OPTIONS = {"quick": True, "epochs": 1, "options": {"transfer": False}}


def cells(losses=("ce", "hem"), seeds=2, **more):
    return make_cells(["classification"], losses=losses, seeds=seeds, **{**OPTIONS, **more})


def numbers(folder):
    """What must be the same however the matrix was run."""
    return sorted((r["task"], r["loss"], r["seed"], r["metric"], repr(r["value"])) for r in read_rows(folder))


def curves(folder):
    """What must be the same, of every epoch."""
    times = ("seconds", "loss_seconds")
    return {
        key: [{name: value for name, value in epoch.items() if name not in times} for epoch in line["history"]]
        for key, line in read_curves(folder).items()
    }


def curve_files(folder):
    return {path.name: len(path.read_text().splitlines()) for path in folder.glob("curves*")}


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


def test_settings_that_were_added_since_count_where_they_are_given():
    (plain,) = cells(losses=["hem"], seeds=1)
    given = [replace(plain, selective=True), plain.with_settings({"optimizer": "adamw"})]
    assert len({cell.key for cell in (plain, *given)}) == 3
    assert len({str(cell.training) for cell in (plain, *given)}) == 3
    assert given[0].settings()["selective"] is True
    assert given[1].settings()["schedule"]["optimizer"] == "adamw"
    # Networks that were kept before keep their place.
    schedule = {"epochs": 1, "batch_size": 64, "max_lr": 0.1, "weight_decay": 5e-4, "policy": "one-cycle"}
    assert plain.training == ["digits", None, None, {}, "small", None, schedule, 0]


def test_selective_cells_stand_beside_plain_ones():
    given = {"losses": ["ce", "hem", "hem+"], "seeds": 2, "sweep": {"margin": [0.1, 0.5]}}
    found, plain = cells(selective=True, **given), cells(**given)
    assert [cell for cell in found if not cell.selective] == plain
    twins = [cell for cell in plain if cell.loss != "ce"]
    assert [replace(cell, selective=False) for cell in found if cell.selective] == twins
    assert len({cell.key for cell in found}) == len(plain) + len(twins)
    assert [cell.variant for cell in found if cell.selective and cell.seed == 0] == [
        "hem selective margin=0.1", "hem selective margin=0.5", "hem+ selective",
    ]  # fmt: skip
    # They keep their own settings as the plain ones do.
    tuned = tuned_cells(found, {"classification": {"hem": {"max_lr": 0.3}}})
    assert {(cell.loss, cell.selective) for cell in tuned if cell.schedule.max_lr == 0.3} == {
        ("hem", False), ("hem", True),
    }  # fmt: skip


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
        (
            ["classification"],
            {"losses": ["ce"], "sweep": {"margin": [1.0]}},
            r"neither the schedule \(epochs, .*, policy, optimizer\) nor a loss of this comparison has margin",
        ),
        (
            ["classification"],
            {"losses": ["ce", "hem"], "sweep": {"margin": [1.0], "momentum": [0.9], "colour": [1]}},
            "nor a loss of this comparison has colour, momentum",
        ),
        (["classification"], {"losses": ["ce"], "sweep": {"max_lr": [0.1, -1]}}, "max_lr must be a number above 0"),
        (["classification"], {"options": {"colour": 1}}, "classification has no option colour; it has transfer"),
        (
            ["classification"],
            {"losses": ["ce", "mm"], "selective": True},
            r"^nothing is trained selectively without hem or hem\+, which are not in this comparison$",
        ),
        (
            ["segmentation"],
            {"losses": ["ce", "dice"], "fused_upsample": True},
            r"^nothing is upsampled by its loss without hem or hem\+, which are not in this comparison$",
        ),
    ],
)
def test_what_cannot_be_compared(tasks, options, words):
    with pytest.raises(ValueError, match=words):
        make_cells(tasks, **options)


def test_hem_alone_is_upsampled_by_its_loss():
    found = make_cells(["segmentation"], losses=["ce", "hem"], seeds=1, quick=True, fused_upsample=True)
    assert [(cell.loss, cell.fused_upsample) for cell in found] == [("ce", False), ("hem", True)]


def test_results_say_everything(whole):
    rows = read_rows(whole)
    assert {(r["loss"], r["seed"]) for r in rows} == {("ce", 0), ("ce", 1), ("hem", 0), ("hem", 1)}
    row = next(r for r in rows if r["metric"] == "accuracy")
    assert 0.15 < row["value"] <= 1
    assert row["settings"]["schedule"]["epochs"] == 1
    assert row["settings"]["options"] == {"transfer": False}
    assert row["of"] == len([r for r in rows if r["cell"] == row["cell"]])
    assert 0 < row["loss_share"] < 1
    found = read_curves(whole)
    assert found.keys() == {r["cell"] for r in rows}
    (epoch,) = found[row["cell"]].pop("history")
    assert epoch["metrics"].keys() == {"accuracy"}
    assert 0 < epoch["loss_seconds"] < epoch["seconds"]
    # What the rows say is not said again.
    assert found[row["cell"]] == {name: row[name] for name in ("cell", "task", "loss", "seed")}
    assert curve_files(whole) == {"curves.jsonl": 4}


def test_a_finished_cell_is_never_run_again(whole, monkeypatch):
    before = {path.name: path.read_bytes() for path in whole.glob("*.jsonl")}
    assert before.keys() == {"results.jsonl", "curves.jsonl"}
    monkeypatch.setattr(compare, "_run_cell", lambda *_: pytest.fail("ran a finished cell"))
    run(cells(), whole, **QUIET)
    assert {path.name: path.read_bytes() for path in whole.glob("*.jsonl")} == before


@pytest.fixture
def given(monkeypatch):
    """What cells are run with, instead of running them."""
    found = []

    def run_cell(cell, output, tracker, num_workers, after_epoch):
        found.append((cell, output, tracker, num_workers))
        after_epoch(None)
        return {"curves": [], "results": []}

    monkeypatch.setattr(compare, "_run_cell", run_cell)
    return found


def test_a_run_says_what_it_has_and_what_it_runs(whole, tmp_path, given):
    (tmp_path / "results.jsonl").write_text((whole / "results.jsonl").read_text())
    console = Console(file=io.StringIO(), width=200)
    run(cells(seeds=3), tmp_path, console=console, tracker="tensorboard", num_workers=5)
    assert given == [(cell, tmp_path, "tensorboard", 5) for cell in cells(seeds=3) if cell.seed == 2]
    kept, ended = console.file.getvalue().splitlines()
    assert kept == f"4 of 6 cells are in {tmp_path} already"
    assert re.match(r"classification, hem, seed 2 ━+ 2/2 0:00:0\d 0:00:00$", ended)


def test_what_makes_cells_by_itself():
    made = make_cells(["corruption"], losses=["hem"])
    assert made == [TASKS["corruption"].cell("hem", seed) for seed in range(5)]


@pytest.mark.parametrize(("kind", "known"), [("task", TASKS), ("loss", LOSSES)])
def test_what_there_is_not_is_told_with_what_there_is(kind, known):
    given = {"tasks": ["corruption"], "losses": ["hem"], {"task": "tasks", "loss": "losses"}[kind]: ["dreaming"]}
    with pytest.raises(ValueError, match=f"^unknown {kind} 'dreaming': one of {re.escape(', '.join(known))}$"):
        make_cells(**given)


def test_epochs_are_written_without_spaces(whole):
    line = {"a": [1, 2], "b": None}
    assert compare._text("results", [line, line]) == '{"a": [1, 2], "b": null}\n' * 2
    assert compare._text("curves", [line]) == '{"a":[1,2],"b":null}\n'
    assert not re.search(r"[:,] ", (whole / "curves.jsonl").read_text())
    assert re.search(r"[:,] ", (whole / "results.jsonl").read_text())


@pytest.fixture
def done(monkeypatch):
    """What is on the bar after every change: its words, the epochs that ended, and all."""
    found = []

    class Noted(Progress):
        def add_task(self, description, **options):
            added = super().add_task(description, **options)
            self.note()
            return added

        def update(self, bar, **changes):
            super().update(bar, **changes)
            self.note()

        def advance(self, bar):
            super().advance(bar)
            self.note()

        def note(self):
            (task,) = self.tasks
            found.append((task.description, task.completed, task.total))

    monkeypatch.setattr(compare, "Progress", Noted)
    return found


@pytest.fixture
def gathered(tmp_path, monkeypatch):
    """The files that there are whenever they are to be gathered; they stay as they are."""
    found = []
    monkeypatch.setattr(compare, "_gather", lambda output: found.append({path.name for path in output.glob("*.jsonl")}))
    return found


def test_progress_is_in_epochs(tmp_path, given, done, gathered):
    run([*cells(seeds=1, losses=["ce"], epochs=3), *cells(seeds=1, losses=["hem"], epochs=5)], tmp_path, **QUIET)
    ce, hem = "classification, ce, seed 0", "classification, hem, seed 0"
    assert done == [("", 0, 8), (ce, 0, 8), (ce, 1, 8), (ce, 3, 8), (hem, 3, 8), (hem, 4, 8), (hem, 8, 8)]
    assert gathered == [set(), {"curves.jsonl", "results.jsonl"}]


def test_progress_of_cells_side_by_side(tmp_path, done, gathered, monkeypatch):
    asked = []

    def side_by_side(*given):
        asked.append(given)
        for cell in reversed(given[0]):
            row = {"cell": cell.key, "metric": "accuracy", "value": 0.5, "of": 1}
            yield cell, {"curves": [{"cell": cell.key, "history": [1, 2]}], "results": [row]}

    monkeypatch.setattr(compare, "_run_side_by_side", side_by_side)
    made = cells(seeds=1, epochs=3)
    run(made, tmp_path, jobs=2, **QUIET)
    assert asked == [(made, 2, (tmp_path, None, 0))]
    ce, hem = "classification, ce, seed 0", "classification, hem, seed 0"
    assert done == [("", 0, 6), (hem, 3, 6), (ce, 6, 6)]
    epochs = [f'{{"cell":"{cell.key}","history":[1,2]}}\n' for cell in reversed(made)]
    assert (tmp_path / "curves.jsonl").read_text() == "".join(epochs)
    assert [json.loads(row)["cell"] for row in both_lines(tmp_path)[0]] == [cell.key for cell in reversed(made)]
    assert gathered == [set(), {"curves.jsonl", "results.jsonl"}]


def test_the_second_process_is_silent_and_writes_files_of_its_own(whole, tmp_path, given, monkeypatch):
    waited = []

    @contextmanager
    def second():
        yield 1, 2, lambda: waited.append(sorted(path.name for path in tmp_path.glob("*.jsonl")))

    (tmp_path / "results.jsonl").write_text((whole / "results.jsonl").read_text())
    before = (tmp_path / "results.jsonl").read_bytes()
    monkeypatch.setattr(compare, "_spread_over_processes", second)
    console = Console(file=io.StringIO(), force_terminal=True)
    run(cells(seeds=4), tmp_path, console=console)
    assert given == [(cell, tmp_path, None, 0) for cell in compare._deal(cells(seeds=4), 1, 2) if cell.seed > 1]
    assert given
    assert console.file.getvalue() == ""
    assert (tmp_path / "results.jsonl").read_bytes() == before
    alone, both = ["results.jsonl"], ["curves-1.jsonl", "results-1.jsonl", "results.jsonl"]
    assert waited == [alone, both, both]


LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "here"}
LAUNCHED |= {"MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "7"}


@pytest.mark.parametrize(("gpus", "device"), [(0, []), (4, [1])])
def test_each_of_several_processes_is_by_itself(monkeypatch, gpus, device):
    begun, ended, devices = [], [], []

    def begin(*given, **options):
        begun.append((given, options, {name: os.environ[name] for name in LAUNCHED}))

    monkeypatch.setattr(torch.distributed, "init_process_group", begin)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append(True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    inside = []

    def work():
        with compare._spread_over_processes() as found:
            inside.append((found, [name for name in LAUNCHED if name in os.environ], list(ended)))
            raise LookupError

    with pytest.raises(LookupError):
        work()
    assert inside == [((1, 2, torch.distributed.barrier), ["TORCHELASTIC_RUN_ID"], [])]
    assert {name: os.environ[name] for name in LAUNCHED} == LAUNCHED
    assert begun == [(("gloo",), {"timeout": timedelta(days=30)}, LAUNCHED)]
    assert (devices, ended) == (device, [True])
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    with compare._spread_over_processes():
        pass
    assert "LOCAL_RANK" not in os.environ
    assert devices == [*device, *([0] if gpus else [])]


def both_lines(folder):
    return [(folder / f"{kind}.jsonl").read_text().splitlines(keepends=True) for kind in ("results", "curves")]


@pytest.mark.parametrize("of_curves", ["whole", "cut off"])
def test_a_line_that_was_cut_off_costs_its_cell_alone(whole, tmp_path, of_curves):
    rows, epochs = both_lines(whole)
    (tmp_path / "results.jsonl").write_text("".join(rows[:-1]) + rows[-1][:20])
    (tmp_path / "curves.jsonl").write_text("".join(epochs[:-1]) + epochs[-1][: None if of_curves == "whole" else 90])
    assert len(finished(tmp_path)) == 3
    run(cells(), tmp_path, **QUIET)
    assert numbers(tmp_path) == numbers(whole)
    assert curves(tmp_path) == curves(whole)
    assert curve_files(tmp_path) == {"curves.jsonl": 4}  # one of each, also of the cell that was run twice


GARBAGE = [
    b"\xff\xfe\x00",
    b"5",
    b"null",
    b"[" * 100_000,
    b'{"cell": [], "metric": 1}',
    b'{"history": []}',
    b"\x00" * 99,
]


def test_garbage_between_lines_costs_nothing(whole, tmp_path, monkeypatch):
    rows, epochs = both_lines(whole)
    for name, lines in (("results", rows), ("curves", epochs)):
        encoded = [line.encode() for line in lines]
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join([*encoded[:3], *(g + b"\n" for g in GARBAGE), *encoded[3:]]))
    monkeypatch.setattr(compare, "_run_cell", lambda *_: pytest.fail("ran a finished cell"))
    run(cells(), tmp_path, **QUIET)
    assert both_lines(tmp_path) == [rows, epochs]


def without(line, name):
    return {key: value for key, value in line.items() if key != name}


def epochs_with(**changed):
    return lambda line: {**line, "history": [{**epoch, **changed} for epoch in line["history"]]}


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda row, name=name: without(row, name) for name in ("loss_share", "torch", "machine", "seed")),
        *(lambda row, value=value: {**row, "value": value} for value in ("0.5", None, True, 10**400)),
        *(lambda row, cell=cell: {**row, "cell": cell} for cell in ([1], {}, 3, "another")),
        *(lambda row, settings=settings: {**row, "settings": settings} for settings in ({}, [], None)),
        lambda row: {**row, "settings": {**row["settings"], "schedule": {}}},
        lambda row: {**row, "task": "dreaming"},
        lambda row: {**row, "seed": "0"},
        lambda row: {**row, "loss": 7},
        lambda row: {**row, "of": "3"},
        lambda row: {**row, "loss_share": "x"},
    ],
)
def test_a_row_of_other_content_costs_its_cell_alone(whole, tmp_path, damage):
    rows, epochs = both_lines(whole)
    (tmp_path / "results.jsonl").write_text(json.dumps(damage(json.loads(rows[0]))) + "\n" + "".join(rows[1:]))
    (tmp_path / "curves.jsonl").write_text("".join(epochs))
    assert finished(tmp_path) == finished(whole) - {json.loads(rows[0])["cell"]}
    compare._gather(tmp_path)
    assert set(read_curves(tmp_path)) == finished(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda line, history=history: {**line, "history": history} for history in (None, [], [1], [{}])),
        *(lambda line, cell=cell: {**line, "cell": cell} for cell in ([1], None)),
        epochs_with(seconds="x"),
        epochs_with(metrics=None),
        epochs_with(metrics={"accuracy": "x"}),
        epochs_with(active=True),
    ],
)
def test_epochs_of_other_content_cost_the_curves_of_their_cell_alone(whole, tmp_path, damage):
    rows, epochs = both_lines(whole)
    (tmp_path / "results.jsonl").write_text("".join(rows))
    (tmp_path / "curves.jsonl").write_text(json.dumps(damage(json.loads(epochs[0]))) + "\n" + "".join(epochs[1:]))
    assert set(read_curves(tmp_path)) == finished(whole) - {json.loads(epochs[0])["cell"]}
    assert finished(tmp_path) == finished(whole)


def test_a_line_that_was_overwritten_costs_its_cell_alone(whole, tmp_path):
    rows, epochs = both_lines(whole)
    lines = [line.encode() for line in rows]
    (tmp_path / "results.jsonl").write_bytes(b"".join([*lines[:1], b"\xff" * len(lines[1]), *lines[2:]]))
    (tmp_path / "curves.jsonl").write_text("".join(epochs))
    assert len(finished(tmp_path)) == 3
    run(cells(), tmp_path, **QUIET)
    assert numbers(tmp_path) == numbers(whole)
    assert curve_files(tmp_path) == {"curves.jsonl": 4}


@pytest.mark.parametrize("kind", ["curves", "results"])
def test_a_full_disk_costs_the_cell_that_ended_alone(whole, tmp_path, kind):
    last = cells()[-1].key
    lines = dict(zip(("results", "curves"), both_lines(whole), strict=True))
    for name, of_all in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(line for line in of_all if last not in line))
    left = {name: [json.loads(line) for line in of_all if last in line] for name, of_all in lines.items()}
    file = tmp_path / f"{kind}.jsonl"
    size = file.stat().st_size + 50
    with full_disk(size), pytest.raises(KeptError, match=rf"^{file} cannot be written: [^\n]*File too large$"):
        compare._append(tmp_path, 0, left if kind == "curves" else {**left, "curves": []})
    assert file.stat().st_size == size
    assert len(finished(tmp_path)) == 3
    run(cells(), tmp_path, **QUIET)
    assert numbers(tmp_path) == numbers(whole)
    assert curves(tmp_path) == curves(whole)
    assert curve_files(tmp_path) == {"curves.jsonl": 4}


def test_what_killed_processes_left_is_gathered(whole, tmp_path, monkeypatch):
    rows, epochs = both_lines(whole)
    left = {
        "results.jsonl": [*rows[:-6], rows[-6][:99]],
        "results-1.jsonl": rows[-9:],
        "curves.jsonl": [*epochs[:2], epochs[2][:99]],
        "curves-1.jsonl": epochs[1:3],
        "curves-2.jsonl": [epochs[3], epochs[0].replace(cells()[0].key, "0123456789abcdef")],  # not finished
    }
    for name, lines in left.items():
        (tmp_path / name).write_text("".join(lines))
    monkeypatch.setattr(compare, "_run_cell", lambda *_: pytest.fail("ran a finished cell"))
    run(cells(), tmp_path, **QUIET)
    assert [sorted(lines) for lines in both_lines(tmp_path)] == [sorted(lines) for lines in (rows, epochs)]
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_more_seeds_join_what_is_there(whole, tmp_path):
    (tmp_path / "results.jsonl").write_bytes((whole / "results.jsonl").read_bytes())
    run(cells(seeds=3), tmp_path, **QUIET)
    assert {r["seed"] for r in read_rows(tmp_path)} == {0, 1, 2}
    assert set(numbers(whole)) < set(numbers(tmp_path))
    # Rows without curves are rows as well.
    assert curves(tmp_path).keys() == {cell.key for cell in cells(seeds=3) if cell.seed == 2}


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
    assert curves(tmp_path) == curves(whole)
    assert not list(tmp_path.glob("models/*/epoch-*"))


def workers(process):
    """Processes that run cells for another."""
    return [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]


def test_side_by_side_cells_give_the_numbers_of_one_process(whole, tmp_path):
    run(cells(), tmp_path, jobs=2, **QUIET)
    assert numbers(tmp_path) == numbers(whole)
    assert curves(tmp_path) == curves(whole)
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


@pytest.mark.parametrize(("jobs", "processes"), [(2, 2), (5, 4)])
def test_there_are_not_more_processes_than_cells(monkeypatch, jobs, processes):
    def executor(count, **options):
        raise LookupError(count)

    monkeypatch.setattr(compare, "ProcessPoolExecutor", executor)
    with pytest.raises(LookupError, match=f"^{processes}$"):
        next(compare._run_side_by_side(cells(), jobs, ()))


def threads():
    return torch.get_num_threads(), {pool["num_threads"] for pool in threadpool_info()}


def test_a_worker_has_one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    context = multiprocessing.get_context("spawn")
    end, _own = context.Pipe(duplex=False)
    with ProcessPoolExecutor(1, mp_context=context, initializer=compare._work_alone, initargs=(end,)) as pool:
        assert pool.submit(threads).result() == (1, {1})


def test_an_error_beside_a_long_training_comes_out_at_once(tmp_path):
    endless = TASKS["classification"].cell("ce", 0, **{**OPTIONS, "epochs": 1_000_000})
    wrong = TASKS["ood"].cell("hem", 0, quick=True, options={"known": 11})
    with pytest.raises(ValueError, match="known must be 2 to 10 classes, got 11"):
        run([endless, wrong], tmp_path, jobs=2, **QUIET)
    assert not workers(psutil.Process())
    assert read_rows(tmp_path) == []


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_was_killed_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "_run_cell", killed)
    words = (
        "a process that trains was killed, perhaps for want of memory: the same command goes on, and fewer --jobs take "
        "less"
    )
    with pytest.raises(ChildProcessError, match=f"^{words}$"):
        run(cells(), tmp_path, jobs=2, **QUIET)
    assert not workers(psutil.Process())
    assert read_rows(tmp_path) == []


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_process_reports_what_was_run(whole, monkeypatch, rank):
    asked, written, console = [], [], Console(quiet=True)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(compare, "side_by_side", lambda: 4)
    monkeypatch.setattr(compare, "run", lambda *given, **options: asked.append((given, options)))
    monkeypatch.setattr(compare.report, "write", lambda *given: written.append(given))
    run_and_report({SHARED: cells(), TUNED: []}, whole, console=console, tracker="tensorboard")
    assert asked == [((cells(), whole), {"console": console, "jobs": 4, "tracker": "tensorboard"})]
    assert written == ([(whole, {SHARED: read_rows(whole)}, console)] if rank == "0" else [])


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


def test_selective_training_has_a_row_and_times_of_its_own(tmp_path):
    found = cells(seeds=1, epochs=4, batch_size=16, model="small-gn", selective=True)
    run_and_report({SHARED: found}, tmp_path, jobs=1, **QUIET)
    rows = {row["loss"]: row for row in read_rows(tmp_path) if row["metric"] == "accuracy"}
    assert list(rows) == ["ce", "hem", "hem selective"]
    history = {loss: read_curves(tmp_path)[row["cell"]]["history"] for loss, row in rows.items()}
    assert [epoch["selected"] for epoch in history["hem"]] == [1] * 4
    assert 0 < history["hem selective"][-1]["selected"] < 0.6
    report = (tmp_path / "report.md").read_text()
    seconds = {loss: sum(epoch["seconds"] for epoch in epochs) for loss, epochs in history.items()}
    for loss in rows:
        assert re.search(rf"^\| {loss} \|.* {seconds[loss] / seconds['ce']:.2f} \|$", report, re.MULTILINE), loss
    assert len(list(tmp_path.glob("models/*"))) == 3


def test_the_lines_of_a_cell(tmp_path, monkeypatch):
    (cell,) = cells(losses=["hem"], seeds=1, sweep={"margin": [0.5]}, mixed_precision="bf16")
    plain = dict.fromkeys(("active", "kept", "logit_gap", "logit_scale", "train_accuracy"), 0.5)
    epochs = [Epoch(train_loss, **plain, seconds=0.25, loss_seconds=train_loss / 16) for train_loss in (1.0, 2.0)]
    picture, benches, asked, ended = torch.rand(2, 1, 4, 4), [], [], []

    def run_task(bench):
        benches.append(bench)
        bench.history += epochs
        bench.pictures["images"] = picture
        for epoch in epochs:
            bench.after_epoch(epoch)
        return {"accuracy": 0.75, "ece": float("nan")}

    def accelerator(*given):
        asked.append(given)
        return made

    made = make_accelerator()

    monkeypatch.setattr(TASKS["classification"], "run", run_task)
    monkeypatch.setattr(compare, "_accelerator", accelerator)
    clock = iter([10.0, 12.34567])
    monkeypatch.setattr(compare, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    lines = compare._run_cell(cell, tmp_path, None, 5, ended.append)
    monkeypatch.undo()
    assert asked == [("bf16", None, tmp_path)]
    assert [(bench.cell, bench.folder, bench.num_workers) for bench in benches] == [(cell, tmp_path / "models", 5)]
    assert benches[0].accelerator is made
    assert ended == epochs
    names = {"cell": cell.key, "task": "classification", "loss": "hem margin=0.5", "seed": 0}
    assert lines["curves"] == [{**names, "history": [asdict(epoch) for epoch in epochs]}]
    about = {
        **names,
        "settings": cell.settings(),
        "seconds": 2.346,
        "loss_share": 3 / 8,
        "torch": torch.__version__,
        "hem_ext": hem_ext.__version__,
        "device": str(make_accelerator().device),
        "machine": platform.machine(),
        "of": 2,
    }
    accuracy, ece = lines["results"]
    assert math.isnan(ece.pop("value"))
    assert [accuracy, ece] == [{**about, "metric": "accuracy", "value": 0.75}, {**about, "metric": "ece"}]
    kept = torch.load(tmp_path / "pictures" / f"{cell.key}.pt")
    assert kept.keys() == {"images"}
    assert torch.equal(kept["images"], picture)


def test_an_accelerator_is_of_a_precision_and_a_tracker(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(compare, "make_accelerator", lambda **options: asked.append(options))
    compare._accelerator.cache_clear()
    for given in (("bf16", None), ("bf16", None), (None, "tensorboard")):
        compare._accelerator(*given, tmp_path)
    compare._accelerator.cache_clear()
    tracked = {"mixed_precision": None, "log_with": "tensorboard", "project_dir": tmp_path}
    assert asked == [{"mixed_precision": "bf16"}, tracked]


def test_every_cell_of_a_sweep_has_its_own_curves_in_tensorboard(tmp_path):
    run(cells(losses=["ce"], seeds=1, sweep={"max_lr": [0.01, 0.1]}), tmp_path, tracker="tensorboard", **QUIET)
    folders = [file.parent for file in tmp_path.glob("tensorboard/**/events.out.tfevents.*")]
    assert len(folders) == len(set(folders)) == 2
    (cell,) = cells(losses=["hem"], seeds=1, sweep={"margin": [0.5]})
    run([cell], tmp_path, tracker="tensorboard", **QUIET)
    (folder,) = {file.parent for file in tmp_path.glob("tensorboard/**/events.out.tfevents.*")} - set(folders)
    assert folder == tmp_path / "tensorboard" / "classification" / "hem_margin=0.5" / f"seed-0-{cell.key}"


def test_two_processes_give_the_table_of_one(whole, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = subprocess.run(command(tmp_path, *launcher), capture_output=True, text=True, check=False, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert numbers(tmp_path) == numbers(whole)
    assert curves(tmp_path) == curves(whole)
    assert curve_files(tmp_path) == {"curves.jsonl": 4}
    assert sorted(p.name for p in tmp_path.glob("results*")) == ["results.jsonl"]
    # Both trained a share, and the first alone reports, on all of it.
    assert done.stdout.count("wrote ") == 1
    report = (tmp_path / "report.md").read_text()
    for loss in ("ce", "hem"):
        assert re.search(rf"^\| {loss} \|.* ± ", report, re.MULTILINE), loss  # two seeds


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
