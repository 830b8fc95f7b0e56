"""Contrastive losses, which draw the embeddings of one image's views together and push those of other images away.

Chen, Kornblith, Norouzi and Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020,
arXiv:2002.05709; He, Fan, Wu, Xie and Girshick, "Momentum Contrast for Unsupervised Visual Representation Learning",
CVPR 2020, arXiv:1911.05722; Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, arXiv:2004.11362; Wang and
Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere", ICML
2020, arXiv:2005.10242.

    -log exp(s_ip / T) / sum_a exp(s_ia / T),    s = cosine similarity

p is the positive of anchor i, and a runs over it and the negatives.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from netwright.checks import number


def nt_xent(
    z1: Float[Tensor, "batch dim"],
    z2: Float[Tensor, "batch dim"],
    temperature: float,
    mask: Bool[Tensor, "views views"] | None = None,
) -> Float[Tensor, ""]:
    """The loss of SimCLR: normalised temperature-scaled cross-entropy over the 2 batch views, in nats.

    Args:
        z1: Embeddings of the first views, of any length; they are normalised here.
        z2: Those of the second views; row i belongs with row i of ``z1``.
        temperature: T, > 0.
        mask: Of shape (2 batch, 2 batch), rows and columns in the order [z1; z2]. Where it is True, the view of the
            column is no negative of the view of the row. A view is never its own negative, and its positive cannot be
            masked.

    Raises:
        ValueError: If the embeddings are not two matrices of one shape, the temperature is not positive, or the mask
            has another shape or holds a positive.

    Example:
        >>> z = torch.ones(4, 8)  # all 8 views alike, so that each of 7 is as likely: log 7
        >>> round(nt_xent(z, z, 0.5).item(), 6)
        1.94591
    """
    _check_pair("z1", z1, "z2", z2)
    check_temperature(temperature)
    count = len(z1)
    partner = torch.arange(2 * count, device=z1.device).roll(count)
    if mask is not None:
        if mask.shape != (2 * count, 2 * count) or mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be boolean with shape {(2 * count, 2 * count)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        if bool(mask.gather(1, partner[:, None]).any()):
            raise ValueError(
                "mask must leave the positives, (i, i + batch) and (i + batch, i), got True at one of them"
            )
    return functional.cross_entropy(_similarities(torch.cat([z1, z2]), temperature, mask), partner)


def supcon(z: Float[Tensor, "views dim"], labels: Int[Tensor, "views"], temperature: float) -> Float[Tensor, ""]:
    """The supervised contrastive loss: the positives of a view are all other views with its label.

    Their logarithms are averaged. With a label for each image, two views an image, it is :func:`nt_xent`.

    Args:
        z: Embeddings of any length; they are normalised here.
        labels: The label of each view. A view whose label no other one has is a negative of the rest and has no loss
            of its own.
        temperature: T, > 0.

    Returns:
        The mean over the views that have a positive, in nats; 0 if none has.

    Raises:
        ValueError: If ``z`` is no matrix, the labels are not one integer a row, or the temperature is not positive.

    Example:
        >>> z, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])  # orthogonal: each of 3 as likely
        >>> round(supcon(z, labels, 0.1).item(), 6)
        1.098612
    """
    if z.ndim != 2:
        raise ValueError(f"z must have shape (views, dim), got {tuple(z.shape)}")
    if labels.shape != z.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels must be {len(z)} integers, one a view, got {labels.dtype} {tuple(labels.shape)}")
    check_temperature(temperature)
    similarities = _similarities(z, temperature)
    positive = labels[:, None] == labels
    positive.fill_diagonal_(False)
    numbers = positive.sum(1)
    anchors = numbers > 0
    if len(z) < 2 or not anchors.any():
        return 0 * z.sum()
    mean = similarities.masked_fill(~positive, 0).sum(1) / numbers.clamp_min(1)
    return (similarities.logsumexp(1) - mean)[anchors].mean()


def info_nce(
    q: Float[Tensor, "batch dim"],
    k: Float[Tensor, "batch dim"],
    queue: Float[Tensor, "dim keys"],
    temperature: float,
) -> Float[Tensor, ""]:
    """The loss of MoCo: each query finds its own key among the keys of earlier batches, in nats.

    The positives are not copied in front of the negatives: with s the positive's logit and n those of the negatives,
    the loss is softplus(logsumexp(n) - s).

    Args:
        q: Queries of any length; they are normalised here.
        k: Their keys, normalised here.
        queue: Keys of other images, a unit vector a column. No gradient flows into them.
        temperature: T, > 0.

    Raises:
        ValueError: If q and k are not two matrices of one shape, the queue has other rows or no column, or the
            temperature is not positive.

    Example:
        >>> unit = torch.eye(3)
        >>> round(info_nce(unit[:1], unit[:1], unit[:, 1:], 1.0).item(), 6)  # -log e / (e + 2)
        0.551445
    """
    _check_pair("q", q, "k", k)
    check_temperature(temperature)
    if queue.ndim != 2 or len(queue) != q.shape[1] or not queue.shape[1]:
        raise ValueError(f"queue must have shape ({q.shape[1]}, keys) with keys >= 1, got {tuple(queue.shape)}")
    with torch.autocast(q.device.type, enabled=False):
        q, k = _unit(q), _unit(k)
        positive = (q * k).sum(1) / temperature
        negatives = (q / temperature) @ queue.detach().to(q.dtype)
        return -functional.logsigmoid(positive - negatives.logsumexp(1)).mean()


def negative_cosine(p: Float[Tensor, "batch dim"], z: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """The loss of SimSiam for one direction: minus the mean cosine, with no gradient into ``z``, in [-1, 1].

    Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021, arXiv:2011.10566.

    Raises:
        ValueError: If the two are not matrices of one shape.

    Example:
        >>> negative_cosine(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0]])).item()
        -1.0
    """
    _check_pair("p", p, "z", z)
    return -functional.cosine_similarity(p, z.detach(), dim=1).mean()


def alignment(x: Float[Tensor, "batch dim"], y: Float[Tensor, "batch dim"], alpha: float = 2) -> Float[Tensor, ""]:
    """How far the embeddings of positive pairs lie apart: the mean of |x - y|^alpha after normalisation; 0 is best.

    Raises:
        ValueError: If the two are not matrices of one shape, or ``alpha`` is not positive.

    Example:
        >>> alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])).item()
        2.0
    """
    _check_pair("x", x, "y", y)
    if not alpha > 0:
        raise ValueError(f"alpha must be > 0, got {alpha}")
    squares = (functional.normalize(x) - functional.normalize(y)).square().sum(1)
    return (squares if alpha == 2 else squares ** (alpha / 2)).mean()


def uniformity(x: Float[Tensor, "batch dim"], t: float = 2) -> Float[Tensor, ""]:
    """How evenly embeddings cover the sphere: log of the mean of exp(-t |x_i - x_j|^2) over pairs; lower is more even.

    Raises:
        ValueError: If ``x`` is no matrix of at least two rows, or ``t`` is not positive.

    Example:
        >>> uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item()  # the only pair is 2 apart
        -8.0
    """
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"x must have shape (batch, dim) with batch >= 2, got {tuple(x.shape)}")
    if not t > 0:
        raise ValueError(f"t must be > 0, got {t}")
    unit = functional.normalize(x)
    squares = functional.pdist(unit).square()
    return squares.mul(-t).logsumexp(0) - math.log(len(squares))


def _similarities(z: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """Cosines of all pairs over the temperature; -inf for a row with itself and where the mask is True."""
    with torch.autocast(z.device.type, enabled=False):
        unit = _unit(z)
        found = (unit / temperature) @ unit.T
    found.fill_diagonal_(-math.inf)
    return found if mask is None else found.masked_fill(mask, -math.inf)


def _unit(z: Tensor) -> Tensor:
    """Unit rows, in single precision at least: over a small temperature half a digit of a cosine is a large error."""
    return functional.normalize(z.float() if z.dtype in (torch.float16, torch.bfloat16) else z)


def _check_pair(first: str, x: Tensor, second: str, y: Tensor) -> None:
    if x.ndim != 2 or x.shape != y.shape or not len(x):
        raise ValueError(
            f"{first} and {second} must have one shape (batch, dim) with batch >= 1, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )


def check_temperature(temperature: float) -> None:
    """Refuses a temperature that is not positive and finite.

    Raises:
        ValueError: If it is not.
    """
    number("temperature", temperature, "> 0")
