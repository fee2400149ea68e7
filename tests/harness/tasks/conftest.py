import gc

import pytest
import torch

from hem_ext.harness import data, training
from hem_ext.harness.models import SmallCNN, Standardized
from hem_ext.harness.tasks import TASKS, Workbench, base


@pytest.fixture(autouse=True, scope="package")
def _nothing_to_collect():
    """Every training collects garbage; looking through all that torch has loaded would take longer than training."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="package")
def made_digits():
    """Of every digit 24 to train, 8 to choose by and 8 to judge by."""
    parts = zip(data.digits(), (24, 8, 8), strict=True)
    return tuple(data.subset_by_counts(part, [n] * 10, seed=0) for part, n in parts)


@pytest.fixture(autouse=True)
def few_digits(monkeypatch, made_digits):
    """So few that a task takes a moment."""
    monkeypatch.setitem(data.BUNDLED, "digits", (lambda: made_digits, data.BUNDLED["digits"][1]))
    base._load_data.cache_clear()
    yield data.load("digits")
    base._load_data.cache_clear()


@pytest.fixture
def trained(monkeypatch):
    """Training set and loss of every epoch that is really trained, in order."""
    found, train_epoch = [], training._train_epoch

    def noted(network, criterion, loader, *rest):
        found.append((loader.dataset, criterion))
        return train_epoch(network, criterion, loader, *rest)

    monkeypatch.setattr(training, "_train_epoch", noted)
    return found


@pytest.fixture
def run(tmp_path):
    """Run a task for one epoch, with few samples of whatever it draws; trained models are kept in tmp_path."""
    small = {
        "adversarial": {"images": 40, "steps": 3},
        "imbalanced": {"factor": 0.1},
        "continual": {"stages": 2, "replay": 40},
        "segmentation": {"data_options": {"num_train": 12, "num_validation": 3, "num_test": 4, "size": 24}},
    }

    def run(name, loss="hem", seed=0, *, folder=tmp_path, options=None, after_epoch=lambda epoch: None, **given):
        options = {**small.get(name, {}), **(options or {})}
        cell = TASKS[name].cell(loss, seed, quick=True, **{"epochs": 1, "options": options, **given})
        return TASKS[name].run(Workbench(cell, folder, after_epoch=after_epoch))

    return run


@pytest.fixture
def kept(tmp_path):
    """The one model that was kept, in eval mode."""

    def kept(num_classes=10, make=SmallCNN, **options):
        (file,) = tmp_path.glob("*/model.pt")
        channels = options.get("channels", 1)
        model = Standardized(make(num_classes, **options), torch.zeros(channels), torch.ones(channels))
        model.load_state_dict(torch.load(file)["model"])
        return model.eval().requires_grad_(False)

    return kept


@pytest.fixture
def share_right(kept):
    """By hand, the share of a split that the kept model gets right."""

    def share_right(images, labels, **options):
        return sum(kept(**options)(images).argmax(1) == labels).item() / len(labels)

    return share_right
