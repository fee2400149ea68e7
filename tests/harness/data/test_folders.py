import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import DataLoader

from hem_ext.harness import data
from hem_ext.harness.data import folders
from hem_ext.harness.data.folders import image_folder, mask_folder
from hem_ext.harness.data.pictures import ImageFiles, picture_size, read_picture, read_rgb

RNG = np.random.default_rng(0)
SHAPE = (12, 16)


def write_image(path, size=(20, 20), colour=0, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def write_classes(folder, classes=("n01", "n02"), count=2):
    """Pictures without two of the same colour."""
    for name in classes:
        for i in range(count):
            write_image(folder / name / f"{i}.png", colour=tuple(RNG.integers(0, 256, 3).tolist()))


def write_image_folder(root):
    for part in ("train", "val"):
        write_image(root / part / "n02" / "b.JPEG", (40, 30), (255, 0, 0))
        write_image(root / part / "n02" / "a.jpg", (30, 40), 100, mode="L")
        write_image(root / part / "n01" / "c.png", colour=(0, 0, 255))
        (root / part / "n02" / "notes.txt").touch()


def names(dataset):
    return [re.sub(r".*/(?=[^/]+/[^/]+$)", "", path) for path, _ in dataset.files]


def test_image_folder(tmp_path):
    write_image_folder(tmp_path)
    loaded = image_folder(tmp_path, size=16)
    assert (loaded.classes, loaded.channels, loaded.validation) == (("n01", "n02"), 3, None)
    for part in (loaded.train, loaded.test):
        assert [label.item() for _, label in part] == [0, 1, 1]
        means = [image.mean(dim=(1, 2)).tolist() for image, _ in part]
        wanted = ((0, 0, 1), (100 / 255,) * 3, (1, 0, 0))
        for mean, colour in zip(means, wanted, strict=True):
            assert mean == pytest.approx(colour, abs=0.01)
    images, labels = next(iter(DataLoader(loaded.test, batch_size=3, num_workers=1)))
    assert (images.shape, images.dtype) == ((3, 3, 16, 16), torch.float32)
    assert (labels.tolist(), labels.dtype) == ([0, 1, 1], torch.int64)
    assert image_folder(tmp_path).train[0][0].shape == (3, 224, 224)
    assert loaded.train.labels.tolist() == [0, 1, 1]
    for picked in (torch.tensor([2, 0]), torch.tensor([True, False, True])):
        some = loaded.train.take(picked)
        order = picked.nonzero().squeeze(1) if picked.dtype == torch.bool else picked
        assert all(torch.equal(some[i][0], loaded.train[j][0]) for i, j in enumerate(order.tolist()))
        assert torch.equal(some.labels, loaded.train.labels[picked])


def write_half(path):
    """White on the right, black on the left."""
    write_image(path, (64, 64))
    half = Image.open(path).convert("RGB")
    half.paste((255, 255, 255), (32, 0, 64, 64))
    half.save(path)


def changes(dataset):
    return len({dataset[0][0].sum().item() for _ in range(10)}) > 1


def test_training_takes_parts_of_the_pictures(tmp_path):
    torch.manual_seed(0)
    for part, name in ((part, name) for part in ("train", "val") for name in ("n01", "n02")):
        for i in range(4):
            write_half(tmp_path / part / name / f"{i}.png")
    loaded = image_folder(tmp_path, size=16)
    whole = loaded.train[0][0]
    means = [loaded.train.for_training()[0][0].mean().item() for _ in range(20)]
    assert whole.mean().item() == pytest.approx(0.5, abs=0.01)
    assert (min(means) < 0.3) or (max(means) > 0.7)
    assert torch.equal(loaded.test.for_training()[0][0], whole)
    assert torch.equal(image_folder(tmp_path, size=16, augment=False).train.for_training()[0][0], whole)
    # What is split off for validation stays whole, what is taken for training is still augmented.
    loaded = data.load("image-folder", tmp_path, size=16, validation=0.25)
    assert (len(loaded.train), len(loaded.validation)) == (6, 2)
    assert not changes(loaded.validation)
    assert changes(loaded.train.for_training())
    assert changes(loaded.train.for_training().take(torch.tensor([0])))


@pytest.mark.parametrize("wide", [True, False])
def test_the_middle_is_cut_out_and_not_squeezed(tmp_path, wide):
    # Red, then green, then blue, a third of the longer side each.
    stripes = Image.new("RGB", (90, 30), (0, 255, 0))
    stripes.paste((255, 0, 0), (0, 0, 30, 30))
    stripes.paste((0, 0, 255), (60, 0, 90, 30))
    path = tmp_path / "stripes.png"
    (stripes if wide else stripes.rotate(-90, expand=True)).save(path)
    image, label = ImageFiles(((str(path), 5),), size=15)[0]
    assert label == 5
    assert (image[1, 1:-1, 1:-1] == 1).all()
    assert (image[[0, 2], 2:-2, 2:-2] == 0).all()


@pytest.mark.parametrize("name", ["a.JPG", "a.jpeg", "a.PNG", "a.webp", "a.WEBP", "a.bmp", "a.BMP"])
def test_pictures_of_any_usual_suffix(tmp_path, name):
    for label, part in enumerate(("n01", "n02")):
        write_image(tmp_path / "train" / part / name, colour=(0, 200 * label, 0))
        write_image(tmp_path / "val" / part / name, colour=(0, 200 * label, 0))
    loaded = image_folder(tmp_path, size=8)
    assert loaded.test[1][0][1].mean().item() == pytest.approx(200 / 255, abs=0.02)


@pytest.mark.parametrize("second", ["val", "valid", "validation", "test"])
def test_one_more_part_than_train_is_the_test_part(tmp_path, second):
    write_classes(tmp_path / "train", count=4)
    write_classes(tmp_path / second)
    loaded = image_folder(tmp_path)
    assert loaded.validation is None
    assert {path.split("/")[-3] for path, _ in loaded.train.files} == {"train"}
    assert {path.split("/")[-3] for path, _ in loaded.test.files} == {second}
    split = data.load("image-folder", tmp_path, validation=0.25)
    assert (len(split.train), len(split.validation), len(split.test)) == (6, 2, 4)
    assert split.validation.labels.tolist() == [0, 1]
    assert sorted(split.train.files + split.validation.files) == sorted(loaded.train.files)


@pytest.mark.parametrize("middle", ["val", "valid", "validation"])
def test_three_parts(tmp_path, middle):
    for part in ("train", middle, "test"):
        write_classes(tmp_path / part)
    loaded = data.load("image-folder", tmp_path)
    for part, dataset in (("train", loaded.train), (middle, loaded.validation), ("test", loaded.test)):
        assert {path.split("/")[-3] for path, _ in dataset.files} == {part}
    with pytest.raises(ValueError, match="has a validation part of its own"):
        data.load("image-folder", tmp_path, validation=0.2)


def test_no_parts(tmp_path):
    write_classes(tmp_path, ("a", "b"), 10)
    write_classes(tmp_path, ("c",), 20)
    (tmp_path / "README.txt").touch()
    (tmp_path / ".hidden").mkdir()
    write_image(tmp_path / "a" / "._0.png")
    loaded = image_folder(tmp_path, size=8)
    assert (loaded.classes, loaded.validation) == (("a", "b", "c"), None)
    assert loaded.train.labels.bincount().tolist() == [8, 8, 16]
    assert loaded.test.labels.bincount().tolist() == [2, 2, 4]
    assert not set(names(loaded.train)) & set(names(loaded.test))
    assert len({*names(loaded.train), *names(loaded.test)}) == 40
    again = image_folder(tmp_path, size=8)
    assert (names(again.train), names(again.test)) == (names(loaded.train), names(loaded.test))
    assert not changes(loaded.test.for_training())
    whole = data.load("image-folder", tmp_path, validation=0.25)
    assert names(whole.test) == names(loaded.test)
    assert whole.validation.labels.bincount().tolist() == [2, 2, 4]


def test_few_pictures_of_a_class(tmp_path):
    write_classes(tmp_path, ("a", "b", "c"), 3)
    write_classes(tmp_path, ("d",), 60)
    loaded = data.load("image-folder", tmp_path)
    for part in (loaded.train, loaded.validation, loaded.test):
        assert part.labels.unique().tolist() == [0, 1, 2, 3]
    (tmp_path / "b" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"class b has 2 samples; .* each part: training, validation, test"):
        data.load("image-folder", tmp_path)


def test_few_pictures_of_a_class_of_the_training_part(tmp_path):
    write_classes(tmp_path / "train", count=2)
    write_classes(tmp_path / "val", count=1)
    loaded = data.load("image-folder", tmp_path)
    assert loaded.train.labels.tolist() == loaded.validation.labels.tolist() == [0, 1]
    (tmp_path / "train" / "n02" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"class n02 has 1 sample; .* each part: training, validation$"):
        data.load("image-folder", tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    write_classes(tmp_path, ("bus", "train", "valid"), 5)
    assert image_folder(tmp_path).classes == ("bus", "train", "valid")


def test_imagenets_test_pictures_without_classes_are_not_read(tmp_path):
    write_image_folder(tmp_path)
    write_image(tmp_path / "test" / "unknown.JPEG")
    assert {path.split("/")[-3] for path, _ in image_folder(tmp_path).test.files} == {"val"}


def test_a_wrong_image_folder(tmp_path):
    write_image_folder(tmp_path)
    write_image(tmp_path / "val" / "n03" / "d.png")
    with pytest.raises(ValueError, match="train and val must hold the same classes; n03 is in one of them alone"):
        image_folder(tmp_path)
    (tmp_path / "train" / "n03").mkdir()
    with pytest.raises(FileNotFoundError, match=re.escape("train/n03/*.JPEG is missing; expected CLASS/*.JPEG (or")):
        image_folder(tmp_path)
    write_image(tmp_path / "train" / "n03" / "d.png")
    write_classes(tmp_path / "test")
    with pytest.raises(ValueError, match="train and test must hold the same classes; n03 is in one of them alone"):
        image_folder(tmp_path)
    write_classes(tmp_path / "valid", ("n01", "n02", "n03"))
    with pytest.raises(ValueError, match="holds val and valid; expected one of them"):
        image_folder(tmp_path)
    for part in ("val", "valid", "test"):
        (tmp_path / part).rename(tmp_path / f"old-{part}")
    with pytest.raises(
        FileNotFoundError, match=r"val/CLASS is missing; expected CLASS/.* holds old-test, old-val, old-valid, train"
    ):
        image_folder(tmp_path)


def test_no_image_folder(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="train/CLASS is missing; expected CLASS/"):
            image_folder(root)
    write_classes(tmp_path, ("cats",), 5)
    with pytest.raises(ValueError, match="holds one class alone, cats; expected two or more"):
        image_folder(tmp_path)


def test_no_picture_is_opened_to_read_the_folder(tmp_path, monkeypatch):
    for part in ("train", "val"):
        write_classes(tmp_path / part, count=5)
    monkeypatch.setattr(Image, "open", None)
    assert len(data.load("image-folder", tmp_path, validation=0.2).train) == 8


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"<html>no picture</html>"])
def test_a_broken_picture(tmp_path, suffix, damage):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(RNG.integers(0, 256, (60, 60, 3)).astype(np.uint8)).save(path)
    files = ImageFiles(((str(path), 0),), size=16, augment=lambda image: image)
    assert files[0][0].shape == (3, 16, 16)
    path.write_bytes(damage(path.read_bytes()))
    for dataset in (files, files.for_training()):
        with pytest.raises(ValueError, match=re.escape(f"{path} is broken, or no picture: ")):
            dataset[0]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        files[0]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (200, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_000)
    with pytest.raises(
        ValueError, match=re.escape(f"{path} is broken, or no picture: Image size (20000 pixels)")
    ) as told:
        ImageFiles(((str(path), 0),), size=16)[0]
    assert "\n" not in str(told.value)


