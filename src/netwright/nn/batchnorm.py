"""Batch normalisation: statistics measured anew, folded away, left alone, or shared by all ranks.

Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
Shift", ICML 2015, arXiv:1502.03167.

    y = gamma (x - mean) / sqrt(var + eps) + beta
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.fx
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from netwright.nn.modes import in_mode
from netwright.nn.sparse import to_dense
from netwright.seeding import stream

_M = TypeVar("_M", bound=nn.Module)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _norms(module: nn.Module) -> list[_BatchNorm]:
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


def recalibrate(module: _M, batches: Iterable[Any]) -> _M:
    """Measures the running statistics of every batch norm anew: their plain average over ``batches``.

    To be called when weights have changed without training (pruning, averaging, quantising). Only batch norms
    are in training mode meanwhile, so dropout and drop-path do not disturb what is measured; weights are not
    touched.

    Args:
        module: The network, changed in place; its mode is restored.
        batches: Inputs of the network, or tuples that begin with them.

    Returns:
        The same network.

    Raises:
        ValueError: If ``batches`` is empty and there are statistics to measure.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1))
        >>> _ = recalibrate(net, [torch.tensor([[1.0], [3.0]])])
        >>> net[0].running_mean
        tensor([2.])
    """
    norms = [norm for norm in _norms(module) if norm.track_running_stats]
    if not norms:
        return module
    momenta = [norm.momentum for norm in norms]
    device = next((tensor.device for tensor in module.parameters()), None)
    seen = 0
    try:
        with in_mode(module, training=False), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch's name for the cumulative average
                norm.train()
            for batch in batches:
                x = batch[0] if isinstance(batch, (tuple, list)) else batch
                module(x if device is None else x.to(device))
                seen += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if not seen:
        raise ValueError("batches must hold at least 1 batch, got 0")
    return module


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms leave their running statistics alone inside the block; in training mode they still
    normalise by the batch, in evaluation mode by the running statistics.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> with frozen_statistics(norm):
        ...     y = norm(torch.tensor([[1.0], [3.0]]))
        >>> norm.running_mean, y.mean().item()
        (tensor([0.]), 0.0)
    """
    norms = _norms(module)
    tracked = [norm.track_running_stats for norm in norms]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm, value in zip(norms, tracked, strict=True):
            norm.track_running_stats = value


def fold(module: nn.Module) -> nn.Module:
    """A copy for inference in which each batch norm that directly follows a convolution is part of it.

    Masks are baked in first; weights that are zero stay exactly zero. Folded batch norms become
    :class:`torch.nn.Identity`, so every other name stays. Which batch norm follows which convolution is read
    from a :mod:`torch.fx` trace; of a network that cannot be traced, from the parts that can.

    Args:
        module: The network; it is not changed.

    Returns:
        The copy, in evaluation mode, equal to the evaluation mode of the original up to rounding.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2)).eval()
        >>> folded, x = fold(net), torch.rand(1, 1, 5, 5)
        >>> folded[1], torch.allclose(folded(x), net(x), atol=1e-6)
        (Identity(), True)
    """
    module = to_dense(module).eval()
    uses = Counter(id(part) for _, part in module.named_modules(remove_duplicate=False))
    for conv_path, norm_path in list(_pairs(module, "")):
        conv, norm = module.get_submodule(conv_path), module.get_submodule(norm_path)
        new = _absorbed(conv, norm) if uses[id(conv)] == 1 == uses[id(norm)] else None
        if new is not None:
            module.set_submodule(conv_path, new)
            module.set_submodule(norm_path, nn.Identity())
    return module


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*_CONVS, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)


def _pairs(module: nn.Module, prefix: str) -> Iterator[tuple[str, str]]:
    """Paths of convolutions whose result goes to one batch norm and nowhere else, with that batch norm's."""
    if not _norms(module):
        return
    try:
        nodes = _Tracer().trace(module).nodes
    except Exception:  # a user's forward may raise anything when it is given proxies
        names = [name for name, _ in module.named_children()]
        for name in names:
            yield from _pairs(module.get_submodule(name), f"{prefix}{name}.")
        if isinstance(module, nn.Sequential):
            yield from ((prefix + conv, prefix + norm) for conv, norm in itertools.pairwise(names))
        return
    calls = Counter(str(node.target) for node in nodes if node.op == "call_module")
    for node in nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if isinstance(source, torch.fx.Node) and source.op == "call_module" and len(source.users) == 1:
            conv, norm = str(source.target), str(node.target)
            if calls[conv] == 1 == calls[norm]:
                yield prefix + conv, prefix + norm


