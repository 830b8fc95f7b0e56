"""Which channels of a network belong together: what :func:`netwright.compress.channels.prune_channels` goes by.

A :mod:`torch.fx` trace is followed with a label for every channel of every value. Layers that treat channels one by one
hand labels on, a convolution gives new ones, a sum makes those of its branches one. A label can go when every layer
that mixes channels finds zeros under it. What the trace does not understand keeps the channels it reads.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional

# One channel in, one channel out, and zero stays zero.
_CHANNELWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Tanh, nn.Identity,
    nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
_FUNCTIONS = {
    functional.relu, functional.relu6, functional.leaky_relu, functional.elu, functional.silu, functional.gelu,
    functional.hardswish, functional.dropout, functional.dropout2d, functional.max_pool2d, functional.avg_pool2d,
    functional.adaptive_avg_pool2d, functional.adaptive_max_pool2d, torch.relu, torch.relu_, torch.tanh,
    "relu", "relu_", "tanh", "contiguous", "clone",
}  # fmt: skip
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_SIZES = {"size", "dim", getattr}


@dataclass(frozen=True)
class _Value:
    """A value of the trace: the label of each channel, whether that is zero everywhere, and whether maps are flat."""

    labels: list[int]
    zero: list[bool]
    flat: bool = False


class Coupling:
    """Finds the channels that can go, and takes them away.

    Args:
        module: The network.
        scales: Scale of each channel of those modules, by name, that make a channel zero where theirs is.

    Raises:
        ValueError: If the network cannot be traced.
    """

    def __init__(self, module: nn.Module, scales: Mapping[str, Tensor]):
        class Tracer(torch.fx.Tracer):
            def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
                return module_qualified_name in scales or super().is_leaf_module(m, module_qualified_name)

        try:
            self._nodes = list(Tracer().trace(module).nodes)
        except Exception as error:  # a user's forward may raise anything when it is given proxies
            raise ValueError(f"module must be traceable by torch.fx, got {type(module).__name__}: {error}") from error
        self._module, self._scales = module, scales

    def narrow(self, threshold: float) -> None:
        """Takes every channel away, in place, that is read as zero alone when scales to ``threshold`` count as zero."""
        self._threshold = threshold
        self._parents: list[int] = []  # of a label: another of its class, or itself
        self._kept: set[int] = set()
        self._read: set[int] = set()
        self._strength: dict[int, float] = {}
        self._inputs: dict[str, _Value | None] = {}
        self._outputs: dict[str, _Value | None] = {}
        values: dict[torch.fx.Node, _Value | None] = {}
        for node in self._nodes:
            values[node] = self._follow(node, values)
        gone = self._gone()
        for name, out in self._outputs.items():
            inside = self._inputs[name]
            channels = len(inside.labels) if inside else 0
            _narrow(self._module.get_submodule(name), self._stay(inside, gone), self._stay(out, gone), channels)

    def _follow(self, node: torch.fx.Node, values: Mapping[torch.fx.Node, _Value | None]) -> _Value | None:
        read = [values[source] for source in node.all_input_nodes]
        known = [value for value in read if value is not None]
        x = values.get(node.args[0]) if node.args and isinstance(node.args[0], torch.fx.Node) else None
        if node.op == "call_module":
            return self._layer(str(node.target), x)
        if node.target in _SIZES:
            return None
        found = self._joined(node, values, known) if len(known) == len(read) else None
        if found is None and x is not None and len(known) == 1 and node.op != "output":
            found = _unchanged(node, x)
        if found is None:
            self._keep(known)
        return found

    def _joined(
        self, node: torch.fx.Node, values: Mapping[torch.fx.Node, _Value | None], known: list[_Value]
    ) -> _Value | None:
        """What a sum of two, or a concatenation along the channels, gives."""
        if node.target in _SUMS and len(known) == 2 and len(known[0].labels) == len(known[1].labels):
            return self._sum(*known)
        along = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if node.target is not torch.cat or along != 1 or any(value.flat for value in known):
            return None
        parts: Any = node.args[0]  # one value may stand there twice
        listed = [value for part in parts if (value := values[part])]
        return _Value([label for v in listed for label in v.labels], [zero for v in listed for zero in v.zero])

    def _layer(self, name: str, x: _Value | None) -> _Value | None:
        layer = self._module.get_submodule(name)
        if name in self._outputs:  # a layer that is used twice stays as it is
            self._keep([x, self._inputs[name], self._outputs[name]])
            return self._outputs[name]
        out = self._through(name, layer, x)
        if name in self._scales or isinstance(layer, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            self._inputs[name], self._outputs[name] = x, out
        return out

    def _through(self, name: str, layer: nn.Module, x: _Value | None) -> _Value | None:
        if isinstance(layer, nn.Conv2d) and layer.groups == 1:
            self._consume(x)
            return self._new(layer.out_channels)
        if x is None:
            return None
        if isinstance(layer, nn.Linear) and (x.flat or layer.in_features == len(x.labels)):
            self._consume(x)
            return None
        found = self._channelwise(name, layer, x)
        if found is None:
            self._keep([x])
        return found

    def _channelwise(self, name: str, layer: nn.Module, x: _Value) -> _Value | None:
        """What a layer gives that treats every channel by itself."""
        zero = x.zero
        if name in self._scales:
            scale = self._scales[name]
            for label, value in zip(x.labels, scale.tolist(), strict=True):
                root = self._root(label)
                self._strength[root] = max(value, self._strength.get(root, 0.0))
            zero = (scale <= self._threshold).tolist()
        elif isinstance(layer, nn.BatchNorm2d):
            zero = [False] * len(zero)
        elif isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels:
            zero = [known and layer.bias is None for known in zero]
        elif not isinstance(layer, _CHANNELWISE) and not (isinstance(layer, nn.Flatten) and layer.start_dim == 1):
            return None
        return _Value(x.labels, zero, x.flat or isinstance(layer, nn.Flatten))

    def _new(self, channels: int) -> _Value:
        first = len(self._parents)
        labels = list(range(first, first + channels))
        self._parents += labels
        return _Value(labels, [False] * channels)

    def _sum(self, a: _Value, b: _Value) -> _Value:
        for left, right in zip(a.labels, b.labels, strict=True):
            kept, root = sorted((self._root(left), self._root(right)))
            self._parents[root] = kept
            self._strength[kept] = max(self._strength.get(kept, 0.0), self._strength.get(root, 0.0))
        return _Value(a.labels, [x and y for x, y in zip(a.zero, b.zero, strict=True)], a.flat or b.flat)

    def _root(self, label: int) -> int:
        while self._parents[label] != label:
            label = self._parents[label]
        return label

    def _consume(self, x: _Value | None) -> None:
        """A layer that mixes channels reads x: labels that are not zero there are needed."""
        if x is not None:
            self._read.update(x.labels)
            self._kept.update(label for label, zero in zip(x.labels, x.zero, strict=True) if not zero)

    def _keep(self, values: Iterable[_Value | None]) -> None:
        for value in values:
            if value is not None:
                self._kept.update(value.labels)

    def _gone(self) -> set[int]:
        kept = {self._root(label) for label in self._kept}
        gone = {self._root(label) for label in self._read} - kept
        for value in self._outputs.values():
            roots = [self._root(label) for label in value.labels] if value else []
            if roots and gone.issuperset(roots):  # no layer without channels
                gone.remove(max(roots, key=lambda root: self._strength.get(root, 0.0)))
        return gone

    def _stay(self, value: _Value | None, gone: set[int]) -> Tensor | None:
        """Positions of the channels that stay; None where all do."""
        if value is None:
            return None
        stay = [place for place, label in enumerate(value.labels) if self._root(label) not in gone]
        return None if len(stay) == len(value.labels) else torch.tensor(stay)


def _unchanged(node: torch.fx.Node, x: _Value) -> _Value | None:
    """What a function or method gives that treats every channel by itself and leaves zeros; None for others."""
    second: Any = node.args[1] if len(node.args) > 1 else None
    flat = x.flat
    if node.target in ("mean", torch.mean):
        dims = node.kwargs.get("dim", second)
        known = isinstance(dims, (list, tuple)) and sorted(dims) in ([2, 3], [-2, -1])
    elif node.target in ("flatten", torch.flatten):
        flat = known = bool(node.kwargs.get("start_dim", second) == 1)
    elif node.target in ("view", "reshape"):
        flat = known = len(node.args) == 3 and bool(node.args[2] == -1)
    else:
        known = node.target in _FUNCTIONS
    return _Value(x.labels, x.zero, flat) if known else None


def _narrow(layer: nn.Module, inside: Tensor | None, out: Tensor | None, channels: int) -> None:
    """Leaves of a layer with ``channels`` input channels those at ``inside``, and the outputs at ``out``."""
    if isinstance(layer, nn.Linear) and inside is not None:
        cells = layer.in_features // channels  # of a map that was flattened each channel is a run of cells
        columns = (inside[:, None] * cells + torch.arange(cells)).flatten()
        layer.weight = _picked(layer.weight, inside=columns)
        layer.in_features = len(columns)
    elif isinstance(layer, nn.Conv2d):
        if layer.groups > 1 and out is not None:  # depthwise
            layer.groups = layer.in_channels = len(out)
        elif inside is not None:
            layer.weight = _picked(layer.weight, inside=inside)
            layer.in_channels = len(inside)
        if out is not None:
            layer.weight = _picked(layer.weight, out)
            layer.bias = None if layer.bias is None else _picked(layer.bias, out)
            layer.out_channels = len(out)
    elif out is not None:
        for name, parameter in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, _picked(parameter, out))
        for name, buffer in list(layer.named_buffers(recurse=False)):
            setattr(layer, name, buffer[out] if buffer.ndim else buffer)
        if isinstance(layer, nn.BatchNorm2d):
            layer.num_features = len(out)


def _picked(parameter: Tensor, out: Tensor | None = None, inside: Tensor | None = None) -> nn.Parameter:
    value = parameter.detach()
    value = value if out is None else value[out]
    value = value if inside is None else value[:, inside]
    return nn.Parameter(value.clone(), requires_grad=parameter.requires_grad)
