"""Readers of folders of your own: pictures in a folder for each class, and pictures with a mask each.

Both take their parts alike. `train/` and a second part, `val/`, `valid/`, `validation/` or `test/`, which is the test
part; or these three: `train/`, one of the middle names for validation, and `test/`; or no parts, where a fifth, drawn
by a fixed seed, becomes the test part. A part's folder without what a part holds is none: ImageNet's `test/`, whose
pictures have no classes, is not read. Names that begin with a dot are not read either.

Pictures are turned upright as their EXIF says. So is a mask that has EXIF itself; any other is taken as it is stored.

A file that is not there raises FileNotFoundError, one that is not what it should be ValueError.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hem_ext.harness.data.augment import ResizedCropFlip
from hem_ext.harness.data.base import Data, DataError, missing, read_text, split_off
from hem_ext.harness.data.pictures import IMAGE_SUFFIXES, ImageFiles, leave_out_broken, picture_size, read_picture
from hem_ext.harness.data.segmentation import IGNORE, Decode, Pair, ScaleCropFlip, SegmentationFiles

VALIDATION_NAMES = ("val", "valid", "validation")
TEST_SHARE = 0.2
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".webp")
IGNORE_16 = 65535  # ignored in place of 255 where labels go beyond that
IGNORED_NAME = "ignore"
COLOUR_COLUMNS = (("name", "red", "green", "blue"), ("name", "r", "g", "b"))

_PARTS = "in train/ and in val/, valid/, validation/ or test/, or straight in the root"
IMAGE_FOLDER_LAYOUT = f"CLASS/*.JPEG (or .jpg, .png, .webp, .bmp) {_PARTS}"
MASK_FOLDER_LAYOUT = f"images/STEM.jpg (or .jpeg, .png, .webp, .bmp) and masks/STEM.png (or .bmp, .tif, .webp) {_PARTS}"


def image_folder(root: Path, size: int = 224, augment: bool = True, skip_broken: bool = False) -> Data:
    """Pictures in a folder for each class, as ImageNet has them: `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`.

    The folders' names, sorted, are the classes. No picture is opened before it is asked for.

    Args:
        root: the folder that holds the parts or, where there are none, the classes' folders; see the module.
        size: of the images, as :class:`ImageFiles` gives them.
        augment: whether training takes random parts of the pictures, :class:`ResizedCropFlip`.
        skip_broken: decode every picture once, and leave the broken ones out with a warning.

    Raises:
        ValueError: one class alone, parts with other classes than each other, a class of broken pictures only or, where
            there are no parts, of fewer than three.
        FileNotFoundError: a part without classes, or a class without a picture.
    """
    folders = _find_parts(root, lambda folder: bool(_class_folders(folder)), "CLASS", IMAGE_FOLDER_LAYOUT)
    classes = _class_folders(folders[0])
    if not classes:
        raise missing(root / "train" / "CLASS", IMAGE_FOLDER_LAYOUT)
    if len(classes) == 1:
        raise ValueError(f"{folders[0]} holds one class alone, {classes[0]}; expected two or more")
    for folder in folders[1:]:
        differing = sorted(set(classes) ^ set(_class_folders(folder)))
        if differing:
            names = f"{folders[0].name} and {folder.name}"
            raise ValueError(f"{root}: {names} must hold the same classes; {differing[0]} is in one of them alone")
    files = [_labelled_files(folder, classes) for folder in folders]
    if skip_broken:
        files = leave_out_broken(files, lambda sample: [Path(sample[0])])
        for folder, left in zip(folders, files, strict=True):
            lost = sorted(set(range(len(classes))) - {label for _, label in left})
            if lost:
                raise ValueError(f"{folder / classes[lost[0]]} holds broken pictures only")
    train, validation, test = _three_parts([ImageFiles(tuple(part), size) for part in files], classes)
    if augment:
        train = replace(train, augment=ResizedCropFlip(size))
    return Data(train=train, validation=validation, test=test, classes=classes, channels=3)


def mask_folder(
    root: Path,
    crop: int | None = None,
    binary: bool | None = None,
    augment: bool = True,
    skip_broken: bool = False,
) -> Data:
    """Pictures and, under the same stem, a mask that says the class of each pixel: `images/a.jpg`, `masks/a.png`.

    A mask has one byte a pixel, one bit or, for up to 65,535 classes, 16 bits: the label, and 255 for a pixel that does
    not count (65535 where labels go beyond 255). Or it has the colours that `classes.csv` in `root` lists.
    Its format keeps what was drawn: .png, .bmp, .tif, .tiff, or .webp without loss. A mask without a picture is not
    read.

    The classes' names come from `classes.txt` in `root`, one a line from label 0 on, or from `classes.csv` with the
    columns name, red, green, blue (or r, g, b), whose row "ignore", if there is one, has the colour of what does not
    count. Without either file every training mask is opened once (every mask where there are no parts): the largest
    label is the last class, and "0", "1" ... are the names. With classes.txt, training masks are opened until one
    holds something else than 0 and 255.

    Args:
        root: the folder that holds the parts or, where there are none, `images/` and `masks/`; see the module.
        crop: side of the square parts that training takes after a random scale, :class:`ScaleCropFlip`; None for the
            whole pictures, which then must be of one size.
        binary: what 255 is in masks that hold nothing but 0 and 255: true for class 1, false for ignored.
        augment: whether training mirrors at random, and crops; without, it gets the whole pictures as they are.
        skip_broken: decode every picture and mask once, and leave the pairs with a broken one out with a warning.

    Raises:
        ValueError: masks of 0 and 255 alone and `binary` not given, pictures that need a `crop`, two files of one stem
            or, where there are no parts, fewer than three pairs; when a pair is asked for, a mask of another size than
            its picture's, an unknown label or colour.
        FileNotFoundError: a part without pictures, or a picture without a mask.
    """
    folders = _find_parts(root, lambda folder: (folder / "images").is_dir(), "images", MASK_FOLDER_LAYOUT)
    pairs = [_pairs(folder) for folder in folders]
    if skip_broken:
        pairs = leave_out_broken(pairs, lambda pair: pair)
        empty = next((folder for folder, left in zip(folders, pairs, strict=True) if not left), None)
        if empty is not None:
            raise ValueError(f"{empty} holds broken pictures only")
    classes, ignore, decode = _labelling(root, [mask for _, mask in pairs[0]], binary)
    parts = [SegmentationFiles(tuple(part), decode, len(classes), ignore) for part in pairs]
    train, validation, test = _three_parts(parts, classes)
    if crop is None or not augment:
        _check_one_size([picture for picture, _ in train.pairs])
    if augment:
        train = replace(train, augment=ScaleCropFlip(crop, ignore=ignore))
    return Data(train=train, validation=validation, test=test, classes=classes, channels=3, ignore_index=ignore)


def _find_parts(root: Path, is_part: Callable[[Path], bool], example: str, layout: str) -> list[Path]:
    """The folders of training, perhaps validation, and test part, in this order; or `root` alone."""
    train, test = root / "train", root / "test"
    if not is_part(train):
        return [root]
    middle = [root / name for name in VALIDATION_NAMES if is_part(root / name)]
    if len(middle) > 1:
        raise ValueError(f"{root} holds {' and '.join(folder.name for folder in middle)}; expected one of them")
    rest = [*middle, *([test] if is_part(test) else [])]
    if not rest:
        raise missing(root / "val" / example, layout)
    return [train, *rest]


def _three_parts(parts: list[Any], classes: tuple[str, ...]) -> tuple[Any, Any, Any]:
    """Training, validation, or None in its place, and test part."""
    if len(parts) == 1:
        # The validation part is split off later, and is to find a sample of every class.
        parts = split_off(parts[0], TEST_SHARE, classes=classes, parts=("training", "validation", "test"))
    train, *middle, test = parts
    return train, middle[0] if middle else None, test


def _class_folders(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        return ()
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))


def _labelled_files(folder: Path, classes: tuple[str, ...]) -> list[tuple[str, int]]:
    result = []
    for label, name in enumerate(classes):
        files = _files(folder / name, IMAGE_SUFFIXES)
        if not files:
            raise missing(folder / name / "*.JPEG", IMAGE_FOLDER_LAYOUT)
        result.extend((str(path), label) for path in files)
    return result


def _pairs(folder: Path) -> list[Pair]:
    pictures = _by_stem(folder / "images", IMAGE_SUFFIXES, "picture")
    if not pictures:
        raise missing(folder / "images" / "*.jpg", MASK_FOLDER_LAYOUT)
    masks = _by_stem(folder / "masks", MASK_SUFFIXES, "mask")
    for stem, picture in pictures.items():
        if stem not in masks:
            raise missing(folder / "masks" / f"{stem}.png", f"a mask for {picture}, {', '.join(MASK_SUFFIXES)}")
    return [(picture, masks[stem]) for stem, picture in pictures.items()]


def _by_stem(folder: Path, suffixes: Sequence[str], what: str) -> dict[str, Path]:
    result: dict[str, Path] = {}
    for file in _files(folder, suffixes):
        if file.stem in result:
            raise ValueError(f"{folder} holds {result[file.stem].name} and {file.name}; expected one {what} of a stem")
        result[file.stem] = file
    return result


def _check_one_size(pictures: Sequence[Path]) -> None:
    first = picture_size(pictures[0])
    for file in pictures:
        size = picture_size(file)
        if size != first:
            raise ValueError(
                f"{pictures[0]} is {first} pixels large, and {file} {size}: training pictures of several sizes need "
                "crop, the side of the parts that training takes, and augment"
            )


def _labelling(root: Path, masks: Sequence[Path], binary: bool | None) -> tuple[tuple[str, ...], int, Decode]:
    """The classes' names, the label that is ignored, and what turns a mask into labels."""
    names, colours = root / "classes.txt", root / "classes.csv"
    if colours.is_file():
        if names.is_file():
            raise ValueError(f"{root} holds classes.txt and classes.csv; expected one of them")
        if binary is not None:
            raise ValueError(f"binary={binary} says what 255 is, but {colours} gives every class a colour")
        return _read_colours(colours)
    decode = Labels(binary=bool(binary))
    if names.is_file():
        classes = _checked(names, read_text(names).splitlines())
        if binary and len(classes) != 2:
            raise ValueError(f"{names} names {len(classes)} classes; binary masks have two")
        if binary is None:
            _check_binary(map(partial(_values, decode=decode), masks), masks)
        return classes, IGNORE if len(classes) <= IGNORE else IGNORE_16, decode
    if binary:
        return ("0", "1"), IGNORE, decode
    with ThreadPool() as pool:  # decoding sets the interpreter free
        values = set().union(*pool.imap(partial(_values, decode=decode), masks))
    if binary is None:
        _check_binary([values], masks)
    ignored = IGNORE if max(values) <= IGNORE else IGNORE_16
    last = max(values - {ignored}, default=0)
    if last == 0:
        raise ValueError(
            f"the masks in {masks[0].parent} hold no label but 0 and the ignored {ignored}; expected two classes or "
            f"more, or their names in {names}"
        )
    return tuple(str(label) for label in range(last + 1)), ignored, decode


