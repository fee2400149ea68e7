"""Build the CUDA kernels for the host, and call them on numpy arrays.

``python tests/emulation/kernels.py`` builds; with ``thread``, ``address`` or ``undefined`` it builds under that
sanitizer and prints what to preload before importing the module.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = [
    HERE / "emulation.cpp",
    HERE / "cuda_emulation.h",
    *(ROOT / "csrc" / "common").glob("*.*h"),
    *(ROOT / "csrc" / "hem").glob("*.*h"),
    *(ROOT / "csrc" / "parallel").glob("*.*h"),
    *(ROOT / "csrc" / "upsample").glob("*.*h"),
]


def build(sanitizer: str = "", *, edits: Sequence[tuple[str, str, str]] = (), folder: Path | None = None) -> Path:
    """The shared library, built where it is not there yet.

    Args:
        sanitizer: a name of GCC's ``-fsanitize``.
        edits: each (file, old, new) replaces a piece of a source in a copy: to see what difference it makes.
        folder: where to keep the build, ``build/emulation`` if not given.
    """
    texts = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in SOURCES}
    for file, old, new in edits:
        name = Path(file)
        assert texts[name].count(old) >= 1, f"{old!r} is not in {name}"
        texts[name] = texts[name].replace(old, new, 1)
    digest = hashlib.sha256(repr([sanitizer, sys.version, sorted(texts.items())]).encode()).hexdigest()[:16]
    folder = (folder or ROOT / "build" / "emulation") / digest
    library = folder / "emulation.so"
    if library.exists():
        return library
    for path, text in texts.items():
        copy = folder / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text, encoding="utf-8")
    command = ["g++", "-std=c++20", "-O1", "-g", "-fPIC", "-shared", "-pthread", "-Wno-unknown-pragmas"]
    command += [f"-fsanitize={sanitizer}"] if sanitizer else []
    command += ["-fno-sanitize-recover=undefined"] if sanitizer == "undefined" else []
    command += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    command += [str(folder / SOURCES[0].relative_to(ROOT)), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return library


def load(library: Path) -> ModuleType:
    """The library as a Python module, of a name of its own: pybind11 keeps one module a name."""
    spec = importlib.util.spec_from_file_location(f"{library.parent.name}.emulation", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ARITHMETIC = {"float64": np.float64}
STORAGE = {"float32": np.float32, "float64": np.float64, "float16": np.uint16, "bfloat16": np.uint16}


def misaligned(count: int, dtype: type, offset: int) -> np.ndarray:
    """`count` elements that lie `offset` elements past a sixteen-byte boundary, and end where their memory ends."""
    skipped = offset * np.dtype(dtype).itemsize
    raw = np.zeros(skipped + count * np.dtype(dtype).itemsize, dtype=np.uint8)
    assert raw.ctypes.data % 16 == 0
    return raw[skipped:].view(dtype)


def placed(
    logits: np.ndarray, rows: bool, pad: int, apart: int, offset: int
) -> tuple[np.ndarray, dict[str, int], dict[str, int]]:
    """Logits as they lie in memory, and the layouts of them and of their gradient; `run` has what the others are."""
    outer, classes, inner = (1, logits.shape[1], logits.shape[0]) if rows else logits.shape
    if rows:
        stored = misaligned(inner * (classes + pad), logits.dtype, offset).reshape(inner, classes + pad)
        stored[:, :classes] = logits
        strides = {"outer_stride": 0, "class_stride": 1, "inner_stride": classes + pad}
        dense = {**strides, "inner_stride": classes}
    else:
        shape = (outer, classes + pad, inner + apart)
        stored = misaligned(math.prod(shape), logits.dtype, offset).reshape(shape)
        stored[:, :classes, :inner] = logits
        strides = {"outer_stride": shape[1] * shape[2], "class_stride": shape[2], "inner_stride": 1}
        dense = {**strides, "outer_stride": classes * inner, "class_stride": inner}
    sizes = {"rows": rows, "outer": outer, "classes": classes, "inner": inner}
    return stored, sizes | strides, sizes | dense


def empty_like(logits: np.ndarray, offset: int) -> np.ndarray:
    """For a gradient, every element of which must be written."""
    gradient = misaligned(logits.size, logits.dtype, offset).reshape(logits.shape)
    gradient[...] = 1
    return gradient


def run(
    module: ModuleType,
    kernel: str,
    dtype: str,
    logits: np.ndarray,
    target: np.ndarray,
    *,
    width: int = 0,
    blocks: int = 2,
    threads: int = 64,
    pad: int = 0,
    apart: int = 0,
    offset: int = 0,
    ignore_index: int = -100,
    margin: float | np.ndarray = 0.2,
    weight: np.ndarray | None = None,
    reduction: str = "mean",
    grad_loss: np.ndarray | None = None,
    align_corners: bool = False,
    channels_last: bool = False,
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Loss, gradient, and whether no device-side assertion failed.

    Args:
        logits: their storage, ``(R, C)`` for the row kernels, ``(A, C, P)`` for the pixel kernels, ``(A, C, h, w)``
            for ``"upsampled"``, whose targets are ``(A, H, W)``.
        width: elements a load, 1 or the widest (0).
        pad: classes that lie in memory behind every row or image, and are not part of it.
        apart: pixels that lie in memory behind those of every class, and are not part of them.
        offset: elements past a sixteen-byte boundary, of the logits and of the gradient.
        align_corners: of ``"upsampled"``.
        channels_last: the gradient of ``"upsampled"`` is ``(A, h, w, C)``.
    """
    rows = kernel.endswith("rows")
    arithmetic = ARITHMETIC.get(dtype, np.float32)
    if kernel == "upsampled":
        outer, classes, inner = *logits.shape[:2], target[0].size
        stored = misaligned(logits.size, logits.dtype, offset).reshape(logits.shape)
        stored[...] = logits
        layout = {"outer": outer, "classes": classes, "inner": inner}
        layout |= {"outer_stride": classes * inner, "class_stride": inner, "inner_stride": 1}
        # Here `rows` is how many the targets have.
        sizes = ("in_rows", "in_columns", "rows", "columns")
        layout |= dict(zip(sizes, logits.shape[2:] + target.shape[1:], strict=True))
        layout |= {"align_corners": int(align_corners), "channels_last": int(channels_last)}
        dense = layout
    else:
        stored, layout, dense = placed(logits, rows, pad, apart, offset)
        outer, classes, inner = (layout[name] for name in ("outer", "classes", "inner"))
    words = (classes + 31) // 32

    margins = margin.astype(arithmetic) if isinstance(margin, np.ndarray) else None
    weight = None if weight is None else weight.astype(arithmetic)
    mask = np.full((inner, words) if rows else (outer, words, inner), 0xDEADBEEF, dtype=np.uint32)
    per_sample = reduction == "none"
    losses = np.full(target.shape, np.nan, dtype=arithmetic) if per_sample else None
    loss, denominator = np.full((), np.nan, dtype=arithmetic), np.full((), np.nan, dtype=arithmetic)
    fine = module.forward(
        kernel, dtype, str(target.dtype), layout, width, blocks, threads, stored, target, ignore_index,
        margins, 0.0 if margins is not None else margin, weight, reduction == "batchmean",
        reduction in ("mean", "batchmean"), losses, mask, loss, denominator,
    )  # fmt: skip
    gradient = empty_like(logits, offset)
    if grad_loss is None:
        grad_loss = np.ones(target.shape if per_sample else (), dtype=arithmetic)
    fine &= module.backward(
        kernel, dtype, str(target.dtype), dense, width, blocks, threads, target, ignore_index, weight,
        grad_loss.astype(arithmetic), per_sample, denominator, mask, gradient, 0, classes, None,
    )  # fmt: skip
    if channels_last:
        gradient = np.moveaxis(gradient.reshape(outer, *logits.shape[2:], classes), -1, 1)
    return (losses if per_sample else loss), gradient, fine


