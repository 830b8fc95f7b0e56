"""What a designed network costs in netwright's own runtime, and how fast this machine could run it at best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from netwright.console import UserError
from netwright.deploy.session import Latency, time_calls

if TYPE_CHECKING:
    from netwright.deploy.model import SparseModel
    from netwright.design.model import Architecture

RUNTIME = "netwright's sparse runtime"
ON_TORCH = "netwright's torch backend"
TOLERANCE = 1e-4  # of a logit, against the largest


class _Standardised(nn.Module):
    """A network behind its scaling and standardisation; these become part of the compiled graph."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, architecture: Architecture):
        super().__init__()
        self.network = network
        scale = 255.0 if architecture.picture else 1.0
        column = (1, -1, 1, 1)
        self.register_buffer("mean", (scale * torch.tensor(architecture.mean)).reshape(column))
        self.register_buffer("std", (scale * torch.tensor(architecture.std)).reshape(column))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width), as stored but float -> logits."""
        return self.network((x - self.mean) / self.std)


def compiled(network: nn.Module, architecture: Architecture, batch: int, *, threads: int = 1) -> SparseModel | None:
    """The network with its standardisation in the sparse runtime, or None where an operator of it is missing there."""
    from netwright.deploy.graph import UnsupportedOperator, capture, optimise
    from netwright.deploy.model import SparseModel

    example = torch.zeros(batch, *architecture.shape)
    try:
        # Not by deploy.compile, which would advise another runtime for the dense networks that are measured too.
        return SparseModel(optimise(capture(_Standardised(network, architecture).eval(), (example,))), threads=threads)
    except UnsupportedOperator:
        return None


def sparse_latency(
    network: nn.Module, architecture: Architecture, feed: np.ndarray, *, batch: int, rounds: int, threads: int = 1
) -> dict[str, Any] | None:
    """Latency of one call with ``batch`` images, preprocessing included, as an entry of ``measurements.json``.

    Args:
        network: The network.
        architecture: Its description.
        feed: Images as the exported file takes them: uint8 (images, height, width, channels), or floats.
        batch: Images in a call.
        rounds: Calls to time.
        threads: Of the runtime.

    Returns:
        The entry, with ``agreement``, the largest difference of a logit from PyTorch's; None where an operator of the
        network is missing in the runtime.

    Raises:
        UserError: If the runtime's logits are further than 1e-4 from PyTorch's, of the largest of them.
    """
    fast = compiled(network, architecture, batch, threads=threads)
    if fast is None:
        return None
    picture = architecture.picture

    def call(images: np.ndarray) -> np.ndarray:
        planes = images.transpose(0, 3, 1, 2) if picture else images
        return fast(np.ascontiguousarray(planes, np.float32))

    batches = [np.take(feed, range(i, i + batch), axis=0, mode="wrap") for i in range(min(len(feed), 16))]
    agreement = _agreement(network, architecture, call, batches[:1])
    p10, median, p90 = time_calls(call, batches, rounds)
    runtime = RUNTIME if fast.backend == "native" else ON_TORCH
    found = Latency(median, p10, p90, batch, threads, rounds, runtime).to_dict()
    return {**found, "agreement": agreement, "table_bytes": fast.nbytes, "arena_bytes": fast.arena_bytes}


def _agreement(network: nn.Module, architecture: Architecture, call: Any, batches: Sequence[np.ndarray]) -> float:
    whole = _Standardised(network, architecture).eval()
    worst = 0.0
    for images in batches:
        planes = torch.from_numpy(images).float()
        with torch.inference_mode():
            expected = whole(planes.permute(0, 3, 1, 2) if architecture.picture else planes).numpy()
        difference, largest = float(np.abs(call(images) - expected).max()), float(np.abs(expected).max())
        if not difference <= TOLERANCE * max(1.0, largest):
            raise UserError(f"the sparse runtime's logits are {difference:.1e} from PyTorch's, more than {TOLERANCE:g}")
        worst = max(worst, difference)
    return worst


def bound(network: nn.Module, shape: tuple[int, int, int], dense_ms: float | None) -> dict[str, Any] | None:
    """What the rates of this machine allow for one input: milliseconds, times as fast as ``dense_ms``, what binds.

    None without a compiler to measure the rates with.
    """
    from netwright.deploy import bench
    from netwright.deploy.bench.roofline import roofline
    from netwright.deploy.native.build import BuildError

    try:
        peaks = bench.measure_peaks()
    except BuildError:
        return None
    found = roofline(bench.describe(network, np.zeros((1, *shape), np.float32), []), peaks, dense_ms)
    return {"ms": found.bound_ms, "ratio": found.ratio, "binds": found.binds, "parts": dict(found.parts)}
