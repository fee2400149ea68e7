import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import Functions, Worlds
from scipy.special import expit, log_softmax, softmax
from torch import nn

from hem_ext import HEMLoss, class_margins, hem_loss
from hem_ext.harness.data import digits
from hem_ext.harness.losses import LOSSES, CrossEntropy, make_loss
from hem_ext.harness.losses.base import check_counts
from hem_ext.harness.models import HeadOptions, SmallCNN

COUNTS = [200, 30, 100, 4, 50]
NEED_COUNTS = ("hem+", "logit-adjusted", "ldam")
PRIORS = np.array(COUNTS) / sum(COUNTS)
PIECEWISE_LINEAR = ("hem", "hem+", "mm")  # exact gradients, but kinks: no central differences across those


def make(name, **options):
    return make_loss(name, num_classes=5, class_counts=COUNTS, **options)


def samples(shape, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape, generator=generator, dtype=dtype)
    target = torch.randint(5, (shape[0], *shape[2:]), generator=generator)
    return logits, target


# --- values: every sample by itself, from the formula, in numpy -----------------------------------------------


def cross_entropy(z, y):
    return -log_softmax(z)[y]


def label_smoothing(z, y, alpha=0.1):
    smoothed = np.full(5, alpha / 5)
    smoothed[y] += 1 - alpha
    return -(smoothed * log_softmax(z)).sum() / (1 - alpha)


def multi_margin(z, y, margin=1.0):
    return sum(max(0.0, z[j] - z[y] + margin) for j in range(5) if j != y) / 5


def logitnorm(z, y, tau=0.04):
    return cross_entropy(z / (math.sqrt((z**2).sum()) + 1e-7) / tau, y)


def logit_adjusted(z, y, tau=1.0, post_hoc=False):
    return cross_entropy(z if post_hoc else z + tau * np.log(PRIORS), y)


def ldam(z, y, max_margin=0.5, s=30.0):
    margins = np.array(COUNTS) ** -0.25
    z = z.copy()
    z[y] -= max_margin * margins[y] / margins.max()
    return cross_entropy(s * z, y)


def focal(z, y, gamma=2.0):
    return (1 - softmax(z)[y]) ** gamma * cross_entropy(z, y)


def ngl(z, y):
    p, t = softmax(z), np.eye(5)[y]
    return np.mean(np.exp(2.4092 - p - p * t) - np.cos(np.cos(np.sin(p))))


def logit_penalty(z, y, beta=6e-4):
    return cross_entropy(z, y) + beta * (z**2).sum() / 2


def cosine_softmax(z, y, tau=0.05):
    return cross_entropy(z / tau, y)


def sigmoid(z, y):
    p = expit(z - math.log(5))
    return -sum(math.log(p[k] if k == y else 1 - p[k]) for k in range(5))


def squared_error(z, y, kappa=9.0, m=60.0, alpha=10.0):
    return alpha * (kappa * (z[y] - m) ** 2 + sum(z[j] ** 2 for j in range(5) if j != y))


FORMULAS = [
    ("ce", cross_entropy, {}),
    ("ce-ls", label_smoothing, {"alpha": 0.3}),
    ("mm", multi_margin, {"margin": 2.5}),
    ("logitnorm", logitnorm, {"tau": 0.5}),
    ("logit-adjusted", logit_adjusted, {"tau": 2.0}),
    ("logit-adjusted", logit_adjusted, {"post_hoc": True}),
    ("ldam", ldam, {"max_margin": 0.8, "s": 5.0}),
    ("focal", focal, {"gamma": 0.5}),
    ("ngl", ngl, {}),
    ("logit-penalty", logit_penalty, {"beta": 0.1}),
    ("cosine-softmax", cosine_softmax, {"tau": 3.0}),
    ("sigmoid", sigmoid, {}),
    ("squared-error", squared_error, {"kappa": 2.0, "m": 3.0, "alpha": 0.5}),
    ("dropout", cross_entropy, {}),
    ("final-l2", cross_entropy, {}),
]


