"""Options: ranges, near names, durations, saved configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from netwright.console import UserError
from netwright.design.options import Options, duration, from_config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must lie in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, "got -0.1"),
        ({"sparsity": float("nan")}, "got nan"),
        ({"time_budget": 0.0}, "time budget must be > 0 s, got 0.0"),
        ({"accuracy_goal": 1.2}, r"accuracy must lie in \(0, 1\], got 1.2"),
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"epochs": 0}, "epochs must be >= 1, got 0"),
        ({"search_channels": 0}, "search-channels must be >= 1, got 0"),
        ({"batch_size": 1}, "batch-size must be >= 2"),
        ({"devices": 0}, "devices and nodes must be >= 1"),
        ({"devices": 3, "batch_size": 64}, r"multiple of all processes \(3\), got 64"),
        ({"search": "das"}, "did you mean dass?"),
        ({"space": "micro-dart"}, "did you mean micro-darts"),
        ({"pruning": "hydro"}, "did you mean hydra?"),
        ({"pruning": "maestro"}, "choose one of hydra, magnitude"),
        ({"logger": "wandb"}, "unknown --logger 'wandb'"),
        ({"strategy": "dp"}, "did you mean ddp?"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(UserError, match=message):
        Options(data="digits", **settings)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("15m", 900), ("1h30m", 5400), ("0.5h", 1800), ("2 min", 120), (" 1d ", 86400), (7, 7)],
)
def test_duration(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "10 parsecs", "m", "-5m", "1x"])
def test_no_duration(text):
    with pytest.raises(UserError, match="not a duration"):
        duration(text)


def test_identity_leaves_out_where_it_runs():
    a = Options(data="digits", out="x")
    assert a.identity() == Options(data="digits", out="y", jobs=2, download=True).identity()
    assert a.identity() != Options(data="digits", seed=1).identity()


def test_configuration_round_trip(tmp_path: Path):
    options = Options(data="digits", sparsity=0.9, time_budget=60.0, epochs=3)
    (tmp_path / "run.json").write_text(json.dumps({"kind": "netwright-run", "options": options.to_dict()}))
    assert Options(**from_config(tmp_path / "run.json")) == options


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "not a JSON file"),
        ("[1]", "JSON object"),
        ('{"sparsty": 0.9}', "did you mean sparsity"),
        ('{"sparsity": "much", "epochs": 1.5}', "sparsity: .*epochs: "),
    ],
)
def test_bad_configuration(tmp_path: Path, content: str, message: str):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(UserError, match=message):
        from_config(tmp_path / "c.json")


def test_missing_configuration(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        from_config(tmp_path / "c.json")
