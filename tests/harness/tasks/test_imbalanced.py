import math

import numpy as np
import pytest
import torch

from hem_ext.harness import data
from hem_ext.harness.data import subset_by_counts

# int(24 * 0.1 ** (c / 9))
LONG_TAIL = [24, 18, 14, 11, 8, 6, 5, 4, 3, 2]


def test_the_training_set_has_a_long_tail_and_the_test_set_has_not(run, trained, kept, few_digits):
    values = run("imbalanced", "ce", epochs=6, batch_size=16)
    assert [dataset.labels.bincount().tolist() for dataset, _ in trained] == 6 * [LONG_TAIL]
    right = kept()(few_digits.test.images).argmax(1) == few_digits.test.labels
    assert values["accuracy"] == pytest.approx(right.double().mean().item())
    by_class = [right[few_digits.test.labels == c].double().mean().item() for c in range(10)]
    assert 0.2 < values["accuracy"] < 1
    assert math.isnan(values["many"])
    assert values["medium"] == pytest.approx(by_class[0])
    assert values["few"] == pytest.approx(np.mean(by_class[1:]))


def test_the_loss_knows_the_counts(run, trained):
    run("imbalanced", "hem+")
    margin = trained[0][1].criterion.margin
    assert torch.allclose(margin, torch.tensor([math.sqrt(2000 / (10 * count)) for count in LONG_TAIL]))


def test_what_a_loss_does_at_test_is_done(run, kept, few_digits):
    values = run("imbalanced", "logit-adjusted", epochs=6, batch_size=16, constants={"post_hoc": True})
    logits, labels = kept()(few_digits.test.images), few_digits.test.labels
    prior = torch.tensor(LONG_TAIL) / sum(LONG_TAIL)
    plain, adjusted = ((z.argmax(1) == labels).double().mean().item() for z in (logits, logits - prior.log()))
    assert values["accuracy"] == pytest.approx(adjusted)
    assert adjusted != plain


def test_the_seed_draws_the_samples_and_the_loss_does_not(run, trained):
    run("imbalanced", "ce", seed=1)
    run("imbalanced", "hem", seed=1)
    run("imbalanced", "hem", seed=2)
    first, second, third = (dataset.images for dataset, _ in trained)
    assert torch.equal(first, second)
    assert not torch.equal(second, third)


def test_other_profiles(run, trained):
    run("imbalanced", options={"profile": "step", "factor": 0.5, "largest": None})
    assert trained[0][0].labels.bincount().tolist() == 5 * [24] + 5 * [12]
    with pytest.raises(ValueError, match="profile must be one of exponential, step, got 'linear'"):
        run("imbalanced", options={"profile": "linear"})


def test_the_largest_class_has_as_many_as_there_are_of_the_rarest(run, trained, few_digits, monkeypatch):
    fewer = subset_by_counts(few_digits.train, [24] * 9 + [20], seed=0)
    parts = fewer, few_digits.validation, few_digits.test
    monkeypatch.setitem(data.BUNDLED, "digits", (lambda: parts, data.BUNDLED["digits"][1]))
    run("imbalanced", "ce", options={"factor": 0.5})
    run("imbalanced", "ce", options={"factor": 0.5, "largest": 12})
    counts = [dataset.labels.bincount().tolist() for dataset, _ in trained]
    assert [(found[0], found[-1]) for found in counts] == [(20, 10), (12, 6)]


def test_a_tail_that_there_are_not_enough_samples_for_is_refused_before_training(run, trained):
    with pytest.raises(
        ValueError, match=r"largest asks for classes of \[25, .*\] training samples, but they have \[24"
    ):
        run("imbalanced", options={"largest": 25})
    with pytest.raises(ValueError, match=r"24 samples times 0\.02 leave the rarest class without a sample"):
        run("imbalanced", options={"factor": 0.02})
    assert not trained
