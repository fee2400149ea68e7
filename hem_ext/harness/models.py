"""Small networks for small images, and the classifier head that a loss may ask for."""

from __future__ import annotations

import copy
import importlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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


Normalisation = Callable[[int], nn.Module]
"""Of so many channels: ``nn.BatchNorm2d``, or :func:`group_norm`, in which samples do not touch each other."""


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation (Wu & He, arXiv 1803.08494) in eight groups, or as many as divide the channels.

    Example::

        >>> from hem_ext.harness.models import group_norm
        >>> group_norm(12).num_groups
        4
    """
    return nn.GroupNorm(math.gcd(8, channels), channels)


def _layer(inputs: int, outputs: int, norm: Normalisation, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), norm(outputs), nn.ReLU(inplace=True)
    )


class SmallCNN(nn.Module):
    """Images ``(N, channels, H, W)``, H and W at least 3, to logits ``(N, C)``.

    Four convolutions, each normalised by `norm`: 28 x 28 pixels become 14 x 14, 7 x 7 and 4 x 4. At that size an image
    takes 2.4 million multiplications, with 65,000 weights.

    Example::

        >>> import torch
        >>> from hem_ext.harness.models import SmallCNN
        >>> model = SmallCNN(10, width=8)
        >>> model.forward_features(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 32])
    """

    def __init__(
        self,
        num_classes: int,
        width: int = 16,
        *,
        channels: int = 1,
        head: HeadOptions = PLAIN_HEAD,
        norm: Normalisation = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _layer(channels, width, norm, stride=2),
            _layer(width, 2 * width, norm),
            nn.MaxPool2d(2),
            _layer(2 * width, 4 * width, norm),
            _layer(4 * width, 4 * width, norm, stride=2),
        )
        self.head = Head(4 * width, num_classes, head)

    def forward_features(self, x: Tensor) -> Tensor:
        """The penultimate features ``(N, 4 * width)``, which the head turns into logits."""
        return self.features(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


class SmallUNet(nn.Module):
    """Images ``(N, channels, H, W)`` to logits ``(N, C, H, W)``.

    Works at half the size: halved by the first convolution, twice more down and up again with skip connections
    (Ronneberger et al., arXiv 1505.04597), and the logits are interpolated to the size of the image. Sides that are
    no multiple of 8 are filled up with the last row and column.

    Example::

        >>> import torch
        >>> from hem_ext.harness.models import SmallUNet
        >>> SmallUNet(11, width=4, channels=3)(torch.zeros(2, 3, 16, 24)).shape
        torch.Size([2, 11, 16, 24])
    """

    multiple = 8

    def __init__(
        self,
        num_classes: int,
        width: int = 16,
        *,
        channels: int = 1,
        head: HeadOptions = PLAIN_HEAD,
        norm: Normalisation = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(
            nn.Sequential(_layer(i, o, norm, stride), _layer(o, o, norm))
            for i, o, stride in zip([channels, *widths], widths, [2, 1, 1], strict=False)
        )
        self.up = nn.ModuleList(
            nn.Sequential(_layer(deep + skip, skip, norm), _layer(skip, skip, norm))
            for deep, skip in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = Head(width, num_classes, head)
        self.fused_upsample = False  # see fuse_upsampling

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if height % self.multiple or width % self.multiple:
            x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")
        filled_up = x.shape[2:]
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2, mode="bilinear"), skip], dim=1))
        logits = self.head(x)
        if self.fused_upsample and self.training:
            return logits
        return F.interpolate(logits, size=filled_up, mode="bilinear")[:, :, :height, :width]


class SmallViT(nn.Module):
    """Images ``(N, channels, H, W)`` of one size, H and W multiples of 4, to logits ``(N, C)``.

    A vision transformer (Dosovitskiy et al., arXiv 2010.11929) on patches of 4 x 4 pixels, with learnt positions and
    the mean over patches as its features. At 28 x 28 pixels it has about the weights of :class:`SmallCNN`, and takes
    two to three times its time.

    Args:
        num_classes: C.
        width: of the features of a patch, a multiple of 16; each 16 of them have an attention head.
        depth: transformer layers.
        channels: of the images.
        size: H and W, which decide the table of positions.
        head: what the loss asks of the last layer.

    Raises:
        ValueError: a side that is no multiple of 4; images of another size than `size`.

    Example::

        >>> import torch
        >>> from hem_ext.harness.models import SmallViT
        >>> model = SmallViT(10, width=16, size=(8, 12))
        >>> model.forward_features(torch.zeros(3, 1, 8, 12)).shape
        torch.Size([3, 16])
    """

    patch = 4

    def __init__(
        self,
        num_classes: int,
        width: int = 48,
        depth: int = 3,
        *,
        channels: int = 1,
        size: tuple[int, int] = (28, 28),
        head: HeadOptions = PLAIN_HEAD,
    ) -> None:
        super().__init__()
        if any(side < 1 or side % self.patch for side in size):
            raise ValueError(
                f"this network takes images whose sides are multiples of {self.patch}, got {_pixels(size)}"
            )
        self.size = tuple(size)
        self.patches = nn.Conv2d(channels, width, self.patch, self.patch)
        self.positions = nn.Parameter(torch.empty(size[0] * size[1] // self.patch**2, width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        layers = [
            nn.TransformerEncoderLayer(
                width, width // 16, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        ]
        self.layers = nn.Sequential(*layers, nn.LayerNorm(width))
        self.head = Head(width, num_classes, head)

    def forward_features(self, x: Tensor) -> Tensor:
        """The penultimate features ``(N, width)``, which the head turns into logits."""
        if x.shape[2:] != self.size:
            raise ValueError(f"this network was made for images of {_pixels(self.size)}, got {_pixels(x.shape[2:])}")
        patches = self.patches(x).flatten(2).transpose(1, 2)  # (N, patches, width)
        return self.layers(patches + self.positions).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


def _pixels(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]} pixels"


class Standardized(nn.Module):
    """A network behind its input's standardisation: images in [0, 1] go in, as attacks and corruptions want them.

    Args:
        network: what is given the standardised images.
        mean, deviation: of each channel, ``(channels,)``; see :meth:`hem_ext.harness.data.Data.statistics`.

    Example::

        >>> model = Standardized(nn.Identity(), torch.tensor([0.5]), torch.tensor([0.25]))
        >>> model(torch.ones(1, 1, 1, 2))
        tensor([[[[2., 2.]]]])
    """

    def __init__(self, network: nn.Module, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean.view(-1, 1, 1))
        self.register_buffer("deviation", deviation.view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x - self.mean) / self.deviation)


def make_model(
    name: str,
    num_classes: int,
    *,
    channels: int = 1,
    size: tuple[int, int] = (28, 28),
    head: HeadOptions = PLAIN_HEAD,
    segmentation: bool = False,
) -> nn.Module:
    """The network of that name: images ``(N, channels, H, W)`` to logits ``(N, C)``, or ``(N, C, H, W)``.

    The weights are random, nothing is downloaded. Where the loss asks for another head than the plain one, it takes
    the place of the network's own last layer, with the same initial weights.

    Args:
        name: this module's own: ``"small"``; ``"small-gn"``, the same with group normalisation in the place of batch
            normalisation; ``"small-vit"``, a transformer, for classification. Or ``"timm:resnet18"``, for
            classification, with options of its own behind it, ``"timm:vit_tiny_patch16_224,img_size=28,patch_size=4"``;
            ``"torchvision:resnet18"``, or ``"torchvision:fcn_resnet50"`` for segmentation; ``"smp:Unet/resnet18"``, an
            architecture and an encoder of segmentation_models_pytorch. What sizes of images such a network takes is up
            to it: :func:`check_size`.
        num_classes: C.
        channels: of the images.
        size: H and W of the images, which a ``"small-vit"`` is made for.
        head: what the loss asks of the last layer.
        segmentation: logits for every pixel.

    Raises:
        ValueError: an unknown name, a network of the other kind, one that cannot have that head, or a ``"small-vit"``
            for images whose sides are no multiples of 4.
        ImportError: the library that has the network is not installed.
    """
    if name in _NORMALISATIONS:
        network = SmallUNet if segmentation else SmallCNN
        return network(num_classes, channels=channels, head=head, norm=_NORMALISATIONS[name])
    if name == "small-vit":
        if segmentation:
            raise ValueError(
                "small-vit is for classification; without batch normalisation, small-gn is for segmentation"
            )
        return SmallViT(num_classes, channels=channels, size=size, head=head)
    source, _, network = name.partition(":")
    if source not in _SOURCES or not network:
        own = ", ".join([*_NORMALISATIONS, "small-vit"])
        raise ValueError(f"unknown model {name!r}: {own}, timm:NAME, torchvision:NAME or smp:ARCHITECTURE/ENCODER")
    model = _SOURCES[source](network, num_classes, channels, segmentation)
    if head != PLAIN_HEAD:
        _replace_head(model, name, num_classes, head)
    return model


_NORMALISATIONS: dict[str, Normalisation] = {"small": nn.BatchNorm2d, "small-gn": group_norm}


def _timm(name: str, num_classes: int, channels: int, segmentation: bool) -> nn.Module:
    name, *given = name.split(",")
    timm = _library("timm", f"timm:{name}")
    if segmentation:
        raise ValueError(f"timm has no networks for segmentation: smp:Unet/tu-{name} has one of its as the encoder")
    if not timm.is_model(name):
        raise ValueError(f"timm has no network {name!r}: timm.list_models() lists all")
    options = dict(map(_option, given))
    try:
        return timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=channels, **options)
    except (TypeError, ValueError) as error:
        if not options:
            raise
        raise ValueError(f"timm makes no {name} with {', '.join(given)}: {error}") from error


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ValueError(
            f"expected timm:NAME,OPTION=VALUE,... such as timm:vit_tiny_patch16_224,img_size=28, got {text!r}"
        )
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _torchvision(name: str, num_classes: int, channels: int, segmentation: bool) -> nn.Module:
    models = _library("torchvision", f"torchvision:{name}").models
    module = models.segmentation if segmentation else models
    if name not in models.list_models(module=module):
        kind, where = ("segmentation", ".segmentation") if segmentation else ("classification", "")
        raise ValueError(
            f"torchvision has no network {name!r} for {kind}: "
            f"torchvision.models.list_models(module=torchvision.models{where}) lists all"
        )
    options = {}
    if segmentation:
        options["weights_backbone"] = None  # or it is downloaded
    elif name in ("googlenet", "inception_v3"):
        options["aux_logits"] = False  # or they give several logits in training
    model = models.get_model(name, weights=None, num_classes=num_classes, **options)
    if channels != 3:
        _replace_first_convolution(model, name, channels)
    return _Logits(model) if segmentation else model


def _smp(name: str, num_classes: int, channels: int, segmentation: bool) -> nn.Module:
    smp = _library("segmentation_models_pytorch", f"smp:{name}")
    if not segmentation:
        raise ValueError("segmentation_models_pytorch has no networks for classification: timm:NAME, torchvision:NAME")
    architecture, slash, encoder = name.partition("/")
    if not (architecture and slash and encoder):
        raise ValueError(f"expected smp:ARCHITECTURE/ENCODER, such as smp:Unet/resnet18, got {'smp:' + name!r}")
    try:
        return smp.create_model(
            architecture, encoder_name=encoder, encoder_weights=None, in_channels=channels, classes=num_classes
        )
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"segmentation_models_pytorch makes no {architecture} with the encoder {encoder} ({error}): its "
            "documentation lists the architectures, segmentation_models_pytorch.encoders.get_encoder_names() encoders"
        ) from error


_SOURCES: dict[str, Callable[[str, int, int, bool], nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "smp": _smp,
}


def _library(name: str, model: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise  # the library is there, and broken
        raise ImportError(f"the model {model} needs {name}: pip install {name.replace('_', '-')}") from error


class _Logits(nn.Module):
    """One of torchvision's networks for segmentation, which give a dictionary."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.fused_upsample = False  # see fuse_upsampling

    def forward(self, x: Tensor) -> Tensor:
        if self.fused_upsample and self.training:
            return self.network.classifier(self.network.backbone(x)["out"])
        return self.network(x)["out"]


