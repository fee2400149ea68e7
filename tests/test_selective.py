import copy
import functools
import gc
import math
import random
import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hem_ext import HEMLoss, Selective, check_independence, selective, selective_loss

CLASSES = 5


class Transformer(nn.Module):
    """Tokens ``(N, T, D)`` to logits ``(N, C)``, the attention written out."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.project = nn.Linear(6, 18)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x, scale=1.0):
        q, k, v = self.project(self.norm(x)).chunk(3, -1)
        return self.head((x + scale * F.scaled_dot_product_attention(q, k, v)).mean(1))


def frozen(norm):
    """Batch normalisation with other statistics than the initial ones, in eval mode."""
    norm.running_mean.normal_()
    return norm.eval()


def per_pixel():
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, CLASSES, 1))


NETWORKS = {
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, CLASSES)), (4,)),
    "group norm": (lambda: nn.Sequential(per_pixel(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (2, 5, 5)),
    "instance norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3), nn.Flatten(), nn.Linear(9, CLASSES)),
        (2, 4),
    ),
    "frozen batch norm": (
        lambda: nn.Sequential(nn.Linear(4, 8), frozen(nn.BatchNorm1d(8)), nn.Linear(8, CLASSES)),
        (4,),
    ),
    "transformer": (Transformer, (7, 6)),
    "pixels": (per_pixel, (2, 4, 3)),
}
ALWAYS = {"pays_below": 1.0}  # no share is above: every step is selective


def make(name="layer norm", count=24, dtype=torch.float64):
    network, shape = NETWORKS[name]
    model = network().to(dtype)
    input = torch.randn(count, *shape, dtype=dtype)
    return model, input, labels_of(model, input)


def labels_of(model, input, wrong=0.4):
    """What the network says, but for a part of the samples; of an image, one pixel is wrong."""
    with torch.no_grad():
        target = model(input).argmax(1)
    for i in range(int(len(target) * wrong)):
        target[i].view(-1)[:1] = (target[i].view(-1)[:1] + 1) % CLASSES
    return target


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def plain(model, criterion, input, target):
    loss = criterion(model(input), target)
    return loss.detach(), gradients(model, loss if loss.dim() == 0 else loss.sin().sum())


def selectively(step, model):
    loss = step()
    return loss.detach(), gradients(model, loss if loss.dim() == 0 else loss.sin().sum())


def equal(a, b, **tolerance):
    torch.testing.assert_close(a[0], b[0], **tolerance)
    for x, y in zip(a[1], b[1], strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def of(function):
    """A network that is this function."""
    model = nn.Identity()
    model.forward = function
    return model


def seen(model):
    """How many samples each call of the network gets, without a hook."""
    sizes, forward = [], model.forward

    def counting(x, *args, **kwargs):
        sizes.append((len(x), torch.is_grad_enabled()))
        return forward(x, *args, **kwargs)

    model.forward = counting
    return sizes


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
def test_the_step_is_that_of_the_whole_batch(name, reduction):
    model, input, target = make(name)
    target.view(-1)[-2:] = -100
    weight = torch.rand(CLASSES, dtype=torch.float64) + 0.5
    criterion = HEMLoss(margin=1e-3, weight=weight, reduction=reduction)
    step = Selective(model, criterion, **ALWAYS)
    expected = plain(model, criterion, input, target)
    step(input, target)
    sizes = seen(model)
    equal(selectively(lambda: step(input, target), model), expected)
    # It is no test unless some samples were left out.
    assert sizes[0] == (24, False)
    assert sizes[1][1]
    assert 0 < sizes[1][0] < 20
    assert len(sizes) == 2


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
@pytest.mark.parametrize("kind", ["nothing active", "all ignored", "everything active", "one sample", "NaN"])
def test_the_ends_are_those_of_the_whole_batch(kind, reduction):
    model, input, target = make(count=1 if kind == "one sample" else 8)
    if kind == "nothing active":
        target = labels_of(model, input, wrong=0)
    elif kind == "all ignored":
        target = torch.full_like(target, -100)
    elif kind == "everything active":
        target = labels_of(model, input, wrong=1)
    elif kind == "NaN":
        input[3] = torch.nan
    criterion = HEMLoss(margin=1e-3, reduction=reduction)
    expected = plain(model, criterion, input, target)
    found = selectively(lambda: selective_loss(model, criterion, input, target, **ALWAYS), model)
    equal(found, expected, equal_nan=True)
    if kind in ("nothing active", "all ignored"):
        assert not any(gradient.any() for gradient in found[1])


class Output(dict):
    """As transformers and torchvision give it."""


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("wrap", "nest"),
    [
        (lambda model: lambda x: model(x), lambda x: x),
        (lambda model: lambda x, y: model(x + y), lambda x: (0.75 * x, 0.25 * x)),
        (lambda model: lambda *, x, y: model(x + y[0]["a"]), lambda x: {"x": 0.75 * x, "y": [{"a": 0.25 * x}, None]}),
        (lambda model: lambda d: model(d["x"]), lambda x: ({"x": x},)),
        (lambda model: lambda pair: model(pair.x + pair.y), lambda x: (Pair(0.75 * x, 0.25 * x),)),
        (lambda model: lambda x: SimpleNamespace(logits=model(x)), lambda x: x),
        (lambda model: lambda x: Output(logits=model(x)), lambda x: x),
        (lambda model: lambda x: Output(out=model(x), aux=None), lambda x: x),
    ],
    ids=[
        "tensor",
        "tuple",
        "mapping",
        "a mapping as one argument",
        "a named tuple",
        ".logits",
        "['logits']",
        "['out']",
    ],
)
def test_any_nest_of_tensors_goes_in_and_any_output_with_logits_comes_out(wrap, nest, reduction):
    model, input, target = make()

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *args, **kwargs):
            return wrap(self.model)(*args, **kwargs)

    criterion = HEMLoss(margin=1e-3, reduction=reduction)
    expected = plain(model, criterion, input, target)
    found = selectively(lambda: selective_loss(Wrapped(), criterion, nest(input), target, **ALWAYS), model)
    equal(found, expected)


def test_tokens_have_one_dimension():
    torch.manual_seed(0)
    model, input = nn.Conv1d(4, CLASSES, 1).double(), torch.randn(6, 4, 7).double()
    target = labels_of(model, input)
    criterion = HEMLoss(margin=1e-3)
    expected = plain(model, criterion, input, target)
    equal(selectively(lambda: selective_loss(model, criterion, input, target, **ALWAYS), model), expected)


@pytest.mark.parametrize("nest", [lambda x: x, lambda x: (x,), lambda x: {"x": x}])
def test_keyword_arguments_are_the_same_for_every_sample(nest):
    model, input, target = make("transformer")
    criterion = HEMLoss(margin=1e-3)
    loss = criterion(model(input, scale=torch.full((24, 1, 1), 0.1)[:7].mean()), target)
    expected = loss.detach(), gradients(model, loss)
    # As many rows as there are samples: nobody takes it apart.
    scale = torch.full((1,), 0.1, dtype=torch.float32)
    found = selectively(
        lambda: selective_loss(model, criterion, nest(input), target, kwargs={"scale": scale}, **ALWAYS), model
    )
    equal(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pays_below", [0.0, 1.0])
def test_logits_are_those_of_the_whole_batch(pays_below):
    model, input, target = make()
    step = Selective(model, HEMLoss(margin=1e-3), pays_below=pays_below)
    for _ in range(2):
        loss, logits = step(input, target, return_logits=True)
        torch.testing.assert_close(logits, model(input).detach())
        assert not logits.requires_grad
        assert loss.requires_grad
    with torch.no_grad():
        assert step(input, target).shape == ()
        loss, logits = step(input, target, return_logits=True)
        torch.testing.assert_close(loss, HEMLoss(margin=1e-3)(logits, target))
        assert not loss.requires_grad
        assert step.steps == 2
    loss, logits = selective_loss(model, step.criterion, input, target, return_logits=True, pays_below=pays_below)
    torch.testing.assert_close(logits, model(input).detach())


def test_the_input_has_its_gradient_too():
    model, input, target = make()
    criterion, x, y = HEMLoss(margin=1e-3), input.clone().requires_grad_(), input.clone().requires_grad_()
    criterion(model(x), target).backward()
    selective_loss(model, criterion, y, target, **ALWAYS).backward()
    torch.testing.assert_close(y.grad, x.grad)


def test_autocast_s_kept_casts_do_not_cut_the_gradient_off():
    model, input, target = make("layer norm", dtype=torch.float32)
    criterion = HEMLoss(margin=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        target = labels_of(model, input)
        expected = plain(model, criterion, input, target)
        found = selectively(lambda: selective_loss(model, criterion, input, target, **ALWAYS), model)
    equal(found, expected, rtol=2e-2, atol=2e-2)
    assert all(gradient.any() for gradient in found[1])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activations_may_be_computed_again(use_reentrant):
    model, input, target = make()
    criterion = HEMLoss(margin=1e-3)
    expected = plain(model, criterion, input, target)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.model, x, use_reentrant=use_reentrant)

    input.requires_grad_()  # without it the older kind has no gradient at all
    found = selectively(lambda: selective_loss(Checkpointed(), criterion, input, target, **ALWAYS), model)
    equal(found, expected)


def test_masks_of_bytes_have_no_room_for_the_ignored_label():
    model, input, target = make("pixels", count=8)
    criterion = HEMLoss(margin=1e-3)
    expected = plain(model, criterion, input, target)
    step = Selective(model, criterion, sizes=2, **ALWAYS)
    equal(selectively(lambda: step(input, target.to(torch.uint8)), model), expected)


# --- how large the second batch is ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "active", "expected"),
    [(None, 3, 3), (None, 0, 1), (8, 3, 3), (8, 4, 6), (8, 0, 3), (4, 7, 12), (1, 1, 24), (5, 21, 24), (100, 3, 3)],
)
def test_the_second_batch_is_filled_up_to_few_sizes(sizes, active, expected):
    model, input, _ = make()
    target = labels_of(model, input, wrong=active / 24)
    criterion = HEMLoss(margin=1e-3)
    whole = plain(model, criterion, input, target)
    step = Selective(model, criterion, sizes=sizes, **ALWAYS)
    step(input, target)
    sizes = seen(model)
    equal(selectively(lambda: step(input, target), model), whole)
    assert sizes == [(24, False), (expected, True)]
    assert step.share == pytest.approx(active / 24)


def test_a_filled_up_sample_that_rounding_wakes_adds_nothing():
    """In the second forward every logit is a little lower at the first class: finished samples are so no longer."""

    class Rounding(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return x + self.logits - 1e-3 * torch.is_grad_enabled() * torch.eye(3)[0]

    model, criterion = Rounding(), HEMLoss(margin=0.5)
    finished, active = torch.tensor([0.5, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0])
    for batch, size, count in ((torch.stack([finished] * 4), 1, 0), (torch.stack([active] + [finished] * 3), 2, 1)):
        step = Selective(model, criterion, sizes=4 // size, **ALWAYS)
        loss = step(batch, torch.zeros(4, dtype=torch.int64))
        assert loss.item() == pytest.approx(0.501 if count else 0.0, abs=1e-6)


class Own(nn.Module):
    """What torch.compile takes a network for, in place: not one of torch's own containers."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_network_gets_few_sizes(in_place):
    model, input, _ = make()
    compiled, criterion, sizes, graphs = Own(copy.deepcopy(model)), HEMLoss(margin=1e-3), set(), []

    def backend(graph, _):
        graphs.append(graph)

        def run(*args):
            shapes = [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]
            sizes.update((shape[0], torch.is_grad_enabled()) for shape in shapes if shape[1:] == (4,) and shape[0] != 8)
            return graph(*args)

        return run

    torch._dynamo.reset()
    if in_place:
        compiled.compile(backend=backend)
    else:
        compiled = torch.compile(compiled, backend=backend)
    step = Selective(compiled, criterion, **ALWAYS)
    for active in range(20):
        target = labels_of(model, input, wrong=active / 24)
        expected = plain(model, criterion, input, target)
        equal(selectively(lambda target=target: step(input, target), compiled), expected)
    # 8 is the first layer's weight.
    assert sizes == {(24, False), *((size, True) for size in range(3, 22, 3))}
    assert len(graphs) <= 4  # the second size makes the first dimension one of any size


