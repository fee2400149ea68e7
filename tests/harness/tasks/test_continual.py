import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from hem_ext.harness import metrics, training
from hem_ext.harness.losses import make_loss
from hem_ext.harness.models import SmallCNN, Standardized
from hem_ext.harness.tasks import TASKS, Workbench, continual
from hem_ext.harness.tasks.base import DivergedError
from hem_ext.harness.training import fit


def test_naive_by_hand(run, few_digits):
    values = run("continual", "ce", seed=2, epochs=2)
    train, test, statistics = few_digits.train, few_digits.test, few_digits.statistics()
    schedule = TASKS["continual"].cell("ce", 2, quick=True, epochs=2).schedule
    torch.manual_seed(2)
    model = Standardized(SmallCNN(10), *statistics).to(memory_format=torch.channels_last)
    after = []
    for classes in (train.labels < 5, train.labels >= 5):
        fit(model, make_loss("ce", num_classes=10), train.take(classes), schedule, seed=2)
        right = model.eval()(test.images.contiguous(memory_format=torch.channels_last)).argmax(1) == test.labels
        after.append([right[part].double().mean().item() for part in (test.labels < 5, test.labels >= 5)])
    assert values["average_accuracy_naive"] == pytest.approx((after[1][0] + after[1][1]) / 2)
    assert values["forgetting_naive"] == pytest.approx(after[0][0] - after[1][0])
    assert values["forgetting_from_learned_naive"] == values["forgetting_naive"]


def test_what_every_stage_is_trained_on(run, trained):
    values = run("continual", "hem+", options={"stages": 5, "replay": 13})
    counts = [dataset.labels.bincount(minlength=10).tolist() for dataset, _ in trained]
    # 13 of 2, 4, 6 and 8 classes; the first stage is the same twice.
    expected = [[24] * 2 + [0] * 8]
    for stage, each in enumerate((6, 3, 2, 1), start=1):
        expected.append([each] * 2 * stage + [24] * 2 + [0] * (8 - 2 * stage))
    expected += [[0] * 2 * stage + [24] * 2 + [0] * (8 - 2 * stage) for stage in range(1, 5)]
    assert counts == expected
    for (_, criterion), each in zip(trained, counts, strict=True):
        margins = [math.sqrt(2000 / (10 * max(count, 1))) for count in each]
        assert torch.allclose(criterion.criterion.margin, torch.tensor(margins))
    assert [name for name in values if name.startswith("accuracy ")] == [
        f"accuracy {c}+{c + 1}" for c in (0, 2, 4, 6, 8)
    ]

    def zeros(dataset):
        return {tuple(image.flatten().tolist()) for image in dataset.images[dataset.labels == 0]}

    buffers = [zeros(dataset) for dataset, _ in trained[:5]]
    assert all(later < earlier for earlier, later in pairwise(buffers))


def test_the_only_class_before_has_the_whole_buffer(run, trained):
    run("continual", options={"stages": 10, "replay": 13})
    counts = [dataset.labels.bincount(minlength=10).tolist() for dataset, _ in trained[:3]]
    assert counts == [[24] + [0] * 9, [13, 24] + [0] * 8, [6, 6, 24] + [0] * 7]


def test_forgetting_is_of_the_accuracies_after_each_stage(run, monkeypatch):
    matrices, continual = [], metrics.continual

    def noted(accuracy):
        matrices.append(accuracy)
        return continual(accuracy)

    monkeypatch.setattr(metrics, "continual", noted)
    values = run("continual", "ce", options={"stages": 5}, epochs=3)
    for suffix, a in zip(("", "_naive"), matrices, strict=True):
        from_best = [max(a[t][i] for t in range(i, 4)) - a[4][i] for i in range(4)]
        from_learned = [a[i][i] - a[4][i] for i in range(4)]
        assert values[f"average_accuracy{suffix}"] == pytest.approx(sum(a[4]) / 5)
        assert values[f"forgetting{suffix}"] == pytest.approx(sum(from_best) / 4)
        assert values[f"forgetting_from_learned{suffix}"] == pytest.approx(sum(from_learned) / 4)
    assert values["forgetting"] > values["forgetting_from_learned"]  # or they are not told apart here
    assert values["average_accuracy"] > values["average_accuracy_naive"]
    assert [value for name, value in values.items() if name.startswith("accuracy ")] == list(matrices[0][-1])


def test_no_buffer_is_naive(run, trained):
    values = run("continual", options={"replay": 0})
    assert len(trained) == 2
    assert values["average_accuracy"] == values["average_accuracy_naive"]
    assert values["forgetting"] == values["forgetting_naive"]


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_it_goes_on_from_the_last_epoch_of_the_last_stage(run, trained, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(training._Checkpoints, "pause", 0)
    whole = run("continual", epochs=3)
    assert len(trained) == 9  # three trainings, for the first stage is the same with and without replay
    trained.clear()
    cell = TASKS["continual"].cell("hem", 0, quick=True, epochs=3, options={"stages": 2, "replay": 40})
    epochs = []

    def kill(epoch):
        epochs.append(epoch)
        if len(epochs) == stop:
            raise KeyboardInterrupt

    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        TASKS["continual"].run(Workbench(cell, folder, after_epoch=kill))
    assert run("continual", folder=folder, epochs=3) == whole
    assert len(trained) == 9


def test_a_naive_training_that_diverges_leaves_replay(run, monkeypatch):
    subset = continual.subset_by_counts

    def spoiled(train, counts, seed):
        part = subset(train, counts, seed)
        if counts[0] == 0:  # naive, after the first stage
            part.images.fill_(math.nan)
        return part

    monkeypatch.setattr(continual, "subset_by_counts", spoiled)
    values = run("continual")
    assert all(math.isnan(value) == name.endswith("naive") for name, value in values.items())


def test_outputs_that_are_not_finite_leave_the_other_training(run, monkeypatch):
    outputs, asked = Workbench.outputs, []

    def overflowing(bench, *given):
        asked.append(given)
        if len(asked) == 2:  # after the second stage, with replay
            raise DivergedError
        return outputs(bench, *given)

    monkeypatch.setattr(Workbench, "outputs", overflowing)
    values = run("continual")
    assert all(math.isnan(value) == (not name.endswith("naive")) for name, value in values.items())


@pytest.mark.parametrize(
    ("num_classes", "stages"), [(2, 2), (3, 3), (4, 2), (7, 7), (10, 5), (12, 4), (14, 7), (36, 4), (66, 6), (100, 5)]
)
def test_stages_are_five_or_the_nearest_number_that_will_do(num_classes, stages):
    found = SimpleNamespace(num_classes=num_classes)
    cell = SimpleNamespace(options={"stages": None}, load_data=lambda: found)
    assert continual._stages(cell) == stages


def test_replay_is_of_no_less_than_nothing(run, trained):
    with pytest.raises(ValueError, match=r"^replay must be 0 samples or more, got -1$"):
        run("continual", options={"replay": -1})
    assert not trained


def test_stages_must_have_as_many_classes_each(run):
    for stages in (1, 3):
        with pytest.raises(ValueError, match=f"10 classes cannot be learned in {stages} stages"):
            run("continual", options={"stages": stages})


def test_losses_bear_classes_without_a_sample(run):
    for loss in TASKS["continual"].losses:
        assert math.isfinite(run("continual", loss, folder=None)["average_accuracy"]), loss
