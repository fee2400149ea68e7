import pytest
import torch

from hem_ext.harness import data


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
