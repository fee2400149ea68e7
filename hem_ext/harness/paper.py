"""What ``hem-ext paper`` compares: every task on the bundled data, under two protocols.

The settings of the second protocol were chosen by validation with ``hem-ext paper --tune``; they lie beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from hem_ext.harness import compare, report, understanding
from hem_ext.harness.compare import Tuned, make_cells, rows_of, tuned_cells
from hem_ext.harness.tasks import TASKS, Cell
from hem_ext.harness.tune import FILE, Grid, read_tuned, tune_grids

SEEDS, FEWER = 10, 5
TUNED_FILE = Path(__file__).with_name(FILE)

MAIN: Mapping[str, Sequence[str]] = {
    "classification": ("ce", "hem", "ce-ls"),
    "corruption": ("ce", "hem", "ce-ls"),
    "ood": ("ce", "hem", "logitnorm"),
    "adversarial": ("ce", "hem", "mm"),
    "imbalanced": ("ce", "hem", "hem+", "logit-adjusted"),
    "continual": ("ce", "hem", "hem+", "mm"),
    "segmentation": ("ce", "hem", "hem+", "dice"),
}
"""Task -> the losses that get all seeds: cross-entropy, HEM, and the rival that is expected to be the strongest. On
balanced classes hem+ is hem."""

TOTALS = [31.25, 125, 500, 2000]  # of HEM's rule: margins of 1/8 to 1 times the paper's
RATES = [0.03, 0.1, 0.3, 0.6, 1.0]
RATES_OF_STAGES = [0.03, 0.1, 0.3]
RATES_OF_SCENES = [0.02, 0.05, 0.1, 0.2, 0.4, 0.8]

# In the order in which they are run; corruption is not among them, for its losses are at their best on clean images.
GRIDS: Sequence[tuple[str, str, int, Grid]] = (
    ("classification", "ce", 2, {"max_lr": RATES}),
    ("classification", "ce-ls", 2, {"max_lr": RATES, "alpha": [0.05, 0.1]}),
    ("classification", "hem", 2, {"max_lr": RATES, "total": TOTALS}),
    ("ood", "ce", 2, {"max_lr": RATES}),
    ("ood", "logitnorm", 2, {"max_lr": RATES, "tau": [0.04, 0.1]}),
    ("ood", "hem", 2, {"max_lr": RATES, "total": TOTALS}),
    ("imbalanced", "ce", 2, {"max_lr": RATES}),
    ("imbalanced", "logit-adjusted", 2, {"max_lr": RATES, "tau": [0.5, 1]}),
    ("imbalanced", "hem", 2, {"max_lr": RATES, "total": TOTALS}),
    ("imbalanced", "hem+", 2, {"max_lr": RATES, "total": TOTALS}),
    ("adversarial", "ce", 2, {"max_lr": RATES}),
    ("adversarial", "mm", 2, {"max_lr": RATES, "margin": [0.2, 1]}),
    ("adversarial", "hem", 2, {"max_lr": RATES, "total": TOTALS}),
    ("continual", "ce", 1, {"max_lr": RATES_OF_STAGES}),
    ("continual", "mm", 1, {"max_lr": RATES_OF_STAGES}),
    ("continual", "hem", 1, {"max_lr": RATES_OF_STAGES, "total": TOTALS}),
    ("continual", "hem+", 1, {"max_lr": RATES_OF_STAGES, "total": TOTALS}),
    ("segmentation", "ce", 2, {"max_lr": [0.1, 0.2, 0.4, 0.8, 1.6]}),
    ("segmentation", "dice", 1, {"max_lr": RATES_OF_SCENES}),
    ("segmentation", "hem", 1, {"max_lr": RATES_OF_SCENES, "margin": [0.1, 0.2, 0.5, 1]}),
    ("segmentation", "hem+", 1, {"max_lr": RATES_OF_SCENES, "total": [31.25, 125, 500]}),
)
"""Task, loss, seeds, and setting -> values to try."""


def protocols(*, quick: bool = False, seeds: int | None = None, tuned: Tuned | None = None) -> dict[str, list[Cell]]:
    """The cells of both protocols.

    Args:
        quick: short schedules on small images, the main losses alone, to see that everything runs.
        seeds: at most so many, of every loss.
        tuned: settings of the second protocol, those beside this file if None. A loss that nothing was chosen for is
            not in it.
    """
    tuned = read_tuned(TUNED_FILE) if tuned is None else tuned
    shared: list[Cell] = []
    for task in TASKS:
        for loss in MAIN[task] if quick else dict.fromkeys((*MAIN[task], *TASKS[task].losses)):
            most = 2 if quick else SEEDS if loss in MAIN[task] else FEWER
            shared += make_cells([task], losses=[loss], seeds=min(most, seeds or most), quick=quick)
    chosen = [cell for cell in shared if cell.loss in tuned.get(cell.task, {})]
    return {report.SHARED: shared, report.TUNED: tuned_cells(chosen, tuned)}


def margin_cells(*, quick: bool = False, seeds: int | None = None) -> list[Cell]:
    """Rejection with HEM at several margins."""
    return make_cells(["ood"], losses=["hem"], sweep={"total": TOTALS}, seeds=min(3, seeds or 3), quick=quick)


def run(output: Path, *, quick: bool = False, seeds: int | None = None, tune: bool = False, jobs: int = 1) -> None:
    """Run what is not finished; write the report, and the pictures of :mod:`hem_ext.harness.understanding`.

    Args:
        output: the folder of the comparison.
        quick, seeds: as in :func:`protocols`.
        tune: choose the settings of the second protocol first.
        jobs: cells side by side.
    """
    tuned = choose(output, jobs=jobs) if tune else None
    found = protocols(quick=quick, seeds=seeds, tuned=tuned)
    margins = margin_cells(quick=quick, seeds=seeds)
    compare.run(margins, output, jobs=jobs)
    compare.run_and_report(found, output, jobs=jobs)
    if compare.is_first_process():
        understanding.draw(output, rows_of(found[report.SHARED], output), rows_of(margins, output))


def choose(output: Path, *, jobs: int = 1, console: Console | None = None) -> Tuned:
    """Run every grid on validation, in `output`; what was chosen, which is written to `output`/tuned.json.

    In the folder of the comparison, networks that both need are trained once.
    """
    cells = [
        (make_cells([task], losses=[loss], seeds=seeds, sweep=grid, part="validation"), grid)
        for task, loss, seeds, grid in GRIDS
    ]
    return tune_grids(cells, output, jobs=jobs, console=console)
