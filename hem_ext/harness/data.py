"""Real images that come with scikit-learn and scikit-image: nothing is downloaded."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

TEXTURES = ("brick", "grass", "gravel", "camera")


class Split(NamedTuple):
    """Images ``(N, 1, H, W)``, float32 in [0, 1], and their labels, int64 ``(N,)`` or ``(N, H, W)``."""

    images: Tensor
    labels: Tensor


def digits() -> tuple[Split, Split]:
    """scikit-learn's handwritten digits, 8 x 8 pixels, 10 classes: 1257 to train and 540 to test.

    The split is the same in every run, and both parts hold every class in the same proportion.
    """
    bunch = load_digits()
    images = torch.from_numpy(bunch.images / 16.0).float().unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=0.3, stratify=bunch.target, random_state=0)
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def textures() -> tuple[list[Tensor], list[Tensor]]:
    """scikit-image's 512 x 512 grey pictures, float32 ``(512, 256)`` in [0, 1]: left halves to train, right to test."""
    from skimage import data

    pictures = [torch.from_numpy(getattr(data, name)() / 255.0).float() for name in TEXTURES]
    return [p[:, :256] for p in pictures], [p[:, 256:] for p in pictures]


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
