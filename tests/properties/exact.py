"""HEM in exact arithmetic: what a call may answer, given that it computes in floating point.

Shares nothing with hem_ext. Logits and margins are what their floats say, as fractions. What is computed from them lies
in an interval around the exact number, as wide as the roundings on the way to it; where there are none it is a point.
So a class has to be kept, has to be left out, or, where its error lies within rounding of the mean or of 0, may be
either; and the loss and gradient have to be those of what was kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor


class Format:
    """What a floating-point type can hold: numbers of so many bits, down to 2**lowest."""

    def __init__(self, precision: int, lowest: int) -> None:
        self.precision, self.lowest = precision, lowest
        self.unit = Fraction(1, 2**precision)  # the most that rounding moves a number, relative to it
        self.least = Fraction(1, 2**-lowest)
        self.largest = (2 - 2 * self.unit) * 2 ** (2 - lowest - precision)

    def holds(self, x: Fraction) -> bool:
        """Whether a number is one of them, and not rounded."""
        if x.denominator & (x.denominator - 1):
            return False
        zeros = (x.numerator & -x.numerator).bit_length() - 1
        bits = abs(x.numerator).bit_length() - zeros
        is_coarse = zeros - x.denominator.bit_length() + 1 >= self.lowest
        return not x or (bits <= self.precision and is_coarse and abs(x) <= self.largest)


FORMATS = {
    torch.float64: Format(53, -1074),
    torch.float32: Format(24, -149),
    torch.bfloat16: Format(8, -133),
    torch.float16: Format(11, -24),
}


class Range(NamedTuple):
    """What lies between two numbers."""

    low: Fraction
    high: Fraction

    def widened(self, relative: Fraction, absolute: Fraction = Fraction(0)) -> Range:
        return Range(self.low - abs(self.low) * relative - absolute, self.high + abs(self.high) * relative + absolute)

    def __contains__(self, x: object) -> bool:
        return isinstance(x, float) and math.isfinite(x) and self.low <= Fraction(x) <= self.high


ZERO = Range(Fraction(0), Fraction(0))


class Row(NamedTuple):
    """What is known of one sample."""

    target: int | None  # None: ignored
    errors: list[Range]
    must: set[int]
    may: set[int]
    breaks: bool = False  # its loss is NaN
    overflows: bool = False  # its errors sum up to more than a float can be, or nearly so

    @property
    def largest(self) -> set[int]:
        """Those that may be the largest of its errors."""
        least = max(e.low for e in self.errors)
        return {j for j, e in enumerate(self.errors) if e.high >= least}


IGNORED = Row(None, [], set(), set())


def row(
    logits: Sequence[float | Fraction], target: int, margin: float, of: Format, slack: Sequence[Fraction] | None = None
) -> Row:
    """What HEM says of a sample whose logits are computed to within `slack`."""
    broken = Row(target, [], set(), set(), breaks=True)
    if any(y != y for y in logits):
        return broken
    y_target = logits[target]
    others = [y for j, y in enumerate(logits) if j != target]
    if y_target == math.inf and math.inf not in others:
        others = []  # separated from all
    if others and (y_target == -math.inf or math.inf in others):
        return broken
    errors = [ZERO] * len(logits)
    for j, y in enumerate(logits):
        if j != target and others and y != -math.inf:
            errors[j] = _error(Fraction(y), Fraction(y_target), margin, of, slack and slack[j] + slack[target])

    total = Range(sum((e.low for e in errors), Fraction(0)), sum((e.high for e in errors), Fraction(0)))
    is_exact = _sums_exactly(errors, total, of)
    if not is_exact:
        total = total.widened(_depth(len(errors)) * of.unit)
    mean = Range(total.low / len(errors), total.high / len(errors))
    # Rounding keeps the order of numbers: what is not below the mean is not below the rounded one.
    rounded = mean if of.holds(mean.low) and is_exact else mean.widened(of.unit, of.least)
    least = min(rounded.low, max(e.low for e in errors))
    most = min(mean.high if is_exact else rounded.high, max(e.high for e in errors))
    return Row(
        target,
        errors,
        {j for j, e in enumerate(errors) if e.low > 0 and e.low >= most},
        {j for j, e in enumerate(errors) if e.high > 0 and e.high >= least},
        overflows=total.high > of.largest,
    )


def _error(y: Fraction, y_target: Fraction, margin: float, of: Format, slack: Fraction | None) -> Range:
    difference = y - y_target
    error = difference + Fraction(margin)
    off = slack or Fraction(0)
    if off or not of.holds(difference):
        off += of.unit * (abs(difference) + off)
    if off or not of.holds(error):
        off += of.unit * (abs(error) + off)
    return Range(max(Fraction(0), error - off), max(Fraction(0), error + off))


def _sums_exactly(errors: Sequence[Range], total: Range, of: Format) -> bool:
    """Whether every partial sum is a number of this format, whatever the order."""
    if any(e.low != e.high for e in errors):
        return False
    return total.low * max(e.low.denominator for e in errors) < 2**of.precision


def _depth(count: int) -> int:
    """Additions that a number goes through in a sum of so many: in chunks, which a tree adds up."""
    return min(count - 1, 24 + count.bit_length())


class Found(NamedTuple):
    """What was kept of a sample, and the loss that it then has; None where that is NaN."""

    kept: set[int]
    loss: Range | None


def check_rows(rows: Sequence[Row], losses: Sequence[float], kept: Sequence[set[int]], of: Format) -> list[Found]:
    """Compare every sample's loss, without weights, and what was kept of it, with what it may be."""
    found = []
    for i, (r, loss, k) in enumerate(zip(rows, losses, kept, strict=True)):
        what = f"sample {i}: loss {loss}, kept {sorted(k)}"
        if loss != loss:
            assert r.breaks or r.overflows, what
            found.append(Found(set(), None))
            continue
        assert not r.breaks, f"{what}, expected NaN"
        # Where the sum of the errors is infinite, the largest bounds their mean.
        is_fine = r.must <= k <= r.may or (r.overflows and k <= r.largest)
        assert is_fine, f"{what}, expected {sorted(r.must)}, perhaps {sorted(r.may - r.must)}"
        assert k or not any(e.low > 0 for e in r.errors), f"{what}, but there are errors"
        expected = ZERO
        if k:
            errors = [r.errors[j] for j in k]
            expected = Range(sum(e.low for e in errors) / len(k), sum(e.high for e in errors) / len(k))
            expected = expected.widened((_depth(len(r.errors)) + 2) * of.unit, of.least)
        assert loss in expected, f"{what}, expected {float(expected.low)} to {float(expected.high)}"
        found.append(Found(k, expected))
    return found


