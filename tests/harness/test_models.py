import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hem_ext.harness.models import Head, HeadOptions, SmallCNN, SmallUNet

COSINES = HeadOptions(normalise_weight=True, normalise_features=True, bias=False)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (28, 28), (4, 6)])
def test_cnn(size, channels):
    assert SmallCNN(7, channels=channels)(torch.zeros(3, channels, *size)).shape == (3, 7)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (48, 48), (16, 24)])
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
    assert features.shape == (3, 8)
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
