"""SimCLR, MoCo and SimSiam: what is contrasted, and with what.

Each is a network with a loss: a *backbone*, which is kept, a *head*, which is thrown away afterwards, and
``forward(x1, x2)``, which takes two views of a batch of images and gives the loss.

- SimCLR (Chen, Kornblith, Norouzi and Hinton, ICML 2020, arXiv:2002.05709): the views of one image against all other
  views of the batch.
- MoCo (He, Fan, Wu, Xie and Girshick, CVPR 2020, arXiv:1911.05722; version 2: Chen, Fan, Girshick and He, 2020,
  arXiv:2003.04297): a query against its key and a queue of keys of earlier batches. Keys come from a second network,
  whose weights follow by theta_k <- m theta_k + (1 - m) theta_q.
- SimSiam (Chen and He, CVPR 2021, arXiv:2011.10566): a view predicts the other one; there are no negatives.

All take a :class:`netwright.train.hallucinator.Hallucinator`, which adds a positive in feature space. It works in
training mode only. Under several processes MoCo shares its keys, and SimCLR contrasts within each process's share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from netwright.checks import number, one_of, whole
from netwright.nn.copies import separate_copy
from netwright.train.contrastive.losses import check_temperature, info_nce, negative_cosine, nt_xent
from netwright.train.hallucinator import Hallucinator
from netwright.train.memory import gather_rows

Images = Float[Tensor, "batch channels height width"]


class Host(nn.Module):
    """What SimCLR, MoCo and SimSiam have in common.

    Attributes:
        backbone: The network that is kept.
        features: Width of what it gives.
        dim: Width of the embeddings.
        hallucinator: What adds a positive in training, or None.
    """

    def __init__(
        self, backbone_fn: Callable[[], nn.Module], dim: int, features: int | None, hallucinator: Hallucinator | None
    ):
        super().__init__()
        whole("dim", dim, ">= 1")
        if hallucinator is not None and hallucinator.dim != dim:
            raise ValueError(f"hallucinator must have the dim of the host, {dim}, got {hallucinator.dim}")
        self.backbone = backbone_fn()
        self.features = width_of(self.backbone) if features is None else features
        if self.features < 1:
            raise ValueError(f"features must be >= 1, got {self.features}")
        self.dim, self.hallucinator = dim, hallucinator

    def encode(self, x: Images) -> Float[Tensor, "batch features"]:
        """The features of images.

        Raises:
            ValueError: If the backbone gives something else than (batch, features).
        """
        return self._checked(self.backbone(x), len(x))

    def embed(self, x: Images) -> Float[Tensor, "batch dim"]:
        """The embeddings that the loss compares, unit vectors."""
        raise NotImplementedError

    def forward(self, x1: Images, x2: Images) -> Float[Tensor, ""]:
        """The loss of two views of each image."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, in groups for an optimiser; ``constant_lr`` marks one that no schedule changes."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def _checked(self, found: Tensor, count: int) -> Tensor:
        if found.shape != (count, self.features):
            raise ValueError(
                f"backbone must give features ({count}, {self.features}), got {tuple(found.shape)}: tell their width "
                "with features="
            )
        return found

    def _check_views(self, x1: Tensor, x2: Tensor) -> None:
        if x1.shape != x2.shape or not x1.ndim or not len(x1):
            raise ValueError(
                f"x1 and x2 must be batches of one shape, of at least 1 image, got {tuple(x1.shape)} and "
                f"{tuple(x2.shape)}"
            )
        if self.training and len(x1) == 1 and any(isinstance(part, _BatchNorm) for part in self.modules()):
            raise ValueError("the batch must hold >= 2 images for batch norm to be trained, got 1")


