"""One input, and what a verdict about it needs."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from netwright.verify.back import back_map
from netwright.verify.grid import other_class
from netwright.verify.network import Network
from netwright.verify.region import Region, size_of
from netwright.verify.result import VerificationResult


@dataclasses.dataclass
class Point:
    """One input under verification.

    Attributes:
        network: The network.
        x: The input, float64.
        label: Its class.
        inputs: Range of inputs to which activations may be taken back.
        deadline: When the time is over.
        begin: When it began.
    """

    network: Network
    x: Tensor
    label: int
    inputs: tuple[float, float] | None
    deadline: float
    begin: float

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return max(1e-3, self.deadline - time.monotonic())

    def result(self, status: str, scope: str, **more: Any) -> VerificationResult:
        """A verdict without a witness."""
        seconds = time.monotonic() - self.begin
        return VerificationResult(status, scope, self.label, seconds=seconds, **more)  # type: ignore[arg-type]

    def unsafe(
        self, witness: Tensor, scope: str, reason: str, distance: float | None = None, **more: Any
    ) -> VerificationResult:
        """A verdict with a witness that the network itself confirms."""
        logits = self.network.logits(witness[None])[0]
        rivals = logits.clone()
        rivals[self.label] = -math.inf
        if distance is None:
            distance = float(size_of((witness - self.x.flatten())[None], None))
        found = {"witness": witness.reshape(self.x.shape), "witness_class": int(rivals.argmax()), "distance": distance}
        return self.result("unsafe", scope, reason=reason, **found, **more)

    def taken_back(self, layer: int, activation: Tensor, dims: Sequence[int]) -> Tensor | None:
        """An input that the network maps near an activation of another class, if it has another class itself."""
        low, high = self.inputs or (float(self.x.min()), float(self.x.max()))
        everywhere = Region(tuple(range(self.x.numel())), span=high - low, bounds=(low, high))
        tol = 1e-3 * max(1e-3, float(activation.abs().max()))
        found = back_map(self.network, layer, activation, self.x, everywhere, tol, dims=dims, timeout=self.left)
        if found.point is None or not bool(other_class(self.network.logits(found.point[None]), self.label)[0]):
            return None
        return found.point
