"""Directions of a latent space that change something visible of an image and not its class, found without labels.

Two ways to candidates: the principal axes of sampled codes (Härkönen et al., "GANSpace", NeurIPS 2020,
arXiv:2004.02546), and the top right singular vectors of the weights A that read the code, the eigenvectors of A^T A
(Shen and Zhou, "Closed-Form Factorization of Latent Semantics in GANs", CVPR 2021, arXiv:2007.06600). Which of them
leave the class alone is told by a classifier. Wang et al., arXiv:2105.04070, use attributes that do not decide the
class; the rule of :func:`filter_directions` is netwright's reading.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from netwright.console import warn
from netwright.nn.modes import in_mode
from netwright.results import Result, new_axes
from netwright.seeding import stream

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from netwright.train.natra.codes import LatentCodes

Method = Literal["pca", "weights"]
FILTER_CODES = 256
FILTER_STEP = 2.0
ENOUGH_ACCURACY = 0.8


class NoDirectionError(ValueError):
    """No direction changes images visibly and leaves their class alone.

    Args:
        what: What was found.
        ways: What could be given instead, each enough by itself.
    """

    def __init__(self, what: str, ways: tuple[str, ...]):
        super().__init__(f"{what}; give {', or '.join(ways)}")
        self.what, self.ways = what, ways

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.ways)


@dataclasses.dataclass(frozen=True, eq=False)
class Directions(Result):
    """Unit vectors in the space of w, with how far codes spread along each.

    Attributes:
        vectors: u_j as rows, (k, d), orthonormal.
        scale: sigma_j, the standard deviation of w along u_j, (k,).
        layers: The layers [s, e) whose codes are moved; None moves all.
        flip: Share of predictions that a step along each changes, where that was measured.
        change: Root mean square change of a pixel of such a step, likewise.
        step: That step, in standard deviations, likewise.

    Example:
        >>> directions = Directions(torch.eye(2), torch.tensor([2.0, 1.0]))
        >>> directions.shift(torch.tensor([[0.5, -1.0]]), num_layers=1)
        tensor([[[ 1., -1.]]])
    """

    vectors: Float[Tensor, "k d"]
    scale: Float[Tensor, "k"]
    layers: tuple[int, int] | None = None
    flip: tuple[float, ...] | None = None
    change: tuple[float, ...] | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or self.scale.shape != self.vectors.shape[:1]:
            shapes = f"{tuple(self.vectors.shape)} and {tuple(self.scale.shape)}"
            raise ValueError(f"vectors and scale must have shapes (k, d) and (k,), got {shapes}")

    def __len__(self) -> int:
        return len(self.vectors)

    def select(self, rows: Any) -> Directions:
        """Those of the given rows, in that order."""
        rows = list(rows)
        flip, change = (None if each is None else tuple(each[i] for i in rows) for each in (self.flip, self.change))
        return dataclasses.replace(self, vectors=self.vectors[rows], scale=self.scale[rows], flip=flip, change=change)

    def to(self, device: torch.device | str) -> Directions:
        """The directions on another device."""
        return dataclasses.replace(self, vectors=self.vectors.to(device), scale=self.scale.to(device))

    def shift(self, coeff: Float[Tensor, "batch k"], num_layers: int) -> Float[Tensor, "batch layers d"]:
        """How codes move: sum_j c_j sigma_j u_j in each of the layers that are moved.

        Raises:
            ValueError: If there is not one number a direction, or the layers are not those of the generator.
        """
        if coeff.ndim != 2 or coeff.shape[1] != len(self):
            raise ValueError(f"coeff must have shape (batch, {len(self)}), got {tuple(coeff.shape)}")
        moved = (coeff * self.scale) @ self.vectors
        if self.layers is None:
            return moved[:, None].expand(-1, num_layers, -1)
        first, last = check_layers(self.layers, num_layers)
        inside = torch.arange(num_layers, device=moved.device)
        inside = ((inside >= first) & (inside < last)).to(moved)
        return moved[:, None] * inside[:, None]

    def plot(self, ax: Axes | None = None) -> Axes:
        """The spread along each direction."""
        ax = new_axes(ax)
        ax.bar(range(1, len(self) + 1), self.scale.tolist())
        ax.set_xlabel("direction")
        ax.set_ylabel("standard deviation of w")
        return ax


def check_layers(layers: tuple[int, int], num_layers: int) -> tuple[int, int]:
    """The range [s, e) of layers.

    Raises:
        ValueError: If it is empty or outside 0 .. S.
    """
    first, last = layers
    if not 0 <= first < last <= num_layers:
        raise ValueError(f"layers must be a range [s, e) within 0..{num_layers}, got {tuple(layers)}")
    return first, last


@torch.no_grad()
def latent_directions(
    generator: nn.Module,
    method: Method = "pca",
    k: int = 20,
    num_samples: int = 10_000,
    layers: tuple[int, int] | None = None,
    normalize_rows: bool = False,
    generator_seed: int | None = None,
) -> Directions:
    """Candidate directions, without labels and without images.

    Args:
        generator: As :class:`netwright.train.natra.Generator` describes it; ``"weights"`` also needs
            ``style_weights(layers)``.
        method: ``"pca"``: principal axes of m(z) for standard normal z; ``"weights"``: eigenvectors of A^T A, the
            largest eigenvalue first, in closed form.
        k: How many, >= 1; at most as many as codes have numbers.
        num_samples: Draws of z for ``"pca"``, >= 2.
        layers: The range [s, e) of layers whose weights are looked at and whose codes are moved; all by default.
        normalize_rows: For ``"weights"``: scales every row of A to norm 1 first, as the released code of the closed
            form does; then a large row counts no more than a small one.
        generator_seed: Of the draws of z; 0 by default.

    Raises:
        ValueError: If an argument is out of its range or the generator has no weights to be looked at.

    Example:
        >>> from netwright.train.natra import DecoderGenerator
        >>> stretched = DecoderGenerator(nn.Identity(), 3, weight=torch.diag(torch.tensor([1.0, 3.0, 2.0])))
        >>> latent_directions(stretched, "weights").vectors.abs()
        tensor([[0., 1., 0.],
                [0., 0., 1.],
                [1., 0., 0.]])
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be 'pca' or 'weights', got {method!r}")
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    if num_samples < 2:
        raise ValueError(f"num_samples must be >= 2, got {num_samples}")
    if layers is not None:
        check_layers(layers, generator.num_layers)  # type: ignore[arg-type]
    mean: Tensor = generator.w_mean  # type: ignore[assignment]
    if method == "pca":
        z_dim = getattr(generator, "z_dim", len(mean))
        z = torch.randn(num_samples, z_dim, generator=stream(generator_seed or 0, "directions"))
        with in_mode(generator, training=False):
            w = generator.mapping(z.to(mean)).double()  # type: ignore[operator]
        values, vectors = torch.linalg.eigh(torch.cov(w.T).view(len(mean), len(mean)))
        order = values.argsort(descending=True, stable=True)[:k]
        return Directions(vectors[:, order].T.contiguous().to(mean), values[order].clamp_min(0).sqrt().to(mean), layers)
    if not hasattr(generator, "style_weights"):
        raise ValueError(f"generator must have style_weights for method 'weights', got {type(generator).__name__}")
    rows: Tensor = generator.style_weights(layers).double()  # type: ignore[operator]
    if normalize_rows:
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    found = vectors[:, values.argsort(descending=True, stable=True)[:k]].T
    spread = torch.einsum("ki,ij,kj->k", found, generator.w_cov.double(), found)
    return Directions(found.contiguous().to(mean), spread.clamp_min(0).sqrt().to(mean), layers)


