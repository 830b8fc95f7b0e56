from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from netwright.console import UserError
from netwright.papers import papers, provenance, run
from netwright.papers.evidence import Evidence, decide
from netwright.papers.run import Run, list_papers, reproduce
from netwright.storage import lock


def trials(folder: Path) -> Counter[str]:
    log = folder / "log.txt"
    return Counter(" ".join(line.split()[:2]) for line in log.read_text().splitlines()) if log.exists() else Counter()


def test_a_reproduction_writes_its_evidence(experiment, tmp_path):
    (found,) = reproduce(["coin-toss"], out=tmp_path / "out")
    assert Evidence.load(tmp_path / "out" / "evidence.json") == found
    assert found.verdict == "supported"
    assert found.seeds == (0, 1, 2, 3)
    assert found.figures["loaded"]["heads"] == pytest.approx([0.7, 0.71, 0.72, 0.73])
    assert found.details["fair"]["coin"] == ["penny 0", "penny 1", "penny 2", "penny 3"]
    assert found.claims["gain"].text == "Loading helps."
    assert not found.claims["speed"].gated
    assert (found.settings["tosses"].used, found.settings["tosses"].specified) == (100, 1000)
    assert found.command == "netwright reproduce coin-toss"
    assert {"processor", "cores", "threads"} <= set(found.machine)
    assert "torch" in found.versions
    assert str(tmp_path) not in (tmp_path / "out" / "evidence.json").read_text()


def test_a_second_run_trains_nothing_again(experiment, tmp_path):
    first = reproduce(["coin-toss"], out=tmp_path)[0]
    assert set(trials(tmp_path).values()) == {1}
    second = reproduce(["coin-toss"], out=tmp_path)[0]
    assert set(trials(tmp_path).values()) == {1}
    assert second.figures == first.figures
    assert second.details == first.details


def test_an_interrupted_run_goes_on_per_arm_and_seed(experiment, tmp_path):
    (tmp_path / "stop").write_text("2 0.2")
    with pytest.raises(KeyboardInterrupt):
        reproduce(["coin-toss"], out=tmp_path)
    assert sum(trials(tmp_path).values()) == 7
    assert not (tmp_path / "evidence.json").exists()
    (tmp_path / "stop").unlink()
    whole = reproduce(["coin-toss"], out=tmp_path)[0]
    assert trials(tmp_path) == Counter(
        {f"{s} {b}": 2 if (s, b) == (2, 0.2) else 1 for s in range(4) for b in (0.0, 0.2)}
    )
    again = reproduce(["coin-toss"], out=tmp_path / "fresh")[0]
    assert whole.figures == again.figures


@pytest.mark.parametrize("damage", ["{", '{"key": "x", "seconds": 1, "figures": {}}', "[]", ""])
def test_a_damaged_or_foreign_arm_is_run_again(experiment, tmp_path, damage):
    reproduce(["coin-toss"], out=tmp_path)
    file = next((tmp_path / "arms").glob("fair*.full.2.json"))
    file.write_text(damage)
    found = reproduce(["coin-toss"], out=tmp_path)[0]
    assert trials(tmp_path)["2 0.0"] == 2
    assert sum(trials(tmp_path).values()) == 9
    assert found.figures["fair"]["heads"][2] == pytest.approx(0.52)


def test_other_sizes_code_or_budget_are_other_arms(experiment, tmp_path, monkeypatch):
    reproduce(["coin-toss"], out=tmp_path, seeds=1)
    reproduce(["coin-toss"], out=tmp_path, seeds=2)
    assert trials(tmp_path) == {"0 0.0": 1, "0 0.2": 1, "1 0.0": 1, "1 0.2": 1}
    reproduce(["coin-toss"], out=tmp_path, seeds=1, scale=2)
    assert trials(tmp_path)["0 0.0"] == 2
    monkeypatch.setattr(run, "sources", lambda: "another commit")
    reproduce(["coin-toss"], out=tmp_path, seeds=1, scale=2)
    assert trials(tmp_path)["0 0.0"] == 3
    fast = reproduce(["coin-toss"], out=tmp_path, fast=True)[0]
    assert fast.budget == "fast"
    assert len(fast.seeds) == 2
    assert trials(tmp_path)["0 0.0"] == 4
    assert {f.name for f in tmp_path.glob("evidence*")} == {"evidence.json", "evidence-fast.json"}
    assert Evidence.load(tmp_path / "evidence.json").budget == "full"


