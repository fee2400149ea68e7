import functools
import math
import re
import shutil
import threading

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from hem_ext.harness import data, metrics
from hem_ext.harness.data import Split
from hem_ext.harness.losses import LOSSES
from hem_ext.harness.models import SmallCNN, SmallUNet, group_norm
from hem_ext.harness.tasks import TASKS, Workbench, base
from hem_ext.harness.training import confusion_matrix, fit

ORDER = ["classification", "corruption", "ood", "adversarial", "imbalanced", "continual", "segmentation"]


def of_every_cell(task):
    """The metrics of a task that every cell of it gives, by name."""
    return [name for name, metric in TASKS[task].metrics.items() if metric.of_every_cell]


def test_the_tasks_come_in_the_order_of_the_paper():
    assert list(TASKS) == ORDER
    assert all(TASKS[name].name == name for name in ORDER)


@pytest.mark.parametrize(
    ("name", "option", "quick", "whole"),
    [
        ("corruption", "severities", [3], [1, 2, 3, 4, 5]),
        ("segmentation", "data_options", {"num_train": 60, "num_validation": 10, "num_test": 20}, {}),
    ],
)
def test_a_quick_cell_has_options_of_its_own(name, option, quick, whole):
    cells = TASKS[name].cell("hem", 0, quick=True), TASKS[name].cell("hem", 0)
    assert [cell.options[option] for cell in cells] == [quick, whole]


@pytest.mark.parametrize("name", ORDER)
def test_values_are_those_declared_and_in_range(run, name):
    values = run(name)
    declared = of_every_cell(name)
    assert list(values)[: len(declared)] == declared
    for metric, value in values.items():
        assert type(value) is float, metric
        lowest = -1 if metric == "separation" or "forgetting" in metric else 0
        undefined = math.isnan(value) and (metric == "many" or metric.startswith("iou"))
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
def test_the_epochs_of_a_task_are_those_that_end(run, monkeypatch, name):
    task, ended, cells = TASKS[name], [], []
    measure = task.measure
    monkeypatch.setattr(task, "measure", lambda bench: cells.append(bench.cell) or measure(bench))
    run(name, epochs=2, after_epoch=ended.append)
    assert task.epochs(*cells) == len(ended)


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
        options = {"num_train": count, "num_validation": 2, "num_test": 2, "size": 24}
        run("segmentation", options={"data_options": options})
    assert [len(dataset) for dataset, _ in trained] == [12, 13]


# --- when test images are looked at ---------------------------------------------------------------------------


class Watched:
    """A data set that notes what `now` gives whenever something of its samples is asked for."""

    def __init__(self, inner, now):
        self.inner, self.now, self.looks = inner, now, []

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        self.looks.append(self.now())
        return self.inner[index]

    def __getattr__(self, name):
        found = getattr(self.inner, name)  # its images, its labels, some of its samples
        self.looks.append(self.now())
        return found


SCENES = {"num_train": 12, "num_validation": 3, "num_test": 4, "size": 24}


def made_of(name, parts):
    """A data set of the same options that always has these parts."""
    make, about = data.BUNDLED[name]
    return functools.wraps(make)(lambda **_: parts), about


@pytest.fixture
def watched(monkeypatch, trained, few_digits):
    """The test part of both kinds of data set, which notes how many epochs were trained when it is looked at."""
    found = {}
    for name, loaded in (("digits", few_digits), ("digit-scenes", data.load("digit-scenes", **SCENES))):
        found[name] = Watched(loaded.test, lambda: len(trained))
        parts = loaded.train, loaded.validation, found[name]
        monkeypatch.setitem(data.BUNDLED, name, made_of(name, parts))
    base._load_data.cache_clear()
    return found


@pytest.mark.parametrize("kept_in", ["a folder", "nothing"])
@pytest.mark.parametrize("name", ORDER)
def test_test_images_are_looked_at_when_all_is_trained(run, watched, trained, tmp_path, name, kept_in):
    run(name, epochs=2, folder=tmp_path if kept_in == "a folder" else None)
    looks = watched[TASKS[name].quick_data].looks
    assert len(trained) >= 2
    assert set(looks) == {len(trained)}


@pytest.mark.parametrize("name", ORDER)
def test_what_chooses_settings_never_looks_at_test_images(run, watched, trained, name):
    values = run(name, part="validation")
    assert math.isfinite(values[next(iter(TASKS[name].metrics))])
    assert trained
    assert watched["digits"].looks == watched["digit-scenes"].looks == []


