import math
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import TensorDataset

from hem_ext.harness import training
from hem_ext.harness.data import Split, digits
from hem_ext.harness.losses import make_loss
from hem_ext.harness.models import HeadOptions, SmallCNN, SmallUNet
from hem_ext.harness.training import (
    POLICIES,
    Schedule,
    confusion_matrix,
    fit,
    head_of,
    make_accelerator,
    predict_logits,
)

SCHEDULE = Schedule(epochs=2, batch_size=32, max_lr=0.1)


def few(count=200):
    train, _, _ = digits()
    return train.take(torch.arange(count))


def small(seed=0, head=None):
    torch.manual_seed(seed)
    return SmallCNN(10, width=4, **({"head": head} if head else {}))


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


def test_one_step_is_a_plain_step_of_sgd():
    # The loss is cut off and joined without a trace, and so is what it asks of the head.
    train, schedule = few(8), Schedule(epochs=1, batch_size=8, max_lr=0.1)
    criterion = make_loss("final-l2", num_classes=10, lam=0.5)
    trained, plain = small(), small()
    fit(trained, criterion, train, schedule, seed=0)

    parameters = list(plain.parameters())
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True, weight_decay=schedule.weight_decay)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=2)
    logits = plain(train.images)
    (criterion(logits, train.labels) + criterion.penalty(plain.head)).backward()
    optimizer.step()
    for a, b in zip(trained.parameters(), parameters, strict=True):
        torch.testing.assert_close(a, b)
    assert not same(trained, small())


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


# --- schedules ------------------------------------------------------------------------------------------------


def rates(policy, steps):
    """The learning rate of every step, and the momentum."""
    schedule = Schedule(epochs=1, batch_size=1, max_lr=2.0, policy=policy)
    optimizer = schedule.optimizer(nn.Linear(1, 1))
    scheduler, seen = schedule.scheduler(optimizer, steps), []
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
    ],
)
def test_a_schedule_refuses(given, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Schedule(**{"epochs": 1, "batch_size": 8, "max_lr": 0.1, **given})


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
    ("policy", "stop_after"), [("one-cycle", 1), ("one-cycle", 3), ("cosine", 2), ("multi-step", 2), ("poly", 2)]
)
def test_an_interrupted_training_ends_with_the_same_bits(tmp_path, monkeypatch, policy, stop_after):
    schedule = Schedule(epochs=4, batch_size=32, max_lr=0.1, policy=policy)
    trained, train_epoch = [], training._train_epoch
    monkeypatch.setattr(training, "_train_epoch", lambda *given: trained.append(1) or train_epoch(*given))

    def run(folder, after_epoch=lambda epoch: None):
        model = small(head=HeadOptions(dropout=0.5))
        evaluate = lambda model: {"sum": sum(p.sum().item() for p in model.parameters())}  # noqa: E731
        criterion = make_loss("hem", num_classes=10)
        history = fit(
            model, criterion, few(64), schedule, seed=0, folder=folder, evaluate=evaluate, after_epoch=after_epoch
        )
        return model, [(epoch.train_loss, epoch.active, epoch.metrics) for epoch in history]

    whole, expected = run(tmp_path / "whole")
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
    # Checkpoints are gone; the model is there, and nothing is trained again.
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["model.pt"]
    before = (tmp_path / "cut" / "model.pt").stat().st_mtime_ns
    again, history = run(tmp_path / "cut")
    assert same(again, whole)
    assert history == expected
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


# --- several processes ----------------------------------------------------------------------------------------


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
            "confusion": confusion_matrix(model, test, 10, accelerator=accelerator),
        }
    accelerator.wait_for_everyone()
    accelerator.end_training()
    torch.save(results, Path(folder) / f"{accelerator.num_processes}-{accelerator.process_index}.pt")


def test_two_processes_train_and_count_as_one(tmp_path):
    for processes in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run([*launch, __file__, str(tmp_path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    alone, *shared = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
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


def test_an_accelerator_of_ones_own():
    accelerator = Accelerator(cpu=True)
    model = small()
    fit(model, make_loss("hem", num_classes=10), few(64), SCHEDULE, seed=0, accelerator=accelerator)
    assert not same(model, small())


if __name__ == "__main__":
    shared_training(sys.argv[1])