class _AtTest(nn.Module):
    """A module that training leaves out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else self.module(x)


@dataclass(frozen=True)
class Upsampling:
    """The last step of a network for segmentation, where the loss takes it: bilinear, to the size of the labels."""

    align_corners: bool = False
    multiple: int = 1
    """What the network fills the sides of images up to."""

    def labels(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Labels ``(N, H, W)`` filled up as the images are."""
        height, width = labels.shape[1:]
        return F.pad(labels, (0, -width % self.multiple, 0, -height % self.multiple), value=ignore_index)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits of the size of `labels`."""
        return F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=self.align_corners)


def fuse_upsampling(model: nn.Module, name: str) -> Upsampling:
    """Let a network for segmentation leave its last interpolation to the loss, while it is in training.

    It then gives the logits that it would interpolate, ``(N, C, h, w)``; in eval mode those of every pixel as before.

    Args:
        model: what :func:`make_model` made of `name`.
        name: as there.

    Raises:
        ValueError: the network does not end in a bilinear interpolation.

    Example::

        >>> import torch
        >>> from hem_ext.harness.models import fuse_upsampling, make_model
        >>> model = make_model("small", 11, channels=3, segmentation=True)
        >>> fuse_upsampling(model, "small")
        Upsampling(align_corners=False, multiple=8)
        >>> model(torch.zeros(2, 3, 16, 24)).shape, model.eval()(torch.zeros(2, 3, 16, 24)).shape
        (torch.Size([2, 11, 8, 12]), torch.Size([2, 11, 16, 24]))
    """
    if isinstance(model, SmallUNet):
        model.fused_upsample = True
        return Upsampling(multiple=model.multiple)
    if isinstance(model, _Logits) and type(model.network).__name__ != "LRASPP":  # whose last step is to add two
        model.fused_upsample = True
        return Upsampling()
    head = getattr(model, "segmentation_head", None)
    for path, module in [] if head is None else head.named_children():
        if isinstance(module, nn.Upsample) and module.mode == "bilinear":
            head.set_submodule(path, _AtTest(module).train(module.training))
            return Upsampling(align_corners=bool(module.align_corners))
    raise ValueError(f"{name} does not end in a bilinear interpolation, which the loss could take over")


def _replace_first_convolution(model: nn.Module, name: str, channels: int) -> None:
    """One that takes images of so many channels, with initial weights of its own."""
    path, old = next(((path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv2d)), ("", None))
    if old is None or old.in_channels != 3 or old.groups != 1:
        raise ValueError(f"torchvision:{name} cannot take images of {channels} channels, it takes 3")
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,
        old.stride,
        old.padding,
        old.dilation,
        bias=old.bias is not None,
        padding_mode=old.padding_mode,
    )
    model.set_submodule(path, new)


def _replace_head(model: nn.Module, name: str, num_classes: int, options: HeadOptions) -> None:
    old = head_of(model)
    path = next((path for path, module in model.named_modules() if module is old), "")
    # Where two layers beside each other give the classes, the logits are made of both.
    layers = [layer for layer in model.get_submodule(path.rpartition(".")[0]).children() if _gives(layer, num_classes)]
    if layers != [old]:
        raise ValueError(
            f"the loss asks for a head with {options}, but the last layer of {name} is not one linear layer or 1x1 "
            f"convolution that gives {num_classes} classes: {old}"
        )
    new = Head(old.weight.shape[1], num_classes, options)
    with torch.no_grad():
        new.weight.copy_(old.weight.flatten(1))
        if new.bias is not None and old.bias is not None:
            new.bias.copy_(old.bias)
    model.set_submodule(path, new)


def _gives(layer: nn.Module, num_classes: int) -> bool:
    """Whether a layer makes logits of each sample's or pixel's features."""
    if isinstance(layer, nn.Linear):
        return layer.out_features == num_classes
    if not isinstance(layer, nn.Conv2d) or layer.out_channels != num_classes:
        return False
    return (layer.kernel_size, layer.stride, layer.padding, layer.groups) == ((1, 1), (1, 1), (0, 0), 1)


SIZES = (28, 32, 64, 96, 128, 160, 192, 224, 256, 299, 384, 512)
"""Sides that a network is tried at, to say what it takes where it does not take what it is given."""


def check_size(model: nn.Module, name: str, image: Tensor) -> None:
    """Raise ValueError where a network cannot take an image of that size ``(channels, H, W)``."""
    error = _refused(model, image)
    if error is None:
        return
    sizes = (side for side in SIZES if _refused(model, image.new_zeros(len(image), side, side)) is None)
    taken = next(sizes, None)
    but = "" if taken is None else f", but of {_pixels((taken, taken))}"
    raise ValueError(f"{name} cannot take images of {_pixels(image.shape[1:])}{but}: {error}") from error


@torch.no_grad()
def _refused(model: nn.Module, image: Tensor) -> Exception | None:
    """What a network raises for an image, as in eval mode: one image alone has nothing to be normalised by."""
    was_training = model.training
    model.eval()
    try:
        model(image.unsqueeze(0))
    except (RuntimeError, ValueError, AssertionError) as error:
        return error
    finally:
        model.train(was_training)
    return None


@torch.no_grad()
def learns_from_one(model: nn.Module, image: Tensor) -> bool:
    """Whether a network can be trained on one image ``(channels, H, W)`` alone.

    Batch normalisation has nothing to normalise it by, where a channel has come down to one pixel.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            copy.deepcopy(model).train()(image.unsqueeze(0).to(next(model.parameters()).device))
        except ValueError:
            return False
    return True


