"""The classifier and its HEM loss in one: it never holds the logits, and multiplies no finished row in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hem_ext import _native, _torch, arguments, reference
from hem_ext.hem import HEMLoss
from hem_ext.stats import loss_and_stats

# Rows are taken in chunks, and of a chunk's logits forward keeps what HEM's backward needs, a bit each: a gradient with
# respect to logits is made from bits, for active rows alone. Others accumulate the gradients of hidden and weight in
# forward, where they have the logits; there it is not known yet which rows are counted, nor what will reach the loss.

# --- chunks of rows -------------------------------------------------------------------------------------------

# A chunk is made by a product and read again at once: on a CPU it should lie in cache.
_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 32 << 20}
# With fewer rows a product takes as long to read the weight as to multiply by it.
_FEWEST_ROWS = {"cpu": 384, "cuda": 224}
# Images of fewer positions than this are copied into rows, a chunk at a time, where they do not lie so.
_FEWEST_POSITIONS = 1024
# Fewer logits side by side are as quick to write wherever they begin.
_FEWEST_APART = 64
# Columns of a product that a thread makes at a time, and with how many features that pays: in float32, on a CPU.
_COLUMNS, _FEWEST_FEATURES = 256, 256
_SUM, _NONE = (arguments.REDUCTION_CODES[name] for name in ("sum", "none"))


class _Constants(NamedTuple):
    """What a call is beside its tensors. Its hidden is (images, positions, features), a row for each position."""

    size: Sequence[int]
    num_classes: int
    ignore_index: int
    dtype_code: int  # of the products
    reduction: int
    chunk_size: int  # 0: what is usual
    transposed: bool  # hidden has positions side by side
    need_bias: bool
    skip_finished: bool

    @property
    def dtype(self) -> torch.dtype:
        return arguments.DTYPES[self.dtype_code]

    @property
    def arithmetic(self) -> torch.dtype:
        return arguments.ARITHMETIC[self.dtype]

    @property
    def rows(self) -> int:
        return self.size[0] * self.size[1]

    @property
    def as_rows(self) -> bool:
        """Whether logits are made with classes side by side; else positions, as in hidden."""
        return not self.transposed or self.size[1] < _FEWEST_POSITIONS

    @property
    def mask_shape(self) -> tuple[int, int]:
        words = (self.num_classes + 31) // 32
        return (self.rows, words) if self.as_rows else (words, self.rows)

    def most(self, device: torch.device) -> int:
        """How many rows forward takes at once. Backward, which has gradients beside them, takes fewer."""
        if self.chunk_size:
            return self.chunk_size
        a_row = max(self.num_classes, self.size[2]) * self.dtype.itemsize
        fitting = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"]) // a_row
        # A GPU reads and writes the whole gradient of the weight for every chunk: few of them.
        fewest = _FEWEST_ROWS.get(device.type, _FEWEST_ROWS["cuda"])
        return max(fewest, fitting // 16 * 16, 0 if device.type == "cpu" else -(-self.rows // 16))

    def classes_at_once(self, active: Tensor) -> int:
        """How many classes of all active rows backward takes at once; 0: it takes all classes of some rows.

        Either way it sums up a gradient over the chunks, that of hidden or that of the weight, and the smaller one is
        the better one to read and write again. The kernel is the CPU's, and no sum may be rounded to half types.
        """
        if not (self.as_rows and active.is_cpu and self.dtype == self.arithmetic):
            return 0
        rows = int(active.sum()) if self.skip_finished else self.rows
        if not 0 < rows < self.num_classes:
            return 0
        logits = max(1, self.most(active.device) // 3) * self.num_classes
        # Of some rows what hidden, its gradient and the bits hold is brought together.
        gathered = 0 if rows == self.rows else rows * (2 * self.size[2] + self.mask_shape[1])
        return max(0, logits - gathered) // rows // 32 * 32  # whole words of bits


class _Span(NamedTuple):
    """Consecutive rows: positions of one image, or whole images."""

    images: slice
    positions: slice
    rows: slice

    @property
    def size(self) -> int:
        size: int = self.rows.stop - self.rows.start
        return size

    def of(self, values: Tensor, dim: int = 0) -> Tensor:
        """Its part of what has one entry for each row in `dim`."""
        return values[self.rows] if dim == 0 else values[:, self.rows]

    def put(self, values: Tensor, part: Tensor, dim: int = 0) -> None:
        self.of(values, dim).copy_(part)

    def take(self, x: Tensor) -> Tensor:
        """Its rows of what is like hidden."""
        return x[self.images, self.positions].flatten(0, 1)

    def put_rows(self, x: Tensor, rows: Tensor) -> None:
        part = x[self.images, self.positions]
        part.copy_(rows.view(part.shape))

    def put_product(self, x: Tensor, left: Tensor, right: Tensor) -> None:
        part = x[self.images, self.positions]
        if len(part) == 1:
            torch.mm(left, right, out=part[0])
        else:
            self.put_rows(x, torch.mm(left, right))


class _Picked(NamedTuple):
    """Some rows; of one image, where it is given."""

    rows: Tensor
    image: int | None
    positions: int

    @property
    def size(self) -> int:
        return self.rows.shape[0]

    def of(self, values: Tensor, dim: int = 0) -> Tensor:
        return values.index_select(dim, self.rows)

    def put(self, values: Tensor, part: Tensor, dim: int = 0) -> None:
        values.index_copy_(dim, self.rows, part)

    # Of positions side by side, those of one feature after the other are taken: in the order of the memory.

    def take(self, x: Tensor) -> Tensor:
        if self.image is None:
            return x[self.rows // self.positions, self.rows % self.positions]
        matrix, rows = x[self.image], self.rows - self.image * self.positions
        return matrix.t().index_select(1, rows).t() if matrix.stride(0) == 1 else matrix.index_select(0, rows)

    def put_rows(self, x: Tensor, rows: Tensor) -> None:
        if self.image is None:
            x[self.rows // self.positions, self.rows % self.positions] = rows
            return
        matrix, index = x[self.image], self.rows - self.image * self.positions
        if matrix.stride(0) == 1:
            matrix.t().index_copy_(1, index, rows.t())
        else:
            matrix.index_copy_(0, index, rows)

    def put_product(self, x: Tensor, left: Tensor, right: Tensor) -> None:
        transposed = self.image is not None and x.stride(1) == 1
        self.put_rows(x, torch.mm(right.t(), left.t()).t() if transposed else torch.mm(left, right))


def _spans(images: range, most: int, c: _Constants) -> Iterator[_Span]:
    """All rows of these images, at most so many at once."""
    positions = c.size[1]
    if not images or not positions:
        return
    if positions <= most:
        step = most // positions if c.as_rows else 1
        for first in range(images.start, images.stop, step):
            last = min(first + step, images.stop)
            yield _Span(slice(first, last), slice(0, positions), slice(first * positions, last * positions))
        return
    chunks = -(-positions // most)
    step = min(most, -(-positions // (16 * chunks)) * 16)  # of one size, rather than a small one at the end
    for image in images:
        for begin in range(0, positions, step):
            end = min(begin + step, positions)
            rows = slice(image * positions + begin, image * positions + end)
            yield _Span(slice(image, image + 1), slice(begin, end), rows)


def _largest(chunks: Sequence[_Span | _Picked]) -> int:
    return max((chunk.size for chunk in chunks), default=0)


def _backward_chunks(active: Tensor, c: _Constants) -> list[_Span | _Picked]:
    """The rows to multiply by. To leave out finished ones it waits for a GPU, once."""
    images, positions, _ = c.size
    most = max(1, c.most(active.device) // 2)
    if not c.skip_finished or not c.rows:
        return list(_spans(range(images), most, c))
    # Of positions side by side, one gathering reaches those of one image.
    groups = [range(images)] if c.as_rows else [range(i, i + 1) for i in range(images)]
    counts = active.view(len(groups), -1).sum(1).tolist()
    indices = torch.nonzero_static(active, size=sum(counts)).squeeze(1)
    found: list[_Span | _Picked] = []
    for group, count, rows in zip(groups, counts, indices.split(counts), strict=True):
        if count == len(group) * positions:
            found += _spans(group, most, c)
        elif count:
            image = group.start if len(group) == 1 else None
            found += [_Picked(part, image, positions) for part in rows.tensor_split(-(-count // most))]
    return found


# --- what the ops do ------------------------------------------------------------------------------------------


def _plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without gradients, and without autocast, which would choose other dtypes for the products."""

    def call(first: Tensor, *args: Any) -> Any:
        with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            return function(first, *args)

    return call


