import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hem_ext.harness import data
from hem_ext.harness.data import segmentation
from hem_ext.harness.data.segmentation import ScaleCropFlip

RNG = np.random.default_rng(0)
SHAPE = (24, 36)


def read(name, root, **options):
    """The set as its files have it, of whose training part :func:`data.load` splits the validation part off."""
    return data.ON_DISK[name][0](root, **options)


def write_image(path, image=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = RNG.integers(0, 256, (*SHAPE, 3)).astype(np.uint8) if image is None else image
    Image.fromarray(image).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    with Image.open(path) as written:
        return np.asarray(written)


def write_labels(path, ids, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(ids, dtype=np.uint8))
    if palette:
        picture.putpalette([*range(256)] * 3)
    picture.save(path)


def ids(*values):
    """A map that holds these ids in turn."""
    return np.resize(values, SHAPE)


def write_voc(root, labels):
    folder = root / "VOCdevkit" / "VOC2012"
    images = {
        name: write_image(folder / "JPEGImages" / f"{name}.jpg") for name in ("2007_1", "2007_2", "2008_3", "unused")
    }
    for name in ("2007_1", "2007_2", "2008_3"):
        write_labels(folder / "SegmentationClass" / f"{name}.png", labels, palette=True)
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_2\n2007_1\n")
    (lists / "val.txt").write_text("2008_3\n")
    return folder, images


def test_voc2012(tmp_path):
    labels = ids(*range(21), 255)
    folder, images = write_voc(tmp_path, labels)
    for root in (tmp_path, folder):
        loaded = read("voc2012", root, crop=16)
        assert (loaded.num_classes, loaded.channels, loaded.ignore_index) == (21, 3, 255)
        assert (loaded.classes[0], loaded.classes[15], loaded.classes[20]) == ("background", "person", "tvmonitor")
        assert (len(loaded.train), len(loaded.test)) == (2, 1)
        image, label = loaded.test[0]
        assert (image.dtype, label.dtype) == (torch.float32, torch.int64)
        np.testing.assert_allclose(image.numpy(), np.moveaxis(images["2008_3"], -1, 0) / 255, rtol=1e-6)
        np.testing.assert_array_equal(label.numpy(), labels)
        assert loaded.validation is None
        crop, crop_label = loaded.train.for_training()[0]
        assert (crop.shape, crop_label.shape) == ((3, 16, 16), (16, 16))
        assert torch.equal(loaded.train.for_training().label_map(0), torch.from_numpy(labels))
    assert [image.name for image, _ in loaded.train.pairs] == ["2007_2.jpg", "2007_1.jpg"]
    for picked in (torch.tensor([1]), torch.tensor([False, True])):
        assert [image.name for image, _ in loaded.train.take(picked).pairs] == ["2007_1.jpg"]


def test_training_alone_crops(tmp_path):
    write_voc(tmp_path, ids(*range(21)))
    loaded = data.load("voc2012", tmp_path, crop=16, validation=0.5)
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (1, 1, 1)
    assert {image.name for part in (loaded.train, loaded.validation) for image, _ in part.pairs} == {
        "2007_1.jpg",
        "2007_2.jpg",
    }
    for part in (loaded.train, loaded.validation, loaded.test, loaded.test.for_training()):
        assert part[0][0].shape == (3, *SHAPE)
    only = loaded.train.for_training().take(torch.tensor([0]))
    assert only[0][0].shape == (3, 16, 16)
    assert len({only[0][1].sum().item() for _ in range(5)}) > 1


@pytest.mark.parametrize("name", ["JPEGImages/2008_3.jpg", "SegmentationClass/2008_3.png"])
def test_a_broken_file(tmp_path, name):
    folder, _ = write_voc(tmp_path, ids(*range(21)))
    loaded, file = read("voc2012", tmp_path), folder / name
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no picture"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is broken, or no picture: "):
            loaded.test[0]


