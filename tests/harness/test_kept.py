"""What trainings keep: damaged, made to call something when it is loaded, and on a full disk."""

import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from damage import DAMAGES, Attack, full_disk

from hem_ext.harness import training
from hem_ext.harness.data import digits
from hem_ext.harness.losses import make_loss
from hem_ext.harness.models import SmallCNN
from hem_ext.harness.training import KeptError, Schedule, fit, in_short, reading, write_whole, writing

SCHEDULE = Schedule(epochs=2, batch_size=32, max_lr=0.1)


class StopError(Exception):
    pass


@pytest.fixture
def _at_once(monkeypatch):
    """A checkpoint after every epoch."""
    monkeypatch.setattr(training._Checkpoints, "pause", 0)


def kept_in(folder, schedule=SCHEDULE, **options):
    """Train, or go on, with what is kept in a folder."""
    torch.manual_seed(0)
    model = SmallCNN(10, width=4)
    few = digits()[0].take(torch.arange(32))
    fit(model, make_loss("hem", num_classes=10), few, schedule, seed=0, folder=folder, **options)
    return model


def cut_in(folder, **options):
    """Stop after the first epoch."""

    def stop(epoch):
        raise StopError

    with pytest.raises(StopError):
        kept_in(folder, after_epoch=stop, **options)


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """Two folders: what a finished training leaves, and one that was cut after its first of two epochs."""
    whole, cut = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
    kept_in(whole)
    with mock.patch.object(training._Checkpoints, "pause", 0):
        cut_in(cut)
    return whole, cut


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("One thing. Another thing."), "ValueError: One thing"),
        (ValueError("One thing:\nanother. A third"), "ValueError: One thing"),
        (ValueError("value X"), "ValueError: value X"),
        (EOFError(), "EOFError"),
    ],
)
def test_errors_in_short(error, words):
    assert in_short(error) == words


def test_what_is_said_of_files():
    with (
        pytest.raises(KeptError, match=r"^a/b is damaged \(ValueError: odd\): it goes$"),
        reading(Path("a/b"), "it goes"),
    ):
        raise ValueError("odd. Very odd.")
    for error in (MemoryError(), torch.OutOfMemoryError(), FileNotFoundError(2, "No such file", "elsewhere")):
        with pytest.raises(type(error)), reading(Path("a/b"), "it goes"):
            raise error
    with pytest.raises(KeptError, match=r"^a/b is damaged \(OSError\): it goes$"), reading(Path("a/b"), "it goes"):
        raise OSError
    for error, words in (
        (OSError(28, "No space left on device"), r"OSError: \[Errno 28\] No space left on device"),
        (RuntimeError("unexpected pos"), r"RuntimeError: unexpected pos; is the disk full\?"),
    ):
        with pytest.raises(KeptError, match=f"^a/b cannot be written: {words}$"), writing(Path("a/b")):
            raise error


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "folder" / "file"
    write_whole(file, lambda path: path.write_text("first"))

    def full(path):
        raise OSError(28, "No space left on device")

    def interrupted(path):
        path.write_text("half of")
        raise KeyboardInterrupt

    with pytest.raises(KeptError, match=rf"^{file} cannot be written: OSError: \[Errno 28\] No space left on device$"):
        write_whole(file, full)
    with pytest.raises(KeyboardInterrupt):
        write_whole(file, interrupted)
    assert [path.read_text() for path in file.parent.iterdir()] == ["first"]


def attack(path, file):
    """The file, and what it would do."""
    torch.save({"model": Attack(path), "history": []}, file)


@pytest.mark.parametrize("damage", [*DAMAGES, "of something else"])
def test_a_damaged_model_is_told_in_a_sentence(left, tmp_path, damage):
    shutil.copytree(left[0], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.pt"
    if damage == "of something else":
        torch.save([1, 2], file)
    else:
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
    words = rf"^{re.escape(str(file))} is damaged \(.+\): without {tmp_path}, the network is trained again$"
    with pytest.raises(KeptError, match=words) as raised:
        kept_in(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["checkpoint.json", "model.safetensors", "optimizer.bin", "schedule.pt"])
def test_a_damaged_checkpoint_is_told_in_a_sentence(left, tmp_path, name, damage):
    shutil.copytree(left[1], tmp_path, dirs_exist_ok=True)
    file = tmp_path / name if name == "checkpoint.json" else tmp_path / "epoch-1" / name
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    named = file if name in ("checkpoint.json", "schedule.pt") else file.parent
    with pytest.raises(KeptError, match=rf"^{re.escape(str(named))} is damaged \(.+\): without ") as raised:
        kept_in(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name", ["model.pt", "optimizer.bin", "pytorch_model.bin", "random_states_0.pkl", "schedule.pt"]
)
def test_what_is_kept_is_loaded_without_calling_anything(left, tmp_path, monkeypatch, name):
    folder, called = tmp_path / "kept", tmp_path / "called"
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # which is not to have the last word
    shutil.copytree(left[0] if name == "model.pt" else left[1], folder)
    file = folder / name if name == "model.pt" else folder / "epoch-1" / name
    if name == "pytorch_model.bin":
        (folder / "epoch-1" / "model.safetensors").unlink()
    attack(called, file)
    if name == "random_states_0.pkl":
        # Accelerate goes on without them, and every epoch is seeded anew.
        resumed, whole = (kept_in(given).state_dict() for given in (folder, left[0]))
        assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    else:
        with pytest.raises(
            KeptError, match=r"^\S+/kept/\S+ is damaged \(UnpicklingError: Weights only load failed\): "
        ):
            kept_in(folder)
    assert not called.exists()
    # What it would have done.
    attack(called, tmp_path / "attack")
    torch.load(tmp_path / "attack", weights_only=False)
    assert called.exists()


@pytest.mark.usefixtures("_at_once")
@pytest.mark.parametrize("room_for_the_weights", [False, True])
def test_a_full_disk_costs_no_checkpoint_that_was_whole(tmp_path, room_for_the_weights):
    schedule = Schedule(epochs=3, batch_size=32, max_lr=0.1)
    cut_in(tmp_path, schedule=schedule)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    weights, optimizer = (len(before[tmp_path / "epoch-1" / name]) for name in ("model.safetensors", "optimizer.bin"))
    assert 100 < weights < optimizer
    with (
        full_disk(weights if room_for_the_weights else 100),
        pytest.raises(KeptError, match=r"/epoch-2 cannot be written: [^\n]*; is the disk full\?$"),
    ):
        kept_in(tmp_path, schedule=schedule)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.usefixtures("_at_once")
def test_a_checkpoint_of_which_nothing_can_be_written_is_told_in_a_sentence(tmp_path, monkeypatch):
    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Accelerator, "save_state", full)
    with pytest.raises(KeptError, match=r"/epoch-1 cannot be written: OSError: \[Errno 28\] No space left on device$"):
        kept_in(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_at_once")
def test_what_cannot_be_removed_stays(tmp_path):
    (tmp_path / "epoch-old").touch()  # no folder
    kept_in(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"epoch-old", "model.pt"}


def test_a_full_disk_leaves_no_part_of_a_model(tmp_path):
    with (
        full_disk(2000),
        pytest.raises(KeptError, match=rf"^{tmp_path}/model.pt cannot be written: [^\n]*; is the disk full\?$"),
    ):
        kept_in(tmp_path)
    assert list(tmp_path.iterdir()) == []
