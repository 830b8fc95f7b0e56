"""Lightning's side of compression: callbacks and modules, for those who train with it."""

from netwright.compress.callbacks.distillation import (
    AlternatingEpochs,
    Distiller,
    QuantizedDistillationCallback,
    SortedPoints,
)
from netwright.compress.callbacks.maestro import FullPassClassifier, MaestroCallback
from netwright.compress.callbacks.pruning import GradualPruning, KeepSparse

__all__ = [
    "AlternatingEpochs",
    "Distiller",
    "FullPassClassifier",
    "GradualPruning",
    "KeepSparse",
    "MaestroCallback",
    "QuantizedDistillationCallback",
    "SortedPoints",
]
