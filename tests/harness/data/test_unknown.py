import importlib.metadata

import numpy as np
import pytest
import torch
from scipy.ndimage import fourier_gaussian

from hem_ext.harness.data import bundled, unknown

SHAPE = (3, 12, 10)
IMAGES = torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(0)) ** 3


@pytest.mark.parametrize("shape", [(1, 8, 8), SHAPE, (3, 32, 32)])
def test_all_sets_are_like_the_images_they_stand_beside(shape):
    sets = unknown.unknown_sets(torch.rand(7, *shape))
    assert list(sets) == ["textures", "faces", "blobs", "noise", "permuted", "phase"]
    for name, images in sets.items():
        assert images.shape == (100 if name == "faces" else 7, *shape)
        assert images.dtype == torch.float32
        assert 0 <= images.min() < images.max() <= 1


def test_all_sets_depend_on_the_seed_alone():
    first, again, other = (unknown.unknown_sets(IMAGES, seed) for seed in (5, 5, 6))
    for name, images in first.items():
        assert torch.equal(images, again[name])
        assert torch.equal(images, other[name]) == (name == "faces")
    assert torch.equal(unknown.unknown_sets(IMAGES)["noise"], unknown.unknown_sets(IMAGES, 0)["noise"])


@pytest.mark.parametrize("shape", [(2, 20, 5), (2, 41, 60)])
def test_texture_patches_are_of_the_test_regions(monkeypatch, shape):
    regions = [[torch.full((20, 30), low + k / 20) for k in range(4)] for low in (0, 0.25, 0.5)]
    monkeypatch.setattr(unknown, "textures", lambda: regions)
    patches = unknown.texture_patches(40, shape, seed=0)
    greys = patches.mul(1000).round().unique().tolist()
    assert greys == [500, 550, 600, 650]


def test_texture_patches_repeat_the_grey_of_one_place():
    patches = unknown.texture_patches(5, (3, 256, 192), seed=0)
    assert torch.equal(patches[:, 0], patches[:, 2])
    for patch in patches[:, 0]:
        rows = [picture.unfold(0, 256, 1).movedim(-1, 1) for picture in bundled.textures()[2]]
        assert any((patch == place).all(dim=(1, 2)).any() for place in rows)


@pytest.mark.parametrize("size", [(8, 193), (513, 8), (224, 224), (600, 600)])
def test_regions_are_enlarged_for_larger_images(size, monkeypatch):
    # Grey rises from left to right; a region is 192 pixels wide and 512 high.
    ramp = torch.linspace(0, 1, 192).expand(512, 192)
    monkeypatch.setattr(unknown, "textures", lambda: ([], [], [ramp] * 4))
    patches = unknown.texture_patches(3, (1, *size), seed=0)
    assert patches.shape == (3, 1, *size)
    scale = max(size[0] / 512, size[1] / 192)
    step = patches.diff(dim=3).median().item()
    assert step == pytest.approx(1 / (191 * scale), rel=0.01)


def test_faces_come_in_the_wheel_of_scikit_image():
    (file,) = (file for file in importlib.metadata.files("scikit-image") if file.name == "lfw_subset.npy")
    wanted = torch.from_numpy(np.load(file.locate())[:100]).float()
    torch.testing.assert_close(unknown.faces((1, 25, 25))[:, 0], wanted)


def test_faces_are_resized_and_not_cropped():
    small, same = unknown.faces((1, 5, 5)), unknown.faces((3, 25, 25))
    assert torch.equal(same[:, 0], same[:, 2])
    assert (small.mean(dim=(1, 2, 3)) - same.mean(dim=(1, 2, 3))).abs().max() < 0.03
    # No two faces are the same.
    assert len(same.flatten(1).unique(dim=0)) == 100


def test_white_faces_stay_white(monkeypatch):
    monkeypatch.setattr("skimage.data.lfw_subset", lambda: np.ones((200, 25, 25)))
    assert (unknown.faces((1, 3, 3)) == 1).all()


def test_noise_is_uniform():
    noise = unknown.uniform_noise(200, SHAPE, seed=1)
    assert noise.mean().item() == pytest.approx(0.5, abs=0.01)
    assert noise.std().item() == pytest.approx(12**-0.5, abs=0.01)


def test_blobs_are_smooth_and_stretched():
    blobs = unknown.smooth_blobs(50, (3, 32, 32), seed=1)
    assert (blobs.amin(dim=(2, 3)) == 0).all()
    assert (blobs.amax(dim=(2, 3)) == 1).all()
    # Neighbours are alike, half an image apart they are not.
    assert blobs.diff(dim=3).abs().mean() < 0.1
    assert (blobs[..., 16:] - blobs[..., :16]).abs().mean() > 0.2
    assert not torch.equal(blobs[:, 0], blobs[:, 1])


def test_blobs_are_blurred_alone_and_wrap_around():
    noise = np.random.default_rng(3).standard_normal((4, 2, 16, 40), dtype=np.float32)
    for given, blobs in zip(
        noise.reshape(8, 16, 40), unknown.smooth_blobs(4, (2, 16, 40), seed=3).flatten(0, 1), strict=True
    ):
        blurred = np.fft.ifft2(fourier_gaussian(np.fft.fft2(given), sigma=(2, 5))).real
        wanted = (blurred - blurred.min()) / (blurred.max() - blurred.min())
        # The one in pixels ends four standard deviations away.
        np.testing.assert_allclose(blobs.numpy(), wanted, atol=0.003)


def test_permuted_pixels_are_the_same_pixels():
    permuted = unknown.permuted_pixels(IMAGES, seed=0)
    orders = set()
    for image, shuffled in zip(IMAGES.flatten(2), permuted.flatten(2), strict=True):
        # Where each pixel went, all its channels with it.
        order = [int((image == pixel[:, None]).all(0).nonzero()) for pixel in shuffled.T]
        assert sorted(order) == list(range(120))
        orders.add(tuple(order))
    assert len(orders) == len(IMAGES)


@pytest.mark.parametrize("width", [10, 11])
def test_random_phase_keeps_the_amplitudes(width):
    # Of low contrast around the middle, so that nothing is clipped.
    images = 0.5 + 0.05 * (torch.rand(8, 3, 12, width) - 0.5)
    result = unknown.random_phase(images, seed=0)
    assert result.shape == images.shape
    assert 0 < result.min() < result.max() < 1
    before, after = torch.fft.fft2(images), torch.fft.fft2(result)
    torch.testing.assert_close(after.abs(), before.abs(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.mean(dim=(2, 3)), images.mean(dim=(2, 3)))
    assert (result - images).abs().mean() > 0.005
    # Each image gets the phases of a noise of its own, in every channel.
    noise = torch.fft.fft2(torch.rand(8, 1, 12, width, generator=torch.Generator().manual_seed(0)))
    change = after[..., 1, 2] / before[..., 1, 2]
    torch.testing.assert_close(change, noise.sgn()[..., 1, 2].expand(8, 3), atol=1e-3, rtol=0)
