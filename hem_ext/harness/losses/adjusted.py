"""Cross-entropy of other logits: normalised, scaled, or shifted by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hem_ext.harness.losses.base import (
    Loss,
    check_counts,
    check_not_negative,
    check_positive,
    cross_entropy,
    of_class,
    one_hot,
)
from hem_ext.harness.losses.cross_entropy import CrossEntropy
from hem_ext.harness.models import HeadOptions


class LogitNorm(Loss):
    r"""Cross-entropy of normalised logits in training, :math:`\mathrm{CE}(z / (\lVert z \rVert + 10^{-7}) / \tau)`.

    At test the logits are used as they are.

    Args:
        tau: the temperature, OpenOOD's.

    Source: Wei, Xie, Cheng, Feng, An & Li, *Mitigating Neural Network Overconfidence with Logit Normalization*,
    arXiv 2205.09310.

    Example::

        >>> import torch
        >>> from hem_ext.harness.losses import make_loss
        >>> criterion = make_loss("logitnorm", num_classes=2, tau=1)
        >>> criterion(torch.tensor([[3.0, 4.0]]), torch.tensor([1]))  # CE of 0.6 and 0.8
        tensor(0.5981)
    """

    name = "logitnorm"

    def __init__(self, *, tau: float = 0.04, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)
        check_positive(tau=tau)
        self.tau = tau

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(logits, dim=1, keepdim=True)
        return cross_entropy(logits / (norm + 1e-7) / self.tau, labels)


class LogitAdjusted(Loss):
    r"""Cross-entropy of logits shifted by the class priors, :math:`\mathrm{CE}(z + \tau \log \pi)`.

    At test nothing is added. With `post_hoc` it is the other way: training is plain cross-entropy, and
    :math:`z - \tau \log \pi` is used at test.

    Args:
        class_counts: training samples of each class ``(C,)``; the priors are their shares.
        tau: the weight of the shift.
        post_hoc: shift at test instead of in training.

    Source: Menon, Jayasumana, Rawat, Jain, Veit & Kumar, *Long-tail learning via logit adjustment*,
    arXiv 2007.07314.

    Example::

        >>> import torch
        >>> from hem_ext.harness.losses import make_loss
        >>> criterion = make_loss("logit-adjusted", num_classes=2, class_counts=[90, 10])
        >>> criterion(torch.zeros(1, 2), torch.tensor([1]))  # -log 0.1
        tensor(2.3026)
    """

    name = "logit-adjusted"

    def __init__(
        self,
        *,
        class_counts: Sequence[float] | Tensor,
        tau: float = 1.0,
        post_hoc: bool = False,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(ignore_index=ignore_index)
        check_not_negative(tau=tau)
        counts = check_counts(class_counts)
        self.post_hoc = post_hoc
        self.register_buffer("shift", (tau * (counts / counts.sum()).log()).to(torch.get_default_dtype()))

    def identity(self) -> list[Any]:
        """With `post_hoc`, that of cross-entropy."""
        return CrossEntropy(ignore_index=self.ignore_index).identity() if self.post_hoc else super().identity()

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits if self.post_hoc else logits + of_class(self.shift, logits), labels)

    def outputs(self, logits: Tensor) -> Tensor:
        return logits - of_class(self.shift, logits) if self.post_hoc else logits


class LDAM(Loss):
    r"""Cross-entropy with label-distribution-aware margins, :math:`\mathrm{CE}(s (z - m_y t))`, for cosines z.

    The margin of a class with n training samples is proportional to :math:`n^{-1/4}`. The head normalises
    features and weights; at test its cosines are used without margins, times s.

    Args:
        class_counts: training samples of each class ``(C,)``.
        max_margin: the margin of the rarest class.
        s: the scale of the cosines.

    Source: Cao, Wei, Gaidon, Arechiga & Ma, *Learning Imbalanced Datasets with Label-Distribution-Aware Margin
    Loss*, arXiv 1906.07413.

    Example::

        >>> from hem_ext.harness.losses import make_loss
        >>> make_loss("ldam", num_classes=2, class_counts=[16, 1]).margins
        tensor([0.2500, 0.5000])
    """

    name = "ldam"

    head = HeadOptions(normalise_weight=True, normalise_features=True, bias=False)

    def __init__(
        self,
        *,
        class_counts: Sequence[float] | Tensor,
        max_margin: float = 0.5,
        s: float = 30.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(ignore_index=ignore_index)
        check_not_negative(max_margin=max_margin)
        check_positive(s=s)
        counts = check_counts(class_counts)
        self.s = s
        self.register_buffer("margins", (max_margin * (counts.min() / counts) ** 0.25).to(torch.get_default_dtype()))

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        margins = of_class(self.margins, logits) * one_hot(logits, labels)
        return cross_entropy(self.s * (logits - margins), labels)

    def outputs(self, logits: Tensor) -> Tensor:
        return self.s * logits


class CosineSoftmax(Loss):
    r"""Cross-entropy at a low temperature, :math:`\mathrm{CE}(z / \tau)`, for a head with weights of norm 1.

    The features are not normalised, as in the authors' code, and the head has a bias. :math:`z / \tau` is used
    at test too.

    Args:
        tau: the temperature.

    Source: Kornblith, Chen, Lee & Norouzi, *What's in a Loss Function for Image Classification?*, arXiv 2010.16402.

    Example::

        >>> import torch
        >>> from hem_ext.harness.losses import make_loss
        >>> criterion = make_loss("cosine-softmax", num_classes=2)
        >>> criterion(torch.tensor([[0.05, 0.0]]), torch.tensor([0]))  # CE of 1 and 0
        tensor(0.3133)
    """

    name = "cosine-softmax"

    head = HeadOptions(normalise_weight=True)

    def __init__(self, *, tau: float = 0.05, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)
        check_positive(tau=tau)
        self.tau = tau

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.outputs(logits), labels)

    def outputs(self, logits: Tensor) -> Tensor:
        return logits / self.tau