# --- what it chooses ------------------------------------------------------------------------------------------


def test_the_share_of_the_first_step_and_of_the_next():
    model, input, target = make()
    step = Selective(model, HEMLoss(margin=1e-3), pays_below=1.0)
    step(input, target)
    assert step.share == 9 / 24
    step(input[:1], target[:1])  # which is active
    assert step.share == 0.75 * 9 / 24 + 0.25


def test_ranks_choose_by_their_sums(mesh, monkeypatch):
    group, groups = mesh.get_group(), []

    def doubled(x, group):
        groups.append(group)
        x.mul_(2)

    step = Selective(nn.Linear(2, 2), HEMLoss(process_group=group))
    monkeypatch.setattr(torch.distributed, "all_reduce", doubled)
    assert step._over_ranks([0.1, 3.0], torch.device("cpu")) == [0.2, 6.0]
    assert groups == [group]
    monkeypatch.setattr(step, "_worthwhile", lambda: 0.4)
    for _ in range(8):
        step(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64)).backward()
    assert step.pays_below == 0.4


def test_plain_steps_while_that_is_better_with_a_look_at_every_eighth():
    model, input, _ = make()
    all_wrong, right = labels_of(model, input, wrong=1), labels_of(model, input, wrong=0.25)
    step = Selective(model, HEMLoss(margin=1e-3), pays_below=0.6)
    step(input, all_wrong)
    sizes = seen(model)
    for _ in range(7):
        step(input, all_wrong)
    assert sizes == [(24, True)] * 7
    sizes.clear()
    shares = []
    for _ in range(40):
        step(input, right)
        shares.append(step.share)
    # 0.75 of what it was, 0.25 of what is seen, at steps 8, 16 and 24: then it is below 0.6.
    expected = 1.0
    for k in range(3):
        expected = 0.75 * expected + 0.25 * 0.25
        assert shares[8 * k : 8 * k + 8] == pytest.approx([expected] * 8) or k == 2
    assert sizes[:17] == [(24, True)] * 17
    assert sizes[17:] == [(24, False), (6, True)] * 23
    for _ in range(20):
        step(input, all_wrong)  # and back
    assert sizes[-1] == (24, True)
    assert step.share > 0.6