@pytest.mark.parametrize(("name", "formula", "constants"), FORMULAS)
def test_values_are_those_of_the_formula(name, formula, constants):
    logits, target = samples((7, 5))
    for given in ({}, constants):
        expected = np.mean([formula(z, y, **given) for z, y in zip(logits.numpy(), target.tolist(), strict=True)])
        # The class shifts and margins of two of them are kept in float32.
        assert make(name, **given)(logits, target).item() == pytest.approx(expected, rel=1e-6)


def test_logitnorm_of_short_logits():
    logits, target = samples((1, 5))
    logits *= 1e-7
    expected = logitnorm(logits[0].numpy(), target.item())
    assert make("logitnorm")(logits, target).item() == pytest.approx(expected, rel=1e-9)


def test_label_smoothing_by_nothing_is_cross_entropy():
    torch.testing.assert_close(make("ce-ls", alpha=0.0)(*samples((7, 5))), make("ce")(*samples((7, 5))))


@pytest.mark.parametrize("name", LOSSES)
def test_one_sample_that_is_kept(name):
    logits, target = samples((3, 5))
    expected = make(name)(logits[:1], target[:1])
    target[1:] = -100
    torch.testing.assert_close(make(name)(logits, target), expected)


def test_one_class_and_an_ignored_sample():
    assert CrossEntropy()(torch.randn(2, 1), torch.tensor([0, -100])) == 0


def test_class_counts_are_float64_on_the_cpu():
    with torch.device("meta"):
        counts = check_counts([1, 3])
    assert counts.dtype == torch.float64
    assert counts.tolist() == [1, 3]
    with pytest.raises(ValueError, match=r"^class_counts must be one number above 0 per class, got \[1, 0\]$"):
        check_counts([1, 0])


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_dice_is_that_of_sums_over_the_batch(squared, smooth):
    logits, target = samples((2, 5, 3, 4))
    target[target == 3] = 0
    p = softmax(logits.numpy(), axis=1)
    total = 0.0
    for c in (0, 1, 2, 4):  # class 3 is absent: its loss is 0
        t = target.numpy() == c
        size = (p[:, c] ** 2).sum() + t.sum() if squared else p[:, c].sum() + t.sum()
        total += 1 - (2 * p[:, c][t].sum() + smooth) / (size + smooth)
    assert make("dice", smooth=smooth, squared=squared)(logits, target).item() == pytest.approx(total / 5)


def test_dice_of_uniform_logits():
    target = torch.tensor([[[0, 0], [1, 1]], [[1, 0], [0, 1]]])  # of 3 classes, one absent
    criterion = make_loss("dice", num_classes=3)
    assert criterion(torch.zeros(2, 3, 2, 2), target).item() == pytest.approx(0.4)


def test_dice_eps_is_the_least_denominator():
    # One pixel of two classes, p = 1/2: 1 - 1 / 2 for the class that is there, 0 for the other.
    assert make_loss("dice", num_classes=2, eps=2.0)(torch.zeros(1, 2), torch.tensor([0])).item() == 0.25


@pytest.mark.parametrize(("margin", "shape"), [(1.0, (9, 5)), (0.3, (2, 5, 3, 4))])
def test_mm_is_torchs(margin, shape):
    logits, target = samples(shape)
    rows = logits.movedim(1, -1).reshape(-1, 5)
    assert make("mm", margin=margin)(logits, target).item() == pytest.approx(
        F.multi_margin_loss(rows, target.flatten(), margin=margin).item()
    )


def test_ce_is_torchs():
    logits, target = samples((2, 5, 3, 4), dtype=torch.float32)
    assert make("ce")(logits, target) == nn.CrossEntropyLoss()(logits, target)


def test_focal_with_gamma_0_is_cross_entropy():
    logits, target = samples((7, 5))
    assert make("focal", gamma=0)(logits, target).item() == pytest.approx(F.cross_entropy(logits, target).item())


@pytest.mark.parametrize("name", LOSSES)
def test_pixels_are_rows(name):
    logits, target = samples((2, 5, 3, 4))
    rows = logits.movedim(1, -1).reshape(-1, 5)
    expected = make(name)(rows, target.flatten()).item()
    assert make(name)(logits, target).item() == pytest.approx(expected)
    assert make(name)(logits.to(memory_format=torch.channels_last), target).item() == pytest.approx(expected)


