"""Break Python as mutmut does, module by module: its tests have to notice, or ``survivors.txt`` says why not.

``python -m tests.mutants.python mix upsample`` takes these modules alone. Exit status 1 where a mutant lived of which
nothing is said. In a copy of the checkout: nothing here is changed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.mutants.mutants import ROOT

MODULES = {
    "arguments": ("test_arguments",),
    "hem": ("test_hem", "test_overwrite_input"),
    "linear": ("test_linear",),
    "margins": ("test_margins",),
    "mix": ("test_mix",),
    "reference": ("test_hem", "test_mix", "test_arguments"),
    "stats": ("test_splitting",),
    "transforms": ("test_transforms",),
    "upsample": ("test_upsample",),
}
"""A module of hem_ext, and the tests that have to notice what is wrong in it."""

LEFT_OUT = [
    # What traces a call sees what mutmut wraps functions in.
    *("compile", "exported", "symbolic", "opcheck"),
    # Kernels alone, or the same lines of Python again.
    *("two_to_the_31", "avx", "caches", "aligned", "thread", "dtype2", "dtype3", "any_strides", "far_apart"),
    *("shares_of_a_batch", "memory_formats"),
    "(gradcheck and (transposed or batchmean or (reference and (channels_last or none or sum))))",
]
SETTINGS = """
[tool.mutmut]
source_paths = ["hem_ext"]
only_mutate = [{module}]
also_copy = ["LICENSE", "README.md", "bench", "docs", "examples", "setup.py"]
process_isolation = "forkserver"
track_dependencies = false
pytest_add_cli_args = ["-p", "no:cacheprovider", "-k", {left_out}]
pytest_add_cli_args_test_selection = {tests}
"""


class Change(NamedTuple):
    """What a mutant does, by text that stays the same where mutmut's numbers do not."""

    function: str
    old: str
    new: str


def explained() -> dict[Change, str]:
    """What ``survivors.txt`` says of changes; of all in a function where nothing is replaced."""
    found: dict[Change, str] = {}
    reason = ""
    for block in Path(__file__).with_name("survivors.txt").read_text("utf-8").split("\n\n"):
        if block.startswith("# "):
            reason = " ".join(line.removeprefix("# ") for line in block.splitlines())
            continue
        function, old, new, *more = [*block.strip().splitlines(), "- ", "+ "]
        change = Change(function, old[1:].strip(), new[1:].strip())
        if change in found or not reason or more not in ([], ["- ", "+ "]):
            raise ValueError(f"said twice, without a reason, or too long: {block}")
        found[change] = reason
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(MODULES)}; all of them")
    parser.add_argument("--jobs", default=1, type=int, help="mutants that are tried side by side")
    options = parser.parse_args()
    unknown = {name: try_all(name, options.jobs) for name in options.modules or MODULES}
    print("".join(f"\n{name}: {count} of which nothing is said" for name, count in unknown.items()))
    sys.exit(any(unknown.values()))


def try_all(module: str, jobs: int) -> int:
    """How many mutants of a module lived of which nothing is said."""
    with tempfile.TemporaryDirectory(prefix="mutmut-") as folder:
        tree = copy_of_checkout(Path(folder), module)
        command = [str(Path(sys.executable).with_name("mutmut")), "run", "--max-children", str(jobs)]
        # One thread: processes are forked, and torch's threads do not come along.
        run = subprocess.run(
            command, cwd=tree, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if run.returncode:
            sys.exit(f"mutmut ended with {run.returncode}\n{run.stdout[-4000:]}{run.stderr[-4000:]}")
        tried, alive = results(tree, module)
    known = explained()
    new = [change for change in alive if known.keys().isdisjoint((change, Change(change.function, "", "")))]
    for change in new:
        print(f"{change.function}\n- {change.old}\n+ {change.new}")
    print(f"{module}: {tried} mutants, {len(alive)} not noticed, unexplained {len(new)}", flush=True)
    return len(new)


def copy_of_checkout(folder: Path, module: str) -> Path:
    tree = folder / "hem_ext"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "demo", "dist", "mutants", "paper")
    shutil.copytree(ROOT, tree, ignore=ignored)
    settings = SETTINGS.format(
        module=json.dumps(f"hem_ext/{module}.py"),
        left_out=json.dumps(" and ".join(f"not {words}" for words in LEFT_OUT)),
        tests=json.dumps([f"tests/{name}.py" for name in MODULES[module]]),
    )
    with (tree / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write(settings)
    return tree


def results(tree: Path, module: str) -> tuple[int, list[Change]]:
    """How many mutants there are, and those that no test noticed."""
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code

    path, before = Path("hem_ext", f"{module}.py"), Path.cwd()
    os.chdir(tree)
    try:
        data = SourceFileMutationData(path=path)
        data.load()
        alive = [name for name, code in data.exit_code_by_key.items() if not is_noticed(status_by_exit_code[code])]
        return len(data.exit_code_by_key), [change_of(name, get_diff_for_mutant(name, path=path)) for name in alive]
    finally:
        os.chdir(before)


def is_noticed(status: str) -> bool:
    return status in ("killed", "timeout", "segfault", "caught by type check")


def change_of(name: str, diff: str) -> Change:
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++"))]
    old, new = (" ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
    return Change(function_of(name), old, new)


def function_of(name: str) -> str:
    """``hem_ext.hem.xǁHEMLossǁforward__mutmut_3`` is of ``hem_ext.hem.HEMLoss.forward``."""
    module, _, rest = name.rpartition("__mutmut_")[0].rpartition(".")
    return f"{module}.{rest.removeprefix('xǁ').removeprefix('x_').replace('ǁ', '.')}"


if __name__ == "__main__":
    main()
