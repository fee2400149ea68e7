"""Picture files: decoded, found to be broken, and as a data set."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from hem_ext.harness.data.base import DataError, Sample, image_tensor

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""What a picture may be, whatever its suffix says. Pillow knows more, and runs Ghostscript for EPS."""
LYING = (5, 6, 7, 8)  # EXIF's orientations that exchange width and height

AnySample = TypeVar("AnySample")


def read_picture(file: Path, enough: int | None = None) -> Image.Image:
    """A picture, wholly decoded, in the mode that its file has, and upright: turned and mirrored as its EXIF says.

    Args:
        file: which.
        enough: a JPEG may be decoded at a fraction of its size, as long as no side gets shorter than this.

    Raises:
        ValueError: a file that is cut short, damaged or no picture.
    """
    with _opened(file) as image:
        if enough is not None:
            image.draft(None, (enough, enough))
        image.load()
        with suppress(Exception):  # damaged EXIF, of which the picture itself has no need
            ImageOps.exif_transpose(image, in_place=True)
        return image


def picture_size(file: Path) -> tuple[int, int]:
    """Width and height of the upright picture, of which only the header is read; errors as of :func:`read_picture`."""
    with _opened(file) as image:
        width, height = image.size
        lying = False
        with suppress(Exception):
            # Not image.getexif(), for which a PNG is decoded.
            lying = Image.Image.getexif(image).get(ExifTags.Base.Orientation) in LYING
        return (height, width) if lying else (width, height)


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(file, formats=FORMATS) as image:
            yield image
    # What a damaged picture raises is not limited to OSError.
    except Exception as error:
        # The system's own errors say nothing of the picture: a file that is not there, too many open files.
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise
        reason = "its format is not known" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{file} is broken, or no picture: {reason}") from error


def read_rgb(file: Path, enough: int | None = None) -> Image.Image:
    """As :func:`read_picture`, in red, green and blue of a byte each; 16 bits of grey become 8.

    Raises:
        ValueError: as there, and where a pixel has 32 bits, whose range nothing tells.
    """
    image = read_picture(file, enough)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise DataError(f"{file} has mode {image.mode}, 32 bits of grey; expected 8 or 16 bits")
    return image.convert("RGB")


def leave_out_broken(
    parts: Sequence[Sequence[AnySample]], files: Callable[[AnySample], Sequence[Path]]
) -> list[list[AnySample]]:
    """Parts without the samples of which a file is broken: every file is decoded once.

    Warns, once, of how many are left out.

    Args:
        parts: of the data set.
        files: the pictures of a sample.
    """
    kept, broken = [], []
    with ThreadPool() as pool:  # decoding sets the interpreter free
        for part in parts:
            found = list(pool.imap(lambda sample: _first_broken(files(sample)), part, chunksize=16))
            kept.append([sample for sample, file in zip(part, found, strict=True) if file is None])
            broken += [str(file) for file in found if file is not None]
    if broken:
        rest = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        count = sum(map(len, parts))
        warnings.warn(
            f"{len(broken)} of {count} samples are left out, since their pictures are broken: "
            f"{', '.join(broken[:3])}{rest}",
            stacklevel=3,
        )
    return kept


def _first_broken(files: Sequence[Path]) -> Path | None:
    for file in files:
        try:
            read_picture(file)
        except ValueError:
            return file
    return None


@dataclass(frozen=True)
class ImageFiles(Dataset[Sample]):
    """Picture files, decoded when they are asked for: float32 ``(3, size, size)`` in [0, 1] and int64 ``()``.

    The shorter side is resized to `size` and the middle cut out; in training `augment` does both its own way. A broken
    picture raises ValueError when it is asked for.
    """

    files: tuple[tuple[str, int], ...]  # paths, as strings since ImageNet has a million, with the label of each
    size: int
    augment: Callable[[Image.Image], Image.Image] | None = None
    training: bool = False

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        path, label = self.files[index]
        if self.training and self.augment is not None:
            image = self.augment(read_rgb(Path(path)))
        else:
            size = (self.size, self.size)
            image = ImageOps.fit(read_rgb(Path(path), enough=self.size), size, Image.Resampling.BILINEAR)
        return image_tensor(image), torch.tensor(label)

    @property
    def labels(self) -> Tensor:
        """int64 ``(N,)``, without opening a file."""
        return torch.tensor([label for _, label in self.files])

    def take(self, indices: Tensor) -> ImageFiles:
        """As :meth:`Split.take`."""
        return replace(self, files=picked(self.files, indices))

    def for_training(self) -> ImageFiles:
        """As :meth:`Split.for_training`."""
        return replace(self, training=True)


def picked(samples: tuple[AnySample, ...], indices: Tensor) -> tuple[AnySample, ...]:
    """Those at `indices`, int64 ``(M,)``, or where a bool ``(N,)`` is true."""
    positions = indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices
    return tuple(samples[i] for i in positions.tolist())
