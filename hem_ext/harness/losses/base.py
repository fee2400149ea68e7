"""What every loss is made of."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hem_ext.harness.models import HeadOptions
from hem_ext.reference import divided, over_group


class Loss(nn.Module):
    """A loss of logits and class indices, and what it asks of the network besides.

    Most losses define :meth:`per_sample` alone. A network is trained and used with any of them like this::

        model = SmallCNN(num_classes, head=criterion.head)
        loss = criterion(model(images), labels) + criterion.penalty(model.head)
        predicted = criterion.outputs(model(test_images)).argmax(1)

    Args:
        ignore_index: samples with this target add nothing to the value or the gradient, whatever their logits
            hold. A batch of nothing else has loss 0 and gradient 0.

    Shape:
        - logits: ``(N, C)`` or ``(N, C, H, W)``, of a floating dtype; float16 and bfloat16 are computed in float32
        - target: ``(N,)`` or ``(N, H, W)``, of an integer dtype
        - output: a scalar, float32 or, for float64 logits, float64

    Example::

        >>> import torch
        >>> from hem_ext.harness.losses import make_loss
        >>> from hem_ext.harness.models import SmallCNN
        >>> criterion = make_loss("ldam", num_classes=3, class_counts=[50, 20, 5])
        >>> model = SmallCNN(3, width=4, head=criterion.head)
        >>> logits, labels = model(torch.rand(2, 1, 8, 8)), torch.tensor([0, 2])
        >>> (criterion(logits, labels) + criterion.penalty(model.head)).backward()
        >>> criterion.outputs(logits).softmax(1).shape
        torch.Size([2, 3])
    """

    head: HeadOptions = HeadOptions()
    """The classifier head that the loss is made for."""

    name: str
    """What tables and commands call it; its class's name where the class does not say."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # Not inherited: what derives from a loss is another one.
        cls.name = vars(cls).get("name", cls.__name__)

    def __init__(self, *, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    @classmethod
    def constants(cls) -> dict[str, Any]:
        """What the loss can be given by keyword, and the defaults."""
        parameters = inspect.signature(cls).parameters.values()
        return {p.name: p.default for p in parameters if p.name not in ("class_counts", "ignore_index")}

    @classmethod
    def needs_class_counts(cls) -> bool:
        """Whether it cannot be made without."""
        counts = inspect.signature(cls).parameters.get("class_counts")
        return counts is not None and counts.default is counts.empty

    def identity(self) -> list[Any]:
        """What decides the training with this loss, beside the data, as JSON: losses of equal identity train the same.

        It is the name and the loss's numbers: its public attributes, which the head has to follow from too, and its
        buffers, to the last bit. A loss that trains as another one does overrides it.

        Example::

            >>> from hem_ext.harness.losses import make_loss
            >>> make_loss("focal", num_classes=10, gamma=3).identity()
            ['focal', {'ignore_index': -100.0, 'gamma': 3.0}]
        """
        of_module = ("training", "head")
        numbers = {k: float(v) for k, v in vars(self).items() if not k.startswith("_") and k not in of_module}
        return [self.name, numbers | {k: values.tolist() for k, values in self.named_buffers()}]

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of every sample.

        Args:
            logits: ``(N, C, ...)``, float32 or float64.
            labels: ``(N, ...)``, int64, all of them classes.

        Returns:
            ``(N, ...)``, of the dtype of `logits`.
        """
        raise NotImplementedError

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, labels, kept = without_ignored(logits, target, self.ignore_index)
        return mean_of_kept(self.per_sample(logits, labels), kept)

    def total(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss as a sum, and what it is to be divided by.

        A loss that is no mean over samples (dice) is that of these samples, weighted by their number.
        """
        logits, labels, kept = without_ignored(logits, target, self.ignore_index)
        kept = torch.ones_like(labels) if kept is None else kept
        return (self.per_sample(logits, labels) * kept).sum(), kept.sum()

    def share(self, logits: Tensor, target: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        """The loss of this process's share of a batch: the mean over `group`, whose processes all have to call, is that
        of the whole batch, and so is the mean of their gradients.
        """
        total, count = self.total(logits, target)
        return divided(total, over_group(count.to(total.dtype), group))

    def penalty(self, head: nn.Module) -> Tensor:
        """What is added to the loss for the weights of the head: a scalar, 0 for most losses."""
        return head.weight.new_zeros(())

    def outputs(self, logits: Tensor) -> Tensor:
        """The logits to use at test, of the same shape: for predictions, probabilities and scores."""
        return logits


def without_ignored(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits in float32 or float64, labels as int64, and which samples are kept, None if all are known to be.

    Ignored samples become samples of class 0 with logits 0: finite, and cut off from the gradient.
    """
    if logits.dim() < 2 or target.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"expected logits (N, C) or (N, C, H, W) with target (N,) or (N, H, W), got {tuple(logits.shape)} "
            f"and {tuple(target.shape)}"
        )
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    labels = target.long()
    kept = labels != ignore_index
    # Saves a copy of the logits; elsewhere than on the CPU, the answer would have to be waited for.
    if kept.device.type == "cpu" and kept.all():
        return logits, labels, None
    return torch.where(kept.unsqueeze(1), logits, 0), torch.where(kept, labels, 0), kept


def mean_of_kept(losses: Tensor, kept: Tensor | None) -> Tensor:
    return losses.mean() if kept is None else (losses * kept).sum() / kept.sum().clamp_min(1)


def one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.zeros_like(logits).scatter_(1, labels.unsqueeze(1), 1)


def of_class(values: Tensor, logits: Tensor) -> Tensor:
    """One value per class ``(C,)``, shaped to broadcast with `logits`."""
    return values.view(-1, *[1] * (logits.dim() - 2))


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "none", **options: float) -> Tensor:
    # Nothing is left to ignore, and -100 is a mistake where another index is the ignored one.
    return F.cross_entropy(logits, labels, ignore_index=torch.iinfo(labels.dtype).min, reduction=reduction, **options)


def check_positive(**constants: float) -> None:
    for name, value in constants.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a number above 0, got {value}")


def check_not_negative(**constants: float) -> None:
    for name, value in constants.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number not below 0, got {value}")


def check_counts(class_counts: Sequence[float] | Tensor) -> Tensor:
    counts = torch.as_tensor(class_counts, dtype=torch.float64, device="cpu")
    if counts.dim() != 1 or not ((counts > 0) & counts.isfinite()).all():
        raise ValueError(f"class_counts must be one number above 0 per class, got {class_counts}")
    return counts
