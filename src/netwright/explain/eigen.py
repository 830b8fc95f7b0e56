"""Eigen-CAM: where the features of a layer are, by their first principal direction; no gradients and no class.

Muhammad and Yeasin, "Eigen-CAM: Class Activation Map using Principal Components", IJCNN 2020, arXiv:2008.00299. The
activations of one image, reshaped to O of shape (h w, C) with a row for every position, are projected on their first
right singular vector,

    O = Psi Sigma V^T,    L = O v_1 = sigma_1 psi_1,

and L, reshaped to h x w, is the map: its sign is fixed, what is below 0 is cut off, and it is brought to [0, 1]. Only
the first pair is needed: the first eigenvector of the Gram matrix O O^T, or the limit of an iteration with O and O^T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args, overload

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.linalg import eigh
from scipy.linalg.blas import dsyrk
from torch import Tensor, nn
from torch.nn import functional

from netwright.checks import one_of
from netwright.explain.layers import Transform
from netwright.explain.maps import LayerMaps, unit
from netwright.nn.modes import in_mode
from netwright.seeding import stream

Sign = Literal["auto", "sum", "minmax", "activation"]
# A gap of singular values below which the first direction is not unique, and below which squaring them costs digits.
DEGENERATE, CLOSE = 1e-6, 1e-4
UNDECIDED = 1e-8
# Up to so many places or channels, whichever are fewer, the Gram matrix is decomposed at once; above, the first
# eigenvectors are iterated with so many more beside them, to an angle of at most so much. After the first rounds it
# shows whether the last will do.
DECOMPOSED, FIRST_ROUNDS, ROUNDS, GUARDS, CONVERGED = 128, 3, 24, 3, 1e-7
CACHED = 2**22  # bytes of activations that a CPU's cache keeps from one pass over them to the next


class EigenMap(NamedTuple):
    """A map and what there is to know of it.

    Attributes:
        map: (batch, rows, columns), or without the batch.
        singular_values: Of the component asked for and the one after it, (batch, 2).
        degenerate: Whether the one before or after is so close that the direction is not unique.
    """

    map: Tensor
    singular_values: Float[Tensor, "batch two"]
    degenerate: Bool[Tensor, " batch"]


@overload
def eigen_cam(
    activations: Tensor,
    center: bool = ...,
    component: int = ...,
    sign: Sign = ...,
    normalize: bool = ...,
    return_info: Literal[False] = ...,
) -> Tensor: ...


@overload
def eigen_cam(
    activations: Tensor,
    center: bool = ...,
    component: int = ...,
    sign: Sign = ...,
    normalize: bool = ...,
    *,
    return_info: Literal[True],
) -> EigenMap: ...


def eigen_cam(
    activations: Tensor,
    center: bool = False,
    component: int = 0,
    sign: Sign = "auto",
    normalize: bool = True,
    return_info: bool = False,
) -> Tensor | EigenMap:
    """The map of a layer's activations; images of a batch have nothing to do with each other.

    Args:
        activations: (C, h, w) or (batch, C, h, w), floating-point and finite, with h w > 1.
        center: Whether each channel's spatial mean is taken away first, as true principal components (and most other
            implementations) have it; the paper does not.
        component: Number of the principal direction, from 0, below min(h w, C).
        sign: What decides the sign, which no decomposition does. ``"sum"`` makes the sum positive; ``"minmax"`` turns a
            map whose least value is further from 0 than its largest; of both, where that is undecided the largest
            absolute value (of equals the first) becomes positive. ``"auto"`` is the one for maps as they are, the other
            for centred ones. ``"activation"`` makes it agree with the mean over the channels, which serves better where
            the background dominates.
        normalize: Cut off at 0 and bring to [0, 1]; a constant map becomes 0. Without, L itself is returned.
        return_info: Return an :class:`EigenMap`.

    Returns:
        (h, w) or (batch, h, w), of the activations' type and on their device. Activations that are zero (centred:
        constant over the places) give zeros.

    Raises:
        ValueError: If shape or type is another, there is a single place, ``sign`` is unknown, or a value is not finite.
        IndexError: If there is no such component.

    Example:
        >>> places = torch.tensor([[3.0, 0.0], [0.0, 1.0]])     # two places of two channels
        >>> eigen_cam(places.T.reshape(2, 1, 2))
        tensor([[1., 0.]])
    """
    if activations.ndim not in (3, 4) or not len(activations):
        raise ValueError(f"activations must be (C, h, w) or (batch, C, h, w), got shape {tuple(activations.shape)}")
    if not activations.is_floating_point():
        raise ValueError(f"activations must be floating-point numbers, got {activations.dtype}")
    one_of("sign", sign, get_args(Sign))
    batch = activations.detach() if activations.ndim == 4 else activations.detach()[None]
    channels, rows, columns = batch.shape[1:]
    if rows * columns < 2:
        raise ValueError(f"activations must have at least 2 places, got {rows} x {columns}")
    most = min(rows * columns, channels)
    if not 0 <= component < most:
        raise IndexError(f"component must lie in [0, {most}), got {component}")
    size = max(1, CACHED // (8 * channels * rows * columns) if batch.device.type == "cpu" else len(batch))
    pieces = [_map(piece, center, component, sign) for piece in batch.split(size)]
    scores, values = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    if normalize:
        scores = unit(scores.clamp_min(0))
    found = scores.view(-1, rows, columns).to(activations.dtype)
    found = found if activations.ndim == 4 else found[0]
    if not return_info:
        return found
    shown = values[:, 1:].to(torch.promote_types(activations.dtype, torch.float32))
    return EigenMap(found, shown, (_gap(values) <= DEGENERATE * values[:, 1]) & (values[:, 1] > 0))


def _map(
    batch: Float[Tensor, "batch channels rows columns"], center: bool, component: int, sign: Sign
) -> tuple[Tensor, Tensor]:
    """L of each image, its sign decided, and three singular values around its own; all in double precision."""
    largest = _largest(batch).double()
    if not largest.isfinite().all():
        raise ValueError("activations must be finite, got NaN or infinity")
    # In double precision from the start: what single precision loses of a mean can be as large as what is left of it.
    whole = batch.double().flatten(2).mT  # (batch, places, channels)
    matrix = whole - whole.mean(1, keepdim=True) if center else whole
    scores, values = _scores(matrix, component)
    # What is left of constant activations after their mean, or of others beyond their rank, is rounding.
    given = torch.finfo(torch.promote_types(batch.dtype, torch.float32)).eps
    rounding = torch.maximum(torch.finfo(torch.float64).eps * largest, given * _largest(matrix))
    rounding = max(matrix.shape[1:]) * rounding
    scores = torch.where(values[:, 1:2] > rounding[:, None], scores, 0.0)
    return scores * _direction(scores, whole.mean(2), center, sign)[:, None], values


def _largest(values: Float[Tensor, "batch *shape"]) -> Float[Tensor, " batch"]:
    """The largest absolute value of each, without a copy of absolute values."""
    flat = tuple(range(1, values.ndim))
    return torch.maximum(values.amax(flat), -values.amin(flat))


def _gap(values: Float[Tensor, "batch three"]) -> Float[Tensor, " batch"]:
    """How far the value in the middle is from the nearer of the others."""
    before, own, after = values.unbind(1)
    return torch.minimum(before - own, own - after)


def _scores(wide: Float[Tensor, "batch places channels"], component: int) -> tuple[Tensor, Tensor]:
    """L of each image, its sign open, and three singular values: before it (or infinity), its own, after it (or 0)."""
    places, channels = wide.shape[1:]
    if min(places, channels) <= DECOMPOSED:
        scores, values = _decomposed(wide, component)
    else:
        scores, values, converged = _iterated(wide, component)
        rest = (~converged).nonzero().flatten()
        if len(rest):
            scores[rest], values[rest] = _decomposed(wide[rest], component)
    # Squaring singular values that are close costs the digits that tell them apart.
    close = (_gap(values) < CLOSE * values[:, 1]) & (values[:, 1] > 0)
    for image in close.nonzero().flatten().tolist():
        left, exact, _ = torch.linalg.svd(wide[image], full_matrices=False)
        scores[image] = exact[component] * left[:, component]
        values[image] = _with_ends(exact)[component : component + 3]
    return scores, values


def _with_ends(values: Float[Tensor, "*batch values"]) -> Tensor:
    """Descending values between infinity and 0."""
    return functional.pad(functional.pad(values, (1, 0), value=math.inf), (0, 1))


def _decomposed(wide: Float[Tensor, "batch places channels"], component: int) -> tuple[Tensor, Tensor]:
    """By the eigenvector of the smaller Gram matrix."""
    few = wide.shape[1] <= wide.shape[2]
    squares, leading = _eigenpairs(_gram(wide if few else wide.mT), component)
    values = squares.clamp_min(0).sqrt()
    return (values[:, 1:2] * leading if few else (wide @ leading[:, :, None]).squeeze(2)), values


def _gram(rows: Float[Tensor, "batch size length"]) -> Float[Tensor, "batch size size"]:
    """Products of all rows; on a CPU the lower triangle, which takes half the time."""
    if rows.device.type != "cpu":
        return rows @ rows.mT
    found = [
        dsyrk(1.0, one, lower=1) if one.flags.f_contiguous else dsyrk(1.0, one.T, trans=1, lower=1)
        for one in rows.numpy()
    ]
    return torch.from_numpy(np.stack(found))


def _eigenpairs(gram: Float[Tensor, "batch size size"], component: int) -> tuple[Tensor, Tensor]:
    """An eigenvalue between the one before and the one after it, infinity and 0 beyond the ends, and its eigenvector.

    Only the lower triangles are read. LAPACK's eigenvectors one by one take a third of the time of all of them, which
    is what torch has.
    """
    size = gram.shape[1]
    place = size - 1 - component  # ascending
    low, high = max(0, place - 1), min(size - 1, place + 1)
    if gram.device.type == "cpu" and size > 1:
        found = [
            eigh(matrix.numpy(), subset_by_index=[low, high], driver="evr", overwrite_a=True, check_finite=False)
            for matrix in gram
        ]
        squares, vectors = (torch.from_numpy(np.stack(parts)) for parts in zip(*found, strict=True))
    else:
        squares, vectors = torch.linalg.eigh(gram)
        squares, vectors = squares[:, low : high + 1], vectors[:, :, low : high + 1]
    first = 0 if component == 0 else 1
    return _with_ends(squares.flip(1))[:, first : first + 3], vectors[:, :, place - low]


def _iterated(wide: Float[Tensor, "batch places channels"], component: int) -> tuple[Tensor, Tensor, Tensor]:
    """By orthogonal iteration of a few vectors, and which images it has served; the Gram matrix is never formed."""
    places, channels = wide.shape[1:]
    tall = wide if channels <= places else wide.mT
    start = torch.randn(tall.shape[2], component + 1 + GUARDS, generator=stream(0, "eigen-cam"), dtype=torch.float64)
    product = start.mT.to(wide.device).expand(len(wide), -1, -1).clone()
    mean = tall.mean(1)
    product[:, 0] += mean / mean.norm(dim=1, keepdim=True).clamp_min(1e-300) * start.norm(dim=0)[0]
    # A few long rows times the activations take a fifth of the time of the activations times a few columns.
    for left in range(ROUNDS, -1, -1):
        basis = torch.linalg.qr(product.mT).Q.mT.contiguous()
        image = basis @ tall.mT
        product = image @ tall
        found = _ritz(basis, image, product, component)
        converged = found.residual <= CONVERGED * found.gap
        # What a round divides the error by is at most the ratio to the last of the vectors, whose value is still too
        # small.
        hopeful = found.residual * found.rate**left <= CONVERGED * found.gap
        if bool(converged.all()) or (left <= ROUNDS - FIRST_ROUNDS and not bool((hopeful & ~converged).any())):
            break
    values = found.squares.clamp_min(0).sqrt()
    return (found.image if channels <= places else values[:, 1:2] * found.vector), values, converged


class _Ritz(NamedTuple):
    """The best that a basis holds of a component: an approximate eigenvector of tall^T tall.

    Attributes:
        vector: (batch, columns), of length 1.
        image: tall times it, (batch, rows).
        squares: (batch, 3): its eigenvalue between the one before, or infinity, and the one after.
        residual: (batch,): how far it is from being one.
        gap: (batch,): from its eigenvalue to the nearer of the others.
        rate: (batch,): the last eigenvalue that the basis shows over its own.
    """

    vector: Tensor
    image: Tensor
    squares: Tensor
    residual: Tensor
    gap: Tensor
    rate: Tensor


def _ritz(basis: Tensor, image: Tensor, product: Tensor, component: int) -> _Ritz:
    squares, turn = torch.linalg.eigh(image @ image.mT)  # ascending
    at = -1 - component
    square, weights = squares[:, at], turn[:, None, :, at]
    vector, imaged, multiplied = ((weights @ rows).squeeze(1) for rows in (basis, image, product))
    residual = (multiplied - square[:, None] * vector).norm(dim=1)
    rate = squares[:, 0] / square.clamp_min(torch.finfo(square.dtype).tiny)
    three = _with_ends(squares.flip(1))[:, component : component + 3]
    return _Ritz(vector, imaged, three, residual, _gap(three), rate)


def _direction(
    scores: Float[Tensor, "batch places"], mean: Float[Tensor, "batch places"], center: bool, sign: Sign
) -> Float[Tensor, " batch"]:
    """1 or -1 for each image."""
    absolute = scores.abs()
    largest = scores.gather(1, absolute.argmax(1, keepdim=True)).squeeze(1)
    if sign == "activation":
        against = (scores - scores.mean(1, keepdim=True)) * (mean - mean.mean(1, keepdim=True))
        decision = against.sum(1)
        undecided = decision == 0
    elif sign == "minmax" or (sign == "auto" and center):
        decision = scores.amax(1) + scores.amin(1)
        undecided = decision.abs() <= UNDECIDED * absolute.amax(1)
    else:
        decision = scores.sum(1)
        undecided = decision.abs() < UNDECIDED * absolute.sum(1)
    # Of equal values that rounding tells apart the first one decides.
    top = absolute >= (1 - 1e-5) * absolute.amax(1, keepdim=True)
    first = scores.gather(1, top.int().argmax(1, keepdim=True)).squeeze(1)
    decided = torch.where(undecided, torch.where(first == 0, largest, first), decision)
    return torch.where(decided < 0, -1.0, 1.0).to(scores)


class EigenCAM(LayerMaps):
    """Maps of a network's layers, from one forward pass of a batch.

    The tensor that is looked at is what the next layer sees: where a ReLU that works in place follows the layer, that
    is its result. The network runs in evaluation mode without gradients and is left as it was; hooks are there during a
    pass only.

    Args:
        model: Any network.
        target_layers: A layer or its name in ``named_modules``, or several of these, whose maps are averaged and
            brought to [0, 1] again. With None the one of :func:`last_places`, found in the first call: what pooling is
            given, in most networks.
        reshape_transform: Turns a layer's output into (batch, C, h, w). Without, channels last and tokens are
            understood by their proportions: see :func:`with_places`.
        center: As for :func:`eigen_cam`.
        upsample: Bring maps to the size of the input, bilinearly; without, all layers must have maps of one size.

    Attributes:
        layers: The layers, once they are known.
        output: What the network answered in the last call.

    Raises:
        ValueError: If no layer is given, and in a call if a layer did not run or its output has no places.
        TypeError: If there is no layer of a name.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 5))
        >>> EigenCAM(net, ["1"])(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 16, 16])
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module | str] | nn.Module | str | None = None,
        reshape_transform: Transform | None = None,
        center: bool = False,
        upsample: bool = True,
    ):
        super().__init__(model, target_layers, reshape_transform, upsample)
        self.center = center
        self._handles: list[Any] = []

    def __call__(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch height width"]:
        """The maps, in [0, 1]."""
        layers = self._known(x)
        seen: dict[int, Any] = {}
        try:
            for layer in layers:
                self._handles.append(layer.register_forward_hook(lambda m, given, out: seen.__setitem__(id(m), out)))
            # Not inference mode: a network that keeps what it computes could not be trained any more.
            with in_mode(self.model, training=False), torch.no_grad():
                self.output = self.model(x)
        finally:
            self.close()
        for layer in layers:
            if id(layer) not in seen:
                raise ValueError(f"target_layers must run, got {type(layer).__name__}, which was never called")
        return self._joined([eigen_cam(self._places(la, seen[id(la)], x), self.center) for la in layers], x)

    def __enter__(self) -> EigenCAM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes away hooks that a failed pass may have left."""
        while self._handles:
            self._handles.pop().remove()
