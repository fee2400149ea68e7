import dataclasses
import math

import pytest
import torch

from hem_ext.harness import data
from hem_ext.harness.tasks import classification
from hem_ext.harness.tasks.base import DivergedError


def test_accuracy_by_hand(run, share_right, few_digits):
    values = run("classification", options={"transfer": False})
    assert values["accuracy"] == pytest.approx(share_right(few_digits.test.images, few_digits.test.labels))
    assert math.isnan(values["transfer"])


def test_transfer_trains_on_the_first_classes_alone(run, trained):
    assert run("classification")["transfer"] > 0.2
    assert [dataset.labels.unique().tolist() for dataset, _ in trained] == [list(range(10)), list(range(5))]


def test_a_transfer_that_diverges_leaves_the_rest(run, monkeypatch):
    def diverge(bench):
        raise DivergedError

    monkeypatch.setattr(classification, "_transfer", diverge)
    values = run("classification")
    assert math.isnan(values.pop("transfer"))
    assert all(math.isfinite(value) for value in values.values())


def test_the_network_sees_augmented_images_and_is_judged_by_whole_ones(run, share_right, few_digits, monkeypatch):
    seen = []

    def blacken(images):
        seen.append(len(images))
        return torch.zeros_like(images)

    train, test = (dataclasses.replace(split, augment=blacken) for split in (few_digits.train, few_digits.test))
    monkeypatch.setitem(data.BUNDLED, "digits", (lambda: (train, test), data.BUNDLED["digits"][1]))
    values = run("classification", options={"transfer": False})
    assert sum(seen) == len(train)
    assert values["accuracy"] == pytest.approx(share_right(test.images, test.labels))
