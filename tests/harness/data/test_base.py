import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from hem_ext.harness import data
from hem_ext.harness.data import base

FEW = {"num_train": 2, "num_validation": 1, "num_test": 1}


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
        ("mnist-5k", {}, (1, 28, 28), (), 10, -100),
        ("digit-scenes", {**FEW, "size": 32}, (1, 32, 32), (32, 32), 11, -100),
        ("mnist-scenes", {**FEW, "size": 64}, (1, 64, 64), (64, 64), 11, -100),
        ("texture-mosaics", FEW, (1, 64, 64), (64, 64), 8, 255),
    ],
)
def test_load_bundled(name, options, shape, label_shape, classes, ignore_index):
    loaded = data.load(name, **options)
    assert (loaded.num_classes, loaded.channels, loaded.ignore_index) == (classes, 1, ignore_index)
    for part in (loaded.train, loaded.validation, loaded.test):
        image, label = part[0]
        assert (image.shape, label.shape) == (shape, label_shape)
        assert (image.dtype, label.dtype) == (torch.float32, torch.int64)
    again = pickle.loads(pickle.dumps(loaded))
    assert torch.equal(again.test.images, loaded.test.images)


def test_load_gives_what_the_functions_give():
    for name, make in (("digits", data.digits), ("mnist-5k", data.mnist_5k)):
        loaded = data.load(name)
        for part, made in zip((loaded.train, loaded.validation, loaded.test), make(), strict=True):
            assert torch.equal(part.images, made.images)
    for name in ("digit-scenes", "mnist-scenes"):
        assert data.load(name, **FEW).classes[:2] == ("background", "0")
    assert data.load("texture-mosaics", **FEW).classes[0] == "brick"


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no data set 'cifar'; there are mnist-5k, .* cifar10, .*, ade20k"):
        data.load("cifar")
    with pytest.raises(ValueError, match="no data set 'cifar10'; there are cifar10-c, mnist-c"):
        data.load_corrupted("cifar10")


@pytest.mark.parametrize("name", data.ON_DISK)
def test_a_set_on_disk_says_what_its_root_must_hold(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} is read from disk: --data-root must name a folder that holds .+"):
        data.load(name)
    (tmp_path / "other").touch()
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


# --- the validation part --------------------------------------------------------------------------------------


def numbered(labels):
    """Image i is filled with i."""
    labels = torch.tensor(labels)
    return data.Split(torch.arange(len(labels)).float().view(-1, 1, 1, 1), labels)


def numbers(split):
    return split.images.flatten().long().tolist()


@pytest.mark.parametrize(("share", "expected"), [(0.1, [6, 3, 1]), (0.25, [15, 8, 2]), (0.5, [30, 15, 5])])
def test_a_part_has_the_same_share_of_every_class(share, expected):
    split = numbered([0] * 60 + [1] * 30 + [2] * 10)
    rest, part = data.split_off(split, share)
    assert sorted(numbers(rest) + numbers(part)) == list(range(100))
    assert part.labels.bincount().tolist() == pytest.approx(expected, abs=1)
    assert len(part) == 100 * share
    for side in (rest, part):
        assert numbers(side) == sorted(numbers(side))
        assert torch.equal(side.labels, split.labels[side.images.flatten().long()])


def test_the_seed_fixes_a_part():
    split = numbered([0, 1] * 20)
    first, again, other = (numbers(data.split_off(split, 0.2, seed)[1]) for seed in (0, 0, 1))
    assert first == again != other
    # Other draws would make other data sets, and every number measured on them wrong.
    assert first == [0, 6, 11, 13, 15, 24, 29, 30]


def test_label_maps_are_split_without_classes():
    split = data.Split(numbered([0] * 20).images, torch.zeros(20, 1, 1, dtype=torch.int64))
    rest, part = data.split_off(split, 0.25)
    assert (len(rest), len(part)) == (15, 5)
    assert sorted(numbers(rest) + numbers(part)) == list(range(20))


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_a_part_is_a_share(share):
    with pytest.raises(ValueError, match=rf"share of the training samples in \(0, 1\), got {share}"):
        data.split_off(numbered([0, 1] * 10), share)


