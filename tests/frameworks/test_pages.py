"""The examples of the pages that need a framework: `make frameworks` installs them and runs this."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hem_ext import HEMLoss

DOCS = Path(__file__).parents[2] / "docs"


def example(heading, page="selective.md"):
    """What the code under a heading defines."""
    section = (DOCS / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    names = {"__name__": "example"}
    for code in section.split("```python\n")[1:]:
        exec(code.partition("```")[0], names)
    return names


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(64, 4), torch.randint(0, 3, (64,))


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))


def by_hand(model, batches, optimizer, steps, logits=lambda model, x: model(x), criterion=None):
    """Plain steps of the same optimizer."""
    criterion = criterion or HEMLoss()
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
        return {
            "input_ids": self.tokens[i],
            "attention_mask": torch.ones(7, dtype=torch.int64),
            "labels": self.labels[i],
        }


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def trainer_arguments(path, **options):
    from transformers import TrainingArguments

    return TrainingArguments(
        path, optim="sgd", learning_rate=0.1, max_grad_norm=0, lr_scheduler_type="constant", use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential", **options,
    )  # fmt: skip


def bert_by_hand(model, batch, steps, criterion=None):
    data = Sentences()
    batches = [
        ({"input_ids": data.tokens[i : i + batch], "attention_mask": torch.ones(batch, 7, dtype=torch.int64)}, labels)
        for i in range(0, 64, batch)
        for labels in [data.labels[i : i + batch]]
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return by_hand(model.train(), batches, optimizer, steps, lambda model, x: model(**x).logits, criterion)


def test_transformers(tmp_path):
    model = bert()
    expected = copy.deepcopy(model)
    arguments = trainer_arguments(tmp_path, max_steps=12, per_device_train_batch_size=16)
    example("In transformers")["HEMTrainer"](model, arguments, train_dataset=Sentences()).train()
    close(model, bert_by_hand(expected, 16, 12))


@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_transformers_with_micro_batches(tmp_path, reduction):
    from transformers import Trainer

    model = bert()
    expected = copy.deepcopy(model)
    arguments = trainer_arguments(
        tmp_path, max_steps=8, per_device_train_batch_size=8, gradient_accumulation_steps=4,
        eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    names, data = example("transformers' Trainer", "distributed.md"), Sentences()
    mean = names["ActiveMean"]()
    given = (
        {"compute_loss_func": names["loss"]}
        if reduction == "batchmean"
        else {"compute_loss_func": mean.loss, "callbacks": [mean]}
    )
    Trainer(model, arguments, train_dataset=data, eval_dataset=data, **given).train()
    assert (mean.criterion.stats is not None) == (reduction == "mean")
    close(model, bert_by_hand(expected, 32, 8, HEMLoss(reduction=reduction)))


@pytest.mark.parametrize(
    ("trainer", "criterion"),
    [
        ("HEMTrainer", HEMLoss(margin=100.0)),  # no sample is finished: as many are active in every micro-batch
        ("WholeStepTrainer", HEMLoss(reduction="batchmean")),
    ],
)
def test_transformers_with_selective_micro_batches(tmp_path, trainer, criterion):
    start, logs, models = bert(), [], []
    for batch, steps in ((32, 1), (8, 4)):
        names = example("In transformers")
        if trainer == "HEMTrainer":
            names["criterion"] = criterion
        model = copy.deepcopy(start)
        arguments = trainer_arguments(
            tmp_path, max_steps=8, per_device_train_batch_size=batch, gradient_accumulation_steps=steps,
            logging_steps=1, eval_strategy="steps", eval_steps=3,
        )  # fmt: skip
        run = names[trainer](model, arguments, train_dataset=Sentences(), eval_dataset=Sentences())
        run.train()
        logs.append([(entry["loss"], entry["grad_norm"]) for entry in run.state.log_history if "loss" in entry])
        models.append(model)
    assert len(logs[0]) == 8
    torch.testing.assert_close(*map(torch.tensor, logs), rtol=1e-4, atol=1e-5)
    close(models[0], bert_by_hand(copy.deepcopy(start), 32, 8, criterion))
    close(models[1], models[0])


def test_a_selective_step_in_transformers_is_the_mean_of_its_micro_batches(tmp_path):
    model, data = bert(), Sentences()
    expected = copy.deepcopy(model)
    arguments = trainer_arguments(tmp_path, max_steps=4, per_device_train_batch_size=16, gradient_accumulation_steps=4)
    example("In transformers")["HEMTrainer"](model, arguments, train_dataset=data).train()
    optimizer = torch.optim.SGD(expected.train().parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        for i in range(0, 64, 16):
            rows = {"input_ids": data.tokens[i : i + 16], "attention_mask": torch.ones(16, 7, dtype=torch.int64)}
            (HEMLoss()(expected(**rows).logits, data.labels[i : i + 16]) / 4).backward()
        optimizer.step()
    close(model, expected)
