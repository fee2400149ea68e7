"""Readers of segmentation sets as they are distributed. Nothing is downloaded.

Every reader takes `root`, the folder that holds the set's own folder, or that folder itself, and `crop`, the side
of the training crops. A file that is not there raises FileNotFoundError, one that is not what it should be
ValueError. Pictures are decoded when they are asked for, whole, each of its own size, but in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from hem_ext.harness.data.base import (
    Data,
    DataError,
    Sample,
    check_labels,
    image_tensor,
    inside,
    listed,
    missing,
    read_text,
)
from hem_ext.harness.data.pictures import picked, read_picture, read_rgb

IGNORE = 255
Pair = tuple[Path, Path]  # a picture and its label map
Decode = Callable[[Image.Image, Path], np.ndarray]  # a label map and its file to labels, uint8 or int32 (H, W)

VOC_LAYOUT = "VOCdevkit/VOC2012/ with JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/{train,val}.txt"
CITYSCAPES_LAYOUT = "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelIds.png"
ADE20K_LAYOUT = "ADEChallengeData2016/ with images/{training,validation}/*.jpg and annotations/.../*.png"

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
CITYSCAPES_CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
# The label id of each; every other id is ignored.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
ADE20K_CLASSES = 150


@dataclass(frozen=True)
class ScaleCropFlip:
    """A random scale, a random square of it, and a flip from left to right one time in two.

    Draws from torch's global generator, which DataLoader seeds in each worker. What a small picture does not fill
    is black, and its label `ignore`.

    Args:
        size: side of the square; None for the whole picture, which is flipped alone.
        scales: between these the factor is uniform.
        ignore: the label that does not count.
    """

    size: int | None
    scales: tuple[float, float] = (0.5, 2.0)
    ignore: int = IGNORE

    def __call__(self, image: Image.Image, label: Image.Image) -> tuple[Image.Image, Image.Image]:
        """An RGB picture and its labels, in 8 or 32 bits, both ``(W, H)``, to crops of `size`."""
        if self.size is not None:
            image, label = self._cropped(image, label, self.size)
        if torch.rand(()).item() < 0.5:
            image, label = ImageOps.mirror(image), ImageOps.mirror(label)
        return image, label

    def _cropped(self, image: Image.Image, label: Image.Image, size: int) -> tuple[Image.Image, Image.Image]:
        low, high = self.scales
        scale = low + (high - low) * torch.rand(()).item()
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        label = label.resize((width, height), Image.Resampling.NEAREST)

        border = (0, 0, max(0, size - width), max(0, size - height))
        image, label = ImageOps.expand(image, border), ImageOps.expand(label, border, fill=self.ignore)
        left, top = (int(torch.randint(side - size + 1, ())) for side in image.size)
        box = (left, top, left + size, top + size)
        return image.crop(box), label.crop(box)


@dataclass(frozen=True, eq=False)
class Ids:
    """Label maps of one byte a pixel, the id of its class.

    Args:
        mapping: uint8 ``(256,)``, the label of each id.
    """

    mapping: np.ndarray

    def __call__(self, ids: Image.Image, file: Path) -> np.ndarray:
        """Labels uint8 ``(H, W)``."""
        if ids.mode not in ("L", "P"):
            raise DataError(f"{file} has mode {ids.mode}; expected one byte a pixel, the id of its class")
        return self.mapping[np.asarray(ids)]


@dataclass(frozen=True, eq=False)
class SegmentationFiles(Dataset[Sample]):
    """Pairs of a picture and its label map: float32 ``(3, H, W)`` in [0, 1] and int64 ``(H, W)``.

    They are decoded when they are asked for; what is wrong with a file raises ValueError then.

    Args:
        pairs: their files.
        decode: the labels of a label map, uint8 or int32 ``(H, W)``, given its picture and its file.
        num_classes: every other label than these and `ignore` is an error.
        ignore: the label that does not count.
        augment: what training does to picture and labels together; they are left whole otherwise.
    """

    pairs: tuple[Pair, ...]
    decode: Decode
    num_classes: int
    ignore: int = IGNORE
    augment: ScaleCropFlip | None = None
    training: bool = False

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        image_file, label_file = self.pairs[index]
        labels = Image.fromarray(self._labels(index))
        picture = read_rgb(image_file)
        if labels.size != picture.size:
            raise DataError(f"{label_file} is {labels.size} pixels large, but {image_file} {picture.size}")
        if self.training and self.augment is not None:
            picture, labels = self.augment(picture, labels)
        return image_tensor(picture), torch.from_numpy(np.array(labels)).long()

    def label_map(self, index: int) -> Tensor:
        """The labels of a whole picture, int64 ``(H, W)``, in training too."""
        return torch.from_numpy(self._labels(index)).long()

    def _labels(self, index: int) -> np.ndarray:
        _, file = self.pairs[index]
        labels = self.decode(read_picture(file), file)
        check_labels(labels, self.num_classes, file, also=(self.ignore,))
        return labels

    def take(self, indices: Tensor) -> SegmentationFiles:
        """As :meth:`Split.take`."""
        return replace(self, pairs=picked(self.pairs, indices))

    def for_training(self) -> SegmentationFiles:
        """As :meth:`Split.for_training`."""
        return replace(self, training=True)


def voc2012(root: Path, crop: int = 512) -> Data:
    """PASCAL VOC 2012: 20 classes and the background, 1464 to train and 1449 to test; 255 marks borders.

    Layout: `VOCdevkit/VOC2012/` with `JPEGImages/ID.jpg`, `SegmentationClass/ID.png`, and the IDs, one a line,
    in `ImageSets/Segmentation/train.txt` and `val.txt`.

    Source: Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 2010.
    """
    folder = inside(root, "VOCdevkit/VOC2012")

    def pairs(part: str) -> list[Pair]:
        ids = folder / "ImageSets" / "Segmentation" / f"{part}.txt"
        if not ids.is_file():
            raise missing(ids, VOC_LAYOUT)
        names = read_text(ids).split()
        if not names:
            raise ValueError(f"{ids} names no picture; expected one ID a line")
        pictures, labels = folder / "JPEGImages", folder / "SegmentationClass"
        return [(listed(pictures, f"{name}.jpg", ids), listed(labels, f"{name}.png", ids)) for name in names]

    return _data(pairs("train"), pairs("val"), np.arange(256, dtype=np.uint8), VOC_CLASSES, crop, VOC_LAYOUT)


def cityscapes(root: Path, crop: int = 768) -> Data:
    """Cityscapes: 19 classes of street scenes, 2048 x 1024 pixels, 2975 to train and 500 to test.

    Layout: `leftImg8bit/{train,val}/CITY/*_leftImg8bit.png` and `gtFine/{train,val}/CITY/*_gtFine_labelIds.png` in
    `root` or in `root`/cityscapes. The ids become the 19 classes of the benchmark, the others 255.

    Source: Cordts et al., arXiv 1604.01685.
    """
    folder = root / "cityscapes" if (root / "cityscapes").is_dir() else root

    def pairs(part: str) -> list[Pair]:
        return [
            (image, folder / "gtFine" / part / image.parent.name / image.name.replace("leftImg8bit", "gtFine_labelIds"))
            for image in _pictures(folder / "leftImg8bit" / part, "*/*_leftImg8bit.png", CITYSCAPES_LAYOUT)
        ]

    mapping = np.full(256, IGNORE, dtype=np.uint8)
    mapping[list(CITYSCAPES_IDS)] = np.arange(len(CITYSCAPES_CLASSES))
    return _data(pairs("train"), pairs("val"), mapping, CITYSCAPES_CLASSES, crop, CITYSCAPES_LAYOUT)


def ade20k(root: Path, crop: int = 512) -> Data:
    """ADE20K as of the scene parsing challenge: 150 classes, 20,210 to train and 2000 to test.

    Layout: `ADEChallengeData2016/` with `images/{training,validation}/*.jpg`, `annotations/{training,validation}/*.png`
    and, for the names of the classes, which are numbers without it, `objectInfo150.txt`. The label 0, "other", is
    ignored, the rest minus 1.

    Source: Zhou et al., arXiv 1608.05442.
    """
    folder = inside(root, "ADEChallengeData2016")

    def pairs(part: str) -> list[Pair]:
        return [
            (image, folder / "annotations" / part / f"{image.stem}.png")
            for image in _pictures(folder / "images" / part, "*.jpg", ADE20K_LAYOUT)
        ]

    mapping = ((np.arange(256) - 1) % 256).astype(np.uint8)
    return _data(pairs("training"), pairs("validation"), mapping, _ade20k_classes(folder), crop, ADE20K_LAYOUT)


def _ade20k_classes(folder: Path) -> tuple[str, ...]:
    file = folder / "objectInfo150.txt"
    if not file.is_file():
        return tuple(str(number) for number in range(1, ADE20K_CLASSES + 1))
    # A heading, then a line for each class: number, statistics and, last, its names, separated by tabs.
    names = tuple(line.split("\t")[-1].strip() for line in read_text(file).splitlines()[1:] if line.strip())
    if len(names) != ADE20K_CLASSES:
        raise ValueError(
            f"{file}: expected a heading and {ADE20K_CLASSES} lines, got {len(names)} lines after the first"
        )
    return names


def _pictures(folder: Path, pattern: str, layout: str) -> list[Path]:
    found = sorted(folder.glob(pattern))
    if not found:
        raise missing(folder / pattern, layout)
    return found


def _data(
    train: list[Pair], test: list[Pair], mapping: np.ndarray, classes: tuple[str, ...], crop: int, layout: str
) -> Data:
    for file in (file for pair in (*train, *test) for file in pair):
        if not file.is_file():
            raise missing(file, layout)
    train_files, test_files = (SegmentationFiles(tuple(pairs), Ids(mapping), len(classes)) for pairs in (train, test))
    return Data(
        train=replace(train_files, augment=ScaleCropFlip(crop)),
        validation=None,
        test=test_files,
        classes=classes,
        channels=3,
        ignore_index=IGNORE,
    )
