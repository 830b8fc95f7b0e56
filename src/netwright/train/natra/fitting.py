"""Training of the small style generator as an auto-encoder on images without labels; an encoder for any generator.

    |G(E(x)) - x|^2 + beta KL(q(z | x), N(0, I)) + lambda_w |E(G(w)) - w|^2        (the last on generated samples)

with means over pixels and over the numbers of a code. The second form fixes G and adds a feature distance.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from netwright.data import Batches, TensorImages
from netwright.nn.modes import in_mode
from netwright.results import History
from netwright.seeding import seeded
from netwright.train.adversarial import without_gradients
from netwright.train.classifier import channels_last
from netwright.train.fitting import fit
from netwright.train.natra.generator import StyleAutoEncoder, StyleGenerator
from netwright.train.natra.inversion import ClassifierFeatures
from netwright.train.schedules import CosineProgress

Pictures = UInt8[Tensor, "images channels height width"] | Float[Tensor, "images channels height width"]


class _Fitting(lightning.LightningModule):
    """What both trainings share: Adam, and a loss of images alone."""

    def __init__(self, network: nn.Module, lr: float):
        super().__init__()
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be > 0 and finite, got {lr}")
        self.network, self.lr = network, lr

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        """The terms of the loss."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch that begins with images."""
        terms = self.terms(channels_last(batch[0]))
        loss = torch.stack(list(terms.values())).sum()
        figures = {"train_loss": loss, **terms}
        self.log_dict(
            {name: value.detach() for name, value in figures.items()}, on_step=False, on_epoch=True,
            batch_size=len(batch[0]),
        )  # fmt: skip
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on what is trained."""
        return torch.optim.Adam([p for p in self.network.parameters() if p.requires_grad], lr=self.lr)


class _AutoEncoding(_Fitting):
    def __init__(self, network: StyleAutoEncoder, lr: float, kl_weight: float, latent_weight: float):
        super().__init__(network.to(memory_format=torch.channels_last), lr)
        self.kl_weight, self.latent_weight = kl_weight, latent_weight

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        network: StyleAutoEncoder = self.network  # type: ignore[assignment]
        generator = network.generator
        mean, log_variance = network.posterior(x)
        z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        terms = {"reconstruction": functional.mse_loss(generator(z), x)}
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        terms["divergence"] = self.kl_weight * divergence
        if self.latent_weight:
            with torch.no_grad():
                w = generator.mapping(torch.randn_like(mean))
                made = generator.synthesis(w[:, None].expand(-1, generator.num_layers, -1))
            again = network.encode(channels_last(made))[:, 0]
            terms["codes"] = self.latent_weight * functional.mse_loss(again, w)
        return terms


class _Encoding(_Fitting):
    def __init__(self, network: nn.Module, generator: nn.Module, lr: float, weights: tuple[float, float], phi: Any):
        super().__init__(network, lr)
        self.weights = weights
        self._fixed = (generator, phi)  # in a tuple, so that they are no parts of the module: they are not trained

    def on_train_start(self) -> None:
        """Brings what is not trained to where the batches are."""
        for part in _modules(*self._fixed):
            part.to(self.device)

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        (generator, phi), (perceptual, latent) = self._fixed, self.weights
        layers, mean = generator.num_layers, generator.w_mean
        codes = self.network(x).view(len(x), layers, len(mean))  # type: ignore[arg-type]
        made = generator.synthesis(codes)  # type: ignore[operator]
        terms = {"reconstruction": functional.mse_loss(made, x)}
        if phi is not None and perceptual:
            pairs = zip(phi(made), phi(x), strict=True)
            terms["features"] = perceptual * torch.stack([functional.mse_loss(a, b.detach()) for a, b in pairs]).sum()
        if latent:
            with torch.no_grad():
                z_dim = getattr(generator, "z_dim", len(mean))  # type: ignore[arg-type]
                w = generator.mapping(torch.randn(len(x), z_dim).to(mean))  # type: ignore[operator, arg-type]
                w = w[:, None].expand(-1, layers, -1)
                sample = generator.synthesis(w)  # type: ignore[operator]
            terms["codes"] = latent * functional.mse_loss(self.network(sample).view_as(w), w)
        return terms


def _modules(generator: nn.Module, phi: Any) -> list[nn.Module]:
    """The networks behind a generator and a function that gives features."""
    inner = phi.classifier if isinstance(phi, ClassifierFeatures) else phi
    return [generator, *([inner] if isinstance(inner, nn.Module) else [])]


@contextlib.contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients inside the block; back on its device afterwards, wherever it went."""
    first = next(itertools.chain(module.parameters(), module.buffers()), None)
    home = None if first is None else first.device
    with in_mode(module, training=False), without_gradients(module):
        try:
            yield
        finally:
            if home is not None:
                module.to(home)


