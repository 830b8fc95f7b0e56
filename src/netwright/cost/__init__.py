"""What a network costs: parameters, multiply-adds, memory and time, with one definition for every part of netwright.

Multiply-adds (MACs) are those of convolutions and matrix products; what papers call "FLOPs" is usually this
number. A convolution has k_h k_w (C_in / groups) C_out H_out W_out of them.
"""

from netwright.cost.allocator import memory_kept
from netwright.cost.counting import Cost, LayerCost, count
from netwright.cost.memory import saved_bytes
from netwright.cost.pace import Pace
from netwright.cost.timing import (
    Comparison,
    LatencyTable,
    Timing,
    alternate,
    compare_times,
    cpu_name,
    threads,
    turn,
)

__all__ = [
    "Comparison",
    "Cost",
    "LatencyTable",
    "LayerCost",
    "Pace",
    "Timing",
    "alternate",
    "compare_times",
    "count",
    "cpu_name",
    "memory_kept",
    "saved_bytes",
    "threads",
    "turn",
]
