"""The command ``hem-ext``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Train networks with HEM and with cross-entropy.", no_args_is_help=True, pretty_exceptions_enable=False
)


@app.callback()
def _app() -> None:
    """Commands stay subcommands while there is only one."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the results and pictures.", file_okay=False)] = Path("demo"),
    seeds: Annotated[int, typer.Option(help="How often to train everything.", min=1)] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead of minutes: shows only that it runs.")
    ] = False,
) -> None:
    """Train a classifier and a segmentation network with each loss; print a table, write pictures."""
    from hem_ext.harness import demo

    demo.run(output, seeds=seeds, quick=quick)
