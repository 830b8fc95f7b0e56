"""The smallest run of ``netwright design`` that has every part; several test files share one."""

from __future__ import annotations

TINY = {
    "search_epochs": 3,
    "search_channels": 2,
    "channels": 4,
    "epochs": 4,
    "baseline": "small_convnet",
    "space": "micro-darts-2-shared",
    "sparsity": 0.8,
    "seed": 1,
}
ARGUMENTS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]


def brief() -> None:
    """Gives the exact engine one second for the radii of a run in place of 20: such a run takes half the time."""
    from netwright.design import timing

    timing.SOLVER_SECONDS = 1.0
