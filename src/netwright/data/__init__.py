"""Data sets by name or path, split without leaks and checked before use; batches and augmentation."""

from netwright.data.biased import BiasedDataset, biased_names
from netwright.data.folder import FolderImages, write_folder
from netwright.data.label_noise import with_noisy_labels
from netwright.data.loading import Data, load
from netwright.data.problems import Problem
from netwright.data.report import DataReport, check
from netwright.data.sequences import as_sequences, series_names
from netwright.data.sources import names
from netwright.data.splits import split_train, subset
from netwright.data.tensors import Batches, Normalise, TensorImages

__all__ = [
    "Batches",
    "BiasedDataset",
    "Data",
    "DataReport",
    "FolderImages",
    "Normalise",
    "Problem",
    "TensorImages",
    "as_sequences",
    "biased_names",
    "check",
    "load",
    "names",
    "series_names",
    "split_train",
    "subset",
    "with_noisy_labels",
    "write_folder",
]