# --- HEM and its margins --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "margin"), [(60_000, 0.1826), (50_000, 0.2), (100_000, 0.1414), (1_281_167, 0.0395)])
def test_hem_takes_the_margin_of_balanced_classes(size, margin):
    criterion = make_loss("hem", num_classes=2, class_counts=[size - 7, 7])
    assert criterion.criterion.margin == pytest.approx(margin, abs=5e-5)


def test_hem_margins():
    logits, target = samples((50, 5))
    plain = make_loss("hem", num_classes=5)
    assert plain(logits, target) == hem_loss(logits, target, margin=0.2)
    assert make("hem", margin=0.7)(logits, target) == hem_loss(logits, target, margin=0.7)
    assert make("hem", total=50)(logits, target) == hem_loss(logits, target, margin=math.sqrt(50 / sum(COUNTS)))
    for constants in ({}, {"total": 50.0}):
        expected = hem_loss(logits, target, margin=class_margins(COUNTS, **constants))
        assert make("hem+", **constants)(logits, target) == expected
    assert plain(logits, target) != make("hem+")(logits, target)
    assert isinstance(plain.criterion, HEMLoss)


# --- what every loss honours ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ignored_logits", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3, 4)])
@pytest.mark.parametrize("name", LOSSES)
def test_ignored_samples_count_for_nothing(name, shape, ignored_logits):
    logits, target = samples(shape)
    ignored = torch.zeros_like(target, dtype=torch.bool)
    ignored.view(-1)[[0, 4, 5]] = True
    logits.masked_fill_(ignored.unsqueeze(1), ignored_logits)
    target[ignored] = 255
    logits.requires_grad_()
    loss = make(name, ignore_index=255)(logits, target)
    loss.backward()

    rows = logits.detach().movedim(1, -1)[~ignored].requires_grad_()
    expected = make(name)(rows, target[~ignored])
    expected.backward()
    assert loss.item() == pytest.approx(expected.item())
    grad = logits.grad.movedim(1, -1)
    torch.testing.assert_close(grad[~ignored], rows.grad)
    assert (grad[ignored] == 0).all()
    assert (grad != 0).any()


@pytest.mark.parametrize("shape", [(3, 5), (2, 5, 3, 4)])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_but_ignored_samples(name, shape):
    logits = torch.full(shape, math.nan, requires_grad=True)
    loss = make(name)(logits, torch.full((shape[0], *shape[2:]), -100))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_class_can_be_ignored(name):
    # Index 0 also stands in for what is ignored.
    logits, target = samples((40, 5))
    kept = target != 0
    loss = make(name, ignore_index=0)(logits, target).item()
    assert loss == pytest.approx(make(name)(logits[kept], target[kept]).item())


@pytest.mark.parametrize("wrong", [5, -1, -100])
@pytest.mark.parametrize("name", LOSSES)
def test_a_target_that_is_no_class(name, wrong):
    logits, target = samples((6, 5))
    target[2] = wrong
    with pytest.raises((IndexError, RuntimeError)):
        make(name, ignore_index=255)(logits, target)


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_that_do_not_fit(name):
    for logits, target in [((4, 5), (3,)), ((2, 5, 3, 4), (2, 4, 3)), ((2, 5, 3, 4), (2,))]:
        with pytest.raises(ValueError, match="target"):
            make(name)(torch.zeros(logits), torch.zeros(target, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name, dtype):
    logits, target = samples((2, 5, 3, 4), dtype=dtype)
    logits = (30 * logits).requires_grad_()  # squared-error exceeds float16's range
    loss = make(name)(logits, target)
    assert loss.dtype == torch.float32
    assert loss == make(name)(logits.detach().float(), target)
    loss.backward()
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
@pytest.mark.parametrize("name", LOSSES)
def test_integer_targets(name, dtype):
    logits, target = samples((6, 5))
    target[1] = 255 if dtype == torch.uint8 else 77
    criterion = make(name, ignore_index=target[1].item())
    assert criterion(logits, target.to(dtype)) == criterion(logits, target)


@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 1, 2)])
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in PIECEWISE_LINEAR])
def test_gradients(name, shape):
    logits, target = samples(shape)
    target.view(-1)[1] = -100
    criterion = make(name)
    assert torch.autograd.gradcheck(lambda z: criterion(z, target), logits.requires_grad_())


