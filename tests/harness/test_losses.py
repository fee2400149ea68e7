import pytest
import torch
from torch import nn

from hem_ext import HEMLoss
from hem_ext.harness.losses import LOSSES, make_loss


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3, 4)])
def test_every_loss_honours_ignore_index(name, shape):
    criterion = make_loss(name, ignore_index=255)
    x = torch.randn(shape)
    t = torch.randint(0, 5, (shape[0], *shape[2:]))
    t[0] = 255
    loss = criterion(x, t)
    assert loss.isfinite()
    x[0] = torch.nan
    assert criterion(x, t) == loss


def test_constants():
    assert isinstance(make_loss("ce"), nn.CrossEntropyLoss)
    hem = make_loss("hem", margin=0.75, ignore_index=3)
    assert isinstance(hem, HEMLoss)
    assert (hem.margin, hem.ignore_index) == (0.75, 3)


def test_an_unknown_loss():
    with pytest.raises(ValueError, match="unknown loss 'hinge': one of ce, hem"):
        make_loss("hinge")
