"""The measuring process: where it runs, what its environment says, and what becomes of errors."""

from __future__ import annotations

import io
import json
import os

import pytest
import stand_in

from netwright.deploy.bench import Recipe, pinned
from netwright.deploy.bench.process import UNSET, Worker, WorkerLostError, environment, measuring
from netwright.deploy.bench.subject import Work
from netwright.deploy.bench.worker import Server, core_choice, serve

TINY = Recipe("stand_in:tiny", {"batch": 2})
ON_LINUX = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind")


@pytest.fixture
def work(tmp_path):
    made = Work(tmp_path)
    made.write(TINY, TINY.make())
    return made


@ON_LINUX
def test_pinned_restores_the_cores_even_after_an_error():
    before = os.sched_getaffinity(0)
    core = min(before)

    def fail():
        with pinned([core]):
            assert os.sched_getaffinity(0) == {core}
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert os.sched_getaffinity(0) == before


@ON_LINUX
def test_the_last_cores_are_chosen():
    free = sorted(os.sched_getaffinity(0))
    assert core_choice(1) == (free[-1],)
    assert core_choice(len(free)) == tuple(free)
    for wrong in (0, len(free) + 1):
        with pytest.raises(ValueError, match=f"threads must lie in 1..{len(free)}, .* got {wrong}"):
            core_choice(wrong)


def test_the_environment_is_set_for_the_child_only(work, monkeypatch):
    for name in UNSET:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    before, cores = dict(os.environ), core_choice(1)
    with measuring(work, {}, 1, cores, 3) as worker:
        state = worker.ask("state", variables=[*UNSET, "OMP_NUM_THREADS"])
    assert state["environment"] == {**dict.fromkeys(UNSET), "OMP_NUM_THREADS": "3"}
    assert state["cores"] is None or tuple(state["cores"]) == cores
    assert dict(os.environ) == before
    assert environment(2)["MKL_NUM_THREADS"] == "2"


def test_a_lost_process_is_told_with_its_last_words(work):
    worker = Worker(work, {"fatal": "stand_in:Fatal"}, 1, None, 1)
    try:
        with pytest.raises(WorkerLostError, match="ended with signal 6: it broke"):
            worker.ask("prepare", name="fatal")
        with pytest.raises(WorkerLostError, match="ended with signal 6"):
            worker.ask("prepare", name="fatal")
    finally:
        worker.close()


def test_a_class_that_cannot_be_found_ends_the_process_with_a_reason(work):
    with (
        measuring(work, {"none": "stand_in:Nobody"}, 1, None, 1) as worker,
        pytest.raises(WorkerLostError, match=r"exit code 1: AttributeError: .*Nobody"),
    ):
        worker.ask("state", variables=[])


def test_questions_and_answers_are_lines_of_json(work):
    asked = [
        {"do": "prepare", "name": "dense"},
        {"do": "turn", "name": "dense", "calls": 3},
        {"do": "prepare", "name": "unable"},
        {"do": "turn", "name": "unable", "calls": 3},
        {"do": "memory", "name": "dense"},
    ]
    questions = io.StringIO("".join(json.dumps(line) + "\n" for line in asked))
    answers = io.StringIO()
    serve(questions, answers, Server(work, {**stand_in.DENSE, "unable": "stand_in:Unable"}, 1))
    found = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert found[0]["deviation"] < 1e-6
    assert found[0]["version"].count(".") >= 2
    assert len(found[1]["seconds"]) == 3
    assert found[2] == {"failed": "NotImplementedError: no such operator"}
    assert found[3] == {"failed": "KeyError: 'unable'"}
    assert found[4]["bytes"] is None or found[4]["bytes"] >= 0
