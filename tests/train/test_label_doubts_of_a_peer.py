"""Labels that are doubted here and by cleanlab, whose answers lie in tests/oracles/cleanlab.json."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from netwright.data import Batches, load, with_noisy_labels
from netwright.nn.convnet import SmallConvNet
from netwright.seeding import seeded
from netwright.train import fit
from netwright.train.callbacks import ELRCallback
from netwright.train.early_learning import suspicious

ORACLE = json.loads((Path(__file__).parents[1] / "oracles" / "cleanlab.json").read_text())


@pytest.fixture(scope="module")
def noisy():
    """Digits with 30 % wrong labels: the data, which are wrong, and which cleanlab doubts."""
    data, changed = with_noisy_labels(load("digits"), "symmetric", 0.3)
    labels = data.train.labels.numpy()
    assert hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest() == ORACLE["labels"]
    doubted = np.zeros(len(labels), bool)
    doubted[ORACLE["issues"]] = True
    return data, changed["train"].numpy(), doubted


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_the_same_probabilities_raise_the_same_doubts(noisy):
    data, wrong, theirs = noisy
    flat = data.train.images.flatten(1).numpy() / 255
    probs = cross_val_predict(
        LogisticRegression(max_iter=500), flat, data.train.labels.numpy(), cv=5, method="predict_proba"
    )
    ours = suspicious(torch.from_numpy(probs), data.train.labels).numpy()
    assert overlap(ours, theirs) > 0.7
    assert ours[wrong].mean() >= theirs[wrong].mean() - 0.02


def test_elr_doubts_what_cleanlab_doubts(noisy):
    data, wrong, theirs = noisy
    method = ELRCallback(lam=3.0)
    with seeded(0, "init"):
        net = SmallConvNet((8, 16), in_channels=1, grid=2)
    fit(net, Batches(data.train, 64, normalise=data.normalise(), indexed=True), epochs=12, callbacks=[method])
    ours = np.zeros(len(wrong), bool)
    ours[list(method.doubts(data.train.labels).index)] = True
    assert overlap(ours, theirs) > 0.75
    assert wrong[ours].mean() > wrong[theirs].mean()
