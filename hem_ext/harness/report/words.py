"""What a report says in words: numbers as it writes them, and where HEM stands against cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from hem_ext.harness import metrics
from hem_ext.harness.report.results import (
    BASELINE,
    LEVEL,
    SHARED,
    TUNED,
    Difference,
    Quantity,
    Question,
    Row,
    differences,
    hem_variants,
)

MISSING = "—"
SHORT = {SHARED: "one schedule", TUNED: "own best"}
"""What tables and pictures call a protocol."""

PROTOCOL = """\
Every loss is given the same networks, initial weights and order of samples. Nothing is stopped early, and test images
are looked at once, when a training has ended: whatever was chosen, and every learning curve, is by validation images.
"""
PROTOCOLS = {
    SHARED: "*One schedule for all*: those that the tasks come with were chosen on cross-entropy, which favours it.",
    TUNED: "*Each loss at its own best on validation*: of one grid of settings, and of the loss's own constants.",
}
ON_VALIDATION = """\
**The numbers below are of validation images**, as for choosing: the best of many is best partly by chance.
"""
STATISTICS = f"""\
± is the standard error over seeds. Losses share their seeds, and so come in pairs: differences to `ce` (of the same
schedule, where several are compared) are over the seeds that both have, with the 95 % interval and the two-sided p of
the paired t-test. p is corrected by Holm for the number of losses in a column, of which two that are the same network
count once; the intervals are not corrected. There is no test with one seed, or where the differences do not vary.

**Ahead** and **behind** are those with p below 0.05; **level** is a difference with its whole interval within
± {LEVEL}; everything else is **not told apart**: too few seeds or images, which is no evidence either way. All seeds
share one split of the data: intervals cover initial weights and the order of samples, not the draw of the images.

