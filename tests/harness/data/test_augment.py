import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from hem_ext.harness import data
from hem_ext.harness.data.augment import ResizedCropFlip, ShiftFlip


def variants(image, padding):
    """By slicing, every image that one may become, by (top, left, mirrored)."""
    _, height, width = image.shape
    padded = F.pad(image, [padding] * 4)
    found = {}
    for top, left in itertools.product(range(2 * padding + 1), repeat=2):
        part = padded[:, top : top + height, left : left + width]
        found[top, left, False], found[top, left, True] = part, part.flip(2)
    return found


def test_each_image_is_moved_and_mirrored_by_itself():
    torch.manual_seed(0)
    images = torch.rand(200, 2, 6, 5)
    seen = []
    for before, after in zip(images, ShiftFlip(padding=1)(images), strict=True):
        (which,) = [key for key, variant in variants(before, 1).items() if torch.equal(variant, after)]
        seen.append(which)
    assert set(seen) == set(itertools.product(range(3), range(3), (False, True)))
    assert 70 < sum(mirrored for *_, mirrored in seen) < 130


def test_the_generator_decides():
    images = torch.rand(9, 3, 8, 8)
    torch.manual_seed(1)
    once, again = ShiftFlip()(images), ShiftFlip()(images)
    torch.manual_seed(1)
    assert torch.equal(ShiftFlip()(images), once)
    assert not torch.equal(again, once)


def places(width, height):
    """A picture whose red is the column and whose green the row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=2).astype(np.uint8))


def test_a_part_of_the_picture_fills_the_square():
    torch.manual_seed(0)
    picture, size = places(240, 180), 48
    areas, ratios, mirrored = [], [], 0
    for _ in range(300):
        part = np.asarray(ResizedCropFlip(size)(picture)).astype(float)
        assert part.shape == (size, size, 3)
        red, green = part[:, :, 0].mean(0), part[:, :, 1].mean(1)
        mirrored += red[-1] < red[0]
        # From the middle of the first pixel to that of the last.
        width, height = (abs(x[-1] - x[0]) * size / (size - 1) for x in (red, green))
        areas.append(width * height / (240 * 180))
        ratios.append(width / height)
    assert 0.07 < min(areas) < 0.12
    assert 0.85 < max(areas) < 1.02
    assert 0.72 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.37
    assert 100 < mirrored < 200


@pytest.mark.parametrize(("width", "height", "ratio"), [(40, 30, 4 / 3), (30, 40, 3 / 4)])
def test_all_of_a_picture_is_a_part_of_it(width, height, ratio):
    picture = places(width, height)
    part = ResizedCropFlip(8, area=(1, 1), ratio=(ratio, ratio))(picture)
    assert_either_way(part, picture.resize((8, 8), Image.Resampling.BILINEAR))


def test_a_pixel_is_a_part_of_a_picture():
    # A square of one pixel; the largest square in the middle is half of each.
    parts = [ResizedCropFlip(1, area=(0.5, 0.5), ratio=(1, 1))(places(2, 1)).getpixel((0, 0)) for _ in range(40)]
    assert set(parts) == {(0, 0, 0), (1, 0, 0)}


@pytest.mark.parametrize(("size", "ratio"), [((1, 2), 3 / 4), ((2, 1), 4 / 3)])
def test_a_part_without_a_pixel_is_none(size, ratio):
    # 0.4 x 0.5 pixels, or the other way: 0 x 1.
    picture = places(*size)
    part = ResizedCropFlip(8, area=(0.1, 0.1), ratio=(ratio, ratio))(picture)
    assert_either_way(part, ImageOps.fit(picture, (8, 8), Image.Resampling.BILINEAR))


def test_a_picture_too_narrow_for_any_part_gives_its_middle():
    torch.manual_seed(0)
    picture = places(200, 10)
    part = ResizedCropFlip(8)(picture)
    drawn = torch.rand(())
    assert_either_way(part, picture.crop((95, 0, 105, 10)).resize((8, 8), Image.Resampling.BILINEAR))
    # Ten times an area and a shape, then whether it is mirrored.
    torch.manual_seed(0)
    assert drawn == [torch.rand(()) for _ in range(22)][-1]


def assert_either_way(picture, wanted):
    assert any(np.array_equal(picture, either) for either in (wanted, ImageOps.mirror(wanted)))


def test_training_augments_and_testing_does_not():
    torch.manual_seed(0)
    split = data.Split(torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8), torch.arange(5), ShiftFlip())
    for plain in (split, split.take(torch.arange(5)), data.Split(split.images, split.labels).for_training()):
        assert torch.equal(plain[3][0], split.images[3] / 255)
    for training in (split.for_training(), split.for_training().take(torch.arange(5)), split.take(split.labels >= 0)):
        image, label = training.for_training()[3]
        assert label == 3
        assert image.dtype == torch.float32
        assert any(torch.equal(image, variant) for variant in variants(split.images[3] / 255, 4).values())
        items = training.for_training().__getitems__([0, 1, 2, 3, 4])
        assert not all(torch.equal(image, split.images[i] / 255) for i, (image, _) in enumerate(items))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_may_be_left_as_it_is(name, monkeypatch):
    split = data.Split(torch.zeros(20, 3, 32, 32), torch.arange(20) % 2)
    made = data.Data(split, None, split, ("a", "b"), 3)
    monkeypatch.setattr(data.classification, "_cifar", lambda *_: made)
    loaded = data.load(name, "root")
    assert loaded.train.augment == ShiftFlip(4)
    assert loaded.test.augment is None
    assert data.load(name, "root", augment=False).train.augment is None
