"""The tables of a report, in Markdown and on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from hem_ext.harness.losses import LOSSES
from hem_ext.harness.report.results import (
    TUNED,
    Quantity,
    Question,
    Result,
    Results,
    differences,
    swept,
    text,
)
from hem_ext.harness.report.words import MISSING, SHORT, TIMES, digits, shown, shown_difference, shown_p, where
from hem_ext.harness.tasks import Metric

DIFFERENCE = "difference to ce [95% interval]"


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, [":--", *["--:"] * (len(headings) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def title(metric: Metric) -> str:
    return metric.title + ("" if metric.higher_is_better else " ↓")


# --- what a task is judged by ---------------------------------------------------------------------------------


def judged_table(question: Question, quantity: Quantity) -> str:
    """The protocols side by side: value, difference to cross-entropy and p of every loss."""
    if len(quantity.metrics) > 1:
        return _several(question, quantity)
    (metric,) = quantity.metrics
    headings, compared = ["loss"], {}
    for protocol, results in question.protocols.items():
        compared[protocol] = differences(results, metric)
        start = f"{SHORT.get(protocol, protocol)}: " if len(question.protocols) > 1 else ""
        headings += [start + title(question.metrics[metric]), DIFFERENCE, "p (Holm)"]
    at = _at(question)
    rows = []
    for name, by_protocol in question.lines().items():
        row = [name]
        for protocol, found in compared.items():
            row += _half(by_protocol.get(protocol), found, metric)
        rows.append(row + ([at.get(name, MISSING)] if at else []))
    return markdown([*headings, *(["at"] if at else [])], rows)


def _several(question: Question, quantity: Quantity) -> str:
    """One column for each metric of a quantity, and the protocols one below the other."""
    at, several = _at(question), len(question.protocols) > 1
    compared = {
        (protocol, metric): differences(results, metric)
        for protocol, results in question.protocols.items()
        for metric in quantity.metrics
    }
    rows = []
    for name, by_protocol in question.lines().items():
        for protocol, result in by_protocol.items():
            cells = []
            for metric in quantity.metrics:
                value, difference, p = _half(result, compared[protocol, metric], metric)
                cells.append(value if difference == MISSING else f"{value}<br>{difference}<br>p {p}")
            row = [name, *([SHORT.get(protocol, protocol)] if several else []), *cells]
            rows.append(row + ([at[name] if protocol == TUNED else MISSING] if at else []))
    headings = ["loss", *(["protocol"] if several else []), *quantity.metrics.values(), *(["at"] if at else [])]
    arrow = "" if quantity.higher_is_better else " ↓"
    return f"{quantity.title}{arrow}, and below it the {DIFFERENCE} and p (Holm):\n\n" + markdown(headings, rows)


def _half(result: Result | None, compared: Mapping[str, Any], metric: str) -> list[str]:
    """Value, difference and p of a result."""
    if result is None:
        return [MISSING] * 3
    difference = compared.get(result.name)
    p = MISSING if difference is None else shown_p(difference.p)
    return [shown(result.values(metric), error=False), shown_difference(difference), p]


def _at(question: Question) -> dict[str, str]:
    """Where each loss is at its own best: name -> ``"lr 0.3, margin 0.5"``."""
    different = swept([result for results in question.protocols.values() for result in results])
    found = {}
    for name, by_protocol in question.lines().items():
        if TUNED in by_protocol:
            result = by_protocol[TUNED]
            settings = [setting for setting in different if setting in result.settings]
            found[name] = ", ".join(
                f"{'lr' if setting == 'max_lr' else setting} {text(result.setting(setting))}"
                for setting in [*settings, *result.constants]
            )
    return {name: said or MISSING for name, said in found.items()}


# --- everything that was measured -----------------------------------------------------------------------------


def best(metrics: Mapping[str, Metric], results: Results, metric: str) -> list[Result]:
    """Those with the best mean, as tables show it."""
    means = {result.name: digits(result.mean(metric)) for result in results if result.finite(metric)}
    if not means:
        return []
    found = (max if metrics[metric].higher_is_better else min)(means.values(), key=float)
    return [result for result in results if means.get(result.name) == found]


def metrics_table(question: Question, results: Results, times: Mapping[str, float] | None = None) -> str:
    """Every declared metric of every loss; with many metrics, a line for each of them instead.

    Args:
        question, results: of one protocol.
        times: of training, relative to cross-entropy: name -> ratio. None, or none at all, is no column.
    """
    winners = {metric: best(question.metrics, results, metric) for metric in question.metrics}
    rows = [["loss", *map(title, question.metrics.values()), "seeds", "in loss", *(["time"] if times else [])]]
    for result in results:
        cells = [shown(result.values(metric)) for metric in winners]
        marked = [f"**{s}**" if result in found else s for s, found in zip(cells, winners.values(), strict=True)]
        share = np.mean([row["loss_share"] for row in result.cells.values()])
        time = [f"{times[result.name]:.2f}" if result.name in times else MISSING] if times else []
        rows.append([result.name, *marked, str(len(result.cells)), f"{share:.1%}", *time])
    headings, *rows = zip(*rows, strict=True) if len(question.metrics) > 8 else rows
    return markdown(headings, rows) + (f"\n{TIMES}" if times else "")


def other_values(question: Question, results: Results) -> str:
    """What was measured beside the declared metrics, a line each; nothing if there is nothing."""
    names = dict.fromkeys(name for result in results for name in result.by_seed if name not in question.metrics)
    rows = [[name, *(shown(result.values(name)) for result in results)] for name in names]
    return markdown(["value", *(result.name for result in results)], rows) if rows else ""


def seeds(results: Results) -> str:
    """``"seeds 0 to 9 of ce, hem; 0 to 4 of mm"``."""
    by_seeds: dict[str, list[str]] = {}
    for result in results:
        found = sorted(result.cells)
        whole = len(found) > 2 and found == list(range(found[0], found[-1] + 1))
        said = f"{found[0]} to {found[-1]}" if whole else ", ".join(map(str, found))
        by_seeds.setdefault(said, []).append(result.name)
    if len(by_seeds) == 1:
        return f"seeds {next(iter(by_seeds))}"
    return "seeds " + "; ".join(f"{said} of {', '.join(names)}" for said, names in by_seeds.items())


def console(question: Question, protocol: str) -> Table:
    """The first of the judged metrics, for a terminal."""
    results, metric = question.protocols[protocol], next(iter(question.quantities[0].metrics))
    compared = differences(results, metric)
    heading = question.name + where(question, protocol)
    table = Table(title=heading, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    left_out = len(question.metrics) - 1
    if left_out:
        table.caption = f"{left_out} more metric{'s' if left_out > 1 else ''} in report.md"
    table.add_column("loss", overflow="fold")
    for name in (title(question.metrics[metric]), "difference to ce [95%]", "p (Holm)", "seeds"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        _, difference, p = _half(result, compared, metric)
        cells = [result.name, shown(result.values(metric)), difference, p, str(len(result.cells))]
        table.add_row(*cells)
    return table


# --- settings -------------------------------------------------------------------------------------------------


def settings(question: Question) -> str:
    """Everything that was the same for all, and the constants of each loss: a list."""
    lines: dict[str, dict[str, str]] = {}  # what -> protocol -> text
    for protocol, results in question.protocols.items():
        rows = [row for result in results for _, row in sorted(result.cells.items())]
        for name in ("data", "data_root", "part", "validation", "model", "mixed_precision", "schedule", "options"):
            said = _distinct(_in_words(row["settings"].get(name)) for row in rows)
            if said != "None":
                lines.setdefault({"part": "judged on"}.get(name, name.replace("_", " ")), {})[protocol] = said
        for loss in dict.fromkeys(result.loss for result in results):
            # None stands for what the loss works out from the classes.
            said = _distinct(
                _in_words({k: "by its rule" if v is None else v for k, v in (LOSSES[loss].constants() | given).items()})
                for given in (result.constants for result in results if result.loss == loss)
            )
            lines.setdefault(f"`{loss}`", {})[protocol] = said.replace("none", "no constants")
        lines.setdefault("run with", {})[protocol] = _distinct(
            f"torch {row['torch']}, hem_ext {row['hem_ext']}, on {row['device']} ({row['machine']})" for row in rows
        )
    found = []
    for name, by_protocol in lines.items():
        if len(by_protocol) == len(question.protocols) and len(set(by_protocol.values())) == 1:
            found.append(f"- {name}: {next(iter(by_protocol.values()))}\n")
        else:
            found += [f"- {name}, {SHORT.get(protocol, protocol)}: {said}\n" for protocol, said in by_protocol.items()]
    return "".join(found)


def _in_words(value: Any) -> str:
    """``{"epochs": 2, "data_options": {"num_train": 3}}`` as "epochs 2, data_options (num_train 3)"."""
    if not isinstance(value, Mapping):
        return text(value)
    items = ((k, f"({_in_words(v)})" if isinstance(v, Mapping) else _in_words(v)) for k, v in value.items())
    return ", ".join(f"{name} {said}" for name, said in items) or "none"


def _distinct(texts: Iterable[str]) -> str:
    return "; or ".join(dict.fromkeys(texts))
