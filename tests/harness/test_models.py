import copy
import re
import sys
from collections import OrderedDict
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hem_ext import check_independence, hem_loss, upsampled_hem_loss
from hem_ext.harness.attacks import fgsm
from hem_ext.harness.data import Data, Split
from hem_ext.harness.models import (
    Head,
    HeadOptions,
    SmallCNN,
    SmallUNet,
    SmallViT,
    Standardized,
    Upsampling,
    check_size,
    fuse_upsampling,
    group_norm,
    head_of,
    learns_from_one,
    make_model,
    penultimate_features,
)
from hem_ext.harness.tasks.base import _try_network

COSINES = HeadOptions(normalise_weight=True, normalise_features=True, bias=False)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (28, 28), (4, 6), (3, 3)])
def test_cnn(size, channels):
    assert SmallCNN(7, channels=channels)(torch.zeros(3, channels, *size)).shape == (3, 7)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (48, 48), (16, 24), (5, 21), (1, 8)])
def test_unet(size, channels):
    model = SmallUNet(11, width=4, channels=channels)
    out = model(torch.zeros(2, channels, *size))
    assert out.shape == (2, 11, *size)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def convolutions(model):
    """Of each, channels in and out, and stride."""
    return [(m.in_channels, m.out_channels, *m.stride[:1]) for m in model.modules() if isinstance(m, nn.Conv2d)]


def test_layers():
    assert convolutions(SmallCNN(7, width=4, channels=3)) == [(3, 4, 2), (4, 8, 1), (8, 16, 1), (16, 16, 2)]
    down = [(3, 4, 2), (4, 4, 1), (4, 8, 1), (8, 8, 1), (8, 16, 1), (16, 16, 1)]
    up = [(24, 8, 1), (8, 8, 1), (12, 4, 1), (4, 4, 1)]
    assert convolutions(SmallUNet(7, width=4, channels=3)) == down + up
    model = SmallViT(7, size=(8, 12))
    *layers, norm = model.layers
    assert [(layer.linear1.in_features, layer.linear1.out_features) for layer in layers] == [(48, 96)] * 3
    assert [layer.self_attn.num_heads for layer in layers] == [3] * 3
    assert isinstance(norm, nn.LayerNorm)
    assert model.positions.shape == (6, 48)
    assert model.positions.std().item() == pytest.approx(0.02, rel=0.2)


def test_cnn_by_hand():
    model, images = SmallCNN(7, width=4).eval(), torch.rand(2, 1, 28, 28)

    def layer(block, x, stride):
        convolution, norm, _ = block
        assert convolution.bias is None
        return F.relu(norm(F.conv2d(x, convolution.weight, None, stride, padding=1)))

    first, second, _, third, fourth = model.features
    x = F.max_pool2d(layer(second, layer(first, images, 2), 1), 2)
    assert x.shape == (2, 8, 7, 7)
    x = layer(fourth, layer(third, x, 1), 2)
    assert x.shape == (2, 16, 4, 4)
    torch.testing.assert_close(model.forward_features(images), x.mean((2, 3)))


def test_unet_by_hand():
    model, x = SmallUNet(7, width=4).eval(), torch.rand(2, 1, 16, 24)
    first = model.down[0](x)
    second = model.down[1](F.max_pool2d(first, 2))
    third = model.down[2](F.max_pool2d(second, 2))
    second = model.up[0](torch.cat([F.interpolate(third, (4, 6), mode="bilinear"), second], 1))
    first = model.up[1](torch.cat([F.interpolate(second, (8, 12), mode="bilinear"), first], 1))
    torch.testing.assert_close(model(x), F.interpolate(model.head(first), (16, 24), mode="bilinear"))


def test_cnn_features():
    model = SmallCNN(7, width=4).eval()
    x = torch.rand(3, 1, 8, 8)
    features = model.forward_features(x)
    assert features.shape == (3, 16)
    torch.testing.assert_close(model(x), features @ model.head.weight.T + model.head.bias)


def test_a_plain_head_is_torchs():
    layers = []
    for make in (lambda: Head(6, 4), lambda: nn.Linear(6, 4), lambda: nn.Conv2d(6, 4, 1)):
        torch.manual_seed(0)
        layers.append((make(), torch.rand(1)))
    (head, after), *others = layers
    for layer, after_layer in others:
        assert torch.equal(head.weight, layer.weight.view(4, 6))
        assert torch.equal(head.bias, layer.bias)
        assert torch.equal(after, after_layer)  # as many random numbers drawn
    linear, conv = (layer for layer, _ in others)
    rows = torch.randn(3, 6)
    assert torch.equal(head(rows), linear(rows))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        maps = torch.randn(2, 6, 5, 3).to(memory_format=memory_format)
        assert torch.equal(head(maps), conv(maps))
        assert head(maps).is_contiguous(memory_format=memory_format)


