from __future__ import annotations

import dataclasses
import json

import pytest

from netwright.console import UserError
from netwright.papers.evidence import Evidence, Setting, decide
from netwright.papers.evidence.statistics import Verdict

EVIDENCE = Evidence(
    slug="coin-toss",
    title="Coins",
    budget="full",
    seeds=(0, 1, 2),
    figures={
        "fair": {"heads": [0.5, None, 0.4], "tails": [0.5, 0.5, 0.6]},
        "loaded": {"heads": [0.9, 0.8, 0.7]},
    },
    claims={"gain": Verdict("supported", 0.3, (0.1, 0.5), "why", "Loading helps.", True)},
    metric="heads",
    details={"fair": {"coin": ["penny", "dime", "penny"]}},
    settings={"tosses": Setting(10, 100)},
    machine={"processor": "x", "cores": 2, "memory_gb": 1.5},
    versions={"python": "3.11"},
    seconds=1.5,
    command="netwright reproduce coin-toss",
    commit="abc",
    date="2026-01-01",
)


def test_round_trip(tmp_path):
    EVIDENCE.save(tmp_path / "e.json")
    assert Evidence.load(tmp_path / "e.json") == EVIDENCE
    assert json.loads((tmp_path / "e.json").read_text())["verdict"] == "supported"


@pytest.mark.parametrize(
    ("claims", "verdict"),
    [
        ({"a": True, "b": True}, "supported"),
        ({"a": True, "b": False}, "not supported"),
        ({"a": True, "b": None}, "inconclusive"),
        ({"a": None, "b": False}, "not supported"),
        ({"a": True, "(b)": False}, "supported"),
        ({"a": True, "(b)": None}, "supported"),
        ({"(a)": True, "b": False}, "not supported"),
    ],
)
def test_verdict_of_the_paper(claims, verdict):
    made = {key: dataclasses.replace(decide(passed), gated=not key.startswith("(")) for key, passed in claims.items()}
    assert dataclasses.replace(EVIDENCE, claims=made).verdict == verdict


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (["verdict"], "not supported", "verdict: 'not supported' is stated, 'supported' follows"),
        (["figures", "fair", "heads"], [0.5, "high", 0.1], r"figures\.fair\.heads\.1"),
        (["figures", "fair", "heads"], [0.5] * 4, r"figures\.fair\.heads: 4 values for 3 seeds"),
        (["figures", "fair", "heads"], [], r"figures\.fair\.heads: 0 values"),
        (["claims", "gain", "verdict"], "proven", r"claims\.gain\.verdict"),
        (["claims", "gain", "gated"], False, "none is gated"),
        (["budget"], "huge", "budget"),
        (["seconds"], None, "seconds"),
        (["extra"], 1, "extra"),
        (["settings", "tosses", "used"], "x", r"settings\.tosses\.used"),
    ],
)
def test_damaged_evidence_is_told_with_its_path(tmp_path, path, value, says):
    EVIDENCE.save(tmp_path / "e.json")
    data = json.loads((tmp_path / "e.json").read_text())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "e.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=says):
        Evidence.load(tmp_path / "e.json")


def test_saving_refuses_what_is_not_whole(tmp_path):
    with pytest.raises(UserError, match=r"figures\.fair\.heads"):
        dataclasses.replace(EVIDENCE, figures={"fair": {"heads": ["x"]}}).save(tmp_path / "e.json")
    assert not (tmp_path / "e.json").exists()
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        Evidence.load(tmp_path / "list.json")


def test_text_names_verdict_claims_and_arms():
    text = str(EVIDENCE)
    assert text.splitlines()[0] == "Coins: supported (full, 3 seeds, 2 s)"
    assert "supported  gain   why" in text
    assert "0.8 ± 0.058 [0.7333, 0.8667]" in text
    assert "0.5333 ± 0.033\n" in text


def test_plot_shows_every_seed_of_every_arm():
    ax = EVIDENCE.plot()
    dots = [sorted(c.get_offsets()[:, 0].compressed().tolist()) for c in ax.collections]
    assert dots == [[0.4, 0.5], [0.7, 0.8, 0.9]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["fair", "loaded"]
    assert "coin-toss: supported" in ax.get_title()
    assert [label.get_text() for label in EVIDENCE.plot(metric="tails").get_yticklabels()] == ["fair"]
    with pytest.raises(ValueError, match="metric must be one of heads, tails, got 'edge'"):
        EVIDENCE.plot(metric="edge")
