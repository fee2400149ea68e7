"""Break the code on purpose, one mutant of ``mutants.py`` after the other, and see that the tests notice.

``python -m tests.mutants.run -k WORD`` takes those whose name or file holds a word. In a copy of the checkout: nothing
here is changed.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch._dynamo  # here, and not once more for every mutant

from tests.mutants.copies import check_without_mutant, copy_of_checkout, is_noticed
from tests.mutants.mutants import MUTANTS, ROOT, Mutant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", default="", metavar="WORD", help="mutants whose name or file holds this word")
    word = parser.parse_args().k
    # By file: what is compiled from a file is compiled once for each of its mutants, and once when the next file comes.
    chosen = sorted((m for m in MUTANTS if word in m.name or word in m.file), key=lambda m: m.file)
    if not chosen:
        sys.exit(f"no mutant has {word!r} in its name or file")
    left_out = [mutant for mutant in chosen if not can_run(mutant)]
    chosen = [mutant for mutant in chosen if can_run(mutant)]
    for mutant in left_out:
        print(f"left out: {mutant.name}, which needs {mutant.needs}", flush=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Tree(Path(folder))
        for kind in {"library"}.union(*map(kinds, chosen)):  # no test runs without the library
            tree.build(kind)
        print("the tests without a mutant", flush=True)
        every_test = dict.fromkeys(test for mutant in chosen for test in mutant.tests)
        check_without_mutant(tree.folder, every_test)
        wrong = [mutant.name for mutant in chosen if not tree.try_one(mutant)]
    print(f"{len(chosen)} mutants, {len(wrong)} not as expected{''.join(f'{chr(10)}  {name}' for name in wrong)}")
    sys.exit(bool(wrong))


def can_run(mutant: Mutant) -> bool:
    order = ["", "AVX2", "AVX512"]
    found = torch.backends.cpu.get_cpu_capability()
    return order.index(mutant.needs) <= (order.index(found) if found in order else 0)


def kinds(mutant: Mutant) -> set[str]:
    """What has to be compiled to run the tests of a mutant."""
    if mutant.file.endswith(".py"):
        return {"library"}
    return {
        "thread" if "[thread]" in test else "emulation" if "emulation" in test else "library" for test in mutant.tests
    }


class Tree:
    """A copy of the checkout, its builds kept between mutants."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mutated: Path | None = None  # the file that may differ from the checkout's
        copy_of_checkout(folder, "*.so")
        kernels = folder / "tests" / "emulation" / "kernels.py"
        text = kernels.read_text("utf-8")
        assert text.count('"-O1", "-g"') == 1
        kernels.write_text(text.replace('"-O1", "-g"', '"-O0"'), "utf-8")  # compiled in a third of the time
        self._write_ninja()

    def _write_ninja(self) -> None:
        before, sys.argv = sys.argv, ["setup.py", "build_scripts"]  # a command that builds nothing
        os.chdir(self.folder)
        extension = runpy.run_path("setup.py", run_name="__main__")["native_library"](False)
        sys.argv = before
        flags = ["-O1" if flag == "-O3" else flag for flag in extension.extra_compile_args["cxx"]]
        flags += ["-fPIC", *(f"-I{path}" for path in (*extension.include_dirs, sysconfig.get_path("include")))]
        flags += [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in extension.define_macros]
        libraries = [f"-L{path}" for path in extension.library_dirs] + [f"-l{name}" for name in extension.libraries]
        lines = [
            "rule compile",
            f"  command = c++ {' '.join(flags)} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "rule link",
            f"  command = c++ -shared $in {' '.join(libraries)} -o $out",
            *(f"build build/{source}.o: compile {source}" for source in extension.sources),
            f"build hem_ext/_C.abi3.so: link {' '.join(f'build/{source}.o' for source in extension.sources)}",
        ]
        (self.folder / "build.ninja").write_text("\n".join([*lines, ""]), "utf-8")

    def build(self, kind: str) -> None:
        command = ["ninja"]
        if kind != "library":
            command = [sys.executable, "tests/emulation/kernels.py", *([kind] if kind == "thread" else [])]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(self.folder)}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")

    def try_one(self, mutant: Mutant) -> bool:
        """Whether the tests noticed a mutant, or did not notice one that makes no difference."""
        begin = time.monotonic()
        path = self.folder / mutant.file
        if self.mutated not in (None, path):
            shutil.copyfile(ROOT / self.mutated.relative_to(self.folder), self.mutated)
        path.write_text(mutant.applied(), "utf-8")
        self.mutated = path
        for kind in kinds(mutant):
            self.build(kind)
        found = "killed" if is_noticed(self.folder, mutant.tests) else "survived"
        expected = "survived" if mutant.survives else "killed"
        note = "" if found == expected else f", but was to be {expected}"
        print(f"{found}{note}: {mutant.name}, {mutant.file} ({time.monotonic() - begin:.0f} s)", flush=True)
        return found == expected


if __name__ == "__main__":
    main()
