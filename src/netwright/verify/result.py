"""What a verification found, in its three honest forms."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from torch import Tensor

from netwright.results import Result

Status = Literal["safe", "unsafe", "unknown"]
Scope = Literal["grid", "box"]


@dataclasses.dataclass(frozen=True)
class VerificationResult(Result):
    """Whether a region around one input can change the class.

    Attributes:
        status: ``"safe"``: nothing in it does. ``"unsafe"``: ``witness`` does, and the network itself says so. Else
            ``"unknown"``, for which ``reason`` says why.
        scope: What ``"safe"`` covers: the points of the grid and nothing in between, or the whole box.
        label: The class.
        witness: An input of another class, in the shape of the input, float64; None unless unsafe.
        witness_class: That class; of a tie, the other one of the two.
        distance: Of the witness from the input: in the region's norm, Euclidean without one.
        layer: Where the region lies that the verdict is about; 0 is the input.
        covers_input: Whether the verdict also holds for the region of inputs that it was made from.
        reason: What decided, or why nothing did.
        n_points: Points that were evaluated.
        seconds: Wall time.
        stats: What else was counted.
    """

    status: Status
    scope: Scope
    label: int
    witness: Tensor | None = None
    witness_class: int | None = None
    distance: float | None = None
    layer: int = 0
    covers_input: bool = True
    reason: str = ""
    n_points: int = 0
    seconds: float = 0.0
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        if self.status == "safe":
            what = "every point of the box has" if self.scope == "box" else "every point of the grid has"
            told = f"safe: {what} class {self.label}"
            told += "" if self.scope == "box" else "; between its points nothing is proved"
            if "blocks" in self.stats:
                told += f", and of {self.stats['blocks']} blocks of numbers each was changed by itself"
        elif self.status == "unsafe":
            told = f"unsafe: an input at distance {self.distance:.4g} has class {self.witness_class}, not {self.label}"
        else:
            told = f"unknown: {self.reason}"
        where = "" if self.layer == 0 else f" (layer {self.layer}{'' if self.covers_input else ', not the input'})"
        return told + where
