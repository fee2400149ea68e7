"""What the property tests draw: logits of every kind in every memory, and what goes with them.

The shape of a case is drawn, and shrinks; most numbers come from a seed, which is cheaper, and the first kinds of them
are the plainest.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from cases import ARITHMETIC, DTYPES, REDUCTIONS
from hypothesis import strategies as st
from properties.exact import FORMATS, product
from properties.interpolation import Axis, axes
from torch import Tensor

from hem_ext import _native

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(DTYPES)
# A row that fits a few lanes, words of a mask, vectors, and the widths from which on kernels go other ways.
few_classes = st.integers(1, 9)
class_counts = st.one_of(few_classes, few_classes, st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65, 70, 129]))
isas = st.sampled_from(_native.library.available_cpu_isas())

TARGET_DTYPES = (torch.int64, torch.int32, torch.uint8, torch.int16, torch.int8, torch.uint16, torch.bool)
LEAST = {torch.int8: -128, torch.int16: -(2**15), torch.int32: -(2**31), torch.int64: -(2**63)}
MOST = {torch.bool: 1, torch.int8: 127, torch.uint8: 255, torch.int16: 2**15 - 1, torch.uint16: 2**16 - 1}
MOST |= {torch.int32: 2**31 - 1, torch.int64: 2**63 - 1}


def from_seed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- numbers ------------------------------------------------------------------------------------------------------

EXACT = ("eighths", "quarters of few values")
FINITE = (*EXACT, "normal", "nearly equal", "subnormal", "of all sizes", "the largest")
KINDS = (*FINITE, "broken", "drawn")
SPECIAL = (torch.nan, torch.inf, -torch.inf)


@st.composite
def numbers(draw: Any, size: int, dtype: torch.dtype, kinds: tuple[str, ...] = KINDS) -> Tensor:
    """So many of one kind, ``(size,)``. Those of the kinds in EXACT can be added up without rounding."""
    kind = draw(st.sampled_from(kinds))
    if kind == "drawn":
        if size > 30:
            kind = "broken"
        else:
            width = dtype.itemsize * 8 if dtype != torch.bfloat16 else 32
            return torch.tensor(draw(st.lists(st.floats(width=width), min_size=size, max_size=size)), dtype=dtype)
    g = from_seed(draw(seeds))
    info = torch.finfo(dtype)
    if kind == "eighths":
        x = torch.randint(-24, 25, (size,), generator=g) / 8
    elif kind == "quarters of few values":  # half of all errors are ties
        x = torch.randint(-1, 2, (size,), generator=g) / 4
    elif kind == "nearly equal":  # some units in the last place apart
        x = (1 + torch.randint(-3, 4, (size,), generator=g) * info.eps) * draw(st.sampled_from([1.0, 3.0, 0.7]))
        x = x.double() + torch.randint(0, 2, (size,), generator=g)
    elif kind == "subnormal":
        x = torch.randint(-6, 7, (size,), generator=g).double() * info.smallest_normal * info.eps
    elif kind == "of all sizes":
        low, high = {torch.float64: (-1074, 1000), torch.float16: (-24, 14)}.get(dtype, (-149, 120))
        powers = torch.randint(low, high, (size,), generator=g)
        x = torch.ldexp(torch.randn(size, generator=g, dtype=torch.float64), powers)
    elif kind == "the largest":
        x = torch.randint(-4, 5, (size,), generator=g).double() / 4 * info.max
    else:
        x = torch.randn(size, generator=g, dtype=torch.float64) * draw(st.sampled_from([1.0, 0.01, 30.0]))
    x = x.double().clamp(info.min, info.max).to(dtype)
    return broken(x, draw(st.sampled_from([0.03, 0.2, 0.8])), g) if kind == "broken" else x


def broken(x: Tensor, share: float, g: torch.Generator, special: tuple[float, ...] = SPECIAL) -> Tensor:
    """With so many of its numbers replaced by those that are none."""
    found = torch.tensor(special, dtype=x.dtype)[torch.randint(0, len(special), x.shape, generator=g)]
    return torch.where(torch.rand(x.shape, generator=g) < share, found, x)


# --- memory -------------------------------------------------------------------------------------------------------


@st.composite
def strides(draw: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of logits, whose classes are dimension 1 where there is one."""
    kind = draw(
        st.sampled_from(["contiguous", "classes innermost", "permuted", "gaps", "one stride is 0", "overlapping"])
    )
    order = list(range(len(shape)))
    if kind == "classes innermost" and len(shape) > 1:
        order.append(order.pop(1))
    if kind in ("permuted", "gaps"):
        order = draw(st.permutations(order))
    found, step = [0] * len(shape), 1
    for d in reversed(order):
        step *= draw(st.integers(1, 3)) if kind == "gaps" else 1
        found[d] = step
        step *= max(shape[d], 1)
    if kind == "one stride is 0":
        found[draw(st.sampled_from(order))] = 0
    if kind == "overlapping":
        found = [draw(st.integers(0, 3)) for _ in shape]
    return tuple(found)


def extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    return 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


@st.composite
def placed(draw: Any, shape: tuple[int, ...], dtype: torch.dtype, kinds: tuple[str, ...] = KINDS) -> Tensor:
    """Numbers in some memory."""
    stride, offset = draw(strides(shape)), draw(st.sampled_from([0, 0, 1, 5]))
    base = draw(numbers(offset + extent(shape, stride), dtype, kinds))
    return base.as_strided(shape, stride, offset)


@st.composite
def placed_as(draw: Any, x: Tensor) -> Tensor:
    """The numbers of a tensor in other memory: contiguous, transposed, or with gaps."""
    kind = draw(st.sampled_from(["contiguous", "transposed", "gaps"]))
    if kind == "transposed":
        order = tuple(reversed(range(x.dim())))
        return x.permute(order).contiguous().permute(order)
    if kind == "gaps" and x.dim():
        wide = x.new_zeros((*x.shape[:-1], x.shape[-1] * 2))
        wide[..., ::2] = x
        return wide[..., ::2]
    return x.contiguous()


def first_of(x: Tensor, dim: int) -> Tensor:
    """Its first part again and again, by a stride of 0."""
    return x.narrow(dim, 0, min(x.shape[dim], 1)).expand_as(x)


# --- whole calls --------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A call of a loss; the same numbers as fractions are beside its arguments."""

    input: Tensor
    target: Tensor
    labels: Tensor  # the same as int64, of the shape of the losses
    margin: Any
    margins: list[float]  # of every class, rounded to the arithmetic's type
    weight: Tensor | None
    ignore_index: int
    reduction: str
    normalizer: Any
    grad_loss: Tensor
    backend: str
    isa: str

    @property
    def options(self) -> dict[str, Any]:
        names = ("margin", "weight", "ignore_index", "reduction", "backend")
        options = {name: getattr(self, name) for name in names}
        return options if self.normalizer is None else options | {"normalizer": self.normalizer}

    @property
    def plain_options(self) -> dict[str, Any]:
        """Of the call that shows each sample by itself."""
        return {name: x for name, x in self.options.items() if name not in ("weight", "normalizer")} | {
            "reduction": "none"
        }

    @property
    def sample_weights(self) -> list[Fraction]:
        labels = self.labels.flatten().tolist()
        if self.weight is None:
            return [Fraction(1)] * len(labels)
        of_class = [Fraction(w) for w in self.weight.to(ARITHMETIC[self.input.dtype]).tolist()]
        return [Fraction(0) if t == self.ignore_index else of_class[t] for t in labels]

    @property
    def divisor(self) -> Fraction | None:
        if self.normalizer is None:
            return None
        normalizer = torch.as_tensor(float(self.normalizer), dtype=torch.float64)
        return Fraction(normalizer.to(ARITHMETIC[self.input.dtype]).item())

    def with_input(self, x: Tensor) -> Case:
        return replace(self, input=x)


shapes_of_batches = st.one_of(
    st.tuples(st.integers(0, 6), class_counts),
    st.tuples(st.integers(14, 35), few_classes),
    st.tuples(st.integers(1, 3), few_classes, st.integers(0, 6)),
    st.tuples(st.integers(0, 3), class_counts, st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), few_classes, st.integers(1, 4), st.integers(1, 8)),
    st.tuples(st.integers(1, 2), few_classes, st.integers(1, 2), st.integers(1, 2), st.integers(1, 3)),
)
shapes_of_logits = st.one_of(shapes_of_batches, st.tuples(class_counts))


