"""Training: the one loop over Lightning's Trainer, its schedules, and the training methods.

A method is functions and modules for a loop of one's own, and a callback for Lightning's Trainer. ``METHODS`` tells
where each is, by the name that people type, in the order in which several are put together: TrAct wraps a layer before
Weight Compander does.
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
}

_NAMES = {
    "Classifier": "classifier",
    "CosineProgress": "schedules",
    "Deadline": "schedules",
    "ELRCallback": "callbacks",
    "ELRLoss": "early_learning",
    "ELRPlus": "early_learning_plus",
    "ELRPlusCallback": "callbacks",
    "GradientNoise": "gradient_noise",
    "GradientNoiseCallback": "callbacks",
    "KeyInitCallback": "kv_bottleneck",
    "LabelDoubts": "early_learning",
    "Loader": "fitting",
    "Memorization": "callbacks.memorization",
    "MemorizationTracker": "callbacks",
    "NaTraTraining": "callbacks",
    "NodeClassifier": "dagnn",
    "NoisyOptimizer": "gradient_noise",
    "PSKDCallback": "callbacks",
    "PSKDLoss": "self_distillation",
    "PSKDTargets": "self_distillation",
    "PatchDrawing": "masked_autoencoder",
    "PredictionMemory": "memory",
    "RMSpropTF": "rmsprop",
    "SplitSGD": "split_sgd",
    "StepProgress": "schedules",
    "TrActCallback": "callbacks",
    "TrActConv1d": "tract",
    "TrActConv2d": "tract",
    "TrActLinear": "tract",
    "WeightAverage": "ema",
    "WeightCompander": "weight_compander",
    "WeightCompanderCallback": "callbacks",
    "add_gradient_noise_": "gradient_noise",
    "agreement_loss": "early_learning",
    "apply_tract": "tract",
    "apply_weight_compander": "weight_compander",
    "channels_last": "classifier",
    "compand": "weight_compander",
    "crossover": "weight_compander",
    "distillation_loss": "distillation",
    "evaluate": "classifier",
    "expand_inverse": "weight_compander",
    "fit": "fitting",
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
    "sigmoid_ramp": "early_learning",
    "tract_gradient": "tract",
    "weight_statistics": "weight_compander",
}
_MODULES = (
    "callbacks",
    "classifier",
    "dagnn",
    "distillation",
    "early_learning",
    "early_learning_plus",
    "ema",
    "fitting",
    "gradient_noise",
    "kv_bottleneck",
    "masked_autoencoder",
    "memory",
    "methods",
    "natra",
    "rmsprop",
    "schedules",
    "self_distillation",
    "split_sgd",
    "tract",
    "weight_compander",
)

if TYPE_CHECKING:
    from netwright.train.callbacks import (
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
    from netwright.train.dagnn import NodeClassifier, fit_node_classifier, node_accuracy
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
        weight_statistics,
    )

__all__ = [
    "METHODS",
    "Classifier",
    "CosineProgress",
    "Deadline",
    "ELRCallback",
    "ELRLoss",
    "ELRPlus",
    "ELRPlusCallback",
    "GradientNoise",
    "GradientNoiseCallback",
    "KeyInitCallback",
    "LabelDoubts",
    "Loader",
    "Memorization",
    "MemorizationTracker",
    "NaTraTraining",
    "NodeClassifier",
    "NoisyOptimizer",
    "PSKDCallback",
    "PSKDLoss",
    "PSKDTargets",
    "PatchDrawing",
    "PredictionMemory",
    "RMSpropTF",
    "SplitSGD",
    "StepProgress",
    "TrActCallback",
    "TrActConv1d",
    "TrActConv2d",
    "TrActLinear",
    "WeightAverage",
    "WeightCompander",
    "WeightCompanderCallback",
    "add_gradient_noise_",
    "agreement_loss",
    "apply_tract",
    "apply_weight_compander",
    "channels_last",
    "compand",
    "crossover",
    "distillation_loss",
    "evaluate",
    "expand_inverse",
    "fit",
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
    "sigmoid_ramp",
    "tract_gradient",
    "weight_statistics",
]

__getattr__, __dir__ = exports(__name__, _NAMES, __all__, _MODULES)
