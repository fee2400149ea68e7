import io
import json
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from matplotlib import image
from rich.console import Console
from scipy import stats

from hem_ext.harness import report
from hem_ext.harness.report import write
from hem_ext.harness.tasks import Metric

SCHEDULE = {"epochs": 3, "batch_size": 64, "max_lr": 0.1, "policy": "one-cycle"}
CE, HEM = [0.90, 0.91, 0.92], [0.95, 0.96, 0.97]


def cells(task, loss, metrics, **constants):
    """Rows as a comparison leaves them; `metrics` holds one value per seed."""
    variant = " ".join([loss, *(f"{name}={value:g}" for name, value in constants.items())])
    settings = {
        "task": task,
        "loss": loss,
        "data": "digits",
        "data_root": None,
        "model": "small",
        "schedule": SCHEDULE,
        "constants": constants,
        "options": {"transfer": True, "data_options": {"num_train": 60}},
    }
    return [
        {
            "cell": f"{task}-{variant}-{seed}".replace(" ", "-"),
            "task": task,
            "loss": variant,
            "seed": seed,
            "settings": settings | {"seed": seed},
            "metric": metric,
            "value": value,
            "seconds": 2.5,
            "loss_share": 0.125,
            "torch": "2.13.0",
            "hem_ext": "0.1.0",
            "device": "cpu",
            "machine": "x86_64",
            "of": len(metrics),
        }
        for seed in range(len(next(iter(metrics.values()))))
        for metric, values in metrics.items()
        for value in [values[seed]]
    ]


def classification(loss, accuracy, ece=None, **constants):
    return cells("classification", loss, {"accuracy": accuracy, "ece": ece or [0.1] * len(accuracy)}, **constants)


def drawn(folder, rows):
    """The report, and what was printed."""
    printed = io.StringIO()
    write(folder, rows, Console(file=printed, width=100))
    return (folder / "report.md").read_text(encoding="utf-8"), printed.getvalue()


def written(folder, rows):
    """The same without pictures, which take long."""
    with mock.patch.object(report, "_draw", return_value=[]):
        return drawn(folder, rows)


def table(text, heading="## classification"):
    """Loss -> column -> text, of the first table after a heading."""
    lines = text[text.index(heading + "\n") :].split("\n\n")[1].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def test_mean_error_p_and_winner(tmp_path):
    other = [0.90, 0.93, 0.90]
    rows = classification("mm", other) + classification("hem", HEM) + classification("ce", CE)
    text, printed = written(tmp_path, rows)
    found = table(text)
    assert list(found) == ["ce", "hem", "mm"]  # as the harness lists them
    error = stats.sem(CE)
    assert found["ce"]["accuracy"] == f"0.910 ± {error:.3f}" == "0.910 ± 0.006"
    assert found["hem"]["accuracy"] == "**0.960 ± 0.006**"
    assert found["mm"]["accuracy"] == "0.910 ± 0.010"
    assert found["ce"]["p"] == "—"
    assert found["hem"]["p"] == f"{stats.ttest_ind(HEM, CE, equal_var=False).pvalue:.3f}"
    assert found["mm"]["p"] == f"{stats.ttest_ind(other, CE, equal_var=False).pvalue:.3f}" == "1.000"
    assert found["hem"]["seeds"] == "3"
    assert found["hem"]["in loss"] == "12.5%"
    assert found["hem"]["linear transfer"] == "—"
    assert "0.960 ± 0.006" in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert "wrote" in printed


def test_less_may_be_better_and_ties_share_the_first_place(tmp_path):
    rows = classification("ce", CE, [0.10, 0.20, 0.30]) + classification("hem", HEM, [0.2001, 0.2, 0.2])
    found = table(written(tmp_path, rows + classification("mm", CE, [0.3, 0.3, 0.3]))[0])
    column = {loss: cells["calibration error ↓"] for loss, cells in found.items()}
    assert column == {"ce": "**0.200 ± 0.058**", "hem": "**0.200 ± 0.000**", "mm": "0.300 ± 0.000"}


