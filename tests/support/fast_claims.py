"""What a fast reproduction must show, by paper: the part of a claim that a few seconds tell, with fixed seeds."""

from __future__ import annotations

from collections.abc import Callable

from netwright.papers.evidence import Evidence, mean


def gradient_noise(found: Evidence) -> None:
    """No smaller share of the restarts learns with noise."""
    from netwright.papers.gradient_noise import COMPANION, LEARNT

    for start, level in (("small start", LEARNT["start"]), ("zero start", LEARNT["zero"]), (COMPANION, LEARNT["zero"])):
        plain, noisy = (found.figures[f"{start}, {name}"]["accuracy"] for name in ("no noise", "noise"))
        assert sum(value > level for value in noisy) >= sum(value > level for value in plain), start


def weight_compander(found: Evidence) -> None:
    """Kurtosis and largest weight are lower in every layer, and the share near zero on average."""
    plain = found.figures["digits, plain"]
    for arm in ("fixed", "learned"):
        ours = found.figures[f"digits, {arm}"]
        for name in plain:
            if name.startswith(("kurtosis", "largest")):
                assert mean(ours[name]) < mean(plain[name]), (arm, name)
        near = [[mean(figures[name]) for name in plain if name.startswith("near zero")] for figures in (ours, plain)]
        assert mean(near[0]) < mean(near[1]), arm


def ps_kd(found: Evidence) -> None:
    """Likelihood and calibration are better."""
    for figure in ("NLL", "ECE"):
        assert mean(found.figures["PS-KD"][figure]) < mean(found.figures["cross-entropy"][figure]), figure


def tract(found: Evidence) -> None:
    """The digits are learnt."""
    for arm in ("plain", "TrAct"):
        assert min(found.figures[f"MLP, {arm}, 5 epochs"]["accuracy"]) > 0.85, arm


EXPECTED: dict[str, Callable[[Evidence], None]] = {
    "gradient-noise": gradient_noise,
    "ps-kd": ps_kd,
    "tract": tract,
    "weight-compander": weight_compander,
}
