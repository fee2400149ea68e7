"""What a task is, and what it works with."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import Dataset

from hem_ext import Selective, check_independence
from hem_ext.harness import data
from hem_ext.harness.data.base import DataError, check_kind, to_float
from hem_ext.harness.losses import LOSSES, Loss, make_loss
from hem_ext.harness.models import (
    PLAIN_HEAD,
    HeadOptions,
    Standardized,
    check_size,
    fuse_upsampling,
    learns_from_one,
    make_model,
)
from hem_ext.harness.training import (
    ADDED,
    PAYS_BELOW,
    Epoch,
    KeptError,
    Schedule,
    check_fused_upsample,
    check_selective,
    confusion_matrix,
    fit,
    make_accelerator,
    predict_logits,
    settings_of,
)

LARGEST_SEED = 2**32  # so that torch takes what is made of it and an epoch
SCHEDULE_SETTINGS = tuple(f.name for f in fields(Schedule))


@dataclass(frozen=True)
class Cell:
    """One training to be judged: a task, a loss, a seed, and every setting that decides the numbers."""

    task: str
    loss: str
    seed: int
    data: str
    schedule: Schedule
    model: str = "small"
    data_root: str | None = None
    mixed_precision: str | None = None
    constants: Mapping[str, float] = field(default_factory=dict)  # of the loss
    options: Mapping[str, Any] = field(default_factory=dict)  # of the task
    validation: float | None = None  # share of the training part, of a set without a validation part
    part: str = "test"  # what is judged: "test", or "validation" where settings are chosen
    selective: bool = field(default=False, metadata=ADDED)  # samples that HEM has finished are in no backward pass
    fused_upsample: bool = field(default=False, metadata=ADDED)  # HEM interpolates the logits of pixels itself

    def settings(self) -> dict[str, Any]:
        """As result rows hold it; equal settings are the same cell."""
        return settings_of(self)

    @property
    def key(self) -> str:
        return digest(self.settings())

    def load_data(self) -> data.Data:
        """The data set, kept for the next cell that has the same."""
        options = json.dumps(self.options.get("data_options", {}), sort_keys=True)  # which a cache can tell apart
        return _load_data(self.data, self.data_root, self.validation, options)

    @property
    def training(self) -> list[Any]:
        """What decides a network that is trained for it, beside the loss and what the task says of each."""
        source = [self.data, self.data_root, self.validation, dict(self.options.get("data_options", {}))]
        plain = [*source, self.model, self.mixed_precision, settings_of(self.schedule), self.seed]
        ways = {"selective": self.selective, "fused upsample": self.fused_upsample}
        return [*plain, *(name for name, is_taken in ways.items() if is_taken)]

    def with_settings(self, settings: Mapping[str, Any]) -> Cell:
        """The same with other values of the schedule's fields, or of the loss's constants."""
        schedule = {name: value for name, value in settings.items() if name in SCHEDULE_SETTINGS}
        constants = {name: value for name, value in settings.items() if name not in SCHEDULE_SETTINGS}
        for name, value in constants.items():
            check_kind(f"{self.loss}: {name}", value, float)
        return replace(self, schedule=replace(self.schedule, **schedule), constants={**self.constants, **constants})

    @property
    def variant(self) -> str:
        """The loss as tables name it, with the constants that were given: ``hem margin=0.5``, ``hem selective``."""
        how = ["selective"] if self.selective else []
        return " ".join([self.loss, *how, *(f"{name}={value:g}" for name, value in self.constants.items())])


def digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Metric:
    """A number that a task gives."""

    title: str
    higher_is_better: bool = True
    of_every_cell: bool = True  # costly ones are of some cells alone


class DivergedError(ArithmeticError):
    """A network has weights or outputs that are not finite: there is nothing to measure."""


class Task:
    """A question put to every loss. A subclass gives the fields and :meth:`measure`."""

    name: str
    metrics: Mapping[str, Metric]
    """By name; the first is the one that settings are chosen by."""
    judged_by: Sequence[str] = ()
    """The metrics that decide; the first alone if empty."""
    data: str = "mnist-5k"
    quick_data: str = "digits"
    label_dims: int = 0  # of the labels of an image: 2 for those of its pixels
    losses: Sequence[str]
    """Those compared unless others are asked for."""
    schedule: Schedule
    quick_schedule: Schedule
    """To see that everything runs, in seconds."""
    options: Mapping[str, Any] = {}
    """Of the task, and under ``data_options`` those of :func:`hem_ext.harness.data.load`."""
    optional: Mapping[str, type] = {}
    """The kinds of the options that may be None too; the others are of the kinds of their defaults."""
    quick_options: Mapping[str, Any] = {}
    constants: Mapping[str, Mapping[str, float]] = {}
    """What a loss gets on this task where nothing is asked for: loss -> constant -> value."""

    def run(self, bench: Workbench) -> dict[str, float]:
        """Train what is needed, and measure: a value for each of `metrics`, but for those that are of some cells alone.

        NaN if the training diverged.

        Raises:
            ValueError, TypeError, FileNotFoundError, ImportError: what :meth:`check` finds, or, of files that are read
                later or kept, :class:`hem_ext.harness.data.base.DataError` and
                :class:`hem_ext.harness.training.KeptError`.
            RuntimeError: an error of one of these kinds that the cell's settings and data are not to blame for.
        """
        self.check(bench.cell)
        try:
            return self.measure(bench)
        except DivergedError:
            return dict.fromkeys(self.metrics, float("nan"))
        except (DataError, KeptError):
            raise
        except (ValueError, TypeError) as error:
            cell = bench.cell
            raise RuntimeError(f"{cell.task} with {cell.variant}, seed {cell.seed}, broke off: {error}") from error

    def check(self, cell: Cell) -> None:
        """Raise ValueError, or FileNotFoundError or ImportError, for what would come to light only after training."""
        found = cell.load_data()
        dims = found.train[0][1].dim()
        if dims != self.label_dims:
            kinds = {0: "one label an image", 2: "a label for every pixel"}
            raise ValueError(f"{self.name} needs {kinds[self.label_dims]}; {cell.data} has {kinds[dims]}")
        about = {"num_classes": found.num_classes, "class_counts": [1] * found.num_classes}
        criterion = make_loss(cell.loss, ignore_index=found.ignore_index, **about, **cell.constants)
        with torch.random.fork_rng(devices=[]):
            _try_network(cell.model, found, dims == 2, one_by_one=cell.schedule.batch_size == 1)
            if cell.fused_upsample:
                if dims != 2:
                    raise ValueError(f"fused upsampling is for segmentation, not for {self.name}")
                check_fused_upsample(criterion, cell.selective)
                model = _new_network(cell.model, found, found.num_classes, criterion.head, segmentation=True)
                fuse_upsampling(model, cell.model)
            if cell.selective:
                check_selective(criterion)
                _try_selective_step(cell.model, found, criterion)

    def notes(self, cell: Cell) -> list[str]:
        """What the task leaves out with this data set, a sentence each: to be said before training."""
        return []

    def measure(self, bench: Workbench) -> dict[str, float]:
        """What :meth:`run` gives: `metrics` in their order, then whatever else is worth a row."""
        raise NotImplementedError

    def epochs(self, cell: Cell) -> int:
        """How many epochs :meth:`run` trains, for the progress bar."""
        return cell.schedule.epochs

    def cell(self, loss: str, seed: int, *, quick: bool = False, **given: Any) -> Cell:
        """A cell of this task, with its defaults where nothing is given.

        Args:
            loss, seed: of the cell.
            quick: with the short schedule and options.
            given: fields of :class:`Cell` and of :class:`Schedule`; None is as good as not given.

        Raises:
            ValueError: an unknown loss, a constant that it does not have, an option that the task does not have or that
                is of another kind, or a seed that is too large.
        """
        if loss not in LOSSES:
            raise ValueError(f"unknown loss {loss!r}: one of {', '.join(LOSSES)}")
        if abs(seed) > LARGEST_SEED:
            raise ValueError(f"seed must be from {-LARGEST_SEED} to {LARGEST_SEED}, got {seed}")
        given = {name: value for name, value in given.items() if value is not None}
        names = ("data", "data_root", "model", "mixed_precision", "validation", "part", "selective", "fused_upsample")
        usual = self.quick_data if quick else self.data
        fields = {"data": usual, **{name: given.pop(name) for name in names if name in given}}
        defaults = {**self.options, **(self.quick_options if quick else {})}
        if fields["data"] != usual:
            defaults["data_options"] = {}  # those of the default data set
        options = given.pop("options", {})
        unknown = sorted(options.keys() - defaults.keys())
        if unknown:
            raise ValueError(f"{self.name} has no option {', '.join(unknown)}; it has {', '.join(defaults) or 'none'}")
        for name, value in options.items():
            if not (value is None and name in self.optional):
                check_kind(name, value, self.optional.get(name, type(defaults[name])))
        constants = {**self.constants.get(loss, {}), **given.pop("constants", {})}
        known = LOSSES[loss].constants()
        unknown = sorted(constants.keys() - known.keys())
        if unknown:
            raise ValueError(f"{loss} has no constant {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
        schedule = Schedule(**{**asdict(self.quick_schedule if quick else self.schedule), **given})
        return Cell(
            self.name, loss, seed, schedule=schedule, constants=constants, options={**defaults, **options}, **fields
        )


class Workbench:
    """What a task runs a cell with: data, models and losses by the cell's names, and models that are kept.

    Args:
        cell: what to run.
        folder: where trained models are kept, to be used again by whatever trains the same; None keeps nothing.
        accelerator: devices, precision and processes.
        after_epoch: called with every epoch that ends.
        num_workers: processes that load images for training.
    """

    def __init__(
        self,
        cell: Cell,
        folder: Path | None = None,
        accelerator: Accelerator | None = None,
        after_epoch: Callable[[Epoch], None] = lambda epoch: None,
        num_workers: int = 0,
    ) -> None:
        self.cell = cell
        self.num_workers = num_workers
        self.folder = folder
        self.accelerator = accelerator or make_accelerator()
        self.after_epoch = after_epoch
        self.options = cell.options
        self.history: list[Epoch] = []
        """Every epoch trained for this cell."""
        self.pictures: dict[str, Tensor] = {}
        """What a report can draw: ``images`` ``(n, channels, H, W)``, ``labels`` and ``predicted`` ``(n, H, W)``."""

    @property
    def data(self) -> data.Data:
        return self.cell.load_data()

    @property
    def held_out(self) -> Dataset:
        """What the cell is judged by, to be looked at when all its networks are trained."""
        return self.data.test if self.cell.part == "test" else self.data.validation

    def criterion(self, num_classes: int, class_counts: Sequence[int] | None = None, ignore_index: int = -100) -> Loss:
        """The cell's loss."""
        return make_loss(
            self.cell.loss,
            num_classes=num_classes,
            class_counts=class_counts,
            ignore_index=ignore_index,
            **self.cell.constants,
        )

    def model(self, num_classes: int, head: HeadOptions, *, segmentation: bool = False) -> nn.Module:
        """The cell's network for images in [0, 1], with the same initial weights for every loss."""
        torch.manual_seed(self.cell.seed)
        network = _new_network(self.cell.model, self.data, num_classes, head, segmentation=segmentation)
        return Standardized(network, *_statistics(self.data))

    def train(
        self,
        model: nn.Module,
        criterion: Loss,
        train: Dataset,
        *,
        what: Any,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
        seed: int | None = None,
    ) -> nn.Module:
        """Train `model`, or fetch it where the same was trained before; in eval mode, on the accelerator's device.

        Args:
            model, criterion, train, evaluate: as :func:`hem_ext.harness.training.fit` takes them; the images are
                augmented if their set says how.
            what: what `train` and the weights of `model` are beside the cell's data set and seed, as JSON: trainings
                that are told apart by nothing else are the same.
            seed: of the order of the samples; the cell's if not given.

        Raises:
            DivergedError: the trained weights are not all finite.
        """
        cell, folder = self.cell, None
        upsampling = fuse_upsampling(model.network, cell.model) if cell.fused_upsample else None
        if self.folder is not None:
            folder = self.folder / digest([*cell.training, criterion.identity(), what])
            folder.mkdir(parents=True, exist_ok=True)
        # Another cell may need the same network at this moment, in another process; those of one training are one.
        alone = folder is not None and self.accelerator.num_processes == 1
        with FileLock(folder / "lock") if alone else nullcontext():
            self.history += fit(
                model.to(memory_format=torch.channels_last),
                criterion,
                for_training(train),
                cell.schedule,
                seed=cell.seed if seed is None else seed,
                accelerator=self.accelerator,
                folder=folder,
                evaluate=evaluate,
                after_epoch=self.after_epoch,
                num_workers=self.num_workers,
                selective=cell.selective,
                upsampling=upsampling,
            )
        _check_finite(*model.state_dict().values())
        return model.eval()

    def outputs(self, model: nn.Module, criterion: Loss, images: Dataset | Tensor) -> Tensor:
        """What a network is judged by: its outputs for every image on the CPU, float32 ``(N, C)``.

        Raises:
            DivergedError: they are not all finite.
        """
        outputs = predict_logits(AtTest(model, criterion), images, self.accelerator)
        _check_finite(outputs)
        return outputs

    def classifier(self, *, what: Any = "all of it", **given: Any) -> tuple[nn.Module, Loss]:
        """A classifier trained with the cell's loss, and that loss.

        Args:
            what: as in :meth:`train`.
            given: `train` and `validation` instead of the data set's own, `num_classes` instead of its own.
        """
        found = self.data
        train, validation = given.get("train", found.train), given.get("validation", found.validation)
        num_classes = given.get("num_classes", found.num_classes)
        counts = class_counts(train, num_classes)
        criterion = self.criterion(num_classes, counts)
        model = self.model(num_classes, criterion.head)

        def evaluate(model: nn.Module) -> dict[str, float]:
            counted = confusion_matrix(
                model, validation, num_classes, outputs=criterion.outputs, accelerator=self.accelerator, batch_size=250
            )
            return {"accuracy": (counted.diag().sum() / counted.sum()).item()}

        return self.train(model, criterion, train, what=what, evaluate=evaluate), criterion