def test_one_arm_at_a_time(experiment, tmp_path):
    going = Run("coin-toss", out=tmp_path)
    log = str(tmp_path / "log.txt")
    (tmp_path / "arms").mkdir()
    assert going.arm("fair", 3, experiment.toss, 0.0, 5, log)["coin"] == "penny 3"
    assert going.arm("fair", 3, experiment.toss, 0.0, 5, log)["tosses"] == 5
    assert trials(tmp_path) == {"3 0.0": 1}
    fewer = going.arms({"fair": (0.0, 5, log)}, experiment.toss, seeds=(3,))
    assert fewer["fair"]["heads"] == pytest.approx([0.53])
    with pytest.raises(TypeError, match="plain JSON values, got a PosixPath"):
        going.arm("fair", 3, experiment.toss, 0.0, 5, Path(log))


def test_the_same_in_processes(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import experiment\n"
        "from netwright.papers import index; index.modules = lambda: {'coin-toss': experiment}\n"
        "from netwright.papers.run import reproduce\n"
        "print(reproduce('coin-toss', out=sys.argv[2], jobs=2, fast=True)[0].figures)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    environment = {**__import__("os").environ, "PYTHONPATH": str(Path(__file__).parent)}
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100, env=environment)
    figures = eval(found.stdout)
    assert figures["loaded"]["heads"] == pytest.approx([0.7, 0.71])
    assert len(list((tmp_path / "arms").iterdir())) == 4


def test_sizes_follow_budget_and_scale(experiment, tmp_path):
    def size(**options):
        going = Run("coin-toss", out=tmp_path, **options)
        return going.size("images", full=4000, fast=100, specified=10_000), going.settings["images"]

    assert size()[0] == 4000
    assert size()[1].shrunk
    assert size(fast=True)[0] == 100
    assert size(scale=2)[0] == 8000
    assert size(scale=50)[0] == 10_000
    assert not size(scale=50)[1].shrunk
    assert size(scale=0.5)[0] == 2000
    assert Run("coin-toss", scale=3).size("epochs", full=5, fast=1) == 5
    with pytest.raises(ValueError, match="epochs must be >= 1, got 0"):
        Run("coin-toss").size("epochs", full=0, fast=1)


def test_the_command_says_what_is_not_default(experiment):
    going = Run("coin-toss", fast=True, seeds=3, scale=0.5, jobs=2)
    assert going.command() == "netwright reproduce coin-toss --fast --seeds 3 --scale 0.5 --jobs 2"


def test_verdicts_must_be_those_of_the_claims(experiment):
    with pytest.raises(ValueError, match=r"must be those of \['gain', 'speed'\], got \['gain'\]"):
        Run("coin-toss").evidence({"a": {"heads": [1.0]}}, {"gain": decide(True)})


def test_recording_publishes_full_runs_only(experiment, tmp_path):
    published = tmp_path / "package" / "results" / "coin-toss.json"
    for options in ({"fast": True}, {"scale": 0.5}, {"seeds": 2}):
        with pytest.raises(UserError, match="only a full run of at least 3 seeds is recorded"):
            reproduce(["coin-toss"], out=tmp_path / "out", record=True, **options)
    reproduce(["coin-toss"], out=tmp_path / "out")
    assert not published.exists()
    rows = {row["slug"]: row for row in list_papers()}
    assert rows["coin-toss"]["verdict"] is None
    assert rows["coin-toss"]["seeds"] is None
    reproduce(["coin-toss"], out=tmp_path / "out", record=True)
    assert Evidence.load(published).verdict == "supported"
    row = next(row for row in list_papers("console") if row["slug"] == "coin-toss")
    assert row["verdict"] == "supported"
    assert row["budget"] == "full"
    assert row["seeds"] == 4
    assert {"slug", "title", "method", "verdict", "budget", "seeds", "seconds"} <= set(row)
    json.dumps(row)


