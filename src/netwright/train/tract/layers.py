"""Layers with TrAct's gradient (arXiv:2410.23970), and what gives it to the first layer of a network."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from netwright.console import nearest
from netwright.nn.patches import Patches
from netwright.train.tract.gradient import Precondition, check_lambda


class _TrAct:
    """What the layers share."""

    lambda_: float
    sync_gram: bool
    weight: Tensor

    def _set_up(self, lambda_: float, sync_gram: bool) -> None:
        self.lambda_, self.sync_gram = check_lambda(lambda_), sync_gram

    def _trained(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return weight
        patches = Patches.of_layer(self)  # type: ignore[arg-type]  # every class that has this is a layer
        return Precondition.apply(weight, x.detach(), self.lambda_, self.sync_gram, patches)


class TrActLinear(_TrAct, nn.Linear):
    """``nn.Linear`` with TrAct's gradient for its weight; leading axes of the input are all rows.

    Args:
        in_features, out_features, bias: As for ``nn.Linear``.
        lambda_: Strength of the ridge, > 0.
        sync_gram: Whether ranks solve with the Gram matrix of the whole batch, rather than each with its own.

    Raises:
        ValueError: If ``lambda_`` is not positive and finite.

    Example:
        >>> TrActLinear(4, 2)(torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        lambda_: float = 0.1,
        *,
        sync_gram: bool = False,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set_up(lambda_, sync_gram)

    def forward(self, input: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """What ``nn.Linear`` gives."""
        return functional.linear(input, self._trained(input), self.bias)

    def extra_repr(self) -> str:
        """That of ``nn.Linear``, and lambda."""
        return f"{super().extra_repr()}, lambda_={self.lambda_:g}"


class _TrActConv(_TrAct):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        lambda_: float = 0.1,
        sync_gram: bool = False,
    ):
        super().__init__(  # type: ignore[call-arg]  # of the convolution that the class is too
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._set_up(lambda_, sync_gram)

    def forward(self, input: Tensor) -> Tensor:
        """What the plain convolution gives."""
        layer: Any = self
        return layer._conv_forward(input, self._trained(input), layer.bias)

    def extra_repr(self) -> str:
        """That of the plain convolution, and lambda."""
        return f"{super().extra_repr()}, lambda_={self.lambda_:g}"  # type: ignore[misc]  # of the convolution


class TrActConv1d(_TrActConv, nn.Conv1d):
    """``nn.Conv1d`` with TrAct's gradient for its weight; each group has a Gram matrix of its own.

    All arguments but two are those of ``nn.Conv1d``.

    Args:
        lambda_: Strength of the ridge, > 0.
        sync_gram: As for :class:`TrActLinear`.

    Raises:
        ValueError: If ``lambda_`` is not positive and finite.

    Example:
        >>> TrActConv1d(1, 2, 3, lambda_=0.2)(torch.ones(1, 1, 8)).shape
        torch.Size([1, 2, 6])
    """


class TrActConv2d(_TrActConv, nn.Conv2d):
    """``nn.Conv2d`` with TrAct's gradient for its weight; each group has a Gram matrix of its own.

    All arguments but two are those of ``nn.Conv2d``.

    Args:
        lambda_: Strength of the ridge, > 0.
        sync_gram: As for :class:`TrActLinear`.

    Raises:
        ValueError: If ``lambda_`` is not positive and finite.

    Example:
        >>> TrActConv2d(1, 2, 3, padding=1)(torch.ones(1, 1, 8, 8)).shape
        torch.Size([1, 2, 8, 8])
    """


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: TrActLinear,
    nn.Conv1d: TrActConv1d,
    nn.Conv2d: TrActConv2d,
}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def tract(layer: nn.Module, lambda_: float = 0.1, *, sync_gram: bool = False) -> nn.Module:
    """Turns a layer into its TrAct form, in place, as parametrizations do: parameters, hooks and references stay.

    Args:
        layer: An ``nn.Linear``, ``nn.Conv1d`` or ``nn.Conv2d``.
        lambda_: Strength of the ridge, > 0.
        sync_gram: As for :class:`TrActLinear`.

    Returns:
        The layer.

    Raises:
        ValueError: If ``lambda_`` is not positive, or the layer is parametrized already.
        TypeError: For a layer of another type, subclasses of these included.
        NotImplementedError: For a transposed convolution.

    Example:
        >>> type(tract(nn.Linear(4, 2))).__name__
        'TrActLinear'
    """
    check_lambda(lambda_)
    _suitable(layer)
    layer.__class__ = _KINDS[type(layer)]
    layer._set_up(lambda_, sync_gram)  # type: ignore[operator]  # the class that it has now
    return layer


def apply_tract(
    model: nn.Module,
    lambda_: float = 0.1,
    layer: str | None = None,
    *,
    example_input: Tensor | None = None,
    sync_gram: bool = False,
) -> nn.Module:
    """Gives the first layer of a network TrAct's gradient, in place; ``state_dict`` and optimisers stay valid.

    Args:
        model: Any network.
        lambda_: Strength of the ridge, > 0.
        layer: Name of the layer; None takes the first linear layer or convolution.
        example_input: A batch, to find the one that is computed first; without it the order of definition decides.
        sync_gram: As for :class:`TrActLinear`.

    Returns:
        The model.

    Raises:
        ValueError: If ``lambda_`` is not positive, the name is unknown, or there is no candidate.
        TypeError, NotImplementedError: As for :func:`tract`.

    Example:
        >>> net = apply_tract(nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Linear(8, 2)))
        >>> traced(net)
        ['1']
    """
    check_lambda(lambda_)
    tract(first_layer(model, layer, example_input), lambda_, sync_gram=sync_gram)
    return model


def first_layer(model: nn.Module, layer: str | None = None, example_input: Tensor | None = None) -> nn.Module:
    """The layer that :func:`apply_tract` changes.

    Subclasses of linear layers and convolutions are no candidates, that of an attention's projection say, which is read
    and never called.

    Raises:
        ValueError, TypeError, NotImplementedError: As for :func:`apply_tract`.
    """
    layers = dict(model.named_modules())
    if layer is not None:
        if layer not in layers:
            raise ValueError(f"no layer is called {layer!r}: {nearest(layer, layers)}")
        return _suitable(layers[layer])
    candidates = [module for module in layers.values() if _plain(module) in (*_KINDS, *_TRANSPOSED)]
    if example_input is not None:
        candidates = _executed(model, candidates, example_input)
    if not candidates:
        raise ValueError(f"model must have a layer of {', '.join(kind.__name__ for kind in _KINDS)}, got none")
    return _suitable(candidates[0])


def _plain(layer: nn.Module) -> type[nn.Module]:
    """The type of a layer without its parametrizations, which make a subclass of it."""
    kind = type(layer)
    return kind.__bases__[0] if parametrize.is_parametrized(layer) else kind


def _suitable(layer: nn.Module) -> nn.Module:
    """The layer, which must be one that has a TrAct form."""
    if isinstance(layer, _TRANSPOSED):
        raise NotImplementedError(f"TrAct of a transposed convolution is not implemented, got {type(layer).__name__}")
    if parametrize.is_parametrized(layer):
        raise ValueError("layer must not be parametrized yet: apply TrAct first, then masks and Weight Compander")
    if type(layer) not in _KINDS:
        known = ", ".join(kind.__name__ for kind in _KINDS)
        raise TypeError(f"layer must be one of {known}, got {type(layer).__name__}")
    return layer


def _executed(model: nn.Module, candidates: list[nn.Module], example: Tensor) -> list[nn.Module]:
    """The candidates in the order in which they are first computed."""
    from netwright.nn.modes import in_mode

    order: list[nn.Module] = []
    hooks = [module.register_forward_pre_hook(lambda m, _: order.append(m)) for module in candidates]
    try:
        with in_mode(model, False), torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(order))


def traced(model: nn.Module) -> list[str]:
    """Names of the layers with TrAct's gradient."""
    return [name for name, module in model.named_modules() if isinstance(module, _TrAct)]


def remove_tract(model: nn.Module) -> nn.Module:
    """Gives every TrAct layer its plain type back, in place.

    Raises:
        ValueError: If such a layer is parametrized; take the parametrization away first.

    Example:
        >>> type(remove_tract(TrActLinear(4, 2))).__name__
        'Linear'
    """
    plain = {traced_as: kind for kind, traced_as in _KINDS.items()}
    for name in traced(model):
        layer = model.get_submodule(name)
        if type(layer) not in plain:
            raise ValueError(f"layer {name!r} must not be parametrized, got a {type(layer).__name__}")
        layer.__class__ = plain[type(layer)]
        del layer.lambda_, layer.sync_gram
    return model
