"""HEM, the high error margin loss, as a native PyTorch extension."""

from hem_ext import reference
from hem_ext.hem import HEMLoss, hem_loss
from hem_ext.linear import LinearHEMLoss, linear_hem_loss
from hem_ext.margins import class_margins
from hem_ext.mix import MixedHEMLoss, mixed_hem_loss
from hem_ext.selective import Selective, check_independence, selective_loss
from hem_ext.splitting import divide_gradients
from hem_ext.upsample import UpsampledHEMLoss, upsampled_hem_loss

__all__ = [
    "HEMLoss",
    "LinearHEMLoss",
    "MixedHEMLoss",
    "Selective",
    "UpsampledHEMLoss",
    "check_independence",
    "class_margins",
    "divide_gradients",
    "hem_loss",
    "linear_hem_loss",
    "mixed_hem_loss",
    "reference",
    "selective_loss",
    "upsampled_hem_loss",
]
__version__ = "0.1.0"
