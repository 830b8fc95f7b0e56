"""Grokking: which neurons of a network generalise and which memorise.

Doshi, Das, He and Gromov, "To grok or not to grok: Disentangling generalization and memorization on corrupted
algorithmic datasets", ICLR 2024, arXiv:2310.13061.

A two-layer network with a quadratic activation can learn to add modulo p and at the same time keep replaced labels by
heart (:mod:`~netwright.diagnose.grokking.arithmetic`, :mod:`~netwright.diagnose.grokking.network`). Neurons that add
are periodic in the inputs, those that memorise are not, and the inverse participation ratio of their spectrum tells
them apart (:mod:`~netwright.diagnose.grokking.periodicity`); without the latter the memory is gone
(:mod:`~netwright.diagnose.grokking.pruning`). Weight decay, dropout, batch norm and small batches do the same during
training (:mod:`~netwright.diagnose.grokking.training`, :mod:`~netwright.diagnose.grokking.phases`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from netwright.diagnose.grokking.arithmetic import ModularArithmetic, PairBatches, one_hot_pairs, power_order
from netwright.diagnose.grokking.network import QuadraticMLP, linear_pair
from netwright.diagnose.grokking.neurons import NeuronReport, memorising_neurons, plot_pruning
from netwright.diagnose.grokking.periodicity import (
    inverse_participation_ratio,
    neuron_ipr,
    random_ipr,
    scale_correlation,
)
from netwright.diagnose.grokking.phases import PHASES, accuracies, classify_phase
from netwright.diagnose.grokking.pruning import prune_neurons, pruning_curve
from netwright.diagnose.grokking.training import (
    SETTINGS,
    ModularConfig,
    ModularHistory,
    measure,
    one_hot_mse,
    train_modular,
)

# Only these need the training engine.
_TRAINED = ("IPRCallback", "ModularRegressor")

if TYPE_CHECKING:
    from netwright.diagnose.grokking.callbacks import IPRCallback, ModularRegressor

__all__ = [
    "PHASES",
    "SETTINGS",
    "IPRCallback",
    "ModularArithmetic",
    "ModularConfig",
    "ModularHistory",
    "ModularRegressor",
    "NeuronReport",
    "PairBatches",
    "QuadraticMLP",
    "accuracies",
    "classify_phase",
    "inverse_participation_ratio",
    "linear_pair",
    "measure",
    "memorising_neurons",
    "neuron_ipr",
    "one_hot_mse",
    "one_hot_pairs",
    "plot_pruning",
    "power_order",
    "prune_neurons",
    "pruning_curve",
    "random_ipr",
    "scale_correlation",
    "train_modular",
]


def __getattr__(name: str) -> Any:
    if name in _TRAINED:
        return getattr(importlib.import_module("netwright.diagnose.grokking.callbacks"), name)
    raise AttributeError(f"module 'netwright.diagnose.grokking' has no attribute {name!r}")
