"""MONAI, Dice and HEM: scenes of MNIST's digits, to be segmented."""

import torch
from monai.data import DataLoader, Dataset
from monai.losses import DiceLoss
from monai.networks.nets import UNet
from monai.transforms import Compose, RandGaussianNoised, RandRotated
from monai.utils import set_determinism

from hem_ext import HEMLoss
from hem_ext.harness.data import load

set_determinism(0)
scenes = load("mnist-scenes", num_train=128).train
augment = Compose(
    [
        RandRotated(["image", "label"], range_x=0.2, prob=0.5, mode=["bilinear", "nearest"]),
        RandGaussianNoised("image", prob=0.5, std=0.05),
    ]
)
data = Dataset([{"image": image, "label": label.unsqueeze(0)} for image, label in scenes], augment)
loader = DataLoader(data, batch_size=8, shuffle=True)
model = UNet(spatial_dims=2, in_channels=1, out_channels=11, channels=(8, 16, 32), strides=(2, 2), num_res_units=1)
dice = DiceLoss(to_onehot_y=True, softmax=True)
pixelwise = HEMLoss(margin=0.5)  # instead of: torch.nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), 1e-3)

losses = []
model.train()
for batch in loader:
    optimizer.zero_grad()
    logits, labels = model(batch["image"]), batch["label"]
    loss = dice(logits, labels) + pixelwise(logits, labels.squeeze(1).long())
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

print(f"loss {sum(losses[:5]) / 5:.3f} in the first five steps, {sum(losses[-5:]) / 5:.3f} in the last five")
