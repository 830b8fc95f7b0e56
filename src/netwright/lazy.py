"""Names of a package that are resolved when they are first used, so that importing the package loads nothing heavy."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def exports(
    package: str, names: Mapping[str, str], exported: Sequence[str], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and the ``__dir__`` of a package.

    Args:
        package: Its name.
        names: Names that are resolved late: the module of each, relative to the package, or by its whole name from
            ``netwright`` on.
        exported: What the package exports, its ``__all__``.
        modules: Its modules that are attributes as well.

    Example:
        >>> get, names = exports("netwright", {"digest": "storage"}, ["digest"], ["seeding"])
        >>> get("digest").__module__, get("seeding").__name__, names()
        ('netwright.storage', 'netwright.seeding', ['digest', 'seeding'])
    """

    def get(name: str) -> Any:
        if name in names:
            module = names[name]
            whole = module if module.startswith("netwright.") else f"{package}.{module}"
            return getattr(importlib.import_module(whole), name)
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted([*exported, *modules])
