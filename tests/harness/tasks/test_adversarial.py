import sys
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from hem_ext.harness import data
from hem_ext.harness.attacks import Attack, fgsm, pgd
from hem_ext.harness.tasks import adversarial, base


def test_clean_and_fgsm_by_hand(run, kept, few_digits):
    values = run("adversarial", options={"images": None, "eps": [0.2]}, epochs=4)
    model, labels = kept(), few_digits.test.labels
    images = few_digits.test.images.clone().requires_grad_()
    logits = model(images)
    clean = logits.argmax(1) == labels
    assert values["clean_accuracy"] == pytest.approx(clean.double().mean().item())
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels), images)
    changed = (images + 0.05 * gradient.sign()).clamp(0, 1)
    right = clean & (model(changed).argmax(1) == labels)
    assert values["fgsm"] == pytest.approx(right.double().mean().item(), abs=1.5 / len(labels))

    assert values["worst_accuracy"] <= min(values["fgsm"], values["pgd_ce"], values["pgd_dlr"])
    assert max(values["fgsm"], values["pgd_ce"], values["pgd_dlr"]) < values["clean_accuracy"]
    assert values["worst_accuracy eps=0"] == values["clean_accuracy"]
    assert values["worst_accuracy eps=0.05"] == values["worst_accuracy"]
    assert values["worst_accuracy eps=0.2"] < values["worst_accuracy"]


def test_the_worst_is_sample_by_sample():
    images, blind = torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.bool)
    first, second = (Attack(images, torch.tensor(fooled), blind) for fooled in ([1, 0, 0, 0], [0, 0, 0, 1]))
    assert [adversarial._accuracy(*found) for found in ((first,), (second,), (first, second))] == [0.75, 0.75, 0.5]


def test_images_are_taken_evenly(run, few_digits, monkeypatch):
    seen = []

    def noted(network, images, labels, eps):
        seen.append((images, labels))
        return fgsm(network, images, labels, eps)

    monkeypatch.setattr(adversarial, "fgsm", noted)
    run("adversarial", options={"images": 20})
    assert torch.equal(seen[0][0], few_digits.test.images[::4])
    assert torch.equal(seen[0][1], few_digits.test.labels[::4])
    seen.clear()
    run("adversarial", options={"images": 1000})
    assert len(seen[0][1]) == len(few_digits.test)


def test_batches_are_put_together(run, monkeypatch):
    whole = run("adversarial")
    monkeypatch.setattr(adversarial, "BATCH", 15)
    parts = run("adversarial")
    assert parts["fgsm"] == pytest.approx(whole["fgsm"], abs=1.5 / 40)
    assert parts["clean_accuracy"] == whole["clean_accuracy"]


def test_what_is_attacked_is_what_the_loss_uses_at_test(run, monkeypatch):
    largest = []

    def noted(network, images, labels, eps, **options):
        largest.append(network(images).abs().max().item())
        return pgd(network, images, labels, eps, **options)

    monkeypatch.setattr(adversarial, "pgd", noted)
    run("adversarial", "ldam")
    assert min(largest) > 1  # LDAM's logits are cosines; at test they are used times 30


def test_zero_gradients_are_reported(run, monkeypatch):
    def blinded(network, images, labels, eps, **options):
        attack = pgd(network, images, labels, eps, **options)
        blind = options["objective"] == "ce" and eps == 0.05
        return attack._replace(zero_gradient=torch.arange(len(labels)) < (10 if blind else 0))

    monkeypatch.setattr(adversarial, "pgd", blinded)
    assert run("adversarial")["zero_gradient"] == 0.25


@pytest.mark.parametrize(("count", "ties"), [(40, 1), (999, 1), (1000, 2)])
def test_what_changes_at_eps_0_is_an_error_but_for_ties(run, monkeypatch, few_digits, count, ties):
    train, validation, test = few_digits.train, few_digits.validation, few_digits.test
    parts = train, validation, test.take(torch.arange(count) % len(test))
    monkeypatch.setitem(data.BUNDLED, "digits", (lambda: parts, {"classes": few_digits.classes}))
    monkeypatch.setattr(adversarial, "BATCH", 1000)

    def fooling(network, images, labels, eps, more):
        fooled = network(images).argmax(1) != labels
        if eps == 0:
            fooled[fooled.logical_not().nonzero()[:more]] = True
        return Attack(images, fooled, labels < 0)

    monkeypatch.setattr(adversarial, "fgsm", partial(fooling, more=ties))
    run("adversarial", options={"images": None})
    monkeypatch.setattr(adversarial, "fgsm", partial(fooling, more=ties + 1))
    with pytest.raises(RuntimeError, match=r"^images that were not changed gave another accuracy than the clean ones$"):
        run("adversarial", options={"images": None})


