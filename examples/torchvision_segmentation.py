"""torchvision's segmentation networks with their auxiliary head: scenes of MNIST's digits, to be segmented."""

import torch
from torch.utils.data import DataLoader
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large
from torchvision.transforms import v2

from hem_ext import hem_loss  # instead of: from torch.nn.functional import cross_entropy
from hem_ext.harness.data import load


def criterion(inputs, target):
    losses = {}
    for name, x in inputs.items():
        losses[name] = hem_loss(x, target, margin=0.5)  # instead of: cross_entropy(x, target)
    return losses["out"] + 0.5 * losses["aux"]


torch.manual_seed(0)
loader = DataLoader(load("mnist-scenes", num_train=128, size=64).train, batch_size=8, shuffle=True)
transform = v2.RGB()  # the networks take three channels
model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=11, aux_loss=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.0007, momentum=0.9, weight_decay=1e-4)
lr_scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=len(loader), power=0.9)

losses = []
model.train()
for image, target in loader:
    output = model(transform(image))
    loss = criterion(output, target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    lr_scheduler.step()
    losses.append(loss.item())

print(f"loss {sum(losses[:5]) / 5:.3f} in the first five steps, {sum(losses[-5:]) / 5:.3f} in the last five")
