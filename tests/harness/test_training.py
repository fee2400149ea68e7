import copy
import itertools
import math
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradScalerKwargs
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hem_ext import hem_loss
from hem_ext.harness import training
from hem_ext.harness.data import Split, digits
from hem_ext.harness.losses import make_loss
from hem_ext.harness.models import HeadOptions, SmallCNN, SmallUNet, SmallViT, fuse_upsampling, group_norm
from hem_ext.harness.tasks import Cell
from hem_ext.harness.training import (
    OPTIMIZERS,
    POLICIES,
    Schedule,
    check_selective,
    confusion_matrix,
    end,
    fit,
    head_of,
    make_accelerator,
    predict_logits,
    settings_of,
)

SCHEDULE = Schedule(epochs=2, batch_size=32, max_lr=0.1)


def few(count=200):
    train, _, _ = digits()
    return train.take(torch.arange(count))


def small(seed=0, **options):
    torch.manual_seed(seed)
    return SmallCNN(10, width=4, **options)


def sure(model):
    """The network, sure of class 0: what is of that class is finished from the beginning."""
    with torch.no_grad():
        model.head.weight *= 0.1
        model.head.bias.zero_()[0] = 1
    return model


def float64(split):
    """So that what rounding does cannot be taken for something else."""
    return TensorDataset(split.images.double(), split.labels)


def third(split):
    """The samples, of which every third keeps its label and the others are of class 0."""
    return Split(split.images, split.labels.where(torch.arange(len(split)) % 3 == 0, 0))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["ce", "hem"])
def test_fit_learns_digits(loss):
    train, validation, _ = digits()
    torch.manual_seed(0)
    model, epochs = SmallCNN(10, width=8), []

    def accuracy(model):
        right = predict_logits(model, validation).argmax(1) == validation.labels
        return {"accuracy": right.float().mean().item()}

    criterion = make_loss(loss, num_classes=10)
    schedule = Schedule(epochs=6, batch_size=32, max_lr=0.1)
    history = fit(model, criterion, train, schedule, seed=0, evaluate=accuracy, after_epoch=epochs.append)
    assert epochs == history
    assert len(history) == 6
    assert history[-1].metrics["accuracy"] > 0.9
    assert history[-1].metrics == accuracy(model)
    assert history[-1].logit_gap > history[0].logit_gap
    assert history[-1].train_accuracy > max(history[0].train_accuracy, 0.9)
    assert 0 < history[-1].loss_seconds < history[-1].seconds
    # Cross-entropy never finishes a sample and pulls at every class; HEM has finished some.
    if loss == "ce":
        assert (history[-1].active, history[-1].kept) == (1, 9)
    else:
        assert 0 < history[-1].active < 1
        assert 1 <= history[-1].kept < 9


@pytest.mark.parametrize(
    ("count", "size", "options", "batches"),
    [
        (65, 8, {}, [32, 32]),
        (66, 8, {}, [32, 32, 2]),
        (65, 16, {}, [32, 32, 1]),  # here batch normalisation has four pixels of the one that is left
        (65, 8, {"norm": group_norm}, [32, 32, 1]),
        (1, 8, {"norm": group_norm}, [1]),
    ],
)
def test_one_sample_that_is_left_over_is_left_out_where_it_cannot_be_trained_on(count, size, options, batches):
    found = []
    split = few(count)
    images = nn.functional.interpolate(split.images, size=(size, size))
    model = small(**options)
    model.register_forward_pre_hook(lambda module, inputs: found.append(len(inputs[0])))
    fit(model, make_loss("hem", num_classes=10), Split(images, split.labels), SCHEDULE, seed=0)
    assert found[-2 * len(batches) :] == 2 * batches


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_step_is_a_plain_step_of_torch(optimizer):
    # The loss is cut off and joined without a trace, and so is what it asks of the head.
    train, schedule = few(8), Schedule(epochs=1, batch_size=8, max_lr=0.1, weight_decay=0.05, optimizer=optimizer)
    images, labels = train.images.double(), train.labels
    criterion = make_loss("final-l2", num_classes=10, lam=0.5)
    trained, plain = small().double(), small().double()
    fit(trained, criterion, float64(train), schedule, seed=0)

    parameters = list(plain.parameters())
    if optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True, weight_decay=0.05)
    else:
        optimizer = torch.optim.AdamW(parameters, 0.1, weight_decay=0.05)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=2)
    (criterion(plain(images), labels) + criterion.penalty(plain.head)).backward()
    optimizer.step()
    for a, b in zip(trained.parameters(), parameters, strict=True):
        torch.testing.assert_close(a, b)
    assert not same(trained, small().double())


