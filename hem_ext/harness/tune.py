"""Settings chosen by validation: a grid for every loss, run like a comparison, and the best of it kept in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from hem_ext.harness import report
from hem_ext.harness.compare import Tuned, is_first_process, make_cells, rows_of, run
from hem_ext.harness.tasks import TASKS, Cell
from hem_ext.harness.training import in_short, write_whole

FILE = "tuned.json"
Grid = Mapping[str, Sequence[Any]]
"""Setting -> values to try."""


def tune(
    tasks: Sequence[str],
    grid: Grid,
    output: Path,
    *,
    losses: Sequence[str] | None = None,
    seeds: int = 2,
    console: Console | None = None,
    jobs: int = 1,
    num_workers: int = 0,
    **given: Any,
) -> Tuned:
    """Run the grid on validation; write `output`/tuned.json and a picture of every task's grid; return what was chosen.

    Resumes as :func:`hem_ext.harness.compare.run` does. What tuned.json holds of other tasks and losses stays.

    Args:
        tasks, losses, seeds, given: as in :func:`hem_ext.harness.compare.make_cells`.
        grid: setting -> values, tried in every combination; a constant, by the losses that have it alone.
        output, console, jobs, num_workers: as in :func:`hem_ext.harness.compare.run`.

    Raises:
        ValueError: a setting that neither the schedule nor any of the losses has, or a tuned.json that is damaged.
    """
    cells = make_cells(tasks, losses=losses, seeds=seeds, sweep=grid, part="validation", **given)
    return tune_grids([(cells, grid)], output, console=console, jobs=jobs, num_workers=num_workers)


def tune_grids(
    grids: Iterable[tuple[Sequence[Cell], Grid]], output: Path, *, console: Console | None = None, **options: Any
) -> Tuned:
    """What :func:`tune` does, of several grids in one run: each of them is of tasks and losses of its own.

    Args:
        grids: the cells of each and what they try, see :func:`hem_ext.harness.compare.make_cells`.
        output, console, options: as in :func:`hem_ext.harness.compare.run`.
    """
    console = console or Console()
    before = _read(output / FILE) if (output / FILE).exists() else {}
    grids = list(grids)
    run([cell for cells, _ in grids for cell in cells], output, console=console, **options)
    chosen: dict[str, dict[str, dict[str, Any]]] = {}
    drawn: dict[str, list[dict[str, Any]]] = {}
    for cells, grid in grids:
        rows = rows_of(cells, output)
        for task in dict.fromkeys(cell.task for cell in cells):
            of_task = [row for row in rows if row["task"] == task]
            found = choose(of_task, grid)
            chosen.setdefault(task, {}).update(found)
            drawn.setdefault(task, []).extend(of_task)
            for loss in found if is_first_process() else ():
                console.print(f"{task}, {loss}: {_described(found[loss], grid)}", highlight=False)
    merged = {task: {**before.get(task, {}), **chosen.get(task, {})} for task in {**before, **chosen}}
    if is_first_process():
        for task, rows in drawn.items():
            report.draw_grid(output, task, rows, settings_of(chosen)[task])
        text = json.dumps(merged, indent=1) + "\n"
        write_whole(output / FILE, lambda path: path.write_text(text, encoding="utf-8"))
        console.print(f"wrote {output / FILE}", highlight=False, soft_wrap=True)
    return settings_of(merged)


def read_tuned(path: Path) -> Tuned:
    """What a tuned.json says.

    Raises:
        ValueError: a file that is not one.
    """
    return settings_of(_read(path))


def _read(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        settings_of(found)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a file that hem-ext tune has written: {in_short(error)}") from error
    return found


def settings_of(chosen: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Tuned:
    """The settings alone, without how they did."""
    return {
        task: {loss: dict(found["settings"]) for loss, found in by_loss.items()} for task, by_loss in chosen.items()
    }


def choose(rows: Iterable[Mapping[str, Any]], grid: Grid) -> dict[str, dict[str, Any]]:
    """Of one task, every loss's best settings by the mean over seeds of the task's first metric on validation.

    A setting with a seed that is NaN is never chosen unless all have one; of settings that tie, the first is.

    Args:
        rows: of the grid's cells.
        grid: as in :func:`tune`.

    Returns:
        Loss -> ``{"settings": {name: value}, "metric": name, "validation": mean, "seeds": n, "tried": n}``.
    """
    values: dict[str, dict[tuple[tuple[str, Any], ...], list[float]]] = {}
    metric = None
    for row in rows:
        metric = next(iter(TASKS[row["task"]].metrics))
        if row["metric"] == metric:
            settings = row["settings"]
            of_cell = {**settings["schedule"], **settings["constants"]}
            key = tuple((name, of_cell[name]) for name in grid if name in of_cell)
            values.setdefault(settings["loss"], {}).setdefault(key, []).append(row["value"])
            higher = TASKS[row["task"]].metrics[metric].higher_is_better
    chosen = {}
    for loss, by_settings in values.items():
        # In the order of the grid, whatever the order in which the cells ended.
        ordered = sorted(by_settings, key=lambda key: [list(grid[name]).index(value) for name, value in key])
        scores = [float(np.mean(by_settings[key])) * (1 if higher else -1) for key in ordered]
        best = max(range(len(ordered)), key=lambda i: -math.inf if math.isnan(scores[i]) else scores[i])
        found = by_settings[ordered[best]]
        chosen[loss] = {
            "settings": dict(ordered[best]),
            "metric": metric,
            "validation": float(np.mean(found)),
            "seeds": len(found),
            "tried": len(ordered),
        }
    return chosen


def _described(found: Mapping[str, Any], grid: Grid) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in found["settings"].items()) or "nothing to choose"
    # A best value at an end of a row of numbers may have a better one beyond.
    ends = [
        name
        for name, value in found["settings"].items()
        if len(grid[name]) > 2 and not isinstance(value, str) and value in (min(grid[name]), max(grid[name]))
    ]
    edge = f"; at the end of the grid: {', '.join(ends)}" if ends else ""
    tried = f"{found['tried']} tried with {found['seeds']} seeds each"
    return f"{settings} ({found['metric']} {found['validation']:.4f} on validation, {tried}{edge})"