@pytest.mark.parametrize(
    ("hem", "said"),
    [
        (
            HEM,
            "HEM is ahead of `ce` by accuracy: `hem` has 0.960 ± 0.006, `ce` 0.910 ± 0.006; the difference is +0.050",
        ),
        ([0.85, 0.86, 0.87], "HEM is behind `ce` by accuracy: `hem` has 0.860 ± 0.006"),
        ([0.90, 0.92, 0.93], "HEM is not told apart from `ce` by accuracy: `hem` has 0.917 ± 0.009"),
    ],
)
def test_the_sentence(tmp_path, hem, said):
    text, printed = written(tmp_path, classification("ce", CE) + classification("hem", hem))
    p = stats.ttest_ind(hem, CE, equal_var=False).pvalue
    assert said in text
    assert f"Welch's p = {p:.3f}, 3 and 3 seeds." in text
    assert f"Welch's p = {p:.3f}, 3 and 3 seeds." in " ".join(printed.split())


def test_the_sentence_goes_on_with_the_other_metrics(tmp_path):
    values = {"accuracy": CE, "ece": [0.2, 0.21, 0.22], "separation": CE, "transfer": [math.nan] * 3}
    better = {"accuracy": CE, "ece": [0.1, 0.11, 0.12], "separation": [0.9, 0.92, 0.93], "transfer": CE}
    rows = cells("classification", "ce", values) + cells("classification", "hem", better)
    said = "Of the other metrics, it is ahead by calibration error; not told apart by class separation."
    assert said in written(tmp_path, rows)[0]


def test_the_sentence_where_less_is_better(tmp_path, monkeypatch):
    task = SimpleNamespace(metrics={"forgetting": Metric("forgetting", higher_is_better=False)})
    monkeypatch.setitem(report.TASKS, "continual", task)
    rows = [*cells("continual", "ce", {"forgetting": CE}), *cells("continual", "hem", {"forgetting": HEM})]
    assert "HEM is behind `ce` by forgetting (less is better)" in written(tmp_path, rows)[0]


def test_the_sentence_names_the_best_variant_and_how_many_there_were(tmp_path):
    rows = classification("ce", CE) + classification("hem", CE, margin=0.5)
    rows += classification("hem+", [x + 0.01 for x in HEM]) + classification("hem", HEM, margin=2.0)
    text, _ = written(tmp_path, rows)
    assert "`hem+` (the best of 3 variants of HEM by this very number) has 0.970 ± 0.006" in text
    assert list(table(text)) == ["ce", "hem margin=0.5", "hem margin=2", "hem+"]


def test_a_tiny_p(tmp_path):
    text, _ = written(tmp_path, classification("ce", [0.1, 0.1001, 0.1]) + classification("hem", [0.9, 0.9001, 0.9]))
    assert table(text)["hem"]["p"] == "<0.001"
    assert "Welch's p < 0.001" in text


@pytest.mark.filterwarnings("error")
def test_one_seed_has_no_error_and_no_test(tmp_path):
    text, _ = written(tmp_path, classification("ce", CE[:1]) + classification("hem", HEM[:1]))
    found = table(text)
    assert found["hem"]["accuracy"] == "**0.950**"
    assert found["hem"]["p"] == "—"
    assert "HEM is not tested against `ce`" in text
    assert "difference is +0.050, 1 and 1 seeds.\n" in text


@pytest.mark.filterwarnings("error")
def test_seeds_that_do_not_differ_are_not_tested(tmp_path):
    # The test would claim to be sure, from two numbers a side.
    rows = classification("ce", [0.9, 0.9 + 1e-15]) + classification("hem", [0.95, 0.95])
    text, _ = written(tmp_path, rows + classification("mm", [0.8, 0.81]))
    found = table(text)
    assert found["hem"]["p"] == "—"
    assert found["mm"]["p"] == f"{stats.ttest_1samp([0.8, 0.81], 0.9).pvalue:.3f}"
    assert "HEM is not tested" in text


