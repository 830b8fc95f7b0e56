"""The spaces of ProxylessNAS and the networks found in them.

Cai, Zhu and Han, "ProxylessNAS: Direct Neural Architecture Search on Target Task and Hardware", ICLR 2019,
arXiv:1812.00332.

    stem 3x3/2 -> MBConv k3 e1 -> 21 layers, each MBConv of k in {3, 5, 7} and e in {3, 6}, or none -> 1x1 -> classifier

A layer may be left out where width and resolution stay. The networks for a processor, a GPU and a phone have widths of
their own, so each has a space of its own: the same choices.
"""

from __future__ import annotations

from collections.abc import Sequence

from netwright.search.spaces.chain import Block, Chain, Stage, published
from netwright.search.spaces.choices import ChoiceSpace

DEPTH, STRIDE = (4, 4, 4, 4, 4, 1), (2, 2, 2, 1, 2, 1)
BLOCKS = tuple(Block(kernel, expansion).name for kernel in (3, 5, 7) for expansion in (3, 6))


def _space(name: str, stem: int, first: int, width: Sequence[int], head: int) -> ChoiceSpace:
    stages = [Stage(first, 1, 1, Block(3, 1).name)]
    stages += [Stage(*values) for values in zip(width, DEPTH, STRIDE, strict=True)]
    chain = Chain(stem, tuple(stages), BLOCKS, stem_stride=2, head=head, bn_eps=1e-3)
    return ChoiceSpace(name, chain, shape=(64, 64))


PROXYLESS = _space("proxylessnas", 32, 16, (24, 40, 80, 96, 192, 320), 1280)
"""The space of the paper's search on ImageNet."""

PROXYLESS_CPU = _space("proxylessnas-cpu", 40, 24, (32, 48, 88, 104, 216, 360), 1432)
PROXYLESS_GPU = _space("proxylessnas-gpu", 40, 24, (32, 56, 112, 128, 256, 432), 1728)
PROXYLESS_MOBILE = _space("proxylessnas-mobile", 32, 16, (32, 40, 80, 96, 192, 320), 1280)
PROXYLESS_MOBILE14 = _space("proxylessnas-mobile14", 48, 24, (40, 56, 112, 136, 256, 448), 1792)
SPACES = (PROXYLESS, PROXYLESS_CPU, PROXYLESS_GPU, PROXYLESS_MOBILE, PROXYLESS_MOBILE14)

_MOBILE = "53 33 - - | 73 33 53 53 | 76 53 53 53 | 56 53 53 53 | 76 76 73 73 | 76"

ProxylessCPU = published(PROXYLESS_CPU, "36 33 33 33 | 36 33 33 53 | 36 - - 33 | 56 33 33 33 | 56 53 53 33 | 56")
"""For a processor (Xeon E5-2640 v4)."""

ProxylessGPU = published(PROXYLESS_GPU, "53 - - - | 73 - - 33 | 76 - - 53 | 56 - 33 53 | 76 76 76 56 | 76")
"""For a GPU (V100)."""

ProxylessMobile = published(PROXYLESS_MOBILE, _MOBILE)
"""For a phone (Pixel 1)."""

ProxylessMobile14 = published(PROXYLESS_MOBILE14, _MOBILE)
"""The network for a phone, 1.4 times as wide."""
