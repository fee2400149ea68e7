"""The oracle itself, against numbers worked by hand."""

import oracle
import pytest
import torch


def test_sample():
    # Errors 0, 0.25, 1.25, 0: mean 0.375.
    assert oracle.sample([1.0, 1.0, 2.0, -1.0], 0, 0.25) == (1.25, [-1.0, 0.0, 1.0, 0.0])
    # Errors 3, 1, 0, 0: the mean is 1, and kept.
    assert oracle.sample([0.0, 2.0, 0.0, -1.0], 0, 1.0) == (2.0, [-1.0, 0.5, 0.5, 0.0])
    # Finished.
    assert oracle.sample([5.0, 1.0], 0, 0.5) == (0.0, [0.0, 0.0])
    assert oracle.sample([5.0], 0, 0.5) == (0.0, [0.0])


# Losses 1.5 (class 0), 0 (class 1), ignored, 2.5 (class 1).
X = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 9.0], [2.0, 0.0]])
T = torch.tensor([0, 1, -100, 1])


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("none", [1.5, 0.0, 0.0, 2.5]), ("sum", 4.0), ("mean", 2.0), ("batchmean", 4 / 3)],
)
def test_reductions(reduction, expected):
    loss, gradient = oracle.hem(X, T, margin=0.5, reduction=reduction)
    assert loss.tolist() == pytest.approx(expected)
    scale = {"none": 1, "sum": 1, "mean": 1 / 2, "batchmean": 1 / 3}[reduction]
    rows = torch.tensor([[-1.0, 1], [0, 0], [0, 0], [1, -1]], dtype=torch.float64)
    torch.testing.assert_close(gradient, rows * scale)


def test_weights_and_margins_are_looked_up_by_the_target():
    # Losses 1.5 and 2.25 with weights 2 and 4; the finished sample of weight 4 counts in batchmean only.
    options = {"margin": torch.tensor([0.5, 0.25]), "weight": torch.tensor([2.0, 4.0])}
    assert oracle.hem(X, T, **options)[0] == pytest.approx((2 * 1.5 + 4 * 2.25) / 6)
    assert oracle.hem(X, T, **options, reduction="batchmean")[0] == pytest.approx((2 * 1.5 + 4 * 2.25) / 10)
    assert oracle.hem(X, T, **options, reduction="none")[0].tolist() == [3.0, 0.0, 0.0, 9.0]


def test_pixels_are_samples():
    x = torch.randn(2, 3, 4, 5)
    t = torch.randint(0, 3, (2, 4, 5))
    loss, gradient = oracle.hem(x, t)
    rows, rows_gradient = oracle.hem(x.permute(0, 2, 3, 1).reshape(-1, 3), t.flatten())
    torch.testing.assert_close(loss, rows)
    torch.testing.assert_close(gradient.permute(0, 2, 3, 1).reshape(-1, 3), rows_gradient)
