"""Rows as a comparison leaves them, made up."""

from collections.abc import Sequence
from typing import Any

from hem_ext.harness.report import SHARED

SCHEDULE = {"epochs": 3, "batch_size": 64, "max_lr": 0.1, "policy": "one-cycle"}
CE, HEM = [0.90, 0.91, 0.93], [0.95, 0.97, 0.97]


def cells(
    task: str,
    loss: str,
    metrics: dict[str, Sequence[float]],
    *,
    data: str = "digits",
    part: str = "test",
    first_seed: int = 0,
    schedule: dict[str, Any] | None = None,
    selective: bool = False,
    **constants: float,
) -> list[dict[str, Any]]:
    """The rows of a loss, whose `metrics` hold one value per seed."""
    variant = " ".join(
        [loss, *(["selective"] if selective else []), *(f"{name}={value:g}" for name, value in constants.items())]
    )
    settings = {
        "task": task,
        "loss": loss,
        "data": data,
        "data_root": None,
        "model": "small",
        "mixed_precision": None,
        "part": part,
        "validation": None,
        "schedule": SCHEDULE | (schedule or {}),
        "constants": constants,
        "options": {"transfer": True, "data_options": {"num_train": 60}},
        **({"selective": True} if selective else {}),
    }
    return [
        {
            "cell": f"{task}-{data}-{variant}-{settings['schedule']['max_lr']}-{seed}".replace(" ", "-"),
            "task": task,
            "loss": variant,
            "seed": seed,
            "settings": settings | {"seed": seed},
            "metric": metric,
            "value": value,
            "seconds": 2.5,
            "loss_share": 0.125,
            "torch": "2.13.0",
            "hem_ext": "0.1.0",
            "device": "cpu",
            "machine": "x86_64",
            "of": len(metrics),
        }
        for i, seed in enumerate(range(first_seed, first_seed + len(next(iter(metrics.values())))))
        for metric, values in metrics.items()
        for value in [values[i]]
    ]


def classification(loss: str, accuracy: Sequence[float], ece: Sequence[float] | None = None, **given: Any):
    return cells("classification", loss, {"accuracy": accuracy, "ece": ece or [0.1] * len(accuracy)}, **given)


def one(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """As the only protocol."""
    return {SHARED: rows}
