"""The examples of docs/selective.md that need a framework: `make frameworks` installs them and runs this."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hem_ext import HEMLoss

PAGE = Path(__file__).parents[2] / "docs" / "selective.md"


def example(heading):
    """What the code under a heading defines."""
    code = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("```python\n")[2]
    names = {"__name__": "example"}
    exec(code.partition("```")[0], names)
    return names


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(64, 4), torch.randint(0, 3, (64,))


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))


def by_hand(model, batches, optimizer, steps, logits=lambda model, x: model(x)):
    """Plain steps of the same optimizer."""
    criterion = HEMLoss()
    for i in range(steps):
        x, t = batches[i % len(batches)]
        optimizer.zero_grad()
        criterion(logits(model, x), t).backward()
        optimizer.step()
    return model


def close(model, expected):
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_lightning(batch, tmp_path):
    import pytorch_lightning as pl

    loader = DataLoader(TensorDataset(*batch), 16)
    model = example("In Lightning")["Classifier"](network())
    trainer = pl.Trainer(
        max_epochs=5, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(model, loader)
    expected = network()
    by_hand(expected, list(loader), torch.optim.SGD(expected.parameters(), lr=0.1), 20)
    close(model.model, expected)
    assert model.selective.steps == 20
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = example("In Lightning")["Classifier"](network())
    again.on_load_checkpoint(torch.load(tmp_path / "last.ckpt", weights_only=False))
    assert again.selective.state_dict() == model.selective.state_dict()


class Sentences(Dataset):
    def __init__(self):
        torch.manual_seed(0)
        self.tokens, self.labels = torch.randint(0, 50, (64, 7)), torch.randint(0, 3, (64,))

    def __len__(self):
        return 64

    def __getitem__(self, i):
        mask = torch.ones(7, dtype=torch.int64)
        return {"input_ids": self.tokens[i], "attention_mask": mask, "labels": self.labels[i]}
        return {
            "input_ids": self.tokens[i],
            "attention_mask": torch.ones(7, dtype=torch.int64),
            "labels": self.labels[i],
        }


def test_transformers(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    expected = copy.deepcopy(model)
    arguments = TrainingArguments(
        tmp_path, max_steps=12, per_device_train_batch_size=16, optim="sgd", learning_rate=0.1, max_grad_norm=0,
        lr_scheduler_type="constant", use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    example("In transformers")["HEMTrainer"](model, arguments, train_dataset=Sentences()).train()
    data = Sentences()
    batches = [
        ({"input_ids": data.tokens[i : i + 16], "attention_mask": torch.ones(16, 7, dtype=torch.int64)}, labels)
        for i in range(0, 64, 16)
        for labels in [data.labels[i : i + 16]]
    ]
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    by_hand(expected.train(), batches, optimizer, 12, lambda model, x: model(**x).logits)
    close(model, expected)