def clocked(monkeypatch, model, fixed, forward=1.0, graph=1.5, backward=2.0):
    """A clock that only the network moves on: by so much a call, and in proportion to its samples."""
    now = [0.0]
    monkeypatch.setattr(selective, "_now", lambda device: now[0])

    class Clocked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.part = len(x) / 24
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            now[0] += backward * (fixed + (1 - fixed) * ctx.part)
            return grad

    original = model.forward

    def moving(x):
        now[0] += (graph if torch.is_grad_enabled() else forward) * (fixed + (1 - fixed) * len(x) / 24)
        return Clocked.apply(original(x))

    model.forward = moving


def test_every_second_of_six_steps_that_are_measured_is_plain(monkeypatch):
    model, input, target = make()
    sizes = seen(model)
    step = Selective(model, HEMLoss(margin=1e-3))
    monkeypatch.setattr(step, "_worthwhile", lambda: 0.6)
    chosen = []
    for _ in range(8):
        sizes.clear()
        step(input, target).backward()
        chosen.append(([size for size, has_graph in sizes if not has_graph], sizes[-1], step.pays_below))
    selected, measured = [24], [24, 6]  # and a quarter
    assert chosen == [
        ([24, 24], (9, True), None),  # the first is a try
        ([], (24, True), None),
        (measured, (9, True), None),
        ([], (24, True), None),
        (measured, (9, True), None),
        ([], (24, True), None),
        (measured, (9, True), None),
        (selected, (9, True), 0.6),
    ]


