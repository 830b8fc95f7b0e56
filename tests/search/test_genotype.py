import dataclasses
import json
import subprocess
import sys

import pytest

from netwright.console import UserError
from netwright.search import spaces
from netwright.search.genotype import DARTS_V1, DARTS_V2, DASS_90, DASS_95, DASS_99, CellGenotype, Genotype
from netwright.seeding import stream

PUBLISHED = {"v1": DARTS_V1, "v2": DARTS_V2, "90": DASS_90, "95": DASS_95, "99": DASS_99}


@pytest.mark.parametrize("genotype", PUBLISHED.values(), ids=PUBLISHED)
def test_published_cells_are_valid_and_survive_json(genotype):
    assert genotype.validate() is genotype
    copy = Genotype.from_json(genotype.to_json())
    assert copy == genotype
    assert hash(copy) == hash(genotype)
    assert genotype.normal.concat == (2, 3, 4, 5)


def test_published_edges():
    assert DARTS_V2.normal.edges() == [
        ("sep_conv_3x3", 0, 2),
        ("sep_conv_3x3", 1, 2),
        ("sep_conv_3x3", 0, 3),
        ("sep_conv_3x3", 1, 3),
        ("skip_connect", 0, 4),
        ("sep_conv_3x3", 1, 4),
        ("skip_connect", 0, 5),
        ("dil_conv_3x3", 2, 5),
    ]
    assert DARTS_V1.reduce.edges()[-2:] == [("avg_pool_3x3", 0, 5), ("skip_connect", 2, 5)]
    assert len({*PUBLISHED.values()}) == 5


def test_convolutions_become_fewer_with_sparsity_as_the_paper_says():
    assert [g.convolutions for g in (DASS_90, DASS_95, DASS_99)] == [13, 14, 4]
    assert DASS_99.skip_share == 7 / 16
    assert DARTS_V1.convolutions == 5


def test_order_of_a_nodes_edges_does_not_matter():
    a = CellGenotype((("skip_connect", 1), ("sep_conv_3x3", 0)))
    b = CellGenotype((("sep_conv_3x3", 0), ("skip_connect", 1)))
    assert a == b
    assert hash(a) == hash(b)
    assert a != CellGenotype((("skip_connect", 0), ("sep_conv_3x3", 1)))


def test_a_genotype_is_frozen_and_knows_its_space():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DARTS_V1.space = "other"
    value = json.loads(DARTS_V1.to_json())
    assert (value["space"], value["version"]) == ("darts", 1)
    assert dataclasses.replace(DARTS_V1, version=2) != DARTS_V1


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ((("skip_connect", 0), ("skip_connect", 2)), r"node 0 .*predecessors 0 to 1, got \(skip_connect, 2\)"),
        ((("skip_connect", 0), ("skip_connect", -1)), "earlier state"),
        ((("skip_connect", 0), ("sep_conv_3x3", 0)), "different predecessors"),
        ((("skip_connect", 0),), "two edges"),
        ((), "at least 1 node"),
        ((("skip_connect", 0), ("skip_connect", "1")), "operation name, predecessor number"),
    ],
)
def test_impossible_cells_are_refused(ops, message):
    with pytest.raises(ValueError, match=message):
        CellGenotype(ops)


def test_concat_must_name_nodes():
    ops = (("skip_connect", 0), ("skip_connect", 1))
    for concat in ((1,), (3,), (2, 2)):
        with pytest.raises(ValueError, match="concat"):
            CellGenotype(ops, concat)


def _json(**changes):
    value = DARTS_V1.to_dict()
    value["normal"]["ops"] = changes.pop("ops", value["normal"]["ops"])
    value["normal"]["concat"] = changes.pop("concat", value["normal"]["concat"])
    return json.dumps({**value, **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_json(space="dart"), "did you mean darts"),
        (_json(version=7), "version 1, got 'darts' version 7"),
        (_json(ops=[["sep_conv_7x7", 0], ["skip_connect", 1]] * 4), "did you mean sep_conv"),
        (_json(ops=[["none", 0], ["skip_connect", 1]] * 4), r"edge \(none, 0\) into state 2 in normal must be one of"),
        (
            _json(ops=[["skip_connect", 0], ["skip_connect", 1]] * 3, concat=[]),
            "normal must have 4 nodes in space 'darts', got 3",
        ),
        (_json(ops=[["skip_connect", 0], ["skip_connect", 5]] * 4), "earlier state"),
        ('{"space": "darts", "version": 1}', "field 'normal'"),
        ("[]", "not a genotype"),
        ("{", "Expecting"),
    ],
)
def test_faulty_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Genotype.from_json(text)


def test_cells_must_agree_in_a_space_with_one_cell_type():
    genotype = spaces.get("micro-darts-2").random(stream(0, "g"))
    assert genotype.normal != genotype.reduce
    with pytest.raises(ValueError, match="must be equal"):
        dataclasses.replace(genotype, space="micro-darts-2-shared").validate()


def test_files(tmp_path):
    DARTS_V1.save(tmp_path / "g.json")
    assert Genotype.load(tmp_path / "g.json") == DARTS_V1
    (tmp_path / "bad.json").write_text(_json(space="zebra"))
    with pytest.raises(UserError, match=r"bad\.json"):
        Genotype.load(tmp_path / "bad.json")


def test_round_trip_builds_the_same_network():
    genotype = spaces.get("micro-darts").random(stream(3, "g"))
    first = genotype.build(1, 10)
    second = Genotype.from_json(genotype.to_json()).build(1, 10)
    assert {k: v.shape for k, v in first.state_dict().items()} == {k: v.shape for k, v in second.state_dict().items()}


def _modules_after(code):
    code += "; import sys; print('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_building_needs_no_supernet_and_reading_no_torch():
    read = "from netwright.search import Genotype, DARTS_V1; Genotype.from_json(DARTS_V1.to_json())"
    assert "torch" not in _modules_after(read)
    loaded = _modules_after("from netwright.search import DARTS_V1; DARTS_V1.build(channels=4, cells=2)")
    assert "netwright.search.spaces.network" in loaded
    assert not loaded & {"netwright.search.supernet", "netwright.search.spaces.cells", "lightning"}
