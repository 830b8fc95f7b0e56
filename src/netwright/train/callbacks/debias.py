"""Callback of CDvG (arXiv:2112.01021): a module of the user's is trained on views of its images with another bias."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from netwright.checks import number, one_of
from netwright.console import UserError, nearest, warn
from netwright.data.tensors import Batches, Normalise, TensorImages
from netwright.nn.activations import last_linear
from netwright.seeding import derive, seeded, stream
from netwright.train.callbacks.examples import indexed_around
from netwright.train.callbacks.terms import TermCallback
from netwright.train.debias.debiasing import check_contrast, contrast, projection_head
from netwright.train.debias.networks import check_classes
from netwright.train.debias.quality import translation_quality
from netwright.train.debias.translator import BiasTranslator
from netwright.train.debias.views import TwoViews, ViewCache, ViewKind, signed_range
from netwright.train.fitting import fit

if TYPE_CHECKING:
    from netwright.data import Data

GENERATOR, CHECKPOINT = "generator.safetensors", "translator.ckpt"
LEAST_SIDE = 4
STEPS_AN_EPOCH = 250  # of the translator, from one checkpoint to the next


class CDvGCallback(TermCallback):
    """Trains on views of each image that a translator gave other classes' bias, and draws the two of an image together.

    Before the training, :meth:`prepare` trains the translator on the same images and translates each of them into every
    class. ``training_step`` is then given (views, labels): both views of every image with the image's own label. Where
    the module has batch norms, the images themselves pass through it before, without gradient, for their statistics: no
    loss is asked of them, so they cost no backward pass.
    The loss gets the contrast of the features that enter the last linear layer, by a projection that the module has
    while it trains; checkpoints have it in the state of this callback, and the module's weights as without CDvG. Not
    together with methods that remember something of each example.

    Args:
        lambda_con: Weight of the contrast, >= 0; to be tuned, 0.1 to 1.
        temperature: Of the contrast, > 0.
        views: ``"transformed"``, or ``"original+transformed"`` for data without a strong bias.
        supervised: Whether views of all images of one class are drawn together.
        steps: Of the translator's critic, >= 1.
        lambda_rec: Weight of the translator's reconstruction, >= 0.
        n_critic: Steps of its critic for each of its generator, >= 1.
        translator_lr: Of its Adam, > 0.
        translator_batch: Images in its batches, >= 2.
        view_noise: Standard deviation of Gaussian noise on both views, on a scale from -1 to 1; >= 0.
        view_blur: Standard deviation in pixels of a Gaussian blur of both views, >= 0.
        round_views: Whether views are kept as bytes; else they take four times the room.
        ce_on_original: Whether the images themselves enter the cross-entropy.
        real_images: Whether they pass through the module for the statistics of its batch norms.
        projection: Width in which views are compared, >= 1.
        generator: A file ``generator.safetensors`` of another run, in place of training one.
        logits: Name of the submodule whose output are the logits; None is the module itself, ``self(x)``.
        features: Name of the linear layer whose input are the features; the last one by default.
        seed: Of everything random in it.

    Attributes:
        translator: The translator, once prepared.
        cache: All views, once prepared.
        refuses: Names of methods that it cannot stand beside.

    Raises:
        ValueError: If an argument is out of its range; in training if it was not prepared, a batch has no indices, the
            module has no such layer, or the optimisers do not train what is added to the module.

    Example:
        >>> trainer = lightning.Trainer(
        ...     callbacks=[CDvGCallback(steps=500)], logger=False, enable_checkpointing=False, accelerator="cpu"
        ... )
    """

    method, logged = "CDvG", "contrast"

    refuses = ("natra", "ps-kd", "elr", "elr+")  # which remember something of each example, where CDvG shows views

    def __init__(
        self,
        lambda_con: float = 1.0,
        temperature: float = 0.1,
        views: ViewKind = "transformed",
        supervised: bool = False,
        steps: int = 2500,
        lambda_rec: float = 10.0,
        n_critic: int = 2,
        translator_lr: float = 4e-4,
        translator_batch: int = 16,
        view_noise: float = 0.0,
        view_blur: float = 0.0,
        round_views: bool = True,
        ce_on_original: bool = False,
        real_images: bool = True,
        projection: int = 128,
        generator: str | None = None,
        logits: str | None = None,
        features: str | None = None,
        seed: int = 0,
    ):
        super().__init__(logits, None, None)
        check_contrast(lambda_con, temperature, projection)
        switches = {"supervised": supervised, "ce_on_original": ce_on_original, "real_images": real_images}
        for name, switch in switches.items():
            one_of(name, switch, (True, False))
        derive(seed)
        for name, value, bound in (("steps", steps, 1), ("translator_batch", translator_batch, 2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < bound:
                raise ValueError(f"{name} must be a whole number >= {bound}, got {value}")
        number("translator_lr", translator_lr, "> 0")
        if features is not None and not isinstance(features, str):
            raise ValueError(f"features must be the name of a linear layer, got {features!r}")
        self._sizes: dict[str, Any] = {"lambda_rec": lambda_rec, "n_critic": n_critic, "lr": translator_lr}
        BiasTranslator(2, 4, width=1, n_down=0, n_res=0, n_layers=1, **self._sizes)  # refuses what is out of range
        TwoViews(_Nothing(), views, noise=view_noise, blur=view_blur, rounded=round_views)
        self.lambda_con, self.temperature, self.supervised, self.seed = lambda_con, temperature, supervised, seed
        self.kind, self.view_noise, self.view_blur, self.round_views = views, view_noise, view_blur, round_views
        self.projection, self.generator = projection, generator
        self.steps, self.translator_batch, self.features = steps, translator_batch, features
        self.ce_on_original, self.real_images = ce_on_original, real_images
        self.translator: BiasTranslator | None = None
        self.cache: ViewCache | None = None
        self._views: TwoViews | None = None
        self._normalise: nn.Module = nn.Identity()
        self._place = 0, 0, 0
        self._caught: list[Tensor] = []
        self._labels: Tensor | None = None
        self._layer: nn.Linear | None = None
        self._feature_hook: RemovableHandle | None = None
        self._projection: nn.Module | None = None
        self._apart: list[RemovableHandle] = []  # keep the projection out of the module's state

    def check_data(self, data: Data) -> None:
        """Refuses data that are no pictures.

        Raises:
            ValueError: If images are no pictures of 8 bits, of one or three channels and at least 4 pixels a side.
            UserError: If the generator's file cannot be read, or is for other images.
        """
        shape = data.train.shape
        if shape[0] not in (1, 3) or min(shape[1:]) < LEAST_SIDE:
            told = " x ".join(map(str, shape))
            raise ValueError(f"cdvg translates pictures of at least {LEAST_SIDE} pixels a side, got images of {told}")
        if isinstance(data.train, TensorImages) and data.train.images.dtype != torch.uint8:
            raise ValueError(f"cdvg translates pictures of 8 bits, got {data.train.images.dtype}")
        if self.generator is not None:
            self._read(data)

    def check_network(self, network: nn.Module, example: Tensor | None = None) -> None:
        """Makes sure that a network has what ``logits`` and ``features`` name.

        Args:
            network: That is to be trained, in the LightningModule in which it will be.
            example: Not looked at.

        Raises:
            ValueError: If it has not, or has no linear layer.
        """
        super().check_network(network, example)
        if self.lambda_con:
            self._feature_layer(self._source(network))

    def prepare(self, data: Data, folder: str | Path | None = None, *, augment: bool = True) -> None:
        """Trains the translator, or reads it, and translates the training part; a stopped training goes on.

        Args:
            data: Whose training part is trained on. On its validation part a translator that was trained is tried, and
                a warning given where it is not ready.
            folder: Where ``generator.safetensors`` is kept; if it is there already, it is read.
            augment: Whether views are augmented as the data are by default; batches should be like them, since an image
                that is a view comes out of its batch.

        Raises:
            ValueError: As :meth:`check_data` has it.
            UserError: Likewise, or if the views do not fit on the disk.
        """
        self.check_data(data)
        own = None if folder is None else Path(folder) / GENERATOR
        if self.generator is not None:
            self.translator = self._read(data)
        elif own is not None and own.exists():
            self.translator = BiasTranslator.load(own)
        else:
            checkpoint = None if own is None else own.with_name(CHECKPOINT)
            self.translator = self._trained(data, checkpoint)
            for fault in translation_quality(self.translator, data).faults():
                warn(f"cdvg: the translator is not ready: {fault}")
            if own is not None and checkpoint is not None:
                self.translator.save(own)
                checkpoint.unlink(missing_ok=True)
        self.cache = ViewCache(data.train, self.translator, rounded=self.round_views)
        changes = data.augmentation() if augment else None
        self._views = TwoViews(
            None, self.kind, cache=self.cache, augment=changes, noise=self.view_noise, blur=self.view_blur
        )
        self._normalise = data.normalise()

    def _read(self, data: Data) -> BiasTranslator:
        translator = BiasTranslator.load(str(self.generator))
        shape, classes = data.train.shape, len(data.classes)
        if (translator.shape, translator.num_classes) != (shape, classes):
            raise UserError(
                f"the generator is for {translator.num_classes} classes of {translator.shape}, the data have {classes} "
                f"of {shape}",
                where=self.generator,
                cure="give that of a run on these data, or none",
            )
        return translator

    def _trained(self, data: Data, checkpoint: Path | None) -> BiasTranslator:
        shape = data.train.shape
        with seeded(self.seed, "translator"):
            translator = BiasTranslator.sized(len(data.classes), shape, seed=self.seed, **self._sizes)
        each = min(STEPS_AN_EPOCH, self.steps)
        batches = Batches(
            data.train, self.translator_batch, seed=self.seed, normalise=signed_range(shape[0]), steps=each,
            name="translator",
        )  # fmt: skip
        epochs = -(-self.steps // each)
        fit(translator, batches, epochs=epochs, seed=self.seed, checkpoint=checkpoint, description="translator")
        return translator

    def _feature_layer(self, module: nn.Module) -> nn.Linear:
        named = module.named_modules(remove_duplicate=False)
        layers = {name: part for name, part in named if isinstance(part, nn.Linear)}
        if not layers:
            raise ValueError(
                "CDvG needs a linear layer, whose input are the features, got a network without one: give lambda_con=0"
            )
        if self.features is None:
            return last_linear(module)
        if self.features not in layers:
            raise ValueError(
                f"features must name a linear layer, got {self.features!r}: {nearest(self.features, layers)}"
            )
        return layers[self.features]

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Gives the module the projection, before its optimisers are made and a checkpoint is read."""
        if stage != "fit" or not self.lambda_con:
            return
        self._layer = self._feature_layer(self._source(pl_module))  # before another linear layer is added
        with seeded(self.seed, "projection"):
            self._projection = projection_head(self._layer.in_features, self.projection)
        pl_module.debias_projection = self._projection
        self._apart = [
            pl_module.register_state_dict_post_hook(_without_projection),
            pl_module.register_load_state_dict_pre_hook(_with_projection),
        ]

    def state_dict(self) -> dict[str, Any]:
        """The projection."""
        return {} if self._projection is None else {"projection": self._projection.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the projection of a checkpoint, if one is trained."""
        if self._projection is not None:
            self._projection.load_state_dict(state_dict["projection"])

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stands around the training step, and watches what enters the last linear layer."""
        if self._views is None:
            raise ValueError("CDvG must be prepared before it trains: call prepare, or use netwright.train.debias.CDvG")
        super().on_fit_start(trainer, pl_module)
        self._normalise = self._normalise.to(pl_module.device)
        if self._layer is not None:
            self._feature_hook = self._layer.register_forward_pre_hook(self._catch)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Looks whether everything fits together."""
        super().on_train_start(trainer, pl_module)
        assert self.cache is not None
        count = self._examples(trainer)
        if count != len(self.cache):
            raise ValueError(f"the training set must be the {len(self.cache)} images of prepare, got {count}")
        if indexed_around(pl_module, self):
            raise ValueError("CDvG trains on views, so no other method may remember something of each example")
        if self.lambda_con:
            trained = {id(p) for each in trainer.optimizers for group in each.param_groups for p in group["params"]}
            if not trained >= {id(param) for param in pl_module.debias_projection.parameters()}:  # type: ignore[union-attr]
                raise ValueError("the optimisers must be made from self.parameters(), since CDvG adds a projection")

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes where the training is."""
        self._place = trainer.current_epoch, batch_idx, trainer.global_rank

    def _catch(self, layer: nn.Module, args: Any) -> None:
        if self._watching:
            self._caught.append(args[0])

    def _before(self, pl_module: lightning.LightningModule, x: Any, labels: Tensor) -> tuple[Any, Tensor]:
        assert self._views is not None
        assert self._ids is not None
        if len(labels) < 2:
            raise ValueError(f"a batch must hold at least 2 images, got {len(labels)}")
        check_classes("labels", labels, len(x), self._views.num_classes)
        draws = stream(self.seed, "views", *self._place)
        images = _pixels(x, self._normalise) if self._views.original else None
        rows = [self._normalise(view.to(x.device)) for view in self._views.kept(self._ids, draws, images)]
        if self.ce_on_original:
            rows.append(x)
        elif self.real_images and _keeps_statistics(pl_module):
            self._pass(pl_module, x)
        self._caught, self._labels = [], labels
        x, labels = super()._before(pl_module, torch.cat(rows), labels.repeat(len(rows)))
        self._pending = bool(self.lambda_con)
        return x, labels

    @torch.no_grad()
    def _pass(self, pl_module: lightning.LightningModule, x: Tensor) -> None:
        """Shows the images themselves to the batch norms; past hooks, for others are to see the views alone."""
        try:
            self._source(pl_module).forward(x)
        except NotImplementedError as error:
            raise RuntimeError(
                "CDvG found no way for the images themselves through the module: give it a forward(x), or name the "
                "submodule that gives the logits with the argument logits, or give real_images=False"
            ) from error

    def _after(self, pl_module: lightning.LightningModule, outputs: Any) -> Any:
        return super()._after(pl_module, outputs) if self.lambda_con else outputs

    def _pull(self, pl_module: lightning.LightningModule, ids: Tensor, logits: Tensor) -> Tensor:
        assert self._labels is not None
        if not self._caught:
            raise RuntimeError("CDvG saw no features: name the layer that they enter with the argument features")
        count = len(self._labels)
        z: Tensor = pl_module.debias_projection(self._caught[0][: 2 * count])  # type: ignore[operator]
        return self.lambda_con * contrast(z[:count], z[count:], self._labels, self.temperature, self.supervised)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Leaves the module as it was."""
        super().teardown(trainer, pl_module, stage)
        if self._feature_hook is not None:
            self._feature_hook.remove()
        self._feature_hook, self._layer, self._caught = None, None, []
        for handle in self._apart:
            handle.remove()
        self._apart = []
        if hasattr(pl_module, "debias_projection"):
            del pl_module.debias_projection


def _pixels(x: Tensor, normalise: nn.Module) -> Tensor:
    """Images in [0, 1] again."""
    assert isinstance(normalise, Normalise)
    return x * normalise.std[:, None, None] + normalise.mean[:, None, None]


class _Nothing:
    """Stands for a translator where only arguments are looked at."""

    num_classes = 2

    def translate(self, x: Tensor, y_target: Tensor) -> Tensor:
        return x


def _without_projection(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}debias_projection.")]:
        del state[name]


def _with_projection(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """What a state without projection lacks; one that has it, as earlier checkpoints do, is read as it is."""
    for name, value in module.debias_projection.state_dict().items():  # type: ignore[union-attr]
        state.setdefault(f"{prefix}debias_projection.{name}", value)


def _keeps_statistics(module: nn.Module) -> bool:
    return any(getattr(part, "running_mean", None) is not None for part in module.modules())
