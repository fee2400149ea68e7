import pytest
import torch

from hem_ext.harness.models import SmallCNN, SmallUNet


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (4, 6)])
def test_cnn(size):
    assert SmallCNN(7)(torch.zeros(3, 1, *size)).shape == (3, 7)


@pytest.mark.parametrize("size", [(8, 8), (48, 48), (16, 24)])
def test_unet(size):
    model = SmallUNet(11, width=4)
    out = model(torch.zeros(2, 1, *size))
    assert out.shape == (2, 11, *size)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
