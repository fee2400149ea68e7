"""What the documents say of the paper's tasks is what the committed rows say."""

from pathlib import Path

import pytest

from hem_ext.harness import compare, paper, report
from hem_ext.harness.compare import make_cells
from hem_ext.harness.tasks import Cell
from hem_ext.harness.training import Schedule
from hem_ext.harness.tune import choose, read_tuned

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "docs" / "paper"


@pytest.fixture(scope="module")
def rows():
    found = compare.read_rows(PAPER)
    assert found
    return found


def test_rows_are_of_the_cells_that_the_command_runs(rows):
    cells = [*paper.margin_cells(), *(cell for cells in paper.protocols().values() for cell in cells)]
    assert {row["cell"] for row in rows if row["settings"]["part"] == "test"} <= {cell.key for cell in cells}


def test_settings_that_were_added_since_leave_the_keys_as_they_are(rows):
    for row in rows:
        settings = {**row["settings"], "schedule": Schedule(**row["settings"]["schedule"])}
        assert Cell(**settings).key == row["cell"]


def test_the_readme_says_what_the_report_says(rows):
    by_protocol = {name: {cell.key for cell in cells} for name, cells in paper.protocols().items()}
    summary = report.summary({name: [row for row in rows if row["cell"] in keys] for name, keys in by_protocol.items()})
    assert summary
    assert summary in (PAPER / "report.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = readme.partition("<!-- begin paper -->\n")[2].partition("<!-- end paper -->")[0]
    assert said == summary


@pytest.mark.parametrize(("task", "loss", "seeds", "grid"), paper.GRIDS)
def test_what_was_chosen_follows_from_the_rows(rows, task, loss, seeds, grid):
    cells = {cell.key for cell in make_cells([task], losses=[loss], seeds=seeds, sweep=grid, part="validation")}
    found = [row for row in rows if row["cell"] in cells]
    assert {row["cell"] for row in found} == cells
    assert choose(found, grid)[loss]["settings"] == read_tuned(paper.TUNED_FILE)[task][loss]
