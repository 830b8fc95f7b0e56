"""``netwright diagnose``: what goes on in a trained network, on training examples and in its weights.

A diagnosis is a function of a :class:`~netwright.design.diagnosis.findings.Sample` that returns a
:class:`~netwright.design.diagnosis.findings.Finding`, or raises
:class:`~netwright.design.diagnosis.findings.NotApplicable`; ``DIAGNOSES`` names them all, in the order of the page.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netwright.console import UserError, nearest, note
from netwright.results import Result
from netwright.storage import new_folder, read_json, refuse_taken

if TYPE_CHECKING:
    from netwright.design.diagnosis.findings import Finding, Sample
    from netwright.design.subject import Subject

# Name to "module:function".
DIAGNOSES = {
    "coherence": "netwright.design.diagnosis.coherence:diagnose",
    "opposing-signals": "netwright.design.diagnosis.opposing:diagnose",
    "memorising-neurons": "netwright.design.diagnosis.neurons:diagnose",
}


@dataclasses.dataclass(frozen=True)
class Diagnosed(Result):
    """What the diagnoses of a network found.

    Attributes:
        model: The network.
        data: The data; None for those of the run.
        examples: How many training examples were looked at.
        verdicts: A sentence of each diagnosis.
        findings: Figures of each diagnosis, by its name.
        left_out: Why a diagnosis says nothing here, by its name.
        page: The page about it.
    """

    model: str
    data: str | None
    examples: int
    verdicts: tuple[str, ...]
    findings: dict[str, dict[str, Any]]
    left_out: dict[str, str]
    page: str

    def __str__(self) -> str:
        return "\n".join([*self.verdicts, f"page: {self.page}"])


def diagnose_model(
    model: str,
    data: str | None,
    out: str | Path,
    *,
    parts: Sequence[str] = (),
    examples: int = 1000,
    size: int | None = None,
    seed: int = 0,
    skip_broken: bool = False,
    drop_unknown: bool = False,
    download: bool = False,
) -> Diagnosed:
    """Looks into a trained network and writes ``diagnosis.html``, ``diagnosis.md`` and ``diagnosis.json``.

    Args:
        model: A run; a name of ``netwright.nn.pretrained``, which comes with trained weights; or ``FILE.py:FUNCTION``.
        data: What it was trained on, as for :func:`netwright.data.load`; a run brings its own.
        out: A folder that does not exist or is empty.
        parts: Of ``DIAGNOSES``; all that apply when empty.
        examples: How many training examples to look at, stratified; all when there are fewer.
        size: Height and width that images of a folder are resized to.
        seed: Of the splits of the data and of the choice of examples.
        skip_broken: As for :func:`netwright.data.load`.
        drop_unknown: Likewise.
        download: Allow the network, for data and trained weights.

    Raises:
        UserError: If something is missing, does not fit, or is there already; if a diagnosis that was asked for does
            not apply.
    """
    from netwright.design.subject import Reading, open_subject
    from netwright.page import Page

    target = Path(out)
    for part in parts:
        if part not in DIAGNOSES:
            raise UserError(f"unknown part {part!r}", cure=nearest(part, DIAGNOSES))
    for name, value, least in (("examples", examples, 2), ("seed", seed, 0), ("size", size, 1)):
        if value is not None and value < least:
            raise UserError(f"{name} must be >= {least}, got {value}")
    refuse_taken(target)
    if data is None and not Path(model).is_dir():
        raise UserError("DATA is missing", where=model, cure="name the data that the network was trained on")
    subject = open_subject(model, data, size, seed, Reading(skip_broken, drop_unknown, download))
    assert subject.data is not None  # a run brings its own
    sample = _sample(subject, examples, seed, _record(Path(model)))
    names = [name for name in DIAGNOSES if not parts or name in parts]
    findings: dict[str, Finding] = {}
    left_out: dict[str, str] = {}
    for name in names:
        found = _find(name, sample, model, asked=bool(parts))
        if isinstance(found, str):
            left_out[name] = found
        else:
            findings[name] = found
    sections = [section for finding in findings.values() for section in finding.sections()]
    verdicts = tuple(finding.verdict for finding in findings.values())
    result = Diagnosed(
        model,
        data,
        len(sample),
        verdicts,
        {name: dict(finding.figures) for name, finding in findings.items()},
        left_out,
        str(target / "diagnosis.html"),
    )
    title = f"Diagnosis of {Path(model).name} on {subject.data.name}"
    facts = {**result.to_dict(), "seed": seed}
    page = Page(title, " ".join(verdicts), sections, facts)
    with new_folder(target) as folder:
        page.write(folder, "diagnosis")
    return result


def _record(model: Path) -> dict[str, Any]:
    """What a run recorded of its training; nothing of other networks."""
    file = model / "training.json"
    found = read_json(file) if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def _sample(subject: Subject, examples: int, seed: int, training: dict[str, Any]) -> Sample:
    import torch

    from netwright.data import Normalise, subset
    from netwright.design.diagnosis.findings import Sample

    assert subject.data is not None
    train = subject.data.train
    if examples < len(train):
        train = train.subset(subset(train.labels, examples, seed))
    elif examples > len(train):
        note(f"  all {len(train)} training examples are looked at")
    images = getattr(train, "images", None)
    if images is None:
        images = torch.stack([train[i][0] for i in range(len(train))])
    normalise = Normalise(subject.mean, subject.std)
    picture = subject.picture and images.shape[1] in (1, 3) and min(images.shape[2:]) > 1
    return Sample(subject.network.eval(), images, train.labels, subject.classes, normalise, picture, training)


def _find(name: str, sample: Sample, model: str, *, asked: bool) -> Finding | str:
    """What a diagnosis finds; unless it was asked for, also why it says nothing."""
    from netwright.design.diagnosis.findings import NotApplicable

    module, _, function = DIAGNOSES[name].partition(":")
    try:
        return getattr(importlib.import_module(module), function)(sample)
    except UserError:
        raise
    except NotApplicable as error:
        if asked:
            raise UserError(str(error), where=model, cure=f"leave out --part {name}") from error
        return str(error)
    except (ValueError, FloatingPointError) as error:
        raise UserError(str(error), where=model) from error
