import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hem_ext.harness.attacks import autoattack, dlr, fgsm, pgd

EPS = 8 / 255


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


@pytest.mark.parametrize("objective", ["ce", "dlr"])
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
    # The ones that hold out are returned at the worst point there is.
    held = ~result.fooled
    worst = (model(result.images)[:, 0] - model(result.images)[:, 1]).abs()
    torch.testing.assert_close(worst[held], gap.abs()[held] - reach)


@pytest.mark.parametrize("objective", ["ce", "dlr"])
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


@pytest.mark.parametrize("objective", ["ce", "dlr"])
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
    assert not (result.images[~already] == images[~already]).flatten(1).all(1).any()


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


def test_dlr_of_equal_logits_is_finite():
    logits = torch.ones(2, 4, requires_grad=True)
    loss = dlr(logits, torch.tensor([0, 3]))
    loss.sum().backward()
    assert loss.tolist() == [0, 0]
    assert logits.grad.isfinite().all()


def test_dlr_needs_3_classes():
    with pytest.raises(ValueError, match="at least 3 classes, got 2"):
        pgd(linear(2), torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), EPS, objective="dlr")


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


def test_saturated_outputs_mask_cross_entropy_and_not_dlr():
    model = mlp()
    images, labels = batch(model, wrong=0)
    assert not fgsm(model, images, labels, EPS).zero_gradient.any()
    model[3].weight.data *= 1e4
    model[3].bias.data *= 1e4
    masked = fgsm(model, images, labels, EPS).zero_gradient
    assert masked.float().mean() > 0.5
    assert not fgsm(model, images, labels, EPS, objective="dlr").zero_gradient.any()


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
        ({"images": torch.full((1, 1, 4, 4), 1.5)}, r"in \[0, 1\]"),
        ({"images": torch.full((1, 1, 4, 4), torch.nan)}, r"in \[0, 1\]"),
        ({"eps": -0.1}, "not be negative, got -0.1"),
        ({"objective": "mse"}, "unknown objective 'mse': one of ce, dlr"),
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
    with pytest.raises(ImportError, match="pip install pyautoattack"):
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


@pytest.mark.usefixtures("_nothing_installed")
def test_autoattack_by_torchattacks(monkeypatch):
    model = linear(6)
    images, labels = torch.rand(7, 1, 4, 4), torch.arange(7) % 6
    calls = []

    def make(model, norm, eps, version, n_classes, seed):
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


@pytest.mark.usefixtures("_nothing_installed")
def test_a_broken_installation_is_not_hidden(monkeypatch, tmp_path):
    (tmp_path / "pyautoattack.py").write_text("import a_module_that_is_missing")
    monkeypatch.delitem(sys.modules, "pyautoattack")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_missing"):
        autoattack(linear(), torch.rand(1, 1, 4, 4), torch.tensor([0]), EPS)
