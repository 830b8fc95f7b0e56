"""Training methods by name, as the command line and configurations know them: ``gradient-noise:eta=0.3,seed=1``."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netwright.console import UserError, nearest
from netwright.train import METHODS, PRETRAINING

if TYPE_CHECKING:
    import lightning
    from torch import Tensor, nn

    from netwright.data import Data
    from netwright.train.contrastive import Host


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a method as people type it.

    Values are Python literals; what is none is text.

    Raises:
        UserError: If the name is unknown, or an argument has no value or comes twice.

    Example:
        >>> parse("gradient-noise:eta=0.3,order=noise_then_clip")
        ('gradient-noise', {'eta': 0.3, 'order': 'noise_then_clip'})
    """
    name, _, rest = text.partition(":")
    if name not in METHODS and name not in PRETRAINING:
        raise UserError(f"unknown training method {name!r}", cure=nearest(name, [*METHODS, *PRETRAINING]))
    if name == "plain" and rest:
        raise UserError(f"plain takes no arguments, got {rest!r}")
    arguments: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        if not equals or not key or not value:
            raise UserError(f"no value in {part!r} of {text!r}", cure="write it like gradient-noise:eta=0.3,gamma=0.5")
        if key in arguments:
            raise UserError(f"{key} comes twice in {text!r}")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[key] = {"true": True, "false": False}.get(value.lower(), value)
    return name, arguments


def callbacks(texts: Sequence[str]) -> list[lightning.Callback]:
    """The callbacks of several methods, in the order in which they must attach, whatever the order of the texts is.

    Args:
        texts: As for :func:`parse`; ``plain`` adds nothing.

    Raises:
        UserError: If a text cannot be parsed, a method comes twice, it does not take such an argument or value, it is
            one that trains without labels, or two do not go together, which the attribute ``refuses`` of one tells.

    Example:
        >>> [type(found).__name__ for found in callbacks(["ps-kd:alpha_T=0.5", "tract"])]
        ['TrActCallback', 'PSKDCallback']
    """
    chosen: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, arguments = parse(text)
        if name in PRETRAINING:
            raise UserError(f"{name} trains without labels", cure=f"use it alone: netwright train DATA --method {name}")
        if name in chosen:
            raise UserError(f"the training method {name!r} comes twice")
        chosen[name] = arguments
    made = {name: _made(name, chosen[name]) for name in METHODS if name in chosen and name != "plain"}
    for name, method in made.items():
        for other in getattr(method, "refuses", ()):
            if other in made:
                raise UserError(f"{name} and {other} cannot be trained with together", cure="choose one of them")
    return list(made.values())


def pretraining(texts: Sequence[str]) -> str | None:
    """The one method that trains without labels; None when there is none among the texts.

    Raises:
        UserError: If a text cannot be parsed, or such a method does not stand alone.

    Example:
        >>> pretraining(["simclr:temperature=0.2"]), pretraining(["tract"])
        ('simclr:temperature=0.2', None)
    """
    found = [text for text in texts if parse(text)[0] in PRETRAINING]
    if found and len(texts) > 1:
        others = ", ".join(parse(text)[0] for text in texts if text != found[0]) or "itself"
        raise UserError(f"{parse(found[0])[0]} trains without labels, alone, got it together with {others}")
    return found[0] if found else None


def host(text: str, backbone: Any, *, features: int, hallucinate: bool = False, queue_size: int | None = None) -> Host:
    """A contrastive host by name, around a backbone that is there.

    Args:
        text: As for :func:`parse`, a name of ``PRETRAINING``.
        backbone: Gives features.
        features: Their width.
        hallucinate: Whether a :class:`netwright.train.Hallucinator` goes into it.
        queue_size: Of MoCo, where the text does not tell it; MoCo's own if None.

    Raises:
        UserError: If the host does not take such an argument or value.

    Example:
        >>> from torch import nn
        >>> host("moco:dim=8", nn.Flatten(), features=4, hallucinate=True, queue_size=32).queue.shape
        torch.Size([8, 32])
    """
    from netwright.train.hallucinator import Hallucinator

    name, arguments = parse(text)
    make = _class(name)
    kinds = inspect.signature(make).parameters
    settings = dict(arguments)
    if queue_size is not None and "queue_size" in kinds:
        settings.setdefault("queue_size", queue_size)
    given: dict[str, Any] = {"backbone_fn": lambda: backbone, "features": features}
    if hallucinate:
        width = settings.get("dim", kinds["dim"].default)
        try:
            given["hallucinator"] = Hallucinator(width)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{name}: {error}") from error
    return _made(name, settings, reserved=("backbone_fn", "features", "hallucinator"), given=given)


