"""Logits that are a DTensor, their samples or pixels on several devices."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from hem_ext import _native, arguments
from hem_ext.parallel import whole
from hem_ext.stats import loss_and_stats


def hem_loss(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> DTensor:
    """:func:`hem_ext.hem_loss` of a DTensor, as one: a part of the loss on every device, or each sample's where it is.

    One number is exchanged for each mesh dimension that shares the samples out, and none in backward.
    """
    assert isinstance(input, DTensor)
    mesh = input.device_mesh
    placements = [_of_target(input, placement) for placement in input.placements]
    if not isinstance(target, DTensor):
        raise TypeError(f"target must be a DTensor where input is one, got {type(target).__name__}")
    if target.dim() == input.dim():
        target = cast(DTensor, target.squeeze(1))
    if target.device_mesh != mesh:
        raise ValueError(f"input and target must be on one device mesh, got {mesh} and {target.device_mesh}")
    logits, labels = input.to_local(), target.redistribute(mesh, placements).to_local()
    options["weight"], options["margin"] = (whole(x) for x in (weight, options["margin"]))
    if options.pop("process_group") is not None:
        raise ValueError("process_group is not for a DTensor, which knows its device mesh")
    if options["overwrite_input"]:
        raise ValueError("overwrite_input=True is not for a DTensor, whose memory is not its own")

    reduction, normalizer = options.pop("reduction"), options.pop("normalizer")
    labels = arguments.class_indices(logits, labels)
    # Checked as they are meant, then summed up here and divided in the end.
    arguments.check(logits, labels, reduction=reduction, normalizer=normalizer, **options)
    args = arguments.check(logits, labels, reduction="none" if reduction == "none" else "sum", **options)
    native = _native.takes(options["backend"], logits.device, "hem_loss")
    loss, stats = loss_and_stats(logits, labels, args, native)
    if reduction == "none":
        return DTensor.from_local(
            loss, mesh, placements, run_check=False, shape=target.shape, stride=_dense(target.shape)
        )
    if reduction != "sum":
        counted = normalizer
        if normalizer is None:
            counted = stats.active if reduction == "mean" else stats.counted
            counted = counted.clone()
            for dim, placement in enumerate(placements):
                if isinstance(placement, Shard):
                    torch.distributed.all_reduce(counted, group=mesh.get_group(dim))
        loss = loss / arguments.or_one(counted)
    parts = [Partial() if isinstance(placement, Shard) else Replicate() for placement in placements]
    return DTensor.from_local(loss, mesh, parts, run_check=False)


def _of_target(input: DTensor, placement: Placement) -> Placement:
    """Where the targets of logits lie that lie so."""
    if placement.is_replicate():
        return placement
    if isinstance(placement, Shard):
        dim = placement.dim % input.dim()
        if dim != arguments.class_dim(input.shape):
            return Shard(dim - (dim > 0))
        raise ValueError("input is a DTensor that is sharded over its classes; over samples or pixels they can be")
    raise ValueError(f"input must be a DTensor that is sharded or replicated, got {placement}")


def _dense(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
