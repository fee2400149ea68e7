import pytest
import torch
import upsample
from upsample import Head

FACTS = {"cpu": "Some CPU", "threads": 2, "torch": "2.13.0", "hem_ext": "0.1.0", "commit": "abc", "date": "2026-01-02"}


def row(way, share, seconds, allocated):
    told = {"way": way, "share": share, "seconds": [0, seconds, 0], "allocated": allocated}
    return {**FACTS, "kind": "upsampled", "head": "a head", "dtype": "float32", **told}


ROWS = [
    row("hem, fused", 1.0, 2.0, 10),
    row("hem", 1.0, 6.0, 150),
    row("ce", 1.0, 9.0, 200),
    row("hem, fused", 0.1, 1.0, 10),
    row("hem", 0.1, 5.0, 150),
]


def test_the_table_holds_ratios():
    assert upsample.table(ROWS)[1:] == [
        ["a head", "100%", "3.0", "4.5", "15", "20"],
        ["a head", "10%", "5.0", "9.0", "15", "20"],
    ]


def test_the_page_gets_the_table(tmp_path):
    page = tmp_path / "upsample.md"
    page.write_text("before\n<!-- begin upsampled -->\nold\n<!-- end upsampled -->\nafter\n")
    upsample.write_page(page, ROWS, [tmp_path / "rows.jsonl"])
    text = page.read_text()
    assert text.startswith("before\n<!-- begin upsampled -->\n`python bench/upsample.py report ")
    assert "2 cores, Some CPU; torch 2.13.0, hem_ext 0.1.0 at abc, 2026-01-02\n\n| labels and logits | active |" in text
    assert text.endswith("| 20 |\n<!-- end upsampled -->\nafter\n")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_is_measured_with_every_share(dtype):
    rows = upsample.run(Head("some", 2, 5, (96, 128), 4), dtype, "cpu", seconds=0, min_rounds=2)
    expected = {(way, share) for way in ("hem, fused", "hem") for share in upsample.SHARES} | {("ce", 1.0)}
    assert {(r["way"], r["share"]) for r in rows} == expected
    assert all(r["rounds"] == 2 and r["seconds"][1] > 0 and r["allocated"] > 0 for r in rows)
    lines = upsample.table([{**FACTS, **r} for r in rows])
    assert [line[1] for line in lines] == ["active", "100%", "10%"]
