"""Dataset quantization: a small part of a data set on which any network can be trained.

Zhou et al., "Dataset Quantization", ICCV 2023, arXiv:2308.10524.

Greedy selection splits the data into bins, the most representative examples first; the same share is then drawn at
random from every bin (:mod:`~netwright.data.condense.bins`), from features that a network gives
(:mod:`~netwright.data.condense.features`). Images may lose their least informative patches
(:mod:`~netwright.data.condense.patches`).
"""

from netwright.data.condense.bins import DatasetQuantizer, dataset_bins, graphcut_order, sample_bins
from netwright.data.condense.features import last_layer_gradient_features, penultimate_features
from netwright.data.condense.patches import (
    PatchedImages,
    QuantizedImageDataset,
    biharmonic,
    drop_patches,
    mean_of_kept,
    nearest_kept,
    patch_importance,
    restore,
)

__all__ = [
    "DatasetQuantizer",
    "PatchedImages",
    "QuantizedImageDataset",
    "biharmonic",
    "dataset_bins",
    "drop_patches",
    "graphcut_order",
    "last_layer_gradient_features",
    "mean_of_kept",
    "nearest_kept",
    "patch_importance",
    "penultimate_features",
    "restore",
    "sample_bins",
]
