"""Training methods by name, as the command line and configurations know them: ``gradient-noise:eta=0.3,seed=1``."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netwright.console import UserError, nearest
from netwright.train import METHODS

if TYPE_CHECKING:
    import lightning

    from netwright.data import Data


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
    if name not in METHODS:
        raise UserError(f"unknown training method {name!r}", cure=nearest(name, METHODS))
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
        UserError: If a text cannot be parsed, a method comes twice, it does not take such an argument or value, or two
            methods do not go together, which the attribute ``refuses`` of one tells.

    Example:
        >>> [type(found).__name__ for found in callbacks(["ps-kd:alpha_T=0.5", "tract"])]
        ['TrActCallback', 'PSKDCallback']
    """
    chosen: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, arguments = parse(text)
        if name in chosen:
            raise UserError(f"the training method {name!r} comes twice")
        chosen[name] = arguments
    made = {name: _made(name, chosen[name]) for name in METHODS if name in chosen and name != "plain"}
    for name, method in made.items():
        for other in getattr(method, "refuses", ()):
            if other in made:
                raise UserError(f"{name} and {other} cannot be trained with together", cure="choose one of them")
    return list(made.values())


def check_data(methods: Sequence[Any], data: Data) -> None:
    """Lets each method that does not suit all data refuse these: one with ``check_data(data)`` raises ValueError.

    Raises:
        UserError: If a method refuses the data.
    """
    _each(methods, "check_data", data)


def prepare(methods: Sequence[Any], data: Data, folder: Path, *, augment: bool) -> None:
    """Lets each method that learns something of the data before training do so: by ``prepare(data, folder, augment=)``.

    What a method keeps in ``folder`` it reads again when an interrupted run goes on.

    Raises:
        UserError: If it cannot.
    """
    _each(methods, "prepare", data, folder, augment=augment)


def _each(methods: Sequence[Any], name: str, *args: Any, **kwargs: Any) -> None:
    for method in methods:
        if hasattr(method, name):
            try:
                getattr(method, name)(*args, **kwargs)
            except UserError:
                raise
            except ValueError as error:
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
    module, _, kind = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), kind)


def _made(name: str, arguments: dict[str, Any]) -> lightning.Callback:
    make = _class(name)
    known = list(inspect.signature(make).parameters)
    for key in arguments:
        if key not in known:
            raise UserError(f"{name} has no argument {key!r}", cure=nearest(key, known))
    try:
        return make(**arguments)
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: {error}") from error
