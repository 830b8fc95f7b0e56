"""How sharp the minimum of a search is, what discretisation costs there, and a step that seeks flat minima.

The relation on which SD-DARTS rests: Zhu, Li, Liu and Wang, "Improving Differentiable Architecture Search via
Self-Distillation", Neural Networks 2023, arXiv:2302.05629. At a minimiser a* of L_val(w*, .), with discretised a,

    L(w*, a) <= L(w*, a*) + lambda_max(H) ||a - a*||^2 / 2,    H = grad^2_a L_val(w*, a*)
    S_rho = max_{||e|| <= rho} L(theta + e) - L(theta),    about rho ||grad L|| for small rho

The step is that of Foret et al., "Sharpness-Aware Minimization", ICLR 2021, arXiv:2010.01412, on the architecture:
g_a = grad_a L_val(w, a + e) at e = rho grad_a L_val / ||grad_a L_val||.

All figures are of the function that the search minimises: batch norms normalise by the batch and keep their statistics,
and layers or gates that draw numbers draw the same ones for a batch every time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from netwright.checks import number, one_of, whole
from netwright.nn.batchnorm import frozen_statistics, recalibrate
from netwright.nn.curvature import hessian_vector_product, largest_eigenvalues
from netwright.nn.modes import in_mode
from netwright.search.bilevel import (
    FirstOrder,
    Gradients,
    assign,
    average,
    check_derivatives,
    global_norm,
    gradients,
)
from netwright.search.objective import Evaluation, Objective, TaskLoss
from netwright.search.pairs import to_device
from netwright.search.protocol import need, weights_of
from netwright.seeding import seeded

if TYPE_CHECKING:
    from netwright.search.genotype import Genotype
    from netwright.search.supernet import Supernet

Wrt = Literal["alpha", "weights", "both"]
Statistics = Literal["batch", "running"]
Loss = Callable[..., Tensor]


@contextmanager
def _only(supernet: Any, parameters: Sequence[Tensor]) -> Iterator[None]:
    """The supernet as the search sees it, with a gradient for these parameters alone, which saves most of a pass."""
    wanted = [(p, p.requires_grad) for p in supernet.parameters()]
    chosen = {id(p) for p in parameters}
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(id(parameter) in chosen)
        with in_mode(supernet, training=True), frozen_statistics(supernet):
            yield
    finally:
        for parameter, value in wanted:
            parameter.requires_grad_(value)


def _losses(supernet: Any, batches: Iterable[Any], objective: Loss) -> Iterator[tuple[Tensor, int]]:
    """The loss of each batch with its size."""
    device = next(iter(supernet.parameters())).device
    seen = 0
    for place, batch in enumerate(batches):
        x = to_device(batch, device)
        with seeded(0, "sharpness", place):
            loss = objective(supernet, x, part="alpha")
        yield loss, len(x[0])
        seen += len(x[0])
    if not seen:
        raise RuntimeError("val must hold at least 1 batch, and give them again when it is read again, got 0")


def _loss(supernet: Any, batches: Iterable[Any], objective: Loss) -> float:
    with torch.no_grad():
        found = [(float(loss), size) for loss, size in _losses(supernet, batches, objective)]
    return sum(loss * size for loss, size in found) / sum(size for _, size in found)


def alpha_hessian_eig(
    supernet: Supernet | Any,
    val: Iterable[Any],
    k: int = 1,
    *,
    objective: Loss | None = None,
    max_steps: int = 30,
    tolerance: float = 1e-3,
) -> Float[Tensor, " k"]:
    """The largest eigenvalues of the Hessian of the validation loss in the architecture parameters, largest first.

    Each of Lanczos's steps reads all batches once and costs about five forward passes over them; a handful is enough.

    Args:
        supernet: The network; nothing of it is changed.
        val: Batches ``(inputs, labels)``, which can be read several times; the loss is the mean over their examples.
        k: How many eigenvalues.
        objective: The loss, ``objective(supernet, batch, part="alpha")``; cross-entropy by default.
        max_steps: Most steps.
        tolerance: Relative residual at which to stop.

    Raises:
        ValueError: If a number is out of its range, or the loss goes in steps of the architecture (superkernels, binary
            gates).
        RuntimeError: If there is no batch.
        FloatingPointError: If a product with the Hessian is not finite.

    Example:
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2)
        >>> batch = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> alpha_hessian_eig(supernet, [batch], k=2).shape
        torch.Size([2])
    """
    check_derivatives(supernet, "alpha_hessian_eig", "rho_sharpness with wrt='weights' tells of the weights")
    alphas = list(supernet.arch_parameters())
    loss = objective or TaskLoss()

    def product(vector: Tensor) -> Tensor:
        parts = vector.to(alphas[0]).split([a.numel() for a in alphas])
        directions = [part.view_as(a) for part, a in zip(parts, alphas, strict=True)]
        total, seen = torch.zeros_like(vector), 0
        for value, size in _losses(supernet, val, loss):
            found = hessian_vector_product(value, alphas, directions)
            total += size * torch.cat([h.reshape(-1) for h in found]).to(vector)
            seen += size
        return total / seen

    with _only(supernet, alphas):
        size = sum(a.numel() for a in alphas)
        return largest_eigenvalues(product, size, k, max_steps=max_steps, tolerance=tolerance)


def rho_sharpness(
    supernet: Supernet | Any,
    loader: Iterable[Any],
    rho: float = 0.05,
    wrt: Wrt = "alpha",
    n_steps: int = 1,
    *,
    objective: Loss | None = None,
) -> float:
    """S_rho: by how much the loss can rise within a distance rho of the parameters, in nats.

    The first step goes along the gradient, e = rho g / ||g||; further ones take the gradient where the last one ended,
    and the largest rise counts. A lower bound of the maximum, and exact to first order in rho.

    Args:
        supernet: The network; nothing of it is changed, to the bit.
        loader: Batches ``(inputs, labels)``, which can be read several times.
        rho: The distance, > 0, in the Euclidean norm of all parameters together.
        wrt: Which parameters move.
        n_steps: Steps, at least 1.
        objective: The loss, ``objective(supernet, batch, part="alpha")``; cross-entropy by default.

    Raises:
        ValueError: If a value is out of its range, or the architecture is to move where the loss goes in steps of it
            (superkernels, binary gates).
        RuntimeError: If there is no batch.

    Example:
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2)
        >>> batch = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> rho_sharpness(supernet, [batch], rho=1.0) > 0
        True
    """
    number("rho", rho, "> 0")
    one_of("wrt", wrt, get_args(Wrt))
    whole("n_steps", n_steps, ">= 1")
    parameters: list[nn.Parameter] = []
    if wrt in ("alpha", "both"):
        check_derivatives(supernet, f"rho_sharpness with wrt={wrt!r}", "take wrt='weights'")
        parameters += supernet.arch_parameters()
    if wrt in ("weights", "both"):
        parameters += weights_of(supernet)
    loss = objective or TaskLoss()
    saved = [p.detach().clone() for p in parameters]
    rises: list[float] = []
    with _only(supernet, parameters):
        start = _loss(supernet, loader, loss)
        try:
            for _ in range(n_steps):
                slope = _gradient(supernet, loader, loss, parameters)
                norm = float(global_norm(slope))
                if norm == 0.0:
                    break
                assign(parameters, torch._foreach_add(saved, slope, alpha=rho / norm))
                rises.append(_loss(supernet, loader, loss) - start)
        finally:
            assign(parameters, saved)
    return max(rises, default=0.0)


def _gradient(supernet: Any, batches: Iterable[Any], objective: Loss, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of the mean loss over all examples; its scale does not matter to who only wants the direction."""
    total = [torch.zeros_like(p) for p in parameters]
    for loss, size in _losses(supernet, batches, objective):
        for sum_, slope in zip(total, gradients(loss, parameters), strict=True):
            if slope is not None:
                sum_.add_(slope, alpha=size)
    return total


