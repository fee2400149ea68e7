"""The HEM loss: its native ops, their autograd, and what users call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from hem_ext import _native, _torch, arguments, reference
from hem_ext.margins import class_margins
from hem_ext.stats import Stats, loss_and_stats

# --- the native ops -----------------------------------------------------------------------------------------

# `rows` is the layout of the logits in memory and of everything derived from it (csrc/hem/hem_layout.h):
# classes side by side (True), or positions side by side (False).


def _fake_forward(
    input: Tensor,
    target: Tensor,
    margins: Tensor | None,
    margin: float,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_outputs(input, target, (margins, weight), reduction, empty_mask(input, target, rows))


def empty_outputs(
    input: Tensor, target: Tensor, constants: Sequence[Tensor | None], reduction: int, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, mask and denominator of a forward."""
    if any(x is not None and x.device != input.device for x in (target, *constants)):
        raise RuntimeError("hem_ext: every tensor must be on the device of the logits")
    arithmetic = arguments.ARITHMETIC[input.dtype]
    loss_shape = target.shape if arguments.REDUCTIONS[reduction] == "none" else ()
    return input.new_empty(loss_shape, dtype=arithmetic), mask, input.new_empty((), dtype=arithmetic)


def empty_mask(input: Tensor, target: Tensor, rows: bool) -> Tensor:
    """A bit for each logit, in the layout of the logits."""
    words = (input.shape[arguments.class_dim(input.shape)] + 31) // 32
    shape: tuple[int, ...]
    if rows:
        shape = (target.numel(), words)
    elif input.dim() == 2:
        shape = (1, words, target.numel())
    else:
        shape = (input.shape[0], words, input.shape[2:].numel())
    return input.new_empty(shape, dtype=torch.int32)


def _fake_backward(
    grad_loss: Tensor,
    mask: Tensor,
    target: Tensor,
    weight: Tensor | None,
    denominator: Tensor,
    ignore_index: int,
    num_classes: int,
    dtype_code: int,
    reduction: int,
    rows: bool,
) -> Tensor:
    return empty_gradient(mask, target, num_classes, dtype_code, rows)


def empty_gradient(like: Tensor, target: Tensor, num_classes: int, dtype_code: int, rows: bool) -> Tensor:
    """The gradient of so many classes, in the layout of their logits, where `like` is."""
    dtype = arguments.DTYPES[dtype_code]
    size = (*target.shape[:1], num_classes, *target.shape[1:])
    if rows and len(size) > 2:
        return like.new_empty((size[0], *size[2:], size[1]), dtype=dtype).movedim(-1, 1)
    if not rows and len(size) == 2:
        return like.new_empty((size[1], size[0]), dtype=dtype).t()
    return like.new_empty(size, dtype=dtype)


_DTYPE_CODES = arguments.DTYPE_CODES
_forward = _native.define(
    "hem_forward(Tensor input, Tensor target, Tensor? margins, float margin, Tensor? weight, int ignore_index, "
    "int reduction, bool rows) -> (Tensor loss, Tensor mask, Tensor denominator)",
    _fake_forward,
    "hem_ext.hem_loss",
)
_backward = _native.define(
    "hem_backward(Tensor grad_loss, Tensor mask, Tensor target, Tensor? weight, Tensor denominator, "
    "int ignore_index, SymInt num_classes, int dtype, int reduction, bool rows) -> Tensor",
    _fake_backward,
    "hem_ext.hem_loss",
)
_backward_into = _native.define(
    "hem_backward_into(Tensor(a!) grad_input, Tensor grad_loss, Tensor mask, Tensor target, Tensor? weight, "
    "Tensor denominator, int ignore_index, int reduction, bool rows) -> ()",
    lambda *_: None,
    "hem_ext.hem_loss",
)
_call_forward, _call_backward = _torch.from_autograd(_forward), _torch.from_autograd(_backward)


# --- autograd -----------------------------------------------------------------------------------------------


