import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import data as pictures

from hem_ext.harness import data
from hem_ext.harness.corruptions import CORRUPTIONS

SEVERITIES = range(1, 6)
RANDOM = {"gaussian_noise", "shot_noise", "impulse_noise", "shift", "rotation", "occlusion"}
everything = pytest.mark.parametrize("name", CORRUPTIONS)


def digits(size=8):
    return F.interpolate(data.digits()[1].images[:100], size=size, mode="bilinear")


def photographs(size):
    """49 overlapping parts of one picture, with three channels."""
    picture = torch.from_numpy(pictures.astronaut() / 255).float().movedim(-1, 0)
    parts = picture.unfold(1, 128, 64).unfold(2, 128, 64).permute(1, 2, 0, 3, 4).reshape(-1, 3, 128, 128)
    return F.interpolate(parts, size=size, mode="area")


def corrupt(name, images, severity, seed=0):
    return CORRUPTIONS[name](images, severity, torch.Generator().manual_seed(seed))


@everything
@pytest.mark.parametrize("images", [digits, photographs], ids=["grey", "colour"])
@pytest.mark.parametrize("size", [8, 28, 32])
def test_damage_grows_with_severity(name, images, size):
    images = images(size)
    before = images.clone()
    damage = [0.0]
    for severity in SEVERITIES:
        corrupted = corrupt(name, images, severity)
        assert corrupted.shape == images.shape
        assert corrupted.dtype == torch.float32
        assert 0 <= corrupted.min() <= corrupted.max() <= 1
        damage.append((corrupted - images).pow(2).mean().item())
    assert torch.equal(images, before)
    assert all(less < 0.95 * more for less, more in itertools.pairwise(damage)), damage


@everything
def test_the_generator_decides(name):
    images = digits()
    first = corrupt(name, images, 3)
    torch.rand(7)  # torch's own generator has no part in it
    assert torch.equal(corrupt(name, images, 3), first)
    assert torch.equal(corrupt(name, images, 3, seed=1), first) == (name not in RANDOM)


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_every_image_draws_its_own(name):
    images = digits()[:1].expand(20, -1, -1, -1)
    assert len(corrupt(name, images, 3).flatten(1).unique(dim=0)) > 1


@everything
def test_sides_of_two_lengths(name):
    corrupted = corrupt(name, torch.rand(3, 2, 12, 20), 5)
    assert corrupted.shape == (3, 2, 12, 20)


@everything
@pytest.mark.parametrize("severity", [0, 6, 1.5])
def test_severities_are_1_to_5(name, severity):
    with pytest.raises(ValueError, match="whole number from 1 to 5"):
        corrupt(name, digits(), severity)


@everything
@pytest.mark.parametrize(
    "images", [torch.full((1, 1, 8, 8), 1.1), torch.rand(1, 8, 8), torch.rand(1, 1, 8, 8, dtype=torch.float64)]
)
def test_images_are_float32_in_0_to_1(name, images):
    with pytest.raises(ValueError, match=r"float32 in \[0, 1\]"):
        corrupt(name, images, 1)


def test_gaussian_noise_has_its_deviation():
    grey = torch.full((4, 3, 64, 64), 0.5)
    noise = corrupt("gaussian_noise", grey, 1) - grey
    assert noise.std() == pytest.approx(0.1, rel=0.05)
    assert noise.mean() == pytest.approx(0, abs=0.005)


def test_shot_noise_has_the_variance_of_photons():
    grey = torch.full((4, 3, 64, 64), 0.5)
    counts = 40 * corrupt("shot_noise", grey, 1)
    assert torch.equal(counts, counts.round())
    assert (counts.mean().item(), counts.var().item()) == pytest.approx((20, 20), rel=0.05)
    assert not corrupt("shot_noise", torch.zeros(1, 1, 8, 8), 5).any()


def test_impulse_noise_hits_its_share():
    grey = torch.full((4, 3, 64, 64), 0.5)
    noisy = corrupt("impulse_noise", grey, 5)
    shares = [(noisy == value).float().mean().item() for value in (0, 0.5, 1)]
    assert shares == pytest.approx([0.2, 0.6, 0.2], abs=0.01)


def test_gaussian_blur_is_a_gaussian():
    point = torch.zeros(1, 1, 33, 41)
    point[..., 16, 20] = 1
    blurred = corrupt("gaussian_blur", point, 5)[0, 0, :, 4:37].double().numpy()
    x = np.arange(33) - 16
    bell = np.exp(-(x**2) / (2 * 3.3**2))
    np.testing.assert_allclose(blurred, np.outer(bell, bell) / bell.sum() ** 2, atol=1e-5)
    torch.testing.assert_close(corrupt("gaussian_blur", torch.ones(1, 1, 8, 8), 5), torch.ones(1, 1, 8, 8))


