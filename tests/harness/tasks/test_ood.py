import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from hem_ext.harness import data
from hem_ext.harness.data import Split, unknown_sets
from hem_ext.harness.metrics import SCORES
from hem_ext.harness.tasks import TASKS

BY_HAND = {
    "max_logit": lambda z: z.amax(1),
    "msp": lambda z: z.double().softmax(1).amax(1),
    "energy": lambda z: z.double().logsumexp(1),
    "entropy": lambda z: (z.double().softmax(1) * z.double().log_softmax(1)).sum(1),
}
FAR = ["textures", "faces", "blobs", "noise", "permuted", "phase"]


def auroc(known, unknown):
    return roc_auc_score(np.arange(len(known) + len(unknown)) < len(known), torch.cat([known, unknown]).numpy())


def fpr95(known, unknown):
    """The share of the known that scores no higher than a threshold that 95 % of the unknown do not exceed."""
    threshold = unknown.sort().values[math.ceil(0.95 * len(unknown)) - 1]
    return (known <= threshold).double().mean().item()


def test_near_and_far_by_hand(run, kept, few_digits, trained):
    values = run("ood", options={"known": 4})
    assert [dataset.labels.bincount().tolist() for dataset, _ in trained] == [[24] * 4]
    model, images, labels = kept(4), few_digits.test.images, few_digits.test.labels
    known = model(images[labels < 4])
    held_out = model(images[labels >= 4])
    far = {name: model(unknown) for name, unknown in unknown_sets(images[labels < 4]).items()}
    assert list(far) == FAR

    assert values["accuracy"] == pytest.approx((known.argmax(1) == labels[labels < 4]).double().mean().item())
    for scale in (0.01, 0.1, 10, 100):
        near, far_too = (
            [auroc(BY_HAND["msp"](scale * known), BY_HAND["msp"](scale * unknown)) for unknown in sets]
            for sets in ([held_out], far.values())
        )
        assert values[f"near_auroc msp of logits times {scale}"] == pytest.approx(near[0], abs=1e-3)
        assert values[f"far_auroc msp of logits times {scale}"] == pytest.approx(np.mean(far_too), abs=1e-3)
    assert not [name for name in values if not name.startswith(("near_", "far_", "auroc ", "accuracy"))]
    assert BY_HAND.keys() == SCORES.keys()
    for name, score in BY_HAND.items():
        each = {unknown: auroc(score(known), score(outputs)) for unknown, outputs in far.items()}
        assert values[f"near_auroc {name}"] == pytest.approx(auroc(score(known), score(held_out)), abs=1e-3)
        assert values[f"far_auroc {name}"] == pytest.approx(sum(each.values()) / 6, abs=1e-3)
        assert {unknown: values[f"auroc {name}, {unknown}"] for unknown in far} == pytest.approx(each, abs=1e-3)
        # One of the 32 known images may change sides with the rounding.
        assert values[f"near_fpr95 {name}"] == pytest.approx(fpr95(score(known), score(held_out)), abs=1.1 / 32)
        mean = np.mean([fpr95(score(known), score(outputs)) for outputs in far.values()])
        assert values[f"far_fpr95 {name}"] == pytest.approx(mean, abs=1.1 / 32)


def test_it_is_judged_by_every_score_near_and_far():
    task = TASKS["ood"]
    aurocs = {f"{where}_auroc {score}" for where in ("near", "far") for score in SCORES}
    fprs = {f"{where}_fpr95 {score}" for where in ("near", "far") for score in SCORES}
    assert set(task.judged_by) == aurocs | fprs
    assert all(metric.higher_is_better == (name not in fprs) for name, metric in task.metrics.items())


def test_six_tenths_of_the_classes_are_known(run, trained):
    run("ood")
    assert [len(dataset.labels.unique()) for dataset, _ in trained] == [6]


def test_half_of_the_classes_are_those_that_transfer_trains(run, trained):
    run("classification")
    assert len(trained) == 2
    run("ood", options={"known": 5})
    assert len(trained) == 2