def write_cityscapes(root, labels):
    images = {}
    for part, city, stem in (
        ("train", "bonn", "bonn_1_2"),
        ("train", "aachen", "aachen_3_4"),
        ("val", "ulm", "ulm_5_6"),
    ):
        path = root / "leftImg8bit" / part / city / f"{stem}_leftImg8bit.png"
        images[stem] = write_image(path)
        write_labels(root / "gtFine" / part / city / f"{stem}_gtFine_labelIds.png", labels)
        # What lies beside it is not read.
        write_labels(root / "gtFine" / part / city / f"{stem}_gtFine_instanceIds.png", ids(99))
    return images


@pytest.mark.parametrize("folder", [".", "cityscapes"])
def test_cityscapes(tmp_path, folder):
    every = np.arange(SHAPE[0] * SHAPE[1]).reshape(SHAPE) % 34
    images = write_cityscapes(tmp_path / folder, every)
    loaded = read("cityscapes", tmp_path, crop=16)
    assert (loaded.num_classes, loaded.channels, loaded.ignore_index, loaded.validation) == (19, 3, 255, None)
    assert (len(loaded.train), len(loaded.test)) == (2, 1)
    image, label = loaded.test[0]
    np.testing.assert_allclose(image.numpy(), np.moveaxis(images["ulm_5_6"], -1, 0) / 255, rtol=1e-6)
    # The benchmark's table, id by id.
    void = 255
    table = [void] * 7 + [0, 1, void, void, 2, 3, 4, void, void, void, 5, void]
    table += [6, 7, 8, 9, 10, 11, 12, 13, 14, 15, void, void, 16, 17, 18]
    assert label.flatten()[:34].tolist() == table
    named = {
        0: "road",
        2: "building",
        5: "pole",
        6: "traffic light",
        8: "vegetation",
        10: "sky",
        11: "person",
        18: "bicycle",
    }
    assert {c: loaded.classes[c] for c in named} == named
    assert [image.parent.name for image, _ in loaded.train.pairs] == ["aachen", "bonn"]


def write_ade20k(root, labels):
    folder = root / "ADEChallengeData2016"
    for part, name in (("training", "ADE_train_1"), ("training", "ADE_train_2"), ("validation", "ADE_val_1")):
        write_image(folder / "images" / part / f"{name}.jpg", RNG.integers(0, 256, SHAPE).astype(np.uint8))
        write_labels(folder / "annotations" / part / f"{name}.png", labels)
    return folder


def test_ade20k(tmp_path):
    folder = write_ade20k(tmp_path, ids(*range(151)))
    loaded = read("ade20k", tmp_path, crop=16)
    assert (loaded.num_classes, loaded.channels, loaded.ignore_index, loaded.validation) == (150, 3, 255, None)
    assert (len(loaded.train), len(loaded.test)) == (2, 1)
    image, label = loaded.test[0]
    # A grey picture, of which the set has some, has three channels too.
    assert image.shape == (3, *SHAPE)
    assert torch.equal(image[0], image[2])
    assert label.flatten()[:151].tolist() == [255, *range(150)]
    assert (loaded.classes[0], loaded.classes[149]) == ("1", "150")

    lines = [f"{i}\t0.1\t10\t2\tthing {i}, object {i}" for i in range(1, 151)]
    (folder / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *lines, ""]))
    assert read("ade20k", tmp_path).classes[149] == "thing 150, object 150"
    (folder / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *lines[:-1]]))
    with pytest.raises(ValueError, match="expected a heading and 150 lines, got 149 lines after the first"):
        read("ade20k", tmp_path)


@pytest.mark.parametrize(
    ("name", "write", "value", "message"),
    [
        ("voc2012", write_voc, 21, r"Class/200[78]_[23].png has the label 21; expected 0 to 20 or 255"),
        ("ade20k", write_ade20k, 151, r"ADE_\w+_1.png has the label 150; expected 0 to 149 or 255"),
    ],
)
def test_a_label_outside_the_classes(tmp_path, name, write, value, message):
    write(tmp_path, ids(1, value))
    loaded = read(name, tmp_path)
    for part in (loaded.train, loaded.test):
        with pytest.raises(ValueError, match=message):
            part[0]