def each_pixel(head, maps):
    return head(maps.movedim(1, -1).reshape(-1, maps.shape[1])).view(len(maps), *maps.shape[2:], -1).movedim(-1, 1)


@pytest.mark.parametrize("options", [COSINES, HeadOptions(normalise_weight=True)])
def test_a_head_that_normalises(options):
    head = Head(6, 4, options)
    nn.init.normal_(head.weight, std=5)
    x = torch.randn(3, 6)
    expected = torch.empty(3, 4)
    for n in range(3):
        for c in range(4):
            if options == COSINES:
                expected[n, c] = F.cosine_similarity(x[n], head.weight[c], dim=0)
            else:
                expected[n, c] = x[n] @ head.weight[c] / head.weight[c].norm() + head.bias[c]
    torch.testing.assert_close(head(x), expected)
    assert (head.bias is None) == (options == COSINES)

    maps = torch.randn(2, 6, 5, 3)
    torch.testing.assert_close(head(maps), each_pixel(head, maps))


@pytest.mark.parametrize("shape", [(2000, 6), (20, 6, 10, 10)])
def test_a_head_with_dropout(shape):
    head = Head(6, 1, HeadOptions(dropout=0.25, bias=False))
    nn.init.ones_(head.weight)
    kept = head(torch.ones(shape)) * 0.75  # how many of 6 features were kept
    torch.testing.assert_close(kept, kept.round())
    assert len(kept.unique()) > 3
    assert kept.mean().item() == pytest.approx(4.5, abs=0.15)
    assert (head.eval()(torch.ones(shape)) == 6).all()


@pytest.mark.parametrize("network", [SmallCNN, SmallUNet, SmallViT])
def test_networks_take_a_head(network):
    options = {"width": 16, "size": (8, 8)} if network is SmallViT else {"width": 4}
    model = network(3, head=COSINES, **options)
    logits = model(torch.rand(2, 1, 8, 8))
    assert model.head.options == COSINES
    assert logits.abs().max() < 1 + 1e-5
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_sides_that_are_no_multiple_of_8_are_filled_up_with_the_last_row_and_column():
    torch.manual_seed(0)
    model = SmallUNet(3, width=4).eval()
    images = torch.rand(2, 1, 13, 20)
    rows, columns = torch.arange(16).clamp(max=12), torch.arange(24).clamp(max=19)
    filled = model(images[:, :, rows][:, :, :, columns])
    torch.testing.assert_close(model(images), filled[:, :, :13, :20])


# --- without batch normalisation ------------------------------------------------------------------------------


@pytest.mark.parametrize("segmentation", [False, True])
def test_small_gn_is_small_with_another_normalisation(segmentation):
    networks = []
    for name in ("small", "small-gn"):
        torch.manual_seed(0)
        networks.append(make_model(name, 7, channels=3, segmentation=segmentation))
    batch, group = ([m for m in model.modules() if not list(m.children())] for model in networks)
    assert len(batch) == len(group)
    for a, b in zip(batch, group, strict=True):
        if isinstance(a, nn.BatchNorm2d):
            assert isinstance(b, nn.GroupNorm)
            assert (b.num_groups, b.num_channels) == (8, a.num_features)
        else:
            assert type(a) is type(b)
            assert all(map(torch.equal, a.parameters(), b.parameters()))
    # A sample says of another what batch normalisation makes of it.
    images = torch.rand(3, 3, 16, 24)
    assert not check_independence(networks[0], images, raise_exception=False)
    assert check_independence(networks[1], images)


@pytest.mark.parametrize(("channels", "groups"), [(16, 8), (4, 4), (12, 4), (3, 1)])
def test_group_norm_divides_the_channels(channels, groups):
    assert group_norm(channels).num_groups == groups