@pytest.mark.parametrize(
    ("labels", "share", "expected"),
    [
        ([0, 1] * 4, 0.1, [1, 1]),  # a tenth of 8 is one for two classes
        ([0, 1] * 2, 0.9, [1, 1]),
        ([0] * 40 + [1] * 2, 0.1, [5, 1]),  # in proportion, class 1 has none
        ([0] * 2 + [1] * 40, 0.9, [1, 36]),
        ([0, 1, 2] * 2 + [3] * 500, 0.1, [1, 1, 1, 50]),
    ],
)
def test_both_sides_have_a_sample_of_every_class(labels, share, expected):
    rest, part = data.split_off(numbered(labels), share)
    assert part.labels.bincount().tolist() == pytest.approx(expected, abs=1)
    assert part.labels.unique().tolist() == rest.labels.unique().tolist() == sorted(set(labels))
    assert sorted(numbers(rest) + numbers(part)) == list(range(len(labels)))
    assert numbers(part) == numbers(data.split_off(numbered(labels), share)[1])


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_both_sides_have_a_label_map(share):
    split = data.Split(numbered([0] * 2).images, torch.zeros(2, 1, 1, dtype=torch.int64))
    assert [len(side) for side in data.split_off(split, share)] == [1, 1]
    for count in (0, 1):
        with pytest.raises(ValueError, match=f"the data set has {count} samples?; expected one or more for each part"):
            data.split_off(split.take(torch.arange(count)), share)


def test_a_class_with_fewer_samples_than_parts_is_named():
    split, each = numbered([0] * 9 + [1]), "one or more for each part: training, validation"
    with pytest.raises(ValueError, match=f"^class 1 has 1 sample; expected {each}$"):
        data.split_off(split, 0.5)
    with pytest.raises(ValueError, match=f"^class cats has 1 sample; expected {each}$"):
        data.Data(split, None, split, ("dogs", "cats"), 1).with_validation(None)
    split = split.take(torch.tensor([0, 1, 2, 9, 9]))
    assert len(data.split_off(split, 0.5)[1]) == 3
    with pytest.raises(ValueError, match=f"^class 1 has 2 samples; expected {each}, test$"):
        data.split_off(split, 0.5, parts=("training", "validation", "test"))


def test_a_set_without_a_validation_part_gets_one_of_its_training_part():
    test = numbered([0, 1])
    made = data.Data(numbered([0, 1] * 20), None, test, ("a", "b"), 1)
    for share, count in ((None, 4), (0.25, 10)):
        found = made.with_validation(share)
        assert (len(found.train), len(found.validation)) == (40 - count, count)
        assert sorted(numbers(found.train) + numbers(found.validation)) == list(range(40))
        assert found.test is test
        assert found.classes == ("a", "b")
        assert found.with_validation(None) is found


def test_a_validation_part_of_its_own_is_not_added_to(monkeypatch):
    with pytest.raises(ValueError, match=r"a validation part of its own: a share of 0\.2 cannot be split off"):
        data.load("digits", validation=0.2)
    part = numbered([0, 1] * 20)
    monkeypatch.setitem(data.ON_DISK, "svhn", (lambda root: data.Data(part, None, part, ("a", "b"), 1), ""))
    assert len(data.load("svhn", "root").validation) == 4
    assert len(data.load("svhn", "root", validation=0.5).validation) == 20
    monkeypatch.setitem(data.ON_DISK, "svhn", (lambda root: data.Data(part, part, part, ("a", "b"), 1), ""))
    assert data.load("svhn", "root").validation is part
    with pytest.raises(ValueError, match=r"a share of 0\.5 cannot be split off"):
        data.load("svhn", "root", validation=0.5)


