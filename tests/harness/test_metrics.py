import math
import multiprocessing

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, jaccard_score, recall_score
from torchmetrics.classification import MulticlassConfusionMatrix

from hem_ext.harness import metrics
from hem_ext.harness.data import digits


def test_scores_by_hand():
    logits = torch.tensor([[math.log(1), math.log(2), math.log(5)]])
    p = np.array([1, 2, 5]) / 8
    assert metrics.msp(logits).item() == pytest.approx(5 / 8)
    assert metrics.max_logit(logits).item() == pytest.approx(math.log(5))
    assert metrics.energy(logits).item() == pytest.approx(math.log(8))
    assert metrics.entropy(logits).item() == pytest.approx((p * np.log(p)).sum())


@pytest.mark.parametrize("score", metrics.SCORES.values(), ids=metrics.SCORES)
def test_scores_are_higher_for_the_known(score):
    known = 10 * torch.eye(5)
    unknown = torch.eye(5)
    assert score(torch.randn(7, 5)).shape == (7,)
    assert metrics.rejection(score(known), score(unknown)).auroc == 1


@pytest.mark.parametrize("name", ["msp", "entropy"])
def test_scores_do_not_tie_where_float32_would(name):
    logits = torch.tensor([[20.0, 0.0], [21.0, 0.0], [22.0, 0.0]])
    assert len(logits.softmax(1).amax(1).unique()) == 1
    score = metrics.SCORES[name](logits)
    assert score[0] < score[1] < score[2]


def rejection_by_hand(known, unknown):
    """All pairs, and all thresholds, one by one."""
    known, unknown = known.tolist(), unknown.tolist()
    wins = sum((k > u) + 0.5 * (k == u) for k in known for u in unknown)

    def average_precision(positive, negative, sign):
        area, recall = 0.0, 0.0
        for threshold in sorted({*positive, *negative}, reverse=sign > 0):
            hits = sum(sign * p >= sign * threshold for p in positive)
            false = sum(sign * n >= sign * threshold for n in negative)
            area += (hits / len(positive) - recall) * hits / (hits + false)
            recall = hits / len(positive)
        return area

    fpr95 = next(
        sum(k <= threshold for k in known) / len(known)
        for threshold in sorted({*known, *unknown})
        if sum(u <= threshold for u in unknown) >= 0.95 * len(unknown)
    )
    return (
        wins / len(known) / len(unknown),
        average_precision(known, unknown, 1),
        average_precision(unknown, known, -1),
        fpr95,
    )


@pytest.mark.parametrize(("known", "unknown"), [(50, 80), (37, 20), (5, 3), (1, 1)])
@pytest.mark.parametrize("ties", [False, True])
def test_rejection_is_what_pairs_and_thresholds_say(known, unknown, ties):
    known, unknown = torch.randn(known, dtype=torch.float64) + 1, torch.randn(unknown, dtype=torch.float64)
    if ties:
        known, unknown = known.mul(2).round(), unknown.mul(2).round()
    assert metrics.rejection(known, unknown) == pytest.approx(rejection_by_hand(known, unknown))


def test_fpr95_rejects_the_unknown_and_not_the_known():
    # One known sample in ten scores below everything unknown; one unknown in ten above everything known.
    known = torch.cat([torch.full((90,), 2.0), torch.full((10,), 0.0)])
    unknown = torch.cat([torch.full((98,), 1.0), torch.full((2,), 3.0)])
    assert metrics.rejection(known, unknown).fpr95 == pytest.approx(0.1)
    # With the roles of the two exchanged: 95 % of the known are accepted only with all the unknown.
    assert metrics.rejection(-unknown, -known).fpr95 == pytest.approx(1)


def test_fpr95_uses_every_point_of_the_curve():
    # The curve is the diagonal, of whose points only the ends are needed to draw it.
    tied = torch.arange(20.0)
    assert metrics.rejection(tied, tied).fpr95 == 0.95


