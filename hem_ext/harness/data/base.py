"""What every data set is made of, and what a reader says when a file is not there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset

Sample = tuple[Tensor, Tensor]


class DataError(ValueError):
    """A file of a data set does not hold what it should: that may show when it is read, in the middle of a training."""


@dataclass(frozen=True, eq=False)
class Split(Dataset[Sample]):
    """Labelled images in memory.

    Args:
        images: ``(N, channels, H, W)``, float32 in [0, 1], or uint8, which an access turns into float32 in [0, 1].
        labels: int64, ``(N,)`` or ``(N, H, W)``.
        augment: what training does to images ``(N, channels, H, W)``, which :meth:`for_training` switches on.

    Raises:
        ValueError: images or labels of another shape or dtype, or not as many labels as images.

    Example::

        >>> import torch
        >>> split = Split(torch.full((3, 1, 2, 2), 51, dtype=torch.uint8), torch.tensor([0, 1, 2]))
        >>> split[1]
        (tensor([[[0.2000, 0.2000], [0.2000, 0.2000]]]), tensor(1))
    """

    images: Tensor
    labels: Tensor
    augment: Callable[[Tensor], Tensor] | None = None
    training: bool = False

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dim() != 4 or images.dtype not in (torch.float32, torch.uint8):
            raise ValueError(
                f"images must be float32 or uint8 (N, channels, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.dim() not in (1, 3):
            raise ValueError(f"labels must be int64 (N,) or (N, H, W), got {labels.dtype} {tuple(labels.shape)}")
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images, but {len(labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """A batch for DataLoader, which asks for it under this name: indexed and converted at once."""
        images = to_float(self.images[indices])
        if self.training and self.augment is not None:
            images = self.augment(images)
        return list(zip(images, self.labels[indices], strict=True))

    def take(self, indices: Tensor) -> Split:
        """The samples at `indices`, int64 ``(M,)``, or where a bool ``(N,)`` is true."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def for_training(self) -> Split:
        """The same samples, augmented anew each time they are asked for."""
        return replace(self, training=True)


@dataclass(frozen=True, eq=False)
class Data:
    """A data set: map-style parts whose items are ``(image, label)``.

    An image is float32 ``(channels, H, W)`` in [0, 1]; a label int64 ``()``, or ``(H, W)`` in segmentation.
    """

    train: Dataset[Sample]
    validation: Dataset[Sample] | None
    """What everything is chosen by; None until :func:`hem_ext.harness.data.load` has split it off `train`."""
    test: Dataset[Sample]
    """Looked at once, when all is trained."""
    classes: tuple[str, ...]
    channels: int
    ignore_index: int = -100  # the label that does not count

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def with_validation(self, share: float | None, seed: int = 0) -> Data:
        """The same with a validation part: its own, or that share of `train`, a tenth if `share` is None.

        Of a class that has few samples it is at least one, whatever the share.

        Raises:
            ValueError: a `share` of a set that has a validation part of its own; see also :func:`split_off`.
        """
        if self.validation is not None:
            if share is not None:
                raise ValueError(f"this set has a validation part of its own: a share of {share} cannot be split off")
            return self
        rest, part = split_off(self.train, 0.1 if share is None else share, seed, classes=self.classes)
        return replace(self, train=rest, validation=part)

    def statistics(self, most: int = 1000) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over training images, float32 ``(channels,)`` each.

        Of `most` images, evenly spread, where there are more. A channel that never changes gets the deviation 1.
        """
        count = min(len(self.train), most)
        sums = torch.zeros(3, self.channels, dtype=torch.float64)  # of values, of their squares, and how many
        for i in range(count):
            values = self.train[i * len(self.train) // count][0].double().flatten(1)
            sums += torch.stack([values.sum(1), values.square().sum(1), torch.ones_like(values).sum(1)])
        mean, square = sums[:2] / sums[2]
        deviation = (square - mean.square()).clamp_min(0).sqrt()
        return mean.float(), torch.where(deviation < 1e-6, 1.0, deviation).float()


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, with or without the mark that some programs begin it with.

    Raises:
        ValueError: it is of something else.
    """
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not a text in UTF-8: {error}") from error


def listed(folder: Path, path: str, source: Path) -> Path:
    """A file that a list names by its path in `folder`.

    Raises:
        ValueError: a path out of the folder.
    """
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise DataError(f"{source} names {path!r}; expected paths that stay in {folder}")
    return folder / path


