"""Features from images without labels: SimCLR around your own encoder, with the Hallucinator's extra positives."""

# %% Images, and how two views of each are made
import torch
from torch import nn

from netwright.data import Batches, load
from netwright.data.augment import Compose, Jitter
from netwright.data.crops import RandomResizedCrop
from netwright.train import Hallucinator
from netwright.train.contrastive import SimCLR, TwoViews, linear_probe

data = load("digits")
views = TwoViews(Compose([RandomResizedCrop((0.7, 1.0)), Jitter(0.4, 0.4)]))  # for photographs: policy(data.shape)
batches = Batches(data.train, 128, augment=views, normalise=data.normalise())


def encoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def worth(backbone: nn.Module) -> float:
    """The accuracy of a linear layer on the frozen features, which alone sees labels."""
    kept = {"shuffle": False, "drop_last": False, "normalise": data.normalise()}
    return linear_probe(backbone, Batches(data.train, 256, **kept), Batches(data.test, 256, **kept), epochs=20)


# %% Your own loop: a host is a module that takes two views of a batch and gives the loss
torch.manual_seed(0)
host = SimCLR(encoder, dim=32, temperature=0.2, hallucinator=Hallucinator(32))
print(f"linear probe before {worth(host.backbone):.3f}")
optimizer = torch.optim.SGD(host.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
for epoch in range(12):
    batches.set_epoch(epoch)
    for both, _ in batches:
        loss = host(both[:, 0], both[:, 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
print(f"linear probe after  {worth(host.backbone):.3f}, loss {loss.item():.3f}")