def test_pillow_is_asked_for_pictures_alone(tmp_path):
    # It would run Ghostscript.
    path = tmp_path / "a.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    assert Image.open(path).format == "EPS"
    with pytest.raises(ValueError, match=re.escape(f"{path} is broken, or no picture: its format is not known")):
        ImageFiles(((str(path), 0),), size=16)[0]


def test_a_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path):
    write_image(tmp_path / "a.jpg", (800, 400))
    assert read_picture(tmp_path / "a.jpg").size == (800, 400)
    for read in (read_picture, read_rgb):
        assert read(tmp_path / "a.jpg", enough=100).size == (200, 100)
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8))
    noise.save(tmp_path / "a.jpg")
    small = ImageOps.fit(read_picture(tmp_path / "a.jpg", enough=24), (24, 24), Image.Resampling.BILINEAR)
    found = ImageFiles(((str(tmp_path / "a.jpg"), 0),), size=24)[0][0]
    np.testing.assert_array_equal(found.movedim(0, 2).mul(255).round(), np.asarray(small))


def write_turned(path, orientation, upright):
    """A picture that is stored lying, as EXIF's number of its orientation says."""
    turn = {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180, 5: Image.Transpose.TRANSPOSE}
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    upright.transpose(turn[orientation]).save(path, exif=exif, quality=95)