def test_the_same_seed_gives_the_same_bits():
    def run(seed):
        model = small(head=HeadOptions(dropout=0.5))
        fit(model, make_loss("hem", num_classes=10), few(), SCHEDULE, seed=seed)
        return model

    assert same(run(1), run(1))
    assert not same(run(1), run(2))


def test_ignored_pixels_are_not_looked_at():
    labels = torch.randint(0, 3, (4, 8, 8))
    labels[:, :4] = 255
    criterion = make_loss("hem", num_classes=3, ignore_index=255)
    history = fit(SmallUNet(3, width=4), criterion, Split(torch.rand(4, 1, 8, 8), labels), SCHEDULE, seed=0)
    assert 0 < history[0].active <= 1


@pytest.mark.parametrize("spatial", [False, True])
def test_an_epoch_says_what_its_logits_were(spatial):
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (6, 8, 8)) if spatial else torch.arange(6) % 3
    counted = torch.rand(labels.shape) < 0.7
    data = Split(torch.rand(6, 1, 8, 8), labels.where(counted, torch.tensor(255)))
    make = SmallUNet if spatial else SmallCNN
    trained, plain = (make(3, width=4) for _ in range(2))
    trained.load_state_dict(plain.state_dict())
    criterion = make_loss("ce", num_classes=3, ignore_index=255)
    # All samples are one batch, whose logits are those of the network as it was.
    (epoch,) = fit(trained, criterion, data, Schedule(epochs=1, batch_size=6, max_lr=0.1), seed=0)

    logits = plain(data.images).detach().movedim(1, -1)[counted].double().numpy()
    targets = labels[counted].numpy()
    rows = np.arange(len(targets))
    others = logits.copy()
    others[rows, targets] = -np.inf
    assert epoch.train_accuracy == pytest.approx((logits.argmax(1) == targets).mean())
    assert epoch.logit_scale == pytest.approx(logits.std(1).mean(), rel=1e-4)
    assert epoch.logit_gap == pytest.approx((logits[rows, targets] - others.max(1)).mean(), rel=1e-4)
    assert 0 < epoch.train_accuracy < 1


@pytest.mark.parametrize("size", [2, 3])
def test_means_are_over_samples_and_not_over_batches(size):
    # Nothing is learned at such a rate: what an epoch says does not depend on the batches. The last one is short.
    data = few(8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    tiny = [Schedule(epochs=1, batch_size=batch, max_lr=1e-9) for batch in (8, size)]
    whole, parts = (fit(model, make_loss("ce", num_classes=10), data, schedule, seed=0)[0] for schedule in tiny)
    for name in ("train_accuracy", "logit_scale", "logit_gap", "active", "kept"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-5), name


@pytest.mark.parametrize("selective", [False, True])
def test_an_epoch_of_one_sample(selective):
    torch.manual_seed(0)
    data = few(8).take(torch.tensor([3]))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        logits = model(data.images)[0]
        model[1].bias[data.labels] += logits.max() - logits[data.labels] + 0.25  # right, within the margin
        logits = model(data.images)[0]
    others = logits[torch.arange(10) != data.labels]
    schedule = Schedule(epochs=1, batch_size=1, max_lr=0.1)
    (epoch,) = fit(model, make_loss("hem", num_classes=10, margin=1), data, schedule, seed=0, selective=selective)
    assert (epoch.train_accuracy, epoch.active, epoch.selected) == (1, 1, 1)
    y = logits.clone().requires_grad_()
    hem_loss(y[None], data.labels, margin=1).backward()
    assert epoch.kept == (y.grad != 0).sum() - 1
    assert epoch.logit_gap == pytest.approx((logits[data.labels] - others.max()).item(), rel=1e-5)
    assert epoch.logit_scale == pytest.approx(logits.std(correction=0).item(), rel=1e-5)


def test_the_order_of_the_samples_is_that_of_the_seed_and_the_epoch():
    given = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].cpu()))
    data = few(30)
    fit(model, make_loss("hem", num_classes=10), data, SCHEDULE, seed=3)
    for images, epoch in zip(given, range(2), strict=True):
        order = torch.randperm(30, generator=torch.Generator().manual_seed(300_009 + epoch))
        assert torch.equal(images, data.images[order])


def test_ties_are_not_right():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    (epoch,) = fit(model, make_loss("ce", num_classes=10), few(8), Schedule(1, 8, 0.1), seed=0)
    assert (epoch.train_accuracy, epoch.logit_gap, epoch.logit_scale, epoch.active) == (0, 0, 0, 1)


def test_images_are_loaded_by_so_many_processes(monkeypatch):
    asked = []

    def loader(*given, num_workers, **options):
        asked.append(num_workers)
        return DataLoader(*given, **options)

    monkeypatch.setattr(training, "DataLoader", loader)
    fit(small(), make_loss("hem", num_classes=10), few(32), SCHEDULE, seed=0, num_workers=3)
    assert asked == [3]