def test_gradient_of_mm():
    logits = torch.tensor([[1.0, 0.5, -3.0], [9.0, 0.0, 0.0]], requires_grad=True)
    make_loss("mm", num_classes=3)(logits, torch.tensor([0, 0])).backward()
    sixth = 1 / 6  # of 2 samples and 3 classes
    torch.testing.assert_close(logits.grad, torch.tensor([[-sixth, sixth, 0.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_extreme_logits_are_finite(name):
    for z in ([0.0, 0, 0, 0, 0], [500.0, -500, 0, 0, 0], [-500.0, 500, 0, 0, 0]):
        logits = torch.tensor([z], requires_grad=True)
        loss = make(name)(logits, torch.tensor([0]))
        loss.backward()
        assert loss.isfinite()
        assert logits.grad.isfinite().all()


def test_gradient_of_focal_below_gamma_1_is_finite():
    logits = torch.tensor([[99.0, 0.0]], requires_grad=True)
    make_loss("focal", num_classes=2, gamma=0.5)(logits, torch.tensor([0])).backward()
    assert logits.grad.isfinite().all()


# --- what it asks of the network ------------------------------------------------------------------------------


def test_heads():
    heads = {
        "ldam": HeadOptions(normalise_weight=True, normalise_features=True, bias=False),
        "cosine-softmax": HeadOptions(normalise_weight=True),
        "dropout": HeadOptions(dropout=pytest.approx(0.3)),
    }
    for name in LOSSES:
        assert make(name).head == heads.get(name, HeadOptions()), name
    assert make("dropout", keep=1).head.dropout == 0


@pytest.mark.parametrize("name", LOSSES)
def test_penalties(name):
    head = nn.Linear(3, 5)
    penalty = make(name).penalty(head)
    assert penalty.shape == ()
    expected = 8e-4 * sum(w**2 for w in head.weight.flatten().tolist()) / 2
    assert penalty.item() == (pytest.approx(expected) if name == "final-l2" else 0)


def test_final_l2_pulls_at_the_weights():
    head = nn.Linear(3, 5)
    make("final-l2", lam=0.5).penalty(head).backward()
    torch.testing.assert_close(head.weight.grad, 0.5 * head.weight)
    assert head.bias.grad is None


@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 3, 4)])
def test_outputs(shape):
    logits, _ = samples(shape)
    prior = torch.tensor(PRIORS).log().view(5, *[1] * (len(shape) - 2))
    expected = {
        "sigmoid": logits - math.log(5),
        "ldam": 30 * logits,
        "cosine-softmax": 20 * logits,
    }
    for name in LOSSES:
        torch.testing.assert_close(make(name).outputs(logits), expected.get(name, logits))
    post_hoc = make("logit-adjusted", post_hoc=True, tau=2)
    torch.testing.assert_close(post_hoc.outputs(logits), logits - 2 * prior, rtol=0, atol=1e-6)


def test_class_constants_move_with_the_module():
    for name, buffers in {"hem+": 1, "logit-adjusted": 1, "ldam": 1, "ce": 0}.items():
        assert len(make(name).state_dict()) == buffers


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_a_network(name):
    train, _, test = digits()
    criterion = make_loss(name, num_classes=10, class_counts=train.labels.bincount())
    torch.manual_seed(0)
    model = SmallCNN(10, width=8, head=criterion.head)
    # Adam, which divides the scale of a loss away: one learning rate serves them all.
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    history = []
    for _ in range(3):
        for batch in torch.randperm(len(train.labels)).split(64):
            loss = criterion(model(train.images[batch]), train.labels[batch]) + criterion.penalty(model.head)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
    model.eval()
    with torch.no_grad():
        predicted = criterion.outputs(model(test.images)).argmax(1)
    accuracy = (predicted == test.labels).float().mean().item()
    assert sum(history[-5:]) < sum(history[:5])
    assert accuracy > 0.6


# --- what decides the training --------------------------------------------------------------------------------


def identity(name, **options):
    """As it is when it is written, and read again."""
    return json.loads(json.dumps(make(name, **options).identity()))


def other(value):
    """Another value of the constant that has `value` by default."""
    if value is None:
        return 0.7
    return not value if isinstance(value, bool) else value + 0.25


@pytest.mark.parametrize("name", LOSSES)
def test_identity_is_json_and_the_same_for_the_same_loss(name):
    assert identity(name) == make(name).identity() == make(name).identity()
    assert identity(name)[0] == {"hem+": "hem"}.get(name, name)


@pytest.mark.parametrize(
    ("name", "constant", "default"),
    [(name, *constant) for name, loss in LOSSES.items() for constant in loss.constants().items()],
)
def test_identity_tells_constants_apart(name, constant, default):
    changed = identity(name, **{constant: other(default)})
    assert changed != identity(name)
    assert changed == identity(name, **{constant: other(default)})


@pytest.mark.parametrize("name", LOSSES)
def test_identity_tells_the_ignored_index_apart(name):
    assert identity(name, ignore_index=255) != identity(name)
    assert identity(name, ignore_index=255) == identity(name, ignore_index=255)


def test_identity_tells_losses_apart():
    identities = [identity(name) for name in LOSSES]
    assert all(identities.count(one) == 1 for one in identities)


def test_identity_tells_class_counts_apart_where_they_matter():
    def with_counts(name, counts):
        return make_loss(name, num_classes=5, class_counts=counts).identity()

    for name in LOSSES:
        same_total = with_counts(name, COUNTS[::-1]) == identity(name)
        assert same_total == (name not in NEED_COUNTS), name
        twice = with_counts(name, [2 * count for count in COUNTS]) == identity(name)
        assert twice == (name not in ("hem", "hem+")), name  # the others look at shares alone


def test_identity_has_every_digit():
    near = math.nextafter(0.3, 1)
    assert identity("focal", gamma=near) != identity("focal", gamma=0.3)
    assert identity("ldam")[1]["margins"] == make("ldam").margins.double().tolist()
    assert identity("logit-adjusted")[1]["shift"] == make("logit-adjusted").shift.double().tolist()


def test_identity_does_not_tell_numbers_of_other_types_apart():
    for name, constant in [("focal", "gamma"), ("hem", "margin"), ("logit-adjusted", "tau"), ("dice", "squared")]:
        # As text: 1 and 1.0 are equal otherwise.
        written = {json.dumps(make(name, **{constant: one}).identity()) for one in (1, 1.0, np.float32(1))}
        assert len(written) == 1


def gradient(criterion, logits, target):
    logits = logits.clone().requires_grad_()
    criterion(logits, target).backward()
    return logits.grad


@pytest.mark.parametrize("count", [7, 60, 5000, 12345])
def test_identity_of_hem_plus_on_balanced_classes_is_that_of_hem(count):
    balanced = {"num_classes": 5, "class_counts": [count] * 5}
    hem, plus = make_loss("hem", **balanced), make_loss("hem+", **balanced)
    margin = np.float32(math.sqrt(2000 / (5 * count))).item()
    assert hem.identity() == plus.identity() == ["hem", {"ignore_index": -100, "margin": margin}]
    assert make("hem", margin=[margin] * 5).identity() == plus.identity()
    logits, target = samples((50, 5), dtype=torch.float32)
    assert torch.equal(gradient(hem, logits, target), gradient(plus, logits, target))


@pytest.mark.parametrize("margin", [[0.3], torch.full((5,), 0.3, dtype=torch.float64)])
def test_identity_of_margins_that_are_all_equal(margin):
    assert LOSSES["hem"](margin=margin).identity()[1]["margin"] == np.float32(0.3).item()


def test_identity_of_hem_plus_on_a_long_tail_has_its_margins():
    plus = make("hem+")
    assert plus.identity() == ["hem", {"ignore_index": -100, "margin": class_margins(COUNTS).double().tolist()}]
    assert plus.identity() == make("hem", margin=class_margins(COUNTS)).identity()
    assert plus.identity() != identity("hem")


@pytest.mark.parametrize("ignored", [0, 3])
def test_identity_of_post_hoc_adjustment_is_that_of_cross_entropy(ignored):
    post_hoc, ce = make("logit-adjusted", post_hoc=True, tau=2.0, ignore_index=255), make("ce", ignore_index=255)
    assert post_hoc.identity() == ce.identity() == ["ce", {"ignore_index": 255}]
    logits, target = samples((50, 5), dtype=torch.float32)
    target[:ignored] = 255
    assert torch.equal(gradient(post_hoc, logits, target), gradient(ce, logits, target))


def test_identity_of_a_loss_that_derives_from_another():
    class Scaled(CrossEntropy):
        def per_sample(self, logits, labels):
            return 2 * super().per_sample(logits, labels)

    class Named(Scaled):
        name = "scaled"

    assert Scaled().identity() == ["Scaled", {"ignore_index": -100}]
    assert Named().identity() == ["scaled", {"ignore_index": -100}]


# --- by name --------------------------------------------------------------------------------------------------


def test_an_unknown_loss():
    with pytest.raises(ValueError, match=r"unknown loss 'hinge': one of ce, ce-ls, hem, .*, final-l2"):
        make_loss("hinge", num_classes=3)


@pytest.mark.parametrize(
    ("name", "constants", "message"),
    [
        ("focal", {"alpha": 1}, r"focal has no constant alpha; its constants are: gamma=2.0"),
        ("ce", {"tau": 1, "beta": 2}, r"ce has no constant tau, beta; its constants are: none"),
        ("ldam", {"margin": 1}, r"ldam has no constant margin; its constants are: max_margin=0.5, s=30.0"),
        ("hem+", {"margin": 1}, r"hem\+ has no constant margin; its constants are: total=2000.0"),
        ("focal", {"gamma": "2"}, r"focal: .*'str'.*; its constants are: gamma=2.0"),
    ],
)
def test_a_constant_that_the_loss_does_not_have(name, constants, message):
    with pytest.raises(TypeError, match=message):
        make(name, **constants)


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("ce-ls", {"alpha": 1.0}),
        ("ce-ls", {"alpha": -0.1}),
        ("hem", {"margin": -1.0}),
        ("hem", {"total": 0.0}),
        ("hem+", {"total": -1.0}),
        ("mm", {"margin": math.nan}),
        ("logitnorm", {"tau": 0.0}),
        ("logitnorm", {"tau": math.inf}),
        ("logit-adjusted", {"tau": math.inf}),
        ("ldam", {"s": 0.0}),
        ("ldam", {"max_margin": -0.5}),
        ("dice", {"smooth": -1.0}),
        ("dice", {"eps": 0.0}),
        ("focal", {"gamma": -1.0}),
        ("logit-penalty", {"beta": -1.0}),
        ("cosine-softmax", {"tau": -0.05}),
        ("squared-error", {"kappa": 0.0}),
        ("squared-error", {"m": 0.0}),
        ("squared-error", {"alpha": math.nan}),
        ("dropout", {"keep": 0.0}),
        ("dropout", {"keep": 1.1}),
        ("final-l2", {"lam": -1.0}),
    ],
)
def test_a_constant_out_of_range(name, constants):
    (constant,) = constants
    with pytest.raises(ValueError, match=rf"^{name.replace('+', '.')}: .*{constant}.*; its constants are: "):
        make(name, **constants)


