"""Debian's package index: the parser on a small text, and the machine's own index where it has one."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier

from netwright import storage
from netwright.console import UserError
from netwright.data import debian
from netwright.data.debian import Package, absent, bag_of_words, load_packages, make_index, parse_packages

TEXT = """Package: 0ad
Version: 0.0.26-3
Depends: 0ad-data (>= 0.0.26), libc6 (>= 2.34) | musl [amd64],
 python3:any, libsdl2-2.0-0
Pre-Depends: dpkg (>= 1.15.6~)
Description: Real-time strategy game
 of ancient warfare
Tag: game::strategy, interface::graphical,
 x11::application
Section: games

Package: 0ad-data
Section: contrib/games
Description: Game data

Package: nameless-section
Description: nothing says what it is for

Package: libc6
Section: libs
Depends: 0ad
Description: GNU C library: shared libraries

Package: 0ad
Version: 0.0.25
Section: oldgames
Description: An older one
"""


@pytest.fixture
def index():
    return make_index(TEXT, "2026-01-02")


def test_fields_are_read_and_entries_without_them_passed_over():
    found = list(parse_packages(TEXT))
    assert [package.name for package in found] == ["0ad", "0ad-data", "libc6", "0ad"]
    assert found[0] == Package(
        "0ad", "games", "Real-time strategy game", ("dpkg", "0ad-data", "libc6", "python3", "libsdl2-2.0-0")
    )
    assert found[1].section == "games"
    assert found[2].description == "GNU C library: shared libraries"


def test_the_first_of_a_name_counts_and_edges_stay_inside(index):
    assert [package.name for package in index.packages] == ["0ad", "0ad-data", "libc6"]
    assert index.packages[0].section == "games"
    assert index.edges().tolist() == [[0, 0, 2], [1, 2, 0]]
    assert index.sections(2) == ["games", "libs"]
    with pytest.raises(ValueError, match="count must lie"):
        index.sections(3)


def test_the_digest_is_of_the_content(index):
    assert make_index(TEXT, "2027-01-01").sha256 == index.sha256
    assert make_index(TEXT.replace("ancient", "modern"), "").sha256 == index.sha256  # not the first line
    assert make_index(TEXT.replace("strategy game", "card game"), "").sha256 != index.sha256


def test_words_are_counted_by_lines():
    X, words = bag_of_words(["A library, a C++ library", "c++ tools", "tools and library"], most=3)
    assert words == ("c++", "library", "tools")
    assert X.toarray().tolist() == [[1, 1, 0], [1, 0, 1], [0, 1, 1]]
    assert X.dtype == np.float32
    assert RandomForestClassifier(2, random_state=0).fit(X[np.arange(3)], [0, 1, 0]).n_features_in_ == 3
    assert bag_of_words(["zeta alpha"] * 2, most=1)[1] == ("alpha",)
    with pytest.raises(ValueError, match="must share words"):
        bag_of_words(["one", "two"], most=5)
    with pytest.raises(ValueError, match="most must be >= 1"):
        bag_of_words(["one"], most=0)


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "cache_home", lambda: tmp_path)
    monkeypatch.setattr(debian, "LISTS", tmp_path)
    monkeypatch.setattr(debian.shutil, "which", lambda name: "/usr/bin/apt-cache")
    assert "apt-get update" in absent()
    monkeypatch.setattr(debian.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="not installed"):
        load_packages()


def test_the_cache_is_read_and_damage_seen(monkeypatch, tmp_path, index):
    from dataclasses import asdict

    monkeypatch.setattr(storage, "cache_home", lambda: tmp_path)
    storage.write_json(tmp_path / "debian" / "packages.json", asdict(index))
    assert absent() is None
    assert load_packages() == index
    other = asdict(index) | {"packages": asdict(index)["packages"][1:]}
    storage.write_json(tmp_path / "debian" / "packages.json", other)
    with pytest.raises(UserError, match="damaged"):
        load_packages()
    (tmp_path / "debian" / "packages.json").write_text('{"packages": [{"name": 1}]}')
    with pytest.raises(UserError, match="damaged"):
        load_packages()


@pytest.mark.slow
def test_the_index_of_this_machine():
    reason = absent()
    if reason is not None:
        pytest.skip(reason)
    found = load_packages()
    assert len(found.packages) > 1000
    assert len(found.sha256) == 64
    assert found.edges().max() < len(found.packages)
