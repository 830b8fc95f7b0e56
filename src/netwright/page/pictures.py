"""Charts as inline SVG that follows the reader's light or dark scheme, and small PNG pictures."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from netwright.checks import one_of

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure as Canvas

MAX_PICTURE_EDGE = 128

# Okabe and Ito's colours, which the colour-blind tell apart, with a lighter twin for the dark scheme.
COLOURS = {
    "ink": ("#1b1d21", "#e7e9ec"),
    "muted": ("#5d6673", "#9ba5b1"),
    "grid": ("#dde1e6", "#333a42"),
    "surface": ("#ffffff", "#15181c"),
    "blue": ("#0072b2", "#56b4e9"),
    "orange": ("#d55e00", "#f5934a"),
    "green": ("#00805d", "#35c79b"),
    "purple": ("#a8528a", "#d98fbd"),
    "yellow": ("#9a7700", "#f0d04a"),
}


def svg(paint: Callable[[Canvas], object], *, width: float = 420, height: float = 260, formulas: bool = False) -> str:
    """Inline SVG of what ``paint`` draws on a new figure, in the page's style; the same drawing gives the same text.

    The colours of :data:`COLOURS`, black and white follow the reader's light or dark scheme; others stay. Letters stay
    text, so that a label is as sharp as the page.

    Args:
        paint: Called with an empty :class:`matplotlib.figure.Figure` that lays itself out.
        width: In points; a phone shows about 360.
        height: In points.
        formulas: Whether text between dollar signs is a formula (never for names that a user gave).

    Raises:
        ValueError: If ``width`` or ``height`` is not positive.

    Example:
        >>> image = svg(lambda figure: figure.subplots().plot([1, 2], color=colour("blue")))
        >>> image.startswith("<svg"), "var(--blue,#0072b2)" in image, "http" in image
        (True, True, False)
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    for name, value in (("width", width), ("height", height)):
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A script in a class name that the measuring font lacks is still shown by the reader's own fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        matplotlib.rcdefaults()
        for name, value in {**_style(), "text.parse_math": formulas}.items():
            matplotlib.rcParams[name] = value  # type: ignore[index]
        canvas = Canvas(figsize=(width / 72, height / 72), dpi=144, layout="constrained")
        paint(canvas)
        if not formulas:
            _plain_ticks(canvas)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue())


def _plain_ticks(canvas: Canvas) -> None:
    """Powers of ten on logarithmic axes as numbers, since matplotlib would write them as formulas."""
    from matplotlib.ticker import FuncFormatter, LogFormatterMathtext, NullFormatter

    for ax in canvas.axes:
        for axis in (ax.xaxis, ax.yaxis):
            if isinstance(axis.get_major_formatter(), LogFormatterMathtext):
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            if isinstance(axis.get_minor_formatter(), LogFormatterMathtext):
                axis.set_minor_formatter(NullFormatter())


def _style() -> dict[str, Any]:
    from cycler import cycler

    light = {name: pair[0] for name, pair in COLOURS.items()}
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "netwright",
        "font.size": 9.5,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.titlecolor": light["ink"],
        "axes.labelcolor": light["muted"],
        "axes.edgecolor": light["muted"],
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycler(color=[light[n] for n in ("blue", "orange", "green", "purple", "yellow")]),
        "grid.color": light["grid"],
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.6,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "text.color": light["ink"],
        "xtick.color": light["muted"],
        "ytick.color": light["muted"],
        "xtick.major.size": 3,
        "ytick.major.size": 3,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
    }


def colour(name: str) -> str:
    """The light twin of a colour of :data:`COLOURS`, which :func:`svg` makes follow the scheme.

    Raises:
        ValueError: If there is no such colour.
    """
    one_of("name", name, COLOURS)
    return COLOURS[name][0]


def _inline(document: str) -> str:
    image = document[document.index("<svg") :].rstrip()
    # The style element would apply to the whole page; the name spaces mean nothing inside HTML.
    image = re.sub(r"\s*<metadata>.*?</metadata>|\s*<style[^>]*>.*?</style>|<!--.*?-->", "", image, flags=re.DOTALL)
    image = re.sub(r' (?:xmlns(?::\w+)?|version)="[^"]*"', "", image).replace("xlink:href", "href")
    image = re.sub(r"\s*\n\s*", " ", image).replace("> <", "><")
    image = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", image)
    scheme = {pair[0]: f"var(--{name},{pair[0]})" for name, pair in COLOURS.items()}
    scheme |= {"#000000": f"var(--ink,{COLOURS['ink'][0]})"}

    def lighten(match: re.Match[str]) -> str:
        value = re.sub("#[0-9a-f]{6}", lambda m: scheme.get(m[0], m[0]), match[0])
        value = re.sub(r"font-family: [^;\"]*;? ?", "", value)
        value = re.sub(r"(font: [^;\"]*?[\d.]+px) [^;\"]*", r"\1 var(--sans,sans-serif)", value)
        return re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), value)

    return re.sub(r' (?:style|d|x|y|width|height|points|transform)="[^"]*"', lighten, image)


def png(pixels: np.ndarray, *, edge: int = MAX_PICTURE_EDGE) -> bytes:
    """A small PNG of an image; a larger one is scaled down so that its longer side has ``edge`` pixels.

    Args:
        pixels: Shape (height, width), (height, width, 1) or (height, width, 3): uint8, or floats, whose range is
            stretched to black and white unless it lies in [0, 1].
        edge: Longest side in pixels.

    Raises:
        ValueError: If the shape is another one.

    Example:
        >>> import numpy as np
        >>> png(np.zeros((8, 8, 1), np.uint8))[1:4]
        b'PNG'
    """
    import numpy as np
    from PIL import Image

    array = np.asarray(pixels)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in {1, 3} or 0 in array.shape:
        raise ValueError(f"pixels must have shape (height, width[, 1 or 3]) and not be empty, got {np.shape(pixels)}")
    if array.dtype != np.uint8:
        floats = np.nan_to_num(array.astype(np.float64))
        low, high = min(0.0, float(floats.min())), max(1.0, float(floats.max()))
        array = np.rint((floats - low) / (high - low) * 255).astype(np.uint8)
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    image.thumbnail((edge, edge))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