def by_hand(model, image):
    """The features of one image ``(channels, H, W)``, patch by patch, the attention written out."""
    size = model.patch
    rows, columns = image.shape[1] // size, image.shape[2] // size
    patches = [
        image[:, size * (i // columns) :, size * (i % columns) :][:, :size, :size] for i in range(rows * columns)
    ]
    weight, bias = model.patches.weight.flatten(1), model.patches.bias
    x = torch.stack([weight @ patch.flatten() + bias for patch in patches]) + model.positions
    *layers, norm = model.layers
    for layer in layers:
        attention, width = layer.self_attn, x.shape[1]
        q, k, v = (layer.norm1(x) @ attention.in_proj_weight.T + attention.in_proj_bias).split(width, 1)
        heads = []
        for a, b, c in zip(*(part.split(16, 1) for part in (q, k, v)), strict=True):
            heads.append((a @ b.T / 4).softmax(1) @ c)
        x = x + attention.out_proj(torch.cat(heads, 1))
        x = x + layer.linear2(F.gelu(layer.linear1(layer.norm2(x))))
    return norm(x).mean(0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (8, 12))])
def test_vit(channels, size, training):
    model = SmallViT(7, width=32, channels=channels, size=size).train(training)
    images = torch.rand(3, channels, *size)
    features = model.forward_features(images)
    torch.testing.assert_close(features, torch.stack([by_hand(model, image) for image in images]))
    with torch.no_grad():  # where torch has a shorter way in eval mode
        torch.testing.assert_close(model(images), features @ model.head.weight.T + model.head.bias)
    assert check_independence(model, images)
    model(images).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p is not model.head.bias)
    weights = [layer.linear1.weight for layer in model.layers[:-1]]
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize(
    ("made_for", "given", "words"),
    [
        ((30, 28), None, "sides are multiples of 4, got 30 x 28 pixels"),
        ((28, 0), None, "sides are multiples of 4, got 28 x 0 pixels"),
        ((28, 28), (32, 28), "made for images of 28 x 28 pixels, got 32 x 28 pixels"),
        ((4, 16), (8, 8), "made for images of 4 x 16 pixels, got 8 x 8 pixels"),  # as many patches
    ],
)
def test_sizes_that_a_vit_does_not_take(made_for, given, words):
    with pytest.raises(ValueError, match=words):
        make_model("small-vit", 7, size=made_for)(torch.zeros(2, 1, *(given or made_for)))


def test_a_vit_is_for_classification():
    words = "^small-vit is for classification; without batch normalisation, small-gn is for segmentation$"
    with pytest.raises(ValueError, match=words):
        make_model("small-vit", 7, segmentation=True)


# --- standardised inputs --------------------------------------------------------------------------------------


def standardized(network):
    return Standardized(network, torch.tensor([0.2, 0.6]), torch.tensor([0.1, 0.4]))


def test_a_network_is_given_standardised_images():
    images = torch.rand(3, 2, 4, 5)
    expected = torch.stack([(images[:, 0] - 0.2) / 0.1, (images[:, 1] - 0.6) / 0.4], dim=1)
    torch.testing.assert_close(standardized(nn.Identity())(images), expected)


def test_what_it_standardises_by_is_kept_and_not_trained():
    model = standardized(SmallCNN(3, width=4, channels=2))
    assert {name for name, _ in model.named_parameters()} == {
        f"network.{name}" for name, _ in model.network.named_parameters()
    }
    other = Standardized(SmallCNN(3, width=4, channels=2), torch.zeros(2), torch.ones(2))
    other.load_state_dict(model.state_dict())
    images = torch.rand(4, 2, 8, 8)
    assert torch.equal(other.eval()(images), model.eval()(images))


@pytest.mark.parametrize("network", [SmallCNN, SmallUNet])
def test_the_head_behind_it_is_found(network):
    model = standardized(network(3, width=4, channels=2, head=COSINES))
    assert head_of(model) is model.network.head
    plain = nn.Sequential(nn.Flatten(), nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 2))
    assert head_of(standardized(plain)) is plain[3]


