"""What a search leaves to look at: how the mixing weights of every choice went, and the skip share, epoch by epoch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from netwright.search import spaces
from netwright.search.spaces.chain import SKIP, Block

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from netwright.search.result import SearchResult

COLUMNS = 5
# Okabe and Ito's colours, which the colour-blind tell apart; operations beyond them are dashed.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def candidates(result: SearchResult) -> dict[str, tuple[str, ...]]:
    """Names of the entries of every alpha: of the candidates, or of what thresholds of superkernels decide on."""
    space = spaces.get(result.genotype.space)
    if result.by_thresholds:
        return {key: _parts(names) for key, names in space.choices().items()}
    if isinstance(space, spaces.Space):
        return {key: space.on(key) for keys in space.incoming().values() for key in keys}
    return space.choices()


def _parts(names: tuple[str, ...]) -> tuple[str, ...]:
    """Kernels but the smallest, then expansions."""
    blocks = [Block.of(name) for name in names if name != SKIP]
    kernels, expansions = (sorted({getattr(block, part) for block in blocks}) for part in ("kernel", "expansion"))
    return (*(f"kernel {k}" for k in kernels[1:]), *(f"expansion {e}" for e in expansions))


def paint_alphas(result: SearchResult, figure: Figure) -> None:
    """Draws softmax(alpha) of every choice over the epochs, a small chart each; the operation that was kept is thick.

    Of a search with superkernels, the thresholds of every layer.

    Args:
        result: What a search returned, or read back.
        figure: An empty figure; as high as :func:`size_of` says it is readable.

    Raises:
        ValueError: If the result holds no history.
    """
    if not result.alpha_history:
        raise ValueError("the result must hold the history of its architecture parameters, got none")
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    names = candidates(result)
    kept = spaces.get(result.genotype.space).decisions(result.genotype)
    operations = list(dict.fromkeys(name for row in names.values() for name in row))
    style: dict[str, dict[str, Any]] = {
        name: {"color": COLOURS[i % len(COLOURS)], "linestyle": "-" if i < len(COLOURS) else "--"}
        for i, name in enumerate(operations)
    }
    keys = list(result.alpha_history[0])
    rows = math.ceil(len(keys) / COLUMNS)
    axes = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flatten()
    epochs = range(len(result.alpha_history))
    history = result.alpha_history
    if not result.by_thresholds:
        history = tuple({key: alpha.softmax(-1) for key, alpha in alphas.items()} for alphas in history)
    for ax, key in zip(axes, keys, strict=False):
        shares = [alphas[key].tolist() for alphas in history]
        for place, name in enumerate(names[key]):
            wide = 2.2 if kept.get(key) == name else 1.0
            ax.plot(epochs, [row[place] for row in shares], linewidth=wide, **style[name])
        ax.set_title(key if key in kept else f"{key} (dropped)", fontsize=8)
        ax.tick_params(labelsize=7)
    for ax in axes[len(keys) :]:
        ax.set_axis_off()
    if not result.by_thresholds:
        most = max(float(shares.max()) for row in history for shares in row.values())
        axes[0].set_ylim(0, 1.05 * most)  # the axes are shared
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("threshold" if result.by_thresholds else "softmax of alpha", fontsize=9)
    handles = [Line2D([], [], label=name.replace("_", " "), **style[name]) for name in operations]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(operations), 5), fontsize=8, frameon=False)


def size_of(result: SearchResult) -> tuple[float, float]:
    """Width and height in inches that :func:`paint_alphas` needs."""
    return 9.0, 0.9 + 1.5 * math.ceil(len(result.alpha_history[0]) / COLUMNS)


def paint_epochs(result: SearchResult, figure: Figure) -> None:
    """Draws the losses and the skip share over the epochs, below each other."""
    from matplotlib.ticker import MaxNLocator

    losses, shares = figure.subplots(2, 1, sharex=True)
    epochs = range(1, len(result.epochs) + 1)
    for name in sorted({name for epoch in result.epochs for name in epoch if name.endswith("loss")}):
        values = [epoch.get(name, math.nan) for epoch in result.epochs]
        losses.plot(epochs, values, marker=".", label=name.replace("_", " "))
    losses.set_ylabel("loss")
    losses.legend(frameon=False, fontsize=8)
    shares.plot(epochs, result.skip_share, marker=".", color=COLOURS[1])
    shares.set_ylabel("skip share")
    shares.set_ylim(-0.02, 1.02)
    shares.set_xlabel("epoch")
    shares.xaxis.set_major_locator(MaxNLocator(integer=True))