@pytest.mark.parametrize("unit", [1.0, 2.0])
@pytest.mark.parametrize(
    ("fixed", "expected"), [(0.0, 0.9 * (1 - 1 / 3.5)), (0.25, 0.9 * (1 - 1 / (3.5 * 0.75))), (0.9, 0.0), (1.0, 0.0)]
)
def test_what_pays_is_measured_in_the_first_steps(monkeypatch, fixed, expected, unit):
    model, input, target = make()
    clocked(monkeypatch, model, fixed, forward=unit, graph=1.5 * unit, backward=2 * unit)
    step = Selective(model, HEMLoss(margin=1e-3))
    for _ in range(7):
        assert step.pays_below is None
        step(input, target).backward()
    step(input, target).backward()
    assert step.pays_below == pytest.approx(expected, abs=1e-9)


def test_the_least_time_counts(monkeypatch):
    model, input, target = make()
    now = iter([0.0, 3.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr(selective, "_now", lambda device: next(now))
    step = Selective(model, HEMLoss(margin=1e-3))
    monkeypatch.setattr(step, "_selective_step", lambda *_: (torch.zeros(()), None))
    for _ in range(6):  # every second is plain
        step(input, target)
    assert step.state_dict()["times"] == {"forward": 2.0}


def test_other_devices_are_waited_for(monkeypatch):
    waited_for = []
    of_device = {"cuda": SimpleNamespace(synchronize=waited_for.append)}
    monkeypatch.setattr(torch, "get_device_module", lambda device: of_device[device.type])
    first, second = (selective._now(torch.device(name)) for name in ("cpu", "cuda:1"))
    assert first <= second
    assert waited_for == [torch.device("cuda:1")]


def test_without_a_backward_the_usual_share_is_taken():
    model, input, target = make()
    step = Selective(model, HEMLoss(margin=1e-3))
    for _ in range(8):
        step(input, target)
    assert step.pays_below == 0.6


def test_measuring_steps_are_right_too():
    model, input, target = make()
    criterion = HEMLoss(margin=1e-3)
    expected = plain(model, criterion, input, target)
    step = Selective(model, criterion)
    for _ in range(10):
        equal(selectively(lambda: step(input, target), model), expected)
    assert 0 <= step.pays_below < 1
    assert step.state_dict()["times"].keys() == {"forward", "backward", "no graph", "quarter"}


def test_nothing_is_measured_where_runs_are_to_be_equal():
    torch.use_deterministic_algorithms(True)
    try:
        assert Selective(nn.Linear(2, 2), HEMLoss()).pays_below == 0.6
    finally:
        torch.use_deterministic_algorithms(False)


def train(steps, state=None):
    """Some steps of a training, from a saved state or from the beginning; the same samples at the same step."""
    torch.manual_seed(3)
    model, input, target = make(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    step = Selective(model, HEMLoss(margin=0.3), pays_below=0.6)
    if state is not None:
        for x, saved in zip((model, optimizer, step), state, strict=True):
            x.load_state_dict(saved)
    selected = []
    for i in steps:
        torch.manual_seed(i)
        chosen = torch.randperm(24)[:16]
        optimizer.zero_grad()
        step(input[chosen], target[chosen]).backward()
        optimizer.step()
        selected.append(step.share)
    return [copy.deepcopy(x.state_dict()) for x in (model, optimizer, step)], selected


def test_a_loop_goes_on_to_the_same_bits():
    whole, shares = train(range(60))
    assert min(shares) < 0.6 < max(shares)
    for at in (1, 13, 40):
        resumed, _ = train(range(at, 60), train(range(at))[0])
        assert resumed[2] == whole[2]
        for name, value in whole[0].items():
            assert torch.equal(resumed[0][name], value)


@pytest.mark.parametrize(
    ("state", "given"), [({}, "an empty one"), ({"steps": 1}, "steps"), ({"steps": 1, 2: 3}, "steps, 2"), ([1], "list")]
)
def test_a_state_that_is_none(state, given):
    words = f"expected the state of Selective, with steps, share, pays_below, times; got {given}"
    with pytest.raises(ValueError, match=f"^{words}$"):
        Selective(nn.Linear(2, 2), HEMLoss()).load_state_dict(state)


def test_the_function_remembers_its_network_as_long_as_it_lives():
    model, input, target = make()
    criterion = HEMLoss(margin=1e-3)
    sizes = seen(model)
    for _ in range(3):
        # Also with a criterion that is new in each step.
        selective_loss(model, copy.deepcopy(criterion), input, target, **ALWAYS)
    with pytest.raises(TypeError, match="which finishes samples; got CrossEntropyLoss"):
        selective_loss(model, nn.CrossEntropyLoss(), input, target, **ALWAYS)
    assert [size for size, graph in sizes if not graph] == [24] * 4  # one more in the first step, to try it
    del model.forward
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_loop_of_the_page(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "selective.md").read_text(encoding="utf-8")
    code = page.partition("\n## In a loop\n")[2].partition("```python\n")[2].partition("```")[0]
    model, input, target = make(dtype=torch.float32)
    start = copy.deepcopy(model.state_dict())
    batches = [(input[i::3], target[i::3]) for i in range(3)] * 8
    exec(code, {"model": model, "batches": batches, "path": tmp_path / "saved.pt"})
    saved = torch.load(tmp_path / "saved.pt")
    assert saved["selective"]["steps"] == 24
    model.load_state_dict(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, t in batches:
        optimizer.zero_grad()
        HEMLoss()(model(x), t).backward()
        optimizer.step()
    torch.testing.assert_close(saved["model"], model.state_dict(), rtol=1e-4, atol=1e-5)


# --- what it refuses ------------------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(F.dropout(x, 0.5, self.training))


class LayerDrop(Functional):
    """Draws of Python's numbers, as some transformers do."""

    def forward(self, x):
        return self.last(x) if random.random() < 0.5 else self.last(-x)


class DropPath(nn.Module):
    drop_prob = 0.1

    def forward(self, x):
        return x


class StochasticDepth(nn.Identity):
    """Of that name, as torchvision has it; without a probability it has none."""

    def __init__(self, p):
        super().__init__()
        if p is not None:
            self.p = p


def hooked():
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].register_forward_hook(lambda *_: None)
    return model


def spectral():
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
    # Far from where the iteration ends: there, on some processors, a call changes no bit.
    model.parametrizations.weight[0]._u.copy_(torch.tensor([1.0, 0.0, 0.0]))
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
            "selective steps are wrong where samples touch each other, and 1 (BatchNorm1d) normalises by the batch: "
            "freeze it with eval(), or take layer, group or instance normalisation",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False).eval()),
            "and 1 (BatchNorm1d) normalises by the batch",
        ),
        (lambda: nn.BatchNorm1d(4), "and the model (BatchNorm1d) normalises by the batch"),
        (
            lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1)),
            "selective steps call the network twice, and 1 (Dropout) would draw another mask: switch it off, or give "
            "allow_stochastic=True if the gradient may differ from a plain step's",
        ),
        (lambda: nn.Sequential(DropPath(), nn.Linear(4, 3)), "and 0 (DropPath) would draw another mask"),
        (lambda: StochasticDepth(0.5), "and the model (StochasticDepth) would draw another mask"),
        (Functional, "and a call draws random numbers, as dropout does: switch it off, or give allow_stochastic=True"),
        (LayerDrop, "and a call draws random numbers"),
        (hooked, "and so its forward hooks: 0 has one; remove it, or give allow_hooks=True"),
        (spectral, "and a call changes its buffer parametrizations.weight.0._u: the second would be another one"),
    ],
    ids=[
        "batch norm",
        "batch norm without statistics",
        "batch norm alone",
        "dropout",
        "stochastic depth",
        "torchvision's stochastic depth",
        "random",
        "Python's random",
        "hook",
        "buffer",
    ],
)
def test_what_would_be_wrong_is_refused_before_the_first_step(build, words):
    model = build()
    before, state, python_state = copy.deepcopy(model.state_dict()), torch.get_rng_state(), random.getstate()
    step = Selective(model, HEMLoss(), **ALWAYS)
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(words)):
            step(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(8, dtype=torch.int64))
    assert step.steps == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("layer", [StochasticDepth(None), StochasticDepth(0.0), nn.Dropout(0.0)])
