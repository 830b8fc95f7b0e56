"""Memory that is kept: no page is taken from the system twice."""

import resource

import pytest
import torch

from netwright.cost import alternate, memory_kept

BYTES = 8 << 20  # below the size from which glibc gives an array a map of its own
PAGES = BYTES // resource.getpagesize()


def faults(times: int) -> int:
    """Pages that the system had to give while an array was made and freed so often."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(BYTES // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_what_is_freed_is_taken_again():
    with memory_kept() as kept:
        if not kept:
            pytest.skip("the C library is not glibc")
        faults(2)
        assert faults(40) < 2 * PAGES  # 40 times as many where each is handed back


def test_turns_are_timed_so():
    found = []

    def one_turn() -> list[float]:
        found.append(faults(40))
        return [1.0]

    with memory_kept() as kept:
        pass
    if not kept:
        pytest.skip("the C library is not glibc")
    alternate({"one": one_turn}, rounds=2)
    assert found[1] < 2 * PAGES


def test_an_error_inside_comes_out():
    with pytest.raises(KeyError), memory_kept():
        raise KeyError("inside")
