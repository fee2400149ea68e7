"""The data sets: real images that come with Python packages, and readers of the usual sets on disk.

:func:`load` gives each by its name. Nothing is downloaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from hem_ext.harness.data import classification, folders, segmentation
from hem_ext.harness.data.base import Data, Split, check_kind, split_off
from hem_ext.harness.data.bundled import (
    BORDER,
    MOSAIC_TEXTURES,
    Parts,
    digit_scenes,
    digits,
    mnist_5k,
    mnist_scenes,
    texture_mosaics,
    textures,
)
from hem_ext.harness.data.imbalance import exponential_counts, step_counts, subset_by_counts
from hem_ext.harness.data.openood import openood
from hem_ext.harness.data.unknown import unknown_sets

__all__ = [
    "BUNDLED",
    "CORRUPTED",
    "ON_DISK",
    "Data",
    "Split",
    "digit_scenes",
    "digits",
    "exponential_counts",
    "load",
    "load_corrupted",
    "mnist_5k",
    "mnist_scenes",
    "openood",
    "split_off",
    "step_counts",
    "subset_by_counts",
    "texture_mosaics",
    "textures",
    "unknown_sets",
]

DIGITS = tuple("0123456789")

# What makes each set, and what else its Data says.
BUNDLED: dict[str, tuple[Callable[..., Parts], dict[str, Any]]] = {
    "mnist-5k": (mnist_5k, {"classes": DIGITS}),
    "mnist-scenes": (mnist_scenes, {"classes": ("background", *DIGITS)}),
    "digits": (digits, {"classes": DIGITS}),
    "digit-scenes": (digit_scenes, {"classes": ("background", *DIGITS)}),
    "texture-mosaics": (texture_mosaics, {"classes": MOSAIC_TEXTURES, "ignore_index": BORDER}),
}

# What reads each set, and what the root must hold.
ON_DISK: dict[str, tuple[Callable[..., Data], str]] = {
    **{
        name: (partial(classification.mnist_family, name=name), classification.MNIST_LAYOUT)
        for name in classification.MNIST_FAMILY
    },
    "cifar10": (classification.cifar10, classification.CIFAR10_LAYOUT),
    "cifar100": (classification.cifar100, classification.CIFAR100_LAYOUT),
    "svhn": (classification.svhn, classification.SVHN_LAYOUT),
    "image-folder": (folders.image_folder, folders.IMAGE_FOLDER_LAYOUT),
    "mask-folder": (folders.mask_folder, folders.MASK_FOLDER_LAYOUT),
    "voc2012": (segmentation.voc2012, segmentation.VOC_LAYOUT),
    "cityscapes": (segmentation.cityscapes, segmentation.CITYSCAPES_LAYOUT),
    "ade20k": (segmentation.ade20k, segmentation.ADE20K_LAYOUT),
}

CORRUPTED: dict[str, tuple[Callable[..., Iterator[tuple[str, int, Split]]], str]] = {
    "cifar10-c": (classification.cifar10_c, classification.CIFAR10_C_LAYOUT),
    "mnist-c": (classification.mnist_c, classification.MNIST_C_LAYOUT),
}


BOUNDS = {"seed": (0, 2**32 - 1), "crop": (1, 2**14), "size": (1, 2**14)}
"""Of options that are whole numbers, the least and the most. A larger picture would take 3 GB."""
OF_OTHERS = (1, 10**6)


def load(name: str, root: Path | None = None, validation: float | None = None, **options: Any) -> Data:
    """A data set by its name: one of :data:`BUNDLED`, or of :data:`ON_DISK`.

    Args:
        name: which.
        root: the folder that holds the set's own; a bundled set has no use for it.
        validation: of a set that has no validation part of its own, the share of its training part that becomes one;
            0.1 if None, and at least one sample of every class.
        options: of the function that makes or reads the set: `size`, `seed`, `crop` ...

    Raises:
        ValueError: a name that is not known, no `root` for a set on disk, a file that is not what it should be, a share
            of a set that has a validation part, a class with too few samples to split one off, or an option of another
            kind or out of its bounds.
        FileNotFoundError: a file that `root` should hold.
        TypeError: an option that the set does not have.

    Example::

        >>> data = load("mnist-5k")
        >>> image, label = data.test[0]
        >>> image.shape, label, data.num_classes, data.channels
        (torch.Size([1, 28, 28]), tensor(0), 10, 1)
    """
    if name in BUNDLED:
        make, about = BUNDLED[name]
        _check_options(name, make, options)
        return Data(*make(**options), channels=1, **about).with_validation(validation)
    read, folder = _on_disk(name, root, ON_DISK, known=(*BUNDLED, *ON_DISK))
    _check_options(name, read, options)
    return read(folder, **options).with_validation(validation)


def load_corrupted(name: str, root: Path | None = None, **options: Any) -> Iterator[tuple[str, int, Split]]:
    """Corrupted test images of one of :data:`CORRUPTED`: corruption, severity and split, one after the other.

    Arguments and errors as in :func:`load`; the files are read, and found to be wrong, as they are asked for.
    """
    read, folder = _on_disk(name, root, CORRUPTED, known=tuple(CORRUPTED))
    return read(folder, **options)


def _check_options(name: str, make: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError where a function has no such option, or not of this kind, or not so large."""
    bound = make.keywords if isinstance(make, partial) else {}
    function = make.func if isinstance(make, partial) else make
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in bound}
    unknown = sorted(options.keys() - defaults.keys())
    if unknown:
        raise TypeError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(defaults) or 'none'}")
    hints = get_type_hints(function)
    for option, value in options.items():
        if value is None and defaults[option] is None:
            continue
        kind = next(kind for kind in get_args(hints[option]) or (hints[option],) if kind is not NoneType)
        check_kind(option, value, kind)
        least, most = BOUNDS.get(option, OF_OTHERS)
        if kind is int and not least <= value <= most:
            raise ValueError(f"{option} must be from {least} to {most}, got {value}")


def _on_disk(
    name: str, root: Path | None, readers: dict[str, tuple[Callable[..., Any], str]], known: tuple[str, ...]
) -> tuple[Callable[..., Any], Path]:
    if name not in readers:
        raise ValueError(f"there is no data set {name!r}; there are {', '.join(known)}")
    read, layout = readers[name]
    if root is None:
        raise ValueError(f"{name} is read from disk: --data-root must name a folder that holds {layout}")
    return read, Path(root)
