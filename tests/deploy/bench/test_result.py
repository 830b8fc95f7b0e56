"""Figures from times, and what is told of them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from netwright.deploy.bench import Benchmark, Facts, Runtime, markdown, summary

TOLD = {"version": "1.0", "deviation": 1e-7, "note": "", "file_bytes": 10, "table_bytes": None, "seconds": 2.0}
# Two timed calls in each of three rounds; the fastest dense call of the rounds: 4, 6 and 8 s.
TIMES = {
    "ours": np.array([[1.0, 3.0], [2.0, 2.5], [2.0, 9.0]]),
    "a": np.array([[4.0, 9.0], [9.0, 7.0], [9.0, 9.0]]),
    "b": np.array([[5.0, 5.0], [6.0, 6.5], [8.0, 8.5]]),
}


def made(times, dense=("a", "b"), **changes):
    runtimes = tuple(Runtime.of(n, prepared=TOLD, times=times, dense=dense, resident_bytes=3 * 10**6) for n in times)
    facts = Facts(2000, 0.9, 1000, 0.95, 10**6, 10**5, 10**5, False, 8000, ())
    whole = Benchmark(
        network="net", origin="random weights", shape=(1, 3, 8, 8), seed=0, threads=2, cores=(0, 1), load=0.5,
        facts=facts, reference="double", runtimes=runtimes, absent={"c": "not installed"}, rounds=3, calls=2,
        roofline=None, no_roofline="no C compiler", cpu="a processor",
        versions={"torch": "2"}, command="netwright bench net",
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)


def test_times_and_ratios_by_hand():
    ours = made(TIMES)["ours"]
    assert (ours.best_ms, ours.median_ms) == (1000.0, 2250.0)
    assert (ours.low_ms, ours.high_ms) == (2000.0, 2875.0)
    assert (ours.ratio, ours.ratio_low, ours.ratio_high) == (4.0, 3.5, 4.0)  # 4/1, 6/2, 8/2
    b = made(TIMES)["b"]
    assert (b.ratio, b.dense) == (1.0, True)  # 4/5, 6/6, 8/8
    with pytest.raises(KeyError, match="'c' was not measured; there are ours, a, b"):
        made(TIMES)["c"]


def test_the_whole():
    found = made(TIMES)
    assert found.ours.name == "ours"
    assert found.best_dense_peer.name == "b"  # by the median; the single best call is a's
    assert found.best_over_best == 4.0
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (data["ratio_to_best_dense_peer"], data["ratio_low"], data["ratio_high"]) == (4.0, 3.5, 4.0)
    assert (data["runtime"], data["best_dense_peer"], data["noisy"]) == ("ours", "b", False)
    assert {"verdict", "best_over_best", "network", "shape", "threads", "cores", "facts", "reference"} <= set(data)
    assert {"runtimes", "absent", "rounds", "calls", "roofline", "cpu", "versions", "command"} <= set(data)
    assert set(data["runtimes"][0]) == {field.name for field in dataclasses.fields(Runtime)}
    assert data["facts"]["sparse_macs"] == 10**5


def test_verdicts():
    assert made(TIMES).verdict == (
        "ours is 4.00 times as fast as the fastest dense runtime, b (quartiles 3.50 to 4.00)"
    )
    slow = {"ours": 10 * TIMES["ours"], "a": TIMES["a"], "b": TIMES["b"]}
    assert made(slow).verdict == "not faster: ours has 0.40 times the speed of b (quartiles 0.35 to 0.40)"
    doubtful = {"ours": np.array([[1.0]] * 4), "a": np.array([[0.8], [0.9], [1.3], [2.0]])}
    assert made(doubtful, ("a",)).verdict.startswith("not faster: ours has 1.10 times")  # a quarter says so
    assert "noisy" in made(doubtful, ("a",)).verdict
    apart = dataclasses.replace(made(TIMES).facts, constant=True)
    assert made(TIMES, facts=apart).verdict.endswith(
        "; but the output does not depend on the input: the zeros have cut the network apart"
    )
    assert "95 %, constant output" in markdown([made(TIMES, facts=apart)])
    assert made({"ours": TIMES["ours"]}, ()).verdict == "no dense runtime was measured"
    assert made({"a": TIMES["a"]}, ("a",)).verdict == "no sparse runtime was measured"
    assert made({"a": TIMES["a"]}, ("a",)).to_dict()["ratio_to_best_dense_peer"] is None


def test_noisy_means_that_quartiles_lie_a_quarter_apart():
    calm = {"ours": np.ones((5, 1)), "a": np.array([[3.6], [3.6], [4.0], [4.6], [4.6]])}
    assert not made(calm, ("a",))["ours"].noisy  # exactly a quarter
    loud = {**calm, "a": np.array([[3.6], [3.6], [4.0], [4.7], [4.7]])}
    assert made(loud, ("a",))["ours"].noisy
    assert "noisy" in str(made(loud, ("a",)))


def test_text():
    text = str(made(TIMES))
    lines = text.splitlines()
    assert lines[0] == "net: input 1x3x8x8, 2 threads on cores 0, 1, a processor"
    assert "95.00% of 0.001 M weights in pruned layers, 90.00% of all" in text
    assert "of them see the input" not in text
    fewer = dataclasses.replace(made(TIMES).facts, live_macs=5 * 10**4)
    assert "multiply-adds left: 0.1 M of 1 M, 0.05 M of them see the input" in str(made(TIMES, facts=fewer))
    assert "c: not installed" in lines
    assert "no roofline: no C compiler" in lines
    assert lines[-1] == made(TIMES).verdict
    row = next(line for line in lines if line.startswith("ours 1.0"))
    assert "4.00 [3.50-4.00]" in row
    assert " 3.0" in row  # MB
    bare = made(TIMES, cores=None, facts=None, threads=1, rounds=1)
    assert str(bare).startswith("net: input 1x3x8x8, 1 thread, a processor\nrandom weights; 1 round of 2 calls")


def test_tables_of_several():
    alone = made({"ours": TIMES["ours"], "b": TIMES["b"]}, ("b",), network="other", facts=None)
    table = markdown([made(TIMES), alone]).splitlines()
    assert len(table) == 4
    columns = [cell.strip() for cell in table[0].strip("|").split("|")]
    assert columns[4:7] == ["ours, best / median ms", "a", "b"]
    rows = [dict(zip(columns, (c.strip() for c in line.strip("|").split("|")), strict=True)) for line in table[2:]]
    assert (rows[0]["network"], rows[0]["zeros"], rows[0]["kept weights"]) == ("net", "95 %", "0 k")
    assert (rows[0]["x fastest dense"], rows[0]["best / best"]) == ("4.00 [3.50-4.00]", "4.00")
    assert (rows[1]["zeros"], rows[1]["a"], rows[1]["b"]) == ("-", "-", "5000.00 / 6250.00")
    told = summary([made(TIMES), alone])
    assert "c: not installed" in told
    assert told.splitlines()[-1].startswith("other 1x3x8x8")


def test_plot():
    ax = made(TIMES).plot()
    assert len(ax.patches) == 3
    assert ax.get_xlabel() == "milliseconds"
