import linear
import pytest
import torch
import torch.nn.functional as F
from linear import Head

FACTS = {"cpu": "Some CPU", "threads": 2, "torch": "2.13.0", "hem_ext": "0.1.0", "commit": "abc", "date": "2026-01-02"}


def row(way, share, seconds, allocated=10, head="a head"):
    return {
        **FACTS,
        "kind": "classifier",
        "head": head,
        "dtype": "float32",
        "way": way,
        "share": share,
        "seconds": [0, seconds, 0],
        "allocated": allocated,
    }


ROWS = [
    row("hem, fused", 1.0, 2.0, 10),
    row("hem", 1.0, 3.0, 85),
    row("ce", 1.0, 4.0),
    row("ce, chunked", 1.0, 5.0),
    row("hem, fused", 0.1, 1.0, 10),
    row("hem", 0.1, 2.5, 80),
]


def test_the_table_holds_ratios():
    lines = linear.table(ROWS)
    assert lines[1:] == [
        ["a head", "100%", "1.50", "2.00", "2.50", "", "1.00", "8.5"],
        ["a head", "10%", "2.50", "4.00", "5.00", "", "2.50", "8.0"],
    ]


def test_the_page_gets_the_table(tmp_path):
    page = tmp_path / "linear.md"
    page.write_text("before\n<!-- begin classifier -->\nold\n<!-- end classifier -->\nafter\n")
    linear.write_page(page, ROWS, [tmp_path / "rows.jsonl"])
    text = page.read_text()
    assert text.startswith("before\n<!-- begin classifier -->\n`python bench/linear.py report ")
    assert "2 cores, Some CPU; torch 2.13.0, hem_ext 0.1.0 at abc, 2026-01-02\n\n| classifier | share active |" in text
    assert text.endswith("| 8.0 |\n<!-- end classifier -->\nafter\n")
    assert "old" not in text
    page.write_text("no place\n")
    with pytest.raises(SystemExit, match="has no <!-- begin classifier -->"):
        linear.write_page(page, ROWS, [])


@pytest.mark.parametrize("head", [Head("rows", 256, 8, 40), Head("pixels", 2, 8, 7, (9, 12), channels_last=True)])
def test_every_way_is_measured_with_every_share(head):
    rows = linear.run(head, torch.float32, "cpu", seconds=0, min_rounds=2)
    fused = {"hem, fused", "hem"}
    others = {"ce"} if head.pixels else {"ce", "ce, chunked", "ce, linear_cross_entropy"}
    if not hasattr(F, "linear_cross_entropy"):
        others -= {"ce, linear_cross_entropy"}
    expected = {(way, share) for way in fused for share in linear.SHARES} | {(way, 1.0) for way in others}
    assert {(r["way"], r["share"]) for r in rows} == expected
    assert all(r["rounds"] == 2 and r["seconds"][1] > 0 and r["allocated"] > 0 for r in rows)
    assert len(linear.table([{**FACTS, **r} for r in rows])) == 4


def test_chunked_cross_entropy_is_cross_entropy():
    target, results = torch.randint(300, (64,)), []
    for loss_of in (
        lambda h, w, b: linear.ChunkedCrossEntropy.apply(h, w, b, target, 10),
        lambda h, w, b: F.cross_entropy(F.linear(h, w, b), target),
    ):
        given = Head("rows", 64, 16, 300).tensors(torch.float32, "cpu")
        loss = 2 * loss_of(*given)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in given)])
    torch.testing.assert_close(*results)