def discretised(supernet: Supernet, genotype: Genotype) -> Supernet:
    """A copy of a supernet in which every choice is the genotype's: one operation with weight 1, or none.

    Superkernels get the thresholds under which the genotype is what is left of them.

    Raises:
        ValueError: If the genotype is not of the supernet's space, or the supernet adopts none.

    Example:
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2)
        >>> sum(float(m.sum()) for m in discretised(supernet, supernet.derive()).mixing_weights().values())
        4.0
    """
    need("discretised", supernet, "adopt")
    made = copy.deepcopy(supernet)
    made.adopt(genotype)
    return made


def discretisation_gap(
    supernet: Supernet,
    genotype: Genotype,
    val: Iterable[Any],
    *,
    statistics: Statistics = "batch",
    recalibrate_on: Iterable[Any] | None = None,
) -> dict[str, float]:
    """Loss and accuracy of a supernet beside those of the same weights with only the genotype's operations.

    Nothing is trained, and the supernet stays as it is.

    Args:
        supernet: A searched supernet.
        genotype: What was derived from it.
        val: Batches ``(inputs, labels)``.
        statistics: What batch norms normalise by: the batch, as in the search, or their running statistics.
        recalibrate_on: Batches on which both networks measure their running statistics anew first.

    Returns:
        ``supernet loss`` and ``discrete loss`` (nats), ``supernet accuracy`` and ``discrete accuracy`` (shares), and
        what is lost from the first to the second, ``loss gap`` and ``accuracy gap``: positive when it got worse.

    Raises:
        ValueError: If the genotype is not of the supernet's space, ``statistics`` is unknown, or batches to
            recalibrate on are given although running statistics are not used.
        RuntimeError: If there is no batch.

    Example:
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2)
        >>> batch = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> gap = discretisation_gap(supernet, supernet.derive(), [batch])
        >>> gap["loss gap"] == gap["discrete loss"] - gap["supernet loss"]
        True
    """
    one_of("statistics", statistics, get_args(Statistics))
    if recalibrate_on is not None and statistics != "running":
        raise ValueError(f"statistics must be 'running' when recalibrate_on is given, got {statistics!r}")
    networks = {"supernet": supernet, "discrete": discretised(supernet, genotype)}
    if recalibrate_on is not None:
        networks["supernet"] = copy.deepcopy(supernet)
        for network in networks.values():
            recalibrate(network, recalibrate_on)
    figures: dict[str, float] = {}
    for name, network in networks.items():
        figures[f"{name} loss"], figures[f"{name} accuracy"] = loss_and_accuracy(network, val, statistics)
    figures["loss gap"] = figures["discrete loss"] - figures["supernet loss"]
    figures["accuracy gap"] = figures["supernet accuracy"] - figures["discrete accuracy"]
    return figures


