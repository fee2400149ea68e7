"""Every task with every loss and every seed: a matrix that is run once, and goes on after it was killed."""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from threadpoolctl import threadpool_limits

import hem_ext
from hem_ext.harness import report
from hem_ext.harness.lock import only_one
from hem_ext.harness.losses import LOSSES
from hem_ext.harness.losses.hem import HEM
from hem_ext.harness.report.results import read_curves, read_lines
from hem_ext.harness.tasks import TASKS, Cell, Workbench
from hem_ext.harness.tasks.base import SCHEDULE_SETTINGS, digest
from hem_ext.harness.training import Epoch, make_accelerator, write_whole, writing

Tuned = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Task -> loss -> setting -> value."""

Lines = Mapping[str, Sequence[Mapping[str, Any]]]
"""What a cell leaves: its line for ``"curves"``, and its rows, one per metric, for ``"results"``."""


def make_cells(
    tasks: Sequence[str],
    *,
    losses: Sequence[str] | None = None,
    seeds: int = 5,
    quick: bool = False,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    selective: bool = False,
    fused_upsample: bool = False,
    **given: Any,
) -> list[Cell]:
    """The matrix: every task with every loss, every value of a sweep and every seed.

    Args:
        tasks, losses: by name; None takes the losses that each task compares by itself.
        seeds: 0 to that.
        quick: short schedules, to see that everything runs.
        sweep: values of settings, in every combination: of a field of the schedule, or of a constant, for the losses
            that have it; ``{"max_lr": [0.1, 0.3], "margin": [0.1, 0.5]}``.
        selective: HEM's losses are trained selectively too, beside plainly.
        fused_upsample: HEM's losses interpolate the logits of pixels themselves; the others' networks do.
        given: what is the same for every cell, see :meth:`hem_ext.harness.tasks.Task.cell`.

    Raises:
        ValueError: an unknown task or loss, a setting that neither the schedule nor any of the losses has, or
            `selective` or `fused_upsample` without a loss of HEM's.
    """
    for name, known in [*((task, TASKS) for task in tasks), *((loss, LOSSES) for loss in losses or ())]:
        if name not in known:
            kind = "task" if known is TASKS else "loss"
            raise ValueError(f"unknown {kind} {name!r}: one of {', '.join(known)}")
    cells = {}
    swept = set()
    for task in tasks:
        for loss in losses or TASKS[task].losses:
            mine = {name: values for name, values in (sweep or {}).items() if _has(loss, name)}
            swept |= mine.keys()
            for values in itertools.product(*mine.values()):
                settings = dict(zip(mine, values, strict=True))
                for seed in range(seeds):
                    how = {"fused_upsample": fused_upsample and _is_hem(loss)}
                    cell = TASKS[task].cell(loss, seed, quick=quick, **how, **given)
                    cell = cell.with_settings(settings)
                    twins = [cell, replace(cell, selective=True)] if selective and _is_hem(loss) else [cell]
                    cells |= {twin.key: twin for twin in twins}
    if selective and not any(cell.selective for cell in cells.values()):
        raise ValueError("nothing is trained selectively without hem or hem+, which are not in this comparison")
    if fused_upsample and not any(cell.fused_upsample for cell in cells.values()):
        raise ValueError("nothing is upsampled by its loss without hem or hem+, which are not in this comparison")
    unused = sorted(set(sweep or {}) - swept)
    if unused:
        known = ", ".join(SCHEDULE_SETTINGS)
        raise ValueError(f"neither the schedule ({known}) nor a loss of this comparison has {', '.join(unused)}")
    return list(cells.values())


def _is_hem(loss: str) -> bool:
    return issubclass(LOSSES[loss], HEM)


def _has(loss: str, setting: str) -> bool:
    return setting in SCHEDULE_SETTINGS or setting in LOSSES[loss].constants()


def tuned_cells(cells: Iterable[Cell], tuned: Tuned) -> list[Cell]:
    """Each cell with its loss's own settings on its task, and as it is where nothing was chosen.

    Args:
        cells: see :func:`make_cells`.
        tuned: what :func:`hem_ext.harness.tune.tune` chose.
    """
    return [cell.with_settings(tuned.get(cell.task, {}).get(cell.loss, {})) for cell in cells]


def side_by_side() -> int:
    """How many cells to train at a time: one for every core, for they are small; one where there is an accelerator."""
    if torch.accelerator.is_available() or "WORLD_SIZE" in os.environ:
        return 1
    return len(os.sched_getaffinity(0))


def is_first_process() -> bool:
    """Whether this is the one process, or of those that torchrun or accelerate launch started the one that writes."""
    return os.environ.get("RANK", "0") == "0"


def run(
    cells: Sequence[Cell],
    output: Path,
    *,
    console: Console | None = None,
    tracker: str | None = None,
    num_workers: int = 0,
    jobs: int = 1,
) -> None:
    """Run the cells that are not finished; add their rows to `output`/results.jsonl, their epochs to curves.jsonl.

    A finished cell is never run again. Killed at any moment, the same call goes on from the last checkpoint and ends
    with the same numbers. Under ``torchrun`` or ``accelerate launch`` each process takes a share of the cells.

    Args:
        cells: see :func:`make_cells`; all of the same precision.
        output: the folder of this comparison. What it holds of other cells stays.
        console: to write to.
        tracker: ``"tensorboard"`` writes the learning curves to `output`/tensorboard.
        num_workers: processes that load images, for each of the processes that train.
        jobs: with more than one, cells run side by side in that many processes of one thread each. They give other
            bits than this process does with several threads, but the same on any number of cores.

    Raises:
        ValueError: another process is at work in `output`.
        ChildProcessError: one of the processes of `jobs` was killed.
    """
    console = console or Console()
    with only_one(output), _spread_over_processes() as (rank, processes, wait):
        if rank == 0:
            _gather(output)
        wait()
        mine = _deal(cells, rank, processes)
        done = finished(output)
        todo = [cell for cell in mine if cell.key not in done]
        kept = sum(cell.key in done for cell in cells)
        if rank == 0 and kept:
            console.print(f"{kept} of {len(cells)} cells are in {output} already")
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=rank != 0) as progress:
            # In epochs: a cell may train for much longer than the next one.
            bar = progress.add_task("", total=sum(TASKS[cell.task].epochs(cell) for cell in todo))
            settings = (output, tracker, num_workers)
            if jobs > 1 and todo:
                for cell, lines in _run_side_by_side(todo, jobs, settings):
                    _append(output, rank, lines)
                    progress.update(bar, description=_described(cell), advance=TASKS[cell.task].epochs(cell))
            else:
                for cell in todo:
                    progress.update(bar, description=_described(cell))
                    end = progress.tasks[0].completed + TASKS[cell.task].epochs(cell)
                    _append(output, rank, _run_cell(cell, *settings, lambda _: progress.advance(bar)))
                    progress.update(bar, completed=end)
        wait()
        if rank == 0:
            _gather(output)
        wait()


def run_and_report(
    protocols: Mapping[str, Sequence[Cell]],
    output: Path,
    *,
    console: Console | None = None,
    jobs: int | None = None,
    **options: Any,
) -> None:
    """Run the cells of all protocols; write `output`/report.md and pictures, and print the tables.

    Args:
        protocols: a name, as :mod:`hem_ext.harness.report` has it, and the cells that are compared under it; a cell
            may belong to both.
        output, console: as in :func:`run`.
        jobs: as in :func:`run`; :func:`side_by_side` if None.
        options: the others of :func:`run`.
    """
    console = console or Console()
    cells = {cell.key: cell for of_protocol in protocols.values() for cell in of_protocol}
    run(list(cells.values()), output, console=console, jobs=jobs or side_by_side(), **options)
    if is_first_process():
        rows = {name: rows_of(found, output) for name, found in protocols.items() if found}
        report.write(output, rows, console)


def rows_of(cells: Iterable[Cell], output: Path) -> list[dict[str, Any]]:
    """The rows in `output` of those of the cells that are finished."""
    keys = {cell.key for cell in cells}
    return [row for row in read_rows(output) if row["cell"] in keys]


def _described(cell: Cell) -> str:
    return f"{cell.task}, {cell.variant}, seed {cell.seed}"


def _deal(cells: Sequence[Cell], rank: int, processes: int) -> list[Cell]:
    """A process's share: those that may share a trained network go to the same one."""
    networks = [digest([*cell.training, cell.loss, cell.constants]) for cell in cells]
    order = {network: i for i, network in enumerate(dict.fromkeys(networks))}
    return [cell for cell, network in zip(cells, networks, strict=True) if order[network] % processes == rank]


