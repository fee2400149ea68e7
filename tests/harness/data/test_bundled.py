import importlib.metadata

import numpy as np
import pytest
import torch
from PIL import Image

from hem_ext.harness.data import bundled as data


def test_digits():
    train, test = data.digits()
    assert train.images.shape == (1257, 1, 8, 8)
    assert test.images.shape == (540, 1, 8, 8)
    for split in (train, test):
        assert split.images.dtype == torch.float32
        assert (split.images.min(), split.images.max()) == (0, 1)
        share = split.labels.bincount(minlength=10) / len(split.labels)
        assert share.tolist() == pytest.approx([0.1] * 10, abs=0.005)
    again, _ = data.digits()
    assert torch.equal(train.images, again.images)


def test_train_and_test_digits_are_different_pictures():
    train, test = data.digits()
    seen = {image.numpy().tobytes() for image in train.images}
    # Of 1797 handwritten digits none is drawn twice to the same sixteenth of grey.
    assert len(seen) == len(train.images)
    assert not seen & {image.numpy().tobytes() for image in test.images}


def test_train_and_test_textures_are_different_regions():
    train, test = data.textures()
    for left, right in zip(train, test, strict=True):
        assert left.shape == right.shape == (512, 256)
        assert 0 <= left.min() < left.max() <= 1
        assert left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
        assert left.storage_offset() + 256 == right.storage_offset()


def test_digit_scenes():
    train, test = data.digit_scenes(40, 10, size=48)
    assert train.images.shape == (40, 1, 48, 48)
    assert train.labels.shape == (40, 48, 48)
    assert test.labels.shape == (10, 48, 48)
    assert train.labels.unique().tolist() == list(range(11))
    assert 0 <= train.images.min() < train.images.max() <= 1
    background = (train.labels == 0).float().mean()
    assert 0.5 < background < 0.95
    # A digit is lighter than what it lies on.
    assert train.images[:, 0][train.labels > 0].mean() > train.images[:, 0][train.labels == 0].mean() + 0.2


def test_digit_scenes_depend_on_the_seed_alone():
    first, again = data.digit_scenes(5, 2, seed=3), data.digit_scenes(5, 2, seed=3)
    other = data.digit_scenes(5, 2, seed=4)
    assert torch.equal(first[0].images, again[0].images)
    assert torch.equal(first[1].labels, again[1].labels)
    assert not torch.equal(first[0].images, other[0].images)


def test_scenes_are_made_of_their_own_split(monkeypatch):
    train, _ = data.digits()
    only_sevens = train.labels == 7
    monkeypatch.setattr(
        data, "digits", lambda: (train, data.Split(train.images[only_sevens], train.labels[only_sevens]))
    )
    train_scenes, test_scenes = data.digit_scenes(10, 5)
    assert len(train_scenes.labels.unique()) > 5
    assert test_scenes.labels.unique().tolist() == [0, 8]


def test_the_scenes_are_those_that_were_measured():
    # Other draws would make other scenes, and every number measured on them wrong. A pixel may round differently.
    train, test = data.digit_scenes(3, 2)
    assert train.labels.view(3, -1).sum(1).tolist() == pytest.approx([877, 1706, 1588], abs=20)
    assert test.images.sum().item() == pytest.approx(1690.882, rel=1e-5)


def test_mosaic_textures_come_in_the_wheel_of_scikit_image():
    files = {
        file.name: file.locate() for file in importlib.metadata.files("scikit-image") if file.parent.name == "data"
    }
    for name in data.MOSAIC_TEXTURES:
        with Image.open(files[f"{name}.png"]) as image:
            assert image.mode == "L"
            torch.testing.assert_close(data._picture(name), torch.from_numpy(np.array(image) / 255).float())


def test_texture_mosaics():
    train, test = data.texture_mosaics(40, 10)
    for split, count in ((train, 40), (test, 10)):
        assert split.images.shape == (count, 1, 64, 64)
        assert split.labels.shape == (count, 64, 64)
        assert split.labels.unique().tolist() == [*range(8), 255]
        assert 0 <= split.images.min() < split.images.max() <= 1
    borders = (train.labels == 255).float().mean()
    assert 0.03 < borders < 0.2
    assert min(len(label.unique()) for label in train.labels) >= 2


def test_mosaics_are_of_their_own_strips_and_marked_where_two_textures_meet(monkeypatch):
    # Every column of every texture has a grey of its own.
    def picture(name):
        return (data.MOSAIC_TEXTURES.index(name) + torch.arange(128) / 128).expand(40, 128) / 8

    monkeypatch.setattr(data, "_picture", picture)
    for split, strips in zip(data.texture_mosaics(60, 60, size=20), ({0, 2}, {1, 3}), strict=True):
        columns = (split.images[:, 0] * 8 * 128).round().long()
        assert set((columns % 128 // 32).flatten().tolist()) == strips

        kinds = columns // 128
        border = torch.zeros_like(kinds, dtype=torch.bool)
        down, right = kinds[:, 1:] != kinds[:, :-1], kinds[:, :, 1:] != kinds[:, :, :-1]
        border[:, 1:] |= down
        border[:, :-1] |= down
        border[:, :, 1:] |= right
        border[:, :, :-1] |= right
        assert torch.equal(split.labels, kinds.masked_fill(border, data.BORDER))


def test_texture_mosaics_depend_on_the_seed_alone():
    first, again, other = (data.texture_mosaics(3, 2, size=32, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first[0].images, again[0].images)
    assert torch.equal(first[1].labels, again[1].labels)
    assert not torch.equal(first[0].images, other[0].images)


def test_a_mosaic_fits_into_a_strip_of_every_picture():
    assert data.texture_mosaics(1, 1, size=96)[0].images.shape == (1, 1, 96, 96)
    with pytest.raises(ValueError, match="at most 96 pixels large, got 97"):
        data.texture_mosaics(1, 1, size=97)
