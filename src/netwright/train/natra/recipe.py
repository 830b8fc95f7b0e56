"""How natural transformations are made of a data set: the numbers that can be chosen."""

from __future__ import annotations

import dataclasses

from netwright.results import Result
from netwright.train.natra.directions import FILTER_STEP, Method

GENERATOR_IMAGES = 10_000  # images an epoch of the generator has at most, and all of the reference classifier's
GENERATOR_BATCH = 64
INVERSIONS = 5_000 * 30  # gradient steps of inversion over all images, at most


@dataclasses.dataclass(frozen=True)
class Recipe(Result):
    """How natural transformations are made of a data set.

    Attributes:
        generator_steps: Gradient steps of the generator, 64 images each, >= 1; whole epochs are made of them, of 10,000
            images at most, each of other ones until all have been seen.
        gan_steps: Further steps against a critic (WGAN-GP), which sharpen what it makes, >= 0; each takes several times
            as long.
        w_dim: Numbers in a code, >= 1.
        inversion_steps: Gradient steps from the encoder's guess, >= 0; None is 30, fewer for more than 5,000 images.
        num_codes: Codes for each image, >= 1.
        directions: ``"weights"`` or ``"pca"``.
        candidates: Directions that are looked at, >= 1.
        max_directions: Directions that are kept, >= 1.
        max_flip: Largest share of predictions that a kept direction changes, in [0, 1].
        min_change: Least root mean square change of a pixel, >= 0.
        reference_epochs: Of the classifier by which directions are chosen, >= 1; it learns from 10,000 images at most.
        step: Step along a direction, both ways, at which ``max_flip`` and ``min_change`` hold, in standard deviations,
            > 0; no smaller than the steps that are trained with.

    Raises:
        ValueError: If a number is out of its range.
    """

    generator_steps: int = 2000
    gan_steps: int = 0
    w_dim: int = 32
    inversion_steps: int | None = None
    num_codes: int = 1
    directions: Method = "weights"
    candidates: int = 20
    max_directions: int = 10
    max_flip: float = 0.1
    min_change: float = 0.02
    reference_epochs: int = 10
    step: float = FILTER_STEP

    def __post_init__(self) -> None:
        least = {
            "generator_steps": 1, "gan_steps": 0, "w_dim": 1, "inversion_steps": 0, "num_codes": 1, "candidates": 1,
            "max_directions": 1, "reference_epochs": 1,
        }  # fmt: skip
        for name, bound in least.items():
            value = getattr(self, name)
            if value is None and name == "inversion_steps":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < bound:
                raise ValueError(f"{name} must be a whole number >= {bound}, got {value!r}")
        if self.directions not in ("weights", "pca"):
            raise ValueError(f"directions must be 'weights' or 'pca', got {self.directions!r}")
        if not isinstance(self.max_flip, (int, float)) or not 0 <= self.max_flip <= 1:
            raise ValueError(f"max_flip must lie in [0, 1], got {self.max_flip!r}")
        if not isinstance(self.min_change, (int, float)) or not 0 <= self.min_change < float("inf"):
            raise ValueError(f"min_change must be >= 0 and finite, got {self.min_change!r}")
        if not isinstance(self.step, (int, float)) or not 0 < self.step < float("inf"):
            raise ValueError(f"step must be > 0 and finite, got {self.step!r}")

    def epochs_for(self, count: int) -> int:
        """Epochs of the generator on so many images."""
        return max(1, round(self.generator_steps / max(1, count // GENERATOR_BATCH)))

    def steps_for(self, count: int) -> int:
        """Gradient steps of the inversion of so many images."""
        return min(30, INVERSIONS // max(1, count)) if self.inversion_steps is None else self.inversion_steps
