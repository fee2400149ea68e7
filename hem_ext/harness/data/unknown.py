"""Images of no known class, to be rejected: drawn, scrambled, or bundled with scikit-image.

All are float32 ``(N, channels, H, W)`` in [0, 1] and depend on their arguments alone.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from hem_ext.harness.data.bundled import textures


def unknown_sets(images: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Every set of this module, of the size and channels of some test images.

    Args:
        images: float32 ``(N, channels, H, W)`` in [0, 1].
        seed: of everything that is drawn.

    Returns:
        By name; each has N images, but there are only 100 faces.

    Example::

        >>> from hem_ext.harness.data import digits
        >>> {name: len(images) for name, images in unknown_sets(digits()[2].images).items()}
        {'textures': 540, 'faces': 100, 'blobs': 540, 'noise': 540, 'permuted': 540, 'phase': 540}
    """
    count, shape = len(images), tuple(images.shape[1:])
    return {
        "textures": texture_patches(count, shape, seed),
        "faces": faces(shape),
        "blobs": smooth_blobs(count, shape, seed),
        "noise": uniform_noise(count, shape, seed),
        "permuted": permuted_pixels(images, seed),
        "phase": random_phase(images, seed),
    }


def texture_patches(count: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Crops of the test regions of :func:`textures`, the grey repeated in every channel.

    Args:
        count: how many.
        shape: ``(channels, H, W)``; the regions, 512 x 192 pixels, are enlarged where they are smaller than that.
        seed: of their places.
    """
    channels, height, width = shape
    pictures = torch.stack(textures()[2])
    sides = pictures.shape[1:]
    scale = max(height / sides[0], width / sides[1])
    if scale > 1:
        size = [math.ceil(side * scale) for side in sides]
        pictures = F.interpolate(pictures.unsqueeze(0), size=size, mode="bilinear")[0]
    generator = np.random.default_rng(seed)
    patches = torch.empty(count, channels, height, width)
    for patch in patches:
        picture = pictures[generator.integers(len(pictures))]
        top = generator.integers(picture.shape[0] - height + 1)
        left = generator.integers(picture.shape[1] - width + 1)
        patch.copy_(picture[top : top + height, left : left + width])
    return patches


def faces(shape: tuple[int, int, int]) -> Tensor:
    """The 100 faces of scikit-image's ``lfw_subset``, grey and 25 x 25 pixels, resized to ``(channels, H, W)``."""
    from skimage import data

    channels, *size = shape
    # The second hundred of the file are not faces.
    grey = torch.from_numpy(data.lfw_subset()[:100]).float().unsqueeze(1)
    resized = F.interpolate(grey, size=size, mode="bilinear", antialias=True)
    return resized.clamp(max=1).repeat(1, channels, 1, 1)  # white is above 1 by rounding, at some sizes


def uniform_noise(count: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Every value of every ``(channels, H, W)`` on its own, uniform in [0, 1)."""
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def smooth_blobs(count: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Gaussian noise, blurred by an eighth of the image's height and width, each channel stretched to [0, 1]."""
    noise = np.random.default_rng(seed).standard_normal((count, *shape), dtype=np.float32)
    # Wrapped around, so that the blobs at the edge are like those in the middle.
    blobs = torch.from_numpy(gaussian_filter(noise, sigma=(0, 0, shape[1] / 8, shape[2] / 8), mode="wrap"))
    low, high = blobs.amin(dim=(2, 3), keepdim=True), blobs.amax(dim=(2, 3), keepdim=True)
    return (blobs - low) / (high - low)


def permuted_pixels(images: Tensor, seed: int) -> Tensor:
    """Each image's pixels in an order of its own; the channels of a pixel stay together."""
    flat = images.flatten(2)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(len(images), 1, flat.shape[2], generator=generator).argsort(dim=2)
    return flat.gather(2, order.expand_as(flat)).view_as(images)


def random_phase(images: Tensor, seed: int) -> Tensor:
    """Each image with its own Fourier amplitudes, but the phases of noise added to its own; clipped to [0, 1].

    All channels get the same phases. But for the clipping, the mean stays.
    """
    noise = torch.rand(len(images), 1, *images.shape[2:], generator=torch.Generator().manual_seed(seed))
    # The noise is real, and so is the result then; it is above 0, hence its mean has the phase 0.
    phase = torch.fft.rfft2(noise).sgn()
    return torch.fft.irfft2(torch.fft.rfft2(images) * phase, s=images.shape[2:]).clamp(0, 1)
