"""What a comparison came to: tables, sentences and pictures, from the rows of its finished cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from hem_ext.harness.report import active, forest, grid, pictures, tables, words
from hem_ext.harness.report.results import SHARED, TUNED, Curves, Question, make_questions, read_curves, relative_times
from hem_ext.harness.report.style import save
from hem_ext.harness.training import write_whole

__all__ = ["SHARED", "TUNED", "draw_grid", "summary", "write"]


def write(
    output: Path,
    protocols: Mapping[str, Sequence[Mapping[str, Any]]],
    console: Console,
    title: str = "Comparison",
) -> None:
    """Print a table and a verdict for every task; write `output`/report.md and the pictures that it shows.

    On top is `output`/forest.png, HEM minus cross-entropy everywhere, if they share two seeds anywhere; before the
    tasks comes `output`/active.png, the share of samples that HEM learnt from by epoch, if it is known. The report
    depends on the rows, and on the curves and pictures that :func:`hem_ext.harness.compare.run` left beside them,
    alone: the same files give the same bytes.

    Args:
        output: the folder of the comparison. Curves or pictures that are not there are not drawn.
        protocols: how losses were compared -> rows of finished cells, one per cell and metric, as that function writes
            them. :data:`SHARED` and :data:`TUNED` stand side by side; a plain comparison or sweep has one entry, of
            any name. A cell may be in both.
        console: to print to.
        title: of the report.
    """
    questions = make_questions(protocols)
    parts = [f"# {title}\n"]
    figure = forest.draw(questions)
    if figure is not None:
        save(figure, output / "forest.png")
        parts.append("![HEM minus cross-entropy, by task and metric](forest.png)\n")
    parts.append(_summaries(questions))
    parts.append(words.protocol(protocols, [row for rows in protocols.values() for row in rows]))
    curves = read_curves(output)
    figure = active.draw(questions, curves)
    if figure is not None:
        save(figure, output / "active.png")
        parts += ["## Samples that are still active\n", words.ACTIVE]
        parts.append("".join(f"- {sentence}\n" for sentence in active.sentences(questions, curves)))
        parts.append("![The share of samples with a gradient, by task and epoch](active.png)\n")
    for question in questions:
        for protocol in question.protocols:
            console.print(tables.console(question, protocol))
        console.print(Text(_summary(question).replace("`", "").replace("**", "")))
        parts += _section(output, question, curves)
    text = "\n".join(parts)
    write_whole(output / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
    console.print(f"wrote {output / 'report.md'}", highlight=False, soft_wrap=True)


def draw_grid(
    output: Path, task: str, rows: Sequence[Mapping[str, Any]], chosen: Mapping[str, Mapping[str, Any]]
) -> Path | None:
    """Draw a tuning: the judged metric of every loss against the settings that were tried, as `output`/TASK-grid.png.

    Args:
        output: where to.
        task: by name; rows of other tasks are left out.
        rows: of the finished cells of the tuning, as :func:`write` takes them, of one data set.
        chosen: what to mark: loss -> setting -> value.

    Returns:
        The file; None, and nothing is written, where every loss has one configuration.
    """
    (question,) = make_questions({"": [row for row in rows if row["task"] == task]})
    figure = grid.draw(question, question.protocols[""], task, chosen)
    if figure is None:
        return None
    save(figure, output / f"{task}-grid.png")
    return output / f"{task}-grid.png"


def summary(protocols: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The list on top of a report: where HEM stands, task by task. `protocols` as in :func:`write`."""
    return _summaries(make_questions(protocols))


def _summaries(questions: Sequence[Question]) -> str:
    return "".join(map(_summary, questions))


def _summary(question: Question) -> str:
    """An item of a list: one line, or a list of its own where several quantities judge."""
    lines = words.summary(question)
    start = f"- **{question.task}** ({question.data})"
    return f"{start}, {lines[0]}\n" if len(lines) == 1 else "\n  - ".join([start, *lines]) + "\n"


def _section(output: Path, question: Question, curves: Curves) -> list[str]:
    """A task's part of the report."""
    parts = [f"## {question.name}\n", *(tables.judged_table(question, quantity) for quantity in question.quantities)]
    parts.append("\n".join(f"- {sentence}" for sentence in words.sentences(question)) + "\n")
    for protocol, results in question.protocols.items():
        where = words.where(question, protocol)
        parts.append(f"### {question.name}: every metric{where}\n")
        # Others are not compared for their time: their cells may come from several runs.
        selective = any(result.selective for result in results)
        times = relative_times(results, curves) if selective else None
        parts += [tables.metrics_table(question, results, times), tables.seeds(results) + "\n"]
        parts += [f"![{Path(name).stem}]({name})\n" for name in pictures.draw(output, question, protocol, curves)]
    for protocol, results in question.protocols.items():
        other = tables.other_values(question, results)
        where = words.where(question, protocol)
        parts += [f"### {question.name}: every other value{where}\n", other] if other else []
    return [*parts, f"### {question.name}: settings\n", tables.settings(question)]
