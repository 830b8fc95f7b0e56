"""Compiled graphs: right on any arena, for any vector width, with threads, between processes; memory stays intact."""

import ctypes
import dataclasses
import gc
import hashlib
import mmap
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from kernels import compiler
from networks import eager, random_network

from netwright.deploy.graph import capture, optimise
from netwright.deploy.native import program, runtime
from netwright.deploy.native.machine import this_machine
from netwright.deploy.native.runtime import Network

GUARD = 1024
MARK = np.float32(-1.2345e30)


@pytest.fixture(autouse=True)
def _needs_a_compiler():
    compiler()


def graph_of(seed, draw=random_network):
    module, x = draw(seed)
    return optimise(capture(module, (x,))), x.contiguous(), eager(module, x)


def call(network, *inputs):
    outputs = [np.full(shape, np.nan, np.float32) for shape in network.outputs]
    network([x.data_ptr() for x in inputs], [y.ctypes.data for y in outputs])
    return outputs


def assert_right(outputs, wanted):
    for y, exact in zip(outputs, wanted, strict=True):
        exact = exact.numpy().reshape(y.shape)
        assert np.abs(y - exact).max() <= 1e-5 * np.abs(exact).max()


def same(a, b):
    return all(np.array_equal(x.view(np.int32), y.view(np.int32)) for x, y in zip(a, b, strict=True))


@pytest.fixture
def guarded(monkeypatch):
    """Every arena and table lies between marks."""
    taken = []

    def aligned(floats):
        whole = real(floats + 2 * GUARD)
        whole[:] = MARK
        taken.append(whole)
        return whole[GUARD:-GUARD]

    def intact():
        return taken and all((w[:GUARD] == MARK).all() and (w[-GUARD:] == MARK).all() for w in taken)

    real = runtime.aligned
    monkeypatch.setattr(runtime, "aligned", aligned)
    return intact


def pruned(seed=0, width=32):
    """A network with enough work in each step for threads to share it, nine weights of ten zero."""
    layers = [
        torch.nn.Conv2d(3, width, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(width, 2 * width, 1),
        torch.nn.ReLU6(),
        torch.nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1, groups=2 * width),
        torch.nn.Conv2d(2 * width, width, 3, padding=1),
        torch.nn.Hardswish(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(36 * width, 50),
        torch.nn.Softmax(1),
    ]
    source = torch.Generator().manual_seed(seed)
    network = torch.nn.Sequential(*layers).eval()
    with torch.no_grad():
        for layer in network:
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
                values = torch.randn(layer.weight.shape, generator=source)
                layer.weight.copy_(values * (torch.rand(values.shape, generator=source) < 0.1))
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=source))
    return network, torch.randn(1, 3, 24, 24, generator=source)


def pruned_graph(seed=0, width=32):
    module, x = pruned(seed, width)
    return optimise(capture(module, x)), x, eager(module, x)


UNITS = sorted({4, 8, this_machine().unit})


def check_memory(seed, unit, threads, guarded):
    graph, x, wanted = graph_of(seed)
    network = Network(graph, threads, machine=dataclasses.replace(this_machine(), unit=unit))
    tables = hashlib.sha256(network._tables.tobytes()).digest()
    a, b = np.full((2, x.numel() + 2 * GUARD), MARK)
    a[GUARD:-GUARD] = x.numpy().ravel()
    b[GUARD:-GUARD] = -2 * x.numpy().ravel()
    results = [np.full(int(np.prod(shape)) + 2 * GUARD, MARK) for shape in network.outputs]

    def run(source):
        before = source.copy()
        for y in results:
            y[GUARD:-GUARD] = np.nan
        network([source.ctypes.data + 4 * GUARD], [y.ctypes.data + 4 * GUARD for y in results])
        assert np.array_equal(source, before)
        assert all((y[:GUARD] == MARK).all() and (y[-GUARD:] == MARK).all() for y in results)
        assert guarded()
        parts = zip(results, network.outputs, strict=True)
        return [y[GUARD:-GUARD].copy().reshape(shape) for y, shape in parts]

    network._arena[:] = np.nan
    first, _, again = run(a), run(b), run(a)
    assert_right(first, wanted)
    assert same(first, again)
    assert hashlib.sha256(network._tables.tobytes()).digest() == tables


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("seed", [1, 2])
def test_any_arena_gives_the_same_and_nothing_else_is_written(seed, unit, guarded):
    check_memory(seed, unit, 1, guarded)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 124))
