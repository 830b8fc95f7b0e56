"""Width search: how many channels each layer of a network needs, by RARTS on a scale for each channel.

Xue, Qi and Xin, "RARTS: An Efficient First-Order Relaxed Architecture Search Method", IEEE Access 2022,
arXiv:2008.03901, doi:10.1109/ACCESS.2022.3185095.

    min over y, w, alpha of  L_val(y, alpha) + lambda L_train(w, alpha) + beta/2 ||y - w||^2 + mu ||alpha||_1

alpha are the gates of :mod:`netwright.compress.channels`; their step is proximal, so channels end at exactly zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from netwright.compress.channels import ProximalSGD, add_gates, channel_scales, gates
from netwright.results import Result, new_axes
from netwright.search.relaxed_split import RelaxedSplit
from netwright.search.searcher import Searcher
from netwright.search.stages import Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from netwright.search.objective import Objective


@dataclass(frozen=True)
class Widths(Result):
    """Channels that are not zero.

    Attributes:
        channels: Their number, by the name of the gate.
        total: All channels, by the same names.
    """

    channels: dict[str, int]
    total: dict[str, int]

    def __str__(self) -> str:
        return ", ".join(f"{name} {kept} of {self.total[name]}" for name, kept in self.channels.items())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Share of the channels kept in each layer."""
        ax = new_axes(ax)
        ax.bar(list(self.channels), [kept / self.total[name] for name, kept in self.channels.items()])
        ax.set_ylabel("share of channels kept")
        ax.tick_params(axis="x", rotation=90)
        return ax


class GatedNetwork(nn.Module):
    """A network as a supernet of its own narrower versions: gates are the architecture, the rest are weights.

    Args:
        network: Gates are added in place where there are none; see :func:`netwright.compress.channels.add_gates`.

    Raises:
        ValueError: If there is no batch norm to gate.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network if gates(network) else add_gates(network)

    def forward(self, x: Any) -> Any:
        """What the network gives."""
        return self.network(x)

    @property
    def arch(self) -> dict[str, nn.Parameter]:
        """alpha by the name of the gate."""
        return {name: gate.alpha for name, gate in gates(self.network).items()}

    def arch_parameters(self) -> list[nn.Parameter]:
        """Every alpha."""
        return list(self.arch.values())

    def weight_parameters(self) -> list[nn.Parameter]:
        """All other parameters."""
        alphas = {id(alpha) for alpha in self.arch.values()}
        return [parameter for parameter in self.parameters() if id(parameter) not in alphas]

    def derive(self) -> Widths:
        """The channels that are not zero now."""
        scales: dict[str, Tensor] = channel_scales(self.network)
        return Widths({n: int((s > 0).sum()) for n, s in scales.items()}, {n: len(s) for n, s in scales.items()})


class WidthSearch(Searcher):
    """Trains a network and the scales of its channels together, on both halves of the data.

    What it leaves is ``supernet.network``, whose dead channels :func:`netwright.compress.channels.prune_channels` takes
    away; it should be fine-tuned then. Defaults are netwright's, since the paper's could not be checked.

    Args:
        network: Any network with batch norms; changed in place.
        lam, beta: As for :class:`netwright.search.rarts.RARTS`.
        l1: Strength mu of the penalty on the scales, >= 0.
        objective: Loss of both parts; cross-entropy by default. A penalty in it has a function of the gated network as
            its cost: there are no operations for a table to price.
        epochs: Epochs of the search.
        lr, lr_min: Learning rate of the weights at the start and at the end of a cosine.
        weight_decay: Weight decay of the weights.
        alpha_lr: Learning rate of the scales.
        fused: As for RARTS.
        **options: ``momentum`` and ``clip`` of :class:`netwright.search.searcher.Searcher`.

    Raises:
        ValueError: If a value is out of range, the network has no batch norm, or the objective prices operations.
        TypeError: If an argument is unknown or has no meaning for widths, such as ``selector``.

    Example:
        >>> import torch
        >>> from netwright.nn.convnet import SmallConvNet
        >>> batch = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> search = WidthSearch(SmallConvNet((4, 8), 0, 3, 1), l1=30.0, epochs=1)
        >>> print(search.search([batch], [batch], seed=0).genotype)
        features.1.gate 0 of 4, features.5.gate 0 of 8
    """

    settled: ClassVar[Mapping[str, str]] = {
        "method": "the step is RelaxedSplit",
        "stages": "it has one; see epochs, lr, lr_min and weight_decay",
        "selector": "widths are read off the gates: a channel is left where its gate is not zero",
        "alpha_betas": "gates move by proximal steps, not by Adam's",
        "alpha_weight_decay": "gates are penalised by l1",
    }

    def __init__(
        self,
        network: nn.Module,
        lam: float = 1.0,
        beta: float = 1e-2,
        l1: float = 1e-2,
        objective: Objective | None = None,
        *,
        epochs: int = 20,
        lr: float = 0.1,
        lr_min: float = 0.0,
        weight_decay: float = 3e-4,
        alpha_lr: float = 0.05,
        fused: bool = True,
        **options: Any,
    ):
        supernet: Any = GatedNetwork(network)
        super().__init__(
            supernet,
            objective=objective,
            method=RelaxedSplit(lam, beta, fused=fused),
            stages=[Stage("search", epochs, lr, lr_min, weight_decay)],
            **options,
        )
        self.a_opt = ProximalSGD(supernet.arch_parameters(), lr=alpha_lr, l1=l1)

    def config(self) -> dict[str, Any]:
        """The settings, as plain values."""
        return super().config() | {"l1": self.a_opt.param_groups[0]["l1"]}
