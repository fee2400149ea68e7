"""What every data set is made of, and what a reader says when a file is not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

Sample = tuple[Tensor, Tensor]


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
    test: Dataset[Sample]
    classes: tuple[str, ...]
    channels: int
    ignore_index: int = -100  # the label that does not count

    @property
    def num_classes(self) -> int:
        return len(self.classes)


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


def check_labels(labels: np.ndarray | Tensor, num_classes: int, source: Path, also: Sequence[int] = ()) -> None:
    """Raise ValueError where a label is neither in [0, `num_classes`) nor one of `also`."""
    bad = [int(v) for v in np.unique(labels) if not (0 <= v < num_classes or v in also)]
    if bad:
        allowed = " or ".join([f"0 to {num_classes - 1}", *map(str, also)])
        raise ValueError(f"{source} has the label {bad[0]}; expected {allowed}")