@pytest.mark.parametrize("selective", [False, True])
def test_the_seconds_of_an_epoch(monkeypatch, selective):
    # The clock goes on by one whenever it is read: at both ends, and about the loss of each of two batches.
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=itertools.count(7).__next__))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    schedule = Schedule(epochs=1, batch_size=2, max_lr=0.1)
    (epoch,) = fit(model, make_loss("hem", num_classes=10), few(4), schedule, seed=0, selective=selective)
    assert epoch.loss_seconds == 2
    assert epoch.seconds == (3 if selective else 5)


@pytest.mark.parametrize(
    ("epochs", "evaluated"),
    [(1, [1]), (3, [1, 2, 3]), (16, range(1, 17)), (17, range(1, 18, 2)), (42, range(3, 43, 3))],
)
def test_a_network_is_evaluated_after_the_last_epoch_and_evenly_before(monkeypatch, epochs, evaluated):
    logged = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append((step, values)))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    schedule = Schedule(epochs=epochs, batch_size=4, max_lr=0.1)
    history = fit(
        model, make_loss("hem", num_classes=10), few(4), schedule, seed=0, evaluate=lambda network: {"an accuracy": 0.5}
    )
    assert [number for number, epoch in enumerate(history, start=1) if epoch.metrics] == list(evaluated)
    assert [step for step, _ in logged] == list(range(1, epochs + 1))
    for epoch, (_, values) in zip(history, logged, strict=True):
        shown = {name.replace("_", " "): value for name, value in vars(epoch).items() if name != "metrics"}
        assert values == shown | epoch.metrics
    assert {"train loss", "logit gap", "an accuracy"} < values.keys()


# --- selective training ---------------------------------------------------------------------------------------


def both_ways(model, data, schedule, **constants):
    """The network and its epochs, trained plainly and selectively from the same weights."""
    found = []
    for selective in (False, True):
        network = copy.deepcopy(model).double()
        criterion = make_loss("hem", num_classes=model.head.out_features, ignore_index=255, **constants)
        found.append((network, fit(network, criterion, data, schedule, seed=0, selective=selective)))
    return found


@pytest.mark.parametrize("batch_size", [48, 20])
@pytest.mark.parametrize(
    "make",
    [
        lambda: SmallCNN(10, width=4, norm=group_norm),
        lambda: SmallViT(10, width=16, depth=2, size=(8, 8)),
    ],
    ids=["small-gn", "small-vit"],
)
def test_selective_training_is_plain_training(make, batch_size):
    torch.manual_seed(0)
    split = third(few(48))
    split.labels[::8] = 255
    schedule = Schedule(epochs=4, batch_size=batch_size, max_lr=0.002)
    (plain, expected), (model, found) = both_ways(sure(make()), float64(split), schedule, margin=0.05)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    for epoch, other in zip(found, expected, strict=True):
        for name in ("train_loss", "active", "kept", "logit_gap", "logit_scale", "train_accuracy"):
            assert getattr(epoch, name) == pytest.approx(getattr(other, name), rel=1e-9), name
        assert (epoch.loss_seconds > 0, epoch.seconds > 0) == (True, True)
        assert other.selected == 1
    # The first step is a plain one; of the ignored, none is active.
    assert batch_size / 48 <= found[0].selected <= 0.7 + 0.3 * (batch_size == 48)
    for epoch in found[1:]:
        assert epoch.selected == pytest.approx(epoch.active * 42 / 48)
        assert 0 < epoch.selected < 0.6


def test_images_whose_pixels_are_all_finished_are_left_out():
    torch.manual_seed(0)
    labels = torch.zeros(8, 8, 8, dtype=torch.int64)
    labels[1, 0, 0] = labels[4, 7, 7] = 2  # one pixel is enough
    labels[6, 3] = 1
    labels[2:4, 2] = 255
    data, schedule = float64(Split(torch.rand(8, 1, 8, 8), labels)), Schedule(epochs=3, batch_size=8, max_lr=1e-3)
    model = sure(SmallUNet(3, width=4, norm=group_norm))
    (plain, expected), (model, found) = both_ways(model, data, schedule, margin=0.5)
    assert [epoch.selected for epoch in found] == [1, 3 / 8, 3 / 8]
    assert [epoch.active for epoch in found] == [10 / (8 * 64 - 16)] * 3
    assert [epoch.kept for epoch in found] == [epoch.kept for epoch in expected]
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    ("loss", "processes", "norm", "words"),
    [
        ("ce", 1, group_norm, "selective training is for hem and hem+, which finish samples; ce does not"),
        ("hem", 2, group_norm, "selective training is for one process to a batch, not for 2 that share it"),
        ("hem", 1, nn.BatchNorm2d, "(BatchNorm2d) normalises by the batch"),
    ],
)
def test_what_cannot_be_trained_selectively(monkeypatch, loss, processes, norm, words):
    model, accelerator = small(norm=norm), make_accelerator()
    monkeypatch.setattr(type(accelerator), "num_processes", processes)
    with pytest.raises(ValueError, match=re.escape(words)):
        fit(
            model,
            make_loss(loss, num_classes=10),
            few(32),
            SCHEDULE,
            seed=0,
            accelerator=accelerator,
            selective=True,
        )
    assert same(model, small(norm=norm))
    check_selective(make_loss("hem", num_classes=10))  # of one process