@pytest.mark.parametrize("name", ORDER)
def test_each_part_is_judged_by_its_own_images(run, trained, monkeypatch, name):
    # All test images are black: no network does with them as it does with others.
    scenes = SCENES if name == "segmentation" else {}
    source = TASKS[name].quick_data
    train, validation, test = data.BUNDLED[source][0](**scenes)
    black = Split(torch.zeros_like(test.images), test.labels)
    monkeypatch.setitem(data.BUNDLED, source, made_of(source, (train, validation, black)))
    judged, chosen = (run(name, "ce", epochs=4, batch_size=8, part=part) for part in ("test", "validation"))
    metric = next(iter(TASKS[name].metrics))
    assert abs(judged[metric] - chosen[metric]) > 0.01
    # A part to judge by is no part of a network.
    assert len(trained) == 4 * {"classification": 2, "continual": 3}.get(name, 1)


def test_learning_curves_are_of_validation(few_digits, share_right, tmp_path):
    bench = Workbench(TASKS["corruption"].cell("ce", 0, quick=True, epochs=3), tmp_path)
    TASKS["corruption"].run(bench)
    by_hand = share_right(few_digits.validation.images, few_digits.validation.labels)
    assert bench.history[-1].metrics == {"accuracy": pytest.approx(by_hand)}
    assert by_hand != share_right(few_digits.test.images, few_digits.test.labels)


def test_the_curve_of_segmentation_is_of_validation(run, kept):
    epochs = []
    run("segmentation", "ce", epochs=2, after_epoch=epochs.append)
    counted = confusion_matrix(kept(11, SmallUNet), data.load("digit-scenes", **SCENES).validation, 11)
    assert epochs[-1].metrics == {"mean_iou": pytest.approx(metrics.segmentation(counted).mean_iou, abs=1e-3)}


# --- networks that are trained once ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["classification", "corruption", "ood", "adversarial"])
def test_hem_and_hem_plus_are_one_network_on_balanced_classes(run, trained, name):
    hem = run(name, "hem")
    once = len(trained)
    plus = run(name, "hem+")
    assert len(trained) == once > 0
    assert str(plus) == str(hem)


def test_hem_and_hem_plus_are_two_networks_on_a_long_tail(run, trained):
    for loss in ("hem", "hem+"):
        run("imbalanced", loss)
    assert len(trained) == 2


def test_a_network_that_another_process_trains_is_waited_for(run, trained, tmp_path):
    expected = run("corruption", folder=tmp_path / "theirs")
    (model,) = (tmp_path / "theirs").glob("*/model.pt")
    mine = tmp_path / "mine" / model.parent.name
    mine.mkdir(parents=True)
    trained.clear()
    found = []
    waiting = threading.Thread(target=lambda: found.append(run("corruption", folder=tmp_path / "mine")))
    with FileLock(mine / "lock"):
        waiting.start()
        waiting.join(1)
        assert waiting.is_alive()
        assert not trained
        shutil.copy(model, mine)
    waiting.join(300)
    assert found == [expected]
    assert not trained


# --- selective training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ORDER)
def test_every_task_trains_selectively_what_it_trains(run, trained, monkeypatch, name):
    asked = []
    monkeypatch.setattr(base, "fit", lambda *given, selective, **more: asked.append(selective) or fit(*given, **more))
    values = run(name, selective=True, model="small-gn")
    assert trained
    assert set(asked) == {True}
    assert list(values)[: len(of_every_cell(name))] == of_every_cell(name)


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.parametrize(("loss", "words"), [("hem", "normalises by the batch"), ("ce", "ce does not")])
def test_what_cannot_be_selective_is_refused_before_training(run, trained, name, loss, words):
    with pytest.raises(ValueError, match=words) as error:
        run(name, loss, selective=True)
    assert "\n" not in str(error.value)
    assert not trained


@pytest.mark.usefixtures("_touching")
def test_networks_whose_samples_touch_each_other_unseen(run, trained):
    with pytest.raises(ValueError, match="touching cannot be trained selectively: samples touch each other"):
        run("corruption", selective=True, model="touching")
    assert not trained
    run("corruption", model="touching")


@pytest.fixture
def _touching(monkeypatch):
    """A network that subtracts the mean over the batch, which no module gives away."""

    class Touching(SmallCNN):
        def forward(self, x):
            logits = super().forward(x)
            return logits - logits.mean(0)

    monkeypatch.setattr(
        base, "make_model", lambda name, *given, size, channels, head, segmentation: Touching(*given, norm=group_norm)
    )


def test_a_network_that_was_trained_selectively_is_another(run, trained):
    for selective in (False, True, False, True):
        run("corruption", selective=selective, model="small-gn")
    assert len(trained) == 2


# --- folders of one's own -------------------------------------------------------------------------------------


def write_pictures(root, classes):
    generator = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for number in range(classes):
            folder = root / part / f"class-{number}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(generator.integers(0, 256, (8, 10, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


