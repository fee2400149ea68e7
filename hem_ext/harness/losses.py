r"""The losses a network can be trained with, by name: HEM, and those it is compared to.

In the formulas z are the logits of a sample (a pixel), y its target class, C the number of classes, p the
softmax of z, t the target as a one-hot vector, and CE the cross-entropy. Unless a loss says otherwise, its value is
the mean over the samples that are not ignored.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hem_ext import HEMLoss, class_margins, hem_loss
from hem_ext.harness.models import HeadOptions


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
        logits, labels, kept = _without_ignored(logits, target, self.ignore_index)
        return _mean(self.per_sample(logits, labels), kept)

    def total(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss as a sum and what it is to be divided by, so that several processes can share a batch.

        A loss that is no mean over samples (dice) is that of this process's samples, weighted by their number.
        """
        logits, labels, kept = _without_ignored(logits, target, self.ignore_index)
        kept = torch.ones_like(labels) if kept is None else kept
        return (self.per_sample(logits, labels) * kept).sum(), kept.sum()

    def penalty(self, head: nn.Module) -> Tensor:
        """What is added to the loss for the weights of the head: a scalar, 0 for most losses."""
        return head.weight.new_zeros(())

    def outputs(self, logits: Tensor) -> Tensor:
        """The logits to use at test, of the same shape: for predictions, probabilities and scores."""
        return logits


def _without_ignored(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor | None]:
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


def _mean(losses: Tensor, kept: Tensor | None) -> Tensor:
    return losses.mean() if kept is None else (losses * kept).sum() / kept.sum().clamp_min(1)


def _one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.zeros_like(logits).scatter_(1, labels.unsqueeze(1), 1)


def _of_class(values: Tensor, logits: Tensor) -> Tensor:
    """One value per class ``(C,)``, shaped to broadcast with `logits`."""
    return values.view(-1, *[1] * (logits.dim() - 2))


def _cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "none", **options: float) -> Tensor:
    # Nothing is left to ignore, and -100 is a mistake where another index is the ignored one.
    return F.cross_entropy(logits, labels, ignore_index=torch.iinfo(labels.dtype).min, reduction=reduction, **options)


def _check_positive(**constants: float) -> None:
    for name, value in constants.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a number above 0, got {value}")


def _check_not_negative(**constants: float) -> None:
    for name, value in constants.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number not below 0, got {value}")


def _check_counts(class_counts: Sequence[float] | Tensor) -> Tensor:
    counts = torch.as_tensor(class_counts, dtype=torch.float64, device="cpu")
    if counts.dim() != 1 or not ((counts > 0) & counts.isfinite()).all():
        raise ValueError(f"class_counts must be one number above 0 per class, got {class_counts}")
    return counts


# --- HEM ------------------------------------------------------------------------------------------------------