@pytest.mark.parametrize("side", [16, 13])  # the second is filled up to 16 by the network
def test_fused_upsampling_trains_the_same(side):
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (6, side, side))
    labels[:, 2:4] = 255
    data, schedule = float64(Split(torch.rand(6, 1, side, side), labels)), Schedule(epochs=2, batch_size=3, max_lr=0.01)
    plain = SmallUNet(3, width=4).double()
    model = copy.deepcopy(plain)
    criterion = make_loss("hem", num_classes=3, ignore_index=255, margin=0.5)
    expected = fit(plain, criterion, data, schedule, seed=0)
    upsampling = fuse_upsampling(model, "small")
    seen = []
    model.register_forward_hook(lambda module, _, logits: seen.append(logits.shape) if module.training else None)
    found = fit(model, criterion, data, schedule, seed=0, upsampling=upsampling)
    assert seen == [(3, 3, 8, 8)] * 4
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    for epoch, other in zip(found, expected, strict=True):
        for name in ("train_loss", "active", "kept", "logit_gap", "logit_scale", "train_accuracy"):
            assert getattr(epoch, name) == pytest.approx(getattr(other, name), rel=1e-6), name


@pytest.mark.parametrize(
    ("loss", "selective", "words"),
    [
        ("ce", False, "fused upsampling is for hem and hem+; ce is given logits of every pixel"),
        ("hem", True, "fused upsampling is not for selective training, which is given logits of every pixel"),
    ],
)
def test_what_upsampling_cannot_be_fused_with(loss, selective, words):
    model, criterion = SmallUNet(3, width=4, norm=group_norm), make_loss(loss, num_classes=3)
    options = {"selective": selective, "upsampling": fuse_upsampling(model, "small-gn")}
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        fit(model, criterion, few(32), SCHEDULE, seed=0, **options)


# --- schedules ------------------------------------------------------------------------------------------------


def rates(policy, steps):
    """The learning rate of every step, and the momentum."""
    schedule = Schedule(epochs=1, batch_size=1, max_lr=2.0, policy=policy)
    optimizer = schedule.make_optimizer(nn.Linear(1, 1))
    scheduler, seen = schedule.make_scheduler(optimizer, steps), []
    for _ in range(steps):
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        scheduler.step()
    return [list(values) for values in zip(*seen, strict=True)]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("poly", [2 * (1 - step / 8) ** 0.9 for step in range(8)]),
        ("cosine", [1 + math.cos(math.pi * step / 8) for step in range(8)]),
        ("multi-step", [2, 2, 2, 2, 0.2, 0.2, 0.02, 0.02]),
    ],
)
def test_policies_that_begin_at_the_largest_rate(policy, expected):
    found, momentum = rates(policy, 8)
    assert found == pytest.approx(expected)
    assert momentum == [0.9] * 8


def test_one_cycle_rises_and_falls_and_the_momentum_goes_the_other_way():
    found, momentum = rates("one-cycle", 20)
    peak = found.index(max(found))
    assert found[peak] == pytest.approx(2)
    assert 3 <= peak <= 8
    assert found == sorted(found[:peak]) + sorted(found[peak:], reverse=True)
    assert found[0] == pytest.approx(2 / 25)
    assert found[-1] < 1e-4
    assert (momentum[0], momentum[peak], momentum[-1]) == pytest.approx((0.95, 0.85, 0.95))


@pytest.mark.parametrize("steps", range(1, 8))
def test_multi_step_divides_when_half_and_three_quarters_are_done(steps):
    done = [step / steps for step in range(steps)]
    found, _ = rates("multi-step", steps)
    assert found == pytest.approx([2 * 0.1 ** ((share >= 0.5) + (share >= 0.75)) for share in done])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("steps", [1, 2])
