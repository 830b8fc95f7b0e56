"""A style generator that was trained as an auto-encoder, sharpened against a critic.

Means of squares blur what they cannot tell. Gulrajani et al., "Improved Training of Wasserstein GANs", NeurIPS 2017,
arXiv:1704.00028, with the term of the auto-encoder kept, so that the encoder goes on to fit:

    L_D = E D(G(z)) - E D(x) + l_gp E (|grad D(x^)| - 1)^2,    L_G = -E D(G(z)) + l_rec |G(E(x)) - x|^2
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional

from netwright.results import History
from netwright.seeding import seeded
from netwright.train.adversarial import gradient_penalty, without_gradients
from netwright.train.classifier import channels_last
from netwright.train.fitting import fit
from netwright.train.natra.fitting import Pictures, check_pictures, picture_batches
from netwright.train.natra.generator import ImageEncoder, StyleAutoEncoder

BETAS = 0.0, 0.9  # of Adam, as published


class _Sharpening(lightning.LightningModule):
    """Every batch is a step of the critic, every few one of generator and encoder."""

    def __init__(
        self, network: StyleAutoEncoder, critic: nn.Module, lr: float, n_critic: int, penalty: float, weight: float
    ):
        super().__init__()
        self.automatic_optimization = False
        self.network = network.to(memory_format=torch.channels_last)
        self.critic = critic.to(memory_format=torch.channels_last)
        self.lr, self.n_critic, self.penalty, self.weight = lr, n_critic, penalty, weight

    def _made(self, like: Tensor) -> Tensor:
        generator = self.network.generator
        return channels_last(generator(torch.randn(len(like), generator.z_dim, device=like.device)))

    def critic_terms(self, x: Tensor) -> dict[str, Tensor]:
        """The terms of L_D, weighted."""
        with torch.no_grad():
            made = self._made(x)
        given = self.critic(torch.cat([x, made])).view(-1)
        distance = given[len(x) :].mean() - given[: len(x)].mean()
        return {"critic": distance, "penalty": self.penalty * gradient_penalty(self.critic, x, made)}

    def generator_terms(self, x: Tensor) -> dict[str, Tensor]:
        """The terms of L_G, weighted; none of them leaves a gradient on the critic."""
        with without_gradients(self.critic):
            source = -self.critic(self._made(x)).mean()
        return {"source": source, "reconstruction": self.weight * functional.mse_loss(self.network(x), x)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """A step of the critic, and one of generator and encoder when their turn has come."""
        x = channels_last(batch[0])
        of_network, of_critic = self.optimizers()  # type: ignore[attr-defined]
        terms = self.critic_terms(x)
        self._update(of_critic, terms)
        step = self.current_epoch * int(self.trainer.num_training_batches) + batch_idx
        if (step + 1) % self.n_critic == 0:
            own = self.generator_terms(x)
            self._update(of_network, own)
            terms |= own
        logged = {name: value.detach() for name, value in terms.items()}
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=len(x))
        return terms["critic"].detach()

    def _update(self, optimizer: Any, terms: dict[str, Tensor]) -> None:
        optimizer.zero_grad()
        self.manual_backward(torch.stack(list(terms.values())).sum())
        optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for generator and encoder, Adam for the critic."""
        return [torch.optim.Adam(part.parameters(), lr=self.lr, betas=BETAS) for part in (self.network, self.critic)]


def sharpen_style_autoencoder(
    network: StyleAutoEncoder,
    images: Pictures,
    *,
    steps: int = 2000,
    n_critic: int = 5,
    penalty: float = 10.0,
    reconstruction: float = 10.0,
    channels: Sequence[int] = (16, 32, 64),
    lr: float = 1e-4,
    batch_size: int = 64,
    epoch_images: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> History:
    """Trains a generator and its encoder further in place, against a critic that is thrown away.

    Args:
        network: As :func:`netwright.train.natra.fit_style_autoencoder` gives it.
        images: uint8, or floats in [0, 1]; those it was trained on.
        steps: Of the critic, >= 1; whole epochs are made of them.
        n_critic: Steps of the critic for each of the generator, >= 1.
        penalty: l_gp, > 0.
        reconstruction: l_rec, >= 0.
        channels: Of the critic's convolutions; it has no norms, as the penalty on each image needs it.
        lr: Learning rate of Adam for both, > 0.
        batch_size: Images in a step.
        epoch_images: Images of an epoch at most, as for :func:`netwright.train.natra.fit_style_autoencoder`.
        seed: Of the critic's initialisation, order and noise.
        checkpoint: As for :func:`netwright.train.fit`.

    Returns:
        The history; ``network`` is in evaluation mode afterwards, frozen, the statistics of w taken anew.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from netwright.train.natra import StyleGenerator
        >>> both = StyleAutoEncoder(StyleGenerator((1, 8, 8), w_dim=4, channels=(8, 8)), (8, 8))
        >>> pictures = torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8)
        >>> history = sharpen_style_autoencoder(both, pictures, steps=4, n_critic=2, channels=(8,), batch_size=16)
        >>> sorted(set(history.last) & {"critic", "penalty", "source", "reconstruction"})
        ['critic', 'penalty', 'reconstruction', 'source']
    """
    for name, value in (("steps", steps), ("n_critic", n_critic)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    if not 0 < penalty < math.inf:
        raise ValueError(f"penalty must be > 0 and finite, got {penalty}")
    if not 0 <= reconstruction < math.inf:
        raise ValueError(f"reconstruction must be >= 0 and finite, got {reconstruction}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be > 0 and finite, got {lr}")
    check_pictures(images)
    planes, height, width = network.generator.image_shape
    if tuple(images.shape[1:]) != (planes, height, width):
        raise ValueError(f"images must be of {(planes, height, width)}, got {tuple(images.shape[1:])}")
    with seeded(seed, "init", "critic"):
        critic = ImageEncoder((planes, height, width), 1, channels)
    batches = picture_batches(images, batch_size, seed, "sharpening", epoch_images)
    network.requires_grad_(True)
    try:
        history = fit(
            _Sharpening(network, critic, lr, n_critic, penalty, reconstruction),
            batches,
            epochs=max(1, round(steps / len(batches))),
            seed=seed,
            checkpoint=checkpoint,
            description="natra: sharpening",
        )
    finally:
        network.eval().requires_grad_(False)
    network.generator.measure()
    return history
