"""The convolution that a discrete linear system is: its kernel without its powers side by side, and FFTs.

    y_k = sum_i K_i u_{k-i},    K_i = C A_bar^i B_bar

With i = p + m q, m near sqrt(L), the kernel is a product of R = (B, A B, ..., A^(m-1) B) and
G = (C, C A^m, C A^2m, ...): O(N sqrt(L)) numbers instead of N L.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from scipy.fft import next_fast_len
from torch import Tensor

KernelMethod = Literal["auto", "split", "doubling", "sequential"]
SEQUENTIAL_BELOW = 8
PIECE = 2**19  # numbers of a batch that are transformed at a time on a processor, so that a cache holds them


def squarings(A_bar: Float[Tensor, "*batch N N"], count: int) -> list[Tensor]:
    """A_bar to the powers 1, 2, 4, ..., 2^count."""
    found = [A_bar]
    for _ in range(count):
        found.append(found[-1] @ found[-1])
    return found


def right_factor(powers: Sequence[Tensor], B: Float[Tensor, "*batch N columns"]) -> Tensor:
    """(B, A B, ..., A^(m-1) B) side by side, block after block, for m = 2^(number of powers)."""
    found = B
    for power in powers:
        found = torch.cat([found, power @ found], -1)
    return found


def left_factor(power: Float[Tensor, "*batch N N"], C: Float[Tensor, "*batch M N"], count: int) -> Tensor:
    """C, C A, ..., C A^(count-1) below each other, block after block, (..., count M, N)."""
    rows = [C]
    for _ in range(count - 1):
        rows.append(rows[-1] @ power)
    return torch.cat(rows, -2)


def _blocks(L: int) -> tuple[int, int, int]:
    """How many squarings give a block, how long it is, and how many blocks cover L."""
    count = round(math.log2(L) / 2)
    return count, 2**count, -(-L // 2**count)


def _check_length(L: int) -> None:
    if L < 1:
        raise ValueError(f"L must be >= 1, got {L}")


def krylov(A_bar: Float[Tensor, "*batch N N"], B_bar: Float[Tensor, "*batch N"], L: int) -> Float[Tensor, "*batch N L"]:
    """The columns B_bar, A_bar B_bar, ..., A_bar^(L-1) B_bar, by doubling.

    Args:
        A_bar: One matrix or several.
        B_bar: Likewise.
        L: Number of columns, at least 1.

    Raises:
        ValueError: If ``L`` is below 1.

    Example:
        >>> krylov(torch.tensor([[0.5]]), torch.tensor([1.0]), 4).tolist()
        [[1.0, 0.5, 0.25, 0.125]]
    """
    _check_length(L)
    found, power = B_bar[..., None], A_bar
    while (have := found.shape[-1]) < L:
        found = torch.cat([found, power @ found[..., : L - have]], -1)
        power = power @ power if 2 * have < L else power
    return found


def ssm_kernel(
    A_bar: Float[Tensor, "*batch N N"],
    B_bar: Float[Tensor, "*batch N"],
    C: Float[Tensor, "*batch M N"],
    L: int,
    method: KernelMethod = "auto",
) -> Float[Tensor, "*batch M L"]:
    """C A_bar^i B_bar for i = 0..L-1.

    Args:
        A_bar: One matrix or several.
        B_bar: Likewise.
        C: Likewise, M lines each.
        L: Length, at least 1.
        method: ``"split"`` multiplies a left and a right factor of about sqrt(L) blocks; ``"doubling"`` makes the whole
            Krylov matrix; ``"sequential"`` steps through it. ``"auto"`` splits but for very short kernels.

    Raises:
        ValueError: If ``L`` is below 1, the method is unknown, or the shapes do not fit.

    Example:
        >>> A_bar, B_bar, C = torch.tensor([[0.5]]), torch.tensor([1.0]), torch.tensor([[2.0]])
        >>> ssm_kernel(A_bar, B_bar, C, 4).tolist()
        [[2.0, 1.0, 0.5, 0.25]]
    """
    _check_length(L)
    if method not in {"auto", "split", "doubling", "sequential"}:
        raise ValueError(f"method must be 'auto', 'split', 'doubling' or 'sequential', got {method!r}")
    N = A_bar.shape[-1]
    if B_bar.shape[-1] != N or C.ndim < 2 or C.shape[-1] != N:
        raise ValueError(
            f"B_bar and C must have shapes (..., {N}) and (..., M, {N}), got {tuple(B_bar.shape)} and {tuple(C.shape)}"
        )
    if method == "doubling":
        return C @ krylov(A_bar, B_bar, L)
    if method == "sequential" or (method == "auto" and L < SEQUENTIAL_BELOW):
        columns = [B_bar[..., None]]
        for _ in range(L - 1):
            columns.append(A_bar @ columns[-1])
        return C @ torch.cat(columns, -1)
    count, _, blocks = _blocks(L)
    powers = squarings(A_bar, count)
    product = left_factor(powers[-1], C, blocks) @ right_factor(powers[:-1], B_bar[..., None])
    M = C.shape[-2]
    return product.unflatten(-2, (blocks, M)).transpose(-3, -2).flatten(-2)[..., :L]


def causal_conv(u: Float[Tensor, "batch L H"], K: Float[Tensor, "H M taps"]) -> Float[Tensor, "batch L H M"]:
    """y_k = sum_i K_i u_{k-i} for each feature and channel, by real FFTs with zeros appended.

    Args:
        u: Inputs; before the first there are zeros.
        K: Kernels of any length; computed in the wider type of the two, float32 at least.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> u, K = torch.tensor([[[1.0], [0.0], [2.0]]]), torch.tensor([[[1.0, 0.5, 0.25]]])
        >>> [round(value, 4) for value in causal_conv(u, K).flatten().tolist()]
        [1.0, 0.5, 2.25]
    """
    return two_sided_conv(u, K, None)


def two_sided_conv(
    u: Float[Tensor, "batch L H"], K: Float[Tensor, "H M taps"], anticausal: Float[Tensor, "H M taps"] | None
) -> Float[Tensor, "batch L H M"]:
    """The causal convolution plus one that runs from the end to the beginning, for the price of one.

        y_k = sum_i K_i u_{k-i} + sum_i anticausal_i u_{k+i}

    Args:
        u: As for :func:`causal_conv`.
        K: Likewise.
        anticausal: Kernels of the same length, or None.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if u.ndim != 3 or K.ndim != 3 or K.shape[0] != u.shape[2] or 0 in (u.shape[1], K.shape[2]):
        raise ValueError(
            "u and K must have shapes (batch, L, H) and (H, M, taps) with L and taps >= 1, "
            f"got {tuple(u.shape)} and {tuple(K.shape)}"
        )
    if anticausal is not None and anticausal.shape != K.shape:
        raise ValueError(f"anticausal must have the shape of K, {tuple(K.shape)}, got {tuple(anticausal.shape)}")
    L, taps = u.shape[1], K.shape[2]
    dtype = torch.promote_types(torch.promote_types(u.dtype, K.dtype), torch.float32)
    n = next_fast_len(L + taps, real=True)  # room for all of it: a shorter transform would wrap around
    with torch.autocast(u.device.type, enabled=False):
        response = torch.fft.rfft(K.to(dtype), n=n)
        if anticausal is not None:
            response = response + torch.fft.rfft(anticausal.to(dtype), n=n).conj()

        def convolved(part: Tensor) -> Tensor:
            signal = torch.fft.rfft(part.to(dtype).mT, n=n)
            y = torch.fft.irfft(signal[:, :, None] * response, n=n)[..., :L]
            return y.permute(0, 3, 1, 2).to(u.dtype)

        whole = u.device.type != "cpu" or torch.compiler.is_compiling()
        at_once = len(u) if whole else max(1, PIECE // (K.shape[0] * K.shape[1] * n))
        return convolved(u) if len(u) <= at_once else torch.cat([convolved(part) for part in u.split(at_once)])


def free_response(
    A_bar: Float[Tensor, "H N N"], C: Float[Tensor, "H M N"], state: Float[Tensor, "batch H N"], L: int
) -> Float[Tensor, "batch L H M"]:
    """What a state gives without input: C A_bar^(k+1) state for k = 0..L-1."""
    count, _, blocks = _blocks(L)
    powers = squarings(A_bar, count)
    first = A_bar @ state.permute(1, 2, 0)
    product = left_factor(powers[-1], C, blocks) @ right_factor(powers[:-1], first)
    shaped = product.unflatten(1, (blocks, C.shape[1])).unflatten(3, (-1, len(state)))  # H, q, M, p, batch
    return shaped.permute(4, 1, 3, 0, 2).flatten(1, 2)[:, :L]


def final_state(
    A_bar: Float[Tensor, "H N N"],
    B_bar: Float[Tensor, "H N"],
    u: Float[Tensor, "batch L H"],
    state: Float[Tensor, "batch H N"] | None = None,
) -> Float[Tensor, "batch H N"]:
    """The state behind the last input, sum_j A_bar^(L-1-j) B_bar u_j, plus A_bar^L state: no step through the sequence.

    The inputs are taken in blocks from the end, each by one product, and put together by Horner's rule.
    """
    L = u.shape[1]
    count, m, blocks = _blocks(L)
    powers = squarings(A_bar, count)
    R = right_factor(powers[:-1], B_bar[..., None])
    reverse = torch.nn.functional.pad(u.flip(1).permute(2, 1, 0), (0, 0, 0, blocks * m - L))
    parts = reverse.unflatten(1, (blocks, m))  # H, q, p, batch
    x = R @ parts[:, -1]
    if state is not None:
        rest, old = L - m * (blocks - 1), state.permute(1, 2, 0)
        for bit, power in enumerate(powers):
            if rest >> bit & 1:
                old = power @ old
        x = x + old
    for q in range(blocks - 2, -1, -1):
        x = powers[-1] @ x + R @ parts[:, q]
    return x.permute(2, 0, 1)
