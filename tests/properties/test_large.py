"""More than 2**31 logits, which 32 bits cannot count: `make large`, 10 GiB and some minutes.

Logits are a block over and over again, or small ones that are enlarged: what each block has to come to is known.
"""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
from cases import targets

import hem_ext

LIMIT = 2**31


@pytest.fixture(autouse=True)
def _memory():
    yield
    gc.collect()


# Errors are multiples of 1/8: their sums are the same in any order.
hem_loss = partial(hem_ext.hem_loss, margin=0.25)
linear_hem_loss = partial(hem_ext.linear_hem_loss, margin=0.25)
upsampled_hem_loss = partial(hem_ext.upsampled_hem_loss, margin=0.25)


def outcome(x, t, **options):
    """The loss of each sample, and its gradient."""
    leaf = x.detach().requires_grad_()
    losses = hem_loss(leaf, t, reduction="none", **options)
    (gradient,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses))
    return losses.detach(), gradient


def block(samples, num_classes):
    """Logits of half precision and targets; one in four samples is ignored."""
    x = (torch.randint(-24, 25, (samples, num_classes), dtype=torch.int8) / 8).half()
    return x, targets(x.shape, torch.int32, ignore_index=-100)


def test_rows():
    blocks, (few, t) = 2**11 + 1, block(2**10, 2**10)
    expected, of_block = outcome(few, t)
    x, labels = few.repeat(blocks, 1), t.repeat(blocks)
    assert x.numel() > LIMIT
    mean = hem_loss(few, t)
    # As rows, and as one image with the classes of a pixel side by side.
    for form, of_labels in ((x, labels), (x.view(1, blocks, *few.shape).movedim(-1, 1), labels.view(1, blocks, -1))):
        losses, gradient = outcome(form, of_labels)
        assert (losses.view(blocks, -1) == expected).all()
        rows = gradient.movedim(1, -1).view(blocks, *few.shape)
        assert all(torch.equal(part, of_block) for part in rows)
        del gradient, rows
        torch.testing.assert_close(hem_loss(form, of_labels), mean)


def test_pixels():
    blocks, (few, t) = 2**12, block(2**12, 129)
    expected, of_block = outcome(few, t)
    x = few.t().unsqueeze(1).repeat(1, blocks, 1).unsqueeze(0)  # (1, classes, blocks, pixels of a block)
    labels = t.repeat(1, blocks, 1)
    assert x.numel() > LIMIT
    mean = hem_loss(few, t)
    # As an image, and as transposed rows.
    for form, of_labels in ((x, labels), (x.view(len(of_block[0]), -1).t(), labels.view(-1))):
        losses, gradient = outcome(form, of_labels)
        assert (losses.view(blocks, -1) == expected).all()
        planes = gradient.view(129, blocks, -1) if gradient.dim() == 4 else gradient.t().view(129, blocks, -1)
        assert all((of_class == column).all() for of_class, column in zip(planes, of_block.t(), strict=True))
        del gradient, planes
        torch.testing.assert_close(hem_loss(form, of_labels), mean)


def test_the_gradient_in_the_place_of_the_logits():
    blocks, (few, t) = 2**11 + 1, block(2**10, 2**10)
    _, of_block = outcome(few, t)
    leaf = torch.zeros((), requires_grad=True, dtype=torch.float16)
    x = few.repeat(blocks, 1) + leaf
    hem_loss(x, t.repeat(blocks), reduction="sum", overwrite_input=True).backward()
    assert all(torch.equal(part, of_block) for part in x.detach().view(blocks, *few.shape))


def test_one_image_again_and_again():
    """Logits that are there once: not copied, so that forward takes no more memory than its bits."""
    few, t = block(2**12, 129)
    images = few.t().unsqueeze(0).expand(2**12, -1, -1)
    assert images.numel() > LIMIT
    losses = hem_loss(images, t.expand(2**12, -1), reduction="none")
    assert (losses == hem_loss(few, t, reduction="none")).all()


def test_a_row_of_all_the_classes_there_can_be():
    last = LIMIT - 2
    x = torch.zeros(1, LIMIT - 1, dtype=torch.float16)
    x[0, 5], x[0, last], x[0, 2**30] = 2.0, 3.0, 1.0
    losses, gradient = outcome(x, torch.tensor([2**30]), margin=0.5)
    assert losses.item() == 2.0
    kept = gradient.nonzero()[:, 1].tolist()
    assert kept == [5, 2**30, last]
    assert gradient[0, kept].tolist() == [0.5, -1.0, 0.5]
    x[0, [5, last, 2**30]] = 0.0
    # All errors are 0.5: their number is more than float32 counts one by one.
    assert hem_loss(x, torch.tensor([last]), margin=0.5).item() == 0.5


def test_upsampled():
    size, step, num_classes = 512, 8, 129  # the logits between are multiples of 2**-11
    x = (torch.randint(-24, 25, (1, num_classes, size, size)) / 8).half()
    t = targets((1, num_classes, size * step, size * step), torch.uint8, ignore_index=255)
    assert num_classes * t.numel() > LIMIT
    leaf = x.clone().requires_grad_()
    losses = upsampled_hem_loss(leaf, t, reduction="none", ignore_index=255)
    (gradient,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses))

    def enlarged(x, dim, pixels, before):
        """Between the logits beside each of these pixels; `before` the first one of `x` there are others."""
        place = ((pixels + 0.5) / step - 0.5).clamp(0, size - 1)
        first = place.long()
        share = (place - first).view([-1] + [1] * (x.dim() - 1 - dim))
        near, far = (x.index_select(dim, i - before) for i in (first, (first + 1).clamp(max=size - 1)))
        return near * (1 - share) + far * share

    expected = torch.zeros(x.shape)
    for rows in torch.arange(size * step).split(64):
        around = slice(max(rows[0].item() // step - 1, 0), rows[-1].item() // step + 2)
        part = x[:, :, around].float().requires_grad_()
        band = enlarged(enlarged(part, 2, rows, around.start), 3, torch.arange(size * step), 0)
        of_band = hem_loss(band, t[:, rows], reduction="none", ignore_index=255)
        assert torch.equal(losses[:, rows], of_band)
        expected[:, :, around] += torch.autograd.grad(of_band.sum(), part)[0]
    torch.testing.assert_close(gradient.float(), expected, rtol=2**-10, atol=1e-3)


def test_classifier_and_loss_in_one():
    blocks, num_classes = 2**6 + 1, 2**15
    few, t = (torch.randint(-8, 9, (2**10, 1)) / 8).half(), targets((2**10, num_classes), ignore_index=-100)
    weight = (torch.randint(-8, 9, (num_classes, 1)) / 8).half()
    assert blocks * len(few) * num_classes > LIMIT
    found = []
    for hidden, labels in ((few, t), (few.repeat(blocks, 1), t.repeat(blocks))):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        losses = linear_hem_loss(leaves[0], leaves[1], None, labels, reduction="none")
        found.append([losses.detach(), *torch.autograd.grad(losses, leaves, torch.ones_like(losses))])
    (losses, of_hidden, of_weight), (all_losses, of_all_hidden, of_shared_weight) = found
    assert (all_losses.view(blocks, -1) == losses).all()
    assert (of_all_hidden.view(blocks, *few.shape) == of_hidden).all()
    torch.testing.assert_close(of_shared_weight, blocks * of_weight, rtol=2**-8, atol=blocks * 2**-10)
