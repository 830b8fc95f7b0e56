"""The main job: data and a budget in, a small, sparse, exported, explained network with a report out."""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "Architecture": "netwright.design.model",
    "Options": "netwright.design.options",
    "RunModel": "netwright.design.model",
    "design": "netwright.design.pipeline",
    "load": "netwright.design.model",
    "load_run": "netwright.design.model",
}

__all__ = ["Architecture", "Options", "RunModel", "design", "load", "load_run"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'netwright.design' has no attribute {name!r}")
