"""Logits of low resolution to the loss, forward and backward: hem_ext.upsampled_hem_loss against the two steps.

    python bench/upsample.py run [--results FILE] [--device cuda] [--dtype bfloat16]
    python bench/upsample.py report FILE... [--page docs/upsample.md]   their table

`run` appends rows, to build/upsample.jsonl if no file is named. In a round every way takes its turn in random order,
HEM's with each share of active pixels; cross-entropy has no finished ones.
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

from hem_ext import hem_loss, upsampled_hem_loss

SHARES = (1.0, 0.1)
MARGIN = 1e-3


@dataclass(frozen=True)
class Head:
    """What a segmentation head gives, and how much larger the labels are."""

    name: str
    images: int
    classes: int
    labels: tuple[int, int]
    stride: int

    def logits(self, dtype: torch.dtype, device: str) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        size = (self.images, self.classes, *(side // self.stride for side in self.labels))
        return torch.randn(size, device=device, generator=generator).to(dtype).requires_grad_()

    @property
    def label(self) -> str:
        return f"{self.name}, {(self.images, self.classes, *self.labels)}, stride {self.stride}"


HEADS = [
    Head("VOC", 2, 21, (512, 512), 8),
    Head("Cityscapes", 2, 19, (512, 1024), 4),
    Head("ADE20K", 2, 150, (512, 512), 4),
    Head("ADE20K", 2, 150, (512, 512), 8),
]


def upsampled(x: Tensor, labels: Tensor) -> Tensor:
    return F.interpolate(x, size=labels.shape[1:], mode="bilinear")


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hem, fused": lambda x, t: upsampled_hem_loss(x, t, margin=MARGIN),
    "hem": lambda x, t: hem_loss(upsampled(x, t), t, margin=MARGIN),
    "ce": lambda x, t: F.cross_entropy(upsampled(x, t), t),
}


def labels_with(share: float, x: Tensor, head: Head) -> Tensor:
    """Labels for which that share of the pixels is active."""
    generator = torch.Generator(x.device).manual_seed(1)
    shape = (head.images, *head.labels)
    if share == 1.0:
        return torch.randint(head.classes, shape, device=x.device, generator=generator)
    with torch.no_grad():
        right = upsampled(x.float(), torch.empty(shape, device="meta")).argmax(1)
        wrong = torch.rand(shape, device=x.device, generator=generator) < share
        labels = torch.where(wrong, (right + 1) % head.classes, right)
        active = upsampled_hem_loss(x, labels, margin=MARGIN, reduction="none") > 0
    assert abs(active.float().mean().item() - share) < 0.02, "the pixels are not as active as was asked for"
    return labels


def run(head: Head, dtype: torch.dtype, device: str, seconds: float, min_rounds: int = 9) -> list[dict[str, Any]]:
    """A row for every way and share: seconds of forward and backward, and what is allocated at once."""
    x = head.logits(dtype, device)
    calls: dict[tuple[str, float], Callable[[], None]] = {}
    for share in SHARES:
        labels = labels_with(share, x, head)
        for name, loss in WAYS.items():
            if name.startswith("hem") or share == SHARES[0]:
                calls[name, share] = lambda loss=loss, labels=labels: _step(loss, x, labels)
    return [
        {
            "kind": "upsampled",
            "head": head.label,
            "shape": asdict(head),
            "dtype": str(dtype).removeprefix("torch."),
            "way": name,
            "share": share,
            "rounds": len(values),
            "seconds": [float(np.quantile(values, q)) for q in (0.2, 0.5, 0.8)],
            "allocated": allocated(calls[name, share], device),
        }
        for (name, share), values in interleaved(calls, device, seconds, min_rounds).items()
    ]


def _step(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, labels: Tensor) -> None:
    torch.autograd.grad(loss(x, labels), x)


# --- the table ------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """How many times the time, and the memory, of the fused HEM the two steps take."""
    found = {(r["head"], r["dtype"], r["share"], r["way"]): r for r in rows if r["kind"] == "upsampled"}
    lines = [["labels and logits", "active", "HEM, time", "CE, time", "HEM, memory", "CE, memory"]]
    for head, dtype, share in dict.fromkeys(key[:3] for key in found):
        fused, hem = (found[head, dtype, share, way] for way in ("hem, fused", "hem"))
        others = [hem, found[head, dtype, SHARES[0], "ce"]]
        lines.append(
            [
                head if dtype == "float32" else f"{head}, {dtype}",
                f"{share:.0%}",
                *(f"{other['seconds'][1] / fused['seconds'][1]:.1f}" for other in others),
                *(f"{other['allocated'] / fused['allocated']:.0f}" for other in others),
            ]
        )
    return lines


def write_page(path: Path, rows: Sequence[dict[str, Any]], files: Sequence[Path]) -> None:
    """Replace what stands between the markers."""
    command = f"python bench/upsample.py report {' '.join(map(str, files))}"
    replace(path, "upsampled", f"`{command}`: {conditions(rows)}\n\n{markdown(table(rows), 1)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--results", type=Path, default=Path("build/upsample.jsonl"))
    parser.add_argument("--seconds", type=float, default=60.0, help="for each head")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    if given.command == "run":
        for head in HEADS:
            rows = run(head, getattr(torch, given.dtype), given.device, given.seconds)
            append(given.results, provenance(given.device), rows)
            print(markdown(table(rows), 1), flush=True)
    else:
        rows = read(given.files)
        print(markdown(table(rows), 1))
        if given.page:
            write_page(given.page, rows, given.files)


if __name__ == "__main__":
    main()