def test_the_head_is_what_is_called_so_or_the_classifier_or_the_last_layer():
    class Three(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head, self.middle, self.last = head, nn.Linear(3, 3), nn.Linear(3, 2)

    class Timm(Three):
        def get_classifier(self):
            return self.middle

    named = Timm(nn.Linear(3, 3))
    assert head_of(named) is named.head
    classified, plain = Timm(nn.Identity()), Three(nn.Identity())
    assert head_of(classified) is classified.middle
    assert head_of(plain) is plain.last


def test_features_behind_it():
    model = standardized(SmallCNN(3, width=4, channels=2)).eval()
    images = torch.rand(4, 2, 8, 8)
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    features = penultimate_features(model, Split(images, torch.zeros(4, dtype=torch.int64)), batch_size=3)
    assert sizes == [3, 1]
    expected = model.network.forward_features((images - model.mean) / model.deviation)
    torch.testing.assert_close(features, expected)


def test_attacks_stay_in_0_to_1():
    torch.manual_seed(0)
    model = standardized(SmallCNN(3, width=4, channels=2)).eval()
    images, labels = torch.rand(6, 2, 8, 8), torch.arange(6) % 3
    changed = fgsm(model, images, labels, 0.1).images
    assert 0 <= changed.min() < changed.max() <= 1
    assert (changed - images).abs().max() <= 0.1 + 1e-6
    # By the gradient of images in [0, 1]: standardising has the same sign everywhere.
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), labels), x)
    expected = (images + 0.1 * gradient.sign()).clamp(0, 1)
    right = model(images).argmax(1) == labels
    torch.testing.assert_close(changed[right], expected[right], atol=1e-6, rtol=0)


# The libraries import torchvision's native parts, which need the build of torch that they were made for: these are
# networks of the same structure, made by functions with the same arguments.


def stem(channels):
    return nn.Sequential(nn.Conv2d(channels, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU())


class Classifier(nn.Module):
    """As a ResNet: features, then a linear layer."""

    def __init__(self, num_classes, channels=3):
        super().__init__()
        self.stem = stem(channels)
        # Not the head, though it gives as many numbers as there are classes in a test.
        self.excitation = nn.Sequential(nn.Conv2d(10, 7, 1), nn.Conv2d(7, 10, 1))
        self.fc = nn.Linear(10, num_classes)

    def forward(self, x):
        x = self.stem(x)
        return self.fc((x + self.excitation(x)).mean((2, 3)))


class ConvClassifier(Classifier):
    """Its last layer is a convolution over a map of one pixel, in a module called head."""

    def __init__(self, num_classes, channels=3):
        super().__init__(1, channels)
        del self.fc
        self.head = nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(1), fc=nn.Conv2d(10, num_classes, 1)))
        self.head.append(nn.Flatten())

    def forward(self, x):
        return self.head(self.stem(x))

    def get_classifier(self):
        return self.head.fc


