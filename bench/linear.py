"""The classifier and its loss, forward and backward: hem_ext.linear_hem_loss against one after the other, and others.

    python bench/linear.py run [--results FILE] [--device cuda] [--dtype bfloat16] [--head WORD]
    python bench/linear.py report FILE... [--page docs/linear.md]   their table

`run` appends rows, to build/linear.jsonl if no file is named. In a round every way takes its turn in random order,
HEM's with each share of active rows; cross-entropy has no finished ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from documents import append, conditions, markdown, read, replace
from measure import allocated, interleaved
from provenance import provenance
from torch import Tensor

from hem_ext import hem_loss
from hem_ext.linear import linear_hem_loss

SHARES = (1.0, 0.3, 0.1)


def margin_of(dtype: torch.dtype) -> float:
    """Small, so that a row is finished where its target's logit is the largest. In half types it may not be alone."""
    return 1e-3 if dtype == torch.float32 else 0.0


@dataclass(frozen=True)
class Head:
    """What a classifier is given, and how many classes it has. With `pixels` it is a 1 x 1 convolution."""

    name: str
    rows: int
    features: int
    classes: int
    pixels: tuple[int, int] = ()
    channels_last: bool = False

    def tensors(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Hidden, weight and bias. Random, of logits that differ by about 1."""
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(self.rows, self.features, *self.pixels), (self.classes, self.features), (self.classes,)]
        hidden, weight, bias = (torch.randn(s, device=device, generator=generator).to(dtype) for s in shapes)
        weight /= self.features**0.5
        if self.pixels:
            weight = weight[:, :, None, None]
        if self.channels_last:
            hidden = hidden.to(memory_format=torch.channels_last)
        return [x.requires_grad_() for x in (hidden, weight, bias)]

    @property
    def label(self) -> str:
        shape = " x ".join(map(str, (self.rows, self.features, *self.pixels)))
        return f"{self.name}, ({shape}) x {self.classes}" + (", channels_last" if self.channels_last else "")


HEADS = [
    Head("language model", 4096, 256, 32000),
    Head("ImageNet-21k", 1024, 768, 21841),
    Head("ImageNet-1k", 1024, 2048, 1000),
    Head("ADE20K", 2, 256, 150, (128, 128)),
    Head("ADE20K", 2, 256, 150, (128, 128), channels_last=True),
    Head("VOC", 2, 256, 21, (128, 128)),
]


# --- ways -----------------------------------------------------------------------------------------------------


def logits(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(hidden, weight, bias) if weight.dim() == 2 else F.conv2d(hidden, weight, bias)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Three products, chunk by chunk, all of them in forward, as is usual: the mean over rows, of rows alone."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, most):
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = torch.zeros_like(bias, dtype=torch.float32)
        total = torch.zeros((), device=hidden.device)
        for begin in range(0, len(hidden), most):
            h, t = hidden[begin : begin + most], target[begin : begin + most, None]
            y = F.linear(h, weight, bias).float()
            y -= y.logsumexp(1, keepdim=True)
            total -= y.gather(1, t).sum()
            g = y.exp_().scatter_add_(1, t, y.new_full(t.shape, -1.0)).div_(len(hidden)).to(hidden.dtype)
            torch.mm(g, weight, out=grad_hidden[begin : begin + most])
            if g.dtype == torch.float32:
                grad_weight.addmm_(g.t(), h)
            else:
                grad_weight += g.t() @ h
            grad_bias += g.sum(0, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype))
        return total / len(hidden)

    @staticmethod
    def backward(ctx, grad_loss):
        return *(grad_loss.to(x.dtype) * x for x in ctx.saved_tensors), None, None


def ways(head: Head, margin: float) -> dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]:
    """By name; HEM's begin with "hem"."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
        "hem, fused": lambda h, w, b, t: linear_hem_loss(h, w, b, t, margin=margin),
        "hem": lambda h, w, b, t: hem_loss(logits(h, w, b), t, margin=margin),
        "ce": lambda h, w, b, t: F.cross_entropy(logits(h, w, b), t),
    }
    if head.pixels:
        return found
    most = max(256, (8 << 20) // (4 * head.classes))
    found["ce, chunked"] = lambda h, w, b, t: ChunkedCrossEntropy.apply(h, w, b, t, most)
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["ce, linear_cross_entropy"] = lambda h, w, b, t: F.linear_cross_entropy(
            h, w, t, linear_bias=b, options=options
        )
    return found


def run(head: Head, dtype: torch.dtype, device: str, seconds: float, min_rounds: int = 9) -> list[dict[str, Any]]:
    """A row for every way and share: seconds of forward and backward, and what is allocated at once."""
    given = head.tensors(dtype, device)
    with torch.no_grad():
        right = logits(*given).argmax(1)
    calls: dict[tuple[str, float], Callable[[], None]] = {}
    for share in SHARES:
        order = torch.randperm(right.numel(), device=device, generator=torch.Generator(device).manual_seed(1))
        wrong = (order < round(share * right.numel())).view(right.shape)
        target = torch.where(wrong, (right + 1) % head.classes, right)
        with torch.no_grad():
            losses = hem_loss(logits(*given), target, margin=margin_of(dtype), reduction="none")
        assert abs((losses > 0).float().mean().item() - share) < 0.02, "the rows are not as active as was asked for"
        for name, loss in ways(head, margin_of(dtype)).items():
            if name.startswith("hem") or share == SHARES[0]:
                calls[name, share] = lambda loss=loss, target=target: _step(loss, given, target)
    taken = interleaved(calls, device, seconds, min_rounds)
    return [
        {
            "kind": "classifier",
            "head": head.label,
            "shape": asdict(head),
            "dtype": str(dtype).removeprefix("torch."),
            "way": name,
            "share": share,
            "rounds": len(values),
            "seconds": [float(np.quantile(values, q)) for q in (0.2, 0.5, 0.8)],
            "allocated": _allocated(calls[name, share], given, device),
        }
        for (name, share), values in taken.items()
    ]


def _step(loss: Callable[..., Tensor], given: Sequence[Tensor], target: Tensor) -> None:
    for x in given:
        x.grad = None
    loss(*given, target).backward()


def _allocated(call: Callable[[], None], given: Sequence[Tensor], device: str) -> int:
    for x in given:
        x.grad = None
    return allocated(call, device)


# --- the table ------------------------------------------------------------------------------------------------

COLUMNS = {
    "hem": "HEM, unfused",
    "ce": "CE, unfused",
    "ce, chunked": "CE, chunked",
    "ce, linear_cross_entropy": "`linear_cross_entropy`",
}


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """How many times the time of the fused HEM each takes, and the memory of the unfused HEM over that of the fused."""
    found = {(r["head"], r["dtype"], r["share"], r["way"]): r for r in rows if r["kind"] == "classifier"}
    lines = [["classifier", "share active", *COLUMNS.values(), "allowed", "memory"]]
    for head, dtype, share in dict.fromkeys(key[:3] for key in found):
        fused = found[head, dtype, share, "hem, fused"]
        line = [head if dtype == "float32" else f"{head}, {dtype}", f"{share:.0%}"]
        for way in COLUMNS:
            other = found.get((head, dtype, share if way == "hem" else SHARES[0], way))
            line.append(f"{other['seconds'][1] / fused['seconds'][1]:.2f}" if other else "")
        unfused = found[head, dtype, share, "hem"]
        lines.append([*line, f"{3 / (1 + 2 * share):.2f}", f"{unfused['allocated'] / fused['allocated']:.1f}"])
    return lines


def write_page(path: Path, rows: Sequence[dict[str, Any]], files: Sequence[Path]) -> None:
    """Replace what stands between the markers."""
    command = f"python bench/linear.py report {' '.join(map(str, files))}"
    replace(path, "classifier", f"`{command}`: {conditions(rows)}\n\n{markdown(table(rows))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--results", type=Path, default=Path("build/linear.jsonl"))
    parser.add_argument("--seconds", type=float, default=60.0, help="for each classifier")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--head", default="", metavar="WORD", help="classifiers whose name holds this word")
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    if given.command == "run":
        for head in (head for head in HEADS if given.head in head.name):
            rows = run(head, getattr(torch, given.dtype), given.device, given.seconds)
            append(given.results, provenance(given.device), rows)
            print(markdown(table(rows)), flush=True)
    else:
        rows = read(given.files)
        print(markdown(table(rows)))
        if given.page:
            write_page(given.page, rows, given.files)


if __name__ == "__main__":
    main()
