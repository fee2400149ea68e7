"""Attacks that change an image by at most eps a pixel (L-infinity) so that the network gets it wrong.

Images are in [0, 1]; a network that wants them normalised does so inside. Cross-entropy alone flatters a network
that is very sure, whose gradient vanishes: attack with ``"dlr"`` and ``"scaled-ce"`` too, which the scale of the
logits does not touch, and with :func:`autoattack`, whose Square looks at no gradient.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attack(NamedTuple):
    """What an attack came to, sample by sample.

    The accuracy under the attack is ``1 - fooled.float().mean()``. A ``zero_gradient.float().mean()`` above 0 warns
    of gradient masking: on these samples the attack was blind, and their being right is no robustness.
    """

    images: Tensor  # (N, C, H, W), like the images attacked
    fooled: Tensor  # bool (N,): misclassified, by the attack or before it
    zero_gradient: Tensor  # bool (N,): the gradient was exactly zero (or NaN) on the clean image and at every step


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    r"""The difference of logits ratio: above 0 where a sample is misclassified, and blind to scale and shift.

    .. math:: -\frac{z_y - \max_{i \ne y} z_i}{z_{\pi_1} - z_{\pi_3}}

    with the logits in decreasing order :math:`z_{\pi_1} \ge z_{\pi_2} \ge z_{\pi_3} \ge \dots`

    Args:
        logits: ``(N, C)``, C at least 3.
        labels: int64 ``(N,)``.

    Returns:
        ``(N,)``, the dtype of `logits`.

    Raises:
        ValueError: fewer than 3 classes, for which the ratio would be a constant or undefined.

    Source: Croce & Hein, arXiv 2003.01690, equation 6.

    Example::

        >>> z, y = torch.tensor([[5.0, 3.0, 1.0]]), torch.tensor([0])
        >>> dlr(z, y), dlr(0.01 * z - 7, y)
        (tensor([-0.5000]), tensor([-0.5000]))
    """
    if logits.shape[1] < 3:
        raise ValueError(f"DLR needs at least 3 classes, got {logits.shape[1]}: use the objective 'margin'")
    first, _, third = logits.topk(3, dim=1).values.unbind(1)
    # Equal logits give 0 and a finite gradient instead of 0 / 0.
    return margin(logits, labels) / (first - third + 1e-12)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    r"""How far the largest other logit is above the label's: above 0 where a sample is misclassified.

    .. math:: \max_{i \ne y} z_i - z_y

    Its gradient never vanishes for being sure, and it is the objective for two classes, which :func:`dlr` cannot have.

    Args:
        logits: ``(N, C)``, C at least 2.
        labels: int64 ``(N,)``.

    Returns:
        ``(N,)``, the dtype of `logits`.

    Source: Carlini & Wagner, arXiv 1608.04644, here without a target.

    Example::

        >>> margin(torch.tensor([[5.0, 3.0]]), torch.tensor([0]))
        tensor([-2.])
    """
    target = logits.gather(1, labels.unsqueeze(1))
    others = logits.scatter(1, labels.unsqueeze(1), -torch.inf).amax(1)
    return others - target.squeeze(1)


def scaled_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Cross-entropy of logits that are scaled, sample by sample, to have the label 2 ahead of the next class.

    .. math:: -\log \mathrm{softmax}(2 z / m)_y, \quad m = |z_y - \max_{i \ne y} z_i|

    where m is a constant to the gradient. However large or small the logits are, the next class has 1 / e^2 of the
    label's probability: the gradient neither vanishes nor is shared by all classes alike, and the nearer a class comes
    the more it gets. As for :func:`dlr`, the scale and shift of the logits make no difference; unlike there, every
    class that is near has a part in the gradient.

    The gradient is what it is for. As m goes with the sample, the value says little about how near it is to being
    misclassified; for two classes it is the same for all that are classified correctly.

    Args:
        logits: ``(N, C)``, C at least 2.
        labels: int64 ``(N,)``.

    Returns:
        ``(N,)``, the dtype of `logits`.

    Source: that scaled logits reveal a masked gradient is Carlini & Wagner's, arXiv 1607.04311, and Hitaj et al.'s,
    arXiv 2103.01914, who multiply them by a constant. The scale of each sample's own is ours.

    Example::

        >>> z, y = torch.tensor([[5.0, 3.0, 1.0]]), torch.tensor([0])
        >>> scaled_cross_entropy(z, y), scaled_cross_entropy(1000 * z - 7, y)
        (tensor([0.1429]), tensor([0.1429]))
    """
    scale = margin(logits, labels).abs().unsqueeze(1).detach() + 1e-12  # of a tie too
    return _cross_entropy(2 * logits / scale, labels)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": _cross_entropy,
    "dlr": dlr,
    "margin": margin,
    "scaled-ce": scaled_cross_entropy,
}