@torch.no_grad()
def penultimate_features(model: nn.Module, images: Dataset, batch_size: int = 250) -> Tensor:
    """What the last layer of a classifier is given for every image, float32 ``(N, F)`` on the CPU.

    Args:
        model: a network whose last layer takes one vector a sample, or a map, which is averaged; it is put into eval
            mode.
        images: items ``(image, label)``.
        batch_size: images at once.
    """
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features = inputs[0].float().cpu()
        seen.append(features.mean((2, 3)) if features.dim() == 4 else features)

    hook = head_of(model).register_forward_pre_hook(keep)
    device = next(model.parameters()).device
    model.eval()
    try:
        for batch, _ in DataLoader(images, batch_size):
            model(batch.to(device))
    finally:
        hook.remove()
    return torch.cat(seen)


def head_of(model: nn.Module) -> nn.Module:
    """The last layer: ``head``, or what timm's ``get_classifier`` gives, or else the last module that has a weight."""
    if isinstance(model, Standardized):
        return head_of(model.network)
    for found in (getattr(model, "head", None), model.get_classifier() if hasattr(model, "get_classifier") else None):
        if isinstance(found, nn.Module) and hasattr(found, "weight"):
            return found
    return [module for module in model.modules() if getattr(module, "weight", None) is not None][-1]
