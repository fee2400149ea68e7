import pytest
import torch
import torch.nn.functional as F

from hem_ext.harness.attacks import Attack, fgsm, pgd
from hem_ext.harness.tasks import adversarial


def test_clean_and_fgsm_by_hand(run, kept, few_digits):
    values = run("adversarial", options={"images": None, "at": 0.05, "eps": [0.2]}, epochs=4)
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
        blind = options["objective"] == "ce" and eps == 0.1
        return attack._replace(zero_gradient=torch.arange(len(labels)) < (10 if blind else 0))

    monkeypatch.setattr(adversarial, "pgd", blinded)
    assert run("adversarial")["zero_gradient"] == 0.25


def test_a_change_at_eps_0_is_an_error(run, monkeypatch):
    def fooling(network, images, labels, eps):
        wrong = torch.ones(len(labels), dtype=torch.bool)
        return Attack(images, wrong, wrong)

    monkeypatch.setattr(adversarial, "fgsm", fooling)
    with pytest.raises(RuntimeError, match="another accuracy than the clean ones"):
        run("adversarial")


def test_a_change_beyond_the_bound_is_an_error(run, monkeypatch):
    def far(network, images, labels, eps, **options):
        return Attack(images + 1.01 * eps, network(images).argmax(1) != labels, labels < 0)

    monkeypatch.setattr(adversarial, "pgd", far)
    with pytest.raises(RuntimeError, match=r"pgd_ce has changed a pixel by more than 0\.1"):
        run("adversarial")


def test_autoattack_is_one_of_the_attacks(run, monkeypatch, kept, few_digits):
    changed = []

    def strong(network, images, labels, eps, seed):
        changed.append(pgd(network, images, labels, eps).images)
        return changed[-1]

    def idle(network, images, labels, eps, **options):
        return fgsm(network, images, labels, 0.0)

    monkeypatch.setattr(adversarial, "autoattack", strong)
    monkeypatch.setattr(adversarial, "pgd", idle)
    monkeypatch.setattr(adversarial, "fgsm", idle)
    values = run("adversarial", epochs=4, options={"images": None, "autoattack": True})
    right = kept()(*changed).argmax(1) == few_digits.test.labels
    assert values["fgsm"] == values["pgd_ce"] == values["clean_accuracy"]
    assert values["autoattack"] == pytest.approx(right.double().mean().item(), abs=1.5 / 80)
    assert values["worst_accuracy"] == values["autoattack"] < values["clean_accuracy"]
