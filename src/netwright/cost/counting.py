"""Parameters and multiply-adds, dense and of the non-zero weights alone, from one forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from netwright.nn.modes import in_mode
from netwright.nn.sparse import SparseConv2d, SparseLinear
from netwright.results import Result, new_axes
from netwright.seeding import stream

if TYPE_CHECKING:
    from matplotlib.axes import Axes

aten = torch.ops.aten


@dataclass(frozen=True)
class LayerCost(Result):
    """One layer's share, by the module that holds the parameters or does the arithmetic.

    Attributes:
        name: Path of the module; empty for the network itself.
        kind: Its class.
        parameters: Its own parameters, as they would be stored without masks.
        nonzeros: Those that are not zero.
        macs: Multiply-adds for one input.
        sparse_macs: Those with a non-zero weight.
    """

    name: str
    kind: str
    parameters: int
    nonzeros: int
    macs: int
    sparse_macs: int


@dataclass(frozen=True)
class Cost(Result):
    """Parameters and multiply-adds of a network for one input.

    Attributes:
        parameters: All parameters, as they would be stored without masks; scores of masks are not counted.
        nonzeros: Those that are not zero.
        macs: Multiply-adds of convolutions and matrix products.
        sparse_macs: Those with a non-zero weight; products of two activations count in full.
        per_layer: The same by layer, in module order; layers without either are left out.
    """

    parameters: int
    nonzeros: int
    macs: int
    sparse_macs: int
    per_layer: tuple[LayerCost, ...] = ()

    @property
    def sparsity(self) -> float:
        """Share of all parameters that are zero, in [0, 1]; biases and batch norm included."""
        return 1 - self.nonzeros / self.parameters if self.parameters else 0.0

    def plot(self, ax: Axes | None = None) -> Axes:
        """Multiply-adds by layer, those of non-zero weights in front."""
        ax = new_axes(ax)
        layers = [layer for layer in self.per_layer if layer.macs]
        ax.bar(range(len(layers)), [layer.macs for layer in layers], label="dense")
        ax.bar(range(len(layers)), [layer.sparse_macs for layer in layers], label="non-zero weights")
        ax.set_xlabel("layer")
        ax.set_ylabel("multiply-adds")
        ax.legend()
        return ax


def count(module: nn.Module, shape: Sequence[int] | None = None, *, inputs: Sequence[Tensor] | None = None) -> Cost:
    """Parameters and multiply-adds of a network, from one forward pass in evaluation mode, of one random input or of
    given ones.

    Every convolution and matrix product is seen, whether a layer, a function or an operator makes it,
    attention included. Weights count as they are used: masks (:mod:`netwright.nn.sparse`) and other
    parametrizations applied. Arithmetic on weights alone (computing a parametrization, say) is not counted,
    since it can be done beforehand.

    Args:
        module: The network; it is left as it was.
        shape: Shape of one input without the batch, such as (channels, height, width).
        inputs: In its place the inputs themselves, of any type and number, with a batch of one.

    Raises:
        ValueError: If ``shape`` holds a size below 1, the network does not take such an input, or not exactly one of
            ``shape`` and ``inputs`` is given.

    Example:
        >>> cost = count(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), (3, 32, 32))
        >>> cost.parameters, cost.macs, cost.macs == 3 * 3 * 3 * 8 * 32 * 32
        (224, 221184, True)
    """
    if (shape is None) == (inputs is None):
        raise ValueError(f"exactly one of shape and inputs must be given, got {shape} and {inputs}")
    if shape is not None and (not shape or min(shape) < 1):
        raise ValueError(f"shape must hold sizes >= 1, got {tuple(shape)}")
    owned = {name: (part, list(_stored(part))) for name, part in _parts(module)}
    first = next((p for _, tensors in owned.values() for p in tensors if p.is_floating_point()), torch.zeros(()))
    if inputs is None:
        assert shape is not None
        inputs = [torch.rand(1, *shape, generator=stream(0, "count")).to(first)]
    counter = _Counter()
    with ExitStack() as stack:
        stack.enter_context(in_mode(module, training=False))
        for handle in _follow(module, counter.path):
            stack.callback(handle.remove)
        stack.enter_context(_plain_kernels(module))
        stack.enter_context(torch.no_grad())
        for x in inputs:
            counter.from_input[x] = True
        try:
            with counter:
                module(*inputs)
        except RuntimeError as error:
            told = f"an input of shape {tuple(shape)}" if shape is not None else "these inputs"
            raise ValueError(f"module must take {told}: {error}") from error
    layers: list[LayerCost] = []
    seen: set[int] = set()
    for name, (part, tensors) in owned.items():
        new = [tensor for tensor in tensors if id(tensor) not in seen]
        seen.update(id(tensor) for tensor in new)
        size, kept = sum(t.numel() for t in new), sum(int(t.count_nonzero()) for t in new)
        kind = parametrize.type_before_parametrizations(part).__name__
        layers.append(LayerCost(name, kind, size, kept, counter.macs[name], counter.sparse_macs[name]))
    return Cost(
        sum(layer.parameters for layer in layers),
        sum(layer.nonzeros for layer in layers),
        sum(layer.macs for layer in layers),
        sum(layer.sparse_macs for layer in layers),
        tuple(layer for layer in layers if layer.parameters or layer.macs),
    )


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules but those that only compute somebody's parameter."""
    inner = {id(p) for m in module.modules() if parametrize.is_parametrized(m) for p in m.parametrizations.modules()}  # type: ignore[union-attr]
    return ((name, part) for name, part in module.named_modules() if id(part) not in inner)


