"""Natural transformations: images whose codes have moved along directions that leave the class alone.

    T(x) = G(w(x) + sum_j c_j sigma_j u_j),    or clip(x + G(w + ..) - G(w)), which is x itself at c = 0

Wang et al., "Robust Training Using Natural Transformation", 2021, arXiv:2105.04070; formulas are netwright's reading.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from netwright.console import task
from netwright.nn.modes import in_mode
from netwright.train.adversarial import without_gradients
from netwright.train.natra.codes import LatentCodes
from netwright.train.natra.directions import Directions
from netwright.train.natra.generator import IMAGE_RANGE

GRID_VALUES = 5


class NaturalTransform(nn.Module):
    """Moves the codes of images along directions and decodes them; at 0 it is the identity.

    Args:
        generator: G; it is used in evaluation mode, and its parameters get no gradient.
        codes: Of the images. Like directions and images they go where the module goes.
        directions: u_j and sigma_j.
        images: The images themselves, of the size and in the range of the generator's, which is its ``image_range`` or
            [0, 1]; needed for ``keep_residual``.
        keep_residual: Whether the difference of two decoded images is added to the image, so that what the codes miss
            of it stays. Without it images are what the generator makes of their codes.

    Raises:
        ValueError: If ``keep_residual`` is asked for without images, their number differs from that of the codes, or
            their size or range from the generator's.

    Example:
        >>> from netwright.train.natra import DecoderGenerator
        >>> generator = DecoderGenerator(nn.Identity(), latent_dim=2)
        >>> x = torch.tensor([[0.5, 0.5], [0.2, 0.4]])
        >>> axes = Directions(torch.eye(2), torch.tensor([0.1, 0.2]))
        >>> transform = NaturalTransform(generator, LatentCodes(x[:, None, None]), axes, x)
        >>> transform(torch.tensor([1]), torch.tensor([[1.0, 0.0]]))
        tensor([[0.3000, 0.4000]])
    """

    def __init__(
        self,
        generator: nn.Module,
        codes: LatentCodes,
        directions: Directions,
        images: Float[Tensor, "images ..."] | None = None,
        *,
        keep_residual: bool = True,
    ):
        super().__init__()
        if keep_residual and images is None:
            raise ValueError("keep_residual needs images: give them, or keep_residual=False")
        if images is not None and len(images) != len(codes):
            raise ValueError(f"images must be as many as codes, {len(codes)}, got {len(images)}")
        self.generator, self.codes, self.directions = generator, codes, directions
        self.images, self.keep_residual = images, keep_residual
        self.image_range: tuple[float, float] = getattr(generator, "image_range", IMAGE_RANGE)
        if images is not None:
            with torch.no_grad(), in_mode(generator, training=False):
                self._check_images(images, codes[:1].decode(generator).shape[1:])  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NaturalTransform:
        super()._apply(fn, recurse)
        codes, axes = self.codes, self.directions
        alpha = None if codes.alpha is None else fn(codes.alpha)
        self.codes = dataclasses.replace(codes, w=fn(codes.w), alpha=alpha)
        self.directions = dataclasses.replace(axes, vectors=fn(axes.vectors), scale=fn(axes.scale))
        self.images = None if self.images is None else fn(self.images)
        return self

    def _check_images(self, images: Tensor, size: torch.Size) -> None:
        if images.shape[1:] != size:
            raise ValueError(f"images must have the generator's size {tuple(size)}, got {tuple(images.shape[1:])}")
        least, most = (float(value) for value in images.detach().aminmax())
        low, high = self.image_range
        if not low <= least <= most <= high:
            got = f"{least:.3g}..{most:.3g}"
            raise ValueError(f"images must lie in [{low:g}, {high:g}] as the generator's do, got {got}")

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def num_directions(self) -> int:
        """J."""
        return len(self.directions)

    def forward(
        self,
        codes: Int[Tensor, "batch"] | LatentCodes,
        coeff: Float[Tensor, "batch directions"],
        images: Float[Tensor, "batch ..."] | None = None,
        still: Float[Tensor, "batch ..."] | None = None,
    ) -> Float[Tensor, "batch ..."]:
        """Transformed images, with a gradient to ``coeff``.

        Args:
            codes: Indices into the codes that are kept, or others; then ``images`` are needed for the residual.
            coeff: c_j, in standard deviations; like indices on any device, whereas images are made where the codes are.
            images: What other codes are of, in the generator's size and range.
            still: What :meth:`still` gives for the same codes, if it is there already: half of the decoding.

        Raises:
            ValueError: If ``coeff`` has not a number for each direction, or the residual of other codes is asked for
                without their images, or with others than the generator's.
        """
        if images is not None and self.images is not None:
            self._check_images(images, self.images.shape[1:])
        if isinstance(codes, Tensor):
            codes = codes.to(self.codes.w.device)
            images = self.images[codes] if images is None and self.images is not None else images
            codes = self.codes[codes]
        if self.keep_residual and images is None:
            raise ValueError("images must be given with other codes, since the residual is kept")
        if still is None:
            still = self.still(codes)
        with in_mode(self.generator, training=False), without_gradients(self.generator):
            return self._moved(codes, coeff.to(codes.w.device), images, still)

    def still(self, codes: Int[Tensor, "batch"] | LatentCodes) -> Float[Tensor, "batch ..."] | None:
        """What the generator makes of codes as they are, without gradient; None where no residual is kept."""
        if not self.keep_residual:
            return None
        if isinstance(codes, Tensor):
            codes = self.codes[codes.to(self.codes.w.device)]
        with in_mode(self.generator, training=False):
            return self._decoded(codes)

    @torch.no_grad()
    def _decoded(self, codes: LatentCodes) -> Tensor:
        """G of codes that have not moved, computed as those that have: equal codes give equal bits."""
        nowhere = codes.w.new_zeros(len(codes), self.num_directions)
        return codes.decode(self.generator, self._shift(nowhere))  # type: ignore[arg-type]

    def _shift(self, coeff: Tensor) -> Tensor:
        layers: int = self.generator.num_layers  # type: ignore[assignment]
        return self.directions.shift(coeff, layers)

    def _moved(self, codes: LatentCodes, coeff: Tensor, images: Tensor | None, still: Tensor | None) -> Tensor:
        moved = codes.decode(self.generator, self._shift(coeff))  # type: ignore[arg-type]
        if images is None or still is None or not self.keep_residual:
            return moved
        # x + 0 has all the bits of x; (x + G(w')) - G(w) would not.
        return (images + (moved - still)).clamp(*self.image_range)

    def at(
        self,
        index: Int[Tensor, "batch"],
        direction: Int[Tensor, "batch"],
        eps: Float[Tensor, "batch"],
        still: Float[Tensor, "batch ..."] | None = None,
    ) -> Float[Tensor, "batch ..."]:
        """Images moved along one direction each, by ``eps`` standard deviations; ``still`` as for the call."""
        coeff = eps.new_zeros(len(index), self.num_directions)
        return self(index, coeff.scatter_(1, direction[:, None], eps[:, None]), still=still)

    def candidates(
        self, index: Int[Tensor, "batch"], direction: Int[Tensor, "k batch"], eps: Float[Tensor, "k batch"]
    ) -> tuple[Float[Tensor, "made ..."], Int[Tensor, "k batch"]]:
        """Images moved in k ways each, by k + 1 decodings of the batch; and which of what is made each one is."""
        still = self.still(index)
        made = [self.at(index, *way, still) for way in zip(direction, eps, strict=True)]
        return torch.cat(made), torch.arange(direction.numel()).view(direction.shape)

    def choose(
        self, draws: Float[Tensor, "batch 2"], eps_max: float
    ) -> tuple[Int[Tensor, "batch"], Float[Tensor, "batch"]]:
        """Directions and steps, uniform over all and over [-eps_max, eps_max], from pairs of numbers in [0, 1)."""
        return _which(draws[:, 0], self.num_directions), eps_max * (2 * draws[:, 1] - 1)

    def grid(self, eps_max: float = 2.0, values: int = GRID_VALUES, *, batch_size: int = 256) -> TransformGrid:
        """All images along all directions at ``values`` equal steps from -eps_max to eps_max, decoded once.

        Raises:
            ValueError: If ``eps_max`` is not positive, ``values`` below 2, or the generator's images are not in [0, 1].
        """
        low, high = self.image_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"a grid holds images in [0, 1], the generator's lie in [{low:g}, {high:g}]")
        if not eps_max > 0:
            raise ValueError(f"eps_max must be > 0, got {eps_max}")
        if values < 2:
            raise ValueError(f"values must be >= 2, got {values}")
        eps = torch.linspace(-eps_max, eps_max, values)
        made: list[Tensor] = []
        with in_mode(self.generator, training=False), task("natra: transformed images", total=len(self)) as bar:
            for index in torch.arange(len(self)).split(batch_size):
                made.append(self._all(index, eps))
                bar.advance(len(index))
        return TransformGrid(torch.cat(made), eps)

    @torch.no_grad()
    def _all(self, index: Tensor, eps: Tensor) -> UInt8[Tensor, "batch directions values ..."]:
        """Some images along all directions at all steps, a byte a number."""
        codes = self.codes[index]
        images = self.images[index] if self.keep_residual and self.images is not None else None
        still = None if images is None else self._decoded(codes)
        found = []
        for j in range(self.num_directions):
            for value in eps:
                coeff = codes.w.new_zeros(len(index), self.num_directions)
                coeff[:, j] = value
                moved = self._moved(codes, coeff, images, still)
                found.append(moved.clamp(0, 1).mul(255).round_().byte().cpu())
        stacked = torch.stack(found, 1)
        return stacked.view(len(index), self.num_directions, len(eps), *stacked.shape[2:])


class TransformGrid:
    """Transformed images that were made before, at a few steps along each direction, a byte a pixel.

    Args:
        images: (N, J, E, channels, height, width) uint8.
        eps: The E steps, in standard deviations, ascending.

    Raises:
        ValueError: If a shape or a type is wrong.

    Example:
        >>> grid = TransformGrid(torch.zeros(4, 2, 3, 1, 5, 5, dtype=torch.uint8), torch.tensor([-2.0, 0.0, 2.0]))
        >>> grid.at(torch.tensor([0, 3]), torch.tensor([1, 1]), torch.tensor([-2.0, 2.0])).shape
        torch.Size([2, 1, 5, 5])
    """

    def __init__(
        self,
        images: UInt8[Tensor, "images directions values channels height width"],
        eps: Float[Tensor, "values"],
    ):
        if images.ndim < 4 or images.dtype != torch.uint8 or images.shape[2] != len(eps):
            raise ValueError(
                f"images must be (images, directions, {len(eps)}, ...) uint8, got {tuple(images.shape)} {images.dtype}"
            )
        if not bool((eps.diff() > 0).all()):
            raise ValueError(f"eps must ascend, got {eps.tolist()}")
        self.images, self.eps = images, eps
        self._middles = (eps[1:] + eps[:-1]) / 2
        still = [place for place, value in enumerate(eps.tolist()) if value == 0 and _alike(images[:, :, place])]
        self._still = still[0] if still else -1  # the step that is one image, whatever the direction

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_directions(self) -> int:
        """J."""
        return self.images.shape[1]

    def at(
        self, index: Int[Tensor, "batch"], direction: Int[Tensor, "batch"], eps: Float[Tensor, "batch"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The images in [0, 1] at the step of the grid that is nearest to ``eps``."""
        return self._read(index.cpu(), direction.cpu(), self._place(eps))

    def candidates(
        self, index: Int[Tensor, "batch"], direction: Int[Tensor, "k batch"], eps: Float[Tensor, "k batch"]
    ) -> tuple[Float[Tensor, "made channels height width"], Int[Tensor, "k batch"]]:
        """Images in k ways each, equal ones once; and which of what is made each one is."""
        place = self._place(eps)
        direction = direction.cpu().where(place != self._still, 0)
        cells = self.num_directions * len(self.eps)
        wanted = torch.arange(len(index)) * cells + direction * len(self.eps) + place
        made, which = wanted.unique(return_inverse=True)
        cell = made % cells
        return self._read(index.cpu()[made // cells], cell // len(self.eps), cell % len(self.eps)), which

    def _place(self, eps: Tensor) -> Tensor:
        return torch.bucketize(eps.cpu(), self._middles, right=True)

    def _read(self, index: Tensor, direction: Tensor, place: Tensor) -> Tensor:
        return self.images[index, direction, place].float().div_(255)

    def choose(
        self, draws: Float[Tensor, "batch 2"], eps_max: float
    ) -> tuple[Int[Tensor, "batch"], Float[Tensor, "batch"]]:
        """Directions and steps of the grid, uniform over those within [-eps_max, eps_max], from pairs in [0, 1).

        Raises:
            ValueError: If no step of the grid lies there.
        """
        inside = self.eps[self.eps.abs() <= eps_max * (1 + 1e-6)]
        if not len(inside):
            raise ValueError(f"eps_max must reach a step of the grid, {self.eps.abs().min():g}, got {eps_max}")
        return _which(draws[:, 0], self.num_directions), inside[_which(draws[:, 1], len(inside))]


def _alike(images: UInt8[Tensor, "images directions ..."]) -> bool:
    return all(torch.equal(images[:, 0], other) for other in images.unbind(1))


def _which(draws: Float[Tensor, "batch"], count: int) -> Int[Tensor, "batch"]:
    """One of ``count``, from numbers in [0, 1)."""
    return (draws * count).long().clamp_max(count - 1)