def _new_network(
    name: str, found: data.Data, num_classes: int, head: HeadOptions = PLAIN_HEAD, *, segmentation: bool
) -> nn.Module:
    """A network for the standardised images of a data set."""
    size = tuple(found.train[0][0].shape[-2:])
    return make_model(name, num_classes, channels=found.channels, size=size, head=head, segmentation=segmentation)


@functools.lru_cache(maxsize=4)
def _try_network(name: str, found: data.Data, segmentation: bool, one_by_one: bool = False) -> None:
    """Raise ValueError or ImportError where there is no such network for these images, or for one at a time."""
    model = _new_network(name, found, found.num_classes, segmentation=segmentation)
    for train in (found.train, for_training(found.train)):  # which may be parts of images
        image = train[0][0]
        check_size(model, name, image)
        if one_by_one and not learns_from_one(model, image):
            raise ValueError(
                f"{name} has batch normalisation, which cannot be trained on one image of {tuple(image.shape[1:])} "
                "pixels at a time: batch_size must be at least 2, got 1"
            )


def _try_selective_step(name: str, found: data.Data, criterion: Loss) -> None:
    """Raise ValueError where samples touch each other in the network, or it draws random numbers."""
    image, label = found.train[0]
    model = _new_network(name, found, found.num_classes, criterion.head, segmentation=label.dim() == 2)
    images, labels = torch.stack([image, 1 - image]), torch.stack([label, label])
    try:
        Selective(model, criterion.criterion, pays_below=PAYS_BELOW)(images, labels)
        check_independence(model, images)
    except ValueError as error:
        raise ValueError(
            f"{name} cannot be trained selectively: {error} (--model small-gn has group normalisation)"
        ) from error


