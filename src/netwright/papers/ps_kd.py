"""Does a network that is taught by its own last epoch become better calibrated, without ranking its errors worse?

Kim, Ji, Yoon and Hwang, "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021,
arXiv:2006.12000.

Fashion-MNIST, 3,000 training images, so that a small convolutional network over-fits; SGD with Nesterov's momentum 0.9,
weight decay 5e-4, batch 64, 25 epochs, a tenth of the learning rate after each half and three quarters, no
augmentation. Three arms with the same initialisation and batches: cross-entropy, label smoothing 0.1, PS-KD with
alpha_T 0.8. All have the learning rate that is best for cross-entropy on 1,000 held-out images, with a seed of its own.
The full test part is used. Not tested: the gain in accuracy of one to three points on CIFAR-100 (300 epochs on a GPU),
detection, translation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from netwright.papers import classification
from netwright.papers.evidence import Evidence, Verdict, compare, decide, mean, paired_difference
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run
from netwright.papers.tuning import best

CARD = Paper(
    slug="ps-kd",
    title="Self-Knowledge Distillation with Progressive Refinement of Targets",
    authors=("Kyungyul Kim", "ByeongMoon Ji", "Doyoung Yoon", "Sangheum Hwang"),
    year=2021,
    venue="IEEE/CVF International Conference on Computer Vision",
    kind="inproceedings",
    arxiv="2006.12000",
    summary=(
        "A network is its own teacher: the label of each example is mixed with what the network predicted for it an "
        "epoch ago, with a weight that grows over the training."
    ),
    method="netwright.train.self_distillation:PSKDTargets",
    covers=("netwright.train.callbacks.targets:PSKDCallback", "netwright.metrics"),
    claims=(
        Claim("likelihood", "Its negative log-likelihood on the test part is lower than with cross-entropy."),
        Claim("calibration", "Its expected calibration error is at most three quarters of cross-entropy's."),
        Claim("ranking", "It does not rank the errors worse: AURC at most one standard error above cross-entropy's."),
        Claim("accuracy", "Its accuracy is not lower than cross-entropy's by 0.3 points."),
        Claim("smoothing", "Label smoothing ranks the errors worse than PS-KD does.", gated=False),
        Claim("gain", "Its accuracy is higher than cross-entropy's.", gated=False),
    ),
    metric="NLL",
    seeds=5,
)

LEARNING_RATES = (0.02, 0.05, 0.1)
ARMS = {"cross-entropy": (0.0, 0.0), "label smoothing": (0.1, 0.0), "PS-KD": (0.0, 0.8)}  # smoothing, alpha_T
BATCH = 64


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    plain, ours = arms["cross-entropy"], arms["PS-KD"]
    share = mean(ours["ECE"]) / mean(plain["ECE"])
    found = {
        "likelihood": compare(ours["NLL"], plain["NLL"], direction="less", errors=2),
        "calibration": decide(share <= 0.75, share, "mean ECE of PS-KD over that of cross-entropy, claimed <= 0.75"),
        "ranking": _ranking(ours["AURC"], plain["AURC"]),
        "accuracy": compare(ours["accuracy"], plain["accuracy"], margin=-0.003),
        "smoothing": decide(None, reason="label smoothing was not run"),
        "gain": compare(ours["accuracy"], plain["accuracy"]),
    }
    if "label smoothing" in arms:
        found["smoothing"] = compare(arms["label smoothing"]["AURC"], ours["AURC"])
    return found


def _ranking(ours: list[float], plain: list[float]) -> Verdict:
    gap = paired_difference(ours, plain)
    if gap.count < 2:
        return decide(None, gap.mean, "a single seed has no standard error")
    reason = f"AURC x 1000, PS-KD minus cross-entropy: {gap.mean:.4g}, claimed <= its s.e. {gap.standard_error:.4g}"
    return decide(gap.mean <= gap.standard_error, gap.mean, reason)


def reproduce(run: Run) -> Evidence:
    """Chooses the learning rate of cross-entropy, then trains every arm for every seed."""
    sizes = [
        run.size("training images", full=3000, fast=1000),
        run.size("validation images", full=1000, fast=100, scaled=False),
        run.size("test images", full=10_000, fast=1000, scaled=False),
        run.size("epochs", full=25, fast=8),
    ]
    trials = {lr: [0.0, 0.0, lr, sizes, True] for lr in LEARNING_RATES}
    lr, tried = best(run, "learning rate", trials, _train)
    chosen = {name: [*each, lr, sizes, False] for name, each in ARMS.items() if not (run.fast and each[0])}
    arms = run.arms(chosen, _train)
    return run.evidence(arms | tried, judge(arms))


def _train(seed: int, smoothing: float, alpha: float, lr: float, sizes: Sequence[int], tuning: bool) -> dict[str, Any]:
    from netwright.nn.convnet import SmallConvNet
    from netwright.seeding import seeded
    from netwright.train.callbacks import PSKDCallback
    from netwright.train.schedules import StepProgress

    *images, epochs = sizes
    data = classification.parts("fashion-mnist", seed, *images)
    with seeded(seed, "init"):
        network = SmallConvNet(in_channels=1, grid=7)
    last = classification.train(
        network, data, epochs=epochs, batch=BATCH, lr=lr, seed=seed, weight_decay=5e-4, label_smoothing=smoothing,
        methods=[PSKDCallback(alpha)] if alpha else [], schedule=StepProgress((0.5, 0.75)),
    )  # fmt: skip
    if tuning:
        return {"validation accuracy": classification.measured(network, data, "validation")["accuracy"]}
    return classification.measured(network, data, "test") | {"training loss": last["train_loss"], "learning rate": lr}