def test_more_networks_with_threads(seed, guarded):
    check_memory(seed, UNITS[seed % len(UNITS)], 1 + seed % 3, guarded)


def walled(floats, behind):
    """Memory between two pages that nobody may touch; it ends (or begins) exactly at one of them."""
    page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
    size = -(-4 * floats // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    base = np.frombuffer(memory, np.uint8).ctypes.data
    for wall in (base, base + page + size):
        assert libc.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(page), 0) == 0
    return np.frombuffer(memory, np.float32, floats, page + (size - 4 * floats if behind else 0))


PAGES = """
import numpy as np
import pytest
from netwright.deploy.native import choose, runtime
from networks import random_rows
from strips_everywhere import force
from test_runtime import assert_right, graph_of, pruned_graph, walled

choose.SHARED_CYCLES = choose.SHARED_PIXELS = 0
patch = pytest.MonkeyPatch()
for behind in (True, False):
    runtime.aligned = lambda floats: walled(floats, behind)
    for place, made in enumerate((pruned_graph(), graph_of(1), graph_of(2), graph_of(4, random_rows))):
        if place == 3:
            force(patch, 3)
        graph, x, wanted = made
        network = runtime.Network(graph, 2)
        given = walled(x.numel(), behind)
        given[:] = x.numpy().ravel()
        outputs = [walled(int(np.prod(shape)), behind) for shape in network.outputs]
        network([given.ctypes.data], [y.ctypes.data for y in outputs])
        assert_right([y.reshape(shape) for y, shape in zip(outputs, network.outputs)], wanted)
    assert any("strips" in what for _, what, _ in network.steps)
    patch.undo()
print("whole")
"""