def _values(mask: Path, decode: Decode) -> set[int]:
    return set(np.unique(decode(read_picture(mask), mask)).tolist())


def _check_binary(values: Iterable[set[int]], masks: Sequence[Path]) -> None:
    """Raise where there is nothing but 0 and 255; the first mask that holds something else ends the search."""
    seen: set[int] = set()
    for found in values:
        seen |= found
        if not seen <= {0, IGNORE}:
            return
    if IGNORE in seen:
        raise ValueError(
            f"the masks in {masks[0].parent} hold only 0 and 255: is 255 the foreground (option binary=True makes it "
            "class 1), or is it ignored (binary=False)?"
        )


def _checked(file: Path, names: Sequence[str]) -> tuple[str, ...]:
    classes = tuple(name.strip() for name in names if name.strip())
    twice = next((name for name in classes if classes.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{file} names the class {twice} twice")
    if len(classes) < 2:
        raise ValueError(f"{file} names {len(classes)} classes; expected two or more")
    return classes


def _read_colours(file: Path) -> tuple[tuple[str, ...], int, Decode]:
    try:
        read = list(csv.reader(io.StringIO(read_text(file), newline="")))
    except csv.Error as error:
        raise DataError(f"{file} is not a table of names and colours: {error}") from error
    rows = [[cell.strip() for cell in row] for row in read if any(cell.strip() for cell in row)]
    header = [cell.lower() for cell in rows[0]] if rows else []
    columns = next((columns for columns in COLOUR_COLUMNS if set(columns) <= set(header)), None)
    if columns is None:
        raise ValueError(f"{file} has the header {','.join(header)}; expected name,red,green,blue or name,r,g,b")
    places = [header.index(column) for column in columns]
    names: list[str] = []
    colours: dict[tuple[int, ...], str] = {}
    for row in rows[1:]:
        name, *cells = [row[place] if place < len(row) else "" for place in places]
        if not name or not all(cell.isdecimal() and len(cell) < 4 and int(cell) < 256 for cell in cells):
            raise ValueError(f"{file}: expected a name and three numbers from 0 to 255, got {','.join(row)}")
        colour = tuple(map(int, cells))
        if colour in colours:
            raise ValueError(f"{file} gives {colours[colour]} and {name} the same colour {colour}")
        colours[colour] = name
        if name.lower() != IGNORED_NAME:
            names.append(name)
    classes = _checked(file, names)
    ignored = IGNORE if len(classes) <= IGNORE else IGNORE_16
    labels = {name: label for label, name in enumerate(classes)}
    order = sorted(colours)
    decode = Colours(
        _code(np.array(order)),
        np.array([labels.get(colours[colour], ignored) for colour in order], dtype=np.int32),
    )
    return classes, ignored, decode


def _code(colours: np.ndarray) -> np.ndarray:
    """Red, green and blue in the last dimension, as one number."""
    return colours.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)


@dataclass(frozen=True)
class Labels:
    """Masks whose pixels are the labels themselves; `binary` ones have 255 for class 1."""

    binary: bool = False

    def __call__(self, mask: Image.Image, file: Path) -> np.ndarray:
        """Labels uint8 or int32 ``(H, W)``."""
        if file.suffix.lower() == ".webp":
            mask = _grey(mask, file)
        if not (mask.mode in ("1", "L", "P", "I") or mask.mode.startswith("I;16")):
            raise DataError(
                f"{file} has mode {mask.mode}; expected one number a pixel, its label, or, where masks have colours, "
                "a classes.csv in the root that lists them"
            )
        values = np.asarray(mask)
        if self.binary and mask.mode != "1":
            other = values[(values != 0) & (values != IGNORE)]
            if other.size:
                raise DataError(f"{file} has the value {other[0]}; expected 0 and 255 alone, since binary is set")
            values = values == IGNORE
        if mask.mode == "I" and not 0 <= values.min() <= values.max() <= IGNORE_16:
            raise DataError(f"{file} has labels from {values.min()} to {values.max()}; expected 0 to {IGNORE_16}")
        return values.astype(np.uint8 if values.dtype in (np.bool_, np.uint8) else np.int32)


@dataclass(frozen=True, eq=False)
class Colours:
    """Masks in colours: `codes` int32 ``(K,)`` in rising order, and the label of each, int32 ``(K,)``."""

    codes: np.ndarray
    labels: np.ndarray

    def __call__(self, mask: Image.Image, file: Path) -> np.ndarray:
        """Labels int32 ``(H, W)``."""
        if file.suffix.lower() == ".webp":
            _check_lossless(file)
        if mask.mode not in ("RGB", "RGBA", "P"):
            raise DataError(f"{file} has mode {mask.mode}; expected the colours that classes.csv lists")
        codes = _code(np.asarray(mask.convert("RGB")))
        places = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
        unlisted = codes[self.codes[places] != codes]
        if unlisted.size:
            colour = tuple(int(unlisted[0]) >> shift & 255 for shift in (16, 8, 0))
            raise DataError(f"{file} has the colour {colour}, which classes.csv does not list")
        return self.labels[places]


def _grey(mask: Image.Image, file: Path) -> Image.Image:
    """A .webp file always has three colours: one of them, since in a mask of labels they are the same."""
    _check_lossless(file)
    low, *others = mask.convert("RGB").split()
    return low if all(low.tobytes() == other.tobytes() for other in others) else mask


def _check_lossless(file: Path) -> None:
    # A RIFF file: 12 bytes, then chunks of a name, a size, and that many bytes, filled up to an even number.
    content = file.read_bytes()
    at = 12
    while at < len(content):
        name, size = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        if name == b"VP8 ":
            raise DataError(f"{file} was compressed with loss, which changes labels; expected a lossless mask")
        at += 8 + size + size % 2
