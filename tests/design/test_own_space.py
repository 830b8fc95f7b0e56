"""Search spaces in a file of the user's own, and latency tables, as the command line takes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from netwright import cli
from netwright.console import UserError
from netwright.cost import LatencyTable
from netwright.data import load
from netwright.design import limits
from netwright.design.limits import Allowance
from netwright.design.model import Architecture, load_run
from netwright.design.options import Options
from netwright.design.plan import search_plan
from netwright.design.user_code import open_space, sizes_of
from netwright.search import Genotype, spaces
from netwright.search.latency import SpaceLatencyTable

NETS = """
from torch import nn
from netwright.search import ChoiceSpace


def body(choose, in_channels, num_classes, {sizes}):
    sizes = {{f"k{{k}}": lambda k=k: nn.Conv2d(8, 8, k, padding=k // 2) for k in (1, 3)}}
    first = nn.Conv2d(in_channels, 8, 3, padding=1)
    return nn.Sequential(first, choose("a", sizes), nn.ReLU(), choose("b", {{**sizes, "skip": nn.Identity}}),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


mine = ChoiceSpace("{name}", body, shape=(8, 8))


def make():
    return mine


number = 3
"""


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def nets(tmp_path: Path):
    """A file with a space; what it makes known is forgotten again."""
    before = dict(spaces.SPACES)
    path = tmp_path / "nets.py"
    path.write_text(NETS.format(name="mine", sizes="width=8"))
    yield path
    spaces.SPACES.clear()
    spaces.SPACES.update(before)


@pytest.mark.parametrize("name", ["mine", "make"])
def test_a_search_on_a_space_in_a_file_goes_on_and_its_genotype_is_built(nets, name, tmp_path):
    out = tmp_path / "found"
    arguments = [
        "search",
        "digits",
        "--method",
        "darts",
        "--space",
        f"{nets}:{name}",
        "--epochs",
        "1",
        "--out",
        str(out),
    ]
    made = invoke(*arguments, "--flops", "1M", "--json")
    assert made.exit_code == 0, made.stderr
    genotype = Genotype.load(out / "genotype.json")
    assert genotype.space == "mine"
    assert genotype.build(1, 10)(load("digits").test.images[:2] / 255).shape == (2, 10)
    assert (out / "space.py").read_text() == nets.read_text()
    assert invoke(*arguments, "--flops", "1M", "--json").stdout == made.stdout
    nets.write_text(nets.read_text() + "\n# edited\n")
    again = invoke(*arguments, "--flops", "1M")
    assert again.exit_code == 2
    assert "the folder holds another search (space_digest" in again.stderr


def test_a_file_that_was_edited_is_read_anew(nets):
    first = open_space(f"{nets}:mine")
    assert open_space(f"{nets}:mine") is first
    nets.write_text(nets.read_text().replace("(1, 3)", "(1, 3, 5)"))
    assert open_space(f"{nets}:mine").choices()["a"] == ("k1", "k3", "k5")
    assert spaces.get("mine") == open_space(f"{nets}:mine")


def test_an_architecture_on_a_space_in_a_file_is_rebuilt_while_the_file_is_what_it_was(nets, tmp_path):
    from netwright.design.user_code import space_facts

    space = open_space(f"{nets}:mine")
    genotype = space.genotype({"a": "k3", "b": "skip"})
    facts = space_facts(f"{nets}:mine")
    known = Architecture(
        "genotype", (1, 8, 8), ("a", "b"), (0.5,), (0.2,), genotype=genotype.to_dict(), channels=32, cells=None, **facts
    )
    (tmp_path / "architecture.json").write_text(json.dumps(known.to_dict()))
    del spaces.SPACES["mine"]  # as in another process
    import netwright.design.user_code as user_code

    user_code._opened.clear()
    read = Architecture.read(tmp_path / "architecture.json")
    assert read == known
    assert sum(p.numel() for p in read.build().parameters()) == sum(
        p.numel() for p in space.build(genotype, 1, 2).parameters()
    )
    kept = nets.read_text()
    nets.write_text(kept + "# edited")
    with pytest.raises(UserError, match=r"the run's search space has changed(.|\n)*space\.py"):
        read.build()
    nets.unlink()
    with pytest.raises(UserError, match="is missing"):
        load_run(tmp_path)
    nets.write_text(kept)
    read.build()


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        ("absent.py:mine", [], "no such file"),
        ("nets.py:nothing", [], "no search space 'nothing'"),
        ("nets.py:number", [], "number is no search space but a int"),
        ("nets.py:mine", ["--channels", "16"], "channels has no meaning: the networks of mine have no channels"),
        ("nets.py:mine", ["--select", "magnitude"], "does not fit the space 'mine'"),
        ("micro-chian", [], "did you mean micro-chain?"),
    ],
)
def test_what_is_no_space(nets, space, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = invoke("search", "digits", "--space", space, *options, "--out", str(tmp_path / "out"))
    assert found.exit_code == 2
    assert message in found.stderr
    assert not (tmp_path / "out").exists()


def test_a_space_with_the_name_of_another_is_refused(nets):
    nets.write_text(NETS.format(name="darts", sizes="width=8"))
    with pytest.raises(UserError, match="there is another search space named 'darts'"):
        open_space(f"{nets}:mine")


def test_the_sizes_of_a_network_are_those_that_it_takes(nets):
    given = {"channels": 8, "cells": 3, "stem": "cifar"}
    assert sizes_of(open_space(f"{nets}:mine"), **given) == {}
    assert sizes_of(spaces.get("micro-chain"), **given) == given
    assert sizes_of(spaces.get("darts"), **given) == given


# --- latency tables -----------------------------------------------------------------------------------------------

SMALL = ["--space", "micro-chain", "--search-channels", "4", "--epochs", "1", "--sparsity", "0.5"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table for digits, 8 channels, made up but for its conditions."""
    space, options = spaces.get("micro-chain"), {"channels": 8, "stem": "cifar"}
    operations = space.supernet(1, 10, **options).operations((1, 8, 8))
    times = {key: 0.01 * (1 + number) for number, key in enumerate(operations)} | {"constant": 0.1}
    made = SpaceLatencyTable(
        milliseconds=times, cpu=limits.cpu_name(), threads=1, batch=1, dtype="float32", torch_version="2",
        runtime="native", sparsity=0.5, space="micro-chain", shape=(1, 8, 8), num_classes=10, options=options,
    )  # fmt: skip
    made.save(tmp_path / "table.json")
    return tmp_path / "table.json"


@pytest.fixture
def no_clock(monkeypatch):
    """No latency is measured."""

    def refuse(*arguments, **options):
        raise AssertionError("something was measured")

    monkeypatch.setattr(limits, "measure", refuse)
    monkeypatch.setattr(limits, "measured", refuse)


def test_a_search_under_a_latency_reads_a_table_and_measures_nothing(table, no_clock, tmp_path):
    out, limit = tmp_path / "found", 0.7
    arguments = ["search", "digits", "--method", "darts", *SMALL, "--latency-ms", str(limit)]
    made = invoke(*arguments, "--latency-table", str(table), "--out", str(out))
    assert made.exit_code == 0, made.stderr
    known = SpaceLatencyTable.load(table)
    assert 0 < known.of(Genotype.load(out / "genotype.json")) <= 0.9 * limit
    assert dict(LatencyTable.load(out / "latency.json")) == dict(known)
    plan = json.loads((out / "plan.json").read_text())
    assert plan["model"]["channels"] == 8  # the table's width, as none was given
    # The content decides, not the name.
    moved = table.rename(tmp_path / "moved.json")
    assert invoke(*arguments, "--latency-table", str(moved), "--out", str(out)).exit_code == 0
    moved.write_text(moved.read_text() + " ")
    again = invoke(*arguments, "--latency-table", str(moved), "--out", str(out))
    assert again.exit_code == 2
    assert "the folder holds another search (latency_table" in again.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runtime": "torch"}, "runtime torch there, native needed"),
        ({"sparsity": 0.9}, "sparsity 0.9 there, 0.5 needed"),
        ({"threads": 2}, "threads 2 there, 1 needed"),
        ({"batch": 4}, "batch 4 there, 1 needed"),
        ({"cpu": "an abacus"}, "cpu an abacus there"),
        ({"shape": [1, 16, 16]}, "shape (1, 16, 16) there, (1, 8, 8) needed"),
        ({"space": "darts"}, "space darts there, micro-chain needed"),
        ({"num_classes": 3}, "classes 3 there, 10 needed"),
        ({"options": {"channels": 8, "stem": "strided"}}, "stem strided there, cifar needed"),
        ({"options": {}}, "channels None there, 32 needed"),
        ({"space": None}, "the latency table does not say its space: an older version measured it"),
        ({"milliseconds": [{"key": "constant", "ms": -1}]}, "a latency must be a number >= 0"),
    ],
)
def test_a_table_of_something_else_is_refused(table, no_clock, change, message, tmp_path):
    content = json.loads(table.read_text()) | change
    table.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    arguments = ["--latency-ms", "5", "--latency-table", str(table), "--out", str(tmp_path / "out")]
    found = invoke("search", "digits", *SMALL, *arguments)
    assert found.exit_code == 2
    assert message in found.stderr
    assert not (tmp_path / "out").exists()


def test_a_table_of_another_width_is_refused_with_the_command_for_the_right_one(table, no_clock):
    options = Options(
        "digits", space="micro-chain", channels=12, sparsity=0.5, latency_ms=1.0, latency_table=str(table)
    )
    with pytest.raises(UserError) as refused:
        search_plan(options, load("digits"))
    assert "channels 8 there, 12 needed" in str(refused.value)
    assert (
        "netwright latency-table micro-chain --runtime native --sparsity 0.5 --shape 1,8,8 --classes 10 --channels 12 "
        f"--stem cifar --out {table} --force"
    ) in str(refused.value)


def test_the_command_that_a_refusal_names_makes_the_table_that_is_needed(tmp_path, monkeypatch):
    options = Options("digits", space="micro-darts-2-shared", sparsity=0.5, latency_ms=50.0)
    model = {"channels": 4, "cells": 3, "stem": "cifar"}
    arguments = Allowance(options, load("digits"), model)._arguments()
    path = tmp_path / "table.json"
    few = ["--repeats", "2", "--calibration", "0"]
    made = invoke("latency-table", *arguments, *few, "--out", str(path))
    assert made.exit_code == 0, made.stderr
    named = Options(**{**options.to_dict(), "train_method": (), "latency_table": str(path)})
    given = Allowance(named, load("digits"), model)._given
    assert given is not None
    assert given.options == {"channels": 4, "cells": 3, "stem": "cifar"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--latency-table", "table.json"], "latency-table has no meaning without a limit"),
        (["--latency-ms", "5", "--latency-table", "absent.json"], "no such file"),
        (["--sample-epochs", "1"], "sample-epochs has no meaning without samples"),
        (["--select", "sample", "--sample-epochs", "0"], "sample-epochs must be >= 1, got 0"),
        (["--select", "sample", "--sample-epochs", "1", "--time-budget", "1m"], "no time budget holds"),
    ],
)
def test_options_that_do_not_go_together(table, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = invoke("search", "digits", *SMALL, *arguments, "--out", str(tmp_path / "out"))
    assert found.exit_code == 2
    assert message in found.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("method", "share"), [("fbnet", 0.2), ("darts", 0.5)])
def test_a_search_splits_the_data_as_its_method_does_and_says_so(method, share, tmp_path, monkeypatch):
    from netwright.data.tensors import Batches
    from netwright.design import search_stage

    sizes = []

    def counted(dataset, *arguments, **options):
        sizes.append(len(dataset))
        return Batches(dataset, *arguments, **options)

    monkeypatch.setattr(search_stage, "Batches", counted)
    out = tmp_path / "found"
    made = invoke("search", "digits", "--method", method, *SMALL, "--out", str(out))
    assert made.exit_code == 0, made.stderr
    assert sizes[1] / sum(sizes[:2]) == pytest.approx(share, abs=0.01)
    split = json.loads((out / "search.json").read_text())["config"]["split"]
    assert split["architecture_share"] == share
    assert isinstance(split["seed"], int)


def test_draws_that_are_trained_are_scored_by_that(tmp_path, monkeypatch):
    from netwright.search.scratch import ScratchAccuracy

    scores = {}

    def scored(self, genotype):
        scores[genotype] = float(len(scores))
        assert (self.epochs, self.options["channels"]) == (2, 8)
        return scores[genotype]

    monkeypatch.setattr(ScratchAccuracy, "__call__", scored)
    out = tmp_path / "found"
    arguments = ["--method", "fbnet", *SMALL, "--channels", "8", "--sample-epochs", "2", "--out", str(out)]
    made = invoke("search", "digits", *arguments)
    assert made.exit_code == 0, made.stderr
    assert len(scores) > 1
    assert Genotype.load(out / "genotype.json") == max(scores, key=scores.__getitem__)
