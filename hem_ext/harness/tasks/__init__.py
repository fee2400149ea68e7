"""The paper's tasks, by name."""

from __future__ import annotations

from hem_ext.harness.tasks.adversarial import Adversarial
from hem_ext.harness.tasks.base import Cell, Metric, Task, Workbench
from hem_ext.harness.tasks.classification import Classification
from hem_ext.harness.tasks.continual import Continual
from hem_ext.harness.tasks.corruption import Corruption
from hem_ext.harness.tasks.imbalanced import Imbalanced
from hem_ext.harness.tasks.ood import OOD
from hem_ext.harness.tasks.segmentation import Segmentation

__all__ = ["TASKS", "Cell", "Metric", "Task", "Workbench"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Classification(),
        Corruption(),
        OOD(),
        Adversarial(),
        Imbalanced(),
        Continual(),
        Segmentation(),
    )
}
"""Every task by the name that tables and commands use."""