def check_data(methods: Sequence[Any], data: Data) -> None:
    """Lets each method that does not suit all data refuse these: one with ``check_data(data)`` raises ValueError.

    Raises:
        UserError: If a method refuses the data.
    """
    _each(methods, "check_data", data)


def check_network(methods: Sequence[Any], network: nn.Module, example: Tensor | None = None) -> None:
    """Lets each method that does not suit every network refuse this one: by ``check_network(module, example)``.

    Args:
        methods: The callbacks.
        network: That is to be trained; its weights stay as they are.
        example: A batch, to find the layer that is computed first.

    Raises:
        UserError: If a method refuses the network.
    """
    import lightning

    from netwright.train import Classifier

    module = network if isinstance(network, lightning.LightningModule) else Classifier(network)
    _each(methods, "check_network", module, example)


def check_epochs(methods: Sequence[Any], epochs: int) -> None:
    """Lets each method that needs a certain length refuse a run: by ``check_epochs(epochs)``.

    Raises:
        UserError: If a method refuses the number of epochs.
    """
    _each(methods, "check_epochs", epochs)


def prepare(methods: Sequence[Any], data: Data, folder: Path, *, augment: bool) -> None:
    """Lets each method that learns something of the data before training do so: by ``prepare(data, folder, augment=)``.

    What a method keeps in ``folder`` it reads again when an interrupted run goes on.

    Raises:
        UserError: If it cannot.
    """
    _each(methods, "prepare", data, folder, augment=augment)


def prepares(texts: Sequence[str]) -> list[str]:
    """The names of the methods that learn something of the data before training.

    Example:
        >>> prepares(["elr", "cdvg:steps=500"])
        ['cdvg']
    """
    names = [parse(text)[0] for text in texts]
    return [name for name in names if hasattr(_class(name), "prepare")]


def _each(methods: Sequence[Any], name: str, *args: Any, **kwargs: Any) -> None:
    for method in methods:
        if hasattr(method, name):
            try:
                getattr(method, name)(*args, **kwargs)
            except UserError:
                raise
            except (ValueError, TypeError, NotImplementedError) as error:
                raise UserError(str(error)) from error


def described(texts: Sequence[str]) -> tuple[str, ...]:
    """One sentence on each method, with the arguments that were given.

    Example:
        >>> described(["gradient-noise:eta=0.3"])
        ("gradient-noise (eta = 0.3): Adds annealed Gaussian noise to every gradient at the optimiser's step.",)
    """
    told = []
    for text in texts:
        name, arguments = parse(text)
        first = (_class(name).__doc__ or "").strip().splitlines()[0].replace("``", "")
        given = ", ".join(f"{key} = {value}" for key, value in arguments.items())
        told.append(f"{name}{f' ({given})' if given else ''}: {first}")
    return tuple(told) or described(["plain"])


def _class(name: str) -> Any:
    module, _, kind = {**METHODS, **PRETRAINING}[name].partition(":")
    return getattr(importlib.import_module(module), kind)


def _made(
    name: str, arguments: dict[str, Any], *, reserved: Collection[str] = (), given: dict[str, Any] | None = None
) -> Any:
    make = _class(name)
    known = [key for key in inspect.signature(make).parameters if key not in reserved]
    for key in arguments:
        if key not in known:
            raise UserError(f"{name} has no argument {key!r}", cure=nearest(key, known))
    try:
        return make(**arguments, **(given or {}))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{name}: {error}") from error