def kept_by_gradient(rows: Sequence[Row], gradients: Sequence[Sequence[float]], dtype: torch.dtype) -> list[set[int]]:
    """What was kept, by the gradients of the samples' losses: 1 / |K| at each of them, -1 at the target."""
    all_kept = []
    for i, (r, g) in enumerate(zip(rows, gradients, strict=True)):
        kept = {j for j, x in enumerate(g) if x != 0 and j != r.target}
        all_kept.append(kept)
        if g and all(x != x for x in g):  # of a loss that is NaN
            continue
        expected = [(j in kept) / max(len(kept), 1) for j in range(len(g))]
        if r.target is not None:
            expected[r.target] = -float(bool(kept))
        check_numbers(g, expected, dtype, what=f"gradient of sample {i}")
    return all_kept


def check_numbers(
    actual: Iterable[float],
    expected: Iterable[float | None],
    dtype: torch.dtype,
    *,
    roundings: int = 8,
    off: Iterable[float] | None = None,
    what: str = "",
) -> None:
    """Compare numbers that were computed in the arithmetic's type, in some roundings, and then rounded to `dtype`."""
    of, to = FORMATS[torch.float64 if dtype == torch.float64 else torch.float32], FORMATS[dtype]
    relative, absolute, largest = float(roundings * of.unit + 2 * to.unit), float(2 * to.least), float(to.largest)
    actual = list(actual)
    off = [0.0] * len(actual) if off is None else off
    for i, (a, e, o) in enumerate(zip(actual, expected, off, strict=True)):
        if e is None:
            assert a != a, f"{what}[{i}] is {a}, expected NaN"
            continue
        if o == math.inf:  # parts of it are beyond the largest number, and one infinity from another is NaN
            continue
        near = abs(e) * relative + absolute + o
        is_beyond = math.isinf(a) and abs(e) + near > largest and (a > 0) == (e > 0)
        assert abs(a - e) <= near or is_beyond, f"{what}[{i}] is {a}, expected {float(e)} to within {near:.3g}"


