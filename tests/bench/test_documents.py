"""The pages that hold tables of committed rows."""

import re
from pathlib import Path

import linear
import pytest
import selective
from documents import read

ROOT = Path(linear.__file__).parents[1]


@pytest.mark.parametrize("bench", [linear, selective], ids=lambda bench: bench.__name__)
def test_the_page_says_what_the_rows_say(tmp_path, bench):
    page = ROOT / "docs" / f"{bench.__name__}.md"
    (file,) = (ROOT / "bench" / "results").glob(f"*-{bench.__name__}.jsonl")
    copy = tmp_path / page.name
    copy.write_text(
        re.sub(r"(<!-- begin \w+ -->\n).*?(?=<!-- end)", r"\1", page.read_text("utf-8"), flags=re.S), "utf-8"
    )
    assert copy.read_text("utf-8") != page.read_text("utf-8")
    bench.write_page(copy, read([file]), [file.relative_to(ROOT)])
    assert copy.read_text("utf-8") == page.read_text("utf-8")
