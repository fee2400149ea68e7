"""Losses that are neither HEM nor a softmax cross-entropy."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hem_ext.harness.losses.base import Loss, check_not_negative, check_positive, one_hot, without_ignored


class MultiMargin(Loss):
    r"""Multi-class margin loss, :math:`\frac{1}{C} \sum_{j \ne y} \max(0, z_j - z_y + m)`.

    The same as :func:`torch.nn.functional.multi_margin_loss`, for pixels too.

    Args:
        margin: the margin m.

    Source: Weston & Watkins, *Support Vector Machines for Multi-Class Pattern Recognition*, ESANN 1999.

    Example::

        >>> import torch
        >>> from hem_ext.harness.losses import make_loss
        >>> make_loss("mm", num_classes=4)(torch.zeros(1, 4), torch.tensor([0]))  # 3 of 4 classes
        tensor(0.7500)
    """

    name = "mm"

    def __init__(self, *, margin: float = 1.0, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)
        check_not_negative(margin=margin)
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

        >>> import torch
        >>> from hem_ext.harness.losses import make_loss
        >>> criterion = make_loss("dice", num_classes=3)
        >>> criterion(torch.zeros(1, 3, 2, 2), torch.tensor([[[0, 0], [1, 1]]]))
        tensor(0.4000)
    """

    name = "dice"

    def __init__(
        self, *, smooth: float = 0.0, eps: float = 1e-7, squared: bool = False, ignore_index: int = -100
    ) -> None:
        super().__init__(ignore_index=ignore_index)
        check_not_negative(smooth=smooth)
        check_positive(eps=eps)
        self.smooth, self.eps, self.squared = smooth, eps, squared

    def total(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        count = (target != self.ignore_index).sum()
        return self(logits, target) * count, count

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits, labels, kept = without_ignored(logits, target, self.ignore_index)
        p, t = logits.softmax(1), one_hot(logits, labels)
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

        >>> import torch
        >>> from hem_ext.harness.losses import make_loss
        >>> criterion = make_loss("ngl", num_classes=2)
        >>> criterion(torch.tensor([[99.0, 0.0]]), torch.tensor([0]))  # p is 1 and 0
        tensor(5.6521)
    """

    name = "ngl"

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        p = logits.softmax(1)
        return (torch.exp(2.4092 - p - p * one_hot(logits, labels)) - p.sin().cos().cos()).mean(1)


class Sigmoid(Loss):
    r"""One binary cross-entropy per class, :math:`\sum_k \mathrm{BCE}(z_k - \log C, t_k)`.

    The shift, by which all probabilities begin at about 1 / C, belongs to the outputs at test too.

    Source: Beyer, Hénaff, Kolesnikov, Zhai & van den Oord, *Are we done with ImageNet?*, arXiv 2006.07159; in this
    form Kornblith, Chen, Lee & Norouzi, arXiv 2010.16402.

    Example::

        >>> import torch
        >>> from hem_ext.harness.losses import make_loss
        >>> make_loss("sigmoid", num_classes=4).outputs(torch.zeros(1, 4)).sigmoid()  # 1 / (1 + C)
        tensor([[0.2000, 0.2000, 0.2000, 0.2000]])
    """

    name = "sigmoid"

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        t = one_hot(logits, labels)
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

        >>> import torch
        >>> from hem_ext.harness.losses import make_loss
        >>> make_loss("squared-error", num_classes=2)(torch.tensor([[59.0, 1.0]]), torch.tensor([0]))
        tensor(100.)
    """

    name = "squared-error"

    def __init__(self, *, kappa: float = 9.0, m: float = 60.0, alpha: float = 10.0, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)
        check_positive(kappa=kappa, m=m, alpha=alpha)
        self.kappa, self.m, self.alpha = kappa, m, alpha

    def per_sample(self, logits: Tensor, labels: Tensor) -> Tensor:
        t = one_hot(logits, labels)
        weight = self.alpha * (1 + (self.kappa - 1) * t)
        return (weight * (logits - self.m * t).square()).sum(1)