FEWEST_CLASSES = {"apgd-ce": 2, "apgd-dlr": 3, "apgd-t": 4, "fab": 2, "fab-t": 2, "square": 2}
"""The attacks of AutoAttack, and how many classes each needs."""
VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
QUERIES = 5000  # of Square, in every version


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, eps: float, *, objective: str = "ce") -> Attack:
    r"""The fast gradient sign method: one step of `eps` along the sign of the gradient.

    .. math:: x' = \mathrm{clip}(x + \epsilon \, \mathrm{sign}(\nabla_x L(f(x), y)))

    It takes the arguments of :func:`pgd`, returns what that does and raises what that does.

    Source: Goodfellow et al., arXiv 1412.6572.

    Example::

        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> images, labels = torch.rand(5, 1, 2, 2), torch.arange(5) % 3
        >>> bool((fgsm(model, images, labels, eps=0.1).images - images).abs().max() <= 0.1)
        True
    """
    return _attack(
        model, images, labels, eps, objective, start=lambda gradient: images + eps * gradient.sign(), steps=0
    )


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    objective: str = "ce",
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Attack:
    r"""Projected gradient descent: steps along the sign of the gradient, from random points within the bound.

    .. math:: x_{k+1} = \mathrm{clip}(x_k + \alpha \, \mathrm{sign}(\nabla_x L(f(x_k), y)))

    A sample stops where the network first gets it wrong; one that holds out to the end is returned at its largest
    objective. What is misclassified without an attack is left as it is, so that accuracy can only fall.

    The model is in eval mode meanwhile, and afterwards every module as it was; its parameters get no gradients.

    Args:
        model: images to logits ``(N, C)``.
        images: ``(N, C, H, W)``, floating-point in [0, 1].
        labels: int64 ``(N,)``.
        eps: the largest change of a pixel, in units of the image: 8 / 255 for CIFAR, 0.3 for MNIST. 0 changes nothing.
        objective: what is increased: ``"ce"``, ``"dlr"``, ``"margin"`` or ``"scaled-ce"``.
        steps: of every restart; 0 tries the random points alone.
        step_size: alpha; 2.5 * eps / steps if None, with which the whole ball can be crossed.
        restarts: random starts, each for the samples that have held out so far.
        generator: of the random starts, on the CPU. Torch's own if None.

    Returns:
        The images, with ``|x' - x| <= eps`` and ``0 <= x' <= 1`` to the last bit, and who was fooled.

    Raises:
        ValueError: images outside [0, 1], a negative `eps`, an unknown `objective`, or ``"dlr"`` for under 3 classes.

    Source: Madry et al., arXiv 1706.06083.

    Example::

        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> images, labels = torch.rand(5, 1, 2, 2), torch.arange(5) % 3
        >>> attack = pgd(model, images, labels, eps=0.1, objective="dlr", restarts=2)
        >>> torch.equal(model(attack.images).argmax(1) != labels, attack.fooled)
        True
    """
    if step_size is None:
        step_size = 2.5 * eps / max(steps, 1)

    def start(_: Tensor) -> Tensor:
        noise = 2 * torch.rand(images.shape, generator=generator, dtype=images.dtype) - 1
        return images + eps * noise.to(images.device)

    return _attack(
        model, images, labels, eps, objective, start=start, steps=steps, step_size=step_size, restarts=restarts
    )


