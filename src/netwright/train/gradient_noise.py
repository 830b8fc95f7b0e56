"""Annealed Gaussian gradient noise: early noise leaves plateaus and bad starts, late noise has faded.

Neelakantan, Vilnis, Le, Sutskever, Kaiser, Kurach and Martens, "Adding Gradient Noise Improves Learning for Very Deep
Networks", 2015, arXiv:1511.06807.

    g_t <- clip(g_t) + N(0, sigma_t^2 I),    sigma_t^2 = eta / (1 + t)^gamma

t counts the updates of the optimiser, from 0. The noise is added after clipping, so that the threshold does not depend
on the number d of parameters (the noise has norm sigma sqrt(d)).

With plain SGD the noise of an update has standard deviation lr * sigma_t; after T steps it has moved a weight by lr *
sqrt(eta * S_T), S_T = sum_{t<T} (1 + t)^-gamma ~ T^(1-gamma) / (1-gamma) (gamma 0.55: 48 at T = 1000, 139 at 10,000). A
network that starts at zero is trainable once that reaches the size of a usual initialisation. Adam divides by sqrt(v),
and v absorbs sigma^2: on a plateau its noisy step has size lr whatever eta is. Decoupled weight decay is not affected;
L2 as a term of the gradient belongs to the optimiser's step, after the noise. It is no Langevin sampler: there the
noise has variance 2 lr and is added to the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from netwright.checks import one_of
from netwright.seeding import derive
from netwright.train.normal import NormalStream

Order = Literal["clip_then_noise", "noise_then_clip"]


def noise_variance(step: int, eta: float = 0.01, gamma: float = 0.55) -> float:
    """The variance sigma_t^2 at update ``step``.

    Args:
        step: Number of the update, counted from 0.
        eta: Variance at step 0, >= 0; the paper uses 0.01, 0.3 or 1.0.
        gamma: Exponent of the decay, >= 0.

    Raises:
        ValueError: If an argument is negative or not finite.

    Example:
        >>> noise_variance(0, eta=0.3), round(noise_variance(99, eta=1.0), 7)
        (0.3, 0.0794328)
    """
    for name, value in (("eta", eta), ("gamma", gamma), ("step", step)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {value}")
    return eta / (1 + step) ** gamma


def add_gradient_noise_(params: Iterable[Tensor], variance: float, generator: torch.Generator | None = None) -> None:
    """Adds independent noise N(0, variance) to every component of the gradients, in place.

    It is drawn in float32 (float64 for float64) and cast. Parameters without a gradient and frozen ones stay as they
    are; a sparse gradient gets noise in the rows that it holds, and no others.

    Args:
        params: Parameters whose ``grad`` is changed.
        variance: Of each component, >= 0; with 0 nothing is drawn.
        generator: Source of the noise; torch's global one when None. Noise is drawn on the generator's device.

    Raises:
        ValueError: If ``variance`` is negative or not finite, or there are no parameters.
        TypeError: If a parameter is not real floating point.

    Example:
        >>> weight = torch.zeros(3, requires_grad=True)
        >>> weight.grad = torch.zeros(3)
        >>> add_gradient_noise_([weight], 0.01, torch.Generator().manual_seed(0))
        >>> bool((weight.grad != 0).all())
        True
    """
    if not 0 <= variance < math.inf:
        raise ValueError(f"variance must be >= 0 and finite, got {variance}")

    def fill(flat: Tensor, std: float) -> None:
        flat.normal_(0.0, std, generator=generator)

    _add(_checked(params), variance, fill, {}, None if generator is None else generator.device)


def _checked(params: Iterable[Tensor]) -> list[Tensor]:
    found = list(params)
    if not found:
        raise ValueError("params must hold at least 1 parameter, got none")
    for param in found:
        if not param.is_floating_point():
            raise TypeError(f"params must be real floating point, got {param.dtype}")
    return found


class _Buffer:
    """Room for the noise of one update, with a view for each gradient; both last as long as the shapes do."""

    def __init__(self, shapes: list[torch.Size], device: torch.device, dtype: torch.dtype):
        self.shapes, sizes = shapes, [math.prod(shape) for shape in shapes]
        self.flat = torch.empty(sum(sizes), device=device, dtype=dtype)
        pieces = self.flat.split(sizes)
        self.views = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


@torch.no_grad()
def _add(
    params: Iterable[Tensor],
    variance: float,
    fill: Callable[[Tensor, float], object],
    buffers: dict[tuple[torch.device, torch.dtype], _Buffer],
    source: torch.device | None = None,
) -> None:
    """The noise of one update: a flat draw for each device and type, by ``fill(flat, std)`` on ``source``."""
    if variance == 0:
        return
    grads = [_held(param) for param in params if param.grad is not None and param.requires_grad]
    for (device, dtype), group in _by_kind(grads).items():
        drawn_as = torch.float64 if dtype == torch.float64 else torch.float32
        shapes = [grad.shape for grad in group]
        buffer = buffers.get((device, dtype))
        if buffer is None or buffer.shapes != shapes:
            buffers[device, dtype] = buffer = _Buffer(shapes, device if source is None else source, drawn_as)
        fill(buffer.flat, math.sqrt(variance))
        same = drawn_as == dtype and buffer.flat.device == device
        views = buffer.views if same else [v.to(grad) for v, grad in zip(buffer.views, group, strict=True)]
        torch._foreach_add_(group, views)


def _by_kind(grads: list[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """Gradients by device and type; nearly always there is one kind, which is told at little cost."""
    if not grads:
        return {}
    device, dtype = grads[0].device, grads[0].dtype
    if all(grad.dtype is dtype and grad.device == device for grad in grads):
        return {(device, dtype): grads}
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        groups.setdefault((grad.device, grad.dtype), []).append(grad)
    return groups


def _held(param: Tensor) -> Tensor:
    """The gradient of a parameter; of a sparse one the rows that it holds."""
    grad = param.grad
    assert grad is not None
    if not grad.is_sparse:
        return grad
    param.grad = grad.coalesce()
    return param.grad._values()


class GradientNoise:
    """Annealed noise for a list of parameters, with the number of the update and a generator of its own.

    In distributed training every rank must add the same noise: give all the same seed, and call :meth:`step` after
    the gradients were reduced. Strategies that cut parameters into shards would repeat the noise in each.

    Args:
        params: Parameters, whose gradients are changed by :meth:`step`.
        eta: Variance at step 0, >= 0; 0 is an exact no-op that draws nothing.
        gamma: Exponent of its decay, >= 0; fixed at 0.55 in the paper.
        seed: Of the noise; torch's global generators are never touched. None takes one that nobody chose, kept in
            ``seed``.
        schedule: Maps the number of the update to its variance, in place of ``eta`` and ``gamma``.

    Attributes:
        t: Updates so far.
        sigma: Standard deviation of the last noise; 0 before the first.

    Raises:
        ValueError: If a number is negative or not finite, there are no parameters, or several processes train without
            a seed, whose noise would differ.
        TypeError: If a parameter is not real floating point.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> noise, optimizer = GradientNoise(net.parameters(), eta=0.3), torch.optim.SGD(net.parameters(), lr=0.1)
        >>> net(torch.ones(1, 4)).sum().backward()
        >>> round(noise.step(), 6), noise.t
        (0.547723, 1)
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        eta: float = 0.01,
        gamma: float = 0.55,
        seed: int | None = None,
        schedule: Callable[[int], float] | None = None,
    ):
        noise_variance(0, eta, gamma)
        self.params = _checked(params)
        self.eta, self.gamma, self.seed, self.schedule = eta, gamma, _chosen(seed), schedule
        self.t, self.sigma = 0, 0.0
        self._generators: dict[torch.device, torch.Generator] = {}
        self._stream = NormalStream(derive(self.seed, "gradient noise"))
        self._buffers: dict[tuple[torch.device, torch.dtype], _Buffer] = {}

    @property
    def variance(self) -> float:
        """Variance of the next update."""
        return noise_variance(self.t, self.eta, self.gamma) if self.schedule is None else float(self.schedule(self.t))

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(derive(self.seed, "gradient noise"))
        return self._generators[device]

    def _fill(self, flat: Tensor, std: float) -> None:
        if flat.dtype == torch.float32 and flat.device.type == "cpu":
            self._stream.fill_(flat, std)
        else:
            flat.normal_(0.0, std, generator=self._generator(flat.device))

    def step(self) -> float:
        """Adds the noise of this update to the gradients, and counts it; returns sigma.

        When no parameter has a gradient there is no update to count.
        """
        variance = self.variance
        if not 0 <= variance < math.inf:
            raise ValueError(f"schedule must give a variance >= 0 and finite, got {variance} at step {self.t}")
        if all(param.grad is None for param in self.params):
            return math.sqrt(variance)
        _add(self.params, variance, self._fill, self._buffers)
        self.t += 1
        self.sigma = math.sqrt(variance)
        return self.sigma

    def state_dict(self) -> dict[str, Any]:
        """Number of the update, seed and state of the generators."""
        states = {str(device): generator.get_state() for device, generator in self._generators.items()}
        return {"t": self.t, "seed": self.seed, "stream": self._stream.get_state(), "generators": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the state was taken."""
        self.t, self.seed = state["t"], state["seed"]
        self._stream.set_state(state["stream"])
        self._generators = {}
        for name, value in state["generators"].items():
            self._generator(torch.device(name)).set_state(value.cpu())


def _chosen(seed: int | None) -> int:
    """The seed, or one that nobody chose."""
    if seed is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise ValueError("seed must be given where several processes train, since they must add the same noise")
        return torch.Generator().seed() >> 1
    derive(seed)
    return seed


def _params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def attach(optimizer: torch.optim.Optimizer, noise: GradientNoise) -> RemovableHandle:
    """Lets ``noise`` act at every step of the optimiser, after a closure that computes the gradients if one is given.

    Lightning passes such a closure, which clips as well: the noise then comes after the clipping.
    """

    def before(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        noise.params = _params_of(optimizer)  # groups may have been added
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            noise.step()
            return None

        def noisy() -> Any:
            loss = closure()
            noise.step()
            return loss

        rest = {name: value for name, value in kwargs.items() if name != "closure"}
        return (args[0], noisy, *args[2:]), rest

    return optimizer.register_step_pre_hook(before)


def register_gradient_noise(
    optimizer: torch.optim.Optimizer, eta: float = 0.01, gamma: float = 0.55, seed: int | None = 0
) -> RemovableHandle:
    """Adds annealed noise before every step of an optimiser; clip before ``optimizer.step()`` as ever.

    With a gradient scaler, ``scaler.unscale_`` first; a step that the scaler skips is not counted.

    Args:
        optimizer: Any optimiser.
        eta, gamma, seed: As for :class:`GradientNoise`. Keep a ``GradientNoise`` and :func:`attach` it where the
            number of the update is to be saved.

    Returns:
        A handle whose ``remove()`` ends it.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> handle = register_gradient_noise(optimizer, eta=0.3)
        >>> handle.remove()
    """
    return attach(optimizer, GradientNoise(_params_of(optimizer), eta, gamma, seed))


class NoisyOptimizer(torch.optim.Optimizer):
    """An optimiser around another one, which clips the gradient and adds annealed noise before each of its steps.

    ``state_dict`` holds the inner optimiser's and the noise's; schedules act on the shared ``param_groups``.

    Args:
        optimizer: The optimiser that makes the step.
        eta, gamma, seed: As for :class:`GradientNoise`.
        clip_norm: Largest norm of the whole gradient, > 0; None leaves it as it is.
        order: ``"clip_then_noise"``, or ``"noise_then_clip"``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> optimizer = NoisyOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), eta=0.3, clip_norm=10.0)
        >>> net(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.noise.t
        1
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        eta: float = 0.01,
        gamma: float = 0.55,
        seed: int | None = 0,
        clip_norm: float | None = None,
        order: Order = "clip_then_noise",
    ):
        check_order(order)
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be > 0, got {clip_norm}")
        self.optimizer = optimizer
        self.noise = GradientNoise(_params_of(optimizer), eta, gamma, seed)
        self.clip_norm, self.order = clip_norm, order
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups = optimizer.param_groups
        self.state = optimizer.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clips, adds noise, and lets the inner optimiser step.

        Args:
            closure: Computes the gradients and returns the loss; called once, before all else.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.noise.params = _params_of(self.optimizer)
        if self.order == "clip_then_noise":
            self._clip()
        self.noise.step()
        if self.order == "noise_then_clip":
            self._clip()
        self.optimizer.step()
        return loss

    def _clip(self) -> None:
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.noise.params, self.clip_norm)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the inner optimiser."""
        if any(param_group is group for group in self.optimizer.param_groups):
            return  # those that it has already, as the base class tells them one by one
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """State of the inner optimiser, and of the noise under ``"noise"``."""
        return {**self.optimizer.state_dict(), "noise": self.noise.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores both."""
        self.noise.load_state_dict(state_dict["noise"])
        self.optimizer.load_state_dict({name: value for name, value in state_dict.items() if name != "noise"})
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state


def check_order(order: str) -> None:
    """Refuses what is no order of clipping and noise."""
    one_of("order", order, get_args(Order))
