"""Reordering, reshaping and selecting against float64 eager: exact, since no number changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import Call, assert_captured
from torch import Tensor, nn

from netwright.deploy.graph import UnsupportedOperator, capture

X = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(0))


def names(function: Callable[..., Tensor], *inputs: Tensor) -> list[str]:
    return [node.op.name for node in assert_captured(Call(function), *inputs)]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).relu(), ["activate"]),
        (lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2), ["activate"]),
        (lambda x: x.flatten(1), ["reshape"]),
        (lambda x: x.view(2, 3, 2, 4, 5).transpose(1, 2).reshape(2, 6, 4, 5), ["channels"]),
        (lambda x: nn.functional.channel_shuffle(x, 2), ["channels"]),
        (lambda x: x[:, 1:5:2], ["channels"]),
        (lambda x: x[:, [3, 3, 0]], ["channels"]),
        (lambda x: x.index_select(1, torch.tensor([5, 0])), ["channels"]),
        (lambda x: x.flip(1), ["channels"]),
        (lambda x: x.narrow(1, 2, 3), ["channels"]),
        (lambda x: x[:, :, 1:3], ["pad"]),
        (lambda x: x[:, :, -3:, 2:], ["pad", "pad"][:1]),
        (lambda x: x[:, :, ::2, ::3], ["conv"]),
        (lambda x: x.reshape(2, 6, 20).reshape(2, 6, 2, 10), ["reshape"]),
        (lambda x: x.repeat(1, 2, 1, 1), ["channels"]),
        (lambda x: x.unflatten(1, (2, 3)).flatten(1, 2).squeeze(), []),
        (lambda x: x.transpose(2, 3), ["reshape", "channels", "reshape"]),
        (lambda x: x.flatten(2).transpose(1, 2), ["reshape", "channels", "reshape"]),
        (lambda x: x.chunk(2, dim=1)[1].relu() + x.split([2, 4], dim=1)[0].sum(1, keepdim=True), None),
        (lambda x: torch.stack(x.unbind(1)[::-1], dim=1), None),
        (lambda x: x.reshape(2, 3, 40)[:, 1, 3:7], None),
        (lambda x: x.permute(0, 3, 1, 2)[:, 1:3].flip(2, 3), None),
        (lambda x: x.expand(2, 6, 4, 5) + x[:, :, :1].expand(-1, -1, 4, -1), None),
        (lambda x: x + torch.ones_like(x) - torch.full_like(x, 2.0) + x.new_zeros(x.shape) + x.new_ones(5), None),
        (lambda x: x + x.new_full((6, 1, 1), 3.0), None),
        (lambda x: nn.functional.dropout(x, 0.5, training=False).clone().to(x.dtype) + 1, None),
    ],
)
def test_movement(function: Callable[[Tensor], Tensor], expected: list[str] | None) -> None:
    found = names(function, X)
    assert expected is None or found == expected


def test_channels_last_layers_become_operations_on_channels() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x.permute(0, 2, 3, 1))
            return x + self.down(nn.functional.gelu(self.up(y))).permute(0, 3, 1, 2)

    torch.manual_seed(0)
    graph = assert_captured(Mixer(), X)
    assert [node.op.name for node in graph] == ["layer_norm", "conv", "conv"]
    assert len(graph.nodes[-1].inputs) == 2


@pytest.mark.parametrize("function", [lambda x: x.transpose(0, 1), lambda x: x[:1], lambda x: x.reshape(4, 3, 4, 5)])
def test_the_batch_stays_whole(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedOperator, match="batch"):
        capture(Call(lambda x: nn.functional.avg_pool2d(function(x), 2)), X)


def test_conversion_to_another_type_is_refused() -> None:
    with pytest.raises(UnsupportedOperator, match=r"converts to torch\.float64"):
        capture(Call(lambda x: x.double().relu().float()), X)


def test_dropout_that_stays_on_is_refused() -> None:
    assert names(lambda x: nn.functional.dropout(x, 0.0, training=True) * 2, X) == ["affine"]
    with pytest.raises(UnsupportedOperator, match="draws random numbers"):
        capture(Call(lambda x: nn.functional.dropout(x, 0.5, training=True)), X)


def test_of_one_picture_the_batch_axis_may_vanish() -> None:
    x = X[:1]
    assert_captured(Call(lambda x: x[0].permute(1, 2, 0).flatten()), x)
    assert_captured(Call(lambda x: nn.functional.max_pool2d(x.squeeze(0), 2)), x)
