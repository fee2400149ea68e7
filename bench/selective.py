"""Selective steps (hem_ext.Selective) against plain ones, in turn.

    python bench/selective.py steps [--results FILE]   a step of a network with a given share of active samples
    python bench/selective.py train [--results FILE]   whole trainings: cross-entropy, HEM, HEM selective, Composer
                                    [--seeds 10] [--networks small-gn]
    python bench/selective.py report FILE... [--page docs/selective.md] [--plots docs]   their tables and pictures

`steps` and `train` append rows, to build/selective.jsonl if no file is named; a training that is in the file already is
not run again. In a round, or a step of the trainings, every way takes its turn in random order.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from documents import append, conditions, markdown, read, replace
from measure import allocated_at_once
from provenance import provenance
from torch import Tensor, nn

from hem_ext import HEMLoss, Selective, hem_loss
from hem_ext.harness import data
from hem_ext.harness.models import Standardized, make_model
from hem_ext.harness.training import Schedule

SHARES = (1.0, 0.6, 0.3, 0.1, 0.0)
KEEP, START, END, EVERY = 0.5, 0.5, 0.9, 2  # Composer's defaults


# --- one step -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A network and a batch of images for it."""

    name: str
    batch: int
    size: int
    channels: int
    classes: int

    def build(self) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        if self.name.startswith("timm:"):
            import timm

            model = timm.create_model(self.name[5:], num_classes=self.classes)
        else:
            model = make_model(self.name, self.classes, channels=self.channels)
        return model.train(), torch.randn(self.batch, self.channels, self.size, self.size)


NETWORKS = [
    Network("small-gn", 128, 28, 1, 10),
    Network("small-vit", 128, 28, 1, 10),
    Network("timm:vit_tiny_patch16_224", 20, 224, 3, 1000),
]


def steps(seconds: float) -> list[dict[str, Any]]:
    """The time of a step with each share, plain, selective and as Selective chooses, and what is allocated at once."""
    rows = []
    for network in NETWORKS:
        try:
            model, images = network.build()
        except ImportError as error:
            print(f"{network.name} is left out: {error}")
            continue
        rows += _steps_of(network, model, images, seconds)
    return rows


def _steps_of(network: Network, model: nn.Module, images: Tensor, seconds: float) -> list[dict[str, Any]]:
    criterion = HEMLoss(margin=0.0)  # of a network that has not learnt, no logit need be ahead by more
    with torch.no_grad():
        right = model(images).argmax(1)
    calls: dict[tuple[str, float], Callable[[], Tensor]] = {}
    for share in SHARES:
        labels = right.clone()
        wrong = round(share * network.batch)
        labels[:wrong] = (labels[:wrong] + 1) % network.classes
        always, choosing = Selective(model, criterion, pays_below=1.0), Selective(model, criterion)
        calls["plain", share] = lambda labels=labels: criterion(model(images), labels)
        calls["selective", share] = lambda labels=labels, step=always: step(images, labels)
        calls["chosen", share] = lambda labels=labels, step=choosing: step(images, labels)
        for _ in range(8):  # it measures in the first ones
            _step(model, calls["chosen", share])
        _step(model, calls["selective", share])
        assert abs(always.share - wrong / network.batch) < 1e-6, "the network does not say what it was asked for"
    taken: dict[tuple[str, float], list[float]] = {key: [] for key in calls}
    order, shuffler, begin = list(calls), random.Random(0), time.perf_counter()
    while time.perf_counter() - begin < seconds or len(taken[order[0]]) < 16:
        shuffler.shuffle(order)
        for key in order:
            start = time.perf_counter()
            _step(model, calls[key])
            taken[key].append(time.perf_counter() - start)
    return [
        {
            "kind": "step",
            "network": network.name,
            "batch": network.batch,
            "size": network.size,
            "share": share,
            "way": way,
            "rounds": len(values),
            "seconds": [float(np.quantile(values, q)) for q in (0.2, 0.5, 0.8)],
            "mean_seconds": float(np.mean(values)),
            "allocated": allocated_at_once(lambda key=(way, share): calls[key]().backward()),
        }
        for (way, share), values in taken.items()
    ]


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    model.zero_grad()
    loss().backward()


# --- whole trainings ------------------------------------------------------------------------------------------


