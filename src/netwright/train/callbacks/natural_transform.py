"""Callback of training with natural transformations (NaTra, arXiv:2105.04070)."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import lightning
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from netwright.checks import one_of
from netwright.console import UserError
from netwright.data.augment import Augmentation
from netwright.data.unlabelled import unlabelled_images
from netwright.nn.modes import in_mode
from netwright.seeding import derive, stream
from netwright.train.callbacks.terms import JoiningCallback
from netwright.train.classifier import channels_last
from netwright.train.natra.directions import FILTER_STEP, Method, NoDirectionError
from netwright.train.natra.generator import LARGEST_SIDE, check_image_shape
from netwright.train.natra.groundwork import Groundwork
from netwright.train.natra.preparing import Prepared, prepare_natural_transform
from netwright.train.natra.recipe import Recipe
from netwright.train.natra.search import (
    PGD_STEPS,
    Search,
    Source,
    check_range,
    depends_on_batch,
    pgd_transform,
    random_transform,
    worst_of_k,
)
from netwright.train.natra.transform import NaturalTransform, TransformGrid

if TYPE_CHECKING:
    from netwright.data import Data

GRID_BYTES = 1_500_000_000
FILE, GENERATOR = "natra.safetensors", "natra-generator.safetensors"


class NaTraTraining(JoiningCallback):
    """Trains with natural transformations of the images: the worst of a few directions and steps, in the same batch.

    The module's ``self(x)`` is given the images of a batch and their transformations together, so that batch norm takes
    its statistics from both; its step sees the logits of the images alone, and the terms

        beta CE(f(T(x)), y) + gamma KL(f(x) | f(T(x)))

    are added to its loss; the first is the module's own ``loss(logits, labels)`` if it has one. Labels are those of the
    images. Batches must be (x, labels, indices), as those of
    ``Batches(..., indexed=True)`` are; the index tells which image's transformations are meant. With beta and gamma 0
    nothing at all is changed.

    Args:
        source: Transformations of the training images by their index, or a grid of them, which costs no decoding. None
            waits for :meth:`prepare`, as ``netwright train`` does it.
        search: ``"worst_of_k"``: the worst of k random ones in evaluation mode; ``"random"``; ``"pgd"``: by the
            gradient through the generator, for a :class:`netwright.train.natra.NaturalTransform`.
        k: Candidates for each image, >= 1.
        beta: Weight of the cross-entropy of transformed images, >= 0.
        gamma: Weight of the divergence of their predictions from those of the images, >= 0.
        eps_max: Largest step along a direction, in standard deviations of the codes, > 0; 3 for weak attributes. It is
            the step at which :meth:`prepare` looks whether a direction leaves the class alone, where it is above 2.
        unlabelled: Folder, ``.npz`` or data set by name whose images the generator learns from beside the training
            part, mixed with it; for :meth:`prepare`.
        generator: A file ``natra-generator.safetensors`` of another run, in place of training a generator; codes and
            reference classifier in it serve too where they are of the same images.
        generator_steps: For :meth:`prepare`, as in :class:`netwright.train.natra.Recipe`, like all that follow.
        gan_steps: Likewise.
        inversion_steps: Likewise.
        num_codes: Likewise.
        directions: Likewise.
        max_directions: Likewise.
        max_flip: Likewise.
        min_change: Likewise.
        reference_epochs: Likewise.
        seed: Of the search and of :meth:`prepare`.
        normalise: From images in [0, 1] to what the module is given; they are given as they are by default. A module is
            used on the images' device and stays where it is.
        augment: Changes transformed images in [0, 1] as the data's own are changed; none by default.

    Attributes:
        source: What images are taken from.
        prepared: What :meth:`prepare` made.
        refuses: Names of methods that it cannot stand beside.

    Raises:
        ValueError: If an argument is out of its range; in training if a batch has no indices, the training set is not
            of as many images as ``source``, or the module gives no logits for all images.
        RuntimeError: In training without transformations, or if an optimiser has parameters of the generator.

    Example:
        >>> trainer = lightning.Trainer(
        ...     callbacks=[NaTraTraining(search="random")], logger=False, enable_checkpointing=False, accelerator="cpu"
        ... )
    """

    method, logged = "NaTra", "natra_term"
    refuses = ("elr+",)  # which mixes examples, so that the index tells nothing

    def __init__(
        self,
        source: Source | None = None,
        search: Search = "worst_of_k",
        k: int = 8,
        beta: float = 1.0,
        gamma: float = 0.0,
        eps_max: float = 2.0,
        unlabelled: str | None = None,
        generator: str | None = None,
        generator_steps: int = 2000,
        gan_steps: int = 0,
        inversion_steps: int | None = None,
        num_codes: int = 1,
        directions: Method = "weights",
        max_directions: int = 10,
        max_flip: float = 0.1,
        min_change: float = 0.02,
        reference_epochs: int = 10,
        seed: int = 0,
        normalise: Callable[[Tensor], Tensor] | None = None,
        augment: Augmentation | None = None,
    ):
        super().__init__()
        if source is not None and not isinstance(source, (NaturalTransform, TransformGrid)):
            raise TypeError(f"source must be a NaturalTransform or a TransformGrid, got {type(source).__name__}")
        one_of("search", search, get_args(Search))
        if search == "pgd" and isinstance(source, TransformGrid):
            raise ValueError("search 'pgd' needs a NaturalTransform, whose generator has a gradient, got a grid")
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k must be a whole number, got {k!r}")
        check_range(eps_max, k)
        for name, value in (("beta", beta), ("gamma", gamma)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {value}")
        if unlabelled is not None and not isinstance(unlabelled, str):
            raise TypeError(f"unlabelled must be a path or a name, got {unlabelled!r}")
        if generator is not None and unlabelled is not None:
            raise ValueError("give generator, which is trained already, or unlabelled to train one on, not both")
        derive(seed)
        self.recipe = Recipe(
            generator_steps=generator_steps, gan_steps=gan_steps, inversion_steps=inversion_steps,
            num_codes=num_codes, directions=directions, max_directions=max_directions, max_flip=max_flip,
            min_change=min_change, reference_epochs=reference_epochs, step=max(FILTER_STEP, float(eps_max)),
        )  # fmt: skip
        self.source, self.search, self.k, self.eps_max, self.seed = source, search, k, float(eps_max), seed
        self.beta, self.gamma, self.unlabelled, self.generator = float(beta), float(gamma), unlabelled, generator
        self.normalise, self.augment = normalise, augment
        self.prepared: Prepared | None = None
        self._moved: Tensor | None = None
        self._draws = torch.empty(0)
        self._labels: Tensor | None = None

    @property
    def active(self) -> bool:
        """Whether anything is added to the loss."""
        return self.beta > 0 or self.gamma > 0

    def check_data(self, data: Data) -> None:
        """Refuses data that the small generator of netwright cannot make.

        Raises:
            ValueError: If images are no pictures of 8 bits in memory.
            UserError: If they are not of 4 to 64 pixels a side, or the generator's file does not suit.
        """
        images = getattr(data.train, "images", None)
        if images is None:
            raise ValueError("natra needs the training images in memory; these stay on disk: choose a smaller size")
        if images.dtype != torch.uint8:
            raise ValueError("natra needs pictures, got data of another kind")
        try:
            check_image_shape(data.shape)
        except ValueError as error:
            sizable = data.train.files is not None and max(data.shape[1:]) > LARGEST_SIDE
            cure = f"add --size {LARGEST_SIDE}" if sizable else f"bring them to 4 to {LARGEST_SIDE} pixels a side"
            raise UserError(str(error), where=data.source, cure=cure) from error
        if self.generator is not None:
            Groundwork.load(self.generator).check_shape(data.shape, self.generator)
        if self.unlabelled is not None:
            unlabelled_images(self.unlabelled, data.shape, limit=1)

    def prepare(self, data: Data, folder: str | Path | None = None, *, augment: bool = True) -> None:
        """Makes the transformations of a training part: generator, codes, directions, and the grid where it fits.

        Args:
            data: Whose training part is trained on.
            folder: Where ``natra.safetensors`` is kept; if it is there already, it is read. Before it, generator, codes
                and reference classifier are kept as ``natra-generator.safetensors``.
            augment: Whether transformed images are augmented as the data are by default.

        Raises:
            ValueError: If the data do not suit.
            UserError: Likewise, or if no direction leaves the class alone.
        """
        self.check_data(data)
        images: Tensor = data.train.images  # type: ignore[attr-defined]
        kept = None if folder is None else Path(folder) / FILE
        if kept is not None and kept.exists():
            self.prepared = Prepared.load(kept, images)
        else:
            more = None if self.unlabelled is None else unlabelled_images(self.unlabelled, data.shape)
            keep = None if kept is None else kept.with_name(GENERATOR)
            try:
                self.prepared = prepare_natural_transform(
                    images, data.train.labels, unlabelled=more, recipe=self.recipe, seed=self.seed, keep=keep,
                    generator=self.generator,
                )  # fmt: skip
            except NoDirectionError as error:
                raise UserError(error.what, where=keep, cure=_cure(error, keep)) from error
            if kept is not None:
                self.prepared.save(kept)
        transform = self.prepared.transform
        fits = images.numel() * transform.num_directions * 5 <= GRID_BYTES
        self.source = transform.grid(self.eps_max) if fits and self.search != "pgd" and self.active else transform
        self.normalise, self.augment = data.normalise(), data.augmentation() if augment else None

    def transformed_samples(self) -> Prepared | None:
        """What :meth:`prepare` made, for a page to look at."""
        return self.prepared

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stands around the training step, and between the module and its callers."""
        if self.active and self.source is None:
            raise RuntimeError("NaTra has no transformations: give source, or call prepare(data) before training")
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Makes sure that the transformations are of the training set, and that nobody trains the generator."""
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        if self.active and self.source is not None and hasattr(dataset, "__len__"):
            own, count = len(self.source), self._examples(trainer)
            if count != own:
                raise ValueError(f"the training set must be the {own} images that source transforms, got {count}")
        if not isinstance(self.source, NaturalTransform):
            return
        frozen = {id(part) for part in self.source.generator.parameters() if part.requires_grad}
        trained = [p for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
        if any(id(part) in frozen for part in trained):
            raise RuntimeError("the generator must stay as it is, got an optimiser that trains its parameters")

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draws the candidates of the epoch for every image: the same ones, whatever process an image falls to."""
        if self.active and self.source is not None:
            count = self.k if self.search == "worst_of_k" else 1
            draws = stream(self.seed, "natra", trainer.current_epoch)
            self._draws = torch.rand(count, len(self.source), 2, generator=draws)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Finds the transformation of each image of the batch."""
        if not self.active:
            return
        self._check_batch(batch)
        x, labels, index = batch[0], batch[1], batch[2]
        assert self.source is not None
        place = trainer.current_epoch, batch_idx, trainer.global_rank
        found = self._find(trainer, pl_module, index, labels)
        if self.augment is not None:
            found = self.augment(found.cpu(), stream(self.seed, "natra augment", *place))
        self._moved = self._given(found, x)

    def _given(self, images: Tensor, like: Tensor) -> Tensor:
        normalise = self.normalise
        if isinstance(normalise, nn.Module):
            first = next(itertools.chain(normalise.parameters(), normalise.buffers()), images)
            if first.device != images.device:
                normalise = copy.deepcopy(normalise).to(images.device)
        return (images if normalise is None else normalise(images)).to(like)

    def _find(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, index: Tensor, labels: Tensor
    ) -> Tensor:
        source = self.source
        assert source is not None
        draws = self._draws[:, index.cpu()]
        if self.search == "random":
            return random_transform(source, index, draws[0], eps_max=self.eps_max)

        def logits_of(images: Tensor) -> Tensor:
            # The plain forward: hooks of other callbacks are not to see these logits.
            return module.forward(channels_last(self._given(images, module_input)))

        parameter = next(iter(module.parameters()))
        module_input = parameter.new_empty(0)
        with in_mode(module, training=False), trainer.precision_plugin.forward_context():
            if self.search == "pgd":
                assert isinstance(source, NaturalTransform)
                return pgd_transform(source, logits_of, index, labels, eps_max=self.eps_max, steps=PGD_STEPS)[0]
            return worst_of_k(
                source, logits_of, index, labels.to(parameter.device), draws, eps_max=self.eps_max,
                apart=depends_on_batch(module),
            )[0]  # fmt: skip

    def _before(self, pl_module: lightning.LightningModule, x: Any, labels: Tensor) -> tuple[Any, Tensor]:
        self._labels = labels
        self._join(self._moved if self.active else None, len(labels))
        return super()._before(pl_module, x, labels) if self.active else (x, labels)

    def _after(self, pl_module: lightning.LightningModule, outputs: Any) -> Any:
        return super()._after(pl_module, outputs) if self.active else outputs

    def _pull(
        self, pl_module: lightning.LightningModule, ids: Tensor, logits: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, ""]:
        assert self._labels is not None
        moved = self._logits_of_joined()
        term = logits.new_zeros((), dtype=torch.float32)
        if self.beta:
            own = getattr(pl_module, "loss", None)
            loss = own if callable(own) else functional.cross_entropy
            term = term + self.beta * loss(moved, self._labels)
        if self.gamma:
            here, there = logits.float().log_softmax(1), moved.float().log_softmax(1)
            term = term + self.gamma * functional.kl_div(there, here, reduction="batchmean", log_target=True)
        self._moved = self._labels = None
        self._join(None, 0)
        return term

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Leaves the module as it was."""
        super().teardown(trainer, pl_module, stage)
        self._moved = None


def _cure(error: NoDirectionError, keep: Path | None) -> str:
    """What else to give; where the generator is kept, together with it, so that only directions are chosen again."""
    *bounds, more = error.ways
    again = "" if keep is None else f",generator={keep}"
    told = [f"--method natra:{bound}{again}" for bound in bounds]
    return ", or ".join([*told, f"give {more}"])
