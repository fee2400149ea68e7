import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from hem_ext.harness import data
from hem_ext.harness.models import SmallUNet
from hem_ext.harness.tasks import TASKS, Workbench

SCENES = {"num_train": 12, "num_test": 4, "size": 24}


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


def test_margin_counts_must_be_known(run):
    with pytest.raises(ValueError, match="margin_counts must be 'images' or 'pixels', got 'classes'"):
        run("segmentation", "hem+", options={"margin_counts": "classes"})


def test_pictures_of_the_first_scenes(kept, tmp_path):
    cell = TASKS["segmentation"].cell("ce", 0, quick=True, epochs=1, options={"data_options": SCENES})
    bench = Workbench(cell, tmp_path)
    TASKS["segmentation"].run(bench)
    test = data.load("digit-scenes", **SCENES).test
    assert torch.equal(bench.pictures["images"], test.images)
    assert torch.equal(bench.pictures["labels"], test.labels)
    agree = bench.pictures["predicted"] == kept(11, SmallUNet)(test.images).argmax(1)
    assert agree.double().mean() > 0.99