def test_policies_of_few_steps(policy, steps):
    found, _ = rates(policy, steps)
    assert all(0 < rate <= 2 for rate in found)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"policy": "linear"}, "must be one of one-cycle, cosine, multi-step, poly, got 'linear'"),
        ({"epochs": 0}, "epochs and batch_size must be whole and at least 1, got 0 and 8"),
        ({"epochs": 1.5}, "must be whole and at least 1, got 1.5 and 8"),
        ({"batch_size": 0}, "must be whole and at least 1, got 1 and 0"),
        ({"batch_size": "many"}, "must be whole and at least 1, got 1 and 'many'"),
        ({"max_lr": 0}, "max_lr must be a number above 0, got 0"),
        ({"max_lr": math.nan}, "max_lr must be a number above 0, got nan"),
        ({"max_lr": math.inf}, "max_lr must be a number above 0, got inf"),
        ({"max_lr": "fast"}, "max_lr must be a number above 0, got 'fast'"),
        ({"weight_decay": -1}, "weight_decay must be a number of at least 0, got -1"),
        ({"weight_decay": math.inf}, "weight_decay must be a number of at least 0, got inf"),
        ({"optimizer": "adam"}, "the optimizer must be one of sgd, adamw, got 'adam'"),
    ],
)
def test_a_schedule_refuses(given, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Schedule(**{"epochs": 1, "batch_size": 8, "max_lr": 0.1, **given})


def test_settings_that_were_added_are_left_out_where_they_are_as_before_them():
    first = {"epochs": 1, "batch_size": 8, "max_lr": 0.1, "weight_decay": 0, "policy": "one-cycle"}
    assert settings_of(Schedule(**first)) == first
    assert settings_of(Schedule(**first, optimizer="adamw")) == first | {"optimizer": "adamw"}
    options = {"parts": {"ood": ["noise"]}}
    found = settings_of(Cell("ood", "ce", 0, "digits", Schedule(**first), options=options))
    assert found["schedule"] == first
    assert found["options"] == options
    assert found["options"]["parts"]["ood"] is not options["parts"]["ood"]
    assert not {"selective", "fused_upsample"} & found.keys()


def test_the_head_of_a_network():
    model = small()
    assert head_of(model) is model.head
    last = nn.Linear(3, 2)
    assert head_of(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), last)) is last


# --- going on after an interruption ---------------------------------------------------------------------------


class StopError(Exception):
    pass


@pytest.fixture
def _at_once(monkeypatch):
    """A checkpoint after every epoch."""
    monkeypatch.setattr(training._Checkpoints, "pause", 0)


@pytest.mark.usefixtures("_at_once")
@pytest.mark.parametrize(
    ("given", "stop_after", "selective"),
    [
        ({}, 1, False),
        ({}, 3, False),
        ({"policy": "cosine"}, 2, False),
        ({"policy": "multi-step"}, 2, False),
        ({"policy": "poly"}, 2, False),
        ({"optimizer": "adamw", "max_lr": 0.01}, 2, False),
        ({"max_lr": 0.01}, 2, True),
        ({"optimizer": "adamw", "max_lr": 1e-3}, 3, True),
    ],
)
def test_an_interrupted_training_ends_with_the_same_bits(tmp_path, monkeypatch, given, stop_after, selective):
    schedule = Schedule(**{"epochs": 4, "batch_size": 32, "max_lr": 0.1, **given})
    trained, train_epoch = [], training._train_epoch
    monkeypatch.setattr(training, "_train_epoch", lambda *given: trained.append(1) or train_epoch(*given))

    def run(folder, after_epoch=lambda epoch: None):
        model, train = small(head=HeadOptions(dropout=0.5)), few(64)
        if selective:
            model, train = sure(small(norm=group_norm)), third(train)
        evaluate = lambda model: {"sum": sum(p.sum().item() for p in model.parameters())}  # noqa: E731
        history = fit(
            model,
            make_loss("hem", num_classes=10),
            train,
            schedule,
            seed=0,
            folder=folder,
            evaluate=evaluate,
            after_epoch=after_epoch,
            selective=selective,
        )
        return model, [(epoch.train_loss, epoch.active, epoch.selected, epoch.metrics) for epoch in history]

    whole, expected = run(tmp_path / "whole")
    assert all((selected < 1) == selective for _, _, selected, _ in expected)
    seen = []

    def stop(epoch):
        seen.append(epoch)
        if len(seen) == stop_after:
            raise StopError

    with pytest.raises(StopError):
        run(tmp_path / "cut", stop)
    assert [path.name for path in (tmp_path / "cut").glob("epoch-*")] == [f"epoch-{stop_after}"]
    epochs = []
    trained.clear()
    model, history = run(tmp_path / "cut", epochs.append)
    assert len(trained) == 4 - stop_after
    assert same(model, whole)
    assert history == expected
    assert len(epochs) == 4
    assert [epoch.metrics for epoch in epochs] == [metrics for *_, metrics in expected]
    # Checkpoints are gone; the model is there, and nothing is trained again.
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["model.pt"]
    before = (tmp_path / "cut" / "model.pt").stat().st_mtime_ns
    again, history = run(tmp_path / "cut", epochs.append)
    assert same(again, whole)
    assert history == expected
    assert [epoch.metrics for epoch in epochs[4:]] == [metrics for *_, metrics in expected]
    assert (tmp_path / "cut" / "model.pt").stat().st_mtime_ns == before


