"""What a page is made of: texts, tables, figures, pictures, code; each is HTML, Markdown and JSON."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from markupsafe import Markup, escape

from netwright.results import plain

MAX_ROWS = 500


@dataclass(frozen=True)
class Em:
    """Emphasised words inside a text."""

    text: str


@dataclass(frozen=True)
class Mono:
    """A name or a command inside a text."""

    text: str


Text = str | Em | Mono | Sequence[str | Em | Mono]


def _parts(text: Text) -> Sequence[str | Em | Mono]:
    return [text] if isinstance(text, (str, Em, Mono)) else text


def text_of(text: Text) -> str:
    """A text for the terminal and for JSON, its emphasis between asterisks.

    Example:
        >>> text_of(["it is ", Em("not faster"), " with ", Mono("--quiet")])
        'it is *not faster* with --quiet'
    """
    return "".join(f"*{p.text}*" if isinstance(p, Em) else p.text if isinstance(p, Mono) else p for p in _parts(text))


def to_html(text: Text) -> Markup:
    """A text as HTML, escaped; a number and its unit stay on one line."""
    tags = {Em: Markup("<em>{}</em>"), Mono: Markup("<code>{}</code>")}

    def together(words: str) -> str:
        return re.sub(r"(?<=\d) (?=%|(?:ms|s|min|h|kB|MB)\b)", "\u00a0", words)

    return Markup("").join(
        tags[type(part)].format(part.text if isinstance(part, Mono) else together(part.text))
        if isinstance(part, (Em, Mono))
        else escape(together(part))
        for part in _parts(text)
    )


def to_markdown(text: Text) -> str:
    """A text as Markdown, escaped."""

    def one(part: str | Em | Mono) -> str:
        if isinstance(part, Mono):
            fence = "`" * (1 + max((len(run) for run in re.findall("`+", part.text)), default=0))
            pad = " " if "`" in part.text else ""
            return f"{fence}{pad}{part.text}{pad}{fence}"
        raw = part.text if isinstance(part, Em) else part
        safe = re.sub(r"([\\`*\[\]<>|#]|(?<!\w)_|_(?!\w)|^[-+](?= ))", r"\\\1", " ".join(raw.splitlines()))
        return f"*{safe}*" if isinstance(part, Em) else safe

    return "".join(one(part) for part in _parts(text))


@dataclass(frozen=True)
class Value:
    """A figure and how it is printed: JSON carries ``number``, the pages carry ``text``."""

    number: Any
    text: str


Cell = Value | Text | int | float | None


def cell_text(cell: Cell) -> Text:
    """What a page prints for a cell."""
    if isinstance(cell, Value):
        return cell.text
    if cell is None:
        return "\u2013"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell) if isinstance(cell, int) else cell


def _number(cell: Cell) -> Any:
    if isinstance(cell, Value):
        return plain(cell.number)
    return plain(cell) if cell is None or isinstance(cell, (int, float)) else text_of(cell)


@dataclass(frozen=True)
class Paragraph:
    """A paragraph."""

    kind: ClassVar[str] = "paragraph"
    text: Text

    def markdown(self) -> str:
        """This block as Markdown."""
        return to_markdown(self.text)

    def to_dict(self) -> dict[str, Any]:
        """This block as plain, JSON-able values."""
        return {"text": text_of(self.text)}


@dataclass(frozen=True)
class Bullets:
    """A list of short texts."""

    kind: ClassVar[str] = "bullets"
    items: Sequence[Text]

    def markdown(self) -> str:
        """This block as Markdown."""
        return "\n".join(f"- {to_markdown(item)}" for item in self.items)

    def to_dict(self) -> dict[str, Any]:
        """This block as plain, JSON-able values."""
        return {"items": [text_of(item) for item in self.items]}


@dataclass(frozen=True)
class Table:
    """A table; a column of figures stands to the right. HTML and Markdown show the first 500 rows, JSON all."""

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: Text = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"rows must hold {len(self.header)} cells each, as header does, got {len(row)}")

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold figures only."""
        columns = [[row[i] for row in self.rows if row[i] is not None] for i in range(len(self.header))]
        return [bool(c) and all(isinstance(cell, (Value, int, float)) for cell in c) for c in columns]

    @property
    def left_out(self) -> int:
        """How many rows only JSON holds."""
        return max(0, len(self.rows) - MAX_ROWS)

    def markdown(self) -> str:
        """This block as Markdown."""
        rule = ["---:" if right else "---" for right in self.numeric]
        lines = [[to_markdown(h) for h in self.header], rule]
        lines += [[to_markdown(cell_text(cell)) for cell in row] for row in self.rows[:MAX_ROWS]]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        more = f"\n\n{self.left_out} more rows are in the JSON file." if self.left_out else ""
        return (f"{to_markdown(self.caption)}\n\n" if self.caption else "") + text + more

    def to_dict(self) -> dict[str, Any]:
        """This block as plain, JSON-able values."""
        rows = [[_number(cell) for cell in row] for row in self.rows]
        return {"caption": text_of(self.caption), "header": list(self.header), "rows": rows}