def test_margins_are_one_per_class():
    margins = [0.1, 0.2, 0.3, 0.4, 0.5]
    logits, target = samples((6, 5))
    expected = hem_loss(logits, target, margin=torch.tensor(margins))
    for given in (margins, tuple(margins), np.array(margins), torch.tensor(margins)):
        assert make("hem", margin=given)(logits, target) == expected
        for few in (given[:4], given[:1]):
            words = f"^hem: margin must be a number or one number per class, got {len(few)} for 5 classes$"
            with pytest.raises(ValueError, match=words):
                make("hem", margin=few)


@pytest.mark.parametrize("name", LOSSES)
def test_class_counts(name):
    if name in NEED_COUNTS:
        with pytest.raises(ValueError, match="needs class_counts"):
            make_loss(name, num_classes=5)
        with pytest.raises(ValueError, match="0"):
            make_loss(name, num_classes=2, class_counts=[1, 0])
    else:
        make_loss(name, num_classes=5)
    with pytest.raises(ValueError, match=r"class_counts must be one number per class, got 5 for 4 classes"):
        make_loss(name, num_classes=4, class_counts=COUNTS)
    logits, target = samples((6, 5))
    expected = make(name)(logits, target)
    for given in (torch.tensor(COUNTS), np.array(COUNTS)):
        assert make_loss(name, num_classes=5, class_counts=given)(logits, target) == expected


