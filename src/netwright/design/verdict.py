"""What a run found, in sentences: the verdict, the speed, what to doubt; all computed from the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from netwright.console import clock
from netwright.page import Em, Text

Figures = Mapping[str, Any]

ONNX_RUNTIME, OUR_RUNTIMES = "ONNX Runtime", "netwright's"

# Medians of the same graph, timed twice, differ by a few percent; less than this is called "not faster".
NOISE = 0.05

# Half of what a sparsity is printed to: 94.96 % is 95.0 %.
ROUNDING = 5e-4


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage.

    Example:
        >>> percent(0.9512), percent(0.95, 0)
        ('95.1 %', '95 %')
    """
    return f"{100 * share:.{digits}f} %"


def milliseconds(value: float) -> str:
    """A time with three significant digits.

    Example:
        >>> milliseconds(0.4123), milliseconds(12.34), milliseconds(123.4)
        ('0.412 ms', '12.3 ms', '123 ms')
    """
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f} ms"


def file_size(value: float) -> str:
    """Bytes as a person reads them.

    Example:
        >>> file_size(9312), file_size(2_100_000)
        ('9.3 kB', '2.10 MB')
    """
    return f"{value / 1e6:.2f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB"


def latency(network: Figures | None, batch: int = 1, runtime: str = ONNX_RUNTIME) -> Figures | None:
    """The latency of a measured network in one runtime at one batch size, or ``None`` when it was not measured."""
    for entry in (network or {}).get("latency") or []:
        named = str(entry.get("runtime", "")).startswith(runtime)  # a version may follow the name
        if named and entry.get("batch") == batch and entry.get("median_ms"):
            return entry
    return None


def goals(measurements: Figures) -> dict[str, dict[str, Any]]:
    """Every goal that was set: what was wanted, what was reached, and whether that is enough.

    A time budget is met when at most 115 % of it were used, which is what ``netwright design`` promises.

    Example:
        >>> goals({"model": {"sparsity": 0.9}, "goal": {"sparsity": 0.95, "time_budget": None}})
        {'sparsity': {'wanted': 0.95, 'reached': 0.9, 'met': False}}
    """
    wanted, model = measurements.get("goal") or {}, measurements.get("model") or {}
    found: dict[str, dict[str, Any]] = {}
    for name in ("sparsity", "accuracy"):
        goal, reached = wanted.get(name), model.get(name)
        if goal and reached is not None:
            slack = ROUNDING if name == "sparsity" else 0.0
            found[name] = {"wanted": goal, "reached": reached, "met": reached >= goal - slack}
    ours = latency(model, runtime=OUR_RUNTIMES)
    for name, most, costs in (
        ("latency", wanted.get("latency_ms"), None if ours is None else ours["median_ms"]),
        ("operations", wanted.get("flops"), None if model.get("macs") is None else 2 * model["macs"]),
    ):
        if most and costs is not None:
            found[name] = {"wanted": most, "reached": costs, "met": costs <= most}
    budget, used = wanted.get("time_budget"), wanted.get("seconds_used")
    if budget and used is not None:
        found["time"] = {"wanted": budget, "reached": used, "met": used <= 1.15 * budget}
    return found


def _goal_clause(name: str, goal: Mapping[str, Any]) -> str | Em:
    wanted, reached = goal["wanted"], goal["reached"]
    if name == "time":
        if reached <= wanted:
            return f"the run took {clock(reached)} of the {clock(wanted)} allowed"
        over = f"{clock(reached - wanted)} ({percent(reached / wanted - 1, 0)}) over the {clock(wanted)} allowed"
        return f"the run was {over}" if goal["met"] else Em(f"the time goal is missed, {over}")
    if name in ("latency", "operations"):
        allowed, taken = (
            (milliseconds(wanted), milliseconds(reached))
            if name == "latency"
            else (f"{wanted:,.0f} FLOPs", f"{reached:,.0f}")
        )
        if goal["met"]:
            return f"it takes {taken} of the {allowed} allowed"
        return Em(f"it takes {taken}, more than the {allowed} allowed")
    if goal["met"]:
        return f"the goal of {percent(wanted)} {name} is met"
    return Em(f"the goal of {percent(wanted)} {name} is missed by {_points(wanted - reached)}")


def _points(difference: float) -> str:
    value = f"{100 * abs(difference):.1f}"
    if value == "0.0":
        return "less than 0.1 points"
    return f"{value} point{'' if value == '1.0' else 's'}"


def _interval(network: Figures, label: str) -> str:
    low, high = network.get("interval") or (None, None)
    return "" if low is None or high is None else f" ({label}{100 * low:.1f} to {percent(high)})"


