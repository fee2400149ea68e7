import socket

import documents
import parallel
import pytest

FACTS = {"cpu": "Some CPU", "threads": 2, "torch": "2.13.0", "hem_ext": "0.1.0", "commit": "abc", "date": "2026-01-02"}


def row(way, processes, *sent):
    return {**FACTS, "kind": "wire", "name": "a", "shape": [8, 6], "way": way, "processes": processes, "sent": sent}


ROWS = [
    row("class parallel", 3, [500, 500, 9000], [510, 510, 510], [490, 490, 490]),
    row("gathered", 3, [20_000] * 3, [20_000] * 3, [20_000] * 3),
    row("cross-entropy", 3, [400] * 3, [400] * 3, [400] * 3),
    row("class parallel", 2, [1_200_000] * 3, [1_200_000] * 3),
    row("gathered", 2, [600_000] * 3, [600_000] * 3),
    row("cross-entropy", 2, [1000] * 3, [1000] * 3),
]
SECONDS = {"class parallel": [2.0, 9.0, 2.0], "gathered": [3.0] * 3, "cross-entropy": [1.0] * 3}
SECONDS["plain PyTorch"] = [8.0] * 3
TIMES = [
    {**FACTS, "kind": "time", "name": "a", "shape": [8, 6], "processes": 2, "active": active, "seconds": seconds}
    for active, seconds in ((1.0, SECONDS), (0.1, SECONDS | {"class parallel": [1.0] * 3}))
]


def test_what_is_sent_is_counted_also_while_it_waits():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
        far, _ = server.accept()
        with far:
            before = parallel.sent()
            near.sendall(b"x" * 12345)
            far.sendall(b"x" * 55)
            assert parallel.sent() - before == 12400
            near.setblocking(False)
            count = near.send(b"x" * 10_000_000)  # more than the other side, which does not read, has room for
            assert 0 < count < 10_000_000
            assert parallel.sent() - before == 12400 + count


def test_the_number_of_classes_is_not_on_the_wire():
    rows = parallel.measure([2], {"few": (8, 6), "many": (8, 1006)})
    rows = [row for row in rows if row["kind"] == "wire"]
    found = {(row["name"], row["way"]): row["sent"] for row in rows}
    assert {row["processes"] for row in rows} == {2}
    assert all(len(set(calls)) == 1 and len(calls) == 3 for sent in found.values() for calls in sent)
    assert found["few", "class parallel"] == found["many", "class parallel"]
    assert found["few", "cross-entropy"] == found["many", "cross-entropy"]
    more = [b[0] - a[0] for a, b in zip(found["few", "gathered"], found["many", "gathered"], strict=True)]
    assert more == [8 * 500 * 4] * 2


def test_what_is_timed_takes_turns():
    times = [row for row in parallel.measure([2], {"few": (8, 6)}) if row["kind"] == "time"]
    assert [row["active"] for row in times] == [1.0, 0.1]
    for row in times:
        assert list(row["seconds"]) == ["class parallel", "gathered", "cross-entropy", "plain PyTorch"]
        assert all(len(seconds) == parallel.ROUNDS and min(seconds) > 0 for seconds in row["seconds"].values())


def test_the_tables():
    assert parallel.time_table(ROWS + TIMES)[1:] == [["a", "(8, 6)", "1.50 / 3.00", "0.50 / 1.00", "4.00 / 8.00"]]
    assert parallel.wire_table(ROWS + TIMES)[1:] == [
        ["a", "(8, 6)", "2", "1,200.0 kB", "600.0 kB", "200.00%", "1.0 kB"],
        ["a", "(8, 6)", "3", "0.5 kB", "20.0 kB", "2.50%", "0.4 kB"],
    ]


def test_the_page_gets_its_table(tmp_path):
    page = tmp_path / "page.md"
    markers = "".join(f"<!-- begin {name} -->\nold\n<!-- end {name} -->\n" for name in ("wire", "parallel time"))
    page.write_text(f"before\n{markers}after\n")
    for _ in range(2):
        parallel.write_page(page, ROWS + TIMES, [tmp_path / "rows.jsonl"])
        text = page.read_text()
        assert text.startswith("before\n<!-- begin wire -->\n`python bench/parallel.py report ")
        assert "| 0.4 kB |\n<!-- end wire -->\n<!-- begin parallel time -->\n`python bench/parallel.py report " in text
        assert text.endswith("| 4.00 / 8.00 |\n<!-- end parallel time -->\nafter\n")
    page.write_text("nothing")
    with pytest.raises(SystemExit, match=documents.MARKER.format("begin", "wire")):
        parallel.write_page(page, ROWS, [])
