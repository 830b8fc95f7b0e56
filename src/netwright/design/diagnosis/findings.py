"""What a diagnosis is given, and what it gives: figures, a chart, and two sentences on how to read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from netwright.page import Block, Figure, Section

CHUNK = 256


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each example, in nats."""
    return functional.cross_entropy(logits, labels, reduction="none")


class NotApplicable(ValueError):
    """A diagnosis has nothing to say of this network or these data."""


@dataclass(frozen=True)
class Sample:
    """A trained network and examples that it was trained on.

    Attributes:
        network: Takes standardised inputs and gives logits; in evaluation mode.
        images: (examples, channels, height, width), as they are in the data.
        labels: (examples,).
        classes: Names of the labels.
        normalise: Standardises images.
        picture: Whether the images can be shown.
        training: What the run recorded of its epochs, as ``training.json`` holds it; empty where there is no record.
    """

    network: nn.Module
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    normalise: Callable[[Tensor], Tensor]
    picture: bool
    training: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, chosen: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Standardised inputs and labels of the chosen examples in their order, or of all."""
        chosen = torch.arange(len(self)) if chosen is None else chosen
        for part in chosen.split(CHUNK):
            yield self.normalise(self.images[part]), self.labels[part]


@dataclass(frozen=True)
class Finding:
    """What one diagnosis found.

    Attributes:
        title: Heading.
        verdict: One sentence with the main figure, which stands at the head of the page.
        chart: Inline SVG.
        reading: How to read the chart, and what to make of it: a sentence each.
        figures: All figures, for programs.
        blocks: What is shown beneath the chart.
        details: What is shown on a click.
    """

    title: str
    verdict: str
    chart: str
    reading: tuple[str, str]
    figures: Mapping[str, Any]
    blocks: Sequence[Block] = ()
    details: Sequence[Block] = field(default_factory=tuple)

    def sections(self) -> list[Section]:
        """The part of the page about it."""
        found = [Section(self.title, [Figure(self.chart, " ".join(self.reading)), *self.blocks])]
        return [*found, Section(f"{self.title}: details", self.details, folded=True)] if self.details else found


Diagnosis = Callable[[Sample], Finding]
