"""Result objects: frozen dataclasses with named figures, ``to_dict()``, a short table as text, and ``plot()``."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netwright.console import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plain(value: Any) -> Any:
    """A JSON-able copy: tensors and arrays become lists, dataclasses dictionaries (by their ``to_dict`` where they have
    one), NaN and infinities ``None``.

    Example:
        >>> import numpy as np
        >>> plain({"a": np.arange(2), "b": float("nan"), "c": (1, "x")})
        {'a': [0, 1], 'b': None, 'c': [1, 'x']}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = getattr(value, "to_dict", None)
        return own() if own else {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Result:
    """Mixin of every result: a frozen dataclass that knows how to be data, text and a picture."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain, JSON-able values."""
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    def __str__(self) -> str:
        rows = [
            [name, f"{value:.4g}" if isinstance(value, float) else value]
            for name, value in self.to_dict().items()
            if isinstance(value, (str, int, float, bool))
        ]
        return f"{type(self).__name__}\n{table(rows, ['figure', 'value'])}"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the result on ``ax`` (a new figure's when none is given) and returns the axes."""
        raise NotImplementedError(f"{type(self).__name__} has no picture")


def new_axes(ax: Axes | None = None, *, size: tuple[float, float] = (5.0, 3.2)) -> Axes:
    """The given axes, or those of a new figure that no pyplot state knows."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").subplots()


def save_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 150) -> None:
    """Writes a figure as its suffix says, atomically; the same drawing gives the same bytes.

    Args:
        figure: The figure.
        path: Ends with ``.svg`` or ``.png``.
        dpi: Pixels an inch of a PNG.

    Raises:
        ValueError: If the suffix is another one.
    """
    import matplotlib

    from netwright.storage import atomic_path

    metadata = {".svg": {"Date": None}, ".png": {"Software": None}}
    target = Path(path)
    if target.suffix not in metadata:
        raise ValueError(f"path must end with one of {', '.join(metadata)}, got {target.name!r}")
    with matplotlib.rc_context({"svg.hashsalt": target.stem}), atomic_path(target) as temporary:
        figure.savefig(temporary, format=target.suffix[1:], metadata=metadata[target.suffix], dpi=dpi)


@dataclasses.dataclass(frozen=True)
class History(Result):
    """What a training run recorded: one dictionary of figures for each epoch.

    Attributes:
        epochs: ``epochs[i]["train_loss"]`` and so on; a figure may be missing in some epochs.
        seconds: Wall time of the whole run, over all its sittings.
    """

    epochs: tuple[dict[str, float], ...] = ()
    seconds: float = 0.0

    def column(self, name: str) -> list[float]:
        """One figure over the epochs, NaN where it is missing.

        Example:
            >>> History(({"loss": 2.0}, {"loss": 1.0})).column("loss")
            [2.0, 1.0]
        """
        return [epoch.get(name, math.nan) for epoch in self.epochs]

    @property
    def last(self) -> dict[str, float]:
        """The figures of the last epoch."""
        return self.epochs[-1] if self.epochs else {}

    def __str__(self) -> str:
        names = sorted({name for epoch in self.epochs for name in epoch})
        rows = [[i + 1, *(f"{epoch.get(n, math.nan):.4g}" for n in names)] for i, epoch in enumerate(self.epochs)]
        return table(rows, ["epoch", *names])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Every loss over the epochs."""
        ax = new_axes(ax)
        for name in sorted({name for epoch in self.epochs for name in epoch if name.endswith("loss")}):
            ax.plot(range(1, len(self.epochs) + 1), self.column(name), marker=".", label=name.replace("_", " "))
        ax.set_xlabel("epoch")
        ax.set_ylabel("loss")
        ax.legend()
        return ax
