from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

from hem_ext.harness import data, metrics
from hem_ext.harness.losses import make_loss
from hem_ext.harness.models import SmallUNet
from hem_ext.harness.tasks import TASKS, Workbench, segmentation

SCENES = {"num_train": 12, "num_validation": 3, "num_test": 4, "size": 24}


def test_by_hand_over_the_whole_test_set(run, kept):
    values = run("segmentation", "ce", epochs=3)
    test = data.load("digit-scenes", **SCENES).test
    predicted = kept(11, SmallUNet)(test.images).argmax(1).flatten()
    labels = test.labels.flatten()
    occurring = torch.cat([labels, predicted]).unique().tolist()
    iou = jaccard_score(labels, predicted, average=None, labels=occurring, zero_division=0)
    assert values["mean_iou"] == pytest.approx(iou.mean(), abs=1e-3)
    assert values["accuracy"] == pytest.approx((labels == predicted).double().mean().item(), abs=1e-3)
    names = ["iou background", *(f"iou {digit}" for digit in range(10))]
    assert [values[names[c]] for c in occurring] == pytest.approx(iou.tolist(), abs=1e-2)
    assert all(np.isnan(values[name]) for c, name in enumerate(names) if c not in occurring)


@pytest.mark.parametrize("counted", ["images", "pixels"])
def test_margins_by_images_or_pixels(run, trained, counted):
    run("segmentation", "hem+", options={"margin_counts": counted})
    labels = data.load("digit-scenes", **SCENES).train.labels.flatten(1)
    each = torch.stack([(labels == c).sum(1) for c in range(11)])
    counts = (each > 0).sum(1) if counted == "images" else each.sum(1)
    expected = (2000 / (11 * counts.clamp(min=1))).sqrt()
    assert torch.allclose(trained[0][1].criterion.margin, expected)
    # Another count is another network.
    run("segmentation", "hem+", options={"margin_counts": "pixels" if counted == "images" else "images"})
    assert len(trained) == 2


