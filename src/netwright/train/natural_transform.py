"""Training with natural transformations (arXiv:2105.04070): what :mod:`netwright.train.natra` has, by its long name."""

from netwright.train.natra import *  # noqa: F403
from netwright.train.natra import __all__  # noqa: F401
