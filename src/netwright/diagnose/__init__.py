"""What training does to a network: whose gradients agree or oppose each other, generalisation and memorisation.

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
    "OpposingSignalCallback": "opposing_signals",
    "OpposingSignalTracker": "opposing_signals",
    "QuadraticMLP": "grokking",
    "RunningCoherence": "running",
    "RunningMedian": "suppression",
    "SplitSGD": "opposing_signals",
    "SuppressionCallback": "callbacks",
    "WinsorizedGradients": "suppression",
    "classify_phase": "grokking",
    "clusters": "opposing_signals",
    "coherence_from_gradients": "coherence",
    "edge_replay": "opposing_signals",
    "feature_sweep": "opposing_signals",
    "full_batch_descent": "opposing_signals",
    "gradient_opposition": "opposing_signals",
    "inverse_participation_ratio": "grokking",
    "m_coherence": "coherence",
    "memorising_neurons": "grokking",
    "neuron_ipr": "grokking",
    "opposing_toy": "opposing_signals",
    "oscillation_score": "opposing_signals",
    "per_example_alignment": "coherence",
    "prune_neurons": "grokking",
    "pruning_curve": "grokking",
    "replay_step": "opposing_signals",
    "sharpness": "opposing_signals",
    "stability_gap_bound": "coherence",
    "stability_limit": "opposing_signals",
    "train_modular": "grokking",
    "winsorized_mean": "suppression",
}
_MODULES = tuple(sorted({*_NAMES.values(), "layer_rules", "losses"}))

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
    from netwright.diagnose.opposing_signals import (
        OpposingSignalCallback,
        OpposingSignalTracker,
        SplitSGD,
        clusters,
        edge_replay,
        feature_sweep,
        full_batch_descent,
        gradient_opposition,
        opposing_toy,
        oscillation_score,
        replay_step,
        sharpness,
        stability_limit,
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
    "OpposingSignalCallback",
    "OpposingSignalTracker",
    "QuadraticMLP",
    "RunningCoherence",
    "RunningMedian",
    "SplitSGD",
    "SuppressionCallback",
    "WinsorizedGradients",
    "classify_phase",
    "clusters",
    "coherence_from_gradients",
    "edge_replay",
    "feature_sweep",
    "full_batch_descent",
    "gradient_opposition",
    "inverse_participation_ratio",
    "m_coherence",
    "memorising_neurons",
    "neuron_ipr",
    "opposing_toy",
    "oscillation_score",
    "per_example_alignment",
    "prune_neurons",
    "pruning_curve",
    "replay_step",
    "sharpness",
    "stability_gap_bound",
    "stability_limit",
    "train_modular",
    "winsorized_mean",
]

__getattr__, __dir__ = exports(__name__, _NAMES, __all__, _MODULES)
