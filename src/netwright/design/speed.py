"""What a designed network costs in netwright's own runtime, and how fast this machine could run it at best."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from netwright.console import UserError
from netwright.cost.timing import alternate, threads, turn
from netwright.deploy.session import Latency
from netwright.design.verdict import ONNX_RUNTIME

if TYPE_CHECKING:
    from netwright.deploy.model import SparseModel
    from netwright.design.model import Architecture

RUNTIME = "netwright's sparse runtime"
ON_TORCH = "netwright's torch backend"
BATCHES = (1, 32)
THREADS = 1
ROUNDS, CALLS = 15, 4  # turns of each, timed calls in one
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


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network whose speed is measured.

    Attributes:
        network: The network.
        architecture: Its description.
        file: The ONNX file made from it.
        batches: Images in a call of the sparse runtime; ONNX Runtime is timed with all of :data:`BATCHES`.
    """

    network: nn.Module
    architecture: Architecture
    file: Path
    batches: tuple[int, ...] = BATCHES[:1]


def latencies(subjects: Mapping[str, Subject], images: Tensor, *, rounds: int = ROUNDS) -> dict[str, list[dict]]:
    """Latencies of networks, preprocessing included: of their files in ONNX Runtime, and in netwright's runtime.

    All take turns, so that a machine which gets slower or faster meanwhile does so for each of them.

    Args:
        subjects: By name.
        images: As they are stored, (images, channels, height, width).
        rounds: Turns of each, of :data:`CALLS` timed calls.

    Returns:
        By name the entries of ``measurements.json``, those of ONNX Runtime first; an operator that is missing in the
        sparse runtime leaves its entry out.

    Raises:
        UserError: If the runtime's logits are further than 1e-4 from PyTorch's, of the largest of them.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in subjects}
    for batch in BATCHES:
        competitors = [
            made for name, subject in subjects.items() for made in _competitors(name, subject, images, batch)
        ]
        with threads(THREADS):
            times = alternate(
                {str(place): partial(_turn, each) for place, each in enumerate(competitors)}, rounds=rounds
            )
        for place, each in enumerate(competitors):
            p10, median, p90 = np.percentile(1e3 * times[str(place)], [10, 50, 90]).tolist()
            entry = Latency(median, p10, p90, batch, THREADS, rounds * CALLS, each.runtime).to_dict()
            found[each.subject].append({**entry, **each.facts})
    return {name: sorted(entries, key=lambda e: e["runtime"] in (RUNTIME, ON_TORCH)) for name, entries in found.items()}


@dataclasses.dataclass(frozen=True)
class _Competitor:
    subject: str
    runtime: str
    call: Callable[[np.ndarray], object]
    batches: Sequence[np.ndarray]
    facts: dict[str, Any]


def _turn(each: _Competitor) -> list[float]:
    """Calls on different images, after one that brings the caches back."""
    feeds = itertools.cycle(each.batches)
    return turn(lambda: each.call(next(feeds)), CALLS, untimed=1)


def _competitors(name: str, subject: Subject, images: Tensor, batch: int) -> list[_Competitor]:
    import onnxruntime

    from netwright.deploy.session import Session

    session = Session(subject.file, threads=THREADS)
    feed = session.feed(images)
    batches = [np.take(feed, range(i, i + batch), axis=0, mode="wrap") for i in range(min(len(feed), CALLS + 1))]
    found = [_Competitor(name, f"{ONNX_RUNTIME} {onnxruntime.__version__}", session.call, batches, {})]
    architecture = subject.architecture
    fast = compiled(subject.network, architecture, batch, threads=THREADS) if batch in subject.batches else None
    if fast is not None:
        picture = architecture.picture

        def call(x: np.ndarray) -> np.ndarray:
            return fast(np.ascontiguousarray(x.transpose(0, 3, 1, 2) if picture else x, np.float32))

        agreement = _agreement(subject.network, architecture, call, batches[:1])
        facts = {"agreement": agreement, "table_bytes": fast.nbytes, "arena_bytes": fast.arena_bytes}
        runtime = RUNTIME if fast.backend == "native" else ON_TORCH
        found.append(_Competitor(name, runtime, call, batches, facts))
    return found


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
