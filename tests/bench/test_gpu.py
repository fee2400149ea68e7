import sys

from gpu import Evidence


def test_steps_pass_fail_and_run_out_of_time(tmp_path, capsys):
    evidence = Evidence(tmp_path, minutes=1, environment={"NUMBER": "7"})
    python = [sys.executable, "-c"]
    assert evidence.step("good", [*python, "import os; print('a'); print(os.environ['NUMBER'])"], minutes=1)
    assert not evidence.step("bad", [*python, "import sys; print('why'); sys.exit(3)"], minutes=1)
    assert not evidence.step("slow", [*python, "import time; time.sleep(60)"], minutes=0)
    assert evidence.step("told", [*python, "import os; print(os.environ['MORE'])"], minutes=1, MORE="8")
    assert [(r["check"], r["outcome"], r["last_line"]) for r in evidence.rows] == [
        ("good", "passed", "7"),
        ("bad", "failed (3)", "why"),
        ("slow", "out of time", ""),
        ("told", "passed", "8"),
    ]
    assert (tmp_path / "bad.log").read_text() == "why\n"
    assert "--- bad: failed (3)" in capsys.readouterr().out
