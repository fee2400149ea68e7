import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from hem_ext.harness import data
from hem_ext.harness.data import Split, unknown_sets


def auroc(known, unknown):
    return roc_auc_score(np.arange(len(known) + len(unknown)) < len(known), torch.cat([known, unknown]).numpy())


def test_near_and_far_by_hand(run, kept, few_digits, trained):
    values = run("ood", options={"known": 4})
    assert [dataset.labels.bincount().tolist() for dataset, _ in trained] == [[24] * 4]
    model, images, labels = kept(4), few_digits.test.images, few_digits.test.labels
    known = model(images[labels < 4])
    held_out = model(images[labels >= 4])
    far = {name: model(unknown) for name, unknown in unknown_sets(images[labels < 4]).items()}

    assert values["accuracy"] == pytest.approx((known.argmax(1) == labels[labels < 4]).double().mean().item())
    for suffix, score in (
        ("", lambda z: z.amax(1)),
        (" msp", lambda z: z.double().softmax(1).amax(1)),
        (" energy", lambda z: z.double().logsumexp(1)),
    ):
        each = {name: auroc(score(known), score(unknown)) for name, unknown in far.items()}
        assert values[f"near_auroc{suffix}"] == pytest.approx(auroc(score(known), score(held_out)), abs=1e-3)
        assert values[f"far_auroc{suffix}"] == pytest.approx(sum(each.values()) / 6, abs=1e-3)
        if suffix == "":
            assert {name: values[f"auroc {name}"] for name in far} == pytest.approx(each, abs=1e-3)


def test_half_of_the_classes_are_those_that_transfer_trains(run, trained):
    run("classification")
    assert len(trained) == 2
    run("ood", options={"known": 5})
    assert len(trained) == 2


def test_another_data_set_is_far(run, monkeypatch, few_digits):
    black = Split(torch.zeros(7, 1, 8, 8), torch.zeros(7, dtype=torch.int64))
    monkeypatch.setitem(data.BUNDLED, "black", (lambda: (black, black), {"classes": ("black",)}))
    without = run("ood")
    values = run("ood", options={"unknown_data": "black"})
    assert values["far_auroc"] == pytest.approx((6 * without["far_auroc"] + values["auroc black"]) / 7)
    assert values["near_auroc"] == without["near_auroc"]


def test_another_data_set_must_have_images_of_that_shape(run, monkeypatch):
    large = Split(torch.zeros(7, 3, 16, 16), torch.zeros(7, dtype=torch.int64))
    monkeypatch.setitem(data.BUNDLED, "large", (lambda: (large, large), {"classes": ("large",)}))
    with pytest.raises(ValueError, match=r"the images of large are \(3, 16, 16\), those of digits \(1, 8, 8\)"):
        run("ood", options={"unknown_data": "large"})


def test_with_all_classes_known_nothing_is_near(run):
    values = run("ood", options={"known": 10})
    assert all(math.isnan(value) == name.startswith("near") for name, value in values.items())


@pytest.mark.parametrize("known", [1, 11])
def test_known_must_be_some_of_the_classes(run, known):
    with pytest.raises(ValueError, match=f"known must be 2 to 10 classes, got {known}"):
        run("ood", options={"known": known})


def test_the_sets_of_openood_are_all_there_is(run, kept, trained, monkeypatch, tmp_path):
    def colour(n, classes=10):
        return Split(torch.rand(n, 3, 8, 8), torch.arange(n) % classes)

    train, test = colour(40), colour(30)
    sets = {"near a": colour(7), "near b": colour(9)}, {"far": colour(11)}
    asked = []

    def openood(root, known, size):
        asked.append((str(root), known, size))
        return sets

    monkeypatch.setitem(data.ON_DISK, "cifar10", (lambda root: data.Data(train, test, tuple("0123456789"), 3), ""))
    monkeypatch.setattr(data, "openood", openood)
    given = {"data": "cifar10", "data_root": "here", "folder": tmp_path}
    options = {"unknown_data": "openood", "unknown_root": "there"}
    with pytest.raises(ValueError, match="OpenOOD takes every class as known: known=10"):
        run("ood", options=options, **given)
    assert not trained, "it was trained before it was said"

    values = run("ood", options={**options, "known": 10}, **given)
    assert asked == [("there", "cifar10", 8)]
    model = kept(10, channels=3)
    score = {name: model(s.images).amax(1) for name, s in {**sets[0], **sets[1], "known": test}.items()}
    each = {name: auroc(score["known"], score[name]) for name in ("near a", "near b", "far")}
    assert {name: values[f"auroc {name}"] for name in each} == pytest.approx(each, abs=1e-3)
    assert values["near_auroc"] == pytest.approx((each["near a"] + each["near b"]) / 2, abs=1e-3)
    assert values["far_auroc"] == pytest.approx(each["far"], abs=1e-3)
    assert "auroc textures" not in values
