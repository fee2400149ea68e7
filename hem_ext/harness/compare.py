"""Every task with every loss and every seed: a matrix that is run once, and goes on after it was killed."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import hem_ext
from hem_ext.harness import report
from hem_ext.harness.losses import LOSSES
from hem_ext.harness.tasks import TASKS, Cell, Workbench
from hem_ext.harness.tasks.base import digest
from hem_ext.harness.training import make_accelerator, write_whole


def make_cells(
    tasks: Sequence[str],
    *,
    losses: Sequence[str] | None = None,
    seeds: int = 5,
    quick: bool = False,
    sweep: Mapping[str, Sequence[float]] | None = None,
    **given: Any,
) -> list[Cell]:
    """The matrix: every task with every loss, every value of a sweep and every seed.

    Args:
        tasks, losses: by name; None takes the losses that each task compares by itself.
        seeds: 0 to that.
        quick: short schedules, to see that everything runs.
        sweep: values of a constant, for the losses that have it: ``{"margin": [0.1, 0.5]}``. Other losses run once.
        given: what is the same for every cell, see :meth:`hem_ext.harness.tasks.Task.cell`.

    Raises:
        ValueError: an unknown task or loss, or a constant that none of the losses has.
    """
    for name, known in [*((task, TASKS) for task in tasks), *((loss, LOSSES) for loss in losses or ())]:
        if name not in known:
            kind = "task" if known is TASKS else "loss"
            raise ValueError(f"unknown {kind} {name!r}: one of {', '.join(known)}")
    cells = {}
    swept = set()
    for task in tasks:
        for loss in losses or TASKS[task].losses:
            variants: list[dict[str, float]] = [{}]
            for constant, values in (sweep or {}).items():
                if constant in LOSSES[loss].constants():
                    swept.add(constant)
                    variants = [{**variant, constant: value} for variant in variants for value in values]
            for constants in variants:
                for seed in range(seeds):
                    cell = TASKS[task].cell(loss, seed, quick=quick, constants=constants, **given)
                    cells[cell.key] = cell
    unused = sorted(set(sweep or {}) - swept)
    if unused:
        raise ValueError(f"no loss of this comparison has a constant {', '.join(unused)}")
    return list(cells.values())


def run(
    cells: Sequence[Cell],
    output: Path,
    *,
    console: Console | None = None,
    tracker: str | None = None,
    num_workers: int = 0,
) -> None:
    """Run the cells that are not finished; write `output`/results.jsonl, report.md and pictures; print the tables.

    A finished cell is never run again. Killed at any moment, the same call goes on from the last checkpoint and ends
    with the same numbers. Under ``torchrun`` or ``accelerate launch`` each process takes a share of the cells.

    Args:
        cells: see :func:`make_cells`; all of the same precision.
        output: the folder of this comparison. What it holds of other cells stays.
        console: to write to.
        tracker: ``"tensorboard"`` writes the learning curves to `output`/tensorboard.
        num_workers: processes that load images, for each of the processes that train.
    """
    console = console or Console()
    output.mkdir(parents=True, exist_ok=True)
    with _spread_over_processes() as (rank, processes, wait):
        if rank == 0:
            _gather(output)
        wait()
        mine = _deal(cells, rank, processes)
        done = finished(output)
        todo = [cell for cell in mine if cell.key not in done]
        if rank == 0 and len(todo) < len(mine):
            console.print(f"{len(mine) - len(todo)} of {len(mine)} cells are in {output} already")
        (precision,) = {cell.mixed_precision for cell in cells}
        options: dict[str, Any] = {"mixed_precision": precision}
        if tracker is not None:
            options |= {"log_with": tracker, "project_dir": output}
        accelerator = make_accelerator(**options)
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=rank != 0) as progress:
            # In epochs: a cell may train for much longer than the next one.
            bar = progress.add_task("", total=sum(TASKS[cell.task].epochs(cell) for cell in todo))
            for cell in todo:
                progress.update(bar, description=f"{cell.task}, {cell.variant}, seed {cell.seed}")
                end = progress.tasks[0].completed + TASKS[cell.task].epochs(cell)
                if tracker is not None:
                    name = f"{cell.task}/{cell.variant.replace(' ', '_')}/seed-{cell.seed}"
                    accelerator.init_trackers(f"tensorboard/{name}")
                bench = Workbench(
                    cell, output / "models", accelerator, lambda _: progress.advance(bar), num_workers=num_workers
                )
                _run_cell(bench, output, rank)
                if tracker is not None:
                    accelerator.end_training()
                progress.update(bar, completed=end)
        wait()
    if rank == 0:
        _gather(output)
        report.write(output, [row for row in read_rows(output) if row["cell"] in {cell.key for cell in cells}], console)


def _deal(cells: Sequence[Cell], rank: int, processes: int) -> list[Cell]:
    """A process's share: those that may share a trained network go to the same one."""
    networks = [digest(cell.training) for cell in cells]
    order = {network: i for i, network in enumerate(dict.fromkeys(networks))}
    return [cell for cell, network in zip(cells, networks, strict=True) if order[network] % processes == rank]


