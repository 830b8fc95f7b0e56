"""The comparison of the searches: who takes part, verdicts from made-up figures, the picture, the command."""

from __future__ import annotations

import json
import time

import pytest
import torch
from typer.testing import CliRunner

from netwright.console import UserError
from netwright.papers import family_search, index
from netwright.papers.evidence import Evidence
from netwright.papers.family_search import BEST, CARD, CHAIN, METHODS, RANDOM, SPACES, arms_of
from netwright.papers.random_table import RandomTable
from netwright.papers.run import Run, published, published_path, reproduce

SEEDS = 5
FAST_SECONDS = 30


def ranks(value):
    return [value + i for i in range(SEEDS)]


def arms(random=50, **others):
    """Every method at 60, those named by the first letters of an arm elsewhere."""
    found = {}
    for space in SPACES:
        for name, arm in arms_of(space).items():
            value = random if name == RANDOM else others.get(name, 60)
            found[arm] = {
                "percentile": ranks(value),
                "accuracy": [0.7] * SEEDS,
                "seconds": [39.0, 40.0, 40.0, 41.0, 40.0],
                "architectures" if name == RANDOM else "epochs": [10] * SEEDS,
            }
        found[f"{space}: {BEST}"] = {"percentile": ranks(90), "accuracy": [0.8] * SEEDS}
    return found


def evidence(tmp_path, figures):
    return Run("family-search", out=tmp_path).evidence(figures, family_search.judge(figures))


def test_every_search_of_netwright_takes_part():
    from netwright.search import METHODS as KNOWN

    assert len(METHODS) == len(KNOWN) + 2  # DARTS of both orders, and DARTS with selection by perturbation
    assert {name for name, method in METHODS.items() if CHAIN in method.spaces} == {
        RANDOM, "ProxylessNAS", "FBNet", "Single-Path NAS",
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in METHODS if name != RANDOM])
def test_a_method_makes_a_searcher_with_the_stages_asked_for(name):
    method = METHODS[name]
    for space in method.spaces:
        searcher = method.searcher(space, 3, list(range(2, 2 + len(method.shares))), 8)
        assert [stage.epochs for stage in searcher.stages] == list(range(2, 2 + len(method.shares)))
        assert searcher.supernet.space.name == space
    assert sum(method.shares) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("figures", "family", "darts"),
    [
        (arms(), "supported", "supported"),
        (arms(random=70), "not supported", "not supported"),
        (arms(random=60), "inconclusive", "inconclusive"),
        (arms(**{"DARTS, first order": 0}), "supported", "not supported"),
        (arms(ProxylessNAS=20, FBNet=20), "not supported", "supported"),
    ],
)
def test_verdicts(figures, family, darts):
    found = family_search.judge(figures)
    assert found["family"].verdict == family
    assert found[f"{SPACES[0]}: DARTS, first order"].verdict == darts
    assert set(found) == {claim.key for claim in CARD.claims}


def test_the_picture_holds_every_seed(tmp_path):
    figure = family_search.figure(evidence(tmp_path, arms(random=40)))
    assert [ax.get_title(loc="left") for ax in figure.axes] == list(SPACES)
    for ax, space in zip(figure.axes, SPACES, strict=True):
        names = [*arms_of(space), BEST]
        assert [label.get_text() for label in ax.get_yticklabels()] == names
        dots = [tuple(points.get_offsets()[:, 0]) for points in ax.collections]
        assert dots[0] == tuple(ranks(40))
        assert dots[1:-1] == [tuple(ranks(60))] * (len(names) - 2)
        assert dots[-1] == tuple(ranks(90))


def test_the_ranking_tells_time_and_interval(tmp_path):
    rows = family_search.ranking(evidence(tmp_path, arms()))
    assert len(rows) == sum(len(arms_of(space)) + 1 for space in SPACES)
    assert rows[-1][1:4] == [BEST, "90, 91, 92, 93, 94", "92.0"]
    assert rows[1][:4] == [SPACES[0], "DARTS, first order", "60, 61, 62, 63, 64", "62.0"]
    assert rows[1][5:] == ["0.7000", "39.0 to 41.0", "10.0 epochs"]
    low, high = map(float, rows[1][4].split(" to "))
    assert 60 < low < 62 < high < 64
    assert rows[0][-1] == "10.0 architectures"
    assert all(len(row) == len(family_search.COLUMNS) for row in rows)


