"""Gradient coherence: how much a step along one example's gradient helps the other examples.

Chatterjee and Zielinski, "On the Generalization Mystery in Deep Learning", 2022, arXiv:2203.10036.

    alpha = E[g_z . g_z'] / E[g_z . g_z] = ||E g||^2 / E||g||^2,    m-coherence = m alpha, in [0, m]

g_z is the gradient of the loss of example z; z and z' are drawn independently, z = z' included. m-coherence is the
number of examples that a small step along one example's gradient helps, on average: 1 if each helps only itself, m if
all agree, below 1 if they work against each other, which happens near interpolation and with contradictory labels. It
grows with m, so only figures of the same m compare; without the pairs z = z' that is otherwise
(``CoherenceResult.pairwise``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.checks import one_of
from netwright.console import warn
from netwright.diagnose.gradients import Batched, ExampleGradients, LossFunction, batches
from netwright.results import Result, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Kind = Literal["share", "cosine", "coherence"]


@dataclasses.dataclass(frozen=True)
class CoherenceResult(Result):
    """How well the gradients of m examples agree.

    Attributes:
        alpha: Coherence, in [0, 1]; without the pairs of an example with itself where that was asked for, in
            [-1 / (m - 1), 1]. NaN when every gradient is zero.
        m_coherence: m times the coherence of all pairs, in [0, m].
        grad_norm2_mean: Mean squared norm of a gradient.
        mean_grad_norm2: Squared norm of the mean gradient.
        m: Number of examples.
        loss: Their mean loss, where it was seen.
        per_layer: The same for the parameters of each layer alone, by its name.
    """

    alpha: float
    m_coherence: float
    grad_norm2_mean: float
    mean_grad_norm2: float
    m: int
    loss: float | None = None
    per_layer: dict[str, CoherenceResult] = dataclasses.field(default_factory=dict)

    @property
    def pairwise(self) -> float:
        """Mean product of two different examples' gradients over the mean square: alpha freed of its bias 1 / m."""
        return (self.m_coherence - 1) / (self.m - 1)

    def plot(self, ax: Axes | None = None) -> Axes:
        """m-coherence of the whole and of each layer."""
        ax = new_axes(ax, size=(5.0, 0.8 + 0.25 * (1 + len(self.per_layer))))
        bars = {"all": self.m_coherence, **{name: each.m_coherence for name, each in self.per_layer.items()}}
        ax.barh(list(bars), list(bars.values()))
        ax.invert_yaxis()
        ax.set_xlabel(f"examples helped, of {self.m}")
        return ax


@dataclasses.dataclass
class Sums:
    """What coherence is computed from, over the examples so far, in double precision.

    Attributes:
        total: Sum of the gradients, by the name of the parameter.
        squared: Sum of squared norms of each parameter's gradient, in the same order.
        norms2: Squared norm of each example's gradient.
        loss: Sum of the losses.
    """

    total: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    squared: Tensor | None = None
    norms2: list[Tensor] = dataclasses.field(default_factory=list)
    loss: float = 0.0

    @property
    def m(self) -> int:
        """Examples so far."""
        return sum(map(len, self.norms2))

    def add(self, gradients: ExampleGradients, data: Batched) -> Sums:
        """Takes in more examples; returns itself."""
        for x, y in batches(data):
            found = gradients.norms(x, y)
            squared = found.squared.double()
            for name, part in found.total.items():
                self.total[name] = self.total[name].add_(part) if name in self.total else part.double()
            self.squared = squared.sum(0) if self.squared is None else self.squared + squared.sum(0)
            self.norms2.append(squared.sum(1))
            self.loss += float(found.losses.double().sum())
        return self

    def join(self, other: Sums) -> Sums:
        """Takes in the examples of another one; returns itself."""
        for name, part in other.total.items():
            self.total[name] = self.total[name] + part if name in self.total else part
        if other.squared is not None:
            self.squared = other.squared if self.squared is None else self.squared + other.squared
        self.norms2 += other.norms2
        self.loss += other.loss
        return self

    def mean(self) -> dict[str, Tensor]:
        """The mean gradient."""
        return {name: part / self.m for name, part in self.total.items()}

    def result(self, *, per_layer: bool = False, unbiased: bool = False, quiet: bool = False) -> CoherenceResult:
        """The coherence of the examples so far; ``quiet`` leaves out the warning that all gradients are zero.

        Raises:
            ValueError: If there are fewer than 2.
        """
        assert self.squared is not None
        means = torch.stack([part.square().sum() for part in self.total.values()]) / self.m**2
        squares = (self.squared / self.m).tolist()
        pairs = list(zip(self.total, means.tolist(), squares, strict=True))
        layers: dict[str, list[tuple[float, float]]] = {}
        for name, mean, square in pairs:
            layers.setdefault(layer_of(name), []).append((mean, square))
        found = coherence(
            sum(mean for _, mean, _ in pairs),
            sum(squares),
            self.m,
            unbiased=unbiased,
            loss=self.loss / self.m,
            quiet=quiet,
        )
        if not per_layer:
            return found
        each = {
            layer: coherence(sum(m for m, _ in both), sum(s for _, s in both), self.m, unbiased=unbiased, quiet=True)
            for layer, both in layers.items()
        }
        return dataclasses.replace(found, per_layer=each)


