"""TrAct: the first layer's weights move as if its pre-activations were what is trained.

Petersen, Borgelt and Ermon, "TrAct: Making First-layer Pre-Activations Trainable", NeurIPS 2024, arXiv:2410.23970.

    grad W = G^T x (x^T x / b + lambda I)^-1        (primal, for b >= n; else the equal dual form)

x (b, n) are the inputs, G (b, m) the gradients of the pre-activations z = x W^T + c. It is the weight change that best
makes the gradient step z - eta G over the batch, by ridge regression, so that an image of high contrast does not move
the layer more than a dull one. Forward pass, input and bias gradients, optimiser and parameters are the ordinary ones.
A convolution is a linear layer on its unfolded patches, with all patches of the batch as rows.

Inputs must be standardised: lambda is measured against the mean eigenvalue of x^T x / b, which is then about 1. Larger
lambda tends to plain training at 1 / lambda of the learning rate. The rule is applied to every micro-batch, so with
gradient accumulation results depend on its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from netwright.console import nearest, warn

CHUNK = 2**22  # numbers of unfolded patches that are held at once
Form = Literal["auto", "primal", "dual"]

_warned: set[str] = set()


class Patches(NamedTuple):
    """How a layer reads its input: rows of what it multiplies with its weight."""

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    mode: str = "constant"
    groups: int = 1

    def of(self, x: Tensor) -> Iterator[Tensor]:
        """The rows of each group, transposed: (groups, n, rows), in pieces."""
        if not self.kernel:
            yield x.reshape(-1, x.shape[-1]).T[None]
            return
        axes = len(self.kernel)
        if x.ndim == axes + 1:
            x = x[None]
        if any(self.pads):
            x = functional.pad(x, self.pads, mode=self.mode)
        each = x[0].numel() * math.prod(self.kernel) // math.prod(self.stride)
        order = [1, *range(2 + axes, 2 + 2 * axes), 0, *range(2, 2 + axes)]
        for part in x.split(max(1, CHUNK // max(1, each))):
            windows = part
            for axis, (size, stride, dilation) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
                windows = windows.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
            inputs = part.shape[1] // self.groups * math.prod(self.kernel)
            yield windows.permute(order).reshape(self.groups, inputs, -1)


def _check_lambda(lambda_: float) -> float:
    if not 0 < lambda_ < math.inf:
        raise ValueError(f"lambda_ must be > 0 and finite, got {lambda_}")
    return float(lambda_)


def tract_gradient(
    x: Float[Tensor, "batch inputs"],
    grad_z: Float[Tensor, "batch outputs"],
    lambda_: float = 0.1,
    form: Form = "auto",
) -> Float[Tensor, "outputs inputs"]:
    """TrAct's gradient of the weight of a linear layer, from its inputs and the gradients of its outputs.

    Args:
        x: Inputs, standardised.
        grad_z: Gradients of the pre-activations, as autograd delivers them.
        lambda_: Strength of the ridge, > 0.
        form: ``"primal"`` solves with an (inputs, inputs) matrix, ``"dual"`` with a (batch, batch) one, ``"auto"``
            with the smaller.

    Raises:
        ValueError: If ``lambda_`` is not positive, the form is unknown, or shapes disagree.

    Example:
        >>> x, grad = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[0.5], [-1.0]])
        >>> tract_gradient(x, grad)
        tensor([[-0.4228,  0.6879]])
    """
    _check_lambda(lambda_)
    if form not in ("auto", "primal", "dual"):
        raise ValueError(f"form must be 'auto', 'primal' or 'dual', got {form!r}")
    if x.ndim != 2 or grad_z.ndim != 2 or len(x) != len(grad_z):
        raise ValueError(f"x and grad_z must be (batch, ...) of one batch, got {tuple(x.shape)}, {tuple(grad_z.shape)}")
    batch, inputs = x.shape
    if form == "primal" or (form == "auto" and batch >= inputs):
        return _solved(x.T @ x / batch, (x.T @ grad_z)[None], lambda_)[0][0].T
    return grad_z.T @ _solved(x @ x.T / batch, x[None], lambda_)[0][0]


def _solved(gram: Tensor, right: Tensor, lambda_: float) -> tuple[Tensor, Tensor]:
    """(gram + lambda I)^-1 right for each group, and whether the factorisation failed."""
    gram = gram[None] if gram.ndim == 2 else gram
    ridge = lambda_ * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram + ridge)
    return torch.cholesky_solve(right, factor), failed != 0


class _Precondition(torch.autograd.Function):
    """The weight itself; its gradient is multiplied by (x^T x / b + lambda I)^-1 on the way back."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, lambda_: float, sync: bool, patches: Patches) -> Tensor:
        ctx.save_for_backward(x)
        ctx.lambda_, ctx.sync, ctx.patches = lambda_, sync, patches
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        if grad.requires_grad:
            raise NotImplementedError("TrAct has no second derivative: its gradient is not that of a function")
        with torch.autocast(x.device.type, enabled=False):
            changed = _preconditioned(grad, x, ctx.lambda_, ctx.sync, ctx.patches)
        return changed.to(grad.dtype), None, None, None, None


