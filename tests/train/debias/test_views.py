"""Views with another bias: kept ones are fresh ones, what is drawn, where they lie, bad input."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from netwright.console import UserError
from netwright.data.biased import PALETTE, colored_mnist, recolored
from netwright.data.tensors import TensorImages
from netwright.seeding import seeded, stream
from netwright.train.debias import BiasTranslator, TwoViews, ViewCache, panel, signed_range
from netwright.train.debias import views as module
from netwright.train.debias.views import as_bytes


class Recolour:
    """The exact bias transformation of coloured digits."""

    num_classes, shape = 10, (3, 8, 8)

    def translate(self, x, y_target):
        return signed_range(3)(recolored(as_bytes(x), torch.tensor(PALETTE)[y_target]))


def coloured(count: int = 40):
    draws = stream(0, "grey")
    grey = torch.randint(0, 256, (count, 8, 8), dtype=torch.uint8, generator=draws)
    return colored_mnist(grey, torch.arange(count) % 10, 1.0)


def translator() -> BiasTranslator:
    with seeded(0, "init"):
        return BiasTranslator(10, 8, width=4, n_down=1, n_res=1, n_layers=2)


def test_the_cache_holds_every_translation():
    data = coloured()
    cache = ViewCache(data, Recolour(), batch_size=7)
    assert cache.views.shape == (40, 10, 3, 8, 8)
    for label in range(10):
        grey = data.images.amax(1)
        assert torch.equal(cache.views[:, label], colored_mnist(grey, torch.full((40,), label), 1.0).images)
    assert torch.equal(cache.views[torch.arange(40), data.labels], data.images)
    views, label = cache[13]
    assert (views.shape, label) == ((10, 3, 8, 8), 3)
    assert len(cache) == 40


def test_kept_views_are_fresh_views():
    data, net = coloured(), translator()
    index = torch.tensor([5, 0, 31])
    x = data.images[index].float() / 255
    fresh, kept = TwoViews(net), TwoViews(None, cache=ViewCache(data, net))
    for a, b in zip(fresh(x, None, stream(0, "v")), kept(x, index, stream(0, "v")), strict=True):
        # One byte may round otherwise: a convolution of a larger batch adds in another order.
        assert float((a - b).abs().max()) <= 1 / 255 + 1e-6
    for a, b in zip(kept(x, index, stream(0, "v")), kept.kept(index, stream(0, "v")), strict=True):
        assert torch.equal(a, b)


def test_a_data_set_of_ones_own_gives_the_same():
    data, net = coloured(12), translator()

    class Own:
        def __len__(self):
            return 12

        def __getitem__(self, index):
            return data.images[index].float() / 255, int(data.labels[index])

    assert torch.equal(ViewCache(Own(), net).views, ViewCache(data, net).views)


def test_many_views_lie_in_a_file(tmp_path):
    data = coloured(12)
    small, mapped = ViewCache(data, Recolour()), ViewCache(data, Recolour(), memory_limit=0)
    assert torch.equal(small.views, mapped.views)
    named = ViewCache(data, Recolour(), memory_limit=0, path=tmp_path / "views.bin")
    assert torch.equal(small.views, named.views)
    assert (tmp_path / "views.bin").stat().st_size == 12 * 10 * 3 * 64


def test_a_full_disk_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "free_bytes", lambda place: 100)
    with pytest.raises(UserError, match="more than is free"):
        ViewCache(coloured(12), Recolour(), memory_limit=0, path=tmp_path / "v")
    assert list(tmp_path.iterdir()) == []


def test_targets_are_uniform_and_independent():
    draw = TwoViews(Recolour()).draw_targets
    first, second = draw(20_000, stream(0, "t"))
    counts = (10 * first + second).bincount(minlength=100)
    assert float(((counts - 200) ** 2 / 200).sum()) < 149  # chi^2, 99 degrees of freedom, p = 0.001


def test_one_class_for_both_gives_equal_views(monkeypatch):
    views = TwoViews(Recolour())
    x = coloured().images[:6].float() / 255
    same = torch.arange(6)
    monkeypatch.setattr(views, "draw_targets", lambda count, generator: (same, same))
    first, second = views(x, None, stream(0, "v"))
    assert torch.equal(first, second)
    z = first.flatten(1)
    assert torch.allclose(torch.cosine_similarity(z, second.flatten(1)), torch.ones(6))


def test_the_original_may_be_a_view():
    x = coloured().images[:6].float() / 255
    first, second = TwoViews(Recolour(), "original+transformed")(x, None, stream(0, "v"))
    assert torch.equal(first, x)
    assert not torch.equal(second, x)
    cached = TwoViews(None, "original+transformed", cache=ViewCache(coloured(), Recolour()))
    assert torch.equal(cached.kept(torch.arange(6), stream(0, "v"), x)[0], x)


def test_an_image_that_is_a_view_is_treated_as_a_translation_is():
    """Else noise and blur would tell which one the translation is."""
    x = coloured().images[:6].float() / 255
    treated = {"noise": 0.4, "blur": 0.7}
    fresh = TwoViews(Recolour(), "original+transformed", **treated)(x, None, stream(0, "v"))
    cached = TwoViews(None, "original+transformed", cache=ViewCache(coloured(), Recolour()), **treated)
    kept = cached.kept(torch.arange(6), stream(0, "v"), x)
    for a, b in zip(fresh, kept, strict=True):
        assert torch.equal(a, b)
    monochrome = torch.full((50, 3, 8, 8), 0.5)
    for view in TwoViews(Identity(), "original+transformed", **treated)(monochrome, None, stream(0, "v")):
        assert float((view - 0.5).std()) == pytest.approx(0.2, abs=0.01)


def test_views_on_another_device_are_augmented_on_the_cpu():
    """Where augmentations draw their numbers."""
    seen = []

    def shift(images, generator):
        seen.append(images.device.type)
        return images - torch.rand(len(images), 1, 1, 1, generator=generator)

    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(4, 3, 8, 8, device="cuda")  # of which only the shape and the place are known
        view = TwoViews(Identity(), augment=shift, noise=0.2)._finished(x, torch.Generator())
        assert view.device.type == "cuda"
    assert seen == ["cpu"]


def test_each_view_is_augmented_by_itself_and_then_noisy():
    x = torch.full((50, 3, 8, 8), 1.0)

    def shift(images, generator):
        return images - torch.rand(len(images), 1, 1, 1, generator=generator)

    views = TwoViews(Identity(), augment=shift)
    first, second = views(x, None, stream(0, "v"))
    assert not torch.allclose(first, second)
    assert torch.allclose(first, first[:, :1, :1, :1].expand_as(first))
    noisy, _ = TwoViews(Identity(), noise=0.4)(x, None, stream(0, "v"))
    assert float((noisy - 1).std()) == pytest.approx(0.2, abs=0.01)  # 0.4 on a scale twice as long


def test_views_may_stay_unrounded_and_be_blurred():
    class Darker:
        num_classes = 10

        def translate(self, x, y_target):
            return x - 0.003 * (x > 0)  # less than half a byte

    data = coloured(12)
    exact = ViewCache(data, Darker(), rounded=False)
    assert exact.views.dtype == torch.float32
    rounded = ViewCache(data, Darker())
    assert torch.equal(rounded.views[:, 0], data.images)
    bright = data.images > 127
    assert torch.allclose((data.images / 255 - exact.views[:, 3])[bright], torch.tensor(0.0015), atol=1e-6)
    mapped = ViewCache(data, Darker(), rounded=False, memory_limit=0)
    assert torch.equal(mapped.views, exact.views)
    x, draws = data.images.float() / 255, stream(0, "v")
    fresh = TwoViews(Darker(), rounded=False)(x, None, draws)[0]
    assert torch.allclose(fresh, exact.views[:, 0], atol=1e-6)
    dot = torch.zeros(2, 1, 21, 21)
    dot[:, :, 10, 10] = 1.0
    spread = TwoViews(Darker(), rounded=False, blur=1.5)(dot, None, draws)[0][0, 0]
    places = torch.arange(21.0) - 10
    assert float(spread.sum()) == pytest.approx(0.9985, abs=1e-3)
    assert float((spread * places.square()).sum() / spread.sum()) == pytest.approx(1.5**2, rel=0.05)
    tiny = TwoViews(Darker(), blur=5.0)(torch.rand(2, 1, 4, 4, generator=draws), None, draws)[0]
    assert tiny.shape == (2, 1, 4, 4)


class Identity:
    num_classes = 10

    def translate(self, x, y_target):
        return x


def test_panels():
    data = coloured(4)
    found = panel(Recolour(), data.images, [2, 5])
    assert found.shape == (4, 3, 3, 8, 8)
    assert torch.equal(found[:, 0], data.images)
    assert torch.equal(found[:, 2], colored_mnist(data.images.amax(1), torch.full((4,), 5), 1.0).images)


def test_range():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(as_bytes(signed_range(1)(every)), every)
    assert as_bytes(torch.tensor([-1.0005, 1.0005])).tolist() == [0, 255]


BELOW = TensorImages(torch.full((2, 3, 8, 8), -1.0), torch.tensor([0, 1]))


def kept() -> TwoViews:
    return TwoViews(None, cache=ViewCache(coloured(12), Recolour()))


def showing_images() -> TwoViews:
    return TwoViews(None, "original+transformed", cache=ViewCache(coloured(12), Recolour()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TwoViews(Recolour(), "both"), "views must be 'transformed' or"),
        (lambda: TwoViews(None), "translator must be given"),
        (lambda: TwoViews(Recolour(), noise=-1.0), "view_noise must be >= 0"),
        (lambda: TwoViews(Recolour(), blur=-1.0), "view_blur must be >= 0"),
        (lambda: TwoViews(Recolour(), rounded="no"), "round_views must be one of True, False, got 'no'"),
        (lambda: showing_images().kept(torch.arange(2), stream(0, "v")), "images must be given where they are a view"),
        (lambda: ViewCache(coloured(12), Recolour(), batch_size=0), "batch_size must be >= 1, got 0"),
        (lambda: ViewCache(coloured(12).subset([]), Recolour()), "at least 1 image, got 0"),
        (lambda: ViewCache(BELOW, Recolour()), r"in \[0, 1\], got -1"),
        (lambda: TwoViews(Recolour())(torch.full((2, 3, 8, 8), 1.1), None, stream(0, "v")), r"lie in \[-1, 1\]"),
        (lambda: kept()(torch.zeros(2, 3, 8, 8), None, stream(0, "v")), "indices"),
        (lambda: kept()(torch.zeros(1, 3, 8, 8), torch.tensor([12]), stream(0, "v")), r"indices must lie in 0..11"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
