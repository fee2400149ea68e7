"""The native library, or why it did not load; its ops, and which calls take them."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_INTERFACE = 1  # csrc/module.cpp says of what
_BUILD = "build it with: pip install --no-build-isolation -e ."


def _left_out() -> bool:
    """Whether HEM_EXT_NATIVE=0 left the library out: setup.py then makes a wheel of Python alone."""
    try:
        return "Root-Is-Purelib: true" in (distribution("hem-ext").read_text("WHEEL") or "")
    except PackageNotFoundError:
        return False


def _check_whole() -> None:
    """Raise where the library is cut off, by a full disk say: to load it would end the process, not in an error."""
    spec = importlib.util.find_spec("hem_ext._C")
    if spec is None or spec.origin is None:
        return
    try:
        with open(spec.origin, "rb") as file:
            header = file.read(64)
    except OSError:
        return
    if header[:5] != b"\x7fELF\x02" or len(header) < 64:
        return  # the loader itself refuses it, or it is of another system
    at, size, count = (int.from_bytes(header[i:j], sys.byteorder) for i, j in ((40, 48), (58, 60), (60, 62)))
    needed, held = at + size * count, os.path.getsize(spec.origin)  # a table of its sections is the last of it
    if held < needed:
        raise ImportError(f"{spec.origin} is cut off: it has {held} bytes of {needed}; {_BUILD}")


load_error: str | None = None
try:
    _check_whole()
    import hem_ext._C as _C  # after torch, which loads the libraries it links against

    if getattr(_C, "build", {}).get("interface") != _INTERFACE:
        raise ImportError(f"{_C.__file__} is of another version of hem_ext; {_BUILD}")
except ImportError as error:
    library = None
    load_error = f"{type(error).__name__}: {error}"
    if isinstance(error, ModuleNotFoundError) and _left_out():
        load_error = "hem_ext was installed without it, by HEM_EXT_NATIVE=0"  # as asked: no warning
    else:
        if isinstance(error, ModuleNotFoundError):
            load_error += (
                f"; there is none in {Path(__file__).parent}. If hem_ext is installed elsewhere, run it in another "
                f"folder; in a clone, {_BUILD}"
            )
        warnings.warn(
            f"hem_ext runs in plain PyTorch: its native library did not load ({load_error})",
            RuntimeWarning,
            stacklevel=4,  # the line that imports hem_ext
        )
else:
    library = _C

devices = frozenset() if library is None else frozenset({"cpu", "cuda"} if library.build["cuda"] else {"cpu"})
"""The types of device that have native kernels."""


_ops = torch.library.Library("hem_ext", "DEF")


def define(
    schema: str, fake: Callable[..., Any], instead: str, kernel: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """A private op without a gradient of its own. Its kernels are in the library, or it is one function everywhere.

    One that writes into a tensor is handed it detached, and whoever calls it tells autograd.

    Args:
        schema: its name, arguments and outputs.
        fake: makes the outputs where there are no values.
        instead: the function that has its gradient.
        kernel: that one function.
    """
    name = schema.partition("(")[0]
    _ops.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    if kernel is not None:
        _ops.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hem_ext::{name}", fake, lib=_ops)

    if "!" in schema:
        return _overload(name)

    # An op called by itself would return a result that claims a gradient and has none.
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"hem_ext::{name} has no gradient of its own: call {instead}, which has")

    torch.library.register_autograd(f"hem_ext::{name}", refuse, setup_context=refuse, lib=_ops)
    return _overload(name)


def _overload(name: str) -> Callable[..., Any]:
    overload: Callable[..., Any] = getattr(torch.ops.hem_ext, name).default
    return overload


def has_kernels(x: Tensor) -> bool:
    """Whether there are kernels for the device of a tensor, without a :class:`torch.device`, which takes longer."""
    return ("cpu" if x.is_cpu else "cuda" if x.is_cuda else None) in devices


def takes(backend: str, device: torch.device, function: str) -> bool:
    """Whether a call of `function` takes the kernels.

    Where there are none, it is an error if it asked for them, and one warning if it asked for nothing.
    """
    if backend == "reference":
        return False
    reason = unavailable(device)
    if reason is None:
        return True
    if backend == "native":
        raise RuntimeError(f"{function}(backend='native'): {reason}")
    if not torch.compiler.is_compiling():
        warn_of_fallback(reason, device.type, function)
    return False


def unavailable(device: torch.device) -> str | None:
    """Why the native kernels cannot serve tensors on `device`, in words; None if they can."""
    if library is None:
        return f"the native library did not load ({load_error})"
    if device.type in devices:
        return None
    return f"hem_ext was built without kernels for {device.type!r} tensors"


@functools.cache
def warn_of_fallback(reason: str, device_type: str, function: str) -> None:
    """Say once that a device with a processor of its own runs plain PyTorch although the library is there."""
    if library is not None and device_type != "meta":
        caller, level = sys._getframe(), 1  # then the first line that is neither ours nor torch's
        while caller.f_back is not None and caller.f_globals["__name__"].startswith(("hem_ext.", "torch.")):
            caller, level = caller.f_back, level + 1
        warnings.warn(f"{function} runs in plain PyTorch: {reason}", RuntimeWarning, stacklevel=level)
