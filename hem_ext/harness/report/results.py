"""Rows of finished cells as results: what each loss came to on a task, and how far from cross-entropy."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from hem_ext.harness import metrics
from hem_ext.harness.losses import LOSSES
from hem_ext.harness.tasks import TASKS, Cell, Metric
from hem_ext.harness.tasks.base import digest
from hem_ext.harness.training import Schedule

BASELINE = "ce"
HEM = ("hem", "hem+")
SHARED = "one schedule for all"
TUNED = "each loss at its own best on validation"
LEVEL = 0.01
"""A difference that lies within this, to either side and with its whole interval, is called level."""

Row = Mapping[str, Any]
Curves = Mapping[str, Mapping[str, Any]]
"""The key of a cell -> its line, with the epochs as ``"history"``; see :func:`read_curves`."""

UNSAID = {f.name: f.default for kind in (Schedule, Cell) for f in fields(kind) if f.metadata.get("added")}
"""Settings that rows leave out where they are these; see :func:`hem_ext.harness.training.settings_of`."""


@dataclass(eq=False)
class Result:
    """One loss with one configuration, on one task."""

    name: str  # as tables have it: "hem margin=0.5", in a sweep "hem margin=0.5 max_lr=0.3"
    loss: str  # "hem"
    constants: Mapping[str, float]  # those that were given
    settings: Mapping[str, Any]  # every other setting by its own name, whether of the schedule, task or data
    cells: dict[int, Row] = field(default_factory=dict)  # seed -> one of the cell's rows
    by_seed: dict[str, dict[int, float]] = field(default_factory=dict)  # metric -> seed -> value
    selective: bool = False  # trained without the samples that were finished; not among `settings`

    @property
    def variant(self) -> str:
        """The loss, and whether it was trained selectively, which are lines of their own."""
        return f"{self.loss} selective" if self.selective else self.loss

    def setting(self, name: str) -> Any:
        """A constant or any other setting, None where it has none of that name."""
        return self.constants.get(name, self.settings.get(name))

    def values(self, metric: str) -> list[float]:
        """One per seed, in their order; empty where the metric was not taken."""
        return [value for _, value in sorted(self.by_seed.get(metric, {}).items())]

    def finite(self, metric: str) -> bool:
        values = self.values(metric)
        return bool(values) and all(map(math.isfinite, values))

    def mean(self, metric: str) -> float:
        return metrics.mean(self.values(metric)).mean


Results = Sequence[Result]


def make_results(rows: Iterable[Row], *, tuned: bool = False) -> tuple[Result, ...]:
    """The results of the rows of one task, losses in the order in which the harness lists them.

    Args:
        rows: of finished cells, one per cell and metric.
        tuned: of losses at their own best: each is called by its name alone.
    """
    found: dict[str, Result] = {}
    for row in rows:
        settings = {name: value for name, value in row["settings"].items() if name not in ("task", "seed")}
        key = digest(settings)
        loss, constants = settings.pop("loss"), settings.pop("constants")
        flat = UNSAID | _flat(settings)
        selective = flat.pop("selective")
        result = found.setdefault(key, Result(row["loss"], loss, constants, flat, selective=selective))
        result.cells[row["seed"]] = row
        result.by_seed.setdefault(row["metric"], {})[row["seed"]] = row["value"]
    results = list(found.values())
    for variant in {result.variant for result in results}:
        variants = [result for result in results if result.variant == variant]
        different = [name for name in swept(variants) if name in variants[0].settings]
        for result in variants:
            if tuned and len(variants) == 1:
                result.name = variant
            result.name = " ".join([result.name, *(f"{name}={text(result.settings[name])}" for name in different)])
    losses = list(LOSSES)

    def order(result: Result) -> tuple[Any, ...]:
        return losses.index(result.loss), result.selective, _sortable(result.constants), _sortable(result.settings)

    return tuple(sorted(results, key=order))


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {name: value}
    return flat


def _sortable(settings: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    return [(k, v, "") if isinstance(v, int | float) else (k, 0, str(v)) for k, v in sorted(settings.items())]


def text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def swept(results: Results) -> list[str]:
    """The settings, constants included, in which some of the results differ: those of all first, then constants."""
    names = dict.fromkeys(name for result in results for name in [*result.settings, *result.constants])
    return [name for name in names if len({str(result.setting(name)) for result in results}) > 1]


# --- on disk --------------------------------------------------------------------------------------------------


TEXTS = ("cell", "task", "loss", "metric", "torch", "hem_ext", "device", "machine")
"""What a row has at least, beside its settings and numbers."""
EPOCH = ("active", "kept", "logit_gap", "logit_scale", "seconds")
"""The numbers that an epoch has at least, beside its metrics."""


def _is_row(found: Any) -> bool:
    """Whether it has all that is read of a row, and its settings are those of its cell."""
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        return False
    settings = found["settings"]
    return (
        all(isinstance(found.get(name), str) for name in TEXTS)
        and all(isinstance(found.get(name), int) for name in ("seed", "of"))
        and all(_is_number(found.get(name)) for name in ("value", "loss_share"))
        and digest(settings) == found["cell"]
        and (settings.get("task"), settings.get("seed")) == (found["task"], found["seed"])
    )


def _is_curve(found: Any) -> bool:
    """Whether it has all that is read of the epochs of a cell."""
    if not isinstance(found, dict) or not isinstance(found.get("cell"), str):
        return False
    history = found.get("history")
    return isinstance(history, list) and bool(history) and all(map(_is_epoch, history))


def _is_epoch(found: Any) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("metrics"), dict):
        return False
    return all(map(_is_number, [*(found.get(name) for name in EPOCH), *found["metrics"].values()]))


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


LINES: Mapping[str, Callable[[Any], bool]] = {"results": _is_row, "curves": _is_curve}
"""The kinds of lines, and whether one is whole."""


def read_lines(output: Path, kind: str) -> Iterator[dict[str, Any]]:
    """The whole lines of `output`/KIND.jsonl, and of the KIND-1.jsonl ... that other processes write beside it."""
    for path in sorted(output.glob(f"{kind}*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            # Cut off by a kill or a full disk, or damaged: its cell is not finished, and is run again.
            with suppress(ValueError, RecursionError):
                found = json.loads(line)
                if LINES[kind](found):
                    yield found


def read_curves(output: Path) -> dict[str, dict[str, Any]]:
    """:data:`Curves` of every cell that left its own."""
    return {line["cell"]: line for line in read_lines(output, "curves")}


def histories(result: Result, curves: Curves) -> list[list[dict[str, Any]]]:
    """The epochs of every cell of a result that has its line in `curves`."""
    return [curves[row["cell"]]["history"] for row in result.cells.values() if row["cell"] in curves]


def relative_times(results: Results, curves: Curves) -> dict[str, float]:
    """Name -> the time of training over that of cross-entropy with the same seed, median over the seeds of both.

    Left out are results that share no seed with it whose cells have their lines in `curves`.
    """

    def seconds(result: Result) -> dict[int, float]:
        there = {seed: row["cell"] for seed, row in result.cells.items() if row["cell"] in curves}
        return {seed: sum(epoch["seconds"] for epoch in curves[cell]["history"]) for seed, cell in there.items()}

    found = {}
    for result in results:
        ce = baseline(result, results)
        ours, theirs = seconds(result), {} if ce is None else seconds(ce)
        seeds = ours.keys() & theirs.keys()
        if seeds:
            found[result.name] = median(ours[seed] / theirs[seed] for seed in seeds)
    return found


# --- what is asked --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantity:
    """Metrics that a task is judged by and that are one quantity: one metric, or an AUROC by each of several scores."""

    title: str
    metrics: Mapping[str, str]  # name -> what tells it from the others: "" where it is alone
    higher_is_better: bool

    @property
    def shown(self) -> str:
        return self.title if self.higher_is_better else f"{self.title} (less is better)"


@dataclass(frozen=True, eq=False)
class Question:
    """A task on a data set, and what the losses came to, once a protocol."""

    task: str
    data: str
    name: str  # in headings and names of files: the task's, with the data set's where the task has several
    protocols: Mapping[str, tuple[Result, ...]]  # by name, never empty

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return TASKS[self.task].metrics

    @property
    def quantities(self) -> list[Quantity]:
        return quantities(self.task)

    def lines(self) -> dict[str, dict[str, Result]]:
        """The lines of a table that has the protocols side by side: name -> protocol -> result."""
        found: dict[str, dict[str, Result]] = {}
        for protocol, results in self.protocols.items():
            for result in results:
                alone = len(self.protocols) > 1 and sum(other.variant == result.variant for other in results) == 1
                found.setdefault(result.variant if alone else result.name, {})[protocol] = result
        losses = list(LOSSES)  # the sort is stable
        return dict(sorted(found.items(), key=lambda line: losses.index(next(iter(line[1].values())).loss)))


def make_questions(protocols: Mapping[str, Sequence[Row]]) -> list[Question]:
    """What the rows of all protocols answer, tasks in the order in which the harness lists them."""
    asked = sorted({(row["task"], row["settings"]["data"]) for rows in protocols.values() for row in rows})
    tasks = [task for task, _ in asked]
    found = []
    for task, data in sorted(asked, key=lambda question: list(TASKS).index(question[0])):
        name = task if tasks.count(task) == 1 else f"{task}-{data}"
        by_protocol = {
            protocol: make_results(
                (row for row in rows if (row["task"], row["settings"]["data"]) == (task, data)),
                tuned=protocol == TUNED,
            )
            for protocol, rows in protocols.items()
        }
        found.append(Question(task, data, name, {name: results for name, results in by_protocol.items() if results}))
    return found


def judged(task: str) -> list[str]:
    """The metrics that a task is judged by: its first where it does not say."""
    return list(getattr(TASKS[task], "judged_by", None) or list(TASKS[task].metrics)[:1])


def quantities(task: str) -> list[Quantity]:
    """The same as quantities: metrics with one first word are one, ``"near_auroc msp"`` and ``"near_auroc energy"``.

    What tells these apart is the end of their titles, after the last comma: ``"near AUROC, MSP"``.
    """
    groups: dict[str, list[str]] = {}
    for name in judged(task):
        groups.setdefault(name.split(" ")[0], []).append(name)
    found = []
    for names in groups.values():
        declared = [TASKS[task].metrics[name] for name in names]
        titles = [metric.title for metric in declared]
        if len(names) > 1:
            parts = [title.rpartition(", ") for title in titles]
            shared, short = parts[0][0], [end for *_, end in parts]
        else:
            shared, short = titles[0], [""]
        found.append(Quantity(shared, dict(zip(names, short, strict=True)), declared[0].higher_is_better))
    return found


# --- differences ----------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A result's difference to cross-entropy: the mean over the seeds of both, 95 % interval, and p after Holm."""

    mean: float
    low: float
    high: float
    p: float
    seeds: int

    def stand(self, higher_is_better: bool) -> str:
        """``"ahead"`` or ``"behind"`` where the test tells them apart, else ``"level"`` or ``"not told apart"``.

        Where there is no test, ``"the same"``, ``"not tested"``, or, without a number, ``"without a number"``.
        """
        if math.isnan(self.mean):
            return "without a number"
        if math.isnan(self.p):
            return "the same" if self.seeds > 1 and abs(self.mean) < 1e-9 else "not tested"
        if self.p < 0.05:
            return "ahead" if (self.mean > 0) == higher_is_better else "behind"
        return "level" if self.low >= -LEVEL and self.high <= LEVEL else "not told apart"