class Transformer(nn.Module):
    """As timm's: made for one size of images, patches with a table of positions, and a plain layer called head."""

    def __init__(self, num_classes, channels=3, img_size=224, patch_size=16, drop_path_rate=0.0):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"image size {img_size} is no multiple of {patch_size}")
        self.img_size, self.drop_path_rate = img_size, drop_path_rate
        self.patch_embed = nn.Conv2d(channels, 10, patch_size, patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(10, img_size // patch_size, img_size // patch_size))
        self.head = nn.Linear(10, num_classes)

    def forward(self, x):
        assert x.shape[2:] == (self.img_size, self.img_size), "Input height doesn't match model"
        return self.head((self.patch_embed(x) + self.pos_embed).mean((2, 3)))

    def get_classifier(self):
        return self.head


class Patches(nn.Module):
    """As ConvNeXt: convolutions without padding, whose kernels are as large as their strides."""

    def __init__(self, num_classes, channels=3):
        super().__init__()
        strides = nn.Conv2d(channels, 10, 4, 4), *(nn.Conv2d(10, 10, 2, 2) for _ in range(3))
        self.stages = nn.Sequential(*strides, nn.BatchNorm2d(10))
        self.head = nn.Linear(10, num_classes)

    def forward(self, x):
        return self.head(self.stages(x).mean((2, 3)))


class TwoHeads(Classifier):
    """As a distilled vision transformer."""

    def __init__(self, num_classes, channels=3):
        super().__init__(num_classes, channels)
        self.fc_distilled = nn.Linear(10, num_classes)

    def get_classifier(self):
        return self.fc, self.fc_distilled


class Segmenter(nn.Module):
    """As those of torchvision, a dictionary."""

    def __init__(self, num_classes):
        super().__init__()
        self.backbone = stem(3)
        self.classifier = nn.Sequential(nn.Conv2d(10, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, num_classes, 1))

    def forward(self, x):
        return OrderedDict(out=self.classifier(self.backbone(x)))


class Interpolated(Segmenter):
    """As FCN and DeepLabV3: their logits are a quarter as wide as the image, and interpolated."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        features = nn.Sequential(nn.AvgPool2d(4, ceil_mode=True), self.backbone)
        self.backbone = type("Features", (nn.Module,), {"forward": lambda m, x: OrderedDict(out=m.features(x))})()
        self.backbone.features = features

    def forward(self, x):
        logits = self.classifier(self.backbone(x)["out"])
        return OrderedDict(out=nn.functional.interpolate(logits, size=x.shape[2:], mode="bilinear"))


class LRASPP(Segmenter):
    """The logits are a sum of two layers'."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.classifier = nn.ModuleDict({"low": nn.Conv2d(10, num_classes, 1), "high": nn.Conv2d(10, num_classes, 1)})

    def forward(self, x):
        x = self.backbone(x)
        return OrderedDict(out=self.classifier["low"](x) + self.classifier["high"](x))


@pytest.fixture
def _libraries(monkeypatch):
    def timm_create_model(model_name, pretrained=False, **kwargs):
        assert not pretrained
        networks = {"resnet": Classifier, "bit": ConvClassifier, "deit": TwoHeads, "vit": Transformer}
        network = networks.get(model_name, Patches)
        return network(kwargs.pop("num_classes", 1000), kwargs.pop("in_chans", 3), **kwargs)

    def get_model(name, **config):
        assert config.pop("weights") is None
        if name in segmentation.networks:
            assert config.pop("weights_backbone") is None
            return segmentation.networks[name](**config)
        if name in ("googlenet", "inception_v3"):
            assert config.pop("aux_logits") is False
        return models.networks[name](**config)

    def smp_create_model(arch, encoder_name="resnet34", encoder_weights="imagenet", in_channels=3, classes=1):
        assert encoder_weights is None
        if arch.lower() not in ("unet", "fpn"):
            raise KeyError(f"Wrong architecture type `{arch}`.")
        if encoder_name != "resnet18":
            raise KeyError(f"Wrong encoder name `{encoder_name}`")
        size = {"unet": 3, "fpn": 1}[arch.lower()]
        head = nn.Sequential(nn.Conv2d(10, classes, size, padding=size // 2))
        if arch == "Unet":
            return nn.Sequential(OrderedDict(decoder=stem(in_channels), segmentation_head=head))
        head.append(nn.Upsample(mode="bilinear", scale_factor=4, align_corners=True))
        decoder = nn.Sequential(nn.AvgPool2d(4, ceil_mode=True), stem(in_channels))
        return nn.Sequential(OrderedDict(decoder=decoder, segmentation_head=head))

    timm, torchvision, smp = map(ModuleType, ("timm", "torchvision", "segmentation_models_pytorch"))
    timm.create_model = timm_create_model
    timm.is_model = lambda name: name in ("resnet", "bit", "deit", "vit", "convnext_atto")
    torchvision.models = models = ModuleType("torchvision.models")
    models.segmentation = segmentation = ModuleType("torchvision.models.segmentation")
    models.networks = dict.fromkeys(("resnet", "googlenet", "inception_v3"), Classifier)
    segmentation.networks = {"fcn": Segmenter, "lraspp": LRASPP, "deeplab": Interpolated}
    models.list_models = lambda module=None: list(module.networks)
    models.get_model = get_model
    smp.create_model = smp_create_model
    for module in (timm, torchvision, smp):
        monkeypatch.setitem(sys.modules, module.__name__, module)


VIT = "timm:vit,img_size=8,patch_size=4"
OWN = ["small", "small-gn"]
OF_TORCHVISION = [f"torchvision:{name}" for name in ("resnet", "googlenet", "inception_v3")]
CLASSIFIERS = [*OWN, "small-vit", "timm:resnet", "timm:bit", VIT, *OF_TORCHVISION]
SEGMENTERS = [*OWN, "torchvision:fcn", "smp:FPN/resnet18"]


@pytest.mark.usefixtures("_libraries")
@pytest.mark.parametrize("name", [*OWN, "torchvision:deeplab", "smp:FPN/resnet18"])
def test_the_loss_can_take_over_the_last_interpolation(name):
    torch.manual_seed(0)
    model = make_model(name, 5, channels=3, segmentation=True).double()
    images, labels = torch.randn(2, 3, 16, 24, dtype=torch.float64), torch.randint(0, 5, (2, 16, 24))
    logits = model.train()(images)
    hem_loss(logits, labels, ignore_index=255).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    upsampling = fuse_upsampling(model.eval(), name)
    assert upsampling.multiple == (8 if name in OWN else 1)
    assert model(images).shape == logits.shape
    coarse = model.train()(images)
    assert coarse.shape == ((2, 5, 8, 12) if name in OWN else (2, 5, 4, 6))
    torch.testing.assert_close(upsampling(coarse, labels), logits)
    upsampled_hem_loss(coarse, labels, align_corners=upsampling.align_corners).backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


@pytest.mark.parametrize(("multiple", "shape"), [(1, (13, 21)), (5, (15, 25)), (8, (16, 24))])
def test_labels_are_filled_up_as_images_are(multiple, shape):
    labels = torch.randint(0, 5, (2, 13, 21))
    filled = Upsampling(multiple=multiple).labels(labels, 255)
    assert filled.shape == (2, *shape)
    assert torch.equal(filled[:, :13, :21], labels)
    assert (filled == 255).sum() == filled.numel() - labels.numel()


@pytest.mark.usefixtures("_libraries")
@pytest.mark.parametrize("name", ["torchvision:lraspp", "smp:Unet/resnet18"])
def test_a_network_that_does_not_end_in_an_interpolation(name):
    with pytest.raises(ValueError, match=f"{name} does not end in a bilinear interpolation"):
        fuse_upsampling(make_model(name, 5, channels=3, segmentation=True), name)


@pytest.mark.usefixtures("_libraries")
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("options", [HeadOptions(), COSINES, HeadOptions(dropout=0.5)])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_by_name(name, options, channels):
    model = make_model(name, 7, channels=channels, size=(8, 8), head=options).eval()
    images = torch.rand(5, channels, 8, 8)
    logits = model(images)
    assert logits.shape == (5, 7)
    features = penultimate_features(model, Split(images, torch.zeros(5, dtype=torch.int64)), batch_size=3)
    assert features.dim() == 2
    head = head_of(model)
    if options != HeadOptions():
        assert head.options == options
    expected = F.linear(features, head.weight.flatten(1), head.bias)
    if options == COSINES:
        expected = F.normalize(features) @ F.normalize(head.weight).T
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert head.weight.grad is not None


@pytest.mark.usefixtures("_libraries")
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("options", [HeadOptions(), COSINES])
@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmenters_by_name(name, options, channels):
    model = make_model(name, 7, channels=channels, head=options, segmentation=True)
    maps = []
    head_of(model).register_forward_hook(lambda *arguments: maps.append(arguments[-1]))
    logits = model(torch.rand(2, channels, 16, 8))
    assert logits.shape == (2, 7, 16, 8)
    # The small networks work at half the size, others at a quarter.
    expected = F.interpolate(maps[0], size=(16, 8), mode="bilinear", align_corners="smp" in name)
    torch.testing.assert_close(logits, expected)
    size = (8, 4) if name in OWN else (4, 2) if name.startswith("smp") else (16, 8)
    assert maps[0].shape[2:] == size
    if options != HeadOptions():
        assert head_of(model).options == options


@pytest.mark.usefixtures("_libraries")
@pytest.mark.parametrize(
    ("name", "segmentation"), [("timm:resnet", False), ("timm:bit", False), (VIT, False), ("torchvision:fcn", True)]
)
def test_every_head_starts_from_the_same_weights(name, segmentation):
    heads, others = [], []
    for options in (HeadOptions(), HeadOptions(dropout=0.5), COSINES):
        torch.manual_seed(0)
        model = make_model(name, 7, head=options, segmentation=segmentation)
        heads.append(head_of(model))
        others.append([p for p in model.parameters() if not any(p is q for q in heads[-1].parameters())])
    assert all(torch.equal(head.weight, heads[0].weight.flatten(1)) for head in heads[1:])
    assert torch.equal(heads[1].bias, heads[0].bias)
    assert heads[2].bias is None
    for parameters in others[1:]:
        assert all(torch.equal(a, b) for a, b in zip(parameters, others[0], strict=True))


@pytest.mark.usefixtures("_libraries")
@pytest.mark.parametrize(
    ("name", "segmentation"), [("timm:deit", False), ("torchvision:lraspp", True), ("smp:Unet/resnet18", True)]
)
def test_a_head_that_cannot_be_replaced(name, segmentation):
    assert hasattr(head_of(make_model(name, 7, segmentation=segmentation)), "weight")
    with pytest.raises(ValueError, match=f"the last layer of {name} is not one linear layer or 1x1"):
        make_model(name, 7, head=COSINES, segmentation=segmentation)


@pytest.mark.usefixtures("_libraries")
@pytest.mark.parametrize(
    ("name", "segmentation", "message"),
    [
        ("resnet", False, "unknown model 'resnet': small, small-gn, small-vit, timm:NAME"),
        ("small,width=3", False, "unknown model 'small,width=3'"),
        ("timm:", False, "unknown model 'timm:'"),
        ("keras:resnet", False, "unknown model 'keras:resnet'"),
        ("timm:a:b", False, "timm has no network 'a:b': timm.list_models()"),
        ("timm:alexnet", False, "timm has no network 'alexnet': timm.list_models()"),
        ("timm:resnet", True, "timm has no networks for segmentation: smp:Unet/tu-resnet"),
        (
            "torchvision:fcn",
            False,
            "torchvision has no network 'fcn' for classification: "
            "torchvision.models.list_models(module=torchvision.models) lists all",
        ),
        (
            "torchvision:resnet",
            True,
            "torchvision has no network 'resnet' for segmentation: "
            "torchvision.models.list_models(module=torchvision.models.segmentation) lists all",
        ),
        (
            "smp:Unet/resnet18",
            False,
            "^segmentation_models_pytorch has no networks for classification: timm:NAME, torchvision:NAME$",
        ),
        ("smp:Unet/", True, "expected smp:ARCHITECTURE/ENCODER, such as smp:Unet/resnet18, got 'smp:Unet/'"),
        ("smp:/resnet18", True, "expected smp:ARCHITECTURE/ENCODER, such as smp:Unet/resnet18, got 'smp:/resnet18'"),
        ("smp:Unet/a/b", True, "makes no Unet with the encoder a/b ("),
        ("smp:Unet", True, "expected smp:ARCHITECTURE/ENCODER, such as smp:Unet/resnet18, got 'smp:Unet'"),
        ("smp:Vnet/resnet18", True, "makes no Vnet with the encoder resnet18 ('Wrong architecture type"),
        (
            "smp:Unet/resnet19",
            True,
            "makes no Unet with the encoder resnet19 ('Wrong encoder name `resnet19`'): its documentation "
            "lists the architectures, segmentation_models_pytorch.encoders.get_encoder_names() encoders$",
        ),
    ],
)
def test_names_that_there_are_not(name, segmentation, message):
    with pytest.raises(ValueError, match=re.escape(message.strip("^$"))) as error:
        make_model(name, 7, segmentation=segmentation)
    assert message in f"^{error.value}$"


@pytest.mark.usefixtures("_libraries")
@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("timm:convnext_atto", (28, 28), "28 x 28 pixels, but of 32 x 32 pixels: .*[Kk]ernel size can't be greater"),
        ("timm:convnext_atto", (40, 8), "40 x 8 pixels, but of 32 x 32 pixels: "),
        ("timm:vit", (28, 28), "28 x 28 pixels, but of 224 x 224 pixels: Input height doesn't match model"),
        ("timm:vit,img_size=48", (28, 28), "28 x 28 pixels: Input height doesn't match model"),
    ],
)
def test_sizes_that_a_network_does_not_take(name, size, words):
    model = make_model(name, 7, channels=3, size=size)
    with pytest.raises(ValueError, match=f"^{name} cannot take images of {words}"):
        check_size(model, name, torch.zeros(3, *size))
    assert model.training


@pytest.mark.usefixtures("_libraries")
@pytest.mark.parametrize("name", ["timm:convnext_atto", "timm:bit"])
def test_a_size_that_a_network_takes(name):
    model = make_model(name, 7)
    before = copy.deepcopy(model.state_dict())
    check_size(model, name, torch.rand(1, 32, 32))  # one image, which has a single pixel in the end
    assert all(torch.equal(values, before[key]) for key, values in model.state_dict().items())


@pytest.mark.usefixtures("_libraries")
def test_images_and_the_parts_of_them_that_are_trained_on_are_tried_before_training():
    class Cropped(Split):
        def for_training(self):
            return Split(self.images[..., :24, :24], self.labels)

    images, labels = torch.rand(4, 1, 32, 32), torch.arange(4) % 2
    about = {"validation": None, "test": None, "classes": ("a", "b"), "channels": 1}
    name = "timm:convnext_atto"
    _try_network(name, Data(train=Split(images, labels), **about), segmentation=False)
    for train, words in ((Cropped(images, labels), "24 x 24"), (Split(images[..., :28], labels), "32 x 28")):
        with pytest.raises(ValueError, match=f"{name} cannot take images of {words} pixels"):
            _try_network(name, Data(train=train, **about), segmentation=False)


@pytest.mark.usefixtures("_libraries")
def test_a_network_of_timm_takes_options():
    model = make_model("timm:vit,img_size=28,patch_size=7,drop_path_rate=0.25", 7, channels=1)
    assert model.drop_path_rate == 0.25
    assert make_model("timm:vit,drop_path_rate=a=b", 7).drop_path_rate == "a=b"
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 7)
    for given, words in (
        (
            "img_size",
            "expected timm:NAME,OPTION=VALUE,... such as timm:vit_tiny_patch16_224,img_size=28, got 'img_size'",
        ),
        ("img_size=", "such as timm:vit_tiny_patch16_224,img_size=28, got 'img_size='"),
        ("=28", "such as timm:vit_tiny_patch16_224,img_size=28, got '=28'"),
        (
            "img_size=28,patch_size=16",
            "timm makes no vit with img_size=28, patch_size=16: image size 28 is no multiple",
        ),
        ("colour=red", "timm makes no vit with colour=red: "),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            make_model(f"timm:vit,{given}", 7)


@pytest.mark.usefixtures("_libraries")
def test_a_network_that_does_not_begin_with_a_convolution(monkeypatch):
    networks = {"linear": lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))}
    monkeypatch.setattr(sys.modules["torchvision"].models, "networks", networks)
    make_model("torchvision:linear", 7, channels=3)
    with pytest.raises(ValueError, match="torchvision:linear cannot take images of 1 channels"):
        make_model("torchvision:linear", 7, channels=1)


