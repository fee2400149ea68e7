"""The command ``hem-ext``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Train networks with HEM and with the losses it is compared to.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Output = Annotated[Path, typer.Option(help="Folder for results, models and pictures.", file_okay=False)]
Quick = Annotated[bool, typer.Option("--quick", help="Short schedules: shows only that everything runs.")]
Data = Annotated[str | None, typer.Option(help="Data set, by name; each task has its own if not given.")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder of a data set that is not bundled.")]
Model = Annotated[str | None, typer.Option(help="small, timm:NAME, torchvision:NAME or smp:ARCHITECTURE/ENCODER.")]
Epochs = Annotated[int | None, typer.Option(min=1)]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Of all processes together.")]
MaxLr = Annotated[float | None, typer.Option(help="The largest learning rate.")]
Policy = Annotated[str | None, typer.Option(help="Of the learning rate: one-cycle or poly.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="An option of the task; may be repeated.")
]
Precision = Annotated[str | None, typer.Option(help="bf16 or fp16; float32 if not given.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that load training images.")]
Tracker = Annotated[str | None, typer.Option(help="tensorboard: learning curves in OUTPUT/tensorboard.")]


@app.command()
def train(
    task: Annotated[str, typer.Argument(help="classification, ood, segmentation ...")],
    loss: Annotated[str, typer.Option(help="ce, hem, mm ...")] = "hem",
    constant: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Of the loss, such as margin=0.5; may be repeated.")
    ] = None,
    seed: int = 0,
    data: Data = None,
    data_root: DataRoot = None,
    model: Model = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    max_lr: MaxLr = None,
    policy: Policy = None,
    option: Settings = None,
    mixed_precision: Precision = None,
    tracker: Tracker = None,
    num_workers: Workers = 0,
    quick: Quick = False,
    output: Output = Path("train"),
) -> None:
    """Train one network and measure it. Under torchrun or accelerate launch, all processes share every batch."""
    from hem_ext.harness.tasks import TASKS, Workbench
    from hem_ext.harness.training import make_accelerator

    with _told():
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}: one of {', '.join(TASKS)}")
        cell = TASKS[task].cell(
            loss,
            seed,
            quick=quick,
            constants={name: float(value) for name, value in _pairs(constant)},
            **_given(data, data_root, model, epochs, batch_size, max_lr, policy, option, mixed_precision),
        )
        TASKS[task].check(cell)
        _known_tracker(tracker)

    options: dict[str, Any] = {"log_with": tracker, "project_dir": output} if tracker else {}
    accelerator = make_accelerator(mixed_precision=mixed_precision, **options)
    if tracker:
        accelerator.init_trackers("tensorboard")

    def after_epoch(epoch: Any) -> None:
        values = {"loss": epoch.train_loss, "active": epoch.active, **epoch.metrics}
        text = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        accelerator.print(f"{text}, {epoch.seconds:.1f} s")

    values = TASKS[task].run(Workbench(cell, output / "models", accelerator, after_epoch, num_workers))
    if accelerator.is_main_process:
        (output / "metrics.json").write_text(json.dumps({**cell.settings(), "metrics": values}, indent=1) + "\n")
    for name, value in values.items():
        accelerator.print(f"{name}: {value:.4f}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


@app.command()
def compare(
    tasks: Annotated[list[str], typer.Argument(help="classification, ood, segmentation ...")],
    losses: Annotated[str | None, typer.Option(help="ce,hem,... ; each task's own if not given.")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=V1,V2,...", help="Values of a constant, for the losses that have it."),
    ] = None,
    data: Data = None,
    data_root: DataRoot = None,
    model: Model = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    max_lr: MaxLr = None,
    policy: Policy = None,
    option: Settings = None,
    mixed_precision: Precision = None,
    tracker: Tracker = None,
    num_workers: Workers = 0,
    quick: Quick = False,
    output: Output = Path("comparison"),
) -> None:
    """Train with every loss and seed; write results, a report and pictures. Goes on where it was interrupted."""
    from hem_ext.harness.compare import make_cells, run
    from hem_ext.harness.tasks import TASKS

    with _told():
        values = {name: [float(v) for v in text.split(",")] for name, text in _pairs(sweep)}
        cells = make_cells(
            tasks,
            losses=losses.split(",") if losses else None,
            seeds=seeds,
            quick=quick,
            sweep=values,
            **_given(data, data_root, model, epochs, batch_size, max_lr, policy, option, mixed_precision),
        )
        for cell in cells:
            if cell.seed == 0:
                TASKS[cell.task].check(cell)
        _known_tracker(tracker)
    run(cells, output, tracker=tracker, num_workers=num_workers)


@app.command()
def paper(
    quick: Quick = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="5, or 2 with --quick.")] = None,
    output: Output = Path("paper"),
) -> None:
    """Every task on the bundled data, with the losses that each compares by itself."""
    from hem_ext.harness.compare import make_cells, run
    from hem_ext.harness.tasks import TASKS

    run(make_cells(list(TASKS), seeds=seeds or (2 if quick else 5), quick=quick), output)


def _given(
    data: str | None,
    data_root: Path | None,
    model: str | None,
    epochs: int | None,
    batch_size: int | None,
    max_lr: float | None,
    policy: str | None,
    option: list[str] | None,
    mixed_precision: str | None,
) -> dict[str, Any]:
    return {
        "data": data,
        "data_root": None if data_root is None else str(data_root),
        "model": model,
        "epochs": epochs,
        "batch_size": batch_size,
        "max_lr": max_lr,
        "policy": policy,
        "mixed_precision": mixed_precision,
        "options": {name: _value(text) for name, text in _pairs(option)},
    }


def _pairs(texts: list[str] | None) -> Iterator[tuple[str, str]]:
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"expected NAME=VALUE, got {text!r}")
        yield name, value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _known_tracker(tracker: str | None) -> None:
    if tracker not in (None, "tensorboard"):
        raise ValueError(f"unknown tracker {tracker!r}: there is tensorboard")


@contextmanager
def _told() -> Iterator[None]:
    """A wrong argument is told in one line, without the way there."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError, ImportError) as error:
        typer.echo(f"hem-ext: {error}", err=True)
        raise typer.Exit(2) from error
