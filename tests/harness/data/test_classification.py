import gzip
import pickle
import re
import struct
import tracemalloc
import zlib
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import pytest
import scipy.io
import torch
from damage import Attack

from hem_ext.harness import data
from hem_ext.harness.data import classification
from hem_ext.harness.data.augment import ShiftFlip

RNG = np.random.default_rng(0)


def read(name, root):
    """The set as its files have it, of whose training part :func:`data.load` splits the validation part off."""
    return data.ON_DISK[name][0](root)


def idx(array):
    """The IDX format, as its page describes it."""
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.astype(np.uint8).tobytes()
    )


MNIST = {
    "train-images-idx3-ubyte": RNG.integers(0, 256, (20, 28, 28)),
    "train-labels-idx1-ubyte": np.arange(20) % 10,
    "t10k-images-idx3-ubyte": RNG.integers(0, 256, (10, 28, 28)),
    "t10k-labels-idx1-ubyte": np.arange(10),
}


def write_mnist(folder, *, dot=False, gz=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in MNIST.items():
        name = name.replace("-idx", ".idx") if dot else name
        if gz:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "."), ("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"), ("kmnist", "kmnist")],
)
def test_mnist_family(tmp_path, name, folder, dot, gz):
    write_mnist(tmp_path / folder, dot=dot, gz=gz)
    loaded = read(name, tmp_path)
    assert (loaded.num_classes, loaded.channels, loaded.ignore_index, loaded.validation) == (10, 1, -100, None)
    for part, images, labels in (
        (loaded.train, MNIST["train-images-idx3-ubyte"], MNIST["train-labels-idx1-ubyte"]),
        (loaded.test, MNIST["t10k-images-idx3-ubyte"], MNIST["t10k-labels-idx1-ubyte"]),
    ):
        assert len(part) == len(images)
        image, label = part[7]
        assert image.shape == (1, 28, 28)
        assert (label.dtype, label.item()) == (torch.int64, labels[7])
        np.testing.assert_allclose(image[0].numpy(), images[7] / 255, rtol=1e-6)


def test_a_set_of_the_mnist_family_prefers_its_own_folder(tmp_path):
    write_mnist(tmp_path)
    write_mnist(tmp_path / "fashion-mnist")
    (tmp_path / "fashion-mnist" / "t10k-labels-idx1-ubyte").write_bytes(idx(np.full(10, 3)))
    assert read("fashion-mnist", tmp_path).test.labels.tolist() == [3] * 10
    assert read("mnist", tmp_path).test.labels.tolist() == list(range(10))


TRAIN_IMAGES = idx(MNIST["train-images-idx3-ubyte"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train-images-idx3-ubyte",
            idx(np.arange(20)),
            "starts with 00000801; an IDX file of 3 dimensions, with 00000803",
        ),
        ("train-labels-idx1-ubyte", TRAIN_IMAGES, "starts with 00000803; .* of 1 dimensions, with 00000801"),
        ("train-images-idx3-ubyte", b"", "starts with nothing"),
        ("train-images-idx3-ubyte", TRAIN_IMAGES[:9], "ends within its header, after 9 bytes"),
        ("train-images-idx3-ubyte", TRAIN_IMAGES[:-1], "should hold 15680 bytes after its header, but holds 15679"),
        ("train-images-idx3-ubyte", TRAIN_IMAGES + b"!", "should hold 15680 bytes after its header, but holds more"),
        ("train-labels-idx1-ubyte", idx(np.arange(19) % 10), "20 images, but 19 labels"),
        ("t10k-labels-idx1-ubyte", idx(np.arange(10) + 1), "has the label 10; expected 0 to 9"),
    ],
)
def test_a_damaged_idx_file(tmp_path, name, content, message):
    write_mnist(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        read("mnist", tmp_path)


@pytest.mark.parametrize("gz", [False, True])
def test_an_idx_file_that_declares_more_than_it_can_hold(tmp_path, gz):
    write_mnist(tmp_path, gz=gz)
    path = tmp_path / f"train-images-idx3-ubyte{'.gz' if gz else ''}"
    content = bytes([0, 0, 8, 3]) + b"\xff" * 12
    path.write_bytes(gzip.compress(content) if gz else content)
    message = rf"ubyte\S* should hold {(2**32 - 1) ** 3} bytes after its header, which a file of \d\d bytes cannot$"
    with pytest.raises(ValueError, match=message):
        read("mnist", tmp_path)


@pytest.mark.parametrize("size", [15, 20, 1000 * 31])
def test_a_plain_idx_file_holds_no_more_than_it_takes(tmp_path, size):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + struct.pack(">I", size) + bytes(7))
    what = "but holds 7" if size == 15 else "which a file of 15 bytes cannot"
    with pytest.raises(ValueError, match=rf"ubyte should hold {size} bytes after its header, {what}$"):
        read("mnist", tmp_path)


