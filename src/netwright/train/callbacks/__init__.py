"""The training methods as Lightning callbacks, for any ``LightningModule``; several of them compose in one Trainer.

Each attaches where an ordinary module leaves room for it, so that module, optimisers and loss stay the user's:

- ``TrActCallback`` and ``WeightCompanderCallback`` change layers in ``setup``, before the checkpoint is read, the
  optimisers are made and the module is wrapped for several processes. TrAct comes first in the list.
- ``GradientNoiseCallback`` acts at each optimiser's step, after gradients were reduced, unscaled and clipped.
- ``PSKDCallback`` stands around ``training_step``: it changes the labels that the step sees and keeps the logits.
- ``ELRCallback`` and ``ELRPlusCallback`` stand around it too, and add a term of the logits to its loss; ELR+ also mixes
  the examples, and lets two networks take turns in the module.
- ``CDvGCallback`` stands around it with two translated views of each image, and adds their contrast.
- ``NaTraTraining`` gives the module transformed images beside those of the batch, and adds a term of their logits.
- ``MemorizationTracker`` only looks.

What a method must remember is in the checkpoint. In a loop of one's own the functions of each method's module do the
same.
"""

from netwright.train.callbacks.debias import CDvGCallback
from netwright.train.callbacks.early_learning import ELRCallback
from netwright.train.callbacks.early_learning_plus import ELRPlusCallback
from netwright.train.callbacks.layers import TrActCallback, WeightCompanderCallback
from netwright.train.callbacks.memorization import MemorizationTracker
from netwright.train.callbacks.natural_transform import NaTraTraining
from netwright.train.callbacks.noise import GradientNoiseCallback
from netwright.train.callbacks.targets import PSKDCallback

__all__ = [
    "CDvGCallback",
    "ELRCallback",
    "ELRPlusCallback",
    "GradientNoiseCallback",
    "MemorizationTracker",
    "NaTraTraining",
    "PSKDCallback",
    "TrActCallback",
    "WeightCompanderCallback",
]
