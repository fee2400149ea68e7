"""Small networks for small images, and the classifier head that a loss may ask for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True)
class HeadOptions:
    """What a loss needs of the last layer; see :attr:`hem_ext.harness.losses.Loss.head`.

    Args:
        dropout: the share of the penultimate features that is zeroed in training.
        normalise_weight: divide each class's weight vector by its L2 norm.
        normalise_features: divide the features of each sample (pixel) by their L2 norm, after dropout.
        bias: add one number per class.

    Example::

        >>> from hem_ext.harness.models import HeadOptions
        >>> HeadOptions(dropout=0.3).normalise_weight
        False
    """

    dropout: float = 0.0
    normalise_weight: bool = False
    normalise_features: bool = False
    bias: bool = True


PLAIN_HEAD = HeadOptions()


class Head(nn.Linear):
    """The last layer: features to logits, by one weight vector per class.

    Args:
        in_features: the number of features F.
        num_classes: the number of classes C.
        options: what the loss asks for; plain, it is ``nn.Linear`` or a 1x1 ``nn.Conv2d`` with the same initial
            weights.

    Shape:
        - features: ``(N, F)`` or ``(N, F, H, W)``
        - output: ``(N, C)`` or ``(N, C, H, W)``
        - weight: ``(C, F)``, as it is before it is normalised

    Example::

        >>> import torch
        >>> from hem_ext.harness.models import Head, HeadOptions
        >>> cosines = Head(4, 3, HeadOptions(normalise_weight=True, normalise_features=True, bias=False))
        >>> bool((cosines(torch.randn(2, 4, 5, 5)).abs() <= 1.0001).all())
        True
    """

    def __init__(self, in_features: int, num_classes: int, options: HeadOptions = PLAIN_HEAD) -> None:
        super().__init__(in_features, num_classes, bias=options.bias)
        self.options = options

    def forward(self, features: Tensor) -> Tensor:
        if self.options.dropout:
            features = F.dropout(features, self.options.dropout, self.training)
        if self.options.normalise_features:
            features = F.normalize(features, dim=1)
        weight = F.normalize(self.weight, dim=1) if self.options.normalise_weight else self.weight
        if features.dim() == 2:
            return F.linear(features, weight, self.bias)
        return F.conv2d(features, weight[:, :, None, None], self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.options}"


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class SmallCNN(nn.Module):
    """Images ``(N, channels, H, W)``, H and W at least 4, to logits ``(N, C)``.

    Example::

        >>> import torch
        >>> from hem_ext.harness.models import SmallCNN
        >>> model = SmallCNN(10, width=8)
        >>> model.forward_features(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 16])
    """

    def __init__(self, num_classes: int, width: int = 32, *, channels: int = 1, head: HeadOptions = PLAIN_HEAD) -> None:
        super().__init__()
        self.features = nn.Sequential(_block(channels, width), nn.MaxPool2d(2), _block(width, 2 * width))
        self.head = Head(2 * width, num_classes, head)

    def forward_features(self, x: Tensor) -> Tensor:
        """The penultimate features ``(N, 2 * width)``, which the head turns into logits."""
        return self.features(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


class SmallUNet(nn.Module):
    """Images ``(N, channels, H, W)``, H and W multiples of 8, to logits ``(N, C, H, W)``.

    Three times down and up again, with skip connections (Ronneberger et al., arXiv 1505.04597).

    Example::

        >>> import torch
        >>> from hem_ext.harness.models import SmallUNet
        >>> SmallUNet(11, width=4, channels=3)(torch.zeros(2, 3, 16, 24)).shape
        torch.Size([2, 11, 16, 24])
    """

    def __init__(self, num_classes: int, width: int = 16, *, channels: int = 1, head: HeadOptions = PLAIN_HEAD) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.down = nn.ModuleList(_block(i, o) for i, o in zip([channels, *widths], widths, strict=False))
        self.up = nn.ModuleList(
            _block(deep + skip, skip) for deep, skip in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = Head(width, num_classes, head)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2, mode="bilinear"), skip], dim=1))
        return self.head(x)


def make_model(
    name: str, num_classes: int, *, channels: int = 1, head: HeadOptions = PLAIN_HEAD, segmentation: bool = False
) -> nn.Module:
    """The network of that name: images ``(N, channels, H, W)`` to logits ``(N, C)``, or ``(N, C, H, W)``.

    Args:
        name: ``"small"``, this module's own.
        num_classes: C.
        channels: of the images.
        head: what the loss asks of the last layer.
        segmentation: logits for every pixel.
    """
    if name != "small":
        raise ValueError(f"unknown model {name!r}: small")
    return (SmallUNet if segmentation else SmallCNN)(num_classes, channels=channels, head=head)


@torch.no_grad()
def penultimate_features(model: nn.Module, images: Dataset, batch_size: int = 250) -> Tensor:
    """What the last layer of a classifier is given for every image, float32 ``(N, F)`` on the CPU.

    Args:
        model: a network whose last layer takes one vector a sample; it is put into eval mode.
        images: items ``(image, label)``.
        batch_size: images at once.
    """
    seen: list[Tensor] = []
    hook = head_of(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float().cpu()))
    device = next(model.parameters()).device
    model.eval()
    try:
        for batch, _ in DataLoader(images, batch_size):
            model(batch.to(device))
    finally:
        hook.remove()
    return torch.cat(seen)


def head_of(model: nn.Module) -> nn.Module:
    """The last layer: ``head``, or what timm's ``get_classifier`` gives, or the last module that has a weight."""
    if isinstance(getattr(model, "head", None), nn.Module) and hasattr(model.head, "weight"):
        return model.head
    if hasattr(model, "get_classifier"):
        return model.get_classifier()
    return [module for module in model.modules() if getattr(module, "weight", None) is not None][-1]
