"""SegFormer with transformers' Trainer: scenes of MNIST's digits, to be segmented."""

import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer, TrainingArguments, set_seed

from hem_ext import hem_loss, upsampled_hem_loss
from hem_ext.harness.data import load


class Scenes(Dataset):
    def __init__(self):
        self.scenes = load("mnist-scenes", num_train=64).train

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, i):
        image, labels = self.scenes[i]
        return {"pixel_values": image, "labels": labels}


# With gradient_accumulation_steps the trainer adds up what the micro-batches say: each says its share of the labels.
def upsampled(outputs, labels, num_items_in_batch):
    """Of the logits as they are, a quarter of the images' size."""
    loss = upsampled_hem_loss(outputs.logits, labels, margin=0.5, ignore_index=255)
    return loss * (labels != -100).sum() / num_items_in_batch


def two_steps(outputs, labels, num_items_in_batch):
    """The same, with more memory."""
    logits = F.interpolate(outputs.logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    return hem_loss(logits, labels, margin=0.5, ignore_index=255) * (labels != -100).sum() / num_items_in_batch


set_seed(0)
config = SegformerConfig(
    num_channels=1, num_labels=11, depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64], decoder_hidden_size=64
)
arguments = TrainingArguments(
    output_dir="build/segformer",
    max_steps=20,
    per_device_train_batch_size=8,
    learning_rate=3e-4,
    logging_steps=1,
    use_cpu=True,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
trainer = Trainer(
    SegformerForSemanticSegmentation(config),
    arguments,
    train_dataset=Scenes(),
    compute_loss_func=upsampled,  # added
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {sum(losses[:5]) / 5:.3f} in the first five steps, {sum(losses[-5:]) / 5:.3f} in the last five")
