import math
import sys
from types import ModuleType

import pyautoattack
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hem_ext.harness.attacks import (
    OBJECTIVES,
    VERSIONS,
    autoattack,
    autoattack_package,
    dlr,
    fgsm,
    margin,
    pgd,
    scaled_cross_entropy,
)

EPS = 8 / 255
BY_ITS_VALUE = ["ce", "dlr", "margin"]  # the objectives that grow as a sample comes nearer to being misclassified


def linear(num_classes=4, pixels=16):
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, num_classes).requires_grad_(False))


def mlp(num_classes=5):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, num_classes))


def batch(model, count=200, wrong=20):
    """Images with the labels the model gives them, but for the first few."""
    images = torch.rand(count, 1, 4, 4)
    logits = model(images)
    labels = logits.argmax(1)
    labels[:wrong] = logits.argmin(1)[:wrong]
    return images, labels


def accuracy(model, images, labels):
    return (model(images).argmax(1) == labels).float().mean()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_a_linear_model_is_fooled_wherever_it_can_be(attack, objective):
    # Of two classes that differ by (v, b), |v| sums what eps can shift; a third class is out of reach.
    model = linear(3)
    weight, bias = model[1].weight, model[1].bias
    weight[2], bias[2] = 0, -100
    bias[0] = bias[1] - 0.5 * (weight[0] - weight[1]).sum()
    images = 0.2 + 0.6 * torch.rand(500, 1, 4, 4)  # [0, 1] is farther away than eps
    labels = model(images).argmax(1)
    gap = model(images)[:, 0] - model(images)[:, 1]
    eps = 0.05
    reach = eps * (weight[0] - weight[1]).abs().sum()
    possible = gap.abs() < reach
    assert 0.1 < possible.float().mean() < 0.9
    options = {} if attack is fgsm else {"steps": 10}
    result = attack(model, images, labels, eps, objective=objective, **options)
    assert torch.equal(result.fooled, possible)
    if objective not in BY_ITS_VALUE:
        return
    # The ones that hold out are returned at the worst point there is.
    held = ~result.fooled
    worst = (model(result.images)[:, 0] - model(result.images)[:, 1]).abs()
    torch.testing.assert_close(worst[held], gap.abs()[held] - reach)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_pgd_is_not_worse_than_fgsm(objective):
    model = mlp()
    images, labels = batch(model)
    one_step = fgsm(model, images, labels, 0.1, objective=objective).fooled
    many_steps = pgd(model, images, labels, 0.1, objective=objective).fooled
    assert 20 < one_step.sum() <= many_steps.sum() < 200


def test_restarts_help_and_who_is_fooled_stays_fooled():
    model = mlp()
    images, labels = batch(model)
    once, often = (
        pgd(model, images, labels, 0.3, steps=0, restarts=n, generator=torch.Generator().manual_seed(0)).fooled
        for n in (1, 10)
    )
    assert 20 < once.sum() < often.sum() < 200
    assert (once <= often).all()