@_plainly
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    margins: Tensor | None,
    margin: float,
    class_weight: Tensor | None,
    keep: bool,
    *constants: Any,
) -> tuple[Tensor, Tensor]:
    """Every row's loss, without its weight, and, to `keep`, its bits."""
    c = _Constants(*constants)
    arguments.check_values(target, c.num_classes, c.ignore_index, margin=margins, class_weight=class_weight)
    target, weight, bias = target.reshape(-1), weight.to(c.dtype), None if bias is None else bias.to(c.dtype)
    losses, mask = _empty_losses(hidden, keep, c)
    spans = list(_spans(range(c.size[0]), c.most(hidden.device), c))
    most = _largest(spans)
    memory = _empty_apart(hidden, (most, c.num_classes) if c.as_rows else (c.num_classes, most), c.dtype)
    for span in spans:
        h = span.take(hidden).to(c.dtype)
        if c.as_rows:
            logits = _product_by_columns(h, weight.t(), bias, memory[: span.size])
        else:
            along = None if bias is None else bias.unsqueeze(1)
            logits = _product(weight, h.t(), along, memory[:, : span.size]).t()
        loss, bits, _ = _hem_forward(logits, span.of(target), margins, margin, None, c.ignore_index, _NONE, c.as_rows)
        span.put(losses, loss)
        if keep:
            span.put(mask, bits if c.as_rows else bits.squeeze(0), 0 if c.as_rows else 1)
    return losses, mask


