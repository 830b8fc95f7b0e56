"""Contrastive pre-training: features that are learned from images without labels.

Two views of an image are drawn together and held apart from other images (SimCLR, MoCo), or one predicts the other
(SimSiam). ``hosts`` says what is contrasted, ``losses`` how, ``views`` makes the views, ``module`` trains, and
``probes`` tell how good the features are. :class:`netwright.train.hallucinator.Hallucinator` goes into any host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netwright.lazy import exports

_NAMES = {
    "CenterCrop2": "views",
    "ContrastiveModule": "module",
    "Host": "hosts",
    "MoCo": "hosts",
    "SimCLR": "hosts",
    "SimSiam": "hosts",
    "TwoViews": "views",
    "alignment": "losses",
    "extract": "probes",
    "fit_contrastive": "module",
    "fit_probe": "probes",
    "info_nce": "losses",
    "knn_accuracy": "probes",
    "knn_probe": "probes",
    "linear_probe": "probes",
    "negative_cosine": "losses",
    "nt_xent": "losses",
    "policy": "views",
    "supcon": "losses",
    "uniformity": "losses",
}
_MODULES = ("hosts", "losses", "module", "probes", "views")

if TYPE_CHECKING:
    from netwright.train.contrastive.hosts import Host, MoCo, SimCLR, SimSiam
    from netwright.train.contrastive.losses import alignment, info_nce, negative_cosine, nt_xent, supcon, uniformity
    from netwright.train.contrastive.module import ContrastiveModule, fit_contrastive
    from netwright.train.contrastive.probes import extract, fit_probe, knn_accuracy, knn_probe, linear_probe
    from netwright.train.contrastive.views import CenterCrop2, TwoViews, policy

__all__ = [
    "CenterCrop2",
    "ContrastiveModule",
    "Host",
    "MoCo",
    "SimCLR",
    "SimSiam",
    "TwoViews",
    "alignment",
    "extract",
    "fit_contrastive",
    "fit_probe",
    "info_nce",
    "knn_accuracy",
    "knn_probe",
    "linear_probe",
    "negative_cosine",
    "nt_xent",
    "policy",
    "supcon",
    "uniformity",
]

__getattr__, __dir__ = exports(__name__, _NAMES, __all__, _MODULES)
