import json

import pytest

from hem_ext.harness import understanding
from hem_ext.harness.tasks import TASKS


def rows_of(task, loss, values, output=None, **constants):
    """Rows of three seeds, as a comparison writes them, and their curves."""
    found = []
    for seed in range(3):
        cell = TASKS[task].cell(loss, seed, constants=constants, epochs=4)
        about = {"task": task, "loss": cell.variant, "seed": seed, "cell": cell.key, "settings": cell.settings()}
        if output is not None:
            epoch = {"active": 0.5 / (1 + seed), "kept": 2.0, "logit_gap": 3.0 + seed, "logit_scale": 1.5, "seconds": 1}
            # A second training follows, as that of the transfer in classification.
            history = [{**shown, "metrics": {}} for shown in [epoch] * 4 + [dict.fromkeys(epoch, 99)] * 4]
            with (output / "curves.jsonl").open("a") as file:
                file.write(json.dumps({"cell": cell.key, "history": history}) + "\n")
        found += [{**about, "metric": name, "value": value} for name, value in values.items()]
    return found


def rejection(value):
    names = [f"{where}_auroc {score}" for where in ("near", "far") for score in understanding.TITLES]
    names += [f"{w}_auroc msp of logits times {s:g}" for w in ("near", "far") for s in understanding.SCALES]
    return dict.fromkeys(names, value)


def test_training_is_drawn_by_epoch(tmp_path):
    rows = [row for loss in ("ce", "hem", "mm") for row in rows_of("classification", loss, {"accuracy": 1.0}, tmp_path)]
    assert understanding.draw(tmp_path, rows, []) == ["why-training.png"]
    assert (tmp_path / "why-training.png").stat().st_size > 10_000
    figure = understanding._draw_training(tmp_path, rows)
    active, _, gap, _ = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ce", "hem"]
    for line in active.lines:
        assert line.get_ydata().tolist() == pytest.approx([0.5 * (1 + 1 / 2 + 1 / 3) / 3] * 4)
    assert gap.lines[0].get_ydata().tolist() == [4.0] * 4


def test_rejection_is_drawn_by_margin_and_scale(tmp_path):
    rows = rows_of("ood", "ce", rejection(0.7)) + rows_of("ood", "hem", rejection(0.8))
    margins = [row for t in (500.0, 2000.0) for row in rows_of("ood", "hem", rejection(t / 4000), total=t)]
    assert understanding.draw(tmp_path, rows, margins) == ["why-rejection.png"]
    near = understanding._draw_rejection(rows, margins).axes[0]
    # Half the margin of the rule, and that of the rule.
    assert near.lines[0].get_xdata().tolist() == [0.5, 1.0]
    assert near.lines[0].get_ydata().tolist() == [0.125, 0.5]


def test_nothing_is_drawn_of_nothing(tmp_path):
    assert understanding.draw(tmp_path, [], []) == []
    assert list(tmp_path.iterdir()) == []