@pytest.mark.usefixtures("_at_once")
def test_a_checkpoint_that_was_cut_off_does_not_count(tmp_path):
    schedule = Schedule(epochs=2, batch_size=32, max_lr=0.1)
    (tmp_path / "epoch-1").mkdir()
    (tmp_path / "epoch-1" / "model.safetensors").write_bytes(b"half of")
    (tmp_path / "checkpoint.json.partial").write_text("{")
    (tmp_path / "model.pt.partial").write_bytes(b"half of")
    model, plain = small(), small()
    fit(model, make_loss("hem", num_classes=10), few(), schedule, seed=0, folder=tmp_path)
    fit(plain, make_loss("hem", num_classes=10), few(), schedule, seed=0)
    assert same(model, plain)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_model_that_was_kept_before_epochs_said_what_was_selected(tmp_path):
    fit(small(), make_loss("hem", num_classes=10), few(32), SCHEDULE, seed=0, folder=tmp_path)
    saved = torch.load(tmp_path / "model.pt")
    for epoch in saved["history"]:
        del epoch["selected"]
    torch.save(saved, tmp_path / "model.pt")
    history = fit(small(), make_loss("hem", num_classes=10), few(32), SCHEDULE, seed=0, folder=tmp_path)
    assert [epoch.selected for epoch in history] == [1, 1]


def test_checkpoints_are_some_time_apart(tmp_path, monkeypatch):
    # Epochs end at these seconds; the training begins at 0.
    ends = iter([0, 4, 9.9, 10, 14, 19.9, 20.5, 50])
    clock = SimpleNamespace(now=next(ends))
    fake = SimpleNamespace(monotonic=lambda: clock.now, perf_counter=time.perf_counter)
    train_epoch = training._train_epoch

    def timed(*given):
        epoch = train_epoch(*given)
        clock.now = next(ends)
        return epoch

    monkeypatch.setattr(training, "time", fake)
    monkeypatch.setattr(training, "_train_epoch", timed)
    there = []

    def look(_):
        there.append([path.name for path in tmp_path.glob("epoch-*")])

    schedule = Schedule(epochs=7, batch_size=32, max_lr=0.1)
    fit(small(), make_loss("hem", num_classes=10), few(32), schedule, seed=0, folder=tmp_path, after_epoch=look)
    assert there == [[], [], ["epoch-3"], ["epoch-3"], ["epoch-3"], ["epoch-6"], ["epoch-6"]]
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_what_ends_before_the_first_checkpoint_was_due_begins_anew(tmp_path):
    def run(folder, after_epoch=lambda epoch: None):
        model = small()
        fit(model, make_loss("hem", num_classes=10), few(64), SCHEDULE, seed=0, folder=folder, after_epoch=after_epoch)
        return model

    def stop(_):
        raise StopError

    with pytest.raises(StopError):
        run(tmp_path / "cut", stop)
    assert not (tmp_path / "cut").exists()
    assert same(run(tmp_path / "cut"), run(tmp_path / "whole"))


# --- looking at a model ---------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Predicts what it was given: image i, filled with i, is the i-th sample."""

    def __init__(self, predicted, num_classes):
        super().__init__()
        logits = nn.functional.one_hot(predicted, num_classes).float().movedim(-1, 1)
        self.logits = nn.Parameter(logits, requires_grad=False)

    def forward(self, x):
        return self.logits[x[:, 0, 0, 0].long()]


def numbered(count):
    return torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()


@pytest.mark.parametrize("shape", [(23,), (9, 6, 7)])
def test_logits_come_in_the_order_of_the_images(shape):
    predicted = torch.randint(0, 5, shape)
    model = Fixed(predicted, 5).train()
    for images in (numbered(shape[0]), TensorDataset(numbered(shape[0]), torch.zeros(shape[0]))):
        logits = predict_logits(model, images, batch_size=4)
        assert torch.equal(logits, model.logits)
    assert model.training


