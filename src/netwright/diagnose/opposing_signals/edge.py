"""How sharp the loss is, and where gradient descent stops being stable.

Rosenfeld and Risteski, "Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization", ICLR
2024, arXiv:2311.04163; the limits are those of Cohen et al., "Gradient Descent on Neural Networks Typically Occurs at
the Edge of Stability", ICLR 2021, arXiv:2103.00065, and "Adaptive Gradient Methods at the Edge of Stability", 2022,
arXiv:2207.14484. On a quadratic of curvature lambda a step of size eta is stable below

    gradient descent: 2 / eta,    heavy ball: 2 (1 + beta) / eta,    Adam: 2 (1 + beta_1) / ((1 - beta_1) eta)

where Adam's lambda is that of P^(-1/2) H P^(-1/2), P the diagonal by which it divides.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from netwright.cost.memory import saved_bytes
from netwright.diagnose.gradients import Batched, batches
from netwright.diagnose.losses import LossFunction, example_losses
from netwright.nn.curvature import hessian_products, largest_eigenpairs
from netwright.nn.modes import in_mode
from netwright.seeding import stream

# Bytes that forward passes save: of a chunk of examples, and of all of them for their graphs to be kept.
CHUNK_BYTES, KEPT_BYTES = 2**26, 2**28
# Bytes of the directions that the iteration keeps; where more are needed it begins anew from the best one.
BASIS_BYTES = 2**30
# An old eigenvector may be exactly another one of the new matrix; a little of everything lets it leave.
NOISE = 0.03


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name.

    Raises:
        ValueError: If there are none.

    Example:
        >>> list(trained_parameters(nn.Linear(2, 1)))
        ['weight', 'bias']
    """
    found = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if not found:
        raise ValueError("model must have at least 1 parameter that is trained, got 0")
    return found