def run_script(text, *arguments, timeout=300):
    """In a process of its own, which may crash."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1] / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", text, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def test_nothing_is_read_or_written_beyond_arena_tables_inputs_and_outputs():
    done = run_script(PAGES)
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr[-2000:]


def test_threads_and_repetitions_give_the_same_bits():
    graph, x, wanted = pruned_graph()
    networks = [Network(graph, threads) for threads in (1, 2, 3)]
    first = call(networks[0], x)
    assert_right(first, wanted)
    assert all(same(first, call(network, x)) for network in networks for _ in range(30))


@pytest.mark.skipif(not (shutil.which("nm") and shutil.which("objdump")), reason="needs binutils")
def test_one_thread_knows_nothing_of_threads():
    graph, *_ = pruned_graph()
    path = Network(graph, 1)._code.path
    symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
    assert "nw_run" in symbols
    assert "pthread" not in symbols
    assert "nw_team" not in symbols
    code = subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True).stdout
    assert not [line for line in code.splitlines() if "lock " in line or "mfence" in line]


def in_threads(*calls):
    """Runs all at once; raises what any of them raises."""
    faults = []

    def guard(work):
        try:
            work()
        except BaseException as error:
            faults.append(error)

    running = [threading.Thread(target=guard, args=(work,)) for work in calls]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
        assert not thread.is_alive()
    if faults:
        raise faults[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_callers_in_threads_take_turns_on_one_network_and_its_clones(threads):
    graph, x, _ = pruned_graph()
    network = Network(graph, threads)
    clones = [network.clone(), network.clone()]
    inputs = [x * factor for factor in (1.0, 0.5, 2.0, -1.0)]
    expected = [call(network, each) for each in inputs]

    def work(target, number):
        for _ in range(50):
            assert same(call(target, inputs[number]), expected[number])

    pairs = [(network, 0), (network, 1), (clones[0], 2), (clones[1], 3)]
    in_threads(*(lambda target=target, number=number: work(target, number) for target, number in pairs))
    assert clones[0]._arena.ctypes.data != network._arena.ctypes.data
    assert clones[0]._tables is network._tables


def test_many_pools_at_once():
    made = [pruned_graph(seed, width) for seed, width in ((0, 32), (1, 24), (2, 40))]
    networks = [Network(graph, threads) for (graph, *_), threads in zip(made, (2, 3, 2), strict=True)]

    def work(network, x, wanted):
        for _ in range(30):
            assert_right(call(network, x), wanted)

    calls = zip(networks, made, strict=True)
    in_threads(*(lambda n=network, x=x, wanted=wanted: work(n, x, wanted) for network, (_, x, wanted) in calls))


def tasks():
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads through /proc")
def test_threads_end_with_the_last_network_that_uses_them():
    graph, x, wanted = pruned_graph(7, 20)
    before = tasks()
    network = Network(graph, 3)
    clone, other = network.clone(), Network(graph, 3)
    assert tasks() == before + 2
    del network, other
    gc.collect()
    assert_right(call(clone, x), wanted)
    assert tasks() == before + 2
    del clone
    gc.collect()
    assert tasks() == before
    assert_right(call(Network(graph, 3), x), wanted)


def test_without_threads_the_caller_does_all_parts(monkeypatch):
    def refusing(name):
        made = program.source(name)
        if name != "run.c.in":
            return made
        call_of_create = "pthread_create(&nw_team.worker[id], 0, nw_worker, (void *)(intptr_t)id)"
        assert call_of_create in made
        return made.replace(
            call_of_create, "(id < 2 ? pthread_create(&nw_team.worker[id], 0, nw_worker, (void *)1) : 1)"
        )

    graph, x, wanted = pruned_graph()
    expected = call(Network(graph, 1), x)
    monkeypatch.setattr(runtime, "source", refusing)
    network = Network(graph, 3)
    outputs = call(network, x)
    assert_right(outputs, wanted)
    assert same(outputs, expected)


EXIT = """
from test_runtime import call, pruned_graph
from netwright.deploy.native.runtime import Network
graph, x, _ = pruned_graph()
network = Network(graph, 2)
call(network, x)
print("done")
"""


def test_a_process_ends_while_its_threads_sleep():
    done = run_script(EXIT)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


FORK = """
import os, threading
from test_runtime import assert_right, call, pruned_graph, same
from netwright.deploy.native.runtime import Network
graph, x, wanted = pruned_graph()
network = Network(graph, 2)
expected = call(network, x)
stop = threading.Event()

def busy():
    while not stop.is_set():
        call(network, x)

for disturbed in (False, True):
    thread = threading.Thread(target=busy)
    if disturbed:
        thread.start()
    for _ in range(20):
        child = os.fork()
        if not child:
            status = 1
            try:
                assert same(call(network, x), expected)
                assert same(call(network.clone(), x), expected)
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert same(call(network, x), expected)
    if disturbed:
        stop.set()
        thread.join()
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_children_of_a_fork_have_threads_of_their_own():
    done = run_script(FORK)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_steps_are_timed():
    graph, x, _ = pruned_graph()
    network = Network(graph, 1)
    outputs = [np.empty(shape, np.float32) for shape in network.outputs]
    seconds = network.time_steps([x.data_ptr()], [y.ctypes.data for y in outputs], 3)
    assert len(seconds) == len(network.steps)
    assert (seconds > 0).all()
    assert (seconds < 1).all()
    assert same(outputs, call(network, x))


def test_module_paths_cannot_leave_their_comment():
    graph, x, wanted = pruned_graph()
    for node in graph:
        node.path = "a */ #error \\ \n??/"
    assert_right(call(Network(graph), x), wanted)


def test_activations_beyond_two_gigabytes_are_refused():
    module = torch.nn.Conv2d(1, 64, 1)
    graph = capture(module, torch.zeros(1, 1, 4, 4))
    for value, shape in graph.shapes.items():
        graph.shapes[value] = (shape[0], shape[1], 4000, 4000)
    with pytest.raises(ValueError, match="2 GiB"):
        Network(graph)