def _run_cell(bench: Workbench, output: Path, rank: int) -> None:
    begin, cell = time.perf_counter(), bench.cell
    values = TASKS[cell.task].run(bench)
    about = {
        "cell": cell.key,
        "task": cell.task,
        "loss": cell.variant,
        "seed": cell.seed,
        "settings": cell.settings(),
        "seconds": round(time.perf_counter() - begin, 3),
        "loss_share": sum(e.loss_seconds for e in bench.history) / max(sum(e.seconds for e in bench.history), 1e-9),
        "torch": torch.__version__,
        "hem_ext": hem_ext.__version__,
        "device": str(bench.accelerator.device),
        "machine": platform.machine(),
        "of": len(values),  # lines of this cell: fewer, and it was cut off
    }
    if bench.pictures:
        write_whole(output / "pictures" / f"{cell.key}.pt", lambda path: torch.save(bench.pictures, path))
    curves = json.dumps({**about, "history": [asdict(epoch) for epoch in bench.history]})
    write_whole(output / "curves" / f"{cell.key}.json", lambda path: path.write_text(curves, encoding="utf-8"))
    lines = [json.dumps({**about, "metric": name, "value": value}) + "\n" for name, value in values.items()]
    with _results(output, rank).open("a", encoding="utf-8") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())


# --- rows on disk ---------------------------------------------------------------------------------------------


def _results(output: Path, rank: int) -> Path:
    """Where a process writes: each to a file of its own, the first to that which keeps all."""
    return output / ("results.jsonl" if rank == 0 else f"results-{rank}.jsonl")


def _lines(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off by a kill: its cell is short of a line, and is run again


def read_rows(output: Path) -> list[dict[str, Any]]:
    """The rows of every cell in `output` that is finished, one per metric, in the order in which they ended."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for row in _lines(sorted(output.glob("results*.jsonl"))):
        cells.setdefault(row["cell"], {})[row["metric"]] = row
    return [row for rows in cells.values() if len(rows) == next(iter(rows.values()))["of"] for row in rows.values()]


def finished(output: Path) -> set[str]:
    """The keys of these cells."""
    return {row["cell"] for row in read_rows(output)}


def _gather(output: Path) -> None:
    """One file with whole cells only, instead of one per process and what a kill cut off."""
    text = "".join(json.dumps(row) + "\n" for row in read_rows(output))
    write_whole(output / "results.jsonl", lambda path: path.write_text(text, encoding="utf-8"))
    for path in output.glob("results-*.jsonl"):
        path.unlink()


@contextmanager
def _spread_over_processes() -> Iterator[tuple[int, int, Callable[[], object]]]:
    """This process's number, how many there are, and a barrier. Inside, each is by itself, on a device of its own.

    A cell is too small to be worth sharing, and one that is not shared gives the same bits as in a single process.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        yield 0, 1, lambda: None
        return
    rank = int(os.environ["RANK"])
    # The process that is done first waits for the others' last cells.
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    if torch.cuda.is_available():
        torch.cuda.set_device(int(hidden.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        yield rank, processes, torch.distributed.barrier
    finally:
        os.environ.update(hidden)
        torch.distributed.destroy_process_group()
