"""Accelerate: digits of MNIST, in as many processes as torchrun --nproc-per-node starts."""

import time

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader

from hem_ext import HEMLoss
from hem_ext.harness.data import load

torch.manual_seed(0)
# A batch of the loader is that of all processes together, so their number changes nothing but the speed.
batches = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True)
accelerator = Accelerator(cpu=not torch.cuda.is_available(), dataloader_config=batches)
model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
loader = DataLoader(load("mnist-5k").train, batch_size=120, shuffle=True)
# The mean is over the samples of all processes that still have an error. The group is None in a script that runs alone.
criterion = HEMLoss(process_group=torch.distributed.group.WORLD)  # instead of: nn.CrossEntropyLoss()
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

accelerator.print(f"on {accelerator.num_processes} processes")
losses = []
for images, labels in loader:
    optimizer.zero_grad()
    loss = criterion(model(images), labels)
    accelerator.backward(loss)
    optimizer.step()
    losses.append(accelerator.reduce(loss.detach(), reduction="mean").item())
    accelerator.print(f"step {len(losses)}: loss {losses[-1]:.5f}")
accelerator.wait_for_everyone()  # a process that leaves takes its connections with it
accelerator.end_training()
time.sleep(1)  # a thread of gloo that gives a tensor back while Python ends aborts the process, in torch 2.13
