"""Accuracy under attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hem_ext.harness.attacks import FEWEST_CLASSES, VERSIONS, Attack, autoattack, autoattack_package, fgsm, pgd
from hem_ext.harness.losses import LOSSES
from hem_ext.harness.tasks.base import (
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
FEW_CLASSES = ("apgd-ce", "fab")
"""AutoAttack's attacks by gradients, where there are too few classes for those of the standard version."""


class Adversarial(Task):
    """Accuracy on images that were changed to mislead the network, by at most `at` a pixel.

    The network is that of :class:`Classification`, and takes images in [0, 1]. The attacks are FGSM (Goodfellow et
    al., arXiv 1412.6572) and PGD (Madry et al., arXiv 1706.06083), PGD on the cross-entropy and on the difference of
    logits ratio (Croce & Hein, arXiv 2003.01690): HEM's logits are small, and an attack on the cross-entropy alone
    would flatter it. It is judged sample by sample by the worst of all attacks. The share of zero gradients warns
    that PGD on the cross-entropy was blind.

    Whether that survives is asked by the strong attack, on fewer images, losses and seeds: PGD of many steps and
    restarts, on the cross-entropy, the ratio and the cross-entropy of scaled logits; Square, which is gradient-free
    (Andriushchenko et al., arXiv 1912.00049); and AutoAttack (Croce & Hein). Each of them attacks every image that is
    classified correctly, so that each ``strong`` value stands for itself: ``strong autoattack`` is the standard
    version, whose last attack is that Square. ``strong cheap`` is what the attacks above leave of the same images.
    `strong_accuracy` is the worst of all, sample by sample, the cheap ones included; it is
    left out where it was not asked for, and where settings are chosen, on validation.

    Two classes have no difference of logits ratio: the margin (Carlini & Wagner, arXiv 1608.04644) takes its place.
    With fewer than four, AutoAttack is APGD on the cross-entropy, FAB and Square, as its others need four.

    Options: `at`, the bound of the metrics; `eps`, more bounds, whose worst accuracy is given as values of their own;
    `steps` and `restarts` of PGD, which is the cheap one; `images`, how many, all if None. Of the strong attack,
    `strong`, whether there is one; `strong_losses` and `strong_seeds`, for which losses and how many of the first
    seeds; `strong_images`, how many of the images; `strong_steps` and `strong_restarts` of PGD; `strong_queries` of
    Square. CIFAR is usually judged at 8 / 255, MNIST at 0.3, but there after training against attacks, which is not
    done here.
    """

    name = "adversarial"
    metrics = {
        "worst_accuracy": Metric("accuracy, worst attack"),
        "strong_accuracy": Metric("accuracy, strong attack", of_every_cell=False),
        "clean_accuracy": Metric("clean accuracy"),
        "fgsm": Metric("accuracy, FGSM"),
        "pgd_ce": Metric("accuracy, PGD on CE"),
        "pgd_dlr": Metric("accuracy, PGD on DLR"),
        "zero_gradient": Metric("zero gradients", higher_is_better=False),
    }
    judged_by = ("worst_accuracy", "strong_accuracy")
    losses = ("ce", "ce-ls", "hem", "mm", "logitnorm")
    schedule, quick_schedule = Classification.schedule, Classification.quick_schedule
    options = {
        "at": 0.05,
        "eps": [0.0, 0.02, 0.05, 0.1, 0.2, 0.3],
        "steps": 10,
        "restarts": 2,
        "images": 500,
        "strong": True,
        "strong_losses": ["ce", "hem", "hem+"],
        "strong_seeds": 3,
        "strong_images": 200,
        "strong_steps": 200,
        "strong_restarts": 5,
        "strong_queries": 5000,
    }
    optional = {"images": int}
    quick_options = {"eps": [0.0], "steps": 5, "restarts": 1, "images": 100, "strong": False}

    def check(self, cell: Cell) -> None:
        super().check(cell)
        options = cell.options
        at, eps = options["at"], options["eps"]
        if not all(isinstance(e, (int, float)) and e >= 0 for e in [at, *eps]):
            raise ValueError(f"at must be a number and eps a list of numbers, none below 0, got {at!r} and {eps!r}")
        for name, value in options.items():
            least = 0 if name == "strong_seeds" else 1
            if type(value) is int and name != "at" and value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value}")
        losses = options["strong_losses"]
        if not all(loss in list(LOSSES) for loss in losses):  # whatever it is
            raise ValueError(f"strong_losses must be a list of losses, some of {', '.join(LOSSES)}, got {losses!r}")
        if (num_classes := cell.load_data().num_classes) < 2:
            raise ValueError(f"{self.name} needs at least 2 classes, {cell.data} has {num_classes}")
        if _is_strong(cell):
            autoattack_package(whole=False)

    def notes(self, cell: Cell) -> list[str]:
        found, num_classes = super().notes(cell), cell.load_data().num_classes
        if num_classes < 3:
            found.append("two classes have no difference of logits ratio: pgd_dlr is PGD on the margin")
        if _is_strong(cell) and num_classes < FEWEST_CLASSES["apgd-t"]:
            names = ", ".join([*FEW_CLASSES, "square"])
            found.append(f"AutoAttack's standard version needs at least four classes: it is {names} alone")
        return found

    def measure(self, bench: Workbench) -> dict[str, float]:
        model, criterion = bench.classifier()
        options, at, num_classes = bench.options, bench.options["at"], bench.data.num_classes
        chosen = _evenly(len(bench.held_out), options["images"])  # for some sets are sorted by class
        part = bench.held_out.take(chosen)
        images, labels = images_of(part), labels_of(part)
        clean = accuracy(bench.outputs(model, criterion, images), labels)

        network = AtTest(model, criterion)
        device, seed = bench.accelerator.device, bench.cell.seed
        worst: dict[float, float] = {}
        more = options["eps"] if bench.cell.part == "test" else []
        for eps in sorted({0.0, at, *more}):
            methods = {
                "fgsm": partial(fgsm, network, eps=eps),
                **_pgd(network, eps, _objectives(num_classes), options["steps"], options["restarts"], seed),
            }
            attacks = _attack(methods, images, labels, eps, device)
            worst[eps] = _accuracy(*attacks.values())
            if eps == 0:
                # Batches of another size round otherwise, which can decide a tie, but not more.
                moved = max(abs(_accuracy(attack) - clean) for attack in attacks.values())
                if round(moved * len(labels)) > max(1, len(labels) // 500):
                    raise RuntimeError("images that were not changed gave another accuracy than the clean ones")
            if eps == at:
                found = attacks
        result = {
            "worst_accuracy": worst[at],
            "clean_accuracy": clean,
            **{name: _accuracy(attack) for name, attack in found.items()},
            "zero_gradient": found["pgd_ce"].zero_gradient.double().mean().item(),
            **{f"worst_accuracy eps={eps:g}": value for eps, value in worst.items()},
        }
        if _is_strong(bench.cell):
            some = _evenly(len(labels), options["strong_images"])
            cheap = [Attack(*(tensor[some] for tensor in attack)) for attack in found.values()]
            strong = _strong(network, images[some], labels[some], num_classes, bench)
            result["strong_accuracy"] = _accuracy(*cheap, *(attack for group in strong.values() for attack in group))
            result["strong cheap"] = _accuracy(*cheap)
            result.update({f"strong {name}": _accuracy(*group) for name, group in strong.items()})
        return {name: result[name] for name in self.metrics if name in result} | result


Method = Callable[[Tensor, Tensor], Attack]  # of images and labels


def _strong(
    network: AtTest, images: Tensor, labels: Tensor, num_classes: int, bench: Workbench
) -> dict[str, list[Attack]]:
    """By the name of a value, the attacks that it is the worst of."""
    options, eps, seed = bench.options, bench.options["at"], bench.cell.seed
    objectives = {**_objectives(num_classes), "pgd_scaled": "scaled-ce"}
    methods = _pgd(network, eps, objectives, options["strong_steps"], options["strong_restarts"], seed)
    # Square has every image to itself; what AutoAttack's other attacks come to with it is what AutoAttack comes to.
    gradients = FEW_CLASSES if num_classes < FEWEST_CLASSES["apgd-t"] else VERSIONS["standard"][:-1]
    for name, attacks in {"square": ("square",), "autoattack": gradients}.items():
        methods[name] = partial(
            _autoattack, network, eps=eps, attacks=attacks, queries=options["strong_queries"], seed=seed
        )
    found = _attack(methods, images, labels, eps, bench.accelerator.device)
    groups = {name: [attack] for name, attack in found.items()}
    groups["autoattack"].append(found["square"])
    return groups


def _objectives(num_classes: int) -> dict[str, str]:
    """What PGD increases, by the name of its value."""
    return {"pgd_ce": "ce", "pgd_dlr": "dlr" if num_classes > 2 else "margin"}


def _pgd(
    network: AtTest, eps: float, objectives: Mapping[str, str], steps: int, restarts: int, seed: int
) -> dict[str, Method]:
    generator = torch.Generator().manual_seed(seed)
    settings = {"steps": steps, "restarts": restarts, "generator": generator}
    return {name: partial(pgd, network, eps=eps, objective=what, **settings) for name, what in objectives.items()}


def _autoattack(network: AtTest, images: Tensor, labels: Tensor, **options: Any) -> Attack:
    changed = autoattack(network, images, labels, **options)
    with torch.no_grad():
        fooled = network(changed).argmax(1) != labels
    return Attack(changed, fooled, torch.zeros_like(fooled))


def _attack(
    methods: Mapping[str, Method], images: Tensor, labels: Tensor, eps: float, device: torch.device
) -> dict[str, Attack]:
    """What every method comes to, on the CPU; its images are seen to be within the bounds."""
    batches: dict[str, list[Attack]] = {name: [] for name in methods}
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        x, y = x.to(device), y.to(device)
        for name, method in methods.items():
            batches[name].append(Attack(*(tensor.cpu() for tensor in method(x, y))))
    attacks = {name: Attack(*map(torch.cat, zip(*parts, strict=True))) for name, parts in batches.items()}
    for name, attack in attacks.items():
        if (attack.images.double() - images.double()).abs().max() > eps:
            raise RuntimeError(f"{name} has changed a pixel by more than {eps}")
        if attack.images.min() < 0 or attack.images.max() > 1:
            raise RuntimeError(f"{name} has left the images' range [0, 1]")
    return attacks


def _accuracy(*attacks: Attack) -> float:
    """The share of samples that no attack has fooled."""
    fooled = torch.stack([attack.fooled for attack in attacks]).any(0)
    return (~fooled).double().mean().item()


def _evenly(length: int, count: int | None) -> Tensor:
    """Indices of so many of a sequence, all if None or too many."""
    count = min(count or length, length)
    return torch.arange(count) * length // count


def _is_strong(cell: Cell) -> bool:
    options = cell.options
    asked = options["strong"] and cell.loss in options["strong_losses"] and cell.seed < options["strong_seeds"]
    return asked and cell.part == "test"
