"""Weight Compander: weights as a bounded function of free parameters, steep at zero and flat far from it.

Cakaj, Mehnert and Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization", IJCNN 2023,
arXiv:2306.16993.

    w = Psi(v; a, b) = a arctan(v / b),    |w| < a pi / 2,    dw/dv = a b / (b^2 + v^2)

Small weights are pushed away from zero and large ones held back; v is what is trained. The abstract of the paper says
that much; that the function is the arctan, its parameters and their defaults are this library's reading, since neither
text nor code is public. All of that stands in this file.

Psi changes the effective learning rate (an SGD step moves w by slope^2 times the plain step), so a comparison must tune
the learning rate of both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from netwright.console import warn

Start = Literal["latent", "match"]
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
INSIDE = 0.999  # share of the bound to which weights are clamped before they are inverted
SPREAD, GAIN = 2.0, 1.2  # default b in standard deviations of the weights, and the default slope a / b at zero
RANGE = math.log(10.0)  # how far log a and log b may move from their start


class Shape(NamedTuple):
    """w / a as a function of v / b: odd and increasing."""

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    bound: float


FUNCTIONS = {
    "arctan": Shape(torch.atan, torch.tan, math.pi / 2),
    "tanh": Shape(torch.tanh, torch.atanh, 1.0),
    "softsign": Shape(lambda u: u / (1 + u.abs()), lambda u: u / (1 - u.abs()), 1.0),
    "erf": Shape(torch.erf, torch.erfinv, 1.0),
    "identity": Shape(lambda u: u, lambda u: u, math.inf),
}


class _Arctan(torch.autograd.Function):
    """a arctan(v / b), which keeps v alone for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (v / b).atan_().mul_(a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        v, a, b = ctx.saved_tensors
        (grad,) = grads
        over = grad / torch.addcmul(b * b, v, v)
        slope = over * (a * b) if ctx.needs_input_grad[0] else None
        along_a = (grad * (v / b).atan()).sum_to_size(a.shape) if ctx.needs_input_grad[1] else None
        along_b = -(over * v).mul(a).sum_to_size(b.shape) if ctx.needs_input_grad[2] else None
        return slope, along_a, along_b


def compand(v: Float[Tensor, "*shape"], a: float | Tensor, b: float | Tensor) -> Float[Tensor, "*shape"]:
    """a arctan(v / b), differentiable in all three; half precision is computed in float32.

    Args:
        v: Latent weights.
        a: Height, > 0; weights stay within a pi / 2.
        b: Width, > 0; the slope at zero is a / b.

    Example:
        >>> round(compand(torch.tensor(0.5, dtype=torch.float64), 0.3, 0.2).item(), 7)
        0.357087
    """
    wide = v.float() if v.dtype in (torch.float16, torch.bfloat16) else v
    a, b = (torch.as_tensor(value, dtype=wide.dtype, device=wide.device) for value in (a, b))
    return _Arctan.apply(wide, a, b).to(v.dtype)


def expand_inverse(w: Float[Tensor, "*shape"], a: float | Tensor, b: float | Tensor) -> Float[Tensor, "*shape"]:
    """b tan(w / a), the inverse of :func:`compand` for abs(w) < a pi / 2.

    Example:
        >>> round(expand_inverse(compand(torch.tensor(0.5), 0.3, 0.2), 0.3, 0.2).item(), 5)
        0.5
    """
    return b * torch.tan(w / a)


def crossover(a: float, b: float) -> float | None:
    """The size v* up to which weights are expanded: the positive root of a arctan(v / b) = v; None if a <= b.

    Raises:
        ValueError: If ``a`` or ``b`` is not positive and finite.

    Example:
        >>> round(crossover(0.3, 0.2), 7), crossover(0.2, 0.3)
        (0.2902208, None)
    """
    from scipy.optimize import brentq

    _check_positive(a=a, b=b)
    if a <= b:
        return None
    # In units of b; arctan(u) > u / (1 + u^2 / 3) bounds the root from below.
    ratio = a / b
    least = math.sqrt(3 * (ratio - 1))
    root = brentq(lambda u: ratio * math.atan(u) - u, least / 2, ratio * math.pi / 2, xtol=1e-15, rtol=1e-14)
    return b * float(root)


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")


class WeightCompander(nn.Module):
    """Parametrization that computes a weight as Psi of its latent one.

    Learned, a = a_0 exp(r tanh(s alpha / r)) with alpha = 0 at the start and r = log 10, so that a stays within a tenth
    and ten times its start; b likewise with beta. The gradients of alpha and beta are sums over all weights of the
    layer, for which the network's learning rate is far too large; s = sqrt(lr_scale) makes a step of SGD move log a and
    log b as ``lr_scale`` times the learning rate would (of Adam, s times), whatever the groups and the schedule of the
    optimiser are.

    Args:
        a: Height at the start, > 0.
        b: Width at the start, > 0.
        learnable: Whether the two are trained.
        function: ``"arctan"``, or for study ``"tanh"``, ``"softsign"``, ``"erf"``, ``"identity"``.
        lr_scale: Learning rate of log a and log b as a share of the network's, > 0.

    Raises:
        ValueError: If a number is not positive and finite, or the function is unknown.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = parametrize.register_parametrization(layer, "weight", WeightCompander(0.3, 0.2))
        >>> bool(layer.weight.abs().max() < 0.3 * math.pi / 2)
        True
    """

    start_a: Tensor
    start_b: Tensor

    def __init__(
        self, a: float, b: float, learnable: bool = False, function: str = "arctan", *, lr_scale: float = 0.01
    ):
        super().__init__()
        _check_positive(a=a, b=b, lr_scale=lr_scale)
        if function not in FUNCTIONS:
            raise ValueError(f"function must be one of {', '.join(FUNCTIONS)}, got {function!r}")
        self.function, self.learnable, self.lr_scale = function, learnable, lr_scale
        self.register_buffer("start_a", torch.tensor(float(a)))
        self.register_buffer("start_b", torch.tensor(float(b)))
        if learnable:
            self.alpha = nn.Parameter(torch.zeros(()))
            self.beta = nn.Parameter(torch.zeros(()))

    def _now(self, start: Tensor, name: str) -> Tensor:
        if not self.learnable:
            return start
        moved: Tensor = getattr(self, name) * (math.sqrt(self.lr_scale) / RANGE)
        return start * (RANGE * moved.tanh()).exp()

    @property
    def a(self) -> Tensor:
        """Height now, positive."""
        return self._now(self.start_a, "alpha")

    @property
    def b(self) -> Tensor:
        """Width now, positive."""
        return self._now(self.start_b, "beta")

    @property
    def bound(self) -> float:
        """What no weight reaches in size."""
        return FUNCTIONS[self.function].bound * float(self.a.detach())

    def forward(self, v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The effective weight."""
        if self.function == "arctan":
            return compand(v, self.a, self.b)
        wide = v.float() if v.dtype in (torch.float16, torch.bfloat16) else v
        return (self.a * FUNCTIONS[self.function].forward(wide / self.b)).to(v.dtype)

    def right_inverse(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The latent weight; sizes beyond 0.999 of the bound are clamped to it."""
        a, b = self.a.detach(), self.b.detach()
        shape = FUNCTIONS[self.function]
        wide = w.float() if w.dtype in (torch.float16, torch.bfloat16) else w
        return (b * shape.inverse((wide / a).clamp(-INSIDE * shape.bound, INSIDE * shape.bound))).to(w.dtype)

    def extra_repr(self) -> str:
        """Function and parameters."""
        return f"{self.function}, a={float(self.a.detach()):.4g}, b={float(self.b.detach()):.4g}"


def companded(model: nn.Module) -> dict[str, WeightCompander]:
    """The companders of a model, by the name of their layer."""
    return {name: found for name, layer in model.named_modules() if (found := _compander(layer)) is not None}


def _compander(layer: nn.Module) -> WeightCompander | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    steps = layer.parametrizations["weight"]  # type: ignore[index]  # a ModuleDict that torch adds
    return next((step for step in steps if isinstance(step, WeightCompander)), None)


def apply_weight_compander(
    model: nn.Module,
    a: float | None = None,
    b: float | None = None,
    *,
    learnable: bool = False,
    init: Start = "latent",
    function: str = "arctan",
    layers: Sequence[type[nn.Module]] = LAYERS,
    exclude: Sequence[str] = (),
    lr_scale: float = 0.01,
) -> nn.Module:
    """Puts a compander on the weight of every linear and convolution layer, in place.

    Optimisers hold the latent weights, so make them afterwards.

    Args:
        model: Any network. Biases, normalisation and embeddings are left alone.
        a: Height for all layers; None is 1.2 b.
        b: Width for all layers; None is twice the standard deviation of each layer's weights.
        learnable: Whether each layer learns its own two.
        init: ``"latent"`` takes the present weights for v, so that the network changes; ``"match"`` for w, so that it
            computes what it did (what a trained network needs).
        function: As for :class:`WeightCompander`.
        layers: Types of layers, subclasses included.
        exclude: Names of layers to leave alone.
        lr_scale: As for :class:`WeightCompander`.

    Returns:
        The model.

    Raises:
        ValueError: If an argument is out of its range, no layer matches, two share their weight, a layer is companded
            already or its weights are all equal while ``b`` is None.
        TypeError: If a weight is complex or an integer.

    Example:
        >>> net = apply_weight_compander(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> sorted(companded(net))
        ['0', '2']
    """
    _check_positive(a=a, b=b)
    if init not in get_args(Start):
        raise ValueError(f"init must be one of {', '.join(get_args(Start))}, got {init!r}")
    unknown = set(exclude) - {name for name, _ in model.named_modules()}
    if unknown:
        raise ValueError(f"exclude must name layers of the model, got {sorted(unknown)}")
    kinds = tuple(layers)
    chosen: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and n not in exclude}
    if not chosen:
        raise ValueError(f"model must have a layer of the types {', '.join(t.__name__ for t in layers)}, got none")
    tied = len({id(layer.weight) for layer in chosen.values()})
    if tied < len(chosen):
        raise ValueError(f"layers must have weights of their own, got {len(chosen)} layers with {tied} weights")
    made = {name: _made(name, layer, a, b, learnable, function, lr_scale) for name, layer in chosen.items()}
    clamped = sum(_place(chosen[name], compander, init) for name, compander in made.items())
    if clamped:
        warn(f"{clamped} weights were larger than {INSIDE} of the compander's bound and were clamped to it")
    return model


def _made(
    name: str, layer: nn.Module, a: float | None, b: float | None, learnable: bool, function: str, lr_scale: float
) -> WeightCompander:
    if _compander(layer) is not None:
        raise ValueError(f"layer {name!r} must not be companded twice")
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]  # a tensor in every layer that has one
    if not weight.is_floating_point():
        raise TypeError(f"weights must be real floating point, got {weight.dtype} in {name!r}")
    width = b if b is not None else SPREAD * float(weight.float().std()) if weight.numel() > 1 else 0.0
    if not 0 < width < math.inf:
        raise ValueError(f"b must be given when the weights of a layer do not vary, as those of {name!r}")
    height = a if a is not None else GAIN * width
    return WeightCompander(height, width, learnable, function, lr_scale=lr_scale).to(weight.device)