class HEM(_torch.Function):
    """Saves one bit per logit, the targets and one number; nothing of the size of the logits.

    `constants` is (margin, ignore_index, reduction, rows, group, overwrite). With `overwrite` backward puts the
    gradient where the logits are, which are saved to that end alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        margins: Tensor | None,
        weight: Tensor | None,
        constants: tuple[Any, ...],
    ) -> Tensor:
        margin, ignore_index, reduction, rows, group, overwrite = constants
        loss: Tensor
        loss, mask, denominator = _call_forward(input, target, margins, margin, weight, ignore_index, reduction, rows)
        if group is not None:
            loss, denominator = _over_group(loss, denominator, group)
        saved = (mask, target, weight, denominator)
        ctx.save_for_backward(*saved, input) if overwrite else ctx.save_for_backward(*saved)
        shape = input.shape
        num_classes = shape[arguments.class_dim(shape)]
        ctx.constants = (ignore_index, num_classes, _DTYPE_CODES[input.dtype], reduction, rows)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if len(saved) > 4:
            return _overwritten(saved[4], grad_loss, saved[:4], ctx.constants), None, None, None, None
        call: Callable[..., Tensor] = HEMGradient.apply if torch.is_grad_enabled() else _call_backward
        return call(grad_loss, *saved, *ctx.constants), None, None, None, None


class HEMGradient(_torch.Function):
    """The backward of `HEM` as a function of `grad_loss`, in which it is linear."""

    @staticmethod
    def forward(ctx: Any, grad_loss: Tensor, *saved: Any) -> Tensor:
        mask, target, weight, denominator, *ctx.constants = saved
        ctx.save_for_backward(grad_loss, mask, target, weight, denominator)
        gradient: Tensor = _call_backward(grad_loss, *saved)
        return gradient

    @staticmethod
    def backward(ctx: Any, grad_grad_input: Tensor) -> tuple[Tensor | None, ...]:
        grad_loss, *tensors = ctx.saved_tensors
        ignore_index, num_classes, _, reduction, rows = ctx.constants
        # The gradient where grad_loss is 1 everywhere, not rounded to the dtype of the logits.
        with torch.no_grad():
            ones = torch.ones_like(grad_loss)
            unit = _backward(ones, *tensors, ignore_index, num_classes, _DTYPE_CODES[grad_loss.dtype], reduction, rows)
        slope = (grad_grad_input * unit).sum(arguments.class_dim(unit.shape))
        return slope.sum_to_size(grad_loss.shape), *[None] * 9


def _overwritten(input: Tensor, grad_loss: Tensor, saved: Sequence[Tensor | None], constants: Sequence[int]) -> Tensor:
    """The gradient of `input`, in its memory."""
    if torch.is_grad_enabled():
        raise RuntimeError("overwrite_input=True leaves no graph behind: backward with create_graph=True needs False")
    ignore_index, _, _, reduction, rows = constants
    grad_input = input.detach()
    _backward_into(grad_input, grad_loss, *saved, ignore_index, reduction, rows)
    # Whoever else saved the logits learns of it, by autograd's own error.
    torch.autograd.graph.increment_version(grad_input)
    return grad_input


def _over_group(loss: Tensor, denominator: Tensor, group: torch.distributed.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The loss and its denominator in a group, from those of this process's samples. Backward needs no more."""
    shared = reference.over_group(denominator, group)
    # Nothing counted here: the loss is 0 or NaN, and stays so.
    return loss * (denominator / shared.masked_fill(shared == 0, 1)), shared


_eager_apply = _torch.eager_apply(HEM)


# --- how the logits lie in memory ------------------------------------------------------------------------------


def _rows(input: Tensor) -> bool | None:
    """The layout of the logits in memory, None if it is neither."""
    shape = input.shape
    has_pixels = len(shape) > 2 and shape[2:].numel() != 1
    if input.is_contiguous():
        return not has_pixels
    if len(shape) == 1:
        return None
    stride = input.stride()
    if has_pixels and _fold(shape[2:], stride[2:]) == 1:
        return False
    side_by_side = stride[1] == 1 or shape[1] == 1
    if side_by_side and _fold((shape[0], *shape[2:]), (stride[0], *stride[2:])) is not None:
        return True
    if len(shape) == 2 and stride[0] == 1:
        return False
    return None