def _empty_apart(like: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rows for a product, which is slow to write them where they begin beside the lines of a cache, or on the same."""
    rows, length = shape
    apart = length if length < _FEWEST_APART else -(-length // 16) * 16
    apart += 0 if apart % 1024 else 16
    return like.new_empty((rows, apart), dtype=dtype)[:, :length]


def _product_by_columns(left: Tensor, right: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """`_product`, where it is faster so, of some columns at a time, which stay in cache until the next."""
    step = _COLUMNS * torch.get_num_threads()
    is_one = not left.is_cpu or left.dtype != torch.float32 or left.shape[1] < _FEWEST_FEATURES
    if is_one or out.shape[1] < 8 * step:
        return _product(left, right, bias, out)
    for part in (slice(begin, begin + step) for begin in range(0, out.shape[1], step)):
        _product(left, right[:, part], None if bias is None else bias[part], out[:, part])
    return out


def _product(left: Tensor, right: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    return torch.mm(left, right, out=out) if bias is None else torch.addmm(bias, left, right, out=out)


def _empty_losses(like: Tensor, keep: bool, c: _Constants) -> tuple[Tensor, Tensor]:
    mask_shape = c.mask_shape if keep else (0, 0)
    return like.new_empty(c.rows, dtype=c.arithmetic), like.new_empty(mask_shape, dtype=torch.int32)


class _Saved(NamedTuple):
    """What forward leaves for backward beside hidden and weight; all of it constant to autograd."""

    mask: Tensor
    active: Tensor  # bool (rows,)
    target: Tensor  # (rows,)
    class_weight: Tensor | None
    denominator: Tensor

    def logits_gradient(self, chunk: _Span | _Picked, grad_loss: Tensor, memory: Tensor, c: _Constants) -> Tensor:
        """(rows of the chunk, C), in this memory."""
        bits = chunk.of(self.mask) if c.as_rows else chunk.of(self.mask, 1).contiguous().unsqueeze(0)
        grad_loss = chunk.of(grad_loss) if c.reduction == _NONE else grad_loss
        g = memory[: chunk.size * c.num_classes]
        g = g.view(-1, c.num_classes) if c.as_rows else g.view(c.num_classes, -1).t()
        saved = (bits, chunk.of(self.target), self.class_weight, self.denominator)
        _hem_backward_into(g, grad_loss, *saved, c.ignore_index, c.reduction, c.as_rows)
        return g

    def hidden(self, chunk: _Span | _Picked, hidden: Tensor, c: _Constants) -> Tensor:
        """Of the chunk, (rows, features). What an ignored row holds, NaN perhaps, is not multiplied, not even by 0."""
        h = chunk.take(hidden).to(c.dtype)
        return h if c.skip_finished else h.masked_fill(~chunk.of(self.active).unsqueeze(1), 0.0)


@_plainly
def _backward(
    grad_loss: Tensor,
    mask: Tensor,
    active: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    denominator: Tensor,
    hidden: Tensor | None,
    weight: Tensor | None,
    *constants: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """With G the gradient of the logits: G @ weight, G.T @ hidden and G's sum; nothing of what is not given.

    The first in the dtype of the products, the others in that of the arithmetic.
    """
    c, saved = _Constants(*constants), _Saved(mask, active, target, class_weight, denominator)
    gradients = _empty_gradients(mask, hidden, weight, c)
    if step := c.classes_at_once(active):
        _backward_by_classes(grad_loss, saved, step, hidden, weight, gradients, c)
    else:
        _backward_by_rows(grad_loss, saved, hidden, weight, gradients, c)
    if not c.skip_finished and weight is not None:  # where it is NaN or infinite, times 0 is not 0
        grad_hidden = gradients[0]
        grad_hidden.masked_fill_(~active.view(*grad_hidden.shape[:2], 1), 0.0)
    return gradients


def _backward_by_rows(
    grad_loss: Tensor,
    saved: _Saved,
    hidden: Tensor | None,
    weight: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
    c: _Constants,
) -> None:
    """A chunk of rows at a time, with all classes: what is summed up over these are the other two gradients."""
    grad_hidden, grad_weight, grad_bias = gradients
    chunks = _backward_chunks(saved.active, c)
    if sum(chunk.size for chunk in chunks) < c.rows:
        grad_hidden.zero_()
    grad_weight.zero_()
    grad_bias.zero_()
    weight = None if weight is None else weight.to(c.dtype)
    memory = _memory_of(chunks, saved.mask, c.dtype, c)
    for chunk in chunks:
        g = saved.logits_gradient(chunk, grad_loss, memory, c)
        if weight is not None:
            chunk.put_product(grad_hidden, g, weight)
        if hidden is not None:
            _accumulate(grad_weight, g, saved.hidden(chunk, hidden, c))
        if c.need_bias:
            grad_bias += g.sum(0, dtype=c.arithmetic)


def _memory_of(chunks: list[_Span | _Picked], like: Tensor, dtype: torch.dtype, c: _Constants) -> Tensor:
    """For the logits of any of the chunks. Used again it is in cache, and has its pages."""
    return like.new_empty(_largest(chunks) * c.num_classes, dtype=dtype)


def _backward_by_classes(
    grad_loss: Tensor,
    saved: _Saved,
    step: int,
    hidden: Tensor | None,
    weight: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
    c: _Constants,
) -> None:
    """So many classes of all active rows at a time: what is summed up over these is the gradient of hidden."""
    grad_hidden, grad_weight, grad_bias = gradients
    images, positions, features = c.size
    is_whole = not c.skip_finished or bool(saved.active.all())
    rows: _Span | _Picked = _Span(slice(0, images), slice(0, positions), slice(0, c.rows))
    if not is_whole:
        rows = _Picked(saved.active.nonzero().squeeze(1), 0 if images == 1 else None, positions)
        grad_hidden.zero_()
    h = None if hidden is None else saved.hidden(rows, hidden, c)
    in_place = is_whole and not c.transposed
    total = grad_hidden.view(c.rows, -1) if in_place else grad_hidden.new_empty(rows.size, features)
    grad_loss = rows.of(grad_loss) if c.reduction == _NONE else grad_loss
    mask, target = rows.of(saved.mask), rows.of(saved.target)
    of_row = (mask, _count(mask), target, saved.class_weight, saved.denominator, c.ignore_index, c.num_classes)

    memory = mask.new_empty(rows.size * min(step, c.num_classes), dtype=c.dtype)
    for first in range(0, c.num_classes, step):
        classes = slice(first, min(first + step, c.num_classes))
        size = classes.stop - first
        g = memory[: rows.size * size].view(rows.size, size)
        _backward_range(g, grad_loss, *of_row, first, c.reduction)
        if weight is not None:
            total.addmm_(g, weight[classes].to(c.dtype), beta=min(first, 1))
        if h is not None:
            torch.mm(g.t(), h, out=grad_weight[classes])
        if c.need_bias:
            torch.sum(g, 0, out=grad_bias[classes])
    if weight is not None and not in_place:
        rows.put_rows(grad_hidden, total)


def _accumulate(total: Tensor, g: Tensor, h: Tensor) -> None:
    """Add a chunk's G.T @ H. Of half types it is summed up in float32: rounded in every chunk, it would drift."""
    if g.dtype == total.dtype:
        total.addmm_(g.t(), h)
    elif g.is_cuda:
        total += torch.mm(g.t(), h, out_dtype=total.dtype)
    else:  # there is no such product on a CPU
        total.addmm_(g.to(total.dtype).t(), h.to(total.dtype))


def _empty_gradients(
    like: Tensor, hidden: Tensor | None, weight: Tensor | None, c: _Constants
) -> tuple[Tensor, Tensor, Tensor]:
    images, positions, features = c.size
    if weight is None:
        grad_hidden = like.new_empty(0, dtype=c.dtype)
    elif c.transposed:
        grad_hidden = like.new_empty((images, features, positions), dtype=c.dtype).transpose(1, 2)
    else:
        grad_hidden = like.new_empty((images, positions, features), dtype=c.dtype)
    grad_weight = like.new_empty(0 if hidden is None else (c.num_classes, features), dtype=c.arithmetic)
    return grad_hidden, grad_weight, like.new_empty(c.num_classes if c.need_bias else 0, dtype=c.arithmetic)


@_plainly
def _slope(
    grad_loss: Tensor,
    hidden: Tensor | None,
    weight: Tensor | None,
    tangents: Sequence[Tensor | None],
    saved: _Saved,
    c: _Constants,
) -> Tensor:
    """How the gradients, each times its tangent and summed, change with `grad_loss`."""
    slope, ones = grad_loss.new_zeros(c.rows), torch.ones_like(grad_loss)
    of_hidden, of_weight, of_bias = tangents
    chunks = _backward_chunks(saved.active, c)
    memory = _memory_of(chunks, saved.mask, c.arithmetic, c)
    for chunk in chunks:
        # The gradient where grad_loss is 1 everywhere, not rounded to the dtype of the logits.
        unit = saved.logits_gradient(chunk, ones, memory, c)
        logits = torch.zeros_like(unit)
        if weight is not None and of_hidden is not None:
            logits += F.linear(chunk.take(of_hidden), weight.to(c.dtype))
        if hidden is not None and of_weight is not None:
            logits += F.linear(saved.hidden(chunk, hidden, c), of_weight.to(c.dtype))
        if of_bias is not None:
            logits += of_bias
        chunk.put(slope, (logits * unit).sum(1))
    return slope if c.reduction == _NONE else slope.sum()


# --- the ops: a compiler leaves them alone, for it cannot know how many rows there are to multiply by ---------------


def _fake_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    margins: Tensor | None,
    margin: float,
    class_weight: Tensor | None,
    keep: bool,
    *constants: Any,
) -> tuple[Tensor, Tensor]:
    return _empty_losses(hidden, keep, _Constants(*constants))