def test_a_layer_that_drops_nothing(layer):
    model, input, target = make("layer norm")
    model.append(layer)
    criterion = HEMLoss(margin=1e-3)
    expected = plain(model, criterion, input, target)
    equal(selectively(lambda: selective_loss(model.train(), criterion, input, target, **ALWAYS), model), expected)


@pytest.mark.parametrize("build", [Functional, lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))])
def test_random_networks_by_consent_or_in_eval_mode(build):
    input, target = torch.randn(8, 4), torch.zeros(8, dtype=torch.int64)
    model = build()
    state = torch.get_rng_state()
    Selective(model, HEMLoss(), allow_stochastic=True, pays_below=0.0)(input, target).backward()
    first = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.set_rng_state(state)
    HEMLoss()(model(input), target).backward()
    assert all(map(torch.equal, first, (p.grad for p in model.parameters())))  # the try has drawn nothing
    Selective(model.eval(), HEMLoss())(input, target)


def test_a_network_that_changes_its_mode_is_looked_at_again():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    step = Selective(model, HEMLoss())
    step(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))
    model.train()
    with pytest.raises(ValueError, match="BatchNorm1d"):
        step(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))


def test_hooks_by_consent():
    step = Selective(hooked(), HEMLoss(), allow_hooks=True)
    step(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64)).backward()


