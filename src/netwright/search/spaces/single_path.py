"""Single-Path NAS's space: the stages of MnasNet, each layer with kernel 3 or 5 and expansion 3 or 6, or left out.

Stamoulis et al., "Single-Path NAS: Designing Hardware-Efficient ConvNets in less than 4 Hours", ECML-PKDD 2019,
arXiv:1904.02877.

    stem 3x3/2 -> MBConv k3 e1 -> five stages of four layers -> MBConv k3 e6 -> 1x1 -> classifier

A layer may be left out where it is not the first of its stage.
"""

from __future__ import annotations

from collections.abc import Sequence

from netwright.search.spaces.chain import Block, Chain, Stage, published
from netwright.search.spaces.choices import ChoiceSpace

MNASNET_MACRO = (
    Stage(16, 1, 1, Block(3, 1).name),
    Stage(24, 4, 2),
    Stage(40, 4, 2),
    Stage(80, 4, 2),
    Stage(96, 4, 1),
    Stage(192, 4, 2),
    Stage(320, 1, 1, Block(3, 6).name),
)
"""Width, layers and stride of the stages; the first and the last are fixed blocks."""


def single_path_space(
    macro: Sequence[Stage] = MNASNET_MACRO,
    kernels: Sequence[int] = (3, 5),
    expansions: Sequence[int] = (3, 6),
    *,
    name: str | None = None,
    stem: int = 32,
    stem_stride: int = 2,
    head: int | None = 1280,
    shape: tuple[int, int] = (64, 64),
) -> ChoiceSpace:
    """A chain whose layers choose kernel and expansion, so that one superkernel holds a layer's candidates.

    Its superkernels are :class:`netwright.search.superkernel_supernet.SuperKernelSupernet`; ``space.supernet`` has a
    path for every candidate.

    Args:
        macro: The stages.
        kernels: Sides of the depthwise convolutions.
        expansions: Expansions.
        name: Name of the space, which its genotypes carry; by default ``"single-path"`` for the published space and
            ``"single-path-own"`` for any other.
        stem: Width of the 3x3 convolution that comes first.
        stem_stride: Its stride.
        head: Width of the 1x1 convolution before the classifier, None for none.
        shape: Height and width for the check of shapes.

    Raises:
        ValueError: If a value is out of range, or the name is no string.

    Example:
        >>> space = single_path_space(kernels=(3, 5, 7))
        >>> space.choices()["layer_1"], len(space.choices()["layer_2"])
        (('k3_e3', 'k3_e6', 'k5_e3', 'k5_e6', 'k7_e3', 'k7_e6'), 7)
    """
    blocks = tuple(Block(kernel, expansion).name for kernel in kernels for expansion in expansions)
    chain = Chain(
        stem, tuple(macro), blocks, skip_first=False, stem_stride=stem_stride, head=head, activation="ReLU",
        bn_eps=1e-3, bn_momentum=0.01,
    )  # fmt: skip
    if name is None:
        name = "single-path" if (chain, shape) == (SINGLE_PATH.network, SINGLE_PATH.shape) else "single-path-own"
    return ChoiceSpace(name, chain, shape)


SINGLE_PATH = single_path_space(name="single-path")
"""The published space."""


SINGLE_PATH_NET = published(SINGLE_PATH, "33 33 33 - | 56 33 33 33 | 56 33 33 33 | 56 53 53 53 | 56 56 56 56")
"""The network of the paper, found for a Pixel 1 (arXiv:1904.02877)."""
