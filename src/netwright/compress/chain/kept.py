"""Finished steps of a chain on disk, so that a chain that was stopped goes on after the last of them.

A step that is kept is read back at once, also by the call that made it: every later step then starts from the same
tensors in the same layout, whether the chain was stopped in between or not.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from torch import nn

from netwright import storage
from netwright.compress.chain.steps import Applied, Step, Training
from netwright.console import UserError

CURE = "choose another folder, or delete the file and give the same command again"


def chain_key(before: nn.Module | str, then: Step | Training) -> str:
    """A digest of all that decides what comes out so far: the network and how steps are trained, then step by step.

    Training data are told by their number of batches alone.
    """
    start = storage.tensors_digest(before.state_dict()) if isinstance(before, nn.Module) else before
    if not isinstance(then, Training):
        return storage.digest(start, then.name, then.facts())
    numbers = {f.name: getattr(then, f.name) for f in dataclasses.fields(then) if f.name != "data"}
    return storage.digest(start, numbers, None if then.data is None else len(then.data))


def kept(path: Path | None, key: str, step: Step, network: nn.Module) -> Applied | None:
    """What a step made of ``network`` in an earlier call; None when it is not there.

    Raises:
        UserError: If the file is damaged, or what is in it is no outcome of this chain.
    """
    if path is None or not path.exists():
        return None
    tensors, told = storage.read_tensors(path), storage.read_metadata(path)
    if told.get("key") != key:
        raise UserError("the folder holds a step of another chain", where=path, cure=CURE)
    try:
        ranks = {str(name): int(rank) for name, rank in json.loads(told["ranks"]).items()}
        form = step.form(network, ranks)
        form.load_state_dict(tensors)
    except (ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise UserError(f"damaged weights file: {str(error).splitlines()[0]}", where=path, cure=CURE) from error
    return Applied(form, ranks)


def finish(path: Path | None, key: str, step: Step, network: nn.Module, made: Applied) -> Applied:
    """Keeps what a step made of ``network``, and gives what was kept."""
    if path is None:
        return made
    storage.write_tensors(path, made.network.state_dict(), {"key": key, "ranks": json.dumps(made.ranks)})
    again = kept(path, key, step, network)
    assert again is not None
    return again
