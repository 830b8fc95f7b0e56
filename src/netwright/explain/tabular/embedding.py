"""Autoencoders for rows of features, and a classifier on what they encode.

Karim et al., "Interpreting Black-box Machine Learning Models for High Dimensional Datasets", IEEE DSAA 2023,
arXiv:2208.13405. Their convolutional autoencoder pads a row with zeros and folds it into a square. Which features
become neighbours so is arbitrary; a dense encoder, or none, does as well for tables.

Attention on an embedding is no attention on features. It is brought back by how far each feature moves the embedding,
score_i = sum_e a_e |d emb_e / d x_i|, averaged over rows; the paper says nothing of this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from netwright.checks import one_of
from netwright.explain.tabular.attention import SelfAttentionNetwork
from netwright.explain.tabular.inputs import as_table, moments
from netwright.nn.modes import in_mode

Encoder = Literal["conv", "dense"]
Head = Literal["san", "dense", "conv"]
MAPS = (16, 8, 8)
JACOBIAN_CELLS = 2_000_000  # of the derivatives that are held at once


class _Columns(nn.Module):
    """(x - shift) * scale, column by column."""

    columnwise = True
    shift: Tensor
    scale: Tensor

    def __init__(self, shift: np.ndarray, unit: np.ndarray):
        super().__init__()
        scale = np.divide(1.0, unit, out=np.zeros(len(unit)), where=unit > 0)
        self.register_buffer("shift", torch.tensor(shift, dtype=torch.float32))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """Scaled rows."""
        return (x - self.shift) * self.scale


class MinMax(_Columns):
    """Scales each feature to [0, 1] over the rows it was made from, as an autoencoder needs it; a constant becomes 0.

    Args:
        X: (rows, features).

    Raises:
        ValueError: If X is no finite matrix.

    Example:
        >>> MinMax(np.array([[1.0, 5.0], [3.0, 5.0]]))(torch.tensor([[2.0, 5.0]]))
        tensor([[0.5000, 0.0000]])
    """

    def __init__(self, X: Any):
        values = as_table(X).dense()
        super().__init__(values.min(0), np.ptp(values, axis=0))


class Standardise(_Columns):
    """Gives each feature mean 0 and variance 1 over the rows it was made from; a constant becomes 0.

    Args:
        X: (rows, features).

    Raises:
        ValueError: If X is no finite matrix.

    Example:
        >>> Standardise(np.array([[1.0, 5.0], [3.0, 5.0]]))(torch.tensor([[3.0, 5.0]]))
        tensor([[1., 0.]])
    """

    def __init__(self, X: Any):
        super().__init__(*moments(as_table(X)))


class _Square(nn.Module):
    """Rows, padded with zeros, as square pictures of one channel."""

    def __init__(self, features: int, side: int):
        super().__init__()
        self.features, self.side = features, side

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ValueError(f"x must have shape (batch, {self.features}), got {tuple(x.shape)}")
        return functional.pad(x, (0, self.side**2 - self.features)).view(-1, 1, self.side, self.side)


class _Row(nn.Module):
    """Square pictures of one channel as rows, without the padding."""

    def __init__(self, features: int):
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, : self.features]


class TabularCAE(nn.Module):
    """The convolutional autoencoder of a row of features folded into a square.

    The encoder's blocks are 3x3 convolution, ReLU, batch norm and 2x2 maxima (a border of its own where a side is odd),
    the decoder mirrors them with upsampling and ends in a sigmoid, so that features must lie in [0, 1].

    Args:
        n_features: Features d, >= 1; the side of the square is sqrt(d), rounded up.
        maps: Channels of the encoder's blocks, at least one block.

    Attributes:
        encoder: (batch, d) to (batch, embedding).
        decoder: Back.
        embedding: Length of an embedding.
        grid: Channels, height and width of an embedding before it is flattened.

    Raises:
        ValueError: If ``n_features`` or a number of maps is below 1.

    Example:
        >>> TabularCAE(7091).embedding  # 86 x 86 becomes 11 x 11 with 8 maps
        968
    """

    def __init__(self, n_features: int, maps: Sequence[int] = MAPS):
        super().__init__()
        if n_features < 1 or not maps or min(maps) < 1:
            raise ValueError(f"n_features and maps must be >= 1, got {n_features} and {tuple(maps)}")
        side = math.isqrt(n_features - 1) + 1
        sides, before = [side], 1
        encoder: list[nn.Module] = [_Square(n_features, side)]
        for width in maps:
            encoder += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(width)]
            encoder += [nn.MaxPool2d(2, ceil_mode=True)]
            sides.append((sides[-1] + 1) // 2)
            before = width
        self.encoder = nn.Sequential(*encoder, nn.Flatten())
        self.grid = (maps[-1], sides[-1], sides[-1])
        self.embedding = math.prod(self.grid)
        decoder: list[nn.Module] = [nn.Unflatten(1, self.grid)]
        for width, target in zip([*reversed(maps[:-1]), maps[0]], reversed(sides[:-1]), strict=True):
            decoder += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(width)]
            decoder += [nn.Upsample(size=(target, target))]
            before = width
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(before, 1, 3, padding=1), nn.Sigmoid(), _Row(n_features))

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """The reconstruction, in (0, 1)."""
        return self.decoder(self.encoder(x))


class EmbeddingClassifier(nn.Module):
    """A classifier on the embedding of an encoder; any modules will do.

    Args:
        encoder: (batch, features) to (batch, embedding).
        decoder: Back, or None where nothing is to be reconstructed.
        head: (batch, embedding) to logits (batch, classes).

    Example:
        >>> model = EmbeddingClassifier(nn.Linear(6, 3), None, SelfAttentionNetwork(3, 2))
        >>> model(torch.rand(4, 6)).shape, model.feature_attention(torch.rand(4, 6)).shape
        (torch.Size([4, 2]), torch.Size([6]))
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module | None, head: nn.Module):
        super().__init__()
        self.encoder, self.decoder, self.head = encoder, decoder, head

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return self.head(self.encoder(x))

    def in_sequence(self) -> tuple[nn.Module, nn.Module]:
        """The parts that an input goes through, for whoever takes the network apart."""
        return self.encoder, self.head

    def feature_attention(
        self, X: Float[Tensor, "rows features"], y: Int[Tensor, " rows"] | None = None
    ) -> Float[Tensor, " features"]:
        """How much attention each feature gets, by way of the embedding.

        Args:
            X: Rows; some hundred are enough, since each takes a derivative of every coordinate of the embedding.
            y: Their classes: only rows that are classified rightly count. Without them all rows do.

        Returns:
            score_i >= 0. Where the encoder is the identity it is the mean attention itself.

        Raises:
            TypeError: If the head is no :class:`SelfAttentionNetwork`.
            ValueError: If no row is classified rightly.
        """
        if not isinstance(self.head, SelfAttentionNetwork):
            raise TypeError(f"head must be a SelfAttentionNetwork, got {type(self.head).__name__}")
        with in_mode(self, training=False):
            with torch.no_grad():
                embedded = self.encoder(X)
                wanted = self.head(embedded).argmax(1) if y is None else y
            attention = self.head.mean_attention(embedded, wanted)
            return attention if isinstance(self.encoder, nn.Identity) else pushed_back(self.encoder, X, attention)


