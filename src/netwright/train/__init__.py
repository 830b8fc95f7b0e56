"""Training: the one loop over Lightning's Trainer, its schedules, and the training methods.

A method is functions and modules for a loop of one's own, and a callback for Lightning's Trainer. ``METHODS`` tells
where each is, by the name that people type, in the order in which several are put together: TrAct wraps a layer before
Weight Compander does. ``PRETRAINING`` tells which modules train without labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netwright.lazy import exports

METHODS = {
    "plain": "netwright.train.classifier:Classifier",
    "tract": "netwright.train.callbacks:TrActCallback",
    "weight-compander": "netwright.train.callbacks:WeightCompanderCallback",
    "gradient-noise": "netwright.train.callbacks:GradientNoiseCallback",
    "natra": "netwright.train.callbacks:NaTraTraining",
    "ps-kd": "netwright.train.callbacks:PSKDCallback",
    "elr": "netwright.train.callbacks:ELRCallback",
    "elr+": "netwright.train.callbacks:ELRPlusCallback",
    "cdvg": "netwright.train.callbacks:CDvGCallback",
}

PRETRAINING = {
    "simclr": "netwright.train.contrastive.hosts:SimCLR",
    "moco": "netwright.train.contrastive.hosts:MoCo",
    "simsiam": "netwright.train.contrastive.hosts:SimSiam",
}

_NAMES = {
    "BiasTranslator": "debias",
    "CDvG": "debias",
    "CDvGCallback": "callbacks",
    "Classifier": "classifier",
    "ContrastiveModule": "contrastive",
    "CosineProgress": "schedules",
    "Deadline": "schedules",
    "ELRCallback": "callbacks",
    "ELRLoss": "early_learning",
    "ELRPlus": "early_learning_plus",
    "ELRPlusCallback": "callbacks",
    "GradientNoise": "gradient_noise",
    "GradientNoiseCallback": "callbacks",
    "Hallucinator": "hallucinator",
    "KeyInitCallback": "kv_bottleneck",
    "LabelDoubts": "early_learning",
    "LfF": "debias",
    "Loader": "fitting",
    "Memorization": "callbacks.memorization",
    "MemorizationTracker": "callbacks",
    "MoCo": "contrastive",
    "NaTraTraining": "callbacks",
    "NodeClassifier": "dagnn",
    "NoisyOptimizer": "gradient_noise",
    "PSKDCallback": "callbacks",
    "PSKDLoss": "self_distillation",
    "PSKDTargets": "self_distillation",
    "PatchDrawing": "masked_autoencoder",
    "PredictionMemory": "memory",
    "RMSpropTF": "rmsprop",
    "SimCLR": "contrastive",
    "SimSiam": "contrastive",
    "SplitSGD": "split_sgd",
    "StepProgress": "schedules",
    "TrActCallback": "callbacks",
    "TrActConv1d": "tract",
    "TrActConv2d": "tract",
    "TrActLinear": "tract",
    "ViewCache": "debias",
    "WeightAverage": "ema",
    "WeightCompander": "weight_compander",
    "WeightCompanderCallback": "callbacks",
    "add_gradient_noise_": "gradient_noise",
    "agreement_loss": "early_learning",
    "apply_tract": "tract",
    "apply_weight_compander": "weight_compander",
    "bias_metrics": "debias",
    "channels_last": "classifier",
    "compand": "weight_compander",
    "crossover": "weight_compander",
    "distillation_loss": "distillation",
    "evaluate": "classifier",
    "expand_inverse": "weight_compander",
    "fit": "fitting",
    "fit_contrastive": "contrastive",
    "fit_masked_autoencoder": "masked_autoencoder",
    "fit_node_classifier": "dagnn",
    "fit_pskd": "self_distillation",
    "label_doubts": "early_learning",
    "memorization": "callbacks.memorization",
    "node_accuracy": "dagnn",
    "noise_variance": "gradient_noise",
    "param_groups": "weight_compander",
    "pskd_alpha": "self_distillation",
    "register_gradient_noise": "gradient_noise",
    "remove_tract": "tract",
    "remove_weight_compander": "weight_compander",
    "scale_rates_": "weight_compander",
    "sigmoid_ramp": "early_learning",
    "tract_gradient": "tract",
    "weight_statistics": "weight_compander",
}
_MODULES = (
    "adversarial",
    "callbacks",
    "classifier",
    "contrastive",
    "dagnn",
    "debias",
    "distillation",
    "early_learning",
    "early_learning_plus",
    "ema",
    "fitting",
    "gradient_noise",
    "groups",
    "hallucinator",
    "kv_bottleneck",
    "masked_autoencoder",
    "memory",
    "methods",
    "natra",
    "natural_transform",
    "normal",
    "rmsprop",
    "schedules",
    "self_distillation",
    "split_sgd",
    "tract",
    "weight_compander",
)

if TYPE_CHECKING:
    from netwright.train.callbacks import (
        CDvGCallback,
        ELRCallback,
        ELRPlusCallback,
        GradientNoiseCallback,
        MemorizationTracker,
        NaTraTraining,
        PSKDCallback,
        TrActCallback,
        WeightCompanderCallback,
    )
    from netwright.train.callbacks.memorization import Memorization, memorization
    from netwright.train.classifier import Classifier, channels_last, evaluate
    from netwright.train.contrastive import ContrastiveModule, MoCo, SimCLR, SimSiam, fit_contrastive
    from netwright.train.dagnn import NodeClassifier, fit_node_classifier, node_accuracy
    from netwright.train.debias import BiasTranslator, CDvG, LfF, ViewCache, bias_metrics
    from netwright.train.distillation import distillation_loss
    from netwright.train.early_learning import ELRLoss, LabelDoubts, agreement_loss, label_doubts, sigmoid_ramp
    from netwright.train.early_learning_plus import ELRPlus
    from netwright.train.ema import WeightAverage
    from netwright.train.fitting import Loader, fit
    from netwright.train.gradient_noise import (
        GradientNoise,
        NoisyOptimizer,
        add_gradient_noise_,
        noise_variance,
        register_gradient_noise,
    )
    from netwright.train.hallucinator import Hallucinator
    from netwright.train.kv_bottleneck import KeyInitCallback
    from netwright.train.masked_autoencoder import PatchDrawing, fit_masked_autoencoder
    from netwright.train.memory import PredictionMemory
    from netwright.train.rmsprop import RMSpropTF
    from netwright.train.schedules import CosineProgress, Deadline, StepProgress
    from netwright.train.self_distillation import PSKDLoss, PSKDTargets, fit_pskd, pskd_alpha
    from netwright.train.split_sgd import SplitSGD
    from netwright.train.tract import (
        TrActConv1d,
        TrActConv2d,
        TrActLinear,
        apply_tract,
        remove_tract,
        tract_gradient,
    )
    from netwright.train.weight_compander import (
        WeightCompander,
        apply_weight_compander,
        compand,
        crossover,
        expand_inverse,
        param_groups,
        remove_weight_compander,
        scale_rates_,
        weight_statistics,
    )

__all__ = [
    "METHODS",
    "PRETRAINING",
    "BiasTranslator",
    "CDvG",
    "CDvGCallback",
    "Classifier",
    "ContrastiveModule",
    "CosineProgress",
    "Deadline",
    "ELRCallback",
    "ELRLoss",
    "ELRPlus",
    "ELRPlusCallback",
    "GradientNoise",
    "GradientNoiseCallback",
    "Hallucinator",
    "KeyInitCallback",
    "LabelDoubts",
    "LfF",
    "Loader",
    "Memorization",
    "MemorizationTracker",
    "MoCo",
    "NaTraTraining",
    "NodeClassifier",
    "NoisyOptimizer",
    "PSKDCallback",
    "PSKDLoss",
    "PSKDTargets",
    "PatchDrawing",
    "PredictionMemory",
    "RMSpropTF",
    "SimCLR",
    "SimSiam",
    "SplitSGD",
    "StepProgress",
    "TrActCallback",
    "TrActConv1d",
    "TrActConv2d",
    "TrActLinear",
    "ViewCache",
    "WeightAverage",
    "WeightCompander",
    "WeightCompanderCallback",
    "add_gradient_noise_",
    "agreement_loss",
    "apply_tract",
    "apply_weight_compander",
    "bias_metrics",
    "channels_last",
    "compand",
    "crossover",
    "distillation_loss",
    "evaluate",
    "expand_inverse",
    "fit",
    "fit_contrastive",
    "fit_masked_autoencoder",
    "fit_node_classifier",
    "fit_pskd",
    "label_doubts",
    "memorization",
    "node_accuracy",
    "noise_variance",
    "param_groups",
    "pskd_alpha",
    "register_gradient_noise",
    "remove_tract",
    "remove_weight_compander",
    "scale_rates_",
    "sigmoid_ramp",
    "tract_gradient",
    "weight_statistics",
]

__getattr__, __dir__ = exports(__name__, _NAMES, __all__, _MODULES)
