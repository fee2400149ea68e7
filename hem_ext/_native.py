"""Load the native library, or remember why it did not load."""

from __future__ import annotations

import warnings

import torch  # noqa: F401  the library links against libtorch, which this loads

BUILD_HINT = "build it with: pip install --no-build-isolation -e ."

try:
    from hem_ext import _C as library
except ImportError as error:
    library = None
    load_error = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"hem_ext runs in plain PyTorch: its native library did not load ({load_error}); {BUILD_HINT}",
        RuntimeWarning,
        stacklevel=3,
    )
else:
    load_error = None


def unavailable(device: torch.device) -> str | None:
    """Why the native kernels cannot serve tensors on `device`, in words; None if they can."""
    if library is None:
        return f"the native library did not load ({load_error}); {BUILD_HINT}"
    if device.type == "cpu" or (device.type == "cuda" and library.build["cuda"]):
        return None
    return f"hem_ext was built without kernels for {device.type!r} tensors"
