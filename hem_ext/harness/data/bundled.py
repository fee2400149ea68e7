"""Real images that come with scikit-learn and scikit-image: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from hem_ext.harness.data.base import Split

TEXTURES = ("brick", "grass", "gravel", "camera")
MOSAIC_TEXTURES = (*TEXTURES, "coins", "moon", "page", "text")
BORDER = 255


def digits() -> tuple[Split, Split]:
    """scikit-learn's handwritten digits, 8 x 8 pixels, 10 classes: 1257 to train and 540 to test.

    The split is the same in every run, and both parts hold every class in the same proportion.

    Example::

        >>> train, test = digits()
        >>> train.images.shape, test.labels.shape
        (torch.Size([1257, 1, 8, 8]), torch.Size([540]))
    """
    bunch = load_digits()
    images = torch.from_numpy(bunch.images / 16.0).float().unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=0.3, stratify=bunch.target, random_state=0)
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def textures() -> tuple[list[Tensor], list[Tensor]]:
    """scikit-image's 512 x 512 grey pictures, float32 ``(512, 256)`` in [0, 1]: left halves to train, right to test."""
    pictures = [_picture(name) for name in TEXTURES]
    return [p[:, :256] for p in pictures], [p[:, 256:] for p in pictures]


def _picture(name: str) -> Tensor:
    from skimage import data

    return torch.from_numpy(getattr(data, name)() / 255.0).float()


def digit_scenes(num_train: int = 500, num_test: int = 200, *, size: int = 48, seed: int = 0) -> tuple[Split, Split]:
    """Digits pasted over textures, to be segmented into 11 classes: 0 the background, k + 1 the digit k.

    A scene is a darkened texture with about five light digits of 14 to 18 pixels, which do not cover each other.
    Train and test scenes share neither a digit nor a region of a texture.

    Args:
        num_train, num_test: scenes of each part.
        size: height and width of a scene in pixels.
        seed: of everything that is drawn.

    Returns:
        Two splits, images ``(N, 1, size, size)`` and labels ``(N, size, size)``.

    Example::

        >>> train, test = digit_scenes(4, 2)
        >>> train.images.shape, test.labels.shape
        (torch.Size([4, 1, 48, 48]), torch.Size([2, 48, 48]))
    """
    train_textures, test_textures = textures()
    train_digits, test_digits = digits()
    generator = np.random.default_rng(seed)
    return (
        _scenes(num_train, train_digits, train_textures, size, generator),
        _scenes(num_test, test_digits, test_textures, size, generator),
    )


def _scenes(count: int, source: Split, backgrounds: list[Tensor], size: int, generator: np.random.Generator) -> Split:
    images = torch.empty(count, 1, size, size)
    labels = torch.zeros(count, size, size, dtype=torch.int64)
    for image, label in zip(images[:, 0], labels, strict=True):
        texture = backgrounds[generator.integers(len(backgrounds))]
        top, left = (generator.integers(side - size + 1) for side in texture.shape)
        image.copy_(0.6 * texture[top : top + size, left : left + size])
        taken = torch.zeros(size, size, dtype=torch.bool)
        for _ in range(12):
            pick = generator.integers(len(source.labels))
            side = int(generator.integers(14, 19))
            top, left = generator.integers(size - side + 1, size=2)
            window = (slice(top, top + side), slice(left, left + side))
            if taken[window].any():
                continue  # digits do not cover each other
            taken[window] = True
            stroke = F.interpolate(source.images[pick][None], size=(side, side), mode="bilinear")[0, 0]
            ink = generator.uniform(0.7, 1.0)
            image[window] += stroke * (ink - image[window])
            label[window][stroke > 0.4] = source.labels[pick] + 1
    return Split(images, labels)


def texture_mosaics(num_train: int = 500, num_test: int = 200, *, size: int = 64, seed: int = 0) -> tuple[Split, Split]:
    """Voronoi maps of eight textures, to be told apart; label k is :data:`MOSAIC_TEXTURES`'s k-th.

    A mosaic has four to eight cells around random points, each a crop of a random texture. The two pixels at a
    border of two textures are labelled 255. Of the four vertical strips of every picture, train mosaics show the
    first and third, test mosaics the second and fourth: the halves of some pictures have little in common.

    Args:
        num_train, num_test: mosaics of each part.
        size: height and width of a mosaic in pixels, at most 96.
        seed: of everything that is drawn.

    Returns:
        Two splits, images ``(N, 1, size, size)`` and labels ``(N, size, size)``.

    Raises:
        ValueError: a mosaic wider than a strip.

    Example::

        >>> train, _ = texture_mosaics(20, 0)
        >>> train.labels.unique().tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 255]
    """
    strips = [picture.split(picture.shape[1] // 4, dim=1) for picture in map(_picture, MOSAIC_TEXTURES)]
    largest = min(min(strip.shape) for of_one in strips for strip in of_one)
    if size > largest:
        raise ValueError(f"a texture mosaic is at most {largest} pixels large, got {size}")
    generator = np.random.default_rng(seed)
    return (
        _mosaics(num_train, [of_one[0::2] for of_one in strips], size, generator),
        _mosaics(num_test, [of_one[1::2] for of_one in strips], size, generator),
    )


def _mosaics(count: int, textures: list[Sequence[Tensor]], size: int, generator: np.random.Generator) -> Split:
    from skimage.segmentation import find_boundaries

    images = torch.empty(count, 1, size, size)
    labels = torch.empty(count, size, size, dtype=torch.int64)
    pixels = np.stack(np.mgrid[:size, :size], axis=-1)
    for image, label in zip(images[:, 0], labels, strict=True):
        points = generator.uniform(0, size, (generator.integers(4, 9), 1, 1, 2))
        nearest = torch.from_numpy(((pixels - points) ** 2).sum(-1).argmin(0))
        for point in range(len(points)):
            kind = int(generator.integers(len(textures)))
            strip = textures[kind][generator.integers(len(textures[kind]))]
            top, left = (generator.integers(side - size + 1) for side in strip.shape)
            cell = nearest == point
            image[cell] = strip[top : top + size, left : left + size][cell]
            label[cell] = kind
        label[torch.from_numpy(find_boundaries(label.numpy(), mode="thick"))] = BORDER
    return Split(images, labels)
