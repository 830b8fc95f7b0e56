"""Labels made wrong on purpose, with what was changed: by lot, by confusion of classes, or by what an image shows.

:func:`with_noisy_labels` does it to a loaded data set; the functions below it to labels alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from netwright.checks import one_of
from netwright.data.tensors import Batches
from netwright.seeding import stream

if TYPE_CHECKING:
    from netwright.data.loading import Data

NoiseKind = Literal["symmetric", "asymmetric", "instance"]
NOISE_KINDS: tuple[NoiseKind, ...] = ("symmetric", "asymmetric", "instance")

# Truck -> automobile, bird -> airplane, cat <-> dog, deer -> horse: what people confuse in CIFAR-10.
CIFAR10_CONFUSIONS = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# The five classes of each super-class of CIFAR-100 (Krizhevsky, 2009), whose labels are in the order of the alphabet.
CIFAR100_SUPERCLASSES = (
    "beaver dolphin otter seal whale",
    "aquarium_fish flatfish ray shark trout",
    "orchid poppy rose sunflower tulip",
    "bottle bowl can cup plate",
    "apple mushroom orange pear sweet_pepper",
    "clock keyboard lamp telephone television",
    "bed chair couch table wardrobe",
    "bee beetle butterfly caterpillar cockroach",
    "bear leopard lion tiger wolf",
    "bridge castle house road skyscraper",
    "cloud forest mountain plain sea",
    "camel cattle chimpanzee elephant kangaroo",
    "fox porcupine possum raccoon skunk",
    "crab lobster snail spider worm",
    "baby boy girl man woman",
    "crocodile dinosaur lizard snake turtle",
    "hamster mouse rabbit shrew squirrel",
    "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "bicycle bus motorcycle pickup_truck train",
    "lawn_mower rocket streetcar tank tractor",
)


def symmetric_noise(
    labels: Int[Tensor, " examples"],
    rate: float,
    num_classes: int,
    generator: Generator,
    exclude_true: bool = False,
) -> tuple[Int[Tensor, " examples"], Bool[Tensor, " examples"]]:
    """Draws the labels of a share of the examples anew, uniformly over the classes.

    Args:
        labels: In 0..num_classes - 1.
        rate: Share of the examples whose label is drawn anew, rounded up, in [0, 1].
        num_classes: C; without ``exclude_true`` a share 1 / C of the new labels is right by chance.
        generator: Of the choice and of the labels.
        exclude_true: Draw among the other classes, so that every new label is wrong.

    Returns:
        The labels, and which of them are other than before.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> labels, generator = torch.zeros(10, dtype=torch.int64), Generator().manual_seed(0)
        >>> noisy, changed = symmetric_noise(labels, 0.3, 5, generator, exclude_true=True)
        >>> int(changed.sum()), bool((noisy[~changed] == 0).all())
        (3, True)
    """
    _check(labels, rate, num_classes)
    count = math.ceil(rate * len(labels) - 1e-9)
    chosen = torch.randperm(len(labels), generator=generator)[:count]
    noisy = labels.clone()
    if exclude_true:
        shift = torch.randint(1, num_classes, (count,), generator=generator)
        noisy[chosen] = (labels[chosen] + shift) % num_classes
    else:
        noisy[chosen] = torch.randint(0, num_classes, (count,), generator=generator)
    return noisy, noisy != labels


def _check(labels: Tensor, rate: float, num_classes: int) -> None:
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"labels must be one whole number an example, got {labels.dtype} of {tuple(labels.shape)}")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must lie in [0, 1], got {rate}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be >= 2, got {num_classes}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"labels must lie in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}")


def next_class(num_classes: int, groups: Sequence[int] | None = None) -> dict[int, int]:
    """Each class to the next one, the last to the first; the confusions of CIFAR-100 stay within its super-classes.

    Args:
        num_classes: At least 2.
        groups: The super-class of each class; a class that is alone in its group is confused with none.

    Raises:
        ValueError: If there are fewer than two classes, or not one group a class.

    Example:
        >>> next_class(3), next_class(5, groups=[0, 1, 0, 1, 2])
        ({0: 1, 1: 2, 2: 0}, {0: 2, 2: 0, 1: 3, 3: 1})
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be >= 2, got {num_classes}")
    if groups is not None and len(groups) != num_classes:
        raise ValueError(f"groups must be {num_classes} numbers, got {len(groups)}")
    members: dict[int, list[int]] = {}
    for label in range(num_classes):
        members.setdefault(0 if groups is None else groups[label], []).append(label)
    return {
        label: group[(place + 1) % len(group)]
        for group in members.values()
        if len(group) > 1
        for place, label in enumerate(group)
    }


