"""Weight Compander: weights as a bounded function of free parameters, steep at zero and flat far from it.

Cakaj, Mehnert and Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization", IJCNN 2023,
arXiv:2306.16993.

- :mod:`~netwright.train.weight_compander.function`: the function, its defaults and its parametrization.
- :mod:`~netwright.train.weight_compander.layers`: on the layers of a network, their training, their statistics.
"""

from netwright.train.weight_compander.function import (
    FUNCTIONS,
    Start,
    WeightCompander,
    check_settings,
    compand,
    crossover,
    expand_inverse,
)
from netwright.train.weight_compander.layers import (
    LAYERS,
    add_effective_decay_,
    apply_weight_compander,
    companded,
    companders,
    latents,
    learned,
    param_groups,
    remove_weight_compander,
    scale_rates_,
    weight_statistics,
)

__all__ = [
    "FUNCTIONS",
    "LAYERS",
    "Start",
    "WeightCompander",
    "add_effective_decay_",
    "apply_weight_compander",
    "check_settings",
    "compand",
    "companded",
    "companders",
    "crossover",
    "expand_inverse",
    "latents",
    "learned",
    "param_groups",
    "remove_weight_compander",
    "scale_rates_",
    "weight_statistics",
]
