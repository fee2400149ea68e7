"""Bilinear interpolation in exact arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from properties.exact import Format
from torch import Tensor


class Axis(NamedTuple):
    """One dimension: output i is `above[i][0]` times input k, the first that is not 0, and so on."""

    matrix: list[dict[int, Fraction]]  # of each output, the share of the inputs it lies between
    off: Fraction  # how far rounding moves a share

    @classmethod
    def of(cls, size: int, out: int, align_corners: bool, of: Format) -> Axis:
        half = Fraction(0) if align_corners else Fraction(1, 2)
        scale = Fraction(size, out)
        if align_corners:
            scale = Fraction(size - 1, out - 1) if out > 1 else Fraction(0)
        matrix = []
        for i in range(out):
            x = min(max(scale * (i + half) - half, Fraction(0)), Fraction(size - 1))
            k = int(x)
            matrix.append({k: 1 - (x - k), min(k + 1, size - 1): x - k} if x > k else {k: Fraction(1)})
        is_exact = scale.denominator & (scale.denominator - 1) == 0
        return cls(matrix, Fraction(0) if is_exact else of.unit * 4 * (size + 1))

    def as_tensor(self, size: int) -> Tensor:
        found = torch.zeros(len(self.matrix), size, dtype=torch.float64)
        for i, shares in enumerate(self.matrix):
            for k, share in shares.items():
                found[i, k] += float(share)
        return found

    def touched(self, i: int, size: int) -> set[int]:
        """The inputs that are read for output i: two, also where it lies on one; of as many as outputs its own."""
        k = min(self.matrix[i])
        return {k} if len(self.matrix) == size else {k, min(k + 1, size - 1)}


def interpolated(
    x: Tensor, rows: Axis, columns: Axis, are_exact: bool, of: Format
) -> tuple[list[list[Fraction | float]], list[list[Fraction]] | None]:
    """Of logits (N, C, h, w) the classes of every pixel, and how far rounding moves each of them; None: not at all.

    A pixel with a NaN among the logits it lies between has NaN for all classes.
    """
    logits, slack = [], []
    given = x.detach().double().tolist()
    largest = x.detach().double().nan_to_num().abs().amax((2, 3)).tolist()
    off = 2 * (rows.off + columns.off) + 8 * of.unit
    reached = x.isnan().any(1).tolist()
    for image, most, nan in zip(given, largest, reached, strict=True):
        planes = [[[Fraction(0 if v != v else v) for v in line] for line in plane] for plane in image]
        for pixel in pixels_of(rows, columns):
            above, left = rows.matrix[pixel[0]], columns.matrix[pixel[1]]
            shares = [(i, k, a * b) for i, a in above.items() for k, b in left.items()]
            if any(nan[i][k] for i, k in touched(rows, columns, pixel, x.shape[2:])):
                logits.append([float("nan")] * len(planes))
            else:
                logits.append([sum((s * p[i][k] for i, k, s in shares), Fraction(0)) for p in planes])
            slack.append([Fraction(m) * off + 4 * of.least for m in most])
    return logits, None if are_exact else slack


def pixels_of(rows: Axis, columns: Axis) -> Iterator[tuple[int, int]]:
    return itertools.product(range(len(rows.matrix)), range(len(columns.matrix)))


def touched(rows: Axis, columns: Axis, pixel: tuple[int, int], size: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The logits that are read for a pixel."""
    return itertools.product(rows.touched(pixel[0], size[0]), columns.touched(pixel[1], size[1]))