def _preconditioned(grad: Tensor, x: Tensor, lambda_: float, sync: bool, patches: Patches) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    plain = grad.to(wide).reshape(patches.groups, grad.shape[0] // patches.groups, -1)
    inputs, gram, rows, kept = plain.shape[-1], None, 0, []
    for piece in patches.of(x):
        a = piece.to(wide)
        rows += a.shape[-1]
        kept.append(a)
        if rows >= inputs or sync:
            # No dual form any more: what was kept goes into the Gram matrix, and nothing is kept.
            for each in kept:
                gram = each @ each.mT if gram is None else gram.baddbmm_(each, each.mT)
            kept = []
    if gram is not None:
        if sync and torch.distributed.is_available() and torch.distributed.is_initialized():
            plain = plain.clone(memory_format=torch.contiguous_format)  # may be a view of autograd's own tensor
            rows = _reduced(gram, plain, rows)
        right, failed = _solved(gram / rows, plain.mT, lambda_)
        found = right.mT
    else:
        a = torch.cat(kept, 2)
        inner, failed = _solved(a.mT @ a / rows, a.mT, lambda_)
        found = (plain - plain @ a @ inner / rows) / lambda_
        # What cancels in the difference above is made good by one step of refinement.
        rest = plain - lambda_ * found - found @ a @ a.mT / rows
        found = found + (rest - rest @ a @ inner / rows) / lambda_
    return _sound(found, plain, failed).reshape(grad.shape)


def _reduced(gram: Tensor, plain: Tensor, rows: int) -> int:
    """Sums the Gram matrices of all ranks and averages their gradients, in place; the rows of all."""
    count = torch.tensor([rows], dtype=torch.float64, device=gram.device)
    for value in (gram, plain, count):
        torch.distributed.all_reduce(value)
    plain /= torch.distributed.get_world_size()
    return int(count)


def _sound(found: Tensor, plain: Tensor, failed: Tensor) -> Tensor:
    """The plain gradient of a group whose factorisation failed: its inputs were not finite."""
    if torch.compiler.is_compiling():
        return torch.where(failed[:, None, None], plain, found)
    if not bool(failed.any()):
        return found
    if torch.is_anomaly_enabled():
        raise FloatingPointError("the inputs of a TrAct layer must be finite, got NaN or infinity")
    if "factor" not in _warned:
        _warned.add("factor")
        warn("the inputs of a TrAct layer were not finite; it trains with the plain gradient where that happens")
    return torch.where(failed[:, None, None], plain, found)


class _TrAct:
    """What the layers share."""

    lambda_: float
    sync_gram: bool
    weight: Tensor

    def _set_up(self, lambda_: float, sync_gram: bool) -> None:
        self.lambda_, self.sync_gram = _check_lambda(lambda_), sync_gram

    def patches(self) -> Patches:
        """How the layer reads its input."""
        return Patches()

    def _trained(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return weight
        return _Precondition.apply(weight, x.detach(), self.lambda_, self.sync_gram, self.patches())


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
    def patches(self) -> Patches:
        layer: Any = self
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        pads = tuple(layer._reversed_padding_repeated_twice)
        return Patches(layer.kernel_size, layer.stride, layer.dilation, pads, mode, layer.groups)

    def forward(self, input: Tensor) -> Tensor:
        """What the plain convolution gives."""
        layer: Any = self
        return layer._conv_forward(input, self._trained(input), layer.bias)

    def extra_repr(self) -> str:
        """That of the plain convolution, and lambda."""
        return f"{super().extra_repr()}, lambda_={self.lambda_:g}"  # type: ignore[misc]  # of the convolution


class TrActConv1d(_TrActConv, nn.Conv1d):
    """``nn.Conv1d`` with TrAct's gradient for its weight; each group has a Gram matrix of its own.

    Args:
        lambda_: Strength of the ridge, > 0.
        sync_gram: As for :class:`TrActLinear`.
        convolution: All other arguments are those of ``nn.Conv1d``, by position or by name.

    Raises:
        ValueError: If ``lambda_`` is not positive and finite.

    Example:
        >>> TrActConv1d(1, 2, 3, lambda_=0.2)(torch.ones(1, 1, 8)).shape
        torch.Size([1, 2, 6])
    """

    def __init__(self, *convolution: Any, lambda_: float = 0.1, sync_gram: bool = False, **options: Any):
        super().__init__(*convolution, **options)
        self._set_up(lambda_, sync_gram)


class TrActConv2d(_TrActConv, nn.Conv2d):
    """``nn.Conv2d`` with TrAct's gradient for its weight; each group has a Gram matrix of its own.

    Args:
        lambda_: Strength of the ridge, > 0.
        sync_gram: As for :class:`TrActLinear`.
        convolution: All other arguments are those of ``nn.Conv2d``, by position or by name.

    Raises:
        ValueError: If ``lambda_`` is not positive and finite.

    Example:
        >>> TrActConv2d(1, 2, 3, padding=1)(torch.ones(1, 1, 8, 8)).shape
        torch.Size([1, 2, 8, 8])
    """

    def __init__(self, *convolution: Any, lambda_: float = 0.1, sync_gram: bool = False, **options: Any):
        super().__init__(*convolution, **options)
        self._set_up(lambda_, sync_gram)


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
    _check_lambda(lambda_)
    if isinstance(layer, _TRANSPOSED):
        raise NotImplementedError(f"TrAct of a transposed convolution is not implemented, got {type(layer).__name__}")
    if parametrize.is_parametrized(layer):
        raise ValueError("layer must not be parametrized yet: apply TrAct first, then masks and Weight Compander")
    if type(layer) not in _KINDS:
        known = ", ".join(kind.__name__ for kind in _KINDS)
        raise TypeError(f"layer must be one of {known}, got {type(layer).__name__}")
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
    _check_lambda(lambda_)
    layers = dict(model.named_modules())
    if layer is not None:
        if layer not in layers:
            raise ValueError(f"no layer is called {layer!r}: {nearest(layer, layers)}")
        tract(layers[layer], lambda_, sync_gram=sync_gram)
        return model
    kinds: tuple[type[nn.Module], ...] = (*_KINDS, *_TRANSPOSED)
    candidates: list[nn.Module] = [module for module in layers.values() if isinstance(module, kinds)]
    if example_input is not None:
        candidates = _executed(model, candidates, example_input)
    if not candidates:
        raise ValueError(f"model must have a layer of {', '.join(kind.__name__ for kind in _KINDS)}, got none")
    tract(candidates[0], lambda_, sync_gram=sync_gram)
    return model


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
