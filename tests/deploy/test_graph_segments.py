"""Networks of which a part stays with PyTorch: the parts together compute what the whole does."""

from __future__ import annotations

import torch
from networks import Call, fill
from torch import Tensor, nn

from netwright.deploy.graph import Graph, Segments, check, optimise, run, split

X = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Convolutions around self-attention over pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.after = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.before(x)
        tokens = y.flatten(2).transpose(1, 2)
        attended = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        z = y + attended.transpose(1, 2).reshape(y.shape)
        return self.after(z), y


def assert_same(module: nn.Module, *inputs: Tensor) -> Segments:
    module = module.eval()
    found = split(module, inputs)
    for graph in found.graphs:
        check(graph)
        check(optimise(graph))
    call = found.compile(lambda graph: lambda values: run(graph, values, dtype=torch.float32))
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(module(*inputs))
    torch.testing.assert_close(call(inputs), expected, rtol=1e-4, atol=1e-5)
    return found


def kinds(found: Segments) -> list[str]:
    return ["graph" if isinstance(part.body, Graph) else "torch" for part in found.parts]


def test_attention_between_convolutions() -> None:
    torch.manual_seed(0)
    found = assert_same(fill(Attention(), 1), X)
    assert kinds(found)[0] == kinds(found)[-1] == "graph"
    assert "torch" in kinds(found)
    assert {node.operator for node in found.unsupported} == {"aten.scaled_dot_product_attention.default"}


def test_a_network_that_fits_is_one_graph() -> None:
    torch.manual_seed(0)
    assert kinds(assert_same(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), X)) == ["graph"]


def test_a_network_that_does_not_fit_at_all_is_left_to_torch() -> None:
    assert kinds(assert_same(Call(lambda x: x.cumsum(1).relu()), X)) == ["torch"]


def test_branches_and_tuples_across_the_cut() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)
            self.register_buffer("scale", torch.rand(4, 1, 1))

        def forward(self, x: Tensor) -> list[Tensor]:
            left, right = x.chunk(2, 1)
            values, places = self.a(left).sort(1)
            chosen = values * torch.where(places > 1, 1.0, -1.0) * self.scale
            return [self.b(chosen) + right, torch.ones(3), x, chosen.mean((2, 3))]

    torch.manual_seed(0)
    found = assert_same(Branches(), X)
    assert len(found.constants) == 1
    assert kinds(found) == ["graph", "torch", "graph"]


def test_operators_without_work_are_not_worth_a_graph() -> None:
    class Thin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv((x.cumsum(1).relu() + 1).cumsum(2))

    torch.manual_seed(0)
    assert kinds(assert_same(Thin(), X)) == ["torch", "graph"]


def test_an_output_in_an_order_no_graph_can_hold() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).transpose(0, 1)

    torch.manual_seed(0)
    assert kinds(assert_same(Swapped(), X)) == ["graph", "torch"]
