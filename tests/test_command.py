import subprocess
import sys


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_the_harness_extra_the_command_says_what_to_install():
    done = run("import sys; sys.modules['typer'] = None; from hem_ext.command import main; main()")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "hem-ext needs the harness extra (typer is not installed): in a clone of hem_ext, "
        "pip install --no-build-isolation -e '.[harness]'"
    )


def test_a_broken_harness_is_not_blamed_on_the_extra():
    done = run("import sys; sys.modules['hem_ext.harness.cli'] = None; from hem_ext.command import main; main()")
    assert "ModuleNotFoundError" in done.stderr
    assert "pip install" not in done.stderr