def baseline(result: Result, results: Results) -> Result | None:
    """The cross-entropy to hold a result against: where there are several, the one of the same schedule and options."""
    found = [other for other in results if other.loss == BASELINE]
    if len(found) > 1:
        found = [other for other in found if other.settings == result.settings]
    return found[0] if len(found) == 1 else None


# A report asks for the same in tables, sentences and pictures, and every correction by statsmodels takes 0.2 s.
@functools.lru_cache(maxsize=1024)
def differences(results: tuple[Result, ...], metric: str) -> dict[str, Difference]:
    """Name -> difference to cross-entropy, for every other loss that shares a seed with it.

    The p are corrected for the number of all that are tested here; of several that are the same network, one is.
    """
    found: dict[str, tuple[metrics.Paired, int]] = {}
    tested: list[Result] = []
    same: dict[str, str] = {}  # name -> name of the one tested that it is the same network as
    for result in results:
        ce = baseline(result, results)
        if ce is None or result.loss == BASELINE:
            continue
        ours, theirs = (side.by_seed.get(metric, {}) for side in (result, ce))
        seeds = sorted(ours.keys() & theirs.keys())
        if seeds:
            paired = metrics.paired([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
            found[result.name] = paired, len(seeds)
            twin = next((other for other in tested if same_network(result, other)), None)
            same[result.name] = (twin or result).name
            if twin is None:
                tested.append(result)
    ps = metrics.holm([found[result.name][0].p for result in tested])
    corrected = {result.name: p for result, p in zip(tested, ps, strict=True)}
    return {name: Difference(*paired[:3], corrected[same[name]], seeds) for name, (paired, seeds) in found.items()}


def same_network(result: Result, other: Result) -> bool:
    """Whether two losses have the same numbers everywhere, seed by seed, as HEM and HEM+ on balanced classes."""
    # As text, for a NaN is not itself.
    ours, theirs = (str(sorted((m, sorted(v.items())) for m, v in r.by_seed.items())) for r in (result, other))
    return result.loss != other.loss and ours == theirs


def hem_variants(results: Results) -> list[tuple[Result, list[str]]]:
    """The results of HEM, each with the names of those that are the same network and so not given again."""
    found: list[tuple[Result, list[str]]] = []
    for result in results:
        if result.loss in HEM:
            twin = next((names for kept, names in found if same_network(kept, result)), None)
            if twin is None:
                found.append((result, []))
            else:
                twin.append(result.name)
    return found