def _absorbed(conv: nn.Module, norm: nn.Module) -> nn.Module | None:
    """The convolution with the batch norm in it; ``None`` where that is not the same function."""
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SynchronisedBatchNorm)
    if not isinstance(conv, _CONVS) or type(norm) not in plain or parametrize.is_parametrized(conv):
        return None
    assert isinstance(norm, _BatchNorm)
    if norm.running_mean is None or norm.running_var is None:
        return None
    mean = norm.running_mean.double()
    scale = 1 / torch.sqrt(norm.running_var.double() + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    bias = -mean if conv.bias is None else conv.bias.detach().double() - mean
    bias = scale * bias if norm.bias is None else scale * bias + norm.bias.detach().double()
    weight = conv.weight.detach()
    new = copy.deepcopy(conv)
    new.weight = nn.Parameter((weight.double().transpose(0, -1) * scale).transpose(0, -1).to(weight.dtype).contiguous())
    new.bias = nn.Parameter(bias.to(weight.dtype))
    return new if type(conv) in _CONVS or _equal(new, nn.Sequential(conv, norm), conv) else None


def _equal(new: nn.Module, old: nn.Module, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """Whether a subclass does with its weight what a convolution does (weight standardisation does not)."""
    size = [4 * k * d for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    x = torch.randn(1, conv.in_channels, *size, generator=stream(0, "fold")).to(conv.weight)
    with torch.no_grad():
        return torch.allclose(new(x), old(x), rtol=1e-3, atol=1e-4)


class _AllReduce(torch.autograd.Function):
    """Sum over ranks whose gradient is the sum over ranks, as the loss of all ranks together demands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _AllReduce.apply(grads[0])


class SynchronisedBatchNorm(_BatchNorm):
    """Batch norm whose batch is that of all ranks together, on any device that ``torch.distributed`` serves.

    Alone, or in evaluation mode, it is the ordinary batch norm. Ranks may hold batches of different sizes.

    Example:
        >>> x = torch.rand(4, 3, 5, 5)
        >>> torch.equal(SynchronisedBatchNorm(3)(x), nn.BatchNorm2d(3)(x))
        True
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"x must have at least 2 dimensions (batch, channels, ...), got {input.ndim}")

    def forward(self, input: Float[Tensor, "batch channels *size"]) -> Float[Tensor, "batch channels *size"]:
        """Normalises by the mean and variance over the batches of all ranks."""
        alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
        if alone or not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        x = input
        dims = [dim for dim in range(x.ndim) if dim != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = torch.full((1,), x.numel() / x.shape[1], dtype=torch.float64, device=x.device)
        # Two passes, mean first: a sum of squares would lose the variance of inputs far from zero.
        total = _AllReduce.apply(torch.cat([x.sum(dims, dtype=torch.float64), count]))
        n = total[-1].detach()
        mean = total[:-1] / n
        centred = x - mean.to(x.dtype).view(shape)
        var = _AllReduce.apply(centred.square().sum(dims, dtype=torch.float64)) / n
        self._track(mean.detach(), var.detach() * n / (n - 1))
        y = centred * torch.rsqrt(var + self.eps).to(x.dtype).view(shape)
        y = y if self.weight is None else y * self.weight.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)

    def _track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        with torch.no_grad():
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), momentum)


def synchronise(module: nn.Module) -> nn.Module:
    """Makes every batch norm normalise by the batch of all ranks, so that training does not depend on their
    number.

    On a GPU torch's :class:`torch.nn.SyncBatchNorm` takes their place, on a CPU
    :class:`SynchronisedBatchNorm`. The network is changed in place, parameters and buffers stay the same
    objects; a batch norm given by itself is replaced, therefore use the result: ``network =
    synchronise(network)``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> type(synchronise(net)[1]).__name__
        'SynchronisedBatchNorm'
    """
    if any(tensor.is_cuda for tensor in module.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    new: dict[int, nn.Module] = {id(norm): _synchronised(norm) for norm in _norms(module)}
    for path, part in list(module.named_modules(remove_duplicate=False)):
        if path and id(part) in new:
            module.set_submodule(path, new[id(part)])
    return new.get(id(module), module)


def _synchronised(norm: _BatchNorm) -> nn.Module:
    if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        if isinstance(norm, (SynchronisedBatchNorm, nn.SyncBatchNorm)):
            return norm
        raise ValueError(f"synchronise knows torch's own batch norms, got {type(norm).__name__}")
    ours = SynchronisedBatchNorm(norm.num_features, norm.eps, norm.momentum)
    ours.affine, ours.track_running_stats = norm.affine, norm.track_running_stats
    ours.weight, ours.bias = norm.weight, norm.bias
    for name, buffer in norm._buffers.items():
        ours._buffers[name] = buffer
    return ours.train(norm.training)