def test_who_holds_out_is_returned_at_the_largest_objective():
    model = linear(3)
    model[1].bias[0] = 100  # not to be fooled
    images, labels = 0.2 + 0.6 * torch.rand(50, 1, 4, 4), torch.zeros(50, dtype=torch.int64)

    def search(restarts, generator):
        result = pgd(model, images, labels, 0.1, objective="dlr", steps=0, restarts=restarts, generator=generator)
        return dlr(model(result.images), labels)

    generator = torch.Generator().manual_seed(0)
    alone = torch.stack([dlr(model(images), labels)] + [search(1, generator) for _ in range(4)])
    assert len(alone.argmax(0).unique()) > 1
    torch.testing.assert_close(search(4, generator.manual_seed(0)), alone.amax(0))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("attack", [fgsm, pgd])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_returned_is_within_the_bounds_and_is_what_was_judged(attack, objective, dtype):
    model = mlp().to(dtype)
    images, labels = batch(mlp())
    images = images.to(dtype)
    images[:50] = images[:50].round()  # at the ends of [0, 1]
    result = attack(model, images, labels, EPS, objective=objective)
    assert result.images.dtype == dtype
    assert (result.images.double() - images.double()).abs().max() <= EPS
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    assert torch.equal(model(result.images).argmax(1) != labels, result.fooled)
    already = model(images).argmax(1) != labels
    assert 0 < already.sum() < len(labels)
    assert torch.equal(result.images[already], images[already])
    moved = (result.images != images).flatten(1).any(1)
    assert (moved | already)[result.fooled].all()
    if objective in BY_ITS_VALUE:
        assert moved[~already].all()


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_eps_0_is_the_clean_accuracy(attack):
    model = mlp()
    images, labels = batch(model)
    result = attack(model, images, labels, 0.0)
    assert torch.equal(result.images, images)
    assert 1 - result.fooled.float().mean() == accuracy(model, images, labels) == 0.9


def test_accuracy_falls_with_eps():
    model = mlp()
    images, labels = batch(model)
    fooled = [pgd(model, images, labels, eps, objective="dlr").fooled.sum() for eps in (0, 0.02, 0.05, 0.1, 0.3)]
    assert fooled == sorted(fooled)
    assert fooled[0] < fooled[-1]


