"""Saved networks: two files that belong together, checked to the last number before anything is made of them."""

import copy
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from kernels import compiler
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from torch import nn

from netwright import storage
from netwright.console import UserError
from netwright.deploy import artifact
from netwright.deploy.graph import capture, check, optimise
from netwright.deploy.native.emit import compile_graph
from netwright.deploy.native.machine import PORTABLE
from netwright.deploy.stored import ArtifactError, pack, unpack


class Mixed(nn.Module):
    """A little of everything."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up, self.shuffle = nn.ConvTranspose2d(8, 8, 3, padding=1), nn.ChannelShuffle(2)
        self.gate, self.norm = nn.Conv2d(8, 8, 1), nn.LayerNorm(16)
        self.pool, self.head = nn.MaxPool2d(2, ceil_mode=True), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = nn.functional.relu6(self.depthwise(x) + x)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = torch.cat([self.up(x), self.shuffle(x)], 1)
        x = nn.functional.avg_pool2d(self.pool(x), 2, padding=1, count_include_pad=False)
        x = self.norm(x.mean((2, 3)))
        return self.head(nn.functional.gelu(x)).softmax(1)


def mixed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Mixed().eval()
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                layer.weight.data *= torch.rand_like(layer.weight) < 0.4
        return network, torch.randn(2, 3, 11, 13)


def graph_of_mixed():
    return optimise(capture(*mixed()))


@pytest.fixture(scope="module")
def graph():
    return graph_of_mixed()


@pytest.fixture
def saved(graph, tmp_path):
    return artifact.write(tmp_path / "saved", pack(graph))


def content(folder):
    return json.loads((folder / "model.json").read_text())


def sign(changed):
    """The digest that an attacker would compute too."""
    changed["digest"] = storage.digest({key: value for key, value in changed.items() if key != "digest"})
    return changed


def rewrite(folder, changed):
    (folder / "model.json").write_text(json.dumps(sign(changed)))


def read(folder):
    return unpack(artifact.read(folder))


def assert_same(a, b):
    assert json.dumps(a.to_plain()[0]) == json.dumps(b.to_plain()[0])
    for name, array in a.to_plain()[1].items():
        np.testing.assert_array_equal(b.to_plain()[1][name], array)


def test_what_was_written_is_read(graph, saved):
    assert sorted(path.name for path in saved.iterdir()) == ["model.json", "model.safetensors"]
    assert_same(read(saved), graph)


def test_the_same_network_gives_the_same_files(graph, saved, tmp_path):
    again = artifact.write(tmp_path / "again", pack(graph))
    for path in saved.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_writing_replaces_a_saved_network_and_nothing_else(graph, saved, tmp_path):
    artifact.write(saved, pack(graph, quantize="int8"))
    assert content(saved)["arrays"]["0.weight"]["encoding"].endswith("int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(UserError, match="something else"):
            artifact.write(tmp_path / name, pack(graph))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_is_made_for_it(graph, tmp_path):
    assert_same(read(artifact.write(tmp_path / "a" / "b" / "c", pack(graph))), graph)


def test_what_cannot_be_written_is_told(graph, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        artifact.write(tmp_path / "file" / "model", pack(graph))


def test_a_write_that_fails_leaves_the_old_one(graph, saved, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_text", fail)
    with pytest.raises(UserError, match="No space left"):
        artifact.write(saved, pack(graph, quantize="int8"))
    assert_same(read(saved), graph)


def flip(path, place):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def with_tensors(folder, raw):
    """Other tensors, with the digests that an attacker would compute too."""
    (folder / "model.safetensors").write_bytes(raw)
    told = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    rewrite(folder, content(folder) | {"tensors": told})


def a_folder_for_a_file(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def structure(raw):
    return lambda folder: (folder / "model.json").write_bytes(raw)


def with_content(**changes):
    return lambda folder: rewrite(folder, content(folder) | changes)


def with_size(size):
    return lambda folder: rewrite(folder, content(folder) | {"tensors": content(folder)["tensors"] | {"bytes": size}})


def with_node(**changes):
    """Changes the first node, a strided convolution."""

    def change(folder):
        changed = content(folder)
        changed["graph"]["nodes"][0] |= changes
        rewrite(folder, changed)

    return change


FAULTS = {
    "no structure": (lambda folder: (folder / "model.json").unlink(), "no such file"),
    "no tensors": (lambda folder: (folder / "model.safetensors").unlink(), "no such file"),
    "a folder for a file": (a_folder_for_a_file, "not a file"),
    "truncated tensors": (lambda folder: os.truncate(folder / "model.safetensors", 300), "truncated"),
    "no tensors at all": (lambda folder: os.truncate(folder / "model.safetensors", 0), "truncated"),
    "longer tensors": (lambda folder: (folder / "model.safetensors").open("ab").write(b"0"), "too long"),
    "a flipped bit": (lambda folder: flip(folder / "model.safetensors", -1), "damaged"),
    "a flipped bit of the header": (lambda folder: flip(folder / "model.safetensors", 0), "damaged"),
    "truncated structure": (lambda folder: os.truncate(folder / "model.json", 300), "not a JSON file"),
    "a flipped bit of the structure": (lambda folder: flip(folder / "model.json", -30), "digest"),
    "a digest of something else": (
        lambda folder: (folder / "model.json").write_text(json.dumps(content(folder) | {"digest": "0"})),
        "digest",
    ),
    "an empty structure": (structure(b""), "not a JSON file"),
    "deep nesting": (structure(b"[" * 100000), "not a JSON file"),
    "long numbers": (structure(b"9" * 10000), "not a JSON file"),
    "no text": (structure(b"\xff\xfe\xff"), "not a JSON file"),
    "a list": (structure(b"[]"), "not a saved network"),
    "another format": (with_content(format="something"), "not a saved network"),
    "another version": (with_content(version=2), "version 2 of the format, this netwright reads 1"),
    "no version": (with_content(version=None), "version None"),
    "more in it": (with_content(more=1), "more: Unexpected keyword argument"),
    "no arrays": (with_content(arrays={}), "must use all arrays"),
    "no graph": (with_content(graph=None), "graph: "),
    "a size below zero": (with_size(-1), "too long"),
    "a size that is text": (with_size("10"), "valid integer"),
    "an infinite number": (with_content(more=float("inf")), "numbers must lie in"),
    "no number": (with_content(more=float("nan")), "numbers must lie in"),
    "an integer beyond C's": (with_node(groups=2**31), "numbers must lie in"),
    "an unknown operation": (with_node(op="run"), "op must be one of conv, "),
    "an operation that is no text": (with_node(op=["conv"]), "op must be one of"),
    "a field too many": (with_node(more=1), "node 0: fields must be op, inputs"),
    "code in a path": (with_node(path="*/ int system(); /*"), "path must be letters"),
    "a line in a path": (with_node(path="a\n"), "path must be letters"),
    "a stride that is text": (with_node(stride=["1", "1; evil()"]), "node 0.stride: 0: "),
    "a stride of three": (with_node(stride=[1, 1, 1]), "node 0.stride: "),
    "a stride of zero": (with_node(stride=[0, 1]), "stride must be "),
    "a fractional stride": (with_node(stride=[1.5, 1]), "node 0.stride: 0: "),
    "an unknown activation": (with_node(act=["evil", None, None]), "kind must be one of"),
    "an activation that is an array": (with_node(act={"array": "0.weight"}), "node 0.act: "),
    "a weight that is none": (with_node(weight=[1.0]), "node 0.weight: "),
    "a weight of another node": (with_node(weight={"array": "1.weight"}), "called by their node"),
    "a value that nobody writes": (with_node(inputs=[99]), "not written before"),
    "padding that moves the output": (with_node(padding=[2, 2, 2, 2]), "output must have shape"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told(saved, name):
    breaks, told = FAULTS[name]
    breaks(saved)
    with pytest.raises(ArtifactError, match=told) as caught:
        read(saved)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_structure_of_any_length_is_not_read(saved, monkeypatch):
    monkeypatch.setattr(artifact, "MOST_STRUCTURE_BYTES", 1000)
    with pytest.raises(ArtifactError, match="too long"):
        read(saved)


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(ArtifactError, match="no such file"):
        artifact.read(tmp_path / "nothing")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_not_waited_for(saved):
    (saved / "model.json").unlink()
    os.mkfifo(saved / "model.json")
    with pytest.raises(ArtifactError, match="not a file"):
        artifact.read(saved)


def test_files_of_two_networks_do_not_go_together(graph, saved, tmp_path):
    other = artifact.write(tmp_path / "other", pack(graph, quantize="int8"))
    (saved / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match=r"truncated|not the weights of this network|too long"):
        artifact.read(saved)


ODD = [
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    2**20,
    2**31 - 1,
    2**40,
    0.5,
    1e30,
    None,
    True,
    "",
    "avg",
    "relu",
    "../x",
    [],
    [1, 1],
    {},
]


def places(value, path=()):
    """All paths in a JSON value."""
    yield path
    if isinstance(value, (list, dict)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*path, key))


def mutate(changed, draw):
    """One change somewhere: another value, a value from elsewhere, one more or one less."""
    path = draw.choice([path for path in places(changed) if path and path[0] in {"graph", "arrays"}])
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    old = parent[path[-1]]
    kind = draw.choice(["odd", "near", "near", "elsewhere", "swap", "without", "twice"])
    if kind == "near" and isinstance(old, (int, float)):
        parent[path[-1]] = old + draw.choice([-2, -1, 1, 2])
    elif kind == "elsewhere":
        other = changed
        for key in draw.choice(list(places(changed))):
            other = other[key]
        parent[path[-1]] = copy.deepcopy(other)
    elif kind == "swap" and isinstance(parent, list):
        draw.shuffle(parent)
    elif kind == "without":
        del parent[path[-1]]
    elif kind == "twice" and isinstance(parent, list):
        parent.insert(path[-1], copy.deepcopy(old))
    else:
        parent[path[-1]] = draw.choice(ODD)


def mutated(whole, seed):
    draw = random.Random(seed)
    changed = copy.deepcopy(whole)
    for _ in range(draw.choice([1, 1, 2])):
        mutate(changed, draw)
    return changed


def test_changed_structures_are_refused_or_sound(saved):
    whole, accepted = content(saved), 0
    for seed in range(1500):
        rewrite(saved, mutated(whole, seed))
        try:
            graph = read(saved)
        except ArtifactError:
            continue
        accepted += 1
        check(graph)
        compiled = compile_graph(graph, PORTABLE)
        assert "evil" not in compiled.text
    # else nothing beyond the first check would have been tried
    assert 20 < accepted < 750


def test_changed_tensors_are_refused_or_sound(saved):
    raw = (saved / "model.safetensors").read_bytes()
    header = int.from_bytes(raw[:8], "little")
    for seed in range(300):
        draw, changed = random.Random(seed), bytearray(raw)
        # the header says what is where; behind it everything is a weight, a gap or an index
        place = draw.randrange(8 + header) if draw.random() < 0.7 else draw.randrange(len(raw))
        changed[place] = draw.randrange(256)
        if draw.random() < 0.2:
            del changed[draw.randrange(len(changed)) :]
        with_tensors(saved, bytes(changed))
        try:
            graph = read(saved)
        except ArtifactError:
            continue
        check(graph)


def test_changed_gaps_are_refused_or_sound(graph, saved):
    tensors = load_tensors((saved / "model.safetensors").read_bytes())
    for name in [name for name in tensors if name.endswith(".weight.gaps")]:
        for value in (0, 1, 254, 255):
            for place in (0, -1):
                changed = tensors[name].copy()
                changed[place] = value
                with_tensors(saved, save_tensors(tensors | {name: changed}))
                try:
                    found = read(saved)
                except ArtifactError:
                    continue
                assert np.count_nonzero(found.nodes[int(name.split(".")[0])].op.weight) == len(changed[changed != 255])


RUNS = """
import json, sys, warnings
from pathlib import Path
import numpy as np, torch
import test_artifact as here
from test_runtime import call, walled
from netwright.deploy.graph import run
from netwright.deploy.native import runtime
from netwright.deploy.stored import ArtifactError