def write_voc(root):
    """Three pictures to train and two to test, of sides that no network likes, labelled left and right."""
    generator = np.random.default_rng(0)
    folder = root / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for part, count in (("train", 3), ("val", 2)):
        names = [f"{part}{i}" for i in range(count)]
        (folder / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names))
        for i, name in enumerate(names):
            width, height = 45 + i, 37 + i
            pixels = generator.integers(0, 256, (height, width, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg")
            labels = np.zeros((height, width), np.uint8)
            labels[:, 20:] = 5
            labels[:, 18:22] = 255  # no two classes meet, as in VOC
            Image.fromarray(labels).save(folder / "SegmentationClass" / f"{name}.png")


def test_pictures_on_disk_of_any_size(run, trained, tmp_path):
    write_voc(tmp_path / "data")
    given = {
        "data": "voc2012",
        "data_root": str(tmp_path / "data"),
        "options": {"data_options": {"crop": 32}},
    }
    cell = TASKS["segmentation"].cell("hem+", 0, **given)
    assert cell.schedule.policy == "poly"
    assert TASKS["segmentation"].cell("hem+", 0, **given, policy="one-cycle").schedule.policy == "one-cycle"
    for _ in range(2):
        values = run("segmentation", "hem+", **given, folder=None)
        assert 0 <= values["mean_iou"] <= 1
        assert np.isnan(values["boundary_f1"])
    # Counted on whole pictures: two classes in two pictures each, whatever was cropped; the third is to choose by.
    for _, criterion in trained:
        expected = torch.tensor([(2000 / (21 * (2 if c in (0, 5) else 1))) ** 0.5 for c in range(21)])
        torch.testing.assert_close(criterion.criterion.margin, expected)


def test_losses_that_need_no_counts_count_nothing(run, monkeypatch):
    monkeypatch.setattr(segmentation, "class_presence", None)
    run("segmentation", "ce")


class Shown(torch.nn.Module):
    """Predicts what the first channel of a picture says."""

    def __init__(self):
        super().__init__()
        self.device = torch.nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return torch.nn.functional.one_hot(images[:, 0].long(), 3).movedim(3, 1).float()


def test_the_boundary_score_is_a_mean_over_pictures_that_have_one():
    about = {"num_classes": 3, "ignore_index": 255}
    labels = torch.zeros(4, 12, 16, dtype=torch.int64)
    labels[0, 6:] = 1  # the other has none
    labels[2, 4:] = 2
    labels[3] = 255
    predicted = labels.clamp(max=2).roll((2, 1), (1, 2))
    pictures = torch.stack([predicted, predicted * 0 + 7, predicted * 0], 1).float()
    score = segmentation._boundary_f1(
        Shown(), [*zip(pictures, labels, strict=True)], SimpleNamespace(**about), make_loss("ce", num_classes=3)
    )
    each = metrics.boundary_f1(predicted, labels, **about)
    assert each.isnan().tolist() == [False, True, False, True]
    assert score == pytest.approx(each[[0, 2]].mean().item())


def test_classes_are_counted_over_whole_label_maps():
    labels = torch.tensor([[[0, 0, 1], [-100, 3, 255]], [[0, 2, 2], [2, 2, 2]]])
    found = [2, 1, 1], [3, 1, 5]
    counted = segmentation.class_presence(tuple(zip(labels, labels, strict=True)), 3)
    assert counted == found
    assert {type(count) for counts in counted for count in counts} == {int}

    class Cropped(tuple):
        """As a training set on disk, whose items may be parts of a picture."""

        def label_map(self, index):
            return labels[index]

    assert segmentation.class_presence(Cropped([None, None]), 3) == found


def test_outlines_that_are_ignored_give_no_boundary_score(run):
    options = {"data_options": {"num_train": 4, "num_validation": 2, "num_test": 2, "size": 48}}
    assert np.isnan(run("segmentation", "ce", data="texture-mosaics", options=options)["boundary_f1"])


def test_margin_counts_must_be_known(run):
    with pytest.raises(ValueError, match="margin_counts must be 'images' or 'pixels', got 'classes'"):
        run("segmentation", "hem+", options={"margin_counts": "classes"})


def test_what_a_loss_does_at_test_is_done(run, kept):
    values = run("segmentation", "logit-adjusted", epochs=3, constants={"post_hoc": True})
    found = data.load("digit-scenes", **SCENES)
    logits = kept(11, SmallUNet)(found.test.images)
    prior = found.train.labels.flatten().bincount(minlength=11).clamp(min=1)
    plain, adjusted = (
        (z.argmax(1) == found.test.labels).double().mean().item()
        for z in (logits, logits - (prior / prior.sum()).log().view(-1, 1, 1))
    )
    assert values["accuracy"] == pytest.approx(adjusted, abs=1e-3)
    assert abs(adjusted - plain) > 0.01


@pytest.fixture
def looked(monkeypatch):
    """Accelerator and batch size of every look at a whole set."""
    found, confusion_matrix = [], segmentation.confusion_matrix

    def look(*given, **options):
        found.append((options["accelerator"], options["batch_size"]))
        return confusion_matrix(*given, **options)

    monkeypatch.setattr(segmentation, "confusion_matrix", look)
    return found


def test_pictures_of_several_sizes_are_shown_as_far_as_all_reach(looked, tmp_path):
    write_voc(tmp_path / "data")
    options = {"data_options": {"crop": 32}}
    cell = TASKS["segmentation"].cell(
        "ce", 0, quick=True, epochs=1, data="voc2012", data_root=str(tmp_path / "data"), options=options
    )
    bench = Workbench(cell, None)
    TASKS["segmentation"].run(bench)
    assert bench.pictures["images"].shape == (2, 3, 37, 45)
    assert bench.pictures["labels"].shape == bench.pictures["predicted"].shape == (2, 37, 45)
    assert looked == [(bench.accelerator, 1)] * 2


def test_pictures_of_the_first_scenes(looked, kept, tmp_path):
    scenes = SCENES | {"num_test": 6}
    cell = TASKS["segmentation"].cell("ce", 0, quick=True, epochs=1, options={"data_options": scenes})
    bench = Workbench(cell, tmp_path)
    TASKS["segmentation"].run(bench)
    assert looked == [(bench.accelerator, 10)] * 2
    test = data.load("digit-scenes", **scenes).test.take(torch.arange(5))
    assert torch.equal(bench.pictures["images"], test.images)
    assert torch.equal(bench.pictures["labels"], test.labels)
    agree = bench.pictures["predicted"] == kept(11, SmallUNet)(test.images).argmax(1)
    assert agree.double().mean() > 0.99
