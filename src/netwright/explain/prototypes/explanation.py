"""What a prototype classifier has to say, after Li et al., AAAI 2018, arXiv:1710.04806: data, text, picture, page."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from torch import Tensor

from netwright.console import table
from netwright.results import Result, new_axes, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from netwright.page import Images


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation(Result):
    """Why a batch is classified as it is.

    Attributes:
        distances: Squared distance of each example to each prototype.
        contributions: What each prototype adds to each logit: weight times distance. Their sum over the prototypes is
            the logit.
        logits: (batch, classes).
        nearest: Numbers of the nearest prototypes, the nearest first.
        prototype_classes: The class that nearness to each prototype speaks for.
        classes: Names of the classes.
        inputs: The examples.
        decoded: Every prototype as an input; None without a decoder.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from netwright.explain import PrototypeClassifier
        >>> network = PrototypeClassifier(nn.Identity(), None, 2, 2, input_shape=(2,))
        >>> _ = network.load_state_dict(network.state_dict() | {
        ...     "prototype_layer.prototypes": torch.tensor([[0.0, 0], [2, 0]]), "linear.weight": -torch.eye(2)})
        >>> print(network.explain(torch.tensor([[0.0, 1.0]]), nearest=2, classes=["left", "right"]))
        example  class  nearest prototypes
        0        left   0 (left) at 1; 1 (right) at 5
    """

    distances: Float[Tensor, "batch prototypes"]
    contributions: Float[Tensor, "batch classes prototypes"]
    logits: Float[Tensor, "batch classes"]
    nearest: Int[Tensor, "batch nearest"]
    prototype_classes: Int[Tensor, " prototypes"]
    classes: tuple[str, ...]
    inputs: Float[Tensor, "batch ..."]
    decoded: Float[Tensor, "prototypes ..."] | None

    @property
    def predicted(self) -> tuple[str, ...]:
        """The most probable class of each example, by name."""
        return tuple(self.classes[i] for i in self.logits.argmax(1).tolist())

    def to_dict(self) -> dict[str, Any]:
        """All but the pictures: for each example its class and its nearest prototypes, then the matrices."""
        examples = [
            {"class": name, "nearest": [dataclasses.asdict(case) for case in self.cases(i)]}
            for i, name in enumerate(self.predicted)
        ]
        matrices = {name: plain(getattr(self, name)) for name in ("logits", "distances", "contributions")}
        return {
            "examples": examples,
            **matrices,
            "prototype_classes": [self.classes[i] for i in self.prototype_classes],
        }

    def cases(self, example: int) -> list[NearPrototype]:
        """The nearest prototypes of one example, the nearest first.

        Raises:
            IndexError: If there is no such example.
        """
        if not -len(self.logits) <= example < len(self.logits):
            raise IndexError(f"example must lie in [0, {len(self.logits)}), got {example}")
        best = int(self.logits[example].argmax())
        return [
            NearPrototype(
                prototype=number,
                label=self.classes[int(self.prototype_classes[number])],
                distance=float(self.distances[example, number]),
                contribution=float(self.contributions[example, best, number]),
            )
            for number in self.nearest[example].tolist()
        ]

    def __str__(self) -> str:
        rows = [[str(i), name, "; ".join(map(str, self.cases(i)))] for i, name in enumerate(self.predicted)]
        return table(rows, ["example", "class", "nearest prototypes"])

    def plot(self, ax: Axes | None = None, *, example: int = 0) -> Axes:
        """One example beside its nearest prototypes, with their class and squared distance; bars without a decoder.

        Raises:
            IndexError: If there is no such example.
        """
        cases = self.cases(example)
        if self.decoded is None:
            ax = new_axes(ax)
            ax.barh([f"{case.prototype}: {case.label}" for case in cases], [case.distance for case in cases])
            ax.invert_yaxis()
            ax.set_xlabel("squared distance")
            ax.set_title(f"taken for {self.predicted[example]}", parse_math=False)
            return ax
        from netwright.data.loading import draw

        shown = [(f"taken for\n{self.predicted[example]}", as_picture(self.inputs[example]))]
        shown += [(f"{c.label}\nat {c.distance:.3g}", as_picture(self.decoded[c.prototype])) for c in cases]
        return draw(shown, ax, columns=len(shown))

    def images(self, example: int = 0) -> Images:
        """The same as a block of a page: the example and its nearest prototypes as small pictures.

        Raises:
            IndexError: If there is no such example.
            ValueError: If the network has no decoder.
        """
        from netwright.page import Images, Picture, png

        if self.decoded is None:
            raise ValueError("decoder must be given to show prototypes, got None")
        items = [Picture(png(_pixels(self.inputs[example])), f"taken for {self.predicted[example]}")]
        items += [
            Picture(
                png(_pixels(self.decoded[case.prototype])),
                f"prototype {case.prototype}, {case.label}: squared distance {case.distance:.3g}",
            )
            for case in self.cases(example)
        ]
        reading = "The picture and the learned cases that the network finds it nearest to, the nearest first."
        return Images(items, reading)


@dataclasses.dataclass(frozen=True)
class NearPrototype:
    """A prototype that is near to an example.

    Attributes:
        prototype: Its number.
        label: The class it stands for.
        distance: Squared, in the latent space.
        contribution: What it adds to the logit of the predicted class.
    """

    prototype: int
    label: str
    distance: float
    contribution: float

    def __str__(self) -> str:
        return f"{self.prototype} ({self.label}) at {self.distance:.3g}"


@dataclasses.dataclass(frozen=True, eq=False)
class NearestCases(Result):
    """The examples of a data set that are nearest to each prototype in the latent space.

    Attributes:
        distances: Squared distances, the least first.
        places: Where each example stands in the order of the loader.
        labels: Its class.
        inputs: The examples themselves.
        encodings: Their latent vectors.
        prototype_classes: The class that nearness to each prototype speaks for.
        decoded: Every prototype as an input; None without a decoder.
    """

    distances: Float[Tensor, "prototypes k"]
    places: Int[Tensor, "prototypes k"]
    labels: Int[Tensor, "prototypes k"]
    inputs: Float[Tensor, "prototypes k ..."]
    encodings: Float[Tensor, "prototypes k dim"]
    prototype_classes: Int[Tensor, " prototypes"]
    decoded: Float[Tensor, "prototypes ..."] | None = None

    @property
    def majority(self) -> Int[Tensor, " prototypes"]:
        """The commonest class among the examples nearest to each prototype; of several the smallest."""
        return self.labels.cpu().mode(1).values

    @property
    def agreement(self) -> float:
        """Share of prototypes whose class is the commonest among the examples nearest to them."""
        return float((self.prototype_classes.cpu() == self.majority).float().mean())

    def to_dict(self) -> dict[str, Any]:
        """All but the examples."""
        names = ("distances", "places", "labels", "prototype_classes")
        return {**{name: plain(getattr(self, name)) for name in names}, "agreement": self.agreement}

    def __str__(self) -> str:
        rows = [
            [number, stands, " ".join(map(str, labels)), f"{distances[0]:.3g}"]
            for number, (stands, labels, distances) in enumerate(
                zip(self.prototype_classes.tolist(), self.labels.tolist(), self.distances.tolist(), strict=True)
            )
        ]
        return table(rows, ["prototype", "class", "classes of the nearest", "at least at"])

    def plot(self, ax: Axes | None = None) -> Axes:
        """A line for each prototype: itself, where it can be decoded, then the examples nearest to it."""
        from netwright.data.loading import draw

        shown = []
        for number, stands in enumerate(self.prototype_classes.tolist()):
            if self.decoded is not None:
                shown.append((f"prototype {number}\nclass {stands}", as_picture(self.decoded[number])))
            shown += [
                (f"class {label}\nat {distance:.3g}", as_picture(example))
                for label, distance, example in zip(
                    self.labels[number].tolist(), self.distances[number].tolist(), self.inputs[number], strict=True
                )
            ]
        return draw(shown, ax, columns=len(shown) // len(self.prototype_classes))


def as_picture(example: Float[Tensor, "..."]) -> Float[Tensor, "channels height width"]:
    """An example as something that can be drawn: a grey or colour picture, or a sequence as one line of pixels.

    Example:
        >>> import torch
        >>> as_picture(torch.rand(5)).shape, as_picture(torch.rand(7, 4, 4)).shape
        (torch.Size([1, 1, 5]), torch.Size([1, 4, 4]))
    """
    example = example.detach().cpu().float()
    if example.ndim == 3:
        return example if example.shape[0] in {1, 3} else example.mean(0, keepdim=True)
    return example[None] if example.ndim == 2 else example.reshape(1, 1, -1)


def _pixels(example: Tensor) -> Any:
    return as_picture(example).permute(1, 2, 0).numpy()
