"""HEM over classes that are shared out: every process of a group has the logits of some of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hem_ext import _torch, arguments, hem, reference


class ClassRange(NamedTuple):
    """The classes of one process, of all `num_classes`."""

    begin: int
    end: int
    num_classes: int

    def local(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels counted from the first class here, and which of them are here. The others are class 0, if there is."""
        here = (labels >= self.begin) & (labels < self.end)
        return (labels - self.begin).masked_fill(~here, 0), here


class ClassParallelHEM(_torch.Function):
    """Each sample's loss, the same in every process. Saves a bit for each logit and a few numbers for each sample.

    `labels` are those of :meth:`ClassRange.local`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        y_target: Tensor,
        margin: float | Tensor,
        labels: Tensor,
        here: Tensor,
        ignored: Tensor,
        shard: ClassRange,
        group: torch.distributed.ProcessGroup,
    ) -> Tensor:
        class_dim = arguments.class_dim(input.shape)
        if isinstance(margin, Tensor):
            margin = margin.unsqueeze(class_dim)

        error = (input.to(y_target.dtype) - y_target.unsqueeze(class_dim)).add_(margin).clamp_(min=0)
        if shard.end > shard.begin:
            at_target = error.gather(class_dim, labels.unsqueeze(class_dim))
            error.scatter_(
                class_dim, labels.unsqueeze(class_dim), at_target.masked_fill(here.unsqueeze(class_dim), 0.0)
            )
        total = error.sum(class_dim)
        largest = error.amax(class_dim) if shard.end > shard.begin else torch.zeros_like(total)
        # NaN is not the largest of numbers to every backend: the sum brings it.
        largest = largest.nan_to_num(nan=0.0, posinf=torch.inf)
        torch.distributed.all_reduce(total, group=group)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)

        mean = total / shard.num_classes
        kept = (error >= torch.minimum(mean, largest).unsqueeze(class_dim)) & (error > 0)
        kept &= ~ignored.unsqueeze(class_dim)
        sums = torch.stack([error.masked_fill_(~kept, 0.0).sum(class_dim), kept.sum(class_dim).to(error.dtype)])
        torch.distributed.all_reduce(sums, group=group)
        losses, count = sums[0] / sums[1].clamp(min=1), sums[1]
        broken = (mean.isnan() | y_target.isnan() | ~losses.isfinite()) & ~ignored

        ctx.save_for_backward(_packed(kept, class_dim), labels, here & ~ignored, count, broken)
        ctx.like = torch.empty_like(input, device="meta")  # how it lies in memory, without any
        return losses.masked_fill(ignored, 0.0).masked_fill(broken, torch.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        packed, labels, here, count, broken = ctx.saved_tensors
        like = ctx.like
        class_dim = arguments.class_dim(like.shape)
        # 1 / |K| at every class in K, -1 at the target where K holds any; NaN in all of a broken row.
        step = (grad_losses / count.clamp(min=1)).masked_fill(broken, torch.nan).unsqueeze(class_dim)
        gradient = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=packed.device)
        for bit in range(8):
            part = gradient[_every_eighth(bit, class_dim)]
            if part.numel():
                words = packed.narrow(class_dim, 0, part.shape[class_dim])
                part.copy_(torch.where(((words >> bit) & 1).bool() | broken.unsqueeze(class_dim), step, 0.0))
        if like.shape[class_dim]:
            at = labels.unsqueeze(class_dim)
            of_target = torch.where(count > 0, -grad_losses, 0.0).masked_fill(broken, torch.nan).unsqueeze(class_dim)
            own = gradient.gather(class_dim, at)
            gradient.scatter_(class_dim, at, torch.where(here.unsqueeze(class_dim), of_target.to(own.dtype), own))
        return gradient, *[None] * 7


def _packed(kept: Tensor, class_dim: int) -> Tensor:
    """A bit for each class: class j at bit j % 8 of byte j / 8."""
    size = list(kept.shape)
    size[class_dim] = (size[class_dim] + 7) // 8
    packed = kept.new_zeros(size, dtype=torch.uint8)
    for bit in range(8):
        part = kept[_every_eighth(bit, class_dim)]
        if part.numel():
            packed.narrow(class_dim, 0, part.shape[class_dim]).bitwise_or_(part.to(torch.uint8) << bit)
    return packed


def _every_eighth(first: int, dim: int) -> tuple[slice, ...]:
    return (*[slice(None)] * dim, slice(first, None, 8))


# --- what users call ------------------------------------------------------------------------------------------


@_torch.uncompiled
def class_parallel_hem_loss(
    local_logits: Tensor,
    target: Tensor,
    *,
    margin: float | Sequence[float] | Tensor = 0.2,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """:func:`hem_ext.hem_loss` of logits whose classes are shared out over the processes of a group.

    What crosses the wire is five numbers for each sample (its target's logit, the sum and the largest of its errors,
    the sum of those that are kept and how many they are), of four bytes, or eight of float64, in four reductions; and
    four for each process, three of which are gathered first. The logits never do. In backward nothing does. A GPU is
    waited for twice, to know the shares, and that nothing is wrong in any. It breaks the graph of ``torch.compile``.

    Args:
        local_logits: of this process's classes, ``(N, C_local)`` or ``(N, C_local, d1, ..., dk)``; the first process
            has the first classes. A process may have any number of them, also one or none. Or a DTensor that is sharded
            over dimension 1 of a one-dimensional mesh, whose group is taken.
        target: as in :func:`hem_ext.hem_loss`, the classes counted over all processes; the same in all of them.
        margin, weight: as there, of all classes ``(C,)``; the same in all processes. Or DTensors that are sharded or
            replicated over these processes: they are gathered.
        ignore_index, reduction: as there.
        group: the processes; the default group if None. Without one, or with one process, it is
            :func:`hem_ext.hem_loss`.

    Returns:
        The loss of all classes, the same in every process. Its gradient in each is that of its own logits, in their
        memory format: nothing is to be averaged over `group`. It cannot be differentiated twice.

    Raises:
        ValueError, TypeError, IndexError: as :func:`hem_ext.hem_loss`, in the process whose arguments are wrong.
        ValueError: in all, where what is to be the same is not: the dtype of the logits, the shape of the targets, an
            option, and how a DTensor is placed. The values that tensors hold are not compared.
        RuntimeError: in a process whose arguments are right, where those of another are not, with its rank and its
            error: nobody is left waiting, unless what is wrong is the group, or the mesh or placement of the logits.

    Source: ours; for cross-entropy Shoeybi et al., *Megatron-LM*, arXiv 1909.08053, section 3.

    Example, in every process, as ``torchrun`` starts them::

        from torch.distributed.tensor import Shard
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
        from hem_ext.parallel import class_parallel_hem_loss

        layout = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        parallelize_module(classifier, mesh, layout)  # an nn.Linear
        loss = class_parallel_hem_loss(classifier(hidden), target)
        loss.backward()  # also of hidden, summed over processes
    """
    local_logits, group = _of_this_process(local_logits, group)
    options: dict[str, Any] = {"margin": margin, "weight": weight, "ignore_index": ignore_index, "reduction": reduction}
    if group is None or group.size() == 1:
        options |= {"margin": whole(margin), "weight": whole(weight)}
        return hem.hem_loss(local_logits, whole(target), **options)

    # What is wrong here is raised only when the others know.
    problem: Exception | None = None
    try:
        target = _check_share(local_logits, target)
        agreed = _to_agree_on(local_logits, target, **options)
        record = [1, local_logits.shape[1], _digest(agreed)]
    except Exception as error:
        problem, record = error, [0, 0, 0]
    on_gpu = "nccl" in torch.distributed.get_backend(group)
    given = torch.tensor(record, device=torch.cuda.current_device() if on_gpu else "cpu")
    gathered = [torch.empty_like(given) for _ in range(group.size())]
    torch.distributed.all_gather(gathered, given, group=group)
    fine, sizes, digests = torch.stack(gathered, 1).tolist()
    if not all(fine):
        _raise_together(problem, group)
    if len(set(digests)) > 1:
        _raise_differing(agreed, group)

    begin = sum(sizes[: group.rank()])
    shard = ClassRange(begin, begin + local_logits.shape[1], sum(sizes))
    arithmetic, device = arguments.ARITHMETIC[local_logits.dtype], local_logits.device
    # With the targets' logits goes what is wrong, a place for each process.
    y_target = torch.zeros(target.numel() + group.size(), dtype=arithmetic, device=device)
    y_of_target, wrong = y_target.split([target.numel(), group.size()])
    try:
        target = whole(target)
        options |= {"margin": whole(margin), "weight": whole(weight)}
        # As the whole logits would be, but for their memory.
        size = (target.shape[0], shard.num_classes, *target.shape[1:])
        all_logits = local_logits.new_empty(1).expand(size)
        args = arguments.check(all_logits, target, backend="reference", **options)
        arguments.check_values(target, shard.num_classes, args.ignore_index, margin=args.margins, weight=args.weight)
    except Exception as error:
        problem = error
        wrong[group.rank()] = 1.0
    else:
        ignored = target.long() == args.ignore_index
        labels = target.long().masked_fill(ignored, 0)
        # Not on a CPU, where it was told.
        wrong[group.rank()] = ((labels < 0) | (labels >= shard.num_classes)).any()
        own_labels, here = shard.local(labels)
        if shard.end > shard.begin:
            own = local_logits.detach().gather(1, own_labels.unsqueeze(1)).squeeze(1).to(arithmetic)
            y_of_target.copy_(own.masked_fill(~here | ignored, 0.0).flatten())
    torch.distributed.all_reduce(y_target, group=group)
    found = wrong.tolist()
    if any(found):
        if problem is None and found[group.rank()]:
            problem = IndexError(f"a target is neither a class in [0, {shard.num_classes}) nor ignore_index")
        _raise_together(problem, group)

    margin = args.margin if args.margins is None else args.margins[labels]
    y_of_target = y_of_target.view(target.shape)
    losses = ClassParallelHEM.apply(local_logits, y_of_target, margin, own_labels, here, ignored, shard, group)
    return reference.of_batch(losses, target, args)


def whole(x: Any) -> Any:
    """All of a DTensor, gathered; anything else as it is."""
    return x.full_tensor() if _torch.is_dtensor(x) else x


def _of_this_process(
    local_logits: Tensor, group: torch.distributed.ProcessGroup | None
) -> tuple[Tensor, torch.distributed.ProcessGroup | None]:
    """The logits as a plain tensor, and the group."""
    arguments.check_group(group)
    if _torch.is_dtensor(local_logits):
        if group is not None:
            raise ValueError("group is not for a DTensor, which knows its device mesh")
        mesh, placements = local_logits.device_mesh, local_logits.placements  # type: ignore[attr-defined]
        if mesh.ndim != 1 or not (placements[0].is_shard(1) or placements[0].is_shard(1 - local_logits.dim())):
            raise ValueError(
                "local_logits must be a DTensor that is sharded over its classes, dimension 1, on a mesh of one "
                f"dimension, got {placements} on {mesh}"
            )
        ranks = mesh.mesh.tolist()
        if ranks != sorted(ranks):
            raise ValueError(f"local_logits must be on a mesh whose processes are in ascending order, got {ranks}")
        return local_logits.to_local(), mesh.get_group()  # type: ignore[attr-defined]
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return local_logits, torch.distributed.group.WORLD if group is None and distributed else group


def _check_share(local_logits: Tensor, target: Tensor) -> Tensor:
    """Raise for what is no share of the logits of these targets; return the targets."""
    for name, value in (("local_logits", local_logits), ("target", target)):
        arguments.check_dense(name, value)
    if local_logits.dtype not in arguments.ARITHMETIC:
        raise TypeError(f"local_logits must be float32, float64, float16 or bfloat16, got {local_logits.dtype}")
    if local_logits.dim() < 2:
        raise ValueError(
            f"local_logits must have shape (N, C_local) or (N, C_local, d1, ..., dk), got {tuple(local_logits.shape)}"
        )
    target = arguments.class_indices(local_logits, target)
    expected = local_logits.shape[:1] + local_logits.shape[2:]
    if target.shape != expected:
        raise ValueError(
            f"expected target of shape {tuple(expected)} for local_logits of shape {tuple(local_logits.shape)}, "
            f"got target of shape {tuple(target.shape)}"
        )
    if target.device != local_logits.device:
        raise arguments.other_device("target", target, local_logits, "local_logits")
    return target


def _to_agree_on(
    local_logits: Tensor,
    target: Tensor,
    margin: float | Sequence[float] | Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> dict[str, str]:
    """What has to be the same in every process, by its name. Of tensors what they are, not what they hold."""
    ignore_index = arguments.check_options(ignore_index, reduction, "reference", None)
    return {
        "the dtype of local_logits": str(local_logits.dtype),
        "the shape of target": str(tuple(target.shape)),
        "target": _kind(target),
        "margin": _kind(arguments.margin_value(margin)),
        "weight": _kind(weight),
        "ignore_index": str(ignore_index),
        "reduction": reduction,
    }


def _kind(x: object) -> str:
    if _torch.is_dtensor(x):
        return f"a DTensor {x.placements} over ranks {x.device_mesh.mesh.tolist()}"  # type: ignore[attr-defined]
    return "a tensor" if isinstance(x, Tensor) else str(x)


def _digest(agreed: Mapping[str, str]) -> int:
    return int.from_bytes(hashlib.sha256(repr(agreed).encode()).digest()[:7], "big")


def _raise_together(problem: Exception | None, group: torch.distributed.ProcessGroup) -> NoReturn:
    """Raise what is wrong here, or say what is elsewhere."""
    told = _everywhere(None if problem is None else f"{type(problem).__name__}: {problem}", group)
    if problem is not None:
        raise problem
    wrong = "; in ".join(f"{ranks}: {error}" for error, ranks in _by_value(told, group).items() if error is not None)
    raise RuntimeError(f"class_parallel_hem_loss was given something wrong in {wrong}")


def _raise_differing(agreed: Mapping[str, str], group: torch.distributed.ProcessGroup) -> NoReturn:
    """Say what is not the same in every process."""
    for name, *values in zip(agreed, *_everywhere(tuple(agreed.values()), group), strict=True):
        if len(set(values)) > 1:
            found = "; ".join(f"{value} in {ranks}" for value, ranks in _by_value(values, group).items())
            raise ValueError(f"{name} must be the same in every process, got {found}")
    raise AssertionError("the digests of what is the same differ")


def _everywhere(value: object, group: torch.distributed.ProcessGroup) -> list[Any]:
    """What each process has."""
    values: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def _by_value(values: Sequence[Any], group: torch.distributed.ProcessGroup) -> dict[Any, str]:
    """The processes that have each value, in words."""
    ranks: dict[Any, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(torch.distributed.get_global_rank(group, rank)))
    return {value: f"rank{'s' * (len(of) > 1)} {', '.join(of)}" for value, of in ranks.items()}
