"""What a wrong argument says: the same words from every backend."""

import importlib
import inspect
import math
import re
import sys

import numpy as np
import pytest
import torch
from cases import ARITHMETIC, DTYPES, REDUCTIONS
from torch.utils._python_dispatch import TorchDispatchMode

from hem_ext import (
    HEMLoss,
    LinearHEMLoss,
    MixedHEMLoss,
    UpsampledHEMLoss,
    arguments,
    class_margins,
    hem_loss,
    linear_hem_loss,
    reference,
)
from hem_ext.hem import _backward, _forward

X = torch.zeros(4, 3)
T = torch.tensor([0, 1, 2, 0])
NAN = math.nan

WRONG = {
    "batch sizes": (
        {"target": T[:3]},
        ValueError,
        "expected target of shape (4,) for input of shape (4, 3)",
    ),
    "the got shape": ({"target": T[:3]}, ValueError, "got target of shape (3,)"),
    "pixels": (
        {"input": torch.zeros(2, 3, 4, 5), "target": torch.zeros(2, 5, 4, dtype=torch.int64)},
        ValueError,
        "expected target of shape (2, 4, 5) for input of shape (2, 3, 4, 5)",
    ),
    "one sample": (
        {"input": X[0], "target": T[:1]},
        ValueError,
        "expected target of shape () for input of shape (3,)",
    ),
    "a number as input": (
        {"input": torch.tensor(1.0), "target": T[0]},
        ValueError,
        "got input of shape () and target of shape ()",
    ),
    "no classes": (
        {"input": torch.zeros(4, 0)},
        ValueError,
        "the class dimension is empty: got input of shape (4, 0) and target of shape (4,)",
    ),
    "integer logits": (
        {"input": X.long()},
        TypeError,
        "input must be float32, float64, float16 or bfloat16 logits, got torch.int64",
    ),
    "complex logits": ({"input": X.cfloat()}, TypeError, "got torch.complex64"),
    "floating targets": (
        {"target": T.float()},
        TypeError,
        "target must be int64, int32 or uint8 class indices (or bool, int8, int16 or uint16), got torch.float32 of "
        "shape (4,): use .long() where they are class indices",
    ),
    "a floating mask": ({"target": T.float()[:, None]}, TypeError, "of shape (4, 1): use .long()"),
    "mixed targets": (
        {"target": torch.full((4, 3), 1 / 3)},
        TypeError,
        "of shape (4, 3): use .argmax(1) where they are one-hot, hem_ext.mix where they mix two classes",
    ),
    "the mixed target of one sample": ({"input": X[0], "target": X[0]}, TypeError, "use .argmax(0) where"),
    "one-hot targets": (
        {"target": torch.zeros(4, 3, dtype=torch.int64)},
        ValueError,
        "got target of shape (4, 3); use .argmax(1) where they are one-hot",
    ),
    "a column for one sample": (
        {"input": X[0], "target": torch.zeros(3, 1, dtype=torch.int64)},
        ValueError,
        "got target of shape (3, 1)",
    ),
    "complex targets": ({"target": T.cfloat()}, TypeError, "got torch.complex64 of shape (4,)"),
    "a class too many in a mask of int16": (
        {"target": torch.tensor([0, 1, 3, 0], dtype=torch.int16)[:, None]},
        IndexError,
        "target[2] is 3",
    ),
    "a class too many": (
        {"target": torch.tensor([0, 1, 3, 0])},
        IndexError,
        "target[2] is 3, which is neither a class in [0, 3) nor ignore_index (-100)",
    ),
    "a negative class": (
        {"target": torch.tensor([0, -1, 3, 0], dtype=torch.int32)},
        IndexError,
        "target[1] is -1, which is neither a class in [0, 3) nor ignore_index (-100)",
    ),
    "another ignore_index": ({"target": T - 100, "ignore_index": 255}, IndexError, "target[0] is -100"),
    "a wide target": ({"target": torch.tensor([0, 2**32, 0, 0])}, IndexError, "target[1] is 4294967296"),
    "a pixel's class": (
        {
            "input": torch.zeros(2, 3, 4, 5),
            "target": torch.zeros(2, 4, 5, dtype=torch.uint8).index_put_(
                (torch.tensor(1), *torch.tensor([2, 3])), torch.tensor(9, dtype=torch.uint8)
            ),
        },
        IndexError,
        "target[1, 2, 3] is 9",
    ),
    "one sample's class": ({"input": X[0], "target": torch.tensor(3)}, IndexError, "target[] is 3"),
    "a negative margin": ({"margin": -0.1}, ValueError, "margin must be finite and not negative, got -0.1"),
    "a NaN margin": ({"margin": NAN}, ValueError, "margin must be finite and not negative, got nan"),
    "an infinite margin": ({"margin": math.inf}, ValueError, "margin must be finite and not negative, got inf"),
    "an infinite weight": ({"weight": torch.tensor([1.0, math.inf, 1.0])}, ValueError, "but weight[1] is inf"),
    "sparse logits": ({"input": X.to_sparse()}, TypeError, "input must be a dense tensor, got a torch.sparse_coo one"),
    "sparse rows": (
        {"input": X.to_sparse_csr()},
        TypeError,
        "input must be a dense tensor, got a torch.sparse_csr one",
    ),
    "sparse targets": ({"target": T.to_sparse()}, TypeError, "target must be a dense tensor, got a torch.sparse_coo"),
    "nested logits": (
        {"input": torch.nested.nested_tensor([X[0], X[1, :2]])},
        TypeError,
        "input must be a dense tensor, got a nested one",
    ),
    "a list as input": ({"input": X.tolist()}, TypeError, "input must be a tensor, got list"),
    "an array as target": ({"target": T.numpy()}, TypeError, "target must be a tensor, got ndarray"),
    "a class too many in wide rows": (
        {"input": torch.zeros(300, 100), "target": torch.arange(300) // 279 * 100},
        IndexError,
        "target[279] is 100, which is neither a class in [0, 100)",
    ),
    "a negative class margin": (
        {"margin": torch.tensor([0.1, -0.5, 0.1])},
        ValueError,
        "margin must be finite and not negative, but margin[1] is -0.5",
    ),
    "a NaN class margin": ({"margin": [0.1, 0.1, NAN]}, ValueError, "but margin[2] is nan"),
    "too many margins": (
        {"margin": torch.ones(4)},
        ValueError,
        "margin must have shape (C,) = (3,) for input of shape (4, 3), got margin of shape (4,)",
    ),
    "a negative margin without dimensions": ({"margin": torch.tensor(-0.5)}, ValueError, "margin[0] is -0.5"),
    "margins of two dimensions": ({"margin": torch.ones(3, 1)}, ValueError, "got margin of shape (3, 1)"),
    "margins that train": (
        {"margin": torch.ones(3, requires_grad=True)},
        ValueError,
        "margin is a constant of the loss and gets no gradient",
    ),
    "a margin in words": (
        {"margin": "large"},
        TypeError,
        "margin must be a number or one number per class, got 'large'",
    ),
    "no margin": ({"margin": None}, TypeError, "got None"),
    "complex margins": (
        {"margin": torch.ones(3, dtype=torch.cfloat)},
        TypeError,
        "margin must hold real numbers, got torch.complex64",
    ),
    "a negative weight": (
        {"weight": torch.tensor([1.0, 1.0, -2.0])},
        ValueError,
        "weight must be finite and not negative, but weight[2] is -2",
    ),
    "a NaN weight": ({"weight": torch.tensor([NAN, 1.0, 1.0])}, ValueError, "but weight[0] is nan"),
    "too few weights": ({"weight": torch.ones(2)}, ValueError, "weight must have shape (C,) = (3,)"),
    "a number as weight": ({"weight": 0.5}, TypeError, "got float 0.5; did you mean margin=0.5?"),
    "weights that train": ({"weight": torch.ones(3, requires_grad=True)}, ValueError, "weight is a constant"),
    "another device": (
        {"target": T.to("meta")},
        RuntimeError,
        "expected target on the device of input, cpu, got target on meta",
    ),
    "margins elsewhere": (
        {"margin": torch.ones(3, device="meta")},
        RuntimeError,
        "expected margin on the device of input, cpu, got margin on meta",
    ),
    "one margin elsewhere": (
        {"margin": torch.ones((), device="meta")},
        RuntimeError,
        "expected margin on the device of input, cpu, got margin on meta",
    ),
    "weights elsewhere": ({"weight": torch.ones(3, device="meta")}, RuntimeError, "got weight on meta"),
    "an unknown reduction": (
        {"reduction": "avg"},
        ValueError,
        "reduction must be one of 'mean', 'batchmean', 'sum' or 'none', got 'avg'",
    ),
    "a list as reduction": ({"reduction": []}, ValueError, "reduction must be one of 'mean', 'batchmean', 'sum' or"),
    "an ignore_index too large": (
        {"ignore_index": 2**63},
        ValueError,
        "ignore_index must fit into an int64, got 9223372036854775808",
    ),
    "one too small": ({"ignore_index": -(2**63) - 1}, ValueError, "into an int64, got -9223372036854775809"),
    "a floating ignore_index": ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got 1.0"),
    "a tensor as ignore_index": ({"ignore_index": torch.tensor(1.7)}, TypeError, "ignore_index must be an int, got"),
    "smoothed labels": (
        {"label_smoothing": 0.1},
        ValueError,
        "label_smoothing must be 0, for HEM has nothing to smooth",
    ),
    "a word as overwrite_input": ({"overwrite_input": "yes"}, TypeError, "must be True or False, got 'yes'"),
    "a negative normalizer": ({"normalizer": -1}, ValueError, "normalizer must be finite and not negative, got -1"),
    "a normalizer in words": ({"normalizer": "all"}, TypeError, "normalizer must be a number or a tensor of one"),
    "normalizers": ({"normalizer": torch.ones(4)}, ValueError, "of shape (), got torch.float32 of shape (4,)"),
    "a normalizer that is a bool": ({"normalizer": torch.tensor(True)}, ValueError, "got torch.bool of shape ()"),
    "a complex normalizer": ({"normalizer": torch.tensor(1j)}, ValueError, "got torch.complex64 of shape ()"),
    "a negative tensor": ({"normalizer": torch.tensor(-1)}, ValueError, "normalizer must be finite and not negative"),
    "a tensor past float32": (
        {"normalizer": torch.tensor(1e39, dtype=torch.float64)},
        ValueError,
        "normalizer must be finite and not negative in torch.float32, got 1e+39",
    ),
    "no number": ({"normalizer": torch.tensor(NAN)}, ValueError, "normalizer must be finite and not negative, got nan"),
    "a normalizer past float32": ({"normalizer": 1e39}, ValueError, "in torch.float32, got 1e+39"),
    "a normalizer that trains": (
        {"normalizer": torch.tensor(1.0, requires_grad=True)},
        ValueError,
        "normalizer is a constant of the loss",
    ),
    "a normalizer elsewhere": (
        {"normalizer": torch.ones((), device="meta")},
        RuntimeError,
        "expected normalizer on the device of input, cpu, got normalizer on meta",
    ),
    "a normalizer of a sum": (
        {"normalizer": 3, "reduction": "sum"},
        ValueError,
        "normalizer is what 'mean' and 'batchmean' divide by, got it with reduction 'sum'",
    ),
    "margins by class": ({"margin": {0: 0.1, 1: 0.2, 2: 0.3}}, TypeError, "margin must be a number or one number per"),
    "margins without an order": ({"margin": {0.1, 0.2, 0.3}}, TypeError, "margin must be a number or one number per"),
    "digits as margins": ({"margin": "012"}, TypeError, "margin must be a number or one number per class, got '012'"),
    "a margin larger than any float": ({"margin": 10**400}, ValueError, "margin must be finite and not negative"),
    "a negative one": ({"margin": -(10**400)}, ValueError, "margin must be finite and not negative, got -inf"),
    "such a normalizer": ({"normalizer": 10**400}, ValueError, "normalizer must be finite and not negative, got inf"),
    "no smoothing at all": ({"label_smoothing": None}, ValueError, "label_smoothing must be 0"),
    "nothing as overwrite_input": ({"overwrite_input": None}, TypeError, "must be True or False, got None"),
    "a margin too large for float32": (
        {"margin": 1e39},
        ValueError,
        "margin must be finite and not negative in torch.float32, got 1e+39",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
def test_a_wrong_argument_is_named(backend, name):
    given, error, words = WRONG[name]
    options = {"input": X, "target": T, **given}
    with pytest.raises(error, match=re.escape(words)):
        hem_loss(options.pop("input"), options.pop("target"), **options, backend=backend)


@pytest.mark.parametrize(
    ("given", "end"),
    [
        ({"target": T.to(torch.uint32)}, "got torch.uint32 of shape (4,)"),
        ({"target": T[:2]}, "got target of shape (2,)"),
        ({"weight": "wide"}, "must be a tensor of shape (C,), got str"),
        ({"weight": [1.0, 2.0, 3.0]}, "must be a tensor of shape (C,), got list"),
    ],
)
def test_a_sentence_gives_no_advice_that_is_not_for_it(backend, given, end):
    options = {"target": T, **given}
    with pytest.raises((TypeError, ValueError), match=re.escape(end) + "$"):
        hem_loss(X, options.pop("target"), **options, backend=backend)


class Mesh:
    def get_group(self):
        raise AssertionError


NO_GROUP = "process_group must be a torch.distributed.ProcessGroup or None, got "


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"process_group": "WORLD"}, f"{NO_GROUP}str"),
        ({"process_group": Mesh()}, f"{NO_GROUP}Mesh: give its get_group()"),
        (
            {"process_group": torch.distributed.GroupMember.NON_GROUP_MEMBER},
            f"{NO_GROUP}the answer of new_group to a process that is not in the group",
        ),
        (
            {"overwrite_input": True, "backend": "reference"},
            "overwrite_input is for the native kernels: the reference reads the logits in backward",
        ),
    ],
)
def test_an_option_is_refused_in_one_whole_sentence(options, sentence):
    for call in (lambda: arguments.check(X, T, **options), lambda: HEMLoss(**options)):
        with pytest.raises((TypeError, ValueError)) as told:
            call()
        assert str(told.value) == sentence