Bold is the best of its column, with all that tie at the shown digits; ↓ marks metrics of which less is better. "In
loss" is the share of the training time that the loss and its gradient took; on a GPU, that launching them took.
"""

ACTIVE = """\
With HEM, a sample that is separated by the margin is finished: only the others have a gradient. Their share, the mean
over seeds, in all epochs and in the last one; of a task with several trainings, in the last one of each:
"""

TIMES = """\
"Time" is that of all training epochs over that of `ce` with the same seed, the median over seeds. Validation is not in
it, but whatever else the machine did is: cells that ran at different hours cannot be compared by it.
"""


def where(question: Question, protocol: str) -> str:
    """What to add to a heading or sentence: ``", own best"``, and nothing where there is nothing to tell apart."""
    alone = len(question.protocols) == 1 and protocol != TUNED
    return "" if alone else f", {SHORT.get(protocol, protocol)}"


def protocol(names: Iterable[str], rows: Iterable[Row]) -> str:
    """How the numbers of a report came about."""
    explained = "".join(f"- {PROTOCOLS[name]}\n" for name in names if name in PROTOCOLS)
    on_validation = any(row["settings"]["part"] == "validation" for row in rows)
    parts = [PROTOCOL, explained, ON_VALIDATION if on_validation else "", STATISTICS]
    return "\n".join(part for part in parts if part)


# --- numbers --------------------------------------------------------------------------------------------------


def digits(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # no -0.000


def signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"


def shown(values: Sequence[float], *, error: bool = True) -> str:
    """Mean and standard error; how many seeds have no number, where only some have one."""
    without = sum(not math.isfinite(value) for value in values)
    if without == len(values):
        return MISSING
    if without:
        return f"NaN in {without} of {len(values)}"
    found = metrics.mean(values)
    return (
        digits(found.mean) if math.isnan(found.error) or not error else f"{digits(found.mean)} ± {digits(found.error)}"
    )


def shown_p(p: float) -> str:
    if math.isnan(p):
        return MISSING
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def shown_difference(difference: Difference | None) -> str:
    """``"+0.050 [+0.031, +0.069]"``, without an interval where there is none."""
    if difference is None or math.isnan(difference.mean):
        return MISSING
    interval = "" if math.isnan(difference.low) else f" [{signed(difference.low)}, {signed(difference.high)}]"
    return signed(difference.mean) + interval


# --- verdicts -------------------------------------------------------------------------------------------------


def sentences(question: Question) -> list[str]:
    """Where every variant of HEM stands against cross-entropy, by quantity and protocol."""
    found = []
    for quantity, protocol, names, compared in _verdicts(question):
        phrases = [
            f"with {short} {_phrase(difference, quantity)}" if short else _phrase(difference, quantity)
            for short, difference in compared.items()
        ]
        found.append(f"By {quantity.shown}{where(question, protocol)}, {names} is {'; '.join(phrases)}.")
    return found or [_cannot(question)]


def summary(question: Question) -> list[str]:
    """The same in short: a line for every quantity."""
    lines: dict[str, dict[str, list[str]]] = {}  # quantity -> variant -> by protocol
    for quantity, protocol, names, compared in _verdicts(question):
        by_stand: dict[str, dict[str, Difference]] = {}
        for short, difference in compared.items():
            by_stand.setdefault(difference.stand(quantity.higher_is_better), {})[short] = difference
        said = ", ".join(_short(stand, found) for stand, found in by_stand.items())
        start = where(question, protocol).removeprefix(", ")
        by_variant = lines.setdefault(quantity.shown, {})
        by_variant.setdefault(f"{names}{', ' if start else ' '}", []).append(f"{start}: {said}" if start else said)
    return [
        f"{title}: " + "; ".join(names + "; ".join(said) for names, said in by_variant.items())
        for title, by_variant in lines.items()
    ] or [_cannot(question)]


def _verdicts(question: Question) -> Iterator[tuple[Quantity, str, str, dict[str, Difference]]]:
    """Quantity, protocol, what a variant of HEM is called, and its differences by what tells the metrics apart."""
    for quantity in question.quantities:
        for protocol, results in question.protocols.items():
            compared = {short: differences(results, metric) for metric, short in quantity.metrics.items()}
            for result, twins in hem_variants(results):
                found = {short: by_name[result.name] for short, by_name in compared.items() if result.name in by_name}
                if found:
                    same = f" (and {', '.join(f'`{name}`' for name in twins)}, the same network here)" if twins else ""
                    yield quantity, protocol, f"`{result.name}`{same}", found


def _phrase(difference: Difference, quantity: Quantity) -> str:
    stand = difference.stand(quantity.higher_is_better)
    seeds = f"{difference.seeds} seed{'s' if difference.seeds > 1 else ''}"
    between = f"between {signed(difference.low)} and {signed(difference.high)}"
    if stand in ("ahead", "behind"):
        low, high = map(digits, sorted((abs(difference.low), abs(difference.high))))
        p = shown_p(difference.p).replace("<", "< ")
        return (
            f"{'ahead of' if stand == 'ahead' else 'behind'} `{BASELINE}` by {digits(abs(difference.mean))} "
            f"[{low}, {high}] (p {p}, {seeds})"
        )
    if stand == "level":
        return f"level with `{BASELINE}` ({between}, all within ± {LEVEL}; {seeds})"
    if stand == "not told apart":
        inside = difference.low <= 0 <= difference.high
        but = "which is no evidence either way" if inside else "which leaves out 0 only without the correction of p"
        return f"not told apart from `{BASELINE}`: {between}, {but} (p {shown_p(difference.p)}, {seeds})"
    if stand == "not tested":
        return f"not tested against `{BASELINE}` ({signed(difference.mean)}, {seeds})"
    return f"the same as `{BASELINE}` in every seed" if stand == "the same" else "without a number for every seed"


def _short(stand: str, found: Mapping[str, Difference]) -> str:
    """``"ahead by 0.020 to 0.110 (MSP, energy)"``, or ``"level (MSP: -0.002)"``."""
    means = sorted((difference.mean for difference in found.values()), key=abs)
    ends = list(dict.fromkeys((means[0], means[-1])))
    inside = [", ".join(short for short in found if short)]
    if stand in ("ahead", "behind"):
        stand += " by " + " to ".join(digits(abs(mean)) for mean in ends)
    elif stand not in ("the same", "without a number"):
        inside.append(" to ".join(map(signed, ends)))
    inside = [part for part in inside if part]
    return f"{stand} ({': '.join(inside)})" if inside else stand


def _cannot(question: Question) -> str:
    """Why there is no verdict."""
    return f"HEM and `{BASELINE}` cannot be compared by {question.quantities[0].title}: they share no seed."
