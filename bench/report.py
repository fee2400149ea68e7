"""What result rows say: the tables and pictures of docs/performance.md, and whether a change made something slower.

    python bench/report.py FILE...                                 print the table
    python bench/report.py FILE... --page docs/performance.md      put it between the page's markers
    python bench/report.py FILE... --plots docs                    draw speed.png, memory.png and roofline.png
    python bench/report.py NEW --against OLD       compare two files, by ratio; 1 where something got worse

A file holds rows of ``make bench`` (bench/results/*.jsonl). Where a row was measured twice, the last one counts.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import documents

Rows = Sequence[dict]

# The columns of ratios: peer, heading.
PEERS = {
    "hem, overwriting": "overwriting",
    "ce": "CE",
    "ce, compiled": "CE, compiled",
    "multi_margin_loss": "multi-margin",
    "hem in torch": "HEM in PyTorch",
    "hem in torch, compiled": "HEM, compiled",
    "liger ce, grad 0.5": "Liger CE",
}
MEMORY = ["kept, CE", "kept, HEM", "peak, CE", "peak, HEM", "peak, overwriting"]  # the last columns
FINISHED = "hem, 10% active"
ROOT = Path(__file__).resolve().parents[1]


def read(paths: Sequence[Path]) -> list[dict]:
    rows = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "peer" in row:  # the others tell of tests that ran
                rows[row["device"], row["workload"], row["peer"]] = row
    if not rows:
        raise SystemExit(f"no rows in {', '.join(map(str, paths))}")
    return list(rows.values())


def by_workload(rows: Rows) -> dict[str, dict[str, dict]]:
    """Workload -> peer -> row, in the order of the file; only workloads that have HEM."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(row["workload"], {})[row["peer"]] = row
    return {name: peers for name, peers in found.items() if "error" not in peers.get("hem", {"error": ""})}


def median(row: dict, phase: str = "both") -> float:
    return row["seconds"][phase][1]


def ratio(peers: dict[str, dict], peer: str, phase: str = "both", *, to: str = "hem") -> float | None:
    """How many times the time of `to` a peer takes, None where one of them was not measured."""
    if any("seconds" not in peers.get(name, {}) for name in (peer, to)):
        return None
    return median(peers[peer], phase) / median(peers[to], phase)


def table(rows: Rows) -> list[list[str]]:
    """The table of one device, its heading first."""
    workloads = by_workload(rows)
    shown = {key: name for key, name in PEERS.items() if any(key in peers for peers in workloads.values())}
    slower = sorted(
        {key for peers in workloads.values() for key in peers if re.fullmatch(r"hem, (avx2|baseline)", key)}
    )
    heading = ["", "shape", *shown.values(), "bf16 / fp32"]
    heading += [f"{key.removeprefix('hem, ').upper()}" for key in slower]
    rated = {"hem": "of the copy rate", FINISHED: "10% active"} | {
        key: key.removeprefix("hem, ").upper() for key in slower
    }
    rated = {key: name for key, name in rated.items() if any(key in peers for peers in workloads.values())}
    heading += [" / ".join(rated.values()), *MEMORY]
    lines = [heading]
    for name, peers in workloads.items():
        hem = peers["hem"]
        line = [name, str(tuple(hem["shape"])), *(_number(ratio(peers, key)) for key in shown)]
        line.append(_number(ratio(peers, "hem, bfloat16")))
        line += [_number(ratio(peers, "ce", to=key)) for key in slower]
        rates = [peers.get(key, {}).get("of_roofline") for key in rated]
        line.append(" / ".join("-" if rate is None else f"{rate:.0%}" for rate in rates))
        line += [_bytes(kept(peers.get(key))) for key in ("ce", "hem")]
        line += [_bytes(kept(peers.get(key), "peak_bytes")) for key in ("ce", "hem", "hem, overwriting")]
        lines.append(line)
    return lines


def kept(row: dict | None, what: str = "saved_bytes") -> float | None:
    """Bytes a logit kept for backward."""
    return None if row is None or row[what] is None else row[what] / math.prod(row["shape"])


def _bytes(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} B"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 2 else f"{value:.1f}"