class HEM(Loss):
    r"""HEM with one margin for every class: :class:`hem_ext.HEMLoss`, the mean over active samples.

    Args:
        margin: None takes :math:`\sqrt{\mathrm{total} / N}` for N training samples, the authors' rule for balanced
            classes, or 0.2, which the rule gives at the size of CIFAR, if there are no `class_counts`.
        class_counts: training samples of each class ``(C,)``.
        total: the constant of the rule, a number of samples.

    Source: Spratling & Schütt, *A margin-based replacement for cross-entropy loss*, arXiv 2501.12191.

    Example::

        >>> make_loss("hem", num_classes=2, class_counts=[30_000, 20_000]).criterion
        HEMLoss(margin=0.2, ignore_index=-100, reduction='mean')
    """

    def __init__(
        self,
        *,
        margin: float | Sequence[float] | Tensor | None = None,
        class_counts: Sequence[float] | Tensor | None = None,
        total: float = 2000.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(ignore_index=ignore_index)
        _check_positive(total=total)
        if margin is None:
            margin = 0.2 if class_counts is None else math.sqrt(total / _check_counts(class_counts).sum().item())
        self.criterion = HEMLoss(margin=margin, ignore_index=ignore_index)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.criterion(logits, target)

    def total(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        each = hem_loss(logits, target, margin=self.criterion.margin, ignore_index=self.ignore_index, reduction="none")
        return each.sum(), (each > 0).sum()


class HEMPlus(HEM):
    """HEM with a margin for each class, larger for rarer ones: :func:`hem_ext.class_margins`.

    Args:
        class_counts: training samples of each class ``(C,)``.
        total: the constant of the rule, a number of samples.

    Source: Spratling & Schütt, *A margin-based replacement for cross-entropy loss*, arXiv 2501.12191.

    Example::

        >>> make_loss("hem+", num_classes=2, class_counts=[100, 1000]).criterion.margin
        tensor([3.1623, 1.0000])
    """

    def __init__(
        self, *, class_counts: Sequence[float] | Tensor, total: float = 2000.0, ignore_index: int = -100
    ) -> None:
        super().__init__(margin=class_margins(class_counts, total), ignore_index=ignore_index)


# --- cross-entropy and what regularises it --------------------------------------------------------------------


class CrossEntropy(Loss):
    r"""Softmax cross-entropy, :math:`-\log p_y`.

    Source: Bridle, *Training stochastic model recognition algorithms as networks can lead to maximum mutual
    information estimation of parameters*, NIPS 1989.

    Example::

        >>> make_loss("ce", num_classes=2)(torch.zeros(1, 2), torch.tensor([0]))  # log 2
        tensor(0.6931)
    """

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        return _cross_entropy(logits, labels)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, labels, kept = _without_ignored(logits, target, self.ignore_index)
        # As fast as torch's own, because the time spent in the losses is compared too.
        if kept is None:
            return _cross_entropy(logits, labels, "mean")
        return _mean(self.per_sample(logits, labels), kept)


class LabelSmoothing(Loss):
    r"""Cross-entropy with smoothed labels, :math:`\frac{1}{1-\alpha} \sum_k -((1-\alpha) t_k + \alpha/C) \log p_k`.

    The factor is that of Kornblith et al.; ``label_smoothing`` of :func:`torch.nn.functional.cross_entropy` has none.

    Args:
        alpha: the share of the label that is spread over all classes.

    Source: Szegedy, Vanhoucke, Ioffe, Shlens & Wojna, *Rethinking the Inception Architecture for Computer Vision*,
    arXiv 1512.00567; Kornblith, Chen, Lee & Norouzi, *What's in a Loss Function for Image Classification?*,
    arXiv 2010.16402.

    Example::

        >>> make_loss("ce-ls", num_classes=2, alpha=0.5)(torch.zeros(1, 2), torch.tensor([0]))  # 2 log 2
        tensor(1.3863)
    """

    def __init__(self, *, alpha: float = 0.1, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha must be in [0, 1), got {alpha}")
        self.alpha = alpha

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        return _cross_entropy(logits, labels, label_smoothing=self.alpha) / (1 - self.alpha)


class LogitPenalty(Loss):
    r"""Cross-entropy and a penalty on the logits, :math:`\mathrm{CE} + \beta \lVert z \rVert^2 / 2`.

    Args:
        beta: the weight of the penalty.

    Source: Kornblith, Chen, Lee & Norouzi, *What's in a Loss Function for Image Classification?*, arXiv 2010.16402.

    Example::

        >>> make_loss("logit-penalty", num_classes=2, beta=1)(torch.ones(1, 2), torch.tensor([0]))  # log 2 + 1
        tensor(1.6931)
    """

    def __init__(self, *, beta: float = 6e-4, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)
        _check_not_negative(beta=beta)
        self.beta = beta

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        return _cross_entropy(logits, labels) + self.beta / 2 * logits.square().sum(1)


class Dropout(CrossEntropy):
    """Cross-entropy with dropout on the penultimate features, which is the head's to do.

    Args:
        keep: the share of the features that is kept.

    Source: Srivastava, Hinton, Krizhevsky, Sutskever & Salakhutdinov, *Dropout: A Simple Way to Prevent Neural
    Networks from Overfitting*, JMLR 15, 2014; the constant from Kornblith, Chen, Lee & Norouzi, arXiv 2010.16402.

    Example::

        >>> make_loss("dropout", num_classes=2, keep=0.75).head.dropout
        0.25
    """

    def __init__(self, *, keep: float = 0.7, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {keep}")
        self.head = HeadOptions(dropout=1 - keep)


class FinalL2(CrossEntropy):
    r"""Cross-entropy and :math:`\lambda \lVert W \rVert^2 / 2` for the weights W of the head, without its bias.

    Args:
        lam: the weight of the penalty, lambda.

    Source: Kornblith, Chen, Lee & Norouzi, *What's in a Loss Function for Image Classification?*, arXiv 2010.16402.

    Example::

        >>> head = nn.Linear(3, 2)
        >>> _ = nn.init.ones_(head.weight)
        >>> make_loss("final-l2", num_classes=2, lam=0.5).penalty(head)
        tensor(1.5000, grad_fn=<MulBackward0>)
    """

    def __init__(self, *, lam: float = 8e-4, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)
        _check_not_negative(lam=lam)
        self.lam = lam

    def penalty(self, head: nn.Module) -> Tensor:
        return self.lam / 2 * head.weight.square().sum()


# --- cross-entropy of other logits ----------------------------------------------------------------------------


class LogitNorm(Loss):
    r"""Cross-entropy of normalised logits in training, :math:`\mathrm{CE}(z / (\lVert z \rVert + 10^{-7}) / \tau)`.

    At test the logits are used as they are.

    Args:
        tau: the temperature, OpenOOD's.

    Source: Wei, Xie, Cheng, Feng, An & Li, *Mitigating Neural Network Overconfidence with Logit Normalization*,
    arXiv 2205.09310.

    Example::

        >>> criterion = make_loss("logitnorm", num_classes=2, tau=1)
        >>> criterion(torch.tensor([[3.0, 4.0]]), torch.tensor([1]))  # CE of 0.6 and 0.8
        tensor(0.5981)
    """

    def __init__(self, *, tau: float = 0.04, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)
        _check_positive(tau=tau)
        self.tau = tau

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(logits, dim=1, keepdim=True)
        return _cross_entropy(logits / (norm + 1e-7) / self.tau, labels)


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

        >>> criterion = make_loss("logit-adjusted", num_classes=2, class_counts=[90, 10])
        >>> criterion(torch.zeros(1, 2), torch.tensor([1]))  # -log 0.1
        tensor(2.3026)
    """

    def __init__(
        self,
        *,
        class_counts: Sequence[float] | Tensor,
        tau: float = 1.0,
        post_hoc: bool = False,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(ignore_index=ignore_index)
        _check_not_negative(tau=tau)
        counts = _check_counts(class_counts)
        self.post_hoc = post_hoc
        self.register_buffer("shift", (tau * (counts / counts.sum()).log()).to(torch.get_default_dtype()))

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        return _cross_entropy(logits if self.post_hoc else logits + _of_class(self.shift, logits), labels)

    def outputs(self, logits: Tensor) -> Tensor:
        return logits - _of_class(self.shift, logits) if self.post_hoc else logits


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

        >>> make_loss("ldam", num_classes=2, class_counts=[16, 1]).margins
        tensor([0.2500, 0.5000])
    """

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
        _check_not_negative(max_margin=max_margin)
        _check_positive(s=s)
        counts = _check_counts(class_counts)
        self.s = s
        self.register_buffer("margins", (max_margin * (counts.min() / counts) ** 0.25).to(torch.get_default_dtype()))

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        margins = _of_class(self.margins, logits) * _one_hot(logits, labels)
        return _cross_entropy(self.s * (logits - margins), labels)

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

        >>> criterion = make_loss("cosine-softmax", num_classes=2)
        >>> criterion(torch.tensor([[0.05, 0.0]]), torch.tensor([0]))  # CE of 1 and 0
        tensor(0.3133)
    """

    head = HeadOptions(normalise_weight=True)

    def __init__(self, *, tau: float = 0.05, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)
        _check_positive(tau=tau)
        self.tau = tau

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        return _cross_entropy(self.outputs(logits), labels)

    def outputs(self, logits: Tensor) -> Tensor:
        return logits / self.tau


class Focal(Loss):
    r"""Focal loss, :math:`(1 - p_y)^\gamma \, \mathrm{CE}`.

    Args:
        gamma: 0 is cross-entropy; the larger, the less a well-classified sample counts.

    Source: Lin, Goyal, Girshick, He & Dollár, *Focal Loss for Dense Object Detection*, arXiv 1708.02002.

    Example::

        >>> make_loss("focal", num_classes=2)(torch.zeros(1, 2), torch.tensor([0]))  # log 2 / 4
        tensor(0.1733)
    """

    def __init__(self, *, gamma: float = 2.0, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)
        _check_not_negative(gamma=gamma)
        self.gamma = gamma

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = _cross_entropy(logits, labels)
        # 1 - p_y. Clamped because a power below 1 has an infinite slope at 0.
        missing = (-torch.expm1(-loss)).clamp_min(torch.finfo(loss.dtype).tiny)
        return missing**self.gamma * loss


# --- other losses ---------------------------------------------------------------------------------------------


class MultiMargin(Loss):
    r"""Multi-class margin loss, :math:`\frac{1}{C} \sum_{j \ne y} \max(0, z_j - z_y + m)`.

    The same as :func:`torch.nn.functional.multi_margin_loss`, for pixels too.

    Args:
        margin: the margin m.

    Source: Weston & Watkins, *Support Vector Machines for Multi-Class Pattern Recognition*, ESANN 1999.

    Example::

        >>> make_loss("mm", num_classes=4)(torch.zeros(1, 4), torch.tensor([0]))  # 3 of 4 classes
        tensor(0.7500)
    """

    def __init__(self, *, margin: float = 1.0, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)
        _check_not_negative(margin=margin)
        self.margin = margin

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        y = labels.unsqueeze(1)
        errors = (logits - logits.gather(1, y) + self.margin).clamp_min(0)
        return errors.scatter(1, y, 0).mean(1)


class Dice(Loss):
    r"""Soft dice loss, the mean over classes of :math:`1 - \frac{2 \sum p t + s}{\sum p + \sum t + s}`.

    The sums are over all samples (pixels) of the batch. This is the multi-class form of
    segmentation_models_pytorch: a class without a pixel in the batch has loss 0, and is in the mean. Other
    libraries differ.

    Args:
        smooth: s.
        eps: the least denominator.
        squared: with :math:`p^2` and :math:`t^2` in the denominator, as in the paper.

    Source: Milletari, Navab & Ahmadi, *V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image
    Segmentation*, arXiv 1606.04797.

    Example::

        >>> criterion = make_loss("dice", num_classes=3)
        >>> criterion(torch.zeros(1, 3, 2, 2), torch.tensor([[[0, 0], [1, 1]]]))
        tensor(0.4000)
    """

    def __init__(
        self, *, smooth: float = 0.0, eps: float = 1e-7, squared: bool = False, ignore_index: int = -100
    ) -> None:
        super().__init__(ignore_index=ignore_index)
        _check_not_negative(smooth=smooth)
        _check_positive(eps=eps)
        self.smooth, self.eps, self.squared = smooth, eps, squared

    def total(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        count = (target != self.ignore_index).sum()
        return self(logits, target) * count, count

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, labels, kept = _without_ignored(logits, target, self.ignore_index)
        p, t = logits.softmax(1), _one_hot(logits, labels)
        if kept is not None:
            p, t = p * kept.unsqueeze(1), t * kept.unsqueeze(1)
        samples = [d for d in range(p.dim()) if d != 1]
        size = (p.square() + t if self.squared else p + t).sum(samples)
        score = (2 * (p * t).sum(samples) + self.smooth) / (size + self.smooth).clamp_min(self.eps)
        return ((1 - score) * t.sum(samples).bool()).mean()


class NGL(Loss):
    r"""Next generation loss, the mean over classes of :math:`e^{2.4092 - p - p t} - \cos \cos \sin p`.

    The mean over classes makes the gradient smaller the more classes there are.

    Source: Akhmedova & Körber, *Next Generation Loss Function for Image Classification*, arXiv 2404.12948.

    Example::

        >>> criterion = make_loss("ngl", num_classes=2)
        >>> criterion(torch.tensor([[99.0, 0.0]]), torch.tensor([0]))  # p is 1 and 0
        tensor(5.6521)
    """

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        p = logits.softmax(1)
        return (torch.exp(2.4092 - p - p * _one_hot(logits, labels)) - p.sin().cos().cos()).mean(1)


class Sigmoid(Loss):
    r"""One binary cross-entropy per class, :math:`\sum_k \mathrm{BCE}(z_k - \log C, t_k)`.

    The shift, by which all probabilities begin at about 1 / C, belongs to the outputs at test too.

    Source: Beyer, Hénaff, Kolesnikov, Zhai & van den Oord, *Are we done with ImageNet?*, arXiv 2006.07159; in this
    form Kornblith, Chen, Lee & Norouzi, arXiv 2010.16402.

    Example::

        >>> make_loss("sigmoid", num_classes=4).outputs(torch.zeros(1, 4)).sigmoid()  # 1 / (1 + C)
        tensor([[0.2000, 0.2000, 0.2000, 0.2000]])
    """

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        t = _one_hot(logits, labels)
        return F.binary_cross_entropy_with_logits(self.outputs(logits), t, reduction="none").sum(1)

    def outputs(self, logits: Tensor) -> Tensor:
        return logits - math.log(logits.shape[1])


class SquaredError(Loss):
    r"""Squared error with a large target, :math:`\alpha (\kappa (z_y - M)^2 + \sum_{j \ne y} z_j^2)`.

    The constants are those for ImageNet. On a small network they need a learning rate of their own, far below
    that of cross-entropy.

    Args:
        kappa: the weight of the target class.
        m: the value M that the logit of the target class should have.
        alpha: the scale.

    Source: Hui & Belkin, *Evaluation of Neural Architectures Trained with Square Loss vs Cross-Entropy in
    Classification Tasks*, arXiv 2006.07322; the constants from Kornblith, Chen, Lee & Norouzi, arXiv 2010.16402.

    Example::

        >>> make_loss("squared-error", num_classes=2)(torch.tensor([[59.0, 1.0]]), torch.tensor([0]))
        tensor(100.)
    """

    def __init__(self, *, kappa: float = 9.0, m: float = 60.0, alpha: float = 10.0, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)
        _check_positive(kappa=kappa, m=m, alpha=alpha)
        self.kappa, self.m, self.alpha = kappa, m, alpha

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        t = _one_hot(logits, labels)
        weight = self.alpha * (1 + (self.kappa - 1) * t)
        return (weight * (logits - self.m * t).square()).sum(1)


# --- by name --------------------------------------------------------------------------------------------------

LOSSES: dict[str, type[Loss]] = {
    "ce": CrossEntropy,
    "ce-ls": LabelSmoothing,
    "hem": HEM,
    "hem+": HEMPlus,
    "mm": MultiMargin,
    "logitnorm": LogitNorm,
    "logit-adjusted": LogitAdjusted,
    "ldam": LDAM,
    "dice": Dice,
    "focal": Focal,
    "ngl": NGL,
    "logit-penalty": LogitPenalty,
    "cosine-softmax": CosineSoftmax,
    "sigmoid": Sigmoid,
    "squared-error": SquaredError,
    "dropout": Dropout,
    "final-l2": FinalL2,
}
"""Every loss by the name that tables and commands use."""


def make_loss(
    name: str,
    *,
    num_classes: int,
    class_counts: Sequence[float] | Tensor | None = None,
    ignore_index: int = -100,
    **constants: Any,
) -> Loss:
    """The loss of that name, for logits ``(N, C)`` or ``(N, C, H, W)``.

    What it knows of each class is a buffer: move it to the device of the logits, like a network.

    Args:
        name: a key of :data:`LOSSES`.
        num_classes: the number of classes C.
        class_counts: training samples of each class ``(C,)``. ``"hem+"``, ``"logit-adjusted"`` and ``"ldam"`` need
            them; ``"hem"`` takes its margin from them; the others pay no heed.
        ignore_index: the target of the samples that are left out.
        constants: of that loss, such as ``margin`` for ``"hem"``: see its class.

    Raises:
        ValueError: an unknown name; `class_counts` that are missing, or not one per class; a constant out of range.
        TypeError: a constant that the loss does not have, or that is not a number.

    Example::

        >>> import torch
        >>> from hem_ext.harness.losses import make_loss
        >>> criterion = make_loss("focal", num_classes=10, gamma=3, ignore_index=255)
        >>> logits = torch.randn(2, 10, 8, 8, requires_grad=True)
        >>> criterion(logits, torch.randint(10, (2, 8, 8))).backward()
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}: one of {', '.join(LOSSES)}")
    known = LOSSES[name].constants()
    counts = inspect.signature(LOSSES[name]).parameters.get("class_counts")

    taken = ", ".join(f"{constant}={default}" for constant, default in known.items()) or "none"
    unknown = [constant for constant in constants if constant not in known]
    if unknown:
        raise TypeError(f"{name} has no constant {', '.join(unknown)}; its constants are: {taken}")
    if class_counts is not None and len(class_counts) != num_classes:
        raise ValueError(
            f"{name}: class_counts must be one number per class, got {len(class_counts)} for {num_classes} classes"
        )
    if counts is not None:
        if class_counts is None and LOSSES[name].needs_class_counts():
            raise ValueError(f"{name} needs class_counts, the training samples of each class")
        constants["class_counts"] = class_counts
    try:
        return LOSSES[name](ignore_index=ignore_index, **constants)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}; its constants are: {taken}") from error
