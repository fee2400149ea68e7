"""Readers of classification sets as they are distributed. Nothing is downloaded.

Every reader takes `root`, the folder that holds the set's own folder, or that folder itself. A file that is not
there raises FileNotFoundError, one that is not what it should be ValueError.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import scipy.io
import torch
from torch import Tensor

from hem_ext.harness.data.augment import ShiftFlip
from hem_ext.harness.data.base import Data, DataError, Split, check_labels, inside, missing

SEVERITIES = 5
DEFLATE = 1032  # bytes that a byte of a .gz stands for, at most
MAT_HEADER = 256  # bytes that a MATLAB file has before the numbers of a variable, at most
MAT_NUMBERS = (*(f"{sign}int{bits}" for sign in ("u", "") for bits in (8, 16, 32, 64)), "single", "double")

MNIST_LAYOUT = (
    "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, "
    "plain or .gz, in the root or in a folder of the set's name"
)
CIFAR10_LAYOUT = "cifar-10-batches-py/ with data_batch_1 to data_batch_5, test_batch and batches.meta"
CIFAR100_LAYOUT = "cifar-100-python/ with train, test and meta"
SVHN_LAYOUT = "train_32x32.mat and test_32x32.mat, in the root or in svhn/"
CIFAR10_C_LAYOUT = "CIFAR-10-C/ with labels.npy and a CORRUPTION.npy for each corruption"
MNIST_C_LAYOUT = "mnist_c/ with CORRUPTION/test_images.npy and CORRUPTION/test_labels.npy"

# The sets in MNIST's format: the folders that may hold them, the second torchvision's, and their classes.
MNIST_FAMILY = {
    "mnist": (("mnist", "MNIST/raw"), tuple("0123456789")),
    "fashion-mnist": (
        ("fashion-mnist", "FashionMNIST/raw"),
        ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    "kmnist": (("kmnist", "KMNIST/raw"), ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")),
}


def mnist_family(root: Path, name: str) -> Data:
    """MNIST, Fashion-MNIST or KMNIST: 28 x 28 grey pixels, 10 classes, 60,000 to train and 10,000 to test.

    Layout: the four IDX files, plain or gzipped, `train-images-idx3-ubyte` or `train-images.idx3-ubyte`, in
    `root`/NAME, where torchvision puts them, or in `root`.

    Source: Yann LeCun's page of MNIST, which describes the IDX format; arXiv 1708.07747; arXiv 1812.01718.
    """
    folders, classes = MNIST_FAMILY[name]
    # `root` comes last: beside another set's folder it may hold MNIST itself.
    folder = next((root / f for f in folders if (root / f).is_dir()), root)
    train, test = (_idx_split(folder, part, len(classes)) for part in ("train", "t10k"))
    return Data(train=train, validation=None, test=test, classes=classes, channels=1)


def _idx_split(folder: Path, part: str, num_classes: int) -> Split:
    image_file, label_file = _idx_file(folder, f"{part}-images", 3), _idx_file(folder, f"{part}-labels", 1)
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    _check_counts(images, labels, label_file)
    check_labels(labels, num_classes, label_file)
    return Split(images.unsqueeze(1), labels.long())


def _idx_file(folder: Path, stem: str, dims: int) -> Path:
    names = [f"{stem}{dot}idx{dims}-ubyte{suffix}" for dot in "-." for suffix in ("", ".gz")]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise missing(folder / names[0], MNIST_LAYOUT)
    return found


def read_idx(path: Path, dims: int) -> Tensor:
    """An IDX file of bytes, plain or .gz, as uint8 with `dims` dimensions.

    The format: two zero bytes, 8 for unsigned bytes, the number of dimensions, each size as a big-endian uint32,
    then the bytes.

    No more is read than its header declares, however much a .gz goes on to.

    Raises:
        ValueError: another magic number, fewer or more bytes than the sizes say, or a damaged .gz.
    """
    begin, file_size = 4 + 4 * dims, path.stat().st_size
    packed = path.suffix == ".gz"
    with gzip.open(path) if packed else path.open("rb") as file:
        try:
            header = file.read(begin)
            magic, wanted = header[:4].hex(), bytes((0, 0, 8, dims)).hex()
            if magic != wanted:
                raise DataError(
                    f"{path} starts with {magic or 'nothing'}; an IDX file of {dims} dimensions, with {wanted}"
                )
            if len(header) < begin:
                raise DataError(f"{path} ends within its header, after {len(header)} bytes")
            sizes = np.frombuffer(header, ">u4", offset=4).tolist()
            declared = math.prod(sizes)
            # read() sets aside what it is asked for.
            if declared > file_size * (DEFLATE if packed else 1):
                raise DataError(
                    f"{path} should hold {declared} bytes after its header, which a file of {file_size} bytes cannot"
                )
            content = file.read(declared + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is not a whole gzip file: {error}") from error
    if len(content) != declared:
        held = "more" if len(content) > declared else len(content)
        raise DataError(f"{path} should hold {declared} bytes after its header, but holds {held}")
    return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(sizes).copy())


def cifar10(root: Path, augment: bool = True) -> Data:
    """CIFAR-10: 32 x 32 colour pixels, 10 classes, 50,000 to train and 10,000 to test.

    Training shifts and mirrors them, :class:`ShiftFlip`, unless `augment` is false.

    Layout: `cifar-10-batches-py/` as in the "python version", with data_batch_1 to 5, test_batch and batches.meta.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """
    folder = inside(root, "cifar-10-batches-py")
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    data = _cifar(folder, "batches.meta", "label_names", batches, "test_batch", "labels", CIFAR10_LAYOUT)
    return _augmented(data) if augment else data


def cifar100(root: Path, augment: bool = True) -> Data:
    """CIFAR-100: as CIFAR-10, with 100 (fine) classes. Layout: `cifar-100-python/` with train, test and meta."""
    folder = inside(root, "cifar-100-python")
    data = _cifar(folder, "meta", "fine_label_names", ["train"], "test", "fine_labels", CIFAR100_LAYOUT)
    return _augmented(data) if augment else data


def _augmented(data: Data) -> Data:
    return replace(data, train=replace(data.train, augment=ShiftFlip()))


def _cifar(folder: Path, meta: str, names: str, train: list[str], test: str, labels: str, layout: str) -> Data:
    (found,) = _unpickle(folder / meta, layout, [names])
    if not (isinstance(found, list) and all(isinstance(name, bytes | str) for name in found)):
        raise DataError(f"{folder / meta}: expected a list of names, got {_described(found)}")
    classes = tuple(name if isinstance(name, str) else name.decode(errors="replace") for name in found)
    *batches, test_split = (_cifar_batch(folder / file, labels, len(classes), layout) for file in (*train, test))
    train_split = Split(torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches]))
    return Data(train=train_split, validation=None, test=test_split, classes=classes, channels=3)


def _cifar_batch(path: Path, label_key: str, num_classes: int, layout: str) -> Split:
    data, labels = _unpickle(path, layout, ["data", label_key])
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3 * 32 * 32,):
        raise DataError(f"{path}: expected data of shape (N, 3072), uint8, got {_described(data)}")
    if not (isinstance(labels, list) and all(isinstance(label, int) for label in labels)):
        raise DataError(f"{path}: expected a list of labels, got {_described(labels)}")
    _check_counts(data, labels, path)
    check_labels(labels, num_classes, path)
    return Split(torch.from_numpy(data).view(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.int64))


class _Array(np.ndarray):
    """What a pickle gets for NumPy's array, and for what makes one: empty until it is given its state, of bytes.

    NumPy's own is filled with as many pointers as a pickle asks for. With a state of objects that are not there, it
    reads where there are none.
    """

    def __new__(cls, *asked: object) -> _Array:
        return super().__new__(cls, 0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state[-1], bytes):
            raise pickle.UnpicklingError(f"an array is made of bytes, not of {type(state[-1]).__name__}")
        super().__setstate__(state)


def _dtype(code: Any, *copied: Any) -> np.dtype:
    """What a pickle gets for NumPy's dtype: a shared one, which a pickle's state does not change."""
    return np.dtype(np.dtype(code).type)


class _ArrayUnpickler(pickle._Unpickler):
    """Unpickles arrays, bytes, lists and dictionaries, and calls nothing else: a pickle can name any function.

    In Python: that in C fills 16 bytes for every number up to one that the file names, in its memo.
    """

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)
    del dispatch[pickle.BYTEARRAY8[0]]  # fills as many bytes as it is told, here; Python 2 did not write it

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "dtype"):
            return _dtype
        # NumPy 2 moved what NumPy 1 calls numpy.core.
        makers = [(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")]
        if (module, name) in (("numpy", "ndarray"), *makers):
            return _Array
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickle(path: Path, layout: str, keys: list[str]) -> list[Any]:
    if not path.is_file():
        raise missing(path, layout)
    with path.open("rb") as file:
        try:
            content = _ArrayUnpickler(file, encoding="bytes").load()
        # What a damaged pickle raises is not limited to UnpicklingError.
        except Exception as error:
            raise DataError(f"{path} is not a whole CIFAR batch, a pickle of arrays and lists: {error}") from error
    # Python 2 wrote these files, and its strings are bytes.
    if not isinstance(content, dict) or any(key.encode() not in content for key in keys):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path}: expected a dictionary with {' and '.join(keys)}, got {found}")
    return [content[key.encode()] for key in keys]


def svhn(root: Path) -> Data:
    """SVHN's cropped digits: 32 x 32 colour pixels, 10 classes, 73,257 to train and 26,032 to test.

    Layout: train_32x32.mat and test_32x32.mat, in `root`/svhn or in `root`. In them the digit 0 is called 10.

    Source: Netzer et al., Reading Digits in Natural Images with Unsupervised Feature Learning, 2011.
    """
    folder = root / "svhn" if (root / "svhn").is_dir() else root
    train, test = (_svhn_split(folder / f"{part}_32x32.mat") for part in ("train", "test"))
    return Data(train=train, validation=None, test=test, classes=tuple("0123456789"), channels=3)


def _svhn_split(path: Path) -> Split:
    if not path.is_file():
        raise missing(path, SVHN_LAYOUT)
    try:
        packed = path.read_bytes()
        _check_variables(path, packed)
        content = scipy.io.loadmat(io.BytesIO(packed), variable_names=["X", "y"])
    except DataError:
        raise
    # What a damaged file raises is not limited to MatReadError.
    except Exception as error:
        raise DataError(f"{path} is not a whole MATLAB file: {error}") from error
    images, labels = content.get("X"), content.get("y")
    if images is None or images.dtype != np.uint8 or images.shape[:3] != (32, 32, 3) or labels is None:
        raise DataError(f"{path}: expected y, and X of shape (32, 32, 3, N), uint8, got {_described(images)}")
    images, labels = np.moveaxis(images, 3, 0), labels.ravel().astype(np.int64)
    _check_counts(images, labels, path)
    check_labels(labels, 11, path)
    return _from_channels_last(images, labels % 10)


def _check_variables(path: Path, content: bytes) -> None:
    """Raise where X or y of a MATLAB file is not of numbers, or more is packed than a variable declares.

    scipy sets aside as many cells and structures as are declared, and unpacks whatever there is.

    The format: 128 bytes, "IM" or "MI" at their end for the order of bytes, then elements. Each begins with its kind
    and size, as uint32; 15 is what zlib has packed, a variable with all that describes it.
    """
    order = "<" if content[126:128] == b"IM" else ">"
    begin = 128
    while begin + 8 <= len(content):
        kind, size = struct.unpack_from(f"{order}II", content, begin)
        unpacker = zlib.decompressobj()
        head = content[begin : begin + min(8 + size, MAT_HEADER)]
        begin += 8 + size
        if kind == 15:
            head = unpacker.decompress(content[begin - size : begin], MAT_HEADER)
        variables = scipy.io.whosmat(io.BytesIO(content[:128] + head))
        for name, _, dtype in variables:
            if name in ("X", "y") and dtype not in MAT_NUMBERS:
                raise DataError(f"{path}: expected numbers in {name}, got {dtype}")
        declared = sum(math.prod(shape) * (1 if dtype == "uint8" else 8) for _, shape, dtype in variables)
        unpacked = 0
        while packed := unpacker.unconsumed_tail:
            unpacked += len(unpacker.decompress(packed, 2**18))
            if unpacked > declared:
                raise DataError(f"{path} has packed more than the {declared} bytes that a variable of it may take")


def cifar10_c(root: Path, corruptions: Sequence[str] | None = None) -> Iterator[tuple[str, int, Split]]:
    """CIFAR-10-C: CIFAR-10's test images under each corruption at severities 1 to 5.

    One after the other, since all of it takes 3 GB.

    Layout: `CIFAR-10-C/` with one CORRUPTION.npy each, uint8 ``(50000, 32, 32, 3)``, five blocks of 10,000 by
    severity, and labels.npy, ``(50000,)``.

    Args:
        root: the folder that holds `CIFAR-10-C/`.
        corruptions: which; all there are when not given.

    Yields:
        Corruption, severity, split.

    Source: Hendrycks & Dietterich, arXiv 1903.12261.
    """
    folder = inside(root, "CIFAR-10-C")
    label_file = folder / "labels.npy"
    labels = _load_npy(label_file, (), CIFAR10_C_LAYOUT).astype(np.int64)
    check_labels(labels, 10, label_file)
    if len(labels) % SEVERITIES or (labels.reshape(SEVERITIES, -1) != labels[: len(labels) // SEVERITIES]).any():
        raise DataError(f"{label_file} is not one block of labels five times over, once for each severity")
    if corruptions is None:
        corruptions = sorted(path.stem for path in folder.glob("*.npy") if path != label_file)
    for corruption in corruptions:
        path = folder / f"{corruption}.npy"
        images = _load_npy(path, (32, 32, 3), CIFAR10_C_LAYOUT)
        _check_counts(images, labels, path)
        blocks = zip(np.split(images, SEVERITIES), np.split(labels, SEVERITIES), strict=True)
        for severity, block in enumerate(blocks, start=1):
            yield corruption, severity, _from_channels_last(*block)


def mnist_c(root: Path, corruptions: Sequence[str] | None = None) -> Iterator[tuple[str, int, Split]]:
    """MNIST-C: MNIST's test images under each corruption, at the one severity that it has, here 1.

    Layout: `mnist_c/` with one folder each, of test_images.npy, uint8 ``(10000, 28, 28, 1)``, and test_labels.npy.

    Arguments and what is yielded as in :func:`cifar10_c`. The folder `identity` holds MNIST itself.

    Source: Mu & Gilmer, arXiv 1906.02337.
    """
    folder = inside(root, "mnist_c")
    if corruptions is None:
        corruptions = sorted(path.parent.name for path in folder.glob("*/test_images.npy"))
        if not corruptions:
            raise missing(folder / "CORRUPTION", MNIST_C_LAYOUT)
    for corruption in corruptions:
        label_file = folder / corruption / "test_labels.npy"
        images = _load_npy(folder / corruption / "test_images.npy", (28, 28, 1), MNIST_C_LAYOUT)
        labels = _load_npy(label_file, (), MNIST_C_LAYOUT).astype(np.int64)
        _check_counts(images, labels, label_file)
        check_labels(labels, 10, label_file)
        yield corruption, 1, _from_channels_last(images, labels)


def _load_npy(path: Path, item_shape: tuple[int, ...], layout: str) -> np.ndarray:
    """An array ``(N, *item_shape)`` of bytes or, of labels, of any integers, mapped from the file."""
    if not path.is_file():
        raise missing(path, layout)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} is not a whole .npy file: {error}") from error
    wanted = np.uint8 if item_shape else np.integer
    if array.shape[1:] != item_shape or array.ndim == 0 or not np.issubdtype(array.dtype, wanted):
        shape = ", ".join(["N", *map(str, item_shape)])
        raise DataError(f"{path}: expected shape ({shape}), {wanted.__name__}, got {_described(array)}")
    return array


def _from_channels_last(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(torch.from_numpy(np.moveaxis(images, -1, 1).copy(order="C")), torch.from_numpy(labels))


def _check_counts(images: Sequence | Tensor, labels: Sequence | Tensor, source: Path) -> None:
    if len(images) != len(labels):
        raise DataError(f"{source}: {len(images)} images, but {len(labels)} labels")


def _described(data: Any) -> str:
    return f"{data.shape}, {data.dtype}" if isinstance(data, np.ndarray) else type(data).__name__
