"""Two tasks, two losses, the same networks: cross-entropy and HEM side by side on real digits.

``hem-ext demo`` trains a classifier of handwritten digits and a segmentation network for scenes of digits
over textures, once with each loss, from the same weights, with the same batches and schedule.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

import hem_ext
from hem_ext.harness import plots
from hem_ext.harness.data import Split, digit_scenes, digits
from hem_ext.harness.losses import make_loss
from hem_ext.harness.models import SmallCNN, SmallUNet
from hem_ext.harness.training import Epoch, Schedule, fit, predict

LOSSES = ("ce", "hem")
SCENES_SHOWN = 5
SCENE_CLASSES = ["background", *map(str, range(10))]


@dataclass(frozen=True)
class Task:
    train: Split
    test: Split
    num_classes: int
    make_model: Callable[[], nn.Module]
    schedule: Schedule
    margin: float
    metric: str  # the field of Epoch by which the task is judged


def tasks(*, quick: bool) -> dict[str, Task]:
    """The demo's tasks; `quick` ones only show that everything runs."""
    train, test = digits()
    scenes = digit_scenes(60, 20) if quick else digit_scenes(500, 200)
    return {
        "digits": Task(
            train,
            test,
            10,
            lambda: SmallCNN(10),
            Schedule(epochs=2 if quick else 15, batch_size=64, max_lr=0.1),
            # The paper's rule for balanced classes.
            margin=round(math.sqrt(2000 / len(train.labels)), 2),
            metric="accuracy",
        ),
        "digit scenes": Task(
            *scenes,
            len(SCENE_CLASSES),
            lambda: SmallUNet(len(SCENE_CLASSES)),
            Schedule(epochs=2 if quick else 16, batch_size=10, max_lr=0.3),
            # The rule does not say what a sample of a class is in segmentation: a fixed margin.
            margin=0.5,
            metric="mean_iou",
        ),
    }


def run(output: Path, *, seeds: int = 1, quick: bool = False, console: Console | None = None) -> None:
    """Train everything; print one table; write `output`/results.jsonl, curves.png and segmentation.png."""
    console = console or Console()
    output.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with console.status("making digit scenes"):
        todo = tasks(quick=quick)
    total = seeds * len(LOSSES) * sum(task.schedule.epochs for task in todo.values())

    runs: dict[str, dict[str, list[list[Epoch]]]] = {name: {loss: [] for loss in LOSSES} for name in todo}
    pictures: dict[str, torch.Tensor] = {}
    with (
        Progress(*columns, console=console) as progress,
        (output / "results.jsonl").open("w", encoding="utf-8") as results,
    ):
        bar = progress.add_task("", total=total)
        for name, task in todo.items():
            for seed in range(seeds):
                for loss in LOSSES:
                    progress.update(bar, description=f"{name}, {plots.NAMES[loss]}, seed {seed}")
                    torch.manual_seed(seed)
                    model = task.make_model().to(memory_format=torch.channels_last)
                    constants = {"margin": task.margin} if loss == "hem" else {}
                    history = fit(
                        model,
                        make_loss(loss, num_classes=task.num_classes, **constants),
                        task.train,
                        task.test,
                        task.schedule,
                        seed=seed,
                        after_epoch=lambda _: progress.advance(bar),
                    )
                    runs[name][loss].append(history)
                    settings = {"task": name, "loss": loss, **constants, "seed": seed, **asdict(task.schedule)}
                    for number, epoch in enumerate(history, start=1):
                        results.write(json.dumps({**settings, "epoch": number, **asdict(epoch)}) + "\n")
                    if seed == 0 and task.metric == "mean_iou":
                        pictures[loss] = predict(model, task.test.images[:SCENES_SHOWN])

    console.print(table(runs, todo, seeds))
    console.print(
        f"[dim]same initial weights, batches and schedule for both losses; {platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, hem_ext {hem_ext.__version__}"
    )
    plots.learning_curves(output / "curves.png", runs, {name: task.metric for name, task in todo.items()})
    scenes = todo["digit scenes"].test
    plots.segmentations(
        output / "segmentation.png",
        scenes.images[:SCENES_SHOWN],
        {"truth": scenes.labels[:SCENES_SHOWN], **{plots.NAMES[loss]: labels for loss, labels in pictures.items()}},
        SCENE_CLASSES,
    )
    for file in ("segmentation.png", "curves.png", "results.jsonl"):
        console.print(f"wrote {output / file}", highlight=False, soft_wrap=True)


def table(runs: dict[str, dict[str, list[list[Epoch]]]], todo: dict[str, Task], seeds: int) -> Table:
    """What the last epoch came to: the mean over seeds, with its standard error where there are several.

    "s/epoch" is training alone, "in loss" the share of it that loss and gradient of the logits took.
    """
    title = f"after training, {seeds} seed{'s' if seeds > 1 else ''}"
    result = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for heading in ("task", "loss", "margin", "accuracy", "mean IoU", "s/epoch", "in loss"):
        result.add_column(heading, justify="left" if heading in ("task", "loss") else "right", no_wrap=True)
    for name, by_loss in runs.items():
        for loss, histories in by_loss.items():
            epochs = [epoch for history in histories for epoch in history]
            seconds = sum(epoch.seconds for epoch in epochs)
            loss_seconds = sum(epoch.loss_seconds for epoch in epochs)
            segmentation = todo[name].metric == "mean_iou"
            result.add_row(
                name,
                loss.upper(),
                f"{todo[name].margin:g}" if loss == "hem" else "",
                _mean([history[-1].accuracy for history in histories]),
                _mean([history[-1].mean_iou for history in histories]) if segmentation else "",
                f"{seconds / len(epochs):.2f}",
                f"{loss_seconds / seconds:.1%}",
                end_section=loss == LOSSES[-1],
            )
    return result


def _mean(values: list[float]) -> str:
    x = torch.tensor(values, dtype=torch.float64)
    if len(values) == 1:
        return f"{x.item():.3f}"
    return f"{x.mean():.3f} ± {x.std() / math.sqrt(len(values)):.3f}"
