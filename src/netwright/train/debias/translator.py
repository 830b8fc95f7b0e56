"""Stage 1 of CDvG: an image translator whose domains are the classes, and which therefore learns to change the bias.

Jung, Shim, Yang and Yang, "Fighting Fire with Fire: Contrastive Debiasing without Bias-free Data via Generative
Bias-transformation", ICML 2023, arXiv:2112.01021. The translator and its numbers are StarGAN's (arXiv:1711.09020):

    L_D = -E D_src(x) + E D_src(G(x, y')) + l_gp E (|grad D_src(x^)| - 1)^2 + l_cls CE(D_cls(x), y)
    L_G = -E D_src(G(x, y')) + l_cls CE(D_cls(G(x, y')), y') + l_rec E |x - G(G(x, y'), y)|

To look like class y' the colour suffices where colour tells the class, and the last term makes everything else cheapest
to keep. Where bias and signal are equally easy, the translator changes the signal too: look at what it makes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn import functional

from netwright import storage
from netwright.checks import number, whole
from netwright.console import UserError
from netwright.nn.modes import in_mode
from netwright.seeding import derive, stream
from netwright.train.adversarial import gradient_penalty, without_gradients
from netwright.train.debias.networks import StarGANDiscriminator, StarGANGenerator, check_classes, image_sides

Targets = Literal["permute", "uniform"]
OUTSIDE = 1e-3  # by which images may leave [-1, 1]
SMALL = 64  # pixels a side below which the published sizes make no sense


def check_signed(images: Tensor) -> None:
    """Refuses images that are not in [-1, 1], as a generator that ends in tanh needs them.

    Raises:
        ValueError: If a pixel lies outside by more than 0.001, or is no number.
    """
    low, high = (float(value) for value in images.detach().aminmax()) if images.numel() else (0.0, 0.0)
    if not (low >= -1 - OUTSIDE and high <= 1 + OUTSIDE):
        raise ValueError(
            f"images must lie in [-1, 1], got {low:.4g}..{high:.4g}: standardise with Normalise([0.5] * C, [0.5] * C)"
        )


class BiasTranslator(lightning.LightningModule):
    """StarGAN with the classes as domains. Batches are (x, y), with x in [-1, 1]; every batch is a step of the critic.

    Args:
        num_classes: At least 2.
        image_size: Side of the images, or (height, width); 2^n_down divides it.
        lambda_cls: Weight of the class loss, >= 0.
        lambda_rec: Weight of the reconstruction, >= 0; small ones let the signal change too.
        lambda_gp: Weight of the gradient penalty, >= 0.
        n_critic: Steps of the critic for each of the generator, >= 1.
        lr: Of Adam for both, > 0; constant for half of the training, then falling to 0 on a line. The Trainer tells how
            long that is, by epochs or steps; where a time alone limits it the rate is constant.
        targets: Where the wanted class of an image comes from: ``"permute"`` takes the batch's own labels in another
            order, as StarGAN does, ``"uniform"`` draws from all classes.
        channels: Of the images.
        width: Of the first convolution of both networks.
        n_down: As for :class:`StarGANGenerator`.
        n_res: Likewise.
        kernel: Likewise.
        n_layers: As for :class:`StarGANDiscriminator`.
        betas: Of Adam.
        penalty_every: Steps of the critic from one gradient penalty to the next, whose weight grows by as much.
        penalty_share: Share of the batch on which it is computed, in (0, 1].
        seed: Of targets and of places between real and made images.

    Raises:
        ValueError: If a number is out of its range; in training if images are not in [-1, 1], labels are no classes or
            the shape is another one.

    Example:
        >>> translator = BiasTranslator(2, 8, width=4, n_down=1, n_res=1, n_layers=2)
        >>> translator.translate(torch.zeros(3, 3, 8, 8), torch.tensor([0, 1, 1])).shape
        torch.Size([3, 3, 8, 8])
    """

    def __init__(
        self,
        num_classes: int,
        image_size: int | Sequence[int],
        lambda_cls: float = 1.0,
        lambda_rec: float = 10.0,
        lambda_gp: float = 10.0,
        n_critic: int = 5,
        lr: float = 1e-4,
        targets: Targets = "permute",
        *,
        channels: int = 3,
        width: int = 64,
        n_down: int = 2,
        n_res: int = 6,
        kernel: int = 7,
        n_layers: int = 6,
        betas: tuple[float, float] = (0.5, 0.999),
        penalty_every: int = 1,
        penalty_share: float = 1.0,
        seed: int = 0,
    ):
        super().__init__()
        sides = image_sides(image_size)
        derive(seed)
        whole("num_classes", num_classes, ">= 2")
        for name, value in {"lambda_cls": lambda_cls, "lambda_rec": lambda_rec, "lambda_gp": lambda_gp}.items():
            number(name, value, ">= 0")
        whole("n_critic", n_critic, ">= 1")
        whole("penalty_every", penalty_every, ">= 1")
        number("lr", lr, "> 0")
        number("penalty_share", penalty_share, "(0, 1]")
        if targets not in ("permute", "uniform"):
            raise ValueError(f"targets must be 'permute' or 'uniform', got {targets!r}")
        if n_down < 0 or any(side % 2**n_down for side in sides):
            raise ValueError(f"image_size must be divisible by 2^n_down = {2 ** max(n_down, 0)}, got {image_size}")
        self.automatic_optimization = False
        self.num_classes, self.shape = num_classes, (channels, *sides)
        self.lambda_cls, self.lambda_rec, self.lambda_gp = lambda_cls, lambda_rec, lambda_gp
        self.n_critic, self.lr, self.betas, self.targets = n_critic, lr, betas, targets
        self.penalty_every, self.penalty_share, self.seed = penalty_every, penalty_share, seed
        self.sizes: dict[str, Any] = {
            "num_classes": num_classes, "image_size": list(sides), "channels": channels, "width": width,
            "n_down": n_down, "n_res": n_res, "kernel": kernel, "n_layers": n_layers,
        }  # fmt: skip
        generator = StarGANGenerator(num_classes, channels, width, n_down, n_res, kernel)
        critic = StarGANDiscriminator(num_classes, sides, channels, width, n_layers)
        self.generator = generator.to(memory_format=torch.channels_last)
        self.critic = critic.to(memory_format=torch.channels_last)

    @classmethod
    def sized(cls, num_classes: int, shape: Sequence[int], **options: Any) -> BiasTranslator:
        """A translator for images of ``shape``: the published sizes, or small ones below 64 pixels.

        Args:
            num_classes: At least 2.
            shape: (channels, height, width), any sides.
            options: As for the class; they go before what is chosen here.

        Example:
            >>> translator = BiasTranslator.sized(10, (3, 28, 28))
            >>> translator.sizes["width"], translator.sizes["n_down"]
            (16, 1)
        """
        channels, *sides = shape
        small = min(sides) < SMALL
        halvings = next(n for n in (1 if small else 2, 1, 0) if not any(side % 2**n for side in sides))
        chosen = {
            "channels": channels,
            "width": 16 if small else 64,
            "n_down": halvings,
            "n_res": 2 if small else 6,
            "kernel": 5 if small else 7,
            "n_layers": max(1, min(3 if small else 6, int(math.log2(max(1, min(sides)))))),
        }
        return cls(num_classes, sides, **(chosen | options))

    def forward(
        self, x: Float[Tensor, "batch channels height width"], y: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch channels height width"]:
        """What the generator makes of ``x`` for the classes ``y``."""
        return self.generator(x, y)

    @torch.no_grad()
    def translate(
        self, x: Float[Tensor, "batch channels height width"], y_target: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Images in [-1, 1] as images of other classes, without gradients, in evaluation mode, on the device of ``x``.

        Raises:
            ValueError: If the images are not in [-1, 1], of another shape, or the labels are no classes.
        """
        check_signed(x)
        device = next(self.generator.parameters()).device
        with in_mode(self.generator, training=False):
            found = self.generator(x.to(device, memory_format=torch.channels_last), y_target.to(device))
        return found.to(x.device)

    def draw_targets(self, y: Int[Tensor, "batch"], generator: Generator) -> Int[Tensor, "batch"]:
        """The class that each image of a batch shall be turned into."""
        if self.targets == "permute":
            return y[torch.randperm(len(y), generator=generator).to(y.device)]
        return torch.randint(self.num_classes, (len(y),), generator=generator).to(y.device)

    def critic_losses(
        self, x: Tensor, y: Tensor, targets: Tensor, generator: Generator | None = None, penalised: bool = True
    ) -> dict[str, Tensor]:
        """The terms of L_D, unweighted: ``source`` (D_src of made minus of real), ``classes`` and ``penalty``.

        Args:
            x: Real images.
            y: Their labels.
            targets: Classes to translate into.
            generator: Of places between real and made images, and of the share of the batch that is penalised.
            penalised: Whether the penalty is computed; 0 otherwise.
        """
        with torch.no_grad():
            made = self.generator(x, targets)
        source, classes = self.critic(torch.cat([x, made]))  # one pass for both
        count = len(x)
        # Each image's map is averaged; all images have as many patches.
        found = {
            "source": source[count:].mean() - source[:count].mean(),
            "classes": functional.cross_entropy(classes[:count], y),
            "penalty": x.new_zeros(()),
        }
        if penalised and self.lambda_gp:
            rows = slice(None)
            if self.penalty_share < 1:
                wanted = max(1, round(self.penalty_share * count))
                rows = torch.randperm(count, generator=generator)[:wanted].to(x.device)  # type: ignore[assignment]
            found["penalty"] = gradient_penalty(self.critic, x[rows], made[rows], generator)
        return found

    def generator_losses(self, x: Tensor, y: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The terms of L_G, unweighted: ``source``, ``classes``, and ``reconstruction`` (mean over pixels)."""
        made = self.generator(x, targets)
        source, classes = self.critic(made)
        return {
            "source": -source.mean(),
            "classes": functional.cross_entropy(classes, targets),
            "reconstruction": functional.l1_loss(self.generator(made, y), x),
        }

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """A step of the critic, and one of the generator when its turn has come; the critic's loss."""
        x, y = batch[0].contiguous(memory_format=torch.channels_last), batch[1]
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"images must have shape (batch, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        check_signed(x)
        check_classes("labels", y, len(x), self.num_classes)
        step = self.trainer.fit_loop.total_batch_idx
        rate = self.lr * min(1.0, max(0.0, 2 * (1 - step / self._length())))
        draws = stream(self.seed, "translator", step, self.global_rank)
        of_generator, of_critic = self.optimizers()  # type: ignore[attr-defined]
        for optimizer in (of_generator, of_critic):
            for group in optimizer.param_groups:
                group["lr"] = rate
        targets = self.draw_targets(y, draws)
        penalised = step % self.penalty_every == 0
        terms = self.critic_losses(x, y, targets, draws, penalised)
        loss = terms["source"] + self.lambda_cls * terms["classes"]
        loss = loss + self.lambda_gp * self.penalty_every * terms["penalty"]
        self._update(of_critic, loss)
        logged = {f"critic_{name}": value.detach() for name, value in terms.items()}
        if (step + 1) % self.n_critic == 0:
            with without_gradients(self.critic):
                terms = self.generator_losses(x, y, targets)
                weights = {"source": 1.0, "classes": self.lambda_cls, "reconstruction": self.lambda_rec}
                self._update(of_generator, sum((weights[name] * terms[name] for name in terms), x.new_zeros(())))
            logged |= {f"generator_{name}": value.detach() for name, value in terms.items()}
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=len(x))
        return loss.detach()

    def _length(self) -> float:
        """Batches of the whole training; infinite where neither epochs nor steps limit it."""
        epochs, steps = self.trainer.max_epochs, self.trainer.max_steps
        length = math.inf
        if epochs is not None and epochs > 0:
            length = float(epochs * self.trainer.num_training_batches)
        if steps > 0:
            # The Trainer counts the steps of both optimisers: n_critic batches make n_critic + 1 of them.
            length = min(length, steps - steps // (self.n_critic + 1))
        return length

    def _update(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for the generator, Adam for the critic."""
        networks = (self.generator, self.critic)
        return [torch.optim.Adam(network.parameters(), lr=self.lr, betas=self.betas) for network in networks]

    def save(self, path: str | Path) -> None:
        """Writes the generator and its sizes as one safetensors file; the critic is left out."""
        storage.write_tensors(path, self.generator.state_dict(), {"translator": json.dumps(self.sizes)})

    @classmethod
    def load(cls, path: str | Path) -> BiasTranslator:
        """Reads what :meth:`save` wrote; the critic has fresh weights.

        Raises:
            UserError: If the file is missing or damaged, or holds something else.
        """
        tensors, metadata = storage.read_tensors(path), storage.read_metadata(path)
        try:
            translator = cls(**json.loads(metadata["translator"]))
            translator.generator.load_state_dict(tensors)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError("no translator of netwright, or a damaged one", where=path) from error
        return translator
