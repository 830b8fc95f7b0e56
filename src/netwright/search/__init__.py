"""Architecture search: spaces, supernets, searchers and what they find.

A search is a short composition: a space (:mod:`netwright.search.spaces`), its supernet, a searcher
(:data:`METHODS`), and the genotype that a selector reads off. Names are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from netwright.checks import one_of
from netwright.lazy import exports

METHODS = {
    "darts": "netwright.search.darts:DARTS",
    "dass": "netwright.search.dass:DASS",
    "rarts": "netwright.search.rarts:RARTS",
    "sd-darts": "netwright.search.self_distill:SDDARTS",
    "fbnet": "netwright.search.fbnet:FBNet",
    "proxylessnas": "netwright.search.proxyless:ProxylessNAS",
    "single-path": "netwright.search.single_path:SinglePathNAS",
    "random": "netwright.search.random_search:RandomSearch",
}
"""Searchers by the name that ``--search`` takes: "module:class"."""

SELECTORS = ("magnitude", "argmax", "sample", "perturbation")
"""Selectors by the name that ``--select`` takes; see :func:`netwright.search.brief.make_selector`."""

_NAMES = {
    "Brief": "brief",
    "ExpectedCost": "pricing",
    "Limit": "pricing",
    "Limits": "pricing",
    "NetworkCost": "pricing",
    "WithinLimits": "pricing",
    "multiply_adds": "pricing",
    "CellGenotype": "genotype",
    "CellsGenotype": "genotype",
    "ChoiceGenotype": "genotype",
    "Genotype": "genotype",
    "DARTS_V1": "genotype",
    "DARTS_V2": "genotype",
    "DASS_90": "genotype",
    "DASS_95": "genotype",
    "DASS_99": "genotype",
    "FBNET_A": "spaces.fbnet",
    "FBNET_B": "spaces.fbnet",
    "FBNET_C": "spaces.fbnet",
    "FBNET_BLOCKS": "spaces.fbnet",
    "FBNET_MACRO": "spaces.fbnet",
    "fbnet_space": "spaces.fbnet",
    "draw": "drawing",
    "Choice": "supernet",
    "Gate": "supernet",
    "MaskedGate": "supernet",
    "FixedGate": "supernet",
    "SoftmaxGate": "supernet",
    "Supernet": "supernet",
    "Space": "spaces",
    "ChoiceSpace": "spaces.choices",
    "mbconv_space": "spaces.chain",
    "Network": "spaces.network",
    "Selector": "selection",
    "ArgmaxSelector": "selection",
    "PerturbationSelector": "perturbation",
    "op_strengths": "strengths",
    "edge_strengths": "strengths",
    "discretisation_accuracy": "strengths",
    "MagnitudeSelector": "selection",
    "SampleSelector": "sampling",
    "ScratchAccuracy": "scratch",
    "inherited_accuracy": "sampling",
    "sample_genotypes": "sampling",
    "Phased": "phased",
    "FirstOrder": "bilevel",
    "SecondOrder": "bilevel",
    "RelaxedSplit": "relaxed_split",
    "WidthSearch": "width",
    "SingleLevel": "single_level",
    "ExpectedLatency": "latency",
    "Objective": "objective",
    "TaskLoss": "objective",
    "CostPenalty": "objective",
    "DARTS": "darts",
    "DASS": "dass",
    "DASSStages": "dass",
    "RARTS": "rarts",
    "FBNet": "fbnet",
    "GumbelSoftmaxGate": "fbnet",
    "TemperatureSchedule": "fbnet",
    "Alternating": "alternating",
    "BinaryGate": "binary_gate",
    "ProxylessNAS": "proxyless",
    "ProxylessCPU": "spaces.proxyless",
    "ProxylessGPU": "spaces.proxyless",
    "ProxylessMobile": "spaces.proxyless",
    "ProxylessMobile14": "spaces.proxyless",
    "MNASNET_MACRO": "spaces.single_path",
    "SINGLE_PATH_NET": "spaces.single_path",
    "single_path_space": "spaces.single_path",
    "PricedSearch": "priced",
    "SinglePathNAS": "single_path",
    "SuperKernelDepthwise": "superkernel",
    "SuperKernelSupernet": "superkernel_supernet",
    "indicator_ste": "superkernel",
    "ThresholdSelector": "selection",
    "RandomSearch": "random_search",
    "uniform_genotypes": "random_search",
    "SDDARTS": "self_distill",
    "SelfDistillation": "self_distill",
    "SnapshotTeachers": "self_distill",
    "SharpnessAware": "sharpness",
    "alpha_hessian_eig": "sharpness",
    "discretisation_gap": "sharpness",
    "discretised": "sharpness",
    "loss_and_accuracy": "sharpness",
    "rho_sharpness": "sharpness",
    "Stage": "stages",
    "EpochEnd": "searcher",
    "Searchable": "protocol",
    "Searcher": "searcher",
    "Deadline": "deadline",
    "Rehearsal": "deadline",
    "rehearse": "deadline",
    "SearchModule": "lightning",
    "SearchResult": "result",
    "ChannelGate": "netwright.compress.channels",
    "LatencyTable": "netwright.cost",
    "distillation_loss": "netwright.train.distillation",
    "prune_channels": "netwright.compress.channels",
    "soft_threshold": "netwright.compress.channels",
}
_MODULES = tuple(sorted({path.split(".")[0] for path in _NAMES.values() if not path.startswith("netwright.")}))

if TYPE_CHECKING:
    from netwright.compress.channels import ChannelGate, prune_channels, soft_threshold
    from netwright.cost import LatencyTable
    from netwright.search.alternating import Alternating
    from netwright.search.bilevel import FirstOrder, SecondOrder
    from netwright.search.binary_gate import BinaryGate
    from netwright.search.brief import Brief
    from netwright.search.darts import DARTS
    from netwright.search.dass import DASS, DASSStages
    from netwright.search.deadline import Deadline, Rehearsal, rehearse
    from netwright.search.drawing import draw
    from netwright.search.fbnet import FBNet, GumbelSoftmaxGate, TemperatureSchedule
    from netwright.search.genotype import (
        DARTS_V1,
        DARTS_V2,
        DASS_90,
        DASS_95,
        DASS_99,
        CellGenotype,
        CellsGenotype,
        ChoiceGenotype,
        Genotype,
    )
    from netwright.search.lightning import SearchModule
    from netwright.search.objective import CostPenalty, Objective, TaskLoss
    from netwright.search.perturbation import PerturbationSelector
    from netwright.search.phased import Phased
    from netwright.search.priced import PricedSearch
    from netwright.search.pricing import ExpectedCost, Limit, Limits, NetworkCost, WithinLimits, multiply_adds
    from netwright.search.protocol import Searchable
    from netwright.search.proxyless import ProxylessNAS
    from netwright.search.random_search import RandomSearch, uniform_genotypes
    from netwright.search.rarts import RARTS
    from netwright.search.relaxed_split import RelaxedSplit
    from netwright.search.result import SearchResult
    from netwright.search.sampling import SampleSelector, inherited_accuracy, sample_genotypes
    from netwright.search.scratch import ScratchAccuracy
    from netwright.search.searcher import EpochEnd, Searcher
    from netwright.search.selection import ArgmaxSelector, MagnitudeSelector, Selector, ThresholdSelector
    from netwright.search.self_distill import SDDARTS, SelfDistillation, SnapshotTeachers
    from netwright.search.sharpness import (
        SharpnessAware,
        alpha_hessian_eig,
        discretisation_gap,
        discretised,
        loss_and_accuracy,
        rho_sharpness,
    )
    from netwright.search.single_level import SingleLevel
    from netwright.search.single_path import SinglePathNAS
    from netwright.search.spaces import Space
    from netwright.search.spaces.chain import mbconv_space
    from netwright.search.spaces.choices import ChoiceSpace
    from netwright.search.spaces.fbnet import FBNET_A, FBNET_B, FBNET_BLOCKS, FBNET_C, FBNET_MACRO, fbnet_space
    from netwright.search.spaces.network import Network
    from netwright.search.spaces.proxyless import ProxylessCPU, ProxylessGPU, ProxylessMobile, ProxylessMobile14
    from netwright.search.spaces.single_path import MNASNET_MACRO, SINGLE_PATH_NET, single_path_space
    from netwright.search.stages import Stage
    from netwright.search.superkernel import SuperKernelDepthwise, indicator_ste
    from netwright.search.superkernel_supernet import SuperKernelSupernet
    from netwright.search.supernet import Choice, FixedGate, Gate, MaskedGate, SoftmaxGate, Supernet
    from netwright.search.width import WidthSearch
    from netwright.train.distillation import distillation_loss

__all__ = [
    "DARTS",
    "DARTS_V1",
    "DARTS_V2",
    "DASS",
    "DASS_90",
    "DASS_95",
    "DASS_99",
    "FBNET_A",
    "FBNET_B",
    "FBNET_BLOCKS",
    "FBNET_C",
    "FBNET_MACRO",
    "METHODS",
    "MNASNET_MACRO",
    "RARTS",
    "SDDARTS",
    "SELECTORS",
    "SINGLE_PATH_NET",
    "Alternating",
    "ArgmaxSelector",
    "BinaryGate",
    "Brief",
    "CellGenotype",
    "CellsGenotype",
    "ChannelGate",
    "Choice",
    "ChoiceGenotype",
    "ChoiceSpace",
    "CostPenalty",
    "DASSStages",
    "Deadline",
    "EpochEnd",
    "ExpectedCost",
    "FBNet",
    "FirstOrder",
    "FixedGate",
    "Gate",
    "Genotype",
    "GumbelSoftmaxGate",
    "LatencyTable",
    "Limit",
    "Limits",
    "MagnitudeSelector",
    "MaskedGate",
    "Network",
    "NetworkCost",
    "Objective",
    "PerturbationSelector",
    "Phased",
    "PricedSearch",
    "ProxylessCPU",
    "ProxylessGPU",
    "ProxylessMobile",
    "ProxylessMobile14",
    "ProxylessNAS",
    "RandomSearch",
    "Rehearsal",
    "RelaxedSplit",
    "SampleSelector",
    "ScratchAccuracy",
    "SearchModule",
    "SearchResult",
    "Searchable",
    "Searcher",
    "SecondOrder",
    "Selector",
    "SelfDistillation",
    "SharpnessAware",
    "SingleLevel",
    "SinglePathNAS",
    "SnapshotTeachers",
    "SoftmaxGate",
    "Space",
    "Stage",
    "SuperKernelDepthwise",
    "SuperKernelSupernet",
    "Supernet",
    "TaskLoss",
    "TemperatureSchedule",
    "ThresholdSelector",
    "WidthSearch",
    "WithinLimits",
    "alpha_hessian_eig",
    "discretisation_accuracy",
    "discretisation_gap",
    "discretised",
    "distillation_loss",
    "draw",
    "edge_strengths",
    "fbnet_space",
    "indicator_ste",
    "inherited_accuracy",
    "loss_and_accuracy",
    "mbconv_space",
    "method",
    "multiply_adds",
    "op_strengths",
    "prune_channels",
    "rehearse",
    "rho_sharpness",
    "sample_genotypes",
    "single_path_space",
    "soft_threshold",
    "uniform_genotypes",
]


def method(name: str) -> Any:
    """The searcher class of a name in :data:`METHODS`.

    Raises:
        ValueError: If there is none.
    """
    one_of("search", name, METHODS)
    module, attribute = METHODS[name].split(":")
    return getattr(importlib.import_module(module), attribute)


__getattr__, __dir__ = exports(__name__, _NAMES, __all__, _MODULES)
