"""The rows that a layer reads, times its weight, are what the layer gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from netwright.nn.patches import Patches
from netwright.seeding import stream


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 3, bias=False), (4, 5)),
        (nn.Linear(5, 3, bias=False), (4, 6, 5)),
        (nn.Conv1d(2, 4, 3, stride=2, padding=1, bias=False), (4, 2, 9)),
        (nn.Conv2d(4, 6, (3, 2), dilation=(2, 1), groups=2, bias=False), (3, 4, 8, 7)),
        (nn.Conv2d(4, 4, 3, padding="same", groups=4, padding_mode="reflect", bias=False), (3, 4, 6, 6)),
        (nn.Conv3d(1, 2, 2, bias=False), (2, 1, 4, 4, 4)),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2**22])
def test_rows_times_weight(layer, shape, chunk, monkeypatch):
    monkeypatch.setattr("netwright.nn.patches.CHUNK", chunk)
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64, generator=stream(0, "x"))
    patches = Patches.of_layer(layer)
    weight = layer.weight.reshape(patches.groups, layer.weight.shape[0] // patches.groups, -1)
    found = torch.cat([weight @ piece for piece in patches.of(x)], 2).flatten(0, 1)  # (outputs, examples and places)
    output = layer(x)
    expected = (
        output.reshape(-1, output.shape[-1]).T if isinstance(layer, nn.Linear) else output.transpose(0, 1).flatten(1)
    )
    assert torch.allclose(found, expected, atol=1e-12)