def test_gaussian_blur_takes_the_edge_for_what_is_outside_and_no_other_channel():
    images = photographs(8)
    blur = CORRUPTIONS["gaussian_blur"].__wrapped__
    padded = blur(F.pad(images, (8, 8, 8, 8), mode="replicate"), 0.1 * 8 / 24, None)
    blurred = corrupt("gaussian_blur", images, 5)
    torch.testing.assert_close(blurred, padded[:, :, 8:-8, 8:-8])
    torch.testing.assert_close(corrupt("gaussian_blur", images[:, 1:2], 5), blurred[:, 1:2])


def test_contrast_and_brightness_by_hand():
    images = torch.tensor([[[[0.0, 0.5, 1.0, 0.5]], [[0.2, 0.2, 0.2, 0.2]]]])
    assert corrupt("contrast", images, 5)[0, 0, 0].tolist() == pytest.approx([0.3, 0.5, 0.7, 0.5])
    assert corrupt("contrast", images, 5)[0, 1, 0].tolist() == pytest.approx([0.2] * 4)
    assert corrupt("brightness", images, 5)[0, 0, 0].tolist() == pytest.approx([0.4, 0.9, 1.0, 0.9])


def centres(images):
    """The centre of mass of every image, in pixels from the middle: ``(N, 2)``, x and y."""
    height, width = images.shape[2:]
    mass = images[:, 0] / images[:, 0].sum((1, 2), keepdim=True)
    x, y = torch.arange(width) - (width - 1) / 2, torch.arange(height) - (height - 1) / 2
    return torch.stack([(mass.sum(1) * x).sum(1), (mass.sum(2) * y).sum(1)], dim=1)


def test_shift_moves_by_its_share_of_a_side_in_all_directions():
    blob = torch.zeros(200, 1, 40, 40)
    blob[:, :, 18:22, 18:22] = 1
    moved = centres(corrupt("shift", blob, 5))
    torch.testing.assert_close(moved.norm(dim=1), torch.full((200,), 8.0), rtol=0, atol=0.05)
    angles = torch.atan2(moved[:, 1], moved[:, 0])
    assert angles.histc(4, -math.pi, math.pi).min() > 30
    angle = 2 * math.pi * torch.rand(200, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved, -8 * torch.stack([angle.cos(), angle.sin()], dim=1), rtol=0, atol=0.05)


@pytest.mark.parametrize("shape", [(40, 40), (40, 60)])
def test_rotation_turns_by_its_degrees_to_both_sides(shape):
    blob = torch.zeros(100, 1, *shape)
    middle = shape[1] // 2
    blob[:, :, 4:8, middle - 2 : middle + 2] = 1  # 14 above the middle
    turned = centres(corrupt("rotation", blob, 5))
    torch.testing.assert_close(turned.norm(dim=1), torch.full((100,), 14.0), rtol=0, atol=0.1)
    angles = torch.rad2deg(torch.atan2(turned[:, 0], -turned[:, 1]))
    torch.testing.assert_close(angles.abs(), torch.full((100,), 40.0), rtol=0, atol=0.5)
    assert 30 < (angles > 0).sum() < 70


def test_occlusion_covers_a_rectangle_anywhere():
    images = torch.ones(200, 2, 8, 16)
    covered = corrupt("occlusion", images, 2) == 0.5
    assert torch.equal(covered[:, 0], covered[:, 1])
    rows, columns = covered[:, 0].any(2), covered[:, 0].any(1)
    assert (rows.sum(1) == 3).all()
    assert (columns.sum(1) == 6).all()
    assert (covered[:, 0].sum((1, 2)) == 18).all()
    assert covered[:, 0].any(0).all()


def test_pixelate_averages_blocks():
    images = photographs(8)
    blocks = images.view(-1, 3, 4, 2, 4, 2).mean((3, 5)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(corrupt("pixelate", images, 4), blocks)
    assert corrupt("pixelate", torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]]), 3).flatten().tolist() == [0.5] * 4
    # Three cells of 8/3 values each: the middle ones share values with their neighbours.
    ramp = torch.arange(8).div(8).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    cells = np.array([(0 + 1 + 2 * 2 / 3) * 3 / 8, 3.5, (2 / 3 * 5 + 6 + 7) * 3 / 8])
    values = [cells[0], cells[0], (2 * cells[0] + cells[1]) / 3, cells[1]]
    assert (8 * corrupt("pixelate", ramp, 5)[0, 0, 0, :4]).tolist() == pytest.approx(values)
