"""Break Python as mutmut does, module by module: its tests have to notice, or ``survivors.txt`` says why not.

``python -m tests.mutants.python mix upsample`` takes these modules alone. Exit status 1 where a mutant lived of which
nothing is said. In a copy of the checkout: nothing here is changed.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.mutants.copies import check_without_mutant, copy_of_checkout, is_noticed
from tests.mutants.mutants import ROOT

IN_PROCESSES = (
    "killed_at_any_moment_the_same_command_ends_with_the_same_table",
    "side_by_side_cells_give_the_numbers_of_one_process",
    "workers_end_with_the_process_that_they_work_for",
    "a_worker_has_one_thread",
    "an_error_beside_a_long_training_comes_out_at_once",
    "a_process_that_was_killed_is_told_in_a_sentence",
    "two_processes_give_the_table_of_one",
)
"""Tests of comparisons that mutmut cannot run."""

CHOSEN = {
    "arguments": "tests/test_arguments.py",
    "harness.attacks": "tests/harness/test_attacks.py",
    "harness.cli": "tests/harness/test_cli.py tests/harness/test_paper.py "
    "--deselect tests/harness/test_cli.py::test_train_under_two_processes",
    "harness.compare": "tests/harness/test_compare.py "
    + " ".join(f"--deselect tests/harness/test_compare.py::test_{name}" for name in IN_PROCESSES),
    "harness.corruptions": "tests/harness/test_corruptions.py",
    "harness.data.augment": "tests/harness/data/test_augment.py",
    "harness.data.base": "tests/harness/data",
    "harness.data.bundled": "tests/harness/data/test_bundled.py",
    "harness.data.classification": "tests/harness/data/test_classification.py",
    "harness.data.folders": "tests/harness/data/test_folders.py",
    "harness.data.imbalance": "tests/harness/data/test_imbalance.py",
    "harness.data.openood": "tests/harness/data/test_openood.py",
    "harness.data.pictures": "tests/harness/data/test_folders.py tests/harness/data/test_segmentation.py",
    "harness.data.segmentation": "tests/harness/data/test_segmentation.py",
    "harness.data.unknown": "tests/harness/data/test_unknown.py",
    "harness.lock": "tests/harness/test_lock.py",
    "harness.losses": "tests/harness/test_losses.py",
    "harness.losses.adjusted": "tests/harness/test_losses.py",
    "harness.losses.base": "tests/harness/test_losses.py",
    "harness.losses.cross_entropy": "tests/harness/test_losses.py",
    "harness.losses.hem": "tests/harness/test_losses.py",
    "harness.losses.other": "tests/harness/test_losses.py",
    "harness.metrics": "tests/harness/test_metrics.py",
    "harness.models": "tests/harness/test_models.py",
    "harness.paper": "tests/harness/test_paper.py",
    "harness.report.active": "tests/harness/test_report_pictures.py",
    "harness.report.grid": "tests/harness/test_report_pictures.py",
    "harness.report.results": "tests/harness/test_report.py",
    "harness.report.style": "tests/harness/test_report_pictures.py",
    "harness.report.tables": "tests/harness/test_report.py",
    "harness.report.words": "tests/harness/test_report.py",
    "harness.tasks.adversarial": "tests/harness/tasks/test_adversarial.py tests/harness/tasks/test_every_task.py",
    "harness.tasks.classification": "tests/harness/tasks/test_classification.py tests/harness/tasks/test_every_task.py",
    "harness.tasks.continual": "tests/harness/tasks/test_continual.py tests/harness/tasks/test_every_task.py",
    "harness.tasks.corruption": "tests/harness/tasks/test_corruption.py tests/harness/tasks/test_every_task.py",
    "harness.tasks.imbalanced": "tests/harness/tasks/test_imbalanced.py tests/harness/tasks/test_every_task.py",
    "harness.tasks.ood": "tests/harness/tasks/test_ood.py tests/harness/tasks/test_every_task.py",
    "harness.tasks.segmentation": "tests/harness/tasks/test_segmentation.py tests/harness/tasks/test_every_task.py",
    "harness.training": "tests/harness/test_training.py tests/harness/test_kept.py "
    "--deselect tests/harness/test_training.py::test_two_processes_train_and_count_as_one",
    "harness.tune": "tests/harness/test_tune.py "
    "--deselect tests/harness/test_tune.py::test_a_killed_tuning_ends_with_the_same_choice",
    "harness.understanding": "tests/harness/test_understanding.py",
    "hem": "tests/test_hem.py tests/test_overwrite_input.py",
    "info": "tests/test_info.py",
    "linear": "tests/test_linear.py",
    "margins": "tests/test_margins.py",
    "mix": "tests/test_mix.py",
    "reference": "tests/test_hem.py tests/test_mix.py tests/test_arguments.py",
    "selective": "tests/test_selective.py",
    "stats": "tests/test_splitting.py",
    "transforms": "tests/test_transforms.py",
    "upsample": "tests/test_upsample.py",
}
"""A module of hem_ext, and, as pytest is told, the tests that have to notice what is wrong in it."""

APPLIED = {
    "_native": "tests/test_native.py tests/test_hem.py tests/test_linear.py tests/test_upsample.py "
    "-k 'test_native or opcheck or ops_are_what_they_say or dynamic_shapes or backend_is_the_one'",
    "_torch": "tests/test_torch.py",
    "parallel": "tests/test_parallel.py",
    "sharded": "tests/test_process_group.py tests/test_hem.py tests/test_upsample.py -k sharded",
    "splitting": "tests/test_splitting.py tests/test_process_group.py -k divide",
}
"""The same where mutmut's way, a function that chooses among all mutants of another, does not go: what is called as
hem_ext is imported, is compiled, or runs in other processes than pytest's. There the file itself is changed."""

