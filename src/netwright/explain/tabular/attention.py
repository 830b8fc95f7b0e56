"""Self-attention over features: a gate with one softmax weight a feature, and what the weights say.

Škrlj, Džeroski, Lavrač and Petković, "Feature Importance Estimation with Self-Attention Networks", ECAI 2020,
arXiv:2002.04464, as used by Karim et al., IEEE DSAA 2023, arXiv:2208.13405:

    Omega(x) = 1/h sum_r x o softmax(W_r x + b_r),    logits = W_2 selu(dropout(W_1 Omega(x) + b_1)) + b_2

The published package had no softmax in its forward pass until 2023, so the paper's own runs gate by x o (W_r x + b_r):
``gate="linear"``.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from netwright.nn.modes import in_mode

Gate = Literal["softmax", "linear"]
FULL_RANK_UP_TO = 2000  # features; above, a head of d x d weights would need 16 MB at least
LOW_RANK = 64


class SelfAttentionNetwork(nn.Module):
    """A classifier whose first layer weighs the features of every input.

    Args:
        n_features: Features d, >= 1.
        n_classes: Classes, >= 2.
        n_heads: Gates that are averaged, h >= 1.
        hidden: Width of the layer between, >= 1.
        dropout: Rate, in [0, 1).
        rank: Of each W_r = A_r B_r. None means full rank up to 2,000 features and 64 above; ``repr`` says which.
        gate: ``"softmax"`` over the features, or ``"linear"``.

    Raises:
        ValueError: If an argument is out of its range; in a call if an input has another number of features.

    Example:
        >>> san = SelfAttentionNetwork(4, 3)
        >>> x = torch.rand(5, 4)
        >>> san(x).shape, san.instance_attention(x).sum(1).allclose(torch.ones(5))
        (torch.Size([5, 3]), True)
    """

    def __init__(
        self,
        n_features: int,
        n_classes: int,
        n_heads: int = 2,
        hidden: int = 32,
        dropout: float = 0.2,
        rank: int | None = None,
        gate: Gate = "softmax",
    ):
        super().__init__()
        wanted = [("n_features", n_features, 1), ("n_classes", n_classes, 2), ("n_heads", n_heads, 1)]
        for name, value, least in [*wanted, ("hidden", hidden, 1), *([("rank", rank, 1)] if rank is not None else [])]:
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        if gate not in get_args(Gate):
            raise ValueError(f"gate must be 'softmax' or 'linear', got {gate!r}")
        self.n_features, self.n_heads, self.gate = n_features, n_heads, gate
        self.rank = LOW_RANK if rank is None and n_features > FULL_RANK_UP_TO else rank
        if self.rank is None:
            self.heads = nn.ModuleList(nn.Linear(n_features, n_features) for _ in range(n_heads))
        else:
            inner = self.rank
            self.heads = nn.ModuleList(
                nn.Sequential(nn.Linear(n_features, inner, bias=False), nn.Linear(inner, n_features))
                for _ in range(n_heads)
            )
        self.fc1 = nn.Linear(n_features, hidden)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, n_classes)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        rank = "full rank" if self.rank is None else f"rank {self.rank}"
        return f"{self.n_features} features, {self.n_heads} heads of {rank}, gate={self.gate!r}"

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return self._classified(self.attend(x))

    def attend(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """Omega(x): the input times its weights, averaged over the heads."""
        return self._gated(self._scores(x), x)

    def _scores(self, x: Tensor) -> Float[Tensor, "heads batch features"]:
        if x.ndim != 2 or x.shape[1] != self.n_features:
            raise ValueError(f"x must have shape (batch, {self.n_features}), got {tuple(x.shape)}")
        return torch.stack([head(x) for head in self.heads])

    def _gated(self, scores: Float[Tensor, "heads batch features"], x: Tensor) -> Tensor:
        weights = scores.softmax(-1) if self.gate == "softmax" else scores
        return x * weights.mean(0)

    def _classified(self, attended: Tensor) -> Tensor:
        return self.fc2(functional.selu(self.dropout(self.fc1(attended))))

    def first_affine(self) -> tuple[Tensor, Tensor | None]:
        """The first maps of all heads, one under another: (heads d, d) and their biases, or (heads rank, d)."""
        parts: list[Any] = list(self.heads)
        if self.rank is not None:
            return torch.cat([head[0].weight for head in parts]), None
        return torch.cat([head.weight for head in parts]), torch.cat([head.bias for head in parts])

    def after_affine(self, z: Float[Tensor, "batch heads_inner"], x: Tensor | None) -> Tensor:
        """Logits from what :meth:`first_affine` makes of x, and x."""
        assert x is not None
        scores = z.unflatten(1, (self.n_heads, -1)).movedim(1, 0)
        if self.rank is not None:
            parts: list[Any] = list(self.heads)
            scores = torch.stack([head[1](inner) for head, inner in zip(parts, scores, strict=True)])
        return self._classified(self._gated(scores, x))

    @torch.no_grad()
    def instance_attention(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """The softmax weights of each input, averaged over the heads; they sum to 1."""
        return self._scores(x).softmax(-1).mean(0)

    @torch.no_grad()
    def mean_attention(
        self,
        X: Float[Tensor, "rows features"],
        y: Int[Tensor, " rows"],
        *,
        per_class: bool = False,
    ) -> Float[Tensor, " features"] | Float[Tensor, "classes features"]:
        """The mean weights of the inputs that are classified rightly.

        Args:
            X: Inputs.
            y: Their classes.
            per_class: One mean a class; NaN for a class of which no input is classified rightly.

        Raises:
            ValueError: If no input is classified rightly.
        """
        with in_mode(self, training=False):
            right = self(X).argmax(1) == y
        if not right.any():
            raise ValueError("X must hold an input that is classified rightly, got none")
        weights = self.instance_attention(X[right])
        if not per_class:
            return weights.mean(0)
        members = functional.one_hot(y[right], self.fc2.out_features).to(weights)
        return (members.T @ weights) / members.sum(0)[:, None]

    @torch.no_grad()
    def global_attention(self) -> Float[Tensor, " features"]:
        """The softmax of the diagonals of the W_r, averaged over the heads, as the package has it; it sums to 1.

        Weights off the diagonal do not enter at all.
        """
        parts: list[Any] = list(self.heads)
        if self.rank is None:
            diagonals = [head.weight.diagonal() for head in parts]
        else:
            diagonals = [(head[1].weight * head[0].weight.T).sum(1) for head in parts]
        return torch.stack(diagonals).softmax(-1).mean(0)