def _place(layer: nn.Module, compander: WeightCompander, init: Start) -> int:
    """Registers a compander; how many weights had to be clamped."""
    weight: Tensor = layer.weight.detach().clone()  # type: ignore[operator]
    parametrize.register_parametrization(layer, "weight", compander)
    if init == "match":
        return int((weight.abs() > INSIDE * compander.bound).sum())
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(weight)  # type: ignore[union-attr,operator]
    return 0


def remove_weight_compander(model: nn.Module) -> nn.Module:
    """Bakes every companded weight into an ordinary one, in place; the network computes what it did.

    Example:
        >>> net = remove_weight_compander(apply_weight_compander(nn.Linear(4, 2)))
        >>> sorted(net.state_dict())
        ['bias', 'weight']
    """
    for name in list(companded(model)):
        parametrize.remove_parametrizations(model.get_submodule(name), "weight")
    return model


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: weight decay on weights of two or more dimensions, none on all the rest.

    The rest are biases, normalisation, and the companders' alpha and beta.

    Args:
        model: Any network.
        weight_decay: Of the first group, >= 0.

    Raises:
        ValueError: If ``weight_decay`` is negative.

    Example:
        >>> [len(group["params"]) for group in param_groups(nn.Linear(2, 2), 1e-4)]
        [1, 1]
    """
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be >= 0 and finite, got {weight_decay}")
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [([p for p in trained if p.ndim >= 2], weight_decay), ([p for p in trained if p.ndim < 2], 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def latents(model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The latent weight of each companded layer, and the effective one."""
    for name in companded(model):
        layer = model.get_submodule(name)
        yield layer.parametrizations.weight.original, layer.weight  # type: ignore[union-attr,misc]


