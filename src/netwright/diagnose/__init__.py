"""What training does to a network: whose gradients agree, generalisation and memorisation.

Names are resolved when they are first used, so that importing this package loads nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netwright.lazy import exports

_NAMES = {
    "CoherenceCallback": "callbacks",
    "CoherenceResult": "coherence",
    "ExampleGradients": "gradients",
    "IPRCallback": "grokking",
    "MedianOfMeans": "suppression",
    "ModularArithmetic": "grokking",
    "ModularConfig": "grokking",
    "QuadraticMLP": "grokking",
    "RunningCoherence": "running",
    "RunningMedian": "suppression",
    "SuppressionCallback": "callbacks",
    "WinsorizedGradients": "suppression",
    "classify_phase": "grokking",
    "coherence_from_gradients": "coherence",
    "inverse_participation_ratio": "grokking",
    "m_coherence": "coherence",
    "memorising_neurons": "grokking",
    "neuron_ipr": "grokking",
    "per_example_alignment": "coherence",
    "prune_neurons": "grokking",
    "pruning_curve": "grokking",
    "stability_gap_bound": "coherence",
    "train_modular": "grokking",
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
    from netwright.diagnose.grokking import (
        IPRCallback,
        ModularArithmetic,
        ModularConfig,
        QuadraticMLP,
        classify_phase,
        inverse_participation_ratio,
        memorising_neurons,
        neuron_ipr,
        prune_neurons,
        pruning_curve,
        train_modular,
    )
    from netwright.diagnose.running import RunningCoherence
    from netwright.diagnose.suppression import MedianOfMeans, RunningMedian, WinsorizedGradients, winsorized_mean

__all__ = [
    "CoherenceCallback",
    "CoherenceResult",
    "ExampleGradients",
    "IPRCallback",
    "MedianOfMeans",
    "ModularArithmetic",
    "ModularConfig",
    "QuadraticMLP",
    "RunningCoherence",
    "RunningMedian",
    "SuppressionCallback",
    "WinsorizedGradients",
    "classify_phase",
    "coherence_from_gradients",
    "inverse_participation_ratio",
    "m_coherence",
    "memorising_neurons",
    "neuron_ipr",
    "per_example_alignment",
    "prune_neurons",
    "pruning_curve",
    "stability_gap_bound",
    "train_modular",
    "winsorized_mean",
]

__getattr__, __dir__ = exports(__name__, _NAMES, __all__, _MODULES)
