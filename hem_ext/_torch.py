"""The names of torch that are not public: what each is for, and what stands in where a torch lacks it.

Nothing depends on any of them: without, a call costs some microseconds more, or what is said beside the name.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from hem_ext.arguments import BAD_VALUE

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _private(name: str, instead: Any) -> Any:
    """``torch.name``, or `instead` where there is none."""
    try:
        return operator.attrgetter(name)(torch)
    except AttributeError:
        return instead


# --- calls: at a hundred rows of ten classes the layers around the kernels are what one costs -----------------

# Who else has to be told of a call of an op: a dispatch mode, a trace, a profiler of this thread. (One of all threads
# sees the autograd function alone.) Without: there may always be one.
_dispatch_modes = _private("_C._len_torch_dispatch_stack", lambda: 1)
_trace = _private("_C._get_tracing_state", lambda: True)
_is_profiled = _private("autograd._profiler_enabled", lambda: True)

# Where a tensor lies, 0 for one that has no memory. Not data_ptr(), which copies what is shared until it is written.
# Without: no tensor has any.
_data_address = _private("_C._data_address", lambda x: 0)

# Which kernel of an op is meant. Without: the dispatcher finds it.
_keys, _key_set = _private("_C.DispatchKey", None), _private("_C.DispatchKeySet", None)

# Whether torch.func transforms what runs. Without: it may.
are_transforms_active = _private("_C._are_functorch_transforms_active", lambda: True)

# Whether there are tensors with tangents: what holds the level of forward-mode differentiation. Without: there may be.
_forward_ad = _private("autograd.forward_ad", None)


def is_view_of_leaf(x: Tensor) -> bool:
    """Whether a tensor lies in the memory of a leaf that requires a gradient. Without: no."""
    base = getattr(x, "_base", None)
    return base is not None and base.is_leaf and base.requires_grad


# What a Python function of autograd leaves behind, as a compiled network is one, and how many tensors share a memory.
# Without: everything was made by one, and all memory is shared.
_MADE_IN_PYTHON = _private("_C._FunctionBase", object)
_holders = _private("_C._storage_Use_Count", lambda storage: sys.maxsize)


def may_be_saved_unseen(x: Tensor) -> bool:
    """Whether autograd may need the memory of a tensor and not notice that it was written to.

    What a Python function of autograd made in its forward shares its memory with what it saved, but not the count of
    changes. torch's own operators share both.
    """
    base = getattr(x, "_base", None)
    is_made_in_python = any(t is not None and isinstance(t.grad_fn, _MADE_IN_PYTHON) for t in (x, base))
    storage = x.untyped_storage()  # itself one of the holders
    return is_made_in_python and _holders(storage._cdata) > 2 + (base is not None)


_is_compiling = torch.compiler.is_compiling  # public
_TENSORS = (Tensor, nn.Parameter)
_NUMBERS = (int, float, bool, type(None))


def from_autograd(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` for calls from within an autograd function, a tensor on the device of all of them first.

    Where nobody else has to be told, the kernel is called straight away: past the dispatcher, and past an op's refusal
    to lose a gradient, which lets every call from there pass.
    """
    direct = cpu = cuda = None
    if _keys is not None and _key_set is not None:
        direct = getattr(getattr(op, "_handle", None), "redispatch_boxed", getattr(op, "redispatch", None))
        cpu, cuda = _key_set(_keys.CPU), _key_set(_keys.CUDA)

    def call(*args: Any) -> Any:
        if _is_compiling():
            return op(*args)
        try:
            if direct is None or not _is_between_us(args):
                return op(*args)
            return direct(cpu if args[0].is_cpu else cuda, *args)
        except RuntimeError as error:
            # torch 2.15 no longer makes a ValueError of the op's std::invalid_argument.
            if BAD_VALUE in str(error):
                raise ValueError(str(error).partition("\n")[0]) from None
            raise

    return call


def _is_between_us(args: tuple[Any, ...]) -> bool:
    """Whether nobody but the kernel has to be told of a call, and every tensor is what its memory holds."""
    if _dispatch_modes() or _trace() or _is_profiled():
        return False
    try:
        for x in args:
            kind = type(x)
            if kind in _TENSORS:
                # A tensor may be other than its memory: negated, all zeros, sparse, one of a batch. These have none.
                if x.is_neg() or not _data_address(x):
                    return False
            elif kind not in _NUMBERS:
                return False
    except RuntimeError:
        return False
    return True


def is_eager() -> bool:
    """Whether what runs is neither compiled, nor transformed by torch.func, nor differentiated forwards."""
    return not (_is_compiling() or are_transforms_active() or getattr(_forward_ad, "_current_level", 0) >= 0)


def is_dtensor(x: object) -> bool:
    """Whether it is a DTensor, without importing what that is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


class Function(torch.autograd.Function):
    """The same; its `apply` has no types."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, *args: Any) -> Any: ...


def eager_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without the layer that serves torch.func alone: for calls that are eager."""
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


def uncompiled(function: _Function) -> _Function:
    """``torch.compiler.disable(function)``, which is public, but loads the compiler: only where one runs."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (torch.compiler.disable(function) if _is_compiling() else function)(*args, **kwargs)

    return cast(_Function, call)


# --- networks ---------------------------------------------------------------------------------------------------

# Calls a function at the end of the backward pass that runs; DistributedDataParallel asks for it too. Without: never.
queue_callback = _private("autograd.Variable._execution_engine.queue_callback", lambda callback: None)

# What frameworks know a loss with class weights by. Without: a module.
if TYPE_CHECKING:
    from torch.nn.modules.loss import _WeightedLoss

    class WEIGHTED_LOSS(_WeightedLoss): ...  # noqa: N801
else:
    WEIGHTED_LOSS = _private("nn.modules.loss._WeightedLoss", nn.Module)

# What batch normalisation and dropout derive from, also others' own. Without: torch's own.
BATCH_NORM = _private(
    "nn.modules.batchnorm._BatchNorm",
    (
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        *(nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d),
    ),
)
DROPOUT = _private(
    "nn.modules.dropout._DropoutNd",
    (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """What a call of a module calls before and after its forward. Without: none is known of."""
    by_id = (getattr(module, name, {}) for name in ("_forward_pre_hooks", "_forward_hooks"))
    return [hook for hooks in by_id for hook in hooks.values()]


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has any part of a network, as a function or in place. Without: no."""
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())
