"""HEM by the letter of its definition: scalar loops over Python floats. Shares nothing with hem_ext."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def sample(logits: list[float], target: int, margin: float) -> tuple[float, list[float]]:
    """The loss of one sample and its gradient."""
    errors = []
    for j, y in enumerate(logits):
        errors.append(0.0 if j == target else max(0.0, y - logits[target] + margin))
    threshold = sum(errors) / len(errors)
    kept = [j for j, e in enumerate(errors) if e >= threshold and e > 0]
    gradient = [0.0] * len(logits)
    if not kept:
        return 0.0, gradient
    for j in kept:
        gradient[j] = 1.0 / len(kept)
    gradient[target] = -1.0
    return sum(errors[j] for j in kept) / len(kept), gradient


def hem(
    input: Tensor,
    target: Tensor,
    *,
    margin: float | Tensor = 0.2,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    grad_loss: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss and, for `grad_loss` (default 1 everywhere), the gradient, both float64 and on the CPU.

    Finite logits only.
    """
    with torch.device("cpu"):
        given = [x.cpu() if isinstance(x, Tensor) else x for x in (input, target, margin, weight, grad_loss)]
        return _hem(*given, ignore_index=ignore_index, reduction=reduction)


def _hem(input, target, margin, weight, grad_loss, *, ignore_index, reduction):
    class_dim = 0 if input.dim() == 1 else 1
    rows = input.detach().double().movedim(class_dim, -1)
    losses = torch.zeros(target.shape, dtype=torch.float64)
    weights = torch.zeros(target.shape, dtype=torch.float64)
    active = torch.zeros(target.shape, dtype=torch.float64)
    gradients = torch.zeros(rows.shape, dtype=torch.float64)
    for position in itertools.product(*map(range, target.shape)):
        label = int(target[position])
        if label == ignore_index:
            continue
        m = float(margin) if not isinstance(margin, Tensor) else float(margin[label])
        w = 1.0 if weight is None else float(weight[label])
        loss, gradient = sample(rows[position].tolist(), label, m)
        losses[position] = w * loss
        weights[position] = w
        active[position] = w if loss > 0 else 0.0
        gradients[position] = w * torch.tensor(gradient, dtype=torch.float64)

    if reduction == "none":
        scale = torch.ones_like(losses) if grad_loss is None else grad_loss.double()
        return losses, (gradients * scale.unsqueeze(-1)).movedim(-1, class_dim)
    denominator = {"mean": active.sum(), "batchmean": weights.sum(), "sum": torch.tensor(1.0)}[reduction]
    factor = 1.0 / denominator if denominator > 0 else 0.0 * denominator
    scale = 1.0 if grad_loss is None else float(grad_loss)
    return losses.sum() * factor, (gradients * factor * scale).movedim(-1, class_dim)
