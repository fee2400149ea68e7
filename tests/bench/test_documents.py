"""The pages that hold tables of committed rows."""

import re
from pathlib import Path

import documents
import explain
import linear
import parallel
import pytest
import report
import selective
import upsample

ROOT = Path(linear.__file__).parents[1]
DOCS = ROOT / "docs"


MARKED = re.compile(r"(<!-- begin [\w ]+ -->\n)(.*?)(?=<!-- end)", flags=re.S)


def emptied(page, copy):
    """A copy of a page with nothing between its markers."""
    text = MARKED.sub(r"\1", page.read_text("utf-8"))
    assert text != page.read_text("utf-8")
    copy.write_text(text, "utf-8")
    return copy


@pytest.mark.parametrize(
    ("bench", "read", "page"),
    [
        (report, report.read, "performance.md"),
        (linear, documents.read, "linear.md"),
        (selective, documents.read, "selective.md"),
        (parallel, documents.read, "distributed.md"),
        (upsample, documents.read, "upsample.md"),
    ],
    ids=["report", "linear", "selective", "parallel", "upsample"],
)
def test_the_page_says_what_the_rows_say(tmp_path, bench, read, page):
    said = (DOCS / page).read_text("utf-8")
    shown = "".join(text for _, text in MARKED.findall(said))
    files = [file for file in sorted((ROOT / "bench" / "results").glob("*.jsonl")) if file.name in shown]
    assert files
    copy = emptied(DOCS / page, tmp_path / page)
    for file in files:
        bench.write_page(copy, read([file]), [file.relative_to(ROOT)])
    assert copy.read_text("utf-8") == said


def test_the_page_says_how_the_selective_trainings_were_made():
    after = (DOCS / "selective.md").read_text("utf-8").partition("<!-- end trainings -->")[2]
    said = " ".join(after.partition("![")[0].split())
    for network, schedule, _ in selective.TRAININGS:
        with_it = said.partition(f"`{network}`")[2]
        numbers = f"weight decay {schedule.weight_decay:g} and a rate of {schedule.max_lr:g}"
        assert numbers in with_it.partition(", `")[0].partition(", both")[0]
        assert f"batches of {schedule.batch_size} by the {schedule.policy} schedule" in said


def test_what_is_explained_follows_from_the_loss_and_the_rows(tmp_path):
    for page in ("loss.md", "margin.md"):
        emptied(DOCS / page, tmp_path / page)
    explain.write_pages(tmp_path, explain.one_row(), explain.sweeps(DOCS / "paper"))
    for page in ("loss.md", "margin.md"):
        assert (tmp_path / page).read_text("utf-8") == (DOCS / page).read_text("utf-8")