def _fold(shape: Sequence[int], stride: Sequence[int]) -> int | None:
    """The one stride of these dimensions seen as a single one, None if there is none."""
    length, step = 1, None
    for size, s in zip(reversed(shape), reversed(stride), strict=True):
        if size == 1:
            continue
        if step is None:
            step = s
        elif s != length * step:
            return None
        length *= size
    return 1 if step is None else step


def in_layout(input: Tensor) -> tuple[Tensor, bool]:
    """The logits in one of the layouts, and in which: copied once, into the nearer one, where they are in neither."""
    rows = _rows(input)
    if rows is None:
        rows = input.dim() > 2 and input.stride(1) == 1
        input = input.movedim(1, -1).contiguous().movedim(-1, 1) if rows else input.contiguous()
        rows = bool(_rows(input))
    return input, rows


# --- what users call ----------------------------------------------------------------------------------------


def hem_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    margin: float | Sequence[float] | Tensor = 0.2,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    normalizer: float | Tensor | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    overwrite_input: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""The HEM (high error margin) loss between logits and class indices.

    For a sample with logits :math:`y`, target class :math:`l` and margin :math:`m`,

    .. math::
        e_j = \max(0, y_j - y_l + m) \; (j \ne l), \quad e_l = 0, \qquad
        K = \{ j : e_j \ge \tfrac{1}{C} \textstyle\sum_i e_i, \; e_j > 0 \}, \qquad
        \mathrm{loss} = \frac{1}{|K|} \sum_{j \in K} e_j

    and 0 where :math:`K` is empty. The mean and :math:`K` are constants to autograd: the gradient is
    :math:`1/|K|` at every class in :math:`K` and -1 at the target.

    Shapes are those of :func:`torch.nn.functional.cross_entropy`: ``(C,)`` with target ``()``, ``(N, C)``
    with ``(N,)``, ``(N, C, d1, ..., dk)`` with ``(N, d1, ..., dk)``. Contiguous, channels_last and transposed
    logits are read where they lie, and the gradient comes back in the same memory format.

    Args:
        input: logits, float32, float64, float16 or bfloat16. Computed in float32 (float64 for float64), also
            under autocast; half-precision logits are read as they are.
        target: class indices, in ``[0, C)`` or equal to `ignore_index`. int64, int32 and uint8 are read as they are;
            bool, int8, int16 and uint16 are converted. A mask ``(N, 1, d1, ..., dk)`` is one of ``(N, d1, ..., dk)``.
        weight: one factor per class ``(C,)``, looked up by the target; finite, not negative. A constant: it gets no
            gradient.
        margin: a number, or one number per class ``(C,)``, looked up by the target; finite, not negative. A
            constant as well.
        ignore_index: samples with this target have loss 0 and gradient 0, whatever their logits hold.
        reduction: what becomes of the losses, :math:`w_i` being the sample's weight (1 without `weight`).

            - ``"mean"``, the paper's: :math:`\sum w_i \mathrm{loss}_i` over :math:`\sum w_i` of the *active*
              samples, those whose loss is above 0. No active sample: 0, and every gradient is 0.
            - ``"batchmean"``: over :math:`\sum w_i` of every sample that is not ignored.
            - ``"sum"``: the sum.
            - ``"none"``: :math:`w_i \mathrm{loss}_i`, shaped like `target`.
        label_smoothing: must be 0; it is there so that a call of ``cross_entropy`` can be changed by its name alone.
        normalizer: what ``"mean"`` and ``"batchmean"`` divide the sum by instead of their own count, a number or a
            tensor of shape (): for a batch that is split, the count of all of it. Where it is 0, so is the loss.
        process_group: the processes that share a batch, such as ``torch.distributed.group.WORLD`` (None before
            ``init_process_group``). ``"mean"`` and ``"batchmean"`` divide by what is counted in all of them, times the
            number of processes: the mean of their losses, and of their gradients as ``DistributedDataParallel`` takes
            it, is that of the whole batch in one process, also where shares are uneven or empty. Every process of the
            group has to call; one number is exchanged, in forward. ``"sum"`` and ``"none"`` are as without a group.
            With `normalizer`, which then counts for all of them, nothing is exchanged.
        overwrite_input: backward writes the gradient into the memory of the logits instead of memory of its own. After
            it they hold the gradient. Where autograd still needs them for something else it raises its own error, or
            this function where autograd could not tell. In plain PyTorch it has no effect.
        backend: ``"auto"`` takes the native kernels where there are some for the device of `input`, else plain
            PyTorch; ``"native"`` raises instead; ``"reference"`` is :func:`hem_ext.reference.hem_loss`.

    Returns:
        The loss in the arithmetic's dtype: float32, also for float16 and bfloat16 logits (unlike
        ``cross_entropy``), float64 for float64. A scalar, or shaped like `target` with ``"none"``. A sample with a
        NaN logit, or with errors whose sum is infinite, has loss NaN and gradient NaN.

    Raises:
        ValueError: shapes that do not fit, no classes, an unknown `reduction` or `backend`, a `margin`, `weight` or
            `normalizer` that is negative, not finite, of another shape or requires a gradient, a `label_smoothing`;
            with `overwrite_input` logits that are a leaf, lie in memory with gaps, or that a compiled network shares
            with what it saved; for native kernels memory that is not aligned to its elements.
        TypeError: a dtype that is not listed above; a `process_group` that is neither None nor a group of this process.
        IndexError: a target that is neither a class nor `ignore_index` (on CUDA: a device-side assertion, as
            in ``cross_entropy``).
        RuntimeError: tensors on different devices; ``backend="native"`` without kernels for the device;
            `overwrite_input` in what torch.func transforms, in a compiled graph that must not break, or where the
            gradient is to be differentiated.

    Source: Spratling & Schütt, *A margin-based replacement for cross-entropy loss*, arXiv 2501.12191.

    Example::

        >>> import torch
        >>> from hem_ext import hem_loss
        >>> logits = torch.tensor([[0.5, 0.25, 1.0], [2.0, 0.0, 0.0]], requires_grad=True)
        >>> loss = hem_loss(logits, torch.tensor([0, 0]), margin=0.25)
        >>> loss  # one active sample, whose largest error is 1.0 - 0.5 + 0.25
        tensor(0.7500, grad_fn=<HEMBackward>)
        >>> loss.backward()
        >>> logits.grad
        tensor([[-1.,  0.,  1.],
                [ 0.,  0.,  0.]])
    """
    if (
        backend == "auto"
        and process_group is None
        and normalizer is None
        and overwrite_input is False
        and label_smoothing == 0
        and _torch.is_eager()
        and arguments.is_plain(input, margin, weight, ignore_index)
        and _native.has_kernels(input)
    ):
        # The op itself refuses what does not fit, and only then is it put into words, or made fit.
        try:
            rows, code = _rows(input), arguments.REDUCTION_CODES.get(reduction)
            if rows is not None and code is not None:
                found: Tensor = _eager_apply(input, target, None, None, (margin, ignore_index, code, rows, None, False))
                return found
        except Exception:
            fitting = arguments.class_indices(input, target)
            arguments.check(input, fitting, margin, weight, ignore_index, reduction, backend)
            if fitting is target:
                raise  # not an argument: out of memory, say, or what a hook on saved tensors raised
    is_told, is_sharded = has_torch_function((input, target)), _torch.is_dtensor(input)
    is_outside = overwrite_input and torch.compiler.is_compiling()  # a graph plans its memory by itself
    if is_told or is_sharded or is_outside:
        options: dict[str, Any] = {"margin": margin, "ignore_index": ignore_index, "reduction": reduction}
        options |= {"label_smoothing": label_smoothing, "normalizer": normalizer, "process_group": process_group}
        options |= {"overwrite_input": overwrite_input, "backend": backend}
        if is_told:
            told: Tensor = handle_torch_function(hem_loss, (input, target), input, target, weight, **options)
            return told
        if is_outside:
            return _uncompiled(input, target, weight, **options)
        from hem_ext import sharded  # which needs torch.distributed

        return sharded.hem_loss(input, target, weight, **options)
    target = arguments.class_indices(input, target)
    args = arguments.check(
        input,
        target,
        margin,
        weight,
        ignore_index,
        reduction,
        backend,
        process_group,
        label_smoothing,
        normalizer,
        overwrite_input,
    )
    # What is exported holds torch's own operators alone: it runs, and trains, where this library is not.
    if torch.compiler.is_exporting() or not _native.takes(backend, input.device, "hem_loss"):
        return reference.compute(input, target, args)
    if overwrite_input:
        overwrite_input = _may_overwrite(input, _rows(input))
    input, rows = in_layout(input)
    if not _torch.is_eager() and not torch.compiler.is_compiling():
        return loss_and_stats(input, target, args, native=True)[0]
    constants = (args.margin, args.ignore_index, args.reduction, rows, args.group, overwrite_input)
    loss: Tensor = HEM.apply(input, target, args.margins, args.weight, constants)
    return loss if args.divisor is None else loss / args.divisor


_uncompiled = _torch.uncompiled(hem_loss)


def _may_overwrite(input: Tensor, rows: bool | None) -> bool:
    """Whether there will be a gradient to put into the memory of these logits; raise where it must not be."""
    if not _torch.is_eager():
        raise RuntimeError("overwrite_input=True is for eager calls, not for what torch.func transforms")
    if not (input.requires_grad and torch.is_grad_enabled()):
        return False
    if input.is_leaf or _torch.is_view_of_leaf(input):
        raise ValueError(
            "overwrite_input=True would put the gradient over a leaf that requires it: give logits made of it"
        )
    if _torch.may_be_saved_unseen(input):
        raise ValueError(
            "overwrite_input=True needs logits whose memory nobody else holds where a compiled network, or another "
            "Python function of autograd, made them: what it saved does perhaps, or a second view of them"
        )
    if rows is None or _has_gaps(input, rows):
        raise ValueError(
            "overwrite_input=True needs logits that are contiguous, channels_last or transposed, got shape "
            f"{tuple(input.shape)} with strides {input.stride()}"
        )
    return True


def _has_gaps(input: Tensor, rows: bool) -> bool:
    order = list(range(input.dim()))
    if rows and len(order) > 2:
        order.append(order.pop(1))
    if not rows and len(order) == 2:
        order.reverse()
    return not input.permute(order).is_contiguous()


class HEMLoss(_torch.WEIGHTED_LOSS):
    """:func:`hem_loss` as a module: ``HEMLoss()`` in the place of ``nn.CrossEntropyLoss()``.

    Args:
        weight, margin, ignore_index, reduction, label_smoothing, normalizer, overwrite_input, backend: as in
            :func:`hem_loss`. A weight and a margin that is a tensor or one per class become buffers: they move with the
            module and are in its ``state_dict``; a margin that is a number is a setting, like the rest, and is not.
            Their values are checked here, on whatever device they are.
        process_group: as in :func:`hem_loss`. Copies share it; it cannot be pickled.
        stats: keep what each call counts in ``stats``, a :class:`hem_ext.stats.Stats`: nothing waits for a GPU until it
            is read. It costs some passes over the targets, and the loss is that without it to rounding.

    Shape:
        - input: ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``
        - target: ``()``, ``(N,)`` or ``(N, d1, ..., dk)``
        - output: a scalar, or shaped like the target with ``reduction="none"``

    Example::

        >>> import torch
        >>> from hem_ext import HEMLoss
        >>> criterion = HEMLoss(ignore_index=255)
        >>> logits = torch.randn(2, 21, 8, 8, requires_grad=True)
        >>> labels = torch.randint(0, 21, (2, 8, 8), dtype=torch.uint8)
        >>> criterion(logits, labels).backward()
    """

    margin: float | Tensor
    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        margin: float | Sequence[float] | Tensor = 0.2,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        normalizer: float | Tensor | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        overwrite_input: bool = False,
        backend: str = "auto",
        stats: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.ignore_index = arguments.check_options(
            ignore_index, reduction, backend, process_group, label_smoothing, overwrite_input
        )
        given, margin = margin, arguments.margin_value(margin)
        if isinstance(margin, Tensor):
            arguments.check_class_values("margin", margin)
            self.register_buffer("margin", margin.clone() if margin is given else margin.to(torch.get_default_dtype()))
        else:
            self.margin = margin
        if weight is not None:
            arguments.check_class_values("weight", weight)
            weight = weight.clone()
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.label_smoothing = 0.0
        if normalizer is not None:
            arguments.check_normalizer(normalizer, reduction)
        self.normalizer = normalizer
        self.process_group = process_group
        self.overwrite_input = overwrite_input
        self.backend = backend
        if not isinstance(stats, bool):
            raise TypeError(f"stats must be True or False, got {stats!r}")
        if stats and overwrite_input:
            raise ValueError("stats=True and overwrite_input=True are not for one call: each takes a way of its own")
        self.keeps_stats = stats
        self.stats: Stats | None = None

    @classmethod
    def from_class_counts(cls, counts: Sequence[int] | Tensor, *, total: float = 2000.0, **options: Any) -> HEMLoss:
        """The loss with the margins of :func:`hem_ext.class_margins`: larger for rarer classes.

        Args:
            counts: training samples of each class, ``(C,)``.
            total: the constant of the rule, 2000 samples in the authors' code.
            options: as in :class:`HEMLoss`, without `margin`.

        Example::

            >>> from hem_ext import HEMLoss
            >>> HEMLoss.from_class_counts([5000, 500, 50]).margin
            tensor([0.3651, 1.1547, 3.6515])
        """
        return cls(margin=class_margins(counts, total), **options)

    def forward(self, input: Tensor, target: Tensor, *, normalizer: float | Tensor | None = None) -> Tensor:
        """The loss; a `normalizer` that is given here takes the place of the module's own."""
        if self.keeps_stats:
            return self._keep_stats(input, target, self.normalizer if normalizer is None else normalizer)
        return hem_loss(
            input,
            target,
            self.weight,
            margin=self.margin,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            normalizer=self.normalizer if normalizer is None else normalizer,
            process_group=self.process_group,
            overwrite_input=self.overwrite_input,
            backend=self.backend,
        )

    def _keep_stats(self, input: Tensor, target: Tensor, normalizer: float | Tensor | None) -> Tensor:
        target = arguments.class_indices(input, target)
        args = arguments.check(input, target, **{**self.options, "normalizer": normalizer})
        native = _native.takes(self.backend, input.device, "hem_loss")
        loss, self.stats = loss_and_stats(input, target, args, native)
        return loss

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # One margin, as a tensor of shape (), stands for as many equal ones, and the other way round.
        own, found = self._buffers.get("margin"), state_dict.get(f"{prefix}margin")
        if own is not None and isinstance(found, Tensor) and own.dim() != found.dim():
            self.margin = own.new_empty(found.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def options(self) -> dict[str, Any]:
        """What :func:`hem_loss` is given beside the tensors. (:meth:`forward` names them itself, which is faster.)"""
        names = ["weight", "margin", "ignore_index", "reduction", "normalizer"]
        names += ["process_group", "overwrite_input", "backend"]
        return {name: getattr(self, name) for name in names}

    def __deepcopy__(self, memo: dict[int, object]) -> HEMLoss:
        if self.process_group is not None:
            memo[id(self.process_group)] = self.process_group  # shared: there is no second one
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def extra_repr(self) -> str:
        margin: object = self.margin
        if isinstance(margin, Tensor):
            margin = f"({len(margin)} classes)" if margin.dim() else f"{margin.item():g}"
        text = f"margin={margin}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        if self.process_group is not None:
            text += f", process_group=({self.process_group.size()} processes)"
        return text if self.backend == "auto" else f"{text}, backend={self.backend!r}"