def test_hooks_of_torch_are_none_of_others():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer)
    layer.register_forward_hook(functools.partial(F.relu, inplace=False))
    unnamed = nn.ReLU()
    unnamed.__module__ = None  # as callables have it that are not Python's
    layer.register_forward_pre_hook(unnamed)
    assert selective._hooked(model) is None
    model.register_forward_hook(functools.partial(print, "called"))
    assert selective._hooked(model) == "the model"
    assert selective._hooked(nn.Sequential(model)) == "0"


def test_the_network_that_is_sent_around(mesh):
    model = nn.Linear(2, 2)
    assert selective._without_data_parallel(nn.parallel.DistributedDataParallel(model)) is model
    assert selective._without_data_parallel(model) is model


def test_the_random_numbers_of_a_device(monkeypatch):
    assert torch.equal(*selective._random_state(torch.device("meta")), torch.get_rng_state())
    state = torch.tensor([1, 2])
    of_device = {"cuda": SimpleNamespace(get_rng_state=lambda device: {1: state}[device.index])}
    monkeypatch.setattr(torch, "get_device_module", lambda device: of_device[device.type])
    _, found = selective._random_state(torch.device("cuda:1"))
    assert found is state


class Halved(HEMLoss):
    def forward(self, input, target):
        return super().forward(input, target) / 2


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), Halved(), F.cross_entropy])
def test_other_criteria_finish_no_sample(criterion):
    kind = type(criterion).__name__
    with pytest.raises(TypeError, match=f"^selective steps need hem_ext.HEMLoss, which finishes samples; got {kind}$"):
        selective_loss(nn.Linear(4, 3), criterion, torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))


