"""Views against torch: reading a stored value through its atoms is what torch's permute, reshape and expand give."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from netwright.deploy.graph.axes import REPEATED, Atom, View, common, in_order, merge, positions


def read(view: View, stored: Tensor) -> Tensor:
    """Number by number, from what atoms mean."""
    strides = [math.prod(stored.shape[axis + 1 :]) for axis in range(stored.ndim)]
    place = np.zeros(1, np.int64)
    for atom in view.atoms:
        step = 0 if atom.axis == REPEATED else atom.stride * strides[atom.axis]
        place = (place[:, None] + step * np.arange(atom.size)).ravel()
    return stored.reshape(-1)[torch.from_numpy(place)].reshape(view.shape)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_a_chain_of_movements(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=4, max_size=4)))
    stored = torch.arange(math.prod(shape)).reshape(shape)
    tensor, view = stored, View.of(0, shape)
    for _ in range(data.draw(st.integers(1, 6))):
        kind = data.draw(st.sampled_from(["permute", "split", "join", "insert", "expand"]))
        rank = tensor.ndim
        if kind == "permute":
            order = data.draw(st.permutations(range(rank)))
            tensor, view = tensor.permute(order), view.permute(order)
        elif kind == "insert":
            place = data.draw(st.integers(0, rank))
            tensor, view = tensor.unsqueeze(place), view.insert(place)
        elif kind == "expand" and tensor.numel() < 5000:
            size = [2 if n == 1 and data.draw(st.booleans()) else n for n in tensor.shape]
            tensor, view = tensor.expand(2, *size), view.expand([2, *size])
        else:
            sizes = list(tensor.shape)
            place = data.draw(st.integers(0, rank - 1))
            if kind == "split":
                factor = data.draw(st.sampled_from([f for f in (1, 2, 3) if sizes[place] % f == 0]))
                sizes[place : place + 1] = [factor, sizes[place] // factor]
            elif kind == "join":
                sizes[place : place + 2] = [math.prod(sizes[place : place + 2])]
            changed = view.reshape(sizes)
            if changed is not None:
                tensor, view = tensor.reshape(sizes), changed
    assert view.shape == tuple(tensor.shape)
    assert torch.equal(read(view, stored), tensor)
    contiguous = tensor.shape == () or torch.equal(tensor.reshape(-1), torch.arange(tensor.numel()))
    if tensor.numel() == stored.numel():
        assert in_order(view.atoms) == contiguous


def test_channel_shuffle_is_a_permutation_of_one_axis() -> None:
    shuffled = View.of(0, (2, 6, 4, 5)).reshape((2, 2, 3, 4, 5))
    assert shuffled is not None
    shuffled = shuffled.permute([0, 2, 1, 3, 4]).reshape((2, 6, 4, 5))
    assert shuffled is not None
    assert positions(shuffled.axes[1]).tolist() == [0, 3, 1, 4, 2, 5]


def test_an_axis_cannot_cut_through_an_atom() -> None:
    assert View.of(0, (1, 4, 6, 1)).reshape((1, 3, 8, 1)) is None
    assert View.of(0, (1, 4, 6, 1)).reshape((1, 2, 12, 1)) is not None


def test_merge_joins_only_what_lies_side_by_side() -> None:
    assert merge([Atom(1, 2, 3), Atom(1, 3)]) == (Atom(1, 6),)
    assert merge([Atom(1, 3), Atom(1, 2, 3)]) == (Atom(1, 3), Atom(1, 2, 3))
    assert merge([Atom(1, 1), Atom(REPEATED, 2), Atom(REPEATED, 3)]) == (Atom(REPEATED, 6),)


def test_common_splits_both_sides() -> None:
    pairs = common((Atom(1, 6),), (Atom(2, 2), Atom(3, 3)))
    assert pairs == [(Atom(1, 2, 3), Atom(2, 2)), (Atom(1, 3), Atom(3, 3))]
    assert common((Atom(1, 6),), (Atom(2, 4), Atom(3, 3))) is None
