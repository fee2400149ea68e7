"""What is measured: the logits of well-known tasks, and the losses that take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hem_ext import _native, hem_loss, reference


@dataclass(frozen=True)
class Workload:
    """Random logits of one shape, and random targets."""

    name: str
    shape: tuple[int, ...]
    channels_last: bool = False
    quick: bool = False  # part of the short benchmark

    @property
    def label(self) -> str:
        return f"{self.name}, channels_last" if self.channels_last else self.name

    def inputs(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Logits that require a gradient, and int64 targets."""
        x = torch.randn(self.shape, device=device, dtype=torch.float32, generator=generator).to(dtype)
        x = x.to(memory_format=torch.channels_last) if self.channels_last else x
        t = torch.randint(0, self.shape[1], (self.shape[0], *self.shape[2:]), device=device, generator=generator)
        return x.requires_grad_(), t

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def floor_bytes(self, dtype: torch.dtype) -> int:
        """Bytes a loss cannot avoid: the logits read once, their gradient written once."""
        return 2 * self.numel * dtype.itemsize

    def hem_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that HEM moves, forward and backward: beside the floor a bit a logit written and read, in words
        of 32 classes, and the int64 targets read twice."""
        positions = self.numel // self.shape[1]
        words = positions * ((self.shape[1] + 31) // 32)
        return self.floor_bytes(dtype) + 2 * (4 * words + 8 * positions)


# The batch is cut so that two cores and a few GiB suffice.
CPU = [
    Workload("CIFAR-10", (128, 10), quick=True),
    Workload("CIFAR-100", (128, 100), quick=True),
    Workload("ImageNet-1k", (1024, 1000), quick=True),
    Workload("ImageNet-21k", (256, 21841)),
    Workload("language model", (2048, 32000), quick=True),
    Workload("VOC", (2, 21, 512, 512), quick=True),
    Workload("VOC", (2, 21, 512, 512), channels_last=True),
    Workload("Cityscapes", (2, 19, 512, 1024)),
    Workload("Cityscapes", (2, 19, 512, 1024), channels_last=True),
    Workload("ADE20K", (1, 150, 512, 512), quick=True),
    Workload("ADE20K", (1, 150, 512, 512), channels_last=True),
]

# The most telling first: a run that must end early leaves the last ones out, and says so.
CUDA = [
    Workload("VOC", (16, 21, 512, 512), quick=True),
    Workload("ImageNet-1k", (1024, 1000), quick=True),
    Workload("language model, 32k", (16384, 32000), quick=True),
    Workload("ADE20K", (16, 150, 512, 512), quick=True),
    Workload("Cityscapes", (8, 19, 512, 1024)),
    Workload("VOC", (16, 21, 512, 512), channels_last=True),
    Workload("ImageNet-21k", (1024, 21841)),
    Workload("language model, 128k", (8192, 128256)),
    Workload("CIFAR-100", (512, 100)),
    Workload("CIFAR-10", (512, 10)),
    Workload("Cityscapes, full size", (2, 19, 1024, 2048)),
    Workload("COCO-Stuff", (8, 171, 512, 512)),
    Workload("ADE20K", (16, 150, 512, 512), channels_last=True),
    Workload("ADE20K, past 2**31", (64, 150, 512, 512)),
]


@dataclass(frozen=True)
class Peer:
    """A loss to measure, of logits of one dtype."""

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    dtype: torch.dtype = torch.float32
    compiled: bool = False
    cpu_isa: str | None = None  # CPU kernels to use instead of the fastest
    overwrites_logits: bool = False
    quick: bool = True  # part of the short benchmark
    grad_output: float | None = None  # the gradient that reaches the loss, where it is not 1
    active: float | None = None  # share of the samples that are not finished, where it is not that of random targets

    @property
    def key(self) -> str:
        """Its name in result rows."""
        parts = [self.name]
        parts += [str(self.dtype).removeprefix("torch.")] if self.dtype != torch.float32 else []
        parts += [self.cpu_isa] if self.cpu_isa else []
        parts += [f"grad {self.grad_output:g}"] if self.grad_output is not None else []
        parts += [f"{self.active:.0%} active"] if self.active is not None else []
        return ", ".join(parts)


def peers(workload: Workload, device: str) -> list[Peer]:
    """HEM and what it is compared with, on one workload."""
    found = [
        Peer("hem", hem_loss),
        Peer("hem, overwriting", _overwriting, overwrites_logits=True),
        Peer("hem", _narrow_margin, active=0.1),
        Peer("ce", F.cross_entropy),
        Peer("ce, compiled", F.cross_entropy, compiled=True),
        Peer("hem in torch", reference.hem_loss, quick=False),
        Peer("hem in torch, compiled", reference.hem_loss, compiled=True),
        Peer("hem", hem_loss, torch.bfloat16),
        Peer("ce", F.cross_entropy, torch.bfloat16, quick=False),
    ]
    if len(workload.shape) == 2:
        found.append(Peer("multi_margin_loss", F.multi_margin_loss))
    if device == "cpu":
        slower = _native.library.available_cpu_isas()[1:-1]  # AVX2, on a processor that has AVX-512
        found += [Peer("hem", hem_loss, cpu_isa=isa) for isa in slower]
        return found
    found += [Peer("ce, compiled", F.cross_entropy, torch.bfloat16, compiled=True)]
    if len(workload.shape) == 2:
        found += [
            Peer("liger ce", loss, dtype, overwrites_logits=True, grad_output=scale)
            for loss in _liger_cross_entropy()
            for dtype in (torch.float32, torch.bfloat16)
            for scale in (None, 0.5)
        ]
    return found


def _narrow_margin(x: Tensor, t: Tensor) -> Tensor:
    return hem_loss(x, t, margin=1e-4)


def mostly_finished(x: Tensor, t: Tensor, active: float) -> Tensor:
    """Targets of which that share is random, and the others the largest logit's: by sample, of pixels by 16 x 16."""
    shape = t.shape[:1] + torch.Size(-(-side // 16) for side in t.shape[1:])
    wrong = torch.rand(shape, device=t.device, generator=torch.Generator(t.device).manual_seed(0)) < active
    for d, side in enumerate(t.shape[1:], start=1):
        wrong = wrong.repeat_interleave(16, d).narrow(d, 0, side)
    return torch.where(wrong, t, x.detach().argmax(1))


def _overwriting(x: Tensor, t: Tensor) -> Tensor:
    return hem_loss(x, t, overwrite_input=True)


def _liger_cross_entropy() -> list[Callable[[Tensor, Tensor], Tensor]]:
    """Liger's cross-entropy, if it is installed."""
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ModuleNotFoundError:
        return []
    return [lambda x, t: liger_cross_entropy(x, t)]