def test_nan_wins_nothing_and_is_told(tmp_path):
    rows = (
        classification("ce", CE) + classification("hem", [0.99, math.nan, 0.99]) + classification("mm", [math.nan] * 3)
    )
    text, _ = written(tmp_path, rows)
    found = table(text)
    assert {loss: cells["accuracy"] for loss, cells in found.items()} == {
        "ce": "**0.910 ± 0.006**",
        "hem": "NaN in 1 of 3",
        "mm": "—",
    }
    assert found["hem"]["p"] == "—"
    assert "HEM and `ce` cannot be compared by accuracy" in text


def test_without_cross_entropy(tmp_path):
    text, _ = written(tmp_path, classification("hem", HEM))
    assert "HEM and `ce` cannot be compared by accuracy" in text


def test_extra_values_and_settings(tmp_path):
    rows = [*cells("segmentation", "ce", {"mean_iou": CE, "iou 0": CE, "iou 1": HEM})]
    rows += [*cells("segmentation", "logitnorm", {"mean_iou": CE, "iou 0": HEM, "iou 1": CE}, tau=0.1)]
    rows += [*cells("segmentation", "hem+", {"mean_iou": CE, "iou 0": HEM, "iou 1": CE})]
    text, printed = written(tmp_path, rows)
    assert table(text, "### segmentation: every other value") == {
        "iou 0": {"ce": "0.910 ± 0.006", "hem+": "0.960 ± 0.006", "logitnorm tau=0.1": "0.960 ± 0.006"},
        "iou 1": {"ce": "0.960 ± 0.006", "hem+": "0.910 ± 0.006", "logitnorm tau=0.1": "0.910 ± 0.006"},
    }
    assert "iou 0" not in printed
    assert "…" not in printed, "a number is cut off"
    assert "1 more metric in report.md" in printed
    for line in (
        "- data: digits",
        "- model: small",
        "- schedule: epochs 3, batch_size 64, max_lr 0.1, policy one-cycle",
        "- options: transfer True, data_options (num_train 60)",
        "- seeds: 0, 1, 2",
        "- `ce`: no constants",
        "- `logitnorm tau=0.1`: tau 0.1",
        "- run with: torch 2.13.0, hem_ext 0.1.0, on cpu (x86_64)",
    ):
        assert line in text.splitlines()
    assert "were chosen by the test results of cross-entropy alone, which favours it" in text


def pixels(path):
    return image.imread(path)[..., :3]


def is_drawn(path):
    found = pixels(path)
    return found.shape[1] == 1200 and len({*map(tuple, found[::5, ::5].reshape(-1, 3))}) > 20


def with_curves(folder, rows, trainings=1):
    (folder / "curves").mkdir(exist_ok=True)
    for row in rows:
        history = [
            {"active": 1 / (i + 1), "logit_gap": i + row["seed"], "metrics": {"accuracy": 0.5 + 0.05 * i}}
            for i in range(trainings * SCHEDULE["epochs"])
        ]
        (folder / "curves" / f"{row['cell']}.json").write_text(json.dumps({"history": history}))


def with_pictures(folder, rows, channels=1):
    (folder / "pictures").mkdir(exist_ok=True)
    labels = torch.zeros(6, 16, 24, dtype=torch.int64)
    labels[:, 4:12, 4:12] = 2
    labels[:, :2] = 255
    for row in rows:
        predicted = labels.where(labels < 255, 0) * (row["settings"]["loss"] != "ce")
        kept = {"images": torch.rand(6, channels, 16, 24), "labels": labels, "predicted": predicted}
        torch.save(kept, folder / "pictures" / f"{row['cell']}.pt")


def test_nothing_is_drawn_of_what_is_not_there(tmp_path):
    text, _ = drawn(tmp_path, classification("ce", CE) + classification("hem", HEM))
    assert [path.name for path in tmp_path.glob("*.png")] == ["classification.png"]
    assert is_drawn(tmp_path / "classification.png")
    assert text.count("![") == 1
    assert "![classification](classification.png)" in text


