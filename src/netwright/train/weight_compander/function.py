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
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.checks import one_of

Start = Literal["latent", "match"]
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
        along_a = (grad * (v / b).atan()).sum_to_size(a.shape) if ctx.needs_input_grad[1] else None
        along_b = -(over * v).mul(a).sum_to_size(b.shape) if ctx.needs_input_grad[2] else None
        slope = over * (a * b) if ctx.needs_input_grad[0] else None
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
    found = _Arctan.apply(wide, _scalar(a, wide), _scalar(b, wide))
    return found if wide is v else found.to(v.dtype)


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor beside another; at once where it is one."""
    if isinstance(value, Tensor) and value.dtype == like.dtype and value.device == like.device:
        return value
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


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

    check_positive(a=a, b=b)
    if a <= b:
        return None
    # In units of b; arctan(u) > u / (1 + u^2 / 3) bounds the root from below.
    ratio = a / b
    least = math.sqrt(3 * (ratio - 1))
    root = brentq(lambda u: ratio * math.atan(u) - u, least / 2, ratio * math.pi / 2, xtol=1e-15, rtol=1e-14)
    return b * float(root)


def check_positive(**values: float | None) -> None:
    """Refuses numbers that are not positive and finite; None is passed over."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")


def check_settings(
    a: float | None, b: float | None, learnable: bool, init: str, function: str, lr_scale: float
) -> None:
    """Refuses what :func:`apply_weight_compander` takes for no network."""
    check_positive(a=a, b=b, lr_scale=lr_scale)
    if not isinstance(learnable, bool):
        raise ValueError(f"learnable must be true or false, got {learnable!r}")
    one_of("init", init, get_args(Start))
    one_of("function", function, FUNCTIONS)


class WeightCompander(nn.Module):
    """Parametrization that computes a weight as Psi of its latent one.

    Learned, a = a_0 exp(r tanh(alpha / r)) with alpha = 0 at the start and r = log 10, so that a stays within a tenth
    and ten times its start; b likewise with beta. The gradients of alpha and beta are sums over all weights of the
    layer, for which the network's learning rate is far too large: ``param_groups`` and ``scale_rates_`` give them a
    parameter group of their own with ``lr_scale`` times that rate; ``Classifier`` and ``WeightCompanderCallback`` do.

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
        >>> _ = nn.utils.parametrize.register_parametrization(layer, "weight", WeightCompander(0.3, 0.2))
        >>> bool(layer.weight.abs().max() < 0.3 * math.pi / 2)
        True
    """

    start_a: Tensor
    start_b: Tensor

    def __init__(
        self, a: float, b: float, learnable: bool = False, function: str = "arctan", *, lr_scale: float = 0.01
    ):
        super().__init__()
        check_settings(a, b, learnable, "latent", function, lr_scale)
        self.function, self.learnable, self.lr_scale = function, learnable, lr_scale
        self.register_buffer("start_a", torch.tensor(float(a)))
        self.register_buffer("start_b", torch.tensor(float(b)))
        if learnable:
            self.alpha = nn.Parameter(torch.zeros(()))
            self.beta = nn.Parameter(torch.zeros(()))

    def _now(self, start: Tensor, name: str) -> Tensor:
        if not self.learnable:
            return start
        moved: Tensor = getattr(self, name) / RANGE
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
