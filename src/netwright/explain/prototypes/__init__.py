"""Classification by cases: an input is what the learned cases are that it lies near, and the cases can be looked at.

Li, Liu, Chen and Rudin, "Deep Learning for Case-Based Reasoning through Prototypes: A Neural Network that Explains Its
Predictions", AAAI 2018, arXiv:1710.04806.

    logits_k = sum_j W_kj ||f(x) - p_j||^2

f is an encoder, the p_j are learned, and a decoder g that is trained along turns each of them into an input. The loss
(:class:`PrototypeLoss`) adds to cross-entropy and reconstruction that every prototype lies near some example and every
example near some prototype; without these the prototypes drift to where nothing decodes to anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from netwright.data.elastic import elastic_deform
from netwright.explain.prototypes.explanation import Explanation, NearestCases, NearPrototype
from netwright.explain.prototypes.layer import LazyPrototypeLayer, PrototypeLayer, squared_distances
from netwright.explain.prototypes.loss import PrototypeLoss, PrototypeTerms
from netwright.explain.prototypes.model import (
    PrototypeClassifier,
    PrototypeOutput,
    explain_by_prototypes,
    find_prototypes,
)
from netwright.explain.prototypes.networks import (
    conv_decoder,
    conv_encoder,
    mnist_conv_decoder,
    mnist_conv_encoder,
)

if TYPE_CHECKING:
    from netwright.explain.prototypes.training import LitPrototypeClassifier

__all__ = [
    "Explanation",
    "LazyPrototypeLayer",
    "LitPrototypeClassifier",
    "NearPrototype",
    "NearestCases",
    "PrototypeClassifier",
    "PrototypeLayer",
    "PrototypeLoss",
    "PrototypeOutput",
    "PrototypeTerms",
    "conv_decoder",
    "conv_encoder",
    "elastic_deform",
    "explain_by_prototypes",
    "find_prototypes",
    "mnist_conv_decoder",
    "mnist_conv_encoder",
    "squared_distances",
]


def __getattr__(name: str) -> Any:
    # Explaining needs no training engine.
    if name == "LitPrototypeClassifier":
        from netwright.explain.prototypes.training import LitPrototypeClassifier

        return LitPrototypeClassifier
    raise AttributeError(f"module 'netwright.explain.prototypes' has no attribute {name!r}")
