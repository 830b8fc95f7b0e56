"""The page itself: a verdict and sections, rendered to one HTML file, Markdown and JSON."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from netwright import storage
from netwright.page.blocks import (
    MAX_ROWS,
    Block,
    Figure,
    Images,
    Text,
    cell_text,
    text_of,
    to_html,
    to_markdown,
)
from netwright.page.pictures import COLOURS
from netwright.results import plain

if TYPE_CHECKING:
    import jinja2

MAX_BYTES = 3_000_000


@dataclass(frozen=True)
class Section:
    """A heading and its blocks; a folded one is opened by a click. Without a title the blocks stand alone."""

    title: str
    blocks: Sequence[Block]
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """A verdict and the sections under it, written as HTML, Markdown and JSON with the same figures.

    Args:
        title: Heading of the page.
        verdict: One sentence, printed first.
        sections: Open ones first, by custom.
        figures: Raw figures for programs, put into the JSON file as they are (NaN becomes null).

    Raises:
        ValueError: If ``title`` or ``verdict`` is empty.

    Example:
        >>> from netwright.page import Table
        >>> page = Page("Run 7", "It works.", [Section("Figures", [Table(["what", "n"], [["a|b", 3]])])])
        >>> print(page.markdown())
        # Run 7
        <BLANKLINE>
        It works.
        <BLANKLINE>
        ## Figures
        <BLANKLINE>
        | what | n |
        | --- | ---: |
        | a\\|b | 3 |
        <BLANKLINE>
        >>> page.html().startswith("<!doctype html>")
        True
    """

    title: str
    verdict: Text
    sections: Sequence[Section] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("title", self.title), ("verdict", text_of(self.verdict))):
            if not value.strip():
                raise ValueError(f"{name} must not be empty, got {value!r}")

    def html(self) -> str:
        """The page as one HTML file of at most 3 MB; the largest pictures give way to a note when it would be larger.

        Raises:
            ValueError: If the texts and tables alone are larger than that.
        """
        places = sorted(self._pictures(), key=lambda place: place[0], reverse=True)
        dropped: set[tuple[int, ...]] = set()
        while True:
            text = self._render(dropped)
            excess = len(text.encode()) - MAX_BYTES
            if excess <= 0:
                return text
            if not places:
                raise ValueError(f"a page must stay under {MAX_BYTES} bytes, got {excess + MAX_BYTES} without pictures")
            while excess > 0 and places:
                size, place = places.pop(0)
                dropped.add(place)
                excess -= size

    def _pictures(self) -> list[tuple[int, tuple[int, ...]]]:
        found: list[tuple[int, tuple[int, ...]]] = []
        for s, section in enumerate(self.sections):
            for b, block in enumerate(section.blocks):
                if isinstance(block, Figure):
                    found.append((len(block.image.encode()), (s, b)))
                elif isinstance(block, Images):
                    found += [(len(item.uri), (s, b, i)) for i, item in enumerate(block.items)]
        return found

    def _render(self, dropped: set[tuple[int, ...]]) -> str:
        return _environment().get_template("page.html.j2").render(page=self, dropped=dropped, colours=COLOURS)

    def markdown(self) -> str:
        """The page as Markdown."""
        lines = [f"# {to_markdown(self.title)}", to_markdown(self.verdict)]
        for section in self.sections:
            lines += [f"## {to_markdown(section.title)}"] if section.title else []
            lines += [block.markdown() for block in section.blocks]
        return "\n\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """The page as plain, JSON-able values."""
        sections = [
            {"title": s.title, "blocks": [{"kind": block.kind, **block.to_dict()} for block in s.blocks]}
            for s in self.sections
        ]
        figures = plain(self.figures)
        return {
            "title": self.title,
            "verdict": text_of(self.verdict),
            "figures": figures,
            "sections": sections,
        }

    def write(self, folder: str | os.PathLike[str], name: str = "report") -> Path:
        """Writes ``report.json``, ``report.md`` and ``report.html`` into ``folder``; returns the HTML file's path."""
        target = Path(folder) / f"{name}.html"
        html = self.html()
        storage.write_json(target.with_name(f"{name}.json"), self.to_dict())
        storage.write_text(target.with_name(f"{name}.md"), self.markdown())
        storage.write_text(target, html)
        return target


@cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("netwright.page", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        rich=to_html, cell=lambda value: to_html(cell_text(value)), plain_text=text_of, own_ids=_own_ids
    )
    environment.globals["max_rows"] = MAX_ROWS
    return environment


def _own_ids(image: str, number: int) -> Markup:
    """Gives the ids of an inline SVG names of their own, so that no two charts of a page share one."""
    names = dict.fromkeys(re.findall(r'\bid="([^"]+)"', image))
    new = {name: f"f{number}-{i}" for i, name in enumerate(names)}
    pattern = re.compile(r'(\bid="|href="#|url\(#)([^")]+)')
    return Markup(pattern.sub(lambda m: m[1] + new.get(m[2], m[2]), image))
