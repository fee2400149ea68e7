import pytest
import torch

from hem_ext.harness.data import Split, exponential_counts, step_counts, subset_by_counts


@pytest.mark.parametrize(
    ("largest", "factor", "counts"),
    [
        (5000, 0.01, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]),
        (140, 0.1, [140, 108, 83, 64, 50, 38, 30, 23, 18, 14]),
        (7, 1, [7] * 10),
    ],
)
def test_exponential_profile(largest, factor, counts):
    assert exponential_counts(largest, 10, factor) == counts


def test_exponential_profile_of_cifar100():
    counts = exponential_counts(500, 100, 0.01)
    assert (sum(counts), counts[0], counts[-1]) == (10_847, 500, 5)


def test_step_profile():
    assert step_counts(5000, 10, 0.01) == [5000] * 5 + [50] * 5
    assert step_counts(10, 5, 0.2) == [10, 10, 2, 2, 2]


@pytest.mark.parametrize("profile", [exponential_counts, step_counts])
def test_the_least_there_can_be(profile):
    assert profile(10, 2, 0.1) == [10, 1]


@pytest.mark.parametrize("profile", [exponential_counts, step_counts])
def test_profiles_refuse(profile):
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        profile(10, 1, 0.1)
    for factor in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"in \(0, 1\], got {factor}"):
            profile(10, 3, factor)
    with pytest.raises(ValueError, match=r"9 samples times 0.1 leave the rarest class without a sample"):
        profile(9, 3, 0.1)


# Image i is filled with i.
SPLIT = Split(torch.arange(60).float().view(-1, 1, 1, 1), torch.arange(60) % 3)


@pytest.mark.parametrize("counts", [[20, 7, 1], [20, 0, 7]])
def test_subset_has_the_counts_and_keeps_the_pairs(counts):
    subset = subset_by_counts(SPLIT, counts, seed=0)
    assert subset.labels.bincount().tolist() == counts
    numbers = subset.images.flatten().long()
    assert torch.equal(subset.labels, numbers % 3)
    assert (numbers.diff() > 0).all()


def test_subset_depends_on_the_seed_alone():
    first, again, other = (subset_by_counts(SPLIT, [5, 5, 5], seed).images for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_subset_refuses():
    with pytest.raises(ValueError, match="21 samples of class 1 were asked for, but there are 20"):
        subset_by_counts(SPLIT, [1, 21, 1], seed=0)
    with pytest.raises(ValueError, match="-1 samples of class 0"):
        subset_by_counts(SPLIT, [-1, 2, 1], seed=0)
    with pytest.raises(ValueError, match="2 counts were given, but there are labels up to 2"):
        subset_by_counts(SPLIT, [1, 1], seed=0)
