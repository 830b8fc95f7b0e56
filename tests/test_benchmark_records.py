"""What benchmarks leave behind: aims, exit codes, and nothing from a trial; and that they begin at all."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
from forked import Script

from netwright.cost.timing import Timing

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def record(tmp_path, monkeypatch):
    """The module, writing into a folder of the test's own."""
    spec = importlib.util.spec_from_file_location("benchmark_record", BENCHMARKS / "support" / "record.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_record", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/speed.py", "--rounds", "3"])
    return module


@pytest.mark.parametrize(
    ("value", "bounds", "met"),
    [
        (1.5, {"least": 1.5}, True),
        (1.49, {"least": 1.5}, False),
        (0.9, {"most": 0.9}, True),
        (0.91, {"most": 0.9}, False),
        (0.5, {"least": 0.6, "most": 0.9}, False),
        (None, {"most": 0.9}, False),
        (7.0, {}, None),
        (None, {}, None),
    ],
)
def test_an_aim_is_met_or_missed_and_what_was_not_measured_meets_none(record, value, bounds, met):
    assert record.Figure("speed", value, **bounds).met is met


def test_figures_are_left_with_machine_versions_and_command(record, tmp_path):
    figures = [record.Figure("a step of ours", 1.234, 1.1, 1.3, most=1.2), record.Figure("another", 0.5)]
    assert record.record("speed", figures, {"threads": 1}, quick=False) == 1
    text = (tmp_path / "speed.md").read_text()
    lines = text.splitlines()
    assert lines[0].startswith("| what | figure | quartiles | aim |")
    assert "| 1.23 | 1.1 to 1.3 | at most 1.2 | missed |" in lines[2]
    assert "remark" not in text  # no figure has one
    assert "threads 1; netwright " in text
    assert "torch" in text
    assert text.endswith("`python benchmarks/speed.py --rounds 3`\n")
    content = json.loads((tmp_path / "speed.json").read_text())
    assert [each["met"] for each in content["figures"]] == [False, None]
    assert content["settings"] == {"threads": 1}
    assert record.record("speed", figures[1:], {}, quick=False) == 0


def test_a_trial_writes_nothing_and_misses_nothing(record, tmp_path):
    assert record.record("speed", [record.Figure("a", 9.0, most=1.0)], {}, quick=True) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_inverse_of_a_ratio_swaps_its_quartiles(record):
    fields = {name: 1.0 for name in Timing.__dataclass_fields__}
    timing = Timing(**fields | {"name": "theirs", "ratio": 2.0, "ratio_low": 1.6, "ratio_high": 2.5})
    plain, inverse = record.over(timing, "x"), record.over(timing, "x", inverse=True)
    assert (plain.value, plain.low, plain.high) == (2.0, 1.6, 2.5)
    assert (inverse.value, inverse.low, inverse.high) == (0.5, 0.4, 0.625)


SCRIPTS = sorted(path for path in BENCHMARKS.glob("*.py"))
WITHOUT_OPTIONS = ("sparse_copies", "sparse_layers")
RECORDED = (
    "cdvg", "coherence", "dagnn", "eigen_cam", "grokking", "hallucinator", "kv_bottleneck", "lssl", "natra",
    "opposing_signals", "prototypes", "surrogate", "verification",
)  # fmt: skip


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_finds_what_it_imports_and_tells_its_options(path, monkeypatch, capsys):
    """A name that has gone is noticed here, not when somebody measures."""
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    if path.stem in WITHOUT_OPTIONS:
        assert "main" in runpy.run_path(str(path), run_name="imported")
        return
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(path), run_name="__main__")
    assert stopped.value.code == 0
    assert "--help" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_a_trial_of_a_benchmark_runs_and_leaves_nothing(name, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").iterdir()}
    with Script(BENCHMARKS / f"{name}.py", "--quick", "--rounds", "1", folder=tmp_path) as trial:
        assert trial.wait(300) == 0, trial.err[-2000:]
        assert len([line for line in trial.out.splitlines() if line.startswith("| ")]) > 2
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").iterdir()} == before
