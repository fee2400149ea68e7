"""The command ``hem-ext``."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

app = typer.Typer(
    help="Train networks with HEM and with the losses it is compared to.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Tasks = Annotated[list[str], typer.Argument(help="classification, ood, segmentation ...")]
Losses = Annotated[str | None, typer.Option(help="ce,hem,... ; each task's own if not given.")]
Output = Annotated[Path, typer.Option(help="Folder for results, models and pictures.", file_okay=False)]
Quick = Annotated[bool, typer.Option("--quick", help="Short schedules: shows only that everything runs.")]
Tracker = Annotated[str | None, typer.Option(help="tensorboard: learning curves in OUTPUT/tensorboard.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that load training images.")]
Fused = Annotated[
    bool, typer.Option("--fused-upsample", help="HEM interpolates the logits of pixels itself, and never holds them.")
]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, help="Cells side by side, each in a process of one thread; one for every core if not given."),
]


@dataclass
class Settings:
    """What decides a network, for every command that trains; named once, here."""

    data: Annotated[str | None, typer.Option(help="Data set, by name; each task has its own if not given.")] = None
    data_root: Annotated[Path | None, typer.Option(help="Folder of a data set that is not bundled.")] = None
    validation: Annotated[
        float | None,
        typer.Option(
            help="Share of the training part to choose by, of a set on disk; 0.1 if not given. At least one sample of "
            "every class is kept for choosing, and one for training."
        ),
    ] = None
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave pictures out that cannot be read, and say how many.")
    ] = False
    model: Annotated[
        str | None,
        typer.Option(help="small, small-gn, small-vit, timm:NAME, torchvision:NAME or smp:ARCHITECTURE/ENCODER."),
    ] = None
    epochs: Annotated[int | None, typer.Option(min=1)] = None
    batch_size: Annotated[int | None, typer.Option(min=1, help="Of all processes together.")] = None
    max_lr: Annotated[float | None, typer.Option(help="The largest learning rate.")] = None
    policy: Annotated[str | None, typer.Option(help="Of the learning rate: one-cycle, cosine, multi-step or poly.")] = (
        None
    )
    optimizer: Annotated[str | None, typer.Option(help="sgd, with Nesterov momentum, or adamw; sgd if not given.")] = (
        None
    )
    option: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="An option of the task; may be repeated.")
    ] = None
    mixed_precision: Annotated[str | None, typer.Option(help="bf16 or fp16; float32 if not given.")] = None

    def given(self) -> dict[str, Any]:
        """As :meth:`hem_ext.harness.tasks.Task.cell` takes them."""
        from hem_ext.harness.data.base import check_kind

        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("option", "skip_broken")}
        options = {name: _value(text) for name, text in _pairs(self.option)}
        if self.skip_broken:
            if self.data not in ("image-folder", "mask-folder"):
                raise ValueError(f"--skip-broken is for image-folder and mask-folder, got {self.data or 'no --data'}")
            data_options = options.get("data_options", {})
            check_kind("data_options", data_options, dict)
            options["data_options"] = {**data_options, "skip_broken": True}
        root = None if self.data_root is None else str(self.data_root)
        return {**plain, "data_root": root, "options": options}


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Show a command's argument `settings` to Typer as one option for every field of Settings."""
    hints = get_type_hints(Settings, include_extras=True)
    options = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(Settings)
    ]
    own_hints = get_type_hints(command, include_extras=True)
    own = [
        p.replace(annotation=own_hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, p in inspect.signature(command).parameters.items()
        if name != "settings"
    ]

    @functools.wraps(command)
    def with_settings(**values: Any) -> None:
        settings = Settings(**{f.name: values.pop(f.name) for f in fields(Settings)})
        with _told():
            command(settings=settings, **values)

    with_settings.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    return with_settings


@app.command()
@_with_settings
def train(
    settings: Settings,
    task: Annotated[str, typer.Argument(help="classification, ood, segmentation ...")],
    loss: Annotated[str, typer.Option(help="ce, hem, mm ...")] = "hem",
    constant: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Of the loss, such as margin=0.5; may be repeated.")
    ] = None,
    seed: int = 0,
    selective: Annotated[
        bool, typer.Option("--selective", help="Leave the samples that HEM has finished out of the backward pass.")
    ] = False,
    fused_upsample: Fused = False,
    quick: Quick = False,
    tracker: Tracker = None,
    num_workers: Workers = 0,
    timeout: Annotated[
        int, typer.Option(min=1, help="Seconds that processes wait for each other, before all end with an error.")
    ] = 1800,
    output: Output = Path("train"),
) -> None:
    """Train one network and measure it. Under torchrun or accelerate launch, all processes share every batch."""
    from hem_ext.harness.lock import only_one
    from hem_ext.harness.tasks import TASKS, Workbench
    from hem_ext.harness.training import end, make_accelerator, write_whole

    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: one of {', '.join(TASKS)}")
    constants = {name: _number(f"--constant {name}", value) for name, value in _pairs(constant)}
    how = {"selective": selective, "fused_upsample": fused_upsample}
    cell = TASKS[task].cell(loss, seed, quick=quick, constants=constants, **how, **settings.given())
    _check([cell], tracker)

    with only_one(output):
        options: dict[str, Any] = {"log_with": tracker, "project_dir": output} if tracker else {}
        accelerator = make_accelerator(timeout=timeout, mixed_precision=settings.mixed_precision, **options)
        if tracker:
            accelerator.init_trackers("tensorboard")

        def after_epoch(epoch: Any) -> None:
            values = {"loss": epoch.train_loss, "active": epoch.active, **epoch.metrics}
            if selective:
                values["selected"] = epoch.selected
            text = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            accelerator.print(f"{text}, {epoch.seconds:.1f} s")

        values = TASKS[task].run(Workbench(cell, output / "models", accelerator, after_epoch, num_workers))
        if accelerator.is_main_process:
            text = json.dumps({**cell.settings(), "metrics": values}, indent=1) + "\n"
            write_whole(output / "metrics.json", lambda path: path.write_text(text))
        for name, value in values.items():
            accelerator.print(f"{name}: {value:.4f}")
        end(accelerator)