LEFT_OUT = [
    # What traces a call sees what mutmut wraps functions in.
    *("compile", "exported", "symbolic", "opcheck", "at_the_call"),
    # Kernels alone, or the same lines of Python again.
    *("two_to_the_31", "avx", "caches", "aligned", "thread", "dtype2", "dtype3", "any_strides", "far_apart"),
    *("shares_of_a_batch", "memory_formats"),
    "(gradcheck and (transposed or batchmean or (reference and (channels_last or none or sum))))",
]
NOTICED = ("killed", "timeout", "segfault", "caught by type check")
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
SETTINGS = """
[tool.mutmut]
source_paths = ["hem_ext"]
only_mutate = [{file}]
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
    modules = sorted(CHOSEN | APPLIED)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(modules)}; all of them")
    parser.add_argument("--jobs", default=1, type=int, help="mutants that are tried side by side")
    options = parser.parse_args()
    # One thread: processes are forked, and torch's threads do not come along.
    os.environ |= {"OMP_NUM_THREADS": "1", "TEST_PROCESSES": "fork"}
    unknown = {name: try_all(name, options.jobs) for name in options.modules or modules}
    print("".join(f"\n{name}: {count} of which nothing is said" for name, count in unknown.items()))
    sys.exit(any(unknown.values()))


def try_all(module: str, jobs: int) -> int:
    """How many mutants of a module lived of which nothing is said."""
    with tempfile.TemporaryDirectory(prefix="mutmut-") as folder:
        tried, alive = (try_applied if module in APPLIED else try_chosen)(Path(folder), module, jobs)
    known = explained()
    new = [change for change in alive if known.keys().isdisjoint((change, Change(change.function, "", "")))]
    for change in new:
        print(f"{change.function}\n- {change.old}\n+ {change.new}")
    print(f"{module}: {tried} mutants, {len(alive)} not noticed, unexplained {len(new)}", flush=True)
    return len(new)


def try_chosen(folder: Path, module: str, jobs: int) -> tuple[int, list[Change]]:
    """How many mutants there are, and those that no test noticed, by mutmut itself."""
    tree = prepared(folder, module)
    mutmut(tree, "--max-children", str(jobs))
    return results(tree, module)


def try_applied(folder: Path, module: str, jobs: int) -> tuple[int, list[Change]]:
    """The same, of mutants that are written into the file one after the other, each for processes of its own."""
    importlib.import_module("tests.processes")  # and what else takes long to import
    trees = [prepared(folder / str(job), module) for job in range(jobs)]
    for tree in trees:
        mutmut(tree, "none", expected=1)  # no mutant has this name: that is said when all are written
    made = (trees[0] / "mutants" / f"{file_of(module)}.meta").read_text("utf-8")
    names = list(json.loads(made)["exit_code_by_key"])
    check_without_mutant(trees[0], shlex.split(APPLIED[module]))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        parts = pool.map(apply_each, trees, [module] * jobs, [names[job::jobs] for job in range(jobs)])
        return len(names), [change for part in parts for change in part]


def apply_each(tree: Path, module: str, names: list[str]) -> list[Change]:
    """The changes that no test notices."""
    from mutmut.mutation.diff_apply import apply_mutant, get_diff_for_mutant

    os.chdir(tree)
    path, alive = file_of(module), []
    source, tests = path.read_text("utf-8"), shlex.split(APPLIED[module])
    for name in names:
        apply_mutant(name)
        if not is_noticed(tree, tests):
            alive.append(change_of(name, get_diff_for_mutant(name, path=path)))
        path.write_text(source, "utf-8")
    return alive


def mutmut(tree: Path, *words: str, expected: int = 0) -> None:
    command = [str(Path(sys.executable).with_name("mutmut")), "run", *words]
    run = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if run.returncode != expected:
        lines = [line for line in f"{run.stdout}{run.stderr}".splitlines() if line[:1] not in SPINNER]
        sys.exit("\n".join([f"mutmut ended with {run.returncode}", *lines[-100:]]))


def file_of(module: str) -> Path:
    path = Path("hem_ext", *module.split("."))
    return path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")


def prepared(tree: Path, module: str) -> Path:
    """A copy of the checkout that says of which module mutmut makes mutants, and which tests it runs."""
    copy_of_checkout(tree)
    settings = SETTINGS.format(
        file=json.dumps(file_of(module).as_posix()),
        left_out=json.dumps(" and ".join(f"not {words}" for words in LEFT_OUT)),
        tests=json.dumps(shlex.split(CHOSEN.get(module, "--collect-only tests/test_oracle.py"))),
    )
    with (tree / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write(settings)
    path = tree / file_of(module)
    path.write_text(undecorated(path.read_text("utf-8")), "utf-8")
    return tree


def undecorated(source: str) -> str:
    """The same with ``name = decorator(name)`` after functions: mutmut leaves decorated ones alone."""
    tree, lines = ast.parse(source), source.splitlines(keepends=True)
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    functions = [node for body in bodies for node in body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    for function in sorted(functions, key=lambda node: -node.lineno):
        called = [ast.unparse(decorator) for decorator in function.decorator_list]
        if called in (["staticmethod"], ["classmethod"]):
            continue  # which it takes
        value = f"{'('.join([*called, function.name])}{')' * len(called)}"
        lines.insert(function.end_lineno, f"{' ' * function.col_offset}{function.name} = {value}\n")
        del lines[function.decorator_list[0].lineno - 1 : function.lineno - 1]
    return "".join(lines)


def results(tree: Path, module: str) -> tuple[int, list[Change]]:
    """What mutmut found."""
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code

    path, before = file_of(module), Path.cwd()
    os.chdir(tree)
    try:
        data = SourceFileMutationData(path=path)
        data.load()
        alive = [name for name, code in data.exit_code_by_key.items() if status_by_exit_code[code] not in NOTICED]
        return len(data.exit_code_by_key), [change_of(name, get_diff_for_mutant(name, path=path)) for name in alive]
    finally:
        os.chdir(before)


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
