"""Cells, and what tasks work with."""

import hashlib
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hem_ext.harness.data.base import DataError
from hem_ext.harness.losses import LOSSES
from hem_ext.harness.models import PLAIN_HEAD, SmallCNN, SmallUNet
from hem_ext.harness.tasks import TASKS, Workbench, base
from hem_ext.harness.tasks.base import AtTest, DivergedError, images_of, labels_of
from hem_ext.harness.training import KeptError


def test_a_network_standardises_by_the_training_set(few_digits):
    bench = Workbench(TASKS["corruption"].cell("hem", 3, quick=True))
    model = bench.model(10, PLAIN_HEAD)
    images = few_digits.train.images.double().numpy()
    assert (model.mean.item(), model.deviation.item()) == pytest.approx((images.mean(), images.std()))
    torch.manual_seed(3)
    plain = SmallCNN(10)
    for a, b in zip(model.network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_held_out():
    for part in ("test", "validation"):
        bench = Workbench(TASKS["corruption"].cell("hem", 0, quick=True, part=part))
        assert bench.held_out is getattr(bench.data, part)


def test_settings_are_of_the_schedule_or_of_the_loss():
    cell = TASKS["corruption"].cell("hem", 0, constants={"total": 100.0})
    other = cell.with_settings({"max_lr": 0.5, "policy": "cosine", "margin": 0.3})
    assert (other.schedule.max_lr, other.schedule.policy) == (0.5, "cosine")
    assert other.schedule.epochs == cell.schedule.epochs
    assert other.constants == {"total": 100.0, "margin": 0.3}
    assert cell.constants == {"total": 100.0}
    assert other.key != cell.key == cell.with_settings({}).key


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


# --- cells ----------------------------------------------------------------------------------------------------


def test_a_key_stays_what_it_is():
    # Results and networks of earlier versions are found by it.
    settings = {"b": 1, "a": [2.5, None], "c": {"y": True, "x": "z"}}
    text = '{"a": [2.5, null], "b": 1, "c": {"x": "z", "y": true}}'
    assert base.digest(settings) == hashlib.sha256(text.encode()).hexdigest()[:16] == "c94765d7e02ab963"
    assert base.digest({"a": torch.device("cpu")}) == base.digest({"a": "cpu"})
    cell = TASKS["corruption"].cell("hem", 3, quick=True, constants={"margin": 0.5})
    assert cell.key == base.digest(cell.settings())


def test_what_decides_a_network():
    given = {"data": "voc", "model": "small-gn", "validation": 0.25, "mixed_precision": "bf16", "max_lr": 0.5}
    given |= {"options": {"data_options": {"size": 64}}, "data_root": "/data"}
    cell = TASKS["segmentation"].cell("hem", 3, **given)
    schedule = {"epochs": 16, "batch_size": 4, "max_lr": 0.5, "weight_decay": 0.0005, "policy": "one-cycle"}
    plain = ["voc", "/data", 0.25, {"size": 64}, "small-gn", "bf16", schedule, 3]
    assert cell.training == plain
    both = TASKS["segmentation"].cell("hem", 3, **given, selective=True, fused_upsample=True)
    assert both.training == [*plain, "selective", "fused upsample"]
    assert TASKS["corruption"].cell("hem", 0).training[:4] == ["mnist-5k", None, None, {}]


def test_a_data_set_is_made_once_for_equal_options(monkeypatch):
    asked = []
    monkeypatch.setattr(base.data, "load", lambda *given, **options: asked.append((given, options)) or object())
    places = [{}, {"data_root": "/data"}, {"data_root": "/data", "validation": 0.5}]
    given = [({"b": 2, "a": 1}, {}), ({"a": 1, "b": 2}, {}), *(({"a": 1}, place) for place in places)]
    cells = [
        TASKS["segmentation"].cell("hem", seed, data="x", options={"data_options": options}, **place)
        for seed, (options, place) in enumerate(given)
    ]
    found = [cell.load_data() for cell in cells]
    assert found[0] is found[1]
    assert len({id(one) for one in found}) == len(asked) == 4
    assert asked == [
        *((("x", None, None), {"a": 1, "b": 2}), (("x", None, None), {"a": 1})),
        *((("x", Path("/data"), None), {"a": 1}), (("x", Path("/data"), 0.5), {"a": 1})),
    ]


def test_a_variant_has_its_constants():
    cell = TASKS["corruption"].cell("hem", 0, constants={"margin": 0.25, "total": 2000.0}, selective=True)
    assert cell.variant == "hem selective margin=0.25 total=2000"
    assert TASKS["corruption"].cell("ce", 0).variant == "ce"


def test_constants_are_numbers():
    with pytest.raises(ValueError, match=r"^hem: margin must be a number, got 'large'$"):
        TASKS["corruption"].cell("hem", 0).with_settings({"margin": "large"})


def test_a_cell_has_what_is_given_and_defaults():
    task = TASKS["segmentation"]
    given = {"epochs": None, "max_lr": 0.7, "model": None, "data_root": None}
    quick, cell = task.cell("hem", 4, quick=True, **given), task.cell("hem", -4, part="validation")
    assert (quick.task, quick.loss, quick.seed, quick.data) == ("segmentation", "hem", 4, task.quick_data)
    assert (quick.schedule.max_lr, quick.schedule.epochs) == (0.7, task.quick_schedule.epochs)
    assert (quick.model, quick.data_root, quick.part, quick.mixed_precision) == ("small", None, "test", None)
    assert (cell.seed, cell.data, cell.schedule, cell.part) == (-4, task.data, task.schedule, "validation")
    assert quick.constants == cell.constants == {"margin": 0.5}
    assert task.cell("hem", 0, constants={"total": 9.0}).constants == {"margin": 0.5, "total": 9.0}
    assert task.cell("ce", 0).constants == {}
    assert quick.options == {**task.options, **task.quick_options}
    # Another data set than the usual one has no options of that one.
    other = task.cell("hem", 0, quick=True, data="voc")
    assert other.options == {**task.options, **task.quick_options, "data_options": {}}
    assert task.cell("hem", 0, quick=True, data=task.quick_data).options == quick.options
    for seed in (2**32, -(2**32)):
        assert task.cell("hem", seed).seed == seed


@pytest.mark.parametrize(
    ("task", "given", "words"),
    [
        ("corruption", {"loss": "hinge"}, f"unknown loss 'hinge': one of {', '.join(LOSSES)}"),
        ("corruption", {"seed": 2**32 + 1}, "seed must be from -4294967296 to 4294967296, got 4294967297"),
        ("corruption", {"seed": -(2**32) - 1}, "seed must be from -4294967296 to 4294967296, got -4294967297"),
        (
            "ood",
            {"options": {"b": 1, "a": 2}},
            "ood has no option a, b; it has known, unknown_data, unknown_root",
        ),
        ("classification", {"options": {"transfer": 1}}, "transfer must be true or false, got 1"),
        ("ood", {"options": {"known": "five"}}, "known must be a whole number, got 'five'"),
        ("imbalanced", {"options": {"factor": None}}, "factor must be a number, got None"),
        ("corruption", {"constants": {"b": 1.0, "a": 2.0}}, "hem has no constant a, b; it has margin, total"),
        ("corruption", {"loss": "ce", "constants": {"a": 2.0}}, "ce has no constant a; it has none"),
    ],
)
def test_what_a_cell_cannot_be(task, given, words):
    given = {"loss": "hem", "seed": 0, **given}
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        TASKS[task].cell(**given)


# --- what a task makes of errors, and finds before training ----------------------------------------------------


def test_errors_of_training_are_told_from_those_of_settings(monkeypatch):
    task = TASKS["corruption"]
    bench = Workbench(task.cell("hem", 3, quick=True, constants={"margin": 0.5}))

    def raising(error):
        def measure(bench):
            raise error

        monkeypatch.setattr(task, "measure", measure)
        return task.run(bench)

    for kind in (ValueError, TypeError):
        with pytest.raises(RuntimeError, match=r"^corruption with hem margin=0\.5, seed 3, broke off: wrong$"):
            raising(kind("wrong"))
    for error in (DataError("wrong"), KeptError("wrong"), KeyError("wrong")):
        with pytest.raises(type(error)) as told:
            raising(error)
        assert told.value is error
    found = raising(DivergedError())
    assert list(found) == list(task.metrics)
    assert all(map(math.isnan, found.values()))


def test_a_loss_that_cannot_be_made_is_found_before_training():
    task = TASKS["corruption"]
    with pytest.raises(ValueError, match=r"^hem: .*; its constants are: "):
        task.check(task.cell("hem", 0, quick=True, constants={"margin": -1.0}))
    task.check(task.cell("hem+", 0, quick=True))  # which needs counts


def test_checks_leave_random_numbers_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    TASKS["corruption"].check(TASKS["corruption"].cell("hem", 0, quick=True, model="small-gn", selective=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_of_one_image_is_too_small_for_batch_normalisation(monkeypatch):
    asked = []
    monkeypatch.setattr(base, "learns_from_one", lambda *given: asked.append(given))
    task = TASKS["corruption"]
    with pytest.raises(ValueError, match=r"^small has batch normalisation, .* one image of \(8, 8\) pixels at a time"):
        task.check(task.cell("hem", 0, quick=True, batch_size=1))
    ((model, image),) = asked
    assert isinstance(model, SmallCNN)
    assert image.shape == (1, 8, 8)


def test_fused_upsampling_is_for_pixels():
    task = TASKS["corruption"]
    with pytest.raises(ValueError, match=r"^fused upsampling is for segmentation, not for corruption$"):
        task.check(task.cell("hem", 0, quick=True, fused_upsample=True))
    segmentation = TASKS["segmentation"]
    with pytest.raises(ValueError, match="ce"):
        segmentation.check(segmentation.cell("ce", 0, quick=True, fused_upsample=True))
    segmentation.check(segmentation.cell("hem", 0, quick=True, fused_upsample=True))


def test_samples_that_touch_are_named_with_a_way_out():
    task = TASKS["corruption"]
    words = r"^small cannot be trained selectively: .* \(--model small-gn has group normalisation\)$"
    with pytest.raises(ValueError, match=words):
        task.check(task.cell("hem", 0, quick=True, selective=True))


# --- training -------------------------------------------------------------------------------------------------


@pytest.fixture
def fitted(monkeypatch):
    """What fit was asked for; it leaves the weights as they are."""
    asked = []

    def fit(*given, **options):
        asked.append((given, options))
        return ["an epoch"]

    monkeypatch.setattr(base, "fit", fit)
    return asked


def test_what_training_is_asked_for(fitted, few_digits, tmp_path):
    ended, watched = [], []
    cell = TASKS["corruption"].cell("hem", 3, quick=True, model="small-gn", selective=True)
    accelerator = base.make_accelerator()
    bench = Workbench(cell, tmp_path / "models", accelerator, ended.append, num_workers=2)
    model, criterion = bench.model(10, PLAIN_HEAD), bench.criterion(10)
    trained = bench.train(model.train(), criterion, few_digits.train, what=["a", 1], evaluate=watched.append, seed=5)
    assert trained is model
    assert not model.training
    assert next(p for p in model.parameters() if p.dim() == 4).is_contiguous(memory_format=torch.channels_last)
    ((given, options),) = fitted
    assert (given[0], given[1], given[3]) == (model, criterion, cell.schedule)
    assert given[2].images is few_digits.train.images
    assert given[2].training
    (folder,) = (tmp_path / "models").iterdir()
    assert folder.name == base.digest([*cell.training, criterion.identity(), ["a", 1]])
    expected = {"seed": 5, "accelerator": accelerator, "folder": folder, "evaluate": watched.append, "num_workers": 2}
    assert options == {**expected, "after_epoch": ended.append, "selective": True, "upsampling": None}
    assert bench.history == ["an epoch"]
    bench.train(model, criterion, few_digits.train, what=["a", 1])
    assert (fitted[1][1]["seed"], fitted[1][1]["evaluate"]) == (3, None)
    assert bench.history == ["an epoch"] * 2


def test_training_that_keeps_nothing_waits_for_nobody(fitted, few_digits):
    bench = Workbench(TASKS["corruption"].cell("hem", 0, quick=True))
    model, criterion = bench.model(10, PLAIN_HEAD), bench.criterion(10)
    bench.train(model, criterion, few_digits.train, what=0)
    assert fitted[0][1]["folder"] is None
    assert fitted[0][1]["num_workers"] == 0
    assert isinstance(fitted[0][1]["accelerator"], Accelerator)
    fitted[0][1]["after_epoch"]("an epoch")
    with torch.no_grad():
        next(model.parameters()).fill_(math.inf)
    with pytest.raises(DivergedError):
        bench.train(model, criterion, few_digits.train, what=0)


def test_processes_of_one_training_do_not_lock_each_other_out(fitted, few_digits, tmp_path):
    for processes in (1, 2):
        bench = Workbench(TASKS["corruption"].cell("hem", 0, quick=True), tmp_path / str(processes))
        accelerator = SimpleNamespace(num_processes=processes)
        bench.accelerator = accelerator
        bench.train(bench.model(10, PLAIN_HEAD), bench.criterion(10), few_digits.train, what=0)
        assert len(list((tmp_path / str(processes)).glob("*/lock"))) == (processes == 1)


def test_upsampling_is_left_to_the_loss(fitted, tmp_path):
    for fused in (False, True):
        task = TASKS["segmentation"]
        cell = task.cell("hem", 0, quick=True, fused_upsample=fused)
        bench = Workbench(cell, tmp_path)
        criterion = bench.criterion(11, ignore_index=255)
        model = bench.model(11, criterion.head, segmentation=True)
        assert isinstance(model.network, SmallUNet)
        bench.train(model, criterion, bench.data.train, what=0)
        assert (fitted[-1][1]["upsampling"] is not None) == fused


def test_the_loss_of_a_cell():
    bench = Workbench(TASKS["corruption"].cell("hem+", 0, quick=True, constants={"total": 100.0}))
    found = bench.criterion(3, [1, 2, 3], ignore_index=7)
    assert found.ignore_index == 7
    by_hand = base.make_loss("hem+", num_classes=3, class_counts=[1, 2, 3], ignore_index=7, total=100.0)
    assert found.identity() == by_hand.identity()
    assert Workbench(TASKS["corruption"].cell("hem", 0, quick=True)).criterion(3).ignore_index == -100


def test_a_classifier_of_other_classes(fitted, few_digits, monkeypatch):
    asked = []
    bench = Workbench(TASKS["corruption"].cell("hem+", 0, quick=True))
    few = few_digits.train.take(few_digits.train.labels < 4)
    validation = few_digits.validation.take(few_digits.validation.labels < 4)
    model, criterion = bench.classifier(what="four", train=few, validation=validation, num_classes=4)
    assert criterion.identity() == bench.criterion(4, [24] * 4).identity()
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 4)
    ((given, options),) = fitted
    assert given[2].labels is few.labels

    def counted(*given, **options):
        asked.append((given, options))
        return torch.tensor([[3.0, 1.0], [0.0, 4.0]])

    monkeypatch.setattr(base, "confusion_matrix", counted)
    assert options["evaluate"](model) == {"accuracy": 0.875}
    expected = {"outputs": criterion.outputs, "accelerator": bench.accelerator, "batch_size": 250}
    assert asked == [((model, validation, 4), expected)]
    model, criterion = bench.classifier()
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert fitted[1][0][2].labels is few_digits.train.labels
    fitted[1][1]["evaluate"](model)
    assert asked[1][0] == (model, few_digits.validation, 10)


def test_what_a_classifier_is_named(fitted, tmp_path):
    bench = Workbench(TASKS["corruption"].cell("hem", 0, quick=True), tmp_path)
    _, criterion = bench.classifier()
    (folder,) = tmp_path.iterdir()
    assert folder.name == base.digest([*bench.cell.training, criterion.identity(), "all of it"])


# --- data sets and outputs ------------------------------------------------------------------------------------


def test_counts_have_a_number_for_every_class(few_digits):
    split = few_digits.test.take(few_digits.test.labels < 2)
    assert base.class_counts(split, 4) == [8, 8, 0, 0]


def test_images_of_bytes_are_between_0_and_1(few_digits):
    split = SimpleNamespace(images=torch.tensor([[0, 51, 255]], dtype=torch.uint8))
    assert images_of(split).tolist() == [[0.0, pytest.approx(0.2), 1.0]]
    listed = [(torch.ones(1, 2, 2), torch.tensor(3)), (torch.zeros(1, 2, 2), torch.tensor(5))]
    assert labels_of(listed).tolist() == [3, 5]


def test_the_share_that_is_right():
    assert base.accuracy(torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 1, 1])) == 2 / 3


@pytest.mark.parametrize("training", [True, False])
def test_what_is_judged_is_in_the_networks_mode(training):
    model = nn.Linear(2, 2).train(training)
    at_test = AtTest(model, base.make_loss("hem", num_classes=2))
    assert at_test.training is at_test.model.training is training
