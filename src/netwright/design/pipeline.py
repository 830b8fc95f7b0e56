"""``netwright design``: search, train, compress, export, measure and report, each stage resumable.

A stage is done when its artefact is in the run folder. The same command goes on where the last one stopped, so a stage
never asks whether it is resumed: it reads what is there and makes what is not.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from netwright import storage
from netwright.console import UserError, note, overall, warn
from netwright.design import distributed
from netwright.design.budget import RunClock
from netwright.design.model import Architecture
from netwright.design.options import Options
from netwright.design.plan import Plan, make_plan, refit
from netwright.design.run import RunFolder, find_folder
from netwright.design.timing import EXPORT_SECONDS, radii_share
from netwright.design.user_code import SPACE_COPY, keep_space, space_facts
from netwright.design.verdict import goals, latency
from netwright.results import Result
from netwright.train import methods

if TYPE_CHECKING:
    from netwright.data import Data
    from netwright.design.training_stage import Stage
    from netwright.search.genotype import Genotype

SAMPLES = 8
FEW_STEPS = 100
_PREFIXES = {"model": "", "baseline": "baseline/"}


@dataclasses.dataclass(frozen=True)
class DesignResult(Result):
    """What a finished run found.

    Attributes:
        folder: The run folder.
        accuracy: Test accuracy of the designed network, in [0, 1].
        baseline_accuracy: That of the baseline at the same sparsity.
        sparsity: Zeros over all weights of convolutions and linear layers.
        nonzeros: Parameters that are not zero.
        goal_met: Whether sparsity, accuracy and time are what was asked for.
        missed: What was missed, and by how much.
        seconds: Wall time over all sittings.
        measurements: Everything, as in ``measurements.json``.
    """

    folder: str
    accuracy: float
    baseline_accuracy: float
    sparsity: float
    nonzeros: int
    goal_met: bool
    missed: tuple[str, ...]
    seconds: float
    measurements: dict[str, Any]


def design(
    data: str | Path | None = None,
    *,
    options: Options | None = None,
    plan: Plan | None = None,
    command: str = "",
    **settings: Any,
) -> DesignResult:
    """Designs a sparse network for a data set, and everything that goes with it, in a run folder.

    Args:
        data: A data set by name or path, as for :func:`netwright.data.load`.
        options: All options at once, in place of ``data`` and ``settings``.
        plan: The plan of an earlier run to repeat; made anew when None.
        command: The command line, for the record.
        settings: Fields of :class:`netwright.design.options.Options`.

    Returns:
        The figures; everything else is in the folder.

    Raises:
        UserError: For bad input, a folder of another run, a full disk or a budget that is too small.
        FloatingPointError: When a loss is no longer finite.
        KeyboardInterrupt: On Ctrl-C; the same call goes on.
    """
    if options is None:
        if data is None:
            raise ValueError("data must be given when options are not")
        options = Options(data=str(data), **settings)
    methods.callbacks(options.train_method)  # a wrong argument is told before anything starts
    distributed.join()
    run = RunFolder(distributed.agree(str(find_folder(options))))
    if not distributed.is_main():
        return _stages(run, options, plan, command)
    with run.locked():
        run.refuse_strangers(options)
        return _stages(run, options, plan, command or f"netwright design {options.data}")


def _stages(run: RunFolder, options: Options, plan: Plan | None, command: str) -> DesignResult:
    from netwright.design.search_stage import run_search
    from netwright.design.training_stage import Stage, train_network

    if distributed.agree(run.has("measurements.json")):
        _report(run)
        return result_of(run)
    clock = RunClock(run)
    data, report = load_data(run, options)
    plan = _planned(run, options, data, plan)
    # Nothing is written before data and budget are known to be good.
    if distributed.is_main() and not run.has("plan.json"):
        run.describe(options, command)
        run.write("data.json", {**report, "counts": data.counts(), "fingerprint": data.fingerprint()})
        run.write("plan.json", plan.to_dict())
        keep_space(options.space, run / SPACE_COPY)
    distributed.barrier()
    stage = Stage(run, options, data, plan, clock)
    finish, exports = plan.stages[-1]["seconds"], 2 * EXPORT_SECONDS
    parts = {"search": plan.search["seconds"]}
    parts |= {f"{p.network}: {p.name}": p.seconds for p in plan.phases if p.network == "model"}
    parts["export"] = exports
    parts |= {f"{p.network}: {p.name}": p.seconds for p in plan.phases if p.network == "baseline"}
    parts["measure"] = finish - exports
    try:
        with overall("design", parts) as total:
            with total.stage("search"):
                architecture = _architecture(stage, run_search(stage))
            clock.save()
            _report(run)
            keep = partial(_export_dense, stage, "model", architecture)
            network, dense = train_network(stage, "model", architecture.build, total, keep)
            clock.save()
            with total.stage("export"):
                _export(stage, "model", architecture, network)
                _report(run)
            other = _baseline_architecture(stage)
            keep = partial(_export_dense, stage, "baseline", other)
            rival, rival_dense = train_network(stage, "baseline", other.build, total, keep)
            clock.save()
            with total.stage("measure"):
                _export(stage, "baseline", other, rival)
                four = {"model": network, "dense": dense, "baseline": rival, "baseline_dense": rival_dense}
                _measure(stage, four, {"model": architecture, "baseline": other}, clock)
    except KeyboardInterrupt:
        clock.save()
        if distributed.is_main():
            _report(run)
        raise
    if distributed.is_main():
        _report(run)
    distributed.barrier()
    return result_of(run)


def load_data(run: RunFolder, options: Options) -> tuple[Data, dict[str, Any]]:
    """The data of a run, told about and checked when it is new; those of one that goes on must be the same."""
    from netwright.data import check, load
    from netwright.train.methods import callbacks, check_data

    size = None if options.size is None else (options.size, options.size)
    known: dict[str, Any] = {
        "skip_broken": options.skip_broken,
        "drop_unknown": options.drop_unknown,
        "download": options.download,
    }
    data = load(options.data, seed=options.seed, size=size, **known)
    check_data(callbacks(options.train_method), data)
    if run.has("plan.json"):
        if run.read("data.json")["fingerprint"] != data.fingerprint():
            raise UserError(
                "the data have changed since this run began", where=options.data, cure="choose another --out"
            )
        return data, {}
    if not distributed.is_main():
        return data, {}
    note(data.summary())
    report = check(options.data, size=size, **known)
    for problem in report.problems:
        note(f"  {problem.message} ({problem.where})")
    return data, report.to_dict()


def _planned(run: RunFolder, options: Options, data: Data, plan: Plan | None) -> Plan:
    if distributed.is_main():
        if run.has("plan.json"):
            plan = run.plan()
        else:
            plan = make_plan(options, data) if plan is None else plan.replayed()
            note(str(plan))
            if (steps := plan.steps("model")) < FEW_STEPS:
                warn(f"{steps} training steps are too few for a useful network: give a longer --time-budget")
    plan = distributed.agree(plan)
    assert plan is not None
    return plan


def _architecture(stage: Stage, genotype: Genotype) -> Architecture:
    run, data = stage.run, stage.data
    if run.has("architecture.json"):
        return Architecture.read(run / "architecture.json")
    if distributed.is_main():
        stage.amend(refit(stage.plan, stage.options, data, genotype, stage.seconds_left()))
    stage.plan = distributed.agree(stage.plan)
    architecture = Architecture(
        kind="genotype",
        shape=data.shape,
        classes=data.classes,
        mean=data.mean,
        std=data.std,
        picture=_is_picture(data),
        genotype=genotype.to_dict(),
        **stage.plan.model,
        **space_facts(stage.options.space),
    )
    distributed.barrier()
    if distributed.is_main():
        run.write("architecture.json", architecture.to_dict())
        run.write("classes.json", list(data.classes))
    distributed.barrier()
    return architecture


def _baseline_architecture(stage: Stage) -> Architecture:
    run, data, name = stage.run, stage.data, stage.options.baseline
    architecture = Architecture(
        kind="named",
        shape=data.shape,
        classes=data.classes,
        mean=data.mean,
        std=data.std,
        picture=_is_picture(data),
        name=name,
    )
    if distributed.is_main():
        run.write("baseline/architecture.json", architecture.to_dict())
    return architecture


def _is_picture(data: Any) -> bool:
    images = getattr(data.test, "images", None)
    return images is None or images.dtype == torch.uint8


def _export_dense(stage: Stage, which: str, architecture: Architecture, dense: nn.Module) -> None:
    """Leaves the files of the network before pruning; until it is pruned they are the best so far: ``model.*``."""
    run: RunFolder = stage.run
    prefix = _PREFIXES[which]
    if distributed.is_main() and not run.has(f"{prefix}model-dense.onnx"):
        _write_network(run, f"{prefix}model-dense", architecture, dense)
        if which == "model":
            from netwright.design.measure import first_images, onnx_input
            from netwright.design.report import readme_text

            images, labels = first_images(stage.data, SAMPLES)
            arrays = {"images": onnx_input(images, architecture.picture), "labels": labels.numpy()}
            storage.write_arrays(run / "sample.npz", arrays)
            storage.write_text(run / "README.txt", readme_text(architecture))
            for suffix in ("safetensors", "onnx"):
                storage.write_bytes(run / f"model.{suffix}", (run / f"model-dense.{suffix}").read_bytes())
            _report(run)
    distributed.barrier()


def _export(stage: Stage, which: str, architecture: Architecture, network: nn.Module) -> None:
    """Leaves the files of the finished network, and a mark that they are its own."""
    mark = f"work/{which}-exported.json"
    if distributed.is_main() and not stage.run.has(mark):
        _write_network(stage.run, f"{_PREFIXES[which]}model", architecture, network)
        stage.run.write(mark, {"exported": True})
    distributed.barrier()


def _write_network(run: RunFolder, name: str, architecture: Architecture, network: nn.Module) -> None:
    from netwright.deploy import onnx as deploy

    storage.write_tensors(run / f"{name}.safetensors", network.state_dict())
    deploy.export(
        network,
        run / f"{name}.onnx",
        shape=architecture.shape,
        mean=architecture.mean,
        std=architecture.std,
        classes=architecture.classes,
        scale=255.0 if architecture.picture else None,
    )


def _measure(
    stage: Stage, networks: dict[str, nn.Module], architectures: dict[str, Architecture], clock: RunClock
) -> None:
    from netwright.design import remarks
    from netwright.design.examples import maps, mistakes, radii
    from netwright.design.measure import first_images, measure
    from netwright.design.speed import BATCHES, Subject, bound, latencies
    from netwright.design.training_stage import histories, training_seconds

    run: RunFolder = stage.run
    if run.has("measurements.json") or not distributed.is_main():
        distributed.barrier()
        return
    run.write("training.json", histories(run))
    figures: dict[str, Any] = {}
    subjects: dict[str, Subject] = {}
    for key, network in networks.items():
        which = "baseline" if key.startswith("baseline") else "model"
        file = ("baseline/" if which == "baseline" else "") + f"model{'-dense' if key.endswith('dense') else ''}.onnx"
        name = stage.options.baseline if which == "baseline" else "the designed network"
        measured, probs = measure(
            name,
            network,
            architectures[which],
            stage.data,
            run / file,
            train_seconds=training_seconds(run, which),
            whole=key == "model",
        )
        batches = BATCHES if key == "model" else BATCHES[:1]
        subjects[key] = Subject(network, architectures[which], run / file, batches)
        figures[key] = measured.to_dict()
        if key == "model":
            storage.write_arrays(run / "mistakes.npz", mistakes(stage.data, probs))
            if (shown := maps(network, stage.data, probs)) is not None:
                storage.write_arrays(run / "maps.npz", shown)
            remarks.write(run, [], network, stage.data)
            share = radii_share(stage.options.time_budget)
            if (certain := radii(network, stage.data, probs, share=share)) is not None:
                storage.write_arrays(run / "radii.npz", certain)
    images, _ = first_images(stage.data, BATCHES[-1])
    for key, entries in latencies(subjects, images).items():
        figures[key]["latency"] = entries
    before = latency(figures["dense"])
    allowed = bound(networks["model"].eval(), stage.data.shape, before["median_ms"] if before else None)
    if allowed is not None:
        figures["bound"] = allowed
    options: Options = stage.options
    clock.save()
    figures["goal"] = {
        "sparsity": options.sparsity,
        "accuracy": options.accuracy_goal,
        "latency_ms": options.latency_ms,
        "flops": options.flops,
        "time_budget": options.time_budget,
        "seconds_used": clock.seconds(),
    }
    run.write("measurements.json", figures)
    distributed.barrier()


def result_of(run: RunFolder) -> DesignResult:
    """The result of a finished run, from its folder.

    Raises:
        UserError: If the run has not come to its measurements yet.
    """
    if not run.has("measurements.json"):
        raise UserError("the run is not finished", where=run.path, cure="give its command again; it goes on")
    figures = run.read("measurements.json")
    goal, model = figures["goal"], figures["model"]
    missed = []
    if model["sparsity"] < goal["sparsity"] - 5e-4:
        missed.append(f"sparsity {model['sparsity']:.4f}, asked for {goal['sparsity']}")
    if goal.get("accuracy") is not None and model["accuracy"] < goal["accuracy"]:
        short = 100 * (goal["accuracy"] - model["accuracy"])
        missed.append(f"accuracy {model['accuracy']:.4f}, {short:.2f} points below the goal of {goal['accuracy']}")
    for name in ("latency", "operations"):
        if (limit := goals(figures).get(name)) and not limit["met"]:
            unit = "ms of latency" if name == "latency" else "FLOPs"
            missed.append(f"{limit['reached']:,.4g} {unit}, allowed {limit['wanted']:,.4g}")
    if goal["time_budget"] is not None and goal["seconds_used"] > 1.15 * goal["time_budget"]:
        missed.append(f"{goal['seconds_used']:.0f} s used of a budget of {goal['time_budget']:.0f} s")
    return DesignResult(
        folder=str(run.path),
        accuracy=model["accuracy"],
        baseline_accuracy=figures["baseline"]["accuracy"],
        sparsity=model["sparsity"],
        nonzeros=model["nonzeros"],
        goal_met=not missed,
        missed=tuple(missed),
        seconds=goal["seconds_used"],
        measurements=figures,
    )


def _report(run: RunFolder) -> None:
    from netwright.design.report import build

    if distributed.is_main():
        build(run.path).write(run.path)
