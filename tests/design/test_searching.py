"""A search alone, and limits on what is found, as a command line gives them."""

from __future__ import annotations

import csv
import json

import pytest
from typer.testing import CliRunner

from netwright import cli
from netwright.console import UserError
from netwright.cost import LatencyTable, count
from netwright.data import load
from netwright.design.limits import Allowance, widest_within
from netwright.design.options import Options, quantity
from netwright.design.pipeline import result_of
from netwright.design.plan import make_plan
from netwright.design.run import RunFolder
from netwright.design.searching import search
from netwright.design.verdict import goals, verdict
from netwright.page import text_of
from netwright.search import Genotype, spaces
from netwright.search.latency import predict
from netwright.seeding import stream

SMALL = ["--space", "micro-chain", "--search-channels", "4", "--channels", "8", "--epochs", "3", "--seed", "1"]


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.mark.parametrize("method", ["proxylessnas", "single-path"])
def test_a_search_leaves_genotype_history_and_skip_share_and_is_not_run_twice(method, tmp_path):
    folder = tmp_path / "found"
    arguments = ["search", "digits", "--method", method, *SMALL, "--flops", "250k", "--out", str(folder)]
    made = invoke(*arguments, "--json")
    assert made.exit_code == 0, made.stderr
    result = json.loads(made.stdout)
    genotype = Genotype.load(folder / "genotype.json")
    assert genotype.to_dict() == result["genotype"]
    rows = list(csv.DictReader((folder / "epochs.csv").open()))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert [float(row["skip_share"]) for row in rows] == result["skip_share"]
    assert len(result["alpha_history"]) == 4
    for name in ("alphas.png", "epochs.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    network = genotype.build(1, 10, channels=8)
    assert 2 * count(network, (1, 8, 8)).macs <= 250_000
    again = invoke(*arguments, "--json")
    assert again.stdout == made.stdout
    told = invoke(*arguments)
    assert "layer_0" in told.stdout
    assert f"folder: {folder}" in told.stdout
    other = invoke("search", "digits", *SMALL, "--out", str(folder))
    assert other.exit_code == 2
    assert "the folder holds another search" in other.stderr
    design = invoke("design", "digits", "--out", str(folder))
    assert design.exit_code == 2
    assert "no run of netwright" in design.stderr


def test_a_search_that_was_stopped_goes_on_to_the_same_end(tmp_path, monkeypatch):
    options = Options("digits", search="darts", space="micro-darts-2-shared", search_epochs=3, search_channels=2)
    whole = search(Options(**{**options.to_dict(), "out": str(tmp_path / "whole")}))
    from netwright.search.searcher import Searcher

    ends, end_epoch = [], Searcher.end_epoch

    def stopping(self, *validation):
        ended = end_epoch(self, *validation)
        ends.append(ended.epoch)
        return ended

    def interrupted(path, state):
        written(path, state)
        if len(ends) == 2:
            raise KeyboardInterrupt

    from netwright import storage

    written = storage.write_checkpoint
    monkeypatch.setattr(Searcher, "end_epoch", stopping)
    monkeypatch.setattr(storage, "write_checkpoint", interrupted)
    cut = Options(**{**options.to_dict(), "out": str(tmp_path / "cut")})
    with pytest.raises(KeyboardInterrupt):
        search(cut)
    monkeypatch.undo()
    assert not (tmp_path / "cut/genotype.json").exists()
    resumed = search(cut)
    assert resumed.genotype == whole.genotype
    # The architecture waits for half of the search, in which there is no validation loss.
    assert [e["train_loss"] for e in resumed.epochs] == [e["train_loss"] for e in whole.epochs]
    losses = [e.get("val_loss") for e in whole.epochs]
    assert [e.get("val_loss") for e in resumed.epochs] == losses
    assert losses[0] is None
    assert losses[-1] is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "random"], "there is nothing to search with random"),
        (["--method", "dart"], "unknown --method 'dart'\n  did you mean darts?"),
        (["--method", "randon"], "unknown --method 'randon'\n  do choose one of darts, dass,"),
        (
            ["--method", "single-path"],
            "single-path cannot search the space micro-darts: a supernet of superkernels must",
        ),
        (
            ["--method", "single-path", "--space", "micro-chain", "--select", "sample"],
            "select 'sample' has no meaning after single-path",
        ),
        (["--select", "argmax"], "select 'argmax' does not fit the space 'micro-darts', whose rule is 'magnitude'"),
        (["--select", "best"], "unknown --select 'best'"),
        (["--flops", "many"], "not a number: 'many'"),
        (["--flops", "0"], "flops must be > 0 and finite, got 0.0"),
        (["--latency-ms", "nan"], "latency-ms must be > 0 and finite, got nan"),
        (["--select", "perturbation", "--flops", "1M"], "looks at the accuracy alone and cannot keep to a limit"),
        (["--flops", "10"], "the cheapest network of micro-darts with 8 channels has"),
        (["--epochs", "0"], "error: epochs must be >= 1, got 0"),
    ],
)
def test_a_search_refuses_what_it_cannot_do(arguments, message, tmp_path):
    found = invoke("search", "digits", *arguments, "--out", str(tmp_path / "out"))
    assert found.exit_code == 2
    assert message in found.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [[], ["--space", "micro-chain", "--select", "perturbation"]])
