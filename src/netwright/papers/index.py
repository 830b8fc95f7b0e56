"""The index of papers: what is built, how to cite it, and which object belongs to which paper.

Nothing here imports torch or lightning: a card names its method by a string, and a card's file imports what
its experiment needs inside ``reproduce()``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import pkgutil
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from netwright import __version__
from netwright.console import UserError, nearest, warn

GROUP = "netwright.papers"
_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement of a paper that its experiment tests.

    Attributes:
        key: Short name in figures and tables, ``"gain"`` say.
        text: The claim as one sentence.
        gated: Whether the verdict of the paper depends on it; the others are reported plainly.
    """

    key: str
    text: str
    gated: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """What BibTeX needs to know of a publication.

    Attributes:
        title: The title as published.
        authors: Names in order, given names first.
        year: Year of the venue.
        venue: Conference, journal or publisher; empty for a preprint.
        kind: The BibTeX entry's type.
        arxiv: Number of the preprint, without version.
        doi: Without the resolver's address.

    Raises:
        ValueError: If no author is given, or the arXiv number or DOI is malformed.
    """

    title: str
    authors: tuple[str, ...]
    year: int
    venue: str = ""
    kind: Literal["article", "inproceedings", "book", "misc"] = "misc"
    arxiv: str | None = None
    doi: str | None = None

    def __post_init__(self) -> None:
        if not self.authors:
            raise ValueError(f"authors must name at least 1 person, got none for {self.title!r}")
        if self.arxiv is not None and not re.fullmatch(r"\d{4}\.\d{4,5}", self.arxiv):
            raise ValueError(f"arxiv must look like 2207.06968, got {self.arxiv!r}")
        if self.doi is not None and not re.fullmatch(r"10\.\d{4,9}/\S+", self.doi):
            raise ValueError(f"doi must look like 10.1145/3609385, got {self.doi!r}")

    @property
    def key(self) -> str:
        """BibTeX key: first author's family name, year, first long word of the title."""
        words = re.findall(r"[a-z0-9]+", _ascii(self.title).lower())
        word = next((word for word in words if len(word) > 3), words[0] if words else "")
        return re.sub(r"[^a-z]", "", _ascii(self.authors[0].split()[-1]).lower()) + str(self.year) + word

    def bibtex(self) -> str:
        """The BibTeX entry, in UTF-8.

        Example:
            >>> found = Reference(title="A Title", authors=("Ada Lovelace",), year=1843, arxiv="1234.56789")
            >>> print(found.bibtex())
            @misc{lovelace1843title,
              title = {{A Title}},
              author = {Ada Lovelace},
              year = {1843},
              eprint = {1234.56789},
              archivePrefix = {arXiv},
            }
        """
        where = {
            "article": "journal",
            "inproceedings": "booktitle",
            "book": "publisher",
            "misc": "howpublished",
        }
        fields = {
            "title": f"{{{_escape(self.title)}}}",
            "author": " and ".join(self.authors),
            where[self.kind]: _escape(self.venue),
            "year": str(self.year),
            "eprint": self.arxiv,
            "archivePrefix": "arXiv" if self.arxiv else None,
            "doi": self.doi,
        }
        lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
        return "\n".join([f"@{self.kind}{{{self.key},", *lines, "}"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paper(Reference):
    """The card of a method: which paper it is, where it lives, and what its experiment tests.

    Attributes:
        slug: The paper's name in every command, ``"darts-pt"``.
        summary: The idea in one or two sentences.
        method: Where the method lives, ``"netwright.search.dass:DASS"``.
        claims: What the experiment tests.
        covers: More targets, ``"module"`` or ``"module:Name"``, that belong to this paper.
        metric: The figure that tables and pictures show.
        seeds: Seeds of a full run.
        fast_seeds: Seeds of a fast one.

    Raises:
        ValueError: If the slug, the method or a claim is malformed, or there is neither arXiv number nor DOI.
    """

    slug: str
    summary: str
    method: str
    claims: tuple[Claim, ...]
    covers: tuple[str, ...] = ()
    metric: str = "accuracy"
    seeds: int = 5
    fast_seeds: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.slug):
            raise ValueError(f"slug must be lower-case words joined by '-', got {self.slug!r}")
        if self.arxiv is None and self.doi is None:
            raise ValueError(f"arxiv or doi must be given for {self.slug!r}, got neither")
        if not _TARGET.fullmatch(self.method):
            raise ValueError(f"method must look like 'netwright.search.dass:DASS', got {self.method!r}")
        keys = [claim.key for claim in self.claims]
        if len(set(keys)) < len(keys) or not any(claim.gated for claim in self.claims):
            raise ValueError(f"claims must have distinct keys and at least 1 gated one, got {keys} for {self.slug!r}")
        if self.seeds < 1 or self.fast_seeds < 1:
            raise ValueError(f"seeds and fast_seeds must be >= 1, got {self.seeds} and {self.fast_seeds}")

    @property
    def family(self) -> str:
        """The package that holds the method: ``"search"``, ``"train"``, or another package's name."""
        parts = self.method.split(":")[0].split(".")
        return parts[1] if parts[0] == "netwright" and len(parts) > 1 else parts[0]

    def load(self) -> Any:
        """Imports the method and returns it.

        Raises:
            ImportError: If its module cannot be imported or has no such name.
        """
        return resolve(self.method)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The card of an experiment that compares the methods of a family with one another; no single paper's claim.

    Attributes:
        family: The package of the methods, ``"search"``.
        title: What is compared.
        claims: What is said of the family, as for a paper.
        metric: The figure that tables and pictures show.
        seeds: Seeds of a full run.
        fast_seeds: Seeds of a fast one.
    """

    family: str
    title: str
    claims: tuple[Claim, ...]
    metric: str
    seeds: int = 5
    fast_seeds: int = 1

    @property
    def slug(self) -> str:
        """Name of its folder and of its file of evidence.

        Example:
            >>> Comparison(family="search", title="All searches", claims=(), metric="accuracy").slug
            'family-search'
        """
        return f"family-{self.family}"


NETWRIGHT = Reference(
    title="netwright: neural networks that are sparse and stay accurate",
    authors=("{The netwright authors}",),
    year=2026,
    venue=f"Python package, version {__version__}",
)


def _ascii(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def _escape(text: str) -> str:
    return re.sub(r"([&%#_$])", r"\\\1", text)


def resolve(target: str) -> Any:
    """Imports ``"module:Name"``, or a module.

    Raises:
        ImportError: If there is no such module or name.

    Example:
        >>> resolve("netwright.console:clock")(90)
        '1 min 30 s'
    """
    module, _, name = target.partition(":")
    found = importlib.import_module(module)
    if not name:
        return found
    try:
        return getattr(found, name)
    except AttributeError as error:
        raise ImportError(f"module {module!r} has no {name!r}") from error


@functools.cache
def _experiments() -> tuple[ModuleType, ...]:
    """netwright's own modules that have a ``CARD``."""
    import netwright.papers as package

    found = (importlib.import_module(f"{package.__name__}.{i.name}") for i in pkgutil.iter_modules(package.__path__))
    return tuple(module for module in found if hasattr(module, "CARD"))


@functools.cache
def comparisons() -> dict[str, ModuleType]:
    """Family to the module that compares its methods, with a :class:`Comparison` as ``CARD`` and ``reproduce``."""
    return {module.CARD.family: module for module in _experiments() if isinstance(module.CARD, Comparison)}


@functools.cache
def modules() -> dict[str, ModuleType]:
    """Slug to the module with ``CARD`` and ``reproduce``: netwright's own, then those of entry points."""
    found = {module.CARD.slug: module for module in _experiments() if isinstance(module.CARD, Paper)}
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            module = entry.load()
            slug = module.CARD.slug
        except Exception as error:
            warn(f"the paper {entry.name!r} of another package is left out: {entry.value}: {error}")
            continue
        if slug in found:
            warn(f"the paper {slug!r} of {entry.value} is left out: there is one of that name already")
        else:
            found[slug] = module
    return dict(sorted(found.items()))


def papers() -> tuple[Paper, ...]:
    """The cards of all papers, by slug; imports neither torch nor lightning."""
    return tuple(module.CARD for module in modules().values())


def module_of(slug: str) -> ModuleType:
    """The module with the card and the experiment of a paper, or of a comparison.

    Raises:
        UserError: If no paper has this slug; the nearest is named.
    """
    known = modules()
    module = known.get(slug) or next((m for m in comparisons().values() if m.CARD.slug == slug), None)
    if module is None:
        raise UserError(f"no paper is called {slug!r}", cure=nearest(slug, known))
    return module


def comparison(family: str) -> Comparison:
    """The card of the comparison of a family.

    Raises:
        UserError: If this family is not compared; the nearest is named.

    Example:
        >>> comparison("search").slug
        'family-search'
    """
    known = comparisons()
    if family not in known:
        raise UserError(f"no comparison of the family {family!r}", cure=nearest(family, known))
    card: Comparison = known[family].CARD
    return card


def get(slug: str) -> Paper:
    """The card of one paper.

    Raises:
        UserError: If no paper has this slug; the nearest is named.

    Example:
        >>> get("dass").arxiv
        '2207.06968'
    """
    card = module_of(slug).CARD
    if not isinstance(card, Paper):
        raise UserError(f"{slug!r} is no paper", cure=f"give --family {card.family}")
    return card


def cite(what: Any) -> str:
    """BibTeX for a netwright object: the paper of its method, of its module or a base, else netwright.

    Args:
        what: A class, function, module or instance; or text: a slug, ``"netwright.search.dass:DASS"``,
            ``"search.dass"`` or the bare name of something public.

    Raises:
        UserError: If the object is no part of netwright and has no base that is, or the text names nothing.

    Example:
        >>> print(cite("netwright").splitlines()[0])
        @misc{authors2026netwright,
    """
    if isinstance(what, str) and not re.fullmatch(r"[\w:.-]*\w", what):
        raise UserError(f"nothing in netwright is called {what!r}", cure="name a paper of `netwright papers`")
    known = _known_targets()
    candidates = _named(what, known) if isinstance(what, str) else list(_places(what))
    for place in candidates:
        module, _, _ = place.partition(":")
        parents = [module.rsplit(".", i)[0] for i in range(module.count("."))]
        for target in [place, *parents]:
            if target in known:
                return known[target].bibtex()
    if any(place.split(":")[0].split(".")[0] == "netwright" for place in candidates):
        return NETWRIGHT.bibtex()
    raise UserError(
        f"{what!r} is no part of netwright", cure="name a paper of `netwright papers`, or a netwright object"
    )


def _known_targets() -> dict[str, Reference]:
    from netwright.papers.citations import CITATIONS

    known: dict[str, Reference] = dict(CITATIONS)
    cards = papers()
    # A method's own target goes last, so that it wins over a module that another card covers.
    for card in cards:
        known |= dict.fromkeys((*card.covers, card.method.split(":")[0]), card)
    return known | CITATIONS | {card.method: card for card in cards}


def _places(what: Any) -> Iterator[str]:
    """Where an object, then its bases, are defined, as ``module:Name``."""
    if isinstance(what, ModuleType):
        yield what.__name__
        return
    thing = what if hasattr(what, "__qualname__") else type(what)
    for item in thing.__mro__ if isinstance(thing, type) else (thing,):
        yield f"{item.__module__}:{item.__qualname__.split('.')[0]}"


def _named(text: str, known: dict[str, Reference]) -> list[str]:
    cards = {card.slug: card for card in papers()}
    if text in cards:
        return [cards[text].method]
    if text == "netwright":
        return [text]
    places = {text, f"netwright.{text}"}
    places |= {f"{place.rpartition('.')[0]}:{place.rpartition('.')[2]}" for place in tuple(places) if ":" not in place}
    hits = [place for place in sorted(places) if place in known]
    hits += [target for target in known if target.partition(":")[2].lower() == text.lower()]
    hits = hits or [place for place in sorted(places) if _is_public(place)] or _defining(text)
    if not hits:
        names = {target.partition(":")[2] for target in known} - {""}
        raise UserError(f"nothing in netwright is called {text!r}", cure=nearest(text, {*cards, *names}))
    return hits


def _is_public(place: str) -> bool:
    module, _, name = place.partition(":")
    path = _root().joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not module.startswith("netwright.") or not file.is_file():
        return False
    return not name or re.search(rf"^(class|def) {re.escape(name)}\b", file.read_text(), re.MULTILINE) is not None


def _defining(name: str) -> list[str]:
    """Where a public class or function is defined, found in the source so that nothing heavy is imported."""
    if not name.isidentifier() or name.startswith("_"):
        return []
    files = sorted(_root().rglob("*.py"))
    dotted = [".".join(("netwright", *file.relative_to(_root()).with_suffix("").parts)) for file in files]
    return [f"{m}:{name}" for m in (d.removesuffix(".__init__") for d in dotted) if _is_public(f"{m}:{name}")]


def _root() -> Path:
    return Path(__file__).parents[1]
