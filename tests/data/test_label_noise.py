"""Noisy labels: exact counts, the distribution of the new labels, repeatability."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from scipy.stats import binomtest, chisquare, kstest, truncnorm
from sklearn.linear_model import LogisticRegression

from netwright.data import TensorImages, load, with_noisy_labels, write_folder
from netwright.data.label_noise import (
    CIFAR10_CLASSES,
    CIFAR10_CONFUSIONS,
    CIFAR100_SUPERCLASSES,
    NOISE_KINDS,
    _cut_normal,
    asymmetric_noise,
    confusions,
    instance_noise,
    next_class,
    symmetric_noise,
)
from netwright.seeding import stream

LABELS = torch.arange(5000) % 5


def test_new_labels_are_uniform_over_the_classes():
    noisy, changed = symmetric_noise(LABELS, 1.0, 5, stream(0, "noise"))
    assert chisquare(noisy[LABELS == 2].bincount(minlength=5).numpy()).pvalue > 0.001
    assert float(changed.double().mean()) == pytest.approx(0.8, abs=0.02)
    assert torch.equal(changed, noisy != LABELS)


@pytest.mark.parametrize("examples", [5000, 4999])
def test_a_share_is_drawn_anew_and_some_of_it_by_chance_right(examples):
    labels, count = LABELS[:examples], math.ceil(0.4 * examples)
    _, chosen = symmetric_noise(labels, 0.4, 10**9, stream(0, "noise"))  # of so many classes none is drawn again
    noisy, changed = symmetric_noise(labels, 0.4, 5, stream(0, "noise"))
    assert int(chosen.sum()) == count
    assert bool(chosen[changed].all())
    assert torch.equal(changed, noisy != labels)
    assert abs(int(changed.sum()) - count * 4 / 5) <= 3 * math.sqrt(count * 4 / 5 / 5)


def test_without_the_true_class_the_count_is_exact():
    noisy, changed = symmetric_noise(LABELS, 0.3, 5, stream(0, "noise"), exclude_true=True)
    assert int(changed.sum()) == 1500
    shifts = (noisy - LABELS)[changed] % 5
    assert chisquare(shifts.bincount(minlength=5)[1:].numpy()).pvalue > 0.001
    assert int(symmetric_noise(LABELS[:7], 0.3, 5, stream(0, "noise"), True)[1].sum()) == 3  # rounded up


def test_the_generator_decides_and_the_labels_stay():
    before = LABELS.clone()
    runs = [symmetric_noise(LABELS, 0.5, 5, stream(seed, "noise"))[0] for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(LABELS, before)
    assert torch.equal(symmetric_noise(LABELS, 0.0, 5, stream(0, "noise"))[0], LABELS)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((LABELS, 1.1, 5), r"rate must lie in \[0, 1\], got 1.1"),
        ((LABELS, float("nan"), 5), "rate must lie"),
        ((LABELS, 0.5, 4), "labels must lie in 0..3, got 0..4"),
        ((LABELS[:0], 0.5, 1), "num_classes must be >= 2, got 1"),
        ((LABELS.float(), 0.5, 5), "one whole number an example, got torch.float32"),
    ],
)
def test_what_is_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        symmetric_noise(*arguments, stream(0, "noise"))


def test_confusions_go_one_way_with_the_given_probability():
    noisy, changed = asymmetric_noise(LABELS, 0.4, {0: 1, 3: 4}, stream(0, "noise"))
    assert torch.equal(changed, noisy != LABELS)
    assert set(LABELS[changed].tolist()) == {0, 3}
    assert bool((noisy[changed] == LABELS[changed] + 1).all())
    for label in (0, 3):
        hits = int(changed[label == LABELS].sum())
        assert binomtest(hits, 1000, 0.4).pvalue > 0.001
    whole, _ = asymmetric_noise(LABELS, 1.0, next_class(5), stream(0, "noise"))
    assert torch.equal(whole, (LABELS + 1) % 5)
    assert not asymmetric_noise(LABELS, 0.0, next_class(5), stream(0, "noise"))[1].any()
    swapped, _ = asymmetric_noise(torch.tensor([3, 5, 9, 1]), 1.0, CIFAR10_CONFUSIONS, stream(0, "noise"))
    assert swapped.tolist() == [5, 3, 1, 1]


# The super-class of each class of CIFAR-100 in the order of its labels, as its files have it; a is the first.
COARSE = [
    ord(letter) - ord("a")
    for letter in "eboiaghhsddojshldjhlglfkhgnpdpalbkmoqjlfftiipnorskqerecaresrkdcmmqmbjtckabqmjnpnqtcegtffitsbcpgarion"
]


def test_confusions_of_cifar():
    assert confusions(CIFAR10_CLASSES) == CIFAR10_CONFUSIONS
    shuffled = [CIFAR10_CLASSES[label] for label in (3, 1, 9, 0, 5, 2, 6, 4, 8, 7)]
    by_name = {shuffled[label]: shuffled[other] for label, other in confusions(shuffled).items()}
    assert by_name == {"truck": "automobile", "bird": "airplane", "cat": "dog", "dog": "cat", "deer": "horse"}
    names = sorted(name for group in CIFAR100_SUPERCLASSES for name in group.split())
    assert len(set(names)) == len(COARSE) == 100
    found = confusions(names)
    assert found == next_class(100, COARSE)
    assert all(COARSE[label] == COARSE[other] and label != other for label, other in found.items())
    assert confusions([f"class {number}" for number in range(10)]) == next_class(10)


def test_asymmetric_noise_goes_by_the_names_of_the_classes():
    data = dataclasses.replace(load("digits"), classes=CIFAR10_CLASSES)
    noisy, changed = with_noisy_labels(data, "asymmetric", 1.0)
    assert set(data.train.labels[changed["train"]].tolist()) == set(CIFAR10_CONFUSIONS)
    expected, _ = asymmetric_noise(data.train.labels, 1.0, CIFAR10_CONFUSIONS, stream(0, "label noise", "train"))
    assert torch.equal(noisy.train.labels, expected)


def test_the_next_class_of_the_same_group():
    groups = [0, 1, 2] * 4
    mapping = next_class(12, groups)
    assert sorted(mapping) == sorted(mapping.values()) == list(range(12))
    assert all(groups[label] == groups[other] and label != other for label, other in mapping.items())
    assert next_class(3, [0, 1, 2]) == {}


def test_instance_noise_goes_by_the_instance():
    draws = torch.Generator().manual_seed(0)
    features, labels = torch.randn(4000, 6, generator=draws), torch.randint(4, (4000,), generator=draws)
    noisy, changed = instance_noise(labels, features, 0.3, 4, stream(1, "noise"))
    assert torch.equal(changed, noisy != labels)
    assert float(changed.double().mean()) == pytest.approx(0.3, abs=0.03)
    # Lot would give a third to each other class; here one linear function of the features decides.
    wrong = changed & (labels == 0)
    model = LogisticRegression(max_iter=500).fit(features[wrong], noisy[wrong])
    assert model.score(features[wrong], noisy[wrong]) > 0.7
    assert int(noisy[wrong].bincount().max()) < 0.6 * int(wrong.sum())
    # Equal rows of one class get the same odds: with features of 0 all other classes are alike.
    flat, _ = instance_noise(labels * 0, features * 0, 0.5, 4, stream(2, "noise"))
    assert chisquare(flat[flat > 0].bincount(minlength=4)[1:].numpy()).pvalue > 0.001


def test_instance_rates_are_a_cut_normal():
    found = _cut_normal(20_000, 0.1, 0.1, stream(0, "rates")).numpy()
    assert kstest(found, truncnorm(-1, 9, loc=0.1, scale=0.1).cdf).pvalue > 0.001
    features = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    for rate in (0.0, 1.0):
        assert bool((instance_noise(LABELS[:500], features, rate, 5, stream(0, "noise"))[1] == bool(rate)).all())


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_a_loaded_data_set_with_wrong_labels(kind):
    data = load("digits")
    noisy, changed = with_noisy_labels(data, kind, 0.4, seed=3, parts=("train", "validation"))
    for part in ("train", "validation"):
        assert torch.equal(changed[part], noisy.parts[part].labels != data.parts[part].labels)
        assert noisy.parts[part].images is data.parts[part].images
    share = float(changed["train"].double().mean())
    assert share == pytest.approx(0.4, abs=1e-3 if kind == "symmetric" else 0.05)
    assert noisy.test is data.test
    assert noisy.fingerprint() != data.fingerprint()
    again, _ = with_noisy_labels(data, kind, 0.4, seed=3)
    assert torch.equal(again.train.labels, noisy.train.labels)
    assert not torch.equal(with_noisy_labels(data, kind, 0.4, seed=4)[0].train.labels, noisy.train.labels)


def test_images_on_disk_get_other_labels(tmp_path):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8, generator=generator)
    write_folder(tmp_path / "data", TensorImages(pixels, torch.arange(60) % 2), ["a", "b"])
    data = load(tmp_path / "data", memory_limit=0)
    noisy, changed = with_noisy_labels(data, "instance", 0.5)
    assert int(changed["train"].sum()) > 5
    assert [noisy.train[i][1] for i in range(5)] == noisy.train.labels[:5].tolist()
    assert noisy.train.files == data.train.files
    with pytest.raises(ValueError, match="integers >= 0"):
        data.train.with_labels(torch.zeros(3))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda g: asymmetric_noise(LABELS, -0.1, {}, g), r"rate must lie in \[0, 1\], got -0.1"),
        (lambda g: asymmetric_noise(LABELS, 0.1, {0: -1}, g), "mapping must name classes >= 0, got -1"),
        (lambda g: asymmetric_noise(-LABELS, 0.1, {}, g), "labels must lie in"),
        (lambda g: next_class(1), "num_classes must be >= 2, got 1"),
        (lambda g: next_class(3, [0]), "groups must be 3 numbers, got 1"),
        (lambda g: instance_noise(LABELS, torch.zeros(3, 2), 0.1, 5, g), "features must be 5000 rows of floats"),
        (lambda g: instance_noise(LABELS[:1], torch.full((1, 2), torch.nan), 0.1, 5, g), "features must be finite"),
        (lambda g: instance_noise(LABELS[:1], torch.zeros(1, 2), 0.1, 5, g, -1), "std must be >= 0"),
        (lambda g: with_noisy_labels(load("digits"), "odd", 0.1), "kind must be one of symmetric"),
        (lambda g: with_noisy_labels(load("digits"), "symmetric", 0.1, parts=("tets",)), "parts must be among"),
        (lambda g: with_noisy_labels(load("digits"), "asymmetric", 0.1, mapping={0: 10}), "classes below 10, got 10"),
    ],
)
def test_what_the_others_refuse(call, told):
    with pytest.raises(ValueError, match=told):
        call(stream(0, "noise"))
