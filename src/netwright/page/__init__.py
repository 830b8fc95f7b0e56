"""Pages: one small file that opens off-line, and the same figures as Markdown and JSON.

A :class:`Page` is a verdict and sections of content blocks. :meth:`Page.write` makes ``report.html`` (one file, no
script, no request, light and dark), ``report.md`` and ``report.json``; the same input gives the same bytes.
"""

from __future__ import annotations

from netwright.page.blocks import (
    Block,
    Bullets,
    Cell,
    Code,
    Em,
    Figure,
    Images,
    KeyValues,
    Mono,
    Paragraph,
    Picture,
    Table,
    Text,
    Value,
    text_of,
)
from netwright.page.document import MAX_BYTES, Page, Section
from netwright.page.pictures import COLOURS, colour, png, svg

__all__ = [
    "COLOURS",
    "MAX_BYTES",
    "Block",
    "Bullets",
    "Cell",
    "Code",
    "Em",
    "Figure",
    "Images",
    "KeyValues",
    "Mono",
    "Page",
    "Paragraph",
    "Picture",
    "Section",
    "Table",
    "Text",
    "Value",
    "colour",
    "png",
    "svg",
    "text_of",
]