def test_a_design_by_a_search_that_cannot_be_leaves_no_folder(more, tmp_path):
    found = invoke("design", "digits", "--search", "single-path", *more, "--out", str(tmp_path / "out"))
    assert found.exit_code == 2
    assert "single-path" in found.stderr
    assert "--debug" not in found.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "M", "1.2.3", "-5", "5MM", "inf"])
def test_what_is_no_quantity(text):
    with pytest.raises(UserError, match="not a number"):
        quantity(text)


def test_the_width_is_the_largest_at_which_a_random_network_keeps_to_the_limits():
    data, space = load("digits"), spaces.get("micro-chain")
    genotype, sizes = space.random(stream(0, "genotype")), {"cells": None, "stem": "cifar"}

    def flops(channels: int) -> int:
        return 2 * count(space.build(genotype, 1, 10, channels=channels), (1, 8, 8)).macs

    for width in (8, 16):
        options = Options("digits", space="micro-chain", flops=flops(width))
        assert widest_within(options, data, sizes, genotype, [32, 16, 8])[0] == width
    tight = Options("digits", space="micro-chain", flops=flops(8) - 1)
    allowance = Allowance(tight, data, {**sizes, "channels": 8})
    assert not allowance.over(allowance.cheapest())
    assert widest_within(tight, data, sizes, genotype, [32, 16, 8])[0] == 8


def test_a_plan_narrows_the_network_to_its_limits_but_not_below_what_was_asked_for():
    data = load("digits")
    common = {"space": "micro-chain", "baseline": "small_convnet", "search_channels": 4}
    assert make_plan(Options("digits", **common), data).model["channels"] == 32
    assert make_plan(Options("digits", flops=1e6, **common), data).model["channels"] < 32
    with pytest.raises(UserError, match="the cheapest network of micro-chain with 32 channels has"):
        make_plan(Options("digits", flops=1e5, channels=32, **common), data)


def test_a_search_keeps_to_a_latency_by_its_own_table(tmp_path):
    folder = tmp_path / "found"
    size = [
        "--space",
        "micro-darts-2-shared",
        "--search-channels",
        "2",
        "--channels",
        "4",
        "--epochs",
        "1",
        "--sparsity",
        "0.5",
    ]
    made = invoke("search", "digits", "--method", "darts", *size, "--latency-ms", "50", "--out", str(folder))
    assert made.exit_code == 0, made.stderr
    table = LatencyTable.load(folder / "latency.json")
    assert (table.runtime, table.sparsity, table.threads, table.batch) == ("native", 0.5, 1, 1)
    space = spaces.get("micro-darts-2-shared")
    taken = predict(space, Genotype.load(folder / "genotype.json"), table, (1, 8, 8), channels=4, cells=3)
    assert 0 < taken <= 50


def test_limits_that_were_missed_are_told():
    latency = [{"runtime": "netwright's sparse runtime", "batch": 1, "median_ms": 0.2}]
    model = {"accuracy": 0.9, "sparsity": 0.95, "macs": 600, "latency": latency}
    kept = {"model": model, "goal": {"latency_ms": 0.25, "flops": 1200.0}}
    missed = {"model": model, "goal": {"latency_ms": 0.1, "flops": 1000.0}}
    assert [goal["met"] for goal in goals(kept).values()] == [True, True]
    assert [goal["met"] for goal in goals(missed).values()] == [False, False]
    assert "it takes 0.200 ms of the 0.250 ms allowed" in text_of(verdict(kept))
    assert "it takes 1,200 of the 1,200 FLOPs allowed" in text_of(verdict(kept))
    assert "it takes 0.200 ms, more than the 0.100 ms allowed" in text_of(verdict(missed))
    assert "it takes 1,200, more than the 1,000 FLOPs allowed" in text_of(verdict(missed))


def test_a_run_that_missed_its_limits_did_not_meet_its_goal(tmp_path):
    model = {"accuracy": 0.9, "sparsity": 0.95, "nonzeros": 5, "macs": 600}
    model["latency"] = [{"runtime": "netwright's sparse runtime", "batch": 1, "median_ms": 0.2}]
    goal = {"sparsity": 0.95, "accuracy": None, "time_budget": None, "seconds_used": 1.0}
    figures = {"model": model, "baseline": {"accuracy": 0.9}, "goal": goal | {"latency_ms": 0.1, "flops": 1000.0}}
    (tmp_path / "measurements.json").write_text(json.dumps(figures))
    result = result_of(RunFolder(tmp_path))
    assert not result.goal_met
    assert result.missed == ("0.2 ms of latency, allowed 0.1", "1,200 FLOPs, allowed 1,000")
