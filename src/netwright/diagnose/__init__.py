"""What goes on while a network learns: whose gradients agree, and what is done about those that do not.

Names are resolved when they are first used, so that importing this package loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "CoherenceCallback": "callbacks",
    "CoherenceResult": "coherence",
    "ExampleGradients": "gradients",
    "MedianOfMeans": "suppression",
    "RunningCoherence": "running",
    "RunningMedian": "suppression",
    "SuppressionCallback": "callbacks",
    "WinsorizedGradients": "suppression",
    "coherence_from_gradients": "coherence",
    "m_coherence": "coherence",
    "per_example_alignment": "coherence",
    "stability_gap_bound": "coherence",
    "winsorized_mean": "suppression",
}
_MODULES = tuple(sorted({*_NAMES.values(), "layer_rules"}))

if TYPE_CHECKING:
    from netwright.diagnose.callbacks import CoherenceCallback, SuppressionCallback
    from netwright.diagnose.coherence import (
        CoherenceResult,
        coherence_from_gradients,
        m_coherence,
        per_example_alignment,
        stability_gap_bound,
    )
    from netwright.diagnose.gradients import ExampleGradients
    from netwright.diagnose.running import RunningCoherence
    from netwright.diagnose.suppression import (
        MedianOfMeans,
        RunningMedian,
        WinsorizedGradients,
        winsorized_mean,
    )

__all__ = [
    "CoherenceCallback",
    "CoherenceResult",
    "ExampleGradients",
    "MedianOfMeans",
    "RunningCoherence",
    "RunningMedian",
    "SuppressionCallback",
    "WinsorizedGradients",
    "coherence_from_gradients",
    "m_coherence",
    "per_example_alignment",
    "stability_gap_bound",
    "winsorized_mean",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"netwright.diagnose.{_NAMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"netwright.diagnose.{name}")
    raise AttributeError(f"module 'netwright.diagnose' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
