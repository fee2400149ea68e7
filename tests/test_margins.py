import re

import pytest
import torch

from hem_ext import class_margins


# From two public re-implementations of the authors' rule.
@pytest.mark.parametrize(
    ("classes", "samples", "margin"),
    [(10, 60_000, 0.1826), (10, 50_000, 0.2), (100, 50_000, 0.2), (200, 100_000, 0.1414), (1000, 1_281_167, 0.0395)],
)
def test_balanced_classes_have_one_margin(classes, samples, margin):
    margins = class_margins([samples / classes] * classes)
    assert margins.shape == (classes,)
    assert margins.tolist() == pytest.approx([margin] * classes, abs=5e-5)


def test_long_tail():
    counts = torch.tensor([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])
    golden = [0.2, 0.258, 0.334, 0.431, 0.557, 0.719, 0.928, 1.2, 1.552, 2.0]
    assert class_margins(counts).tolist() == pytest.approx(golden, abs=5e-4)
    assert class_margins(counts).dtype == torch.float32


def test_total():
    assert class_margins([2, 8], total=64.0).tolist() == [4.0, 2.0]
    assert class_margins([2, 8], total=0.25).tolist() == [0.25, 0.125]


def test_counts_of_half_precision_are_not_computed_with():
    counts = torch.tensor([40_000, 50], dtype=torch.float16)  # twice the first is infinite
    assert torch.equal(class_margins(counts), class_margins(counts.tolist()))


def test_they_are_on_the_cpu_whatever_the_default_is():
    with torch.device("meta"):
        margins = class_margins([2, 8], total=64.0)
    assert margins.tolist() == [4.0, 2.0]


def test_counts_whose_memory_was_given_back():
    counts = torch.ones(3)
    counts.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"^the memory of counts is not allocated: "):
        class_margins(counts)


@pytest.mark.parametrize(
    ("counts", "total", "words"),
    [
        ([5, 0, 5], 2000, "every class needs at least one sample, but counts[1] is 0"),
        ([5, -2], 2000, "counts[1] is -2"),
        ([float("nan")], 2000, "counts[0] is nan"),
        ([], 2000, "got shape (0,)"),
        (7, 2000, "got shape ()"),
        ([[1, 2]], 2000, "got shape (1, 2)"),
        ([1], 0, "total must be a positive number of samples, got 0"),
        ([1], float("nan"), "got nan"),
        ([1], float("inf"), "total must be a positive number of samples, got inf"),
        ([1, 2], 1e308, "total must give margins that float32 holds, got 1e+308"),
    ],
)
def test_wrong_counts(counts, total, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        class_margins(counts, total)


@pytest.mark.parametrize("counts", [None, "57", ["5"], [[1], [2, 3]]])
def test_counts_that_are_no_numbers(counts):
    with pytest.raises(TypeError, match="counts must be one number per class, got"):
        class_margins(counts)