def _fake_backward(
    grad_loss: Tensor,
    mask: Tensor,
    active: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    denominator: Tensor,
    hidden: Tensor | None,
    weight: Tensor | None,
    *constants: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(mask, hidden, weight, _Constants(*constants))


_OPTIONS = (
    "SymInt[] size, SymInt num_classes, int ignore_index, int dtype, int reduction, SymInt chunk_size, "
    "bool transposed, bool need_bias, bool skip_finished"
)
_forward_op = _native.define(
    "linear_hem_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? margins, float margin, "
    f"Tensor? class_weight, bool keep, {_OPTIONS}) -> (Tensor losses, Tensor mask)",
    _fake_forward,
    "hem_ext.linear_hem_loss",
    _forward,
)
_backward_op = _native.define(
    "linear_hem_backward(Tensor grad_loss, Tensor mask, Tensor active, Tensor target, Tensor? class_weight, "
    f"Tensor denominator, Tensor? hidden, Tensor? weight, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    "hem_ext.linear_hem_loss",
    _backward,
)
_count = _native.define(
    "hem_count(Tensor mask) -> Tensor",
    lambda mask: mask.new_empty(mask.shape[:1]),
    "hem_ext.linear_hem_loss",
)
_backward_range = _native.define(
    "hem_backward_range(Tensor(a!) grad_input, Tensor grad_loss, Tensor mask, Tensor counts, Tensor target, "
    "Tensor? weight, Tensor denominator, int ignore_index, SymInt num_classes, SymInt first, int reduction) -> ()",
    lambda *_: None,
    "hem_ext.linear_hem_loss",
)
# Those of hem_ext.hem.
_hem_forward = torch.ops.hem_ext.hem_forward.default
_hem_backward_into = torch.ops.hem_ext.hem_backward_into.default


# --- autograd -------------------------------------------------------------------------------------------------


class LinearHEM(_torch.Function):
    """Of hidden (images, positions, features) and weight (C, features). Saves a bit for each logit."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        margins: Tensor | None,
        class_weight: Tensor | None,
        margin: float,
        group: torch.distributed.ProcessGroup | None,
        needs: tuple[bool, bool, bool],
        constants: tuple[Any, ...],
    ) -> Tensor:
        c, keep = _Constants(*constants), any(needs)
        run = _forward_op if torch.compiler.is_compiling() else _forward
        losses, mask = run(hidden, weight, bias, target, margins, margin, class_weight, keep, *constants)
        target = target.reshape(-1)
        labels = target.long()
        ignored = labels == c.ignore_index
        weights = reference.weights_of(labels, ignored, class_weight)
        loss, denominator = _reduced(losses, weights, ignored, group, c)
        if keep:
            need_hidden, need_weight, _ = needs
            given = (hidden if need_weight else None, weight if need_hidden else None)
            ctx.save_for_backward(*given, mask, _active(losses, weights), target, class_weight, denominator)
            ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
            ctx.needs, ctx.constants = needs, constants
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = LinearHEMGradient.apply(grad_loss, hidden, weight, *saved, ctx.constants)
        else:
            run = _backward_op if torch.compiler.is_compiling() else _backward
            found = run(grad_loss, *saved, hidden, weight, *ctx.constants)
        gradients = [x.to(dtype) if need else None for x, dtype, need in zip(found, ctx.dtypes, ctx.needs, strict=True)]
        return *gradients, *[None] * 7


class LinearHEMGradient(_torch.Function):
    """The backward of `LinearHEM` as a function of `grad_loss`, hidden and weight, linear in each of them."""

    @staticmethod
    def forward(
        ctx: Any, grad_loss: Tensor, hidden: Tensor | None, weight: Tensor | None, *saved_and_constants: Any
    ) -> tuple[Tensor, ...]:
        *saved, ctx.constants = saved_and_constants
        ctx.save_for_backward(grad_loss, hidden, weight, *saved)
        ctx.set_materialize_grads(False)
        gradients: tuple[Tensor, ...] = _backward(grad_loss, *saved, hidden, weight, *ctx.constants)
        return gradients

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_loss, hidden, weight, *saved = ctx.saved_tensors
        c = _Constants(*ctx.constants)
        need_grad_loss, need_hidden, need_weight = ctx.needs_input_grad[:3]
        grad_grad_loss = grad_hidden = grad_weight = None
        if need_grad_loss:
            grad_grad_loss = _slope(grad_loss, hidden, weight, tangents, _Saved(*saved), c)
        # Hidden is in the gradient of the weight alone, and weight in that of hidden.
        of_hidden = tangents[0] if need_weight else None
        of_weight = tangents[1] if need_hidden else None
        if of_hidden is not None or of_weight is not None:
            found = _backward(grad_loss, *saved, of_hidden, of_weight, *c._replace(need_bias=False))
            grad_hidden = None if of_weight is None else found[0].to(hidden.dtype)
            grad_weight = None if of_hidden is None else found[1].to(weight.dtype)
        return grad_grad_loss, grad_hidden, grad_weight, *[None] * 6


def _active(losses: Tensor, weights: Tensor | None) -> Tensor:
    """The rows that have a gradient. NaN is one, whatever its weight."""
    active = losses != 0
    return active if weights is None else active & ((weights > 0) | losses.isnan())


def _reduced(
    losses: Tensor,
    weights: Tensor | None,
    ignored: Tensor,
    group: torch.distributed.ProcessGroup | None,
    c: _Constants,
) -> tuple[Tensor, Tensor]:
    """The loss, and what it was divided by."""
    weighted = losses if weights is None else weights * losses
    if c.reduction == _NONE:
        return weighted, losses.new_ones(())
    total = weighted.sum(dtype=torch.float64)
    if c.reduction == _SUM:
        return total.to(losses.dtype), losses.new_ones(())
    reduction = arguments.REDUCTIONS[c.reduction]
    denominator = reference.denominator(losses, weights, ignored, reduction, group, torch.float64)
    return reference.divided(total, denominator).to(losses.dtype), denominator.to(losses.dtype)


# --- what users call ------------------------------------------------------------------------------------------


def linear_hem_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    margin: float | Sequence[float] | Tensor = 0.2,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    chunk_size: int | None = None,
    skip_finished: bool = True,
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """``hem_loss(F.linear(hidden, weight, bias), target)`` and its gradients, without ever holding the logits.

    Rows are taken in chunks: forward keeps a bit for each logit, and backward multiplies for active rows only, those
    whose loss is not 0. With a share `a` of them the three products cost 1 + 2a instead of 3.

    Args:
        hidden: what the classifier is given, ``(..., D)``; or ``(N, D, d1, ..., dk)`` with the weight of a convolution.
            float32, float64, float16 or bfloat16. It is read where it lies, slices of sequences and channels_last as
            well; cropped pixels, and four dimensions or more whose middle ones are not one in memory, are copied.
        weight: ``(C, D)``, as ``nn.Linear`` has it, or ``(C, D, 1, ..., 1)``, as a 1 x 1 convolution has it, for a
            `hidden` with its features in dimension 1.
        bias: ``(C,)`` or None.
        target: class indices, of the shape of `hidden` without its features, of the dtypes of :func:`hem_ext.hem_loss`;
            of pixels masks ``(N, 1, d1, ..., dk)`` as well.
        margin, ignore_index, reduction, normalizer, process_group: as in :func:`hem_ext.hem_loss`.
        class_weight: one factor per class ``(C,)``, the `weight` of :func:`hem_ext.hem_loss`.
        chunk_size: rows whose logits are there at a time in forward; backward takes half as many, or, on a CPU with
            fewer active rows than classes, some classes of them all: a third as many logits. By default as many rows
            as make 8 MiB of logits or of hidden on a CPU, 32 MiB on a GPU, but at least 384, and on a GPU 224 and a
            sixteenth of all.
        skip_finished: leave finished rows out of both gradient products. Backward then has to know how many there are,
            and waits for a GPU, once. False: it multiplies by all rows and never waits.
        backend: as in :func:`hem_ext.hem_loss`. In plain PyTorch all logits are held, with what it makes of them; so
            they are where torch.func transforms it, or tangents go forwards.

    Returns:
        The loss in the arithmetic's dtype, a scalar or shaped like `target` with ``"none"``. Gradients of what requires
        one: for a frozen weight or a frozen hidden there is neither a product nor a buffer. Of half types the weight's
        gradient is summed up in float32 and rounded once. Under autocast products are of its dtype, as those of
        ``F.linear``, and the gradient of a float32 weight is not rounded to it.

    Raises:
        ValueError: shapes that do not fit, a `chunk_size` that is no number of rows, and as :func:`hem_ext.hem_loss`.
        TypeError: dtypes that are none of the above or, outside of autocast, more than one.
        IndexError: a target that is neither a class nor `ignore_index` (on CUDA: a device-side assertion).
        RuntimeError: tensors on different devices.

    Source: ours. Wijmans et al., *Cut your losses in large-vocabulary language models*, arXiv 2411.09009, leave out
    gradients of cross-entropy that are small; here they are 0.

    Example::

        >>> import torch
        >>> from hem_ext import linear_hem_loss
        >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> weight = torch.tensor([[0.5, 1.0], [0.25, 0.0], [1.0, 0.0]], requires_grad=True)
        >>> loss = linear_hem_loss(hidden, weight, None, torch.tensor([0, 0]), margin=0.25)
        >>> loss  # the second row is finished
        tensor(0.7500, grad_fn=<LinearHEMBackward>)
        >>> loss.backward()
        >>> hidden.grad
        tensor([[ 0.5000, -1.0000],
                [ 0.0000,  0.0000]])
    """
    if isinstance(weight, Tensor) and weight.dim() > 2:
        target = arguments.class_indices(hidden, target)
    elif isinstance(target, Tensor):
        target = arguments.converted(target)
    dtype = _check(hidden, weight, bias, target, chunk_size, skip_finished)
    # As the logits would be, but for their memory.
    logits = weight.new_empty((1, 1), dtype=dtype).expand(target.numel(), weight.shape[0])
    args = arguments.check(
        logits,
        target.reshape(-1),
        margin=margin,
        weight=None,
        ignore_index=ignore_index,
        reduction=reduction,
        backend=backend,
        process_group=process_group,
        normalizer=normalizer,
    )
    if class_weight is not None:
        arithmetic = arguments.ARITHMETIC[dtype]
        class_weight = arguments.class_tensor("class_weight", class_weight, logits, weight.shape[0], arithmetic)

    is_convolution = weight.dim() > 2
    x = _as_images(hidden.flatten(2).transpose(1, 2) if is_convolution else hidden)
    weight = weight.flatten(1)
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias))
    constants = _Constants(
        size=tuple(x.shape),
        num_classes=weight.shape[0],
        ignore_index=args.ignore_index,
        dtype_code=arguments.DTYPE_CODES[dtype],
        reduction=args.reduction,
        chunk_size=chunk_size or 0,
        transposed=x.stride(1) == 1 and x.stride(2) != 1,
        need_bias=needs[2],
        skip_finished=skip_finished,
    )
    # What is exported holds torch's own operators alone, as that of hem_loss.
    native = not torch.compiler.is_exporting() and _native.takes(backend, hidden.device, "linear_hem_loss")
    if native and (_torch.is_eager() or torch.compiler.is_compiling()):
        given = (args.margins, class_weight, args.margin, args.group, needs, tuple(constants))
        loss: Tensor = LinearHEM.apply(x, weight, bias, target, *given)
        loss = loss if args.divisor is None else loss / args.divisor
    else:
        # Of rows, what is wrong would have another place and name.
        counted = (target, weight.shape[0], args.ignore_index)
        arguments.check_values(*counted, margin=args.margins, class_weight=class_weight)
        # What an ignored row holds, NaN perhaps, is in no product.
        ignored = target.reshape(-1, 1).long() == args.ignore_index
        logits = F.linear(x.flatten(0, 1).masked_fill(ignored, 0.0), weight, bias)
        args = args._replace(weight=class_weight)
        if native:  # torch.func transforms it, or tangents go forwards
            loss = loss_and_stats(logits, target.reshape(-1), args, native=True)[0]
        else:
            loss = reference.compute(logits, target.reshape(-1), args)
    return loss.view(target.shape) if reduction == "none" else loss


def _as_images(x: Tensor) -> Tensor:
    """``(..., D)`` as (images, positions, features): one image where its rows are a single stride apart."""
    x = x.flatten(1, -2) if x.dim() > 2 else x.view(1, -1, x.shape[-1]) if x.dim() == 1 else x.unsqueeze(0)
    images, positions, _ = x.shape
    is_one = images > 1 and x.numel() and x.stride(0) == positions * x.stride(1)
    return x.flatten(0, 1).unsqueeze(0) if is_one else x


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, chunk_size: int | None, skip_finished: bool
) -> torch.dtype:
    """Raise for what does not fit together; return the dtype of the products."""
    given = {"hidden": hidden, "weight": weight, "target": target} | ({} if bias is None else {"bias": bias})
    for name, value in given.items():
        arguments.check_dense(name, value)
    floats = {name: value.dtype for name, value in given.items() if name != "target"}
    for name, dtype in floats.items():
        if dtype not in arguments.ARITHMETIC:
            raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {dtype}")

    shapes = f"got hidden of shape {tuple(hidden.shape)} and weight of shape {tuple(weight.shape)}"
    if weight.dim() < 2 or any(size != 1 for size in weight.shape[2:]):
        raise ValueError(
            f"weight must have shape (C, D), or (C, D, 1, ..., 1) as that of a 1 x 1 convolution, {shapes}"
        )
    is_convolution = weight.dim() > 2
    if is_convolution and hidden.dim() != weight.dim():
        raise ValueError(f"a weight of shape (C, D, 1, ..., 1) needs hidden of as many dimensions, {shapes}")
    if not hidden.dim() or hidden.shape[1 if is_convolution else -1] != weight.shape[1]:
        expected = "(..., D) for weight (C, D)"
        if is_convolution:
            expected = "(N, D, d1, ..., dk) for weight (C, D, 1, ..., 1)"
        hint = ""
        if hidden.dim() > 2 and not is_convolution and hidden.shape[1] == weight.shape[1]:
            hint = "; for features in dimension 1 give the weight of a convolution, (C, D, 1, ..., 1)"
        raise ValueError(f"hidden must have shape {expected}, {shapes}{hint}")
    if not weight.shape[0]:
        raise ValueError(f"the class dimension of weight is empty: {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must have shape (C,) = ({weight.shape[0]},) for weight of shape {tuple(weight.shape)}, "
            f"got bias of shape {tuple(bias.shape)}"
        )
    of_target = hidden.shape[:1] + hidden.shape[2:] if is_convolution else hidden.shape[:-1]
    if target.shape != of_target:
        raise ValueError(
            f"expected target of shape {tuple(of_target)} for hidden of shape {tuple(hidden.shape)} and weight of "
            f"shape {tuple(weight.shape)}, got target of shape {tuple(target.shape)}"
        )
    for name, value in given.items():
        if value.device != hidden.device:
            raise arguments.other_device(name, value, hidden, "hidden")
    _check_options(chunk_size, skip_finished)

    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        half = torch.get_autocast_dtype(device)
        floats = {name: dtype if dtype == torch.float64 else half for name, dtype in floats.items()}
    if len(set(floats.values())) > 1:
        found = ", ".join(f"{name} {dtype}" for name, dtype in floats.items())
        raise TypeError(f"hidden, weight and bias must have one dtype, or be under autocast, got {found}")
    return floats["hidden"]


def _check_options(chunk_size: int | None, skip_finished: bool) -> None:
    if chunk_size is not None and not (type(chunk_size) is int and chunk_size >= 1):
        raise ValueError(f"chunk_size must be a number of rows, at least 1, or None, got {chunk_size!r}")
    if not isinstance(skip_finished, bool):
        raise TypeError(f"skip_finished must be True or False, got {skip_finished!r}")


class LinearHEMLoss(nn.Module):
    """A classifier with its loss, :func:`linear_hem_loss`: in the place of an ``nn.Linear`` and ``HEMLoss``.

    Its weight and bias have the names, shapes and initial values of ``nn.Linear``'s, or ``nn.Conv2d``'s with
    ``spatial_dims=2``, so that either's ``state_dict`` fits, where neither a margin per class nor a class weight adds
    to it. To share an embedding's weight, assign it:
    ``head.weight = embedding.weight``.

    Args:
        in_features: D.
        num_classes: C.
        bias: whether there is one.
        spatial_dims: 0: hidden is ``(..., D)``; k: ``(N, D, d1, ..., dk)``, and the weight is a convolution's.
        margin, class_weight, ignore_index, reduction, normalizer, chunk_size, skip_finished, process_group, backend:
            as in :func:`linear_hem_loss`. A margin per class and a class weight become buffers of ``criterion``, the
            :class:`hem_ext.HEMLoss` that holds what is the loss's.
        device, dtype: of weight and bias.

    Shape:
        - hidden: ``(..., D)`` or ``(N, D, d1, ..., dk)``
        - target: the same without D
        - output: a scalar, or shaped like the target with ``reduction="none"``

    Example::

        >>> import torch
        >>> from hem_ext import LinearHEMLoss
        >>> head = LinearHEMLoss(16, 1000)
        >>> head(torch.randn(4, 7, 16), torch.randint(0, 1000, (4, 7))).backward()
        >>> head.logits(torch.randn(4, 16)).shape  # to predict with
        torch.Size([4, 1000])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        *,
        spatial_dims: int = 0,
        margin: float | Sequence[float] | Tensor = 0.2,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        normalizer: float | Tensor | None = None,
        chunk_size: int | None = None,
        skip_finished: bool = True,
        process_group: torch.distributed.ProcessGroup | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_options(chunk_size, skip_finished)
        if type(spatial_dims) is not int or spatial_dims < 0:
            raise ValueError(f"spatial_dims must be a number of dimensions, at least 0, got {spatial_dims!r}")
        if class_weight is not None:
            arguments.check_class_values("class_weight", class_weight)
        linear = nn.Linear(in_features, num_classes, bias, device=device, dtype=dtype)
        self.weight = nn.Parameter(linear.weight.detach().view(num_classes, in_features, *[1] * spatial_dims))
        self.register_parameter("bias", linear.bias)
        self.criterion = HEMLoss(
            margin=margin,
            weight=class_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            process_group=process_group,
            backend=backend,
        )
        self.chunk_size = chunk_size
        self.skip_finished = skip_finished

    def forward(self, hidden: Tensor, target: Tensor, *, normalizer: float | Tensor | None = None) -> Tensor:
        """The loss; a `normalizer` that is given here takes the place of the module's own."""
        c = self.criterion
        return linear_hem_loss(
            hidden,
            self.weight,
            self.bias,
            target,
            margin=c.margin,
            class_weight=c.weight,
            ignore_index=c.ignore_index,
            reduction=c.reduction,
            normalizer=c.normalizer if normalizer is None else normalizer,
            chunk_size=self.chunk_size,
            skip_finished=self.skip_finished,
            process_group=c.process_group,
            backend=c.backend,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """``(..., C)``, or ``(N, C, d1, ..., dk)`` of a convolution's weight."""
        if self.weight.dim() == 2:
            return F.linear(hidden, self.weight, self.bias)
        return F.linear(hidden.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)

    def extra_repr(self) -> str:
        text = f"in_features={self.weight.shape[1]}, num_classes={self.weight.shape[0]}, bias={self.bias is not None}"
        if self.weight.dim() > 2:
            text += f", spatial_dims={self.weight.dim() - 2}"
        text += "" if self.chunk_size is None else f", chunk_size={self.chunk_size}"
        return text if self.skip_finished else f"{text}, skip_finished=False"
