import re
import sys
from collections import OrderedDict
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hem_ext.harness.attacks import fgsm
from hem_ext.harness.data import Split
from hem_ext.harness.models import (
    Head,
    HeadOptions,
    SmallCNN,
    SmallUNet,
    Standardized,
    head_of,
    make_model,
    penultimate_features,
)

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


@pytest.mark.parametrize("network", [SmallCNN, SmallUNet])
def test_networks_take_a_head(network):
    model = network(3, width=4, head=COSINES)
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


def test_features_behind_it():
    model = standardized(SmallCNN(3, width=4, channels=2)).eval()
    images = torch.rand(4, 2, 8, 8)
    features = penultimate_features(model, Split(images, torch.zeros(4, dtype=torch.int64)))
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


class TwoMaps(Segmenter):
    """As LR-ASPP: the logits are a sum of two layers'."""

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
        network = {"resnet": Classifier, "bit": ConvClassifier, "deit": TwoHeads}[model_name]
        return network(kwargs.pop("num_classes", 1000), kwargs.pop("in_chans", 3), **kwargs)

    def get_model(name, **config):
        assert config.pop("weights") is None
        if name in segmentation.networks:
            assert config.pop("weights_backbone") is None
            return segmentation.networks[name](**config)
        if name == "googlenet":
            assert config.pop("aux_logits") is False
        return models.networks[name](**config)

    def smp_create_model(arch, encoder_name="resnet34", encoder_weights="imagenet", in_channels=3, classes=1):
        assert encoder_weights is None
        if arch.lower() not in ("unet", "fpn"):
            raise KeyError(f"Wrong architecture type `{arch}`.")
        if encoder_name != "resnet18":
            raise KeyError(f"Wrong encoder name `{encoder_name}`")
        size = {"unet": 3, "fpn": 1}[arch.lower()]
        return nn.Sequential(stem(in_channels), nn.Sequential(nn.Conv2d(10, classes, size, padding=size // 2)))

    timm, torchvision, smp = map(ModuleType, ("timm", "torchvision", "segmentation_models_pytorch"))
    timm.create_model = timm_create_model
    timm.is_model = lambda name: name in ("resnet", "bit", "deit")
    torchvision.models = models = ModuleType("torchvision.models")
    models.segmentation = segmentation = ModuleType("torchvision.models.segmentation")
    models.networks = {"resnet": Classifier, "googlenet": Classifier}
    segmentation.networks = {"fcn": Segmenter, "lraspp": TwoMaps}
    models.list_models = lambda module=None: list(module.networks)
    models.get_model = get_model
    smp.create_model = smp_create_model
    for module in (timm, torchvision, smp):
        monkeypatch.setitem(sys.modules, module.__name__, module)


CLASSIFIERS = ["small", "timm:resnet", "timm:bit", "torchvision:resnet", "torchvision:googlenet"]
SEGMENTERS = ["small", "torchvision:fcn", "smp:FPN/resnet18"]


@pytest.mark.usefixtures("_libraries")
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("options", [HeadOptions(), COSINES, HeadOptions(dropout=0.5)])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_by_name(name, options, channels):
    model = make_model(name, 7, channels=channels, head=options).eval()
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
    # The small network works at half the size.
    assert torch.equal(F.interpolate(maps[0], size=(16, 8), mode="bilinear"), logits)
    assert maps[0].shape[2:] == ((8, 4) if name == "small" else (16, 8))
    if options != HeadOptions():
        assert head_of(model).options == options


@pytest.mark.usefixtures("_libraries")
@pytest.mark.parametrize(
    ("name", "segmentation"), [("timm:resnet", False), ("timm:bit", False), ("torchvision:fcn", True)]
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
        ("resnet", False, "unknown model 'resnet': small, timm:NAME"),
        ("timm:", False, "unknown model 'timm:'"),
        ("keras:resnet", False, "unknown model 'keras:resnet'"),
        ("timm:alexnet", False, "timm has no network 'alexnet': timm.list_models()"),
        ("timm:resnet", True, "timm has no networks for segmentation: smp:Unet/tu-resnet"),
        ("torchvision:fcn", False, "'fcn' for classification: torchvision.models.list_models("),
        ("torchvision:resnet", True, "'resnet' for segmentation: torchvision.models.list_models("),
        ("smp:Unet/resnet18", False, "segmentation_models_pytorch has no networks for classification"),
        ("smp:Unet", True, "expected smp:ARCHITECTURE/ENCODER, such as smp:Unet/resnet18, got 'smp:Unet'"),
        ("smp:Vnet/resnet18", True, "makes no Vnet with the encoder resnet18 ('Wrong architecture type"),
        ("smp:Unet/resnet19", True, "segmentation_models_pytorch.encoders.get_encoder_names()"),
    ],
)
def test_names_that_there_are_not(name, segmentation, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_model(name, 7, segmentation=segmentation)


@pytest.mark.usefixtures("_libraries")
def test_a_network_that_does_not_begin_with_a_convolution(monkeypatch):
    networks = {"linear": lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))}
    monkeypatch.setattr(sys.modules["torchvision"].models, "networks", networks)
    make_model("torchvision:linear", 7, channels=3)
    with pytest.raises(ValueError, match="torchvision:linear cannot take images of 1 channels"):
        make_model("torchvision:linear", 7, channels=1)


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
