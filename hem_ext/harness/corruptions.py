"""Corrupted test images, in five severities, after the protocol of Hendrycks & Dietterich (arXiv 1903.12261).

The functions and severities are our own, so that they work on images of 8 x 8 pixels as on 32 x 32: lengths are
shares of an image's side. Results compare losses with each other here; they are not those of CIFAR-10-C or MNIST-C.

Every function takes images ``(N, C, H, W)``, float32 in [0, 1] on the CPU, a severity from 1 to 5 and a CPU
generator, which alone decides what is random, for every image anew. It returns new images of the same shape, dtype
and range. The numbers above a function are its five severities. Other severities and images raise ValueError.

Example::

    >>> generator = torch.Generator().manual_seed(0)
    >>> CORRUPTIONS["contrast"](torch.tensor([[[[0.0, 1.0]]]]), 5, generator)
    tensor([[[[0.3000, 0.7000]]]])
    >>> sorted(CORRUPTIONS)
    ['brightness', 'contrast', 'gaussian_blur', 'gaussian_noise', 'impulse_noise', 'occlusion', 'pixelate',
     'rotation', 'shift', 'shot_noise']
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Generator, Tensor

CORRUPTIONS: dict[str, Callable[[Tensor, int, Generator], Tensor]] = {}


def _corruption(*levels: float) -> Callable:
    """Enter a function of images, a level and a generator into CORRUPTIONS, as one of a severity."""

    def register(function: Callable[[Tensor, float, Generator], Tensor]) -> Callable[[Tensor, int, Generator], Tensor]:
        @functools.wraps(function)
        def corrupt(images: Tensor, severity: int, generator: Generator) -> Tensor:
            if severity not in range(1, len(levels) + 1):
                raise ValueError(f"severity must be a whole number from 1 to {len(levels)}, got {severity}")
            if images.dim() != 4 or images.dtype != torch.float32 or not ((images >= 0) & (images <= 1)).all():
                raise ValueError(
                    "images must be (N, C, H, W), float32 in [0, 1], "
                    f"got {images.dtype} of shape {tuple(images.shape)} or values outside"
                )
            return function(images, levels[severity - 1], generator).clamp(0, 1)

        CORRUPTIONS[function.__name__] = corrupt
        return corrupt

    return register


@_corruption(0.1, 0.2, 0.3, 0.4, 0.5)
def gaussian_noise(images: Tensor, deviation: float, generator: Generator) -> Tensor:
    """Add normal noise to every value: electronic noise."""
    return images + deviation * torch.randn(images.shape, generator=generator)


@_corruption(40, 20, 10, 5, 2)
def shot_noise(images: Tensor, photons: float, generator: Generator) -> Tensor:
    """Count photons, so many on average where the image is white: noise that grows with the light."""
    return torch.poisson(images * photons, generator=generator) / photons


@_corruption(0.05, 0.1, 0.2, 0.3, 0.4)
def impulse_noise(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Set that share of the values to 0 or 1: salt and pepper, broken bits."""
    hit = torch.rand(images.shape, generator=generator) < share
    salt = torch.rand(images.shape, generator=generator) < 0.5
    return torch.where(hit, salt.float(), images)


@_corruption(0.05, 0.06, 0.07, 0.085, 0.1)
def gaussian_blur(images: Tensor, width: float, generator: Generator) -> Tensor:
    """Blur with a Gaussian, its standard deviation a share of the image's shorter side. Nothing is random."""
    sigma = width * min(images.shape[2:])
    return torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, sigma, sigma), mode="nearest"))


@_corruption(0.8, 0.7, 0.6, 0.5, 0.4)
def contrast(images: Tensor, factor: float, generator: Generator) -> Tensor:
    """Draw every channel together around its mean. Nothing is random."""
    mean = images.mean((2, 3), keepdim=True)
    return mean + factor * (images - mean)


@_corruption(0.08, 0.16, 0.24, 0.32, 0.4)
def brightness(images: Tensor, light: float, generator: Generator) -> Tensor:
    """Add light, up to white. Nothing is random."""
    return images + light


@_corruption(0.04, 0.08, 0.12, 0.16, 0.2)
def shift(images: Tensor, distance: float, generator: Generator) -> Tensor:
    """Move by that share of a side, in a direction of its own, by parts of a pixel too; black comes in."""
    angle = 2 * math.pi * torch.rand(len(images), generator=generator)
    # grid_sample's coordinates run from -1 to 1: a side is 2.
    offset = 2 * distance * torch.stack([angle.cos(), angle.sin()], dim=1)
    return _resample(images, torch.eye(2).expand(len(images), 2, 2), offset)


@_corruption(8, 16, 24, 32, 40)
def rotation(images: Tensor, degrees: float, generator: Generator) -> Tensor:
    """Turn around the middle by that many degrees, to the left or to the right; black comes in."""
    turn = torch.where(torch.rand(len(images), generator=generator) < 0.5, -1, 1) * math.radians(degrees)
    ratio = images.shape[2] / images.shape[3]  # coordinates run from -1 to 1 along the longer side too
    matrix = torch.stack([turn.cos(), -turn.sin() * ratio, turn.sin() / ratio, turn.cos()], dim=1).view(-1, 2, 2)
    return _resample(images, matrix, torch.zeros(len(images), 2))


def _resample(images: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    theta = torch.cat([matrix, offset.unsqueeze(2)], dim=2)
    return F.grid_sample(images, F.affine_grid(theta, list(images.shape), align_corners=False), align_corners=False)


@_corruption(0.25, 0.375, 0.5, 0.625, 0.75)
def occlusion(images: Tensor, part: float, generator: Generator) -> Tensor:
    """Cover a place of its own with a grey rectangle, that share of the image's height and width."""
    height, width = images.shape[2:]
    rows, columns = round(part * height), round(part * width)
    top = torch.randint(height - rows + 1, (len(images), 1), generator=generator)
    left = torch.randint(width - columns + 1, (len(images), 1), generator=generator)
    y, x = torch.arange(height) - top, torch.arange(width) - left
    covered = ((y >= 0) & (y < rows)).unsqueeze(2) & ((x >= 0) & (x < columns)).unsqueeze(1)
    return images.masked_fill(covered.unsqueeze(1), 0.5)


@_corruption(0.875, 0.75, 0.625, 0.5, 0.375)
def pixelate(images: Tensor, scale: float, generator: Generator) -> Tensor:
    """Average into fewer pixels, that share of each side, and draw them over the image. Nothing is random."""
    rows, columns = (_pixels(side, max(1, round(scale * side))) for side in images.shape[2:])
    return rows @ images @ columns.T


def _pixels(side: int, count: int) -> Tensor:
    """The matrix that averages `side` values into `count` equal cells and these back into the values they touch.

    Cells end within values where `count` does not divide `side`; a share of a value then counts by its length.
    """
    ends = torch.linspace(0, side, count + 1, dtype=torch.float64)
    begin = torch.arange(side)
    overlap = (torch.minimum(ends[1:, None], begin + 1) - torch.maximum(ends[:-1, None], begin)).clamp(min=0)
    return ((overlap / overlap.sum(0)).T @ (overlap / overlap.sum(1, keepdim=True))).float()