def test_a_torch_without_distributed_has_no_groups(monkeypatch):
    monkeypatch.delattr(torch.distributed, "GroupMember")
    with pytest.raises(TypeError, match=f"^{re.escape(NO_GROUP)}str$"):
        arguments.check(X, T, process_group="WORLD")


@pytest.mark.parametrize("margin", ["012", b"012", {0: 0.1, 1: 0.2, 2: 0.3}, {0.1, 0.2, 0.3}])
def test_the_cause_names_what_iterates_over_something_else(margin):
    with pytest.raises(TypeError, match=r"^margin must be a number or one number per class, got ") as told:
        arguments.check(X, T, margin)
    assert str(told.value.__cause__) == type(margin).__name__


@pytest.mark.parametrize("margin", [-1, NAN, math.inf])
def test_margins_of_the_host_are_checked_for_every_device(backend, margin):
    x, t = X.to("meta"), T.to("meta")
    with pytest.raises(ValueError, match=rf"^margin must be finite and not negative, but margin\[1\] is {margin:g}$"):
        hem_loss(x, t, margin=[0.1, margin, 0.1], backend="auto" if backend == "native" else backend)


def test_a_module_can_be_built_without_memory():
    with torch.device("meta"):
        assert HEMLoss(margin=[0.1, 0.2], weight=torch.ones(2)).margin.device.type == "meta"
        assert HEMLoss.from_class_counts([1, 2]).margin.tolist() == pytest.approx([1000**0.5, 500**0.5])


