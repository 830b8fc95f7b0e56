"""Opposing signals: the few examples, in pairs of groups, whose losses make training spike and oscillate.

Rosenfeld and Risteski, "Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization", ICLR
2024, arXiv:2311.04163.

A tracker records the loss of every example along a training
(:mod:`~netwright.diagnose.opposing_signals.tracker`); the examples whose losses rise and fall most in a step are the
groups, and scores tell whether they oppose each other more than other examples do
(:mod:`~netwright.diagnose.opposing_signals.scores`). Sharpness tells how near a training is to the edge of stability
(:mod:`~netwright.diagnose.opposing_signals.edge`), where they show; a trained network can be taken there
(:mod:`~netwright.diagnose.opposing_signals.descent`). A linear model shows the mechanism
(:mod:`~netwright.diagnose.opposing_signals.toy`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from netwright.diagnose.opposing_signals.descent import (
    EdgeReplay,
    StepReplay,
    edge_replay,
    feature_sweep,
    full_batch_descent,
    replay_step,
)
from netwright.diagnose.opposing_signals.edge import adam_preconditioner, sharpness, stability_limit
from netwright.diagnose.opposing_signals.opposition import clusters, gradient_opposition
from netwright.diagnose.opposing_signals.results import Groups, OpposingReport, PairScores
from netwright.diagnose.opposing_signals.scores import oscillation_score, outsized_share
from netwright.diagnose.opposing_signals.toy import ToyHistory, opposing_toy
from netwright.diagnose.opposing_signals.tracker import OpposingSignalTracker
from netwright.train.split_sgd import SplitSGD

if TYPE_CHECKING:
    from netwright.diagnose.opposing_signals.callbacks import OpposingSignalCallback

__all__ = [
    "EdgeReplay",
    "Groups",
    "OpposingReport",
    "OpposingSignalCallback",
    "OpposingSignalTracker",
    "PairScores",
    "SplitSGD",
    "StepReplay",
    "ToyHistory",
    "adam_preconditioner",
    "clusters",
    "edge_replay",
    "feature_sweep",
    "full_batch_descent",
    "gradient_opposition",
    "opposing_toy",
    "oscillation_score",
    "outsized_share",
    "replay_step",
    "sharpness",
    "stability_limit",
]


def __getattr__(name: str) -> Any:
    if name == "OpposingSignalCallback":  # only this needs the training engine
        return importlib.import_module("netwright.diagnose.opposing_signals.callbacks").OpposingSignalCallback
    raise AttributeError(f"module 'netwright.diagnose.opposing_signals' has no attribute {name!r}")
