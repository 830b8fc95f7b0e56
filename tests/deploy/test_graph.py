"""The whole way from a module to an optimised graph, against float64 eager."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from netwright.deploy.graph import capture, check, optimise, run
from netwright.nn.mbconv import mobilenet_v2_32
from netwright.nn.resnet import resnet18_cifar


def eager(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        output = copy.deepcopy(module).eval().double()(*(x.double() for x in inputs))
    return torch.utils._pytree.tree_leaves(output)


@pytest.mark.parametrize("make", [resnet18_cifar, mobilenet_v2_32])
def test_our_networks_become_convolutions_alone(make) -> None:
    torch.manual_seed(0)
    module, x = make().eval(), torch.randn(2, 3, 32, 32)
    graph = capture(module, x)
    check(graph)
    small = optimise(graph, precision=np.float64)
    check(small)
    assert {node.op.name for node in small} == {"conv", "adaptive_pool", "reshape", "linear"}
    for result in (run(graph, [x]), run(small, [x])):
        torch.testing.assert_close(result, eager(module, x), rtol=1e-10, atol=1e-10)
