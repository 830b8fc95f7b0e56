"""A stack of LSSL layers with residual connections, an encoder before and a decoder behind."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.checks import one_of, whole
from netwright.nn.lssl.layer import LR_A, LR_DT, LSSL, Learn, Mode, param_groups
from netwright.nn.lssl.measures import Measure

Task = Literal["classify", "regress", "seq2seq"]


class LSSLBlock(nn.Module):
    """x + dropout(layer(norm(x))), or norm(x + dropout(layer(x))).

    Args:
        layer: The layer.
        norm: ``"pre"`` or ``"post"``.
        dropout: Probability, in [0, 1).

    Raises:
        ValueError: If ``norm`` is another word.
    """

    def __init__(self, layer: LSSL, norm: Literal["pre", "post"] = "pre", dropout: float = 0.0):
        super().__init__()
        one_of("norm", norm, ("pre", "post"))
        self.layer, self.dropout, self.norm = layer, nn.Dropout(dropout), nn.LayerNorm(layer.d_model)
        self.first = norm == "pre"

    def forward(
        self,
        x: Float[Tensor, "batch L H"],
        state: Float[Tensor, "batch H N"] | None = None,
        rate: float = 1.0,
        return_state: bool = False,
        *,
        mode: Mode = "convolution",
    ) -> Any:
        """As the layer's."""
        found = self.layer(self.norm(x) if self.first else x, state, rate, return_state, mode=mode)
        out, last = found if return_state else (found, None)
        out = x + self.dropout(out)
        out = out if self.first else self.norm(out)
        return (out, last) if return_state else out


class LSSLModel(nn.Module):
    """A deep LSSL: a linear encoder, blocks, the mean over time and a linear decoder.

    Args:
        d_input: Numbers at each time, >= 1.
        d_output: Classes, or numbers that are predicted, >= 1.
        d_model: Features H.
        n_layers: Blocks, >= 1.
        d_state: Size N of each state.
        channels: Outputs M of each system.
        measure: As for :class:`LSSL`.
        learn: Likewise.
        alpha: Likewise.
        dt_min: Likewise; a step of 1 / L remembers about L inputs.
        dt_max: Likewise.
        dropout: Probability, in [0, 1), in the layers and behind them.
        norm: Layer norm before each layer (``"pre"``) or behind each sum (``"post"``).
        task: ``"classify"`` and ``"regress"`` decode the mean over time, ``"seq2seq"`` every step.
        bidirectional: Whether the layers look into the future as well.
        dt_init: As for :class:`LSSL`.
        kernel_dtype: Likewise.

    Raises:
        ValueError: If an argument is out of its range; in ``forward``, if the input does not fit.
        TypeError: In ``forward``, if the input holds no floating-point numbers.

    Example:
        >>> model = LSSLModel(1, 10, d_model=16, n_layers=2, d_state=16)
        >>> model(torch.randn(2, 196, 1)).shape
        torch.Size([2, 10])
        >>> model(torch.randn(2, 1, 14, 14)).shape  # images are read row by row
        torch.Size([2, 10])
    """

    def __init__(
        self,
        d_input: int,
        d_output: int,
        *,
        d_model: int = 128,
        n_layers: int = 4,
        d_state: int = 64,
        channels: int = 1,
        measure: Measure | tuple[Tensor, Tensor] = "legs",
        learn: Learn = 1,
        alpha: float = 0.5,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dropout: float = 0.0,
        norm: Literal["pre", "post"] = "pre",
        task: Task = "classify",
        bidirectional: bool = False,
        dt_init: Literal["random", "linspace"] = "random",
        kernel_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        counts = {"d_input": d_input, "d_output": d_output, "d_model": d_model, "n_layers": n_layers}
        for name, value in counts.items():
            whole(name, value, ">= 1")
        one_of("norm", norm, ("pre", "post"))
        one_of("task", task, ("classify", "regress", "seq2seq"))
        self.d_input, self.task = d_input, task
        self.encoder = nn.Linear(d_input, d_model)
        self.blocks = nn.ModuleList(
            LSSLBlock(
                LSSL(
                    d_model, d_state, channels, measure, learn, alpha, dt_min, dt_max, dropout,
                    bidirectional=bidirectional, dt_init=dt_init, kernel_dtype=kernel_dtype,
                ),
                norm,
                dropout,
            )
            for _ in range(n_layers)
        )  # fmt: skip
        self.decoder = nn.Linear(d_model, d_output)

    def forward(
        self,
        u: Float[Tensor, "batch L d_input"] | Float[Tensor, "batch d_input height width"],
        rate: float = 1.0,
        *,
        mode: Mode = "convolution",
    ) -> Float[Tensor, "batch d_output"] | Float[Tensor, "batch L d_output"]:
        """Logits or predictions.

        Args:
            u: Sequences; or images, whose channels are the numbers at each time, pixel after pixel and row after row.
            rate: How many times coarser the sequences are sampled than those of the training.
            mode: As for :meth:`LSSL.forward`.
        """
        if u.ndim == 4:
            u = u.flatten(2).mT
        if not u.is_floating_point():
            raise TypeError(f"u must hold floating-point numbers, got {u.dtype}")
        if u.ndim != 3 or u.shape[2] != self.d_input or u.shape[1] < 1:
            raise ValueError(
                f"u must have shape (batch, L, {self.d_input}) with L >= 1, or (batch, {self.d_input}, height, width), "
                f"got {tuple(u.shape)}"
            )
        x = self.encoder(u)
        for block in self.blocks:
            x = block(x, None, rate, mode=mode)
        return self.decoder(x if self.task == "seq2seq" else x.mean(1))

    def step(
        self, u_t: Float[Tensor, "batch d_input"], states: list[Tensor], rate: float = 1.0
    ) -> tuple[Float[Tensor, "batch d_output"], list[Tensor]]:
        """One input of a ``"seq2seq"`` model: its prediction and the next states.

        Args:
            u_t: One input of each sequence.
            states: From :meth:`initial_state` or an earlier step.
            rate: As for :meth:`forward`.

        Raises:
            ValueError: If the task is another, or a shape does not fit.
        """
        if self.task != "seq2seq":
            raise ValueError(f"task must be 'seq2seq' to predict step by step, got {self.task!r}")
        if u_t.ndim != 2 or u_t.shape[1] != self.d_input:
            raise ValueError(f"u_t must have shape (batch, {self.d_input}), got {tuple(u_t.shape)}")
        if len(states) != len(self.blocks):
            raise ValueError(f"states must be one for each of {len(self.blocks)} layers, got {len(states)}")
        x, later = self.encoder(u_t)[:, None], []
        for block, state in zip(self.blocks, states, strict=True):
            x, last = block(x, state, rate, True, mode="recurrence")
            later.append(last)
        return self.decoder(x[:, 0]), later

    def initial_state(self, batch: int) -> list[Tensor]:
        """The state of every layer before any input.

        Raises:
            ValueError: If ``batch`` is below 1.
        """
        return [block.layer.initial_state(batch) for block in self.blocks]  # type: ignore[operator, union-attr]

    def param_groups(
        self, lr: float, weight_decay: float = 0.0, *, lr_A: float = LR_A, lr_dt: float = LR_DT
    ) -> list[dict[str, Any]]:
        """As :func:`netwright.nn.lssl.param_groups`, which takes any network."""
        return param_groups(self, lr, weight_decay, lr_A=lr_A, lr_dt=lr_dt)
