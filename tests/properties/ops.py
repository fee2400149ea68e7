"""Every op as a function of logits, with its gradient: what an invariance of HEM is one of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from properties.checks import Outcome, outcome
from properties.pair import Pair
from properties.strategies import EXACT, FINITE, KINDS
from torch import Tensor

from hem_ext import hem_loss, linear_hem_loss, upsampled_hem_loss
from hem_ext.mix import mixed_hem_loss


def _hem(_: Pair, x: Tensor, t: Tensor, **options: Any) -> Outcome:
    leaf = x.detach().requires_grad_()
    return outcome(hem_loss(leaf, t, **options), leaf)


def _upsampled(_: Pair, x: Tensor, t: Tensor, **options: Any) -> Outcome:
    leaf = x.detach().requires_grad_()
    return outcome(upsampled_hem_loss(leaf, t, **options), leaf)


def _linear(_: Pair, x: Tensor, t: Tensor, *, skip_finished: bool = True, **options: Any) -> Outcome:
    """The classifier is the identity."""
    num_classes = x.shape[1]
    leaf = x.detach().requires_grad_()
    # What has dimensions behind the classes is given to a convolution.
    weight = torch.eye(num_classes, dtype=x.dtype).view(num_classes, num_classes, *[1] * (x.dim() - 2))
    options["class_weight"] = options.pop("weight", None)
    loss = linear_hem_loss(leaf, weight, None, t, skip_finished=skip_finished, chunk_size=3, **options)
    return outcome(loss, leaf, keeps_format=options.get("backend") != "reference")


def _unskipped(pair: Pair, x: Tensor, t: Tensor, **options: Any) -> Outcome:
    return _linear(pair, x, t, skip_finished=False, **options)


def _mixed(_: Pair, x: Tensor, a: Tensor, b: Tensor, **options: Any) -> Outcome:
    leaf = x.detach().requires_grad_()
    return outcome(mixed_hem_loss(leaf, a, b, 0.375, **options), leaf)


def _parallel(pair: Pair, x: Tensor, t: Tensor, **options: Any) -> Outcome:
    first = (x.shape[1] + 1) // 3
    parts = x.split([first, x.shape[1] - first], 1)
    answers = pair([(part, t, None, options) for part in parts])
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    (loss, left), (_, right) = answers
    return loss, torch.cat([left, right], 1)


class Op(NamedTuple):
    call: Callable[..., Outcome]
    kinds: tuple[str, ...] = KINDS  # of logits that it can be given
    targets: int = 1
    is_coarse: bool = False  # targets are those of a finer grid than the logits
    takes_normalizer: bool = True
    backends: tuple[str, ...] = ("native", "reference")

    def finite(self) -> tuple[str, ...]:
        return tuple(kind for kind in self.kinds if kind in (*EXACT, "normal"))

    @property
    def drawn(self) -> dict[str, Any]:
        return {"targets": self.targets, "is_coarse": self.is_coarse}


# Of one class the others' logits are in no product and in no interpolation only where they are finite.
OPS = {
    "hem_loss": Op(_hem),
    "linear_hem_loss": Op(_linear, FINITE),
    "linear_hem_loss of all rows": Op(_unskipped, FINITE),
    "upsampled_hem_loss": Op(_upsampled, FINITE, is_coarse=True),
    "mixed_hem_loss": Op(_mixed, targets=2, takes_normalizer=False),
    "class_parallel_hem_loss": Op(_parallel, takes_normalizer=False),
}