def layer_of(parameter: str) -> str:
    """The name of the layer that a parameter belongs to.

    Example:
        >>> layer_of("features.0.weight"), layer_of("head.parametrizations.weight.original")
        ('features.0', 'head')
    """
    before, found, _ = parameter.partition(".parametrizations.")
    return before if found else parameter.rpartition(".")[0]


def coherence(
    mean_grad_norm2: float,
    grad_norm2_mean: float,
    m: int,
    *,
    unbiased: bool = False,
    loss: float | None = None,
    quiet: bool = False,
) -> CoherenceResult:
    """The result that follows from ||mean g||^2 and mean ||g||^2.

    Raises:
        ValueError: If ``m`` is below 2, or a figure is not finite.
    """
    if m < 2:
        raise ValueError(f"m, the number of examples, must be >= 2, got {m}")
    if not (math.isfinite(mean_grad_norm2) and math.isfinite(grad_norm2_mean)):
        raise ValueError("gradients must be finite, got NaN or infinity")
    alpha = mean_grad_norm2 / grad_norm2_mean if grad_norm2_mean > 0 else math.nan
    if math.isnan(alpha) and not quiet:
        warn("every gradient is zero, so that coherence has no value")
    if alpha > 1:  # by a rounding, since Jensen's inequality bounds it
        alpha = 1.0
    m_coherence = m * alpha
    asked = (m_coherence - 1) / (m - 1) if unbiased else alpha
    return CoherenceResult(asked, m_coherence, grad_norm2_mean, mean_grad_norm2, m, loss)


def m_coherence(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Batched,
    params: Sequence[str] | None = None,
    per_layer: bool = False,
    unbiased: bool = False,
    *,
    bn: Literal["eval"] | None = None,
) -> CoherenceResult:
    """Coherence of a model's gradients over examples, without the gradient of any one of them.

    Args:
        model: Maps a batch of inputs to outputs; in evaluation mode meanwhile, left as it was.
        loss_fn: Maps (outputs, targets) of a batch to one loss an example, like ``CrossEntropyLoss(reduction="none")``.
        data: A pair of tensors (inputs, targets), or batches of such pairs.
        params: Names of parameters, or of modules for all parameters inside; those that are trained, by default.
        per_layer: Also measure each layer by itself: layers differ a lot. The whole is their mean, weighted by
            ``grad_norm2_mean``.
        unbiased: ``alpha`` without the pairs of an example with itself, so that figures of different m compare.
        bn: ``"eval"`` allows a model in training mode that has batch norms, whose running statistics are then used.

    Returns:
        The result; NaN, with a warning, if every gradient is zero.

    Raises:
        ValueError: If there are fewer than 2 examples, a gradient is not finite, the loss does not give one number an
            example, or the model normalises by the batch.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
        >>> found = m_coherence(net, lambda output, _: output[:, 0], (x, torch.zeros(3)))    # g_i = x_i
        >>> round(found.alpha, 6), round(found.m_coherence, 6), round(found.pairwise, 6)
        (0.666667, 2.0, 0.5)
    """
    gradients = ExampleGradients(model, loss_fn, params, bn=bn)
    return Sums().add(gradients, data).result(per_layer=per_layer, unbiased=unbiased)