@app.command()
@_with_settings
def compare(
    settings: Settings,
    tasks: Tasks,
    losses: Losses = None,
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=V1,V2,...", help="Values of the schedule's settings, or of constants of losses."),
    ] = None,
    tuned: Annotated[
        Path | None, typer.Option(help="tuned.json of hem-ext tune: each loss with its own settings too.")
    ] = None,
    selective: Annotated[
        bool, typer.Option("--selective", help="HEM's losses train selectively too, a row of their own, with times.")
    ] = False,
    fused_upsample: Fused = False,
    quick: Quick = False,
    tracker: Tracker = None,
    num_workers: Workers = 0,
    jobs: Jobs = None,
    output: Output = Path("comparison"),
) -> None:
    """Train with every loss and seed; write results, a report and pictures. Goes on where it was interrupted."""
    from hem_ext.harness import report
    from hem_ext.harness.compare import make_cells, run_and_report, tuned_cells
    from hem_ext.harness.tune import read_tuned

    cells = make_cells(
        tasks,
        losses=losses.split(",") if losses else None,
        seeds=seeds,
        quick=quick,
        sweep=_values(sweep),
        selective=selective,
        fused_upsample=fused_upsample,
        **settings.given(),
    )
    protocols = {report.SHARED: cells}
    if tuned is not None:
        protocols[report.TUNED] = tuned_cells(cells, read_tuned(tuned))
    _check([cell for of_protocol in protocols.values() for cell in of_protocol], tracker)
    run_and_report(protocols, output, tracker=tracker, num_workers=num_workers, jobs=jobs)


@app.command()
@_with_settings
def tune(
    settings: Settings,
    tasks: Tasks,
    grid: Annotated[
        list[str],
        typer.Option(metavar="NAME=V1,V2,...", help="Values to try, of the schedule's settings or of constants."),
    ],
    losses: Losses = None,
    seeds: Annotated[int, typer.Option(min=1)] = 2,
    quick: Quick = False,
    num_workers: Workers = 0,
    jobs: Jobs = None,
    output: Output = Path("tuning"),
) -> None:
    """Choose settings by validation, for every loss its own; write OUTPUT/tuned.json and pictures of the grid."""
    from hem_ext.harness import tune as tuning
    from hem_ext.harness.compare import make_cells, side_by_side

    given = {
        "losses": losses.split(",") if losses else None,
        "seeds": seeds,
        "quick": quick,
        **settings.given(),
    }
    values = _values(grid)
    _check(make_cells(tasks, sweep=values, part="validation", **given), None)
    tuning.tune(tasks, values, output, num_workers=num_workers, jobs=jobs or side_by_side(), **given)


@app.command()
def paper(
    quick: Quick = False,
    choose: Annotated[
        bool, typer.Option("--tune", help="Choose each loss's own settings anew first, which takes an hour.")
    ] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="At most so many; 10 or 5, with --quick 2.")] = None,
    jobs: Jobs = None,
    output: Output = Path("paper"),
) -> None:
    """Every task on the bundled data, with one schedule for all losses and with each loss's own."""
    from hem_ext.harness import paper as plan
    from hem_ext.harness.compare import side_by_side

    with _told():
        plan.run(output, quick=quick, seeds=seeds, tune=choose, jobs=jobs or side_by_side())


def _check(cells: list[Any], tracker: str | None) -> None:
    """Find what is wrong before anything is trained, and say what is left out."""
    from hem_ext.harness.tasks import TASKS

    if tracker not in (None, "tensorboard"):
        raise ValueError(f"unknown tracker {tracker!r}: there is tensorboard")
    said = set()
    for cell in cells:
        if cell.seed == cells[0].seed:
            TASKS[cell.task].check(cell)
            for note in TASKS[cell.task].notes(cell):
                if note not in said:
                    typer.echo(f"{cell.task}: {note}")
                said.add(note)


def _pairs(texts: list[str] | None) -> Iterator[tuple[str, str]]:
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"expected NAME=VALUE, got {text!r}")
        yield name, value


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{name} must be a number, got {text!r}") from error


def _values(texts: list[str] | None) -> dict[str, list[Any]]:
    return {name: [_value(text) for text in values.split(",")] for name, values in _pairs(texts)}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@contextmanager
def _told() -> Iterator[None]:
    """What is wrong with arguments or files is told in one line, without the way there.

    A task makes another error of what comes up once it trains, and is no matter of its files: see ``Task.run``.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        typer.echo(f"hem-ext: {_sentence(error)}", err=True)
        raise typer.Exit(2) from error


def _sentence(error: Exception) -> str:
    """What an error says; of one in a process that loads images, without the way there, which torch puts before it."""
    text = str(error)
    kind = type(error)
    raised = f"\n{kind.__name__ if kind.__module__ == 'builtins' else f'{kind.__module__}.{kind.__name__}'}: "
    return text.rpartition(raised)[2].strip() if "Original Traceback" in text else text
