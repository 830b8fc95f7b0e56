"""From figures to verdicts: means, standard errors, bootstrap intervals, comparisons of arms over seeds.

A claim is *supported* when the interval of its figure lies wholly on the claimed side of the bound, *not
supported* when it lies wholly on the other, else *inconclusive*. Intervals are percentile bootstraps of
10,000 resamples over seeds (Efron, "Bootstrap methods: another look at the jackknife", 1979,
doi:10.1214/aos/1176344552), or a multiple of the standard error where an experiment says so. All statistics
of the reproductions stand in this file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from netwright.results import Result

RESAMPLES = 10_000
Outcome = Literal["supported", "not supported", "inconclusive"]
Direction = Literal["greater", "less"]
Values = Sequence[float | None]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the figures say of one claim.

    Attributes:
        verdict: ``"supported"``, ``"not supported"`` or ``"inconclusive"``.
        statistic: The figure that decided, if there is one.
        interval: Its interval, if there is one.
        reason: The rule and the figures, in words.
        text: The claim; filled in from the card.
        gated: Whether the paper's verdict depends on it; filled in from the card.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    verdict: Outcome
    statistic: float | None = None
    interval: tuple[float, float] | None = None
    reason: str = ""
    text: str = ""
    gated: bool = True


@dataclasses.dataclass(frozen=True)
class Difference(Result):
    """A mean difference between two arms with its interval.

    Attributes:
        mean: Mean of a minus b.
        standard_error: Of the mean; NaN for a single pair.
        interval: Bootstrap interval; NaN for a single pair.
        count: Pairs (paired), or values of the smaller arm.
        level: Coverage of the interval.
    """

    mean: float
    standard_error: float
    interval: tuple[float, float]
    count: int
    level: float


def mean(values: Values) -> float:
    """Arithmetic mean; NaN when a value is missing or there is none.

    Example:
        >>> mean([1.0, 2.0, 6.0])
        3.0
    """
    numbers = floats(values)
    return sum(numbers) / len(numbers) if numbers else math.nan


def standard_error(values: Values) -> float:
    """Standard error of the mean, with n - 1; NaN for fewer than two values.

    Example:
        >>> round(standard_error([1.0, 2.0, 3.0]), 6)
        0.57735
    """
    numbers = floats(values)
    if len(numbers) < 2:
        return math.nan
    centre = mean(numbers)
    return math.sqrt(sum((v - centre) ** 2 for v in numbers) / (len(numbers) - 1) / len(numbers))


def bootstrap(*arms: Values, level: float = 0.9, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of a mean (one arm), or of a difference of means of two independent arms.

    Args:
        arms: One or two arms; the values of an arm are resampled with replacement.
        level: Coverage, in (0, 1).
        resamples: Bootstrap samples.
        seed: Of the resampling, so that equal figures give equal intervals.

    Raises:
        ValueError: If ``level`` is outside (0, 1), or the number of arms is neither 1 nor 2.

    Example:
        >>> bootstrap([2.0, 2.0, 2.0])
        (2.0, 2.0)
    """
    import numpy as np

    from netwright.seeding import numpy_stream

    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    if len(arms) not in {1, 2}:
        raise ValueError(f"arms must be 1 or 2, got {len(arms)}")
    numbers = [np.asarray(floats(arm)) for arm in arms]
    if any(len(arm) < 2 or not np.isfinite(arm).all() for arm in numbers):
        return math.nan, math.nan
    random = numpy_stream(seed, "bootstrap")
    means = [arm[random.integers(0, len(arm), (resamples, len(arm)))].mean(axis=1) for arm in numbers]
    low, high = np.quantile(means[0] - means[1] if len(means) == 2 else means[0], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(a: Values, b: Values, *, level: float = 0.9, seed: int = 0) -> Difference:
    """Mean of a - b over pairs (same seed, same data), with standard error and bootstrap interval.

    Raises:
        ValueError: If the arms differ in length or are empty.

    Example:
        >>> paired_difference([3.0, 4.0], [1.0, 2.0]).interval
        (2.0, 2.0)
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"a and b must have the same number of values, at least 1, got {len(a)} and {len(b)}")
    gaps = [x - y for x, y in zip(floats(a), floats(b), strict=True)]
    return Difference(mean(gaps), standard_error(gaps), bootstrap(gaps, level=level, seed=seed), len(gaps), level)


def independent_difference(a: Values, b: Values, *, level: float = 0.9, seed: int = 0) -> Difference:
    """Mean of a minus mean of b where nothing pairs their values; the standard error is Welch's.

    Raises:
        ValueError: If an arm is empty.
    """
    if not a or not b:
        raise ValueError(f"a and b must have at least 1 value each, got {len(a)} and {len(b)}")
    error = math.hypot(standard_error(a), standard_error(b))
    interval = bootstrap(a, b, level=level, seed=seed)
    return Difference(mean(a) - mean(b), error, interval, min(len(a), len(b)), level)


def compare(
    a: Values,
    b: Values | float,
    *,
    level: float = 0.9,
    direction: Direction = "greater",
    margin: float = 0.0,
    paired: bool = True,
    errors: float | None = None,
    seed: int = 0,
) -> Verdict:
    """Whether a exceeds b (or falls below it) by ``margin``, with an interval that excludes the margin.

    Args:
        a: Figures of the arm the claim is about, one a seed; ``None`` or NaN where a seed failed.
        b: Figures of the other arm, or one constant.
        level: Coverage of the bootstrap interval.
        direction: ``"greater"`` claims a - b > margin, ``"less"`` claims a - b < margin.
        margin: Bound of the difference; for "no worse by more than 0.3" use ``-0.3`` with ``"greater"``.
        paired: Whether a[i] and b[i] share their seed.
        errors: Use the mean plus and minus this many standard errors instead of the bootstrap.
        seed: Of the resampling.

    Raises:
        ValueError: If ``direction`` is unknown, or the arms cannot be compared.

    Example:
        >>> compare([0.91, 0.92, 0.93], [0.90, 0.90, 0.90]).verdict
        'supported'
        >>> compare([0.91], [0.90]).verdict
        'inconclusive'
    """
    if direction not in {"greater", "less"}:
        raise ValueError(f"direction must be 'greater' or 'less', got {direction!r}")
    other = b if isinstance(b, Sequence) else [float(b)] * len(a)
    found = (paired_difference if paired else independent_difference)(a, other, level=level, seed=seed)
    low, high = found.interval
    name = f"{100 * level:g} % interval"
    if errors is not None:
        low, high = found.mean - errors * found.standard_error, found.mean + errors * found.standard_error
        name = f"mean ± {errors:g} s.e."
    sign = ">" if direction == "greater" else "<"
    if not math.isfinite(found.mean):
        return Verdict("inconclusive", reason="a figure is missing: a seed failed or diverged")
    if not math.isfinite(low + high):
        return Verdict("inconclusive", found.mean, reason="a single seed has no interval")
    reason = f"claimed {sign} {margin:g}: {found.mean:.4g}, {name} {low:.4g} to {high:.4g}, n = {found.count}"
    side = _side(low, high, margin, direction)
    return Verdict(side, found.mean, (low, high), reason)


def _side(low: float, high: float, bound: float, direction: Direction) -> Outcome:
    above, below = low > bound, high < bound
    if direction == "less":
        above, below = below, above
    return "supported" if above else "not supported" if below else "inconclusive"


def decide(passed: bool | None, statistic: float | None = None, reason: str = "") -> Verdict:
    """A verdict by a rule without interval: an exact figure against a bound, say; ``None`` is inconclusive.

    Example:
        >>> decide(2 > 1, 2, "2 neurons, claimed more than 1").verdict
        'supported'
    """
    if statistic is not None and not math.isfinite(statistic):
        passed, statistic = None, None
    outcome: Outcome = "inconclusive" if passed is None else "supported" if passed else "not supported"
    return Verdict(outcome, None if statistic is None else float(statistic), None, reason)


def all_of(*verdicts: Verdict) -> Verdict:
    """One verdict for a claim of several parts: supported if all are, not supported if one is not.

    The first part's figure stands for it.

    Example:
        >>> all_of(decide(True), decide(None)).verdict
        'inconclusive'
    """
    reason = "; ".join(verdict.reason for verdict in verdicts if verdict.reason)
    return dataclasses.replace(verdicts[0], verdict=overall(verdicts), reason=reason)


def overall(verdicts: Sequence[Verdict]) -> Outcome:
    """Supported if all are, not supported if one is not, else inconclusive."""
    found = {verdict.verdict for verdict in verdicts}
    if "not supported" in found:
        return "not supported"
    return "supported" if found == {"supported"} else "inconclusive"


def sign_test(a: Values, b: Values, *, direction: Direction = "greater") -> float:
    """One-sided p value of the sign test on pairs; ties are left out.

    Example:
        >>> sign_test([1, 1, 1, 1, 1], [0, 0, 0, 0, 0])
        0.03125
    """
    from scipy.stats import binomtest

    gaps = [x - y for x, y in zip(floats(a), floats(b), strict=True) if x != y]
    wins = sum((gap > 0) == (direction == "greater") for gap in gaps)
    return float(binomtest(wins, len(gaps), alternative="greater").pvalue) if gaps else 1.0


def fisher_exact(successes_a: int, total_a: int, successes_b: int, total_b: int) -> float:
    """One-sided p value that arm a succeeds more often than arm b.

    Example:
        >>> round(fisher_exact(3, 3, 0, 3), 6)
        0.05
    """
    from scipy import stats

    counts = [[successes_a, total_a - successes_a], [successes_b, total_b - successes_b]]
    return float(stats.fisher_exact(counts, alternative="greater")[1])


def spearman(x: Values, y: Values) -> float:
    """Rank correlation, ties averaged; NaN when a side is constant.

    Example:
        >>> spearman([1, 2, 3], [10.0, 20.0, 25.0])
        1.0
    """
    import numpy as np
    from scipy.stats import rankdata

    ranks = [rankdata(floats(side)) for side in (x, y)]
    if len(ranks[0]) != len(ranks[1]) or len(ranks[0]) < 2:
        raise ValueError(f"x and y must have the same number of values, at least 2, got {len(x)} and {len(y)}")
    gaps = [side - side.mean() for side in ranks]
    scale = math.sqrt(float(np.dot(gaps[0], gaps[0]) * np.dot(gaps[1], gaps[1])))
    return float(np.dot(gaps[0], gaps[1])) / scale if scale else math.nan


def floats(values: Values) -> list[float]:
    """The figures as numbers, NaN where a seed failed."""
    return [math.nan if value is None else float(value) for value in values]
