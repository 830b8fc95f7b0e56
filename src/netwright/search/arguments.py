"""Arguments of searchers that hand ``**options`` on: unknown ones are refused in the name of the class called."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from netwright.console import nearest


def refuse_unknown(cls: type, names: Iterable[str]) -> None:
    """Refuses names that no ``__init__`` takes which the class's own hands its options on to.

    A class of the user's own that takes ``**options`` may use some itself and answers for them.

    Args:
        cls: The class that is called; its ``settled`` tells which names are none of its arguments, and why.
        names: Of the arguments given.

    Raises:
        TypeError: If one is unknown, with the reason or the nearest known name.

    Example:
        >>> from netwright.search import RARTS
        >>> refuse_unknown(RARTS, ["aplha_lr"])
        Traceback (most recent call last):
        ...
        TypeError: RARTS has no argument 'aplha_lr'; did you mean alpha_lr?
    """
    known: set[str] = set()
    settled: dict[str, str] = {}
    for each in cls.__mro__:
        if "__init__" not in vars(each):
            continue
        parameters = inspect.signature(vars(each)["__init__"]).parameters.values()
        known |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - settled.keys()
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
        if not each.__module__.startswith("netwright."):
            return
        settled |= {name: why for name, why in vars(each).get("settled", {}).items() if name not in known}
    known.discard("self")
    for name in names:
        if name not in known:
            raise TypeError(f"{cls.__name__} has no argument {name!r}; {settled.get(name) or nearest(name, known)}")
