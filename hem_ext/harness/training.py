"""Train one network with one loss, and say how it went after every epoch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from hem_ext.harness.data import Split


@dataclass(frozen=True)
class Schedule:
    """SGD with momentum under one cycle of the learning rate (Smith, arXiv 1708.07120)."""

    epochs: int
    batch_size: int
    max_lr: float
    weight_decay: float = 5e-4


@dataclass(frozen=True)
class Epoch:
    """What an epoch of training came to; the metrics are of the test split, in [0, 1]."""

    train_loss: float
    active: float  # share of the training samples (pixels) that had a gradient
    accuracy: float
    mean_iou: float
    seconds: float  # training only
    loss_seconds: float  # of these, in the loss: forward and backward


def fit(
    model: nn.Module,
    criterion: nn.Module,
    train: Split,
    test: Split,
    schedule: Schedule,
    *,
    seed: int,
    after_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> list[Epoch]:
    """Train `model` in place; return every epoch.

    Args:
        model: images ``(N, 1, H, W)`` to logits ``(N, C)`` or ``(N, C, H, W)``.
        criterion: the mean loss of logits and labels.
        train, test: what to learn from, and what to measure on.
        schedule: the same one for every loss that is compared.
        seed: of the order of the samples.
        after_epoch: called with every epoch as it ends.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = -(-len(train.labels) // schedule.batch_size)
    optimizer = torch.optim.SGD(
        model.parameters(), schedule.max_lr, momentum=0.9, nesterov=True, weight_decay=schedule.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.max_lr, epochs=schedule.epochs, steps_per_epoch=steps
    )
    history = []
    for _ in range(schedule.epochs):
        model.train()
        begin, loss_seconds, loss_sum, active = time.perf_counter(), 0.0, 0.0, 0
        for batch in torch.randperm(len(train.labels), generator=generator).split(schedule.batch_size):
            logits, labels = model(train.images[batch]), train.labels[batch]

            # The loss is cut off from the network, so that it is timed alone.
            y = logits.detach().requires_grad_()
            loss_begin = time.perf_counter()
            loss = criterion(y, labels)
            loss.backward()
            loss_seconds += time.perf_counter() - loss_begin

            optimizer.zero_grad()
            logits.backward(y.grad)
            optimizer.step()
            scheduler.step()
            loss_sum += loss.item() * len(batch)
            active += (y.grad.gather(1, labels.unsqueeze(1)) != 0).sum().item()
        seconds = time.perf_counter() - begin
        epoch = Epoch(
            train_loss=loss_sum / len(train.labels),
            active=active / train.labels.numel(),
            **evaluate(model, test),
            seconds=seconds,
            loss_seconds=loss_seconds,
        )
        history.append(epoch)
        after_epoch(epoch)
    return history


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 100) -> Tensor:
    """The class of every image ``(N,)`` or pixel ``(N, H, W)``."""
    model.eval()
    return torch.cat([model(batch).argmax(1) for batch in images.split(batch_size)])


def evaluate(model: nn.Module, test: Split) -> dict[str, float]:
    """Accuracy, and mean intersection over union, both of one confusion matrix over the whole split.

    As in mmsegmentation, the mean is over the classes that occur in the labels or the predictions.
    """
    predicted = predict(model, test.images)
    num_classes = int(max(predicted.max(), test.labels.max())) + 1
    confusion = multiclass_confusion_matrix(predicted, test.labels, num_classes).double()
    hits = confusion.diag()
    union = confusion.sum(0) + confusion.sum(1) - hits
    return {
        "accuracy": (hits.sum() / confusion.sum()).item(),
        "mean_iou": (hits / union).nanmean().item(),
    }
