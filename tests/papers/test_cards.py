"""Every card: its method, its citation, its experiment and its published evidence."""

from __future__ import annotations

import inspect
import sys
import time

import pytest
import torch
from fast_claims import EXPECTED

from netwright.papers.citations import CITATIONS
from netwright.papers.evidence import Evidence
from netwright.papers.index import cite, get, module_of, papers, resolve
from netwright.papers.run import published, published_path, reproduce

SLUGS = [card.slug for card in papers()]
FAST_SECONDS = 30


def test_there_are_cards():
    assert "dass" in SLUGS


@pytest.mark.parametrize("slug", SLUGS)
def test_the_method_is_there_and_names_its_paper(slug):
    card = get(slug)
    method = card.load()
    documentation = (inspect.getdoc(method) or "") + (sys.modules[method.__module__].__doc__ or "")
    assert any(number in documentation for number in (card.arxiv, card.doi) if number), slug
    assert cite(method) == card.bibtex()
    for target in card.covers:
        resolve(target)


@pytest.mark.parametrize("slug", SLUGS)
def test_the_file_is_named_by_the_slug(slug):
    module = module_of(slug)
    assert module.__name__ == f"netwright.papers.{slug.replace('-', '_')}"
    assert module.__doc__
    assert callable(module.reproduce)


@pytest.mark.parametrize("slug", SLUGS)
def test_the_fast_reproduction_runs(slug, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.process_time()
        (found,) = reproduce([slug], fast=True, out=tmp_path)
        spent = time.process_time() - start
    finally:
        torch.set_num_threads(threads)
    assert Evidence.load(tmp_path / "evidence-fast.json") == found
    assert set(found.claims) == {claim.key for claim in get(slug).claims}
    assert any(found.metric in metrics for metrics in found.figures.values())
    assert spent < FAST_SECONDS
    if slug in EXPECTED:
        EXPECTED[slug](found)
    found.plot()


@pytest.mark.parametrize("slug", SLUGS)
def test_published_verdicts_follow_from_the_published_figures(slug):
    found = published(slug)
    if found is None:
        assert not published_path(slug).exists()
        return
    assert (found.slug, found.budget) == (slug, "full")
    card = get(slug)
    assert {key: (claim.text, claim.gated) for key, claim in found.claims.items()} == {
        claim.key: (claim.text, claim.gated) for claim in card.claims
    }
    judge = getattr(module_of(slug), "judge", None)
    for key, verdict in (judge(found.figures) if judge else {}).items():
        assert verdict.verdict == found.claims[key].verdict, key
        assert verdict.statistic == pytest.approx(found.claims[key].statistic), key


@pytest.mark.parametrize("target", CITATIONS)
def test_further_citations_name_what_exists(target):
    assert cite(resolve(target)) == CITATIONS[target].bibtex()
