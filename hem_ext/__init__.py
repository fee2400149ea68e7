"""HEM, the high error margin loss, as a native PyTorch extension."""

from hem_ext import reference
from hem_ext.hem import HEMLoss, hem_loss
from hem_ext.margins import class_margins

__all__ = ["HEMLoss", "class_margins", "hem_loss", "reference"]
__version__ = "0.1.0"