def product(a: Tensor, b: Tensor, of: Format, relative: float) -> tuple[Tensor, Tensor]:
    """The product of two matrices, and how far one that is made of such numbers may be from it: infinitely far where
    the order of a sum decides whether it is infinite."""
    largest = float(of.largest)
    # A processor's instruction for bfloat16 takes what is subnormal for 0.
    least = float(of.least) * (2 ** (of.precision - 1) if of is FORMATS[torch.bfloat16] else 1)
    a, b = a.double(), b.double()
    x, y = (m.nan_to_num(0.0, 0.0, 0.0).abs() for m in (a, b))
    most = x.masked_fill(x > largest, math.inf) @ y.masked_fill(y > largest, math.inf)
    off = (x @ y) * relative + least * (x.sum(1, keepdim=True) + y.sum(0) + len(b))
    return a @ b, off.masked_fill(~(most <= largest), math.inf)


class Reduced(NamedTuple):
    """What becomes of the samples' losses."""

    losses: list[Range | None]  # one, or with "none" one of each sample
    factors: list[Fraction]  # of each sample's gradient
    overflows: bool = False  # on the way to a mean there is a sum


def reduce(
    rows: Sequence[Row],
    found: Sequence[Found],
    weights: Sequence[Fraction],
    reduction: str,
    normalizer: Fraction | None,
    of: Format,
) -> Reduced:
    """The loss of a batch. Of samples that are mixed, each is there once for each of its targets."""
    count = len(rows)
    losses = [
        None if f.loss is None else Range(w * f.loss.low, w * f.loss.high) for f, w in zip(found, weights, strict=True)
    ]
    if reduction == "none":
        return Reduced([x and x.widened(2 * of.unit, of.least) for x in losses], list(weights))
    divisor = Fraction(1)
    if normalizer is not None:
        divisor = normalizer
    elif reduction != "sum":
        counts = {"mean": lambda r, f: bool(f.kept), "batchmean": lambda r, f: r.target is not None}[reduction]
        divisor = sum((w for r, f, w in zip(rows, found, weights, strict=True) if counts(r, f)), Fraction(0))
    factors = [w / divisor if divisor else Fraction(0) for w in weights]
    if any(x is None for x in losses):
        return Reduced([None], factors)
    total = Range(sum(x.low for x in losses), sum(x.high for x in losses)) if losses else ZERO
    total = total.widened((2 * count + 8) * of.unit, count * of.least)
    loss = Range(total.low / (divisor or 1), total.high / (divisor or 1)).widened(of.unit, of.least)
    return Reduced([loss], factors, overflows=total.high > of.largest)


def check_losses(actual: Tensor, expected: Reduced, of: Format) -> None:
    for i, (a, e) in enumerate(zip(actual.double().flatten().tolist(), expected.losses, strict=True)):
        if e is None:
            assert a != a, f"loss[{i}] is {a}, expected NaN"
        else:
            beyond = expected.overflows or e.high > of.largest
            assert a in e or (beyond and not math.isfinite(a)), (
                f"loss[{i}] is {a}, expected {float(e.low)} to {float(e.high)}"
            )


def gradients(
    rows: Sequence[Row], found: Sequence[Found], coefficients: Sequence[Fraction], num_classes: int
) -> list[list[float | None]]:
    """Those of the logits, where each sample's loss has a coefficient; None where they are NaN."""
    all_of_them: list[list[float | None]] = []
    for r, f, c in zip(rows, found, coefficients, strict=True):
        if f.loss is None:
            all_of_them.append([None] * num_classes)
            continue
        of_kept = float(c / max(len(f.kept), 1))
        gradient: list[float | None] = [of_kept if j in f.kept else 0.0 for j in range(num_classes)]
        if f.kept and r.target is not None:
            gradient[r.target] = -float(c)
        all_of_them.append(gradient)
    return all_of_them
