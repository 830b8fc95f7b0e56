"""Training: the one loop over Lightning's Trainer, its schedules and its callbacks."""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "Classifier": "netwright.train.fit",
    "CosineProgress": "netwright.train.schedules",
    "Deadline": "netwright.train.schedules",
    "RMSpropTF": "netwright.train.rmsprop",
    "distillation_loss": "netwright.train.distillation",
    "evaluate": "netwright.train.fit",
    "fit": "netwright.train.fit",
}

METHODS = {"plain": "netwright.train.fit:Classifier"}

__all__ = ["METHODS", "Classifier", "CosineProgress", "Deadline", "RMSpropTF", "distillation_loss", "evaluate", "fit"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'netwright.train' has no attribute {name!r}")