def test_settings_are_chosen_by_what_is_near(run, kept, few_digits, monkeypatch):
    monkeypatch.setattr(data, "unknown_sets", lambda *_: pytest.fail("looked at what is far"))
    values = run("ood", options={"known": 4}, part="validation")
    images, labels = few_digits.validation.images, few_digits.validation.labels
    known, held_out = kept(4)(images[labels < 4]), kept(4)(images[labels >= 4])
    for name, score in BY_HAND.items():
        assert values[f"near_auroc {name}"] == pytest.approx(auroc(score(known), score(held_out)), abs=1e-3)
    assert all(math.isnan(value) for name, value in values.items() if name.startswith("far"))


def test_another_data_set_is_far(run, monkeypatch, few_digits):
    black = Split(torch.zeros(7, 1, 8, 8), torch.zeros(7, dtype=torch.int64))
    monkeypatch.setitem(data.BUNDLED, "black", (lambda: (black,) * 3, {"classes": ("black",)}))
    without = run("ood")
    values = run("ood", options={"unknown_data": "black"})
    for score in SCORES:
        mean = (6 * without[f"far_auroc {score}"] + values[f"auroc {score}, black"]) / 7
        assert values[f"far_auroc {score}"] == pytest.approx(mean)
        assert values[f"near_auroc {score}"] == without[f"near_auroc {score}"]


@pytest.mark.parametrize(
    ("data_root", "unknown_root", "read_from"),
    [("here", None, "here"), ("here", "there", "there"), (None, "there", "there")],
)
def test_another_data_set_is_read_from_its_root(run, monkeypatch, few_digits, data_root, unknown_root, read_from):
    read = {}

    def reader(name):
        def load(root):
            read[name] = root
            return few_digits

        return load, ""

    monkeypatch.setattr(data, "ON_DISK", {name: reader(name) for name in ("known", "other")})
    options = {"unknown_data": "other", "unknown_root": unknown_root}
    values = run("ood", data="known" if data_root else "digits", data_root=data_root, options=options)
    assert read.pop("other") == Path(read_from)
    assert read == ({"known": Path(data_root)} if data_root else {})
    assert "auroc msp, other" in values


def test_another_data_set_must_have_images_of_that_shape(run, trained, monkeypatch):
    large = Split(torch.zeros(7, 3, 16, 16), torch.zeros(7, dtype=torch.int64))
    monkeypatch.setitem(data.BUNDLED, "large", (lambda: (large,) * 3, {"classes": ("large",)}))
    with pytest.raises(ValueError, match=r"the images of large are \(3, 16, 16\), those of digits \(1, 8, 8\)"):
        run("ood", options={"unknown_data": "large"})
    with pytest.raises(ValueError, match="there is no data set 'small'"):
        run("ood", options={"unknown_data": "small"})
    assert not trained, "it was trained before it was said"


def test_with_all_classes_known_nothing_is_near(run):
    values = run("ood", options={"known": 10})
    assert all(math.isnan(value) == name.startswith("near") for name, value in values.items())
    task = TASKS["ood"]
    cells = [task.cell("hem", 0, quick=True, options={"known": known}) for known in (10, 9)]
    assert [task.notes(cell) for cell in cells] == [["every class is known: there is nothing near to reject"], []]


def test_without_a_class_that_is_not_known_nothing_can_be_chosen(run, trained):
    with pytest.raises(ValueError, match="settings are chosen by classes that are not known, but all 10 are"):
        run("ood", options={"known": 10}, part="validation")
    assert not trained


def test_pictures_larger_than_the_textures_are_no_trouble(run, monkeypatch):
    # A region of the textures is 192 pixels wide; pictures in folders are 224 by default.
    split = Split(torch.rand(6, 1, 196, 196), torch.arange(6) % 3)
    monkeypatch.setitem(data.BUNDLED, "large", (lambda: (split,) * 3, {"classes": ("a", "b", "c")}))
    values = run("ood", "ce", data="large")
    assert 0 <= values["auroc msp, textures"] <= 1