@pytest.mark.parametrize(
    ("name", "write", "crop"),
    [("voc2012", write_voc, 512), ("cityscapes", write_cityscapes, 768), ("ade20k", write_ade20k, 512)],
)
def test_training_crops_squares_of_a_side(tmp_path, name, write, crop):
    write(tmp_path, ids(1))
    loaded = read(name, tmp_path)
    assert loaded.train.augment == ScaleCropFlip(crop)
    assert loaded.test.decode.mapping.dtype == np.uint8
    assert read(name, tmp_path, crop=16).train.augment == ScaleCropFlip(16)


def test_a_wrong_label_map(tmp_path):
    folder, _ = write_voc(tmp_path, ids(0))
    loaded, path = read("voc2012", tmp_path), folder / "SegmentationClass" / "2008_3.png"
    write_labels(path, np.zeros((24, 35)))
    with pytest.raises(ValueError, match=r"2008_3.png is \(35, 24\) pixels large, but .*2008_3.jpg \(36, 24\)"):
        loaded.test[0]
    write_image(path)
    with pytest.raises(ValueError, match=r"2008_3.png has mode RGB; expected one byte a pixel"):
        loaded.test[0]


@pytest.mark.parametrize(
    ("name", "write", "lost"),
    [
        ("voc2012", write_voc, "VOCdevkit/VOC2012/JPEGImages/2007_1.jpg"),
        ("voc2012", write_voc, "VOCdevkit/VOC2012/SegmentationClass/2008_3.png"),
        ("voc2012", write_voc, "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"),
        ("cityscapes", write_cityscapes, "gtFine/val/ulm/ulm_5_6_gtFine_labelIds.png"),
        ("ade20k", write_ade20k, "ADEChallengeData2016/annotations/training/ADE_train_2.png"),
    ],
)
def test_a_lost_file(tmp_path, name, write, lost):
    write(tmp_path, ids(0))
    (tmp_path / lost).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{lost} is missing; expected {data.ON_DISK[name][1]}")):
        read(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "write", "lost"),
    [
        ("cityscapes", write_cityscapes, "leftImg8bit/val/*/*_leftImg8bit.png"),
        ("ade20k", write_ade20k, "ADEChallengeData2016/images/validation/*.jpg"),
    ],
)
def test_a_part_without_a_picture(tmp_path, name, write, lost):
    write(tmp_path, ids(0))
    for path in tmp_path.glob(lost):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{lost} is missing; expected {data.ON_DISK[name][1]}")):
        read(name, tmp_path)


def test_a_list_without_a_name(tmp_path):
    folder, _ = write_voc(tmp_path, ids(0))
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"val.txt names no picture; expected one ID a line"):
        read("voc2012", tmp_path)
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_bytes(b"\xff\xfe2\x00")
    with pytest.raises(ValueError, match=r"val.txt is not a text in UTF-8: .* byte 0xff in position 0: "):
        read("voc2012", tmp_path)


@pytest.mark.parametrize("name", ["../JPEGImages/2007_1", "/tmp/2007_1"])
def test_a_list_that_leads_out_of_the_folder(tmp_path, name):
    folder, _ = write_voc(tmp_path, ids(0))
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text(f"2008_3\n{name}\n")
    with pytest.raises(ValueError, match=rf"val.txt names '{name}.jpg'; expected paths that stay in .*JPEGImages$"):
        read("voc2012", tmp_path)


