"""Ranks that are learned: layers as two factors, trained with ordered dropout, shrunk meanwhile, cut further
afterwards.

Horvath, Laskaridis, Rajput and Wang, "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", ICML 2024,
arXiv:2308.14929.
"""

from netwright.compress.low_rank.attention import SplitAttention
from netwright.compress.low_rank.budget import LowRankCost, low_rank_cost, prune_to_budget, singular_cut, svd_truncate
from netwright.compress.low_rank.decomposing import (
    decompose,
    factored_ranks,
    finalize,
    low_rank_layers,
    split_attention,
    with_ranks,
)
from netwright.compress.low_rank.layers import LowRankConv2d, LowRankLinear
from netwright.compress.low_rank.ordered import (
    hierarchical_group_lasso,
    ordered_rank_sampler,
    progressive_shrink,
    recalibrate_batchnorm,
    truncated,
)
from netwright.compress.low_rank.training import fit_maestro

__all__ = [
    "LowRankConv2d",
    "LowRankCost",
    "LowRankLinear",
    "SplitAttention",
    "decompose",
    "factored_ranks",
    "finalize",
    "fit_maestro",
    "hierarchical_group_lasso",
    "low_rank_cost",
    "low_rank_layers",
    "ordered_rank_sampler",
    "progressive_shrink",
    "prune_to_budget",
    "recalibrate_batchnorm",
    "singular_cut",
    "split_attention",
    "svd_truncate",
    "truncated",
    "with_ranks",
]
