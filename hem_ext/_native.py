"""Load the native library, or remember why it did not load."""

from __future__ import annotations

import functools
import warnings

import torch

try:
    import hem_ext._C as _C  # after torch, which loads the libraries it links against
except ImportError as error:
    library = None
    load_error = f"{type(error).__name__}: {error}"
    if isinstance(error, ModuleNotFoundError):
        load_error += "; build it with: pip install --no-build-isolation -e ."
    warnings.warn(
        f"hem_ext runs in plain PyTorch: its native library did not load ({load_error})",
        RuntimeWarning,
        stacklevel=4,  # the line that imports hem_ext
    )
else:
    library = _C
    load_error = None

devices = frozenset() if library is None else frozenset({"cpu", "cuda"} if library.build["cuda"] else {"cpu"})
"""The types of device that have native kernels."""


def unavailable(device: torch.device) -> str | None:
    """Why the native kernels cannot serve tensors on `device`, in words; None if they can."""
    if library is None:
        return f"the native library did not load ({load_error})"
    if device.type in devices:
        return None
    return f"hem_ext was built without kernels for {device.type!r} tensors"


@functools.cache
def warn_of_fallback(reason: str, device_type: str) -> None:
    """Say once that a device with a processor of its own runs plain PyTorch although the library is there."""
    if library is not None and device_type != "meta":
        warnings.warn(f"hem_loss runs in plain PyTorch: {reason}", RuntimeWarning, stacklevel=3)
