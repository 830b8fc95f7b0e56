"""A network of the user's and the data that go with it: what ``compress`` and ``diagnose`` work on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from netwright.console import UserError
from netwright.data import Data, names
from netwright.data import load as load_data
from netwright.design.benchmark import SIZE
from netwright.design.model import input_channels, is_named, load, load_run
from netwright.nn.activations import logits_only
from netwright.seeding import seeded


@dataclasses.dataclass(frozen=True)
class Reading:
    """How data are read.

    Attributes:
        skip_broken: As for :func:`netwright.data.load`.
        drop_unknown: Likewise.
        download: Allow the network, for data and trained weights.
    """

    skip_broken: bool = False
    drop_unknown: bool = False
    download: bool = False


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network with how it is fed.

    Attributes:
        network: Takes standardised inputs and gives logits; around a network that gives more than these, a
            :class:`~netwright.nn.activations.LogitsOnly`.
        shape: Channels, height and width of an input.
        classes: Names of the outputs.
        mean: What inputs are standardised by, a value a channel.
        std: Likewise.
        picture: Whether inputs are images of 0..255.
        data: The data; None where there are none.
    """

    network: nn.Module
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    picture: bool
    data: Data | None


def open_subject(model: str, data: str | None, size: int | None, seed: int, reading: Reading) -> Subject:
    """A network and its data.

    Args:
        model: A run; a name of ``netwright.nn.pretrained``, which comes with trained weights; or ``FILE.py:FUNCTION``.
        data: As for :func:`netwright.data.load`; a run brings its own.
        size: Height and width of the input, where neither run nor data tell.
        seed: Of the splits of the data (a run's own are split as they were for it), and of weights that a function
            draws.
        reading: How they are read.

    Raises:
        UserError: If something is missing, or network and data do not fit.
    """
    if (Path(model) / "architecture.json").is_file():
        return _open_run(model, data, reading)
    if not is_named(model):
        with seeded(seed, "init", "model"):  # a function may draw its weights, the same ones every time
            network = load(model)
    else:
        from netwright.nn.pretrained import create

        network = create(model, pretrained=True, download=reading.download).eval()
    channels = input_channels(network)
    found = None if data is None else _load(data, seed, None if size is None else (size, size), reading)
    shape = (channels, size or SIZE, size or SIZE) if found is None else found.shape
    network = _logits_only(network, shape, model)
    found_outputs = outputs(network, shape, model)
    if found is None:
        classes, mean, std = tuple(map(str, range(found_outputs))), (0.0,) * shape[0], (1.0,) * shape[0]
        return Subject(network, shape, classes, mean, std, shape[0] in (1, 3), None)
    if len(found.classes) != found_outputs:
        raise UserError(f"the network has {found_outputs} outputs, the data {len(found.classes)} classes", where=model)
    picture = getattr(found.train, "images", torch.empty(0, dtype=torch.uint8)).dtype == torch.uint8
    return Subject(network, shape, found.classes, found.mean, found.std, picture, found)


def _open_run(run: str, data: str | None, reading: Reading) -> Subject:
    from netwright.design.run import RunFolder

    model = load_run(run)
    known, options = model.architecture, RunFolder(run).described()["options"]
    if data is None:
        data = options["data"]
        reading = Reading(**{name: on or options[name] for name, on in dataclasses.asdict(reading).items()})
    found = _load(data, options["seed"], known.shape[1:], reading)
    if found.shape != tuple(known.shape) or found.classes != tuple(known.classes):
        told = f"the data hold {len(found.classes)} classes of {found.shape}, the network knows "
        raise UserError(
            f"{told}{len(known.classes)} of {tuple(known.shape)}", where=data, cure="give the run's own data"
        )
    return Subject(model.network, known.shape, known.classes, known.mean, known.std, known.picture, found)


def _load(data: str, seed: int, size: tuple[int, int] | None, reading: Reading) -> Data:
    # Only images in files can be resized.
    files = data not in names() and Path(data).expanduser().is_dir()
    return load_data(data, seed=seed, size=size if files else None, **dataclasses.asdict(reading))


@torch.inference_mode()
def outputs(network: nn.Module, shape: tuple[int, int, int], model: str) -> int:
    """How many outputs a network has.

    Raises:
        UserError: If it does not take inputs of this shape, or gives no logits; the message names ``model``.
    """
    return int(_logits_only(network, shape, model)(torch.zeros(1, *shape)).shape[-1])


def _logits_only(network: nn.Module, shape: tuple[int, int, int], model: str) -> nn.Module:
    try:
        return logits_only(network, torch.zeros(1, *shape))
    except TypeError as error:
        cure = "give a network that takes images and gives logits"
        raise UserError(str(error).splitlines()[0], where=model, cure=cure) from error
    except (RuntimeError, ValueError, AssertionError, AttributeError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the network does not take inputs of {shape}: {told}", where=model, cure="set --size"
        ) from error
