"""Everything that natural transformations need, from images and labels alone: generator, codes, directions, filter."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from netwright import storage
from netwright.console import UserError
from netwright.data import Batches, Normalise, TensorImages
from netwright.data.splits import subset
from netwright.data.tensors import scaled
from netwright.nn.convnet import SmallConvNet
from netwright.nn.modes import in_mode
from netwright.results import Result
from netwright.seeding import seeded
from netwright.train.classifier import Classifier
from netwright.train.fitting import fit
from netwright.train.natra.codes import LatentCodes
from netwright.train.natra.directions import FILTER_CODES, Directions, Method, filter_directions, latent_directions
from netwright.train.natra.fitting import Pictures, check_pictures, fit_style_autoencoder
from netwright.train.natra.generator import StyleAutoEncoder, StyleGenerator
from netwright.train.natra.inversion import BatchInverter
from netwright.train.natra.transform import NaturalTransform
from netwright.train.schedules import CosineProgress

GENERATOR_IMAGES = 10_000  # images an epoch of the generator sees at most, and one of the reference classifier
GENERATOR_BATCH = 64
INVERSIONS = 5_000 * 30  # gradient steps of inversion over all images, at most
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Recipe(Result):
    """How natural transformations are made of a data set.

    Attributes:
        generator_steps: Gradient steps of the generator, 64 images each, >= 1; whole epochs are made of them.
        w_dim: Numbers in a code, >= 1.
        inversion_steps: Gradient steps from the encoder's guess, >= 0; None is 30, fewer for more than 5,000 images.
        num_codes: Codes for each image, >= 1.
        directions: ``"weights"`` or ``"pca"``.
        candidates: Directions that are looked at, >= 1.
        max_directions: Directions that are kept, >= 1.
        max_flip: Largest share of predictions that a kept direction changes, in [0, 1].
        min_change: Least root mean square change of a pixel, >= 0.
        reference_epochs: Of the classifier by which directions are chosen, >= 1.

    Raises:
        ValueError: If a number is out of its range.
    """

    generator_steps: int = 2000
    w_dim: int = 32
    inversion_steps: int | None = None
    num_codes: int = 1
    directions: Method = "weights"
    candidates: int = 20
    max_directions: int = 10
    max_flip: float = 0.1
    min_change: float = 0.02
    reference_epochs: int = 10

    def __post_init__(self) -> None:
        least = {
            "generator_steps": 1, "w_dim": 1, "inversion_steps": 0, "num_codes": 1, "candidates": 1,
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

    def epochs_for(self, count: int) -> int:
        """Epochs of the generator on so many images."""
        return max(1, round(self.generator_steps / max(1, count // GENERATOR_BATCH)))

    def steps_for(self, count: int) -> int:
        """Gradient steps of the inversion of so many images."""
        return min(30, INVERSIONS // max(1, count)) if self.inversion_steps is None else self.inversion_steps


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared(Result):
    """Natural transformations of a training set, and what is known of them.

    Attributes:
        transform: Of the training images, by their index.
        reconstruction: Mean squared error of a pixel of what the generator makes of their codes.
        reference: The reference classifier's accuracy on reconstructions, in [0, 1].
        looked_at: Directions that were candidates.
    """

    transform: NaturalTransform
    reconstruction: float
    reference: float
    looked_at: int

    def figures(self) -> dict[str, Any]:
        """What is known, JSON-able."""
        found = self.transform.directions
        return {
            "reconstruction": self.reconstruction, "reference": self.reference, "looked_at": self.looked_at,
            "flip": list(found.flip or ()), "change": list(found.change or ()),
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Writes generator, codes and directions as safetensors; the images are those of the data set."""
        transform = self.transform
        generator: StyleGenerator = transform.generator  # type: ignore[assignment]
        tensors = {f"generator.{name}": value for name, value in generator.state_dict().items()}
        tensors |= {"codes.w": transform.codes.w, "vectors": transform.directions.vectors}
        tensors |= {"scale": transform.directions.scale}
        if transform.codes.alpha is not None:
            tensors["codes.alpha"] = transform.codes.alpha
        about = {
            "version": VERSION, "generator": generator.settings(), "merge_layer": transform.codes.merge_layer,
            "figures": self.figures(),
        }  # fmt: skip
        storage.write_tensors(path, tensors, {"natra": json.dumps(about)})

    @staticmethod
    def load(path: str | Path, images: Pictures) -> Prepared:
        """Reads what :meth:`save` wrote.

        Args:
            path: The file.
            images: Of the training set, in its order.

        Raises:
            UserError: If the file is missing, damaged, or of other images.
        """
        tensors, header = storage.read_tensors(path), storage.read_metadata(path)
        try:
            about = json.loads(header["natra"])
            if about["version"] != VERSION:
                raise ValueError(f"version {about['version']}")
            settings = about["generator"] | {"image_shape": tuple(about["generator"]["image_shape"])}
            generator = StyleGenerator(**settings)
            own = {name.removeprefix("generator."): value for name, value in tensors.items() if "generator." in name}
            generator.load_state_dict(own)
            figures = about["figures"]
            codes = LatentCodes(tensors["codes.w"], tensors.get("codes.alpha"), about["merge_layer"])
            flip, change = (tuple(figures[name]) for name in ("flip", "change"))
            directions = Directions(tensors["vectors"], tensors["scale"], None, flip, change)
            # In the layout that training leaves, in which the same sums are taken in the same order.
            generator.to(memory_format=torch.channels_last).eval().requires_grad_(False)
            transform = NaturalTransform(generator, codes, directions, scaled(images))
            return Prepared(transform, figures["reconstruction"], figures["reference"], figures["looked_at"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(
                f"no natural transformations of these images: {error}", where=path, cure="delete it and start again"
            ) from error


def prepare_natural_transform(
    images: Pictures,
    labels: Int[Tensor, "images"],
    *,
    unlabelled: Pictures | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
) -> Prepared:
    """Trains a generator, finds the codes of all images, and the directions that leave their class alone.

    Args:
        images: Of the training set, in its order: uint8, or floats in [0, 1].
        labels: Their classes; only the reference classifier looks at them.
        unlabelled: Further images of the same size for the generator, which then is trained on both: they should vary
            as images of real use do.
        recipe: How; its defaults by default.
        seed: Of everything random.

    Raises:
        ValueError: If images are not of a size that the generator makes, or no direction leaves the class alone.
    """
    recipe = Recipe() if recipe is None else recipe
    check_pictures(images)
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be {len(images)} whole numbers, got {tuple(labels.shape)}")
    if unlabelled is not None:
        check_pictures(unlabelled)
        if unlabelled.shape[1:] != images.shape[1:]:
            raise ValueError(f"unlabelled must be of {tuple(images.shape[1:])}, got {tuple(unlabelled.shape[1:])}")
    seen = images if unlabelled is None else torch.cat([_bytes(images), _bytes(unlabelled)])
    seen = seen[_some(len(seen), seed)]
    network, _ = fit_style_autoencoder(
        seen, epochs=recipe.epochs_for(len(seen)), w_dim=recipe.w_dim, batch_size=GENERATOR_BATCH, seed=seed
    )
    reference = reference_classifier(images, labels, epochs=recipe.reference_epochs, seed=seed)
    return prepared_from(network, reference, images, labels, recipe=recipe, seed=seed)


def prepared_from(
    network: StyleAutoEncoder,
    reference: nn.Module,
    images: Pictures,
    labels: Int[Tensor, "images"],
    *,
    recipe: Recipe,
    seed: int = 0,
) -> Prepared:
    """:func:`prepare_natural_transform` with a trained generator and reference classifier.

    Args:
        network: Generator and encoder.
        reference: Maps images in [0, 1] to logits.
        images: Of the training set, in its order.
        labels: Their classes.
        recipe: How the rest is made.
        seed: Of everything random.

    Raises:
        ValueError: If no direction leaves the class alone.
    """
    x = scaled(images)
    inverter = BatchInverter(
        network.generator, network.encode, steps=recipe.steps_for(len(x)), num_codes=recipe.num_codes, seed=seed
    )
    codes = inverter.invert(x, description="natra: codes")
    found = latent_directions(network.generator, recipe.directions, k=recipe.candidates, generator_seed=seed)
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:FILTER_CODES]
    kept = filter_directions(
        found, network.generator, reference, codes[some], recipe.max_flip, recipe.min_change,
        max_directions=recipe.max_directions, images=x[some], labels=labels[some],
    )  # fmt: skip
    error, right = 0.0, 0
    with torch.no_grad(), in_mode(reference, training=False):
        for rows in torch.arange(len(x)).split(500):
            made = codes[rows].decode(network.generator)
            error += float((made - x[rows]).square().flatten(1).mean(1).sum())
            right += int((reference(made).argmax(1) == labels[rows]).sum())
    transform = NaturalTransform(network.generator, codes, kept, x)
    return Prepared(transform, error / len(x), right / len(x), len(found))


def reference_classifier(
    images: Pictures,
    labels: Int[Tensor, "images"],
    *,
    epochs: int = 10,
    channels: Sequence[int] = (16, 32),
    seed: int = 0,
) -> nn.Sequential:
    """A small network trained on images as they are, behind the layer that standardises them: [0, 1] to logits.

    Example:
        >>> pictures = torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8)
        >>> reference_classifier(pictures, torch.arange(32) % 3, epochs=1)(pictures[:2] / 255).shape
        torch.Size([2, 3])
    """
    data = TensorImages(images, labels)
    if len(data) > GENERATOR_IMAGES:
        data = data.subset(subset(data, GENERATOR_IMAGES, seed=seed))
    mean, square = data.moments()
    std = (square - mean**2).clip(1e-8) ** 0.5
    normalise = Normalise(mean.tolist(), std.tolist())
    side = min(images.shape[2:]) // 2 ** len(channels)
    with seeded(seed, "init", "reference"):
        network = SmallConvNet(
            channels, in_channels=images.shape[1], num_classes=int(labels.max()) + 1, grid=max(1, min(4, side))
        )
    batches = Batches(data, 64, seed=seed, normalise=normalise, name="reference")
    fit(
        Classifier(network, lr=0.05), batches, epochs=epochs, callbacks=[CosineProgress()], seed=seed,
        description="natra: reference",
    )  # fmt: skip
    return nn.Sequential(normalise, network).eval().requires_grad_(False)


def _bytes(images: Tensor) -> Tensor:
    return images if images.dtype == torch.uint8 else images.mul(255).round().byte()


def _some(count: int, seed: int) -> Tensor:
    """Which images the generator learns from."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:GENERATOR_IMAGES].sort().values