def text(rows: Rows) -> str:
    """For a terminal."""
    lines = table(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    body = "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return f"{documents.conditions(rows)}\n{body}"


def write_page(path: Path, rows: Rows, files: Sequence[Path]) -> None:
    """Replace what stands between the markers: the table in two, of times and of memory.

    Of rows that were measured with settings of malloc, the times, between markers of their own.
    """
    lines, command = table(rows), f"python bench/report.py {' '.join(map(str, files))}"
    about = f"`{command}`: {documents.conditions(rows)}"
    split = len(lines[0]) - len(MEMORY)
    times, memory = [line[:split] for line in lines], [[*line[:2], *line[split:]] for line in lines]
    parts = {"reused": times} if "malloc" in rows[-1] else {"speed": times, "memory": memory}
    for name, part in parts.items():
        documents.replace(path, name, f"{about}\n\n{documents.markdown(part, numbers_from=2)}")


def draw(folder: Path, rows: Rows) -> list[Path]:
    """speed.png, memory.png and roofline.png: bars by workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    workloads = by_workload(rows)
    names = list(workloads)
    colors = dict(
        zip(
            ["hem", *PEERS],
            ["#0072B2", "#D55E00", "#E69F00", "#CC79A7", "#56B4E9", "#009E73", "#999999", "#F0E442"],
            strict=True,
        )
    )

    def bars(file: str, title: str, values: dict[str, list[float | None]], *, log: bool, line: float) -> Path:
        figure, axis = plt.subplots(figsize=(11, 4.6), layout="constrained")
        width = 0.8 / len(values)
        for i, (peer, heights) in enumerate(values.items()):
            xs = [x + (i - (len(values) - 1) / 2) * width for x in range(len(names))]
            axis.bar(xs, [h or 0 for h in heights], width, color=colors[peer], label=PEERS.get(peer, "hem_ext"))
        axis.axhline(line, color="black", linewidth=0.8)
        axis.set_xticks(range(len(names)), [n.replace(", ", ",\n") for n in names], fontsize=8)
        axis.set(title=title)
        axis.set_yscale("log" if log else "linear")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        figure.legend(fontsize=8, ncols=len(values), loc="outside upper center")
        figure.supxlabel(documents.conditions(rows), fontsize=7)
        figure.savefig(folder / file, dpi=120)
        plt.close(figure)
        return folder / file

    measured = [key for key in PEERS if any("seconds" in peers.get(key, {}) for peers in workloads.values())]
    memory = {key: [kept(p.get(key)) for p in workloads.values()] for key in ("hem", "ce", "hem in torch")}
    roofline = {"hem": [100 * p["hem"]["of_roofline"] for p in workloads.values()]}
    roofline |= {"ce": [100 * p["ce"]["of_roofline"] if "ce" in p else None for p in workloads.values()]}
    return [
        bars(
            "speed.png",
            "time of the peer over the time of hem_ext, forward + backward, float32 (above 1: hem_ext is faster)",
            {key: [ratio(p, key) for p in workloads.values()] for key in measured},
            log=True,
            line=1,
        ),
        bars("memory.png", "bytes per float32 logit kept for backward", memory, log=True, line=4),
        bars("roofline.png", "percent of the rate at which the logits can be copied", roofline, log=False, line=100),
    ]


def worse(new: Rows, old: Rows, tolerance: float) -> list[str]:
    """Where HEM lost ground on a peer, or keeps more memory: a line each. Compares ratios, never times."""
    found = []
    before, after = by_workload(old), by_workload(new)
    for name in before.keys() & after.keys():
        for peer in before[name].keys() & after[name].keys() - {"hem"}:
            was, now = ratio(before[name], peer), ratio(after[name], peer)
            if was and now and now < was * (1 - tolerance):
                found.append(f"{name}, {peer}: {now:.2f} times the time of hem_ext, was {was:.2f}")
        was, now = (rows[name]["hem"]["saved_bytes"] for rows in (before, after))
        if now > was:
            found.append(f"{name}: {now} bytes kept for backward, was {was}")
    for name in before.keys() - after.keys():
        found.append(f"{name}: not measured any more")
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--plots", type=Path)
    parser.add_argument("--against", type=Path, nargs="+")
    parser.add_argument("--tolerance", type=float, default=0.25, help="share of a ratio that noise may take")
    args = parser.parse_args()
    rows = read(args.files)
    if args.against:
        found = worse(rows, read(args.against), args.tolerance)
        print("\n".join(found) or "nothing got worse")
        sys.exit(1 if found else 0)
    if args.page:
        write_page(args.page, rows, args.files)
    if args.plots:
        for path in draw(args.plots, rows):
            print(f"wrote {path}")
    print(text(rows))


if __name__ == "__main__":
    main()