@st.composite
def ignored(draw: Any, num_classes: int) -> tuple[torch.dtype, int]:
    """A dtype of targets that holds these classes, and a label to ignore, perhaps one of them or one it cannot hold."""
    dtype = draw(st.sampled_from([d for d in TARGET_DTYPES if MOST[d] >= num_classes - 1]))
    beyond = [-100, 255, -1, num_classes, LEAST.get(dtype, 0), MOST[dtype], -(2**63), 2**63 - 1]
    return dtype, draw(st.one_of(st.just(-100), st.sampled_from(beyond), st.integers(0, num_classes - 1)))


@st.composite
def labels(draw: Any, shape: tuple[int, ...], num_classes: int, dtype: torch.dtype, ignore_index: int) -> Tensor:
    """Classes, and here and there what is ignored; int64."""
    g = from_seed(draw(seeds))
    t = torch.randint(0, num_classes, shape, generator=g)
    if LEAST.get(dtype, 0) <= ignore_index <= MOST[dtype]:
        share = draw(st.sampled_from([0.0, 0.25, 1.0]))
        t = torch.where(torch.rand(shape, generator=g) < share, ignore_index, t)
    return t


@st.composite
def margins(draw: Any, num_classes: int, arithmetic: torch.dtype) -> tuple[Any, list[float]]:
    """What is given, and what each class has."""
    values = [0.2, 0.0, 0.5, 1.0, 0.1, 2.5, 1e-40, 1e30, torch.finfo(arithmetic).max]
    kind = draw(st.sampled_from(["number", "one for each class", "list", "tensor of one"]))
    if kind in ("number", "tensor of one"):
        value = draw(st.one_of(st.sampled_from(values), st.floats(0, 8, width=32)))
        given = value if kind == "number" else torch.tensor(value, dtype=draw(st.sampled_from(list(ARITHMETIC))))
        # A tensor of half precision can round a margin to infinity.
        given = value if kind != "number" and given.isinf() else given
        return given, [torch.as_tensor(given, dtype=torch.float64).to(arithmetic).item()] * num_classes
    g = from_seed(draw(seeds))
    eighths = torch.randint(0, 17, (num_classes,), generator=g) / 8
    if kind == "list":
        return eighths.tolist(), eighths.tolist()
    given = torch.where(torch.rand(num_classes, generator=g) < 0.5, eighths, torch.rand(num_classes, generator=g))
    given = given.to(draw(dtypes))
    return given, given.to(arithmetic).tolist()


@st.composite
def class_weights(draw: Any, num_classes: int) -> Tensor | None:
    g = from_seed(draw(seeds))
    kind = draw(st.sampled_from(["none", "eighths", "rounded", "0", "tiny", "large", "of all sizes"]))
    if kind == "none":
        return None
    if kind == "0":
        return torch.zeros(num_classes)
    dtype = draw(dtypes)
    w = torch.randint(0, 17, (num_classes,), generator=g) / 8
    if kind == "rounded":
        w = torch.rand(num_classes, generator=g, dtype=torch.float64) * 10
    elif kind != "eighths":
        low, high = {"tiny": (-60, -60), "large": (60, 60), "of all sizes": (-60, 60)}[kind]
        powers = torch.randint(low, high + 1, (num_classes,), generator=g)
        if dtype == torch.float16:  # neither subnormal nor infinite
            powers = powers.clamp(-14, 14)
        w = torch.ldexp(1 + torch.rand(num_classes, generator=g, dtype=torch.float64), powers)
    return w.to(dtype)


@st.composite
def grad_losses(draw: Any, shape: tuple[int, ...], arithmetic: torch.dtype) -> Tensor:
    """What comes down to the loss in backward, also through an expansion or a transposition."""
    g = from_seed(draw(seeds))
    x = torch.randint(-16, 17, shape, generator=g).to(arithmetic) / 8
    if shape and draw(st.booleans()):
        return x.flatten()[:1].sum().expand(shape)
    return draw(placed_as(x)) if shape else x


@st.composite
def reductions(draw: Any, arithmetic: torch.dtype, with_normalizer: bool = True) -> tuple[str, Any]:
    reduction = draw(st.sampled_from(REDUCTIONS))
    if reduction not in ("mean", "batchmean") or not with_normalizer or draw(st.integers(0, 3)):
        return reduction, None
    value = draw(st.sampled_from([1.0, 3.0, 7.5, 0.1, 1000.0]))
    return reduction, draw(st.sampled_from([value, torch.tensor(value), torch.tensor(value, dtype=arithmetic)]))