RAW = {
    "rows that are pixels": (
        {"input": torch.zeros(2, 3, 4), "target": torch.zeros(2, 4).long()},
        "do not lie in memory",
    ),
    "too few targets": ({"target": T[:2]}, "expected targets of sizes [4], got [2]"),
    "targets of another shape": ({"target": T.view(2, 2)}, "expected targets of sizes [4], got [2, 2]"),
    "a target dtype": ({"target": T.to(torch.int16)}, "targets of this dtype"),
    "a logit dtype": ({"input": X.long()}, "logits of this dtype"),
    "no classes": ({"input": torch.zeros(4, 0)}, "must hold between 1 and"),
    "short margins": ({"margins": torch.ones(2)}, "margin must be contiguous, of shape [3]"),
    "wide weights": ({"weight": torch.ones(3).double()}, "weight must be contiguous, of shape [3]"),
    "another device": ({"target": T.to("meta")}, "every tensor must be on the device of the logits"),
}


@pytest.mark.parametrize("name", RAW)
def test_a_raw_op_stays_inside_its_memory(name):
    given, words = RAW[name]
    call = {"input": X, "target": T, "margins": None, "weight": None, **given}
    with pytest.raises(RuntimeError, match=re.escape(words)):
        _forward(call["input"], call["target"], call["margins"], 0.2, call["weight"], -100, 1, True)