# --- a batch that two processes share -------------------------------------------------------------------------

SHAPES = [(12, 5), (4, 5, 3, 4)]
# What the first process gets of the batch, and the share of the targets that are ignored in it and in the second.
SHARED = {"even": (0.5, 0.2, 0.0), "uneven": (0.75, 0.0, 0.5), "one ignored": (0.25, 1.0, 0.0), "all": (0.5, 1.0, 1.0)}


def shared_batch(shape, how):
    """Logits and targets, and the slice of each process."""
    part, *ignored = SHARED[how]
    x, t = samples(shape)
    middle = int(part * shape[0])
    slices = slice(0, middle), slice(middle, shape[0])
    generator = torch.Generator().manual_seed(1)
    for own, share in zip(slices, ignored, strict=True):
        t[own][torch.rand(t[own].shape, generator=generator) < share] = 255
    return x, t, slices


UPSAMPLED = list(itertools.product(["hem", "hem+"], [False, True]))


def coarse_logits():
    """Logits, and targets of more pixels."""
    x, t = samples((3, 5, 3, 4))[0], samples((3, 5, 8, 9))[1]
    return x, t.where(t > 1, 1)


def shared_losses(rank):
    """The loss of this process's share, and its gradient, for every loss."""
    found = {}
    for name, shape, how in itertools.product(LOSSES, SHAPES, SHARED):
        x, t, slices = shared_batch(shape, how)
        x = x[slices[rank]].requires_grad_()
        loss = make(name, ignore_index=255).share(x, t[slices[rank]], torch.distributed.group.WORLD)
        loss.backward()
        found[name, shape, how] = loss.detach(), x.grad
    for name, align_corners in UPSAMPLED:
        x, t = coarse_logits()
        loss = make(name, ignore_index=1).upsampled(
            x[rank::2], t[rank::2], align_corners, torch.distributed.group.WORLD
        )
        found[name, align_corners] = loss
    return found


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    worlds = Worlds(Functions({("shared_losses", 2): shared_losses}), tmp_path_factory.mktemp("worlds"))
    return worlds(2, "shared_losses")