class SimCLR(Host):
    """The views of one image are drawn together and pushed away from all other views of the batch.

    Args:
        backbone_fn: Makes the network that gives features (batch, features).
        dim: Width of the embeddings, >= 1.
        temperature: T, > 0.
        hallucinator: Adds a positive for each image, if given.
        features: Width of the backbone's features; by default that of its last layer with weights.
        mask_duplicates: With a hallucinator, whether views of the same image other than the positive are left out of
            the negatives. Without it a key stands in its own denominator with similarity 1, as in the authors' code.

    Raises:
        ValueError: If a number is out of its range; in a call if the views differ in shape, or one image alone is to
            train batch norm.

    Example:
        >>> host = SimCLR(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 8)), dim=4)
        >>> x1, x2 = torch.rand(2, 3, 1, 4, 4)
        >>> host(x1, x2).shape
        torch.Size([])
    """

    def __init__(
        self,
        backbone_fn: Callable[[], nn.Module],
        dim: int = 128,
        temperature: float = 0.07,
        hallucinator: Hallucinator | None = None,
        *,
        features: int | None = None,
        mask_duplicates: bool = True,
    ):
        check_temperature(temperature)
        super().__init__(backbone_fn, dim, features, hallucinator)
        self.temperature, self.mask_duplicates = temperature, mask_duplicates
        self.head = two_layers(self.features, dim)
        self._mask: Tensor | None = None

    def embed(self, x: Images) -> Float[Tensor, "batch dim"]:
        """Unit embeddings."""
        return functional.normalize(self.head(self.encode(x)))

    def forward(self, x1: Images, x2: Images) -> Float[Tensor, ""]:
        """NT-Xent of the two views, which pass the network as one batch."""
        self._check_views(x1, x2)
        z1, z2 = self.head(self.encode(torch.cat([x1, x2]))).chunk(2)
        mask = None
        if self.hallucinator is not None and self.training:
            z1, z2 = self.hallucinator(z1, z2)
            mask = self._duplicates(len(x1), x1.device) if self.mask_duplicates else None
        return nt_xent(z1, z2, self.temperature, mask)

    def _duplicates(self, count: int, device: torch.device) -> Tensor:
        """The mask of the last batch size, which hardly ever changes."""
        if self._mask is None or len(self._mask) != 4 * count or self._mask.device != device:
            self._mask = duplicates(count, device)
        return self._mask