@pytest.mark.parametrize(
    ("known", "unknown", "message"),
    [([], [1.0], "got 0 known and 1 unknown"), ([1.0], [], "got 1 known and 0"), ([math.nan], [1.0], "NaN")],
)
def test_rejection_of_nothing(known, unknown, message):
    with pytest.raises(ValueError, match=message):
        metrics.rejection(torch.tensor(known), torch.tensor(unknown))


@pytest.mark.parametrize("bins", [15, 4])
@pytest.mark.parametrize("offset", [0, 100])  # logits within [0, 1], which could be taken for probabilities, and not
def test_expected_calibration_error(bins, offset):
    logits, labels = torch.rand(500, 4) + offset, torch.randint(4, (500,))
    p = np.exp(logits.double().numpy() - offset)
    p /= p.sum(1, keepdims=True)
    confidence, right = p.max(1), p.argmax(1) == labels.numpy()
    error = 0.0
    for b in range(bins):
        inside = (confidence >= b / bins) & (confidence < (b + 1) / bins)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert metrics.expected_calibration_error(logits, labels, bins) == pytest.approx(error, abs=1e-5)
    if bins == 15:
        assert metrics.expected_calibration_error(logits, labels) == pytest.approx(error, abs=1e-5)


def test_group_accuracies():
    counts = [101, 100, 20, 19, 500, 1]
    labels, predicted = torch.randint(6, (400,)), torch.randint(6, (400,))
    predicted = torch.where(torch.rand(400) < 0.4, labels, predicted)
    recall = recall_score(labels, predicted, average=None)
    expected = [recall[[0, 4]].mean(), recall[[1, 2]].mean(), recall[[3, 5]].mean()]
    assert metrics.group_accuracies(predicted, labels, counts) == pytest.approx(expected)
    everything = metrics.group_accuracies(predicted, labels, torch.full((6,), 50))
    assert everything.medium == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert math.isnan(everything.many)
    assert math.isnan(everything.few)


def test_a_class_without_test_samples_has_no_accuracy():
    labels = torch.tensor([0, 0, 1])
    assert metrics.group_accuracies(labels, labels, [200, 200, 200]).many == 1


def separation_by_hand(features, labels):
    features, labels = features.double().numpy(), labels.numpy()
    classes = sorted(set(labels.tolist()))

    def distance(a, b):
        return np.mean(
            [
                1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y)
                for x in features[labels == a]
                for y in features[labels == b]
            ]
        )

    within = np.mean([distance(c, c) for c in classes])
    total = np.mean([distance(a, b) for a in classes for b in classes])
    return 1 - within / total


def test_class_separation_is_that_of_all_pairs():
    # Classes of different sizes, which weigh the same; labels with a gap.
    labels = torch.tensor([0] * 12 + [1] * 3 + [4] * 6)
    features = torch.randn(21, 5) + 2 * torch.randn(5, 5)[labels]
    expected = separation_by_hand(features, labels)
    assert 0.1 < expected < 0.9
    assert metrics.class_separation(features, labels) == pytest.approx(expected)
    lengths = torch.rand(21, 1) + 0.1
    assert metrics.class_separation(features * lengths, labels) == pytest.approx(expected)


def test_no_class_separation():
    features = torch.randn(1, 20, 4).expand(3, -1, -1).reshape(60, 4)
    labels = torch.arange(3).repeat_interleave(20)
    assert metrics.class_separation(features, labels) == pytest.approx(0, abs=1e-12)


