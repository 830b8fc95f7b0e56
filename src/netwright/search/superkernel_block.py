"""An inverted residual block whose depthwise convolution is a superkernel.

Stamoulis et al., "Single-Path NAS", ECML-PKDD 2019, arXiv:1904.02877; the superkernel W is explained in
:mod:`netwright.search.superkernel`.

    y = x + d50 project(mask(relu(bn(W * relu(bn(expand x))))))

W alone is the paper's. The factor d50 and the mask of the channels that are off are not: after the norm, a channel
whose kernel is zero still has its shift beta, so without them a layer that is skipped adds a constant and channels that
are off leak relu(beta) into the projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from netwright.nn.mbconv import MBConv
from netwright.search.spaces.chain import SKIP, Block
from netwright.search.superkernel import Decided, Scale, SuperKernelDepthwise

if TYPE_CHECKING:
    from netwright.search.supernet import OperationKey

Candidates = Mapping[str, Callable[[], nn.Module]]


def sides(key: str, names: Iterable[str]) -> tuple[list[int], list[int]]:
    """Kernels and expansions of the blocks that a superkernel holds, ascending.

    Args:
        key: Name of the layer.
        names: Names of its candidates: all pairs of kernels and expansions, and maybe ``skip``.

    Raises:
        ValueError: If they are no such pairs.

    Example:
        >>> sides("layer_0", ("k3_e2", "k3_e4", "k5_e2", "k5_e4", "skip"))
        ([3, 5], [2, 4])
    """
    blocks = [Block.of(name) for name in names if name != SKIP]
    kernels = sorted({block.kernel for block in blocks})
    expansions = sorted({block.expansion for block in blocks})
    pairs = {(kernel, expansion, 1) for kernel in kernels for expansion in expansions}
    if not blocks or {tuple(block) for block in blocks} != pairs:
        raise ValueError(f"choice {key!r} must offer all pairs of kernels and expansions, got {', '.join(names)}")
    return kernels, expansions


class SuperKernelMBConv(nn.Module):
    """An inverted residual block whose depthwise convolution is a superkernel.

    Args:
        candidates: What makes each block by its name, and the identity as ``skip`` where the layer may go: all pairs of
            some kernels and some expansions.
        key: Name of the layer.
        stride: That of the candidates.
        kind: As for :class:`~netwright.search.supernet.Choice`.
        exact_skip: Whether the branch of a skipped layer is multiplied by 0.
        exact_mask: Whether channels that are off are masked before the projection.
        squared, scale: As for :class:`~netwright.search.superkernel.SuperKernelDepthwise`.
        thresholds: The parameter that holds the thresholds.

    Attributes:
        names: The candidates' names.
        second_order: False: outputs go in steps of norms and thresholds; see :class:`~netwright.search.supernet.Gate`.
        decided: What the next pass is to use; the layer's own decision if None.

    Raises:
        ValueError: If the candidates are no such pairs.
    """

    second_order = False

    def __init__(
        self,
        candidates: Candidates,
        *,
        key: str,
        stride: int,
        kind: str,
        exact_skip: bool,
        exact_mask: bool,
        squared: bool,
        scale: Scale,
        thresholds: nn.ParameterDict,
    ) -> None:
        super().__init__()
        kernels, expansions = sides(key, candidates)
        largest = candidates[Block(kernels[-1], expansions[-1]).name]()
        if not isinstance(largest, MBConv):
            raise ValueError(f"choice {key!r} must be among inverted residual blocks, got {type(largest).__name__}")
        skippable = SKIP in candidates
        if skippable and (largest.shortcut is None or not isinstance(candidates[SKIP](), nn.Identity)):
            raise ValueError(f"choice {key!r} must be skipped by the identity, got another module")
        *before, depthwise, norm, activation, project, last = largest.conv
        assert isinstance(depthwise, nn.Conv2d)
        assert isinstance(project, nn.Conv2d)
        thresholds[key] = nn.Parameter(torch.zeros(len(kernels) - 1 + len(expansions)))
        self.before = nn.Sequential(*before)
        self.superkernel = SuperKernelDepthwise(
            depthwise.in_channels, kernels, [e / expansions[-1] for e in expansions], skippable, depthwise.stride[0],
            squared, scale=scale, weight=depthwise.weight, thresholds=thresholds[key],
        )  # fmt: skip
        self.norm, self.activation, self.project, self.last = norm, activation, project, last
        self.shortcut = largest.shortcut
        self.key, self.stride, self.kind, self.names, self.candidates = key, stride, kind, tuple(candidates), candidates
        self.skippable, self.exact_skip, self.exact_mask = skippable, exact_skip, exact_mask
        self.expansions = tuple(expansions)
        self.decided: Decided | None = None

    def decision(self) -> str:
        """Name of the candidate that is left.

        Raises:
            FloatingPointError: If a threshold or a weight is not finite.
        """
        found = self.superkernel.decision()
        if found is None:
            return SKIP
        kernel, ratio = found
        return Block(kernel, self.expansions[self.superkernel.ratios.index(ratio)]).name

    def needs(self, name: str) -> list[bool]:
        """Which indicators a candidate needs: of kernels but the first, then of ratios."""
        if name == SKIP:
            return [False] * len(self.superkernel.thresholds)
        block = Block.of(name)
        return [k <= block.kernel for k in self.superkernel.kernels[1:]] + [
            e <= block.expansion for e in self.expansions
        ]

    def mixing_weights(self, decided: Decided) -> Float[Tensor, "candidates"]:
        """The weight of each candidate: 1 for the one that is left, else 0, differentiable in the indicators."""
        end = decided.rings.new_zeros(1)
        rings, channels = (torch.cat([part, end]) for part in (decided.rings, decided.channels))
        each = (rings[:-1] - rings[1:])[:, None] * (channels[:-1] - channels[1:])
        kernels = self.superkernel.kernels
        return torch.stack(
            [
                1 - channels[0]
                if name == SKIP
                else each[kernels.index(Block.of(name).kernel), self.expansions.index(Block.of(name).expansion)]
                for name in self.names
            ]
        )

    def keys(self, shape: tuple[int, int, int], c_out: int) -> dict[str, OperationKey]:
        """The key in cost tables of every candidate but the identity.

        Args:
            shape: (C, H, W) of the layer's input.
            c_out: Channels of its output.
        """
        c_in, height, width = shape
        return {name: (name, c_in, c_out, height, width, self.stride, self.kind) for name in self.names if name != SKIP}

    def rows(self, costs: Sequence[float]) -> tuple[list[float], list[float]]:
        """What the model of the layer's runtime needs; as :meth:`SuperKernelDepthwise.rows`.

        Args:
            costs: The cost of every candidate, in their order.

        Raises:
            ValueError: If one of them is not positive and finite.
        """
        times = {}
        for name, cost in zip(self.names, costs, strict=True):
            if name != SKIP:
                block = Block.of(name)
                times[block.kernel, self.superkernel.ratios[self.expansions.index(block.expansion)]] = cost
        try:
            return self.superkernel.rows(times)
        except ValueError as error:
            raise ValueError(f"{error}, layer {self.key!r}") from None

    def forward(self, x: Float[Tensor, "batch c_in height width"]) -> Float[Tensor, "batch c_out out_height out_width"]:
        """The block with what is left of its superkernel."""
        decided = self.superkernel.decide() if self.decided is None else self.decided
        y = self.activation(self.norm(self.superkernel.convolve(self.before(x), decided)))
        weight = self.project.weight
        if self.exact_mask:
            # To mask columns of the projection is to mask its input, without a pass over that.
            weight = weight * (self.superkernel.groups @ decided.masks)[:, None, None]
        y = self.last(functional.conv2d(y, weight))
        if self.shortcut is None:
            return y
        if self.skippable and self.exact_skip:
            return torch.addcmul(self.shortcut(x), y, decided.channels[0])
        return self.shortcut(x) + y

    def extra_repr(self) -> str:
        """The key and the candidates."""
        return f"key={self.key!r}, candidates={self.names}"
