"""The learned cases that a network goes by, as ``netwright explain`` shows them beside its maps.

Li et al., "Deep Learning for Case-Based Reasoning through Prototypes", AAAI 2018, arXiv:1710.04806.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from netwright.console import UserError, table
from netwright.explain.prototypes import NearPrototype, explain_by_prototypes, find_prototypes
from netwright.page import Block, Paragraph, Section, Table
from netwright.results import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


NEAREST = 3
MOST_SHOWN = 20  # images on a page
FOLDER = "prototypes"

Near = tuple[NearPrototype, ...]


class Cases:
    """Collects the nearest prototypes of images, batch by batch; of a network without prototypes nothing.

    Args:
        network: Any network.
        classes: Names of the classes, used where there is one for each output.

    Attributes:
        near: The nearest prototypes of every image so far, the nearest first.
    """

    def __init__(self, network: nn.Module, classes: Sequence[str] | None):
        self.network, found = network, find_prototypes(network)
        self.here = found is not None
        outputs = 0 if found is None else len(found.linear.weight)
        self.classes = tuple(classes) if classes is not None and len(classes) == outputs else ()
        self.most = 0 if found is None else min(NEAREST, found.prototype_layer.n_prototypes)
        self.near: list[Near] = []
        self._blocks: list[Block] = []
        self._rows: list[list[str]] = []

    def add(self, x: Tensor, names: Sequence[str], folder: Path, dpi: int) -> None:
        """Takes in a batch, and writes a picture of each image beside its nearest cases where these can be decoded.

        Args:
            x: Inputs, as the network takes them.
            names: Of the images, with which the pictures are named.
            folder: Where the pictures are written to.
            dpi: Of the pictures.
        """
        if not self.here:
            return
        try:
            found = explain_by_prototypes(self.network, x, nearest=self.most, classes=self.classes)
        except ValueError as error:
            raise UserError(f"the nearest prototypes cannot be told: {error}") from error
        for i, name in enumerate(names):
            cases = tuple(found.cases(i))
            self.near.append(cases)
            self._rows.append([name, found.predicted[i], _told(cases)])
            if found.decoded is not None:
                (folder / FOLDER).mkdir(exist_ok=True)
                save_figure(cast("Figure", found.plot(example=i).figure), folder / FOLDER / name, dpi=dpi)
                if len(self._blocks) < MOST_SHOWN:
                    block = found.images(i)
                    self._blocks.append(dataclasses.replace(block, reading="") if self._blocks else block)

    def section(self) -> list[Section]:
        """What the page says; nothing without prototypes."""
        if not self.near:
            return []
        reading = (
            "The network compares each image with learned cases and sees nothing else of it: the class follows from "
            "the squared distances alone, so what stands here is why it answers as it does."
        )
        blocks: list[Block] = [Paragraph(reading)]
        if self._blocks and len(self._blocks) < len(self.near):
            blocks.append(Paragraph(f"Pictures of the first {len(self._blocks)} images; the others are files."))
        blocks += self._blocks
        blocks.append(
            Table(["image", "taken for", "nearest cases"], self._rows, "The number of a case, and its class.")
        )
        return [Section("Nearest learned cases", blocks)]


def told(files: Sequence[str], near: Sequence[Near]) -> str:
    """A line an image."""
    return table([[file, _told(cases)] for file, cases in zip(files, near, strict=True)], ["image", "nearest cases"])


def _told(cases: Near) -> str:
    return "; ".join(map(str, cases))
