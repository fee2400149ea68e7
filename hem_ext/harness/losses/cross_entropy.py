"""Cross-entropy, and what weights or regularises it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hem_ext.harness.losses.base import Loss, check_not_negative, cross_entropy, mean_of_kept, without_ignored
from hem_ext.harness.models import HeadOptions


class CrossEntropy(Loss):
    r"""Softmax cross-entropy, :math:`-\log p_y`.

    Source: Bridle, *Training stochastic model recognition algorithms as networks can lead to maximum mutual
    information estimation of parameters*, NIPS 1989.

    Example::

        >>> import torch
        >>> from hem_ext.harness.losses import make_loss
        >>> make_loss("ce", num_classes=2)(torch.zeros(1, 2), torch.tensor([0]))  # log 2
        tensor(0.6931)
    """

    name = "ce"

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, labels, kept = without_ignored(logits, target, self.ignore_index)
        # As fast as torch's own, because the time spent in the losses is compared too.
        if kept is None:
            return cross_entropy(logits, labels, "mean")
        return mean_of_kept(self.per_sample(logits, labels), kept)


class LabelSmoothing(Loss):
    r"""Cross-entropy with smoothed labels, :math:`\frac{1}{1-\alpha} \sum_k -((1-\alpha) t_k + \alpha/C) \log p_k`.

    The factor is that of Kornblith et al.; ``label_smoothing`` of :func:`torch.nn.functional.cross_entropy` has none.

    Args:
        alpha: the share of the label that is spread over all classes.

    Source: Szegedy, Vanhoucke, Ioffe, Shlens & Wojna, *Rethinking the Inception Architecture for Computer Vision*,
    arXiv 1512.00567; Kornblith, Chen, Lee & Norouzi, *What's in a Loss Function for Image Classification?*,
    arXiv 2010.16402.

    Example::

        >>> import torch
        >>> from hem_ext.harness.losses import make_loss
        >>> make_loss("ce-ls", num_classes=2, alpha=0.5)(torch.zeros(1, 2), torch.tensor([0]))  # 2 log 2
        tensor(1.3863)
    """

    name = "ce-ls"

    def __init__(self, *, alpha: float = 0.1, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha must be in [0, 1), got {alpha}")
        self.alpha = alpha

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels, label_smoothing=self.alpha) / (1 - self.alpha)


class Focal(Loss):
    r"""Focal loss, :math:`(1 - p_y)^\gamma \, \mathrm{CE}`.

    Args:
        gamma: 0 is cross-entropy; the larger, the less a well-classified sample counts.

    Source: Lin, Goyal, Girshick, He & Dollár, *Focal Loss for Dense Object Detection*, arXiv 1708.02002.

    Example::

        >>> import torch
        >>> from hem_ext.harness.losses import make_loss
        >>> make_loss("focal", num_classes=2)(torch.zeros(1, 2), torch.tensor([0]))  # log 2 / 4
        tensor(0.1733)
    """

    name = "focal"

    def __init__(self, *, gamma: float = 2.0, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)
        check_not_negative(gamma=gamma)
        self.gamma = gamma

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(logits, labels)
        # 1 - p_y. Clamped because a power below 1 has an infinite slope at 0.
        missing = (-torch.expm1(-loss)).clamp_min(torch.finfo(loss.dtype).tiny)
        return missing**self.gamma * loss


class LogitPenalty(Loss):
    r"""Cross-entropy and a penalty on the logits, :math:`\mathrm{CE} + \beta \lVert z \rVert^2 / 2`.

    Args:
        beta: the weight of the penalty.

    Source: Kornblith, Chen, Lee & Norouzi, *What's in a Loss Function for Image Classification?*, arXiv 2010.16402.

    Example::

        >>> import torch
        >>> from hem_ext.harness.losses import make_loss
        >>> make_loss("logit-penalty", num_classes=2, beta=1)(torch.ones(1, 2), torch.tensor([0]))  # log 2 + 1
        tensor(1.6931)
    """

    name = "logit-penalty"

    def __init__(self, *, beta: float = 6e-4, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)
        check_not_negative(beta=beta)
        self.beta = beta

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels) + self.beta / 2 * logits.square().sum(1)


class Dropout(CrossEntropy):
    """Cross-entropy with dropout on the penultimate features, which is the head's to do.

    Args:
        keep: the share of the features that is kept.

    Source: Srivastava, Hinton, Krizhevsky, Sutskever & Salakhutdinov, *Dropout: A Simple Way to Prevent Neural
    Networks from Overfitting*, JMLR 15, 2014; the constant from Kornblith, Chen, Lee & Norouzi, arXiv 2010.16402.

    Example::

        >>> from hem_ext.harness.losses import make_loss
        >>> make_loss("dropout", num_classes=2, keep=0.75).head.dropout
        0.25
    """

    name = "dropout"

    def __init__(self, *, keep: float = 0.7, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {keep}")
        self.keep = keep
        self.head = HeadOptions(dropout=1 - keep)


class FinalL2(CrossEntropy):
    r"""Cross-entropy and :math:`\lambda \lVert W \rVert^2 / 2` for the weights W of the head, without its bias.

    Args:
        lam: the weight of the penalty, lambda.

    Source: Kornblith, Chen, Lee & Norouzi, *What's in a Loss Function for Image Classification?*, arXiv 2010.16402.

    Example::

        >>> from torch import nn
        >>> from hem_ext.harness.losses import make_loss
        >>> head = nn.Linear(3, 2)
        >>> _ = nn.init.ones_(head.weight)
        >>> make_loss("final-l2", num_classes=2, lam=0.5).penalty(head)
        tensor(1.5000, grad_fn=<MulBackward0>)
    """

    name = "final-l2"

    def __init__(self, *, lam: float = 8e-4, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)
        check_not_negative(lam=lam)
        self.lam = lam

    def penalty(self, head: nn.Module) -> Tensor:
        return self.lam / 2 * head.weight.square().sum()
