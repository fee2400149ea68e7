"""Forward and backward of HEM against cross-entropy, interleaved in one run.

    python bench/speed.py [--repeats 15] [--dtype float32]

A line per shape: how many times longer `F.cross_entropy` takes than `hem_loss` (median over median), how many
copies of the logits `hem_loss` is worth, and what each keeps for backward. Inputs are random.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hem_ext import hem_loss, info

# name, shape, channels_last: the batch cut so that two cores and a few GiB suffice.
SHAPES = [
    ("CIFAR-10", (128, 10), False),
    ("CIFAR-100", (128, 100), False),
    ("ImageNet-1k", (1024, 1000), False),
    ("language model", (2048, 32000), False),
    ("VOC", (2, 21, 512, 512), False),
    ("VOC, channels_last", (2, 21, 512, 512), True),
    ("Cityscapes", (2, 19, 512, 1024), False),
    ("Cityscapes, channels_last", (2, 19, 512, 1024), True),
    ("ADE20K", (1, 150, 512, 512), False),
    ("ADE20K, channels_last", (1, 150, 512, 512), True),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32")
    args = parser.parse_args()
    for name, value in info.describe().items():
        print(f"{name + ':':16} {value}")
    print(f"\n{args.dtype}, forward + backward\n")
    print(f"{'':28}{'shape':22}{'CE / HEM':>9}{'HEM / copy':>12}{'kept, CE':>12}{'kept, HEM':>12}")
    for name, shape, channels_last in SHAPES:
        x = torch.randn(shape).to(getattr(torch, args.dtype))
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        t = torch.randint(0, shape[1], (shape[0], *shape[2:]))
        seconds = compare(x, t, repeats=args.repeats if x.numel() > 1e6 else 100 * args.repeats)
        kept = [bytes_kept(loss, x, t) / x.numel() for loss in (F.cross_entropy, hem_loss)]
        print(
            f"{name:28}{shape!s:22}{seconds['ce'] / seconds['hem']:9.2f}{seconds['hem'] / seconds['copy']:12.2f}"
            f"{kept[0]:10.2f} B{kept[1]:10.2f} B",
            flush=True,
        )
    print("\nkept: bytes per logit saved for backward, the targets included")


def compare(x: Tensor, t: Tensor, repeats: int) -> dict[str, float]:
    """The median seconds of each, taken in turn."""
    y, target = x.clone(memory_format=torch.preserve_format).requires_grad_(), torch.empty_like(x)
    runs: dict[str, Callable[[], object]] = {
        "ce": lambda: F.cross_entropy(y, t).backward(),
        "hem": lambda: hem_loss(y, t).backward(),
        "copy": lambda: target.copy_(x),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            y.grad = None
            begin = time.perf_counter()
            run()
            if i > 0:  # the first warms up
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(s) for name, s in seconds.items()}


def bytes_kept(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> int:
    """Bytes of the distinct tensors that autograd saves."""
    seen = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(x.detach().requires_grad_(), t)
    return sum(seen.values())


if __name__ == "__main__":
    main()