def write_masks(root):
    generator = np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 4)):
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True)
        for i in range(count):
            picture = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(picture).save(root / part / "images" / f"{i}.png")
            Image.fromarray(np.tri(16, k=i - 4, dtype=np.uint8)).save(root / part / "masks" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """By the number of classes, a folder of pictures; by 0, one of pictures with masks of two classes."""
    root = tmp_path_factory.mktemp("pictures")
    return {0: write_masks(root / "masks")} | {n: write_pictures(root / str(n), n) for n in (2, 3, 4)}


def own(root, name="image-folder", **options):
    """What a cell is given of a folder."""
    data_options = {"size": 8} if name == "image-folder" else {}
    return {"data": name, "data_root": str(root), "options": {**options, "data_options": data_options}}


OPTIONS = {"imbalanced": {"factor": 0.5}, "continual": {"stages": None}}


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("name", ORDER[:6])
def test_pictures_in_folders_will_do(run, pictures, trained, name, classes):
    values = run(name, **own(pictures[classes], **OPTIONS.get(name, {})))
    near = {metric for metric in TASKS["ood"].metrics if metric.startswith("near")}
    undefined = {
        "classification": {"transfer"} if classes < 4 else set(),
        "ood": near if classes == 2 else set(),
        "imbalanced": {"many", "medium"},
    }
    found = {metric for metric in of_every_cell(name) if math.isnan(values[metric])}
    assert found == undefined.get(name, set())
    if name == "continual":
        # Two classes of four at a stage, or one.
        seen = [len(dataset.labels.unique()) for dataset, _ in trained]
        assert (seen[0], max(seen)) == ({2: 1, 3: 1, 4: 2}[classes], classes)
        assert len([metric for metric in values if metric.startswith("accuracy ")]) == {2: 2, 3: 3, 4: 2}[classes]


@pytest.mark.parametrize("name", ORDER[:6])
def test_what_two_classes_leave_out_is_said(pictures, name):
    cell = TASKS[name].cell("hem", 0, quick=True, **own(pictures[2], **OPTIONS.get(name, {})))
    words = {
        "classification": "linear transfer needs at least four classes",
        "ood": "there is nothing near to reject",
        "adversarial": "pgd_dlr is PGD on the margin",
    }
    notes = TASKS[name].notes(cell)
    assert len(notes) == (name in words)
    assert words.get(name, "") in "".join(notes)


def test_masks_in_folders_will_do(run, pictures):
    values = run("segmentation", **own(pictures[0], "mask-folder"))
    assert all(math.isfinite(values[metric]) for metric in TASKS["segmentation"].metrics)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("imbalanced", {"factor": 0.02}, r"10 samples times 0\.02 leave the rarest class without a sample"),
        ("ood", {"known": 3}, "known must be 2 to 2 classes, got 3"),
        ("continual", {"stages": 5}, "2 classes cannot be learned in 5 stages of as many classes each"),
        ("segmentation", {}, "segmentation needs a label for every pixel; image-folder has one label an image"),
    ],
)
def test_what_cannot_be_done_with_two_classes_is_refused_before_training(run, pictures, trained, name, options, words):
    with pytest.raises(ValueError, match=words):
        run(name, **own(pictures[2], **options))
    assert not trained


def test_settings_cannot_be_chosen_by_rejection_with_two_classes(run, pictures, trained):
    with pytest.raises(ValueError, match="settings are chosen by classes that are not known, but all 2 are"):
        run("ood", **own(pictures[2]), part="validation")
    assert not trained


@pytest.mark.parametrize("name", ORDER[:6])
def test_masks_are_no_labels_of_images(run, pictures, trained, name):
    with pytest.raises(ValueError, match=f"{name} needs one label an image; mask-folder has a label for every pixel"):
        run(name, **own(pictures[0], "mask-folder", **OPTIONS.get(name, {})))
    assert not trained


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("name", ORDER)
def test_a_broken_picture_is_named(run, pictures, trained, tmp_path, name, part):
    kind = 0 if name == "segmentation" else 2
    root = shutil.copytree(pictures[kind], tmp_path / "data")
    broken = root / part / ("class-1" if kind else "images") / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    given = own(root, "image-folder" if kind else "mask-folder", **OPTIONS.get(name, {}))
    with pytest.raises(ValueError, match=f"^{re.escape(str(broken))} is broken, or no picture: ") as error:
        run(name, **given)
    assert "\n" not in str(error.value)
    # In the training part it is found before anything is trained.
    assert bool(trained) == (part == "val")

    given["options"]["data_options"]["skip_broken"] = True
    with pytest.warns(UserWarning, match="1 of .* samples are left out, since their pictures are broken"):
        run(name, **given)


def test_a_share_to_choose_by_is_one_of_the_settings(pictures):
    cells = [TASKS["corruption"].cell("hem", 0, **own(pictures[2]), validation=share) for share in (None, 0.25)]
    assert [len(cell.load_data().validation) for cell in cells] == [3, 6]
    assert cells[0].key != cells[1].key
    assert cells[0].training != cells[1].training
