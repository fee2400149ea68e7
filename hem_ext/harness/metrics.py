"""What the tasks are judged by: numbers from logits, labels and features, which may lie on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from statsmodels.stats.multitest import multipletests
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

# ---- rejection of unknown classes ----


def msp(logits: Tensor) -> Tensor:
    """The maximum softmax probability of logits ``(N, C)``: ``(N,)``, higher for the known.

    Source: Hendrycks & Gimpel, arXiv 1610.02136.

    Example::

        >>> msp(torch.tensor([[0.0, 2.0]]))
        tensor([0.8808], dtype=torch.float64)
    """
    # In float32 whatever the network is sure of would tie at 1.
    return logits.double().softmax(1).amax(1)


def max_logit(logits: Tensor) -> Tensor:
    """The maximum logit score (MLS) of logits ``(N, C)``: ``(N,)``, higher for the known.

    Source: Hendrycks et al., arXiv 1911.11132; Vaze et al., arXiv 2110.06207.

    Example::

        >>> max_logit(torch.tensor([[0.0, 2.0]]))
        tensor([2.])
    """
    return logits.amax(1)


def energy(logits: Tensor) -> Tensor:
    """The negative free energy ``log sum exp z`` of logits ``(N, C)``: ``(N,)``, higher for the known.

    Source: Liu et al., arXiv 2010.03759.

    Example::

        >>> energy(torch.tensor([[0.0, 2.0]]))
        tensor([2.1269], dtype=torch.float64)
    """
    return logits.double().logsumexp(1)


def entropy(logits: Tensor) -> Tensor:
    """The negative entropy in nats, ``sum p log p``, of logits ``(N, C)``: ``(N,)``, higher for the known.

    Example::

        >>> entropy(torch.tensor([[0.0, 2.0]]))
        tensor([-0.3653], dtype=torch.float64)
    """
    return -torch.distributions.Categorical(logits=logits.double()).entropy()


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "msp": msp,
    "max_logit": max_logit,
    "energy": energy,
    "entropy": entropy,
}


class Rejection(NamedTuple):
    """How well a score tells known from unknown samples, in [0, 1]."""

    auroc: float
    aupr_known: float  # the known as the positive class
    aupr_unknown: float  # the unknown as the positive class
    fpr95: float  # lower is better


def rejection(known_scores: Tensor, unknown_scores: Tensor) -> Rejection:
    """Tell known samples from unknown ones by one score.

    - AUROC: the chance that a known sample scores above an unknown one; a tie counts a half.
    - AUPR: average precision, the step-wise area. OpenOOD joins the points by lines, which is mostly a little higher.
    - FPR95, in OpenOOD's convention, where the unknown (OOD) are the positive class: the share of the known that is
      rejected with a threshold just high enough to reject 95 % of the unknown. OpenOOD's first version and many papers
      have it the other way around: the share of the unknown accepted where 95 % of the known are.

    Args:
        known_scores, unknown_scores: ``(N,)`` and ``(M,)``, higher for the known, as of every one of :data:`SCORES`.

    Raises:
        ValueError: scores that are not finite, or none on one side.

    Source: Zhang et al., OpenOOD v1.5, arXiv 2306.09301, and its ``openood/evaluators/metrics.py``.

    Example::

        >>> rejection(torch.tensor([0.9, 0.8, 0.4, 0.3]), torch.tensor([0.35]))
        Rejection(auroc=0.75, aupr_known=0.95, aupr_unknown=0.5, fpr95=0.25)
    """
    if len(known_scores) == 0 or len(unknown_scores) == 0:
        raise ValueError(f"both sides need scores, got {len(known_scores)} known and {len(unknown_scores)} unknown")
    score = torch.cat([known_scores, unknown_scores]).detach().cpu().numpy()
    unknown = np.arange(len(score)) >= len(known_scores)
    # All the points of the curve: the fewer that are enough to draw it can step over the 95 %.
    false_positive, true_positive, _ = roc_curve(unknown, -score, drop_intermediate=False)
    return Rejection(
        auroc=float(roc_auc_score(~unknown, score)),
        aupr_known=float(average_precision_score(~unknown, score)),
        aupr_unknown=float(average_precision_score(unknown, -score)),
        fpr95=float(false_positive[np.argmax(true_positive >= 0.95)]),
    )


# ---- classification ----


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    r"""The mean gap of confidence and accuracy over bins of equal width of the confidence.

    .. math:: \sum_b \frac{|B_b|}{N} \, |\mathrm{acc}(B_b) - \mathrm{conf}(B_b)|

    Args:
        logits: ``(N, C)``.
        labels: int64 ``(N,)``.
        bins: of the confidence, the largest softmax probability.

    Source: Guo et al., arXiv 1706.04599.

    Example::

        >>> logits = torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log()
        >>> round(expected_calibration_error(logits, torch.tensor([0, 1])), 4)  # 75 % sure, half of them right
        0.25
    """
    # Softmax here, for torchmetrics takes logits that happen to lie in [0, 1] for probabilities.
    return multiclass_calibration_error(logits.softmax(1), labels, logits.shape[1], n_bins=bins).item()


class GroupAccuracies(NamedTuple):
    """Mean of the accuracies of the classes in each group, in [0, 1]; NaN for a group without a class."""

    many: float
    medium: float
    few: float


def group_accuracies(predicted: Tensor, labels: Tensor, train_counts: Sequence[int] | Tensor) -> GroupAccuracies:
    """The accuracy on classes with many (> 100), medium (20 to 100) and few (< 20) training samples.

    Every class weighs the same, so that a balanced test set gives the accuracy over the group's samples.

    Args:
        predicted, labels: int64 ``(N,)``, of the test set; a class without a test sample is left out.
        train_counts: training samples of each class, ``(C,)``.

    Source: Liu et al., arXiv 1904.05160.

    Example::

        >>> labels = torch.tensor([0, 0, 1, 1, 2, 2])
        >>> group_accuracies(torch.tensor([0, 0, 1, 0, 0, 0]), labels, [500, 101, 19])
        GroupAccuracies(many=0.75, medium=nan, few=0.0)
    """
    counts = torch.as_tensor(train_counts).cpu()
    confusion = multiclass_confusion_matrix(predicted, labels, len(counts)).double().cpu()
    accuracy = confusion.diag() / confusion.sum(1)
    groups = (counts > 100, (counts >= 20) & (counts <= 100), counts < 20)
    return GroupAccuracies(*(accuracy[group].nanmean().item() for group in groups))


# ---- features ----


def class_separation(features: Tensor, labels: Tensor) -> float:
    r"""How far apart the classes lie in feature space, by cosine distances: 0 not at all, 1 each at one point.

    .. math:: R^2 = 1 - \bar d_\mathrm{within} / \bar d_\mathrm{total}

    where :math:`\bar d_\mathrm{within}` is the mean of :math:`1 - \cos` over the pairs of samples of a class, then
    over classes, and :math:`\bar d_\mathrm{total}` that over the pairs of samples of two classes, then over all pairs
    of classes, each with itself too: every class weighs the same, whatever its size. A sample pairs with itself, as
    in the paper. Undefined where all features point the same way.

    Args:
        features: of the penultimate layer, ``(N, D)``, none of them zero.
        labels: int64 ``(N,)``.

    Source: Kornblith et al., arXiv 2010.16402, equation 11.

    Example::

        >>> features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
        >>> class_separation(features, torch.tensor([0, 0, 1, 1]))
        1.0
    """
    directions = F.normalize(features.double(), dim=1)
    # A mean over pairs of cosines is the product of two means of directions.
    means = torch.stack([directions[labels == label].mean(0) for label in labels.unique()])
    within = 1 - means.square().sum(1).mean()
    total = 1 - means.mean(0).square().sum()
    return (1 - within / total).item()


class Probe(NamedTuple):
    """Accuracies of a linear probe, in [0, 1]."""

    train: float
    test: float


def linear_probe(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, *, strength: float = 1.0
) -> Probe:
    """Multinomial logistic regression on frozen features: how well they serve for other classes.

    Features are standardised by the training part's mean and deviation, the weights have an L2 penalty, by
    scikit-learn's L-BFGS. The paper tunes the penalty for every data set; here it is fixed.

    Args:
        train_features, test_features: ``(N, D)`` and ``(M, D)``.
        train_labels, test_labels: int64 ``(N,)`` and ``(M,)``, at least two classes.
        strength: the inverse of the penalty, scikit-learn's ``C``.

    Source: Kornblith et al., arXiv 2010.16402.

    Example::

        >>> features, labels = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([4, 7])
        >>> linear_probe(features, labels, features, 11 - labels)
        Probe(train=1.0, test=0.0)
    """
    train_x, train_y, test_x, test_y = (
        x.detach().cpu().numpy() for x in (train_features, train_labels, test_features, test_labels)
    )
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000)).fit(train_x, train_y)
    return Probe(float(probe.score(train_x, train_y)), float(probe.score(test_x, test_y)))


# ---- continual learning ----


class Continual(NamedTuple):
    """What is left after the last task: accuracy is better higher, forgetting lower."""

    average_accuracy: float
    forgetting_from_learned: float
    forgetting_from_best: float


def continual(accuracy: Sequence[Sequence[float]] | np.ndarray) -> Continual:
    r"""Average accuracy and forgetting from the accuracies :math:`a_{t,i}` after task t on task i, T tasks in all.

    .. math::
        \mathrm{average\ accuracy} &= \frac{1}{T} \sum_i a_{T,i} \\
        \mathrm{from\ learned} &= \frac{1}{T-1} \sum_{i<T} a_{i,i} - a_{T,i} \\
        \mathrm{from\ best} &= \frac{1}{T-1} \sum_{i<T} \max_{i \le t < T} a_{t,i} - a_{T,i}

    Args:
        accuracy: ``(T, T)``, row t after task t; what is above the diagonal is not looked at.

    Raises:
        ValueError: not a square matrix, or of fewer than two tasks.

    Source: Lopez-Paz & Ranzato, arXiv 1706.08840 (from learned, there with the other sign: backward transfer);
    Chaudhry et al., arXiv 1801.10112 (from best, there with what was right before the task was learned too).

    Example::

        >>> continual([[0.75, 0.0], [0.5, 1.0]])
        Continual(average_accuracy=0.75, forgetting_from_learned=0.25, forgetting_from_best=0.25)
    """
    a = np.asarray(accuracy, dtype=np.float64)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or len(a) < 2:
        raise ValueError(f"accuracy must be (T, T) for at least two tasks, got shape {a.shape}")
    earlier, last = range(len(a) - 1), a[-1]
    return Continual(
        average_accuracy=float(last.mean()),
        forgetting_from_learned=float(np.mean([a[i, i] - last[i] for i in earlier])),
        forgetting_from_best=float(np.mean([a[i:-1, i].max() - last[i] for i in earlier])),
    )


# ---- segmentation ----


class Segmentation(NamedTuple):
    """In [0, 1]; NaN for the IoU of a class that occurs in neither labels nor predictions."""

    mean_iou: float
    mean_accuracy: float
    accuracy: float
    iou: list[float]


def segmentation(confusion: Tensor) -> Segmentation:
    """Intersection over union and accuracies from one confusion matrix over a whole test set.

    As in mmsegmentation, the mean IoU is over the classes that occur in labels or predictions, the mean accuracy over
    those that occur in labels. The accuracy is that of all pixels.

    Args:
        confusion: pixels, ``(C, C)``, row the label and column the prediction, as torchmetrics'
            ``MulticlassConfusionMatrix(num_classes, ignore_index=255)`` adds it up over batches and processes.

    Source: MMSegmentation's ``IoUMetric``.

    Example::

        >>> from torchmetrics.classification import MulticlassConfusionMatrix
        >>> confusion = MulticlassConfusionMatrix(3, ignore_index=255)
        >>> confusion.update(torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 255]]))
        >>> segmentation(confusion.compute())
        Segmentation(mean_iou=0.25, mean_accuracy=0.5, accuracy=0.5, iou=[0.5, 0.0, nan])
    """
    confusion = confusion.double()
    hits, labelled, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou = hits / (labelled + predicted - hits)
    return Segmentation(
        mean_iou=iou.nanmean().item(),
        mean_accuracy=(hits / labelled).nanmean().item(),
        accuracy=(hits.sum() / confusion.sum()).item(),
        iou=iou.tolist(),
    )


def boundary_f1(
    predicted: Tensor, labels: Tensor, num_classes: int, *, tolerance: int = 2, ignore_index: int = 255
) -> Tensor:
    """How well the outlines of classes agree, image by image: their F1 score, the mean over classes.

    A pixel is on the boundary of its class if one of its eight neighbours is of another. Precision is the share of
    the predicted boundary pixels of a class within `tolerance` of a true one, recall the share of the true ones within
    `tolerance` of a predicted one. Ignored pixels are on no boundary and make none: label maps that ignore the outlines
    themselves, as VOC's, cannot be judged so.

    Args:
        predicted, labels: int64 ``(N, H, W)``.
        num_classes: C, the classes being 0 to C - 1.
        tolerance: in pixels, along rows, columns and diagonals alike.
        ignore_index: the label that is left out.

    Returns:
        float64 ``(N,)`` in [0, 1], over the classes with a boundary in the labels or the prediction; NaN for an image
        without any. Average over the test set with ``nanmean``.

    Source: Csurka et al., What is a good evaluation measure for semantic segmentation?, BMVC 2013, there with a round
    neighbourhood and the labels' classes alone.

    Example::

        >>> labels = torch.zeros(1, 8, 8, dtype=torch.int64)
        >>> labels[:, :, 4:] = 1
        >>> predicted = torch.zeros(1, 8, 8, dtype=torch.int64)
        >>> predicted[:, :, 5:] = 1
        >>> boundary_f1(predicted, labels, 2, tolerance=0), boundary_f1(predicted, labels, 2, tolerance=1)
        (tensor([0.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    kept = labels != ignore_index
    truth = _boundaries(labels, kept, num_classes)
    guess = _boundaries(predicted, kept, num_classes)
    precision = (guess & _near(truth, tolerance)).sum((2, 3)).double() / guess.sum((2, 3)).clamp(min=1)
    recall = (truth & _near(guess, tolerance)).sum((2, 3)).double() / truth.sum((2, 3)).clamp(min=1)
    f1 = torch.where(precision > 0, 2 * precision * recall / (precision + recall), 0.0)
    return f1.masked_fill(~(truth | guess).any(3).any(2), torch.nan).nanmean(1)


def has_boundary(labels: Tensor, num_classes: int, ignore_index: int = 255) -> bool:
    """Whether two classes meet anywhere in ``(N, H, W)``, where neither is ignored."""
    return bool(_boundaries(labels, labels != ignore_index, num_classes).any())


def _boundaries(labels: Tensor, kept: Tensor, num_classes: int) -> Tensor:
    """Which pixels are on the boundary of which class: bool ``(N, C, H, W)``."""
    kept = kept.unsqueeze(1)
    inside = (labels.unsqueeze(1) == torch.arange(num_classes, device=labels.device).view(-1, 1, 1)) & kept
    return inside & _near(~inside & kept, 1)


def _near(mask: Tensor, distance: int) -> Tensor:
    """Whether a pixel of `mask`, bool ``(N, C, H, W)``, is at most so many pixels away."""
    return F.max_pool2d(mask.float(), 2 * distance + 1, stride=1, padding=distance) > 0


# ---- seeds ----


class Mean(NamedTuple):
    """A mean and its standard error, the sample's deviation (n - 1) over the root of n."""

    mean: float
    error: float  # NaN for a single value


def mean(values: Sequence[float]) -> Mean:
    """The mean over seeds and its standard error.

    Example::

        >>> mean([1.0, 3.0])
        Mean(mean=2.0, error=1.0)
    """
    return Mean(float(np.mean(values)), float(stats.sem(values)) if len(values) > 1 else float("nan"))


class Paired(NamedTuple):
    """A mean difference over pairs, its 95 % interval, and the two-sided p of no difference."""

    difference: float
    low: float
    high: float
    p: float


def paired(values: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Student's paired t-test: the seeds of two losses share initial weights and batches, and so come in pairs.

    Without two pairs, or where the differences do not vary but for rounding (by less than 1e-9), there is no test:
    interval and p are NaN. Of numbers that are not finite, all four are.

    Args:
        values, baseline: one number per seed, in the same order of seeds, at least one.

    Raises:
        ValueError: not as many numbers on both sides, or none.

    Source: Student, The probable error of a mean, Biometrika 6, 1908.

    Example::

        >>> [round(number, 3) for number in paired([0.8, 0.9, 1.0], [0.7, 0.8, 0.8])]
        [0.133, -0.01, 0.277, 0.057]
    """
    if len(values) != len(baseline) or len(values) == 0:
        raise ValueError(f"pairs need as many numbers on both sides, got {len(values)} and {len(baseline)}")
    differences = np.subtract(values, baseline)
    nan = float("nan")
    if not np.isfinite(differences).all():
        return Paired(nan, nan, nan, nan)
    if len(differences) < 2 or np.ptp(differences) < 1e-9:
        return Paired(float(differences.mean()), nan, nan, nan)
    test = stats.ttest_rel(values, baseline)
    return Paired(float(differences.mean()), *map(float, test.confidence_interval(0.95)), float(test.pvalue))


def holm(ps: Sequence[float]) -> list[float]:
    """The p of several tests, corrected for their number; a NaN stays one and is no test.

    The chance of one p below 0.05 or more, where there is no difference anywhere, is at most 0.05.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979.

    Example::

        >>> holm([0.03, 0.01, float("nan"), 0.04])  # 0.01 times 3, 0.03 times 2, and no less than that
        [0.06, 0.03, nan, 0.06]
    """
    corrected = np.array(ps, dtype=np.float64)
    tested = ~np.isnan(corrected)
    if tested.any():
        corrected[tested] = multipletests(corrected[tested], method="holm")[1]
    return corrected.tolist()