@pytest.mark.parametrize(
    "changed",
    [
        {"mask": torch.zeros(3, 1, dtype=torch.int32)},
        {"mask": torch.zeros(4, 1)},
        {"mask": torch.zeros(8, 1, dtype=torch.int32)[::2]},
        {"grad_loss": torch.ones(4)},
        {"grad_loss": torch.ones((), dtype=torch.float64)},
        {"denominator": torch.ones(2)},
    ],
)
def test_a_raw_backward_stays_inside_its_memory(changed):
    _, mask, denominator = _forward(X, T, None, 0.2, None, -100, 1, True)
    call = {"grad_loss": torch.ones(()), "mask": mask, "denominator": denominator, **changed}
    with pytest.raises(RuntimeError, match=r"the mask must be contiguous|do not fit the loss"):
        _backward(call["grad_loss"], call["mask"], T, None, call["denominator"], -100, 3, 0, 1, True)


@pytest.mark.parametrize("code", [-1, 4, 2**32])
def test_raw_ops_know_their_codes_alone(code):
    _, mask, denominator = _forward(X, T, None, 0.2, None, -100, 1, True)
    with pytest.raises(RuntimeError, match=f"no type of logits of code {code}"):
        _backward(torch.ones(()), mask, T, None, denominator, -100, 3, code, 1, True)
    with pytest.raises(RuntimeError, match=f"no reduction of code {code}"):
        _backward(torch.ones(()), mask, T, None, denominator, -100, 3, 0, code, True)
    with pytest.raises(RuntimeError, match=f"no reduction of code {code}"):
        _forward(X, T, None, 0.2, None, -100, code, True)