def pair(size=(40, 30)):
    """A picture whose red is its label, in four quarters: 10, 20 above 30, 40."""
    label = Image.new("L", size, 10)
    half = (size[0] // 2, size[1] // 2)
    label.paste(20, (half[0], 0, size[0], half[1]))
    label.paste(30, (0, half[1], half[0], size[1]))
    label.paste(40, (*half, *size))
    return Image.merge("RGB", (label, label, Image.new("L", size, 200))), label


def test_crops_are_whole_and_picture_and_labels_stay_together():
    torch.manual_seed(0)
    seen, reds = set(), set()
    for _ in range(50):
        image, label = ScaleCropFlip(12)(*pair())
        assert image.size == label.size == (12, 12)
        red, values = np.asarray(image)[..., 0].astype(int), np.asarray(label)
        # But for the blending of two quarters.
        assert (red == values).mean() > 0.5
        assert (np.asarray(image)[..., 2] == 200).all()
        assert set(np.unique(values)) <= {10, 20, 30, 40}
        seen |= set(np.unique(values))
        reds |= set(np.unique(red))
    assert seen == {10, 20, 30, 40}
    # The picture is blended, the labels never are.
    assert len(reds) > 4


def test_what_a_small_picture_does_not_fill_is_ignored():
    torch.manual_seed(0)
    shares = []
    for _ in range(200):
        image, label = ScaleCropFlip(100)(*pair())
        filled = np.asarray(label) != 255
        assert (np.asarray(image)[filled][:, 2] == 200).all()
        assert (np.asarray(image)[~filled] == 0).all()
        # The filled part is a rectangle of the scaled picture's shape.
        height, width = filled.any(1).sum(), filled.any(0).sum()
        assert filled.sum() == height * width
        assert width / height == pytest.approx(4 / 3, abs=0.08)
        shares.append(width / 40)
    assert 0.5 <= min(shares) < 0.56
    assert 1.94 < max(shares) <= 2
    assert np.mean(shares) == pytest.approx(1.25, abs=0.1)


def test_at_least_a_pixel_of_a_picture_is_left():
    _, label = ScaleCropFlip(4, scales=(0.1, 0.1))(*pair((4, 2)))
    assert (np.asarray(label) != 255).sum() == 1


def test_what_is_ignored_may_have_another_label():
    torch.manual_seed(0)
    image, label = pair()
    wide = Image.fromarray(np.asarray(label).astype(np.int32) * 1000)
    crop, labels = ScaleCropFlip(100, ignore=65535)(image, wide)
    filled = np.asarray(crop)[..., 2] == 200
    assert set(np.asarray(labels)[filled]) == {10000, 20000, 30000, 40000}
    assert set(np.asarray(labels)[~filled]) == {65535}


def test_without_a_size_the_whole_is_mirrored_and_no_more():
    torch.manual_seed(0)
    image, label = pair()
    flips = 0
    for _ in range(100):
        turned, labels = ScaleCropFlip(None)(image, label)
        flipped = labels.getpixel((0, 0)) == 20
        for whole, found in ((image, turned), (label, labels)):
            whole = np.asarray(whole)
            np.testing.assert_array_equal(np.asarray(found), whole[:, ::-1] if flipped else whole)
        flips += flipped
    assert 30 < flips < 70


def test_half_of_the_crops_are_mirrored():
    torch.manual_seed(0)
    flips = 0
    for _ in range(200):
        _, label = ScaleCropFlip(40, scales=(1, 1))(*pair((40, 40)))
        corners = [label.getpixel(xy) for xy in ((0, 0), (39, 0), (0, 39), (39, 39))]
        assert corners in ([10, 20, 30, 40], [20, 10, 40, 30])
        flips += corners[0] == 20
    assert 70 < flips < 130


def test_crops_come_from_everywhere():
    torch.manual_seed(0)
    column = Image.fromarray(np.tile(np.arange(40, dtype=np.uint8), (40, 1)))
    crops = [ScaleCropFlip(10, scales=(1, 1))(Image.merge("RGB", (column,) * 3), column)[1] for _ in range(400)]
    assert {np.asarray(crop).min() for crop in crops} == set(range(31))


def test_the_transform_draws_from_torch_alone():
    transform = pickle.loads(pickle.dumps(ScaleCropFlip(20)))

    def draw(seed):
        torch.manual_seed(seed)
        return np.asarray(transform(*pair())[1])

    np.testing.assert_array_equal(draw(3), draw(3))
    assert any((draw(3) != draw(seed)).any() for seed in range(4, 8))


def test_workers_read_it(tmp_path):
    write_voc(tmp_path, ids(*range(21)))
    loaded = read("voc2012", tmp_path, crop=16)
    images, labels = next(
        iter(DataLoader(loaded.train.for_training(), batch_size=2, num_workers=1, multiprocessing_context="spawn"))
    )
    assert (images.shape, labels.shape) == ((2, 3, 16, 16), (2, 16, 16))


def test_the_tables_agree():
    assert len(segmentation.CITYSCAPES_CLASSES) == len(segmentation.CITYSCAPES_IDS) == 19
    assert len(set(segmentation.VOC_CLASSES)) == 21