def coherence_from_gradients(G: Float[Tensor, "examples numbers"], dim: int = 0) -> CoherenceResult:
    """Coherence of gradients that are there.

    Args:
        G: A gradient an example; further axes are part of it.
        dim: The axis of the examples.

    Raises:
        ValueError: If there are fewer than 2 examples, or a number is not finite.

    Example:
        >>> coherence_from_gradients(torch.eye(4)).m_coherence
        1.0
    """
    if not G.ndim or not G.is_floating_point():
        raise ValueError(f"G must be floats with an axis of examples, got {G.dtype} of shape {tuple(G.shape)}")
    rows = G.detach().double().movedim(dim, 0).flatten(1) if G.ndim > 1 else G.detach().double()[:, None]
    if len(rows) < 2:
        raise ValueError(f"G must hold at least 2 examples, got {len(rows)}")
    return coherence(float(rows.mean(0).square().sum()), float(rows.square().sum(1).mean()), len(rows))


def per_example_alignment(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Batched,
    kind: Kind = "share",
    leave_one_out: bool = False,
    *,
    params: Sequence[str] | None = None,
    bn: Literal["eval"] | None = None,
) -> Float[Tensor, " examples"]:
    """How well each example's gradient agrees with the mean gradient; examples with little are learned late.

    Args:
        model: As for :func:`m_coherence`.
        loss_fn: Likewise.
        data: Likewise; batches are read twice, and must come alike: without shuffling and random augmentation.
        kind: With g the mean gradient: ``"share"``, g_i . g / ||g||^2, whose mean is 1; ``"cosine"`` of the two; or
            ``"coherence"``, g_i . g over the mean ||g_j||^2, whose mean is alpha.
        leave_one_out: Take for g the mean over the other examples wherever it stands, so that no example agrees with
            itself.
        params: As for :func:`m_coherence`.
        bn: Likewise.

    Returns:
        One number an example, float64; NaN where the denominator is zero, with a warning.

    Raises:
        ValueError: As for :func:`m_coherence`; and if ``kind`` is unknown, data can be read only once, or gives other
            examples, or another order, the second time.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
        >>> per_example_alignment(net, lambda output, _: output[:, 0], (x, torch.zeros(3)))
        tensor([0.7500, 1.5000, 0.7500], dtype=torch.float64)
    """
    one_of("kind", kind, get_args(Kind))
    if iter(data) is data:
        raise ValueError("data must be such that it can be read twice, got an iterator: give a list or a loader")
    gradients = ExampleGradients(model, loss_fn, params, bn=bn)
    first, second = hashlib.blake2b(), hashlib.blake2b()
    sums = Sums().add(gradients, _noted(data, first))
    found = alignment(gradients, _noted(data, second), sums, kind, leave_one_out)
    if first.digest() != second.digest():
        raise ValueError(
            "data must give the same examples in the same order again, got others: take a loader without shuffling and "
            "random augmentation"
        )
    return found


def _noted(data: Batched, note: hashlib.blake2b) -> Iterator[tuple[Tensor, Any]]:
    """The batches, whose bytes go into ``note``."""
    for x, y in batches(data):
        for part in (x, y):
            note.update(part.detach().cpu().flatten().view(torch.uint8).numpy().data)
        yield x, y


