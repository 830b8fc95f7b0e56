"""What training methods leave in a run besides weights: doubted labels, accuracies by bias, transformed samples."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from netwright.design import debiasing, label_doubts, transformed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from netwright.data import Data
    from netwright.design.run import RunFolder
    from netwright.page import Block

# Each part is a module with ``write``, ``read``, ``lines`` and ``blocks``, by its name in the figures of a page.
PARTS: dict[str, tuple[str, ModuleType]] = {
    "doubts": ("Labels to check", label_doubts),
    "bias": ("Bias", debiasing),
    "natra": ("Natural transformations", transformed),
}


def write(
    run: RunFolder, methods: Sequence[Any], network: nn.Module, data: Data, changed: Tensor | None = None
) -> None:
    """Leaves what the methods have to say; of methods that have nothing to say nothing.

    Args:
        run: Whose folder.
        methods: That were trained with.
        network: What came of it, for images that ``data`` normalises.
        data: That was trained on.
        changed: Which training labels were made wrong on purpose, if any were.
    """
    for _, part in PARTS.values():
        part.write(run, methods, network, data, changed)


def lines(run: RunFolder) -> list[str]:
    """What the terminal says."""
    return [line for _, part in PARTS.values() for line in part.lines(run)]


def blocks(run: RunFolder, name: str) -> list[Block]:
    """The section of a page; empty where there is nothing to say.

    Args:
        run: Whose folder.
        name: One of :data:`PARTS`.

    Raises:
        UserError: If a file is damaged.
    """
    found: list[Block] = PARTS[name][1].blocks(run)
    return found


def figures(run: RunFolder) -> dict[str, Any]:
    """The figures of the parts that there are, by name."""
    found = {name: part.read(run) for name, (_, part) in PARTS.items()}
    return {name: each for name, each in found.items() if each is not None}
