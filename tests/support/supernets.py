"""Supernets of one edge with a given head, and batches for them."""

import torch
from torch import nn

from netwright.search.selection import MagnitudeSelector
from netwright.search.supernet import Choice, SoftmaxGate, Supernet


def batches(number=2, size=16, classes=3, side=8, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 1, side, side, generator=source), torch.randint(classes, (size,), generator=source))
        for _ in range(number)
    ]


class ChainSpace:
    def genotype(self, decisions):
        return dict(decisions)

    def selector(self):
        return MagnitudeSelector()


class OneEdge(Supernet):
    """One choice between features and a head that is given."""

    def __init__(self, candidates, head):
        super().__init__(ChainSpace(), head.shape[0])
        self.edge = Choice(candidates, key="edge", gate=SoftmaxGate())
        self.register_buffer("head", head)
        self.anchor = nn.Parameter(torch.zeros(()))
        self.initialise_arch(0, (head.shape[1], 1, 1))

    def forward(self, x):
        return self.edge(x, self.arch["edge"]).flatten(1) @ self.head.T + self.anchor


class Columns(nn.Module):
    """Features where ``kept`` is 1, zeros elsewhere."""

    def __init__(self, kept):
        super().__init__()
        self.register_buffer("kept", torch.tensor(kept).view(1, -1, 1, 1))

    def forward(self, x):
        return x * self.kept
