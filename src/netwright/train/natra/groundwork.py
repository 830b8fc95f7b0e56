"""What natural transformations cost most: a generator and its encoder, codes of the images, a reference classifier.

All of it is kept in one file as it comes about, before any direction is looked at: another choice of directions, or a
run that was stopped, starts from there.
"""

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
from netwright.nn.activations import last_linear
from netwright.train.natra.codes import LatentCodes
from netwright.train.natra.fitting import Pictures, fit_style_autoencoder
from netwright.train.natra.generator import StyleAutoEncoder, StyleGenerator
from netwright.train.natra.inversion import BatchInverter
from netwright.train.natra.recipe import GENERATOR_BATCH, GENERATOR_IMAGES, Recipe
from netwright.train.natra.reference import reference_classifier, reference_network
from netwright.train.natra.sharpening import sharpen_style_autoencoder

VERSION = 1
CHECKPOINT, SHARPENING = "natra-generator.ckpt", "natra-sharpening.ckpt"


@dataclasses.dataclass(eq=False)
class Groundwork:
    """A generator, and with it whatever was made of a training set so far.

    Attributes:
        network: Generator and encoder, frozen.
        codes: Of the training images, in their order.
        reference: Maps images in [0, 1] to logits.
        made_of: What ``codes`` and ``reference`` were made of, by name: they serve again where that is the same.
    """

    network: StyleAutoEncoder
    codes: LatentCodes | None = None
    reference: nn.Sequential | None = None
    made_of: dict[str, str] = dataclasses.field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Writes all of it as safetensors."""
        generator = self.network.generator
        about: dict[str, Any] = {"version": VERSION, "generator": generator.settings(), "made_of": self.made_of}
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        if self.codes is not None:
            about["merge_layer"] = self.codes.merge_layer
            tensors["codes.w"] = self.codes.w
            if self.codes.alpha is not None:
                tensors["codes.alpha"] = self.codes.alpha
        if self.reference is not None:
            about["classes"] = last_linear(self.reference).out_features
            tensors |= {f"reference.{name}": value for name, value in self.reference.state_dict().items()}
        storage.write_tensors(path, tensors, {"natra-generator": json.dumps(about)})

    @staticmethod
    def load(path: str | Path) -> Groundwork:
        """Reads what :meth:`save` wrote.

        Raises:
            UserError: If the file is missing, damaged or of another kind.
        """
        tensors, header = storage.read_tensors(path), storage.read_metadata(path)
        try:
            about = json.loads(header["natra-generator"])
            if about["version"] != VERSION:
                raise ValueError(f"version {about['version']}")
            settings = about["generator"]
            settings |= {"image_shape": tuple(settings["image_shape"]), "channels": tuple(settings["channels"])}
            network = StyleAutoEncoder(StyleGenerator(**settings), settings["channels"][::-1])
            network.load_state_dict(_within(tensors, "network."))
            # In the layout that training leaves, in which the same sums are taken in the same order.
            network.to(memory_format=torch.channels_last).eval().requires_grad_(False)
            found = Groundwork(network, made_of=dict(about["made_of"]))
            if "codes.w" in tensors:
                found.codes = LatentCodes(tensors["codes.w"], tensors.get("codes.alpha"), about["merge_layer"])
            if state := _within(tensors, "reference."):
                found.reference = reference_network(settings["image_shape"], about["classes"])
                found.reference.load_state_dict(state)
                found.reference.to(memory_format=torch.channels_last).eval().requires_grad_(False)
            return found
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            cure = "give the natra-generator.safetensors of a run with natra, or none"
            raise UserError(f"no generator of natural transformations: {error}", where=path, cure=cure) from error

    def check_shape(self, shape: tuple[int, int, int], where: object) -> None:
        """Refuses images of another shape than the generator's.

        Raises:
            UserError: If they are.
        """
        own = tuple(self.network.generator.image_shape)
        if own != tuple(shape):
            raise UserError(
                f"the generator makes images of {own}, the data have {tuple(shape)}",
                where=where,
                cure="give that of a run on images of this shape, or none",
            )


def _within(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def lay_groundwork(
    images: Pictures,
    labels: Int[Tensor, "images"],
    *,
    unlabelled: Pictures | None,
    recipe: Recipe,
    seed: int,
    keep: Path | None = None,
    generator: Path | None = None,
) -> Groundwork:
    """Makes generator, codes and reference classifier, each unless it is there already.

    Args:
        images: Of the training set, in its order.
        labels: Their classes.
        unlabelled: Further images for the generator; an epoch of it has 10,000 images at most, each other ones.
        recipe: How.
        seed: Of everything random.
        keep: A file that is written as each is made, and read where it exists; a stopped training of the generator goes
            on from a checkpoint beside it.
        generator: Such a file of another run, whose generator is taken in place of training one.

    Raises:
        UserError: If a file cannot be read, or its generator makes images of another shape.
    """
    there = keep is not None and keep.exists()
    source = keep if there else generator
    if source is not None:
        found = Groundwork.load(source)
        found.check_shape(tuple(images.shape[1:]), source)  # type: ignore[arg-type]  # three
    else:
        found = Groundwork(_generator(images, unlabelled, recipe, seed, keep))
    if keep is not None and not there:
        found.save(keep)
        for name in (CHECKPOINT, SHARPENING):
            keep.with_name(name).unlink(missing_ok=True)
    own = image_digests(images.cpu().numpy()).tobytes()
    of_codes = storage.digest("codes", own, recipe.steps_for(len(images)), recipe.num_codes, seed)
    of_reference = storage.digest("reference", own, labels.cpu().numpy().tobytes(), recipe.reference_epochs, seed)
    if found.codes is None or found.made_of.get("codes") != of_codes:
        inverter = BatchInverter(
            found.network.generator, found.network.encode, steps=recipe.steps_for(len(images)),
            num_codes=recipe.num_codes, seed=seed,
        )  # fmt: skip
        found.codes = inverter.invert(scaled(images), description="natra: codes")
        found.made_of["codes"] = of_codes
        if keep is not None:
            found.save(keep)
    if found.reference is None or found.made_of.get("reference") != of_reference:
        found.reference = reference_classifier(images, labels, epochs=recipe.reference_epochs, seed=seed)
        found.made_of["reference"] = of_reference
        if keep is not None:
            found.save(keep)
    return found


def _generator(
    images: Pictures, unlabelled: Pictures | None, recipe: Recipe, seed: int, keep: Path | None
) -> StyleAutoEncoder:
    seen = images if unlabelled is None else torch.cat([_bytes(images), _bytes(unlabelled)])
    network, _ = fit_style_autoencoder(
        seen, epochs=recipe.epochs_for(min(len(seen), GENERATOR_IMAGES)), w_dim=recipe.w_dim,
        batch_size=GENERATOR_BATCH, epoch_images=GENERATOR_IMAGES, seed=seed,
        checkpoint=None if keep is None else keep.with_name(CHECKPOINT),
    )  # fmt: skip
    if recipe.gan_steps:
        sharpen_style_autoencoder(
            network, seen, steps=recipe.gan_steps, batch_size=GENERATOR_BATCH, epoch_images=GENERATOR_IMAGES, seed=seed,
            checkpoint=None if keep is None else keep.with_name(SHARPENING),
        )  # fmt: skip
    return network


def _bytes(images: Tensor) -> Tensor:
    return images if images.dtype == torch.uint8 else images.mul(255).round().byte()