def test_everything_that_takes_the_options_takes_the_same():
    def options(function):
        parameters = inspect.signature(function).parameters.values()
        return {p.name: (p.default, p.annotation) for p in parameters if p.default is not p.empty}

    taken = options(hem_loss)
    assert taken == options(arguments.check)
    assert [*taken.items(), ("stats", (False, "bool"))] == list(options(HEMLoss).items())
    assert HEMLoss().options == {name: default for name, (default, _) in taken.items() if name != "label_smoothing"}
    of_logits = ("label_smoothing", "overwrite_input")
    renamed = {"class_weight" if name == "weight" else name: of for name, of in taken.items() if name not in of_logits}
    for function in (linear_hem_loss, LinearHEMLoss):
        assert renamed.items() <= options(function).items()


@pytest.mark.parametrize(
    ("module", "place", "sizes", "count"),
    [
        (HEMLoss, "hem.hem_loss", (), 2),
        (LinearHEMLoss, "linear.linear_hem_loss", (6, 3), 2),
        (MixedHEMLoss, "mix.mixed_hem_loss", (), 4),
        (UpsampledHEMLoss, "upsample.upsampled_hem_loss", (), 2),
    ],
)
def test_a_module_gives_its_function_every_option(monkeypatch, module, place, sizes, count):
    told = []
    owner, _, name = place.partition(".")
    owner = importlib.import_module(f"hem_ext.{owner}")
    signature = inspect.signature(getattr(owner, name))
    monkeypatch.setattr(owner, name, lambda *args, **kw: told.append(signature.bind(*args, **kw).arguments))
    group = torch.distributed.ProcessGroup(0, 1)
    options = {"margin": 0.75, "ignore_index": 7, "reduction": "batchmean", "normalizer": 3.0, "process_group": group}
    options |= {"backend": "native", "overwrite_input": True, "align_corners": True}
    options |= {"chunk_size": 5, "skip_finished": False}
    taken = options.keys() & inspect.signature(module).parameters
    for left_out in ("process_group", "normalizer"):  # these two are not for one call
        given = {name: options[name] for name in taken - {left_out}}
        call = module(*sizes, **given)
        call(*range(count))
        assert given.items() <= told.pop().items()
        if "normalizer" in given:
            call(*range(count), normalizer=5.0)
            assert told.pop()["normalizer"] == 5.0