def test_networks_are_given_channels_last():
    found = []

    class Noted(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            found.append((self.training, x.is_contiguous(memory_format=torch.channels_last)))
            return self.head(x.mean((2, 3)))

    model, data = Noted(), TensorDataset(torch.rand(6, 3, 8, 8), torch.arange(6) % 2)
    fit(model, make_loss("hem", num_classes=2), data, Schedule(epochs=1, batch_size=3, max_lr=0.1), seed=0)
    for images in (data, data.tensors[0]):
        predict_logits(model, images)
    assert found == [(True, True)] * 2 + [(False, True)] * 2


def test_confusion_counts_every_pixel_that_is_not_ignored():
    labels, predicted = torch.randint(0, 4, (9, 6, 7)), torch.randint(0, 4, (9, 6, 7))
    ignored = torch.rand(9, 6, 7) < 0.3
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for label, guess in zip(labels[~ignored].tolist(), predicted[~ignored].tolist(), strict=True):
        expected[label, guess] += 1
    labels[ignored] = 255
    test = TensorDataset(numbered(9), labels)
    found = confusion_matrix(Fixed(predicted, 4), test, 4, ignore_index=255, batch_size=2)
    assert torch.equal(found, expected)
    flipped = confusion_matrix(Fixed(predicted, 4), test, 4, ignore_index=255, outputs=lambda x: x.flip(1))
    assert torch.equal(flipped, expected.flip(1))


def test_confusion_counts_what_float32_cannot(monkeypatch):
    many = torch.full((2, 2), 2**24 + 1)
    monkeypatch.setattr(training, "multiclass_confusion_matrix", lambda *_, **__: many)
    test = TensorDataset(numbered(2), torch.zeros(2, dtype=torch.int64))
    found = confusion_matrix(Fixed(test.tensors[1], 2), test, 2, batch_size=1)
    assert found.tolist() == [[2**25 + 2] * 2] * 2


# --- several processes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("processes", "count"), [(2, 0), (3, 1), (2, 5), (3, 7)])
def test_each_process_looks_at_its_share_and_gets_all(monkeypatch, processes, count):
    ranks = range(processes)
    accelerators = [
        SimpleNamespace(process_index=rank, num_processes=processes, reduce=lambda counts: counts + counts)
        for rank in ranks
    ]
    labels, predicted = torch.randint(0, 4, (count,)), torch.randint(0, 4, (7,))
    model, shares = Fixed(predicted, 4).train(), []
    test, wanted = TensorDataset(numbered(count), labels), torch.zeros(4, 4)
    wanted.index_put_((labels, predicted[:count]), torch.ones(()), accumulate=True)
    first = torch.arange(1), model.logits[:1]
    for images in (numbered(count), test):
        monkeypatch.setattr(training, "gather_object", lambda given: shares.extend(given) or [first])
        for accelerator in accelerators:
            predict_logits(model, images, accelerator, batch_size=2)
        assert [share.tolist() for share, _ in shares] == [list(range(rank, count, processes)) for rank in ranks]
        monkeypatch.setattr(training, "gather_object", lambda given: shares)
        if count:
            assert torch.equal(predict_logits(model, images, accelerators[1]), model.logits[:count])
        shares.clear()
    found = [confusion_matrix(model, test, 4, accelerator=each, batch_size=2) for each in accelerators]
    assert torch.equal(sum(found), 2 * wanted.double())
    assert torch.equal(confusion_matrix(model, test, 4), wanted.double())
    assert predict_logits(model, numbered(count)).shape == ((count, 4) if count else (0,))


def shared_training(folder):
    """What one process of several does in the test below."""
    accelerator = make_accelerator()
    train, _, test = digits()
    results = {}
    for loss in ("ce", "hem", "mm"):
        torch.manual_seed(0)
        # Nothing in it looks at its neighbours in the batch, as batch normalisation does.
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        history = fit(
            model,
            make_loss(loss, num_classes=10),
            train.take(torch.arange(250)),  # the last batch is short
            SCHEDULE,
            seed=0,
            accelerator=accelerator,
        )
        results[loss] = {
            "weights": model[1].weight.detach().clone(),
            "active": history[-1].active,
            "train_loss": history[-1].train_loss,
            "logits": predict_logits(model, test, accelerator),
            # Uneven shares; and one image, of which the second process gets none.
            "few": [predict_logits(model, test.images[:count], accelerator) for count in (1, 7)],
            "confusion": confusion_matrix(model, test, 10, accelerator=accelerator),
        }
    results["fused"] = shared_upsampling(accelerator)
    model = small()
    fit(model, make_loss("hem", num_classes=10), few(64), SCHEDULE, seed=0, accelerator=accelerator)
    results["normalised"] = model.state_dict()
    end(accelerator)
    torch.save(results, Path(folder) / f"{accelerator.num_processes}-{accelerator.process_index}.pt")


def shared_upsampling(accelerator):
    """The weights of a network whose loss upsamples its logits, and its last epoch."""
    torch.manual_seed(0)
    model = SmallUNet(3, width=4, norm=group_norm)
    images, labels = torch.rand(7, 1, 16, 16), torch.randint(0, 3, (7, 16, 16))
    for number, each in enumerate(labels):
        each[: 2 * number] = -100  # so that no share has as many pixels as another
    (epoch,) = fit(
        model,
        make_loss("hem", num_classes=3),
        TensorDataset(images, labels),
        Schedule(epochs=1, batch_size=4, max_lr=0.01),
        seed=0,
        accelerator=accelerator,
        upsampling=fuse_upsampling(model, "small-gn"),
    )
    return {"weights": model.state_dict(), "active": epoch.active, "train_loss": epoch.train_loss}


def test_two_processes_train_and_count_as_one(tmp_path):
    for processes in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run([*launch, __file__, str(tmp_path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    alone, *shared = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    normalised = [found.pop("normalised") for found in (alone, *shared)]
    for name, values in normalised[1].items():
        assert torch.equal(values, normalised[2][name])  # running means too, of which each process has its own
    fused = [found.pop("fused") for found in (alone, *shared)]
    for found in fused[1:]:
        for name, weights in found["weights"].items():
            torch.testing.assert_close(weights, fused[0]["weights"][name], rtol=1e-4, atol=1e-5)
        assert found["active"] == pytest.approx(fused[0]["active"], abs=0.01)
        assert found["train_loss"] == pytest.approx(fused[0]["train_loss"], rel=1e-3)
    for loss in alone:
        for found in shared:
            # One sum of gradients is taken in another order.
            torch.testing.assert_close(found[loss]["weights"], alone[loss]["weights"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found[loss]["logits"], alone[loss]["logits"], rtol=1e-3, atol=1e-3)
            assert found[loss]["active"] == pytest.approx(alone[loss]["active"], abs=0.01)
            assert found[loss]["train_loss"] == pytest.approx(alone[loss]["train_loss"], rel=1e-3)
            assert (found[loss]["confusion"] - alone[loss]["confusion"]).abs().sum() <= 4
            assert found[loss]["confusion"].sum() == 540
        assert torch.equal(shared[0][loss]["logits"], shared[1][loss]["logits"])
        for found in (alone, *shared):
            one, seven = found[loss]["few"]
            torch.testing.assert_close(one, found[loss]["logits"][:1])
            torch.testing.assert_close(seven, found[loss]["logits"][:7])


def test_a_network_trained_in_half_precision_is_measured_in_float32(tmp_path):
    def train(model):
        accelerator = make_accelerator(mixed_precision="bf16")
        fit(
            model, make_loss("hem", num_classes=10), few(64), SCHEDULE, seed=0, accelerator=accelerator, folder=tmp_path
        )
        return predict_logits(model, digits()[2])

    AcceleratorState._reset_state(reset_partial_state=True)  # else the first precision of a process stays
    try:
        trained, kept = train(small()), train(small())
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert torch.equal(trained, kept)


def test_options_of_an_accelerator():
    scaler = GradScalerKwargs(init_scale=2)
    accelerator = make_accelerator(timeout=7, kwargs_handlers=[scaler], gradient_accumulation_steps=3)
    assert accelerator.init_handler.timeout == timedelta(seconds=7)
    assert accelerator.scaler_handler is scaler
    assert accelerator.gradient_accumulation_steps == 3
    assert make_accelerator().init_handler.timeout == timedelta(minutes=30)
    assert accelerator.split_batches  # a batch size counts for all processes together


@pytest.mark.parametrize(("number", "rank", "fresh"), [(0, 0, 2), (1, 1, 2), (2, 0, 2), (2, 1, 0), (3, 0, 0)])
def test_samples_that_fill_the_last_batch_up_are_ignored(number, rank, fresh):
    loader = SimpleNamespace(total_batch_size=4, dataset=range(10))
    accelerator = SimpleNamespace(num_processes=2, process_index=rank)
    found = training._once(torch.tensor([3, 4]), number, loader, accelerator, -7)
    assert found.tolist() == [3, 4][:fresh] + [-7] * (2 - fresh)


@pytest.mark.parametrize(("processes", "seconds"), [(1, []), (2, [1]), (3, [1])])
def test_an_end_of_several_processes_waits_for_gloo(monkeypatch, processes, seconds):
    done, slept = [], []
    monkeypatch.setattr(training, "time", SimpleNamespace(sleep=slept.append))
    ways = {name: lambda name=name: done.append(name) for name in ("wait_for_everyone", "end_training")}
    end(SimpleNamespace(num_processes=processes, **ways))
    assert done == ["wait_for_everyone", "end_training"]
    assert slept == seconds


def test_an_accelerator_of_ones_own():
    accelerator = Accelerator(cpu=True)
    model = small()
    fit(model, make_loss("hem", num_classes=10), few(64), SCHEDULE, seed=0, accelerator=accelerator)
    assert not same(model, small())


if __name__ == "__main__":
    shared_training(sys.argv[1])
