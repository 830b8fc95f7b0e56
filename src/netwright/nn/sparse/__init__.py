"""Layers that own a weight and a score for it, and use only the weights whose scores are largest.

Ramanujan et al., "What's Hidden in a Randomly Weighted Neural Network?", CVPR 2020, arXiv:1911.13299; Sehwag
et al., "HYDRA: Pruning Adversarially Robust Neural Networks", NeurIPS 2020, arXiv:2002.10509; used for
architecture search by Mousavi et al., "DASS: Differentiable Architecture Search for Sparse Neural Networks",
2023, arXiv:2207.06968.

    y = op(x, M * W) + b,    M = 1 on the max(1, round(k n)) largest |S|, else 0

    dL/dW = M * dL/d(M * W),    dL/dS = sign(S) * W * dL/d(M * W)  for every entry (straight-through on the
    mask)

Layers take the ``density`` k, the share that is kept; people are shown the sparsity 1 - k. The one mask
mechanism is :class:`TopKMask`, a parametrization for any tensor; :class:`SparseConv2d` and
:class:`SparseLinear` are the same thing as layers, and :class:`FixedMask` is its sibling without scores.
"""

from netwright.nn.shared import bake
from netwright.nn.sparse.layers import SparseConv2d, SparseLinear
from netwright.nn.sparse.masks import (
    FixedMask,
    TopKMask,
    check_density,
    kept_count,
    masked_weight,
    top_k_mask,
)
from netwright.nn.sparse.modules import (
    LAYERS,
    LayerSparsity,
    clone,
    effective_weight,
    export_csr,
    init_scores,
    layers,
    mask_of,
    masked_tensors,
    set_density,
    sparsify,
    sparsity,
    sparsity_report,
    to_dense,
    train_mode,
    unparametrized,
)

__all__ = [
    "LAYERS",
    "FixedMask",
    "LayerSparsity",
    "SparseConv2d",
    "SparseLinear",
    "TopKMask",
    "bake",
    "check_density",
    "clone",
    "effective_weight",
    "export_csr",
    "init_scores",
    "kept_count",
    "layers",
    "mask_of",
    "masked_tensors",
    "masked_weight",
    "set_density",
    "sparsify",
    "sparsity",
    "sparsity_report",
    "to_dense",
    "top_k_mask",
    "train_mode",
    "unparametrized",
]