LABELS = torch.zeros(8, dtype=torch.int64)
NO_LOGITS = "the model must return logits, or an output with .logits, ['logits'] or ['out']; got "


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pays_below": 1.5}, "pays_below must be a share from 0 to 1, got 1.5"),
        ({"sizes": 0}, "sizes must be a whole number of at least 1, got 0"),
        ({"sizes": 2.0}, "sizes must be a whole number of at least 1, got 2.0"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Selective(nn.Linear(4, 3), HEMLoss(), **options)


@pytest.mark.parametrize(
    ("input", "target", "model", "words"),
    [
        (torch.zeros(7, 4), LABELS, nn.Linear(4, 3), "must hold the 8 samples of target, got one of shape (7, 4)"),
        ((torch.zeros(8, 4), torch.zeros(())), LABELS, nn.Linear(4, 3), "got one of shape ()"),
        ((torch.zeros(8, 4), "train"), LABELS, nn.Linear(4, 3), "a nest of tensors, got str in it: put it into kwargs"),
        ([], LABELS, nn.Linear(4, 3), "input must be a nest of tensors, got list without any"),
        (torch.zeros(8, 4), torch.tensor(0), nn.Linear(4, 3), "shape (N, ...), got one of shape ()"),
        (torch.zeros(8, 4), [0] * 8, nn.Linear(4, 3), "shape (N, ...), got one of type list"),
        (torch.zeros(8, 4), LABELS, nn.Flatten(0), "got logits of shape (32,) and target of shape (8,)"),
        (torch.zeros(8, 4), LABELS, of(lambda x: x.sum(1)), "got logits of shape (8,) and target"),
        (torch.zeros(8, 4), LABELS, of(lambda x: x[1:]), "got logits of shape (7, 4) and target of shape (8,)"),
        (torch.zeros(8, 4), LABELS, nn.LSTM(4, 3), NO_LOGITS + "tuple"),
        (torch.zeros(8, 4), LABELS, of(lambda x: {"y": x}), NO_LOGITS + "dict"),
    ],
)
@pytest.mark.parametrize("pays_below", [0.0, 1.0])
def test_arguments_that_do_not_fit(input, target, model, words, pays_below):
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        Selective(model, HEMLoss(), pays_below=pays_below)(input, target)
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match=re.escape(words)):
        Selective(model, HEMLoss(), pays_below=pays_below)(input, target)


