"""Pruning whole channels: a scale for each channel, pushed to exact zeros, and the narrower network that is left.

Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017, arXiv:1708.06519, scale by
batch norm's own gamma; Xue, Qi and Xin, "RARTS", IEEE Access 2022, arXiv:2008.03901, search widths as an architecture:

    y_c = alpha_c BN_c(x),    alpha <- soft(alpha - eta grad, eta mu),    soft(z, s) = sign(z) max(|z| - s, 0)

The proximal step makes zeros exact. What a network reads of a channel that is zero can be left out without a change of
its output; :func:`prune_channels` does so on any network that :mod:`torch.fx` can trace, sums and concatenations of
branches included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.compress.coupling import Coupling
from netwright.cost import count

_M = TypeVar("_M", bound=nn.Module)


def soft_threshold(x: Float[Tensor, " *shape"], s: float) -> Float[Tensor, " *shape"]:
    """sign(x) max(|x| - s, 0): the proximal operator of s ||x||_1.

    Raises:
        ValueError: If ``s`` is negative.

    Example:
        >>> soft_threshold(torch.tensor([-2.0, -0.5, 0.0, 1.5]), 1.0)
        tensor([-1.0000, -0.0000,  0.0000,  0.5000])
    """
    if not s >= 0:
        raise ValueError(f"s must be >= 0, got {s}")
    return x.sign() * (x.abs() - s).clamp_min(0)


class ProximalSGD(torch.optim.SGD):
    """SGD on a loss plus ``l1`` times the sum of absolute values, with exact zeros: a step, then soft thresholding.

    Args:
        params: Parameters, as for every optimiser.
        lr: Learning rate; the threshold is ``lr`` times ``l1``.
        l1: Strength mu of the penalty, >= 0; a group may have its own.
        momentum: Momentum, in [0, 1).

    Raises:
        ValueError: If ``l1`` is negative.

    Example:
        >>> alpha = nn.Parameter(torch.tensor([1.0, 0.05]))
        >>> optimizer = ProximalSGD([alpha], lr=0.1, l1=1.0)
        >>> alpha.grad = torch.zeros(2)
        >>> optimizer.step()
        >>> alpha.tolist()
        [0.8999999761581421, 0.0]
    """

    def __init__(self, params: Iterable[Any], lr: float, l1: float, momentum: float = 0.0):
        if not l1 >= 0:
            raise ValueError(f"l1 must be >= 0, got {l1}")
        super().__init__(params, lr=lr, momentum=momentum)
        for group in self.param_groups:
            group.setdefault("l1", l1)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; parameters without a gradient are left alone."""
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.copy_(soft_threshold(parameter, group["lr"] * group["l1"]))
        return loss


class ChannelGate(nn.Module):
    """Scales each channel: y_c = alpha_c x_c.

    Args:
        channels: Number of channels.

    Raises:
        ValueError: If ``channels`` is below 1.

    Example:
        >>> gate = ChannelGate(2)
        >>> gate.alpha.data[1] = 0.0
        >>> gate(torch.ones(1, 2, 1, 1)).flatten().tolist()
        [1.0, 0.0]
    """

    def __init__(self, channels: int):
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be >= 1, got {channels}")
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Float[Tensor, "batch channels *size"]) -> Float[Tensor, "batch channels *size"]:
        """The scaled input."""
        return x * self.alpha.view(1, -1, *[1] * (x.ndim - 2))

    def extra_repr(self) -> str:
        """The number of channels."""
        return f"{len(self.alpha)}"