def overlap(a: Figures | None, b: Figures | None) -> bool | None:
    """Whether the intervals of two networks share a point; ``None`` when one was not measured."""
    first, second = (a or {}).get("interval"), (b or {}).get("interval")
    if not first or not second:
        return None
    return bool(first[0] <= second[1] and second[0] <= first[1])


def verdict(measurements: Figures, tested: int | None = None) -> list[str | Em]:
    """One sentence: accuracy with its interval, sparsity, the baseline, goals met or missed by how much.

    Args:
        measurements: As in ``measurements.json``; ``model`` must be there.
        tested: Number of test examples.

    Example:
        >>> from netwright.page import text_of
        >>> run = {"model": {"accuracy": 0.9, "sparsity": 0.95}, "goal": {"sparsity": 0.95},
        ...        "baseline": {"accuracy": 0.92, "name": "MobileNet-v2"}}
        >>> print(text_of(verdict(run)))
        The designed network is right on 90.0 % of the test examples with 95.0 % of its weights removed; *the
        baseline is better*: MobileNet-v2 reaches 92.0 %, 2.0 points more; the goal of 95.0 % sparsity is met.
    """
    model, baseline = measurements["model"], measurements.get("baseline")
    examples = f"{tested:,} test examples" if tested else "the test examples"
    start = f"The designed network is right on {percent(model['accuracy'])} of {examples}"
    start += _interval(model, "95 % interval ")
    if model.get("sparsity"):
        start += f" with {percent(model['sparsity'])} of its weights removed"
    sentence = [start, *_compared(model, baseline)]
    clauses = [_goal_clause(name, goal) for name, goal in goals(measurements).items()]
    for i, clause in enumerate(clauses):
        sentence += ["; " if i == 0 else ", and " if i == len(clauses) - 1 else ", ", clause]
    return [*sentence, "."]


def _compared(model: Figures, baseline: Figures | None) -> list[str | Em]:
    if not baseline:
        return ["; no baseline has been measured yet"]
    name = baseline.get("name") or "a network without search"
    score = percent(baseline["accuracy"]) + _interval(baseline, "")
    if baseline.get("sparsity") is not None:
        score += f" at {percent(baseline['sparsity'])} sparsity"
    shared = ", but the intervals overlap" if overlap(model, baseline) else ""
    gain = model["accuracy"] - baseline["accuracy"]
    if abs(round(1000 * gain)) == 0:
        return [f"; the baseline, {name}, is as accurate with {score}"]
    if gain < 0:
        return ["; ", Em("the baseline is better"), f": {name} reaches {score}, {_points(gain)} more{shared}"]
    return [f", {_points(gain)} more than the baseline, {name}, with {score}{shared}"]


def _against(ratio: float) -> str:
    """How a network compares with one that takes ``ratio`` times as long."""
    if ratio >= 1 + NOISE:
        return f"{ratio:.1f} times as fast" if ratio >= 1.95 else f"{percent(1 - 1 / ratio, 0)} quicker"
    return f"{percent(1 / ratio - 1, 0)} slower" if ratio <= 1 - NOISE else "no quicker and no slower"


def speed(measurements: Figures) -> list[str | Em]:
    """One sentence: what pruning did to the speed of the exported file, and how that compares with the baseline.

    What another runtime needs is compared with the network before pruning in ONNX Runtime, and with the bound that the
    machine's rates put on it. "Not faster" is anything under 5 % less time than the same network before pruning:
    repeated timings of one file differ by as much.

    Example:
        >>> from netwright.page import text_of
        >>> def at(ms):
        ...     return {"latency": [{"runtime": "ONNX Runtime", "batch": 1, "threads": 1, "median_ms": ms}]}
        >>> print(text_of(speed({"model": at(0.41), "dense": at(0.40), "baseline": at(0.82)})))
        Pruning made this network *not faster* in ONNX Runtime: 0.410 ms against 0.400 ms before pruning (medians at
        batch 1, 1 thread); the baseline takes 0.820 ms, so this network is 2.0 times as fast.
    """
    model, dense, baseline = (measurements.get(name) for name in ("model", "dense", "baseline"))
    pruned, before = latency(model), latency(dense)
    if pruned is None:
        return ["The speed of the exported network has not been measured yet."]
    threads = pruned.get("threads", 1)
    setting = f"{threads} thread{'' if threads == 1 else 's'}"
    sentence: list[str | Em]
    if before is None or (model or {}).get("sparsity") == 0:
        sentence = [
            f"This network takes {milliseconds(pruned['median_ms'])} in ONNX Runtime (median at batch 1, {setting})"
        ]
    else:
        ratio = before["median_ms"] / pruned["median_ms"]
        if ratio >= 1 + NOISE:
            sentence = [f"Pruning made this network {ratio:.2f} times as fast in ONNX Runtime"]
        else:
            sentence = ["Pruning made this network ", Em("not faster"), " in ONNX Runtime"]
        medians = f"{milliseconds(pruned['median_ms'])} against {milliseconds(before['median_ms'])} before pruning"
        sentence.append(f": {medians} (medians at batch 1, {setting})")
    for entry in (model or {}).get("latency") or []:
        if (
            not str(entry.get("runtime", "")).startswith(ONNX_RUNTIME)
            and entry.get("batch") == 1
            and entry.get("median_ms")
        ):
            told = _against((before or pruned)["median_ms"] / entry["median_ms"])
            than = "" if before is None else " as the dense network in ONNX Runtime"
            than = than if told.endswith("as fast") else than.replace(" as", " than", 1)
            sentence.append(f"; in {entry['runtime']} it takes {milliseconds(entry['median_ms'])}, {told}{than}")
            allowed = (measurements.get("bound") or {}).get("ratio")
            if allowed:
                sentence.append(f" (the rates of this machine allow {allowed:.1f} times)")
    other = latency(baseline)
    if other is not None:
        told = _against(other["median_ms"] / pruned["median_ms"])
        sentence.append(f"; the baseline takes {milliseconds(other['median_ms'])}, so this network is {told}")
    return [*sentence, "."]


