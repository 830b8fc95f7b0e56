"""Linear state-space layers: one sequence layer that is a recurrence, a convolution and a system in continuous time.

Gu, Johnson, Goel, Saab, Dao, Rudra and Ré, "Combining Recurrent, Convolutional, and Continuous-time Models with Linear
State-Space Layers", NeurIPS 2021, arXiv:2110.13985:

    x' = A x + B u,  y = C x + D u     x_k = A_bar x_{k-1} + B_bar u_k     y = K * u + D u,  K_i = C A_bar^i B_bar
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.checks import number, one_of, whole
from netwright.nn.lssl.convolution import final_state, free_response, krylov, ssm_kernel, two_sided_conv
from netwright.nn.lssl.dense import DenseMatrix
from netwright.nn.lssl.measures import Measure
from netwright.nn.lssl.quasiseparable import QuasiSeparable
from netwright.nn.lssl.remembered import Remembered

Learn = Literal[0, 1, 2]
Mode = Literal["convolution", "recurrence"]
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "identity": nn.Identity}
DT_INITS = ("random", "linspace")
LR_A, LR_DT = 1e-4, 1e-3
KRYLOV_LIMIT = 2**26  # numbers of a fixed system's powers that are kept


class LSSL(nn.Module):
    """A linear state-space layer: (batch, L, d_model) to the same shape.

    Every feature is a system of its own with the state matrix of all: a step size, a read-out of ``channels`` numbers
    and a pass-through. Then come the activation, dropout and a linear map that mixes the features.

    Args:
        d_model: Features H, >= 1.
        d_state: Size N of each state, >= 1.
        channels: Outputs M of each system, >= 1.
        measure: ``"legs"``, ``"legt"`` or ``"lagt"``; or a pair (A, B) of shapes (N, N) and (N,) of one's own, which is
            trained without structure.
        learn: 0 is LSSL-f: A, B and the steps are fixed, and powers of A for one length are kept, H x N x L numbers up
            to 2^26. 1 trains them, A and B shared by all features. 2 trains an A
            and a B for each feature.
        alpha: Of the discretisation, in [0, 1]; below 1/2 long steps are unstable.
        dt_min: Least initial step, > 0.
        dt_max: Largest initial step, at least ``dt_min``.
        dropout: Probability, in [0, 1), after the activation.
        activation: ``"gelu"``, ``"relu"``, ``"silu"`` or ``"identity"``.
        mix: Whether features are mixed; else the output is (batch, L, d_model channels), a feature's channels together.
        bidirectional: Adds a second read-out whose state runs from the end of the sequence to its beginning.
        dt_init: ``"random"`` draws logarithms of steps evenly, from the global generator; ``"linspace"`` spaces them.
        noise: Standard deviation, >= 0, of what is added to the main diagonal of T when it is trained.
        kernel_dtype: Of the discretisation, the kernel and the FFTs: float32, whatever autocast says, or float64.

    Raises:
        ValueError: If an argument is out of its range; in ``forward``, if input, state or rate do not fit.
        TypeError: In ``forward``, if the input holds no floating-point numbers.

    Example:
        >>> layer = LSSL(4, d_state=8)
        >>> u = torch.randn(2, 50, 4)
        >>> y, state = layer(u, return_state=True)  # as a convolution
        >>> y.shape, state.shape
        (torch.Size([2, 50, 4]), torch.Size([2, 4, 8]))
        >>> y_next, state = layer.step(torch.randn(2, 4), state)  # and on as a recurrence
        >>> y_next.shape
        torch.Size([2, 4])
    """

    log_dt: Tensor
    b: Tensor

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        channels: int = 1,
        measure: Measure | tuple[Tensor, Tensor] = "legs",
        learn: Learn = 1,
        alpha: float = 0.5,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dropout: float = 0.0,
        activation: str = "gelu",
        mix: bool = True,
        *,
        bidirectional: bool = False,
        dt_init: Literal["random", "linspace"] = "random",
        noise: float = 0.0,
        kernel_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        _check_arguments(
            {"d_model": d_model, "d_state": d_state, "channels": channels},
            {"learn": (learn, (0, 1, 2)), "activation": (activation, ACTIVATIONS), "dt_init": (dt_init, DT_INITS)},
            {"alpha": (alpha, True), "dropout": (dropout, False)},
        )
        if not 0 < dt_min <= dt_max < math.inf:
            raise ValueError(f"dt_min and dt_max must be 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        number("noise", noise, ">= 0")
        if noise and not (learn and isinstance(measure, str)):
            raise ValueError(f"noise must be 0 unless a named measure is trained, got {noise}")
        if kernel_dtype not in {torch.float32, torch.float64}:
            raise ValueError(f"kernel_dtype must be torch.float32 or torch.float64, got {kernel_dtype}")
        self.d_model, self.d_state, self.channels, self.learn, self.alpha = d_model, d_state, channels, learn, alpha
        self.bidirectional, self.kernel_dtype = bidirectional, kernel_dtype
        copies = d_model if learn == 2 else None
        self.A: QuasiSeparable | DenseMatrix
        if isinstance(measure, str):
            self.A = QuasiSeparable.hippo(
                measure, d_state, copies=copies, noise=noise if learn else 0.0, trainable=learn > 0
            )
            b = torch.ones_like(self.A.P)
        else:
            self.A, b = self._own(*measure, copies)
        spread = torch.rand(d_model) if dt_init == "random" else torch.linspace(0, 1, d_model)
        log_dt = math.log(dt_min) + spread * (math.log(dt_max) - math.log(dt_min))
        for name, value in (("b", b), ("log_dt", log_dt)):
            if learn:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        read_outs = channels * (2 if bidirectional else 1)
        self.C = nn.Parameter(torch.randn(d_model, read_outs, d_state))
        self.D = nn.Parameter(torch.randn(d_model, channels))
        self.activation, self.dropout = ACTIVATIONS[activation](), nn.Dropout(dropout)
        self.mix = nn.Linear(channels * d_model, d_model) if mix else nn.Identity()
        self._system_kept: Remembered[tuple[Tensor, Tensor]] = Remembered()
        self._krylov_kept: Remembered[Tensor] = Remembered()
        self._kernel_kept: Remembered[Tensor] = Remembered()

    def _own(self, A: Tensor, B: Tensor, copies: int | None) -> tuple[DenseMatrix, Tensor]:
        N = self.d_state
        if tuple(A.shape) != (N, N) or tuple(B.shape) != (N,):
            shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
            raise ValueError(f"measure must be a name or (A, B) of shapes ({N}, {N}) and ({N},), got {shapes}")
        A, b = A.float(), B.detach().float().clone()
        if copies is not None:
            A, b = A.expand(copies, N, N), b.expand(copies, N).clone()
        return DenseMatrix(A, trainable=self.learn > 0), b

    def extra_repr(self) -> str:
        """Sizes, for a person."""
        both = ", bidirectional" if self.bidirectional else ""
        return f"{self.d_model}, d_state={self.d_state}, channels={self.channels}, learn={self.learn}{both}"

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.kernel_dtype, self.C.dtype)

    def _sources(self) -> list[Tensor]:
        return [*self.A.parameters(), *self.A.buffers(), self.b, self.log_dt]

    def discretized(self, rate: float = 1.0) -> tuple[Float[Tensor, "H N N"], Float[Tensor, "H N"]]:
        """A_bar and B_bar of every feature.

        Args:
            rate: How many steps of the training data one step is, > 0.

        Raises:
            ValueError: If ``rate`` is not positive.
        """
        if not 0 < rate < math.inf:
            raise ValueError(f"rate must be > 0 and finite, got {rate}")

        def compute() -> tuple[Tensor, Tensor]:
            with torch.autocast(self.C.device.type, enabled=False):
                dt = self.log_dt.to(self._dtype).exp() * rate
                B = self.b * self.A.P if isinstance(self.A, QuasiSeparable) else self.b
                return self.A.discretize(B, dt, self.alpha)

        return self._system_kept((rate, self.alpha, self._dtype), self._sources(), compute)

    def kernel(self, L: int, rate: float = 1.0) -> Float[Tensor, "H read_outs L"]:
        """K_i = C A_bar^i B_bar for i = 0..L-1; with two directions, the channels of the second follow.

        Args:
            L: Length, at least 1.
            rate: As for :meth:`forward`.

        Raises:
            ValueError: If ``L`` is below 1 or ``rate`` is not positive.
        """
        if L < 1:
            raise ValueError(f"L must be >= 1, got {L}")

        def compute() -> Tensor:
            A_bar, B_bar = self.discretized(rate)
            C = self.C.to(self._dtype)
            with torch.autocast(C.device.type, enabled=False):
                if self.learn or self.d_model * self.d_state * L > KRYLOV_LIMIT:
                    return ssm_kernel(A_bar, B_bar, C, L)
                # A fixed system: its powers stay, and a step of training costs one product.
                key = (L, rate, self.alpha, self._dtype)
                return C @ self._krylov_kept(key, self._sources(), lambda: krylov(A_bar, B_bar, L))

        return self._kernel_kept((L, rate, self.alpha, self._dtype), [*self._sources(), self.C], compute)

    def core(
        self,
        u: Float[Tensor, "batch L H"],
        state: Float[Tensor, "batch H N"] | None = None,
        rate: float = 1.0,
        *,
        mode: Mode = "convolution",
        return_state: bool = False,
    ) -> tuple[Float[Tensor, "batch L H M"], Float[Tensor, "batch H N"] | None]:
        """The linear system alone, before the activation, and the state behind it where it is asked for.

        Args:
            u: As for :meth:`forward`.
            state: Likewise.
            rate: Likewise.
            mode: Likewise.
            return_state: Whether the state is returned, else None.
        """
        u = self._checked(u, state)
        if mode not in {"convolution", "recurrence"}:
            raise ValueError(f"mode must be 'convolution' or 'recurrence', got {mode!r}")
        if self.bidirectional and (state is not None or return_state):
            raise ValueError("state must be None where the layer is bidirectional: it would have to know the future")
        dtype, kind = self._dtype, u.device.type
        past = None if state is None else state.to(dtype)
        if mode == "recurrence":
            y, last = self._recurrence(u.to(dtype), past, rate)
        else:
            K = self.kernel(u.shape[1], rate)
            K, back = (K[:, : self.channels], K[:, self.channels :]) if self.bidirectional else (K, None)
            # The pass-through is a first tap: no sum over the whole output.
            K = torch.cat([K[..., :1] + self.D.to(dtype)[..., None], K[..., 1:]], -1)
            y = two_sided_conv(u.to(dtype), K, back)
            last = None
            if past is not None or return_state:
                A_bar, B_bar = self.discretized(rate)
                with torch.autocast(kind, enabled=False):
                    if past is not None:
                        y = y + free_response(A_bar, self.C.to(dtype), past, u.shape[1])
                    last = final_state(A_bar, B_bar, u.to(dtype), past) if return_state else None
        return y.to(u.dtype), last if return_state else None

    def _recurrence(self, u: Tensor, state: Tensor | None, rate: float) -> tuple[Tensor, Tensor | None]:
        A_bar, B_bar = self.discretized(rate)
        C = self.C.to(u.dtype)

        def run(inputs: Iterable[Tensor], C: Tensor, x: Tensor) -> tuple[list[Tensor], Tensor]:
            found = []
            for u_t in inputs:
                x = torch.baddbmm((B_bar[..., None] * u_t.mT[:, None, :]), A_bar, x)  # H, N, batch
                found.append(C @ x)
            return found, x

        start = u.new_zeros(self.d_model, self.d_state, len(u)) if state is None else state.permute(1, 2, 0)
        with torch.autocast(u.device.type, enabled=False):
            outputs, last = run(u.unbind(1), C[:, : self.channels], start)
            y = torch.stack(outputs)
            if self.bidirectional:
                back, _ = run(u.flip(1).unbind(1), C[:, self.channels :], start)
                y = y + torch.stack(back).flip(0)
        return y.permute(3, 0, 1, 2) + u[..., None] * self.D.to(u.dtype), last.permute(2, 0, 1)

    def forward(
        self,
        u: Float[Tensor, "batch L H"],
        state: Float[Tensor, "batch H N"] | None = None,
        rate: float = 1.0,
        return_state: bool = False,
        *,
        mode: Mode = "convolution",
    ) -> Any:
        """The layer on whole sequences.

        Args:
            u: Sequences, L >= 1.
            state: What earlier inputs left; zeros by default.
            rate: How many times coarser the sequence is sampled than those the steps were learned on.
            return_state: Whether the state behind the last input is returned beside the output.
            mode: ``"convolution"`` for all steps at once, or ``"recurrence"`` for one after another; the same result.

        Returns:
            (batch, L, H), or that and the state (batch, H, N).
        """
        y, last = self.core(u, state, rate, mode=mode, return_state=return_state)
        # In one layout: an activation between two is several times slower.
        out = self.mix(self.dropout(self.activation(y.flatten(2).contiguous())))
        return (out, last) if return_state else out

    def step(
        self, u_t: Float[Tensor, "batch H"], state: Float[Tensor, "batch H N"], rate: float = 1.0
    ) -> tuple[Float[Tensor, "batch H"], Float[Tensor, "batch H N"]]:
        """One input: the output and the next state, in time and memory that do not depend on the past.

        Use it under :func:`torch.no_grad`: with gradients every step is remembered, and discretises anew.

        Args:
            u_t: One input of each sequence.
            state: From :meth:`initial_state`, an earlier step, or ``return_state``.
            rate: As for :meth:`forward`.

        Raises:
            ValueError: If a shape does not fit, or the layer is bidirectional.
        """
        if u_t.ndim != 2:
            raise ValueError(f"u_t must have shape (batch, {self.d_model}), got {tuple(u_t.shape)}")
        out, last = self.forward(u_t[:, None], state, rate, True, mode="recurrence")
        return out[:, 0], last

    def initial_state(self, batch: int) -> Float[Tensor, "batch H N"]:
        """The state before any input: zeros.

        Raises:
            ValueError: If ``batch`` is below 1.
        """
        if batch < 1:
            raise ValueError(f"batch must be >= 1, got {batch}")
        return torch.zeros(batch, self.d_model, self.d_state, dtype=self._dtype, device=self.C.device)

    def _checked(self, u: Tensor, state: Tensor | None) -> Tensor:
        if not u.is_floating_point():
            raise TypeError(f"u must hold floating-point numbers, got {u.dtype}")
        if u.ndim != 3 or u.shape[2] != self.d_model or u.shape[1] < 1:
            raise ValueError(f"u must have shape (batch, L, {self.d_model}) with L >= 1, got {tuple(u.shape)}")
        wanted = (len(u), self.d_model, self.d_state)
        if state is not None and tuple(state.shape) != wanted:
            raise ValueError(f"state must have shape {wanted}, got {tuple(state.shape)}")
        return u

    def param_groups(
        self, lr: float, weight_decay: float = 0.0, *, lr_A: float = LR_A, lr_dt: float = LR_DT
    ) -> list[dict[str, Any]]:
        """Groups for an optimiser: the rest, then A and B, then the steps, these without weight decay.

        Args:
            lr: Learning rate of the rest.
            weight_decay: Of the rest.
            lr_A: Learning rate of A and B; ``lr`` where that is lower.
            lr_dt: Likewise of the steps.
        """
        return param_groups(self, lr, weight_decay, lr_A=lr_A, lr_dt=lr_dt)


def _check_arguments(
    counts: Mapping[str, int],
    names: Mapping[str, tuple[Any, Collection[Any]]],
    shares: Mapping[str, tuple[float, bool]],
) -> None:
    """Counts >= 1, names of a list, and numbers in [0, 1], the end being allowed or not."""
    for name, value in counts.items():
        whole(name, value, ">= 1")
    for name, (value, known) in names.items():
        one_of(name, value, known)
    for name, (share, closed) in shares.items():
        number(name, share, "[0, 1]" if closed else "[0, 1)")


def param_groups(
    module: nn.Module, lr: float, weight_decay: float = 0.0, *, lr_A: float = LR_A, lr_dt: float = LR_DT
) -> list[dict[str, Any]]:
    """Groups for an optimiser of any network that holds LSSL layers.

    Args:
        module: The network.
        lr: Learning rate of everything but A, B and the steps of its layers.
        weight_decay: Of the same.
        lr_A: Learning rate of A and B, without weight decay; ``lr`` where that is lower.
        lr_dt: Likewise of the logarithms of the steps.

    Returns:
        The groups that have parameters to train.

    Raises:
        ValueError: If a learning rate is not positive, or the weight decay is negative.

    Example:
        >>> groups = param_groups(nn.Sequential(LSSL(4), nn.Linear(4, 2)), 4e-3, 0.01)
        >>> [(group["lr"], group["weight_decay"]) for group in groups]
        [(0.004, 0.01), (0.0001, 0.0), (0.001, 0.0)]
    """
    for name, value in (("lr", lr), ("lr_A", lr_A), ("lr_dt", lr_dt)):
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
    layers = [part for part in module.modules() if isinstance(part, LSSL)]
    matrices = {id(p): p for layer in layers for p in (*layer.A.parameters(), layer.b) if p.requires_grad}
    steps = {id(layer.log_dt): layer.log_dt for layer in layers if layer.log_dt.requires_grad}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in matrices and id(p) not in steps]
    groups: list[dict[str, Any]] = [
        {"params": rest, "lr": lr, "weight_decay": weight_decay},
        {"params": list(matrices.values()), "lr": min(lr, lr_A), "weight_decay": 0.0},
        {"params": list(steps.values()), "lr": min(lr, lr_dt), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