def test_verbs_choose_papers_by_family(experiment, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from netwright.cli import app

    calls = []
    monkeypatch.setattr(run, "_reproduce", lambda going, record: calls.append(going.slug) or _Printed())
    shown = CliRunner().invoke(app, ["papers", "--family", "console", "--json"])
    assert [row["slug"] for row in json.loads(shown.stdout)] == ["coin-toss"]
    assert CliRunner().invoke(app, ["reproduce", "--family", "search"]).exit_code == 0
    assert calls == ["family-search"]
    nothing = CliRunner().invoke(app, ["reproduce"])
    assert (nothing.exit_code, "no paper was named" in nothing.output) == (2, True)
    assert CliRunner().invoke(app, ["papers", "--family", "nonsense"]).exit_code == 2


class _Printed:
    def to_dict(self):
        return {}


def test_several_papers_get_folders_of_their_own(experiment, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(run, "_reproduce", lambda going, record: calls.append((going.slug, going.out)))
    reproduce(["coin-toss", "dass", "coin-toss"], out=tmp_path)
    reproduce("coin-toss", out=tmp_path)
    reproduce("coin-toss")
    reproduce(family="search")
    assert calls == [
        ("coin-toss", tmp_path / "coin-toss"),
        ("dass", tmp_path / "dass"),
        ("coin-toss", tmp_path),
        ("coin-toss", Path("reproduce/coin-toss")),
        ("family-search", Path("reproduce/family-search")),
    ]
    calls.clear()
    reproduce("all")
    assert [slug for slug, _ in calls] == [card.slug for card in papers()]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"slugs": ["coin-tos"]}, "did you mean coin-toss"),
        ({}, "no paper was named"),
        ({"family": "serch"}, "did you mean search"),
        ({"slugs": ["coin-toss"], "seeds": 0}, "seeds must be >= 1, got 0"),
        ({"slugs": ["coin-toss"], "scale": 0.0}, "scale must be > 0"),
    ],
)
def test_bad_options_are_told(experiment, options, says):
    with pytest.raises(UserError, match=says):
        reproduce(**options)


def test_a_folder_belongs_to_one_paper_and_one_process(experiment, tmp_path):
    (tmp_path / "paper.json").write_text('{"paper": "dass"}')
    with pytest.raises(UserError, match="choose another folder with --out"):
        reproduce(["coin-toss"], out=tmp_path)
    with lock(tmp_path / "busy"), pytest.raises(UserError, match="in use by process"):
        reproduce(["coin-toss"], out=tmp_path / "busy")


def test_the_source_digest_sees_every_file(monkeypatch, tmp_path):
    provenance.sources.cache_clear()
    (tmp_path / "papers").mkdir()
    (tmp_path / "a.py").write_text("x = 1")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "papers" / "provenance.py"))
    first = provenance.sources()
    provenance.sources.cache_clear()
    (tmp_path / "a.py").write_text("x = 2")
    assert provenance.sources() != first
    provenance.sources.cache_clear()
    provenance.commit.cache_clear()
    assert provenance.commit().startswith("version ")
    provenance.commit.cache_clear()


def test_arms_by_seed_give_every_seed_its_own_arguments(tmp_path):
    run = Run("dass", fast=True, seeds=2, out=tmp_path)
    found = run.arms_by_seed({"a": [[1], [2]], "b": [[10], [20]]}, _sum)
    assert found == {"a": {"sum": [1, 3]}, "b": {"sum": [10, 21]}}
    with pytest.raises(ValueError, match="arm 'a' must have arguments for 2 seeds, got 1"):
        run.arms_by_seed({"a": [[1]]}, _sum)


def _sum(seed, value):
    return {"sum": seed + value}
