"""What a training set may do to its images each time it is asked for them.

Drawn from torch's global generator, which DataLoader seeds in each worker.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor


@dataclass(frozen=True)
class ShiftFlip:
    """Each image moved by up to `padding` pixels either way, black coming in, and mirrored one time in two.

    The usual augmentation of CIFAR: a random crop of the padded image and a flip from left to right (He et al.,
    arXiv 1512.03385, section 4.2).

    Example::

        >>> import torch
        >>> ShiftFlip()(torch.rand(8, 3, 32, 32)).shape
        torch.Size([8, 3, 32, 32])
    """

    padding: int = 4

    def __call__(self, images: Tensor) -> Tensor:
        """Images ``(N, channels, H, W)``; the same shape and dtype."""
        count, channels, height, width = images.shape
        top, left = torch.randint(2 * self.padding + 1, (2, count, 1))
        rows, columns = top + torch.arange(height), left + torch.arange(width)
        columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
        padded = F.pad(images, [self.padding] * 4)
        n, c = torch.arange(count).view(-1, 1, 1, 1), torch.arange(channels).view(-1, 1, 1)
        return padded[n, c, rows[:, None, :, None], columns[:, None, None, :]]


@dataclass(frozen=True)
class ResizedCropFlip:
    """A random part of a picture at `size`, mirrored one time in two.

    The usual augmentation of ImageNet (Szegedy et al., arXiv 1409.4842, section 6): a part of 8 % to all of the area,
    3 : 4 to 4 : 3 in shape, or the largest square in the middle where ten draws do not fit.
    """

    size: int
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(self, image: Image.Image) -> Image.Image:
        """A picture ``(W, H)`` to one of ``(size, size)``."""
        width, height = image.size
        low, high = (math.log(r) for r in self.ratio)
        for _ in range(10):
            area = width * height * _uniform(*self.area)
            ratio = math.exp(_uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = (int(torch.randint(rest + 1, ())) for rest in (width - w, height - h))
                box = (left, top, left + w, top + h)
                image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
                break
        else:
            image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)
        return ImageOps.mirror(image) if torch.rand(()).item() < 0.5 else image


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()