def test_a_packed_idx_file_holds_more_than_it_takes(tmp_path):
    write_mnist(tmp_path, gz=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.zeros((20, 28, 28)))))
    assert path.stat().st_size < 20 * 28 * 28 / 100
    assert not read("mnist", tmp_path).train.images.any()


@contextmanager
def little_memory():
    """See that less than a MiB is taken at a time."""
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_a_gz_that_goes_on_is_read_no_further(tmp_path):
    write_mnist(tmp_path, gz=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes() + gzip.compress(bytes(2**20)) * 32)
    with (
        little_memory(),
        pytest.raises(ValueError, match=r"\.gz should hold 15680 bytes after its header, but holds more$"),
    ):
        read("mnist", tmp_path)


@pytest.mark.parametrize("damage", [lambda z: z[:-9], lambda z: b"no gzip", lambda z: z[:40] + b"\xff" * 40 + z[80:]])
def test_a_damaged_gz(tmp_path, damage):
    write_mnist(tmp_path, gz=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz is not a whole gzip file"):
        read("mnist", tmp_path)


def test_a_missing_idx_file(tmp_path):
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"mnist/t10k-labels-idx1-ubyte is missing; .* holds t10k-images-idx3"):
        read("mnist", tmp_path)


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 and NumPy 1 wrote: strings of bytes, and NumPy's old module name."""

    def save_bytes(self, obj):
        self.write(pickle.BINSTRING + struct.pack("<i", len(obj)) + obj)
        self.memoize(obj)

    dispatch: ClassVar = {**pickle._Pickler.dispatch, bytes: save_bytes}


