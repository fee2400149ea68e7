"""Train one network with one loss: Accelerate's loop, a checkpoint after every epoch, the same bits from one seed."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchmetrics.functional.classification import multiclass_confusion_matrix

from hem_ext import Selective
from hem_ext.harness.losses import Loss
from hem_ext.harness.losses.hem import HEM
from hem_ext.harness.models import Upsampling, head_of, learns_from_one

# From the optimizer, the largest rate and the number of steps.
POLICIES: dict[str, Callable[[torch.optim.Optimizer, float, int], lr_scheduler.LRScheduler]] = {
    "one-cycle": lambda optimizer, max_lr, steps: lr_scheduler.OneCycleLR(optimizer, max_lr, total_steps=max(steps, 2)),
    "cosine": lambda optimizer, _, steps: lr_scheduler.CosineAnnealingLR(optimizer, steps),
    # Rounded up: a division waits until that many steps are done, also where there are few.
    "multi-step": lambda optimizer, _, steps: lr_scheduler.MultiStepLR(optimizer, [-(-steps // 2), -(-steps * 3 // 4)]),
    "poly": lambda optimizer, _, steps: lr_scheduler.PolynomialLR(optimizer, steps, power=0.9),
}

# From the parameters, the largest rate and the weight decay.
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], float, float], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, max_lr, decay: torch.optim.SGD(
        parameters, max_lr, momentum=0.9, weight_decay=decay, nesterov=True
    ),
    "adamw": lambda parameters, max_lr, decay: torch.optim.AdamW(parameters, max_lr, weight_decay=decay),
}

PAYS_BELOW = 0.6
"""The share of active samples below which selective training takes two forwards. Measured anew in every run, it would
not be the same, and neither would the bits."""

ADDED = {"added": True}
"""Metadata of a field that settings did not have from the beginning; see :func:`settings_of`."""


def settings_of(given: Any) -> dict[str, Any]:
    """A dataclass of settings as a dictionary, as result rows hold it and networks are told apart by.

    Fields that were added to it later are left out where they hold their defaults, which is how it was before them: the
    rows and networks of that time keep their keys.

    Example::

        >>> from hem_ext.harness.training import Schedule, settings_of
        >>> settings_of(Schedule(epochs=1, batch_size=8, max_lr=0.1))
        {'epochs': 1, 'batch_size': 8, 'max_lr': 0.1, 'weight_decay': 0.0005, 'policy': 'one-cycle'}
    """
    found = {}
    for f in fields(given):
        value = getattr(given, f.name)
        if not (f.metadata.get("added") and value == f.default):
            found[f.name] = settings_of(value) if is_dataclass(value) else copy.deepcopy(value)
    return found


@dataclass(frozen=True)
class Schedule:
    """An optimiser, and a learning rate that changes with every step.

    ``"sgd"`` has Nesterov momentum, ``"adamw"`` decays weights apart from the gradient (Loshchilov & Hutter,
    arXiv 1711.05101), by `weight_decay` times the learning rate a step, and is what transformers are trained with.

    ``"one-cycle"`` rises to `max_lr` and falls to nothing, while the momentum, AdamW's first beta, goes from 0.95 down
    to 0.85 and back (Smith, arXiv 1708.07120). The others begin at `max_lr`, with the momentum at 0.9: ``"cosine"``
    falls along half a period of a cosine (Loshchilov & Hutter, arXiv 1608.03983), ``"multi-step"`` is divided by 10
    after half and after three quarters of the steps (He et al., arXiv 1512.03385), and ``"poly"`` falls as
    (1 - step / steps) to the power of 0.9, as is usual in segmentation (Chen et al., arXiv 1606.00915).

    Raises:
        ValueError: less than one epoch or one sample a batch, a learning rate that is not above 0, a weight decay below
            0, another policy or optimiser.
    """

    epochs: int
    batch_size: int  # of all processes together
    max_lr: float
    weight_decay: float = 5e-4
    policy: str = "one-cycle"
    optimizer: str = field(default="sgd", metadata=ADDED)

    def __post_init__(self) -> None:
        whole = [self.epochs, self.batch_size]
        if not all(type(number) is int and number >= 1 for number in whole):
            raise ValueError(f"epochs and batch_size must be whole and at least 1, got {whole[0]!r} and {whole[1]!r}")
        if not (isinstance(self.max_lr, int | float) and 0 < self.max_lr < math.inf):
            raise ValueError(f"max_lr must be a number above 0, got {self.max_lr!r}")
        if not (isinstance(self.weight_decay, int | float) and 0 <= self.weight_decay < math.inf):
            raise ValueError(f"weight_decay must be a number of at least 0, got {self.weight_decay!r}")
        if self.policy not in list(POLICIES):  # whatever it is
            raise ValueError(f"the policy of a schedule must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        if self.optimizer not in list(OPTIMIZERS):
            raise ValueError(f"the optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](model.parameters(), self.max_lr, self.weight_decay)

    def make_scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> lr_scheduler.LRScheduler:
        """The learning rate over so many steps in all."""
        return POLICIES[self.policy](optimizer, self.max_lr, steps)


@dataclass(frozen=True)
class Epoch:
    """What an epoch of training came to. The means are over the training samples (pixels) that are not ignored."""

    train_loss: float  # mean over batches
    active: float  # share of the samples that had a gradient
    kept: float  # logits beside the target's that had one, mean over active samples
    logit_gap: float  # the target's logit minus the largest other, mean
    logit_scale: float  # standard deviation of a sample's logits, mean
    train_accuracy: float  # by the logits that were trained on, while the network changed
    seconds: float  # training only
    loss_seconds: float  # of these, in the loss and its gradient
    metrics: dict[str, float] = field(default_factory=dict)  # of the validation part; of some epochs
    selected: float = 1.0  # share of the samples (images) that the backward pass ran on


def make_accelerator(timeout: float = 1800, **options: Any) -> Accelerator:
    """Accelerate's view of this process, with a batch size that counts for all processes together.

    Args:
        timeout: seconds that processes wait for each other, before they end with an error.
        options: of :class:`accelerate.Accelerator`: `mixed_precision`, `log_with`, `project_dir` ...
    """
    # Without this, processes that have no GPU would each believe to be alone.
    options.setdefault("cpu", not torch.accelerator.is_available())
    handlers = [InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)), *options.pop("kwargs_handlers", ())]
    loading = DataLoaderConfiguration(split_batches=True)
    return Accelerator(dataloader_config=loading, kwargs_handlers=handlers, **options)


def end(accelerator: Accelerator) -> None:
    """Close trackers and connections, once every process is here. For the end of a command."""
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.num_processes > 1:
        # A thread of gloo that gives a tensor back while Python ends aborts the process: torch's issue 190489.
        time.sleep(1)


def fit(
    model: nn.Module,
    criterion: Loss,
    train: Dataset,
    schedule: Schedule,
    *,
    seed: int,
    accelerator: Accelerator | None = None,
    folder: Path | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    after_epoch: Callable[[Epoch], None] = lambda epoch: None,
    num_workers: int = 0,
    selective: bool = False,
    upsampling: Upsampling | None = None,
) -> list[Epoch]:
    """Train `model` in place; return every epoch.

    Under several processes (``torchrun``, ``accelerate launch``) each takes its share of every batch, and what a loss
    divides by is counted over all of them: the gradient is that of the whole batch. Batch normalisation alone looks at
    a process's share, and dice sums over it.

    Args:
        model: images ``(N, channels, H, W)`` to logits ``(N, C)`` or ``(N, C, H, W)``.
        criterion: what to minimise; its penalty on the head is added.
        train: items ``(image, label)``.
        schedule: the same one for every loss that is compared. Where batches leave one sample over, which batch
            normalisation could not be trained on, every epoch goes without one.
        seed: of the order of the samples and of dropout. With the same seed, a CPU gives the same bits again.
        accelerator: devices, precision and processes; plain if not given.
        folder: where checkpoints and the finished model are kept. What is finished there is not trained again, what
            was begun goes on after its last checkpoint, and ends with the same bits.
        evaluate: the trained-so-far model to metrics of the validation part, called after the last epoch and, evenly
            spread, at most 16 before it.
        after_epoch: called with every epoch as it ends, also with those that a checkpoint brings back.
        num_workers: processes that load images.
        selective: leave the samples that HEM has finished out of the backward pass: :class:`hem_ext.Selective`. What is
            learnt is the same but for rounding, which the order of sums decides.
        upsampling: the last step of the network, which :func:`hem_ext.harness.models.fuse_upsampling` has left to the
            loss: :func:`hem_ext.upsampled_hem_loss`. What is learnt is the same but for rounding here as well.

    Raises:
        ValueError: `selective` with another loss than HEM's, in several processes, or with a network in which samples
            touch each other, as with batch normalisation. `upsampling` with another loss than HEM's, or selectively.
        KeptError: a damaged file in `folder`, or one that cannot be written.
    """
    accelerator = accelerator or make_accelerator()
    if selective:
        check_selective(criterion, accelerator.num_processes)
    if upsampling is not None:
        check_fused_upsample(criterion, selective)
    criterion.to(accelerator.device)
    if folder is not None and (folder / "model.pt").exists():
        with reading(folder / "model.pt", f"without {folder}, the network is trained again"):
            saved = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
            model.load_state_dict(saved["model"])
            history = [Epoch(**epoch) for epoch in saved["history"]]
        model.to(accelerator.device)
        for epoch in history:
            after_epoch(epoch)
        return history

    accelerator.free_memory()  # of what was trained before: checkpoints hold all that is prepared
    sampler = _EpochSampler(train, seed)
    # Processes that share batches fill the last one up.
    one_is_left = len(train) > schedule.batch_size and len(train) % schedule.batch_size == 1
    drop_last = one_is_left and accelerator.num_processes == 1 and not learns_from_one(model, train[0][0])
    loader = DataLoader(train, schedule.batch_size, sampler=sampler, num_workers=num_workers, drop_last=drop_last)
    steps = schedule.epochs * len(loader)
    every = math.ceil(schedule.epochs / 16)
    optimizer = schedule.make_optimizer(model)
    scheduler = schedule.make_scheduler(optimizer, steps)
    network, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = Selective(_Counting(network), criterion.criterion, pays_below=PAYS_BELOW) if selective else None
    checkpoints = None if folder is None else _Checkpoints(folder, accelerator)
    history = []
    if checkpoints is not None:
        history = checkpoints.load(scheduler, step)
        for epoch in history:
            after_epoch(epoch)

    for number in range(len(history), schedule.epochs):
        sampler.epoch = number
        torch.manual_seed(_mix(seed, number) + accelerator.process_index)  # dropout and augmentation
        epoch = _train_epoch(network, criterion, loader, optimizer, scheduler, accelerator, step, upsampling)
        if evaluate is not None and (schedule.epochs - number - 1) % every == 0:
            epoch.metrics.update(evaluate(model))
        history.append(epoch)
        accelerator.log(
            {name.replace("_", " "): value for name, value in asdict(epoch).items() if name != "metrics"}
            | epoch.metrics,
            step=number + 1,
        )
        if checkpoints is not None and number + 1 < schedule.epochs:
            checkpoints.save(history, scheduler, step)
        after_epoch(epoch)
    # Measured in float32 whatever it was trained in, as it is where it comes from a file.
    accelerator.unwrap_model(network, keep_fp32_wrapper=False)
    if checkpoints is not None:
        checkpoints.finish(model, history)
    return history


def check_selective(criterion: Loss, processes: int = 1) -> None:
    """Raise ValueError where a loss, or so many processes to a batch, cannot train selectively."""
    if not isinstance(criterion, HEM):
        raise ValueError(f"selective training is for hem and hem+, which finish samples; {criterion.name} does not")
    if processes > 1:
        raise ValueError(f"selective training is for one process to a batch, not for {processes} that share it")


def check_fused_upsample(criterion: Loss, selective: bool) -> None:
    """Raise ValueError where a loss cannot take the last step of a network for segmentation."""
    if not isinstance(criterion, HEM):
        raise ValueError(f"fused upsampling is for hem and hem+; {criterion.name} is given logits of every pixel")
    if selective:
        raise ValueError("fused upsampling is not for selective training, which is given logits of every pixel")


class _Counting(nn.Module):
    """A network that counts the samples which the backward pass will run on."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.samples = network, 0

    def forward(self, images: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.samples += len(images)
        return self.network(images)


def _train_epoch(
    network: nn.Module,
    criterion: Loss,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    scheduler: lr_scheduler.LRScheduler,
    accelerator: Accelerator,
    selective: Selective | None = None,
    upsampling: Upsampling | None = None,
) -> Epoch:
    network.train()
    head = head_of(accelerator.unwrap_model(network))
    group = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None
    begin, loss_seconds, losses = time.perf_counter(), 0.0, []
    counts = torch.zeros(6, dtype=torch.float64)
    if selective is not None:
        selective.model.samples = 0
    for number, (images, labels) in enumerate(loader):
        labels = _once(labels, number, loader, accelerator, criterion.ignore_index)
        images = images.contiguous(memory_format=torch.channels_last)
        if selective is None:
            logits = network(images)
        else:
            value, logits = selective(images, labels, return_logits=True)

        # The loss is cut off from the network, so that it is timed alone and its gradient can be looked at.
        y = logits.detach().requires_grad_()
        if upsampling is not None:
            labels = upsampling.labels(labels, criterion.ignore_index)
        loss_begin = time.perf_counter()
        if upsampling is not None:
            loss = criterion.upsampled(y, labels, upsampling.align_corners, group)
        else:
            loss = criterion(y, labels) if group is None else criterion.share(y, labels, group)
        loss.backward()
        loss_seconds += time.perf_counter() - loss_begin

        if selective is None:
            value = (logits * y.grad).sum()
        optimizer.zero_grad()
        accelerator.backward(value + criterion.penalty(head))
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
        if upsampling is None:
            counts += _look(y.detach(), y.grad, labels, criterion.ignore_index)
        else:
            counts += _look_upsampled(y.detach(), labels, criterion, upsampling)
    seconds = time.perf_counter() - begin
    if selective is not None:
        seconds -= loss_seconds  # it had its losses already, and these are to be looked at alone
    if accelerator.num_processes > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)  # running means, or each process would judge its own network
    samples, active, kept, gap, scale, right = accelerator.reduce(counts.to(accelerator.device, torch.float32)).tolist()
    return Epoch(
        train_loss=accelerator.reduce(torch.stack(losses).mean(), "mean").item(),
        active=active / max(samples, 1),
        kept=kept / max(active, 1),
        logit_gap=gap / max(samples, 1),
        logit_scale=scale / max(samples, 1),
        train_accuracy=right / max(samples, 1),
        seconds=seconds,
        loss_seconds=loss_seconds,
        selected=1.0 if selective is None else selective.model.samples / max(len(loader.dataset), 1),
    )


