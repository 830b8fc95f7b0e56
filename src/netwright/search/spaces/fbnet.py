"""FBNet's space: 22 layers of a fixed macro-architecture, each with one of nine blocks, and the networks found in it.

Wu et al., "FBNet: Hardware-Aware Efficient ConvNet Design via Differentiable Neural Architecture Search", CVPR 2019,
arXiv:1812.03443; layers of the published networks as in the authors' model definitions. Blocks of expansion 1 keep
their first 1x1 convolution. Multiply-adds at 224x224 of the networks so built: A 249.9 M, B 306.2 M, C 385.0 M.
"""

from __future__ import annotations

from collections.abc import Sequence

from netwright.search.genotype import ChoiceGenotype
from netwright.search.spaces.chain import SKIP, Block, Chain, Stage
from netwright.search.spaces.choices import ChoiceSpace

FBNET_MACRO = (
    Stage(16, 1, 1),
    Stage(24, 4, 2),
    Stage(32, 4, 2),
    Stage(64, 4, 2),
    Stage(112, 4, 1),
    Stage(184, 4, 2),
    Stage(352, 1, 1),
)
"""Width, layers and stride of the stages."""

FBNET_BLOCKS = ("k3_e1", "k3_e1_g2", "k3_e3", "k3_e6", "k5_e1", "k5_e1_g2", "k5_e3", "k5_e6")
"""The blocks besides ``skip``."""


def fbnet_space(
    macro: Sequence[Stage] = FBNET_MACRO,
    blocks: Sequence[str] = FBNET_BLOCKS,
    *,
    name: str | None = None,
    stem: int = 16,
    stem_stride: int = 2,
    head: int | None = 1984,
    skip_projection: bool = False,
    shape: tuple[int, int] = (64, 64),
) -> ChoiceSpace:
    """A chain with FBNet's blocks.

    Args:
        macro: The stages.
        blocks: Names of the blocks that a layer chooses among, besides ``skip``.
        name: Name of the space, which its genotypes carry; by default ``"fbnet"`` for the published space and
            ``"fbnet-own"`` for any other.
        stem: Width of the 3x3 convolution that comes first.
        stem_stride: Its stride.
        head: Width of the 1x1 convolution before the classifier, None for none.
        skip_projection: Whether layers that change width or resolution have a ``skip`` too: a 1x1 convolution with a
            batch norm. Otherwise such layers do not offer it.
        shape: Height and width for the check of shapes.

    Raises:
        ValueError: If a value is out of range, or the name is no string.

    Example:
        >>> fbnet_space(skip_projection=True).size == 9**22
        True
    """
    chain = Chain(
        stem, tuple(macro), tuple(blocks), stem_stride=stem_stride, head=head, activation="ReLU", keep_expansion=True,
        skip_projection=skip_projection,
    )  # fmt: skip
    if name is None:
        name = "fbnet" if (chain, shape) == (FBNET.network, FBNET.shape) else "fbnet-own"
    return ChoiceSpace(name, chain, shape)


FBNET = fbnet_space(name="fbnet")
"""The published space."""

FBNET_SMALL_HEAD = fbnet_space(name="fbnet-1504", head=1504)
"""The space with the narrower head of FBNet-A."""


def _published(layers: str, space: ChoiceSpace) -> ChoiceGenotype:
    """A genotype from ``kernel,expansion[,groups]`` or ``s`` a layer."""
    names = [SKIP if layer == "s" else Block(*map(int, layer.split(","))).name for layer in layers.split()]
    return ChoiceGenotype(tuple((f"layer_{i}", name) for i, name in enumerate(names)), space=space.name)


FBNET_A = _published(
    "s  3,3 3,1 s s  5,6 3,3 5,1 3,3  5,6 5,3 5,1,2 5,6  3,6 5,1,2 5,3 3,1,2  5,6 5,6 5,3 5,6  5,6", FBNET_SMALL_HEAD
)
"""FBNet-A (arXiv:1812.03443)."""

FBNET_B = _published(
    "3,1  3,6 5,1 3,1 3,1  5,6 5,3 3,6 5,6  5,6 5,6 s 5,3  5,6 3,1 5,1 5,3  5,6 5,1 5,6 5,6  3,6", FBNET
)
"""FBNet-B (arXiv:1812.03443)."""

FBNET_C = _published(
    "3,1  3,6 s 3,1 3,1  5,6 5,3 5,6 3,6  5,6 5,3 5,6 5,6  5,6 5,6 5,6 5,3  5,6 5,6 5,6 5,6  3,6", FBNET
)
"""FBNet-C (arXiv:1812.03443)."""
