import json

import pytest
from matplotlib import image

from hem_ext.harness import understanding
from hem_ext.harness.report.style import COLORS
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
    assert image.imread(tmp_path / "why-training.png").shape == (1140, 1200, 4)
    figure = understanding._draw_training(tmp_path, rows)
    active, _, gap, _ = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ce", "hem"]
    for line in active.lines:
        assert line.get_ydata().tolist() == pytest.approx([0.5 * (1 + 1 / 2 + 1 / 3) / 3] * 4)
        assert line.get_xdata().tolist() == [1, 2, 3, 4]
    assert gap.lines[0].get_ydata().tolist() == [4.0] * 4
    assert [axis.get_xlabel() for axis in figure.axes] == ["", "", "", "epoch"]
    assert [axis.get_ylabel() for axis in figure.axes] == [
        *("with a gradient, share", "other classes with one,\nmean over these"),
        *("logit gap, mean", "deviation of a sample's\nlogits, mean"),
    ]
    assert {axis.get_ylim()[0] for axis in figure.axes} == {0}


def test_every_task_with_curves_is_a_column(tmp_path):
    rows = [row for loss in ("ce", "hem", "hem+") for row in rows_of("segmentation", loss, {"mean_iou": 1.0}, tmp_path)]
    rows += rows_of("imbalanced", "hem", {"accuracy": 1.0}, tmp_path)
    rows += rows_of("classification", "hem", {"accuracy": 1.0})
    rows += rows_of("continual", "hem", {"forgetting": 1.0}, tmp_path)
    # Of cross-entropy a seed is missing.
    lines = (tmp_path / "curves.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "curves.jsonl").write_text("".join(lines[1:]))
    figure = understanding._draw_training(tmp_path, rows)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["imbalanced: samples", "segmentation: pixels", *[""] * 6]
    assert [len(axis.lines) for axis in figure.axes] == [1, 2] * 4
    assert [axis.get_xlabel() for axis in figure.axes] == [*[""] * 6, "epoch", "epoch"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["hem", "hem margin=0.5", "hem+"]
    assert [line.get_color() for line in figure.axes[1].lines] == [COLORS["hem"], COLORS["hem+"]]
    assert figure.axes[1].get_shared_x_axes().joined(figure.axes[1], figure.axes[7])
    assert not [axis.get_ylabel() for axis in figure.axes[1::2] if axis.get_ylabel()]
    assert understanding.draw(tmp_path, [row for row in rows if row["task"] == "classification"], []) == []


def is_a_row_below(legend, figure):
    figure.draw_without_rendering()
    rows = {round(text.get_window_extent().y0) for text in legend.get_texts()}
    return len(rows) == 1 and legend.get_window_extent().y1 <= min(axis.get_tightbbox().y0 for axis in figure.axes)


def test_the_legend_has_every_loss_once(tmp_path):
    losses = {"classification": "hem", "imbalanced": "hem", "segmentation": "hem+"}
    rows = [row for task, loss in losses.items() for row in rows_of(task, loss, {"accuracy": 1.0}, tmp_path)]
    figure = understanding._draw_training(tmp_path, rows)
    (legend,) = figure.legends
    named = {text.get_text(): line.get_color() for text, line in zip(legend.texts, legend.get_lines(), strict=True)}
    assert named == {loss: COLORS[loss] for loss in ("hem", "hem+")}
    assert is_a_row_below(legend, figure)


def test_rejection_is_drawn_by_margin_and_scale(tmp_path):
    rows = rows_of("ood", "ce", rejection(0.7)) + rows_of("ood", "hem", rejection(0.8))
    margins = [row for t in (500.0, 2000.0) for row in rows_of("ood", "hem", rejection(t / 4000), total=t)]
    assert understanding.draw(tmp_path, rows, margins) == ["why-rejection.png"]
    assert (tmp_path / "why-rejection.png").stat().st_size > 10_000
    near = understanding._draw_rejection(rows, margins).axes[0]
    # Half the margin of the rule, and that of the rule.
    assert near.lines[0].get_xdata().tolist() == [0.5, 1.0]
    assert near.lines[0].get_ydata().tolist() == [0.125, 0.5]


def points(axis):
    """Label -> (x, mean, what the bar reaches) of each point."""
    found = {}
    for container in axis.containers:
        line, _, (bars,) = container
        ends = [segment[:, 1] for segment in bars.get_segments()]
        found[container.get_label()] = [(*p, *end) for p, end in zip(line.get_xydata(), ends, strict=True)]
    return found


def test_rejection_has_every_score_and_loss():
    scores = list(understanding.TITLES)
    measured = [f"{where}_auroc {score}" for where in ("near", "far") for score in scores]
    scaled = {s: [f"{w}_auroc msp of logits times {s:g}" for w in ("near", "far")] for s in understanding.SCALES}
    measured += [name for names in scaled.values() for name in names]
    values = {name: 0.1 + i / 100 for i, name in enumerate(measured)}
    rows = rows_of("ood", "ce", values) + rows_of("ood", "hem", {name: v + 0.3 for name, v in values.items()})
    rows += rows_of("classification", "ce", {"accuracy": 1.0})
    margins = [
        {**row, "value": row["value"] + 0.2 * row["seed"] if total == 2000 else row["value"] / 2}
        for total in (500.0, 2000.0)
        for row in rows_of("ood", "hem", values, total=total)
    ]
    margins += rows_of("ood", "hem", values)  # with the rule's own total
    figure = understanding._draw_rejection(rows, margins)
    near, far, near_scale, far_scale = figure.axes
    error = 0.2 / 3**0.5
    for axis, where in ((near, "near"), (far, "far")):
        found = points(axis)
        assert list(found) == list(understanding.TITLES.values())
        for score, title in understanding.TITLES.items():
            value = values[f"{where}_auroc {score}"]
            whole = value + 0.2
            expected = [(0.5, *[value / 2] * 3), (1, whole, whole - error, whole + error)]
            assert found[title] == [pytest.approx(point) for point in expected]
        assert (axis.get_title(), axis.get_xlabel()) == (f"{where}: HEM by its margin", "margin over the rule's")
        assert [label.get_text() for label in axis.get_xticklabels()] == ["0.5", "1"]
    for axis, where in ((near_scale, "near"), (far_scale, "far")):
        names = {1.0: f"{where}_auroc msp", **{s: f"{where}_auroc msp of logits times {s:g}" for s in scaled}}
        found = points(axis)
        assert list(found) == ["ce", "hem"]
        for loss, more in (("ce", 0), ("hem", 0.3)):
            assert found[loss] == [pytest.approx([x, *[values[names[x]] + more] * 3]) for x in sorted(names)]
        assert [container[0].get_color() for container in axis.containers] == [COLORS["ce"], COLORS["hem"]]
        assert (axis.get_title(), axis.get_xlabel()) == (f"{where}: MSP by the scale of the logits", "logits times")
        assert [label.get_text() for label in axis.get_xticklabels()] == [f"{x:g}" for x in sorted(names)]
    for axis in figure.axes:
        assert (axis.get_xscale(), axis.get_ylabel()) == ("log", "AUROC")
        assert {container[0].get_marker() for container in axis.containers} == {"."}
    assert [text.get_text() for text in near.get_legend().get_texts()] == list(understanding.TITLES.values())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ce", "hem"]
    assert is_a_row_below(figure.legends[0], figure)
    assert near.get_shared_y_axes().joined(near, near_scale)
    assert understanding._draw_rejection(rows, margins[-len(values) * 3 :]) is None
    assert understanding._draw_rejection(rows_of("classification", "ce", {"accuracy": 1.0}), margins) is None


def test_nothing_is_drawn_of_nothing(tmp_path):
    assert understanding.draw(tmp_path, [], []) == []
    assert list(tmp_path.iterdir()) == []