def chunk_size(model: nn.Module, loss_fn: LossFunction, x: Tensor, y: Tensor) -> tuple[int, int]:
    """How many examples fit into a chunk, and the bytes that a forward pass of one saves."""
    few = x[:3].clone()  # a part of x would count as the whole of it
    with torch.enable_grad():
        saved = saved_bytes(lambda: example_losses(loss_fn, model(few), y[: len(few)]))
    each = max(1, saved // len(few))
    return max(1, CHUNK_BYTES // each), each


def sharpness(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Batched,
    iters: int = 30,
    v0: Float[Tensor, " numbers"] | None = None,
    *,
    tolerance: float = 1e-3,
    preconditioner: Float[Tensor, " numbers"] | None = None,
    seed: int = 0,
) -> tuple[float, Float[Tensor, " numbers"]]:
    """The algebraically largest eigenvalue of the Hessian of the mean loss, and its direction, by Lanczos's iteration.

    An iteration costs two to three gradients of all the data. Begun with the direction of a moment before, it takes
    three to five.

    Args:
        model: Maps a batch of inputs to outputs; in evaluation mode meanwhile, left as it was.
        loss_fn: Maps (outputs, targets) of a batch to one loss an example.
        data: A pair of tensors (inputs, targets), or batches of such pairs that can be read many times.
        iters: Most iterations, at least 1.
        v0: Direction to begin with, of all trained parameters in the model's order.
        tolerance: Residual over the largest absolute eigenvalue seen, at which to stop; the eigenvalue's relative
            error is about the square of it, over the relative gap to the next.
        preconditioner: Positive P, a number a parameter, for the eigenvalue of P^(-1/2) H P^(-1/2).
        seed: Of the first direction.

    Returns:
        The eigenvalue, and a vector of length 1 of all trained parameters; with a preconditioner the direction in which
        the parameters themselves move.

    Raises:
        ValueError: If ``iters`` or ``tolerance`` is out of its range, a vector has another length, the preconditioner
            is not positive, there is no example, or the loss does not give one number an example.
        FloatingPointError: If a product with the Hessian is not finite.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> loss = lambda output, _: 0.5 * output[:, 0] ** 2      # the Hessian is the mean of x x^T
        >>> value, vector = sharpness(net, loss, (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2)))
        >>> round(value, 4), vector.abs().round(decimals=3)
        (2.0, tensor([1., 0.]))
    """
    params = list(trained_parameters(model).values())
    size = sum(param.numel() for param in params)
    like = params[0]
    if iters < 1:
        raise ValueError(f"iters must be >= 1, got {iters}")
    for name, vector in (("v0", v0), ("preconditioner", preconditioner)):
        if vector is not None and vector.shape != (size,):
            raise ValueError(f"{name} must hold {size} numbers, one a parameter, got shape {tuple(vector.shape)}")
    if preconditioner is not None and not bool((preconditioner > 0).all()):
        raise ValueError(f"preconditioner must be > 0, got {float(preconditioner.min())}")
    scale = None if preconditioner is None else preconditioner.to(like).rsqrt()
    hessian = _mean_hessian(model, loss_fn, data, params)
    dtype = torch.float64 if 8 * size * iters <= BASIS_BYTES // 4 else like.dtype

    def product(vector: Tensor) -> Tensor:
        given = vector.to(like) if scale is None else scale * vector.to(like)
        image = hessian(given)
        return (image if scale is None else scale * image).to(vector)

    start = None
    noise = torch.randn(size, generator=stream(seed, "sharpness")).to(like)
    if v0 is not None:
        known = v0.to(like) if scale is None else v0.to(like) / scale
        start = known / known.norm() + NOISE * noise / noise.norm()
    elif dtype != torch.float64 or like.device.type != "cpu":
        start = noise
    rows = max(3, BASIS_BYTES // (size * dtype.itemsize))
    left = iters
    with in_mode(model, training=False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        while True:
            most = min(left, rows)
            found = largest_eigenpairs(
                product, size, max_steps=most, tolerance=tolerance, start=start, seed=seed, dtype=dtype
            )
            left -= found.products
            if left < 1 or found.products < most or float(found.residuals) <= tolerance * abs(float(found.values)):
                break
            start = found.vectors[0]
    direction = found.vectors[0].to(like)
    direction = direction if scale is None else scale * direction
    return float(found.values), direction / direction.norm()


def _mean_hessian(
    model: nn.Module, loss_fn: LossFunction, data: Batched, params: list[nn.Parameter]
) -> Callable[[Tensor], Tensor]:
    """v -> H v of the mean loss over all examples; the graphs are kept where they are small."""
    pieces: list[tuple[Tensor, Tensor]] = []
    saved = 0
    with in_mode(model, training=False):
        for batch in batches(data):
            x, y = (side.to(params[0].device) for side in batch)
            if not len(x):
                continue
            count, each = chunk_size(model, loss_fn, x, y)
            saved += each * len(x)
            pieces += zip(x.split(count), y.split(count), strict=True)
    examples = sum(len(x) for x, _ in pieces)
    if not examples:
        raise ValueError("data must hold at least 1 example, got 0")
    sizes = [param.numel() for param in params]

    def products(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        loss = example_losses(loss_fn, model(x), y).sum() / examples
        product = hessian_products(loss, params)

        def flat(vector: Tensor) -> Tensor:
            parts = [part.view_as(p) for part, p in zip(vector.split(sizes), params, strict=True)]
            return torch.cat([part.reshape(-1) for part in product(parts)])

        return flat

    kept: list[Callable[[Tensor], Tensor]] = []

    def hessian(vector: Tensor) -> Tensor:
        total = torch.zeros_like(vector)
        if saved > KEPT_BYTES:
            for x, y in pieces:
                total += products(x, y)(vector)
            return total
        if not kept:
            kept.extend(products(x, y) for x, y in pieces)
        for each in kept:
            total += each(vector)
        return total

    return hessian


def stability_limit(optimizer: torch.optim.Optimizer) -> float:
    """The sharpness above which the optimiser's steps oscillate with growing amplitude, on a quadratic.

    Args:
        optimizer: SGD with any momentum, Adam or AdamW (whose limit is that of the sharpness under
            :func:`adam_preconditioner`), all groups at one learning rate.

    Raises:
        ValueError: If it is another optimiser, or its groups differ in learning rate or momentum.

    Example:
        >>> w = nn.Parameter(torch.zeros(1))
        >>> optimizers = torch.optim.SGD([w], 0.1), torch.optim.SGD([w], 0.1, momentum=0.9), torch.optim.Adam([w], 0.1)
        >>> [round(stability_limit(optimizer)) for optimizer in optimizers]
        [20, 38, 380]
    """
    found = {_limit(optimizer, group) for group in optimizer.param_groups}
    if len(found) > 1:
        raise ValueError(f"groups must share learning rate and momentum, got limits {sorted(found)}")
    return found.pop()


def _limit(optimizer: torch.optim.Optimizer, group: dict) -> float:
    lr = float(group["lr"])
    if lr <= 0:
        return math.inf
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        beta = float(group["betas"][0])
        return 2 * (1 + beta) / ((1 - beta) * lr)
    if isinstance(optimizer, torch.optim.SGD):
        beta, damped = float(group["momentum"]), 1 - float(group["dampening"])
        if group["nesterov"]:
            return 2 * (1 + beta) / ((1 + 2 * beta) * lr)
        return 2 * (1 + beta) / ((damped if beta else 1.0) * lr)
    raise ValueError(f"optimizer must be SGD, Adam or AdamW, got {type(optimizer).__name__}")


def adam_preconditioner(optimizer: torch.optim.Adam) -> Float[Tensor, " numbers"]:
    """P, by which the next step of Adam divides the mean gradient: (1 - beta_1^t) (sqrt(v / (1 - beta_2^t)) + eps).

    v is the mean square, under AMSGrad the largest it has been.

    Args:
        optimizer: Adam or AdamW after at least one step, of the model's trained parameters in order.

    Raises:
        ValueError: If a parameter has made no step.

    Example:
        >>> w = nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = torch.optim.Adam([w], lr=0.1)
        >>> (w * torch.tensor([1.0, 100.0])).sum().backward()
        >>> optimizer.step()
        >>> adam_preconditioner(optimizer) / (1 - 0.9)
        tensor([  1., 100.])
    """
    parts = []
    for group in optimizer.param_groups:
        first, second = (float(beta) for beta in group["betas"])
        square = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            if square not in state:
                raise ValueError("optimizer must have made a step on every parameter, got one without")
            step = float(state["step"])
            root = (state[square] / (1 - second**step)).sqrt() + group["eps"]
            parts.append(((1 - first**step) * root).reshape(-1))
    return torch.cat(parts)