@dataclass
class Way:
    """One of the trainings that go side by side, from the same weights, through the same batches."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    loss: Callable[[Tensor, Tensor, int], Tensor]
    seconds: list[float] = field(default_factory=list)  # of every step
    shares: list[float] = field(default_factory=list)  # of active samples, of HEM's


# small-gn with SGD, small-vit with AdamW; short and long. Rates by validation, on cross-entropy:
#     hem-ext tune classification --losses ce --epochs 15 --batch-size 128 --seeds 1 --model small-gn
#         --grid max_lr=0.1,0.3,1
#     ... --model small-vit --optimizer adamw --grid max_lr=0.001,0.002,0.004
TRAININGS = [("small-gn", Schedule(epochs, 128, 0.1), epochs) for epochs in (15, 60)]
TRAININGS += [("small-vit", Schedule(epochs, 128, 4e-3, 0.05, optimizer="adamw"), epochs) for epochs in (15, 60)]


def train(
    results: Path, facts: dict[str, Any], seeds: int, networks: Sequence[str] = ("small-gn", "small-vit")
) -> None:
    """Append a row for each way of each training, and one for every comparison of gradients."""
    done = {(row["network"], row["epochs"], row["seed"]) for row in read([results]) if row["kind"] == "training"}
    images = data.load("mnist-5k")
    for seed in range(seeds):
        for name, schedule, epochs in TRAININGS:
            if (name, epochs, seed) in done or name not in networks:
                continue
            begin = time.perf_counter()
            rows = _side_by_side(name, schedule, images, seed)
            append(results, facts, rows)
            print(f"{name}, {epochs} epochs, seed {seed}: {time.perf_counter() - begin:.0f} s", flush=True)


def _side_by_side(name: str, schedule: Schedule, found: data.Data, seed: int) -> list[dict[str, Any]]:
    train, test = (_tensors(part) for part in (found.train, found.test))
    count, batch = len(train[1]), schedule.batch_size
    per_epoch = count // batch
    total = schedule.epochs * per_epoch
    margin = (2000 / count) ** 0.5
    generator = np.random.default_rng(seed)
    ways = []
    for way in ("ce", "hem", "hem selective", "composer"):
        torch.manual_seed(seed)
        network = make_model(name, found.num_classes, channels=found.channels)
        model = Standardized(network, *found.statistics()).to(memory_format=torch.channels_last).train()
        optimizer = schedule.make_optimizer(model)
        criterion, step = HEMLoss(margin=margin), None
        if way == "hem selective":
            step = Selective(model, criterion)
        losses: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
            "ce": lambda x, y, _, model=model: F.cross_entropy(model(x), y),
            "hem": lambda x, y, _, model=model, criterion=criterion: criterion(model(x), y),
            "hem selective": lambda x, y, _, step=step: step(x, y),
            "composer": lambda x, y, i, model=model: _composer(model, x, y, i, total, generator),
        }
        ways.append(Way(way, model, optimizer, schedule.make_scheduler(optimizer, total), losses[way]))

    shuffler = random.Random(seed)
    margins = {"margin": margin, "reduction": "none"}
    differences = []
    for number in range(total):
        if number % per_epoch == 0:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_003 + number))
        chosen = order[number % per_epoch * batch :][:batch]
        x, y = train[0][chosen].contiguous(memory_format=torch.channels_last), train[1][chosen]
        turn = list(ways)
        shuffler.shuffle(turn)
        by_name = {way.name: way for way in ways}
        selective = by_name["hem selective"]
        # Not timed: the share of active samples, and at some steps what a plain step would have for a gradient.
        with torch.no_grad():
            selective.shares.append((hem_loss(selective.model(x), y, **margins) > 0).float().mean().item())
        checked = number % 10 == 0
        if checked:
            selective.model.zero_grad()
            HEMLoss(margin=margin)(selective.model(x), y).backward()
            plain = _gradient(selective.model)
        for way in turn:
            begin = time.perf_counter()
            way.optimizer.zero_grad()
            way.loss(x, y, number).backward()
            middle = time.perf_counter()
            if checked and way is selective:
                scale = plain.norm().item()
                difference = (_gradient(way.model) - plain).norm().item()
                differences.append(difference / scale if scale else difference)
            resume = time.perf_counter()
            way.optimizer.step()
            way.scheduler.step()
            way.seconds.append(time.perf_counter() - resume + middle - begin)
    ends = {way.name: torch.cat([p.detach().flatten() for p in way.model.parameters()]) for way in ways}
    shares = selective.shares
    return [
        {
            "kind": "training",
            "network": name,
            "optimizer": schedule.optimizer,
            "epochs": schedule.epochs,
            "batch": batch,
            "seed": seed,
            "way": way.name,
            "accuracy": _accuracy(way.model, *test),
            "seconds": sum(way.seconds),
            "seconds_by_epoch": _by_epoch(way.seconds, per_epoch, sum),
            **(
                {
                    "share_by_epoch": _by_epoch(shares, per_epoch, np.mean),
                    "allowed": float(np.mean([min(1.0, (1 + 3 * a) / 3) for a in shares])),
                    "gradient_difference": [float(np.median(differences)), max(differences)],
                    "weight_difference": ((ends["hem selective"] - ends["hem"]).norm() / ends["hem"].norm()).item(),
                }
                if way is selective
                else {}
            ),
        }
        for way in ways
    ]


def _composer(
    model: nn.Module, x: Tensor, y: Tensor, number: int, total: int, generator: np.random.Generator
) -> Tensor:
    """Cross-entropy, selective as Composer has it: between half and 0.9 of the training every step but each second
    keeps half of the batch, drawn by the rank of the loss; of what is kept, the plain mean."""
    if START <= number / total < END and (number + 1) % EVERY != 0:
        with torch.no_grad():
            losses = F.cross_entropy(model(x), y, reduction="none")
        ranks = np.argsort(np.argsort(losses.numpy())) / len(y)
        chances = ranks ** (1 / KEEP - 1)
        kept = generator.choice(len(y), size=int(KEEP * len(y)), replace=False, p=chances / chances.sum())
        x, y = x[kept], y[kept]
    return F.cross_entropy(model(x), y)


def _gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


def _tensors(dataset: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return torch.stack(images), torch.stack(labels)


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(images).argmax(1) == labels).double().mean().item()


def _by_epoch(values: Sequence[float], per_epoch: int, reduce: Callable[[Sequence[float]], float]) -> list[float]:
    return [float(reduce(values[i : i + per_epoch])) for i in range(0, len(values), per_epoch)]


# --- rows, tables, pictures -----------------------------------------------------------------------------------


def steps_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """How many times as fast as the plain step; `chosen` by means, for it looks at the share only now and then."""
    found = {(r["network"], r["share"], r["way"]): r for r in rows if r["kind"] == "step"}
    lines = [["network", "share active", "selective", "as it chooses", "allowed", "memory"]]
    for network, share in dict.fromkeys((network, share) for network, share, _ in found):
        plain, always, chosen = (found[network, share, way] for way in ("plain", "selective", "chosen"))
        lines.append(
            [
                f"`{network}`, batch {plain['batch']}",
                f"{share:.0%}",
                f"{plain['seconds'][1] / always['seconds'][1]:.2f}",
                f"{plain['mean_seconds'] / chosen['mean_seconds']:.2f}",
                f"{3 / (1 + 3 * share):.2f}",
                f"{always['allocated'] / plain['allocated']:.2f}",
            ]
        )
    return lines


def trainings(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int], dict[str, dict[int, dict[str, Any]]]]:
    """(Network, epochs) -> way -> seed -> row."""
    found: dict[tuple[str, int], dict[str, dict[int, dict[str, Any]]]] = {}
    for row in rows:
        if row["kind"] == "training":
            found.setdefault((row["network"], row["epochs"]), {}).setdefault(row["way"], {})[row["seed"]] = row
    return found


def trainings_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    found = trainings(rows)
    differences = _differences(found)
    lines = [["network", "epochs", "seeds", "trained with", "accuracy", "against", "time", "allowed"]]
    for (network, epochs), ways in found.items():
        for way, by_seed in ways.items():
            other = AGAINST[way]
            accuracy = np.array([row["accuracy"] for row in by_seed.values()])
            line = [f"`{network}`", str(epochs), str(len(by_seed)), TITLES[way], f"{accuracy.mean():.4f}"]
            if other is None:
                line += ["", "1", ""]
            else:
                line.append(f"{TITLES[other]}: {differences[network, epochs, way]}")
                ratios = [row["seconds"] / ways[other][seed]["seconds"] for seed, row in by_seed.items()]
                line.append(f"{np.mean(ratios):.2f}")
                allowed = [row["allowed"] for row in by_seed.values() if "allowed" in row]
                line.append(f"{np.mean(allowed):.2f}" if allowed else "")
            lines.append(line)
    return lines


TITLES = {"ce": "cross-entropy", "hem": "HEM", "hem selective": "HEM, selective", "composer": "Composer's rule"}
AGAINST = {"ce": None, "hem": "ce", "hem selective": "hem", "composer": "ce"}


def _differences(found: dict[tuple[str, int], dict[str, dict[int, dict[str, Any]]]]) -> dict[tuple[str, int, str], str]:
    """By network, epochs and way: the mean difference from what it is held against, its 95% interval, and the p of a
    paired t-test, corrected by Holm over the trainings that the two are compared in."""
    from scipy import stats
    from statsmodels.stats.multitest import multipletests

    texts = {}
    for way, other in AGAINST.items():
        tests = {}
        for (network, epochs), ways in found.items() if other else ():
            pairs = [(row["accuracy"], ways[other][seed]["accuracy"]) for seed, row in ways.get(way, {}).items()]
            a, b = np.array(pairs).T
            texts[network, epochs, way] = f"{(a - b).mean():+.4f}"
            if len(a) > 1 and (a - b).std():
                tests[network, epochs, way] = stats.ttest_rel(a, b)
        corrected = multipletests([test.pvalue for test in tests.values()], method="holm")[1] if tests else []
        for (key, test), p in zip(tests.items(), corrected, strict=True):
            low, high = test.confidence_interval()
            texts[key] += f" [{low:+.4f}, {high:+.4f}], p {p:.2f}".replace("p 0.00", "p <0.01")
    return texts


def exactness_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    lines = [["network", "epochs", "gradient, median", "gradient, largest", "weights at the end"]]
    for (network, epochs), ways in trainings(rows).items():
        found = list(ways["hem selective"].values())
        medians, largest = np.array([row["gradient_difference"] for row in found]).T
        ends = [row["weight_difference"] for row in found]
        lines.append(
            [f"`{network}`", str(epochs), f"{np.median(medians):.0e}", f"{largest.max():.0e}", f"{max(ends):.0e}"]
        )
    return lines


def draw(folder: Path, rows: Sequence[dict[str, Any]]) -> list[Path]:
    """selective-share.png and selective-time.png: by epoch, mean over seeds."""
    from matplotlib.figure import Figure

    found = trainings(rows)
    paths = []
    for name, title in (
        ("share", "share of the samples that are active (HEM)"),
        ("time", "time of an epoch over that of plain HEM"),
    ):
        figure = Figure(figsize=(10, 3.2 * -(-len(found) // 2)), layout="constrained")
        axes = figure.subplots(-(-len(found) // 2), 2, squeeze=False).flat
        for axis, ((network, epochs), ways) in zip(axes, found.items(), strict=False):
            selective = list(ways["hem selective"].values())
            shares = np.mean([row["share_by_epoch"] for row in selective], axis=0)
            x = np.arange(1, len(shares) + 1)
            if name == "share":
                axis.plot(x, shares, color="#0072B2")
            else:
                hem = {seed: np.array(row["seconds_by_epoch"]) for seed, row in ways["hem"].items()}
                for way, color in (("ce", "#D55E00"), ("hem selective", "#0072B2"), ("composer", "#E69F00")):
                    ratios = [np.array(row["seconds_by_epoch"]) / hem[seed] for seed, row in ways[way].items()]
                    axis.plot(x, np.median(ratios, axis=0), color=color, label=TITLES[way])
                allowed = np.minimum(1, (1 + 3 * shares) / 3)
                axis.plot(x, allowed, ":", color="black", label="what the share allows")
                axis.axhline(1, color="black", linewidth=0.8)
                axis.legend(fontsize=8)
            axis.set(title=f"{network}, {epochs} epochs", xlabel="epoch", ylim=(0, None))
            axis.grid(alpha=0.3)
        for axis in list(axes):
            axis.set_axis_off()
        figure.suptitle(title, fontsize=11)
        paths.append(folder / f"selective-{name}.png")
        figure.savefig(paths[-1], dpi=110)
    return paths


TABLES = {"steps": steps_table, "trainings": trainings_table, "exactness": exactness_table}


def write_page(path: Path, rows: Sequence[dict[str, Any]], files: Sequence[Path]) -> None:
    """Replace what stands between the markers."""
    command = f"python bench/selective.py report {' '.join(map(str, files))}"
    for name, table in TABLES.items():
        kind = "step" if name == "steps" else "training"
        row = next(row for row in reversed(rows) if row["kind"] == kind)
        replace(path, name, f"`{command}`: {conditions([row])}\n\n{markdown(table(rows))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["steps", "train", "report"])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--results", type=Path, default=Path("build/selective.jsonl"))
    parser.add_argument("--seconds", type=float, default=60.0, help="of steps, for each network")
    parser.add_argument("--seeds", type=int, default=5)
    names = sorted({name for name, _, _ in TRAININGS})
    parser.add_argument("--networks", nargs="+", choices=names, default=names, help="of the trainings")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--plots", type=Path)
    given = parser.parse_args()
    if given.command == "steps":
        append(given.results, provenance("cpu"), steps(given.seconds))
    elif given.command == "train":
        train(given.results, provenance("cpu"), given.seeds, given.networks)
    else:
        rows = read(given.files)
        for name, table in TABLES.items():
            print(f"{name}\n{markdown(table(rows))}\n")
        if given.page:
            write_page(given.page, rows, given.files)
        for path in draw(given.plots, rows) if given.plots else ():
            print(path)


if __name__ == "__main__":
    main()
