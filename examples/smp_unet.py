"""segmentation_models.pytorch: scenes of MNIST's digits, to be segmented."""

import segmentation_models_pytorch as smp
import torch
from torch.utils.data import DataLoader

from hem_ext import HEMLoss
from hem_ext.harness.data import load

torch.manual_seed(0)
loader = DataLoader(load("mnist-scenes", num_train=128, size=64).train, batch_size=8, shuffle=True)
model = smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=11, decoder_channels=(64, 32, 32, 16, 16))
loss_fn = HEMLoss(margin=0.5)  # instead of: torch.nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)

losses = []
model.train()
for image, mask in loader:
    optimizer.zero_grad()
    logits_mask = model(image)
    loss = loss_fn(logits_mask, mask)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

with torch.no_grad():
    stats = smp.metrics.get_stats(logits_mask.argmax(1), mask, mode="multiclass", num_classes=11)
print(f"loss {sum(losses[:5]) / 5:.3f} in the first five steps, {sum(losses[-5:]) / 5:.3f} in the last five")
print(f"IoU of the last batch {smp.metrics.iou_score(*stats, reduction='micro'):.3f}")