def confusions(classes: Sequence[str]) -> dict[int, int]:
    """Which class is taken for which in the literature on wrong labels, by the names of the classes.

    Those of CIFAR-10 have :data:`CIFAR10_CONFUSIONS`, in whatever order they are; each class of CIFAR-100 becomes the
    next of its super-class; elsewhere :func:`next_class` holds.

    Args:
        classes: Their names, at least 2.

    Example:
        >>> confusions(CIFAR10_CLASSES) == CIFAR10_CONFUSIONS, confusions(["a", "b"])
        (True, {0: 1, 1: 0})
    """
    place = {name: label for label, name in enumerate(classes)}
    if set(classes) == set(CIFAR10_CLASSES):
        pairs = ((CIFAR10_CLASSES[label], CIFAR10_CLASSES[other]) for label, other in CIFAR10_CONFUSIONS.items())
        return {place[name]: place[other] for name, other in pairs}
    groups = {name: group for group, names in enumerate(CIFAR100_SUPERCLASSES) for name in names.split()}
    if set(classes) == set(groups):
        return next_class(len(classes), [groups[name] for name in classes])
    return next_class(len(classes))


def asymmetric_noise(
    labels: Int[Tensor, " examples"], rate: float, mapping: Mapping[int, int], generator: Generator
) -> tuple[Int[Tensor, " examples"], Bool[Tensor, " examples"]]:
    """Confuses classes: every label that ``mapping`` names becomes the other one with probability ``rate``.

    Args:
        labels: At least 0.
        rate: In [0, 1].
        mapping: Class to the class it is taken for: :func:`confusions`, :data:`CIFAR10_CONFUSIONS`, :func:`next_class`.
        generator: Of the choice; one number an example is drawn, whatever the mapping.

    Returns:
        The labels, and which of them are other than before.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> noisy, changed = asymmetric_noise(torch.tensor([0, 1, 2, 3]), 1.0, {3: 5, 5: 3}, Generator())
        >>> noisy.tolist(), changed.tolist()
        ([0, 1, 2, 5], [False, False, False, True])
    """
    named = [*mapping.keys(), *mapping.values()]
    if named and min(named) < 0:
        raise ValueError(f"mapping must name classes >= 0, got {min(named)}")
    _check(labels, rate, max(2, 1 + int(labels.max()) if len(labels) else 0))
    table = torch.arange(1 + max([*named, int(labels.max()) if len(labels) else 0]))
    for label, other in mapping.items():
        table[label] = other
    chosen = torch.rand(len(labels), generator=generator, dtype=torch.float64) < rate
    noisy = torch.where(chosen, table[labels.long()].to(labels.dtype), labels)
    return noisy, noisy != labels


def instance_noise(
    labels: Int[Tensor, " examples"],
    features: Float[Tensor, "examples features"],
    rate: float,
    num_classes: int,
    generator: Generator,
    std: float = 0.1,
) -> tuple[Int[Tensor, " examples"], Bool[Tensor, " examples"]]:
    """Labels go wrong by what an example shows: alike examples of a class are taken for the same other class.

    Xia et al., "Part-dependent Label Noise: Towards Instance-dependent Label Noise", NeurIPS 2020, arXiv:2006.07836:
    an example x of class y keeps its label with probability 1 - q; else it gets class c != y with probability
    proportional to exp((x W_y)_c), where q is normal with mean ``rate`` and deviation ``std``, cut to [0, 1], and the
    entries of W_y, one matrix a class, are standard normal.

    Args:
        labels: In 0..num_classes - 1.
        features: Of each example, standardised images say; the larger, the more the class is decided by them.
        rate: Probability of a wrong label, about, in [0, 1]; 0 and 1 are exact.
        num_classes: At least 2.
        generator: Of everything.
        std: Deviation of q between examples, >= 0.

    Returns:
        The labels, and which of them are other than before.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> x = torch.randn(1000, 4, generator=Generator().manual_seed(0))
        >>> labels = torch.zeros(1000, dtype=torch.int64)
        >>> noisy, changed = instance_noise(labels, x, 0.3, 3, Generator().manual_seed(1))
        >>> 250 < int(changed.sum()) < 350
        True
    """
    _check(labels, rate, num_classes)
    if features.ndim != 2 or len(features) != len(labels) or not features.is_floating_point():
        raise ValueError(
            f"features must be {len(labels)} rows of floats, got {features.dtype} of {tuple(features.shape)}"
        )
    if not bool(features.isfinite().all()):
        raise ValueError("features must be finite, got NaN or infinity")
    if not 0 <= std < math.inf:
        raise ValueError(f"std must be >= 0 and finite, got {std}")
    flip = _cut_normal(len(labels), rate, std if 0 < rate < 1 else 0.0, generator)
    noisy = labels.clone()
    for label in range(num_classes):  # one matrix at a time: all of them need not fit in memory
        weights = torch.randn(features.shape[1], num_classes, generator=generator)
        own = (labels == label).nonzero()[:, 0]
        if len(own):
            logits = (features[own].float() @ weights).index_fill(1, torch.tensor([label]), -math.inf)
            probs = flip[own, None] * logits.double().softmax(1)
            probs[:, label] = 1 - flip[own]
            noisy[own] = torch.multinomial(probs, 1, generator=generator)[:, 0].to(labels.dtype)
    return noisy, noisy != labels


