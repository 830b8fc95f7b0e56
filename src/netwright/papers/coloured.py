"""Coloured digits, what translates them, and what knows their colours: the material of CDvG's experiment."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netwright.papers import classification

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from netwright.data import BiasedDataset
    from netwright.data.augment import Augmentation

CLASSES, BATCH = 10, 64


def parts(ratio: float, side: int, images: Sequence[int]) -> dict[str, BiasedDataset]:
    """Training and validation part of one share, test part with uniform colours; 14 x 14 in a frame for 16 pixels."""
    return _parts(ratio, side, tuple(images))


@functools.lru_cache(maxsize=2)
def _parts(ratio: float, side: int, images: tuple[int, ...]) -> dict[str, BiasedDataset]:
    from torch.nn import functional

    from netwright.data.biased import colored_mnist
    from netwright.seeding import stream

    found, _ = classification.parts("mnist-5000", 0, *images)
    made = {}
    for name, part in found.items():
        grey = part.images
        if side < grey.shape[-1]:
            grey = functional.pad(functional.avg_pool2d(grey.float(), 2).round().byte(), (1, 1, 1, 1))
        share = 1 / CLASSES if name == "test" else ratio
        made[name] = colored_mnist(grey, part.labels, share, generator=stream(0, "colours", name))
    return made


def translate(
    seed: int, ratio: float, side: int, images: Sequence[int], steps: int, reconstruction: float, file: str, fast: bool
) -> dict[str, Any]:
    """Trains a translator, keeps it and all its views in files, and measures what it changes on 500 training images.

    In a fast run it is half as wide, and the network that judges shapes is trained for one epoch.
    """
    import torch

    from netwright import storage
    from netwright.data import Batches, TensorImages
    from netwright.data.biased import nearest_color
    from netwright.seeding import seeded, stream
    from netwright.train import Classifier, fit
    from netwright.train.debias import BiasTranslator, ViewCache, signed_range, translation_rates

    data = parts(ratio, side, images)["train"]
    small = {"width": 8} if fast else {}
    with seeded(seed, "translator"):
        translator = BiasTranslator.sized(
            CLASSES, data.shape, lambda_rec=reconstruction, n_critic=2, lr=4e-4, seed=seed, **small
        )
    signed = signed_range(3)
    each = min(steps, 200)
    batches = Batches(data, 16, seed=seed, normalise=signed, steps=each, name="translator")
    history = fit(translator, batches, epochs=-(-steps // each), seed=seed)
    cache = ViewCache(data, translator)
    translator.save(translator_file(file))
    storage.write_tensors(file, {"views": cache.views})
    grey = TensorImages(data.images.amax(1, keepdim=True), data.labels)
    with seeded(seed, "judge"):
        judge_of_shape = features(1, side).append(torch.nn.Linear(576, CLASSES))
    gray_range = signed_range(1)
    fit(
        Classifier(judge_of_shape),
        Batches(grey, BATCH, seed=seed, normalise=gray_range, name="judge"),
        epochs=1 if fast else 5,
        optimizer=lambda params: torch.optim.Adam(params, 1e-3),
        seed=seed,
    )
    rows = torch.arange(min(500, len(data)))
    y = data.labels[rows]
    targets = (y + torch.randint(1, CLASSES, y.shape, generator=stream(seed, "targets"))) % CLASSES
    made = cache.pick(rows, targets)
    with torch.inference_mode():
        shape = judge_of_shape.eval()(gray_range(made.amax(1, keepdim=True))).argmax(1)
    last = history.last
    return {
        **translation_rates(nearest_color(made), shape, y, targets),
        "reconstruction": last["generator_reconstruction"],
        "seconds a step": history.seconds / (each * len(history.epochs)),
    }


def translator_file(file: str) -> Path:
    """Where the translator of a file of views is."""
    return Path(file).with_suffix(".translator")


def features(channels: int, side: int) -> nn.Sequential:
    """Three convolutions, 576 features."""
    from netwright.nn.convnet import SmallConvNet

    return SmallConvNet((16, 32, 64), hidden=0, in_channels=channels, grid=3).features


class Recolouring:
    """The translator that knows: an image in the colour of another class."""

    num_classes = CLASSES

    def __init__(self, shape: tuple[int, int, int]):
        self.shape = shape

    def translate(self, x: Tensor, y_target: Tensor) -> Tensor:
        """Images in [-1, 1] in the colours of other classes."""
        import torch

        from netwright.data.biased import PALETTE, recolored
        from netwright.train.debias import signed_range
        from netwright.train.debias.views import as_bytes

        return signed_range(3)(recolored(as_bytes(x), torch.tensor(PALETTE)[y_target]))


class KeptViews:
    """All views of a translator, read from its file."""

    classes = CLASSES

    def __init__(self, file: str):
        from netwright import storage

        self.views: Tensor = storage.read_tensors(file)["views"]

    def __len__(self) -> int:
        return len(self.views)

    def pick(self, index: Tensor, targets: Tensor) -> Tensor:
        """The translation of image ``index[i]`` into class ``targets[i]``."""
        return self.views[index, targets]


def strong_jitter() -> Augmentation:
    """Brightness, contrast, saturation and any hue, and half of the images grey: an augmentation against colours."""
    from netwright.data.augment import Compose
    from netwright.data.colour import ColourJitter, Greyscale

    return Compose([ColourJitter(0.8, 0.8, 0.8, 0.5), Greyscale(0.5)])


def random_colours(images: Tensor, generator: Generator) -> Tensor:
    """Images in [0, 1] in colours drawn anew, each with a full channel: who does this knows the bias."""
    import torch

    colours = torch.rand(len(images), 3, generator=generator)
    return images.amax(1, keepdim=True) * (colours / colours.amax(1, keepdim=True))[:, :, None, None]