def _run_side_by_side(cells: Sequence[Cell], jobs: int, settings: tuple[Any, ...]) -> Iterator[tuple[Cell, Lines]]:
    """The cells as they end, each with its lines."""
    context = multiprocessing.get_context("spawn")
    workers_end, own_end = context.Pipe(duplex=False)
    with ProcessPoolExecutor(
        min(jobs, len(cells)), mp_context=context, initializer=_work_alone, initargs=(workers_end,)
    ) as pool:
        running = {pool.submit(_run_cell, cell, *settings): cell for cell in cells}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BaseException as error:
            own_end.close()
            if isinstance(error, BrokenProcessPool):
                raise ChildProcessError(
                    "a process that trains was killed, perhaps for want of memory: the same command goes on, and "
                    "fewer --jobs take less"
                ) from error
            raise


def _work_alone(parent: Connection) -> None:
    """One thread, and an end as soon as the process that it works for closes its end of a pipe, or ends itself."""
    torch.set_num_threads(1)
    threadpool_limits(1)

    def end_with_parent() -> None:
        with suppress(EOFError):
            parent.recv()  # nothing is ever sent
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _run_cell(
    cell: Cell,
    output: Path,
    tracker: str | None,
    num_workers: int,
    after_epoch: Callable[[Epoch], object] = lambda epoch: None,
) -> Lines:
    """Train and measure; the lines for curves.jsonl and results.jsonl."""
    begin = time.perf_counter()
    accelerator = _accelerator(cell.mixed_precision, tracker, output)
    if tracker is not None:
        # Cells of one variant and seed may still differ in their schedules: the key tells them apart.
        folder = f"tensorboard/{cell.task}/{cell.variant.replace(' ', '_')}/seed-{cell.seed}-{cell.key}"
        accelerator.init_trackers(folder)
    bench = Workbench(cell, output / "models", accelerator, after_epoch, num_workers=num_workers)
    values = TASKS[cell.task].run(bench)
    if tracker is not None:
        accelerator.end_training()
        accelerator.trackers.clear()  # or the curves of the next cell would join those of this one
    names = {"cell": cell.key, "task": cell.task, "loss": cell.variant, "seed": cell.seed}
    about = {
        **names,
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
    return {
        "curves": [{**names, "history": [asdict(epoch) for epoch in bench.history]}],
        "results": [{**about, "metric": name, "value": value} for name, value in values.items()],
    }


@functools.lru_cache(maxsize=1)
def _accelerator(precision: str | None, tracker: str | None, output: Path) -> Accelerator:
    options = {} if tracker is None else {"log_with": tracker, "project_dir": output}
    return make_accelerator(mixed_precision=precision, **options)


# --- rows and curves on disk ----------------------------------------------------------------------------------


def _append(output: Path, rank: int, lines: Lines) -> None:
    """Add the lines of a cell, those that make it finished last.

    Each process writes to files of its own, the first to those which keep all.
    """
    for kind in ("curves", "results"):
        name = f"{kind}.jsonl" if rank == 0 else f"{kind}-{rank}.jsonl"
        with writing(output / name), (output / name).open("a", encoding="utf-8") as file:
            file.write(_text(kind, lines[kind]))
            file.flush()
            os.fsync(file.fileno())


def _text(kind: str, lines: Iterable[Mapping[str, Any]]) -> str:
    # Epochs are many, and read by programs alone.
    separators = (",", ":") if kind == "curves" else None
    return "".join(json.dumps(line, separators=separators) + "\n" for line in lines)


def read_rows(output: Path) -> list[dict[str, Any]]:
    """The rows of every cell in `output` that is finished, one per metric, in the order in which they ended."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for row in read_lines(output, "results"):
        cells.setdefault(row["cell"], {})[row["metric"]] = row
    return [row for rows in cells.values() if len(rows) == next(iter(rows.values()))["of"] for row in rows.values()]


def finished(output: Path) -> set[str]:
    """The keys of these cells."""
    return {row["cell"] for row in read_rows(output)}


def _gather(output: Path) -> None:
    """One file of rows and one of curves with whole cells only, instead of one per process and what a kill cut off."""
    rows = read_rows(output)
    whole = {row["cell"] for row in rows}
    curves = [line for key, line in read_curves(output).items() if key in whole]
    for kind, lines in (("curves", curves), ("results", rows)):
        text = _text(kind, lines)
        write_whole(output / f"{kind}.jsonl", lambda path, text=text: path.write_text(text, encoding="utf-8"))
        for path in output.glob(f"{kind}-*.jsonl"):
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
