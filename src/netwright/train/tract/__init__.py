"""TrAct: the first layer's weights move as if its pre-activations were what is trained.

Petersen, Borgelt and Ermon, "TrAct: Making First-layer Pre-Activations Trainable", NeurIPS 2024, arXiv:2410.23970.

    grad W = G^T x (x^T x / b + lambda I)^-1        (primal, for b >= n; else the equal dual form)

x (b, n) are the inputs, G (b, m) the gradients of the pre-activations z = x W^T + c. It is the weight change that best
makes the gradient step z - eta G over the batch, by ridge regression, so that an image of high contrast does not move
the layer more than a dull one. Forward pass, input and bias gradients, optimiser and parameters are the ordinary ones.
A convolution is a linear layer on its unfolded patches, with all patches of the batch as rows.

Inputs must be standardised: lambda is measured against the mean eigenvalue of x^T x / b, which is then about 1. Larger
lambda tends to plain training at 1 / lambda of the learning rate. The rule is applied to every micro-batch, so with
gradient accumulation results depend on its size.
"""

from netwright.train.tract.gradient import check_lambda, tract_gradient
from netwright.train.tract.layers import (
    TrActConv1d,
    TrActConv2d,
    TrActLinear,
    apply_tract,
    first_layer,
    remove_tract,
    traced,
    tract,
)

__all__ = [
    "TrActConv1d",
    "TrActConv2d",
    "TrActLinear",
    "apply_tract",
    "check_lambda",
    "first_layer",
    "remove_tract",
    "traced",
    "tract",
    "tract_gradient",
]