@pytest.mark.usefixtures("_libraries")
@pytest.mark.parametrize("bias", [True, False])
def test_a_first_convolution_for_other_images_is_as_the_network_s_own(monkeypatch, bias):
    settings = {
        "kernel_size": (3, 5),
        "stride": 2,
        "padding": 4,
        "dilation": 3,
        "bias": bias,
        "padding_mode": "reflect",
    }

    def network(num_classes):
        return nn.Sequential(nn.Identity(), nn.Sequential(nn.Conv2d(3, 6, **settings)), nn.Conv2d(6, num_classes, 1))

    monkeypatch.setattr(sys.modules["torchvision"].models, "networks", {"odd": network})
    plain, model = (make_model("torchvision:odd", 7, channels=channels) for channels in (3, 4))
    assert str(model) == str(plain).replace("Conv2d(3, 6", "Conv2d(4, 6")
    assert (model[1][0].bias is not None) is bias
    assert model(torch.rand(2, 4, 16, 16)).shape == plain(torch.rand(2, 3, 16, 16)).shape


@pytest.mark.usefixtures("_libraries")
@pytest.mark.parametrize("first", [nn.Conv2d(1, 6, 3), nn.Conv2d(3, 6, 3, groups=3)])
def test_a_first_convolution_that_is_not_of_three_channels(monkeypatch, first):
    monkeypatch.setattr(
        sys.modules["torchvision"].models, "networks", {"odd": lambda num_classes: nn.Sequential(first)}
    )
    with pytest.raises(ValueError, match=r"^torchvision:odd cannot take images of 4 channels, it takes 3$"):
        make_model("torchvision:odd", 7, channels=4)


@pytest.mark.parametrize(("norm", "side", "learns"), [(None, 8, False), (None, 16, True), (group_norm, 8, True)])
def test_which_networks_learn_from_one_image(norm, side, learns):
    options = {"norm": norm} if norm else {}
    model = SmallCNN(3, width=4, channels=3, head=HeadOptions(dropout=0.5), **options).eval()
    image, before, random = torch.rand(3, side, side), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert learns_from_one(model, image) is learns
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("timm:resnet", "timm"),
        ("torchvision:resnet", "torchvision"),
        ("smp:Unet/resnet18", "segmentation-models-pytorch"),
    ],
)
def test_a_missing_library_is_named(monkeypatch, name, package):
    module = package.replace("-", "_")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"the model {name} needs {module}: pip install {package}"):
        make_model(name, 7, segmentation=name.startswith("smp"))


def test_a_broken_library_is_not_hidden(monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text("import a_module_that_is_missing")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_missing"):
        make_model("timm:resnet", 7)
