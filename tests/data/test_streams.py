"""Class-incremental streams: what is shown when, and what is measured of it."""

import math

import pytest
import torch

from netwright.data import TensorImages
from netwright.data.streams import class_incremental_stream, continual_metrics
from netwright.seeding import stream


def data(count=40, classes=5):
    images = torch.arange(count, dtype=torch.float32).view(count, 1, 1, 1)
    return TensorImages(images, torch.arange(count) % classes)


def steps(order=(3, 0, 4, 1), seed=0, **options):
    options = {"classes_per_step": 2, "epochs_per_step": 3, "batch_size": 5} | options
    return list(class_incremental_stream(data(), order, generator=stream(seed, "order"), **options))


def test_each_step_shows_its_classes_in_full_as_often_as_told():
    found = steps()
    assert [step.classes for step in found] == [(3, 0), (4, 1)]
    assert [step.number for step in found] == [0, 1]
    for step in found:
        batches = list(step)
        assert len(batches) == len(step) == 3 * math.ceil(16 / 5)
        for epoch in range(3):
            shown = torch.cat([x.flatten() for x, _ in batches[4 * epoch : 4 * (epoch + 1)]]).long()
            assert shown.sort().values.tolist() == step.indices.tolist()
        for x, labels in batches:
            assert torch.equal(x.flatten().long() % 5, labels)
            assert set(labels.tolist()) <= set(step.classes)
    assert not set(found[0].indices.tolist()) & set(found[1].indices.tolist())
    assert not (torch.cat([step.indices for step in found]) % 5 == 2).any()


def test_indices_are_those_of_the_whole_data_set():
    for step in steps():
        assert [x.flatten().long().tolist() for x, _ in step] == [i.tolist() for i in step.index_batches()]


def test_order_is_shuffled_anew_each_pass_and_depends_on_the_generator_alone():
    def shown(found):
        return [[i.tolist() for i in step.index_batches()] for step in found]

    assert shown(steps()) == shown(steps())
    assert shown(steps()) != shown(steps(seed=1))
    first = shown(steps())[0]
    assert first[:4] != first[4:8]
    again = steps()[0]
    assert list(map(str, again)) == list(map(str, again))


@pytest.mark.parametrize(
    ("order", "options", "message"),
    [
        ((0, 1, 2), {}, "class_order must hold a multiple of 2 classes, got 3"),
        ((), {}, "class_order must hold a multiple of 2 classes, got 0"),
        ((0, 1, 1, 2), {}, "class_order must name each class once"),
        ((0, 7), {}, r"got \[7\] without an example"),
        ((0, 1), {"classes_per_step": 0}, "classes_per_step must be >= 1, got 0"),
        ((0, 1), {"epochs_per_step": 0}, "epochs_per_step must be >= 1, got 0"),
        ((0, 1), {"batch_size": 0}, "batch_size must be >= 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(order, options, message):
    with pytest.raises(ValueError, match=message):
        steps(order, **options)


def test_bad_arguments_are_refused_before_the_first_step():
    with pytest.raises(ValueError, match="class_order"):
        class_incremental_stream(data(), [9])
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        class_incremental_stream(data(), [0], batch_size=0)


def test_metrics_by_hand():
    matrix = [[0.9, 0.1, 0.0], [0.95, 0.8, 0.0], [0.3, 0.9, 0.7]]
    found = continual_metrics(matrix)
    assert found["final_accuracy"] == pytest.approx((0.3 + 0.9 + 0.7) / 3)
    assert found["forgetting"] == pytest.approx((0.65 + 0.0) / 2)  # the first was best after step 2
    assert found["learning_accuracy"] == pytest.approx((0.9 + 0.8 + 0.7) / 3)


def test_what_has_not_come_yet_does_not_count():
    matrix = torch.tensor([[0.9, 1.0], [0.5, 0.6]])
    unknown = matrix.clone()
    unknown[0, 1] = torch.nan
    assert continual_metrics(matrix) == continual_metrics(unknown)
    assert continual_metrics([[0.5]]) == {"final_accuracy": 0.5, "forgetting": 0.0, "learning_accuracy": 0.5}


@pytest.mark.parametrize("matrix", [[], [0.5], [[0.5, 0.5]], [[0.5, 0.0], [math.nan, 0.5]]])
def test_bad_matrices(matrix):
    with pytest.raises(ValueError, match="acc_matrix must"):
        continual_metrics(matrix)