def test_the_page_tells_what_was_found(pages, tmp_path):
    found = evidence(tmp_path, arms(random=40))
    page = pages.family_part(family_search, found)
    assert "netwright reproduce --family search --jobs 2" in page
    assert "](../methods/family-search.svg)" in page
    assert f"| {CHAIN} | FBNet | 60, 61, 62, 63, 64 | 62.0 |" in page
    assert f"On {CHAIN} FBNet ranks above random search. | **supported** | 20" in page
    assert found.commit in page
    assert "No full run is recorded yet." in pages.family_part(family_search, None)


def test_a_comparison_has_no_card_among_the_papers():
    assert list(index.comparisons()) == ["search"]
    assert CARD.slug == "family-search"
    assert CARD.slug not in index.modules()
    assert index.module_of(CARD.slug) is family_search
    with pytest.raises(UserError, match="give --family search"):
        index.get(CARD.slug)


def test_the_command_names_the_family():
    assert Run("family-search", fast=True, seeds=3).command() == "netwright reproduce --family search --fast --seeds 3"
    assert str(Run("family-search").out) == "reproduce/family-search"
    assert Run("family-search").seeds == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--family", "serch"], "no comparison of the family 'serch'"),
        (["--family", "compress"], "choose one of search"),
        (["dass", "--family", "search"], "a family is compared as a whole, got dass beside it"),
        (["family-search"], "give --family search"),
    ],
)
def test_bad_words_are_told(words, says):
    from netwright.cli import app

    found = CliRunner().invoke(app, ["reproduce", *words])
    assert found.exit_code == 2
    assert says in found.output
    assert "Traceback" not in found.output


def test_an_interrupted_comparison_goes_on(tmp_path, monkeypatch):
    calls = []

    def find(seed, name, space, *rest):
        calls.append(name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return {"genotype": {"space": space}, "seconds": 1.0, "architectures" if name == RANDOM else "epochs": 3}

    find.__qualname__ = "find"
    table = RandomTable("x", (0.5, 0.6, 0.7), (1, 2, 3), ({"number": 0}, {"number": 1}, {"number": 2}))
    scored = []

    def score(seed, genotype, protocol):
        scored.append((seed, genotype.get("number")))
        return {"accuracy": 0.65, "parameters": 5}

    monkeypatch.setattr(family_search, "find", find)
    monkeypatch.setattr(family_search.random_table, "tabulate", lambda run, space: table)
    monkeypatch.setattr(family_search.random_table, "score", score)
    with pytest.raises(KeyboardInterrupt):
        reproduce(family="search", seeds=2, out=tmp_path)
    assert not (tmp_path / "evidence.json").exists()
    (found,) = reproduce(family="search", seeds=2, out=tmp_path)
    pairs = 2 * sum(len(arms_of(space)) for space in SPACES)
    assert len(calls) == pairs + 1  # the interrupted one twice, no other
    assert found.figures[f"{CHAIN}: FBNet"]["percentile"] == [pytest.approx(200 / 3)] * 2
    assert [pair for pair in scored if pair[1] is not None] == [(1, 2), (2, 2)] * 2  # the best, from other seeds
    assert found.details[f"table: {CHAIN}"]["accuracy"] == [[0.5, 0.6, 0.7]]
    assert Evidence.load(tmp_path / "evidence.json") == found
    assert (tmp_path / "evidence.svg").read_text().count("<svg") == 1
    assert (tmp_path / "evidence.png").read_bytes()[1:4] == b"PNG"
    assert json.loads((tmp_path / "paper.json").read_text()) == {"paper": "family-search"}


def test_the_published_verdicts_follow_from_the_published_figures():
    found = published("family-search")
    if found is None:
        assert not published_path("family-search").exists()
        return
    assert found.budget == "full"
    assert len(found.seeds) >= SEEDS
    for key, verdict in family_search.judge(found.figures).items():
        assert verdict.verdict == found.claims[key].verdict, key


@pytest.mark.slow
def test_the_fast_comparison_runs(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.process_time()
        (found,) = reproduce(family="search", fast=True, out=tmp_path)
        spent = time.process_time() - start
    finally:
        torch.set_num_threads(threads)
    assert spent < FAST_SECONDS
    assert Evidence.load(tmp_path / "evidence-fast.json") == found
    for space in SPACES:
        for name, arm in arms_of(space).items():
            figures = found.figures[arm]
            assert 0 <= figures["percentile"][0] <= 100
            assert figures["architectures" if name == RANDOM else "epochs"][0] >= 1
            assert found.details[arm]["genotype"][0]["space"] == space