@pytest.mark.parametrize("how", SHARED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_over_processes_is_the_loss_of_the_batch(shares, mesh, name, shape, how):
    criterion = make(name, ignore_index=255)
    x, t, slices = shared_batch(shape, how)
    x.requires_grad_()
    expected = criterion(x, t)
    torch.testing.assert_close(criterion.share(x, t, mesh.get_group()), expected)
    if name == "dice":  # no mean over samples: of each process's own, by their number
        counts = torch.stack([(t[own] != 255).sum() for own in slices])
        losses = torch.stack([criterion(x[own], t[own]) for own in slices])
        expected = (losses * counts).sum() / counts.sum().clamp(min=1)
    expected.backward()
    losses, gradients = zip(*(of_process[name, shape, how] for of_process in shares), strict=True)
    torch.testing.assert_close(sum(losses) / 2, expected.detach())
    torch.testing.assert_close(torch.cat(gradients) / 2, x.grad)
    assert (expected > 0) == (how != "all")


@pytest.mark.parametrize(("name", "align_corners"), UPSAMPLED)
def test_the_loss_of_upsampled_logits(shares, name, align_corners):
    x, t = coarse_logits()
    criterion = make(name, ignore_index=1)
    expected = criterion(F.interpolate(x, t.shape[1:], mode="bilinear", align_corners=align_corners), t)
    torch.testing.assert_close(criterion.upsampled(x, t, align_corners), expected)
    losses = [of_process[name, align_corners] for of_process in shares]
    assert losses[0] != losses[1]
    torch.testing.assert_close(sum(losses) / 2, expected)
