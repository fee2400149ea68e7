"""Bilinear interpolation in exact arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from properties.exact import Format
from torch import Tensor


class Axis(NamedTuple):
    """One dimension: output i is `above[i][0]` times input k, the first that is not 0, and so on."""

    matrix: list[dict[int, Fraction]]  # of each output, the share of the inputs it lies between
    unused: list[list[int]]  # of each output, what is read as well, and has no share
    off: Fraction  # how far rounding moves a share

    @classmethod
    def of(cls, size: int, out: int, align_corners: bool, of: Format) -> Axis:
        half = Fraction(0) if align_corners else Fraction(1, 2)
        scale = Fraction(size, out)
        if align_corners:
            scale = Fraction(size - 1, out - 1) if out > 1 else Fraction(0)
        matrix, unused = [], []
        for i in range(out):
            x = max(scale * (i + half) - half, Fraction(0))
            k = min(int(x), size - 1)
            behind = min(k + 1, size - 1)
            matrix.append({k: 1 - (x - k), behind: x - k} if x > k < behind else {k: Fraction(1)})
            unused.append([k if size == out else behind] if x == k else [])
        is_exact = scale.denominator & (scale.denominator - 1) == 0
        return cls(matrix, unused, Fraction(0) if is_exact else of.unit * 4 * (size + 1))

    def as_tensor(self, size: int) -> Tensor:
        found = torch.zeros(len(self.matrix), size, dtype=torch.float64)
        for i, shares in enumerate(self.matrix):
            for k, share in shares.items():
                found[i, k] += float(share)
        return found

    def reads(self, i: int) -> list[tuple[int, Fraction]]:
        """The inputs that are read for output i, with their shares."""
        return [*self.matrix[i].items(), *((k, Fraction(0)) for k in self.unused[i])]


def axes(size: Sequence[int], out: Sequence[int], align_corners: bool, of: Format) -> tuple[Axis, Axis]:
    """Those of an image. One that keeps its size is not interpolated."""
    rows, columns = (Axis.of(n, o, align_corners, of) for n, o in zip(size, out, strict=True))
    if tuple(size) != tuple(out):
        return rows, columns
    return rows._replace(unused=[[]] * size[0]), columns._replace(unused=[[]] * size[1])


def interpolated(
    x: Tensor, rows: Axis, columns: Axis, are_exact: bool, of: Format
) -> tuple[list[list[Fraction | float]], list[list[Fraction]] | None]:
    """Of logits (N, C, h, w) the classes of every pixel, and how far rounding moves each of them; None: not at all.

    What is no number stays none, also where its share is 0: 0 times it is NaN.
    """
    logits, slack = [], []
    given = x.detach().double()
    numbers = given.nan_to_num(0.0, 0.0, 0.0)
    off = 2 * (rows.off + columns.off) + 8 * of.unit
    for image, finite, most in zip(given.tolist(), numbers.tolist(), numbers.abs().amax((2, 3)).tolist(), strict=True):
        planes = [[[Fraction(v) for v in line] for line in plane] for plane in finite]
        for pixel in pixels_of(rows, columns):
            read = list(touched(rows, columns, pixel))
            of_pixel: list[Fraction | float] = []
            for values, plane in zip(image, planes, strict=True):
                specials = [values[i][k] * bool(share) for i, k, share in read if not math.isfinite(values[i][k])]
                of_pixel.append(sum(specials) if specials else sum(share * plane[i][k] for i, k, share in read))
            logits.append(of_pixel)
            slack.append([Fraction(m) * off + 4 * of.least for m in most])
    return logits, None if are_exact else slack


def pixels_of(rows: Axis, columns: Axis) -> Iterator[tuple[int, int]]:
    return itertools.product(range(len(rows.matrix)), range(len(columns.matrix)))


def touched(rows: Axis, columns: Axis, pixel: tuple[int, int]) -> Iterator[tuple[int, int, Fraction]]:
    """The logits that are read for a pixel, with their shares."""
    for (i, a), (k, b) in itertools.product(rows.reads(pixel[0]), columns.reads(pixel[1])):
        yield i, k, a * b
