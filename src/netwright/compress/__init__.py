"""Making trained networks smaller: pruning to an exact ratio, on any module and in any training loop; narrower layers.

Names are resolved when they are first used, so that importing this package loads nothing heavy. ``METHODS``
tells where each method is, by the name that people type.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

METHODS = {
    "magnitude": "netwright.compress.prune:magnitude",
    "gradual": "netwright.compress.callbacks:GradualPruning",
    "dense-sparse-dense": "netwright.compress.prune:dense_sparse_dense",
    "hydra": "netwright.compress.hydra:HydraPruner",
}

_NAMES = {
    "ChannelGate": "channels",
    "GradualPruning": "callbacks",
    "HydraPruner": "hydra",
    "KeepSparse": "callbacks",
    "ProximalSGD": "channels",
    "Sparsity": "prune",
    "add_gates": "channels",
    "begin_finetune": "hydra",
    "begin_scores": "hydra",
    "cubic_sparsity": "prune",
    "dense_sparse_dense": "prune",
    "hold": "prune",
    "lamp_scores": "exact",
    "magnitude": "prune",
    "place_masks": "prune",
    "prune_channels": "channels",
    "remove": "prune",
    "soft_threshold": "channels",
    "sparsity": "prune",
    "threshold_for": "channels",
    "update": "prune",
}
_MODULES = ("callbacks", "channels", "exact", "hydra", "prune")

if TYPE_CHECKING:
    from netwright.compress.callbacks import GradualPruning, KeepSparse
    from netwright.compress.channels import (
        ChannelGate,
        ProximalSGD,
        add_gates,
        prune_channels,
        soft_threshold,
        threshold_for,
    )
    from netwright.compress.exact import lamp_scores
    from netwright.compress.hydra import HydraPruner, begin_finetune, begin_scores
    from netwright.compress.prune import (
        Sparsity,
        cubic_sparsity,
        dense_sparse_dense,
        hold,
        magnitude,
        place_masks,
        remove,
        sparsity,
        update,
    )

__all__ = [
    "METHODS",
    "ChannelGate",
    "GradualPruning",
    "HydraPruner",
    "KeepSparse",
    "ProximalSGD",
    "Sparsity",
    "add_gates",
    "begin_finetune",
    "begin_scores",
    "cubic_sparsity",
    "dense_sparse_dense",
    "hold",
    "lamp_scores",
    "magnitude",
    "place_masks",
    "prune_channels",
    "remove",
    "soft_threshold",
    "sparsity",
    "threshold_for",
    "update",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"netwright.compress.{_NAMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"netwright.compress.{name}")
    raise AttributeError(f"module 'netwright.compress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
