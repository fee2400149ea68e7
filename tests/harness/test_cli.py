import json
import re

import pytest
import torch
from typer.testing import CliRunner

from hem_ext.harness import demo
from hem_ext.harness.cli import app


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    result = CliRunner().invoke(
        app, ["demo", "--quick", "--seeds", "2", "--output", str(folder)], env={"COLUMNS": "80"}
    )
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_demo_prints_one_table(quick):
    _, output = quick
    rows = [line.strip() for line in output.splitlines() if "±" in line]
    names = [re.match(r"(digits|digit scenes) +(CE|HEM) ", row).groups() for row in rows]
    assert names == [(task, loss) for task in ("digits", "digit scenes") for loss in ("CE", "HEM")]
    for heading in ("margin", "accuracy", "mean IoU", "s/epoch", "in loss"):
        assert heading in output
    assert "…" not in output  # nothing is cut off in a usual terminal


def test_demo_writes_results_and_pictures(quick):
    folder, output = quick
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    cells = {(line["task"], line["loss"], line["seed"]) for line in lines}
    assert len(cells) == 2 * 2 * 2
    assert len(lines) == 2 * len(cells)
    assert {line["margin"] for line in lines if line["loss"] == "hem"} == {1.26, 0.5}
    last = next(line for line in lines if line["task"] == "digits" and line["epoch"] == 2)
    assert last["accuracy"] > 0.8
    for name in ("segmentation.png", "curves.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert name in output


def test_losses_start_from_the_same_weights_and_batches(tmp_path, monkeypatch):
    starts = []

    def fit(model, criterion, train, test, schedule, *, seed, after_epoch):
        weights = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
        starts.append((weights, train, schedule, seed))
        return real_fit(model, criterion, train, test, schedule, seed=seed, after_epoch=after_epoch)

    real_fit = demo.fit
    monkeypatch.setattr(demo, "fit", fit)
    demo.run(tmp_path, quick=True)
    assert len(starts) == 4
    for ce, hem in (starts[:2], starts[2:]):
        assert torch.equal(ce[0], hem[0])
        assert ce[1] is hem[1]
        assert ce[2:] == hem[2:]


def test_an_output_that_is_a_file(tmp_path):
    file = tmp_path / "taken"
    file.write_text("")
    result = CliRunner().invoke(app, ["demo", "--output", str(file)])
    assert result.exit_code == 2
    assert "is a file" in " ".join(result.output.replace("│", "").split())


def test_no_command_shows_help():
    result = CliRunner().invoke(app, [])
    assert "demo" in result.output