@pytest.mark.parametrize("known", [1, 11])
def test_known_must_be_some_of_the_classes(run, known):
    with pytest.raises(ValueError, match=f"known must be 2 to 10 classes, got {known}"):
        run("ood", options={"known": known})


def test_the_sets_of_openood_are_all_there_is(run, kept, trained, monkeypatch, tmp_path):
    def colour(n, classes=10):
        return Split(torch.rand(n, 3, 8, 8), torch.arange(n) % classes)

    train, test = colour(200), colour(30)
    sets = {"near a": colour(7), "near b": colour(9)}, {"far": colour(11)}
    asked = []

    def openood(root, known, size):
        asked.append((str(root), known, size))
        return sets

    monkeypatch.setitem(
        data.ON_DISK, "cifar10", (lambda root: data.Data(train, None, test, tuple("0123456789"), 3), "")
    )
    monkeypatch.setattr(data, "openood", openood)
    given = {"data": "cifar10", "data_root": "here", "folder": tmp_path}
    options = {"unknown_data": "openood", "unknown_root": "there"}
    with pytest.raises(ValueError, match="OpenOOD takes every class as known: known=10"):
        run("ood", options={**options, "known": 6}, **given)
    assert not trained, "it was trained before it was said"

    values = run("ood", options=options, **given)
    assert set(asked) == {("there", "cifar10", 8)}
    assert [len(dataset.labels.unique()) for dataset, _ in trained] == [10]
    model = kept(10, channels=3)
    outputs = {name: model(s.images) for name, s in {**sets[0], **sets[1], "known": test}.items()}
    for score, measure in BY_HAND.items():
        found = {name: measure(z) for name, z in outputs.items()}
        each = {name: auroc(found["known"], found[name]) for name in ("near a", "near b", "far")}
        assert {name: values[f"auroc {score}, {name}"] for name in each} == pytest.approx(each, abs=1e-3)
        assert values[f"near_auroc {score}"] == pytest.approx((each["near a"] + each["near b"]) / 2, abs=1e-3)
        assert values[f"far_auroc {score}"] == pytest.approx(each["far"], abs=1e-3)
    assert "auroc msp, textures" not in values
    assert TASKS["ood"].notes(TASKS["ood"].cell("hem", 0, data="cifar10", data_root="here", options=options)) == []


@pytest.mark.parametrize(("data_root", "unknown_root", "read_from"), [("here", None, "here"), (None, "there", "there")])
def test_openood_is_read_from_its_root(monkeypatch, few_digits, data_root, unknown_root, read_from):
    asked = []
    monkeypatch.setattr(data, "openood", lambda root, known, size: asked.append((root, known, size)))
    monkeypatch.setitem(data.ON_DISK, "known", (lambda root: few_digits, ""))
    options = {"unknown_data": "openood", "unknown_root": unknown_root}
    name = "known" if data_root else "digits"
    task = TASKS["ood"]
    task.check(task.cell("hem", 0, quick=True, data=name, data_root=data_root, options=options))
    assert asked == [(Path(read_from), name, 8)]


def test_openood_needs_a_root(run, trained):
    with pytest.raises(ValueError, match=r"^unknown_root must name OpenOOD's folder of data$"):
        run("ood", options={"unknown_data": "openood"})
    assert not trained


def test_what_openood_lacks_is_said_before_training(run, trained, monkeypatch, tmp_path):
    images = Split(torch.rand(200, 3, 8, 8), torch.arange(200) % 10)
    made = data.Data(images, None, images, tuple("0123456789"), 3)
    monkeypatch.setitem(data.ON_DISK, "cifar10", (lambda root: made, ""))
    options = {"unknown_data": "openood", "unknown_root": str(tmp_path)}
    with pytest.raises(FileNotFoundError, match=r"test_cifar100\.txt is missing"):
        run("ood", options=options, data="cifar10", data_root="here")
    assert not trained
