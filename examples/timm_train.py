"""timm's train loop: digits of MNIST, plain, or mixed as timm's train.py does: --mixup 0.8 --cutmix 1.0"""

import argparse

from timm.data import Mixup
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, random_seed
from torch.utils.data import DataLoader

from hem_ext import HEMLoss  # instead of: from torch.nn import CrossEntropyLoss
from hem_ext.harness.data import load
from hem_ext.mix import MixedHEMLoss  # instead of: from timm.loss import SoftTargetCrossEntropy

parser = argparse.ArgumentParser()
parser.add_argument("--mixup", type=float, default=0.0)
parser.add_argument("--cutmix", type=float, default=0.0)
args = parser.parse_args()

random_seed(0)
loader_train = DataLoader(load("mnist-5k").train, batch_size=50, shuffle=True)
model = create_model("test_resnet", pretrained=False, num_classes=10, in_chans=1)
optimizer = create_optimizer_v2(model, opt="sgd", lr=0.003, momentum=0.9)
scheduler, num_epochs = create_scheduler_v2(
    optimizer, sched="cosine", num_epochs=1, step_on_epochs=False, updates_per_epoch=len(loader_train)
)

mixup_fn = None
if args.mixup or args.cutmix:
    # HEM has nothing to smooth.
    mixup_fn = Mixup(mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, label_smoothing=0.0, num_classes=10)
    train_loss_fn = MixedHEMLoss()  # instead of: SoftTargetCrossEntropy()
else:
    train_loss_fn = HEMLoss()  # instead of: CrossEntropyLoss()

losses, losses_m = [], AverageMeter()
model.train()
for num_updates, (input, target) in enumerate(loader_train, start=1):
    if mixup_fn is not None:
        input, target = mixup_fn(input, target)
    optimizer.zero_grad()
    loss = train_loss_fn(model(input), target)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    losses_m.update(loss.item(), input.size(0))
    scheduler.step_update(num_updates=num_updates, metric=losses_m.avg)

print(f"loss {sum(losses[:5]) / 5:.3f} in the first five steps, {sum(losses[-5:]) / 5:.3f} in the last five")
