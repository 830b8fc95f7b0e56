"""Several methods one after the other, and what each of them did to accuracy, size and speed.

The order is that in which nothing is lost again: a smaller student (``distill``), two factors for a layer
(``low-rank``), zeros (``prune``), few bits (``quantize``). With training data every step is trained, and the network
that was given is the teacher throughout (Hinton et al., 2015, arXiv:1503.02531); without, weights are only cut and
rounded.
"""

from netwright.compress.chain.measured import Compression, Measured
from netwright.compress.chain.running import compress, packed, unpacked
from netwright.compress.chain.steps import (
    Alternate,
    Distill,
    LearnLevels,
    LowRank,
    Maestro,
    Prune,
    Quantize,
    Step,
    Training,
)

__all__ = [
    "Alternate",
    "Compression",
    "Distill",
    "LearnLevels",
    "LowRank",
    "Maestro",
    "Measured",
    "Prune",
    "Quantize",
    "Step",
    "Training",
    "compress",
    "packed",
    "unpacked",
]