def test_linear_probe_standardises_and_classifies():
    train, _, test = digits()
    scale = 10.0 ** torch.randint(-3, 4, (64,))
    features = [split.images.flatten(1) * scale + 5 for split in (train, test)]
    probe = metrics.linear_probe(features[0], train.labels, features[1], test.labels)
    # The same by hand: columns that never change stay 0.
    mean, deviation = features[0].double().mean(0), features[0].double().std(0, correction=0)
    deviation[deviation < 1e-12 * scale] = 1
    x, y = [((f.double() - mean) / deviation).numpy() for f in features]
    model = LogisticRegression(max_iter=5000).fit(x, train.labels)
    assert probe == pytest.approx((model.score(x, train.labels), model.score(y, test.labels)), abs=0.003)
    assert probe.train > probe.test > 0.95


@pytest.mark.filterwarnings("error")
def test_linear_probe_converges():
    train, _, _ = digits()
    features = train.images.flatten(1)
    assert metrics.linear_probe(features, train.labels, features, train.labels, strength=100.0).train == 1


def test_linear_probe_has_a_penalty():
    features, labels = torch.randn(40, 60), torch.arange(2).repeat(20)
    fits = [metrics.linear_probe(features, labels, features, labels, strength=s).train for s in (1e-6, 1.0)]
    assert fits[0] < fits[1] == 1


def test_continual_by_hand():
    nan = math.nan
    accuracy = [[0.9, nan, nan], [0.95, 0.8, nan], [0.5, 0.7, 1.0]]
    result = metrics.continual(accuracy)
    assert result.average_accuracy == pytest.approx((0.5 + 0.7 + 1.0) / 3)
    assert result.forgetting_from_learned == pytest.approx(((0.9 - 0.5) + (0.8 - 0.7)) / 2)
    assert result.forgetting_from_best == pytest.approx(((0.95 - 0.5) + (0.8 - 0.7)) / 2)
    assert metrics.continual(np.array([[0.5, 0], [0.75, 1]])).forgetting_from_best == -0.25  # learned more since


def test_continual_computes_in_float64():
    accuracy = np.array([[0.9, 0], [0.7, 0.3]], dtype=np.float16)
    first, last, other = accuracy[[0, 1, 1], [0, 0, 1]].astype(np.float64)
    assert metrics.continual(accuracy) == ((last + other) / 2, first - last, first - last)


@pytest.mark.parametrize("accuracy", [[[1.0]], [[1.0, 0.5]], [1.0, 0.5], np.ones((2, 3)), np.ones((3, 2))])
def test_continual_needs_a_square_matrix(accuracy):
    with pytest.raises(ValueError, match="at least two tasks"):
        metrics.continual(accuracy)


def test_segmentation_is_that_of_scikit_learn():
    labels, predicted = torch.randint(0, 5, (6, 9, 7)), torch.randint(0, 6, (6, 9, 7))  # class 5 only predicted
    labels[torch.rand(labels.shape) < 0.2] = 255
    confusion = MulticlassConfusionMatrix(8, ignore_index=255)  # classes 6 and 7 occur nowhere
    for i in range(0, 6, 2):
        confusion.update(predicted[i : i + 2], labels[i : i + 2])
    result = metrics.segmentation(confusion.compute())
    truth, guess = labels[labels != 255], predicted[labels != 255]
    iou = jaccard_score(truth, guess, average=None, zero_division=0)
    assert iou[5] == 0
    assert result.iou == pytest.approx([*iou, math.nan, math.nan], nan_ok=True)
    assert result.mean_iou == pytest.approx(iou.mean())
    assert result.mean_accuracy == pytest.approx(recall_score(truth, guess, labels=range(5), average="macro"))
    assert result.accuracy == pytest.approx((truth == guess).float().mean().item())


