import math

import pytest
import torch
from PIL import Image

from hem_ext.harness.losses import LOSSES
from hem_ext.harness.models import SmallCNN
from hem_ext.harness.tasks import TASKS, Workbench
from hem_ext.harness.tasks.base import AtTest, DivergedError, images_of, labels_of

ORDER = ["classification", "corruption", "ood", "adversarial", "imbalanced", "continual", "segmentation"]


def test_the_tasks_come_in_the_order_of_the_paper():
    assert list(TASKS) == ORDER
    assert all(TASKS[name].name == name for name in ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_values_are_those_declared_and_in_range(run, name):
    values = run(name)
    declared = list(TASKS[name].metrics)
    assert list(values)[: len(declared)] == declared
    for metric, value in values.items():
        assert type(value) is float, metric
        lowest = -1 if metric == "separation" or "forgetting" in metric else 0
        undefined = math.isnan(value) and (metric in ("many", "transfer") or metric.startswith("iou"))
        assert lowest <= value <= 1 or undefined, metric


@pytest.mark.parametrize("name", ORDER)
def test_a_seed_decides_every_bit(run, name):
    def losses_and_values(seed):
        losses = []
        values = run(name, "ce", seed, folder=None, after_epoch=lambda epoch: losses.append(epoch.train_loss))
        return losses, str(values)  # NaN is equal to itself as text

    first, again, other = map(losses_and_values, (3, 3, 4))
    assert first == again
    assert first[0] != other[0]


@pytest.mark.parametrize("name", ORDER)
def test_a_training_that_diverges_gives_nan(run, name):
    values = run(name, "ce", max_lr=1e30, epochs=2)
    assert list(values)[: len(TASKS[name].metrics)] == list(TASKS[name].metrics)
    assert all(math.isnan(value) for value in values.values())


@pytest.mark.parametrize("name", ORDER[:5])
def test_outputs_that_are_not_finite_give_nan(run, name, monkeypatch):
    monkeypatch.setattr(LOSSES["ce"], "outputs", lambda self, logits: logits.index_fill(0, torch.tensor(5), math.nan))
    assert all(math.isnan(value) for value in run(name, "ce").values())


@pytest.mark.parametrize("name", ORDER)
def test_every_loss_compared_is_a_loss(name):
    assert set(TASKS[name].losses) <= set(LOSSES)
    assert {"ce", "hem"} <= set(TASKS[name].losses)


def test_one_network_serves_three_tasks(run, trained):
    run("classification", options={"transfer": False})
    assert len(trained) == 1
    for name in ("corruption", "adversarial"):
        run(name)
    assert len(trained) == 1
    run("corruption", "ce")
    assert len(trained) == 2


def test_the_defaults_let_it_serve_them():
    for quick in (False, True):
        cells = [TASKS[name].cell("hem", 0, quick=quick) for name in ("classification", "corruption", "adversarial")]
        assert len({(cell.data, cell.schedule, str(cell.constants)) for cell in cells}) == 1


def test_a_data_set_made_with_other_options_is_trained_anew(run, trained):
    for count in (12, 13, 12):
        run("segmentation", options={"data_options": {"num_train": count, "num_test": 2, "size": 24}})
    assert [len(dataset) for dataset, _ in trained] == [12, 13]


@pytest.mark.parametrize("name", ORDER[:6])
def test_pictures_in_folders_will_do(run, name, tmp_path):
    for part, count in (("train", 6), ("val", 3)):
        for number in range(4):
            folder = tmp_path / "data" / part / f"class-{number}"
            folder.mkdir(parents=True)
            for i in range(count):
                colour = tuple(torch.randint(256, (3,)).tolist())
                Image.new("RGB", (10, 8), colour).save(folder / f"{i}.png")
    options = {
        "ood": {"known": 2},
        "imbalanced": {"largest": 4, "factor": 0.5},
        "continual": {"stages": 2},
    }.get(name, {})
    options = {**options, "data_options": {"size": 8}}
    values = run(name, data="image-folder", data_root=str(tmp_path / "data"), options=options)
    assert all(math.isfinite(values[metric]) for metric in TASKS[name].metrics if metric not in ("many", "medium"))


def test_outputs_are_what_the_loss_makes_of_the_logits(few_digits):
    bench = Workbench(TASKS["corruption"].cell("ldam", 0))
    criterion = bench.criterion(10, [24] * 10)
    model = SmallCNN(10, width=4, head=criterion.head).eval()
    found = bench.outputs(model, criterion, few_digits.test)
    assert torch.allclose(found, 30 * model(few_digits.test.images), rtol=1e-4, atol=1e-4)
    assert not model.training
    assert torch.equal(AtTest(model, criterion)(torch.ones(2, 1, 8, 8)), 30 * model(torch.ones(2, 1, 8, 8)))
    with pytest.raises(DivergedError):
        bench.outputs(model, criterion, few_digits.test.images * math.inf)


def test_images_and_labels_of_any_dataset(few_digits):
    split = few_digits.test
    items = [split[i] for i in range(len(split))]
    assert torch.equal(images_of(items), split.images)
    assert torch.equal(images_of(split), split.images)
    assert torch.equal(labels_of(items), split.labels)
