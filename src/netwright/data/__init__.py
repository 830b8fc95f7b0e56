"""Data sets by name or path, split without leaks and checked before use; batches and augmentation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from netwright.data.biased import BiasedDataset, biased_names, colored_mnist, corrupted_images, textured_images
from netwright.data.folder import FolderImages, write_folder
from netwright.data.indexed import IndexedDataset
from netwright.data.label_noise import asymmetric_noise, instance_noise, symmetric_noise, with_noisy_labels
from netwright.data.loading import Data, Place, load
from netwright.data.problems import Problem
from netwright.data.report import DataReport, check
from netwright.data.sequences import as_sequences, series_names
from netwright.data.sources import names
from netwright.data.splits import split_train, subset
from netwright.data.tensors import Batches, Normalise, TensorImages
from netwright.lazy import exports

_NAMES = {
    "Graph": "graphs",
    "class_incremental_stream": "streams",
    "continual_metrics": "streams",
    "debian_graph": "graphs",
    "digits_graph": "graphs",
    "load_planetoid": "planetoid",
    "planetoid_split": "graphs",
}

if TYPE_CHECKING:
    from netwright.data.graphs import Graph, debian_graph, digits_graph, planetoid_split
    from netwright.data.planetoid import load_planetoid
    from netwright.data.streams import class_incremental_stream, continual_metrics

__all__ = [
    "Batches",
    "BiasedDataset",
    "Data",
    "DataReport",
    "FolderImages",
    "Graph",
    "IndexedDataset",
    "Normalise",
    "Place",
    "Problem",
    "TensorImages",
    "as_sequences",
    "asymmetric_noise",
    "biased_names",
    "check",
    "class_incremental_stream",
    "colored_mnist",
    "continual_metrics",
    "corrupted_images",
    "debian_graph",
    "digits_graph",
    "instance_noise",
    "load",
    "load_planetoid",
    "names",
    "planetoid_split",
    "series_names",
    "split_train",
    "subset",
    "symmetric_noise",
    "textured_images",
    "with_noisy_labels",
    "write_folder",
]

__getattr__, __dir__ = exports(__name__, _NAMES, __all__)
