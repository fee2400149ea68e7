"""Readers of segmentation sets as they are distributed. Nothing is downloaded.

Every reader takes `root`, the folder that holds the set's own folder, or that folder itself, and `crop`, the side
of the training crops. A file that is not there raises FileNotFoundError, one that is not what it should be
ValueError. Pictures are decoded when they are asked for; those of the test part are whole, each of its own size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from hem_ext.harness.data.base import Data, Sample, check_labels, image_tensor, inside, missing

IGNORE = 255
Pair = tuple[Path, Path]  # a picture and its label map

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
    is black, and its label 255.

    Args:
        size: side of the square.
        scales: between these the factor is uniform.
    """

    size: int
    scales: tuple[float, float] = (0.5, 2.0)

    def __call__(self, image: Image.Image, label: Image.Image) -> tuple[Image.Image, Image.Image]:
        """An RGB picture and its 8-bit labels, both ``(W, H)``, to crops of `size`."""
        low, high = self.scales
        scale = low + (high - low) * torch.rand(()).item()
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        label = label.resize((width, height), Image.Resampling.NEAREST)

        border = (0, 0, max(0, self.size - width), max(0, self.size - height))
        image, label = ImageOps.expand(image, border, fill=0), ImageOps.expand(label, border, fill=IGNORE)
        left, top = (int(torch.randint(side - self.size + 1, ())) for side in image.size)
        box = (left, top, left + self.size, top + self.size)
        image, label = image.crop(box), label.crop(box)
        if torch.rand(()).item() < 0.5:
            image, label = ImageOps.mirror(image), ImageOps.mirror(label)
        return image, label


@dataclass(frozen=True, eq=False)
class SegmentationFiles(Dataset[Sample]):
    """Pairs of a picture and its label map: float32 ``(3, H, W)`` in [0, 1] and int64 ``(H, W)``.

    Args:
        pairs: their files. A label map is a picture of one byte a pixel, the id of its class.
        mapping: uint8 ``(256,)``, the label of each id.
        num_classes: every other label than these and 255 is an error.
        transform: of picture and labels together; they are left whole without.
    """

    pairs: tuple[Pair, ...]
    mapping: np.ndarray
    num_classes: int
    transform: ScaleCropFlip | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        image_file, label_file = self.pairs[index]
        labels = Image.fromarray(self._labels(index))
        with Image.open(image_file) as image:
            picture = image.convert("RGB")
        if labels.size != picture.size:
            raise ValueError(f"{label_file} is {labels.size} pixels large, but {image_file} {picture.size}")
        if self.transform is not None:
            picture, labels = self.transform(picture, labels)
        return image_tensor(picture), torch.from_numpy(np.array(labels)).long()

    def label_map(self, index: int) -> Tensor:
        """The labels of a whole picture, int64 ``(H, W)``, whatever the transform."""
        return torch.from_numpy(self._labels(index)).long()

    def _labels(self, index: int) -> np.ndarray:
        _, file = self.pairs[index]
        with Image.open(file) as ids:
            if ids.mode not in ("L", "P"):
                raise ValueError(f"{file} has mode {ids.mode}; expected one byte a pixel, the id of its class")
            labels = self.mapping[np.asarray(ids)]
        check_labels(labels, self.num_classes, file, also=(IGNORE,))
        return labels


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
        names = ids.read_text().split()
        if not names:
            raise ValueError(f"{ids} names no picture; expected one ID a line")
        return [(folder / "JPEGImages" / f"{name}.jpg", folder / "SegmentationClass" / f"{name}.png") for name in names]

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
    names = tuple(line.split("\t")[-1].strip() for line in file.read_text().splitlines()[1:] if line.strip())
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
    return Data(
        SegmentationFiles(tuple(train), mapping, len(classes), ScaleCropFlip(crop)),
        SegmentationFiles(tuple(test), mapping, len(classes)),
        classes,
        channels=3,
        ignore_index=IGNORE,
    )
