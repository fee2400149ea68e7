import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score
from torch import nn

from hem_ext.harness.data import Split, digits
from hem_ext.harness.losses import make_loss
from hem_ext.harness.models import SmallCNN
from hem_ext.harness.training import Schedule, evaluate, fit, predict

SCHEDULE = Schedule(epochs=2, batch_size=32, max_lr=0.1)


class Fixed(nn.Module):
    """Predicts what it was given: image i, filled with i, is the i-th sample."""

    def __init__(self, predicted, num_classes):
        super().__init__()
        self.logits = nn.functional.one_hot(predicted, num_classes).float().movedim(-1, 1)

    def forward(self, x):
        return self.logits[x[:, 0, 0, 0].long()]


def numbered(count):
    return torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8)


@pytest.mark.parametrize("shape", [(200,), (9, 6, 7)])
def test_metrics_are_those_of_scikit_learn(shape):
    labels, predicted = torch.randint(0, 4, shape), torch.randint(0, 5, shape)
    metrics = evaluate(Fixed(predicted, 6), Split(numbered(shape[0]), labels))
    truth, guess = labels.flatten().numpy(), predicted.flatten().numpy()
    assert metrics["accuracy"] == pytest.approx(accuracy_score(truth, guess))
    assert metrics["mean_iou"] == pytest.approx(jaccard_score(truth, guess, average="macro", zero_division=0))


def test_a_class_that_occurs_nowhere_does_not_count():
    labels = torch.tensor([0, 0, 5])
    assert evaluate(Fixed(labels, 6), Split(numbered(3), labels))["mean_iou"] == 1


@pytest.mark.parametrize("loss", ["ce", "hem"])
def test_fit_learns_digits(loss):
    train, test = digits()
    torch.manual_seed(0)
    model, epochs = SmallCNN(10, width=8), []
    history = fit(model, make_loss(loss, num_classes=10), train, test, SCHEDULE, seed=0, after_epoch=epochs.append)
    assert epochs == history
    assert len(history) == 2
    assert history[-1].accuracy > 0.9
    assert history[-1].accuracy == pytest.approx((predict(model, test.images) == test.labels).float().mean().item())
    assert history[-1].train_loss < history[0].train_loss or loss == "hem"
    assert 0 < history[-1].loss_seconds < history[-1].seconds
    # Cross-entropy never finishes a sample; HEM has finished some.
    assert history[-1].active == 1 if loss == "ce" else 0 < history[-1].active < 1


def test_fit_repeats_itself():
    train, test = digits()
    train = Split(train.images[:200], train.labels[:200])

    def run():
        torch.manual_seed(1)
        model = SmallCNN(10, width=4)
        fit(model, make_loss("hem", num_classes=10), train, test, SCHEDULE, seed=1)
        return model.state_dict()

    first, again = run(), run()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_loss_is_cut_off_and_joined_without_a_trace():
    # One step of fit is one plain step of SGD.
    train = Split(torch.rand(8, 1, 8, 8), torch.arange(8))
    models = []
    for _ in range(2):
        torch.manual_seed(2)
        models.append(SmallCNN(10, width=4))
    schedule = Schedule(epochs=1, batch_size=8, max_lr=0.1)
    fit(models[0], make_loss("hem", num_classes=10), train, train, schedule, seed=0)

    parameters = list(models[1].parameters())
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True, weight_decay=schedule.weight_decay)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs=1, steps_per_epoch=1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    make_loss("hem", num_classes=10)(models[1](train.images[order]), train.labels[order]).backward()
    optimizer.step()
    for a, b in zip(models[0].parameters(), parameters, strict=True):
        assert torch.equal(a, b)
