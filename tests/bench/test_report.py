import json

import pytest
import report

FACTS = {
    "device": "cpu",
    "cpu": "Some CPU",
    "cpu_isa": "avx512",
    "threads": 2,
    "torch": "2.13.0",
    "hem_ext": "0.1.0",
    "commit": "abc",
    "date": "2026-01-02T00:00:00Z",
}


def row(workload, peer, seconds, saved=800, **more):
    times = {"forward": [0, seconds / 4, 0], "backward": [0, seconds, 0], "both": [0, seconds, 0], "no grad": [0, 1, 0]}
    return {
        **FACTS,
        "workload": workload,
        "shape": [10, 20],
        "peer": peer,
        "seconds": times,
        "of_roofline": 0.5,
        "saved_bytes": saved,
        "peak_bytes": None if saved is None else 2 * saved,
        **more,
    }


ROWS = [
    row("a", "hem", 2.0, saved=100),
    row("a", "ce", 8.0),
    row("a", "hem, avx2", 4.0, of_roofline=0.25),
    row("a", "hem, bfloat16", 1.0),
    row("b", "hem", 1.0, saved=100),
    row("b", "ce", 0.5),
    row("b", "multi_margin_loss", 3.0),
]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_table():
    finished = row("a", "hem, 10% active", 1.0, of_roofline=0.75)
    heading, a, b = report.table([*ROWS, row("a", "hem, overwriting", 3.0, saved=60), finished])
    assert heading == [
        "", "shape", "overwriting", "CE", "multi-margin", "bf16 / fp32", "AVX2",
        "of the copy rate / 10% active / AVX2",
        "kept, CE", "kept, HEM", "peak, CE", "peak, HEM", "peak, overwriting",
    ]  # fmt: skip
    assert a[:9] == ["a", "(10, 20)", "1.50", "4.0", "", "0.50", "2.0", "50% / 75% / 25%", "4.00 B"]
    assert a[9:] == ["0.50 B", "8.00 B", "1.00 B", "0.60 B"]
    assert b == ["b", "(10, 20)", "", "0.50", "3.0", "", "", "50% / - / -", "4.00 B", "0.50 B", "8.00 B", "1.00 B", ""]
    assert "2 cores, Some CPU, avx512; torch 2.13.0" in report.text(ROWS)


def test_a_peer_without_numbers_is_left_blank():
    failed = {k: v for k, v in row("a", "ce", 1.0, saved=None).items() if k != "seconds"} | {"error": "out of memory"}
    assert report.table([ROWS[0], failed])[1][2:] == ["", "", "50%", "", "0.50 B", "", "1.00 B", ""]
    assert report.by_workload([failed]) == {}


def test_the_last_row_of_a_cell_counts_and_checks_are_no_rows(tmp_path):
    path = write(tmp_path / "r.jsonl", [{**FACTS, "check": "tests"}, row("a", "hem", 9.0), *ROWS])
    rows = report.read([path])
    assert len(rows) == len(ROWS)
    assert report.median(rows[0]) == 2.0
    with pytest.raises(SystemExit, match="no rows in"):
        report.read([write(tmp_path / "empty.jsonl", [])])


def test_what_got_worse():
    assert report.worse(ROWS, ROWS, 0.2) == []
    # Twice the time of everything is another machine, not a regression.
    slow = [{**r, "seconds": {k: [2 * s for s in v] for k, v in r["seconds"].items()}} for r in ROWS]
    assert report.worse(slow, ROWS, 0.2) == []
    changed = [row("a", "hem", 3.0, saved=101), *ROWS[1:4]]
    assert report.worse(changed, ROWS, 0.2) == [
        "a, ce: 2.67 times the time of hem_ext, was 4.00",
        "a, hem, avx2: 1.33 times the time of hem_ext, was 2.00",
        "a, hem, bfloat16: 0.33 times the time of hem_ext, was 0.50",
        "a: 101 bytes kept for backward, was 100",
        "b: not measured any more",
    ]
    assert report.worse([row("a", "hem", 2.1, saved=100), *ROWS[1:]], ROWS, 0.2) == []


def test_the_command_compares_two_files(tmp_path, monkeypatch, capsys):
    old, new = write(tmp_path / "old", ROWS), write(tmp_path / "new", [row("a", "hem", 9.0), *ROWS[1:]])
    for files, status in (((old, old), 0), ((new, old), 1)):
        monkeypatch.setattr("sys.argv", ["report.py", str(files[0]), "--against", str(files[1])])
        with pytest.raises(SystemExit) as stopped:
            report.main()
        assert stopped.value.code == status
    assert "nothing got worse\na, ce: 0.89 times" in capsys.readouterr().out


def test_the_page_gets_the_table_in_two_and_keeps_the_rest(tmp_path):
    page = tmp_path / "performance.md"
    markers = "<!-- begin {0} -->\nold\n<!-- end {0} -->\n"
    page.write_text(f"before\n{markers.format('speed')}between\n{markers.format('memory')}after\n")
    report.write_page(page, ROWS, [tmp_path / "r.jsonl"])
    text = page.read_text()
    assert text.startswith("before\n<!-- begin speed -->\n`python bench/report.py ")
    speed, memory = text.split("between")
    assert "| b | (10, 20) | 0.50 | 3.0 |  |  | 50% / - |\n<!-- end speed -->\n" in speed
    assert "| a | (10, 20) | 4.00 B | 0.50 B | 8.00 B | 1.00 B |  |\n" in memory
    assert all("2 cores, Some CPU, avx512; torch 2.13.0" in part for part in (speed, memory))
    assert text.endswith("<!-- end memory -->\nafter\n")
    assert "old" not in text
    report.write_page(page, ROWS, [tmp_path / "r.jsonl"])
    assert page.read_text() == text
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="has no <!-- begin speed -->"):
        report.write_page(page, ROWS, [])
    measured = [{**r, "malloc": {"MALLOC_X_": "1"}} for r in ROWS]
    page.write_text("<!-- begin reused -->\n<!-- end reused -->\n")
    report.write_page(page, measured, [])
    assert "2 cores, Some CPU, avx512, MALLOC_X_=1; torch" in page.read_text()
    assert "| b | (10, 20) | 0.50 | 3.0 |  |  | 50% / - |\n<!-- end reused -->\n" in page.read_text()


def test_pictures(tmp_path):
    paths = report.draw(tmp_path, ROWS)
    assert [path.name for path in paths] == ["speed.png", "memory.png", "roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