def split_off(
    dataset: Any,
    share: float,
    seed: int = 0,
    *,
    classes: Sequence[str] | None = None,
    parts: Sequence[str] = ("training", "validation"),
) -> tuple[Any, Any]:
    """All but a share of a data set, and that share, drawn by the seed; of every class the same share.

    Whatever the share, at least one sample goes to either side; of every class, where there are classes.

    Args:
        dataset: with ``take``. Where its ``labels`` are ``(N,)``, the draw is stratified by them.
        share: of its samples, in (0, 1).
        seed: of the draw.
        classes: what an error calls the classes; their labels if None.
        parts: what the data set becomes in all, where the first of the two is split again.

    Returns:
        Two data sets, both in the order of `dataset`.

    Raises:
        ValueError: a share outside (0, 1), or fewer samples than `parts`, of a class where there are classes.

    Example::

        >>> split = Split(torch.zeros(10, 1, 2, 2), torch.tensor([0] * 6 + [1] * 4))
        >>> rest, part = split_off(split, 0.5)
        >>> rest.labels.tolist(), part.labels.tolist()
        ([0, 0, 0, 1, 1], [0, 0, 0, 1, 1])
    """
    if not 0 < share < 1:
        raise ValueError(f"a part is a share of the training samples in (0, 1), got {share}")
    count, labels = len(dataset), getattr(dataset, "labels", None)
    stratify = labels.numpy() if isinstance(labels, Tensor) and labels.dim() == 1 else None
    least = 1
    _check_enough("the data set", count, parts)
    if stratify is not None:
        kinds, counts = np.unique(stratify, return_counts=True)
        for kind, of_kind in zip(kinds, counts, strict=True):
            _check_enough(f"class {kind if classes is None else classes[kind]}", of_kind, parts)
        least = len(kinds)
    size = min(max(math.ceil(share * count), least), count - least)
    rest, part = train_test_split(np.arange(count), test_size=size, stratify=stratify, random_state=seed)
    taken = np.isin(np.arange(count), part)
    if stratify is not None:
        drawn = np.concatenate([rest, part])
        for alone in np.setxor1d(stratify[rest], stratify[part]):  # a rare class that is on one side alone
            one = drawn[stratify[drawn] == alone][0]
            taken[one] = not taken[one]
    return dataset.take(torch.from_numpy(~taken)), dataset.take(torch.from_numpy(taken))


def _check_enough(what: str, count: int, parts: Sequence[str]) -> None:
    if count < len(parts):
        raise ValueError(
            f"{what} has {count} sample{'s' if count != 1 else ''}; expected one or more for each part: "
            f"{', '.join(parts)}"
        )


def to_float(images: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]; float32 as it is."""
    return images / 255 if images.dtype == torch.uint8 else images


def image_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as float32 ``(3, H, W)`` in [0, 1]."""
    return to_float(torch.from_numpy(np.array(image)).movedim(-1, 0).contiguous())


def inside(root: Path, folder: str) -> Path:
    """`root`/`folder`, or `root` where it is that very folder."""
    parts = Path(folder).parts
    return root if root.absolute().parts[-len(parts) :] == parts else root / folder


def missing(wanted: Path, layout: str) -> FileNotFoundError:
    """The error for a file that is not there: what was expected, and what is there instead."""
    parent = next((p for p in wanted.absolute().parents if p.is_dir()), Path("/"))
    return FileNotFoundError(f"{wanted} is missing; expected {layout}. {parent} holds {_listing(parent)}")


def _listing(folder: Path, most: int = 6) -> str:
    names = sorted(path.name for path in folder.iterdir())
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest if names else "nothing"


KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: 'a dictionary, such as {"seed": 1}',
}


def check_kind(name: str, value: object, kind: type) -> None:
    """Raise ValueError where an option is not of one of :data:`KINDS`. A whole number is a number, and true is none."""
    is_kind = isinstance(value, int | float if kind is float else kind)
    if not is_kind or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} must be {KINDS[kind]}, got {value!r}")


def check_labels(labels: np.ndarray | Tensor, num_classes: int, source: Path, also: Sequence[int] = ()) -> None:
    """Raise :class:`DataError` where a label is neither in [0, `num_classes`) nor one of `also`."""
    bad = [int(v) for v in np.unique(labels) if not (0 <= v < num_classes or v in also)]
    if bad:
        allowed = " or ".join([f"0 to {num_classes - 1}", *map(str, also)])
        raise DataError(f"{source} has the label {bad[0]}; expected {allowed}")