class MoCo(Host):
    """Queries are contrasted with their own keys and a queue of earlier ones, made by a slowly moving network.

    Version 2 by default; version 1 is ``mlp=False, temperature=0.07``, with ``policy(..., version=1)`` and
    ``schedule="step"``. There is no shuffle of batches on one device,
    where batch norm can tell a query its key's batch: ``bn_splits`` has keys normalised in random groups.

    Args:
        backbone_fn: Makes the network that gives features (batch, features); the key's is a copy.
        dim: Width of the embeddings, >= 1.
        queue_size: Keys that are remembered, at least those of a batch.
        momentum: m, the share of its weights that the key's network keeps in a step, in [0, 1].
        temperature: T, > 0.
        mlp: Whether the head has a hidden layer (version 2).
        hallucinator: Adds a positive for each image, if given.
        features: Width of the backbone's features; by default that of its last layer with weights.
        normalize_query: Whether the hallucinator is given unit queries; the authors' code gives them as they are.
        enqueue_once: Whether each key enters the queue once. With False and a hallucinator it enters twice, as in the
            authors' code, which halves the queue.
        bn_splits: Groups in which a batch passes the networks, >= 1; those of the keys are drawn at random.

    Attributes:
        queue: Unit keys (dim, queue_size), the oldest at the pointer.
        pointer: Where the next key goes.

    Raises:
        ValueError: If a number is out of its range; in a call if the views differ in shape, one image alone is to train
            batch norm, or the batch exceeds the queue.

    Example:
        >>> host = MoCo(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 8)), dim=4, queue_size=6)
        >>> x1, x2 = torch.rand(2, 4, 1, 4, 4)
        >>> host(x1, x2).shape, int(host.pointer)
        (torch.Size([]), 4)
    """

    queue: Tensor
    pointer: Tensor

    def __init__(
        self,
        backbone_fn: Callable[[], nn.Module],
        dim: int = 128,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.2,
        mlp: bool = True,
        hallucinator: Hallucinator | None = None,
        *,
        features: int | None = None,
        normalize_query: bool = False,
        enqueue_once: bool = True,
        bn_splits: int = 1,
    ):
        check_temperature(temperature)
        number("momentum", momentum, "[0, 1]")
        whole("queue_size", queue_size, ">= 1")
        whole("bn_splits", bn_splits, ">= 1")
        for name, value in (("mlp", mlp), ("normalize_query", normalize_query), ("enqueue_once", enqueue_once)):
            one_of(name, value, (True, False))
        super().__init__(backbone_fn, dim, features, hallucinator)
        self.momentum, self.temperature, self.bn_splits = momentum, temperature, bn_splits
        self.normalize_query, self.enqueue_once = normalize_query, enqueue_once
        self.head: nn.Module = two_layers(self.features, dim) if mlp else nn.Linear(self.features, dim)
        self.key_backbone, self.key_head = separate_copy(self.backbone), separate_copy(self.head)
        for parameter in (*self.key_backbone.parameters(), *self.key_head.parameters()):
            parameter.requires_grad_(False)
        self.register_buffer("queue", functional.normalize(torch.randn(dim, queue_size), dim=0))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    def embed(self, x: Images) -> Float[Tensor, "batch dim"]:
        """Unit queries."""
        return functional.normalize(self.head(self.encode(x)))

    def forward(self, x1: Images, x2: Images) -> Float[Tensor, ""]:
        """InfoNCE of queries from ``x1`` and keys from ``x2``; in training the key's network and the queue move on."""
        self._check_views(x1, x2)
        q = self._split(lambda x: self.head(self.encode(x)), x1)
        if self.training:
            self.follow()
        k = self.keys(x2)
        queries, keys = q, k
        if self.hallucinator is not None and self.training:
            queries, keys = self.hallucinator(functional.normalize(q) if self.normalize_query else q, k)
        # The queue changes before the backward pass, which needs it as it was.
        loss = info_nce(queries, keys, self.queue.clone() if self.training else self.queue, self.temperature)
        if self.training:
            self.enqueue(k if self.enqueue_once else keys)
        return loss

    @torch.no_grad()
    def keys(self, x: Images) -> Float[Tensor, "batch dim"]:
        """Unit keys of images, without gradient."""
        order = torch.randperm(len(x), device=x.device) if self.bn_splits > 1 and self.training else None
        found = self._split(
            lambda part: self.key_head(self._checked(self.key_backbone(part), len(part))),
            x if order is None else x[order],
        )
        return functional.normalize(found if order is None else found[order.argsort()])

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the key's network towards the query's, in one call for all weights."""
        own: list[Tensor] = [*self.key_backbone.parameters(), *self.key_head.parameters()]
        torch._foreach_lerp_(own, [*self.backbone.parameters(), *self.head.parameters()], 1 - self.momentum)

    @torch.no_grad()
    def enqueue(self, keys: Float[Tensor, "batch dim"]) -> None:
        """Puts unit keys in the place of the oldest, those of all processes on each.

        Raises:
            ValueError: If there are more than the queue can hold.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
            keys = gather_rows(torch.arange(len(keys), device=keys.device) * world + rank, keys)[1]
        size, start = self.queue.shape[1], int(self.pointer)
        if len(keys) > size:
            raise ValueError(f"queue_size must be >= the keys of a batch, {len(keys)}, got {size}")
        places = (start + torch.arange(len(keys), device=keys.device)) % size
        self.queue[:, places] = keys.T.to(self.queue.dtype)
        self.pointer.fill_((start + len(keys)) % size)

    def _split(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.bn_splits == 1 or not self.training:
            return network(x)
        if len(x) < 2 * self.bn_splits:
            raise ValueError(f"bn_splits must leave >= 2 images in a group, got {self.bn_splits} for {len(x)} images")
        return torch.cat([network(part) for part in x.tensor_split(self.bn_splits)])


class SimSiam(Host):
    """A view predicts the embedding of the other one, which has no gradient; there are no negatives.

    Args:
        backbone_fn: Makes the network that gives features (batch, features).
        dim: Width of the embeddings, >= 1; 512 for small images.
        pred_dim: Width of the predictor's hidden layer, >= 1; the paper's is a quarter of ``dim``.
        hallucinator: Adds a positive for each view, if given.
        features: Width of the backbone's features; by default that of its last layer with weights.

    Raises:
        ValueError: If a number is out of its range; in a call if the views differ in shape, or one image is alone.

    Example:
        >>> host = SimSiam(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 8)), dim=8, pred_dim=2)
        >>> x1, x2 = torch.rand(2, 3, 1, 4, 4)
        >>> -1 <= host(x1, x2).item() <= 1
        True
    """

    def __init__(
        self,
        backbone_fn: Callable[[], nn.Module],
        dim: int = 2048,
        pred_dim: int = 512,
        hallucinator: Hallucinator | None = None,
        *,
        features: int | None = None,
    ):
        whole("pred_dim", pred_dim, ">= 1")
        super().__init__(backbone_fn, dim, features, hallucinator)
        width = self.features
        self.projector = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Linear(width, dim, bias=False), nn.BatchNorm1d(dim, affine=False),
        )  # fmt: skip
        self.predictor = nn.Sequential(
            nn.Linear(dim, pred_dim, bias=False), nn.BatchNorm1d(pred_dim), nn.ReLU(), nn.Linear(pred_dim, dim)
        )

    def embed(self, x: Images) -> Float[Tensor, "batch dim"]:
        """Unit projections."""
        return functional.normalize(self.projector(self.encode(x)))

    def forward(self, x1: Images, x2: Images) -> Float[Tensor, ""]:
        """Half of each direction's negative cosine."""
        self._check_views(x1, x2)
        z1, z2 = (self.projector(self.encode(x)) for x in (x1, x2))
        p1, p2 = self.predictor(z1), self.predictor(z2)
        if self.hallucinator is not None and self.training:
            (p1, _), (p2, _) = self.hallucinator(p1, p2), self.hallucinator(p2, p1)
            z1, z2 = torch.cat([z1, z1]), torch.cat([z2, z2])
        return (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The predictor keeps its learning rate, so that it stays ahead of what it predicts."""
        own = list(self.predictor.parameters())
        rest = [p for p in self.parameters() if p.requires_grad and not any(p is other for other in own)]
        return [{"params": rest}, {"params": own, "constant_lr": True}]


def duplicates(count: int, device: torch.device | str = "cpu") -> Bool[Tensor, "views views"]:
    """The mask for :func:`nt_xent` of [q; h] and [k; k]: views of one image that are not each other's positive.

    Args:
        count: Images of the batch; the mask has 4 rows for each.
        device: Where the mask lies.

    Example:
        >>> duplicates(1).int().tolist()  # q, h, k, k: the positives are (q, k) and (h, k)
        [[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]]
    """
    images = torch.arange(count, device=device).repeat(4)
    mask = images[:, None] == images
    mask.fill_diagonal_(False)
    for offset in (2 * count, -2 * count):
        mask.diagonal(offset).fill_(False)
    return mask


def two_layers(features: int, dim: int) -> nn.Sequential:
    """The head of SimCLR and of MoCo v2: linear, ReLU, linear."""
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, dim))


def width_of(backbone: nn.Module) -> int:
    """The width of the last layer with weights, in module order.

    Raises:
        ValueError: If there is none.

    Example:
        >>> width_of(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()))
        8
    """
    for part in reversed(list(backbone.modules())):
        for name in ("out_features", "out_channels", "num_features"):
            if isinstance(width := getattr(part, name, None), int) and any(True for _ in part.parameters()):
                return width
    raise ValueError(f"features must be given for {type(backbone).__name__}, which has no layer that tells its width")
