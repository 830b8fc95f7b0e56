"""Batch inversion: the codes of many images at once, from an encoder's guess, refined by gradient steps ("BIES").

    min_w  |G(w) - x|^2 + lambda_p sum_l |phi_l(G(w)) - phi_l(x)|^2 / N_l + lambda_s (w - mean)^T Sigma^-1 (w - mean)

Wang et al., arXiv:2105.04070, name the module and its purpose ("batch inverse encoding and shifting"); loss, constants
and schedule are netwright's reading. The loss is the sum over the batch, so images do not act on each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.console import task
from netwright.nn.activations import caught, last_convolution, last_linear
from netwright.nn.modes import in_mode
from netwright.seeding import stream
from netwright.train.natra.codes import LatentCodes
from netwright.train.natra.generator import IMAGE_RANGE

Perceptual = Callable[[Tensor], Sequence[Tensor]]
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
NOISE = 0.1  # of the further codes at the start, as a share of the deviation of w


class ClassifierFeatures:
    """phi from a classifier that was trained on the same data: what its last convolution gives, and its last linear
    layer is given; each divided by its root mean square, so that a network's scale does not matter.

    Args:
        classifier: Of images as the generator makes them; in evaluation mode meanwhile.

    Raises:
        ValueError: If it has no convolution or no linear layer.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 2))
        >>> [tuple(part.shape) for part in ClassifierFeatures(net)(torch.rand(2, 1, 6, 6))]
        [(2, 4, 4, 4), (2, 64)]
    """

    def __init__(self, classifier: nn.Module):
        self.classifier = classifier
        self.layers = last_convolution(classifier), last_linear(classifier)

    def __call__(self, images: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """The features, of places and of the whole image."""
        first, second = self.layers
        with in_mode(self.classifier, training=False), caught(first) as places, caught(second, inputs=True) as last:
            self.classifier(images)
        found = []
        for part in (places[-1], last[-1]):
            size = part.detach().flatten(1).square().mean(1).add(1e-8).sqrt()
            found.append(part / size.view(-1, *[1] * (part.ndim - 1)))
        return found


class BatchInverter:
    """Finds the codes from which a generator makes given images, for whole batches together.

    Adam with a learning rate that falls to 0 along half a cosine; the best step of each image is kept, and an image is
    left alone once it is good enough.

    Args:
        generator: G, an ``nn.Module`` as :class:`netwright.train.natra.Generator` describes it; not changed.
        encoder: Images to codes (B, S, d) or (B, d) to start from; the mean code by default.
        steps: Gradient steps, >= 0: about 30 from an encoder, 100 to 500 without.
        lr: Learning rate of Adam, > 0.
        lambda_perceptual: Weight of the feature distance, >= 0; without ``perceptual`` there is none.
        lambda_prior: Weight of the squared Mahalanobis distance to the mean code, >= 0.
        num_codes: M codes for each image, >= 1.
        merge_layer: Where the feature maps of M codes are merged, in 0 .. S - 1; the middle by default.
        perceptual: phi, gives a list of features of images; :class:`ClassifierFeatures` is one.
        tol: Mean squared error of a pixel below which an image is left alone, >= 0.
        batch_size: Images at once, >= 1; a matter of memory only.
        seed: Of the noise that tells M codes apart.

    Raises:
        ValueError: If an argument is out of its range, or several codes are to be merged in a generator that cannot.

    Example:
        >>> from netwright.train.natra import DecoderGenerator
        >>> generator = DecoderGenerator(nn.Linear(2, 4, bias=False), latent_dim=2, image_range=(-9.0, 9.0))
        >>> w = torch.tensor([[1.0, -0.5]])
        >>> codes = BatchInverter(generator, steps=400, lambda_prior=0.0).invert(generator(w).detach())
        >>> torch.allclose(codes.mean[:, 0], w, atol=1e-2)
        True
    """

    def __init__(
        self,
        generator: nn.Module,
        encoder: Callable[[Tensor], Tensor] | None = None,
        steps: int = 100,
        lr: float = 0.05,
        lambda_perceptual: float = 0.8,
        lambda_prior: float = 1e-3,
        num_codes: int = 1,
        merge_layer: int | None = None,
        perceptual: Perceptual | None = None,
        *,
        tol: float = 0.0,
        batch_size: int = 256,
        seed: int = 0,
    ):
        for name, value, bound in (("steps", steps, 0), ("num_codes", num_codes, 1), ("batch_size", batch_size, 1)):
            if value < bound:
                raise ValueError(f"{name} must be >= {bound}, got {value}")
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be > 0 and finite, got {lr}")
        weights = {"lambda_perceptual": lambda_perceptual, "lambda_prior": lambda_prior, "tol": tol}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {weight}")
        layers: int = generator.num_layers  # type: ignore[assignment]  # a plain number
        merges = merge_layer is not None or num_codes > 1
        if merges and not (hasattr(generator, "features") and hasattr(generator, "render")):
            raise ValueError("generator must have features and render to merge codes at an inner layer")
        if merge_layer is not None and not 0 <= merge_layer < layers:
            raise ValueError(f"merge_layer must lie in 0..{layers - 1}, got {merge_layer}")
        self.generator, self.encoder, self.steps, self.lr = generator, encoder, steps, lr
        self.lambda_perceptual, self.lambda_prior, self.perceptual = lambda_perceptual, lambda_prior, perceptual
        self.num_codes, self.tol, self.batch_size, self.seed = num_codes, tol, batch_size, seed
        self.merge_layer = (layers // 2 if merge_layer is None else merge_layer) if merges else None
        cov: Tensor = generator.w_cov  # type: ignore[assignment]
        ridge = 1e-6 * cov.diagonal().mean().clamp_min(1e-12) * torch.eye(len(cov)).to(cov)
        self._precision = torch.linalg.inv((cov + ridge).double()).to(cov)

    def invert(
        self, x: Float[Tensor, "images ..."], start: LatentCodes | None = None, *, description: str | None = None
    ) -> LatentCodes:
        """The codes of images.

        Args:
            x: Images of any number, of the size and in the range of the generator's, which is its ``image_range`` or
                [0, 1].
            start: Codes to start from, one for each image, in place of the encoder's; they are what is returned for an
                image where no step is better.
            description: Of a progress bar; none by default.

        Raises:
            ValueError: If the images are not finite, not of the generator's size or range, or a reconstruction is not
                finite.
        """
        self._check(x)
        if start is not None and (len(start) != len(x) or start.w.shape[1] != 1):
            raise ValueError(f"start must hold one code for each of {len(x)} images, got {tuple(start.w.shape[:2])}")
        found = []
        with in_mode(self.generator, training=False):
            if description is None:
                return LatentCodes.joined([self._batch(x[rows], start and start[rows]) for rows in self._rows(len(x))])
            with task(description, total=len(x)) as bar:
                for rows in self._rows(len(x)):
                    found.append(self._batch(x[rows], start and start[rows]))
                    bar.advance(len(found[-1]))
        return LatentCodes.joined(found)

    def _rows(self, count: int) -> list[slice]:
        return [slice(first, first + self.batch_size) for first in range(0, count, self.batch_size)]

    def _check(self, x: Tensor) -> None:
        if len(x) < 1 or not x.is_floating_point():
            raise ValueError(f"x must be at least 1 image of floats, got {len(x)} of {x.dtype}")
        if not bool(x.isfinite().all()):
            raise ValueError("x must be finite, got NaN or infinity")
        low, high = getattr(self.generator, "image_range", IMAGE_RANGE)
        if not (float(x.min()) >= low - 1e-6 and float(x.max()) <= high + 1e-6):
            got = f"{float(x.min()):.3g}..{float(x.max()):.3g}"
            raise ValueError(f"x must lie in [{low:g}, {high:g}] as the generator's images do, got {got}")
        mean: Tensor = self.generator.w_mean  # type: ignore[assignment]
        layers: int = self.generator.num_layers  # type: ignore[assignment]
        with torch.no_grad(), in_mode(self.generator, training=False):
            made = self.generator.synthesis(mean.expand(1, layers, -1))  # type: ignore[operator]
        if made.shape[1:] != x.shape[1:]:
            raise ValueError(f"x must have the generator's size {tuple(made.shape[1:])}, got {tuple(x.shape[1:])}")

    @torch.no_grad()
    def _start(self, x: Tensor, start: LatentCodes | None) -> tuple[Tensor, Tensor | None]:
        """Codes (B, M, S, d), all M alike, and their weights."""
        mean: Tensor = self.generator.w_mean  # type: ignore[assignment]
        layers: int = self.generator.num_layers  # type: ignore[assignment]
        if start is not None:
            w = start.w[:, 0]
        elif self.encoder is None:
            w = mean.expand(len(x), layers, -1)
        else:
            w = self.encoder(x)
            w = w[:, None].expand(-1, layers, -1) if w.ndim == 2 else w
            if w.shape != (len(x), layers, len(mean)):
                raise ValueError(f"encoder must give {(len(x), layers, len(mean))}, got {tuple(w.shape)}")
        w = w[:, None].expand(-1, self.num_codes, -1, -1).clone()
        if self.merge_layer is None:
            return w, None
        maps = self.generator.features(w[:1, 0], self.merge_layer)  # type: ignore[operator]
        return w, torch.full((len(x), self.num_codes, maps.shape[1]), 1 / self.num_codes).to(w)

    def _batch(self, x: Tensor, start: LatentCodes | None) -> LatentCodes:
        w, alpha = self._start(x, start)
        wanted = [] if self._phi is None else [part.detach() for part in self._phi(x)]
        best = [part.clone() for part in (w, alpha) if part is not None]
        with torch.no_grad():
            best_loss, error = self._loss(LatentCodes(w, alpha, self.merge_layer), x, wanted)
        if self.num_codes > 1:
            cov: Tensor = self.generator.w_cov  # type: ignore[assignment]
            noise = torch.randn(1, *w.shape[1:], generator=stream(self.seed, "codes")).to(w)
            w = w + NOISE * cov.diagonal().clamp_min(0).sqrt() * noise  # the same for every image
        rows = (error >= self.tol).nonzero()[:, 0]
        values = [part[rows] for part in (w, alpha) if part is not None]
        first = [torch.zeros_like(part) for part in values]
        second = [torch.zeros_like(part) for part in values]
        for step in range(1, self.steps + 2):
            if not len(rows):
                break
            leaves = [part.detach().requires_grad_() for part in values]
            with torch.enable_grad():
                codes = LatentCodes(leaves[0], leaves[1] if len(leaves) > 1 else None, self.merge_layer)
                loss, error = self._loss(codes, x[rows], [part[rows] for part in wanted])
                last = step > self.steps
                slopes = () if last else torch.autograd.grad(loss.sum(), leaves)
            better = loss.detach() < best_loss[rows]
            best_loss[rows[better]] = loss.detach()[better]
            for kept, value in zip(best, values, strict=True):
                kept[rows[better]] = value[better]
            if last:
                break
            rate = self.lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / self.steps))
            for i, slope in enumerate(slopes):
                first[i].lerp_(slope, 1 - BETA1)
                second[i].lerp_(slope.square(), 1 - BETA2)
                size = (second[i] / (1 - BETA2**step)).sqrt_().add_(EPSILON)
                values[i] = values[i] - rate * (first[i] / (1 - BETA1**step)) / size
            going = error >= self.tol
            if not bool(going.all()):
                rows = rows[going]
                values, first, second = ([part[going] for part in each] for each in (values, first, second))
        return LatentCodes(best[0], best[1] if len(best) > 1 else None, self.merge_layer)

    @property
    def _phi(self) -> Perceptual | None:
        return self.perceptual if self.lambda_perceptual else None

    def _loss(self, codes: LatentCodes, x: Tensor, wanted: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Loss of each image, and its mean squared error of a pixel without gradient."""
        made = codes.decode(self.generator)  # type: ignore[arg-type]
        squares = (made - x).flatten(1).square().sum(1)
        loss = squares
        if self._phi is not None:
            for theirs, own in zip(self._phi(made), wanted, strict=True):
                loss = loss + self.lambda_perceptual * (theirs - own).flatten(1).square().mean(1)
        if self.lambda_prior:
            away = codes.w - self.generator.w_mean  # type: ignore[operator]
            distance = torch.einsum("bmsi,ij,bmsj->b", away, self._precision, away) / codes.w.shape[1]
            loss = loss + self.lambda_prior * distance
        if not bool(loss.detach().isfinite().all()):
            raise ValueError("reconstructions must be finite, got NaN or infinity from the generator: lower lr")
        return loss, squares.detach() / x[0].numel()
