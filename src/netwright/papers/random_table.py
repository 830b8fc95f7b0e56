"""Random architectures of a small space, trained alike: what the finding of a search is ranked among.

A search on a space of a thousand architectures can be told its true rank, as on a tabular benchmark, when enough of
them have been trained. Every entry of the table is trained by one protocol (:func:`score`): Fashion-MNIST at 16x16, the
same images for all, SGD with one cosine; its accuracy on test images is the entry. What a search found is trained by
the same function and ranked by :meth:`RandomTable.percentile`.

Entries are kept in netwright's cache under the digest of all that decides them, so experiments share them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from netwright.results import Result, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from netwright.papers.run import Run

LR = 0.1
BATCH = 64


@dataclass(frozen=True)
class RandomTable(Result):
    """Test accuracies of random architectures of one space.

    Attributes:
        space: Name of the space.
        accuracies: One for each architecture, in [0, 1], in the order drawn.
        parameters: Number of weights of each.
        genotypes: Each as plain values.
    """

    space: str
    accuracies: tuple[float, ...]
    parameters: tuple[int, ...]
    genotypes: tuple[dict[str, Any], ...]

    def percentile(self, accuracy: float) -> float:
        """Share of the architectures that ``accuracy`` beats, ties counting half, in percent.

        Example:
            >>> RandomTable("a-space", (0.5, 0.6, 0.6, 0.7), (1, 1, 1, 1), ({}, {}, {}, {})).percentile(0.6)
            50.0
        """
        from netwright.search.random_search import percentile

        return percentile(self.accuracies, accuracy)

    def figures(self) -> dict[str, list[Any]]:
        """The table as an arm of the evidence."""
        return {"accuracy": list(self.accuracies), "parameters": list(self.parameters)}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy over the number of weights."""
        ax = new_axes(ax)
        ax.plot(self.parameters, self.accuracies, ".", color="0.5")
        ax.set_xlabel("weights")
        ax.set_ylabel("test accuracy")
        return ax


def sizes(run: Run) -> list[int]:
    """Training images, epochs and test images of the protocol, noted in the run's settings."""
    return [
        run.size("table: training images", full=4000, fast=64, specified=6000, scaled=False),
        run.size("table: epochs", full=2, fast=1, scaled=False),
        run.size("table: test images", full=4000, fast=250, specified=10_000, scaled=False),
    ]


def tabulate(run: Run, space: str) -> RandomTable:
    """The table of a space, trained where the cache does not hold it yet.

    Args:
        run: The reproduction; its fast budget makes a table of three.
        space: A name of :data:`netwright.search.spaces.SPACES`.
    """
    from netwright.search import spaces
    from netwright.search.random_search import uniform_genotypes

    count = run.size("table: random architectures", full=100, fast=3, specified=200, scaled=False)
    drawn = [genotype.to_dict() for genotype in uniform_genotypes(spaces.get(space), count, seed=0)]
    protocol = sizes(run)
    found = run.arms(
        {f"table {space} {number}": [genotype, protocol] for number, genotype in enumerate(drawn)}, score, seeds=[0]
    )
    return RandomTable(
        space,
        tuple(entry["accuracy"][0] for entry in found.values()),
        tuple(entry["parameters"][0] for entry in found.values()),
        tuple(drawn),
    )


def score(seed: int, genotype: dict[str, Any], protocol: Sequence[int]) -> dict[str, Any]:
    """The arm that trains one architecture by the protocol of the table.

    Args:
        seed: Of the initial weights and the order of the images; the images are the same for every seed.
        genotype: A genotype's plain values.
        protocol: What :func:`sizes` gives.

    Returns:
        ``accuracy`` on the test images, in [0, 1], and ``parameters``.
    """
    from netwright.storage import cache_folder, digest, read_json, write_json

    path = cache_folder("random-table") / f"{digest(_protocol(), seed, genotype, list(protocol))}.json"
    if path.is_file():
        kept: dict[str, Any] = read_json(path)
        return kept
    figures = _train(seed, genotype, protocol)
    write_json(path, figures)
    return figures


@functools.cache
def _protocol() -> str:
    """A digest of the code that decides what an entry is."""
    import inspect
    from pathlib import Path

    import torch

    from netwright.data import tensors
    from netwright.papers import small_images
    from netwright.search import spaces
    from netwright.storage import digest, file_digest
    from netwright.train import classifier, fitting, schedules

    files = [inspect.getfile(module) for module in (tensors, small_images, fitting, classifier, schedules)] + [__file__]
    files += sorted(str(path) for path in Path(inspect.getfile(spaces)).parent.glob("*.py"))
    return digest(torch.__version__, *(file_digest(file) for file in files))


def _train(seed: int, genotype: dict[str, Any], protocol: Sequence[int]) -> dict[str, Any]:
    from netwright.papers import small_images
    from netwright.search.genotype import Genotype

    images, epochs, test = protocol
    parts, normalise = small_images.parts(0, images, 0, test)
    network = Genotype.from_dict(genotype).build(1, 10, seed=seed)
    accuracy = small_images.trained_accuracy(
        network, parts["train"], parts["test"], normalise, batch=BATCH, epochs=epochs, lr=LR, seed=seed
    )
    return {"accuracy": accuracy, "parameters": sum(p.numel() for p in network.parameters())}
