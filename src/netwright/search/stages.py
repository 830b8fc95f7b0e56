"""Stages of a search: how long, and with which learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from netwright.checks import number, whole


@dataclass(frozen=True)
class Stage:
    """One stage of a search.

    Attributes:
        name: What the stage is called in figures and errors.
        epochs: Epochs, 0 to pass through it.
        lr, lr_min: Learning rate of the weights at its start and its end; a cosine joins them.
        weight_decay: Weight decay of the weights.
        alpha_step: Whether the architecture is updated.
        wait: Share of the stage, in [0, 1), for which the architecture waits first. Operations without weights are
            good from the first step on, so that of an architecture that moves at once they are soon a large part.

    Raises:
        ValueError: If a value is out of range.
    """

    name: str = "search"
    epochs: int = 50
    lr: float = 0.025
    lr_min: float = 0.001
    weight_decay: float = 3e-4
    alpha_step: bool = True
    wait: float = 0.0

    def __post_init__(self) -> None:
        whole(f"epochs of stage {self.name!r}", self.epochs, ">= 0")
        number(f"lr of stage {self.name!r}", self.lr, "> 0")
        number(f"lr_min of stage {self.name!r}", self.lr_min, f"[0, {self.lr}]")
        number(f"weight_decay of stage {self.name!r}", self.weight_decay, ">= 0")
        number(f"wait of stage {self.name!r}", self.wait, "[0, 1)")

    def moves(self, progress: float) -> bool:
        """Whether the architecture is updated after a share ``progress`` of the stage.

        Example:
            >>> Stage(wait=0.5).moves(0.4), Stage(wait=0.5).moves(0.5)
            (False, True)
        """
        return self.alpha_step and progress >= self.wait

    def lr_at(self, progress: float) -> float:
        """The learning rate after a share ``progress`` in [0, 1] of the stage.

        Example:
            >>> stage = Stage(lr=0.025, lr_min=0.001)
            >>> stage.lr_at(0.0), round(stage.lr_at(0.5), 4), stage.lr_at(1.0)
            (0.025, 0.013, 0.001)
        """
        return self.lr_min + (self.lr - self.lr_min) * (1 + math.cos(math.pi * progress)) / 2
