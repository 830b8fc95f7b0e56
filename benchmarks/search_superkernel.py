"""A step of a search with superkernels: over the largest network, a supernet of all paths, and NNI's superkernels.

    python benchmarks/search_superkernel.py [--rounds 30] [--quick]

The peer is NNI 3.0, whose mixed operations slice one weight and mix the slices by softmax; it is compared where it can
be imported. It installs beside current PyTorch without its dependencies:

    pip install --no-deps --target peer nni==3.0 json_tricks schema typeguard==3.0.2 PythonWebHDFS responses \\
        prettytable cloudpickle astor simplejson contextlib2 colorama websockets
    PYTHONPATH=peer python benchmarks/search_superkernel.py

Both networks are ``micro-chain`` at 16x16, batch 64, channels last; NNI's leaves no layer out. The first entry of each
table is the peer. The figures go to benchmarks/results/; --quick makes two rounds and writes nothing. Exit 1 if a step
is above 1.2 of the largest network's, 0.4 of all paths' or 0.7 of NNI's, or the peer is not there.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from netwright.cost import compare_times
from netwright.papers.single_path_nas import step_times
from netwright.search import spaces
from netwright.search.superkernel import SuperKernelDepthwise
from netwright.search.superkernel_supernet import SuperKernelSupernet
from netwright.seeding import stream
from netwright.train.rmsprop import RMSpropTF
from support.record import Figure, over, record

BATCH, SHAPE = 64, (1, 16, 16)
MOST = {"largest": 1.2, "all paths": 0.4, "NNI": 0.7}


def training(network: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """A step that trains all parameters."""
    network.train()
    optimizer = RMSpropTF(network.parameters(), lr=0.004)

    def step() -> None:
        loss = functional.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def passes(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward through one layer."""
    layer.train()
    parameters = [x.requires_grad_(), *layer.parameters()]

    def both() -> None:
        torch.autograd.grad(layer(x).sum(), parameters)

    return both


def peers() -> tuple[nn.Module, nn.Module]:
    """NNI's network of micro-chain, and one depthwise layer of 96 channels, both with their mixtures."""
    import nni
    from nni.nas.nn.pytorch import ModelSpace, MutableBatchNorm2d, MutableConv2d
    from nni.nas.oneshot.pytorch.strategy import DARTS

    class Block(nn.Module):
        def __init__(self, number: int, c_in: int, c_out: int, stride: int) -> None:
            super().__init__()
            width = nni.choice(f"width_{number}", [2 * c_in, 4 * c_in])
            kernel = nni.choice(f"kernel_{number}", [3, 5])
            self.body = nn.Sequential(
                MutableConv2d(c_in, width, 1, bias=False), MutableBatchNorm2d(width), nn.ReLU(),
                MutableConv2d(width, width, kernel, stride, 2, groups=width, bias=False), MutableBatchNorm2d(width),
                nn.ReLU(), MutableConv2d(width, c_out, 1, bias=False), MutableBatchNorm2d(c_out),
            )  # fmt: skip
            self.adds = stride == 1 and c_in == c_out

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return x + y if self.adds else y

    class Chain(ModelSpace):
        def __init__(self) -> None:
            super().__init__()
            blocks, c_in = [], 8
            for c_out, stride in ((12, 1), (16, 2), (24, 2)):
                blocks += [Block(len(blocks), c_in, c_out, stride), Block(len(blocks) + 1, c_out, c_out, 1)]
                c_in = c_out
            stem = (nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            self.body = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, 10))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    class Depthwise(ModelSpace):
        def __init__(self) -> None:
            super().__init__()
            width = nni.choice("width", [48, 96])
            self.body = MutableConv2d(width, width, nni.choice("kernel", [3, 5]), padding=2, groups=width, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    return DARTS().mutate_model(Chain()), DARTS().mutate_model(Depthwise())


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="two rounds; nothing is written")
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    times = step_times(rounds, BATCH)
    print(f"a step of the search, batch {BATCH}\n{times}\n", flush=True)
    figures = [
        over(times[name], f"a step over that of {text}", inverse=True, most=MOST[name])
        for name, text in (("largest", "the largest network"), ("all paths", "a search over all paths"))
    ]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network, layer = peers()
    except ImportError as error:
        figures.append(Figure("a training step over NNI's", None, most=MOST["NNI"], note=str(error)))
    else:
        draw = stream(0, "batch")
        x: Any = torch.rand(BATCH, *SHAPE, generator=draw).clone(memory_format=torch.channels_last)
        y = torch.randint(10, (BATCH,), generator=draw)
        wide = torch.rand(BATCH, 96, 4, 4, generator=draw).contiguous(memory_format=torch.channels_last)
        network = network.to(memory_format=torch.channels_last)
        space = spaces.get("micro-chain")
        ours = SuperKernelSupernet(space, 1, 10)
        largest: Any = space.build(ours.derive(), 1, 10).to(memory_format=torch.channels_last)
        for text, most, pair in (
            (
                "a training step without penalty",
                MOST["NNI"],
                {"NNI": training(network, x, y), "ours": training(ours, x, y), "largest": training(largest, x, y)},
            ),
            (
                "one layer, forward and backward",
                None,
                {"NNI": passes(layer, wide), "ours": passes(SuperKernelDepthwise(96), wide)},
            ),
        ):
            found = compare_times(pair, rounds=rounds, threads=1)
            print(f"{text}\n{found}\n", flush=True)
            figures.append(over(found["ours"], f"{text}, over NNI's", most=most))
    return record("search_superkernel", figures, {"threads": 1, "batch": BATCH, "rounds": rounds}, quick=options.quick)


if __name__ == "__main__":
    sys.exit(main())
