"""Random networks over every operator of a graph, for backends to be compared with float64 eager.

A network is a chain of blocks that are drawn with a seed for the shape before them, so that any seed gives a network.
Weights are sparse in every degree: whole layers and single rows are zero; batch norms carry statistics.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import torch
from hypothesis import strategies
from torch import Tensor, nn

from netwright.deploy.graph import Graph, capture, check, optimise, run

Shape = tuple[int, ...]
Block = Callable[[random.Random, Shape], nn.Module]

ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.SiLU,
    nn.GELU, lambda: nn.GELU(approximate="tanh"), nn.Tanh, nn.Hardtanh, lambda: nn.PReLU(init=0.3),
    lambda: nn.LeakyReLU(-0.2), lambda: nn.Hardtanh(-0.5, 2.0), nn.Identity,
)  # fmt: skip


class Residual(nn.Module):
    """x + body(x), then a non-linearity."""

    def __init__(self, body: nn.Module, act: nn.Module, swap: bool):
        super().__init__()
        self.body, self.act, self.swap = body, act, swap

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + x if self.swap else x + self.body(x))


class Gate(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self, channels: int, inner: int, gate: nn.Module, flat: bool):
        super().__init__()
        layer = nn.Linear if flat else lambda i, o: nn.Conv2d(i, o, 1)
        self.flat = flat
        self.down, self.up, self.gate = layer(channels, inner), layer(inner, channels), gate

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=not self.flat)
        scale = self.gate(self.up(torch.relu(self.down(pooled))))
        return x * (scale[:, :, None, None] if self.flat else scale)


class Branches(nn.Module):
    """Branches joined along the channels, x itself among them."""

    def __init__(self, branches: list[nn.Module], keep: bool):
        super().__init__()
        self.branches, self.keep = nn.ModuleList(branches), keep

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches] + [x] * self.keep, dim=1)


class Split(nn.Module):
    """Channels in two, one part through a body, then joined and shuffled."""

    def __init__(self, part: int, body: nn.Module, groups: int):
        super().__init__()
        self.part, self.body, self.shuffle = part, body, nn.ChannelShuffle(groups)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, : self.part], x[:, self.part :]
        return self.shuffle(torch.cat([b, self.body(a)], dim=1))


class ChannelsLast(nn.Module):
    """A ConvNeXt block without its convolution: a norm, two linear layers and a scale over the last axis."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(channels), nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels),
        )  # fmt: skip
        self.scale = nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(nn.functional.gelu(self.up(self.norm(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        return x + self.scale * y


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _act(draw: random.Random) -> nn.Module:
    return draw.choice(ACTIVATIONS)()


def _conv(draw: random.Random, shape: Shape, *, same: bool = False, out: int | None = None) -> nn.Module:
    _, channels, height, width = shape
    kernel = [draw.choice([1, 1, 2, 3, 3, 5]) for _ in range(2)]
    kernel = [1, 1] if draw.random() < 0.3 else kernel
    dilation = [draw.choice([1, 1, 1, 2, 3]) for _ in range(2)]
    stride = [1, 1] if same else [draw.choice([1, 1, 2, 3]) for _ in range(2)]
    kind = draw.choice(["dense", "dense", "depthwise", "multiplied", "grouped"])
    divisors = [g for g in range(1, channels + 1) if channels % g == 0]
    groups = {"dense": 1, "grouped": draw.choice(divisors)}.get(kind, channels)
    outputs = out or (channels if same else channels * 2 if kind == "multiplied" else groups * draw.randint(1, 4))
    groups = groups if outputs % groups == 0 else 1
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if same:
        kernel = [k if k % 2 else k + 1 for k in kernel]
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
    else:
        room = zip((height, width), reach, strict=True)
        padding = [draw.randint(max(0, (r - n + 2) // 2), max(r, (r - n + 2) // 2)) for n, r in room]
    return nn.Conv2d(
        channels, outputs, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups, draw.random() < 0.5
    )


def _conv_block(draw: random.Random, shape: Shape) -> nn.Module:
    conv = _conv(draw, shape)
    parts = [conv]
    if draw.random() < 0.6:
        parts.append(nn.BatchNorm2d(conv.out_channels))
    return nn.Sequential(*parts, _act(draw))


def _preactivated(draw: random.Random, shape: Shape) -> nn.Module:
    act = _act(draw) if draw.random() < 0.6 else nn.Identity()
    return nn.Sequential(nn.BatchNorm2d(shape[1]), act, _conv(draw, shape))


def _transposed(draw: random.Random, shape: Shape) -> nn.Module:
    channels = shape[1]
    kernel, stride = draw.randint(1, 4), draw.randint(1, 3)
    dilation = draw.choice([1, 1, 2])
    groups = draw.choice([1, channels])
    most = min((dilation * (kernel - 1)) // 2, 2)
    return nn.Sequential(
        nn.ConvTranspose2d(
            channels,
            groups * draw.randint(1, 3) if groups > 1 else draw.randint(1, 8),
            kernel,
            stride,
            draw.randint(0, most),
            draw.randint(0, max(stride, dilation) - 1),
            groups,
            draw.random() < 0.5,
            dilation,
        ),
        _act(draw),
    )


def _pool(draw: random.Random, shape: Shape) -> nn.Module:
    kernel = tuple(draw.randint(1, min(4, n)) for n in shape[2:])
    stride = tuple(draw.randint(1, 3) for _ in kernel)
    padding = tuple(draw.randint(0, k // 2) for k in kernel)
    ceil = draw.random() < 0.5
    if draw.random() < 0.5:
        dilation = tuple(draw.choice([1, 1, 2]) if n >= 2 * k else 1 for k, n in zip(kernel, shape[2:], strict=True))
        return nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil)
    divisor = draw.choice([None, None, 3])
    return nn.AvgPool2d(kernel, stride, padding, ceil, draw.random() < 0.5, divisor)


def _adaptive(draw: random.Random, shape: Shape) -> nn.Module:
    size = (draw.randint(1, shape[2] + 1), draw.randint(1, shape[3] + 1))
    return draw.choice([nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d])(size)


def _norm(draw: random.Random, shape: Shape) -> nn.Module:
    channels = shape[1]
    groups = draw.choice([g for g in range(1, channels + 1) if channels % g == 0])
    many = shape[2] * shape[3] > 1
    kinds = [nn.BatchNorm2d(channels), nn.GroupNorm(groups, channels), nn.LayerNorm(shape[1:])]
    kinds += [nn.InstanceNorm2d(channels, affine=True)] if many else []
    return nn.Sequential(draw.choice(kinds), _act(draw))


def _residual(draw: random.Random, shape: Shape) -> nn.Module:
    body = nn.Sequential(_conv(draw, shape, same=True), nn.BatchNorm2d(shape[1]))
    if draw.random() < 0.5:
        body = nn.Sequential(body, _act(draw), _conv(draw, shape, same=True))
    return Residual(body, _act(draw), draw.random() < 0.5)


def _gate(draw: random.Random, shape: Shape) -> nn.Module:
    gate = draw.choice([nn.Sigmoid, nn.Hardsigmoid, nn.Tanh])()
    return Gate(shape[1], draw.randint(1, 4), gate, draw.random() < 0.5)


def _branches(draw: random.Random, shape: Shape) -> nn.Module:
    branches = [
        nn.Sequential(_conv(draw, shape, same=True, out=draw.randint(1, 6)), _act(draw))
        for _ in range(draw.randint(1, 3))
    ]
    return Branches(branches, draw.random() < 0.5)


def _split(draw: random.Random, shape: Shape) -> nn.Module:
    channels = shape[1]
    if channels < 2:
        return nn.Identity()
    part = draw.randint(1, channels - 1)
    groups = draw.choice([g for g in range(1, channels + 1) if channels % g == 0])
    return Split(part, _conv(draw, (shape[0], part, *shape[2:]), same=True), groups)


def _movement(draw: random.Random, shape: Shape) -> nn.Module:
    step = draw.randint(1, 2)
    start = [draw.randint(0, min(1, n - 1)) for n in shape[2:]]
    pads = [draw.randint(0, 2) for _ in range(4)]
    return draw.choice(
        [
            Call(lambda x: x[:, :, start[0] :: step, start[1] :: step]),
            Call(lambda x: nn.functional.pad(x, pads)),
            Call(lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)]),
            Call(lambda x: x.flip(1)),
            Call(lambda x: 0.5 - x / 3),
            Call(lambda x: x * x.sigmoid()),
            Call(lambda x: nn.functional.relu6(x + 3) / 6),
            Call(lambda x: x + torch.zeros_like(x)),
            nn.Upsample(scale_factor=2) if max(shape[2:]) <= 16 else nn.Identity(),
            nn.Softmax(dim=1),
            nn.Softmax2d(),
            nn.Dropout(),
            nn.PReLU(shape[1]),
            nn.PixelShuffle(2) if shape[1] % 4 == 0 else nn.Identity(),
            nn.PixelUnshuffle(2) if shape[2] % 2 == shape[3] % 2 == 0 else nn.Identity(),
            Call(lambda x: x.repeat(1, 2, 1, 1)),
            Call(lambda x: x * x.amax((2, 3), keepdim=True).tanh()),
            Call(lambda x: x + x.mean(1, keepdim=True)),
            Call(lambda x: x - x.mean(3, keepdim=True)),
            Call(lambda x: x.transpose(2, 3)),
            Call(lambda x: torch.stack([x, -x], 2).flatten(1, 2)),
        ]
    )


def _channels_last(draw: random.Random, shape: Shape) -> nn.Module:
    return ChannelsLast(shape[1])


BLOCKS: tuple[Block, ...] = (
    _conv_block, _conv_block, _conv_block, _preactivated, _transposed, _pool, _adaptive, _norm, _residual, _residual,
    _gate, _branches, _split, _movement, _channels_last,
)  # fmt: skip
LARGEST = 12000
ILL_CONDITIONED = 1e-6


def _head(draw: random.Random, shape: Shape) -> nn.Module:
    _, channels, height, width = shape
    kind = draw.choice(["maps", "pooled", "flat", "log"])
    classes = draw.randint(1, 7)
    if kind == "pooled":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    if kind == "flat":
        inner = [nn.Linear(channels * height * width, 5), nn.BatchNorm1d(5), _act(draw), nn.LayerNorm(5)]
        return nn.Sequential(nn.Flatten(), *inner, nn.Linear(5, classes), nn.Softmax(dim=1))
    if kind == "log":
        return nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.LogSoftmax(dim=-1))
    return nn.Identity()


def fill(module: nn.Module, seed: int) -> nn.Module:
    """Weights of every sparsity with zero rows and zero layers, and statistics for the batch norms."""
    source = torch.Generator().manual_seed(seed)
    draw = random.Random(seed)
    with torch.no_grad():
        for part in module.modules():
            for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                if not tensor.is_floating_point():
                    continue
                values = torch.randn(tensor.shape, generator=source)
                if name == "running_var" or (name == "weight" and tensor.ndim == 1):
                    values = values.abs() + 0.3
                if tensor.ndim > 1 and isinstance(part, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                    sparsity = draw.choice([0.0, 0.5, 0.9, 0.99, 1.0])
                    values *= torch.rand(tensor.shape, generator=source) >= sparsity
                    if draw.random() < 0.4:
                        values[torch.rand(len(values), generator=source) < 0.4] = 0
                    values *= max(1, (values != 0).sum().item() / len(values)) ** -0.5
                tensor.copy_(values)
    return module


def random_network(seed: int) -> tuple[nn.Module, Tensor]:
    """A network in evaluation mode and an input for it; the same seed gives the same.

    Networks whose own float32 result is far from their float64 result are drawn again: there, no backend could be told
    from a wrong one.

    Example:
        >>> module, x = random_network(3)
        >>> x.ndim
        4
    """
    return _well_conditioned(str(seed), _draw)


def _well_conditioned(name: str, draw: Callable[[str], tuple[nn.Module, Tensor]]) -> tuple[nn.Module, Tensor]:
    attempt = 0
    while True:
        module, example = draw(f"{name} {attempt}")
        with torch.no_grad():
            exact, single = copy.deepcopy(module).double()(example.double()), module(example)
        scale = exact.abs().max()
        if 1e-3 < scale < 1e6 and (single - exact).abs().max() <= ILL_CONDITIONED * scale:
            return module, example
        attempt += 1


def _draw(name: str) -> tuple[nn.Module, Tensor]:
    draw = random.Random(name)
    shape: Shape = (draw.choice([1, 1, 2, 3, 9]), draw.randint(1, 9), draw.randint(1, 33), draw.randint(1, 33))
    seed = draw.randrange(2**32)
    example = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    blocks: list[nn.Module] = []
    for _ in range(draw.randint(1, 6)):
        block = draw.choice(BLOCKS)(draw, shape).eval()
        with torch.no_grad():
            after = tuple(block(torch.zeros(shape)).shape)
        if torch.Size(after).numel() <= LARGEST * shape[0]:
            shape = after
            blocks.append(block)
    network = nn.Sequential(*blocks, _head(draw, shape))
    return fill(network, seed).eval(), example


def _inverted(draw: random.Random, shape: Shape) -> nn.Module:
    """An inverted residual block, its gate (if any) before the last 1x1 convolution."""
    channels, inner, stride, kernel = shape[1], draw.randint(4, 20), draw.choice([1, 1, 2]), draw.choice([3, 5])
    act = draw.choice([nn.ReLU6, nn.Hardswish])
    body = nn.Sequential(
        nn.Conv2d(channels, inner, 1), nn.BatchNorm2d(inner), act(),
        nn.Conv2d(inner, inner, kernel, stride, kernel // 2, groups=inner), nn.BatchNorm2d(inner), act(),
        _gate(draw, (shape[0], inner, *shape[2:])) if draw.random() < 0.3 else nn.Identity(),
        nn.Conv2d(inner, channels, 1), nn.BatchNorm2d(channels),
    )  # fmt: skip
    return body if stride > 1 else Residual(body, nn.Identity(), draw.random() < 0.5)


def _row_by_row(draw: random.Random, shape: Shape) -> nn.Module:
    channels = nn.Parameter(torch.rand(1, shape[1], 1, 1))
    return nn.Sequential(nn.ReLU(), draw.choice([nn.BatchNorm2d(shape[1]), Call(lambda x: x * x.sigmoid() + channels)]))


ROW_BLOCKS: tuple[Block, ...] = (_conv_block, _pool, _residual, _residual, _inverted, _inverted, _row_by_row)


def random_rows(seed: int) -> tuple[nn.Module, Tensor]:
    """A network, all of whose layers but gates can compute some rows of their output; as :func:`random_network`."""
    return _well_conditioned(f"rows {seed}", _draw_rows)


def _draw_rows(name: str) -> tuple[nn.Module, Tensor]:
    draw = random.Random(name)
    shape: Shape = (draw.choice([1, 1, 2, 3]), draw.randint(2, 6), draw.randint(9, 26), draw.randint(9, 34))
    seed = draw.randrange(2**32)
    example = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    blocks: list[nn.Module] = []
    for _ in range(draw.randint(3, 6)):
        block = draw.choice(ROW_BLOCKS)(draw, shape).eval()
        with torch.no_grad():
            after = tuple(block(torch.zeros(shape)).shape)
        if after[3] >= 8 and after[2] >= 3 and after[1] <= 24:
            shape = after
            blocks.append(block)
    return fill(nn.Sequential(*blocks), seed).eval(), example


def eager(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """What PyTorch computes in float64, outputs flattened."""
    exact = copy.deepcopy(module).eval().double()
    with torch.no_grad():
        return torch.utils._pytree.tree_leaves(exact(*(x.double() for x in inputs)))


def assert_captured(module: nn.Module, *inputs: Tensor) -> Graph:
    """Compares the graph of a module, as captured and optimised, with float64 eager; gives the optimised one."""
    graph = capture(module, inputs)
    check(graph)
    small = optimise(graph, precision=np.float64)
    check(small)
    for result in (run(graph, inputs), run(small, inputs)):
        torch.testing.assert_close(result, eager(module, *inputs), rtol=1e-10, atol=1e-10)
    rounded = optimise(graph)
    check(rounded)
    return rounded


def networks() -> strategies.SearchStrategy[tuple[nn.Module, Tensor]]:
    """Networks with inputs, by seed: a failure is told by ``random_network(seed)``."""
    return strategies.integers(0, 2**32 - 1).map(random_network)