def pushed_back(
    encoder: nn.Module, X: Float[Tensor, "rows features"], weights: Float[Tensor, " embedding"]
) -> Float[Tensor, " features"]:
    """Weights of the coordinates of an embedding as weights of features: sum_e w_e mean_x |d emb_e / d x_i|.

    Args:
        encoder: In the mode it shall have; its rows must not depend on one another.
        X: Rows.
        weights: One for each coordinate.

    Raises:
        ValueError: If there is not one weight a coordinate.

    Example:
        >>> linear = nn.Linear(3, 2)
        >>> found = pushed_back(linear, torch.rand(4, 3), torch.tensor([1.0, 0.0]))
        >>> torch.allclose(found, linear.weight[0].abs())
        True
    """
    with torch.enable_grad():
        x = X.detach().clone().requires_grad_()
        embedded = encoder(x)
        if embedded.shape != (len(x), len(weights)):
            raise ValueError(f"weights must be {embedded.shape[-1]}, one a coordinate, got {len(weights)}")
        total = torch.zeros(x.shape[1], dtype=x.dtype, device=x.device)
        step = max(1, JACOBIAN_CELLS // max(embedded.numel(), x.numel()))
        for chosen in torch.arange(len(weights), device=x.device).split(step):
            seeds = functional.one_hot(chosen, len(weights)).to(x)[:, None].expand(-1, len(x), -1)
            (slopes,) = torch.autograd.grad(embedded, x, seeds, is_grads_batched=True, retain_graph=True)
            total += weights[chosen].to(x) @ slopes.abs().mean(1)
    return total


class ConvHead(nn.Sequential):
    """The paper's small convolutional head: convolution with 32 maps, batch norm, maxima, dropout, a dense layer.

    Args:
        grid: Channels, height and width of the embedding.
        n_classes: Classes, >= 2.
        maps: Of the convolution.
        hidden: Width of the dense layer.

    Example:
        >>> ConvHead((8, 3, 3), 5)(torch.rand(2, 72)).shape
        torch.Size([2, 5])
    """

    def __init__(self, grid: tuple[int, int, int], n_classes: int, maps: int = 32, hidden: int = 512):
        channels, height, width = grid
        places = -(-height // 2) * -(-width // 2)
        super().__init__(
            nn.Unflatten(1, grid),
            nn.Conv2d(channels, maps, 3, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(maps),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(maps * places, hidden),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(hidden, n_classes),
        )


def tabular_classifier(
    n_features: int,
    n_classes: int,
    encoder: Encoder | None = "conv",
    head: Head = "san",
    *,
    embedding: int = 64,
    hidden: int = 128,
) -> EmbeddingClassifier:
    """One of the paper's black boxes, untrained, or a simpler one.

    Args:
        n_features: Features, >= 1, which must lie in [0, 1] for an encoder (put a :class:`MinMax` in front).
        n_classes: Classes, >= 2.
        encoder: ``"conv"`` (:class:`TabularCAE`), ``"dense"``, or None: the head sees the features themselves.
        head: ``"san"`` (:class:`SelfAttentionNetwork`), ``"conv"`` (:class:`ConvHead`, behind ``"conv"`` only), or
            ``"dense"``: one hidden layer with ReLU.
        embedding: Length of a dense embedding, >= 1.
        hidden: Width of the dense head and of the dense encoder, >= 1.

    Raises:
        ValueError: If an argument is unknown or out of its range, or the head does not fit the encoder.

    Example:
        >>> tabular_classifier(20, 3, encoder=None, head="dense")(torch.rand(2, 20)).shape
        torch.Size([2, 3])
    """
    for name, value in (("n_features", n_features), ("embedding", embedding), ("hidden", hidden)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if n_classes < 2:
        raise ValueError(f"n_classes must be >= 2, got {n_classes}")
    if encoder is not None and encoder not in get_args(Encoder):
        raise ValueError(f"encoder must be 'conv', 'dense' or None, got {encoder!r}")
    one_of("head", head, get_args(Head))
    coder: nn.Module
    decoder: nn.Module | None = None
    length, grid = n_features, None
    if encoder == "conv":
        cae = TabularCAE(n_features)
        coder, decoder, length, grid = cae.encoder, cae.decoder, cae.embedding, cae.grid
    elif encoder == "dense":
        coder = nn.Sequential(nn.Linear(n_features, hidden), nn.ReLU(), nn.Linear(hidden, embedding), nn.ReLU())
        decoder = nn.Sequential(nn.Linear(embedding, hidden), nn.ReLU(), nn.Linear(hidden, n_features), nn.Sigmoid())
        length = embedding
    else:
        coder = nn.Identity()
    if head == "conv":
        if grid is None:
            raise ValueError(f"head 'conv' needs encoder='conv', got {encoder!r}")
        return EmbeddingClassifier(coder, decoder, ConvHead(grid, n_classes))
    if head == "san":
        return EmbeddingClassifier(coder, decoder, SelfAttentionNetwork(length, n_classes))
    dense = nn.Sequential(nn.Linear(length, hidden), nn.ReLU(), nn.Linear(hidden, n_classes))
    return EmbeddingClassifier(coder, decoder, dense)