def add_effective_decay_(model: nn.Module, weight_decay: float, *, only: Collection[int] | None = None) -> None:
    """Adds the gradient of weight_decay / 2 * sum w^2 over the *effective* weights to the gradients, in place.

    Call it once an update, and give the optimiser no decay for the latent weights: their size says little where Psi is
    flat. Learned a and b are not decayed.

    Args:
        model: With companded layers.
        weight_decay: Strength, >= 0.
        only: ``id`` of the latent weights that are meant, those of one optimiser say; None means all.

    Example:
        >>> net = apply_weight_compander(nn.Linear(2, 1))
        >>> net(torch.ones(1, 2)).sum().backward()
        >>> add_effective_decay_(net, 1e-2)
    """
    for latent, effective in latents(model):
        if latent.grad is not None and (only is None or id(latent) in only):
            (slope_w,) = torch.autograd.grad(effective, latent, effective.detach())
            latent.grad.add_(slope_w, alpha=weight_decay)


@torch.no_grad()
def weight_statistics(model: nn.Module) -> dict[str, dict[str, float]]:
    """How the effective weights of each linear and convolution layer are spread.

    Returns:
        For each layer ``"kurtosis"`` (excess; 0 of a Gaussian), ``"near zero"`` (share below a tenth of the standard
        deviation) and ``"largest"`` (largest size in standard deviations).

    Example:
        >>> sorted(weight_statistics(nn.Linear(8, 8))[""])
        ['kurtosis', 'largest', 'near zero']
    """
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LAYERS):
            weight: Tensor = layer.weight.detach().double()  # type: ignore[operator]
            std = weight.std(correction=0)
            found[name] = {
                "kurtosis": float(((weight - weight.mean()) / std).pow(4).mean() - 3),
                "near zero": float((weight.abs() < 0.1 * std).double().mean()),
                "largest": float(weight.abs().max() / std),
            }
    return found