def confusion_of(scenes):
    labels, predicted = (torch.randint(4, (7, 5, 5), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    confusion = MulticlassConfusionMatrix(4, ignore_index=3)
    confusion.update(predicted[scenes], labels[scenes])
    return repr(metrics.segmentation(confusion.compute()))


def one_of_two(rank, folder):
    torch.set_num_threads(1)  # a forked process has no thread pool
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    (folder / str(rank)).write_text(confusion_of([slice(0, 2), slice(2, 7)][rank]))


def test_segmentation_over_two_processes(tmp_path):
    # Forked, for a fresh process takes seconds to import torch.
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=one_of_two, args=(rank, tmp_path), daemon=True) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    together = confusion_of(slice(0, 7))
    assert together != confusion_of(slice(0, 2))
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == [together] * 2


def boundary_f1_by_hand(predicted, labels, num_classes, tolerance, ignore_index):
    height, width = labels.shape

    def boundary(classes, c):
        points = set()
        for i in range(height):
            for j in range(width):
                if classes[i, j] != c or labels[i, j] == ignore_index:
                    continue
                for a in range(max(0, i - 1), min(height, i + 2)):
                    for b in range(max(0, j - 1), min(width, j + 2)):
                        if classes[a, b] != c and labels[a, b] != ignore_index:
                            points.add((i, j))
        return points

    def share(points, others):
        near = [any(max(abs(i - a), abs(j - b)) <= tolerance for a, b in others) for i, j in points]
        return sum(near) / len(near) if near else 0.0

    scores = []
    for c in range(num_classes):
        truth, guess = boundary(labels, c), boundary(predicted, c)
        if truth or guess:
            precision, recall = share(guess, truth), share(truth, guess)
            scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return sum(scores) / len(scores) if scores else math.nan


@pytest.mark.parametrize("tolerance", [0, 1, 3])
def test_boundary_f1_is_that_of_loops(tolerance):
    # Blocks, moved a little; a part is ignored, one class is only predicted, one occurs nowhere.
    labels = torch.randint(0, 3, (4, 3, 4)).repeat_interleave(5, 1).repeat_interleave(4, 2)
    predicted = labels.roll((1, 1), (1, 2))
    predicted[0, 6:9, 6:9] = 3
    labels[1:, :4, 3:12] = 255
    labels[3] = 1
    predicted[3] = 1
    score = metrics.boundary_f1(predicted, labels, 5, tolerance=tolerance)
    expected = [
        boundary_f1_by_hand(p, t, 5, tolerance, 255) for p, t in zip(predicted.numpy(), labels.numpy(), strict=True)
    ]
    assert score.tolist() == pytest.approx(expected, nan_ok=True)
    assert 0 < expected[0] < 1
    assert math.isnan(expected[3])


def test_boundary_f1_of_the_truth_is_1():
    labels = torch.randint(0, 4, (3, 10, 10))
    labels[2] = 0
    labels[2, 5, 5] = 3  # a boundary of one pixel
    assert metrics.boundary_f1(labels, labels, 4, tolerance=0).tolist() == [1, 1, 1]


@pytest.mark.parametrize(("moved", "score"), [(2, 1), (3, 0)])
def test_boundary_f1_tolerates_two_pixels(moved, score):
    labels, predicted = (torch.arange(16).expand(1, 8, 16) // column for column in (6, 6 + moved))
    assert metrics.boundary_f1(predicted.clamp(max=1), labels.clamp(max=1), 2) == score


def test_whether_two_classes_meet():
    labels = torch.zeros(2, 3, 6, dtype=torch.int64)
    assert not metrics.has_boundary(labels, 2)
    labels[1, :, 3:] = 1
    assert metrics.has_boundary(labels, 2)
    assert metrics.has_boundary(labels, 2, ignore_index=3)
    assert not metrics.has_boundary(labels, 2, ignore_index=1)
    labels[1, :, 2] = 255  # between them
    assert not metrics.has_boundary(labels, 2)
    assert metrics.has_boundary(labels, 2, ignore_index=256)


def test_boundary_f1_cannot_judge_ignored_outlines():
    labels = torch.zeros(1, 6, 6, dtype=torch.int64)
    labels[:, :, 2:4], labels[:, :, 4:] = 255, 1
    predicted = torch.zeros(1, 6, 6, dtype=torch.int64)
    predicted[:, :, 3:] = 1
    assert metrics.boundary_f1(predicted, labels, 2).isnan().all()


@pytest.mark.filterwarnings("error")
def test_mean_and_standard_error():
    assert metrics.mean([1.0, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt((4 + 1 + 9) / 2 / 3)))
    assert metrics.mean([1.0, 3.0]) == (2, 1)
    assert metrics.mean([2.0]).mean == 2
    assert math.isnan(metrics.mean([2.0]).error)


def test_paired_by_hand():
    # Differences 1, 2, 3 and 6: mean 3, deviation sqrt(14 / 3), error half of that; t of 3 degrees 3.1824 at 97.5 %.
    found = metrics.paired([2.0, 4.0, 6.0, 10.0], [1.0, 2.0, 3.0, 4.0])
    error = math.sqrt(14 / 3) / 2
    assert found[:3] == pytest.approx((3, 3 - 3.18245 * error, 3 + 3.18245 * error), abs=1e-4)
    # The area under Student's density of 3 degrees of freedom beyond t, which has a closed form.
    x = 3 / error / math.sqrt(3)
    assert found.p == pytest.approx(1 - 2 / math.pi * (x / (1 + x * x) + math.atan(x)))


def test_paired_is_scipys_test():
    values, baseline = np.random.default_rng(0).random((2, 7))
    found = metrics.paired(values.tolist(), baseline.tolist())
    expected = stats.ttest_rel(values, baseline)
    assert found == pytest.approx(
        (np.mean(values - baseline), *expected.confidence_interval(0.95), expected.pvalue), abs=1e-12
    )
    mirrored = metrics.paired(baseline.tolist(), values.tolist())
    assert mirrored == pytest.approx((-found.difference, -found.high, -found.low, found.p))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("values", "baseline"), [([0.9], [0.8]), ([0.9, 0.8], [0.8, 0.7 + 1e-15]), ([0.5, 0.6], [0.4, 0.5])]
)
def test_without_spread_there_is_no_paired_test(values, baseline):
    found = metrics.paired(values, baseline)
    assert found.difference == pytest.approx(0.1)
    assert all(map(math.isnan, found[1:]))


def test_what_spread_is_enough_for_a_paired_test():
    # Two pairs: t of one degree of freedom, whose p is that of Cauchy's distribution.
    found = metrics.paired([0.3, 0.4], [0.2, 0.1])
    assert found.p == pytest.approx(1 - 2 / math.pi * math.atan(2))
    # Of 0 and 1e-9 the mean is half the difference, and t is 1.
    assert metrics.paired([0.0, 1e-9], [0.0, 0.0]).p == pytest.approx(0.5)


@pytest.mark.filterwarnings("error")
def test_a_pair_without_a_number():
    assert all(map(math.isnan, metrics.paired([0.9, math.nan, 0.7], [0.8, 0.8, 0.8])))


@pytest.mark.parametrize(("values", "baseline"), [([1.0], [1.0, 2.0]), ([], [])])
def test_paired_needs_pairs(values, baseline):
    with pytest.raises(ValueError, match=f"got {len(values)} and {len(baseline)}"):
        metrics.paired(values, baseline)


def test_holm_by_hand():
    # In their order 0.01, 0.02, 0.03: times 3, 2 and 1, and none less than the one before.
    assert metrics.holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert metrics.holm([0.5, 0.9]) == pytest.approx([1, 1])
    p = np.float16(0.24)
    assert metrics.holm(np.array([1, p, 1], np.float16)) == [1, 3 * float(p), 1]


def test_holm_does_not_count_what_was_not_tested():
    found = metrics.holm([0.02, math.nan, 0.5])
    assert found == pytest.approx([0.04, math.nan, 0.5], nan_ok=True)
    assert metrics.holm([]) == []
    assert all(map(math.isnan, metrics.holm([math.nan])))