def picture_batches(
    images: Pictures, batch_size: int, seed: int, name: str, epoch_images: int | None = None
) -> Batches:
    """Batches of images whose labels mean nothing; an epoch is one pass, or a part of one of ``epoch_images`` at most.

    Raises:
        ValueError: If ``epoch_images`` is below 1.
    """
    if epoch_images is not None and epoch_images < 1:
        raise ValueError(f"epoch_images must be >= 1, got {epoch_images}")
    data = TensorImages(images, torch.zeros(len(images), dtype=torch.long))
    part = epoch_images is not None and len(images) > epoch_images
    steps = max(1, epoch_images // batch_size) if part else None  # type: ignore[operator]
    return Batches(data, batch_size, seed=seed, name=name, steps=steps)


def fit_style_autoencoder(
    images: Pictures,
    *,
    epochs: int = 5,
    w_dim: int = 32,
    channels: Sequence[int] = (64, 32, 16),
    kl_weight: float = 1e-3,
    latent_weight: float = 0.0,
    lr: float = 5e-3,
    batch_size: int = 64,
    epoch_images: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> tuple[StyleAutoEncoder, History]:
    """Trains a style generator and its encoder on images without labels.

    Args:
        images: uint8, or floats in [0, 1]; 4 to 64 pixels a side.
        epochs: >= 1.
        w_dim: Numbers in a code.
        channels: Of the generator's scales, from coarse to fine; the encoder has them turned round.
        kl_weight: Weight of the divergence of z from a standard normal, a number of z, >= 0.
        latent_weight: lambda_w, >= 0. It is half as much work again, and here the divergence already draws codes of
            images to where samples lie: hence 0 by default, where :func:`fit_encoder`, whose generator is fixed, has 1.
        lr: Learning rate of Adam, > 0; one cosine after a short warm-up.
        batch_size: Images in a step.
        epoch_images: Images of an epoch at most, >= 1, each of other ones until all have been seen; all by default.
        seed: Of initialisation, order and noise.
        checkpoint: As for :func:`netwright.train.fit`.

    Returns:
        Both in one module in evaluation mode, its parameters frozen and the statistics of w taken; and the history.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> pictures = torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8)
        >>> both, history = fit_style_autoencoder(pictures, epochs=1, w_dim=4, channels=(8, 8), batch_size=16)
        >>> both(pictures[:2] / 255).shape, sorted(history.last)
        (torch.Size([2, 1, 8, 8]), ['divergence', 'lr', 'reconstruction', 'seconds', 'train_loss'])
    """
    for name, value in (("kl_weight", kl_weight), ("latent_weight", latent_weight)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {value}")
    check_pictures(images)
    shape: tuple[int, int, int] = tuple(images.shape[1:])  # type: ignore[assignment]
    with seeded(seed, "init", "generator"):
        network = StyleAutoEncoder(StyleGenerator(shape, w_dim, channels=channels), channels[::-1])
    history = fit(
        _AutoEncoding(network, lr, kl_weight, latent_weight),
        picture_batches(images, batch_size, seed, "generator", epoch_images),
        epochs=epochs,
        callbacks=[CosineProgress(warmup=0.05)],
        seed=seed,
        checkpoint=checkpoint,
        description="natra: generator",
    )
    network.eval().requires_grad_(False)
    network.generator.measure()
    return network, history


def fit_encoder(
    generator: nn.Module,
    encoder: nn.Module,
    images: Pictures,
    *,
    epochs: int = 5,
    lambda_perceptual: float = 0.8,
    lambda_latent: float = 1.0,
    perceptual: Any = None,
    lr: float = 1e-3,
    batch_size: int = 64,
    seed: int = 0,
) -> History:
    """Trains an encoder in place for a generator that is there already and stays as it is.

    Meanwhile the generator is in evaluation mode and, like the network behind ``perceptual``, where the batches are.

    Args:
        generator: As :class:`netwright.train.natra.Generator` describes it.
        encoder: Gives S times d numbers an image; :class:`netwright.train.natra.ImageEncoder` is one.
        images: uint8, or floats in [0, 1].
        epochs: >= 1.
        lambda_perceptual: Weight of the distance of features, >= 0; none without ``perceptual``.
        lambda_latent: Weight of the distance of codes of generated samples, >= 0.
        perceptual: phi, gives a list of features of images: an ``nn.Module``, which is in evaluation mode meanwhile,
            :class:`netwright.train.natra.ClassifierFeatures`, or a function, which must be where the batches are.
        lr: Learning rate of Adam, > 0.
        batch_size: Images in a step.
        seed: Of order and samples.

    Raises:
        ValueError: If an argument is out of its range.
    """
    for name, value in (("lambda_perceptual", lambda_perceptual), ("lambda_latent", lambda_latent)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {value}")
    check_pictures(images)
    with contextlib.ExitStack() as stack:
        for module in _modules(generator, perceptual):
            stack.enter_context(_kept(module))
        return fit(
            _Encoding(encoder, generator, lr, (lambda_perceptual, lambda_latent), perceptual),
            picture_batches(images, batch_size, seed, "encoder"),
            epochs=epochs,
            callbacks=[CosineProgress(warmup=0.05)],
            seed=seed,
            description="natra: encoder",
        )


def check_pictures(images: Tensor) -> None:
    """Refuses what is no batch of pictures.

    Raises:
        ValueError: If images are not four-dimensional, or floats outside [0, 1].
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images must have shape (images, channels, height, width), got {tuple(images.shape)}")
    if images.dtype != torch.uint8:
        if not images.is_floating_point() or not bool(images.isfinite().all()):
            raise ValueError(f"images must be uint8 or finite floats, got {images.dtype}")
        if float(images.min()) < 0 or float(images.max()) > 1:
            raise ValueError(f"images must lie in [0, 1], got {float(images.min()):.3g}..{float(images.max()):.3g}")
