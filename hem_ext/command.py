"""The command ``hem-ext``. Its parts need the harness extra; this says so where it is missing."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from hem_ext.harness.cli import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "hem_ext":
            raise
        sys.exit(
            f"hem-ext needs the harness extra ({error.name} is not installed): in a clone of hem_ext, "
            "pip install --no-build-isolation -e '.[harness]'"
        )
    app()


if __name__ == "__main__":
    main()