def _cut_normal(count: int, mean: float, std: float, generator: Generator) -> Tensor:
    """Normal numbers cut to [0, 1], by the inverse of the distribution function."""
    places = torch.rand(count, generator=generator, dtype=torch.float64)
    if std == 0:
        return torch.full((count,), mean, dtype=torch.float64)
    ends = torch.special.ndtr((torch.tensor([0.0, 1.0], dtype=torch.float64) - mean) / std)
    return (mean + std * torch.special.ndtri(torch.lerp(ends[0], ends[1], places))).clamp(0, 1)


def with_noisy_labels(
    data: Data,
    kind: NoiseKind,
    rate: float,
    *,
    seed: int = 0,
    parts: Sequence[str] = ("train",),
    mapping: Mapping[int, int] | None = None,
) -> tuple[Data, dict[str, Bool[Tensor, " examples"]]]:
    """A loaded data set with some labels made wrong; images, classes and the other parts stay.

    Args:
        data: As :func:`netwright.data.load` gives it.
        kind: ``"symmetric"`` draws another class by lot for exactly ``rate`` of the examples, ``"asymmetric"`` takes
            each class for another one (see ``mapping``), ``"instance"`` goes by the standardised images.
        rate: In [0, 1].
        seed: Of everything random.
        parts: Which parts: ``"train"``, ``"validation"``, ``"test"``.
        mapping: For asymmetric noise; by default :func:`confusions` of the classes' names.

    Returns:
        The data set, and for each of the parts which labels are other than before.

    Raises:
        ValueError: If ``kind``, ``rate`` or a part is unknown or out of its range.

    Example:
        >>> from netwright.data import load
        >>> noisy, changed = with_noisy_labels(load("digits"), "symmetric", 0.4)
        >>> int(changed["train"].sum()), len(noisy.train)
        (518, 1294)
    """
    one_of("kind", kind, NOISE_KINDS)
    if unknown := [name for name in parts if name not in data.parts]:
        raise ValueError(f"parts must be among {', '.join(data.parts)}, got {unknown[0]!r}")
    classes = len(data.classes)
    found: dict[str, Any] = {}
    changed: dict[str, Tensor] = {}
    for name in parts:
        images, generator = data.parts[name], stream(seed, "label noise", name)
        if kind == "symmetric":
            labels, changed[name] = symmetric_noise(images.labels, rate, classes, generator, exclude_true=True)
        elif kind == "asymmetric":
            taken_for = confusions(data.classes) if mapping is None else mapping
            if outside := [label for label in taken_for.values() if label >= classes]:
                raise ValueError(f"mapping must name classes below {classes}, got {outside[0]}")
            labels, changed[name] = asymmetric_noise(images.labels, rate, taken_for, generator)
        else:
            batches = Batches(images, 512, shuffle=False, drop_last=False, normalise=data.normalise())
            rows = torch.cat([x.flatten(1) for x, _ in batches])
            labels, changed[name] = instance_noise(images.labels, rows, rate, classes, generator)
        found[name] = images.with_labels(labels)
    return dataclasses.replace(data, **found), changed
