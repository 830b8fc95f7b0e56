"""Everything that natural transformations need, from images and labels alone: generator, codes, directions, filter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from netwright import storage
from netwright.console import UserError
from netwright.data.tensors import image_digests, scaled
from netwright.nn.modes import in_mode
from netwright.results import Result
from netwright.train.natra.codes import LatentCodes
from netwright.train.natra.directions import (
    FILTER_CODES,
    FILTER_STEP,
    Directions,
    filter_directions,
    latent_directions,
)
from netwright.train.natra.fitting import Pictures, check_pictures
from netwright.train.natra.generator import StyleAutoEncoder, StyleGenerator
from netwright.train.natra.groundwork import lay_groundwork
from netwright.train.natra.inversion import BatchInverter
from netwright.train.natra.recipe import Recipe
from netwright.train.natra.transform import NaturalTransform

VERSION = 2  # 1 did not tell what images it was made of


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
            "flip": list(found.flip or ()), "change": list(found.change or ()), "step": found.step,
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Writes generator, codes and directions as safetensors; of the images, which are the data set's, a digest."""
        transform = self.transform
        generator: StyleGenerator = transform.generator  # type: ignore[assignment]
        tensors = {f"generator.{name}": value for name, value in generator.state_dict().items()}
        tensors |= {"codes.w": transform.codes.w, "vectors": transform.directions.vectors}
        tensors |= {"scale": transform.directions.scale}
        if transform.codes.alpha is not None:
            tensors["codes.alpha"] = transform.codes.alpha
        about = {
            "version": VERSION, "generator": generator.settings(), "merge_layer": transform.codes.merge_layer,
            "figures": self.figures(), "images": None if transform.images is None else _digest(transform.images),
            "layers": transform.directions.layers, "keep_residual": transform.keep_residual,
        }  # fmt: skip
        storage.write_tensors(path, tensors, {"natra": json.dumps(about)})

    @staticmethod
    def load(path: str | Path, images: Pictures) -> Prepared:
        """Reads what :meth:`save` wrote.

        Args:
            path: The file.
            images: Of the training set, in its order.

        Raises:
            UserError: If the file is missing, damaged, of an earlier version, or of other images.
        """
        tensors, header = storage.read_tensors(path), storage.read_metadata(path)
        try:
            about = json.loads(header["natra"])
            if about["version"] != VERSION:
                raise ValueError(f"version {about['version']}")
            if about["images"] not in (None, _digest(images)):
                raise ValueError("it was made of other images")
            settings = about["generator"] | {"image_shape": tuple(about["generator"]["image_shape"])}
            generator = StyleGenerator(**settings)
            own = {name.removeprefix("generator."): value for name, value in tensors.items() if "generator." in name}
            generator.load_state_dict(own)
            figures = about["figures"]
            codes = LatentCodes(tensors["codes.w"], tensors.get("codes.alpha"), about["merge_layer"])
            flip, change = (tuple(figures[name]) for name in ("flip", "change"))
            # Files of earlier versions tell no step, layers and residual: they were made with these.
            layers, step = about.get("layers"), figures.get("step", FILTER_STEP)
            directions = Directions(
                tensors["vectors"], tensors["scale"], None if layers is None else tuple(layers), flip, change, step
            )
            # In the layout that training leaves, in which the same sums are taken in the same order.
            generator.to(memory_format=torch.channels_last).eval().requires_grad_(False)
            keep = about.get("keep_residual", True)
            transform = NaturalTransform(generator, codes, directions, scaled(images), keep_residual=keep)
            return Prepared(transform, figures["reconstruction"], figures["reference"], figures["looked_at"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(
                f"no natural transformations of these images: {error}", where=path, cure="delete it and start again"
            ) from error


def _digest(images: Pictures) -> str:
    return storage.digest("images", image_digests(scaled(images).cpu().numpy()).tobytes())


def prepare_natural_transform(
    images: Pictures,
    labels: Int[Tensor, "images"],
    *,
    unlabelled: Pictures | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    keep: str | Path | None = None,
    generator: str | Path | None = None,
) -> Prepared:
    """Trains a generator, finds the codes of all images, and the directions that leave their class alone.

    Args:
        images: Of the training set, in its order: uint8, or floats in [0, 1].
        labels: Their classes; only the reference classifier looks at them.
        unlabelled: Further images of the same size for the generator, which then is trained on both, mixed: they should
            vary as images of real use do. An epoch has 10,000 images at most, each other ones until all have been seen.
        recipe: How; its defaults by default.
        seed: Of everything random.
        keep: A file that generator, codes and reference classifier are written to as they are made, before directions
            are looked at, and read from where it exists.
        generator: Such a file of another run: its generator is taken in place of training one, and what else in it was
            made of the same images in the same way.

    Raises:
        ValueError: If images are not of a size that the generator makes; :class:`NoDirectionError`, if no direction
            leaves the class alone.
        UserError: If a file cannot be read, or its generator makes images of another shape.
    """
    recipe = Recipe() if recipe is None else recipe
    check_pictures(images)
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be {len(images)} whole numbers, got {tuple(labels.shape)}")
    if unlabelled is not None:
        check_pictures(unlabelled)
        if unlabelled.shape[1:] != images.shape[1:]:
            raise ValueError(f"unlabelled must be of {tuple(images.shape[1:])}, got {tuple(unlabelled.shape[1:])}")
    ground = lay_groundwork(
        images, labels, unlabelled=unlabelled, recipe=recipe, seed=seed, keep=None if keep is None else Path(keep),
        generator=None if generator is None else Path(generator),
    )  # fmt: skip
    assert ground.reference is not None
    return prepared_from(ground.network, ground.reference, images, labels, recipe=recipe, seed=seed, codes=ground.codes)


def prepared_from(
    network: StyleAutoEncoder,
    reference: nn.Module,
    images: Pictures,
    labels: Int[Tensor, "images"],
    *,
    recipe: Recipe,
    seed: int = 0,
    codes: LatentCodes | None = None,
) -> Prepared:
    """:func:`prepare_natural_transform` with a trained generator and reference classifier.

    Args:
        network: Generator and encoder.
        reference: Maps images in [0, 1] to logits.
        images: Of the training set, in its order.
        labels: Their classes.
        recipe: How the rest is made.
        seed: Of everything random.
        codes: Of the images, where they are there already.

    Raises:
        NoDirectionError: If no direction leaves the class alone.
    """
    x = scaled(images)
    if codes is None:
        inverter = BatchInverter(
            network.generator, network.encode, steps=recipe.steps_for(len(x)), num_codes=recipe.num_codes, seed=seed
        )
        codes = inverter.invert(x, description="natra: codes")
    found = latent_directions(network.generator, recipe.directions, k=recipe.candidates, generator_seed=seed)
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:FILTER_CODES]
    kept = filter_directions(
        found, network.generator, reference, codes[some], recipe.max_flip, recipe.min_change, recipe.step,
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
