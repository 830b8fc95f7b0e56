"""The exponential moving average of a network's weights, which changes more slowly than the network and errs less.

Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017, arXiv:1703.01780.

    w' <- decay w' + (1 - decay) w
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from netwright.nn.modes import in_mode


class WeightAverage:
    """Averaged parameters of a network, and its latest buffers.

    Buffers are copied, not averaged: running statistics of batch norm are averages already, and averaged weights with
    the statistics of long ago would be the classic fault.

    Args:
        module: Whose weights are averaged; it starts as a copy of them.

    Attributes:
        parameters: By name.
        buffers: By name.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> average = WeightAverage(net)
        >>> with torch.no_grad():
        ...     before, _ = net.weight.item(), net.weight.add_(1.0)
        >>> average.update(net, decay=0.9)
        >>> round(average.parameters["weight"].item() - before, 4)
        0.1
    """

    def __init__(self, module: nn.Module):
        self.parameters = {name: value.detach().clone() for name, value in module.named_parameters()}
        self.buffers = {name: value.detach().clone() for name, value in module.named_buffers()}
        self._fitting: list[int] = []  # the parameters whose shapes were compared last

    @torch.no_grad()
    def update(self, module: nn.Module, decay: float) -> None:
        """Moves the parameters towards the module's, all in one call, and copies the buffers.

        Raises:
            ValueError: If ``decay`` is outside [0, 1], or the module has other parameters.
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        current: list[Tensor] = list(module.parameters())
        averaged = list(self.parameters.values())
        if (present := [*map(id, current)]) != self._fitting:
            if [value.shape for value in current] != [value.shape for value in averaged]:
                raise ValueError(
                    f"module must have the {len(averaged)} parameters that are averaged, got {len(current)}"
                )
            self._fitting = present
        torch._foreach_lerp_(averaged, current, 1 - decay)
        if self.buffers:
            for name, value in module.named_buffers():
                self.buffers[name].copy_(value)

    @torch.no_grad()
    def predict(self, module: nn.Module, *inputs: Any) -> Any:
        """What the module answers with the averaged weights, in evaluation mode, without gradient.

        Weights and modes of the module are as before afterwards; a compiled module is run uncompiled.
        """
        with in_mode(module, False), torch.compiler.set_stance("force_eager"):
            return functional_call(module, {**self.parameters, **self.buffers}, inputs)

    def to(self, device: torch.device | str) -> WeightAverage:
        """Moves everything."""
        self.parameters = {name: value.to(device) for name, value in self.parameters.items()}
        self.buffers = {name: value.to(device) for name, value in self.buffers.items()}
        return self

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """For a checkpoint."""
        return {"parameters": dict(self.parameters), "buffers": dict(self.buffers)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes up what :meth:`state_dict` gave."""
        self.parameters = {name: value.clone() for name, value in state["parameters"].items()}
        self.buffers = {name: value.clone() for name, value in state["buffers"].items()}
        self._fitting = []