def _once(labels: Tensor, number: int, loader: DataLoader, accelerator: Accelerator, ignore_index: int) -> Tensor:
    """The labels of a process's share, without the samples that Accelerate repeats to fill the last batch up."""
    if accelerator.num_processes == 1:
        return labels
    begin = number * loader.total_batch_size + accelerator.process_index * len(labels)
    fresh = min(max(len(loader.dataset) - begin, 0), len(labels))
    return torch.cat([labels[:fresh], torch.full_like(labels[fresh:], ignore_index)])


@torch.no_grad()
def _look(logits: Tensor, gradient: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Of samples that count: their number, those with a gradient, other classes that have one; gaps, scales, hits."""
    counted = labels != ignore_index
    target = torch.where(counted, labels, 0).unsqueeze(1)
    pulled = gradient != 0
    active = pulled.gather(1, target).squeeze(1) & counted
    kept = (pulled.sum(1) - 1)[active]
    gaps = logits.gather(1, target).squeeze(1) - logits.scatter(1, target, -math.inf).amax(1)
    scales = logits.float().std(1, correction=0)
    looked = (counted, active, kept, gaps[counted], scales[counted], gaps[counted] > 0)
    return torch.stack([x.sum().double().cpu() for x in looked])


def _look_upsampled(logits: Tensor, labels: Tensor, criterion: Loss, upsampling: Upsampling) -> Tensor:
    """The same of logits of every pixel, which are made here, of one image at a time."""
    counts = torch.zeros(6, dtype=torch.float64)
    for coarse, target in zip(logits.split(1), labels.split(1), strict=True):
        y = upsampling(coarse, target).requires_grad_()
        criterion(y, target).backward()
        counts += _look(y.detach(), y.grad, target, criterion.ignore_index)
    return counts


# --- looking at a trained model -------------------------------------------------------------------------------


@torch.no_grad()
def predict_logits(
    model: nn.Module, images: Dataset | Tensor, accelerator: Accelerator | None = None, batch_size: int = 250
) -> Tensor:
    """The logits of every image on the CPU, ``(N, C)`` or ``(N, C, H, W)``, float32, in their order.

    Args:
        model: on the accelerator's device.
        images: a dataset of ``(image, label)``, or the images themselves ``(N, channels, H, W)``.
        accelerator: every process computes a share, and each gets all.
        batch_size: of a process.
    """
    parts = list(_batches(model, images, accelerator, batch_size))
    indices = torch.cat([index for index, _, _ in parts]) if parts else torch.zeros(0, dtype=torch.int64)
    logits = torch.cat([logits.float().cpu() for _, logits, _ in parts]) if parts else torch.zeros(0)
    if accelerator is not None and accelerator.num_processes > 1:
        gathered = [part for part in gather_object([(indices, logits)]) if len(part[0])]
        indices, logits = (torch.cat(tensors) for tensors in zip(*gathered, strict=True))
    return logits[indices.argsort()]


@torch.no_grad()
def confusion_matrix(
    model: nn.Module,
    test: Dataset,
    num_classes: int,
    *,
    ignore_index: int = -100,
    outputs: Callable[[Tensor], Tensor] = lambda logits: logits,
    accelerator: Accelerator | None = None,
    batch_size: int = 50,
) -> Tensor:
    """Counts over the whole test set and all processes, float64 ``(C, C)``: row the label, column the prediction.

    Args:
        model, accelerator, batch_size: as in :func:`predict_logits`.
        test: items ``(image, label)``.
        num_classes: C.
        ignore_index: labels that are not counted.
        outputs: what the loss makes of the logits at test.
    """
    device = next(model.parameters()).device
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    for _, logits, labels in _batches(model, test, accelerator, batch_size):
        predicted = outputs(logits).argmax(1)
        counts += multiclass_confusion_matrix(predicted, labels.to(device), num_classes, ignore_index=ignore_index)
    return (accelerator.reduce(counts) if accelerator is not None else counts).double().cpu()


def _batches(
    model: nn.Module, images: Dataset | Tensor, accelerator: Accelerator | None, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Positions, logits and labels of this process's share, batch by batch, in eval mode."""
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    mine = range(rank, len(images), processes)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        if isinstance(images, Tensor):
            loader = ((images[list(part)], None) for part in _chunks(mine, batch_size))
        else:
            loader = DataLoader(Subset(images, mine), batch_size)
        for part, (batch, labels) in zip(_chunks(mine, batch_size), loader, strict=True):
            yield torch.tensor(part), model(batch.to(device, memory_format=torch.channels_last)), labels
    finally:
        model.train(was_training)


def _chunks(positions: range, size: int) -> Iterator[list[int]]:
    for begin in range(0, len(positions), size):
        yield list(positions[begin : begin + size])


# --- the order of the samples, and checkpoints ----------------------------------------------------------------


class _EpochSampler(Sampler[int]):
    """A random order that depends on the seed and the epoch alone, and so needs no state to go on from."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.size, self.seed, self.epoch = len(dataset), seed, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(
            self.size, generator=torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        ).tolist()


def _mix(seed: int, epoch: int) -> int:
    return seed * 100_003 + epoch


class _Checkpoints:
    """Accelerate's state after the last whole epoch. A kill at any moment leaves one that is whole.

    An epoch that ends within `pause` seconds of the last checkpoint is not kept: writing would take longer than
    training it again.
    """

    pause = 10.0

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = folder, accelerator
        self.pointer = folder / "checkpoint.json"
        self.last = time.monotonic()

    def load(self, scheduler: lr_scheduler.LRScheduler, step: Selective | None) -> list[Epoch]:
        if not self.pointer.exists():
            return []
        otherwise = f"without {self.folder}, the network is trained again"
        with reading(self.pointer, otherwise):
            saved = json.loads(self.pointer.read_text(encoding="utf-8"))
            state, history = self.folder / saved["state"], [Epoch(**epoch) for epoch in saved["history"]]
            if step is not None:
                step.load_state_dict(saved["selective"])
        with reading(state, otherwise):
            self.accelerator.load_state(state)  # with weights_only, as Accelerate loads
        with reading(state / "schedule.pt", otherwise):
            scheduler.load_state_dict(torch.load(state / "schedule.pt", weights_only=True))
        return history

    def save(self, history: list[Epoch], scheduler: lr_scheduler.LRScheduler, step: Selective | None) -> None:
        # One clock decides for all processes.
        (due,) = broadcast_object_list([time.monotonic() - self.last >= self.pause])
        if not due:
            return
        name = f"epoch-{len(history)}"
        try:
            with writing(self.folder / name):
                self.accelerator.save_state(self.folder / name)
                if self.accelerator.is_main_process:
                    torch.save(scheduler.state_dict(), self.folder / name / "schedule.pt")
        except KeptError:
            shutil.rmtree(self.folder / name, ignore_errors=True)  # a full disk has no room for half of it
            raise
        if self.accelerator.is_main_process:
            saved = {"state": name, "history": [asdict(epoch) for epoch in history]}
            text = json.dumps(saved if step is None else {**saved, "selective": step.state_dict()})
            write_whole(self.pointer, lambda path: path.write_text(text, encoding="utf-8"))
            self._forget(all_but=name)
        self.last = time.monotonic()
        self.accelerator.wait_for_everyone()

    def finish(self, model: nn.Module, history: list[Epoch]) -> None:
        if self.accelerator.is_main_process:
            state = {name: value.cpu() for name, value in model.state_dict().items()}
            saved = {"model": state, "history": [asdict(epoch) for epoch in history]}
            write_whole(self.folder / "model.pt", lambda path: torch.save(saved, path))
            self.pointer.unlink(missing_ok=True)
            self._forget()
        self.accelerator.wait_for_everyone()

    def _forget(self, all_but: str | None = None) -> None:
        for path in self.folder.glob("epoch-*"):
            if path.name != all_but:
                shutil.rmtree(path, ignore_errors=True)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that is there with all its content, or not at all.

    Raises:
        KeptError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(partial)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()  # a full disk has no room for it
            raise


class KeptError(ValueError):
    """A file of the output folder is damaged, or cannot be written."""


@contextmanager
def reading(path: Path, otherwise: str) -> Iterator[None]:
    """Make KeptError, which names the file and says what happens without it, of what its content raises."""
    try:
        yield
    # What a damaged file raises is of many kinds: pickle's, zip's, safetensors', and what comes of other content.
    except Exception as error:
        # Of memory, and of files that cannot be opened, which alone have their names: nothing of the content.
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "filename", None) is not None:
            raise
        raise KeptError(f"{path} is damaged ({in_short(error)}): {otherwise}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make KeptError, which names the file, of what writing it raises, also of torch's and safetensors' own errors."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch says where in its sources it noticed, and not why.
        hint = "" if isinstance(error, OSError) else "; is the disk full?"
        raise KeptError(f"{path} cannot be written: {in_short(error)}{hint}") from error


def in_short(error: Exception) -> str:
    """The kind of an error, and the first sentence of what it says."""
    said = str(error).partition("\n")[0].partition(". ")[0].rstrip(" :.")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
