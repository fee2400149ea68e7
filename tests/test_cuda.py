"""What only a GPU can show. Collected where there is one; ``--require-cuda`` insists on it."""

import os
import subprocess
import sys

import pytest
import torch
from cases import DTYPES, assert_gradient, assert_loss, eighths, logits, targets

from hem_ext import hem_loss

# Every way the logits are cut up (hem_cuda.cu, `plan`), with lengths that no vector divides.
SHAPES = {
    "narrow rows": (517, 10),
    "narrow rows, odd": (70, 63),
    "warp rows": (37, 257),
    "warp rows, even": (40, 1000),
    "block rows": (5, 21841),
    "block rows of a language model": (3, 50257),
    "rows beyond shared memory": (2, 128256),
    "pixels": (2, 21, 24, 32),
    "odd pixels": (2, 19, 7, 9),
    "pixels, more classes than a word": (1, 150, 16, 20),
    "odd pixels, more classes than a word": (1, 171, 5, 13),
    "pixels of many classes": (2, 700, 3, 7),
}


def loss_and_gradient(x, t, **options):
    x = x.detach().requires_grad_()
    loss = hem_loss(x, t, backend="native", **options)
    loss.backward(torch.ones_like(loss))
    return loss.detach(), x.grad


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_agrees_with_the_cpu(name, dtype, layout):
    x, t = logits(SHAPES[name], dtype), targets(SHAPES[name], ignore_index=-100)
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    values = eighths(x.shape[1])
    for options in ({}, {"reduction": "none"}, {"margin": values, "weight": values, "reduction": "batchmean"}):
        expected = loss_and_gradient(x, t, **options)
        there = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        loss, gradient = loss_and_gradient(x.cuda(), t.cuda(), **there)
        assert_loss(loss, expected[0].double())
        assert_gradient(gradient, expected[1].double())
        assert gradient.stride() == expected[1].stride()


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_bits_every_time(name):
    x, t = torch.randn(SHAPES[name], device="cuda"), targets(SHAPES[name]).cuda()
    first = loss_and_gradient(x, t)
    for _ in range(5):
        again = loss_and_gradient(x, t)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("name", SHAPES)
def test_a_graph_can_hold_a_call(name):
    # Capturing refuses whatever waits for the device.
    x, t = torch.randn(SHAPES[name], device="cuda", requires_grad=True), targets(SHAPES[name]).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.autograd.grad(hem_loss(x, t), x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = hem_loss(x, t)
        (gradient,) = torch.autograd.grad(loss, x)
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            t.copy_(targets(SHAPES[name]))
        graph.replay()
        expected = loss_and_gradient(x, t)
        assert torch.equal(loss, expected[0])
        assert torch.equal(gradient, expected[1])


def test_kernels_run_on_the_current_stream():
    x, t = torch.zeros(1000, 1000, device="cuda", requires_grad=True), targets((1000, 1000)).cuda()
    expected = loss_and_gradient(torch.ones(1000, 1000, device="cuda").cumsum(1), t)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # what another stream would overtake
        with torch.no_grad():
            x.copy_(torch.ones_like(x).cumsum(1))
        loss = hem_loss(x, t)
        (gradient,) = torch.autograd.grad(loss, x)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


def test_tensors_choose_their_device():
    # On the last device, whatever the current one is.
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    with torch.cuda.device(0):
        x, t = logits((40, 1000)), targets((40, 1000))
        loss, gradient = loss_and_gradient(x.to(device), t.to(device))
        assert (loss.device, gradient.device) == (device, device)
        assert torch.cuda.current_device() == 0
    assert_loss(loss, loss_and_gradient(x, t)[0].double())


@pytest.mark.parametrize("shape", [(4, 5), (4, 500), (2, 5, 8, 8)])
def test_a_bad_target_is_a_device_side_assertion(shape):
    # In a process of its own: an assertion ends every use of the device.
    code = (
        "import torch; from hem_ext import hem_loss;"
        f"x = torch.zeros({shape}, device='cuda'); t = torch.zeros({(shape[0], *shape[2:])}, device='cuda').long();"
        f"t.view(-1)[1] = {shape[1]}; print('before'); hem_loss(x, t); torch.cuda.synchronize(); print('after')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.stdout.split() == ["before"]
    assert "device-side assert" in done.stderr


def test_class_values_are_checked_when_the_module_is_built():
    from hem_ext import HEMLoss

    with pytest.raises(ValueError, match=r"margin\[1\] is -1"):
        HEMLoss(margin=torch.tensor([0.5, -1.0], device="cuda"))


def test_more_than_two_to_the_31_elements_in_segmentation():
    # (N, C, H, W), as a network for ADE20K gives it.
    x = torch.zeros(64, 150, 512, 512, dtype=torch.bfloat16, device="cuda")
    t = torch.full((64, 512, 512), 255, dtype=torch.uint8, device="cuda")
    x[63, 149, 511, 511], t[63, 511, 511] = 1.0, 2
    loss, gradient = loss_and_gradient(x, t, margin=0.5, ignore_index=255)
    assert loss.item() == 1.5
    assert gradient[63, :, 511, 511].nonzero().flatten().tolist() == [2, 149]
    assert gradient[31].count_nonzero() == 0