LARGEST = torch.finfo(torch.float32).max


def test_what_is_not_given_is_as_in_the_signature():
    assert arguments.check(X, T) == (0.2, None, None, -100, arguments.REDUCTIONS.index("mean"), None, None)
    assert arguments.check_options(7, "sum", "reference", None) == 7
    assert arguments.check_normalizer(3) == 3.0


@pytest.mark.parametrize("margin", [0.0, 0.5, LARGEST])
def test_what_is_plain_is_handed_on_as_it_is(margin):
    for x in (X, torch.nn.Parameter(X)):
        assert arguments.is_plain(x, margin, None, 7)
        assert arguments.check(x, T, margin, ignore_index=7) == (margin, None, None, 7, 1, None, None)


@pytest.mark.parametrize(
    "changed",
    [
        *({"margin": margin} for margin in (1, -0.5, NAN, math.inf, 1e39, [0.5] * 3, torch.tensor(0.5))),
        {"weight": torch.ones(3)},
        {"ignore_index": np.int64(7)},
        {"input": X.tolist()},
    ],
)
def test_what_is_not_plain(changed):
    assert not arguments.is_plain(**{"input": X, "margin": 0.5, "weight": None, "ignore_index": 7, **changed})


def test_the_least_and_the_largest_are_taken():
    for dtype, largest in ((torch.float32, LARGEST), (torch.float64, sys.float_info.max)):
        for margin in (0, largest):
            assert arguments.check(X.to(dtype), T, margin).margin == margin
        for normalizer in (largest, torch.tensor(largest, dtype=torch.float64)):
            assert arguments.check(X.to(dtype), T, normalizer=normalizer).divisor == largest
    for ignore_index in (-(2**63), 2**63 - 1):
        assert arguments.check(X, T, ignore_index=ignore_index).ignore_index == ignore_index
    zeros = torch.zeros(3)
    module = HEMLoss(zeros, margin=zeros)
    assert torch.equal(module.weight, zeros)
    assert torch.equal(module.margin, zeros)


@pytest.mark.parametrize("dtype", DTYPES)
def test_margins_and_weights_are_of_the_dtype_of_the_loss(dtype):
    numbers, x = [0.0, 0.1, 3.0], X.to(dtype)
    expected = torch.tensor(numbers, dtype=ARITHMETIC[dtype])
    exact = torch.tensor(numbers, dtype=torch.float64)
    for margin in (numbers, exact):
        found = arguments.check(x, T, margin, exact)
        torch.testing.assert_close(found.margins, expected, rtol=0, atol=0)
        torch.testing.assert_close(found.weight, expected, rtol=0, atol=0)


