"""What ``hem-ext paper`` runs."""

import math
from collections import Counter

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hem_ext.harness import compare, paper, understanding
from hem_ext.harness.cli import app
from hem_ext.harness.losses import LOSSES
from hem_ext.harness.report import SHARED, TUNED
from hem_ext.harness.tasks import TASKS
from hem_ext.harness.tune import read_tuned


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_second_protocol_has_what_was_chosen():
    tuned = {"ood": {"hem": {"max_lr": 0.7, "total": 5}, "ce": {"max_lr": 0.4}}}
    found = paper.protocols(tuned=tuned)
    shared, own = found[SHARED], found[TUNED]
    assert {(cell.task, cell.loss) for cell in own} == {("ood", "hem"), ("ood", "ce")}
    assert {cell.schedule.max_lr for cell in own} == {0.7, 0.4}
    assert len({cell.key for cell in shared}) == len(shared)
    assert any(cell.loss not in paper.MAIN[cell.task] for cell in shared)


def test_what_the_paper_has_chosen_is_of_its_grids():
    for task, by_loss in read_tuned(paper.TUNED_FILE).items():
        for loss, settings in by_loss.items():
            (grid,) = [grid for of_task, of_loss, _, grid in paper.GRIDS if (of_task, of_loss) == (task, loss)]
            assert settings.keys() == grid.keys()
            assert all(value in grid[name] for name, value in settings.items())


@pytest.mark.parametrize(("task", "loss", "seeds", "grid"), paper.GRIDS)
def test_grids_are_of_settings_that_there_are(task, loss, seeds, grid):
    assert loss in paper.MAIN[task]
    assert seeds >= 1
    assert all(name == "max_lr" or name in LOSSES[loss].constants() for name in grid)


def test_paper_is_every_task_under_both_protocols(monkeypatch, tmp_path):
    asked, margins, drawn = [], [], []
    monkeypatch.setattr(compare, "run_and_report", lambda *given, **options: asked.append((*given, options)))
    monkeypatch.setattr(compare, "run", lambda *given, **options: margins.append((*given, options)))
    monkeypatch.setattr(paper, "rows_of", lambda cells, output: (list(cells), output))
    monkeypatch.setattr(understanding, "draw", lambda *given: drawn.append(given))
    tuned = {"ood": {"hem": {"margin": 0.7}}}
    monkeypatch.setattr(paper, "read_tuned", lambda path: tuned)
    for arguments, most in (((), 10), (("--quick",), 2), (("--quick", "--seeds", 1), 1), (("--seeds", 3), 3)):
        result = invoke("paper", *arguments, "--jobs", 3, "--output", tmp_path)
        assert result.exit_code == 0, result.output
        quick = "--quick" in arguments
        wide, *rest = margins.pop()
        assert rest == [tmp_path, {"jobs": 3}]
        by_margin = [TASKS["ood"].cell("hem", s, quick=quick) for s in range(min(3, 3 if most == 2 else most))]
        expected = [cell.with_settings({"total": total}) for total in paper.TOTALS for cell in by_margin]
        assert wide == expected
        protocols, output, options = asked.pop()
        assert (output, options) == (tmp_path, {"jobs": 3})
        shared, own = protocols[SHARED], protocols[TUNED]
        assert drawn.pop() == (tmp_path, (shared, tmp_path), (wide, tmp_path))
        for task in TASKS:
            seeds = Counter(cell.loss for cell in shared if cell.task == task)
            others = {} if quick else dict.fromkeys(TASKS[task].losses, min(most, 5))
            assert seeds == others | dict.fromkeys(paper.MAIN[task], most)
            assert all(
                cell.schedule == (TASKS[task].quick_schedule if quick else TASKS[task].schedule)
                for cell in shared
                if cell.task == task
            )
        assert {cell.task for cell in shared} == set(TASKS)
        assert {cell.seed for cell in shared} == set(range(most))
        assert {cell.part for cell in [*shared, *own]} == {"test"}
        assert {cell.loss for cell in own if cell.task == "ood"} == {"hem"}
        assert all(cell.constants["margin"] == 0.7 for cell in own if cell.task == "ood")
        # Cross-entropy, HEM and a rival have all seeds on every task.
        for task in TASKS:
            seeds = [cell.loss for cell in shared if cell.task == task and cell.seed == most - 1]
            assert {"ce", "hem"} < set(seeds)


def test_paper_chooses_settings_anew(monkeypatch, tmp_path):
    asked, chosen = [], []

    def tune_grids(grids, output, *, jobs, console):
        chosen.append((grids, output, jobs))
        assert console is None
        return {"ood": {"hem": {"max_lr": 0.7}}}

    monkeypatch.setattr(compare, "side_by_side", lambda: 4)
    monkeypatch.setattr(compare, "run_and_report", lambda found, output, **options: asked.append((found, options)))
    monkeypatch.setattr(compare, "run", lambda cells, output, **options: asked.append((cells, options)))
    monkeypatch.setattr(paper, "tune_grids", tune_grids)
    drawn = []
    monkeypatch.setattr(understanding, "draw", lambda *given: drawn.append(given))
    result = invoke("paper", "--tune", "--seeds", 2, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    ((grids, output, jobs),) = chosen
    assert (output, jobs) == (tmp_path, 4)
    for (cells, grid), (task, loss, seeds, expected) in zip(grids, paper.GRIDS, strict=True):
        assert grid == expected
        assert len(cells) == seeds * math.prod(map(len, grid.values()))
        assert {(cell.task, cell.loss, cell.part) for cell in cells} == {(task, loss, "validation")}
    (margins, _), (found, options) = asked
    assert options == {"jobs": 4}
    assert {(cell.constants["total"], cell.seed) for cell in margins} == {(t, s) for t in paper.TOTALS for s in (0, 1)}
    assert {(cell.task, cell.loss, cell.schedule.max_lr) for cell in found[TUNED]} == {("ood", "hem", 0.7)}
    assert drawn == [(tmp_path, [], [])]
    monkeypatch.setenv("RANK", "1")
    assert invoke("paper", "--quick", "--output", tmp_path).exit_code == 0
    assert len(drawn) == len(chosen) == 1


def test_what_is_not_asked_for_is_the_whole_paper(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(paper, "tune_grids", lambda *given, **options: asked.append(options))
    monkeypatch.setattr(compare, "run", lambda *given, **options: asked.append((given, options)))
    monkeypatch.setattr(compare, "run_and_report", lambda *given, **options: asked.append((given, options)))
    monkeypatch.setattr(understanding, "draw", lambda *given: None)
    paper.run(tmp_path)
    margins, protocols = paper.margin_cells(), paper.protocols()
    assert asked == [((margins, tmp_path), {"jobs": 1}), ((protocols, tmp_path), {"jobs": 1})]
    assert {(cell.seed, cell.schedule) for cell in margins} == {(s, TASKS["ood"].schedule) for s in range(3)}
    assert paper.margin_cells(seeds=9) == margins
    asked.clear()
    console = Console(quiet=True)
    paper.choose(tmp_path)
    paper.choose(tmp_path, jobs=3, console=console)
    assert asked == [{"jobs": 1, "console": None}, {"jobs": 3, "console": console}]