def test_the_random_start_depends_on_the_generator_alone():
    model = mlp()
    images, labels = batch(model)

    def run(seed):
        return pgd(model, images, labels, EPS, steps=1, step_size=0.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(run(0).images, run(0).images)
    assert not torch.equal(run(0).images, run(1).images)


class Calls(nn.Module):
    """Keeps what a network is called with."""

    def __init__(self, model):
        super().__init__()
        self.model, self.inputs = model, []

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        return self.model(x)


class Constant(nn.Module):
    """A network that does not look at its images."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.logits = nn.Parameter(torch.arange(num_classes).flip(0).double())

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def test_how_often_the_network_is_called():
    images, labels = torch.rand(1, 1, 4, 4).double(), torch.zeros(1, dtype=torch.int64)
    for attack, options, calls in (
        (fgsm, {}, 2),
        (pgd, {}, 1 + 21),
        (pgd, {"steps": 3, "restarts": 2}, 1 + 2 * 4),
        (pgd, {"labels": labels + 1}, 1),  # fooled before
    ):
        model = Calls(Constant())
        result = attack(model, images, options.pop("labels", labels), EPS, **options)
        assert len(model.inputs) == calls
        assert torch.equal(result.images, images)  # nothing is better than the clean one
        assert result.zero_gradient.tolist() == [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bound_that_is_a_number_of_the_dtype_is_reached(dtype):
    images = torch.full((4, 1, 4, 4), 0.5, dtype=dtype)
    model = linear(3).to(dtype)
    found = fgsm(model, images, model(images).argmax(1), 0.25).images
    assert found.unique().tolist() == [0.25, 0.75]


def test_pgd_starts_anywhere_in_the_ball_in_the_dtype_of_the_images():
    model = Calls(Constant())
    images, labels = 0.25 + 0.5 * torch.rand(5, 2, 4, 4).double(), torch.zeros(5, dtype=torch.int64)
    result = pgd(model, images, labels, 0.1, steps=0, generator=torch.Generator().manual_seed(3))
    noise = 2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 1
    torch.testing.assert_close(model.inputs[1], images + 0.1 * noise, rtol=0, atol=1e-15)
    assert result.zero_gradient.tolist() == [True] * 5


@pytest.mark.parametrize("steps", [1, 5])
def test_the_steps_of_pgd_can_cross_the_ball(steps):
    model = mlp()
    images, labels = batch(model, wrong=0)

    def attacked(**options):
        calls = Calls(model)
        pgd(calls, images, labels, 1e-3, steps=steps, generator=torch.Generator().manual_seed(3), **options)
        return calls.inputs

    for found, expected in zip(attacked(), attacked(step_size=2.5e-3 / steps), strict=True):
        assert torch.equal(found, expected)


def test_pgd_walks_from_a_random_start_in_steps_of_step_size():
    model = linear(3)
    model[1].bias[0] = 100  # not to be fooled
    images, labels = 0.2 + 0.6 * torch.rand(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64)

    def run(steps):
        generator = torch.Generator().manual_seed(0)
        return pgd(model, images, labels, 0.1, objective="dlr", steps=steps, step_size=1e-3, generator=generator).images

    # The rest of the walk is only kept where it is worse than the clean image, so that the start may not be.
    start, end = run(0), run(40)
    kept = (start != images).flatten(1).any(1)
    assert kept.any()
    assert (start - images)[kept].amin() < -0.09
    assert (start - images)[kept].amax() > 0.09
    assert 0.03 < (end - start)[kept].abs().max() <= 0.04 + 1e-6


def by_hand(z, y):
    ordered = sorted(z, reverse=True)
    return -(z[y] - max(v for i, v in enumerate(z) if i != y)) / (ordered[0] - ordered[2])


@pytest.mark.parametrize("num_classes", [3, 4, 10])
def test_dlr_is_the_formula_and_blind_to_scale_and_shift(num_classes):
    logits, labels = torch.randn(50, num_classes, dtype=torch.float64), torch.randint(num_classes, (50,))
    loss = dlr(logits, labels)
    assert loss.tolist() == pytest.approx([by_hand(z, y) for z, y in zip(logits.tolist(), labels, strict=True)])
    assert torch.equal(loss > 0, logits.argmax(1) != labels)
    torch.testing.assert_close(dlr(1e-3 * logits + 5, labels), loss)


def test_dlr_of_logits_that_are_nearly_equal():
    found = dlr(torch.tensor([[0.0, -1e-12, -2e-12]]).double(), torch.tensor([0]))
    torch.testing.assert_close(found, torch.tensor([-1 / 3]).double())


def test_dlr_of_equal_logits_is_finite():
    logits = torch.ones(2, 4, requires_grad=True)
    loss = dlr(logits, torch.tensor([0, 3]))
    loss.sum().backward()
    assert loss.tolist() == [0, 0]
    assert logits.grad.isfinite().all()


def test_dlr_needs_3_classes():
    with pytest.raises(ValueError, match="at least 3 classes, got 2: use the objective 'margin'"):
        pgd(linear(2), torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), EPS, objective="dlr")


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_margin_is_the_formula(num_classes):
    logits, labels = torch.randn(50, num_classes), torch.randint(num_classes, (50,))
    by_hand = [max(v for i, v in enumerate(z) if i != y) - z[y] for z, y in zip(logits.tolist(), labels, strict=True)]
    assert margin(logits, labels).tolist() == pytest.approx(by_hand)


def scaled_by_hand(z, y):
    gap = abs(z[y] - max(v for i, v in enumerate(z) if i != y))
    exponents = [2 * (v - z[y]) / gap for v in z]
    return math.log(sum(map(math.exp, exponents)))


def gradient_of(objective, logits, labels):
    logits = logits.clone().requires_grad_()
    objective(logits, labels).sum().backward()
    return logits.grad


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_scaled_cross_entropy_is_the_formula_and_its_scale_is_a_constant(num_classes):
    logits, labels = torch.randn(50, num_classes, dtype=torch.float64), torch.randint(num_classes, (50,))
    by_hand = [scaled_by_hand(z, y) for z, y in zip(logits.tolist(), labels, strict=True)]
    assert scaled_cross_entropy(logits, labels).tolist() == pytest.approx(by_hand)
    gap = margin(logits, labels).abs().unsqueeze(1)
    expected = ((2 * logits / gap).softmax(1) - F.one_hot(labels, num_classes)) * 2 / gap
    torch.testing.assert_close(gradient_of(scaled_cross_entropy, logits, labels), expected)


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_scaled_cross_entropy_is_blind_to_scale_and_shift(factor):
    logits, labels = torch.randn(50, 10, dtype=torch.float64), torch.arange(50) % 10
    changed = factor * logits + 7
    torch.testing.assert_close(scaled_cross_entropy(changed, labels), scaled_cross_entropy(logits, labels))
    gradient = gradient_of(scaled_cross_entropy, changed, labels)
    torch.testing.assert_close(factor * gradient, gradient_of(scaled_cross_entropy, logits, labels))


def test_scaled_cross_entropy_has_the_share_of_the_next_class_whatever_there_is():
    # One-hot outputs of 1000 classes, where cross-entropy's gradient is exactly zero.
    logits, labels = 1e3 * torch.eye(1000)[:2], torch.tensor([0, 1])
    logits[:, 500] = 100.0
    assert not gradient_of(OBJECTIVES["ce"], logits, labels).any()
    gradient = gradient_of(scaled_cross_entropy, logits, labels)
    assert (gradient[:, 500] > 0).all()
    assert (gradient.argmin(1) == labels).all()
    assert (gradient.argmax(1) == 500).all()


@pytest.mark.parametrize("num_classes", [2, 10])
def test_scaled_cross_entropy_of_a_tie_is_finite(num_classes):
    logits = torch.tensor([[5.0, 5.0], [1e4, 1e4]]).repeat(1, num_classes // 2)
    gradient = gradient_of(scaled_cross_entropy, logits, torch.tensor([0, 1]))
    assert gradient.isfinite().all()
    assert (gradient.argmin(1) == torch.tensor([0, 1])).all()


@pytest.mark.parametrize("objective", ["dlr", "margin", "scaled-ce"])
@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_who_is_fooled_does_not_depend_on_the_scale_of_the_logits(objective, factor):
    model = mlp()
    images, labels = batch(model)

    def fooled():
        return pgd(model, images, labels, 0.1, objective=objective, generator=torch.Generator().manual_seed(0)).fooled

    before = fooled()
    assert 20 < before.sum() < 200
    model[3].weight.data *= factor
    model[3].bias.data *= factor
    assert torch.equal(fooled(), before)


@pytest.mark.parametrize("objective", ["margin", "scaled-ce"])
def test_two_classes_are_fooled_wherever_they_can_be(objective):
    model = linear(2)
    model[1].bias += torch.tensor([0, 0.5]) * (model[1].weight[0] - model[1].weight[1]).sum()
    model[1].weight *= 1e4  # cross-entropy would be blind
    model[1].bias *= 1e4
    images = 0.2 + 0.6 * torch.rand(200, 1, 4, 4)
    logits = model(images)
    reach = 0.05 * (model[1].weight[0] - model[1].weight[1]).abs().sum()
    possible = (logits[:, 0] - logits[:, 1]).abs() < reach
    assert 0.1 < possible.float().mean() < 0.9
    assert torch.equal(pgd(model, images, logits.argmax(1), 0.05, objective=objective).fooled, possible)
    assert not torch.equal(pgd(model, images, logits.argmax(1), 0.05).fooled, possible)


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_a_constant_model_gives_no_gradient(attack):
    model = linear(3)
    model[1].weight.zero_()
    model[1].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    labels = torch.arange(9) % 3
    result = attack(model, torch.rand(9, 1, 4, 4), labels, 0.1)
    assert result.zero_gradient.all()
    assert torch.equal(result.fooled, labels != 1)


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_a_gradient_that_is_not_a_number_does_not_spoil_the_image(attack):
    class Broken(nn.Module):
        def forward(self, x):
            zero = (0 * x).sqrt().flatten(1).sum(1, keepdim=True)  # whose derivative is 0 / 0
            return zero + torch.tensor([1.0, 0.0, -1.0])

    result = attack(Broken(), torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64), 0.1, objective="dlr")
    assert result.images.isfinite().all()
    assert result.zero_gradient.all()
    assert not result.fooled.any()


def test_saturated_outputs_mask_cross_entropy_alone():
    model = mlp()
    images, labels = batch(model, wrong=0)
    assert not fgsm(model, images, labels, EPS).zero_gradient.any()
    model[3].weight.data *= 1e4
    model[3].bias.data *= 1e4
    masked = fgsm(model, images, labels, EPS).zero_gradient
    assert masked.float().mean() > 0.5
    for objective in ("dlr", "margin", "scaled-ce"):
        assert not fgsm(model, images, labels, EPS, objective=objective).zero_gradient.any()


def test_one_gradient_is_enough_to_be_unmasked():
    class Plateau(nn.Module):
        """Flat at the grey of the clean images, sloping beside it."""

        def forward(self, x):
            slope = (x - 0.5).pow(2).flatten(1).sum(1)
            return torch.stack([1 - slope, slope * 0, slope * 0 - 1], dim=1)

    images, labels = torch.full((4, 1, 2, 2), 0.5), torch.zeros(4, dtype=torch.int64)
    assert fgsm(Plateau(), images, labels, 0.1).zero_gradient.all()
    assert not pgd(Plateau(), images, labels, 0.1).zero_gradient.any()


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_the_model_is_left_as_it_was(attack):
    model = nn.Sequential(nn.Conv2d(1, 3, 4), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten())
    model.train()
    model[1].eval()  # frozen on purpose
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    model.register_forward_hook(lambda module, *_: seen.append(any(m.training for m in module.modules())))
    attack(model, torch.rand(6, 1, 4, 4), torch.arange(6) % 3, EPS)
    assert seen
    assert not any(seen)
    assert [module.training for module in model] == [True, False, True, True]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_mode_comes_back_after_an_error():
    model = mlp().train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fgsm(model, torch.rand(2, 1, 5, 5), torch.tensor([0, 1]), EPS)
    assert model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": torch.full((1, 1, 4, 4), 1.5)},
            r"^images must be in \[0, 1\]: put their normalisation into the model$",
        ),
        ({"images": torch.full((1, 1, 4, 4), torch.nan)}, r"in \[0, 1\]"),
        ({"eps": -0.1}, "not be negative, got -0.1"),
        ({"objective": "mse"}, "unknown objective 'mse': one of ce, dlr, margin, scaled-ce"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"images": torch.rand(1, 1, 4, 4), "labels": torch.tensor([0]), "eps": EPS} | change
    with pytest.raises(ValueError, match=message):
        pgd(linear(), **arguments)


@pytest.fixture
def _nothing_installed(monkeypatch):
    for name in ("pyautoattack", "torchattacks"):
        monkeypatch.setitem(sys.modules, name, None)


def install(monkeypatch, name, attack):
    module = ModuleType(name)
    module.AutoAttack = attack
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("_nothing_installed")
def test_autoattack_says_what_to_install():
    words = (
        "AutoAttack needs one of the packages pyautoattack and torchattacks: pip install pyautoattack, or pip install "
        "--no-deps torchattacks, whose dependencies would replace the installed torch"
    )
    with pytest.raises(ImportError, match=f"^{words}$"):
        autoattack_package()
    with pytest.raises(ImportError, match=f"^{words}$"):
        autoattack(linear(), torch.rand(1, 1, 4, 4), torch.tensor([0]), EPS)


@pytest.mark.parametrize(("version", "num_classes"), [("standard", 4), ("standard", 12), ("rand", 4)])
def test_autoattack_by_its_authors(version, num_classes):
    model = linear(num_classes).train()
    images = torch.rand(12, 1, 4, 4)
    labels = model(images).argmax(1)
    eps = 0.05
    found = autoattack(model, images, labels, eps, version=version, seed=3, batch_size=5)
    assert model.training
    assert (found.double() - images.double()).abs().max() <= eps
    assert found.min() >= 0
    assert found.max() <= 1
    # Of a linear network the strongest attack is known: along the signs of a difference of weights.
    weight, logits = model[1].weight, model(images)
    gap = logits.gather(1, labels[:, None]) - logits
    reach = eps * (weight[labels][:, None] - weight).abs().sum(2)
    certain = (gap >= reach).logical_or(F.one_hot(labels, num_classes).bool()).all(1)
    fooled = model(found).argmax(1) != labels
    assert not (fooled & certain).any()
    assert fooled.any()
    if version == "rand":  # the quickest
        assert torch.equal(found, autoattack(model, images, labels, eps, version=version, seed=3, batch_size=5))


@pytest.mark.parametrize(("version", "restarts", "gradients"), [("standard", 1, 1), ("plus", 5, 1), ("rand", 1, 20)])
def test_autoattack_has_the_constants_of_its_version(monkeypatch, version, restarts, gradients):
    runs = []

    def run(attack, images, labels, batch_size):
        runs.append((attack.attacks_to_run, attack.apgd.n_restarts, attack.apgd.eot_iter, batch_size))
        return images, labels

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", run)
    images = torch.rand(2, 1, 4, 4)
    assert torch.equal(autoattack(linear(), images, torch.tensor([0, 1]), EPS, version=version), images)
    assert runs == [(list(VERSIONS[version]), restarts, gradients, 250)]


def counted(model):
    """How often it was asked for logits, and for how many images."""
    sizes = []
    model.register_forward_hook(lambda _, inputs, output: sizes.append(len(inputs[0])))
    return sizes


def test_square_alone_asks_for_logits_as_often_as_it_may():
    model = mlp()
    images, labels = batch(model)
    few, many = (autoattack(model, images, labels, 0.1, attacks=["square"], queries=n) for n in (3, 100))
    assert (many - images).abs().max() <= 0.1
    fooled = [(model(found).argmax(1) != labels).sum() for found in (few, many)]
    assert 20 < fooled[0] < fooled[1] < 200
    sizes = counted(model)
    model[3].bias.data[0] = 1e3  # nobody is fooled
    labels = torch.zeros_like(labels)
    autoattack(model, images, labels, 0.1, attacks=["square"], queries=0)
    others = len(sizes)
    sizes.clear()
    autoattack(model, images, labels, 0.1, attacks=["square"], queries=20)
    assert len(sizes) == others + 20


def test_square_looks_at_no_gradient():
    class Stairs(nn.Module):
        def forward(self, x):
            slope = (20 * x).round().flatten(1).sum(1)
            return torch.stack([slope, 320 - slope, slope * 0 - 1e3], dim=1)

    images = 0.2 + 0.6 * torch.rand(30, 1, 4, 4)
    labels = Stairs()(images).argmax(1)
    blind = pgd(Stairs(), images, labels, 0.1, objective="margin", steps=5)
    assert blind.zero_gradient.all()
    assert blind.fooled.float().mean() < 0.5
    found = autoattack(Stairs(), images, labels, 0.1, attacks=["square"], queries=500)
    assert (Stairs()(found).argmax(1) != labels).float().mean() > 0.9


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("attack", ["apgd-ce", "fab", "fab-t", "square"])
def test_few_classes_have_attacks_of_their_own(num_classes, attack):
    model = linear(num_classes)
    images = 0.2 + 0.6 * torch.rand(40, 1, 4, 4)
    model[1].bias -= model(images).mean(0)
    weight, logits = model[1].weight, model(images)
    labels = logits.argmax(1)
    found = autoattack(model, images, labels, 0.02, attacks=[attack], queries=1000)
    assert (found.double() - images.double()).abs().max() <= 0.02
    gap = logits.gather(1, labels[:, None]) - logits
    reach = 0.02 * (weight[labels][:, None] - weight).abs().sum(2)
    possible = ((gap < reach) & ~F.one_hot(labels, num_classes).bool()).any(1)
    fooled = model(found).argmax(1) != labels
    assert 0 < possible.sum() < 40
    assert not (fooled & ~possible).any()
    assert fooled.sum() >= (0.5 if attack == "square" else 0.8) * possible.sum()


@pytest.mark.parametrize(
    ("num_classes", "options", "message"),
    [
        (3, {}, "apgd-t of AutoAttack needs at least 4 classes, got 3: give attacks that need fewer"),
        (2, {"version": "rand"}, "apgd-dlr of AutoAttack needs at least 3 classes, got 2"),
        (4, {"version": "best"}, "unknown version 'best' of AutoAttack: one of standard, plus, rand"),
        (4, {"attacks": ["cw", "square", "pgd"]}, "some of apgd-ce, .*square, got cw, pgd$"),
        (4, {"attacks": []}, "some of apgd-ce, .*square, got none"),
        (4, {"eps": -1.0}, "not be negative"),
    ],
)
def test_wrong_arguments_of_autoattack(num_classes, options, message):
    arguments = {"eps": EPS} | options
    with pytest.raises(ValueError, match=message):
        autoattack(linear(num_classes), torch.rand(2, 1, 4, 4), torch.tensor([0, 1]), **arguments)


def test_autoattack_leaves_torchs_random_numbers_as_they_were():
    model = linear()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    images = torch.full((2, 1, 4, 4), 0.5)
    autoattack(model, images, model(images).argmax(1), EPS, attacks=["square"], queries=5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.usefixtures("_nothing_installed")
@pytest.mark.parametrize("options", [{"attacks": ["square"]}, {"queries": 10}])
def test_single_attacks_need_the_authors_package(monkeypatch, options):
    install(monkeypatch, "torchattacks", lambda *_, **__: None)
    words = "attacks and queries of AutoAttack need the package pyautoattack: pip install pyautoattack"
    with pytest.raises(ImportError, match=f"^{words}$"):
        autoattack(linear(), torch.rand(1, 1, 4, 4), torch.tensor([0]), EPS, **options)


@pytest.mark.usefixtures("_nothing_installed")
def test_autoattack_by_torchattacks(monkeypatch):
    model = linear(6)
    images, labels = torch.rand(7, 1, 4, 4), torch.arange(7) % 6
    calls = []

    def make(given, norm, eps, version, n_classes, seed):
        assert given is model
        calls.append((norm, eps, version, n_classes, seed))

        def attack(x, y):
            calls.append(len(x))
            return x - F.one_hot(y, 16).view_as(x)

        return attack

    install(monkeypatch, "torchattacks", make)
    result = autoattack(model, images, labels, EPS, version="rand", batch_size=5)
    assert calls == [("Linf", EPS, "rand", 6, 0), 5, 2]
    expected = (images - EPS * F.one_hot(labels, 16).view_as(images)).clamp(min=0)
    torch.testing.assert_close(result, expected)
    calls.clear()
    autoattack(model, torch.rand(251, 1, 4, 4), torch.arange(251) % 6, EPS)
    assert calls == [("Linf", EPS, "standard", 6, 0), 250, 1]
    assert autoattack_package() is sys.modules["torchattacks"]
    with pytest.raises(ValueError, match="shorter"):
        autoattack(model, images, labels[:5], EPS, batch_size=5)


@pytest.mark.usefixtures("_nothing_installed")
def test_a_broken_installation_is_not_hidden(monkeypatch, tmp_path):
    (tmp_path / "pyautoattack.py").write_text("import a_module_that_is_missing")
    monkeypatch.delitem(sys.modules, "pyautoattack")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_missing"):
        autoattack(linear(), torch.rand(1, 1, 4, 4), torch.tensor([0]), EPS)