class Copies(TorchDispatchMode):
    """Notes what goes to another device: its dtype, and whether it waits."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device", args[0].device) != args[0].device:
            self.seen.append((args[0].dtype, not kwargs.get("non_blocking")))
        return func(*args, **kwargs)


def test_margins_of_the_host_go_to_the_device_of_the_logits():
    """In the dtype of the loss, for not every device has float64, and nobody waits for it."""
    with Copies() as copies:
        found = arguments.check(X.to("meta"), T.to("meta"), [0.1, 0.2, 0.3])
    assert copies.seen[-1:] == [(torch.float32, False)]
    assert found.margins.device.type == "meta"
    assert found.margins.dtype == torch.float32


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_mean_alone_asks_the_others(reduction, size):
    group = torch.distributed.ProcessGroup(0, size)
    found = arguments.check(X, T, reduction=reduction, process_group=group)
    assert found.group is (group if size > 1 and reduction in ("mean", "batchmean") else None)
    assert arguments.REDUCTIONS[found.reduction] == reduction


@pytest.mark.parametrize(
    ("normalizer", "divisor"),
    [
        (0, 1.0),
        (0.5, 0.5),
        (1, 1.0),
        (3, 3.0),
        (2.0**-149, 2.0**-149),  # the least number of float32
        (2.0**-150, 1.0),  # half of it, which is rounded to 0
        (2.0**-150 + 2.0**-180, 2.0**-149),
    ],
)
def test_a_normalizer_divides_a_sum(normalizer, divisor):
    for given in (normalizer, torch.tensor(normalizer, dtype=torch.float64)):
        for reduction in ("mean", "batchmean"):
            found = arguments.check(X, T, reduction=reduction, normalizer=given)
            assert torch.as_tensor(found.divisor, dtype=torch.float32) == divisor
            assert isinstance(given, torch.Tensor) == isinstance(found.divisor, torch.Tensor)
            assert arguments.REDUCTIONS[found.reduction] == "sum"
    assert found.divisor.dtype == torch.float32
    assert arguments.check(X.double(), T, normalizer=normalizer).divisor == (normalizer or 1.0)


@pytest.mark.parametrize("normalizer", [3, torch.tensor(3), torch.tensor(3.0, dtype=torch.float64)])
def test_a_normalizer_counts_for_all_processes(normalizer):
    for size in (1, 2, 4):
        group = torch.distributed.ProcessGroup(0, size)
        found = arguments.check(X, T, normalizer=normalizer, process_group=group)
        assert found.group is None
        assert found.divisor == 3 / size


@pytest.mark.parametrize(("normalizer", "share"), [(0, 0.5), (2.0**-149, 1.0), (2.0**-148, 2.0**-149)])
def test_a_process_s_share_of_a_normalizer_is_never_0(normalizer, share):
    group = torch.distributed.ProcessGroup(0, 2)
    for given in (normalizer, torch.tensor(normalizer)):
        divisor = arguments.check(X, T, normalizer=given, process_group=group).divisor
        assert torch.as_tensor(divisor, dtype=torch.float32) == share


def short(x):
    """The last byte of its memory is missing."""
    x.untyped_storage().resize_(x.nbytes - 1)
    return x


def test_values_are_not_looked_at_while_a_graph_is_traced(monkeypatch):
    counts = short(torch.ones(3))
    calls = (
        (lambda: arguments.check_normalizer(torch.tensor(NAN)), ValueError),
        (lambda: arguments.check_values(T + 7, 3, -100), IndexError),
        (lambda: arguments.check_memory("counts", counts), RuntimeError),
    )
    for call, error in calls:
        with pytest.raises(error):
            call()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for call, _ in calls:
        call()


def test_nothing_is_found_where_there_is_no_value():
    assert arguments.any_of(torch.tensor([False, True]))
    assert not arguments.any_of(torch.tensor([False, True], device="meta"))


def test_the_calls_of_cross_entropy():
    """By position and by name, as users of `cross_entropy` write them."""
    weight = torch.tensor([1.0, 2.0, 0.5])
    x = torch.randn(4, 3)
    expected = hem_loss(x, T, weight=weight)
    assert expected != hem_loss(x, T)
    assert hem_loss(x, T, weight) == HEMLoss(weight)(x, T) == expected
    torch.testing.assert_close(reference.hem_loss(x, T, weight), expected)
    assert HEMLoss(weight, ignore_index=-100, reduction="mean", label_smoothing=0.0)(x, T) == expected
    assert isinstance(HEMLoss(), torch.nn.modules.loss._WeightedLoss)
    with pytest.raises(TypeError, match=re.escape("got float 0.5; did you mean margin=0.5?")):
        HEMLoss(0.5)
    for deprecated in ("size_average", "reduce"):
        with pytest.raises(TypeError, match=deprecated):
            HEMLoss(**{deprecated: True})


def test_the_reference_takes_no_other_options():
    assert reference.hem_loss(X, T, margin=0.5, reduction="sum") == hem_loss(X, T, margin=0.5, reduction="sum")
    for options in ({"backend": "native"}, {"margins": 0.5}):
        with pytest.raises(TypeError, match=next(iter(options))):
            reference.hem_loss(X, T, **options)


def test_the_reference_module_checks_as_well():
    with pytest.raises(ValueError, match=r"expected target of shape \(4,\)"):
        reference.hem_loss(X, T[:2])
    masks = torch.tensor([[[True, False, True]]])  # (N, 1, d), as data sets have them
    x = torch.randn(1, 2, 3)
    assert reference.hem_loss(x, masks) == hem_loss(x, masks.long().squeeze(1), backend="reference")


def test_an_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'native' or 'reference', got 'cuda'"):
        hem_loss(X, T, backend="cuda")


def test_native_without_kernels_for_the_device():
    x, t = X.to("meta"), T.to("meta")
    with pytest.raises(RuntimeError, match=r"backend='native'.*without kernels for 'meta' tensors"):
        hem_loss(x, t, backend="native")
    assert hem_loss(x, t).shape == ()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"margin": -1}, ValueError, "margin must be finite and not negative, got -1"),
        ({"margin": [0.1, -1.0]}, ValueError, "margin[1] is -1"),
        ({"margin": torch.tensor([NAN])}, ValueError, "margin[0] is nan"),
        ({"margin": torch.tensor(-0.5)}, ValueError, "margin must be finite and not negative, got -0.5"),
        ({"margin": torch.ones(2, 1)}, ValueError, "margin must have shape (C,), got margin of shape (2, 1)"),
        ({"weight": torch.tensor(1.0)}, ValueError, "weight must have shape (C,), got weight of shape ()"),
        ({"label_smoothing": 0.1}, ValueError, "label_smoothing must be 0"),
        ({"normalizer": -1}, ValueError, "normalizer must be finite"),
        ({"overwrite_input": True, "backend": "reference"}, ValueError, "overwrite_input is for the native kernels"),
        ({"margin": torch.ones(2, requires_grad=True)}, ValueError, "detach it"),
        ({"weight": torch.tensor([1.0, -1.0])}, ValueError, "weight[1] is -1"),
        ({"weight": torch.tensor([True])}, TypeError, "weight must hold real numbers, got torch.bool"),
        ({"weight": [1.0]}, TypeError, "weight must be a tensor of shape (C,), got list"),
        ({"reduction": "avg"}, ValueError, "got 'avg'"),
        ({"backend": "fast"}, ValueError, "got 'fast'"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
    ],
)
def test_the_module_checks_when_it_is_built(options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        HEMLoss(**options)


def test_numbers_of_numpy(backend):
    expected = hem_loss(X, T, margin=0.5, backend=backend)
    assert hem_loss(X, T, margin=np.float32(0.5), backend=backend) == expected
    assert hem_loss(X, T, margin=np.full(3, 0.5), backend=backend) == expected
    assert HEMLoss(margin=np.full(3, 0.5), ignore_index=np.int64(-1))(X, T) == expected
    assert hem_loss(X, T, margin=0.5, ignore_index=np.int32(9), backend=backend) == expected


@pytest.mark.parametrize(("shape", "stride", "offset"), [((5,), (1,), 0), ((2, 3), (7, 2), 3), ((), (), 2)])
def test_memory_that_ends_before_the_last_number(shape, stride, offset):
    needed = 8 * (1 + offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)))
    x = torch.zeros(100, dtype=torch.float64).as_strided(shape, stride, offset)
    x.untyped_storage().resize_(needed)
    arguments.check_memory("counts", x)
    x.untyped_storage().resize_(needed - 1)
    words = f"memory of counts is not allocated: its storage was resized to {needed - 1} bytes, and {needed} are needed"
    with pytest.raises(RuntimeError, match=words):
        arguments.check_memory("counts", x)
    if x.dim() == 1:
        with pytest.raises(RuntimeError, match=words):
            class_margins(x)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("input", lambda: arguments.check(short(X.clone()), T)),
        ("target", lambda: arguments.check(X, short(T.clone()))),
        ("target", lambda: arguments.class_indices(X, short(T.short()))),
        ("margin", lambda: arguments.check(X, T, short(torch.ones(3)))),
        ("weight", lambda: arguments.check(X, T, weight=short(torch.ones(3)))),
        ("normalizer", lambda: arguments.check(X, T, normalizer=short(torch.tensor(2.0)))),
        ("margin", lambda: HEMLoss(margin=short(torch.ones(3)))),
        ("weight", lambda: HEMLoss(short(torch.ones(3)))),
    ],
)
def test_memory_that_is_not_there_is_named(name, call):
    with pytest.raises(RuntimeError, match=rf"^the memory of {name} is not allocated: its storage was resized to \d+ "):
        call()