def test_a_bound_of_0_changes_nothing(run):
    values = run("adversarial", options={"at": 0})
    assert values["worst_accuracy"] == values["fgsm"] == values["clean_accuracy"]


def test_a_change_beyond_the_bound_is_an_error(run, monkeypatch):
    def far(network, images, labels, eps, **options):
        return Attack(images + 1.01 * eps, network(images).argmax(1) != labels, labels < 0)

    monkeypatch.setattr(adversarial, "pgd", far)
    with pytest.raises(RuntimeError, match=r"pgd_ce has changed a pixel by more than 0\.05"):
        run("adversarial")


STRONG = {"strong": True, "strong_images": 20, "strong_steps": 3, "strong_restarts": 1, "strong_queries": 10}
PER_ATTACK = ("pgd_ce", "pgd_dlr", "pgd_scaled", "square", "autoattack")


@pytest.fixture
def _few_steps(monkeypatch):
    """APGD and FAB take 10 steps instead of 100, or a network takes seconds."""
    import pyautoattack

    class Short(pyautoattack.AutoAttack):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            for attack in (self.apgd, self.apgd_targeted, self.fab):
                attack.n_iter = 10

    monkeypatch.setattr(pyautoattack, "AutoAttack", Short)


@pytest.mark.usefixtures("_few_steps")
def test_the_strong_attack_is_the_worst_of_all(run):
    values = run("adversarial", epochs=6, options={"images": None, **STRONG, "at": 0.1})
    strong = [values[f"strong {name}"] for name in PER_ATTACK]
    assert 0 < values["strong_accuracy"] <= min(strong)
    assert values["strong_accuracy"] <= values["strong cheap"] <= 1
    assert max(strong) <= 1
    assert values["strong autoattack"] <= values["strong square"]
    assert min(strong) < 1
    assert list(values)[:2] == ["worst_accuracy", "strong_accuracy"]


@pytest.fixture
def found(monkeypatch):
    """Which samples each attack is to fool: set `fools`; and what each was asked for, in `calls`."""

    class Found:
        fools, calls, change = {}, [], 0.0

        def attack(self, name, network, images, labels, **options):
            self.calls.append((name, len(labels), options))
            if options["eps"] == 0:
                return Attack(images, network(images).argmax(1) != labels, labels < 0)
            fooled = labels < 0
            fooled[self.fools.get(name, [])] = True
            return Attack(images + self.change, fooled, labels < 0)

    found = Found()
    found.fools, found.calls = {}, []
    short = {"ce": "pgd_ce", "dlr": "pgd_dlr", "margin": "pgd_margin", "scaled-ce": "pgd_scaled"}

    def pgd(network, images, labels, eps, *, objective, steps, **options):
        options |= {"eps": eps, "steps": steps, "objective": objective}
        return found.attack(f"{steps} {short[objective]}", network, images, labels, **options)

    def auto(network, images, labels, *, attacks, **options):
        return found.attack(attacks[0], network, images, labels, attacks=attacks, **options)

    monkeypatch.setattr(adversarial, "fgsm", partial(found.attack, "fgsm"))
    monkeypatch.setattr(adversarial, "pgd", pgd)
    monkeypatch.setattr(adversarial, "_autoattack", auto)
    return found


def test_each_strong_value_is_that_of_its_attack_and_autoattacks_is_with_square(run, found):
    found.fools |= {
        "fgsm": [0],  # of 40 images, of which every other is one of the strong attack's
        "3 pgd_ce": [2, 3],
        "9 pgd_ce": [1],
        "9 pgd_dlr": [2, 3],
        "9 pgd_scaled": [3],
        "square": [5, 6, 7],
        "apgd-ce": [7, 8],
    }
    values = run("adversarial", options={**STRONG, "strong_steps": 9})
    assert {name for name, count, _ in found.calls if count == 20} == found.fools.keys() - {"fgsm", "3 pgd_ce"}
    left = [values["strong cheap"], *(values[f"strong {name}"] for name in PER_ATTACK), values["strong_accuracy"]]
    assert [20 - 20 * value for value in left] == pytest.approx([2, 1, 2, 1, 3, 4, 8])
    assert values["worst_accuracy"] == 37 / 40