def _stored(part: nn.Module) -> Iterator[Tensor]:
    """The module's own parameters as they are used: masked, parametrizations applied, scores left out."""
    with torch.no_grad():
        sparse = isinstance(part, (SparseConv2d, SparseLinear))
        for name, parameter in part.named_parameters(recurse=False):
            if sparse and name == "weight":
                yield part.apply_mask(parameter)  # type: ignore[operator]
            elif not (sparse and name == "scores"):
                yield parameter
        if parametrize.is_parametrized(part):
            for name in part.parametrizations:  # type: ignore[union-attr]
                yield getattr(part, name)


def _follow(module: nn.Module, path: list[str]) -> Iterator[Any]:
    """Hooks that keep the path of the module that runs on top of a stack."""

    def enter(name: str) -> Callable[..., None]:
        return lambda part, inputs: path.append(name)

    def leave(part: nn.Module, inputs: Any, output: Any) -> None:
        path.pop()

    for name, part in _parts(module):
        yield part.register_forward_pre_hook(enter(name), prepend=True)
        yield part.register_forward_hook(leave, always_call=True)


@contextmanager
def _plain_kernels(module: nn.Module) -> Iterator[None]:
    """Fused kernels for attention and recurrent layers hide their products; switch them off."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(part, nn.RNNBase) for part in module.modules()):
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        yield


class _Counter(TorchDispatchMode):
    """Counts products of which at least one factor depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = [""]
        self.macs: Counter[str] = Counter()
        self.sparse_macs: Counter[str] = Counter()
        self.from_input = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = list(_tensors((args, kwargs)))
        if any(tensor in self.from_input for tensor in inputs):
            for tensor in _tensors(out):
                self.from_input[tensor] = True
            product = _PRODUCTS.get(func.overloadpacket)
            if product is not None:
                self._add(out, *product(out, *args))
        return out

    def _add(self, out: Tensor, macs: int, *factors: Tensor) -> None:
        name = self.path[-1]
        self.macs[name] += macs
        weight = next((factor for factor in factors if factor not in self.from_input), None)
        if weight is None or not weight.numel():
            self.sparse_macs[name] += macs
        else:  # every entry of a weight takes part equally often
            dense = weight.to_dense() if weight.layout != torch.strided else weight
            self.sparse_macs[name] += macs // dense.numel() * int(dense.count_nonzero())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _convolution(out: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[int, Tensor, Tensor]:
    transposed = rest[4]
    positions = x if transposed else out
    return positions.shape[0] * positions.shape[2:].numel() * weight.numel(), x, weight


def _matrix(out: Tensor, left: Tensor, right: Tensor, *rest: Any) -> tuple[int, Tensor, Tensor]:
    return left.numel() * right.shape[-1], left, right


def _matrix_plus(out: Tensor, start: Tensor, left: Tensor, right: Tensor, *rest: Any) -> tuple[int, Tensor, Tensor]:
    return _matrix(out, left, right)


def _vector(out: Tensor, left: Tensor, right: Tensor, *rest: Any) -> tuple[int, Tensor, Tensor]:
    return left.numel(), left, right


def _vector_plus(out: Tensor, start: Tensor, left: Tensor, right: Tensor, *rest: Any) -> tuple[int, Tensor, Tensor]:
    return _vector(out, left, right)


_PRODUCTS: dict[Any, Callable[..., tuple[int, Tensor, Tensor]]] = {
    aten.convolution: _convolution,
    aten.mm: _matrix,
    aten.bmm: _matrix,
    aten.addmm: _matrix_plus,
    aten.baddbmm: _matrix_plus,
    aten.mv: _vector,
    aten.dot: _vector,
    aten.addmv: _vector_plus,
}
