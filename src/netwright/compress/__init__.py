"""Making trained networks smaller, on any module: zeros, narrower layers, two factors for a layer, few bits, students.

Names are resolved when they are first used, so that importing this package loads nothing heavy. ``METHODS``
tells where each step of a chain is, by the name that people give ``netwright compress --method``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netwright.lazy import exports

METHODS = {
    "distill": "netwright.compress.chain:Distill",
    "low-rank": "netwright.compress.chain:LowRank",
    "maestro": "netwright.compress.chain:Maestro",
    "prune": "netwright.compress.chain:Prune",
    "quantize": "netwright.compress.chain:Quantize",
    "differentiable-quantization": "netwright.compress.chain:LearnLevels",
    "alternating-quantization": "netwright.compress.chain:Alternate",
}

_NAMES = {
    "BucketScaler": "quantize",
    "ChannelGate": "channels",
    "DifferentiableQuantizer": "quantize",
    "DistillationLoss": "distill",
    "Distiller": "callbacks",
    "GradualPruning": "callbacks",
    "HydraPruner": "hydra",
    "KeepSparse": "callbacks",
    "LowRankConv2d": "low_rank",
    "LowRankLinear": "low_rank",
    "MaestroCallback": "callbacks",
    "NonuniformQuantizer": "quantize",
    "ProximalSGD": "channels",
    "QuantizedDistillationCallback": "callbacks",
    "Sparsity": "prune",
    "UniformQuantizer": "quantize",
    "add_gates": "channels",
    "allocate_points": "quantize",
    "alternating_quantization": "quantize",
    "baked": "quantize",
    "begin_finetune": "hydra",
    "begin_scores": "hydra",
    "compress": "chain",
    "compressed_size": "quantize",
    "cubic_sparsity": "prune",
    "decompose": "low_rank",
    "dense_sparse_dense": "prune",
    "differentiable_quantization": "quantize",
    "finalize": "low_rank",
    "fit_maestro": "low_rank",
    "hierarchical_group_lasso": "low_rank",
    "hold": "prune",
    "huffman_code_lengths": "quantize",
    "lamp_scores": "exact",
    "magnitude": "prune",
    "nonuniform_quantize": "quantize",
    "ordered_rank_sampler": "low_rank",
    "pack": "quantize",
    "packed": "chain",
    "place_masks": "prune",
    "post_training_quantize": "quantize",
    "progressive_shrink": "low_rank",
    "prune_channels": "channels",
    "prune_to_budget": "low_rank",
    "quantized_distillation": "quantize",
    "recalibrate_batchnorm": "low_rank",
    "remove": "prune",
    "soft_threshold": "channels",
    "sparsity": "prune",
    "threshold_for": "channels",
    "uniform_quantize": "quantize",
    "unpack": "quantize",
    "unpacked": "chain",
    "update": "prune",
}
_MODULES = ("callbacks", "chain", "channels", "distill", "exact", "hydra", "low_rank", "prune", "quantize")

if TYPE_CHECKING:
    from netwright.compress.callbacks import (
        Distiller,
        GradualPruning,
        KeepSparse,
        MaestroCallback,
        QuantizedDistillationCallback,
    )
    from netwright.compress.chain import (
        compress,
        packed,
        unpacked,
    )
    from netwright.compress.channels import (
        ChannelGate,
        ProximalSGD,
        add_gates,
        prune_channels,
        soft_threshold,
        threshold_for,
    )
    from netwright.compress.distill import (
        DistillationLoss,
    )
    from netwright.compress.exact import (
        lamp_scores,
    )
    from netwright.compress.hydra import (
        HydraPruner,
        begin_finetune,
        begin_scores,
    )
    from netwright.compress.low_rank import (
        LowRankConv2d,
        LowRankLinear,
        decompose,
        finalize,
        fit_maestro,
        hierarchical_group_lasso,
        ordered_rank_sampler,
        progressive_shrink,
        prune_to_budget,
        recalibrate_batchnorm,
    )
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
    from netwright.compress.quantize import (
        BucketScaler,
        DifferentiableQuantizer,
        NonuniformQuantizer,
        UniformQuantizer,
        allocate_points,
        alternating_quantization,
        baked,
        compressed_size,
        differentiable_quantization,
        huffman_code_lengths,
        nonuniform_quantize,
        pack,
        post_training_quantize,
        quantized_distillation,
        uniform_quantize,
        unpack,
    )

__all__ = [
    "METHODS",
    "BucketScaler",
    "ChannelGate",
    "DifferentiableQuantizer",
    "DistillationLoss",
    "Distiller",
    "GradualPruning",
    "HydraPruner",
    "KeepSparse",
    "LowRankConv2d",
    "LowRankLinear",
    "MaestroCallback",
    "NonuniformQuantizer",
    "ProximalSGD",
    "QuantizedDistillationCallback",
    "Sparsity",
    "UniformQuantizer",
    "add_gates",
    "allocate_points",
    "alternating_quantization",
    "baked",
    "begin_finetune",
    "begin_scores",
    "compress",
    "compressed_size",
    "cubic_sparsity",
    "decompose",
    "dense_sparse_dense",
    "differentiable_quantization",
    "finalize",
    "fit_maestro",
    "hierarchical_group_lasso",
    "hold",
    "huffman_code_lengths",
    "lamp_scores",
    "magnitude",
    "nonuniform_quantize",
    "ordered_rank_sampler",
    "pack",
    "packed",
    "place_masks",
    "post_training_quantize",
    "progressive_shrink",
    "prune_channels",
    "prune_to_budget",
    "quantized_distillation",
    "recalibrate_batchnorm",
    "remove",
    "soft_threshold",
    "sparsity",
    "threshold_for",
    "uniform_quantize",
    "unpack",
    "unpacked",
    "update",
]

__getattr__, __dir__ = exports(__name__, _NAMES, __all__, _MODULES)