def write_pickle(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(content)
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


@pytest.mark.parametrize("bomb", [b"r" + struct.pack("<I", 2**22), b"\x96" + struct.pack("<Q", 2**26)])
def test_a_pickle_that_names_a_large_number_takes_no_memory_for_it(tmp_path, bomb):
    write_pickle(tmp_path / "cifar-100-python" / "meta", {})
    (tmp_path / "cifar-100-python" / "meta").write_bytes(b"\x80\x02}" + bomb + b"0.")
    with little_memory(), pytest.raises(ValueError, match=r"meta is not a whole CIFAR batch"):
        read("cifar100", tmp_path)


class Made:
    """What a pickle makes: a call of something with arguments, and a state that it is given."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


RECONSTRUCT, (NDARRAY, *EMPTY), _ = np.empty(0, np.uint8).__reduce__()
POINTERS = (2**22,)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (Made(NDARRAY, (POINTERS, "O")), r"uint8, got \(0,\), uint8$"),
        (Made(RECONSTRUCT, (NDARRAY, POINTERS, "O")), r"uint8, got \(0,\), uint8$"),
        (
            Made(RECONSTRUCT, (NDARRAY, *EMPTY), (1, POINTERS, np.dtype("O"), False, [])),
            "is not a whole CIFAR batch, .*: an array is made of bytes, not of list$",
        ),
    ],
)
def test_a_pickle_of_pointers_takes_no_memory_for_them(tmp_path, array, words):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    content = {b"data": array, b"labels": []}
    # Not of protocol 2, in which bytes are made by a call that is refused.
    (folder / "test_batch").write_bytes(pickle.dumps(content, protocol=4))
    with little_memory(), pytest.raises(ValueError, match=rf"^\S*test_batch.*{words}"):
        read("cifar10", tmp_path)


def batch(count=4, key=b"labels", num_classes=10):
    labels = [int(label) for label in RNG.integers(0, num_classes, count)]
    return {b"data": RNG.integers(0, 256, (count, 3072)).astype(np.uint8), key: labels, b"batch_label": b"a batch"}


def write_cifar10(folder):
    batches = {f"data_batch_{i}": batch() for i in range(1, 6)} | {"test_batch": batch(7)}
    for name, content in batches.items():
        write_pickle(folder / name, content)
    write_pickle(folder / "batches.meta", {b"label_names": [f"class {i}".encode() for i in range(10)]})
    return batches


def test_cifar10(tmp_path):
    batches = write_cifar10(tmp_path / "cifar-10-batches-py")
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in (tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes()
    for root in (tmp_path, tmp_path / "cifar-10-batches-py"):
        loaded = read("cifar10", root)
        assert (loaded.classes[3], loaded.num_classes, loaded.channels) == ("class 3", 10, 3)
        assert loaded.validation is None
        assert (len(loaded.train), len(loaded.test)) == (20, 7)
        assert loaded.train.labels.tolist() == [v for i in range(1, 6) for v in batches[f"data_batch_{i}"][b"labels"]]
        image, label = loaded.test[2]
        row = batches["test_batch"][b"data"][2]
        assert label == batches["test_batch"][b"labels"][2]
        # A row is the red plane, then the green one, then the blue one, each line by line.
        assert image.shape == (3, 32, 32)
        for channel, y, x in ((0, 0, 0), (0, 0, 31), (1, 5, 7), (2, 31, 30)):
            assert image[channel, y, x].item() == pytest.approx(row[channel * 1024 + y * 32 + x] / 255)


def test_what_is_split_off_cifar10_is_not_augmented(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    for i in range(1, 6):
        write_pickle(folder / f"data_batch_{i}", {**batch(10), b"labels": list(range(10))})
    loaded = data.load("cifar10", tmp_path, validation=0.4)
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (30, 20, 7)
    assert loaded.validation.labels.bincount().tolist() == [2] * 10
    assert torch.equal(loaded.validation[0][0], loaded.validation.images[0] / 255)
    train = loaded.train.for_training()
    assert any(not torch.equal(train[i][0], loaded.train[i][0]) for i in range(5))
    taken = train.take(torch.tensor([3]))
    assert len({taken[0][0].sum().item() for _ in range(5)}) > 1


def write_cifar100(folder):
    train, test = batch(6, b"fine_labels", 100), batch(5, b"fine_labels", 100)
    write_pickle(folder / "train", {**train, b"coarse_labels": [0] * 6})
    write_pickle(folder / "test", {**test, b"coarse_labels": [0] * 5})
    names = [f"fine {i}".encode() for i in range(100)]
    write_pickle(folder / "meta", {b"fine_label_names": names, b"coarse_label_names": [b"coarse"] * 20})
    return train, test


def test_cifar100(tmp_path):
    train, test = write_cifar100(tmp_path / "cifar-100-python")
    loaded = read("cifar100", tmp_path)
    assert (loaded.num_classes, loaded.classes[99], loaded.validation) == (100, "fine 99", None)
    assert loaded.train.labels.tolist() == train[b"fine_labels"]
    assert loaded.test.labels.tolist() == test[b"fine_labels"]
    np.testing.assert_array_equal(loaded.test.images.flatten(1).numpy(), test[b"data"])


def test_names_of_classes_are_text(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    names = [*map(str, range(8)), b"8", b"n\xffne"]
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=4))
    assert read("cifar10", tmp_path).classes == (*map(str, range(9)), "n\ufffdne")


def test_an_empty_batch(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(batch(0), protocol=4))
    loaded = read("cifar10", tmp_path)
    assert (len(loaded.train), len(loaded.test), loaded.test.labels.dtype) == (20, 0, torch.int64)


def test_batches_that_todays_python_wrote(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    content = batch()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(content, protocol=4))
    assert read("cifar10", tmp_path).test.labels.tolist() == content[b"labels"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_2", {b"data": batch()[b"data"]}, "expected a dictionary with data and labels, got b'data'"),
        ("data_batch_2", [1, 2], "expected a dictionary with data and labels, got list"),
        ("test_batch", {b"a": 1, b"labels": 2}, "expected a dictionary with data and labels, got b'a', b'labels'$"),
        (
            "data_batch_2",
            {**batch(), b"data": np.zeros((4, 100), np.uint8)},
            r"\(N, 3072\), uint8, got \(4, 100\), uint8",
        ),
        ("data_batch_2", {**batch(), b"data": np.zeros((4, 3072))}, r"got \(4, 3072\), float64"),
        ("data_batch_2", {**batch(), b"data": [[0]]}, "got list"),
        ("data_batch_2", {**batch(), b"labels": [1, 2, 3]}, "4 images, but 3 labels"),
        ("test_batch", {**batch(), b"labels": [1, 2, 3, 10]}, "has the label 10; expected 0 to 9"),
        ("test_batch", {**batch(), b"labels": [1, 2, 3, -1]}, "has the label -1; expected 0 to 9"),
        ("test_batch", {**batch(), b"labels": 7}, "expected a list of labels, got int"),
        ("test_batch", {**batch(), b"labels": [1, 2, 3, b"4"]}, "expected a list of labels, got list"),
        ("batches.meta", {b"names": []}, "expected a dictionary with label_names, got b'names'"),
        ("batches.meta", {b"label_names": [1, 2]}, "expected a list of names, got list"),
        ("batches.meta", {b"label_names": 7}, "expected a list of names, got int"),
    ],
)
def test_a_wrong_cifar_batch(tmp_path, name, content, message):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    write_pickle(folder / name, content)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        read("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["test_batch", "batches.meta"])
def test_a_pickle_that_calls_something_is_refused_uncalled(tmp_path, name):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    content = pickle.dumps({b"data": Attack(tmp_path / "called"), b"labels": []})
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is not a whole CIFAR batch.*: it asks for pathlib"):
        read("cifar10", tmp_path)
    assert not (tmp_path / "called").exists()
    pickle.loads(content)
    assert (tmp_path / "called").exists()


@pytest.mark.parametrize("damage", [lambda b: b[:-50], lambda b: b"<html>no pickle</html>", lambda b: b""])
def test_a_damaged_pickle(tmp_path, damage):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    (folder / "data_batch_5").write_bytes(damage((folder / "data_batch_5").read_bytes()))
    with pytest.raises(ValueError, match="data_batch_5 is not a whole CIFAR batch"):
        read("cifar10", tmp_path)


def test_a_missing_batch(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    (folder / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_4 is missing; expected cifar-10-batches-py/ with"):
        read("cifar10", tmp_path)


SVHN = {
    "train": {"X": RNG.integers(0, 256, (32, 32, 3, 5)).astype(np.uint8), "y": np.array([[1], [10], [9], [2], [10]])},
    "test": {"X": RNG.integers(0, 256, (32, 32, 3, 2)).astype(np.uint8), "y": np.array([[10], [3]], dtype=np.uint8)},
}


def write_svhn(folder, **changed):
    folder.mkdir(parents=True, exist_ok=True)
    for part, content in SVHN.items():
        scipy.io.savemat(folder / f"{part}_32x32.mat", {**content, **changed})


@pytest.mark.parametrize("folder", [".", "svhn"])
def test_svhn(tmp_path, folder):
    write_svhn(tmp_path / folder)
    loaded = read("svhn", tmp_path)
    assert (loaded.classes, loaded.channels, loaded.validation) == (tuple("0123456789"), 3, None)
    assert loaded.train.labels.tolist() == [1, 0, 9, 2, 0]
    assert loaded.test.labels.tolist() == [0, 3]
    image, label = loaded.train[2]
    assert label == 9
    np.testing.assert_allclose(image.numpy(), np.moveaxis(SVHN["train"]["X"][..., 2], -1, 0) / 255, rtol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"X": np.zeros((32, 32, 3, 5))}, r"expected y, and X of shape \(32, 32, 3, N\), uint8, got .*float64"),
        ({"X": np.zeros((5, 32, 32, 3), np.uint8)}, r"expected y, and X of shape .*, got \(5, 32, 32, 3\), uint8"),
        ({"y": np.full((5, 1), 11)}, "train_32x32.mat has the label 11"),
        ({"y": np.zeros((4, 1), int)}, "5 images, but 4 labels"),
    ],
)
def test_a_wrong_svhn(tmp_path, changed, message):
    write_svhn(tmp_path, **changed)
    with pytest.raises(ValueError, match=message):
        read("svhn", tmp_path)


def test_a_damaged_or_missing_svhn(tmp_path):
    write_svhn(tmp_path)
    file = tmp_path / "train_32x32.mat"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"train_32x32.mat is not a whole MATLAB file"):
        read("svhn", tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"train_32x32.mat is missing; expected train_32x32.mat and test_32x32"):
        read("svhn", tmp_path)


def element(order, kind, content):
    return struct.pack(f"{order}II", kind, len(content)) + content


def variable(order, name, sizes, content, kind=9, data=2):
    """A variable as a MATLAB file has it unpacked; 9 and 2 stand for uint8."""

    def aligned(kind, content):
        return element(order, kind, content) + bytes(-len(content) % 8)

    flags, dims = struct.pack(f"{order}II", kind, 0), struct.pack(f"{order}{len(sizes)}I", *sizes)
    return element(
        order,
        14,
        aligned(6, flags) + aligned(5, dims) + aligned(1, name) + (aligned(data, content) if content else b""),
    )


def packed(order, variable):
    return element(order, 15, zlib.compress(variable))


def write_mat(path, order, *variables):
    path.write_bytes(b" " * 124 + struct.pack(f"{order}HH", 0x0100, 0x4D49) + b"".join(variables))


@pytest.mark.parametrize("order", "<>")
def test_an_svhn_that_packs_more_than_it_declares_is_not_unpacked(tmp_path, order):
    def write(part, held):
        images = packed(order, variable(order, b"X", (32, 32, 3, 2), bytes(held)))
        write_mat(tmp_path / f"{part}_32x32.mat", order, images, packed(order, variable(order, b"y", (2, 1), b"\1\2")))

    for part in ("train", "test"):
        write(part, 6144)
    assert read("svhn", tmp_path).train.labels.tolist() == [1, 2]
    write("train", 2**26)
    with (
        little_memory(),
        pytest.raises(ValueError, match=r"train_32x32.mat has packed more than the 6144 bytes that"),
    ):
        read("svhn", tmp_path)


def test_what_an_svhn_packs_is_counted_over_all_of_it(tmp_path):
    write_svhn(tmp_path)
    images = packed("<", variable("<", b"X", (32, 32, 3, 100), bytes(2**26)))
    write_mat(tmp_path / "test_32x32.mat", "<", images)
    words = rf"test_32x32.mat has packed more than the {32 * 32 * 3 * 100} bytes that a variable of it may take$"
    with little_memory(), pytest.raises(ValueError, match=words):
        read("svhn", tmp_path)


def test_an_svhn_whose_labels_are_packed_and_doubles(tmp_path):
    content = {"X": np.zeros((32, 32, 3, 200), np.uint8), "y": np.ones((200, 1))}
    for part in ("train", "test"):
        scipy.io.savemat(tmp_path / f"{part}_32x32.mat", content, do_compression=True)
    assert read("svhn", tmp_path).train.labels.tolist() == [1] * 200
    scipy.io.savemat(tmp_path / "test_32x32.mat", {**content, "y": np.ones((199, 1))})
    with pytest.raises(ValueError, match=rf"^{tmp_path}/test_32x32.mat: 200 images, but 199 labels$"):
        read("svhn", tmp_path)


@pytest.mark.parametrize("order", "<>")
def test_an_svhn_that_is_not_packed(tmp_path, order):
    images, labels = variable(order, b"X", (32, 32, 3, 2), bytes(6144)), variable(order, b"y", (2, 1), b"\1\2")
    write_mat(tmp_path / "train_32x32.mat", order, images, labels)
    write_mat(tmp_path / "test_32x32.mat", order, labels, images)
    assert read("svhn", tmp_path).test.labels.tolist() == [1, 2]


def test_what_else_an_svhn_holds_takes_no_memory(tmp_path):
    write_svhn(tmp_path)
    images, labels = variable("<", b"X", (32, 32, 3, 2), bytes(6144)), variable("<", b"y", (2, 1), b"\1\2")
    write_mat(tmp_path / "test_32x32.mat", "<", images, labels, variable("<", b"z", (1, 2**22), b"", kind=1))
    with little_memory():
        assert read("svhn", tmp_path).test.labels.tolist() == [1, 2]


@pytest.mark.parametrize("name", ["X", "y"])
@pytest.mark.parametrize("wrap", [lambda variable: variable, lambda variable: packed("<", variable)])
def test_an_svhn_of_cells_takes_no_memory_for_them(tmp_path, wrap, name):
    write_svhn(tmp_path)
    cells = variable("<", name.encode(), (1, 2**22), b"", kind=1)
    write_mat(tmp_path / "train_32x32.mat", "<", wrap(cells))
    with little_memory(), pytest.raises(ValueError, match=rf"train_32x32.mat: expected numbers in {name}, got cell$"):
        read("svhn", tmp_path)


def write_cifar10_c(folder, corruptions=("fog", "snow")):
    folder.mkdir(parents=True)
    np.save(folder / "labels.npy", np.tile(np.array([4, 0, 9], dtype=np.int32), 5))
    images = {name: RNG.integers(0, 256, (15, 32, 32, 3)).astype(np.uint8) for name in corruptions}
    for name, array in images.items():
        np.save(folder / f"{name}.npy", array)
    return images


def test_cifar10_c(tmp_path):
    images = write_cifar10_c(tmp_path / "CIFAR-10-C")
    found = list(data.load_corrupted("cifar10-c", tmp_path))
    assert [key for *key, _ in found] == [[name, severity] for name in ("fog", "snow") for severity in range(1, 6)]
    for name, severity, split in found:
        assert split.labels.tolist() == [4, 0, 9]
        assert split.images.shape == (3, 3, 32, 32)
        assert split.images.is_contiguous()
        wanted = images[name][3 * (severity - 1) + 2, 5, 7]
        np.testing.assert_allclose(split[2][0][:, 5, 7].numpy(), wanted / 255, rtol=1e-6)
    (*key, _), *_ = data.load_corrupted("cifar10-c", tmp_path / "CIFAR-10-C", corruptions=["snow"])
    assert key == ["snow", 1]


def write_mnist_c(folder):
    images = RNG.integers(0, 256, (4, 28, 28, 1)).astype(np.uint8)
    for name in ("zigzag", "fog"):
        (folder / name).mkdir(parents=True)
        np.save(folder / name / "test_images.npy", images if name == "fog" else 255 - images)
        np.save(folder / name / "test_labels.npy", np.array([1, 2, 3, 4]))
    return images


def test_mnist_c(tmp_path):
    images = write_mnist_c(tmp_path / "mnist_c")
    fog, zigzag = data.load_corrupted("mnist-c", tmp_path)
    assert (fog[:2], zigzag[:2]) == (("fog", 1), ("zigzag", 1))
    assert fog[2].labels.tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(fog[2].images[:, 0].numpy(), images[..., 0])
    np.testing.assert_array_equal(zigzag[2].images[:, 0].numpy(), 255 - images[..., 0])
    with pytest.raises(FileNotFoundError, match=r"rain/test_images.npy is missing; .* holds fog, zigzag"):
        next(data.load_corrupted("mnist-c", tmp_path, corruptions=["rain"]))
    np.save(tmp_path / "mnist_c" / "fog" / "test_labels.npy", np.array([1, 2, 3]))
    with pytest.raises(ValueError, match=r"fog/test_labels.npy: 4 images, but 3 labels"):
        next(data.load_corrupted("mnist-c", tmp_path))
    np.save(tmp_path / "mnist_c" / "fog" / "test_labels.npy", np.array([1, 2, 3, 10]))
    with pytest.raises(ValueError, match=r"fog/test_labels.npy has the label 10"):
        next(data.load_corrupted("mnist-c", tmp_path))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("labels", np.arange(15) % 10, "labels.npy is not one block of labels five times over"),
        ("labels", np.zeros(14, int), "labels.npy is not one block of labels five times over"),
        ("labels", np.full(15, 10), "labels.npy has the label 10; expected 0 to 9"),
        ("labels", np.zeros(15), r"labels.npy: expected shape \(N\), integer, got \(15,\), float64"),
        ("labels", np.array(3), r"labels.npy: expected shape \(N\), integer, got \(\), int64"),
        ("fog", np.zeros((15, 3, 32, 32), np.uint8), r"fog.npy: expected shape \(N, 32, 32, 3\), uint8, got \(15, 3, "),
        ("fog", np.zeros((15, 32, 32, 3)), "fog.npy: expected .*, uint8, got .*, float64"),
        ("fog", np.zeros((10, 32, 32, 3), np.uint8), "fog.npy: 10 images, but 15 labels"),
    ],
)
def test_a_wrong_npy(tmp_path, name, array, message):
    write_cifar10_c(tmp_path / "CIFAR-10-C")
    np.save(tmp_path / "CIFAR-10-C" / f"{name}.npy", array)
    with pytest.raises(ValueError, match=message):
        next(data.load_corrupted("cifar10-c", tmp_path))


@pytest.mark.parametrize("name", ["labels", "fog"])
def test_an_npy_that_calls_something_is_refused_uncalled(tmp_path, name):
    folder, called = tmp_path / "CIFAR-10-C", tmp_path / "called"
    write_cifar10_c(folder)
    np.save(folder / f"{name}.npy", np.array([Attack(called)]), allow_pickle=True)
    with pytest.raises(ValueError, match=rf"{name}.npy is not a whole .npy file"):
        next(data.load_corrupted("cifar10-c", tmp_path))
    assert not called.exists()
    np.load(folder / f"{name}.npy", allow_pickle=True)
    assert called.exists()


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:20], lambda b: b"", lambda b: pickle.dumps([1])])
def test_a_damaged_npy(tmp_path, damage):
    write_cifar10_c(tmp_path / "CIFAR-10-C")
    path = tmp_path / "CIFAR-10-C" / "fog.npy"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"fog.npy is not a whole .npy file"):
        next(data.load_corrupted("cifar10-c", tmp_path))


WRITERS = {
    "mnist": ("mnist", write_mnist, classification.MNIST_LAYOUT),
    "cifar10": ("cifar-10-batches-py", write_cifar10, classification.CIFAR10_LAYOUT),
    "cifar100": ("cifar-100-python", write_cifar100, classification.CIFAR100_LAYOUT),
    "svhn": ("svhn", write_svhn, classification.SVHN_LAYOUT),
    "cifar10-c": ("CIFAR-10-C", write_cifar10_c, classification.CIFAR10_C_LAYOUT),
    "mnist-c": ("mnist_c", write_mnist_c, classification.MNIST_C_LAYOUT),
}


def written_but_for(folder, file, write, layout):
    """Write a set, take a file of it away, and return what is to be told of it."""
    write(folder)
    wanted = folder / file
    wanted.unlink()
    return f"^{re.escape(f'{wanted} is missing; expected {layout}. {wanted.parent} holds ')}"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "train-images-idx3-ubyte"),
        ("mnist", "t10k-labels-idx1-ubyte"),
        ("cifar10", "batches.meta"),
        ("cifar10", "test_batch"),
        ("cifar100", "meta"),
        ("cifar100", "train"),
        ("svhn", "test_32x32.mat"),
    ],
)
def test_what_is_missing_is_told_with_the_layout(tmp_path, name, file):
    folder, *rest = WRITERS[name]
    words = written_but_for(tmp_path / folder, file, *rest)
    with pytest.raises(FileNotFoundError, match=words):
        read(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "corruption"),
    [
        ("cifar10-c", "labels.npy", "fog"),
        ("cifar10-c", "snow.npy", "snow"),
        ("mnist-c", "fog/test_images.npy", "fog"),
        ("mnist-c", "zigzag/test_labels.npy", "zigzag"),
    ],
)
def test_what_is_missing_of_corruptions_is_told_with_the_layout(tmp_path, name, file, corruption):
    folder, *rest = WRITERS[name]
    words = written_but_for(tmp_path / folder, file, *rest)
    with pytest.raises(FileNotFoundError, match=words):
        next(data.load_corrupted(name, tmp_path, corruptions=[corruption]))


def test_arrays_stay_in_their_files(tmp_path):
    write_mnist_c(tmp_path)
    assert isinstance(classification._load_npy(tmp_path / "fog" / "test_labels.npy", (), ""), np.memmap)


def test_an_mnist_c_without_corruptions(tmp_path):
    (tmp_path / "mnist_c").mkdir()
    words = f"{tmp_path / 'mnist_c' / 'CORRUPTION'} is missing; expected {classification.MNIST_C_LAYOUT}. {tmp_path}"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(words)}"):
        next(data.load_corrupted("mnist-c", tmp_path))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_training_is_augmented_unless_it_is_not_to_be(tmp_path, name):
    folder, write, _ = WRITERS[name]
    write(tmp_path / folder)
    reader = data.ON_DISK[name][0]
    assert isinstance(reader(tmp_path).train.augment, ShiftFlip)
    assert reader(tmp_path, augment=False).train.augment is None
