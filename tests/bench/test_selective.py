import json
import re

import documents
import numpy as np
import pytest
import selective
import torch
from torch import nn

from hem_ext.harness.training import Schedule

FACTS = {"cpu": "Some CPU", "threads": 2, "torch": "2.13.0", "hem_ext": "0.1.0", "commit": "abc", "date": "2026-01-02"}


def step(way, share, seconds, allocated, mean=None):
    facts = {**FACTS, "kind": "step", "network": "small-gn", "batch": 8}
    seconds = {"seconds": [0, seconds, 0], "mean_seconds": mean or seconds}
    return {**facts, "way": way, "share": share, "allocated": allocated, **seconds}


STEPS = [
    step("plain", 0.25, 6.0, 100, mean=8.0),
    step("selective", 0.25, 4.0, 40),
    step("chosen", 0.25, 5.0, 40, mean=10.0),
]


def training(way, seed, accuracy, seconds, **more):
    facts = {**FACTS, "kind": "training", "network": "small-gn", "epochs": 2, "seed": seed, "way": way}
    return {**facts, "accuracy": accuracy, "seconds": sum(seconds), "seconds_by_epoch": seconds, **more}


EXACT = {"share_by_epoch": [1.0, 0.1], "allowed": 0.7, "gradient_difference": [1e-8, 2e-7], "weight_difference": 3e-6}
TRAININGS = [
    training("ce", 0, 0.90, [3.0, 3.0]),
    training("hem", 0, 0.92, [2.0, 2.0]),
    training("hem selective", 0, 0.92, [2.0, 1.0], **EXACT),
    training("composer", 0, 0.89, [3.0, 1.5]),
    training("ce", 1, 0.91, [3.0, 3.0]),
    training("hem", 1, 0.90, [2.0, 2.0]),
    training("hem selective", 1, 0.91, [2.0, 1.0], **EXACT),
    training("composer", 1, 0.88, [3.0, 1.5]),
]


def test_a_step_is_compared_with_the_plain_one():
    assert selective.steps_table(STEPS)[1:] == [["`small-gn`, batch 8", "25%", "1.50", "0.80", "1.71", "0.40"]]


def test_trainings_are_compared_seed_by_seed():
    ce, hem, found, composer = selective.trainings_table(TRAININGS)[1:]
    assert ce == ["`small-gn`", "2", "2", "cross-entropy", "0.9050", "", "1", ""]
    assert hem[5:] == ["cross-entropy: +0.0050 [-0.1856, +0.1956], p 0.80", "0.67", ""]
    assert found[3:] == ["HEM, selective", "0.9150", "HEM: +0.0050 [-0.0585, +0.0685], p 0.50", "0.75", "0.70"]
    assert composer[5:] == ["cross-entropy: -0.0200 [-0.1471, +0.1071], p 0.30", "0.75", ""]


def test_a_small_p_is_not_0():
    ahead = [{**row, "accuracy": row["accuracy"] + 9 * (row["way"] == "hem")} for row in TRAININGS]
    assert selective.trainings_table(ahead)[2][5].endswith("], p <0.01")


def test_the_largest_difference_of_any_seed_is_told():
    assert selective.exactness_table(TRAININGS)[1:] == [["`small-gn`", "2", "1e-08", "2e-07", "3e-06"]]


def test_the_page_gets_its_tables(tmp_path):
    page, file = tmp_path / "page.md", tmp_path / "rows.jsonl"
    markers = [documents.MARKER.format(end, name) for name in selective.TABLES for end in ("begin", "end")]
    page.write_text("before\n" + "\n".join(markers) + "\nafter\n")
    documents.append(file, {}, STEPS + TRAININGS)
    rows = documents.read([file, tmp_path / "none.jsonl"])
    assert rows == STEPS + TRAININGS
    for _ in range(2):
        selective.write_page(page, rows, [file])
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert text.count("| `small-gn`") == 6
        assert text.count(f"`python bench/selective.py report {file}`: 2 cores, Some CPU; torch 2.13.0") == 3
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="has no <!-- begin steps -->"):
        selective.write_page(page, rows, [file])


def test_pictures(tmp_path):
    for path in selective.draw(tmp_path, TRAININGS):
        assert path.stat().st_size > 5000


@pytest.mark.parametrize("number", [0, 49, 50, 51, 88, 90, 99])
def test_composer_s_rule_keeps_half_by_the_rank_of_the_loss(number):
    """Between half and 0.9 of the training, but for each second step."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 3), torch.zeros(64, dtype=torch.int64)
    x[:16, 0] = 30.0  # those have the least loss
    sizes = []

    class Counted(nn.Module):
        def forward(self, x):
            sizes.append((len(x), int((x[:, 0] == 30).sum()), torch.is_grad_enabled()))
            return x

    counts = []
    for seed in range(20):
        sizes.clear()
        selective._composer(Counted(), x, y, number, 100, np.random.default_rng(seed))
        counts.append(sizes[-1][1])
        if number in (50, 88):
            assert [size for size, _, _ in sizes] == [64, 32]
            assert [graph for *_, graph in sizes] == [False, True]
        else:
            assert sizes == [(64, 16, True)]
    if number in (50, 88):
        # Chances in proportion to the rank: of the lowest quarter about a sixteenth of the draws at first, more as
        # the others run out.
        assert 0 < np.mean(counts) < 5


def test_four_trainings_go_side_by_side_through_the_same_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(selective, "TRAININGS", [("small-gn", Schedule(2, 500, 0.1), 2)])
    file = tmp_path / "rows.jsonl"
    selective.train(file, FACTS, 1)
    rows = documents.read([file])
    assert [row["way"] for row in rows] == ["ce", "hem", "hem selective", "composer"]
    (found,) = [row for row in rows if row["way"] == "hem selective"]
    hem = rows[1]
    assert found["accuracy"] == pytest.approx(hem["accuracy"], abs=0.01)
    assert found["gradient_difference"][1] < 1e-3
    assert len(found["share_by_epoch"]) == len(found["seconds_by_epoch"]) == 2
    assert 0 < found["share_by_epoch"][1] <= 1
    text = file.read_text()
    selective.train(file, FACTS, 1)  # what is there is not run again
    assert file.read_text() == text
    assert all(re.fullmatch(r"\{.*\}", line) and json.loads(line) for line in text.splitlines())