def test_logits_that_will_be_written_over_are_not_returned():
    words = "return_logits=True with overwrite_input=True would return the gradient after backward"
    with pytest.raises(ValueError, match=f"^{words}$"):
        selective_loss(nn.Linear(4, 3), HEMLoss(overwrite_input=True), torch.zeros(8, 4), LABELS, return_logits=True)


# --- whether samples touch each other -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_whose_samples_are_apart(name):
    model, input, _ = make(name)
    assert check_independence(model, input)


class Centred(nn.Module):
    """A network that subtracts the batch's mean: no module gives it away."""

    def forward(self, x):
        return x - x.mean(0)


@pytest.mark.parametrize("model", [nn.BatchNorm1d(4), Centred(), nn.Sequential(nn.Dropout(0.5), Centred())])
def test_networks_whose_samples_touch(model):
    before = copy.deepcopy(model.state_dict())
    assert not check_independence(model, torch.randn(64, 4), raise_exception=False)
    with pytest.raises(ValueError, match=r"^samples touch each other in this network: "):
        check_independence(model, torch.randn(64, 4))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


class FromFirst(nn.Module):
    """A network whose other samples get a little of the first one's last feature."""

    def __init__(self, share=1.0):
        super().__init__()
        self.share = share

    def forward(self, x):
        return torch.cat([x[:1], x[1:] + self.share * x[:1, -1:]])


@pytest.mark.parametrize(
    "input",
    [
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]]),
        torch.tensor([[math.nan, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        torch.tensor([[1.0, 2.0], [1.0, 2.0], [-math.inf, 4.0]]),
    ],
)
def test_one_other_sample_is_enough(input):
    with pytest.raises(ValueError, match=r"the logits of the rest change by up to 2; batch normalisation"):
        check_independence(FromFirst(), input)


def test_rounding_is_no_touch():
    x = torch.tensor([[1e4, 2.0], [1e4, 3.0]])
    assert check_independence(FromFirst(5e-3), x)
    assert not check_independence(FromFirst(2e-2), x, raise_exception=False)
    zero = nn.Linear(2, 3)
    for parameter in zero.parameters():
        nn.init.zeros_(parameter)
    assert check_independence(zero, x)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("masked", [1, 3])
def test_logits_that_are_not_finite_are_no_touch(value, masked):
    model = of(lambda x: torch.cat([x[:, masked:], x.new_full((len(x), masked), value)], dim=1))
    assert check_independence(model, torch.randn(4, 3))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_how_far_the_others_move_is_held_against_those_that_are_finite(value):
    model = of(lambda x: torch.cat([1e-8 * (x + x[:1]), x.new_full((len(x), 1), value)], dim=1))
    assert not check_independence(model, torch.randn(4, 3), raise_exception=False)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_finite_for_one_first_sample_alone_is_a_touch(value):
    model = of(lambda x: torch.where(x[:1, :1] > 0, x, value))
    x = torch.tensor([[1.0, 2.0], [-1.0, 3.0]])
    for input in (x, x.flip(0)):
        assert not check_independence(model, input, raise_exception=False)


def test_random_numbers_alone_are_no_touch():
    assert check_independence(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)), torch.randn(8, 4))
    # Of Python's as well: any two draws of these networks would agree by chance every second time.
    assert all(check_independence(LayerDrop(), torch.randn(8, 4)) for _ in range(20))


@pytest.mark.parametrize(
    ("input", "words"),
    [
        (torch.zeros(1, 4), "the same two samples or more, got (1, 4)"),
        ((torch.zeros(3, 4), torch.zeros(2, 4)), "the same two samples or more, got (3, 4), (2, 4)"),
        ((), "the same two samples or more, got no tensor"),
        (torch.zeros(8, 4), "all samples of the input are equal: nothing would show which of them touch each other"),
    ],
)
def test_inputs_that_would_show_nothing(input, words):
    with pytest.raises(ValueError, match=f"(^| hold tensors of ){re.escape(words)}$"):
        check_independence(nn.Linear(4, 3), input)