@torch.no_grad()
def filter_directions(
    directions: Directions,
    generator: nn.Module,
    classifier: nn.Module,
    codes: LatentCodes,
    max_flip: float = 0.1,
    min_change: float = 0.02,
    step: float = FILTER_STEP,
    max_directions: int = 10,
    *,
    images: Tensor | None = None,
    labels: Int[Tensor, "images"] | None = None,
) -> Directions:
    """Keeps the directions that change images and not their class, the most visible first.

    From the first 256 codes a step of ``step`` sigma_j is made along each direction, both ways. Measured are the share
    of predictions that are others than without the step, and the root mean square change of a pixel.

    Args:
        directions: Candidates.
        generator: G.
        classifier: The reference: maps images as G makes them to logits; trained without natural transformations.
        codes: Of images that the classifier knows.
        max_flip: Largest share of changed predictions of a direction that is kept, in [0, 1].
        min_change: Least change of a pixel, in the units of the images.
        step: In standard deviations of w, > 0; no smaller than the steps that are trained with.
        max_directions: How many are kept at most, >= 1.
        images: What the codes are of; with them the step is looked at as :class:`NaturalTransform` makes it by default,
            the difference of two decoded images added to the image itself.
        labels: Classes of the codes; with them the classifier's accuracy on reconstructions is known, and a warning
            given below 80 %.

    Returns:
        The directions that are kept, with ``flip``, ``change`` and ``step``.

    Raises:
        ValueError: If an argument is out of its range; :class:`NoDirectionError`, if no direction survives.
    """
    from netwright.train.natra.transform import NaturalTransform

    if not 0 <= max_flip <= 1:
        raise ValueError(f"max_flip must lie in [0, 1], got {max_flip}")
    if not 0 <= min_change < math.inf:
        raise ValueError(f"min_change must be >= 0 and finite, got {min_change}")
    if not 0 < step < math.inf:
        raise ValueError(f"step must be > 0 and finite, got {step}")
    if max_directions < 1 or len(codes) < 1:
        raise ValueError(f"max_directions and codes must be >= 1, got {max_directions} and {len(codes)}")
    some = codes[:FILTER_CODES]
    transform = NaturalTransform(
        generator, some, directions, None if images is None else images[:FILTER_CODES], keep_residual=images is not None
    )
    with in_mode(generator, training=False), in_mode(classifier, training=False):
        if labels is not None:
            made = some.decode(generator)  # type: ignore[arg-type]
            accuracy = float((classifier(made).argmax(1) == labels[:FILTER_CODES]).float().mean())
            if accuracy < ENOUGH_ACCURACY:
                warn(
                    f"the reference classifier is right on {100 * accuracy:.0f} % of the reconstructions only: what it "
                    "says of directions is uncertain"
                )
        index = torch.arange(len(some), device=some.w.device)
        still = transform(index, some.w.new_zeros(len(some), len(directions)))
        answer = classifier(still).argmax(1)
        flips, changes = torch.zeros(len(directions)), torch.zeros(len(directions))
        for j in range(len(directions)):
            for sign in (step, -step):
                coeff = some.w.new_zeros(len(some), len(directions))
                coeff[:, j] = sign
                moved = transform(index, coeff)
                flips[j] += (classifier(moved).argmax(1) != answer).float().mean().cpu() / 2
                changes[j] += (moved - still).flatten(1).square().mean(1).sqrt().mean().cpu() / 2
    measured = dataclasses.replace(
        directions, flip=tuple(flips.tolist()), change=tuple(changes.tolist()), step=float(step)
    )
    kept = [j for j in changes.argsort(descending=True).tolist() if flips[j] <= max_flip and changes[j] >= min_change]
    if not kept:
        what = (
            f"no direction survives: of {len(directions)} the least share of changed predictions is "
            f"{float(flips.min()):.3g} (max_flip {max_flip:g}), the largest change {float(changes.max()):.3g} "
            f"(min_change {min_change:g})"
        )
        raise NoDirectionError(what, _ways(flips, changes, max_flip, min_change))
    return measured.select(kept[:max_directions])


def _ways(flips: Tensor, changes: Tensor, max_flip: float, min_change: float) -> tuple[str, ...]:
    """Bounds with which a direction would have been kept, and the way out where none would be of use."""
    ways = []
    visible, harmless = flips[changes >= min_change], changes[flips <= max_flip]
    if len(visible):
        ways.append(f"max_flip={math.ceil(1000 * float(visible.min())) / 1000:g}")
    if len(harmless) and float(harmless.max()) >= 0.001:
        ways.append(f"min_change={math.floor(1000 * float(harmless.max())) / 1000:g}")
    return (*ways, "more generator_steps")
