"""What a network certainly does around an input: bounds, exhaustive grids, an exact engine, counterexamples.

Names are resolved when they are first used, so that importing this package loads nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netwright.lazy import exports

_NAMES = {
    "BackMapped": "back",
    "DLV": "layer_search",
    "Decision": "exact",
    "GridResult": "grid",
    "Network": "network",
    "Radii": "radius",
    "Region": "region",
    "RobustnessReport": "report",
    "VerificationResult": "result",
    "back_map": "back",
    "condense": "layerwise",
    "few_number_radii": "radius",
    "fgsm": "netwright.train.attacks",
    "grid_search": "grid",
    "interval_bounds": "bounds",
    "jsma": "netwright.train.attacks",
    "ladder_search": "ladder",
    "map_region": "layerwise",
    "robustness_radii": "radius",
    "robustness_report": "report",
    "smt_verify": "exact",
    "stretch": "layerwise",
    "verify_point": "safety",
}
_OWN = {module for module in _NAMES.values() if not module.startswith("netwright.")}
_MODULES = (*sorted(_OWN), "basis", "encoding", "forms", "greedy", "point")

if TYPE_CHECKING:
    from netwright.train.attacks import fgsm, jsma
    from netwright.verify.back import BackMapped, back_map
    from netwright.verify.bounds import interval_bounds
    from netwright.verify.exact import Decision, smt_verify
    from netwright.verify.grid import GridResult, grid_search
    from netwright.verify.ladder import ladder_search
    from netwright.verify.layer_search import DLV
    from netwright.verify.layerwise import condense, map_region, stretch
    from netwright.verify.network import Network
    from netwright.verify.radius import Radii, few_number_radii, robustness_radii
    from netwright.verify.region import Region
    from netwright.verify.report import RobustnessReport, robustness_report
    from netwright.verify.result import VerificationResult
    from netwright.verify.safety import verify_point

__all__ = [
    "DLV",
    "BackMapped",
    "Decision",
    "GridResult",
    "Network",
    "Radii",
    "Region",
    "RobustnessReport",
    "VerificationResult",
    "back_map",
    "condense",
    "few_number_radii",
    "fgsm",
    "grid_search",
    "interval_bounds",
    "jsma",
    "ladder_search",
    "map_region",
    "robustness_radii",
    "robustness_report",
    "smt_verify",
    "stretch",
    "verify_point",
]


__getattr__, __dir__ = exports(__name__, _NAMES, __all__, _MODULES)
