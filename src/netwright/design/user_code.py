"""What the user wrote: a function or an object in a Python file, by ``FILE.py:NAME``, and search spaces given so."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from netwright import storage
from netwright.console import UserError, nearest
from netwright.search import spaces

SPACE_COPY = "space.py"


@dataclasses.dataclass
class _Opened:
    """A file that was run.

    Attributes:
        digest: What it was then.
        module: What came of it.
        names: Names of the spaces that it made known.
        made: Those that were asked for, by their name in the file.
    """

    digest: str
    module: ModuleType
    names: set[str]
    made: dict[str, spaces.AnySpace] = dataclasses.field(default_factory=dict)


_opened: dict[Path, _Opened] = {}


def in_file(text: str) -> tuple[Path, str] | None:
    """File and name of ``FILE.py:NAME``; None for anything else.

    Example:
        >>> in_file("nets.py:make"), in_file("micro-darts")
        ((PosixPath('nets.py'), 'make'), None)
    """
    file, _, name = text.rpartition(":")
    return (Path(file), name) if file.endswith(".py") else None


def run_file(path: Path) -> ModuleType:
    """Runs a Python file, which may import what lies beside it, and returns it as a module.

    Raises:
        UserError: If there is no such file.
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
    return module


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
    cure = "name a ChoiceSpace, or a function without arguments that returns one"
    opened = _open(path)
    if not hasattr(opened.module, name):
        raise UserError(f"no search space {name!r}", where=path, cure=cure)
    made = opened.made.get(name, getattr(opened.module, name))
    if callable(made) and not isinstance(made, spaces.AnySpace):
        made = made()
    if not isinstance(made, spaces.AnySpace):
        raise UserError(f"{name} is no search space but a {type(made).__name__}", where=path, cure=cure)
    try:
        spaces.register(made)
    except ValueError:
        told = f"there is another search space named {made.name!r}"
        raise UserError(told, where=path, cure="give it a name of its own") from None
    opened.names.add(made.name)
    opened.made[name] = made
    return made


def _open(path: Path) -> _Opened:
    """The file as it is now, run once; one that was edited takes back the spaces that it had made known."""
    before = _opened.get(path)
    digest = storage.file_digest(path) if path.is_file() else ""
    if before is not None and before.digest == digest:
        return before
    for name in before.names if before else ():
        spaces.SPACES.pop(name, None)
    known = set(spaces.SPACES)
    module = run_file(path)
    _opened[path] = _Opened(digest, module, set(spaces.SPACES) - known)
    return _opened[path]


def space_digest(text: str) -> str | None:
    """SHA-256 of the file that a space is in; None for one of netwright's own."""
    found = in_file(text)
    return None if found is None else storage.file_digest(found[0].expanduser())


def space_facts(text: str) -> dict[str, Any]:
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