@dataclass(frozen=True)
class KeyValues:
    """Names and their values."""

    kind: ClassVar[str] = "keyvalues"
    items: Mapping[str, Cell]

    def markdown(self) -> str:
        """This block as Markdown."""
        return "\n".join(
            f"- {to_markdown(name)}: {to_markdown(cell_text(value))}" for name, value in self.items.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """This block as plain, JSON-able values."""
        return {"items": {name: _number(value) for name, value in self.items.items()}}


@dataclass(frozen=True)
class Code:
    """Code or a command, to be copied."""

    kind: ClassVar[str] = "code"
    text: str
    language: str = ""

    def markdown(self) -> str:
        """This block as Markdown."""
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", self.text)), default=0))
        return f"{fence}{self.language}\n{self.text.rstrip()}\n{fence}"

    def to_dict(self) -> dict[str, Any]:
        """This block as plain, JSON-able values."""
        return {"text": self.text, "language": self.language}


@dataclass(frozen=True)
class Figure:
    """A chart with one sentence on how to read it.

    Attributes:
        image: Inline SVG as :func:`svg` makes it.
        reading: One sentence on how to read the chart.
        title: Short heading.
        data: The figures in the chart, for JSON.

    Raises:
        ValueError: If ``image`` is no SVG, or could run a script or fetch something.
    """

    kind: ClassVar[str] = "figure"
    image: str
    reading: Text
    title: str = ""
    data: Any = None

    def __post_init__(self) -> None:
        if not self.image.startswith("<svg"):
            raise ValueError(f"image must be inline SVG that starts with <svg, got {self.image[:40]!r}")
        unsafe = re.search(
            r"<(script|foreignObject|iframe|style)|<[^<>]*\s(on\w+|(?:href|src)=\"(?!#|data:image/))",
            self.image,
        )
        if unsafe:
            raise ValueError(f"image must not run or fetch anything, got {unsafe[0]!r}")

    def markdown(self) -> str:
        """This block as Markdown."""
        head = f"**{to_markdown(self.title)}.** " if self.title else ""
        return f"{head}{to_markdown(self.reading)} (The chart is in the HTML page, its figures in the JSON file.)"

    def to_dict(self) -> dict[str, Any]:
        """This block as plain, JSON-able values."""
        return {"title": self.title, "reading": text_of(self.reading), "data": plain(self.data)}


@dataclass(frozen=True)
class Picture:
    """A PNG, as :func:`png` makes it, with what is to be said about it."""

    png: bytes
    caption: Text = ""

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Images:
    """A grid of small pictures with captions; wide ones keep their proportions, two or three in a row."""

    kind: ClassVar[str] = "images"
    items: Sequence[Picture]
    reading: Text = ""
    wide: bool = False

    def markdown(self) -> str:
        """This block as Markdown."""
        head = f"{to_markdown(self.reading)} (The pictures are in the HTML page.)" if self.reading else ""
        return head + "\n\n" + "\n".join(f"- {to_markdown(item.caption)}" for item in self.items if item.caption)

    def to_dict(self) -> dict[str, Any]:
        """This block as plain, JSON-able values."""
        return {"reading": text_of(self.reading), "captions": [text_of(item.caption) for item in self.items]}


Block = Paragraph | Bullets | Table | KeyValues | Code | Figure | Images
