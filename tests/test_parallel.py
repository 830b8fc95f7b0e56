import os
import time
import warnings

import pytest

from netwright.console import UserError
from netwright.parallel import run_all


def slow_square(x, seconds):
    time.sleep(seconds)
    return x * x, os.getpid()


def fail(x):
    raise UserError(f"trial {x} failed", cure="look at it")


KEPT = []


def keep(megabytes):
    KEPT.append(b"x" * (megabytes << 20))
    time.sleep(0.5)  # joblib looks at the memory of its processes once a second
    return len(KEPT)


def threads():
    import torch

    return torch.get_num_threads()


def test_one_job_stays_in_this_process():
    assert run_all(slow_square, [(3, 0.0), (4, 0.0)]) == [(9, os.getpid()), (16, os.getpid())]


def test_two_jobs_run_elsewhere_and_keep_the_order():
    results = run_all(slow_square, [(i, 0.3 if i == 0 else 0.0) for i in range(6)], jobs=2)
    assert [square for square, _ in results] == [0, 1, 4, 9, 16, 25]
    assert os.getpid() not in {pid for _, pid in results}


def test_trials_in_other_processes_take_one_thread_each():
    assert run_all(threads, [(), ()], jobs=2) == [1, 1]


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_of_a_trial_arrives_whole(jobs):
    with pytest.raises(UserError, match="trial 7 failed") as caught:
        run_all(fail, [(7,)], jobs=jobs)
    assert caught.value.cure == "look at it"


def test_a_process_that_keeps_memory_is_replaced_without_a_word():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        kept = run_all(keep, [(200,)] * 8, jobs=2)
    assert len(kept) == 8
    assert max(kept) < 4  # four trials in each process, had none been replaced
    assert not told


def test_no_trials():
    assert run_all(fail, []) == []
    assert run_all(fail, [], jobs=2) == []


@pytest.mark.parametrize("jobs", [0, -2])
def test_bad_number_of_jobs(jobs):
    with pytest.raises(ValueError, match=f"jobs must be >= 1, or -1 for every core, got {jobs}"):
        run_all(pow, [(1, 1)], jobs=jobs)


def test_ray_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UserError, match=r"netwright\[ray\]"):
        run_all(pow, [(2, 3)], ray="local")


@pytest.mark.slow
def test_ray_gives_the_same_results():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000)
    try:
        assert run_all(pow, [(2, 3), (3, 2), (5, 0)], jobs=2, ray="local") == [8, 9, 1]
    finally:
        ray.shutdown()
