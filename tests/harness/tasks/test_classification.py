import dataclasses
import math

import pytest
import torch

from hem_ext.harness import data, metrics
from hem_ext.harness.tasks import TASKS, classification
from hem_ext.harness.tasks.base import DivergedError


def test_accuracy_by_hand(run, share_right, few_digits):
    values = run("classification", options={"transfer": False})
    assert values["accuracy"] == pytest.approx(share_right(few_digits.test.images, few_digits.test.labels))
    assert math.isnan(values["transfer"])


def test_transfer_is_from_the_first_classes_to_the_others(run, trained, monkeypatch):
    probed, linear_probe = [], metrics.linear_probe

    def probe(features, labels, test_features, test_labels):
        probed.append([len(features), labels.unique().tolist(), len(test_features), test_labels.unique().tolist()])
        return linear_probe(features, labels, test_features, test_labels)

    monkeypatch.setattr(metrics, "linear_probe", probe)
    assert run("classification")["transfer"] > 0.2
    assert [dataset.labels.unique().tolist() for dataset, _ in trained] == [list(range(10)), list(range(5))]
    others = list(range(5, 10))
    assert probed == [[120, others, 40, others]]


@pytest.mark.parametrize(("classes", "transfers"), [(2, False), (3, False), (4, True)])
def test_with_fewer_than_four_classes_transfer_is_left_out_and_said_so(
    run, trained, few_digits, monkeypatch, classes, transfers
):
    task = TASKS["classification"]
    parts = few_digits.train, few_digits.validation, few_digits.test
    parts = [part.take(part.labels < classes) for part in parts]
    about = {"classes": data.BUNDLED["digits"][1]["classes"][:classes]}
    monkeypatch.setitem(data.BUNDLED, "some-digits", (lambda: parts, about))
    values = run("classification", data="some-digits")
    assert len(trained) == 1 + transfers
    assert math.isfinite(values.pop("transfer")) == transfers
    assert all(math.isfinite(value) for value in values.values())
    asked, not_asked = (
        task.cell("hem", 0, quick=True, data="some-digits", options={"transfer": asked}) for asked in (True, False)
    )
    assert task.epochs(asked) == (1 + transfers) * task.epochs(not_asked)
    note = "linear transfer needs at least four classes, two to learn and two to transfer to"
    assert task.notes(asked) == ([] if transfers else [note])
    assert task.notes(not_asked) == []


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

    parts = few_digits.train, few_digits.validation, few_digits.test
    parts = [dataclasses.replace(part, augment=blacken) for part in parts]
    monkeypatch.setitem(data.BUNDLED, "digits", (lambda: parts, data.BUNDLED["digits"][1]))
    values = run("classification", options={"transfer": False})
    train, _, test = parts
    assert sum(seen) == 1 + len(train)  # one of them to see whether the network takes its size
    assert values["accuracy"] == pytest.approx(share_right(test.images, test.labels))
