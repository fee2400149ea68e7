"""The CPU kernels in a program of their own, without torch: for another processor, by another compiler, or watched.

``python tests/cross/kernels.py`` prints how many instructions they take a logit on arm64, as an emulator counts them.
"""

from __future__ import annotations

import ast
import shlex
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = [
    HERE / "driver.cpp",
    ROOT / "csrc/common/cpu_isa.cpp",
    *sorted((ROOT / "csrc/hem").glob("hem_cpu_[ab]*.cpp")),
    *sorted((ROOT / "csrc/parallel").glob("parallel_cpu_[ab]*.cpp")),
    *sorted((ROOT / "csrc/upsample").glob("upsample_cpu_[ab]*.cpp")),
]
X86 = ("baseline", "avx2", "avx512")


class Target(NamedTuple):
    """What the kernels are compiled by, for which instruction sets, and what runs the program."""

    compiler: str
    isas: tuple[str, ...]
    emulator: str = ""


TARGETS = {
    "gcc": Target("g++", X86),
    "clang": Target("clang++", X86),
    "address": Target("g++ -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all", X86),
    "thread": Target("g++ -O1 -g -fsanitize=thread", X86),
    "valgrind": Target("g++ -g", X86[:2], "valgrind --quiet --error-exitcode=1"),  # it knows no AVX-512
    "arm": Target("aarch64-linux-gnu-g++ -static", ("baseline",), "qemu-aarch64"),
    "arm-clang": Target("clang++ --target=aarch64-linux-gnu -static", ("baseline",), "qemu-aarch64"),
}

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of InputType
TARGET_DTYPES = (torch.int64, torch.int32, torch.uint8)  # ... of TargetType


class Call(NamedTuple):
    """hem_loss of `input` (R, C) or (A, C, P) with reduction "none", and its gradient.

    That is for a `grad_loss` (R,) or (A, P), or where there is a `denominator`, a mean's, for one number. Of `input`
    (A, C, h, w) it is upsampled_hem_loss, for targets (A, H, W), and the library's own `block`. With `target_logits`
    it is class_parallel_hem_loss: `input` has the classes of all `of` from `first` on, and no others have an error.
    """

    input: Tensor
    target: Tensor
    grad_loss: Tensor
    margin: float | Tensor = 0.2
    weight: Tensor | None = None
    ignore_index: int = -100
    denominator: float | None = None
    block: int = 128
    align_corners: bool = False
    channels_last: bool = False  # the gradient, as where the logits were
    past_caches: int = 0  # the gradient of rows: zeros are written so by 1, all of it by 2
    target_logits: Tensor | None = None  # (R,) or (A, P)
    of: int = 0
    first: int = 0

    @property
    def sizes(self) -> tuple[bool, int, int, int]:
        """Rows or not, outer, classes, inner."""
        rows, (outer, classes) = self.input.dim() == 2, self.input.shape[:2]
        return (True, 1, classes, outer) if rows else (False, outer, classes, self.target[0].numel())


class Result(NamedTuple):
    losses: Tensor
    mask: Tensor
    partials: Tensor  # (blocks, 3)
    gradient: Tensor


