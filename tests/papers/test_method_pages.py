from __future__ import annotations

import json

import pytest
from matplotlib.figure import Figure

from netwright.papers import index
from netwright.papers.run import published_path, reproduce


@pytest.fixture
def site(experiment, tmp_path, monkeypatch):
    """A repository with one paper and its published evidence."""
    monkeypatch.setattr(index, "modules", lambda: {"coin-toss": experiment})
    (tmp_path / "README.md").write_text("# x\n\n<!-- evidence -->\n<!-- /evidence -->\n\nend\n")
    reproduce(["coin-toss"], out=tmp_path / "out", record=True)
    return tmp_path


def test_the_pages_hold_what_was_found(site, pages):
    assert pages.main([], root=site) == 0
    readme = (site / "README.md").read_text()
    assert readme.startswith("# x\n\n<!-- evidence -->\n| paper |")
    assert readme.endswith("<!-- /evidence -->\n\nend\n")
    assert "**supported**" in readme
    assert "0.2 [0.2, 0.2]" in readme
    assert "4 seeds" in readme
    page = (site / "docs" / "methods" / "coin-toss.md").read_text()
    for part in (
        "from netwright.console import clock",
        "@inproceedings{lovelace1843fair",
        "| tosses | 100 | 1000 |",
    ):
        assert part in page
    assert "reported only" in (site / "docs" / "reproduced.md").read_text()
    assert (site / "docs" / "methods" / "coin-toss.svg").read_text().count("<svg") == 1


def test_pictures_of_a_paper_s_own_stand_on_its_page(site, pages, experiment, monkeypatch):
    drawn = {"Tosses, one after the other.": Figure()}
    monkeypatch.setattr(
        experiment, "pictures", lambda evidence: drawn if evidence.slug == "coin-toss" else {}, raising=False
    )
    pages.main([], root=site)
    folder = site / "docs" / "methods"
    assert "![Tosses, one after the other.](coin-toss-1.svg)" in (folder / "coin-toss.md").read_text()
    assert (folder / "coin-toss-1.svg").read_text().count("<svg") == 1


def test_check_fails_until_the_table_is_made_again(site, pages, capsys):
    assert pages.main(["--check"], root=site) == 1
    assert pages.main([], root=site) == 0
    assert pages.main(["--check"], root=site) == 0
    assert "python scripts/method_pages.py" in capsys.readouterr().err


@pytest.mark.parametrize("place", [["figures", "fair", "heads", 1], ["figures", "loaded", "tosses", 0], ["seconds"]])
def test_any_changed_figure_makes_check_fail(site, pages, place):
    pages.main([], root=site)
    file = published_path("coin-toss")
    data = json.loads(file.read_text())
    part = data
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] += 0.001
    file.write_text(json.dumps(data))
    assert pages.main(["--check"], root=site) == 1
    pages.main([], root=site)
    assert pages.main(["--check"], root=site) == 0


def test_failures_are_as_visible_as_successes(site, pages):
    file = published_path("coin-toss")
    data = json.loads(file.read_text())
    data["claims"]["gain"]["verdict"] = data["verdict"] = "not supported"
    file.write_text(json.dumps(data))
    pages.main([], root=site)
    readme = (site / "README.md").read_text()
    assert readme.count("**not supported**") == 2
    assert "<summary>0 of 1 hold</summary>" in readme
    assert "1 not supported" in (site / "docs" / "reproduced.md").read_text()


def test_writing_twice_gives_the_same_bytes(site, pages):
    def everything():
        pages.main([], root=site)
        return {f: f.read_bytes() for f in [site / "README.md", *(site / "docs").rglob("*.*")]}

    assert everything() == everything()


def test_papers_without_a_full_run_are_listed(site, pages):
    published_path("coin-toss").unlink()
    pages.main([], root=site)
    assert "no full run yet" in (site / "README.md").read_text()
    assert "no full run yet" in (site / "docs" / "reproduced.md").read_text()
    assert "No full run is recorded yet." in (site / "docs" / "methods" / "coin-toss.md").read_text()


def test_a_readme_without_markers_is_refused(site, pages):
    (site / "README.md").write_text("no markers")
    with pytest.raises(SystemExit, match="must hold <!-- evidence -->"):
        pages.main([], root=site)
