"""Linear state-space layers: sequences as recurrence, convolution and continuous time at once.

Gu et al., "Combining Recurrent, Convolutional, and Continuous-time Models with Linear State-Space Layers", NeurIPS
2021, arXiv:2110.13985.
"""

from netwright.nn.lssl.convolution import causal_conv, krylov, ssm_kernel, two_sided_conv
from netwright.nn.lssl.discretization import discretize_gbt
from netwright.nn.lssl.layer import LSSL, param_groups
from netwright.nn.lssl.measures import hippo
from netwright.nn.lssl.model import LSSLBlock, LSSLModel
from netwright.nn.lssl.quasiseparable import QuasiSeparable, tridiagonal_solve

__all__ = [
    "LSSL",
    "LSSLBlock",
    "LSSLModel",
    "QuasiSeparable",
    "causal_conv",
    "discretize_gbt",
    "hippo",
    "krylov",
    "param_groups",
    "ssm_kernel",
    "tridiagonal_solve",
    "two_sided_conv",
]