class ShareResult(NamedTuple):
    errors: Tensor  # (2, R) or (2, A, P)
    mask: Tensor
    kept: Tensor  # as errors
    gradient: Tensor


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def of_setup(name: str) -> Any:
    """A constant of setup.py, which cannot be imported."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py has no {name}")


def run_compiler(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")


@cache
def build(name: str) -> Path:
    program = ROOT / "build" / "cross" / name
    program.parent.mkdir(parents=True, exist_ok=True)
    compiler, *flags = shlex.split(TARGETS[name].compiler)
    run_compiler([compiler, *of_setup("CXX_FLAGS"), "-pthread", *flags, *map(str, SOURCES), "-o", str(program)])
    return program


def objects_for_macos(architecture: str, folder: Path) -> list[Path]:
    """The library's sources, all of them, compiled by ziglang, which has a Mac's headers. Nothing is linked."""
    command = [sys.executable, "-m", "ziglang", "c++", "-target", f"{architecture}-macos.11.0", "-Werror", "-fPIC"]
    command += [*of_setup("CXX_FLAGS"), f"-DTORCH_TARGET_VERSION={of_setup('TORCH_TARGET_VERSION')}"]
    command += ["-DHEM_EXT_TORCH_VERSION=0", "-DTORCH_EXTENSION_NAME=_C", "-DPy_LIMITED_API=0x030a0000"]
    for path in (*cpp_extension.include_paths(), sysconfig.get_path("include")):
        command += ["-isystem", path]
    objects = []
    for source in of_setup("SOURCES"):
        objects.append(folder / Path(source).with_suffix(".o").name)
        run_compiler([*command, "-c", str(ROOT / source), "-o", str(objects[-1])])
    return objects


def stored(x: Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def encoded(call: Call) -> bytes:
    """A call as driver.cpp reads it."""
    x, number = call.input, arithmetic(call.input.dtype)
    margins = call.margin.to(number) if isinstance(call.margin, Tensor) else None
    of_upsampled = (0,) * 5
    if x.dim() == 4:
        of_upsampled = (*x.shape[2:], call.target.shape[2], call.align_corners, call.channels_last)
    head = struct.pack(
        "=20qd",
        *(DTYPES.index(x.dtype), *call.sizes, TARGET_DTYPES.index(call.target.dtype)),
        *(call.ignore_index, False, margins is not None, call.weight is not None, call.denominator is None, call.block),
        *of_upsampled,
        *(call.past_caches, call.of, call.first),
        0.0 if isinstance(call.margin, Tensor) else call.margin,
    )
    per_class = [t.to(number) for t in (margins, call.weight) if t is not None]
    rest = [call.grad_loss.to(number), torch.tensor([call.denominator or 1], dtype=number)]
    rest += [] if call.target_logits is None else [call.target_logits.to(number)]
    return head + b"".join(map(stored, [x, call.target, *per_class, *rest]))


def decoded(call: Call, data: bytearray, start: int) -> tuple[Result | ShareResult, int]:
    """The result that begins there, and where it ends."""

    def take(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        nonlocal start
        size = torch.Size(shape).numel()
        found = torch.frombuffer(data, dtype=dtype, count=size, offset=start).reshape(shape).clone()
        start += size * dtype.itemsize
        return found

    x, (rows, outer, classes, inner) = call.input, call.sizes
    words = (classes + 31) // 32
    mask_shape = (inner, words) if rows else (outer, words, inner)
    if call.target_logits is not None:
        pairs = (2, *call.target.shape), arithmetic(x.dtype)
        share = ShareResult(take(*pairs), take(mask_shape, torch.int32), take(*pairs), take(x.shape, x.dtype))
        return share, start
    losses = take(call.target.shape, arithmetic(x.dtype))
    mask = take(mask_shape, torch.int32)
    partials = take((int(take((), torch.int64)), 3), torch.float64)
    if call.channels_last:
        gradient = take((outer, *x.shape[2:], classes), x.dtype).movedim(-1, 1)
    else:
        gradient = take(x.shape, x.dtype)
    result = Result(losses, mask, partials, gradient)
    return result, start


def run(name: str, isa: str, calls: Sequence[Call], *options: str) -> list[Result | ShareResult]:
    """What the kernels of a target make of the calls; `options` go to the emulator."""
    with TemporaryDirectory() as folder:
        given, found = Path(folder, "calls"), Path(folder, "results")
        given.write_bytes(b"".join(map(encoded, calls)))
        emulator = [*shlex.split(TARGETS[name].emulator), *options]
        subprocess.run([*emulator, str(build(name)), isa, str(given), str(found)], check=True)
        data, place, results = bytearray(found.read_bytes()), 0, []
    for call in calls:
        result, place = decoded(call, data, place)
        results.append(result)
    assert place == len(data), "the driver wrote more than was asked for"
    return results


def instructions(name: str, calls: Sequence[Call]) -> int:
    """How many instructions the program takes for the calls, its start included."""
    with TemporaryDirectory() as folder:
        log = Path(folder, "log")
        known = subprocess.run([TARGETS[name].emulator, "--help"], capture_output=True, text=True, check=True).stdout
        single = "-one-insn-per-tb" if "one-insn-per-tb" in known else "-singlestep"
        run(name, "baseline", calls, single, "-d", "exec,nochain", "-D", str(log))
        with log.open("rb") as lines:
            return sum(line.startswith(b"Trace") for line in lines)


def main() -> None:
    """Pixels (1, 21, 4096), narrow rows (2048, 10), wide rows (64, 1000), and pixels upsampled from 16 x 16.

    A tenth of the samples is active.
    """
    torch.manual_seed(0)
    print("| kernel | logits | " + " | ".join(str(d).removeprefix("torch.") for d in DTYPES) + " |")
    print("|---|---|" + "---|" * len(DTYPES))
    for what, shape in (
        *(("pixels", (1, 21, 4096)), ("narrow rows", (2048, 10)), ("wide rows", (64, 1000))),
        ("upsampled pixels", (1, 21, 64, 64)),
    ):
        found = []
        for dtype in DTYPES:
            x = torch.randn(shape)
            target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
            finished = torch.rand(target.shape) < 0.9
            if len(shape) == 4:
                x = torch.randn(*shape[:2], *(side // 4 for side in shape[2:]))
                largest = F.interpolate(x.to(dtype).float(), size=shape[2:], mode="bilinear").argmax(1)
                call = Call(x.to(dtype), torch.where(finished, largest, target), torch.ones(1), 0.0, denominator=100.0)
            else:
                x.scatter_add_(1, target.unsqueeze(1), 10 * finished.to(x.dtype).unsqueeze(1))
                call = Call(x.to(dtype), target, torch.ones(1), denominator=100.0)
            once, twice = (instructions("arm", [call] * count) for count in (1, 2))
            found.append(f"{(twice - once) / torch.Size(shape).numel():.1f}")
        print(f"| {what} | {shape} | " + " | ".join(found) + " |", flush=True)


if __name__ == "__main__":
    main()
