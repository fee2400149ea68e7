"""Rows in files, and their tables in documents: what the reports of all benchmarks share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MARKER = "<!-- {} {} -->"  # begin or end, and the name of the table between


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Every row of those of the files that are there."""
    lines = [line for path in paths if path.exists() for line in path.read_text(encoding="utf-8").splitlines()]
    return [json.loads(line) for line in lines]


def append(path: Path, facts: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps({**facts, **row}) + "\n" for row in rows))


def conditions(rows: Sequence[dict[str, Any]]) -> str:
    """Where and with what rows of one machine were measured; the last of them says so, of commits all do."""
    row, commits = rows[-1], dict.fromkeys(row["commit"] for row in rows)
    if "gpu" in row:
        where = row["gpu"]
    else:
        where = ", ".join([f"{row['threads']} cores", row["cpu"], *([row["cpu_isa"]] if "cpu_isa" in row else [])])
        where += "".join(f", {name}={value}" for name, value in row.get("malloc", {}).items())
    return f"{where}; torch {row['torch']}, hem_ext {row['hem_ext']} at {' and '.join(commits)}, {row['date'][:10]}"


def markdown(lines: Sequence[Sequence[str]], numbers_from: int | None = None) -> str:
    """A table, its heading first; from a column on to the right."""
    rule = ["---" if numbers_from is None or i < numbers_from else "---:" for i in range(len(lines[0]))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def replace(path: Path, name: str, text: str) -> None:
    """Put `text` between the markers of that name."""
    begin, end = MARKER.format("begin", name), MARKER.format("end", name)
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path} has no {begin} ... {end}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
