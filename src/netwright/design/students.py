"""The network that ``netwright compress --method distill`` trains in the place of the given one."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from netwright.console import UserError, warn
from netwright.design.model import baseline_network, is_named, load, load_run
from netwright.design.subject import Subject, outputs
from netwright.nn.convnet import SmallConvNet
from netwright.seeding import seeded

SMALL = {"small_convnet": 1, "small_convnet/2": 2, "small_convnet/4": 4, "small_convnet/8": 8}
"""Names of small students, and what the widths of the first are divided by."""


def student_for(subject: Subject, name: str, seed: int) -> tuple[str, nn.Module]:
    """A student by name, with its name.

    Args:
        subject: The network that it shall take the place of.
        name: One of ``SMALL`` or of ``netwright.nn.pretrained``, which starts untrained; a run or ``FILE.py:FUNCTION``,
            which starts with the weights it has; empty for the first of ``SMALL`` with at most half the parameters.
        seed: Of weights that are drawn.

    Raises:
        UserError: If nothing is found under the name, it does not fit the data, or no default is small enough.
    """
    most = _count(subject.network)
    if name:
        found = _made(subject, name, seed)
        if _count(found) >= most:
            warn(f"the student {name} is not smaller than the network: {_count(found):,} parameters against {most:,}")
        return name, found
    for small in SMALL:
        found = _made(subject, small, seed)
        if 2 * _count(found) <= most:
            return small, found
    raise UserError(
        f"the network has {most:,} parameters, of which no default student needs half",
        cure="name one with --student FILE.py:FUNCTION",
    )


def _made(subject: Subject, name: str, seed: int) -> nn.Module:
    classes = len(subject.classes)
    with seeded(seed, "init", "student"):
        if SMALL.get(name, 1) > 1:
            by = SMALL[name]
            found: nn.Module = SmallConvNet((16 // by, 32 // by), 64 // by, classes, subject.shape[0], grid=2)
        elif (Path(name) / "architecture.json").is_file():
            found = load_run(name).network
        elif is_named(name):
            found = baseline_network(name, subject.shape, classes)
        else:
            found = load(name)
    if (got := outputs(found, subject.shape, name)) != classes:
        raise UserError(f"the student has {got} outputs, the network {classes}", where=name)
    return found


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
