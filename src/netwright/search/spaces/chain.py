"""Chains of inverted residual blocks: one choice of block a layer.

The spaces of Cai et al., "ProxylessNAS", ICLR 2019, arXiv:1812.00332, Wu et al., "FBNet", CVPR 2019, arXiv:1812.03443,
and Stamoulis et al., "Single-Path NAS", ECML-PKDD 2019, arXiv:1904.02877: a stem, stages of layers, a classifier. Every
layer chooses a block by name,

    k3_e6       MBConv with a 3x3 depthwise convolution and expansion 6
    k5_e1_g2    a 5x5 one, expansion 1, 1x1 convolutions in 2 groups with a channel shuffle
    skip        the identity, where width and resolution stay
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from netwright.checks import one_of
from netwright.search.genotype import ChoiceGenotype
from netwright.search.spaces.choices import ChoiceSpace, Choose

if TYPE_CHECKING:
    from torch import nn

SKIP = "skip"
_BLOCK = re.compile(r"k(\d+)_e(\d+)(?:_g(\d+))?")


class Block(NamedTuple):
    """An inverted residual block.

    Attributes:
        kernel: Side of the depthwise convolution.
        expansion: Width inside over the width of the input.
        groups: Groups of the 1x1 convolutions.
    """

    kernel: int
    expansion: int
    groups: int = 1

    @property
    def name(self) -> str:
        """Its name.

        Example:
            >>> Block(5, 1, 2).name, Block(3, 6).name
            ('k5_e1_g2', 'k3_e6')
        """
        return f"k{self.kernel}_e{self.expansion}" + (f"_g{self.groups}" if self.groups > 1 else "")

    @classmethod
    def of(cls, name: str) -> Block:
        """The block of a name.

        Raises:
            ValueError: If it is no block's name.

        Example:
            >>> Block.of("k3_e6")
            Block(kernel=3, expansion=6, groups=1)
        """
        found = _BLOCK.fullmatch(name)
        if found is None:
            raise ValueError(f"a block must be named like 'k3_e6' or 'k5_e1_g2', got {name!r}")
        return cls(int(found[1]), int(found[2]), int(found[3] or 1))


class Stage(NamedTuple):
    """Layers of one width.

    Attributes:
        channels: Width.
        layers: How many.
        stride: Of the first layer; the others have stride 1.
        block: A fixed block instead of choices, None for choices.
    """

    channels: int
    layers: int
    stride: int
    block: str | None = None


@dataclass(frozen=True)
class Chain:
    """What a chain is made of; as ``network`` of a :class:`~netwright.search.spaces.choices.ChoiceSpace` it builds it.

    Attributes:
        stem: Width of the 3x3 convolution that comes first.
        stages: The stages.
        blocks: Names of the blocks that a layer chooses among.
        skip: Whether a layer may be left out where width and resolution stay.
        skip_first: Whether that holds for the first layer of a stage too.
        stem_stride: Stride of the stem.
        head: Width of a 1x1 convolution before the classifier, None for none.
        activation: Name of a class of ``torch.nn``.
        bn_eps, bn_momentum: Of the batch norms.
        keep_expansion: Whether a block of expansion 1 keeps its first 1x1 convolution.
        dropout: Before the classifier, in [0, 1).
        skip_projection: Whether a layer that changes width or resolution may be left out too, for a 1x1 convolution
            with a batch norm.

    Raises:
        ValueError: If a number is out of range, or a block's name is none.
    """

    stem: int
    stages: tuple[Stage, ...]
    blocks: tuple[str, ...]
    skip: bool = True
    skip_first: bool = True
    stem_stride: int = 1
    head: int | None = None
    activation: str = "ReLU6"
    bn_eps: float = 1e-5
    keep_expansion: bool = False
    dropout: float = 0.0
    skip_projection: bool = False
    bn_momentum: float = 0.1

    def __post_init__(self) -> None:
        if self.stem < 1 or not self.stages:
            raise ValueError(f"stem must be >= 1 and stages at least one, got {self.stem} and {self.stages}")
        for stage in self.stages:
            if not isinstance(stage, Stage):
                raise ValueError(f"stages must be of Stage(channels, layers, stride), got {stage!r}")
        if len(set(self.blocks)) != len(self.blocks) or not self.blocks:
            raise ValueError(f"blocks must be different names, at least one, got {self.blocks}")
        for name in (*self.blocks, *(stage.block for stage in self.stages if stage.block)):
            Block.of(name)
        for stage in self.stages:
            if stage.channels < 1 or stage.layers < 1 or stage.stride not in (1, 2):
                raise ValueError(f"a stage must have channels and layers >= 1 and stride 1 or 2, got {stage}")

    def __call__(
        self,
        choose: Choose,
        in_channels: int,
        num_classes: int,
        *,
        channels: int | None = None,
        stem: str = "cifar",
        cells: int | None = None,
        drop_path: float = 0.0,
        auxiliary: bool = False,
    ) -> nn.Module:
        """The network.

        Args:
            choose: Gives the module of a layer that has a choice.
            in_channels: Channels of the images.
            num_classes: Number of classes.
            channels: Width of the stem; the other widths grow alike, rounded to multiples of 4.
            stem: ``cifar`` keeps the chain's own stride, ``strided`` doubles it, ``imagenet`` multiplies it by 4.
            cells: Must be the number of layers, or None.
            drop_path, auxiliary: Chains have neither: 0 and False.

        Raises:
            ValueError: If an option is out of range.
        """
        from torch import nn

        from netwright.nn.mbconv import MBConv

        strides = {"cifar": 1, "strided": 2, "imagenet": 4}
        one_of("stem", stem, strides)
        if cells not in (None, self.layers):
            raise ValueError(f"cells must be {self.layers}, the number of layers of the chain, or None, got {cells}")
        if drop_path or auxiliary:
            raise ValueError(f"a chain has no drop path and no auxiliary head, got {drop_path} and {auxiliary}")
        if channels is not None and channels < 1:
            raise ValueError(f"channels must be >= 1, got {channels}")
        scale = 1.0 if channels is None else channels / self.stem
        activation = getattr(nn, self.activation)

        def norm(width: int) -> nn.Module:
            return nn.BatchNorm2d(width, eps=self.bn_eps, momentum=self.bn_momentum)

        def mbconv(name: str, c_in: int, c_out: int, stride: int) -> nn.Module:
            block = Block.of(name)
            return MBConv(
                c_in, c_out, kernel_size=block.kernel, expansion=block.expansion, stride=stride, groups=block.groups,
                activation=activation, bn_eps=self.bn_eps, bn_momentum=self.bn_momentum,
                expand=True if self.keep_expansion else None,
            )  # fmt: skip

        width, before = _scaled(self.stem, scale), self.stem
        stride = self.stem_stride * strides[stem]
        layers: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(in_channels, width, 3, min(stride, 2), 1, bias=False), norm(width), activation())
        ]
        if stride > 2:
            layers.append(nn.MaxPool2d(3, stride // 2, padding=1))
        for number, (stage, index) in enumerate((s, i) for s in self.stages for i in range(s.layers)):
            c_out, step = _scaled(stage.channels, scale), stage.stride if index == 0 else 1
            if stage.block is not None:
                layers.append(mbconv(stage.block, width, c_out, step))
            else:
                candidates: dict[str, Any] = {
                    name: lambda n=name, i=width, o=c_out, s=step: mbconv(n, i, o, s) for name in self.blocks
                }
                if self.skip and (index or self.skip_first):
                    # By the widths of the space, so that networks of every width have the same choices.
                    if step == 1 and stage.channels == before:
                        candidates[SKIP] = nn.Identity
                    elif self.skip_projection:
                        candidates[SKIP] = lambda i=width, o=c_out, s=step: nn.Sequential(
                            nn.Conv2d(i, o, 1, s, bias=False), norm(o)
                        )
                layers.append(choose(f"layer_{number}", candidates, stride=step, kind=self._kind))
            width, before = c_out, stage.channels
        if self.head is not None:
            head = _scaled(self.head, max(1.0, scale))
            layers.append(nn.Sequential(nn.Conv2d(width, head, 1, bias=False), norm(head), activation()))
            width = head
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        layers += [nn.Dropout(self.dropout)] if self.dropout else []
        return nn.Sequential(*layers, nn.Linear(width, num_classes))

    @property
    def layers(self) -> int:
        """Number of layers, fixed ones included."""
        return sum(stage.layers for stage in self.stages)

    @property
    def _kind(self) -> str:
        return f"mbconv {self.activation}" + (" keep" if self.keep_expansion else "")


def _scaled(width: int, scale: float) -> int:
    """A width times a factor, a multiple of 4 unless the factor is 1."""
    return width if scale == 1 else max(4, round(width * scale / 4) * 4)


def mbconv_space(
    name: str,
    *,
    stem: int = 32,
    width: Sequence[int] = (24, 40, 80, 96, 192, 320),
    depth: Sequence[int] = (4, 4, 4, 4, 4, 1),
    stride: Sequence[int] = (2, 2, 2, 1, 2, 1),
    kernels: Sequence[int] = (3, 5, 7),
    expansions: Sequence[int] = (3, 6),
    allow_skip: bool = True,
    shape: tuple[int, int] = (32, 32),
    **options: Any,
) -> ChoiceSpace:
    """A chain in which every layer chooses kernel and expansion; the defaults are ProxylessNAS's stages.

    Args:
        name: Name of the space.
        stem: Width of the stem.
        width, depth, stride: Of the stages; equally many.
        kernels: Sides of the depthwise convolutions.
        expansions: Expansions.
        allow_skip: Whether a layer may be left out.
        shape: Height and width for the check of shapes.
        **options: Other fields of :class:`Chain`.

    Raises:
        ValueError: If the sequences differ in length, or a value is out of range.

    Example:
        >>> mbconv_space("tiny", stem=8, width=(8, 16), depth=(1, 2), stride=(1, 2), kernels=(3, 5)).choices()
        {'layer_0': ('k3_e3', 'k3_e6', 'k5_e3', 'k5_e6', 'skip'), 'layer_1': ('k3_e3', 'k3_e6', 'k5_e3', 'k5_e6'),
         'layer_2': ('k3_e3', 'k3_e6', 'k5_e3', 'k5_e6', 'skip')}
    """
    if not len(width) == len(depth) == len(stride):
        raise ValueError(
            f"width, depth and stride must be equally long, got {len(width)}, {len(depth)} and {len(stride)}"
        )
    stages = tuple(Stage(*values) for values in zip(width, depth, stride, strict=True))
    blocks = tuple(Block(kernel, expansion).name for kernel in kernels for expansion in expansions)
    return ChoiceSpace(name, Chain(stem, stages, blocks, allow_skip, **options), shape)


def published(space: ChoiceSpace, layers: str) -> ChoiceGenotype:
    """A genotype from kernel and expansion of each layer that has a choice, two digits each.

    Args:
        space: A space whose network is a chain.
        layers: ``-`` stands for a layer that is left out; bars between stages are for the eye.

    Example:
        >>> published(MICRO_CHAIN, "34 - | 52 34 | 52 -").decisions[:3]
        (('layer_0', 'k3_e4'), ('layer_1', 'skip'), ('layer_2', 'k5_e2'))
    """
    chain = space.network
    assert isinstance(chain, Chain)
    fixed = [stage.block is not None for stage in chain.stages for _ in range(stage.layers)]
    keys = [f"layer_{number}" for number, known in enumerate(fixed) if not known]
    words = layers.replace("|", "").split()
    names = [SKIP if word == "-" else Block(int(word[0]), int(word[1])).name for word in words]
    return ChoiceGenotype(tuple(zip(keys, names, strict=True)), space=space.name, version=space.version)


MICRO_CHAIN = mbconv_space(
    "micro-chain", stem=8, width=(12, 16, 24), depth=(2, 2, 2), stride=(1, 2, 2), kernels=(3, 5), expansions=(2, 4),
    shape=(16, 16), activation="ReLU",
)  # fmt: skip
"""The small space on which methods for chains are compared."""