def alignment(
    gradients: ExampleGradients, data: Batched, sums: Sums, kind: Kind = "share", leave_one_out: bool = False
) -> Float[Tensor, " examples"]:
    """:func:`per_example_alignment` where the sums over the same examples are there already."""
    m, mean = sums.m, sums.mean()
    if m < 2:
        raise ValueError(f"m, the number of examples, must be >= 2, got {m}")
    norms2 = torch.cat(sums.norms2)
    dot = torch.cat([gradients.along(x, y, mean) for x, y in batches(data)]).double()
    if len(dot) != m:
        raise ValueError(f"data must give the same {m} examples again, got {len(dot)}")
    mean2: Tensor = sum((part.square().sum() for part in mean.values()), dot.new_zeros(()))
    if leave_one_out:
        mean2 = (m**2 * mean2 - 2 * m * dot + norms2) / (m - 1) ** 2
        dot = (m * dot - norms2) / (m - 1)
    below = {
        "share": mean2.expand(m),
        "cosine": (norms2 * mean2.clamp_min(0)).sqrt(),
        "coherence": norms2.mean().expand(m),
    }[kind]
    # What rounding leaves of a mean gradient that vanishes is no number to divide by.
    zero = below <= torch.finfo(torch.float32).eps ** 2 * norms2.mean()
    if bool(zero.any()):
        warn(f"{int(zero.sum())} of {m} examples have no alignment: a gradient is zero")
    return torch.where(zero, math.nan, dot / torch.where(zero, 1.0, below))


def stability_gap_bound(
    alphas: Sequence[float] | Tensor,
    lrs: float | Sequence[float] | Tensor,
    lipschitz: float,
    smoothness: float,
    m: int,
    *,
    log: bool = False,
) -> Float[Tensor, ""]:
    """Bound of the expected gap between test and training loss after T steps of stochastic gradient descent.

        (L^2 / m) sum_t [prod_{k > t} (1 + eta_k beta)] eta_t sqrt(2 (1 - alpha_{t-1}))

    Coherence early in training counts most, since its term is multiplied by all later steps.

    Args:
        alphas: Coherence before each of the T steps, in [0, 1].
        lrs: Learning rate eta_t of each step, or one for all, >= 0.
        lipschitz: L, a bound of the gradient's norm, > 0.
        smoothness: beta, a bound of the Hessian's norm, >= 0.
        m: Number of training examples.
        log: Return the natural logarithm, which does not overflow.

    Returns:
        A float64 number; infinity when it overflows.

    Raises:
        ValueError: If a number is out of its range, or there are not as many rates as steps.

    Example:
        >>> stability_gap_bound([0.5], 0.1, lipschitz=2.0, smoothness=1.0, m=100)    # 4 / 100 * 0.1 * 1
        tensor(0.0040, dtype=torch.float64)
    """
    alpha = torch.as_tensor(alphas, dtype=torch.float64)
    if alpha.ndim != 1 or not len(alpha):
        raise ValueError(f"alphas must be a series of at least 1 number, got shape {tuple(alpha.shape)}")
    if not bool(((alpha >= 0) & (alpha <= 1)).all()):
        raise ValueError(f"alphas must lie in [0, 1], got {float(alpha.min())} to {float(alpha.max())}")
    lr = torch.as_tensor(lrs, dtype=torch.float64)
    lr = lr if lr.ndim else lr.expand(len(alpha))
    if lr.shape != alpha.shape:
        raise ValueError(f"lrs must be one number or {len(alpha)}, got {len(lr)}")
    if not bool(((lr >= 0) & lr.isfinite()).all()):
        raise ValueError(f"lrs must be >= 0 and finite, got {lr.tolist()[:5]}")
    if not 0 < lipschitz < math.inf:
        raise ValueError(f"lipschitz must be > 0 and finite, got {lipschitz}")
    if not 0 <= smoothness < math.inf:
        raise ValueError(f"smoothness must be >= 0 and finite, got {smoothness}")
    if m < 1:
        raise ValueError(f"m must be >= 1, got {m}")
    growth = torch.log1p(lr * smoothness)
    later = growth.sum() - growth.cumsum(0)
    terms = later + lr.log() + 0.5 * (2 * (1 - alpha)).log()
    found = torch.logsumexp(terms, 0) + 2 * math.log(lipschitz) - math.log(m)
    return found if log else found.exp()
