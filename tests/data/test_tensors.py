"""Batches are a function of seed and step; labels stay with their images; ranks share one global batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netwright.data.augment import Compose, Cutout, HorizontalFlip, Jitter, RandomCrop
from netwright.data.tensors import Batches, Normalise, TensorImages, image_digests
from netwright.seeding import stream


def numbered(count, channels=1, side=6):
    """Images whose every pixel is their own number, which is their label too."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, channels, side, side).contiguous()
    return TensorImages(images, torch.arange(count))


def random_images(count, seed=0, side=8):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return TensorImages(images, torch.randint(0, 5, (count,), generator=generator))


AUGMENT = Compose([RandomCrop(2), HorizontalFlip(), Jitter(), Cutout(3)])


class MapStyle(torch.utils.data.Dataset):
    """The same examples as a data set that Batches knows nothing about."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


def drain(batches, epochs):
    found = []
    for epoch in epochs:
        batches.set_epoch(epoch)
        found.append([(x.clone(), y.clone()) for x, y in batches])
    return found


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(x, a) and torch.equal(y, b) for (x, y), (a, b) in zip(first, second, strict=True)
    )


def test_an_example_is_scaled_and_its_label_is_a_plain_int():
    data = TensorImages(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1), torch.tensor([3, 4]))
    x, y = data[1]
    assert x.dtype == torch.float32
    assert x.item() == 1.0
    assert y == 4
    assert type(y) is int
    floats = TensorImages(torch.full((1, 1, 1, 4), -7.5), torch.tensor([0]))
    assert floats[0][0].min() == -7.5


def test_subset_keeps_images_labels_and_files_together():
    data = numbered(6)
    data.files = tuple("abcdef")
    part = data.subset([4, 1])
    assert part.labels.tolist() == [4, 1]
    assert part.images[:, 0, 0, 0].tolist() == [4, 1]
    assert part.files == ("e", "b")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 3), torch.zeros(2, dtype=torch.int64), r"images must have shape .* \(2, 3, 3\)"),
        (torch.zeros(2, 1, 3, 3).double(), torch.zeros(2, dtype=torch.int64), "uint8 or float32, got torch.float64"),
        (torch.zeros(2, 1, 3, 3), torch.zeros(2), "labels must be 2 integers"),
        (torch.zeros(2, 1, 3, 3), torch.zeros(3, dtype=torch.int64), "labels must be 2 integers"),
        (torch.zeros(1, 1, 3, 3), torch.tensor([-1]), "labels must be >= 0, got -1"),
    ],
)
def test_wrong_tensors_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        TensorImages(images, labels)


def test_moments_equal_numpy_in_float64():
    data = random_images(3000)
    mean, square = data.moments()
    values = data.images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, values.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(square, (values**2).mean((0, 2, 3)), rtol=1e-12)


def test_normalise_makes_uint8_and_float_equal_and_standard():
    data = random_images(200)
    mean, square = data.moments()
    normalise = Normalise(mean.tolist(), np.sqrt(square - mean**2).tolist())
    standard = normalise(data.images)
    assert torch.equal(standard, normalise(data.images.float() / 255))
    assert standard.mean((0, 2, 3)).abs().max() < 1e-5
    assert (standard.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    assert set(normalise.state_dict()) == {"mean", "std"}
    with pytest.raises(ValueError, match="3, H, W"):
        normalise(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="std must be > 0"):
        Normalise([0.0], [0.0])


def test_digests_are_equal_only_for_equal_images():
    images = np.random.default_rng(0).integers(0, 256, (50, 1, 4, 4), dtype=np.uint8)
    images[[7, 30]] = images[3]
    digests = [row.tobytes() for row in image_digests(images)]
    assert digests[7] == digests[30] == digests[3]
    assert len(set(digests)) == 48


def test_a_pass_covers_every_example_once_and_the_next_one_in_another_order():
    first, second = drain(Batches(numbered(12), 4), [0, 1])
    orders = [torch.cat([y for _, y in epoch]).tolist() for epoch in (first, second)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(12))
    assert orders[0] != orders[1]
    assert orders[0] != list(range(12))


def test_an_odd_length_of_an_epoch_still_walks_through_whole_passes():
    batches = Batches(numbered(12), 4, steps=2)  # three steps a pass
    labels = [y for epoch in drain(batches, range(3)) for _, y in epoch]
    for begin in (0, 3):
        assert sorted(torch.cat(labels[begin : begin + 3]).tolist()) == list(range(12))


@pytest.mark.parametrize("steps", [None, 1, 5, 11])
def test_set_epoch_alone_resumes(steps):
    def make():
        return Batches(random_images(30), 8, seed=3, steps=steps, augment=AUGMENT)

    straight = drain(make(), range(4))
    assert same(straight[3], drain(make(), [3])[0])
    again = make()
    drain(again, [7, 0])
    assert same(straight[2], drain(again, [2])[0])
    assert not same(straight[0], straight[1])


def test_the_order_neither_reads_nor_moves_the_global_generators():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = drain(Batches(MapStyle(random_images(16)), 4, augment=AUGMENT, workers=0), [0])[0]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert same(first, drain(Batches(MapStyle(random_images(16)), 4, augment=AUGMENT, workers=0), [0])[0])


def test_seed_and_name_change_the_order():
    orders = [
        torch.cat([y for _, y in Batches(numbered(40), 8, seed=seed, name=name)]).tolist()
        for seed, name in [(0, "order"), (1, "order"), (0, "other")]
    ]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_the_order_is_the_documented_stream():
    expected = torch.randperm(12, generator=stream(5, "order", 1))
    batches = Batches(numbered(12), 4, seed=5)
    batches.set_epoch(1)
    assert torch.cat([y for _, y in batches]).tolist() == expected.tolist()


@settings(max_examples=40, deadline=None)
@given(
    world=st.integers(1, 4),
    local=st.integers(1, 4),
    extra=st.integers(0, 9),
    steps=st.one_of(st.none(), st.integers(1, 5)),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_the_shares_of_the_ranks_are_the_global_batch(world, local, extra, steps, drop_last, shuffle, epoch):
    data = random_images(2 * world * local + extra)

    def make(rank, of):
        batches = Batches(
            data,
            world * local,
            seed=1,
            shuffle=shuffle,
            steps=steps,
            drop_last=drop_last,
            augment=AUGMENT,
            rank=rank,
            world=of,
        )
        return drain(batches, [epoch])[0]

    whole = make(0, 1)
    shares = [make(rank, world) for rank in range(world)]
    for step, (x, y) in enumerate(whole):
        assert torch.equal(x, torch.cat([share[step][0] for share in shares]))
        assert torch.equal(y, torch.cat([share[step][1] for share in shares]))
        if len(y) == world * local:
            assert all(len(share[step][1]) == local for share in shares)


def test_a_plain_function_as_augmentation_sees_the_global_batch_too():
    def noisy(images, generator):
        return images + torch.rand(images.shape, generator=generator)

    whole = drain(Batches(random_images(16), 8, augment=noisy), [1])[0]
    halves = [drain(Batches(random_images(16), 8, augment=noisy, rank=r, world=2), [1])[0] for r in (0, 1)]
    assert same(whole, [(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in zip(*halves, strict=True)])
    assert not same(whole, drain(Batches(random_images(16), 8), [1])[0])


def test_labels_stay_with_their_images_under_augmentation():
    batches = Batches(numbered(200), 16, augment=Compose([RandomCrop(1), HorizontalFlip()]), drop_last=False)
    for x, y in batches:
        assert torch.equal((x.amax((1, 2, 3)) * 255).round().long(), y)


def test_augmentation_differs_between_steps_but_not_between_readings():
    data = TensorImages(torch.randint(0, 256, (1, 1, 8, 8), dtype=torch.uint8), torch.tensor([0]))
    batches = Batches(data, 1, augment=RandomCrop(3), steps=6)  # one image, so nothing but the augmentation can differ
    first, second = drain(batches, [0, 1])
    assert len({x.numpy().tobytes() for x, _ in first + second}) > 6
    assert same(first, drain(batches, [0])[0])


def test_normalise_comes_after_augmentation():
    normalise = Normalise([0.5] * 3, [0.25] * 3)
    plain = drain(Batches(random_images(8), 8, augment=AUGMENT), [0])[0]
    standard = drain(Batches(random_images(8), 8, augment=AUGMENT, normalise=normalise), [0])[0]
    torch.testing.assert_close(standard[0][0], (plain[0][0] - 0.5) / 0.25)


def test_without_shuffling_one_pass_in_order_with_a_smaller_last_batch():
    batches = Batches(numbered(10), 4, shuffle=False)
    assert len(batches) == 3
    for epoch in drain(batches, [0, 5]):
        assert [y.tolist() for _, y in epoch] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize(("drop_last", "lengths"), [(True, [4, 4]), (False, [4, 4, 2])])
def test_drop_last(drop_last, lengths):
    batches = Batches(numbered(10), 4, drop_last=drop_last)
    assert [len(y) for _, y in batches] == lengths
    assert len(batches) == len(lengths)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("augment", [None, AUGMENT, lambda x, generator: x.flip(3)])
@pytest.mark.parametrize("kind", [lambda data: data, MapStyle])
def test_indices_on_request_are_those_of_the_examples(world, augment, kind):
    data = numbered(20, channels=3)
    for rank in range(world):
        options = {"augment": augment, "rank": rank, "world": world, "workers": 0}
        plain, indexed = (Batches(kind(data), 8, indexed=wanted, **options) for wanted in (False, True))
        for epoch in range(2):
            plain.set_epoch(epoch)
            indexed.set_epoch(epoch)
            for (x, y), (x_too, y_too, index) in zip(plain, indexed, strict=True):
                assert torch.equal(x, x_too)
                assert torch.equal(y, y_too)
                assert torch.equal(index, y)  # the label of an example is its number


def test_a_data_set_smaller_than_the_batch_is_one_batch_a_pass():
    batches = Batches(numbered(5), 64, steps=3)
    assert [sorted(y.tolist()) for _, y in batches] == [[0, 1, 2, 3, 4]] * 3
    assert [len(y) for _, y in Batches(numbered(5), 64, rank=1, world=2)] == [2]


@pytest.mark.parametrize("workers", [0, 2])
def test_any_map_style_data_set_gives_the_same_batches_through_workers(workers):
    data = random_images(20)
    expected = drain(Batches(data, 8, augment=AUGMENT), [0, 2])
    found = drain(Batches(MapStyle(data), 8, augment=AUGMENT, workers=workers), [0, 2])
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 5, "world": 2}, r"multiple of world \(2\).*got 5"),
        ({"batch_size": 4, "rank": 2, "world": 2}, "rank 2 of world 2"),
        ({"batch_size": 4, "steps": 0}, "steps must be >= 1, got 0"),
        ({"batch_size": 16, "world": 16}, "16 ranks, got 10"),
        ({"batch_size": 4, "workers": -1}, "workers must be >= 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Batches(numbered(10), **options)


def test_an_empty_data_set_and_a_negative_epoch_are_refused():
    with pytest.raises(ValueError, match="at least 1 example"):
        Batches(numbered(3).subset([]), 2)
    with pytest.raises(ValueError, match="epoch must be >= 0, got -1"):
        Batches(numbered(3), 2).set_epoch(-1)
