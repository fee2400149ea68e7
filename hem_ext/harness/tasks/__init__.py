"""The paper's tasks, by name."""

from __future__ import annotations

from hem_ext.harness.tasks.base import Cell, Metric, Task, Workbench
from hem_ext.harness.tasks.classification import Classification
from hem_ext.harness.tasks.segmentation import Segmentation

__all__ = ["TASKS", "Cell", "Metric", "Task", "Workbench"]

TASKS: dict[str, Task] = {task.name: task for task in (Classification(), Segmentation())}
"""Every task by the name that tables and commands use."""
