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


def distill_quantize(found: Evidence) -> None:
    """Training with rounded weights beats rounding."""
    trained, rounded = (found.figures[f"{kind}, 2 bits"]["accuracy"] for kind in ("distilled", "rounded in buckets"))
    assert min(trained) > max(rounded)


def dataset_quantization(found: Evidence) -> None:
    """Bins are no worse than one greedy selection."""
    for ratio in (10, 30):
        ours, greedy = (found.figures[arm][f"accuracy at {ratio} %"] for arm in ("DQ", "graph cut"))
        assert mean(ours) >= mean(greedy), ratio


def maestro(found: Evidence) -> None:
    """Prefixes are best approximations, and sizes fall with the share."""
    figures = found.figures
    assert max(figures["linear target"]["error"]) <= 0.02
    assert min(figures["linear target, not truncated"]["error at rank 1"]) > 0.1
    whole = figures["dense"]["parameters"][0]
    for arm in ("Maestro", "Maestro, the paper's order", "singular values", "singular values, fine-tuned"):
        sizes = [figures[f"{arm} at {share:g}"]["parameters"][0] for share in (0.5, 0.25, 0.1)]
        assert all(size <= share * whole for size, share in zip(sizes, (0.5, 0.25, 0.1), strict=True))
        assert sizes[0] >= sizes[1] >= sizes[2] > 0.05 * whole
    for order in ("the paper's order", "one by one"):
        sizes = [figures[f"leading terms, {order} at {share:g}"]["parameters"][0] for share in (0.75, 0.5, 0.25)]
        assert sizes[0] > sizes[1] > sizes[2]


EXPECTED: dict[str, Callable[[Evidence], None]] = {
    "dataset-quantization": dataset_quantization,
    "distill-quantize": distill_quantize,
    "gradient-noise": gradient_noise,
    "maestro": maestro,
    "ps-kd": ps_kd,
    "tract": tract,
    "weight-compander": weight_compander,
}
