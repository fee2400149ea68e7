"""HEM over classes that are shared out: every process of a group has the logits of some of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hem_ext import _native, _torch, arguments, hem, reference

_MOST_CLASSES = 2**31 - 1  # that the kernels count


class Share(NamedTuple):
    """Of a call, what the ops below take besides what there is for each sample."""

    margins: Tensor | None  # (num_classes,)
    margin: float  # where margins is None
    ignore_index: int
    num_classes: int  # in all processes
    first: int  # of those here
    rows: bool  # the layout of the logits, as in hem_ext/hem.py


# --- the native ops ---------------------------------------------------------------------------------------------

# Of the logits of some classes. `target` is of all classes, `target_logits` the logit of each sample's target, 0 where
# it is ignored, `errors` the sum of each sample's errors and the largest, first those here, then those of all classes;
# `kept` the sum of those that are kept, and how many they are.
_OF_SHARE = "Tensor? margins, float margin, int ignore_index, SymInt num_classes, SymInt first, bool rows"
_FUNCTION = "hem_ext.parallel.class_parallel_hem_loss"
_errors = _native.define(
    f"class_parallel_hem_errors(Tensor input, Tensor target, Tensor target_logits, {_OF_SHARE}) -> Tensor errors",
    lambda input, target, target_logits, *share: target_logits.new_empty((2, *target.shape)),
    _FUNCTION,
)
_keep = _native.define(
    f"class_parallel_hem_keep(Tensor input, Tensor target, Tensor target_logits, Tensor errors, {_OF_SHARE}) "
    "-> (Tensor mask, Tensor kept)",
    lambda input, target, target_logits, errors, *share: (
        hem.empty_mask(input, target, share[-1]),
        torch.empty_like(errors),
    ),
    _FUNCTION,
)
_backward = _native.define(
    "class_parallel_hem_backward(Tensor grad_loss, Tensor mask, Tensor counts, Tensor target, int ignore_index, "
    "SymInt num_classes, SymInt first, SymInt num_here, int dtype, bool rows) -> Tensor",
    lambda grad_loss, mask, counts, target, ignore_index, num_classes, first, num_here, dtype, rows: hem.empty_gradient(
        mask, target, num_here, dtype, rows
    ),
    _FUNCTION,
)
_NATIVE = tuple(map(_torch.from_autograd, (_errors, _keep, _backward)))


# --- the same in plain PyTorch ----------------------------------------------------------------------------------


def _plain_errors(input: Tensor, target: Tensor, target_logits: Tensor, *of_share: Any) -> Tensor:
    error = _error(input, target, target_logits, Share(*of_share))
    total = error.sum(1)
    largest = error.amax(1) if input.shape[1] else torch.zeros_like(total)
    # NaN is not the largest of numbers to every backend: the sum brings it.
    return torch.stack([total, largest.nan_to_num(nan=0.0, posinf=torch.inf)])


def _plain_keep(
    input: Tensor, target: Tensor, target_logits: Tensor, errors: Tensor, *of_share: Any
) -> tuple[Tensor, Tensor]:
    share = Share(*of_share)
    error = _error(input, target, target_logits, share)
    threshold = torch.minimum(errors[0] / share.num_classes, errors[1])
    kept = (error >= threshold.unsqueeze(1)) & (error > 0)
    return _packed(kept), torch.stack([error.masked_fill_(~kept, 0.0).sum(1), kept.sum(1).to(error.dtype)])


def _plain_backward(
    grad_loss: Tensor,
    mask: Tensor,
    counts: Tensor,
    target: Tensor,
    ignore_index: int,
    num_classes: int,
    first: int,
    num_here: int,
    dtype: int,
    rows: bool,
) -> Tensor:
    broken = counts == num_classes
    # 1 / |K| at every class in K, -1 at the target where K holds any; NaN in all of a broken sample.
    step = (grad_loss / counts.clamp(min=1)).masked_fill(broken, torch.nan).unsqueeze(1)
    gradient = hem.empty_gradient(grad_loss, target, num_here, dtype, rows)
    for bit in range(8):
        part = gradient[:, bit::8]
        if part.numel():
            words = mask[:, : part.shape[1]]
            part.copy_(torch.where(((words >> bit) & 1).bool() | broken.unsqueeze(1), step, 0.0))
    if num_here:
        labels, here = _own(target, ignore_index, first, num_here)
        of_target = (-grad_loss).masked_fill(broken, torch.nan)
        own = gradient.gather(1, labels.unsqueeze(1)).squeeze(1)
        of_target = torch.where(here & (counts > 0), of_target.to(own.dtype), own)
        gradient.scatter_(1, labels.unsqueeze(1), of_target.unsqueeze(1))
    return gradient


_PLAIN = (_plain_errors, _plain_keep, _plain_backward)


def _error(input: Tensor, target: Tensor, target_logits: Tensor, share: Share) -> Tensor:
    """(N, C_local, d1, ..., dk): 0 at the target and of samples that are ignored."""
    ignored = target.long() == share.ignore_index
    margin: float | Tensor = share.margin
    if share.margins is not None:
        margin = share.margins[target.long().masked_fill(ignored, 0)].unsqueeze(1)
    error = (input.to(target_logits.dtype) - target_logits.unsqueeze(1)).add_(margin).clamp_(min=0)
    if input.shape[1]:
        labels, here = (x.unsqueeze(1) for x in _own(target, share.ignore_index, share.first, input.shape[1]))
        error.scatter_(1, labels, error.gather(1, labels).masked_fill_(here, 0.0))
    return error.masked_fill_(ignored.unsqueeze(1), 0.0)


def _own(target: Tensor, ignore_index: int, first: int, num_here: int) -> tuple[Tensor, Tensor]:
    """Targets counted from the first class here, and which of them are here. The others are class 0."""
    labels = target.long()
    here = (labels >= first) & (labels < first + num_here) & (labels != ignore_index)
    return (labels - first).masked_fill_(~here, 0), here


def _packed(kept: Tensor) -> Tensor:
    """A bit for each class: class j at bit j % 8 of byte j / 8."""
    size = list(kept.shape)
    size[1] = (size[1] + 7) // 8
    packed = kept.new_zeros(size, dtype=torch.uint8)
    for bit in range(8):
        part = kept[:, bit::8]
        if part.numel():
            packed[:, : part.shape[1]].bitwise_or_(part.to(torch.uint8) << bit)
    return packed


# --- autograd -----------------------------------------------------------------------------------------------------


def _with_every_bit(mask: Tensor, broken: Tensor, num_here: int, rows: bool) -> Tensor:
    """The mask of the kernels, with every class of broken samples, whatever they kept: their gradient is NaN."""
    every = mask.new_full(((num_here + 31) // 32,), -1)
    if num_here % 32:
        every[-1] = 2 ** (num_here % 32) - 1
    if rows:
        return torch.where(broken.reshape(-1, 1), every, mask)
    return torch.where(broken.reshape(mask.shape[0], 1, mask.shape[2]), every.unsqueeze(1), mask)


class ClassParallelHEM(_torch.Function):
    """Each sample's loss, the same in every process. Saves a bit for each logit, and how many each sample keeps."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        target_logits: Tensor,
        share: Share,
        group: torch.distributed.ProcessGroup,
        is_native: bool,
    ) -> Tensor:
        look, keep, ctx.backward_of = _NATIVE if is_native else _PLAIN
        errors = look(input, target, target_logits, *share)
        total, largest = errors
        torch.distributed.all_reduce(total, group=group)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
        mask, kept = keep(input, target, target_logits, errors, *share)
        torch.distributed.all_reduce(kept, group=group)

        losses, count = kept[0] / kept[1].clamp(min=1), kept[1].to(torch.int32)
        ignored = target.long() == share.ignore_index
        broken = (total.isnan() | target_logits.isnan() | ~losses.isfinite()) & ~ignored
        if is_native:
            mask = _with_every_bit(mask, broken, input.shape[1], share.rows)
        # Of more than 2**24 classes a count may be rounded up to all of them, which says that the sample is broken.
        count = count.clamp_(max=share.num_classes - 1).masked_fill_(broken, share.num_classes)
        ctx.save_for_backward(mask, count, target)
        num_here, dtype = input.shape[1], arguments.DTYPE_CODES[input.dtype]
        ctx.constants = (share.ignore_index, share.num_classes, share.first, num_here, dtype, share.rows)
        return losses.masked_fill_(broken, torch.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.backward_of(grad_losses, *ctx.saved_tensors, *ctx.constants), *[None] * 5


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
    backend: str = "auto",
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
        backend: as there. Processes may differ in it.

    Returns:
        The loss of all classes, the same in every process. Its gradient in each is that of its own logits, in their
        memory format: nothing is to be averaged over `group`. It cannot be differentiated twice.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as :func:`hem_ext.hem_loss`, in the process whose arguments are
            wrong, or that has no kernels where it asks for them.
        ValueError: in all, where what is to be the same is not: the dtype of the logits and their type of device, the
            shape of the targets, an option, and how a DTensor is placed. The values that tensors hold are not compared.
        RuntimeError: in a process whose arguments are right, where those of another are not, with its rank and its
            error: nobody is left waiting, unless what is wrong is the group, or the mesh of the logits.

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
    given_logits = local_logits
    local_logits, group = _of_this_process(given_logits, group)
    options: dict[str, Any] = {"margin": margin, "weight": weight, "ignore_index": ignore_index, "reduction": reduction}
    options["backend"] = backend
    if group is None or group.size() == 1:
        _check_placement(given_logits)
        options |= {"margin": whole(margin), "weight": whole(weight)}
        return hem.hem_loss(local_logits, whole(target), **options)

    # What is wrong here is raised only when the others know.
    problem: Exception | None = None
    try:
        _check_placement(given_logits)
        target = _check_share(local_logits, target)
        agreed = _to_agree_on(local_logits, target, **options)
        is_native = _native.takes(backend, local_logits.device, "class_parallel_hem_loss") and local_logits.shape[1] > 0
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

    begin, num_here, num_classes = sum(sizes[: group.rank()]), local_logits.shape[1], sum(sizes)
    arithmetic, device = arguments.ARITHMETIC[local_logits.dtype], local_logits.device
    # With the targets' logits goes what is wrong, a place for each process.
    shared = torch.zeros(target.numel() + group.size(), dtype=arithmetic, device=device)
    target_logits, wrong = shared.split([target.numel(), group.size()])
    try:
        target = whole(target)
        options |= {"margin": whole(margin), "weight": whole(weight), "backend": "reference"}
        # As the whole logits would be, but for their memory.
        size = (target.shape[0], num_classes, *target.shape[1:])
        all_logits = local_logits.new_empty(1).expand(size)
        args = arguments.check(all_logits, target, **options)
        arguments.check_values(target, num_classes, args.ignore_index, margin=args.margins, weight=args.weight)
        if is_native:
            _check_for_kernels(num_classes, local_logits=local_logits, target=target, margin=args.margins)
    except Exception as error:
        problem = error
        wrong[group.rank()] = 1.0
    else:
        # Not on a CPU, where it was told.
        labels = target.long()
        is_class = (labels >= 0) & (labels < num_classes)
        wrong[group.rank()] = (~is_class & (labels != args.ignore_index)).any()
        if num_here:
            own_labels, here = _own(target, args.ignore_index, begin, num_here)
            own = local_logits.detach().gather(1, own_labels.unsqueeze(1)).squeeze(1)
            target_logits.copy_(own.masked_fill_(~here, 0.0).flatten())
    torch.distributed.all_reduce(shared, group=group)
    found = wrong.tolist()
    if any(found):
        if problem is None and found[group.rank()]:
            problem = IndexError(f"a target is neither a class in [0, {num_classes}) nor ignore_index")
        _raise_together(problem, group)

    local_logits, rows = hem.in_layout(local_logits)
    share = Share(args.margins, args.margin, args.ignore_index, num_classes, begin, rows)
    target_logits = target_logits.view(target.shape)
    losses = ClassParallelHEM.apply(local_logits, target.contiguous(), target_logits, share, group, is_native)
    return reference.of_batch(losses, target, args)


def whole(x: Any) -> Any:
    """All of a DTensor, gathered; anything else as it is."""
    return x.full_tensor() if _torch.is_dtensor(x) else x


def _of_this_process(
    local_logits: Tensor, group: torch.distributed.ProcessGroup | None
) -> tuple[Tensor, torch.distributed.ProcessGroup | None]:
    """The logits as a plain tensor, and the group. Raise where there is no telling which one it is."""
    arguments.check_group("group", group)
    if _torch.is_dtensor(local_logits):
        if group is not None:
            raise ValueError("group is not for a DTensor, which knows its device mesh")
        mesh = local_logits.device_mesh  # type: ignore[attr-defined]
        if mesh.ndim != 1:
            raise _not_sharded(local_logits)
        ranks = mesh.mesh.tolist()
        if ranks != sorted(ranks):
            raise ValueError(f"local_logits must be on a mesh whose processes are in ascending order, got {ranks}")
        return local_logits.to_local(), mesh.get_group()  # type: ignore[attr-defined]
    if group is None and torch.distributed.is_available():
        group = torch.distributed.group.WORLD  # None where there are no processes
    return local_logits, group


def _check_placement(logits: Any) -> None:
    """Raise for a DTensor that is not sharded over its classes."""
    if _torch.is_dtensor(logits) and not logits.placements[0].is_shard(1):
        raise _not_sharded(logits)


def _not_sharded(logits: Any) -> ValueError:
    return ValueError(
        "local_logits must be a DTensor that is sharded over its classes, dimension 1, on a mesh of one dimension, got "
        f"{logits.placements} on {logits.device_mesh}"
    )


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


def _check_for_kernels(num_classes: int, **tensors: Tensor | None) -> None:
    """Raise what the kernels would, when the other processes already wait for what they find."""
    if num_classes > _MOST_CLASSES:
        raise ValueError(f"the kernels take at most 2**31 - 1 classes, got {num_classes} in all processes")
    for name, x in tensors.items():
        if x is not None and x.data_ptr() % x.element_size():
            size = x.element_size()
            raise ValueError(
                f"the memory of {name} is not aligned to its elements of {size} bytes: give a copy, .clone()"
            )


def _to_agree_on(
    local_logits: Tensor,
    target: Tensor,
    margin: float | Sequence[float] | Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    backend: str,
) -> dict[str, str]:
    """What has to be the same in every process, by its name. Of tensors what they are, not what they hold."""
    ignore_index = arguments.check_options(ignore_index, reduction, backend, None)
    return {
        "the dtype of local_logits": str(local_logits.dtype),
        "the type of device of local_logits": local_logits.device.type,
        "the shape of target": str(tuple(target.shape)),
        "target": _kind(target),
        "margin": _kind(arguments.margin_value(margin)),
        "weight": _kind(weight),
        "ignore_index": str(ignore_index),
        "reduction": reduction,
    }


def _kind(x: Any) -> str:
    if _torch.is_dtensor(x):
        placed = f"{x.placements} over ranks {x.device_mesh.mesh.tolist()}"
        return f"a DTensor of {x.dtype} and shape {tuple(x.shape)}, {placed}"
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
    everywhere = zip(agreed, *_everywhere(tuple(agreed.values()), group), strict=True)
    name, *values = next(line for line in everywhere if len(set(line[1:])) > 1)
    found = "; ".join(f"{value} in {ranks}" for value, ranks in _by_value(values, group).items())
    raise ValueError(f"{name} must be the same in every process, got {found}")


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
