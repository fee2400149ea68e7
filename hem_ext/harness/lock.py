"""One command at a time to a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Two commands that write to one folder would lose what the other writes; the processes of torchrun are one.

    Raises:
        ValueError: another command is at work in `output`.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / "lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(f"another process is at work in {output}: wait for it, or give another --output") from None