@st.composite
def calls(
    draw: Any,
    input: Tensor,
    of_losses: tuple[int, ...],
    num_classes: int,
    *,
    with_normalizer: bool = True,
) -> Case:
    """What else a call is given. `input` has the dtype of the logits."""
    arithmetic = ARITHMETIC[input.dtype]
    dtype, ignore_index = draw(ignored(num_classes))
    t = draw(labels(of_losses, num_classes, dtype, ignore_index))
    given, of_classes = draw(margins(num_classes, arithmetic))
    reduction, normalizer = draw(reductions(arithmetic, with_normalizer))
    return Case(
        input=input,
        target=draw(placed_as(t.to(dtype))),
        labels=t,
        margin=given,
        margins=of_classes,
        weight=draw(class_weights(num_classes)),
        ignore_index=ignore_index,
        reduction=reduction,
        normalizer=normalizer,
        grad_loss=draw(grad_losses(of_losses if reduction == "none" else (), arithmetic)),
        backend=draw(st.sampled_from(["auto", "native", "reference"])),
        isa=draw(isas),
    )


@st.composite
def of_logits(draw: Any, kinds: tuple[str, ...] = KINDS, shapes: Any = shapes_of_logits, **options: Any) -> Case:
    """A call of hem_loss."""
    shape = draw(shapes)
    x = draw(placed(shape, draw(dtypes), kinds))
    num_classes = shape[0] if len(shape) == 1 else shape[1]
    case = draw(calls(x, () if len(shape) == 1 else (shape[0], *shape[2:]), num_classes, **options))
    if len(shape) > 2 and draw(st.booleans()):
        case = replace(case, target=case.target.unsqueeze(1))  # a mask, as data sets have it
    return case


def positions(shape: tuple[int, ...]) -> Any:
    return itertools.product(*map(range, shape))


@dataclass
class Upsampling:
    align_corners: bool
    rows: Axis
    columns: Axis
    are_exact: bool  # neither shares nor the logits between are rounded


@st.composite
def of_coarse_logits(draw: Any) -> tuple[Case, Upsampling]:
    """A call of upsampled_hem_loss: by ratios that round nothing, and others."""
    dtype = draw(dtypes)
    of = FORMATS[ARITHMETIC[dtype]]
    # Lanes are pixels: some images are wide, others have many classes.
    num_classes, sizes, outs = draw(
        st.sampled_from(
            [
                (draw(st.integers(1, 5)), ((1, 4), (1, 4)), ((1, 8), (1, 8))),
                (draw(st.integers(1, 5)), ((1, 2), (1, 12)), ((1, 2), (1, 40))),
                (draw(class_counts), ((1, 2), (1, 3)), ((1, 2), (1, 4))),
            ]
        )
    )
    size = tuple(draw(st.integers(*least_and_most)) for least_and_most in sizes)
    align_corners, plain = draw(st.booleans()), draw(st.booleans())
    out = []
    for n, (least, most) in zip(size, outs, strict=True):
        step = draw(st.sampled_from([1, 2, 4]))
        exact = (n - 1) * step + 1 if align_corners else n * step
        out.append(exact if plain and exact <= most else n if plain else draw(st.integers(least, most)))
    rows, columns = axes(size, out, align_corners, of)
    has_plain_axes = not rows.off and not columns.off
    kinds = EXACT if has_plain_axes and draw(st.booleans()) else FINITE
    if dtype in (torch.float32, torch.float64) and not has_plain_axes:
        # Shares that are rounded may add up to more than 1, and that much of the largest number is infinite.
        kinds = tuple(kind for kind in kinds if kind != "the largest")
    images = draw(st.integers(1, 2))
    x = draw(placed((images, num_classes, *size), dtype, kinds))
    if has_plain_axes and draw(st.integers(0, 2)) == 0:  # elsewhere rounding decides whether a share is 0
        x = broken(x, 0.1, from_seed(draw(seeds)), draw(st.sampled_from([SPECIAL, (torch.nan,), (-torch.inf,)])))
    case = draw(calls(x, (images, *out), num_classes))
    if draw(st.booleans()):
        case = replace(case, target=case.target.unsqueeze(1))
    return case, Upsampling(align_corners, rows, columns, has_plain_axes and kinds == EXACT)


