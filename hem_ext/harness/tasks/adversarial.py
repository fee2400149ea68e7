"""Accuracy under attack."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hem_ext.harness.attacks import Attack, autoattack, autoattack_package, fgsm, pgd
from hem_ext.harness.tasks.base import (
    PAPER_LOSSES,
    AtTest,
    Cell,
    Metric,
    Task,
    Workbench,
    accuracy,
    images_of,
    labels_of,
)
from hem_ext.harness.tasks.classification import Classification

BATCH = 250  # images attacked at once


class Adversarial(Task):
    """Accuracy on test images that were changed to mislead the network, by at most `at` a pixel.

    The network is that of :class:`Classification`, and takes images in [0, 1]. The attacks are FGSM (Goodfellow et
    al., arXiv 1412.6572) and PGD (Madry et al., arXiv 1706.06083), PGD on the cross-entropy and on the difference of
    logits ratio (Croce & Hein, arXiv 2003.01690): HEM's logits are small, and an attack on the cross-entropy alone
    would flatter it. It is judged sample by sample by the worst of all attacks. The share of zero gradients warns
    that PGD on the cross-entropy was blind.

    Options: `at`, the bound of the metrics; `eps`, more bounds, whose worst accuracy is given as values of their own;
    `steps` and `restarts` of PGD; `images`, how many test images, all if None; `autoattack`, whether AutoAttack (Croce
    & Hein) is among the attacks at `at`. CIFAR is usually judged at 8 / 255, MNIST at 0.3.
    """

    name = "adversarial"
    metrics = {
        "worst_accuracy": Metric("accuracy, worst attack"),
        "clean_accuracy": Metric("clean accuracy"),
        "fgsm": Metric("accuracy, FGSM"),
        "pgd_ce": Metric("accuracy, PGD on CE"),
        "pgd_dlr": Metric("accuracy, PGD on DLR"),
        "zero_gradient": Metric("zero gradients", higher_is_better=False),
    }
    losses = PAPER_LOSSES
    schedule, quick_schedule = Classification.schedule, Classification.quick_schedule
    options = {
        "at": 0.1,
        "eps": [0.0, 0.05, 0.1, 0.2],
        "steps": 10,
        "restarts": 2,
        "images": None,
        "autoattack": False,
    }
    quick_options = {"eps": [0.0], "steps": 5, "restarts": 1, "images": 100}

    def check(self, cell: Cell) -> None:
        super().check(cell)
        at, eps = cell.options["at"], cell.options["eps"]
        if not isinstance(eps, list) or not all(isinstance(e, (int, float)) and e >= 0 for e in [at, *eps]):
            raise ValueError(f"at must be a number and eps a list of numbers, none below 0, got {at!r} and {eps!r}")
        if cell.options["autoattack"]:
            autoattack_package()

    def measure(self, bench: Workbench) -> dict[str, float]:
        model, criterion = bench.classifier()
        test, at = bench.data.test, bench.options["at"]
        count = min(bench.options["images"] or len(test), len(test))
        test = test.take(torch.arange(count) * len(test) // count)  # evenly, for some sets are sorted by class
        images, labels = images_of(test), labels_of(test)
        clean = accuracy(bench.outputs(model, criterion, images), labels)

        network = AtTest(model, criterion)
        worst: dict[float, float] = {}
        for eps in sorted({0.0, at, *bench.options["eps"]}):
            attacks = _attack(network, images, labels, eps, bench)
            worst[eps] = _accuracy(*attacks.values())
            # Batches of another size round otherwise, which can decide a tie, but not more.
            if eps == 0 and any(abs(_accuracy(attack) - clean) > 0.002 for attack in attacks.values()):
                raise RuntimeError("images that were not changed gave another accuracy than the clean ones")
            if eps == at:
                found = attacks
        return {
            "worst_accuracy": worst[at],
            "clean_accuracy": clean,
            **{name: _accuracy(found[name]) for name in ("fgsm", "pgd_ce", "pgd_dlr")},
            "zero_gradient": found["pgd_ce"].zero_gradient.double().mean().item(),
            **{f"worst_accuracy eps={eps:g}": value for eps, value in worst.items()},
            **({"autoattack": _accuracy(found["autoattack"])} if bench.options["autoattack"] else {}),
        }


def _accuracy(*attacks: Attack) -> float:
    """The share of samples that no attack has fooled."""
    fooled = torch.stack([attack.fooled for attack in attacks]).any(0)
    return (~fooled).double().mean().item()


def _attack(network: nn.Module, images: Tensor, labels: Tensor, eps: float, bench: Workbench) -> dict[str, Attack]:
    """Every attack with that bound, by name."""
    device, options = bench.accelerator.device, bench.options
    generator = torch.Generator().manual_seed(bench.cell.seed)
    batches: dict[str, list[Attack]] = {}
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        x, y = x.to(device), y.to(device)
        found = {"fgsm": fgsm(network, x, y, eps)}
        for objective in ("ce", "dlr"):
            found[f"pgd_{objective}"] = pgd(
                network,
                x,
                y,
                eps,
                objective=objective,
                steps=options["steps"],
                restarts=options["restarts"],
                generator=generator,
            )
        if options["autoattack"] and eps == options["at"]:
            changed = autoattack(network, x, y, eps, seed=bench.cell.seed)
            with torch.no_grad():
                fooled = network(changed).argmax(1) != y
            found["autoattack"] = Attack(changed, fooled, torch.zeros_like(fooled))
        for name, attack in found.items():
            batches.setdefault(name, []).append(Attack(*(tensor.cpu() for tensor in attack)))
    attacks = {name: Attack(*map(torch.cat, zip(*parts, strict=True))) for name, parts in batches.items()}
    for name, attack in attacks.items():
        if (attack.images.double() - images.double()).abs().max() > eps:
            raise RuntimeError(f"{name} has changed a pixel by more than {eps}")
    return attacks