# --- what a network standardises by ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_statistics_are_numpys(dtype):
    images = torch.randint(0, 256, (30, 3, 5, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[:, 1] //= 3
    images[:, 2] = 51  # never changes
    floats = images.numpy() / 255
    split = data.Split(images if dtype == torch.uint8 else torch.from_numpy(floats).float(), torch.zeros(30).long())
    black = data.Split(torch.zeros(9, 3, 5, 4), torch.zeros(9).long())
    mean, deviation = data.Data(split, black, black, ("a",), 3).statistics()
    assert mean.dtype == deviation.dtype == torch.float32
    assert mean.numpy() == pytest.approx(floats.mean((0, 2, 3)), abs=1e-6)
    assert deviation[:2].numpy() == pytest.approx(floats.std((0, 2, 3))[:2], abs=1e-6)
    assert deviation[2] == 1
    assert mean[2] == pytest.approx(0.2)


def test_statistics_of_many_images_are_those_of_some_evenly_spread():
    split = data.Split(torch.rand(10, 1, 2, 2), torch.zeros(10).long())
    some = split.images[[0, 2, 5, 7]].double().numpy()
    mean, deviation = data.Data(split, split, split, ("a",), 1).statistics(most=4)
    assert (mean.item(), deviation.item()) == pytest.approx((some.mean(), some.std()))


def test_statistics_of_pictures_of_several_sizes_count_every_pixel_once():
    pictures = [(torch.zeros(1, 1, 3), torch.tensor(0)), (torch.ones(1, 1, 1), torch.tensor(0))]
    mean, deviation = data.Data(pictures, None, pictures, ("a",), 1).statistics()
    assert (mean.item(), deviation.item()) == pytest.approx((0.25, 0.1875**0.5))


def test_the_seed_of_a_validation_part():
    labels = torch.arange(2).repeat(50)
    whole = data.Data(data.Split(torch.arange(100.0).view(-1, 1, 1, 1), labels), None, None, ("a", "b"), 1)

    def drawn(part):
        return part.images.flatten().tolist()

    by_seed = [drawn(base.split_off(whole.train, 0.3, seed)[1]) for seed in (0, 1)]
    assert by_seed[0] != by_seed[1]
    assert [drawn(whole.with_validation(0.3, seed).validation) for seed in (0, 1)] == by_seed
    assert drawn(whole.with_validation(0.3).validation) == by_seed[0]


@pytest.mark.parametrize(
    ("kind", "value", "right"),
    [
        (bool, True, True),
        (bool, 1, False),
        (int, 1, True),
        (int, True, False),
        (int, 1.0, False),
        (float, 1, True),
        (float, 0.5, True),
        (float, False, False),
        (str, 3, False),
    ],
)
def test_the_kind_of_an_option(kind, value, right):
    if right:
        base.check_kind("it", value, kind)
        return
    with pytest.raises(ValueError, match=f"^it must be {base.KINDS[kind]}, got {value!r}$"):
        base.check_kind("it", value, kind)


@pytest.mark.parametrize("value", [101, 179, 200, 254])
def test_statistics_of_images_that_never_change(value):
    # In float32 the squares would be off by more than the square of the deviation that counts as none.
    split = data.Split(torch.full((1001, 1, 8, 8), value, dtype=torch.uint8), torch.zeros(1001, dtype=torch.long))
    split.images[1000] = 0  # beyond the thousandth of 1001 that are looked at
    mean, deviation = data.Data(split, None, split, ("a",), 1).statistics()
    torch.testing.assert_close(mean, torch.tensor([value / 255]))
    assert deviation.item() == 1


@pytest.mark.parametrize(
    ("count", "said"), [(0, "nothing"), (6, "0, 1, 2, 3, 4, 5"), (8, "0, 1, 2, 3, 4, 5 and 2 more")]
)
def test_what_is_there_instead(tmp_path, count, said):
    for i in range(count):
        (tmp_path / str(i)).touch()
    error = base.missing(tmp_path / "no" / "file", "a file")
    assert str(error) == f"{tmp_path / 'no' / 'file'} is missing; expected a file. {tmp_path} holds {said}"