def test_the_strong_attack_gets_its_options(run, found):
    options = {"at": 0.07, "strong_steps": 9, "strong_restarts": 4, "strong_queries": 11, "strong_images": 7}
    run("adversarial", seed=2, options={**STRONG, **options})
    strong = [(name, options) for name, count, options in found.calls if count == 7]
    assert [options["eps"] for _, options in strong] == [0.07] * 5
    assert [options["restarts"] for name, options in strong if "pgd_" in name] == [4] * 3
    assert [options["attacks"] for name, options in strong[3:]] == [("square",), ("apgd-ce", "apgd-t", "fab-t")]
    assert [(options["queries"], options["seed"]) for name, options in strong[3:]] == [(11, 2)] * 2


def test_the_images_of_the_strong_attack_are_some_of_the_others(run, found, few_digits, monkeypatch):
    seen, attack = [], adversarial._attack

    def noted(methods, images, labels, eps, device):
        seen.append(images)
        return attack(methods, images, labels, eps, device)

    monkeypatch.setattr(adversarial, "_attack", noted)
    run("adversarial", options={**STRONG, "strong_images": 10})
    assert torch.equal(seen[0], few_digits.test.images[::2])
    assert torch.equal(seen[-1], few_digits.test.images[::8])


@pytest.mark.parametrize(
    ("loss", "seed", "given", "expected"),
    [
        ("hem", 0, {}, True),
        ("hem", 1, {}, True),
        ("hem", 2, {}, False),
        ("focal", 0, {}, False),
        ("hem", 0, {"strong": False}, False),
        ("focal", 0, {"strong_losses": ["focal"]}, True),
    ],
)
def test_which_cells_have_the_strong_attack(run, found, loss, seed, given, expected):
    values = run("adversarial", loss, seed, options={**STRONG, "strong_seeds": 2, **given})
    assert ("strong_accuracy" in values) is expected
    assert any(name.startswith("strong ") for name in values) is expected
    assert any(count == 20 for _, count, _ in found.calls) is expected


def test_settings_are_chosen_without_the_strong_attack(run, found, few_digits):
    values = run("adversarial", options={**STRONG, "images": None, "eps": [0.2]}, part="validation")
    assert "strong_accuracy" not in values
    assert {options["eps"] for _, _, options in found.calls} == {0, 0.05}
    assert {count for _, count, _ in found.calls} == {len(few_digits.validation)}


def test_the_strong_attack_is_held_to_its_bounds_too(run, found, monkeypatch):
    def far(network, images, labels, *, eps, **options):
        return Attack(images + 1.01 * eps, labels < 0, labels < 0)

    monkeypatch.setattr(adversarial, "_autoattack", far)
    with pytest.raises(RuntimeError, match=r"square has changed a pixel by more than 0\.05"):
        run("adversarial", options=STRONG)


@pytest.mark.parametrize("change", [-1e-3, 1e-3])  # of black pixels, or of white ones
def test_images_outside_their_range_are_an_error(run, found, change):
    found.change = change
    with pytest.raises(RuntimeError, match=r"fgsm has left the images' range \[0, 1\]"):
        run("adversarial", options={"eps": [], "at": 0.05})


@pytest.fixture
def classes(monkeypatch, few_digits):
    """Leave so many of the digits."""

    def classes(count):
        parts = [
            split.take(split.labels < count) for split in (few_digits.train, few_digits.validation, few_digits.test)
        ]
        about = {"classes": few_digits.classes[:count]}
        monkeypatch.setitem(data.BUNDLED, "digits", (lambda: parts, about))
        base._load_data.cache_clear()

    return classes


@pytest.mark.usefixtures("_few_steps")
@pytest.mark.parametrize("count", [2, 3])
def test_few_classes(run, classes, count):
    classes(count)
    values = run("adversarial", epochs=3, options={**STRONG, "at": 0.2})
    assert values["strong_accuracy"] <= min(values[f"strong {name}"] for name in PER_ATTACK) < 1
    assert values["clean_accuracy"] > 0.5