@pytest.mark.parametrize("trainings", [1, 2])
def test_curves(tmp_path, trainings):
    rows = [row for loss in report.LOSSES for row in classification(loss, CE)]
    with_curves(tmp_path, [row for row in rows if row["loss"] != "mm"], trainings)
    text, _ = drawn(tmp_path, rows)
    assert "(classification-curves.png)" in text
    assert is_drawn(tmp_path / "classification-curves.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_scenes(tmp_path, channels):
    metrics = {"mean_iou": CE} | {f"iou {name}": CE for name in ("background", "a", "b")}
    rows = [row for loss in ("focal", "dice", "hem+", "hem", "ce") for row in cells("segmentation", loss, metrics)]
    with_pictures(tmp_path, [row for row in rows if row["loss"] != "hem+"], channels)
    text, _ = drawn(tmp_path, rows)
    assert "(segmentation-pictures.png)" in text
    assert is_drawn(tmp_path / "segmentation-pictures.png")
    # Six columns: image, truth, ce (which found nothing), hem, dice, focal.
    found = pixels(tmp_path / "segmentation-pictures.png")
    third = torch.tensor([int(report.CLASS_COLORS[2][i : i + 2], 16) / 255 for i in (1, 3, 5)])
    share = (abs(found - third.numpy()).max(-1) < 0.02).mean(0)
    assert [share[i * 200 : (i + 1) * 200].max() > 0.2 for i in range(6)] == [False, True, False, True, True, True]


def test_a_sweep(tmp_path):
    rows = classification("ce", CE) + classification("logitnorm", CE, tau=0.04) + classification("mm", CE)
    rows += [row for margin in (0.1, 1.0, 10.0) for row in classification("hem", HEM, margin=margin)]
    rows += [row for margin in (0.0, 1.0) for row in classification("ldam", HEM, margin=margin)]
    text, _ = drawn(tmp_path, rows)
    assert "(classification-sweep.png)" in text
    assert is_drawn(tmp_path / "classification-sweep.png")


def test_two_constants_at_once_are_no_sweep(tmp_path):
    rows = classification("hem", HEM, margin=0.1, total=1.0) + classification("hem", HEM, margin=0.2, total=2.0)
    drawn(tmp_path, classification("ce", CE) + rows)
    assert not (tmp_path / "classification-sweep.png").exists()


def test_near_is_drawn_beside_far_and_accuracies_against_eps(tmp_path, monkeypatch):
    near, far = Metric("near AUROC"), Metric("far AUROC")
    monkeypatch.setitem(report.TASKS, "ood", SimpleNamespace(metrics={"near_auroc": near, "far_auroc": far}))
    monkeypatch.setitem(report.TASKS, "adversarial", SimpleNamespace(metrics={"robust": Metric("robust accuracy")}))
    by_eps = {"robust": CE} | {f"pgd eps={eps}": CE for eps in ("0", "0.1", "8/255")} | {"fgsm eps=0.1": CE}
    rows = cells("ood", "ce", {"near_auroc": CE, "far_auroc": HEM}) + cells("adversarial", "ce", by_eps)
    text, _ = drawn(tmp_path, rows)
    assert text.index("(ood.png)") < text.index("(adversarial.png)") < text.index("(adversarial-eps.png)")
    assert all(is_drawn(tmp_path / f"{name}.png") for name in ("ood", "adversarial", "adversarial-eps"))


def test_the_same_files_give_the_same_report(tmp_path):
    rows = classification("ce", CE) + classification("hem", HEM, margin=0.5)
    with_curves(tmp_path, rows)
    drawn(tmp_path, rows)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert len(first) == 3
    drawn(tmp_path, rows[::-1])  # the order in which cells end is chance
    assert {name: (tmp_path / name).read_bytes() for name in first} == first


def test_every_loss_has_a_line_of_its_own():
    results = [report.Result(loss, loss, {}) for loss in report.LOSSES]
    styles = [tuple(report._style(result, results).values()) for result in results]
    assert len(set(styles)) == len(styles)