@dataclass
class Classifier:
    """What makes logits. Behind its own features there are as many as classes, of value 0 and with the identity for
    weights: the gradient of these is that of the logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    slack: list[list[Fraction]] | None  # of the logits, where they are rounded
    chunk_size: int | None
    skip_finished: bool

    @property
    def rows(self) -> Tensor:
        """(samples, features)"""
        is_convolution = self.weight.dim() > 2
        x = self.hidden.movedim(1, -1) if is_convolution else self.hidden
        return x.reshape(-1, x.shape[-1])


shapes_of_samples = st.one_of(
    st.tuples(), st.tuples(st.integers(0, 9)), st.tuples(st.integers(1, 3), st.integers(0, 5)),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4)),
)  # fmt: skip


@st.composite
def of_hidden(draw: Any) -> tuple[Case, Classifier]:
    """A call of linear_hem_loss. `input` is the logits."""
    dtype = draw(dtypes)
    shape, features, num_classes = draw(shapes_of_samples), draw(st.integers(1, 4)), draw(class_counts)
    samples = torch.Size(shape).numel()
    g = from_seed(draw(seeds))
    # Numbers of all sizes are in hidden or in weight, the others are near 1: no product is infinite.
    wild = draw(st.sampled_from(["neither", "neither", "hidden", "weight"]))
    is_exact = wild == "neither" and draw(st.booleans())

    def values(*size: int, is_wild: bool = False) -> Tensor:
        if is_wild:
            most = torch.finfo(dtype).max / 64
            return draw(numbers(torch.Size(size).numel(), dtype, FINITE)).view(size).clamp(-most, most)
        # Sums of products of these are quarters of at most 16: not rounded, not even in bfloat16.
        x = torch.randint(-4, 5, size, generator=g) / 2 if is_exact else torch.randn(size, generator=g)
        return x.to(dtype)

    own = values(samples, features, is_wild=wild == "hidden")
    weight = values(num_classes, features, is_wild=wild == "weight")
    bias = values(num_classes, is_wild=wild != "neither") if draw(st.booleans()) else None
    share, kind = draw(st.sampled_from([0.05, 0.4])), draw(st.sampled_from(["none", "hidden", "weight", "bias"]))
    if kind == "hidden" and wild != "weight":  # infinity times a subnormal number is NaN where that counts as 0
        own = broken(own, share, g)
    elif kind == "weight":  # in the gradient of hidden there is 0 times what is not kept: NaN if it were infinite
        weight = broken(weight, share / 4, g, (torch.nan,))
    elif kind == "bias" and bias is not None:
        bias = broken(bias, share, g, draw(st.sampled_from([SPECIAL, (-torch.inf,)])))
    dim = draw(st.sampled_from([None, None, *range(len(shape))]))
    own = own.view(*shape, features)
    own = own if dim is None else first_of(own, dim)
    if bias is not None and draw(st.integers(0, 5)) == 0:
        bias = first_of(bias, 0)

    of = FORMATS[dtype]
    last = weight.new_zeros(num_classes) if bias is None else bias
    wide = torch.cat([own.reshape(-1, features), own.new_ones(samples, 1)], 1)
    logits, off = product(wide, torch.cat([weight, last.unsqueeze(1)], 1).t(), of, float(of.unit * (features + 4)))
    slack = None if is_exact else [[Fraction(x) for x in row] for row in off.tolist()]

    hidden = torch.cat([own, own.new_zeros(*shape, num_classes)], -1)
    hidden = draw(placed_as(hidden)) if dim is None else first_of(hidden, dim)
    weight = draw(placed_as(torch.cat([weight, torch.eye(num_classes, dtype=dtype)], 1)))
    if len(shape) > 1 and draw(st.booleans()):
        hidden = hidden.movedim(-1, 1)
        weight = weight.view(*weight.shape, *[1] * (hidden.dim() - 2))
    case = draw(calls(logits.to(dtype), shape, num_classes))
    if own.isinf().any() and case.backend == "reference":
        case = replace(case, backend="native")  # in plain PyTorch the gradient 0 of a finished row is multiplied by it
    # Without skipping them the gradient 0 of ignored rows is multiplied by the weight.
    skip_finished = draw(st.booleans())
    chunk_size = draw(st.sampled_from([None, 1, 2, 3, 7]))
    return case, Classifier(hidden, weight, bias, slack, chunk_size, skip_finished)


@st.composite
def of_mixed(draw: Any) -> tuple[Case, Tensor, Tensor, Any, Tensor]:
    """A call of mixed_hem_loss: the case of the first targets, the second ones and their labels, lam as it is given and
    as it is for each target."""
    case = draw(of_logits(with_normalizer=False))
    dim = 0 if case.input.dim() == 1 else 1
    arithmetic, shape = ARITHMETIC[case.input.dtype], case.labels.shape
    b = draw(labels(tuple(shape), case.input.shape[dim], case.target.dtype, case.ignore_index))
    if draw(st.booleans()):
        b = torch.where(torch.rand(shape, generator=from_seed(draw(seeds))) < 0.5, case.labels, b)
    target_b = b.to(case.target.dtype).view(case.target.shape)
    of_lam = draw(st.sampled_from([None, (), tuple(shape[:1]), tuple(shape)]))
    values = st.one_of(st.integers(0, 8).map(lambda k: k / 8), st.floats(0, 1, width=32))
    if of_lam is None:
        lam = draw(values)
        of_targets = torch.full(shape, lam, dtype=arithmetic)
    else:
        g = from_seed(draw(seeds))
        lam = torch.randint(0, 9, of_lam, generator=g) / 8 if draw(st.booleans()) else torch.rand(of_lam, generator=g)
        lam = lam.to(draw(dtypes))
        of_targets = lam.to(arithmetic).view(of_lam + (1,) * (len(shape) - len(of_lam))).expand(shape)
    return case, target_b, b, lam, of_targets


@st.composite
def of_shares(draw: Any) -> tuple[Case, list[Tensor]]:
    """A call of class_parallel_hem_loss: all logits, and those of each of two processes."""
    case = draw(of_logits(shapes=shapes_of_batches, with_normalizer=False))
    first = draw(st.integers(0, case.input.shape[1]))
    parts = case.input.split([first, case.input.shape[1] - first], 1)
    return case, [part if draw(st.booleans()) else draw(placed_as(part)) for part in parts]


# --- batches that are transformed ---------------------------------------------------------------------------------


@dataclass
class Batch:
    """Logits ``(N, C, ...)``, and the labels of each target of its samples or, with `size`, of its pixels."""

    x: Tensor
    labels: tuple[Tensor, ...]
    options: dict[str, Any]

    @property
    def num_classes(self) -> int:
        return self.x.shape[1]

    def call(self, op: Any, reduction: str = "none", **others: Any) -> tuple[Tensor, Tensor]:
        return op(self.x, *self.labels, **{**self.options, "reduction": reduction, **others})


@st.composite
def batches(
    draw: Any, kinds: tuple[str, ...], targets: int = 1, is_coarse: bool = False, with_weight: bool = True
) -> Batch:
    dtype = draw(dtypes)
    if is_coarse:
        images, num_classes, size = (
            draw(st.integers(0, 3)),
            draw(class_counts),
            draw(st.tuples(*[st.integers(1, 3)] * 2)),
        )
        shape = (images, num_classes, *size)
        steps = draw(st.sampled_from([(2, 2), (4, 1), (1, 2), (1, 1)]))
        of_labels: tuple[int, ...] = (images, size[0] * steps[0], size[1] * steps[1])
    else:
        shape = draw(shapes_of_batches)
        num_classes, of_labels = shape[1], (shape[0], *shape[2:])
    x = draw(numbers(torch.Size(shape).numel(), dtype, kinds)).view(shape)
    g = from_seed(draw(seeds))
    options: dict[str, Any] = {"margin": draw(st.integers(0, 16)) / 8}
    if draw(st.booleans()):
        options["margin"] = (torch.randint(0, 17, (num_classes,), generator=g) / 8).to(ARITHMETIC[dtype])
    if with_weight and draw(st.booleans()):
        options["weight"] = torch.randint(0, 9, (num_classes,), generator=g) / 4
    of_targets = tuple(draw(labels(of_labels, num_classes, torch.int64, -100)) for _ in range(targets))
    return Batch(x, of_targets, options)