folder, wanted = Path(sys.argv[1]), int(sys.argv[2])
whole, seed, done = here.content(folder), int(sys.argv[3]), 0
plain = json.dumps(here.read(folder).to_plain()[0])
behind = True
runtime.aligned = lambda floats: walled(floats, behind)
while done < wanted:
    seed += 1
    here.rewrite(folder, here.mutated(whole, seed))
    try:
        graph = here.read(folder)
    except ArtifactError:
        continue
    if json.dumps(graph.to_plain()[0]) == plain:
        continue
    behind = bool(done % 2)
    network = runtime.Network(graph)
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for shape in network.inputs]
    outputs = call(network, *inputs)
    exact = run(graph, [x.view(graph.views.get(v, x.shape)) for v, x in zip(graph.inputs, inputs)])
    for y, reference in zip(outputs, exact):
        reference = reference.numpy().reshape(y.shape)
        # a changed pad may have made everything NaN, in both
        scale = np.abs(np.where(np.isfinite(reference), reference, 0)).max()
        np.testing.assert_allclose(y, reference, rtol=0, atol=1e-4 * scale + 1e-6, err_msg=f"seed {seed}")
    done += 1
print("ran", done)
"""


def run_mutated(saved, number, first):
    compiler()
    here = Path(__file__).parent
    paths = [str(here), str(here / "native"), str(here.parent / "support")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", RUNS, str(saved), str(number), str(first)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout) == (0, f"ran {number}\n"), done.stderr[-3000:]


def test_changed_networks_run_within_their_memory(saved):
    run_mutated(saved, 4, 0)


@pytest.mark.slow
def test_more_changed_networks_run_within_their_memory(saved):
    run_mutated(saved, 60, 10000)
