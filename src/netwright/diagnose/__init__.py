"""What training did to a network: diagnoses of generalisation and memorisation.

Names are resolved when they are first used, so that importing this package loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "IPRCallback": "grokking",
    "ModularArithmetic": "grokking",
    "ModularConfig": "grokking",
    "QuadraticMLP": "grokking",
    "classify_phase": "grokking",
    "inverse_participation_ratio": "grokking",
    "memorising_neurons": "grokking",
    "neuron_ipr": "grokking",
    "prune_neurons": "grokking",
    "pruning_curve": "grokking",
    "train_modular": "grokking",
}
_MODULES = tuple(sorted(set(_NAMES.values())))

if TYPE_CHECKING:
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

__all__ = [
    "IPRCallback",
    "ModularArithmetic",
    "ModularConfig",
    "QuadraticMLP",
    "classify_phase",
    "inverse_participation_ratio",
    "memorising_neurons",
    "neuron_ipr",
    "prune_neurons",
    "pruning_curve",
    "train_modular",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"netwright.diagnose.{_NAMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"netwright.diagnose.{name}")
    raise AttributeError(f"module 'netwright.diagnose' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
