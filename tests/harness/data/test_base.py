import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from hem_ext.harness import data
from hem_ext.harness.data import base


def bytes_split():
    images = torch.arange(5 * 2 * 3, dtype=torch.uint8).view(5, 1, 2, 3)
    return data.Split(images, torch.arange(5))


def test_bytes_become_floats_on_access():
    split = bytes_split()
    image, label = split[2]
    assert image.dtype == torch.float32
    assert image.flatten().tolist() == pytest.approx([v / 255 for v in range(12, 18)])
    assert (label.dtype, label.shape, label.item()) == (torch.int64, (), 2)
    assert split.images.dtype == torch.uint8


def test_floats_stay_as_they_are():
    images = torch.rand(3, 2, 4, 4)
    split = data.Split(images, torch.zeros(3, 4, 4, dtype=torch.int64))
    assert torch.equal(split[1][0], images[1])
    assert split[1][1].shape == (4, 4)
    assert len(split) == 3
    with pytest.raises(IndexError):
        split[3]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gets_what_single_accesses_give(workers):
    split = bytes_split()
    part = Subset(split, [4, 1, 3])
    (batch,) = DataLoader(part, batch_size=3, num_workers=workers)
    assert torch.equal(batch[0], torch.stack([split[i][0] for i in (4, 1, 3)]))
    assert batch[1].tolist() == [4, 1, 3]


def test_a_loader_asks_for_whole_batches(monkeypatch):
    asked = []
    monkeypatch.setattr(data.Split, "__getitem__", lambda split, index: asked.append(index))
    assert len(list(DataLoader(bytes_split(), batch_size=2))) == 3
    assert asked == []


def test_take():
    split = bytes_split()
    assert split.take(torch.tensor([3, 0])).labels.tolist() == [3, 0]
    assert torch.equal(split.take(split.labels > 2).images, split.images[3:])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 8, 8), torch.zeros(2).long(), r"images must be .* got torch.float32 \(2, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8).double(), torch.zeros(2).long(), "images must be .* got torch.float64"),
        (torch.zeros(2, 1, 8, 8), torch.zeros(2), "labels must be int64 .* got torch.float32"),
        (torch.zeros(2, 1, 8, 8), torch.zeros(2, 8).long(), r"labels must be int64 .* \(2, 8\)"),
        (torch.zeros(2, 1, 8, 8), torch.zeros(3).long(), "2 images, but 3 labels"),
    ],
)
def test_a_split_refuses(images, labels, message):
    with pytest.raises(ValueError, match=message):
        data.Split(images, labels)


@pytest.mark.parametrize(
    ("name", "options", "shape", "label_shape", "classes", "ignore_index"),
    [
        ("digits", {}, (1, 8, 8), (), 10, -100),
        ("digit-scenes", {"num_train": 2, "num_test": 1, "size": 32}, (1, 32, 32), (32, 32), 11, -100),
        ("texture-mosaics", {"num_train": 2, "num_test": 1}, (1, 64, 64), (64, 64), 8, 255),
    ],
)
def test_load_bundled(name, options, shape, label_shape, classes, ignore_index):
    loaded = data.load(name, **options)
    assert (loaded.num_classes, loaded.channels, loaded.ignore_index) == (classes, 1, ignore_index)
    for part in (loaded.train, loaded.test):
        image, label = part[0]
        assert (image.shape, label.shape) == (shape, label_shape)
        assert (image.dtype, label.dtype) == (torch.float32, torch.int64)
    again = pickle.loads(pickle.dumps(loaded))
    assert torch.equal(again.test.images, loaded.test.images)


def test_load_gives_what_the_functions_give():
    assert torch.equal(data.load("digits").train.images, data.digits()[0].images)
    assert data.load("digit-scenes", num_train=1, num_test=1).classes[:2] == ("background", "0")
    assert data.load("texture-mosaics", num_train=1, num_test=1).classes[0] == "brick"


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no data set 'cifar'; there are digits, .* cifar10, .*, ade20k"):
        data.load("cifar")
    with pytest.raises(ValueError, match="no data set 'cifar10'; there are cifar10-c, mnist-c"):
        data.load_corrupted("cifar10")


@pytest.mark.parametrize("name", data.ON_DISK)
def test_a_set_on_disk_says_what_its_root_must_hold(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} is read from disk: --data-root must name a folder that holds .+"):
        data.load(name)
    (tmp_path / "other").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError) as error:
        data.load(name, tmp_path)
    assert f"is missing; expected {data.ON_DISK[name][1]}. {tmp_path} holds notes.txt, other" in str(error.value)


@pytest.mark.parametrize("name", data.CORRUPTED)
def test_a_corrupted_set_says_what_its_root_must_hold(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} is read from disk"):
        data.load_corrupted(name)
    with pytest.raises(FileNotFoundError, match="is missing; expected") as error:
        next(data.load_corrupted(name, tmp_path))
    assert f"{data.CORRUPTED[name][1]}. {tmp_path} holds nothing" in str(error.value)


def test_a_long_listing_is_cut(tmp_path):
    for i in range(9):
        (tmp_path / f"f{i}").touch()
    assert str(base.missing(tmp_path / "a" / "b", "x")).endswith("holds f0, f1, f2, f3, f4, f5 and 3 more")


def test_inside_takes_the_folder_or_what_holds_it(tmp_path, monkeypatch):
    assert base.inside(tmp_path, "a/b") == tmp_path / "a" / "b"
    assert base.inside(tmp_path / "a" / "b", "a/b") == tmp_path / "a" / "b"
    assert base.inside(tmp_path / "b", "a/b") == tmp_path / "b" / "a" / "b"
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    assert base.inside(base.Path("."), "a").resolve() == tmp_path / "a"