def run_shares(
    module: ModuleType,
    kernel: str,
    backward: str,
    dtype: str,
    logits: np.ndarray,
    target_logits: np.ndarray,
    target: np.ndarray,
    begins: Sequence[int],
    *,
    blocks: int = 2,
    threads: int = 64,
    pad: int = 0,
    offset: int = 0,
    ignore_index: int = -100,
    margin: float | np.ndarray = 0.2,
    grad_loss: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Each sample's loss, the gradient, and whether no assertion failed: by the kernels of class_parallel_hem_loss.

    Args:
        kernel, backward: of these, and the one of hem_loss that takes their gradient back.
        target_logits: of each sample's target, whatever they are where it is ignored.
        begins: the first class of each share.
    """
    rows, arithmetic = kernel.endswith("rows"), ARITHMETIC.get(dtype, np.float32)
    classes, fine = logits.shape[1], True
    margins = margin.astype(arithmetic) if isinstance(margin, np.ndarray) else None
    target_logits = target_logits.astype(arithmetic)
    parts = np.split(logits, begins[1:], axis=1)
    places = [placed(part, rows, pad, 0, offset) for part in parts]

    def look(first: int, place: tuple[np.ndarray, dict, dict], errors: np.ndarray, *kept: np.ndarray | None) -> bool:
        stored, layout, _ = place
        return module.look(
            kernel, dtype, str(target.dtype), layout, blocks, threads, stored, target, ignore_index, margins,
            0.0 if margins is not None else margin, classes, first, target_logits, errors, *kept,
        )  # fmt: skip

    of_parts = []
    for first, place in zip(begins, places, strict=True):
        errors = np.full((2, *target.shape), np.nan, dtype=arithmetic)
        fine &= look(first, place, errors, None, None)
        of_parts.append(errors)
    errors = np.stack([sum(e[0] for e in of_parts), np.max([e[1] for e in of_parts], axis=0)])
    masks, kept = [], []
    for first, place in zip(begins, places, strict=True):
        layout = place[1]
        outer, words, inner = layout["outer"], (layout["classes"] + 31) // 32, layout["inner"]
        masks.append(np.full((inner, words) if rows else (outer, words, inner), 0xDEADBEEF, dtype=np.uint32))
        kept.append(np.full((2, *target.shape), np.nan, dtype=arithmetic))
        fine &= look(first, place, errors, masks[-1], kept[-1])
    kept_sum, count = sum(kept)
    with np.errstate(invalid="ignore"):
        losses = kept_sum / np.maximum(count, 1)
    broken = (np.isnan(errors[0]) | np.isnan(target_logits) | ~np.isfinite(losses)) & (target != ignore_index)
    counts = np.where(broken, classes, count).astype(np.int32)

    gradients, unused = [], np.full((), np.nan, dtype=arithmetic)
    grad_loss = np.ones(target.shape) if grad_loss is None else grad_loss
    for first, part, place, mask in zip(begins, parts, places, masks, strict=True):
        here = place[1]["classes"]
        every = np.array([2 ** min(32, here - 32 * w) - 1 for w in range((here + 31) // 32)], dtype=np.uint32)
        of_mask = broken.reshape(-1, 1) if rows else broken.reshape(mask.shape[0], 1, -1)
        mask = np.where(of_mask, every if rows else every[:, None], mask)
        gradients.append(empty_like(part, offset))
        fine &= module.backward(
            backward, dtype, str(target.dtype), place[2], 1, blocks, threads, target, ignore_index, None,
            grad_loss.astype(arithmetic), True, unused, mask, gradients[-1], first, classes, counts,
        )  # fmt: skip
    return np.where(broken, np.nan, losses), np.concatenate(gradients, axis=1), fine


if __name__ == "__main__":
    print(build(*sys.argv[1:2]))
