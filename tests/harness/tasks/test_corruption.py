import re
import struct

import numpy as np
import pytest
import torch

from hem_ext.harness.corruptions import CORRUPTIONS
from hem_ext.harness.tasks import TASKS


@pytest.mark.parametrize("severities", [[1, 2, 3, 4, 5], [2, 5]])
def test_means_by_hand(run, share_right, few_digits, severities):
    values = run("corruption", options={"severities": severities})
    images, labels = few_digits.test.images, few_digits.test.labels
    assert values["clean_accuracy"] == pytest.approx(share_right(images, labels))
    for name in ("contrast", "brightness", "gaussian_blur", "pixelate"):  # which draw nothing
        by_hand = [share_right(CORRUPTIONS[name](images, severity, None), labels) for severity in severities]
        assert values[f"accuracy {name}"] == pytest.approx(sum(by_hand) / len(severities)), name
    each = [values[f"accuracy {name}"] for name in CORRUPTIONS]
    assert values["mean_accuracy"] == pytest.approx(sum(each) / len(each))


def test_every_corruption_and_severity_draws_its_own(run, monkeypatch):
    drawn = []

    def note(images, severity, generator):
        drawn.append((severity, torch.rand((), generator=generator).item()))
        return images

    for name in CORRUPTIONS:
        monkeypatch.setitem(CORRUPTIONS, name, note)
    values = run("corruption", options={"severities": [1, 2, 3]})
    assert values["mean_accuracy"] == pytest.approx(values["clean_accuracy"])
    assert len(set(drawn)) == 3 * len(CORRUPTIONS)
    # Another draw would make other images, and every number measured on them wrong.
    seeds = [(severity, 100 * number + severity) for number in range(len(CORRUPTIONS)) for severity in (1, 2, 3)]
    assert drawn == [(severity, torch.manual_seed(seed) and torch.rand(()).item()) for severity, seed in seeds]
    before = list(drawn)
    run("corruption", "ce", seed=1, options={"severities": [1, 2, 3]})
    assert drawn[len(before) :] == before  # the same images for every loss and seed


@pytest.fixture
def mnist(tmp_path):
    """A little of MNIST and of MNIST-C as they lie on disk."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (100, 28, 28), dtype=np.uint8)
    labels = (np.arange(100) % 10).astype(np.uint8)
    (tmp_path / "mnist").mkdir()
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
            (tmp_path / "mnist" / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
    for name in ("fog", "identity", "spatter"):
        folder = tmp_path / "mnist_c" / name
        folder.mkdir(parents=True)
        changed = images if name == "identity" else generator.integers(0, 256, images.shape, dtype=np.uint8)
        np.save(folder / "test_images.npy", changed[..., None])
        np.save(folder / "test_labels.npy", labels)
    return tmp_path


def test_mnist_c_is_read_from_disk(run, mnist, share_right):
    values = run("corruption", data_root=str(mnist), options={"corrupted": "mnist-c"})
    assert list(values) == ["mean_accuracy", "clean_accuracy", "accuracy fog", "accuracy spatter"]
    for name in ("fog", "spatter"):
        images = np.load(mnist / "mnist_c" / name / "test_images.npy").astype(np.float32) / 255
        by_hand = share_right(torch.from_numpy(images).movedim(-1, 1), torch.arange(100) % 10)
        assert values[f"accuracy {name}"] == pytest.approx(by_hand)
    assert values["mean_accuracy"] == pytest.approx((values["accuracy fog"] + values["accuracy spatter"]) / 2)


@pytest.mark.parametrize("severities", [[], [0], [1, 6], [2.0], [True], ["3"]])
def test_severities_that_there_are_not(run, trained, severities):
    wanted = re.escape(f"severities must be a list of some of 1 to 5, got {severities!r}")
    with pytest.raises(ValueError, match=f"^{wanted}$"):
        run("corruption", options={"severities": severities})
    assert not trained


def test_the_clean_set_is_the_one_that_was_corrupted():
    cell = TASKS["corruption"].cell("hem", 0, data_root="somewhere", options={"corrupted": "cifar10-c"})
    assert cell.data == "cifar10"
    with pytest.raises(ValueError, match="mnist-c holds images of mnist, not of cifar10"):
        TASKS["corruption"].cell("hem", 0, data="cifar10", options={"corrupted": "mnist-c"})
    with pytest.raises(ValueError, match="corrupted must be one of cifar10-c, mnist-c, got 'imagenet-c'"):
        TASKS["corruption"].cell("hem", 0, options={"corrupted": "imagenet-c"})


def test_what_is_made_of_test_images_is_not_chosen_by(run, trained, mnist):
    with pytest.raises(ValueError, match="mnist-c is made of test images: nothing can be chosen by it"):
        run("corruption", data_root=str(mnist), options={"corrupted": "mnist-c"}, part="validation")
    assert not trained


def test_settings_are_chosen_by_corrupted_validation_images(run, share_right, few_digits):
    values = run("corruption", options={"severities": [3]}, part="validation")
    images, labels = few_digits.validation.images, few_digits.validation.labels
    assert values["clean_accuracy"] == pytest.approx(share_right(images, labels))
    by_hand = share_right(CORRUPTIONS["contrast"](images, 3, None), labels)
    assert values["accuracy contrast"] == pytest.approx(by_hand)
