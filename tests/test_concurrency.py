"""Threads and processes: the loss is the same from wherever it is called."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import logits, targets
from torch.utils.data import DataLoader, Dataset

from hem_ext import hem_loss

SHAPES = [(64, 10), (300, 500), (2, 21, 64, 65)]  # the larger two are cut into blocks for several threads


def loss_and_gradient(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).requires_grad_()
    t = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
    loss = hem_loss(x, t)
    loss.backward()
    return loss.detach(), x.grad


def same(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_several_python_threads_at_once(shape):
    expected = [loss_and_gradient(shape, seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            found = pool.map(lambda seed: loss_and_gradient(shape, seed), range(8))
            assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_backward_in_another_thread():
    x, t = logits((300, 500)).requires_grad_(), targets((300, 500))
    loss = hem_loss(x, t)
    with ThreadPoolExecutor(1) as pool:
        (there,) = pool.submit(torch.autograd.grad, loss, x, retain_graph=True).result()
    assert torch.equal(there, torch.autograd.grad(loss, x)[0])


class Losses(Dataset):
    """Item i is the loss and the gradient of seed i, computed in the worker."""

    def __init__(self, shape):
        self.shape = shape

    def __len__(self):
        return 6

    def __getitem__(self, seed):
        return loss_and_gradient(self.shape, seed)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_in_the_workers_of_a_data_loader(shape, start):
    # Threads of the parent do not live on in a forked child: the first call here has started them.
    expected = [loss_and_gradient(shape, seed) for seed in range(6)]
    loader = DataLoader(Losses(shape), batch_size=None, num_workers=2, multiprocessing_context=start, timeout=60)
    found = list(loader)
    assert len(found) == 6
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_the_number_of_threads_may_change_between_calls():
    before, expected = torch.get_num_threads(), loss_and_gradient((2, 21, 64, 65))
    try:
        for threads in (1, 4, 2, 7, 1):
            torch.set_num_threads(threads)
            assert same(loss_and_gradient((2, 21, 64, 65)), expected)
    finally:
        torch.set_num_threads(before)


def test_one_thread_from_the_start():
    code = """
import hashlib, torch
from hem_ext import hem_loss
assert torch.get_num_threads() == 1
generator = torch.Generator().manual_seed(0)
x = torch.randn((2, 21, 64, 65), generator=generator).requires_grad_()
hem_loss(x, torch.randint(0, 21, (2, 64, 65), generator=generator)).backward()
print(hashlib.sha256(x.grad.numpy().tobytes()).hexdigest())
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    _, gradient = loss_and_gradient((2, 21, 64, 65))
    assert done.stdout.strip() == hashlib.sha256(gradient.numpy().tobytes()).hexdigest()
