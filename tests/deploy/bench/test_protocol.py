"""Who takes part, in which process, and what is told of it. No test looks at how long anything took."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import stand_in
import torch

from netwright.console import UserError
from netwright.deploy.bench import COMPETITORS, Recipe, bench
from netwright.deploy.bench.peers import OnnxRuntime

TINY = Recipe("stand_in:tiny", {"batch": 2})
TROUBLED = {
    "fatal": "stand_in:Fatal",
    "missing": "stand_in:Missing",
    **stand_in.SPARSE,
    "wrong": "stand_in:Wrong",
    "unable": "stand_in:Unable",
    **stand_in.DENSE,
    "onnxruntime": COMPETITORS["onnxruntime"],
}


@pytest.fixture(scope="module")
def found():
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    variables = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    made = bench(TINY, competitors=TROUBLED, rounds=3, seconds=60.0, command="typed")
    assert os.sched_getaffinity(0) == cores
    # torch's exporter leaves this one behind
    assert {n: v for n, v in os.environ.items() if n != "TORCHINDUCTOR_CACHE_DIR"} == variables
    assert torch.get_num_threads() == threads
    return made


def test_those_that_can_are_measured_and_agree(found):
    assert [runtime.name for runtime in found.runtimes] == ["sparse", "dense", "onnxruntime"]
    assert [runtime.dense for runtime in found.runtimes] == [False, True, True]
    assert all(runtime.deviation < 1e-6 for runtime in found.runtimes)
    assert all(0 < r.best_ms <= r.low_ms <= r.median_ms <= r.high_ms for r in found.runtimes)
    assert all(0 < r.ratio_low <= r.ratio <= r.ratio_high for r in found.runtimes)
    assert found["dense"].ratio <= 1
    assert found["onnxruntime"].version == OnnxRuntime().version()
    assert (found["sparse"].file_bytes, found["sparse"].table_bytes) == (100, 50)
    assert found["onnxruntime"].file_bytes > 4 * found.facts.weights
    assert found.ours.name == "sparse"
    assert found.best_dense_peer.name in {"dense", "onnxruntime"}
    assert "dense runtime" in found.verdict or found.verdict.startswith("not faster")


def test_those_that_cannot_say_why(found):
    assert list(found.absent) == ["missing", "fatal", "wrong", "unable"]
    assert found.absent["missing"] == "not installed: pip install no_such_package"
    assert found.absent["fatal"] == "its process ended with signal 6: it broke"
    assert found.absent["wrong"].startswith("wrong output: 0.01 of the largest is off")
    assert found.absent["unable"] == "NotImplementedError: no such operator"


def test_what_was_measured_is_told(found):
    assert (found.network, found.shape, found.threads, found.rounds, found.calls) == ("tiny", (2, 3, 8, 8), 1, 3, 4)
    assert found.cores == (max(os.sched_getaffinity(0)),)
    assert found.reference == "PyTorch eager in float64"
    assert found.command == "typed"
    assert {"netwright", "torch", "python"} <= set(found.versions)
    assert found.facts.pruned_sparsity == 0.75
    if found.roofline is None:
        assert "no C compiler" in found.no_roofline
    else:
        assert found.roofline.binds in found.roofline.parts


def test_one_thread_is_one_process(found):
    assert found["sparse"].note == found["dense"].note
    assert found["sparse"].note.startswith("1 threads")


def test_memory_is_that_of_the_network_and_its_runtime():
    made = bench(TINY, competitors={"hungry": "stand_in:Hungry", **stand_in.DENSE}, rounds=1)
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not tell")
    assert 60e6 < made["hungry"].resident_bytes < 90e6
    assert made["dense"].resident_bytes < 30e6


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_with_several_threads_torch_has_a_process_of_its_own():
    made = bench(TINY, competitors={**stand_in.SPARSE, **stand_in.DENSE}, threads=2, rounds=2, memory=False)
    ours, other = made["sparse"].note.split(), made["dense"].note.split()
    assert (ours[0], other[0]) == ("2", "1")
    assert ours[-1] != other[-1]
    assert len(made.cores) == 2
    assert made["sparse"].resident_bytes is None


def test_only_the_runtimes_asked_for():
    made = bench(TINY, competitors=TROUBLED, runtimes=["dense"], rounds=1, memory=False)
    assert ([r.name for r in made.runtimes], dict(made.absent)) == (["dense"], {})
    assert (made.ours, made.verdict) == (None, "no sparse runtime was measured")


def test_a_function_that_draws_its_weights_anew_is_measured_with_one_set_of_them():
    made = bench(Recipe("stand_in:unseeded"), competitors=stand_in.DENSE, rounds=1, memory=False)
    assert made["dense"].deviation < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
        ({"seconds": 0.0}, "seconds must be > 0, got 0.0"),
        ({"threads": 0}, "threads must lie in 1.."),
        ({"threads": 10_000}, "threads must lie in 1..*got 10000"),
        ({"runtimes": ["onnxruntim"]}, "unknown runtime 'onnxruntim'\n  did you mean onnxruntime?"),
        ({"competitors": {"missing": "stand_in:Missing"}}, "no runtime can run tiny: missing: not installed"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message.replace("*", ".*").replace("?", r"\?")):
        bench(TINY, **options)


@pytest.mark.parametrize(("load", "warned"), [(0.0, False), (99.0, True)])
def test_a_busy_machine_is_warned_of(monkeypatch, capsys, load, warned):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    assert bench(TINY, competitors=stand_in.DENSE, rounds=1, memory=False).load == load
    assert ("this machine is busy (load 99.0 on" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(
    ("runtime", "told"), [("Moody", "RuntimeError: enough"), ("Doomed", "its process ended with signal 6")]
)
def test_a_runtime_that_fails_while_it_is_timed_is_named(runtime, told):
    with pytest.raises(UserError, match=f"moody failed while it was timed: {told}"):
        bench(TINY, competitors={"moody": f"stand_in:{runtime}"}, rounds=5, memory=False)
