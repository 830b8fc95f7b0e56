"""What the user wrote: a function or an object in a Python file, by ``FILE.py:NAME``, and search spaces given so."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from netwright import storage
from netwright.console import UserError, nearest
from netwright.search import spaces

SPACE_COPY = "space.py"
_opened: dict[Path, tuple[str, dict[str, spaces.AnySpace]]] = {}


def in_file(text: str) -> tuple[Path, str] | None:
    """File and name of ``FILE.py:NAME``; None for anything else.

    Example:
        >>> in_file("nets.py:make"), in_file("micro-darts")
        ((PosixPath('nets.py'), 'make'), None)
    """
    file, _, name = text.rpartition(":")
    return (Path(file), name) if file.endswith(".py") else None


def from_file(path: Path, name: str, what: str, cure: str) -> Any:
    """The attribute of a Python file, which is run; it may import what lies beside it.

    Args:
        path: The file.
        name: The attribute.
        what: What it should be.
        cure: What to do where there is none.

    Raises:
        UserError: If there is no such file, or nothing of that name in it.
    """
    if not path.is_file():
        raise UserError("no such file", where=path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    if not hasattr(module, name):
        raise UserError(f"no {what} {name!r}", where=path, cure=cure)
    return getattr(module, name)


def open_space(text: str) -> Any:
    """The search space of a name, or of ``FILE.py:NAME``, which is then known by its own name too.

    Args:
        text: A name of :data:`netwright.search.spaces.SPACES`; or a file and what is in it: a space, or a function that
            takes nothing and returns one.

    Raises:
        UserError: If there is none.
    """
    found = in_file(text)
    if found is None:
        if text not in spaces.SPACES:
            raise UserError(
                f"unknown search space {text!r}", cure=f"{nearest(text, spaces.SPACES)}, or give FILE.py:NAME"
            )
        return spaces.get(text)
    path, name = found[0].expanduser().resolve(), found[1]
    digest, known = _opened.get(path, ("", {}))
    if path.is_file() and digest != (now := storage.file_digest(path)):
        for space in known.values():  # the file was edited: its spaces make room for what it says now
            spaces.SPACES.pop(space.name, None)
        known = {}
        _opened[path] = now, known
    if name not in known:
        cure = "name a ChoiceSpace, or a function without arguments that returns one"
        made = from_file(path, name, "search space", cure)
        if callable(made) and not isinstance(made, spaces.AnySpace):
            made = made()
        if not isinstance(made, spaces.AnySpace):
            raise UserError(f"{name} is no search space but a {type(made).__name__}", where=path, cure=cure)
        try:
            known[name] = spaces.register(made)
        except ValueError:
            raise UserError(
                f"there is another search space named {made.name!r}", where=path, cure="give it a name of its own"
            ) from None
    return known[name]


def space_digest(text: str) -> str | None:
    """SHA-256 of the file that a space is in; None for one of netwright's own."""
    found = in_file(text)
    return None if found is None else storage.file_digest(found[0].expanduser())


def space_facts(text: str) -> dict[str, str]:
    """What an architecture keeps of a space that is in a file: where it is, and its digest; nothing of others."""
    found, digest = in_file(text), space_digest(text)
    if found is None or digest is None:
        return {}
    return {"space": f"{found[0].expanduser().resolve()}:{found[1]}", "space_digest": digest}


def keep_space(text: str, path: Path) -> None:
    """Leaves a copy of the file that a space is in, so that it can be put back; nothing for netwright's own."""
    if (found := in_file(text)) is not None:
        storage.write_bytes(path, found[0].expanduser().read_bytes())


def sizes_of(space: Any, **sizes: Any) -> dict[str, Any]:
    """Those of some sizes that the networks of a space have: one of the user's own need not have a width to choose.

    Args:
        space: The space.
        **sizes: By the names of ``space.build``: ``channels``, ``cells``, ``stem``.

    Example:
        >>> from netwright.search import ChoiceSpace
        >>> def network(choose, in_channels, num_classes, channels=8): ...
        >>> sizes_of(ChoiceSpace("fixed-depth", network), channels=16, cells=3)
        {'channels': 16}
    """
    if isinstance(space, spaces.Space):
        return sizes
    parameters = inspect.signature(space.network).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return sizes
    return {name: value for name, value in sizes.items() if name in parameters}