def autoattack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    version: str = "standard",
    attacks: Sequence[str] | None = None,
    queries: int = QUERIES,
    seed: int = 0,
    batch_size: int = 250,
) -> Tensor:
    """AutoAttack, the ensemble of four attacks without parameters that robustness is compared by, or some of them.

    Each of them is for the samples that the ones before have left. It is run by the first that is installed of
    ``pyautoattack``, the authors' own code, and ``torchattacks``, which has the whole versions alone.

    Args:
        model, images, labels, eps: as in :func:`pgd`.
        version: ``"standard"``, ``"plus"`` or ``"rand"``.
        attacks: these instead of a version's, in this order: ``"apgd-ce"``, ``"apgd-dlr"``, ``"apgd-t"``, ``"fab"``,
            ``"fab-t"`` and ``"square"``, each with one restart, as in the standard version.
        queries: how many times Square, which is gradient-free (Andriushchenko et al., arXiv 1912.00049), may ask for
            the logits of an image.
        seed: of its random starts; torch's own generators are left as they were.
        batch_size: images attacked at a time.

    Returns:
        The images, within the same bounds as those of :func:`pgd`.

    Raises:
        ImportError: none of the packages is installed, or not pyautoattack for `attacks` or `queries`.
        ValueError: images outside [0, 1], a negative `eps`, an unknown version or attack, or one that needs more
            classes: the standard version needs 4.

    Source: Croce & Hein, arXiv 2003.01690.
    """
    lower, upper = _bounds(images, eps)
    if version not in VERSIONS:
        raise ValueError(f"unknown version {version!r} of AutoAttack: one of {', '.join(VERSIONS)}")
    names = VERSIONS[version] if attacks is None else tuple(attacks)
    unknown = [name for name in names if name not in FEWEST_CLASSES]
    if unknown or not names:
        raise ValueError(f"attacks must be some of {', '.join(FEWEST_CLASSES)}, got {', '.join(unknown) or 'none'}")
    package = autoattack_package(whole=attacks is None and queries == QUERIES)
    with _evaluating(model), _same_random_numbers(images.device):
        with torch.no_grad():
            num_classes = model(images[:1]).shape[1]
        for name in names:
            if num_classes < FEWEST_CLASSES[name]:
                raise ValueError(
                    f"{name} of AutoAttack needs at least {FEWEST_CLASSES[name]} classes, got {num_classes}: "
                    "give attacks that need fewer, such as apgd-ce, fab and square"
                )
        if package.__name__ == "torchattacks":
            attack = package.AutoAttack(model, norm="Linf", eps=eps, version=version, n_classes=num_classes, seed=seed)
            batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
            adversarial = torch.cat([attack(*batch) for batch in batches])
        else:
            attack = package.AutoAttack(model, norm="Linf", eps=eps, version=version, seed=seed, device=images.device)
            attack.attacks_to_run = list(names)
            attack.square.n_queries = queries
            # Nine targets are the default, also where there are fewer other classes.
            attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, num_classes - 1)
            adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=batch_size)
    return adversarial.detach().clamp(lower, upper)


def autoattack_package(*, whole: bool = True) -> ModuleType:
    """What :func:`autoattack` runs, a `whole` version or some attacks; ImportError if nothing for it is installed."""
    for name in ("pyautoattack", "torchattacks") if whole else ("pyautoattack",):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:  # installed, but broken
                raise
    if not whole:
        raise ImportError("attacks and queries of AutoAttack need the package pyautoattack: pip install pyautoattack")
    raise ImportError(
        "AutoAttack needs one of the packages pyautoattack and torchattacks: pip install pyautoattack, "
        "or pip install --no-deps torchattacks, whose dependencies would replace the installed torch"
    )


def _attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    objective: str,
    *,
    start: Callable[[Tensor], Tensor],
    steps: int,
    step_size: float = 0.0,
    restarts: int = 1,
) -> Attack:
    """Ascend from `start`, a function of the gradient on the clean images, and keep the best of every sample."""
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: one of {', '.join(OBJECTIVES)}")
    lower, upper = _bounds(images, eps)

    def look(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The objective of every sample, infinite where it is misclassified, and its gradient."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = model(x)
            value = OBJECTIVES[objective](logits, y)
            # The sum keeps samples apart, where a mean would shrink small gradients further.
            (gradient,) = torch.autograd.grad(value.sum(), x, materialize_grads=True)
        # A gradient that is not a number leaves its pixel alone, where it would spoil the image.
        return value.detach().masked_fill(logits.argmax(1) != y, torch.inf), gradient.nan_to_num()

    with _evaluating(model):
        score, clean_gradient = look(images, labels)
        best, zero = images.detach().clone(), _is_zero(clean_gradient)
        for _ in range(restarts):
            x = start(clean_gradient).detach().clamp(lower, upper)
            for _ in range(steps + 1):
                todo = score.isfinite().nonzero().squeeze(1)
                if len(todo) == 0:
                    break
                now, gradient = look(x[todo], labels[todo])
                better = now > score[todo]
                score[todo[better]] = now[better]
                best[todo[better]] = x[todo[better]]
                zero[todo] &= _is_zero(gradient)
                x[todo] = (x[todo] + step_size * gradient.sign()).clamp(lower[todo], upper[todo])
    return Attack(best, score.isinf(), zero)


def _is_zero(gradient: Tensor) -> Tensor:
    return (gradient == 0).flatten(1).all(1)


def _bounds(images: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The least and the largest image that are allowed, in the dtype of the images."""
    if not ((images >= 0) & (images <= 1)).all():
        raise ValueError("images must be in [0, 1]: put their normalisation into the model")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    exact = images.double()
    lower = (exact - eps).clamp(min=0).to(images.dtype)
    upper = (exact + eps).clamp(max=1).to(images.dtype)
    # Where rounding led beyond eps, one representable number back.
    lower = torch.where(exact - lower.double() > eps, lower.nextafter(images), lower)
    upper = torch.where(upper.double() - exact > eps, upper.nextafter(images), upper)
    return lower, upper


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; then every module as it was, for some may have been in eval mode on purpose."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """What is seeded meanwhile has no effect afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
