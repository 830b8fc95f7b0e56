"""Networks for the tests of verification, and what a network does at many points of a box."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor, nn

from netwright.verify import Network


def drawn(seed: int, make) -> nn.Module:
    """What ``make`` builds, in evaluation mode, with seeded weights and statistics."""
    generator = torch.Generator().manual_seed(seed)
    net = make().eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            scale = (3.0 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + (name.endswith("norm.weight")))
        for part in net.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.running_mean.copy_(0.5 * torch.randn(part.running_mean.shape, generator=generator))
                part.running_var.copy_(0.5 + torch.rand(part.running_var.shape, generator=generator))
    return net


def perceptron(*sizes: int, act=nn.ReLU) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


class Branches(nn.Module):
    """A sum, a concatenation, both poolings, batch norms before and after: what designed networks are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.deep = nn.Sequential(
            nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        )
        self.average = nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)
        self.largest = nn.MaxPool2d(3, 1, padding=1)
        self.shrink = nn.Sequential(nn.ReLU6(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.1))
        self.classifier = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.deep(x) + self.average(x), self.largest(x) + x], dim=1)
        return self.classifier(self.shrink(x).mean((2, 3)))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.ReLU(),
        nn.Dropout(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def adaptive() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip


NETS = {
    "perceptron": (lambda: perceptron(6, 10, 8, 3), (6,)),
    "leaky": (lambda: perceptron(6, 10, 3, act=lambda: nn.LeakyReLU(0.2)), (6,)),
    "clamped": (lambda: perceptron(5, 8, 8, 3, act=lambda: nn.Hardtanh(-0.5, 1.0)), (5,)),
    "hard sigmoid": (lambda: perceptron(5, 8, 3, act=nn.Hardsigmoid), (5,)),
    "convolutional": (convolutional, (1, 8, 8)),
    "branches": (Branches, (1, 4, 4)),
    "adaptive": (adaptive, (1, 6, 6)),
}


def balanced(net: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """With logits of mean 0 over [0, 1], so that every class wins somewhere."""
    *_, last = (part for part in net.modules() if isinstance(part, nn.Linear))
    with torch.no_grad():
        last.bias -= net(torch.rand(256, *shape, generator=torch.Generator().manual_seed(2))).mean(0)
    return net


def net(name: str, seed: int = 0) -> tuple[nn.Module, tuple[int, ...]]:
    make, shape = NETS[name]
    return balanced(drawn(seed, make), shape), shape


@functools.lru_cache(maxsize=64)
def network(name: str, seed: int = 0) -> Network:
    """The same as the verifier sees it; capturing takes a quarter of a second, so once is enough."""
    return Network(*net(name, seed))


@functools.lru_cache(maxsize=64)
def captured(seed: int, *sizes: int) -> Network:
    """A perceptron with ReLUs."""
    return Network(balanced(drawn(seed, lambda: perceptron(*sizes)), sizes[:1]), sizes[:1])


def inputs_of(made: Network, count: int) -> list[Tensor]:
    """Random inputs in [0, 1], every other one near a boundary between classes, so that verdicts differ."""
    x = torch.rand(50 * count, *made.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    best = made.logits(x).topk(2, dim=1).values
    order = (best[:, 0] - best[:, 1]).argsort()
    chosen = torch.stack([order[: count // 2], order[len(order) // 2 :][: count // 2]], dim=1).flatten()
    return list(x[chosen])


def points_of(low: Tensor, high: Tensor, count: int, seed: int = 0) -> Tensor:
    """Random points of a box, half of them corners."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(count, *low.shape, generator=generator, dtype=torch.float64)
    share[: count // 2] = share[: count // 2].round()
    return low + (high - low) * share