def quarters(size):
    """Red and green above, blue and white below."""
    (width, height), colours = size, [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    small = Image.fromarray(np.array(colours, dtype=np.uint8).reshape(2, 2, 3))
    return small.resize((width, height), Image.Resampling.NEAREST)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", [3, 5, 6])
def test_a_picture_is_turned_upright(tmp_path, suffix, orientation):
    path, upright = tmp_path / f"a{suffix}", quarters((32, 64))
    write_turned(path, orientation, upright)
    found = read_rgb(path)
    assert found.size == picture_size(path) == (32, 64)
    assert abs(np.asarray(found).astype(int) - np.asarray(upright)).mean() < 10
    files = ImageFiles(((str(path), 0),), size=16, augment=lambda image: image)
    assert (files[0][0][:, 2, 2] > 0.9).tolist() == [True, False, False]
    assert files.for_training()[0][0].shape == (3, 64, 32)


def test_a_picture_of_a_phone_at_a_fraction_of_its_size(tmp_path):
    write_turned(tmp_path / "a.jpg", 6, quarters((400, 800)))
    found = read_picture(tmp_path / "a.jpg", enough=100)
    assert found.size == (100, 200)
    assert np.asarray(found)[10, 10] == pytest.approx([255, 0, 0], abs=10)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_a_picture_of_damaged_exif_is_taken_as_it_is_stored(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    quarters((32, 64)).save(path, exif=b"Exif\0\0garbage!")
    assert read_rgb(path).size == picture_size(path) == (32, 64)


def test_pictures_of_16_bits(tmp_path):
    grey = RNG.integers(0, 65536, SHAPE).astype(np.uint16)
    for suffix in (".png", ".tif"):
        Image.fromarray(grey).save(tmp_path / f"a{suffix}")
        found = np.asarray(read_rgb(tmp_path / f"a{suffix}"))
        np.testing.assert_array_equal(found, np.repeat((grey // 256)[..., None], 3, axis=2))
    for dtype, mode in ((np.int32, "I"), (np.float32, "F")):
        Image.fromarray(grey.astype(dtype)).save(tmp_path / "a.tif")
        with pytest.raises(ValueError, match=f"a.tif has mode {mode}, 32 bits of grey; expected 8 or 16 bits"):
            read_rgb(tmp_path / "a.tif")


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def test_broken_pictures_are_left_out(tmp_path):
    write_classes(tmp_path / "train", count=5)
    write_classes(tmp_path / "val", count=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(image_folder(tmp_path, skip_broken=True).train) == 10
    for name in ("train/n01/2.png", "train/n02/0.png", "train/n02/4.png", "val/n01/1.png"):
        cut(tmp_path / name)
    with pytest.warns(UserWarning, match="^4 of 16 samples") as caught:
        loaded = image_folder(tmp_path, skip_broken=True)
    (warning,) = caught
    listed = ", ".join(str(tmp_path / name) for name in ("train/n01/2.png", "train/n02/0.png", "train/n02/4.png"))
    assert str(warning.message) == (
        f"4 of 16 samples are left out, since their pictures are broken: {listed} and 1 more"
    )
    assert names(loaded.train) == [f"n01/{i}.png" for i in (0, 1, 3, 4)] + [f"n02/{i}.png" for i in (1, 2, 3)]
    assert names(loaded.test) == ["n01/0.png", "n01/2.png", "n02/0.png", "n02/1.png", "n02/2.png"]
    assert len(image_folder(tmp_path).train) == 10
    for i in range(3):
        cut(tmp_path / "val" / "n02" / f"{i}.png")
    with (
        pytest.warns(UserWarning, match="^7 of 16 samples"),
        pytest.raises(ValueError, match=r"val/n02 holds broken pictures only"),
    ):
        image_folder(tmp_path, skip_broken=True)


def with_broken(folder, count):
    write_classes(folder / "train", count=5)
    write_classes(folder / "val")
    broken = [folder / "train" / "n01" / f"{i}.png" for i in range(count)]
    for path in broken:
        cut(path)
    return broken


def test_three_broken_pictures_are_all_named(tmp_path):
    listed = ", ".join(map(str, with_broken(tmp_path, 3)))
    with pytest.warns(UserWarning, match=rf"^3 of 14 samples are left out, [^\n]* broken: {re.escape(listed)}$"):
        image_folder(tmp_path, skip_broken=True)


def test_the_warning_of_broken_pictures_is_at_the_call(tmp_path):
    with_broken(tmp_path, 1)
    with pytest.warns(UserWarning, match="^1 of 14 samples") as caught:
        image_folder(tmp_path, skip_broken=True)
    assert [warning.filename for warning in caught] == [__file__]


def write_pair(folder, stem, labels, suffix=".png", size=None, **options):
    """A noisy picture and its mask: an array of labels ``(H, W)``, of colours, or an image."""
    labels = labels if isinstance(labels, Image.Image) else Image.fromarray(labels)
    width, height = size or labels.size
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(folder / "images" / f"{stem}.png")
    labels.save(folder / "masks" / f"{stem}{suffix}", **options)


def mask(*values, dtype=np.uint8):
    """Labels that are these values in turn."""
    return np.resize(values, SHAPE).astype(dtype)


def write_masks(root, labels, parts=("train", "val"), count=2, **options):
    for part in parts:
        for i in range(count):
            write_pair(root / part, f"{part}-{i}", labels, **options)


def stems(dataset):
    assert all(picture.stem == mask.stem for picture, mask in dataset.pairs)
    return [picture.stem for picture, _ in dataset.pairs]


def test_mask_folder(tmp_path):
    labels = mask(0, 1, 2, 3, 255)
    write_masks(tmp_path, labels)
    loaded = mask_folder(tmp_path)
    assert (loaded.classes, loaded.channels, loaded.ignore_index) == (("0", "1", "2", "3"), 3, 255)
    assert loaded.validation is None
    assert (stems(loaded.train), stems(loaded.test)) == (["train-0", "train-1"], ["val-0", "val-1"])
    for part in (loaded.train, loaded.test):
        image, label = part[1]
        with Image.open(part.pairs[1][0]) as picture:
            np.testing.assert_allclose(image.numpy(), np.moveaxis(np.asarray(picture), -1, 0) / 255, rtol=1e-6)
        assert (image.dtype, label.dtype) == (torch.float32, torch.int64)
        np.testing.assert_array_equal(label.numpy(), labels)
        np.testing.assert_array_equal(part.label_map(0).numpy(), labels)
    assert data.load("mask-folder", tmp_path).classes == loaded.classes


@pytest.mark.parametrize("second", ["val", "valid", "validation", "test"])
def test_one_more_part_than_train_is_the_test_part_of_masks(tmp_path, second):
    write_masks(tmp_path, mask(0, 1), ("train", second), count=4)
    loaded = mask_folder(tmp_path)
    assert loaded.validation is None
    assert stems(loaded.test) == [f"{second}-{i}" for i in range(4)]
    split = loaded.with_validation(0.25)
    assert (len(split.train), len(split.validation)) == (3, 1)
    assert sorted([*stems(split.train), *stems(split.validation)]) == [f"train-{i}" for i in range(4)]


def test_three_parts_of_masks(tmp_path):
    write_masks(tmp_path, mask(0, 1), ("train", "valid", "test"))
    loaded = mask_folder(tmp_path)
    for part, dataset in (("train", loaded.train), ("valid", loaded.validation), ("test", loaded.test)):
        assert stems(dataset) == [f"{part}-0", f"{part}-1"]
    write_masks(tmp_path, mask(0, 1), ("val",))
    with pytest.raises(ValueError, match="holds val and valid; expected one of them"):
        mask_folder(tmp_path)


def test_masks_without_parts(tmp_path):
    for i in range(10):
        write_pair(tmp_path, f"{i}", mask(0, 1))
    # Every mask is counted: the label of one alone may come to be tested.
    write_pair(tmp_path, stems(mask_folder(tmp_path).test)[0], mask(0, 4))
    loaded = mask_folder(tmp_path)
    assert (len(loaded.train), len(loaded.test), loaded.num_classes) == (8, 2, 5)
    assert sorted([*stems(loaded.train), *stems(loaded.test)]) == [f"{i}" for i in range(10)]
    again = mask_folder(tmp_path)
    assert (stems(again.train), stems(again.test)) == (stems(loaded.train), stems(loaded.test))


def test_training_alone_crops_and_mirrors(tmp_path):
    write_masks(tmp_path, mask(*range(200)), count=4)
    loaded = mask_folder(tmp_path, crop=8).with_validation(0.25)
    for part in (loaded.train, loaded.validation, loaded.test, loaded.test.for_training()):
        assert part[0][0].shape == (3, *SHAPE)
        assert not changes(part)
    train = loaded.train.for_training()
    assert train[0][0].shape == (3, 8, 8)
    assert changes(train)
    assert train.take(torch.tensor([0]))[0][1].shape == (8, 8)
    # Without a crop the whole is mirrored, or not.
    whole = mask_folder(tmp_path).train
    sums = [whole.for_training()[0] for _ in range(20)]
    both = [whole[0][0], whole[0][0].flip(-1)]
    assert [sum(torch.equal(image, wanted) for image, _ in sums) > 0 for wanted in both] == [True, True]
    assert all(any(torch.equal(image, wanted) for wanted in both) for image, _ in sums)
    for crop in (None, 8):
        assert not changes(mask_folder(tmp_path, crop=crop, augment=False).train.for_training())


def test_pictures_of_several_sizes_need_a_crop(tmp_path):
    write_masks(tmp_path, mask(0, 1))
    write_pair(tmp_path / "train", "wide", np.resize([0, 1], (12, 40)).astype(np.uint8))
    write_pair(tmp_path / "val", "wide", np.resize([0, 1], (12, 40)).astype(np.uint8))
    for options in ({}, {"crop": 8, "augment": False}):
        with pytest.raises(ValueError, match=r"train-0.png is \(16, 12\) pixels .*wide.png \(40, 12\): .* need crop"):
            mask_folder(tmp_path, **options)
    write_pair(tmp_path / "train", "a", np.resize([0, 1], (12, 9)).astype(np.uint8))
    with pytest.raises(ValueError, match=r"train/images/a.png is \(9, 12\) pixels .*train-0.png \(16, 12\): "):
        mask_folder(tmp_path)
    train = mask_folder(tmp_path, crop=8).train.for_training()
    images, labels = next(iter(DataLoader(train, batch_size=4, num_workers=1, multiprocessing_context="spawn")))
    assert (images.shape, labels.shape) == ((4, 3, 8, 8), (4, 8, 8))


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".BMP", ".tif", ".TIFF", ".webp"])
def test_masks_of_any_lossless_suffix(tmp_path, suffix):
    labels = mask(0, 1, 7, 255)
    write_masks(tmp_path, labels, suffix=suffix, **({"lossless": True} if suffix == ".webp" else {}))
    loaded = mask_folder(tmp_path)
    assert loaded.num_classes == 8
    np.testing.assert_array_equal(loaded.test[0][1].numpy(), labels)
    assert loaded.test.decode(Image.fromarray(labels), Path("a.png")).dtype == np.uint8


def test_a_webp_with_opacity(tmp_path):
    labels = mask(0, 1, 7, 255)
    picture = Image.fromarray(labels)
    picture.putalpha(200)
    write_masks(tmp_path, picture, suffix=".webp", lossless=True)
    np.testing.assert_array_equal(mask_folder(tmp_path).test[0][1].numpy(), labels)


def test_a_webp_that_lost_something(tmp_path):
    write_masks(tmp_path, mask(0, 1, 7), suffix=".webp", lossless=False)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"train-0.webp was compressed with loss, which changes labels"):
            mask_folder(tmp_path)
        # A profile makes it a file of several chunks.
        write_masks(tmp_path, mask(0, 1, 7), suffix=".webp", lossless=False, icc_profile=b"odd")
    write_masks(tmp_path, mask(0, 1, 7), suffix=".webp", lossless=True, icc_profile=b"odd")
    assert mask_folder(tmp_path).num_classes == 8
    write_masks(tmp_path, np.zeros((*SHAPE, 3), np.uint8) + np.uint8([1, 2, 3]), suffix=".webp", lossless=True)
    with pytest.raises(ValueError, match=r"train-0.webp has mode RGB; expected one number a pixel"):
        mask_folder(tmp_path)


def test_masks_with_a_palette_or_of_one_bit(tmp_path):
    labels = Image.fromarray(mask(0, 1, 2))
    labels.putpalette([*range(200, 256)] * 3)
    write_masks(tmp_path / "palette", labels)
    assert mask_folder(tmp_path / "palette").test[0][1].unique().tolist() == [0, 1, 2]
    bits = mask(0, 0, 1)
    write_masks(tmp_path / "bits", bits.astype(bool))
    for binary in (None, True, False):
        loaded = mask_folder(tmp_path / "bits", binary=binary)
        assert loaded.classes == ("0", "1")
        np.testing.assert_array_equal(loaded.test[0][1].numpy(), bits)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_masks_of_16_bits(tmp_path, suffix):
    labels = mask(0, 254, 255, 256, 1000, 65535, dtype=np.uint16)
    write_masks(tmp_path / "many", labels, suffix=suffix)
    loaded = mask_folder(tmp_path / "many")
    # 255 is one class among them, so the largest number is what is ignored.
    assert (loaded.num_classes, loaded.ignore_index) == (1001, 65535)
    np.testing.assert_array_equal(loaded.test[0][1].numpy(), labels)
    image, crop = mask_folder(tmp_path / "many", crop=40).train.for_training()[0]
    assert set(crop.unique().tolist()) <= set(labels.flatten().tolist())
    assert crop[(image == 0).all(0)].unique().tolist() == [65535]
    (tmp_path / "many" / "classes.txt").write_text("\n".join(f"class {i}" for i in range(1001)))
    named = mask_folder(tmp_path / "many")
    assert (named.classes[1000], named.ignore_index) == ("class 1000", 65535)
    write_masks(tmp_path / "few", mask(0, 3, 255, dtype=np.uint16), suffix=suffix)
    loaded = mask_folder(tmp_path / "few")
    assert (loaded.num_classes, loaded.ignore_index) == (4, 255)


def test_masks_of_32_bits(tmp_path):
    write_masks(tmp_path, mask(0, 300, 65535, dtype=np.int32), suffix=".tif")
    write_pair(tmp_path / "val", "val-1", mask(300, dtype=np.int32), suffix=".tif")
    loaded = mask_folder(tmp_path)
    assert loaded.num_classes == 301
    assert loaded.test[1][1].unique().tolist() == [300]
    for value in (-1, 65536):
        write_masks(tmp_path, mask(0, value, dtype=np.int32), suffix=".tif")
        with pytest.raises(ValueError, match=rf"train-\d.tif has labels from .*{value}.*; expected 0 to 65535"):
            mask_folder(tmp_path)
    write_masks(tmp_path, mask(0, 1, dtype=np.float32), suffix=".tif")
    with pytest.raises(ValueError, match=r"train-\d.tif has mode F; expected one number a pixel, its label"):
        mask_folder(tmp_path)


def test_names_of_classes(tmp_path, monkeypatch):
    write_masks(tmp_path, mask(0, 1, 255))
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfsky\r\nthe ground\r\ntree\r\n\r\n")
    opened = []
    monkeypatch.setattr(folders, "read_picture", lambda file: opened.append(file) or Image.open(file))
    loaded = mask_folder(tmp_path)
    assert loaded.classes == ("sky", "the ground", "tree")
    assert [file.stem for file in opened] == ["train-0"]
    write_masks(tmp_path, mask(0, 3))
    loaded = mask_folder(tmp_path)
    for part in (loaded.train, loaded.test):
        with pytest.raises(ValueError, match=r"-0.png has the label 3; expected 0 to 2 or 255"):
            part[0]
    for content, message in (
        ("a\nb\na\n", "names the class a twice"),
        ("a\n", "names 1 classes; expected two or more"),
    ):
        (tmp_path / "classes.txt").write_text(content)
        with pytest.raises(ValueError, match=f"classes.txt {message}"):
            mask_folder(tmp_path)


def test_what_255_is_in_binary_masks_is_asked(tmp_path):
    labels = mask(0, 255, 255)
    write_masks(tmp_path, labels)
    question = re.escape(
        "train/masks hold only 0 and 255: is 255 the foreground (option binary=True makes it class 1), or is it "
        "ignored (binary=False)?"
    )
    with pytest.raises(ValueError, match=question):
        mask_folder(tmp_path)
    loaded = mask_folder(tmp_path, binary=True)
    assert (loaded.classes, loaded.ignore_index) == (("0", "1"), 255)
    np.testing.assert_array_equal(loaded.test[0][1].numpy(), labels // 255)
    with pytest.raises(ValueError, match="hold no label but 0 and the ignored 255; expected two classes or more"):
        mask_folder(tmp_path, binary=False)
    (tmp_path / "classes.txt").write_text("field\nroad\n")
    write_pair(tmp_path / "train", "train-1", mask(0))
    with pytest.raises(ValueError, match=question):
        mask_folder(tmp_path)
    write_pair(tmp_path / "one" / "train", "alone", labels)
    write_pair(tmp_path / "one" / "val", "alone", labels)
    with pytest.raises(ValueError, match=question):
        mask_folder(tmp_path / "one")
    for binary in (True, False):
        loaded = mask_folder(tmp_path, binary=binary)
        assert loaded.classes == ("field", "road")
        assert loaded.test[0][1].unique().tolist() == [0, 1 if binary else 255]
    (tmp_path / "classes.txt").write_text("field\nroad\ntree\n")
    with pytest.raises(ValueError, match=r"classes.txt names 3 classes; binary masks have two"):
        mask_folder(tmp_path, binary=True)
    (tmp_path / "classes.txt").unlink()
    # One mask that holds more than both tells.
    write_pair(tmp_path / "train", "another", mask(0, 1, 255, 3))
    assert mask_folder(tmp_path).num_classes == 4
    with pytest.raises(ValueError, match=r"another.png has the value 1; expected 0 and 255 alone, since binary is set"):
        mask_folder(tmp_path, binary=True).train[0]


@pytest.mark.parametrize(("label", "binary"), [(0, None), (0, False), (255, False)])
def test_masks_of_one_label(tmp_path, label, binary):
    write_masks(tmp_path, mask(label), count=1)
    with pytest.raises(ValueError, match="hold no label but 0 and the ignored 255; expected two classes or more"):
        mask_folder(tmp_path, binary=binary)


def colours(*wanted):
    """A mask that is these colours in turn."""
    return np.array(wanted, dtype=np.uint8)[np.arange(SHAPE[0] * SHAPE[1]).reshape(SHAPE) % len(wanted)]


CSV = "name,r,g,b\nsky,128,128,128\nroad,128,64,128\nIgnore,0,0,0\ncar,64,0,128\n"


@pytest.mark.parametrize(
    "text",
    [
        CSV,
        CSV.replace("name,r,g,b", "Name, Red ,GREEN,blue"),
        "\ufeff" + CSV + "\n,,,\n",
        CSV.replace("\n", "\r\n"),
        CSV.replace("\n", "\r"),
    ],
)
def test_masks_in_colours(tmp_path, text):
    write_masks(tmp_path, colours((64, 0, 128), (128, 128, 128), (0, 0, 0), (128, 64, 128)))
    (tmp_path / "classes.csv").write_bytes(text.encode())
    loaded = mask_folder(tmp_path, crop=8)
    assert (loaded.classes, loaded.ignore_index) == (("sky", "road", "car"), 255)
    assert loaded.test[0][1].flatten()[:4].tolist() == [2, 0, 255, 1]
    assert loaded.train.label_map(0).unique().tolist() == [0, 1, 2, 255]
    assert set(loaded.train.for_training()[0][1].unique().tolist()) <= {0, 1, 2, 255}
    decode = loaded.test.decode
    assert {decode.codes.dtype, decode.labels.dtype, folders._code(np.uint8([[1, 2, 3]])).dtype} == {np.dtype("int32")}
    assert pickle.loads(pickle.dumps(loaded.test))[0][1].flatten()[:4].tolist() == [2, 0, 255, 1]


def test_colours_of_a_palette_or_with_opacity(tmp_path):
    (tmp_path / "classes.csv").write_text(CSV)
    picture = Image.fromarray(colours((64, 0, 128), (128, 128, 128)))
    for masks in (picture.quantize(), picture.convert("RGBA")):
        write_masks(tmp_path, masks)
        assert mask_folder(tmp_path).test[0][1].flatten()[:2].tolist() == [2, 0]


@pytest.mark.parametrize("colour", [(65, 3, 127), (0, 0, 0), (255, 255, 255)])
def test_an_unlisted_colour(tmp_path, colour):
    (tmp_path / "classes.csv").write_text(CSV.replace("Ignore,0,0,0\n", ""))
    write_masks(tmp_path, colours((64, 0, 128), colour, (1, 1, 1)))
    with pytest.raises(ValueError, match=re.escape(f"val-0.png has the colour {colour}, which classes.csv does not")):
        mask_folder(tmp_path).test[0]


def test_255_colours(tmp_path):
    rows = [f"class {i},{i},9,9" for i in range(255)]
    (tmp_path / "classes.csv").write_text("\n".join(["name,r,g,b", *rows]))
    write_masks(tmp_path, colours((0, 9, 9), (254, 9, 9)))
    loaded = mask_folder(tmp_path)
    assert (loaded.num_classes, loaded.ignore_index) == (255, 255)
    (tmp_path / "classes.csv").unlink()
    (tmp_path / "classes.txt").write_text("\n".join(f"class {i}" for i in range(255)))
    write_masks(tmp_path, mask(0, 254, 255))
    loaded = mask_folder(tmp_path)
    assert (loaded.num_classes, loaded.ignore_index) == (255, 255)


def test_more_than_255_colours(tmp_path):
    rows = [f"class {i},{i // 256},{i % 256},9" for i in range(300)]
    (tmp_path / "classes.csv").write_text("\n".join(["name,r,g,b", *rows, "ignore,9,9,9"]))
    write_masks(tmp_path, colours((1, 43, 9), (0, 255, 9), (9, 9, 9)))
    loaded = mask_folder(tmp_path)
    assert (loaded.num_classes, loaded.ignore_index) == (300, 65535)
    assert loaded.test[0][1].flatten()[:3].tolist() == [299, 255, 65535]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has the header ; expected name,red,green,blue or name,r,g,b"),
        ("sky,1,2,3\nroad,2,3,4\n", "has the header sky,1,2,3; expected name,red,green,blue or name,r,g,b"),
        ("name,r,g,b\nsky,1,2,256\n", "expected a name and three numbers from 0 to 255, got sky,1,2,256"),
        ("name,r,g,b\nsky,1,2,-1\n", "expected a name and three numbers from 0 to 255, got sky,1,2,-1"),
        ("name,r,g,b\nsky,1,2," + 5000 * "9", "expected a name and three numbers from 0 to 255, got sky,1,2,999"),
        (
            "name,r,g,b\n" + (2**17 + 1) * "a" + ",1,2,3",
            "is not a table of names and colours: field larger than field limit",
        ),
        ("name,r,g,b\nsky,1,2,0003\n", "expected a name and three numbers from 0 to 255, got sky,1,2,0003"),
        ("r,g,b,name\n1,2,3\n", "expected a name and three numbers from 0 to 255, got 1,2,3"),
        ("name,r,g,b\nsky,1,2\n", "expected a name and three numbers from 0 to 255, got sky,1,2"),
        ("name,r,g,b\n,1,2,3\n", "expected a name and three numbers from 0 to 255, got ,1,2,3"),
        ("name,r,g,b\nsky,1,2,3\nroad,1,2,3\n", r"gives sky and road the same colour \(1, 2, 3\)"),
        ("name,r,g,b\nsky,1,2,3\nsky,1,2,4\n", "names the class sky twice"),
        ("name,r,g,b\nsky,1,2,3\nignore,1,2,4\n", "names 1 classes; expected two or more"),
    ],
)
def test_a_wrong_list_of_colours(tmp_path, text, message):
    write_masks(tmp_path, colours((1, 2, 3)))
    (tmp_path / "classes.csv").write_text(text)
    with pytest.raises(ValueError, match=f"classes.csv:? {message}"):
        mask_folder(tmp_path)


@pytest.mark.parametrize("name", ["classes.txt", "classes.csv"])
def test_a_list_of_classes_that_is_no_text(tmp_path, name):
    write_masks(tmp_path, mask(0, 1))
    (tmp_path / name).write_bytes("name,r,g,b\nGehsteig für Füßgänger,1,2,3".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{name} is not a text in UTF-8: .* byte 0xfc in position 21"):
        mask_folder(tmp_path)


def test_colours_and_labels_are_not_mistaken_for_each_other(tmp_path):
    write_masks(tmp_path, colours((1, 2, 3)))
    with pytest.raises(ValueError, match=r"train-\d.png has mode RGB; .*, a classes.csv in the root that lists them"):
        mask_folder(tmp_path)
    (tmp_path / "classes.csv").write_text(CSV)
    with pytest.raises(
        ValueError, match=r"binary=False says what 255 is, but .*classes.csv gives every class a colour"
    ):
        mask_folder(tmp_path, binary=False)
    write_masks(tmp_path, mask(0, 1))
    with pytest.raises(ValueError, match=r"val-0.png has mode L; expected the colours that classes.csv lists"):
        mask_folder(tmp_path).test[0]
    write_masks(tmp_path / "lossy", colours((1, 2, 3)), suffix=".webp", lossless=False)
    (tmp_path / "lossy" / "classes.csv").write_text(CSV)
    with pytest.raises(ValueError, match=r"val-0.webp was compressed with loss"):
        mask_folder(tmp_path / "lossy").test[0]
    (tmp_path / "classes.txt").touch()
    with pytest.raises(ValueError, match=r"holds classes.txt and classes.csv; expected one of them"):
        mask_folder(tmp_path)


def test_pairs_are_whole(tmp_path):
    write_masks(tmp_path, mask(0, 1))
    write_pair(tmp_path / "train", "spare", mask(0, 9))
    (tmp_path / "train" / "images" / "spare.png").unlink()
    assert stems(mask_folder(tmp_path).train) == ["train-0", "train-1"]
    assert mask_folder(tmp_path).num_classes == 2
    write_pair(tmp_path / "train", "train-1", mask(0, 1), suffix=".tif")
    with pytest.raises(ValueError, match=r"train/masks holds train-1.png and train-1.tif; expected one mask of a stem"):
        mask_folder(tmp_path)
    (tmp_path / "train" / "masks" / "train-1.tif").unlink()
    write_image(tmp_path / "train" / "images" / "train-0.jpg")
    with pytest.raises(ValueError, match=r"holds train-0.jpg and train-0.png; expected one picture of a stem"):
        mask_folder(tmp_path)
    (tmp_path / "train" / "images" / "train-0.jpg").unlink()
    (tmp_path / "val" / "masks" / "val-1.png").rename(tmp_path / "val" / "masks" / "val-1.jpg")
    with pytest.raises(
        FileNotFoundError,
        match=r"masks/val-1.png is missing; expected a mask for .*images/val-1.png, \.png, .* val-1.jpg",
    ):
        mask_folder(tmp_path)
    for path in (tmp_path / "val" / "images").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape("val/images/*.jpg is missing; expected images/STEM.jpg")):
        mask_folder(tmp_path)
    (tmp_path / "val" / "images").rmdir()
    with pytest.raises(FileNotFoundError, match=r"val/images is missing; expected images/STEM.jpg"):
        mask_folder(tmp_path)


def test_a_mask_of_another_size(tmp_path):
    write_masks(tmp_path, mask(0, 1))
    write_pair(tmp_path / "val", "val-0", mask(0, 1), size=(16, 13))
    with pytest.raises(ValueError, match=r"masks/val-0.png is \(16, 12\) pixels large, but .*val-0.png \(16, 13\)"):
        mask_folder(tmp_path).test[0]


def test_masks_of_a_phones_pictures(tmp_path):
    # Drawn on the upright picture; in val, the mask was turned together with the picture.
    upright = mask(0, 0, 1)
    for part in ("train", "val"):
        for stem in ("a", "b"):
            write_pair(tmp_path / part, stem, upright)
            write_turned(tmp_path / part / "images" / f"{stem}.png", 6, quarters((16, 12)))
            if part == "val":
                write_turned(tmp_path / part / "masks" / f"{stem}.png", 6, Image.fromarray(upright))
    loaded = mask_folder(tmp_path)
    for part in (loaded.train, loaded.test):
        image, label = part[0]
        assert image[:, 0, 0].tolist() == [1, 0, 0]
        assert image.shape[1:] == label.shape
        np.testing.assert_array_equal(label.numpy(), upright)
    # The pictures of the training part are of one size.
    write_pair(tmp_path / "train", "c", upright)
    assert len(mask_folder(tmp_path).train) == 3


def test_few_pairs_without_parts(tmp_path):
    for i in range(3):
        write_pair(tmp_path, f"{i}", mask(0, 1))
    loaded = data.load("mask-folder", tmp_path)
    assert sorted(stems(loaded.train) + stems(loaded.validation) + stems(loaded.test)) == ["0", "1", "2"]
    assert len(loaded.train) == len(loaded.validation) == 1
    for name in ("images", "masks"):
        (tmp_path / name / "1.png").unlink()
    with pytest.raises(ValueError, match=r"the data set has 2 samples; .* each part: training, validation, test"):
        data.load("mask-folder", tmp_path)


def test_broken_pictures_and_masks(tmp_path):
    write_masks(tmp_path, mask(0, 1), count=3)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for name in ("train/images/train-2.png", "val/masks/val-1.png"):
        cut(tmp_path / name)
    loaded = mask_folder(tmp_path)
    for part, index, name in ((loaded.train, 2, "images/train-2.png"), (loaded.test, 1, "masks/val-1.png")):
        with pytest.raises(ValueError, match=f"{name} is broken, or no picture: "):
            part[index]
    with pytest.warns(UserWarning, match=r"^2 of 6 samples are left out, .*images/train-2.png, .*masks/val-1.png$"):
        loaded = mask_folder(tmp_path, skip_broken=True)
    assert (stems(loaded.train), stems(loaded.test)) == (["train-0", "train-1"], ["val-0", "val-2"])
    # What must be read at once is said to be broken at once.
    (tmp_path / "train" / "images" / "train-2.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"images/train-2.png is broken, or no picture: its format is not known"):
        mask_folder(tmp_path)
    (tmp_path / "classes.txt").unlink()
    cut(tmp_path / "train" / "masks" / "train-0.png")
    with pytest.raises(ValueError, match=r"masks/train-0.png is broken, or no picture: "):
        mask_folder(tmp_path)
    for i in range(3):
        (tmp_path / "val" / "masks" / f"val-{i}.png").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="^5 of 6 samples"),
        pytest.raises(ValueError, match="val holds broken pictures only"),
    ):
        mask_folder(tmp_path, skip_broken=True)
