from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import netwright
from netwright.console import UserError
from netwright.papers import index
from netwright.papers.citations import CITATIONS
from netwright.papers.index import Claim, Paper, Reference, cite, get, papers

FIELDS = {
    "slug": "a-b",
    "title": "T",
    "authors": ("A B",),
    "year": 2020,
    "arxiv": "2001.00001",
    "summary": "S",
    "method": "m:N",
    "claims": (Claim("k", "t"),),
}


def read_bibtex(text: str) -> tuple[str, str, dict[str, str]]:
    """A reader of its own: type, key, and the fields of one entry."""
    head = re.fullmatch(r"@(\w+)\{([a-z0-9]+),\n(.*)\n\}", text, re.DOTALL)
    assert head is not None, text
    assert text.count("{") == text.count("}")
    lines = [re.fullmatch(r"  (\w+) = \{(.*)\},", line) for line in head[3].splitlines()]
    assert all(lines), text
    return head[1], head[2], {line[1]: line[2] for line in lines if line}


def test_listing_loads_nothing_heavy():
    code = (
        "import sys; from netwright.papers import list_papers, papers, get, cite\n"
        "cards = papers(); list_papers(); cite(cards[0].slug); cite('netwright')\n"
        "cite('netwright.console.task')\n"
        "heavy = {'torch', 'lightning', 'numpy', 'scipy', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert cards and not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_unknown_slugs_get_the_nearest(experiment):
    assert get("coin-toss") is experiment.CARD
    with pytest.raises(UserError, match="did you mean coin-toss"):
        get("coin-tos")
    with pytest.raises(UserError, match="no paper is called 'zzz'"):
        get("zzz")


def test_bibtex_reads_back(experiment):
    kind, key, fields = read_bibtex(experiment.CARD.bibtex())
    assert (kind, key) == ("inproceedings", "lovelace1843fair")
    assert fields == {
        "title": r"{On the 100 \% Fair Coin \& its Tosses}",
        "author": "Ada Lovelace and Karl Friedrich Gauß",
        "booktitle": "Proceedings of Chance",
        "year": "1843",
        "eprint": "1234.56789",
        "archivePrefix": "arXiv",
    }


@pytest.mark.parametrize("reference", [*papers(), *CITATIONS.values(), index.NETWRIGHT], ids=lambda r: r.key)
def test_every_reference_has_a_whole_entry(reference):
    _, key, fields = read_bibtex(reference.bibtex())
    assert re.fullmatch(r"[a-z]+\d{4}[a-z0-9]+", key)
    assert {"title", "author", "year"} <= set(fields)
    assert "eprint" in fields or "doi" in fields or reference is index.NETWRIGHT


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"slug": "A_b"}, "slug must be"),
        ({"arxiv": "207.1"}, "arxiv must look like"),
        ({"doi": "https://doi.org/10.1/2"}, "doi must look like"),
        ({"arxiv": None}, "got neither"),
        ({"method": "netwright.search.dass.DASS"}, "method must look like"),
        ({"claims": (Claim("k", "t"), Claim("k", "u"))}, "distinct keys"),
        ({"claims": (Claim("k", "t", gated=False),)}, "at least 1 gated"),
        ({"seeds": 0}, "seeds and fast_seeds must be >= 1, got 0 and 1"),
        ({"authors": ()}, "authors must name"),
    ],
)
def test_cards_are_checked(change, says):
    with pytest.raises(ValueError, match=says):
        Paper(**{**FIELDS, **change})


def test_family_is_the_package_of_the_method():
    assert Paper(**{**FIELDS, "method": "netwright.search.dass:DASS"}).family == "search"
    assert Paper(**{**FIELDS, "method": "other.thing:F"}).family == "other"


def test_cite_goes_from_the_object_to_its_paper(experiment):
    from netwright import console, parallel, results

    entry = experiment.CARD.bibtex()

    class Mine(results.History):
        pass

    for what in (
        console.clock,
        parallel.run_all,
        parallel,
        results.History,
        results.History(),
        Mine,
        Mine().column,
    ):
        assert cite(what) == entry, what
    for name in (
        "coin-toss",
        "netwright.console:clock",
        "netwright.console.clock",
        "clock",
        "run_all",
        "parallel",
    ):
        assert cite(name) == entry, name
    assert netwright.cite is cite


def test_cite_falls_back_to_netwright_itself(experiment):
    from netwright import results, seeding, storage

    own = index.NETWRIGHT.bibtex()
    assert netwright.__version__ in own
    for what in (
        seeding.stream,
        results.Result,
        storage,
        "netwright",
        "storage.lock",
        "atomic_path",
        netwright,
    ):
        assert cite(what) == own, what


def test_cite_takes_the_closest_reference(experiment, monkeypatch):
    from netwright import console
    from netwright.papers import citations, evidence

    other = Reference(title="Other Thing", authors=("X Y",), year=2000, arxiv="0000.0000")
    monkeypatch.setitem(citations.CITATIONS, "netwright.console", other)
    assert cite(console.task) == other.bibtex()
    assert cite(console.clock) == experiment.CARD.bibtex()
    assert cite(evidence.compare) == citations.BOOTSTRAP.bibtex()


def test_cite_refuses_what_is_not_ours():
    import json

    with pytest.raises(UserError, match="no part of netwright"):
        cite(json.dumps)
    with pytest.raises(UserError, match="did you mean dass"):
        cite("das")


def entry(name: str, module: object) -> SimpleNamespace:
    def load() -> object:
        if isinstance(module, Exception):
            raise module
        return module

    return SimpleNamespace(name=name, value=f"other.{name}", load=load)


def test_other_packages_add_papers(monkeypatch, experiment, capsys):
    other = SimpleNamespace(CARD=Paper(**{**FIELDS, "slug": "theirs"}))
    twin = SimpleNamespace(CARD=Paper(**{**FIELDS, "slug": "dass"}))
    entries = [entry("theirs", other), entry("dass", twin), entry("broken", ImportError("no such thing"))]
    monkeypatch.undo()
    monkeypatch.setattr(index.importlib.metadata, "entry_points", lambda group: entries)
    index.modules.cache_clear()
    try:
        assert get("theirs") is other.CARD
        assert get("dass") is not twin.CARD
        told = capsys.readouterr().err
        assert "'dass' of other.dass is left out" in told
        assert "'broken' of another package is left out" in told
    finally:
        index.modules.cache_clear()
