"""How a classifier stands up to distortions of its images: accuracy under each, beside that without any."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from netwright.nn.modes import in_mode
from netwright.seeding import stream

CLEAN = "clean"


def common_corruptions(seed: int = 0) -> dict[str, Callable[[Tensor], Tensor]]:
    """Distortions that no generator is needed for, of images (batch, channels, height, width) in [0, 1].

    Gaussian noise of deviation 0.1, Gaussian blur of one pixel, brightness raised by 0.2, contrast halved about the
    image's mean, and a shift by two pixels to the right and down.

    Args:
        seed: Of the noise, which is another one in each batch and the same in each :func:`distortion_report`.

    Example:
        >>> sorted(common_corruptions())
        ['blur', 'brightness', 'contrast', 'noise', 'shift']
    """

    def contrast(x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3), keepdim=True)
        return mean + 0.5 * (x - mean)

    def shift(x: Tensor) -> Tensor:
        return nn.functional.pad(x, (2, 0, 2, 0))[..., : x.shape[-2], : x.shape[-1]]

    return {
        "noise": _Noise(seed),
        "blur": lambda x: gaussian_blur(x, [5, 5], [1.0, 1.0]),
        "brightness": lambda x: (x + 0.2).clamp(0, 1),
        "contrast": contrast,
        "shift": shift,
    }


class _Noise:
    """Gaussian noise of deviation 0.1, from a stream that a report begins again."""

    def __init__(self, seed: int):
        self.seed = seed
        self.restart()

    def restart(self) -> None:
        self.draws = stream(self.seed, "corruptions")

    def __call__(self, x: Tensor) -> Tensor:
        return (x + 0.1 * torch.randn(x.shape, generator=self.draws).to(x)).clamp(0, 1)


@torch.no_grad()
def distortion_report(
    model: nn.Module, transforms: Mapping[str, Callable[[Tensor], Tensor]], loader: Iterable[tuple[Tensor, ...]]
) -> dict[str, float]:
    """Accuracy on images as they are, and under each distortion.

    Args:
        model: Maps images as the loader gives them to logits; in evaluation mode meanwhile.
        transforms: Name to a function of a batch of images; :func:`common_corruptions` are such, and so are natural
            transformations, those that were trained with and others.
        loader: Batches (images, labels, ...).

    Returns:
        ``"clean"`` and each name to an accuracy in [0, 1].

    Raises:
        ValueError: If a transform is called ``"clean"``, changes the shape of images, or there are no images.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = model[1].weight.data.copy_(torch.tensor([[-1.0, 0, 0, 0], [1.0, 0, 0, 0]]))
        >>> batches = [(torch.ones(3, 1, 2, 2), torch.ones(3, dtype=torch.long))]
        >>> distortion_report(model, {"turned": lambda x: -x}, batches)
        {'clean': 1.0, 'turned': 0.0}
    """
    if CLEAN in transforms:
        raise ValueError(f"transforms must not hold the name {CLEAN!r}, which is that of the images as they are")
    for transform in transforms.values():
        if isinstance(transform, _Noise):
            transform.restart()
    right = dict.fromkeys((CLEAN, *transforms), 0)
    count = 0
    with in_mode(model, training=False):
        for x, labels, *_ in loader:
            count += len(labels)
            for name in right:
                changed = x if name == CLEAN else transforms[name](x)
                if changed.shape != x.shape:
                    raise ValueError(f"{name} must keep the shape {tuple(x.shape)}, got {tuple(changed.shape)}")
                right[name] += int((model(changed).argmax(1) == labels).sum())
    if not count:
        raise ValueError("loader must give at least 1 image, got 0")
    return {name: found / count for name, found in right.items()}