class _LossAndAccuracy(Objective):
    """Both at once, of one pass."""

    def term(self, total: Tensor, seen: Evaluation) -> Tensor:
        loss = functional.cross_entropy(seen.logits, seen.labels)
        return torch.stack([loss, (seen.logits.argmax(1) == seen.labels).to(loss.dtype).mean()])


@torch.no_grad()
def loss_and_accuracy(network: nn.Module, val: Iterable[Any], statistics: Statistics = "batch") -> tuple[float, float]:
    """Loss (nats) and accuracy (a share) of a network, means over all examples; nothing of it is changed.

    Args:
        network: A supernet, or any other network.
        val: Batches ``(inputs, labels)``.
        statistics: What batch norms normalise by: the batch, as in the search, or their running statistics.

    Raises:
        RuntimeError: If there is no batch.
    """
    with in_mode(network, training=statistics == "batch"), frozen_statistics(network):
        found = [(size * value.double(), size) for value, size in _losses(network, val, _LossAndAccuracy())]
    loss, accuracy = torch.stack([value for value, _ in found]).sum(0) / sum(size for _, size in found)
    return float(loss), float(accuracy)


class SharpnessAware(FirstOrder):
    """As :class:`netwright.search.bilevel.FirstOrder`, but the architecture descends from the worst place nearby.

    Its gradient is taken at alpha + rho g / ||g||, where g is the gradient at alpha: one more pass, forward and back.

    Args:
        rho: Distance to that place, > 0.

    Raises:
        ValueError: If ``rho`` is not positive.

    Example:
        >>> a = nn.Parameter(torch.tensor(1.0))
        >>> figures = SharpnessAware(0.5).step(
        ...     nn.Module(), lambda supernet, batch, part: a**2, None, torch.optim.SGD([a], lr=0.1), None, None)
        >>> round(a.item(), 4)    # 1 - 0.1 * 2 * (1 + 0.5)
        0.7
    """

    def __init__(self, rho: float = 0.05):
        number("rho", rho, "> 0")
        self.rho = rho

    def _gradient(
        self,
        supernet: nn.Module,
        objective: Any,
        w_opt: torch.optim.Optimizer | None,
        alphas: Sequence[nn.Parameter],
        train_batch: Any,
        val_batch: Any,
    ) -> tuple[Gradients, float]:
        slope, loss = super()._gradient(supernet, objective, w_opt, alphas, train_batch, val_batch)
        present = [(a, g) for a, g in zip(alphas, slope, strict=True) if g is not None]
        norm = float(global_norm([g for _, g in present]))
        if not 0.0 < norm < float("inf"):
            return slope, loss
        saved = [a.detach().clone() for a in alphas]
        try:
            assign([a for a, _ in present], [a.detach() + self.rho / norm * g for a, g in present])
            above = objective(supernet, val_batch, part="alpha")
            worst, _ = average(gradients(above, alphas), like=alphas)
        finally:
            assign(alphas, saved)
        return worst, loss