class GatedNorm(nn.Module):
    """A batch norm whose gamma is fixed to 1, and the gate that scales in its place; the function is the same.

    Without that, scale would slip between gamma and alpha and the penalty on alpha would press on nothing.

    Args:
        norm: The batch norm; its parameters are taken over.

    Raises:
        ValueError: If it has no gamma or no beta.
    """

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        if norm.weight is None or norm.bias is None:
            raise ValueError("norm must have a gamma and a beta (affine=True), got none")
        self.norm, self.gate = norm, ChannelGate(norm.num_features).to(norm.weight)
        with torch.no_grad():
            gamma = norm.weight.detach().clone()
            self.gate.alpha.copy_(gamma)
            norm.bias.copy_(torch.where(gamma == 0, 0.0, norm.bias / gamma))
            norm.weight.fill_(1.0)
        norm.weight.requires_grad_(False)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Normalises, then scales."""
        return self.gate(self.norm(x))

    def fold(self) -> nn.BatchNorm2d:
        """The batch norm with alpha in its gamma and beta, trainable again."""
        alpha = self.gate.alpha.detach()
        with torch.no_grad():
            self.norm.weight.mul_(alpha)
            self.norm.bias.mul_(alpha)
        self.norm.weight.requires_grad_(True)
        return self.norm


def add_gates(module: _M) -> _M:
    """Puts a gate behind every 2-d batch norm, in place; the function of the network stays.

    Raises:
        ValueError: If there is no batch norm to gate, or gates are there already.

    Example:
        >>> net = add_gates(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
        >>> [name for name, _ in net.named_parameters()]
        ['0.weight', '0.bias', '1.norm.weight', '1.norm.bias', '1.gate.alpha']
    """
    if gates(module):
        raise ValueError(f"module must have no gates yet, got {', '.join(gates(module))}")
    found = [name for name, part in module.named_modules() if isinstance(part, nn.BatchNorm2d) and name]
    if not found:
        raise ValueError(f"module must hold a BatchNorm2d to gate, got {type(module).__name__} without one")
    for name in found:
        norm = module.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm2d)
        module.set_submodule(name, GatedNorm(norm))
    return module


def gates(module: nn.Module) -> dict[str, ChannelGate]:
    """Every gate by its name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, ChannelGate)}


def channel_scales(module: nn.Module) -> dict[str, Tensor]:
    """|alpha| of every gate by name; of a network without gates, |gamma| of every batch norm.

    Raises:
        ValueError: If there is neither.

    Example:
        >>> {name: len(s) for name, s in channel_scales(nn.Sequential(nn.BatchNorm2d(3))).items()}
        {'0': 3}
    """
    scales = {name: gate.alpha.detach().abs() for name, gate in gates(module).items()}
    if not scales:
        norms = {n: part for n, part in module.named_modules() if isinstance(part, nn.BatchNorm2d) and part.affine}
        scales = {name: norm.weight.detach().abs() for name, norm in norms.items()}
    if not scales:
        raise ValueError(f"module must hold gates or affine batch norms, got {type(module).__name__} without either")
    return scales


def prune_channels(module: _M, threshold: float = 0.0) -> _M:
    """A narrower copy without the channels whose scale is at most ``threshold``; gates are folded into batch norms.

    A channel goes where *all* that read it would read zero: of branches that are added, a channel goes when it goes in
    every branch. With gates at ``threshold=0`` the copy gives the same output; above it, that of the network whose
    pruned gates are set to zero. Without gates the batch norms' gammas decide, and what their betas gave is lost, as in
    network slimming. Each layer keeps its strongest channel at least.

    Args:
        module: The network; it is not changed. :mod:`torch.fx` must be able to trace it.
        threshold: Largest scale that is pruned, >= 0.

    Raises:
        ValueError: If ``threshold`` is negative, there are no scales, or the network cannot be traced.

    Example:
        >>> net = add_gates(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)))
        >>> net[1].gate.alpha.data[:3] = 0.0
        >>> narrow = prune_channels(net)
        >>> narrow[0].out_channels, narrow[1], narrow[3].in_channels
        (1, BatchNorm2d(1, ...), 1)
    """
    if not threshold >= 0:
        raise ValueError(f"threshold must be >= 0, got {threshold}")
    scales = channel_scales(module)
    pruned = copy.deepcopy(module)
    Coupling(pruned, scales).narrow(threshold)
    for name, part in list(pruned.named_modules()):
        if isinstance(part, GatedNorm):
            pruned.set_submodule(name, part.fold())
    return pruned


def threshold_for(module: nn.Module, share: float, shape: Sequence[int]) -> float:
    """The smallest threshold at which :func:`prune_channels` leaves at most ``share`` of the multiply-adds.

    Args:
        module: The network.
        share: In (0, 1].
        shape: Shape of one input without the batch.

    Raises:
        ValueError: If ``share`` is outside (0, 1], or not reached with one channel a layer.

    Example:
        >>> net = add_gates(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)))
        >>> net[1].gate.alpha.data.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
        tensor([0.1000, 0.2000, 0.3000, 0.4000])
        >>> round(threshold_for(net, 0.5, (1, 8, 8)), 4)
        0.2
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    wanted = share * count(module, shape).macs

    def fits(threshold: float) -> bool:
        return count(prune_channels(module, threshold), shape).macs <= wanted

    values = [0.0, *torch.cat([s.double() for s in channel_scales(module).values()]).unique().tolist()]
    if not fits(values[-1]):
        raise ValueError(f"share must be reachable with one channel a layer, got {share}")
    low, high = -1, len(values) - 1  # values[high] fits, values[low] does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(values[middle]) else (middle, high)
    return values[high]