class AtTest(nn.Module):
    """A network followed by what its loss makes of the logits at test: what is judged, and attacked."""

    def __init__(self, model: nn.Module, criterion: Loss) -> None:
        super().__init__()
        self.model, self.criterion = model, criterion
        self.train(model.training)

    def forward(self, images: Tensor) -> Tensor:
        return self.criterion.outputs(self.model(images))


def _check_finite(*tensors: Tensor) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise DivergedError


@functools.lru_cache(maxsize=4)
def _load_data(name: str, root: str | None, validation: float | None, options: str) -> data.Data:
    return data.load(name, None if root is None else Path(root), validation, **json.loads(options))


@functools.lru_cache(maxsize=4)
def _statistics(found: data.Data) -> tuple[Tensor, Tensor]:
    return found.statistics()


def for_training(dataset: Dataset) -> Dataset:
    """The same, its images augmented if it says how."""
    return dataset.for_training() if hasattr(dataset, "for_training") else dataset


def labels_of(dataset: Dataset) -> Tensor:
    """Every label of a classification set, int64 ``(N,)``; without opening an image where that can be helped."""
    labels = getattr(dataset, "labels", None)
    return labels if isinstance(labels, Tensor) else torch.stack([dataset[i][1] for i in range(len(dataset))])


def images_of(dataset: Dataset) -> Tensor:
    """Every image of a set in memory, float32 ``(N, channels, H, W)`` in [0, 1]."""
    images = getattr(dataset, "images", None)
    return to_float(images) if isinstance(images, Tensor) else torch.stack([dataset[i][0] for i in range(len(dataset))])


def class_counts(dataset: Dataset, num_classes: int) -> list[int]:
    """Samples of each class of a classification set."""
    return labels_of(dataset).bincount(minlength=num_classes).tolist()


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """The share of samples whose largest output is the label's."""
    return (outputs.argmax(1) == labels).double().mean().item()