def doubts(measurements: Figures, data: Figures | None, classes: Sequence[str], seed: int | None) -> list[Text]:
    """What a reader should not take for granted: small classes, confusions, seeds, overlapping intervals, faults."""
    model = measurements.get("model") or {}
    baseline, dense = measurements.get("baseline"), measurements.get("dense")
    confusion = model.get("confusion") or []
    found: list[Text] = [*_smallest(data, confusion, classes), *_worst(confusion, classes)]
    which = "" if seed is None else f" (seed {seed})"
    found.append(f"One seed was run{which}: how far another one would move these figures was not measured.")
    for name, network in (("This network", model), ("The baseline", baseline or {})):
        if (guess := _guessing(network)) is not None and (network.get("interval") or [1.0])[0] <= guess:
            found.append(f"{name} is no better than always naming the largest class, which gives {percent(guess)}.")
    if overlap(model, baseline):
        found.append("The intervals of this network and the baseline overlap: their difference may be chance.")
    if dense and round(dense["accuracy"] - model["accuracy"], 3) >= 0.01:
        lost = _points(dense["accuracy"] - model["accuracy"])
        found.append(f"Pruning cost {lost} of accuracy: the same network had {percent(dense['accuracy'])} before it.")
    if (model.get("ece") or 0) >= 5:
        found.append(f"Its confidence is off by {model['ece']:.1f} % on average (expected calibration error).")
    if (model.get("agreement") or 0) > 1e-4:
        found.append(f"The exported network differs from the trained one by up to {model['agreement']:.1g} in a logit.")
    problems = (data or {}).get("problems") or []
    if problems:
        spoiling = sum(bool(problem.get("spoils")) for problem in problems)
        serious = f", {spoiling} of them serious" if spoiling else ""
        found.append(f"The data check found {len(problems)} fault{'' if len(problems) == 1 else 's'}{serious} (below).")
    return found


def _guessing(network: Figures) -> float | None:
    """Accuracy of always naming the class that is most frequent among the test examples."""
    sizes = [sum(row) for row in network.get("confusion") or []]
    return max(sizes) / sum(sizes) if sum(sizes) else None


def _smallest(data: Figures | None, confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> list[str]:
    counts = (data or {}).get("counts") or {}
    part = counts.get("train") or {}
    if not part:
        return []
    name = min(part, key=lambda c: part[c])
    if len(set(part.values())) == 1:
        return [f"All classes have {part[name]:,} training examples: none is smaller than the others."]
    text = f"The smallest class, \u201c{name}\u201d, has {part[name]:,} training examples"
    if name in classes and len(confusion) == len(classes):
        row = confusion[classes.index(name)]
        text += f"; the network is right on {row[classes.index(name)]} of its {sum(row)} test examples"
    return [text + "."]


def _worst(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> list[str]:
    wrong = [(n, -i, -j) for i, row in enumerate(confusion) for j, n in enumerate(row) if i != j and n]
    if not wrong:
        return ["No test example was misclassified: the test may be too easy or too small."] if confusion else []
    count, i, j = max(wrong)
    row = confusion[-i]
    true, predicted = (classes[k] if k < len(classes) else str(k) for k in (-i, -j))
    return [f"Worst confusion: \u201c{true}\u201d is taken for \u201c{predicted}\u201d in {count} of {sum(row)} cases."]
