"""The two-layer network with a quadratic activation, trained or built from waves.

Doshi, Das, He and Gromov, "To grok or not to grok: Disentangling generalization and memorization on corrupted
algorithmic datasets", ICLR 2024, arXiv:2310.13061:

    f(m, n) = W (U e_m + V e_n)^2,    U, V of shape (N, p), W of shape (p, N)

The solution that adds in closed form is Gromov's, "Grokking modular arithmetic", 2023, arXiv:2301.02679.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from netwright.checks import one_of

Norm = Literal["bn", "ln"]


class QuadraticMLP(nn.Module):
    """A hidden layer of squares, without biases: ``fc1 -> dropout -> square -> norm -> fc2``.

    It takes pairs of numbers (examples, 2) of an integer type, for which the first layer is a look-up, or their one-hot
    form (examples, 2 p) in floating point, for which it is a product; both give the same. Weights start as N(0, s^2)
    with s = 0.5 / (2 N)^(1/3).

    Args:
        p: The modulus, >= 3: classes, and length of each half of the input.
        width: Neurons N of the hidden layer, >= 1.
        dropout: Rate before the activation, in [0, 1).
        norm: ``"bn"`` (batch norm) or ``"ln"`` (layer norm) of the squares, or None.
        generator: Source of the weights; torch's global one when None.

    Attributes:
        fc1: The first layer, weight (N, 2 p).
        fc2: The second, weight (p, N).

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> net = QuadraticMLP(7, width=16)
        >>> net(torch.tensor([[3, 5], [6, 6]])).shape, net.U.shape, net.W.shape
        (torch.Size([2, 7]), torch.Size([16, 7]), torch.Size([7, 16]))
    """

    def __init__(
        self,
        p: int,
        width: int = 500,
        dropout: float = 0.0,
        norm: Norm | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if p < 3:
            raise ValueError(f"p must be >= 3, got {p}")
        if width < 1:
            raise ValueError(f"width must be >= 1, got {width}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        if norm is not None:
            one_of("norm", norm, get_args(Norm))
        self.p, self.width = p, width
        self.fc1 = nn.Linear(2 * p, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.norm = {None: nn.Identity, "bn": nn.BatchNorm1d, "ln": nn.LayerNorm}[norm](width)
        self.fc2 = nn.Linear(width, p, bias=False)
        std = 0.5 / (2 * width) ** (1 / 3)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=std, generator=generator)

    @property
    def U(self) -> Float[Tensor, "neurons p"]:
        """Weights of the first number."""
        return self.fc1.weight[:, : self.p]

    @property
    def V(self) -> Float[Tensor, "neurons p"]:
        """Weights of the second number."""
        return self.fc1.weight[:, self.p :]

    @property
    def W(self) -> Float[Tensor, "p neurons"]:
        """Weights of the second layer."""
        return self.fc2.weight

    def forward(
        self, x: Int[Tensor, "examples two"] | Float[Tensor, "examples inputs"]
    ) -> Float[Tensor, "examples classes"]:
        """The outputs, which are trained towards the one-hot label.

        Raises:
            ValueError: If the shape is another, or a number is outside 0 .. p - 1.
        """
        return self.fc2(self.hidden(x))

    def hidden(self, x: Tensor) -> Float[Tensor, "examples neurons"]:
        """What the second layer sees: the squares, normalised.

        Raises:
            ValueError: As for :meth:`forward`.
        """
        return self.norm(self.dropout(self._first(x)).square())

    def _first(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            if x.ndim != 2 or x.shape[1] != 2 * self.p:
                raise ValueError(f"x must have shape (examples, {2 * self.p}), got {tuple(x.shape)}")
            return self.fc1(x)
        if x.ndim != 2 or x.shape[1] != 2:
            raise ValueError(f"x must have shape (examples, 2), got {tuple(x.shape)}")
        if len(x) and not 0 <= int(x.min()) <= int(x.max()) < self.p:
            raise ValueError(f"x must lie in 0..{self.p - 1}, got {int(x.min())}..{int(x.max())}")
        table = self.fc1.weight.T.contiguous()
        # In place: one temporary of the size of the hidden layer less.
        return functional.embedding(x[:, 0], table[: self.p]).add_(functional.embedding(x[:, 1], table[self.p :]))

    @classmethod
    def analytic(cls, p: int, width: int, generator: torch.Generator | None = None) -> QuadraticMLP:
        """A network that adds mod p without training: every neuron is a wave.

        U[k, i] = A cos(2 pi s_k i / p + a_k), V[k, j] = A cos(2 pi s_k j / p + b_k), W[q, k] = A cos(2 pi s_k q / p +
        a_k + b_k), A = (2 / N)^(1/3). Frequencies s_k in 1 .. (p - 1) / 2 are used equally often, as far as N allows;
        phases a_k, b_k are uniform. The output is 1 at the right class and -1 / (p - 1) elsewhere, with noise of order
        1 / sqrt(N).

        Args:
            p: The modulus, >= 3.
            width: Neurons N.
            generator: Source of the phases; torch's global one when None.

        Raises:
            ValueError: If an argument is out of its range.

        Example:
            >>> net = QuadraticMLP.analytic(11, 400, torch.Generator().manual_seed(0))
            >>> net(torch.tensor([[3, 5], [9, 9]])).argmax(1)
            tensor([8, 7])
        """
        net = cls(p, width)
        frequencies = 1 + torch.arange(width, dtype=torch.float64) % ((p - 1) // 2)
        a, b = 2 * math.pi * torch.rand(2, width, dtype=torch.float64, generator=generator)
        waves = 2 * math.pi / p * frequencies[:, None] * torch.arange(p)
        amplitude = (2 / width) ** (1 / 3)
        parts = [amplitude * torch.cos(waves + phase[:, None]) for phase in (a, b, a + b)]
        with torch.no_grad():
            net.fc1.weight.copy_(torch.cat(parts[:2], 1))
            net.fc2.weight.copy_(parts[2].T)
        return net


def linear_pair(model: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """The two linear layers of a network that has no others, first and second.

    Raises:
        ValueError: If it has fewer or more, or the first does not lead to the second.

    Example:
        >>> first, second = linear_pair(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)))
        >>> first.out_features, second.in_features
        (4, 4)
    """
    found = [part for part in model.modules() if isinstance(part, nn.Linear)]
    if len(found) != 2:
        raise ValueError(f"model must hold 2 linear layers, got {len(found)} in {type(model).__name__}")
    first, second = found
    if first.out_features != second.in_features:
        raise ValueError(
            f"the second layer must take what the first gives, got {first.out_features} and {second.in_features}"
        )
    return first, second


def norms_between(model: nn.Module) -> list[nn.BatchNorm1d | nn.LayerNorm]:
    """The norms of the hidden neurons: those that stand between the two linear layers and are as wide.

    Example:
        >>> [type(norm).__name__ for norm in norms_between(QuadraticMLP(7, 16, norm="ln"))]
        ['LayerNorm']
    """
    first, second = linear_pair(model)
    parts = list(model.modules())
    between = parts[parts.index(first) + 1 : parts.index(second)]
    wide = (first.out_features,)
    return [
        part
        for part in between
        if (isinstance(part, nn.BatchNorm1d) and (part.num_features,) == wide)
        or (isinstance(part, nn.LayerNorm) and part.normalized_shape == wide)
    ]
