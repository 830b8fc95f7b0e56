"""Stage 2 of CDvG: a classifier that is to answer alike for views of an image whose biases differ.

Jung, Shim, Yang and Yang, "Fighting Fire with Fire: Contrastive Debiasing without Bias-free Data via Generative
Bias-transformation", ICML 2023, arXiv:2112.01021.

    L = (CE(h(f(x')), y) + CE(h(f(x'')), y)) / 2 + l_con NT-Xent(g(f(x')), g(f(x'')); T)

x' and x'' are translations of x into classes drawn by lot; y is the label of x. Coefficients, where cross-entropy
applies and how classes are drawn are this library's reading: no code of the paper is public.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import lightning
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from netwright.checks import number, one_of, whole
from netwright.nn.modes import in_mode
from netwright.seeding import derive, stream
from netwright.train.contrastive.losses import nt_xent, supcon
from netwright.train.debias.networks import check_classes
from netwright.train.debias.translator import check_signed
from netwright.train.debias.views import Translates, TwoViews, ViewCache, ViewKind

SampleWeight = Tensor | Callable[[Tensor, Tensor], Tensor]


def check_contrast(lambda_con: float, temperature: float, projection: int) -> None:
    """Refuses values that mean nothing.

    Raises:
        ValueError: Naming the argument, the bound and the value.
    """
    number("lambda_con", lambda_con, ">= 0")
    number("temperature", temperature, "> 0")
    whole("projection", projection, ">= 1")


def projection_head(features: int, out: int) -> nn.Sequential:
    """g: two layers, from features to the space in which views are compared, which is as wide as what is between."""
    hidden = min(features, out)
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, out))


def contrast(
    first: Float[Tensor, "batch dim"],
    second: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    temperature: float,
    supervised: bool = False,
) -> Float[Tensor, ""]:
    """NT-Xent of the two views of each image, or with ``supervised`` the supervised contrastive loss, in nats."""
    if supervised:
        return supcon(torch.cat([first, second]), labels.repeat(2), temperature)
    return nt_xent(first, second, temperature)


class CDvG(lightning.LightningModule):
    """Trains encoder, classifier and projection on translated views; ``module(x)`` are logits of images as they are.

    Batches are (x, labels), with x in [-1, 1], or (x, labels, indices) where there is a cache or a weight for each
    example. The translator is not trained, and is no part of the module.

    Args:
        encoder: f, which gives features (batch, features).
        num_classes: At least 2.
        translator: A trained :class:`BiasTranslator`, or any other change of the bias.
        lambda_con: Weight of the contrast, >= 0; to be tuned, 0.1 to 1.
        temperature: T, > 0.
        views: ``"transformed"``, or ``"original+transformed"`` (x and x') for data without a strong bias.
        supervised: Whether views of all images of one class are drawn together, not those of one image alone.
        sample_weight: Factors of the cross-entropy: one an example of the training set, or a function of (x, labels),
            such as :meth:`LfF.weights`. Each multiplies the loss of its example; the mean over the batch is taken after
            that, so factors below 1 also make the cross-entropy count for less beside the contrast.
        cache: All translations of the training set, made once.
        augment: As for :class:`TwoViews`.
        view_noise: Standard deviation of Gaussian noise on both views, on their scale from -1 to 1, >= 0: covers traces
            of the label that a translator hides in them.
        view_blur: Standard deviation in pixels of a Gaussian blur of both views, >= 0, to the same end.
        round_views: Whether views made afresh are rounded to bytes, in whose last bits traces can hide; a cache has its
            own.
        ce_on_original: Whether x itself enters the cross-entropy, as a third view.
        real_images: Whether x passes through the encoder too, so that running statistics of batch norms know real
            images. It passes before its views, alone and without gradient: no loss is asked of it, so it costs no
            backward pass. For an encoder without such norms nothing is added.
        projection: Width of what g gives, >= 1.
        features: Width of what ``encoder`` gives; by default it is shown an image of the translator's ``shape``.
        lr: Of Adam, > 0.
        optimizer_fn: Makes the optimiser from the parameters, in place of Adam.
        seed: Of targets and noise.

    Raises:
        ValueError: If a value is out of its range; in training if images are not in [-1, 1], labels are no classes, a
            batch holds one image or tells no indices where they are needed.

    Example:
        >>> from netwright.train.debias import BiasTranslator
        >>> translator = BiasTranslator(2, 8, width=4, n_down=1, n_res=1, n_layers=2)
        >>> module = CDvG(nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU()), 2, translator)
        >>> module(torch.zeros(3, 3, 8, 8)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        translator: Translates,
        lambda_con: float = 1.0,
        temperature: float = 0.1,
        views: ViewKind = "transformed",
        supervised: bool = False,
        sample_weight: SampleWeight | None = None,
        *,
        cache: ViewCache | None = None,
        augment: Callable[[Tensor, Generator], Tensor] | None = None,
        view_noise: float = 0.0,
        view_blur: float = 0.0,
        round_views: bool = True,
        ce_on_original: bool = False,
        real_images: bool = True,
        projection: int = 128,
        features: int | None = None,
        lr: float = 1e-3,
        optimizer_fn: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        whole("num_classes", num_classes, ">= 2")
        check_contrast(lambda_con, temperature, projection)
        switches = {"supervised": supervised, "ce_on_original": ce_on_original, "real_images": real_images}
        for name, value in switches.items():
            one_of(name, value, (True, False))
        derive(seed)
        number("lr", lr, "> 0")
        # Neither a submodule nor trained: it is applied as it is.
        self._views = TwoViews(
            translator, views, cache=cache, augment=augment, noise=view_noise, blur=view_blur, rounded=round_views
        )
        if self._views.num_classes != num_classes:
            raise ValueError(f"translator must know {num_classes} classes, got {self._views.num_classes}")
        self.num_classes, self.lambda_con, self.temperature, self.supervised = (
            num_classes, lambda_con, temperature, supervised,
        )  # fmt: skip
        self.sample_weight, self.ce_on_original, self.lr, self.seed = sample_weight, ce_on_original, lr, seed
        self.optimizer_fn = optimizer_fn
        self.real_images = real_images and any(isinstance(part, _BatchNorm) for part in encoder.modules())
        width = _width(encoder, translator) if features is None else features
        self.encoder = encoder.to(memory_format=torch.channels_last)
        self.head = nn.Linear(width, num_classes)
        self.projection = projection_head(width, projection)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of images in [-1, 1]."""
        return self.head(self.encoder(x))

    def losses(
        self, x: Tensor, y: Int[Tensor, "batch"], index: Tensor | None, generator: Generator
    ) -> dict[str, Float[Tensor, ""]]:
        """``cross-entropy`` and, unweighted, ``contrast`` of a batch, in nats.

        Args:
            x: Images in [-1, 1].
            y: Their labels.
            index: Of the images in the training set.
            generator: Of targets, augmentation and noise.
        """
        if len(x) < 2:
            raise ValueError(f"a batch must hold at least 2 images, got {len(x)}")
        check_signed(x)
        check_classes("labels", y, len(x), self.num_classes)
        first, second = (2 * view - 1 for view in self._views((x + 1) / 2, index, generator))
        counted = 3 if self.ce_on_original else 2
        if self.real_images and self.training and not self.ce_on_original:
            with torch.no_grad():  # for the statistics of batch norms alone
                self.encoder(x.contiguous(memory_format=torch.channels_last))
        images = torch.cat([first, second, x][:counted])
        features = self.encoder(images.contiguous(memory_format=torch.channels_last))
        logits = self.head(features)
        each = functional.cross_entropy(logits, y.repeat(counted), reduction="none").view(counted, -1).mean(0)
        found = {"cross-entropy": each.mean() if self.sample_weight is None else self._weighted(each, x, y, index)}
        if self.lambda_con:
            z = self.projection(features[: 2 * len(x)])
            found["contrast"] = contrast(z[: len(x)], z[len(x) :], y, self.temperature, self.supervised)
        return found

    def _weighted(self, each: Tensor, x: Tensor, y: Tensor, index: Tensor | None) -> Tensor:
        if isinstance(self.sample_weight, Tensor):
            if index is None:
                raise ValueError("batches must be (x, labels, indices) for weights: make Batches(..., indexed=True)")
            weight = self.sample_weight[index.cpu()].to(each)
        else:
            assert self.sample_weight is not None
            weight = self.sample_weight(x, y).to(each)
        return (weight * each).mean()

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x, y = batch[0], batch[1]
        draws = stream(self.seed, "views", self.current_epoch, batch_idx, self.global_rank)
        found = self.losses(x, y, batch[2] if len(batch) > 2 else None, draws)
        loss = found["cross-entropy"] + self.lambda_con * found.get("contrast", 0.0)
        named = {name.replace("-", "_"): value.detach() for name, value in found.items()}
        self.log_dict({"train_loss": loss.detach(), **named}, on_step=False, on_epoch=True, batch_size=len(y))
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Loss and accuracy of a validation batch of images as they are."""
        logits, y = self(batch[0]), batch[1]
        found = {
            "val_loss": functional.cross_entropy(logits, y),
            "val_accuracy": (logits.argmax(1) == y).float().mean(),
        }
        self.log_dict(found, on_epoch=True, batch_size=len(y), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, or what ``optimizer_fn`` makes."""
        params = [param for param in self.parameters() if param.requires_grad]
        return torch.optim.Adam(params, lr=self.lr) if self.optimizer_fn is None else self.optimizer_fn(params)


def _width(encoder: nn.Module, translator: Translates) -> int:
    shape = getattr(translator, "shape", None)
    if shape is None:
        raise ValueError("features must be given where the translator does not tell the shape of its images, got None")
    with in_mode(encoder, training=False), torch.no_grad():
        given = encoder(torch.zeros(2, *shape))
    if not isinstance(given, Tensor) or given.ndim != 2:
        told = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"encoder must give features (batch, features), got {told}")
    return given.shape[1]
