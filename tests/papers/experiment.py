"""A paper whose experiment takes no time: what the tests of the mechanism run."""

from __future__ import annotations

import os
from pathlib import Path

from netwright.papers.evidence import Evidence, Verdict, compare, decide
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run

CARD = Paper(
    slug="coin-toss",
    title="On the 100 % Fair Coin & its Tosses",
    authors=("Ada Lovelace", "Karl Friedrich Gauß"),
    year=1843,
    venue="Proceedings of Chance",
    kind="inproceedings",
    arxiv="1234.56789",
    summary="A coin lands on heads more often when it is loaded.",
    method="netwright.console:clock",
    covers=("netwright.parallel", "netwright.results:History"),
    claims=(Claim("gain", "Loading helps."), Claim("speed", "It is fast.", gated=False)),
    metric="heads",
    seeds=4,
    fast_seeds=2,
)


def toss(seed: int, bonus: float, tosses: int, log: str) -> dict[str, object]:
    with Path(log).open("a") as file:
        file.write(f"{seed} {bonus} {os.getpid()}\n")
    if (stop := Path(log).with_name("stop")).exists() and f"{seed} {bonus}" == stop.read_text():
        raise KeyboardInterrupt
    return {"heads": 0.5 + bonus + 0.01 * seed, "tosses": tosses, "coin": f"penny {seed}"}


def judge(arms: Arms) -> dict[str, Verdict]:
    return {
        "gain": compare(arms["loaded"]["heads"], arms["fair"]["heads"]),
        "speed": decide(None, reason="not timed"),
    }


def reproduce(run: Run) -> Evidence:
    tosses = run.size("tosses", full=100, fast=10, specified=1000)
    log = str(run.out / "log.txt")
    arms = run.arms({"fair": (0.0, tosses, log), "loaded": (0.2, tosses, log)}, toss)
    return run.evidence(arms, judge(arms))