@pytest.mark.parametrize(("count", "dlr", "ensemble"), [(2, "margin", 2), (3, "dlr", 2), (4, "dlr", 3)])
def test_what_few_classes_cannot_have_has_another_in_its_place_and_that_is_said(
    run, found, classes, count, dlr, ensemble
):
    classes(count)
    run("adversarial", options=STRONG)
    objectives = {options["objective"] for _, _, options in found.calls if "objective" in options}
    assert objectives == {"ce", dlr, "scaled-ce"}
    assert found.calls[-1][2]["attacks"] == [(), (), ("apgd-ce", "fab"), ("apgd-ce", "apgd-t", "fab-t")][ensemble]
    task = adversarial.Adversarial()
    notes = [task.notes(task.cell("hem", seed, quick=True, options=STRONG)) for seed in (0, 9)]
    expected = {
        2: ["pgd_dlr is PGD on the margin", "it is apgd-ce, fab, square alone"],
        3: ["it is apgd-ce, fab, square alone"],
        4: [],
    }[count]
    for said, words in zip(notes[0], expected, strict=True):
        assert said.endswith(words)
    assert len(notes[1]) == (count == 2)  # without the strong attack


def test_one_class_is_refused(run, classes, trained):
    classes(1)
    with pytest.raises(ValueError, match="adversarial needs at least 2 classes, digits has 1"):
        run("adversarial", "ce")
    assert not trained


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.3}, "eps must be a list, got 0.3"),
        ({"at": -1}, "none below 0, got -1"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"restarts": 1.5}, "restarts must be a whole number, got 1.5"),
        ({"images": 0}, "images must be a whole number of at least 1, got 0"),
        ({"strong_images": None}, "strong_images must be a whole number, got None"),
        ({"strong_steps": "9"}, "strong_steps must be a whole number, got '9'"),
        ({"strong_restarts": True}, "strong_restarts must be a whole number, got True"),
        ({"strong_queries": -5}, "strong_queries must be a whole number of at least 1, got -5"),
        ({"strong_seeds": -1}, "strong_seeds must be a whole number of at least 0, got -1"),
        ({"strong": 1}, "strong must be true or false, got 1"),
        ({"strong_losses": "hem"}, "strong_losses must be a list, got 'hem'"),
        ({"strong_losses": ["hems"]}, r"strong_losses must be a list of losses, some of ce, .*, got \['hems'\]"),
    ],
)
def test_wrong_options_are_found_before_training(run, trained, options, message):
    with pytest.raises(ValueError, match=message):
        run("adversarial", options=options)
    assert not trained


def test_the_package_is_missed_before_training(run, trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match="pip install pyautoattack"):
        run("adversarial", options=STRONG)
    assert not trained
    assert run("adversarial", options={**STRONG, "strong_seeds": 0})["clean_accuracy"] > 0


def test_another_package_does_not_do(run, trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    monkeypatch.setitem(sys.modules, "torchattacks", ModuleType("torchattacks"))  # which has whole versions alone
    with pytest.raises(ImportError, match="pip install pyautoattack"):
        run("adversarial", options=STRONG)
    assert not trained


@pytest.mark.usefixtures("_few_steps")
def test_the_scale_of_the_logits_makes_no_difference_to_the_strong_attack(run, monkeypatch):
    class Scaled(base.AtTest):
        factor = 1.0

        def forward(self, images):
            return self.factor * super().forward(images)

    monkeypatch.setattr(adversarial, "AtTest", Scaled)
    found = []
    for factor in (1.0, 1e-3, 1e3):
        monkeypatch.setattr(Scaled, "factor", factor)
        options = {**STRONG, "images": None, "strong_images": 80, "at": 0.1, "strong_steps": 10, "strong_queries": 100}
        found.append(run("adversarial", epochs=6, options=options))
    for name in ("strong_accuracy", "strong pgd_dlr", "strong pgd_scaled"):
        assert found[1][name] == pytest.approx(found[0][name], abs=1.5 / 80)
        assert found[2][name] == pytest.approx(found[0][name], abs=1.5 / 80)
    assert found[0]["strong_accuracy"] < found[0]["clean_accuracy"]
    assert found[2]["strong pgd_ce"] > found[0]["strong pgd_scaled"] + 0.1  # which alone would be taken in
