"""Exact selective backpropagation: a step that leaves out of its backward pass the samples that have no gradient."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hem_ext import _torch, arguments, reference
from hem_ext.hem import HEMLoss, hem_loss

_USUAL = 0.6  # the share below which two forwards pay, where it is not measured
_LOOK_EVERY = 8  # plain steps
_MEASURED = 3  # steps of each kind
_SIZES = 8  # of the batches that a compiled network is given
_TWICE = "selective steps call the network twice"
_RANDOM = "switch it off, or give allow_stochastic=True if the gradient may differ from a plain step's"


def selective_loss(
    model: nn.Module,
    criterion: HEMLoss,
    input: Any,
    target: Tensor,
    *,
    kwargs: Mapping[str, Any] | None = None,
    return_logits: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """``criterion(model(input), target)`` with the same gradients, for less: finished samples are not in the graph.

    The loss of a sample that HEM has finished is 0, and so is its gradient. A forward of the whole batch without a
    graph finds the others, and the graph is of a second forward, of those alone. With a share `a` active a step costs
    about 1 + 3a forwards instead of 3, and keeps `a` of the activations; while that does not pay, the step is the
    plain one. What it learns of the network is kept as long as `model` lives; :class:`Selective` is the same as an
    object, whose state can be saved.

    Args:
        model, criterion, options: as in :class:`Selective`.
        input, target, kwargs, return_logits: as in :meth:`Selective.__call__`.

    Returns:
        The loss; with `return_logits` also the logits of the whole batch, ``(N, C, ...)``, detached.

    Raises:
        TypeError, ValueError: as in :class:`Selective` and its call.

    Source: ours; HEM finishes samples, see Spratling & Schütt, arXiv 2501.12191, equations in :func:`hem_ext.hem_loss`.

    Example::

        >>> import torch
        >>> from hem_ext import HEMLoss, selective_loss
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
        >>> images, labels = torch.randn(16, 4), torch.randint(3, (16,))
        >>> selective_loss(model, HEMLoss(), images, labels).backward()
    """
    of_model = _kept.setdefault(model, {})
    selective = of_model.get(key := tuple(sorted(options.items())))
    if selective is None:
        selective = of_model[key] = Selective(model, criterion, **options)
        del selective.model  # or the values of the dictionary would keep its keys alive
    elif selective.criterion is not criterion:
        _check_criterion(criterion)
        selective.criterion = criterion
    return selective._step(model, input, target, kwargs or {}, return_logits)


# Network -> options -> what was learnt of it with them.
_kept: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Selective]] = WeakKeyDictionary()


class Selective:
    """:func:`selective_loss` for one network, with what it has learnt of it, which can be saved and loaded.

    It is exact where samples do not touch each other in the network: with layer, group or instance normalisation, in
    transformers, with frozen batch normalisation. :func:`check_independence` tells. What would be wrong is refused
    before the first step.

    A first few steps measure what a forward without a graph costs, a whole step, and a smaller batch; from that
    follows the share of active samples below which a selective step pays (about 0.6). Above it, the step is the plain
    one, and looks at the share every 8 steps.

    Args:
        model: with logits as its output, or an output that has them as ``.logits`` or under ``"logits"`` or ``"out"``.
        criterion: :class:`hem_ext.HEMLoss`. With its `process_group` the ranks choose as one, and each of them takes
            part in every step, also one that has no active sample.
        pays_below: a share from 0 to 1 instead of measuring. Measured times differ between runs, and so would the
            order of sums: give it for runs that are equal to the last bit. It is 0.6, and nothing is measured, under
            :func:`torch.use_deterministic_algorithms`.
        sizes: how many sizes the second batch may have: it is filled up with ignored samples to the next multiple of
            a `sizes`-th of the first. None takes 8 for a network that :func:`torch.compile` compiles, which would
            compile anew for each size, and every size there is for others.
        allow_stochastic: accept dropout and stochastic depth: the second forward draws other masks than the one that
            found the active samples, so that the gradient is not that of a plain step.
        allow_hooks: accept forward hooks, which are called in both forwards.

    Raises:
        TypeError: a criterion that is not HEM's.
        ValueError: a share that is none.

    Source: ours. Dropping samples by their loss is due to Jiang et al., *Accelerating deep learning by focusing on the
    biggest losers*, arXiv 1910.00762; there they still have a gradient.

    Example::

        >>> import torch
        >>> from hem_ext import HEMLoss, Selective
        >>> selective = Selective(torch.nn.Linear(4, 3), HEMLoss(), pays_below=0.6)
        >>> selective(torch.randn(16, 4), torch.randint(3, (16,))).backward()
        >>> sorted(selective.state_dict())
        ['pays_below', 'share', 'steps', 'times']
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: HEMLoss,
        *,
        pays_below: float | None = None,
        sizes: int | None = None,
        allow_stochastic: bool = False,
        allow_hooks: bool = False,
    ) -> None:
        _check_criterion(criterion)
        if pays_below is not None and not 0 <= pays_below <= 1:
            raise ValueError(f"pays_below must be a share from 0 to 1, got {pays_below!r}")
        if sizes is not None and not (type(sizes) is int and sizes >= 1):
            raise ValueError(f"sizes must be a whole number of at least 1, got {sizes!r}")
        if pays_below is None and torch.are_deterministic_algorithms_enabled():
            pays_below = _USUAL
        self.model = model
        self.criterion = criterion
        self.pays_below = pays_below
        """The share of active samples below which a step is selective; None while it is being measured."""
        self.share = 1.0
        """The running share of active samples."""
        self.steps = 0
        """How many there have been."""
        self.sizes = sizes
        self.allow_stochastic = allow_stochastic
        self.allow_hooks = allow_hooks
        self._times: dict[str, float] = {}  # the least of each kind, seconds
        self._suspects: list[tuple[str, nn.Module]] | None = None

    def __call__(
        self, input: Any, target: Tensor, *, kwargs: Mapping[str, Any] | None = None, return_logits: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of a batch, to call ``backward()`` on.

        Args:
            input: what the network is called with, tensors of N samples: a tensor, a tuple of arguments, a mapping of
                keyword arguments (as transformers have it), or any nest of these.
            target: ``(N, ...)``, as the criterion takes it.
            kwargs: more keyword arguments, the same for every sample.
            return_logits: return the logits of the whole batch as well, ``(N, C, ...)``, detached.

        Returns:
            The loss, of the criterion's dtype and reduction; where no sample is active it is 0, and the parameters'
            gradients are 0, not None. Without :func:`torch.is_grad_enabled`, the plain value.

        Raises:
            TypeError, ValueError: arguments that do not fit, or a network in which a second forward on a part of the
                batch is another one: with batch normalisation in training mode, dropout or stochastic depth, forward
                hooks, or buffers that a forward changes.
        """
        return self._step(self.model, input, target, kwargs or {}, return_logits)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: with them, and the same seeds, another process goes on with the same steps."""
        return {"steps": self.steps, "share": self.share, "pays_below": self.pays_below, "times": dict(self._times)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`.

        Raises:
            ValueError: it is not one.
        """
        if not isinstance(state, Mapping) or state.keys() != self.state_dict().keys():
            expected = ", ".join(self.state_dict())
            found = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"expected the state of Selective, with {expected}; got {found or 'an empty one'}")
        self.steps, self.share, self.pays_below = state["steps"], state["share"], state["pays_below"]
        self._times = dict(state["times"])

    # --- a step -----------------------------------------------------------------------------------------------

    @_torch.uncompiled
    def _step(
        self, model: nn.Module, input: Any, target: Tensor, kwargs: Mapping[str, Any], return_logits: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        _check_samples(input, target)
        target = arguments.converted(target)
        if return_logits and self.criterion.overwrite_input:
            raise ValueError("return_logits=True with overwrite_input=True would return the gradient after backward")
        if not torch.is_grad_enabled():
            logits = _logits(_call(model, input, kwargs), target)
            loss = self.criterion(logits, target)
            return (loss, logits) if return_logits else loss
        self._refuse(model, input, kwargs)
        number, self.steps = self.steps, self.steps + 1
        # After the first step, which warms up, every second is plain.
        measuring = self.pays_below is None and 1 <= number <= 2 * _MEASURED
        if self.pays_below is None and number > 2 * _MEASURED:
            total, ranks = self._over_ranks([self._worthwhile(), 1.0], target.device)
            self.pays_below = total / ranks
        if number % 2 == 1 if measuring else self.pays_below is not None and self.share > self.pays_below:
            loss, logits = self._plain_step(model, input, target, kwargs, measuring)
            if measuring or number % _LOOK_EVERY == 0:
                self._learn(int(self._active(logits, target).sum()), target)
        else:
            loss, logits = self._selective_step(model, input, target, kwargs, measuring)
        return (loss, logits) if return_logits else loss

    def _plain_step(
        self, model: nn.Module, input: Any, target: Tensor, kwargs: Mapping[str, Any], measuring: bool
    ) -> tuple[Tensor, Tensor]:
        with self._timed("forward", target.device) if measuring else nullcontext():
            logits = _logits(_call(model, input, kwargs), target)
            loss = self.criterion(logits, target)
        if measuring and loss.requires_grad:
            self._time_backward(loss)
        return loss, logits.detach()

    def _selective_step(
        self, model: nn.Module, input: Any, target: Tensor, kwargs: Mapping[str, Any], measuring: bool
    ) -> tuple[Tensor, Tensor]:
        alone = _without_data_parallel(model)  # not every rank need be here
        with torch.no_grad(), self._timed("no graph", target.device) if measuring else nullcontext():
            logits = _logits(_call(alone, input, kwargs), target)
        if measuring:
            part = _take(input, torch.arange(math.ceil(len(target) / 4), device=target.device))
            with torch.no_grad(), self._timed("quarter", target.device):
                _call(alone, part, kwargs)
        # In older torch, autocast keeps casts of the weights that were made without a graph for the second forward.
        torch.clear_autocast_cache()
        active = self._active(logits, target)
        indices = active.nonzero().squeeze(1)
        count, most = len(indices), len(target)
        self._learn(count, target)
        if count == most:
            return self.criterion(_logits(_call(model, input, kwargs), target), target), logits
        fillers = (~active).nonzero().squeeze(1)[: self._size(model, count, most) - count]
        indices = torch.cat([indices, fillers])
        labels = target[indices]
        if len(fillers):
            # Ignored, for rounding might give them a loss in the second forward.
            ignore_index, bounds = self.criterion.ignore_index, torch.iinfo(labels.dtype)
            labels = labels if bounds.min <= ignore_index <= bounds.max else labels.long()
            labels[count:] = ignore_index
        again = _logits(_call(model, _take(input, indices), kwargs), labels)
        return self._reduced(again, labels, indices, target), logits

    def _reduced(self, logits: Tensor, labels: Tensor, indices: Tensor, target: Tensor) -> Tensor:
        """The loss of the whole batch, from the logits of the samples at `indices`."""
        reduction = self.criterion.reduction
        if reduction in ("mean", "sum") or self.criterion.normalizer is not None:
            loss: Tensor = self.criterion(logits, labels)
            return loss  # the others add nothing, neither above nor below
        losses = self._losses(logits, labels)
        if reduction == "none":
            return losses.new_zeros(len(target), *losses.shape[1:]).index_copy(0, indices, losses)
        c, ignored = self.criterion, target.long() == self.criterion.ignore_index
        weights = reference.weights_of(target.long(), ignored, c.weight)
        counted = reference.denominator(losses, weights, ignored, reduction, c.process_group, losses.dtype)
        return reference.divided(losses.sum(), counted)

    def _losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Of every sample or pixel."""
        of_each = {"reduction": "none", "normalizer": None, "process_group": None}
        return hem_loss(logits, target, **{**self.criterion.options, **of_each})

    @torch.no_grad()
    def _active(self, logits: Tensor, target: Tensor) -> Tensor:
        """The samples that may have a gradient, bool ``(N,)``: any pixel of an image makes it one."""
        losses = self._losses(logits, target)
        return (losses != 0).flatten(1).any(1) if losses.dim() > 1 else losses != 0

    def _learn(self, count: int, target: Tensor) -> None:
        active, samples = self._over_ranks([float(count), float(len(target))], target.device)
        share = active / max(samples, 1.0)
        self.share = share if self.steps == 1 else 0.75 * self.share + 0.25 * share

    def _over_ranks(self, values: list[float], device: torch.device) -> list[float]:
        """Their sums over the ranks, which so take the same decisions."""
        group = self.criterion.process_group
        if group is None:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(sums, group=group)
        return sums.tolist()

    def _size(self, model: nn.Module, count: int, most: int) -> int:
        """How many samples the second forward gets: one at least, for gradients that are 0 and not None."""
        step = math.ceil(most / (self.sizes or (_SIZES if _torch.is_compiled(model) else most)))
        return min(max(math.ceil(count / step), 1) * step, most)

    # --- what pays --------------------------------------------------------------------------------------------

    def _worthwhile(self) -> float:
        """The share at which a selective step takes as long as a plain one, and a tenth less to be sure.

        With a part `o` of a step's time that does not shrink with the batch, a selective step takes
        ``f + T (o + (1 - o) a)``, f the forward without a graph and T the plain step.
        """
        times = self._times
        if not times.keys() >= {"no graph", "quarter", "forward", "backward"}:
            return _USUAL  # no backward was seen
        whole = times["forward"] + times["backward"]
        fixed = min(max((4 * times["quarter"] / times["no graph"] - 1) / 3, 0), 1)
        return 0.9 * max(1 - times["no graph"] / (whole * (1 - fixed)), 0.0) if fixed < 1 else 0.0

    @contextmanager
    def _timed(self, what: str, device: torch.device) -> Iterator[None]:
        begin = _now(device)
        yield
        self._note(what, _now(device) - begin)

    def _time_backward(self, loss: Tensor) -> None:
        device = loss.device

        def begin(_: Tensor) -> None:
            start = _now(device)
            _torch.queue_callback(lambda: self._note("backward", _now(device) - start))

        loss.register_hook(begin)

    def _note(self, what: str, seconds: float) -> None:
        self._times[what] = min(seconds, self._times.get(what, math.inf))

    # --- what would be wrong ----------------------------------------------------------------------------------

    def _refuse(self, model: nn.Module, input: Any, kwargs: Mapping[str, Any]) -> None:
        first = self._suspects is None
        suspects = [(n, m) for n, m in model.named_modules() if _kind(m)] if self._suspects is None else self._suspects
        for name, module in suspects:
            kind = _kind(module)
            where = f"{name or 'the model'} ({type(module).__name__})"
            if kind == "batch" and (module.training or module.running_mean is None):
                raise ValueError(
                    f"selective steps are wrong where samples touch each other, and {where} normalises by the batch: "
                    f"freeze it with eval(), or take layer, group or instance normalisation"
                )
            if kind == "random" and module.training and not self.allow_stochastic and _probability(module) > 0:
                raise ValueError(f"{_TWICE}, and {where} would draw another mask: {_RANDOM}")
        if first:
            hooked = None if self.allow_hooks else _hooked(model)
            if hooked is not None:
                raise ValueError(
                    f"{_TWICE}, and so its forward hooks: {hooked} has one; remove it, or give allow_hooks=True"
                )
            self._try(_without_data_parallel(model), input, kwargs)
            self._suspects = suspects

    @torch.no_grad()
    def _try(self, model: nn.Module, input: Any, kwargs: Mapping[str, Any]) -> None:
        """Call the network once, to see whether that changes what the next call would give."""
        device = next(_tensors(input)).device
        state, python_state = _random_state(device), random.getstate()
        with _put_back(model, device) as buffers:
            _call(model, input, kwargs)
            torch.clear_autocast_cache()
            changed = [name for name, buffer in model.named_buffers() if not _same(buffer, buffers.get(name))]
            drawn = random.getstate() != python_state or not all(map(torch.equal, state, _random_state(device)))
        if changed:
            raise ValueError(f"{_TWICE}, and a call changes its buffer {changed[0]}: the second would be another one")
        if drawn and not self.allow_stochastic:
            raise ValueError(f"{_TWICE}, and a call draws random numbers, as dropout does: {_RANDOM}")


def check_independence(
    model: nn.Module, input: Any, *, kwargs: Mapping[str, Any] | None = None, raise_exception: bool = True
) -> bool:
    """Whether what the network says of a sample depends on that sample alone, tried by changing one.

    The first sample is replaced by another of the batch; every other sample's logits have to stay what they are. Both
    forwards draw the same random numbers, and buffers are put back.

    Args:
        model: in the mode in which it is to be trained.
        input: at least two samples that differ, as :class:`Selective` takes them.
        kwargs: as there.
        raise_exception: raise, or return False.

    Returns:
        True if no other sample was touched.

    Raises:
        ValueError: another sample's logits changed; fewer than two samples, or all of them equal.

    Example::

        >>> import torch
        >>> from hem_ext import check_independence
        >>> check_independence(torch.nn.LayerNorm(3), torch.randn(8, 3))
        True
        >>> check_independence(torch.nn.BatchNorm1d(3), torch.randn(8, 3), raise_exception=False)
        False
    """
    tensors = list(_tensors(input))
    count = len(tensors[0]) if tensors and tensors[0].dim() else 0
    if count < 2 or any(not x.dim() or len(x) != count for x in tensors):
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors) or "no tensor"
        raise ValueError(f"input must hold tensors of the same two samples or more, got {shapes}")
    others = [i for i in range(1, count) if any(not torch.equal(x[0], x[i]) for x in tensors)]
    if not others:
        raise ValueError("all samples of the input are equal: nothing would show which of them touch each other")
    order = torch.arange(count, device=tensors[0].device)
    order[0] = others[0]
    outputs = []
    for given in (input, _take(input, order)):
        with torch.no_grad(), _put_back(model, tensors[0].device):
            outputs.append(_logits(_call(model, given, kwargs or {}))[1:].double())
    before, after = outputs
    same = (before == after) | (before.isnan() & after.isnan())  # also two that are infinite
    difference = (before - after).abs().masked_fill(same, 0).amax().item()
    # The same shapes give the same order of summation: what is left is to be generous.
    if difference <= 1e-6 * before.nan_to_num(0, 0, 0).abs().amax().item():
        return True
    if raise_exception:
        raise ValueError(
            f"samples touch each other in this network: with another first sample the logits of the rest change by up "
            f"to {difference:.3g}; batch normalisation in training mode is the usual reason"
        )
    return False


# --- calls, nests and kinds -----------------------------------------------------------------------------------


def _call(model: nn.Module, input: Any, kwargs: Mapping[str, Any]) -> Any:
    if isinstance(input, Mapping):
        return model(**input, **kwargs)
    if isinstance(input, tuple):
        return model(*input, **kwargs)
    return model(input, **kwargs)


def _logits(output: Any, target: Tensor | None = None) -> Tensor:
    if isinstance(output, Mapping):
        found = next((output[name] for name in ("logits", "out") if name in output), None)
    else:
        found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the model must return logits, or an output with .logits, ['logits'] or ['out']; "
            f"got {type(output).__name__}"
        )
    if target is not None and (found.dim() < 2 or len(found) != len(target)):
        raise ValueError(
            f"the model must return logits (N, C, ...) for target (N, ...), got logits of shape {tuple(found.shape)} "
            f"and target of shape {tuple(target.shape)}"
        )
    return found


def _tensors(nest: Any) -> Iterator[Tensor]:
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, Mapping):
        for part in nest.values():
            yield from _tensors(part)
    elif isinstance(nest, tuple | list):
        for part in nest:
            yield from _tensors(part)
    elif nest is not None:
        raise TypeError(f"input must be a nest of tensors, got {type(nest).__name__} in it: put it into kwargs")


def _take(nest: Any, indices: Tensor) -> Any:
    """The samples at `indices`."""
    if isinstance(nest, Tensor):
        return nest.index_select(0, indices.to(nest.device))
    if isinstance(nest, Mapping):
        return {name: _take(part, indices) for name, part in nest.items()}
    if isinstance(nest, tuple | list):
        parts = [_take(part, indices) for part in nest]
        return type(nest)(*parts) if hasattr(nest, "_fields") else type(nest)(parts)
    return nest


def _check_criterion(criterion: Any) -> None:
    # A subclass may make anything of the losses.
    if not isinstance(criterion, HEMLoss) or type(criterion).forward is not HEMLoss.forward:
        kind = type(criterion).__name__
        raise TypeError(f"selective steps need hem_ext.HEMLoss, which finishes samples; got {kind}")


def _check_samples(input: Any, target: Tensor) -> None:
    if not isinstance(target, Tensor) or not target.dim():
        given = f"shape {tuple(target.shape)}" if isinstance(target, Tensor) else f"type {type(target).__name__}"
        raise ValueError(f"target must be a tensor of shape (N, ...), got one of {given}")
    tensors = list(_tensors(input))
    if not tensors:
        raise TypeError(f"input must be a nest of tensors, got {type(input).__name__} without any")
    for x in tensors:
        if not x.dim() or len(x) != len(target):
            raise ValueError(
                f"every tensor of input must hold the {len(target)} samples of target, got one of shape "
                f"{tuple(x.shape)}: put what all samples share into kwargs"
            )


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, _torch.BATCH_NORM):
        return "batch"
    # Stochastic depth by the name of the class that it has in torchvision, and in timm and those who follow it.
    if isinstance(module, _torch.DROPOUT) or type(module).__name__ in ("StochasticDepth", "DropPath"):
        return "random"
    return None


def _probability(module: nn.Module) -> float:
    return next((p for p in (getattr(module, name, None) for name in ("p", "drop_prob")) if p is not None), 0.0)


def _hooked(model: nn.Module) -> str | None:
    """The first module with a forward hook of somebody else than torch, which shards networks by some."""
    for name, module in model.named_modules():
        for hook in _torch.forward_hooks(module):
            origin = getattr(hook, "func", hook)
            if not str(getattr(origin, "__module__", None) or type(origin).__module__).startswith("torch."):
                return name or "the model"
    return None


def _without_data_parallel(model: nn.Module) -> nn.Module:
    """The network itself: DistributedDataParallel would send buffers to every rank in each call."""
    if torch.distributed.is_available() and isinstance(model, nn.parallel.DistributedDataParallel):
        module: nn.Module = model.module
        return module
    return model


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


@contextmanager
def _put_back(model: nn.Module, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Afterwards buffers and random numbers are what they were before; what the buffers were, by name."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    python_state = random.getstate()
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            yield buffers
    finally:
        random.setstate(python_state)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])


def _same(buffer: Tensor, before: Tensor | None) -> bool:
    return before is not None and torch.equal(torch.nan_to_num(buffer), torch.nan_to_num(before))


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
    return time.perf_counter()
