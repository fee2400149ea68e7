"""The pictures of a report."""

import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from damage import Attack, full_disk
from matplotlib import image
from matplotlib.colors import to_rgba
from matplotlib.container import ErrorbarContainer
from report_rows import CE, HEM, SCHEDULE, cells, classification, one
from rich.console import Console

from hem_ext.harness import metrics
from hem_ext.harness.losses import LOSSES
from hem_ext.harness.report import SHARED, TUNED, active, draw_grid, forest, grid, pictures, results, style, write
from hem_ext.harness.tasks import TASKS, Metric
from hem_ext.harness.training import KeptError


def drawn(folder, protocols):
    """The report, with its pictures."""
    write(folder, protocols, Console(file=io.StringIO(), width=100))
    return (folder / "report.md").read_text(encoding="utf-8")


def pixels(path):
    return image.imread(path)[..., :3]


def is_drawn(path):
    found = pixels(path)
    return found.shape[1] == 1200 and len({*map(tuple, found[::5, ::5].reshape(-1, 3))}) > 20


def question(rows):
    """The only one, and its results."""
    (found,) = results.make_questions(one(rows))
    return found, found.protocols[SHARED]


@pytest.mark.parametrize("size", [0, 4096])
@pytest.mark.parametrize("before", [None, b"a picture"])
def test_a_full_disk_costs_the_picture_alone(tmp_path, size, before):
    path = tmp_path / "a.png"
    if before is not None:
        path.write_bytes(before)
    figure, _ = style.panels(2)
    with full_disk(size), pytest.raises(KeptError, match=rf"^{path} cannot be written: OSError: [^\n]*File too large$"):
        style.save(figure, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == (
        {} if before is None else {"a.png": before}
    )
    style.save(figure, path)
    assert pixels(path).shape[1] == 1200


# --- the forest -----------------------------------------------------------------------------------------------


def marks(figure):
    """Label of a line -> (mean, low, high) of each mark in it, from left to right, and what the mark looks like."""
    (axis,) = figure.axes
    labels = [label.get_text() for label in axis.get_yticklabels()]
    found = {label: [] for label in labels}
    for container in axis.containers:
        assert isinstance(container, ErrorbarContainer)
        point, _, bars = container
        ((x, y),) = point.get_xydata()
        ends = bars[0].get_segments()[0][:, 0] if bars else (math.nan, math.nan)
        found[labels[round(y)]].append((x, *ends, point.get_marker(), point.get_color()))
    return found


def test_the_forest_shows_differences_and_intervals():
    ce = [0.90, 0.91, 0.93]
    rows = classification("ce", ce) + classification("hem", [0.91, 0.93, 0.96])
    found = marks(forest.draw(results.make_questions(one(rows))))
    assert list(found) == ["classification, digits", "accuracy"]
    assert found["classification, digits"] == []
    ((*numbers, marker, color),) = found["accuracy"]
    half = 4.30265 * 0.01 / math.sqrt(3)  # Student's t with two degrees of freedom, and the standard error
    assert numbers == pytest.approx([0.02, 0.02 - half, 0.02 + half], abs=1e-6)
    assert (marker, color) == ("o", style.COLORS["hem"])


def test_the_forest_is_ruled_and_named():
    one_task = classification("ce", CE) + classification("hem", HEM)
    pixels = cells("segmentation", "ce", {"mean_iou": CE}) + cells("segmentation", "hem", {"mean_iou": HEM})
    for count, rows in enumerate((one_task, one_task + pixels), 1):
        figure = forest.draw(results.make_questions(one(rows)))
        (axis,) = figure.axes
        labels = axis.get_yticklabels()
        assert [label.get_weight() for label in labels] == ["bold", "normal"] * count
        assert [label.get_position()[1] for label in labels] == [*range(2 * count)]
        assert axis.get_ylim() == pytest.approx((2 * count - 0.4, -0.6))
        zero, *rules = [line for line in axis.lines if len(line.get_xdata()) == 2]
        assert (zero.get_xdata(), zero.get_color()) == ([0, 0], "black")
        assert [rule.get_ydata() for rule in rules] == [[1.5, 1.5]][: count - 1]  # above the second task
        (level,) = axis.patches
        assert (level.get_x(), level.get_width()) == pytest.approx((-0.01, 0.02))
        assert level.get_zorder() < zero.get_zorder() < axis.containers[0][0].get_zorder()
        heading = "← worse     HEM minus cross-entropy, mean and 95 % interval     better →"
        assert axis.get_xlabel() == heading
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["level, ± 0.01"]
        assert legend.get_patches()[0].get_facecolor() == level.get_facecolor() == to_rgba("#e4e4e4")
        point, _, (bars,) = axis.containers[0]
        assert (point.get_linestyle(), bars.get_color().tolist()) == ("-", [[*to_rgba(style.COLORS["hem"])]])
        assert point.get_ydata() == [1]


def test_right_is_better_in_the_whole_forest(monkeypatch):
    declared = {"kept": Metric("kept"), "forgetting": Metric("forgetting", higher_is_better=False)}
    monkeypatch.setitem(TASKS, "continual", SimpleNamespace(metrics=declared, judged_by=("kept", "forgetting")))
    rows = cells("continual", "ce", dict.fromkeys(declared, CE)) + cells(
        "continual", "hem", dict.fromkeys(declared, HEM)
    )
    figure = forest.draw(results.make_questions(one(rows)))
    found = marks(figure)
    paired = metrics.paired(HEM, CE)
    assert found["kept"][0][:3] == pytest.approx(paired[:3])
    assert found["forgetting ↓"][0][:3] == pytest.approx([-paired.difference, -paired.high, -paired.low])
    note = "↓ less is better: the sign is turned, so that right is always better"
    assert figure.axes[0].get_xlabel().split("\n")[1:] == [note]


def test_the_forest_has_a_line_for_hem_plus_where_it_is_another_network():
    balanced = [row for loss in ("ce", "hem", "hem+") for row in classification(loss, CE if loss == "ce" else HEM)]
    tail = cells("imbalanced", "ce", {"accuracy": CE}, data="tail")
    tail += cells("imbalanced", "hem", {"accuracy": HEM}, data="tail") + cells(
        "imbalanced", "hem+", {"accuracy": CE[::-1]}, data="tail"
    )
    figure = forest.draw(results.make_questions(one(balanced + tail)))
    found = marks(figure)
    assert list(found) == ["classification, digits", "accuracy", "imbalanced, tail", "accuracy, hem", "accuracy, hem+"]
    assert found["accuracy, hem+"][0][4] == style.COLORS["hem+"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["hem", "hem+", "level, ± 0.01"]
    assert [line.get_color() for line in legend.get_lines()] == [style.COLORS["hem"], style.COLORS["hem+"]]


def test_the_forest_has_a_mark_for_every_protocol():
    ce = classification("ce", CE)
    shared, tuned = ce + classification("hem", HEM), ce + classification("hem", [0.93, 0.95, 0.96], margin=0.5)
    figure = forest.draw(results.make_questions({SHARED: shared, TUNED: tuned}))
    assert {marker: round(x, 3) for x, _, _, marker, _ in marks(figure)["accuracy"]} == {"o": 0.05, "D": 0.033}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one schedule", "own best", "level, ± 0.01"]
    keys = [(line.get_marker(), line.get_markerfacecolor(), line.get_color()) for line in legend.get_lines()]
    assert keys == [("o", "#404040", "#404040"), ("D", "white", "#404040")]
    points = [container[0] for container in figure.axes[0].containers]
    blue = style.COLORS["hem"]
    assert [(point.get_ydata()[0], point.get_markerfacecolor()) for point in points] == [
        (pytest.approx(0.78), blue),
        (pytest.approx(1.22), "white"),
    ]


def test_the_forest_leaves_out_what_has_no_two_seeds():
    one_seed = cells("corruption", "ce", {"mean_accuracy": CE[:1]}) + cells(
        "corruption", "hem", {"mean_accuracy": HEM[:1]}
    )
    assert forest.draw(results.make_questions(one(one_seed))) is None
    diverged = classification("ce", CE) + classification("hem", [math.nan] * 3)
    assert forest.draw(results.make_questions(one(one_seed + diverged))) is None
    rows = one_seed + classification("ce", CE) + classification("hem", HEM)
    assert list(marks(forest.draw(results.make_questions(one(rows))))) == ["classification, digits", "accuracy"]


def test_the_forest_without_an_interval():
    rows = classification("ce", CE) + classification("hem", [value + 0.05 for value in CE])
    ((mean, low, *_),) = marks(forest.draw(results.make_questions(one(rows))))["accuracy"]
    assert mean == pytest.approx(0.05)
    assert math.isnan(low)


@pytest.mark.parametrize(("more", "scale"), [(0.04, "linear"), (-0.4, "symlog")])
def test_the_forest_has_room_for_all(more, scale):
    rows = classification("ce", CE) + classification("hem", [0.001 * i + more + ce for i, ce in enumerate(CE)])
    axis = forest.draw(results.make_questions(one(rows))).axes[0]
    assert axis.get_xscale() == scale
    left, right = axis.get_xlim()
    assert left < -abs(more)
    assert right > abs(more)
    notes = axis.get_xlabel().split("\n")[1:]
    assert notes == (["logarithmic beyond ± 0.05"] if scale == "symlog" else [])
    if scale == "symlog":
        ticks = {-0.5: "-0.5", -0.2: "-0.2", -0.1: "-0.1", -0.05: "-0.05", 0.0: "0"}
        ticks |= {-tick: f"+{-tick:g}" for tick in reversed([*ticks][:-1])}
        shown = axis.get_xticklabels()
        expected = {tick: text for tick, text in ticks.items() if abs(tick) < 1.2 * reach(axis)}
        assert dict(zip(axis.get_xticks().tolist(), (text.get_text() for text in shown), strict=True)) == expected
        assert axis.get_xlim() == pytest.approx((-1.2 * reach(axis), 1.2 * reach(axis)))
    else:
        assert axis.get_xlim() == pytest.approx((-1.1 * reach(axis), 1.1 * reach(axis)))


def reach(axis):
    """What is farthest from 0, of means and intervals."""
    ends = [x for _, _, (bars,) in axis.containers for segment in bars.get_segments() for x in segment[:, 0].tolist()]
    return max(map(abs, ends))


def test_small_differences_are_seen_beside_what_is_level():
    rows = classification("ce", CE) + classification("hem", [ce + 0.001 + 0.0001 * i for i, ce in enumerate(CE)])
    assert forest.draw(results.make_questions(one(rows))).axes[0].get_xlim() == (-0.02, 0.02)


def test_the_forest_is_on_top_of_the_report(tmp_path):
    text = drawn(tmp_path, one(classification("ce", CE) + classification("hem", HEM)))
    lines = text.splitlines()
    assert lines[2] == "![HEM minus cross-entropy, by task and metric](forest.png)"
    assert lines[4].startswith("- **classification**")
    assert is_drawn(tmp_path / "forest.png")


# --- sweeps and tunings ---------------------------------------------------------------------------------------


def tuning():
    rows = []
    for lr in (0.03, 0.1, 0.3):
        given = {"part": "validation", "schedule": {"max_lr": lr}}
        rows += classification("ce", [0.9 + lr] * 2, **given)
        for margin in (0.5, 2.0):
            value = math.nan if (lr, margin) == (0.3, 2.0) else 0.8 + lr / 10 + margin / 100
            rows += classification("hem", [value] * 2, **given, margin=margin)
    return rows


def test_a_grid_of_one_setting_is_a_line_and_of_two_a_heat_map():
    asked, found = question(tuning())
    chosen = {"ce": {"max_lr": 0.1}, "hem": {"max_lr": 0.1, "margin": 0.5}}
    figure = grid.draw(asked, found, "tuning", chosen)
    lines, heat = figure.axes
    assert lines.get_xlabel() == "max_lr"
    assert lines.lines[0].get_xydata().tolist() == [pytest.approx(p) for p in ([0.03, 0.93], [0.1, 1.0], [0.3, 1.2])]
    stars = [line.get_xydata().tolist() for line in lines.lines if line.get_marker() == "*"]
    assert stars == [[pytest.approx([0.1, 1.0])]]
    assert (heat.get_title(), heat.get_ylabel(), heat.get_xlabel()) == ("hem", "max_lr", "margin")
    (shown,) = heat.get_images()
    expected = [[0.808, 0.823], [0.815, 0.83], [0.835, math.nan]]
    assert shown.get_array().filled(math.nan).tolist() == [pytest.approx(row, nan_ok=True) for row in expected]
    assert sorted(text.get_text() for text in heat.texts) == ["0.808", "0.823", "0.830", "0.835", "★ 0.815"]
    assert figure.get_suptitle() == "tuning: accuracy on validation, mean over seeds, star: chosen"
    # The chosen number is bold; each is in the middle of its cell, white where that is dark.
    marked = {text.get_text(): (text.get_weight(), text.get_color()) for text in heat.texts}
    assert marked == {
        "0.808": ("normal", "white"),
        "★ 0.815": ("bold", "white"),
        "0.823": ("normal", "white"),
        "0.830": ("normal", "black"),
        "0.835": ("normal", "black"),
    }
    assert {(text.get_ha(), text.get_va()) for text in heat.texts} == {("center", "center")}
    assert {text.get_text()[-5:]: text.get_position() for text in heat.texts} == {
        "0.808": (0, 0),
        "0.823": (1, 0),
        "0.815": (0, 1),
        "0.830": (1, 1),
        "0.835": (0, 2),
    }
    assert [label.get_text() for label in heat.get_xticklabels()] == ["0.5", "2"]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["0.03", "0.1", "0.3"]
    assert heat.get_aspect() == "auto"


def test_bright_is_best_in_every_heat_map(monkeypatch):
    rows = []
    for lr in (0.1, 0.3):
        for value in (0.5, 2.0):
            rows += classification("hem", [lr + value / 10] * 2, schedule={"max_lr": lr}, margin=value)
            rows += classification("ldam", [lr + value / 5] * 2, schedule={"max_lr": lr}, max_margin=value)
    means = [0.15, 0.2, 0.3, 0.35, 0.4, 0.5, 0.5, 0.7]
    # The worst quarter ends between the second and the third of eight, or the sixth and the seventh.
    most, least = (means[1] + 3 * means[2]) / 4, (3 * means[5] + means[6]) / 4
    for better, *bounds, colors in ((True, most, means[-1], "cividis"), (False, means[0], least, "cividis_r")):
        monkeypatch.setitem(
            TASKS, "classification", SimpleNamespace(metrics={"accuracy": Metric("accuracy", higher_is_better=better)})
        )
        figure = grid.draw(*question(rows), "sweep")
        arrow = "" if better else " (less is better)"
        assert figure.get_suptitle() == f"sweep: accuracy{arrow} on test, mean over seeds"
        shown = [image for axis in figure.axes for image in axis.get_images()]
        assert [(image.norm.vmin, image.norm.vmax) for image in shown] == [pytest.approx(bounds)] * 2
        assert [image.norm.clip for image in shown] == [True] * 2
        assert [image.get_cmap().name for image in shown] == [colors] * 2
        best, worst = (max, min) if better else (min, max)
        by_value = {float(text.get_text()): text.get_color() for axis in figure.axes for text in axis.texts}
        assert (by_value[best(by_value)], by_value[worst(by_value)]) == ("black", "white")


def test_a_heat_map_of_trainings_that_all_failed():
    rows = [
        row
        for lr in (0.1, 0.3)
        for margin in (0.5, 2.0)
        for row in classification("hem", [math.nan], schedule={"max_lr": lr}, margin=margin)
    ]
    (heat,) = grid.draw(*question(rows), "").axes
    assert heat.get_images()[0].get_array().mask.all()
    assert not heat.texts


def test_lines_of_a_sweep_have_errors_and_stars():
    rows = [row for loss in ("hem", "ngl") for row in classification(loss, [0.5, 0.7], schedule={"max_lr": 0.1})]
    rows += [row for loss in ("hem", "ngl") for row in classification(loss, [0.6], schedule={"max_lr": 0.2})]
    (axis,) = grid.draw(*question(rows), "", {"ngl": {"max_lr": 0.2}}).axes
    by_loss = {container.get_label(): container for container in axis.containers}
    assert list(by_loss) == ["hem", "ngl"]
    for loss, (point, _, (bars,)) in by_loss.items():
        expected = style.line(results.Result(loss, loss, {}, {}), [results.Result(loss, loss, {}, {})])
        assert (point.get_marker(), point.get_color(), point.get_linestyle()) == ("o", *expected.values())
        ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
        assert ends == [pytest.approx([0.5, 0.7]), pytest.approx([0.6, 0.6])]  # one seed has no error
    (star,) = [line for line in axis.lines if line.get_marker() == "*" and len(line.get_xdata())]
    assert star.get_color() == by_loss["ngl"][0].get_color()
    assert star.get_xydata().tolist() == [pytest.approx([0.2, 0.6])]
    assert star.get_markersize() > 2 * by_loss["ngl"][0].get_markersize()
    assert axis.get_xticks().tolist() == [0.1, 0.2]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.1", "0.2"]


def test_a_cross_entropy_that_was_not_swept_is_a_level_line():
    rows = classification("ce", [0.5, 0.7])
    rows += [row for margin in (0.1, 1.0) for row in classification("hem", HEM, margin=margin)]
    (axis,) = grid.draw(*question(rows), "").axes
    (level,) = [line for line in axis.lines if line.get_label() == "ce"]
    assert level.get_ydata() == pytest.approx([0.6, 0.6])
    (span,) = axis.patches
    assert (span.get_y(), span.get_height()) == pytest.approx((0.5, 0.2))
    assert level.get_color() == style.COLORS["ce"]
    assert span.get_facecolor() == pytest.approx(to_rgba(style.COLORS["ce"], span.get_alpha()))
    assert span.get_alpha() < 0.5


def test_three_grids_are_in_two_columns():
    swept = {"hem": "margin", "logitnorm": "tau", "ldam": "max_margin"}
    rows = [row for loss, name in swept.items() for v in (0.1, 0.5) for row in classification(loss, CE, **{name: v})]
    figure = grid.draw(*question(rows), "")
    two = grid.draw(*question([row for row in rows if not row["loss"].startswith("ldam")]), "")
    assert [axis.get_xlabel() for axis in figure.axes] == [*swept.values(), ""]
    assert [axis.axison for axis in figure.axes] == [True, True, True, False]
    assert (figure.axes[0].get_gridspec().nrows, figure.axes[0].get_gridspec().ncols) == (2, 2)
    assert (two.axes[0].get_gridspec().nrows, two.axes[0].get_gridspec().ncols) == (1, 2)
    assert 1.5 < figure.get_figheight() / two.get_figheight() < 2
    assert figure.get_layout_engine() is not None


def test_of_three_settings_two_are_shown_and_the_third_is_as_chosen():
    rows = [
        row
        for lr in (0.1, 0.3)
        for margin in (0.5, 2.0)
        for total in (1.0, 9.0)
        for row in classification(
            "hem", [lr + margin / 10 + total / 100], schedule={"max_lr": lr}, margin=margin, total=total
        )
    ]
    asked, found = question(rows)
    (heat,) = grid.draw(asked, found, "", {"hem": {"max_lr": 0.1, "margin": 2.0, "total": 9.0}}).axes
    assert heat.get_images()[0].get_array().tolist() == [pytest.approx(row) for row in ([0.24, 0.39], [0.44, 0.59])]
    assert [text.get_text() for text in heat.texts if "★" in text.get_text()] == ["★ 0.390"]
    assert grid.draw(asked, found, "") is None


def test_settings_that_are_no_numbers():
    rows = [row for policy in ("poly", "cosine") for row in classification("ce", CE, schedule={"policy": policy})]
    (axis,) = grid.draw(*question(rows), "").axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["cosine", "poly"]
    # Numbers are before None, and texts behind it.
    rows = [row for v in ("long", None, 2.0, 0.5) for row in classification("ce", CE, schedule={"warmup": v})]
    (axis,) = grid.draw(*question(rows), "").axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.5", "2", "None", "long"]
    assert axis.get_xticks().tolist() == axis.lines[0].get_xdata().tolist() == [0, 1, 2, 3]


def test_the_grid_is_written(tmp_path):
    path = draw_grid(tmp_path, "classification", tuning() + cells("corruption", "ce", {"mean_accuracy": CE}), {})
    assert path == tmp_path / "classification-grid.png"
    assert is_drawn(path)
    assert draw_grid(tmp_path, "corruption", cells("corruption", "ce", {"mean_accuracy": CE}), {}) is None
    assert not (tmp_path / "corruption-grid.png").exists()


def test_a_sweep(tmp_path):
    rows = classification("ce", CE) + classification("logitnorm", CE, tau=0.04) + classification("mm", CE)
    rows += [row for margin in (0.1, 1.0, 10.0) for row in classification("hem", HEM, margin=margin)]
    rows += [row for margin in (0.0, 1.0) for row in classification("ldam", HEM, max_margin=margin)]
    assert "(classification-sweep.png)" in drawn(tmp_path, one(rows))
    assert is_drawn(tmp_path / "classification-sweep.png")
    margin, other = grid.draw(*question(rows), "").axes
    assert [text.get_text() for text in margin.get_legend().get_texts()] == ["ce", "hem"]
    assert (margin.get_xlabel(), margin.get_xscale()) == ("margin", "log")
    assert (other.get_xlabel(), other.get_xscale()) == ("max_margin", "linear")


# --- what a task shows ----------------------------------------------------------------------------------------


EPOCH = {"active": 1.0, "kept": 1.0, "logit_gap": 0.0, "logit_scale": 1.0, "seconds": 1.0, "metrics": {}}


def with_curves(folder, rows, trainings=1):
    with (folder / "curves.jsonl").open("a") as file:
        for row in rows:
            history = [
                {**EPOCH, "active": 1 / (i + 1), "logit_gap": i + row["seed"], "metrics": {"accuracy": 0.5 + 0.05 * i}}
                for i in range(trainings * SCHEDULE["epochs"])
            ]
            file.write(json.dumps({"cell": row["cell"], "history": history}) + "\n")


def with_pictures(folder, rows, channels=1):
    (folder / "pictures").mkdir(exist_ok=True)
    labels = torch.zeros(6, 16, 24, dtype=torch.int64)
    labels[:, 4:12, 4:12] = 2
    labels[:, :2] = 255
    for row in rows:
        predicted = labels.where(labels < 255, 0) * (row["settings"]["loss"] != "ce")
        kept = {"images": 2 * torch.rand(6, channels, 16, 24) - 0.5, "labels": labels, "predicted": predicted}
        torch.save(kept, folder / "pictures" / f"{row['cell']}.pt")


def test_values_are_seeds_means_and_errors():
    rows = classification("hem", HEM) + classification("ce", CE) + classification("mm", [0.5])
    rows += classification("focal", [0.5, math.nan])
    figure = pictures._draw_values(*question(rows), "classification")
    assert figure.get_suptitle() == "classification: mean and standard error, and every seed"
    (axis,) = figure.axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert sorted(names) == ["ce", "focal", "hem", "mm"]
    assert axis.get_yticks().tolist() == [0, 1, 2, 3]
    assert axis.get_ylim() == (3.5, -0.5)
    assert axis.get_xlabel() == "accuracy"
    made = {result.name: result for result in question(rows)[1]}
    for name, seeds in (("ce", CE), ("hem", HEM), ("mm", [0.5])):
        y, color = names.index(name), style.line(made[name], list(made.values()))["color"]
        (dots,) = [line for line in axis.lines if line.get_marker() == "." and line.get_ydata()[0] == y + 0.25]
        assert dots.get_xydata().tolist() == [[value, y + 0.25] for value in seeds]
        assert (dots.get_color(), dots.get_linestyle()) == (color, "None")
        (point, _, bars) = next(c for c in axis.containers if c[0].get_ydata()[0] == y)
        mean, error = metrics.mean(seeds)
        assert point.get_xydata().tolist() == [pytest.approx([mean, y])]
        assert (point.get_marker(), point.get_color()) == ("o", color)
        ends = [segment.tolist() for bar in bars for segment in bar.get_segments()]
        assert ends == ([] if name == "mm" else [[pytest.approx([mean - error, y]), pytest.approx([mean + error, y])]])
    assert len(axis.containers) == 3  # a loss that diverged has no mark
    (level,) = [line for line in axis.lines if line.get_linestyle() == "--"]
    assert level.get_xdata() == pytest.approx([metrics.mean(CE).mean] * 2)
    assert level.get_color() == style.COLORS["ce"]
    assert pictures._draw_values(*question(classification("ce", [math.nan])), "") is None


def test_nothing_is_drawn_of_what_is_not_there(tmp_path):
    text = drawn(tmp_path, one(classification("ce", CE) + classification("mm", HEM)))
    assert [path.name for path in tmp_path.glob("*.png")] == ["classification.png"]
    assert is_drawn(tmp_path / "classification.png")
    assert text.count("![") == 1
    assert "![classification](classification.png)" in text


def test_both_protocols_have_their_pictures(tmp_path):
    rows = classification("ce", CE) + classification("mm", HEM)
    text = drawn(tmp_path, {SHARED: rows, TUNED: rows})
    assert text.index("(classification.png)") < text.index("(classification-own-best.png)")
    assert is_drawn(tmp_path / "classification-own-best.png")


@pytest.mark.parametrize("trainings", [1, 2])
def test_curves(tmp_path, trainings):
    rows = [row for loss in ("ce", "hem", "mm") for row in classification(loss, CE)]
    with_curves(tmp_path, [row for row in rows if row["loss"] != "mm"], trainings)
    assert "(classification-curves.png)" in drawn(tmp_path, one(rows))
    assert is_drawn(tmp_path / "classification-curves.png")
    figure = pictures._draw_curves(results.read_curves(tmp_path), *question(rows), "ours")
    first = figure.axes[0]
    assert first.get_title() == "accuracy on validation"
    assert [axis.get_title() for axis in figure.axes[1:3]] == [
        *("training samples with a gradient", "logit gap in training")
    ]
    assert figure.get_suptitle() == "ours: mean over seeds, and all of them"
    dotted = ", dotted: a new training" if trainings > 1 else ""
    assert [axis.get_xlabel() for axis in figure.axes[:3]] == [f"epoch{dotted}"] * 3
    for axis, expected in ((figure.axes[1], [1, 1 / 2, 1 / 3]), (figure.axes[2], [1, 2, 3])):
        assert axis.lines[0].get_ydata() == pytest.approx(expected)
    legend = figure.axes[3].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["ce", "hem"]
    assert legend.get_title().get_text() == "without 1 other"
    ce = [line for line in first.lines if line.get_color() == style.COLORS["ce"]]
    assert [line.get_xdata().tolist() for line in ce] == [[1, 2, 3], [4, 5, 6]][:trainings]
    assert ce[0].get_ydata() == pytest.approx([0.5, 0.55, 0.6])
    assert len(first.lines) == 2 * trainings + (trainings - 1)  # mm has no curve; a dotted line between trainings


def test_curves_of_a_metric_of_no_task_or_of_none(tmp_path):
    rows = classification("ce", CE[:1]) + classification("hem", CE[:1])
    for shown, title in (({"kappa": 0.25}, "kappa on validation"), ({}, "training samples with a gradient")):
        epochs = [{**EPOCH, "metrics": {}}, {**EPOCH, "metrics": shown}]
        lines = [json.dumps({"cell": row["cell"], "history": epochs}) + "\n" for row in rows if row["metric"] == "ece"]
        (tmp_path / "curves.jsonl").write_text("".join(lines))
        figure = pictures._draw_curves(results.read_curves(tmp_path), *question(rows), "")
        assert figure.axes[0].get_title() == title
    assert pictures._draw_curves({}, *question(rows), "") is None


def active_curves(folder, rows, shares):
    """Curves of which every seed has its own shares, by loss: loss -> seed -> epoch."""
    with (folder / "curves.jsonl").open("a") as file:
        for row in rows:
            epochs = shares[row["settings"]["loss"]][row["seed"]]
            history = [{**EPOCH, "active": share} for share in epochs]
            file.write(json.dumps({"cell": row["cell"], "history": history}) + "\n")


def test_the_active_share_of_every_task(tmp_path):
    losses = ("ce", "hem", "hem+")
    rows = [row for loss in losses for row in classification(loss, HEM[:2] if loss == "hem" else CE[:2])]
    pixels = [row for loss in losses[:2] for row in cells("segmentation", loss, {"mean_iou": CE[:2]})]
    without = [row for loss in losses for row in cells("corruption", loss, {"mean_accuracy": CE[:2]})]
    # Two trainings; of the second seed of hem+, the second one diverged.
    shares = {
        "ce": [[1, 1, 1]] * 2,
        "hem": [[0.8, 0.4, 0.2, 0.9, 0.5, 0.4], [0.6, 0.2, 0.0, 0.7, 0.5, 0.2]],
        "hem+": [[0.5, 0.3, 0.1, 0.8, 0.4, 0.2], [0.3, 0.3, 0.3]],
    }
    active_curves(tmp_path, rows, shares)
    active_curves(tmp_path, pixels, {loss: [epochs[:3] for epochs in shares[loss]] for loss in losses})
    text = drawn(tmp_path, {SHARED: rows + without, TUNED: pixels})
    assert text.startswith("# Comparison\n")
    lines = [line for line in text.splitlines() if " over the training, " in line]
    assert lines == [
        "- **classification**: `hem` 0.450 over the training, 0.200 at the end; "
        "`hem+` 0.342 over the training, 0.225 at the end",
        "- **segmentation, own best, pixels**: `hem` 0.367 over the training, 0.100 at the end",
    ]
    assert text.index(lines[1]) < text.index("(active.png)") < text.index("\n## classification\n")
    assert is_drawn(tmp_path / "active.png")

    questions = results.make_questions({SHARED: rows + without, TUNED: pixels})
    figure = active.draw(questions, results.read_curves(tmp_path))
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("classification", "segmentation, own best, pixels")
    assert (first.get_xlabel(), second.get_xlabel()) == ("epoch, dotted: a new training", "epoch")
    means = {"hem": [[0.7, 0.3, 0.1], [0.8, 0.5, 0.3]], "hem+": [[0.4, 0.3, 0.2], [0.8, 0.4, 0.2]]}
    for loss, expected in means.items():
        found = [line for line in first.lines if line.get_color() == style.COLORS[loss]]
        assert [line.get_xdata().tolist() for line in found] == [[1, 2, 3], [4, 5, 6]]
        assert [line.get_ydata().tolist() for line in found] == [pytest.approx(values) for values in expected]
    assert len(first.lines) == 5  # and one dotted line between the trainings
    low, high = (fill(first.collections[0].get_paths()[0].vertices[:, 1]) for fill in (min, max))
    assert (low, high) == pytest.approx((0.0, 0.8))  # all seeds of hem's first training
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["hem", "hem+"]
    assert figure.get_suptitle() == "Share of training samples with a gradient: mean over seeds, and all of them"
    for axis in figure.axes:
        assert axis.get_ylim()[0] == 0
        assert 1 < axis.get_ylim()[1] < 1.1


def test_a_second_training_that_the_last_loss_did_not_reach_is_named(tmp_path):
    rows = [row for loss in ("ce", "hem", "hem+") for row in classification(loss, HEM if loss == "hem" else CE)]
    active_curves(tmp_path, rows, {"ce": [[1]] * 3, "hem": [[0.5] * 6] * 3, "hem+": [[0.5]] * 3})
    figure = active.draw(results.make_questions(one(rows)), results.read_curves(tmp_path))
    assert figure.axes[0].get_xlabel() == "epoch, dotted: a new training"


@pytest.mark.parametrize("there", [("ce", "mm"), ()])
def test_without_curves_of_hem_nothing_is_said_of_active_samples(tmp_path, there):
    rows = [row for loss in ("ce", "hem", "mm") for row in classification(loss, CE)]
    with_curves(tmp_path, [row for row in rows if row["loss"] in there])
    assert "active" not in drawn(tmp_path, one(rows))
    assert not (tmp_path / "active.png").exists()


def test_few_lines_are_those_of_hem_and_the_best_others():
    means = {"ce": 0.5, "hem": 0.5, "hem+": 0.4, "mm": 0.7, "focal": 0.9, "ngl": 0.8, "ldam": 0.6}
    asked, found = question([row for loss, mean in means.items() for row in classification(loss, [mean] * 2)])
    assert [result.name for result in style.few(asked, found)] == ["ce", "hem", "hem+", "focal", "ngl", "mm"]
    # The same network as HEM has the same line.
    means["hem+"] = 0.5
    asked, found = question([row for loss, mean in means.items() for row in classification(loss, [mean] * 2)])
    assert [result.name for result in style.few(asked, found)] == ["ce", "hem", "focal", "ngl", "mm"]


@pytest.mark.parametrize("channels", [1, 3])
def test_scenes(tmp_path, channels):
    measured = {"mean_iou": CE} | {f"iou {name}": CE for name in ("background", "a", "b")}
    rows = [row for loss in ("focal", "dice", "hem+", "hem", "ce") for row in cells("segmentation", loss, measured)]
    with_pictures(tmp_path, [row for row in rows if row["loss"] != "hem+"], channels)
    assert "(segmentation-pictures.png)" in drawn(tmp_path, one(rows))
    assert is_drawn(tmp_path / "segmentation-pictures.png")
    # Six columns: image, truth, ce (which found nothing), hem, dice, focal.
    found = pixels(tmp_path / "segmentation-pictures.png")
    third = torch.tensor([int(pictures.CLASS_COLORS[2][i : i + 2], 16) / 255 for i in (1, 3, 5)])
    share = (abs(found - third.numpy()).max(-1) < 0.02).mean(0)
    assert [share[i * 200 : (i + 1) * 200].max() > 0.2 for i in range(6)] == [False, True, False, True, True, True]


@pytest.mark.parametrize("content", ["garbage", "of something else", "an attack"])
def test_damaged_scenes_are_told_in_a_sentence(tmp_path, content):
    rows = cells("segmentation", "ce", {"mean_iou": CE})
    with_pictures(tmp_path, rows)
    file = tmp_path / "pictures" / f"{rows[0]['cell']}.pt"
    if content == "garbage":
        file.write_bytes(b"garbage")
    else:
        torch.save([1] if content == "of something else" else Attack(tmp_path / "called"), file)
    with pytest.raises(ValueError, match=rf"^{file} is damaged \([^\n]*\): the report has no scenes of this"):
        drawn(tmp_path, one(rows))
    assert not (tmp_path / "called").exists()


def shown_scenes(folder, rows):
    figure = pictures._draw_scenes(folder, question(rows)[1])
    titles = [axis.get_title() for axis in figure.axes]
    columns = len([title for title in titles if title])
    return figure, titles[:columns], [figure.axes[i : i + columns] for i in range(0, len(figure.axes), columns)]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_scenes_are_images_truth_and_what_networks_made_of_them(tmp_path, channels):
    measured = {"mean_iou": CE} | {f"iou {name}": CE for name in ("background", "a", "b")}
    losses = ("mm", "focal", "dice", "hem+", "hem", "ce")
    rows = [row for loss in losses for row in cells("segmentation", loss, measured)]
    with_pictures(tmp_path, [row for row in rows if row["seed"] == 0 and row["loss"] != "hem+"], channels)
    figure, titles, scenes = shown_scenes(tmp_path, rows)
    assert titles == ["image", "truth", "ce", "hem", "dice", "mm"]
    assert len(scenes) == 5
    assert [figure.get_figwidth(), figure.axes[0].axison] == [style.WIDTH, False]
    kept = torch.load(next((tmp_path / "pictures").glob("*-ce-0.1-0.pt")))
    for i, (picture, truth, *others) in enumerate(scenes):
        expected = kept["images"][i].movedim(0, 2)[..., : min(channels, 3)].expand(16, 24, 3).clamp(0, 1)
        assert torch.equal(torch.from_numpy(picture.get_images()[0].get_array()), expected)
        (labels,) = truth.get_images()
        assert torch.equal(torch.from_numpy(labels.get_array().data), kept["labels"][i])
        assert (labels.norm.vmin, labels.norm.vmax, labels.get_interpolation()) == (-0.5, 2.5, "nearest")
        assert labels.to_rgba(torch.tensor([[0, 1, 2, 255]]).numpy())[0].tolist() == [
            pytest.approx(to_rgba(colour)) for colour in (*pictures.CLASS_COLORS[:3], "white")
        ]
        assert [axis.get_images()[0].get_array().max() for axis in others] == [0, 2, 2, 2]
        assert not any(axis.axison for axis in (picture, truth, *others))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["background", "a", "b"]
    colours = [to_rgba(colour) for colour in pictures.CLASS_COLORS[:3]]
    assert [patch.get_facecolor() for patch in legend.get_patches()] == colours


def test_scenes_of_many_or_unnamed_classes(tmp_path):
    rows = cells("segmentation", "ce", {"mean_iou": CE})
    with_pictures(tmp_path, rows)
    figure, _, scenes = shown_scenes(tmp_path, rows)
    assert not figure.legends
    assert scenes[0][1].get_images()[0].norm.vmax == 2.5
    rows = cells("segmentation", "ce", {"mean_iou": CE} | {f"iou {i}": CE for i in range(12)})
    with_pictures(tmp_path, rows)
    figure, _, _ = shown_scenes(tmp_path, rows)
    colours = {patch.get_facecolor() for patch in figure.legends[0].get_patches()}
    assert len(colours) == 12  # more than there are colours of classes
    assert not colours & {to_rgba(colour) for colour in pictures.CLASS_COLORS}
    rows = cells("segmentation", "ce", {"mean_iou": CE} | {f"iou {i}": CE for i in range(25)})
    assert not shown_scenes(tmp_path, rows)[0].legends
    assert pictures._draw_scenes(tmp_path / "none", question(rows)[1]) is None


def test_every_judged_metric_has_a_panel(tmp_path, monkeypatch):
    declared = {f"{w}_auroc {s}": Metric(f"{w} AUROC, {s}") for w in ("near", "far") for s in ("MSP", "energy")}
    monkeypatch.setitem(TASKS, "ood", SimpleNamespace(metrics=declared, judged_by=tuple(declared)))
    rows = cells("ood", "ce", dict.fromkeys(declared, CE)) + cells("ood", "hem", dict.fromkeys(declared, HEM))
    figure = pictures._draw_values(*question(rows), "")
    assert [axis.get_xlabel() for axis in figure.axes] == [
        *("near AUROC,\nMSP", "near AUROC,\nenergy"),
        *("far AUROC,\nMSP", "far AUROC,\nenergy"),
    ]
    drawn(tmp_path, one(rows))
    assert is_drawn(tmp_path / "ood.png")


def test_accuracies_against_eps(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "adversarial", SimpleNamespace(metrics={"robust": Metric("robust accuracy")}))
    by_eps = {"robust": CE} | {f"pgd eps={eps}": CE for eps in ("0", "0.1", "8/255")} | {"fgsm eps=0.1": CE}
    rows = cells("adversarial", "ce", by_eps)
    assert "(adversarial-eps.png)" in drawn(tmp_path, one(rows))
    assert is_drawn(tmp_path / "adversarial-eps.png")
    first = pictures._draw_by_eps(*question(rows), "").axes[0]
    assert first.get_title() == "pgd"
    assert first.lines[0].get_xdata().tolist() == [0, 8 / 255, 0.1]


def test_accuracies_against_eps_have_errors_and_names(monkeypatch):
    declared = {"robust": Metric("robust accuracy"), "pgd": Metric("PGD")}
    monkeypatch.setitem(TASKS, "adversarial", SimpleNamespace(metrics=declared))
    measured = {"robust": CE, "pgd eps=0.1": HEM, "pgd eps=0": CE, "fgsm_eps_0.1 late": CE, "fgsm_eps_0.2 late": CE}
    rows = cells("adversarial", "ce", measured)
    rows += cells("adversarial", "mm", measured | {"pgd eps=0": [math.nan] * 3})
    rows += cells("adversarial", "focal", measured | {"pgd eps=0": [math.nan] * 3, "pgd eps=0.1": [math.nan] * 3})
    figure = pictures._draw_by_eps(*question(rows), "adversarial, own best")
    assert figure.get_suptitle() == "adversarial, own best"
    assert [axis.get_title() for axis in figure.axes] == ["PGD", "fgsm late"]
    assert [axis.get_xlabel() for axis in figure.axes] == ["eps", "eps"]
    by_loss = {container.get_label(): container for container in figure.axes[0].containers}
    point, _, (bars,) = by_loss["ce"]
    means = [metrics.mean(CE), metrics.mean(HEM)]
    assert point.get_xydata().tolist() == [pytest.approx([x, m.mean]) for x, m in zip((0, 0.1), means, strict=True)]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx([mean - error, mean + error]) for mean, error in means]
    assert (point.get_color(), point.get_marker(), point.get_linestyle()) == (style.COLORS["ce"], ".", "-")
    assert by_loss["mm"][0].get_xdata().tolist() == [0.1]
    assert set(by_loss) == {"ce", "mm"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ce", "mm", "focal"]
    assert not figure.legends[0].get_title().get_text()


def test_the_same_files_give_the_same_report(tmp_path):
    shared = classification("ce", CE) + classification("hem", HEM, margin=0.5)
    tuned = classification("ce", CE, schedule={"max_lr": 0.3}) + classification("hem", HEM)
    with_curves(tmp_path, shared + tuned)
    drawn(tmp_path, {SHARED: shared, TUNED: tuned})
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert len(first) == 8
    drawn(tmp_path, {SHARED: shared[::-1], TUNED: tuned[::-1]})  # the order in which cells end is chance
    assert {name: (tmp_path / name).read_bytes() for name in first} == first


def test_every_loss_has_a_line_of_its_own():
    found = [results.Result(loss, loss, {}, {}) for loss in LOSSES]
    styles = [tuple(style.line(result, found).values()) for result in found]
    assert len(set(styles)) == len(styles)


# --- what the pictures have in common -------------------------------------------------------------------------


def test_a_selective_training_has_dashes_of_its_own():
    names = ["hem", "hem margin=0.1", "hem margin=0.2", "ngl", "ngl a=1"]
    found = [results.Result(name, name.split(" ")[0], {}, {}) for name in names]
    assert [style.line(result, found)["linestyle"] for result in found[:3]] == ["-", "--", ":"]
    assert {style.line(result, found)["color"] for result in found[:3]} == {style.COLORS["hem"]}
    assert [style.line(result, found)["linestyle"] for result in found[3:]] == ["--", ":"]  # after four other losses
    many = [results.Result(f"hem margin={i}", "hem", {}, {}) for i in range(7)]
    assert style.line(many[6], many)["linestyle"] == "-"
    selective = results.Result("hem", "hem", {}, {}, selective=True)
    assert style.line(selective, [selective]) == {"color": style.COLORS["hem"], "linestyle": "--"}


def test_not_more_lines_than_can_be_told_apart():
    rows = [row for i in range(8) for row in classification("ce", [0.5 + i / 100] * 2, schedule={"max_lr": 0.1 + i})]
    rows += classification("focal", [0.9] * 2)
    asked, found = question(rows)
    assert [result.loss for result in style.few(asked, found)] == ["ce"] * 6


def by_epoch(values, epochs=2):
    _, axes = style.panels(2)
    begins = style.by_epoch(axes[0], values, epochs, "hem", {"color": "#0072B2", "linestyle": "--"})
    return axes[0], begins


def test_epochs_are_a_mean_and_a_range():
    axis, begins = by_epoch([[0.1, 0.2, 0.3, 0.4, 0.5], [0.3, 0.6]])
    assert begins == {0, 2, 4}
    dotted = [line for line in axis.lines if line.get_linestyle() == ":"]
    assert [line.get_xdata() for line in dotted] == [[2.5, 2.5], [4.5, 4.5]]
    assert {line.get_color() for line in dotted} == {"gray"}
    first, second, third = (line for line in axis.lines if line not in dotted)
    assert first.get_xydata().tolist() == [pytest.approx([1, 0.2]), pytest.approx([2, 0.4])]
    assert second.get_xydata().tolist() == [pytest.approx([3, 0.3]), pytest.approx([4, 0.4])]
    assert third.get_xydata().tolist() == [pytest.approx([5, 0.5])]
    assert {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in (first, second, third)} == {
        ("#0072B2", "--", ".")
    }
    assert axis.get_legend_handles_labels()[1] == ["hem"]
    reached = [fill.get_paths()[0].vertices for fill in axis.collections]
    for found, ends in zip(reached, ([(1, 0.1), (1, 0.3), (2, 0.2), (2, 0.6)], [(3, 0.3), (4, 0.4)]), strict=False):
        assert {*map(tuple, found.round(9))} == set(ends)
    for fill in axis.collections:
        assert fill.get_facecolor().tolist() == [pytest.approx(to_rgba("#0072B2", fill.get_alpha()))]
        assert fill.get_alpha() < 0.5
    # The dotted lines of a second result are the same.
    style.by_epoch(axis, [[0.5] * 5], 2, "ce", {"color": "#D55E00", "linestyle": "-"})
    assert len([line for line in axis.lines if line.get_linestyle() == ":"]) == 2


def test_epochs_that_were_not_looked_at_are_no_gap():
    axis, begins = by_epoch([[math.nan, 0.5, math.nan, 0.7], [math.nan, math.nan, math.nan, 0.9]], epochs=4)
    assert begins == {0}
    (line,) = axis.lines
    assert line.get_xydata().tolist() == [pytest.approx([2, 0.5]), pytest.approx([4, 0.8])]
    assert all(tick == round(tick) for tick in axis.get_xticks())


@pytest.mark.parametrize(
    ("panels", "left_out", "title"), [(2, 0, ""), (3, 1, "without 1 other"), (4, 2, "without 2 others")]
)
def test_the_legend_is_below_or_in_the_empty_panel(panels, left_out, title):
    figure, axes = style.panels(panels)
    assert len(axes) == 2 * ((panels + 1) // 2)
    for axis, names in zip(axes[:panels], (["hem"], *[["hem", "hem+", "ce", "focal"]] * 3), strict=False):
        for name in names:
            axis.plot([1, 2], [3, 4], label=name, color=style.COLORS.get(name, "black"))
    style.legend(figure, axes, [None] * (4 + left_out))
    below, inside = figure.legends, axes[-1].get_legend()
    assert (len(below), inside is None, axes[-1].axison) == ((0, False, False) if panels == 3 else (1, True, True))
    (shown,) = below or [inside]
    colours = [(text.get_text(), line.get_color()) for text, line in zip(shown.texts, shown.get_lines(), strict=True)]
    assert colours == [*((name, style.COLORS[name]) for name in ("hem", "hem+", "ce")), ("focal", "black")]
    assert shown.get_title().get_text() == title
    figure.draw_without_rendering()
    if below:
        lowest = min(axis.get_tightbbox().y0 for axis in axes)
        assert shown.get_window_extent().y1 <= lowest
        assert len({round(text.get_window_extent().y0) for text in shown.get_texts()}) == 1
    else:
        empty, found = axes[-1].get_window_extent(), shown.get_window_extent()
        assert (found.x0 + found.x1, found.y0 + found.y1) == pytest.approx((empty.x0 + empty.x1, empty.y0 + empty.y1))
    # Room for what is below, and for every row.
    odd, even, two_rows = (style.panels(count)[0].get_figheight() for count in (1, 2, 3))
    assert odd < even < two_rows == 2 * odd
