"""SimCLR, MoCo and SimSiam against direct transcriptions; the queue, the key's network, the Hallucinator in each."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.train.contrastive import MoCo, SimCLR, SimSiam
from netwright.train.contrastive.hosts import duplicates, width_of
from netwright.train.contrastive.losses import nt_xent
from netwright.train.hallucinator import Hallucinator, extrapolate

HOSTS = (SimCLR, MoCo, SimSiam)
DIM = 6


class Fixed(Hallucinator):
    """One that always draws the same ratio."""

    def drawn_ratio(self, q):
        return torch.tensor(0.04, dtype=q.dtype)


def backbone() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 8)
    )


def host(kind, hallucinator: Hallucinator | None = None, **settings) -> nn.Module:
    extra = {MoCo: {"queue_size": 20, "momentum": 0.9}, SimSiam: {"pred_dim": 3}}.get(kind, {})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(backbone, dim=DIM, hallucinator=hallucinator, **{**extra, **settings}).double()


def fixed() -> Fixed:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Fixed(DIM)


def views(count: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x1, x2 = torch.rand(2, count, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x1, x2


def cosines(a, b):
    return functional.normalize(a) @ functional.normalize(b).T


def test_simclr_by_hand():
    found, other = host(SimCLR, temperature=0.3), host(SimCLR)
    x1, x2 = views()
    z1, z2 = other.head(other.backbone(torch.cat([x1, x2]))).chunk(2)
    assert found(x1, x2).item() == pytest.approx(nt_xent(z1, z2, 0.3).item(), abs=1e-12)


def test_moco_by_hand():
    found, other = host(MoCo), host(MoCo)
    x1, x2 = views()
    q = other.head(other.backbone(x1))
    with torch.no_grad():
        for own, query in zip(
            [*other.key_backbone.parameters(), *other.key_head.parameters()],
            [*other.backbone.parameters(), *other.head.parameters()],
            strict=True,
        ):
            own.copy_(0.9 * own + 0.1 * query)
        k = functional.normalize(other.key_head(other.key_backbone(x2)))
    logits = torch.cat([(functional.normalize(q) * k).sum(1, keepdim=True), functional.normalize(q) @ other.queue], 1)
    expected = functional.cross_entropy(logits / 0.2, torch.zeros(5, dtype=torch.long))
    loss = found(x1, x2)
    loss.backward()  # the queue has moved on, the graph has not
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    expected.backward()
    for a, b in zip(found.backbone.parameters(), other.backbone.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-12)
    assert torch.allclose(found.queue[:, :5], k.T, atol=1e-12)


def test_simsiam_by_hand():
    found, other = host(SimSiam), host(SimSiam)
    x1, x2 = views()
    z1, z2 = other.projector(other.backbone(x1)), other.projector(other.backbone(x2))
    p1, p2 = other.predictor(z1), other.predictor(z2)
    one = (functional.normalize(p1) * functional.normalize(z2.detach())).sum(1)
    two = (functional.normalize(p2) * functional.normalize(z1.detach())).sum(1)
    expected = -0.5 * (one.mean() + two.mean())
    loss = found(x1, x2)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    loss.backward()
    expected.backward()
    for a, b in zip(found.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-12)


@pytest.mark.parametrize("mask", [True, False])
def test_hallucinated_simclr_by_hand(mask):
    found, other = host(SimCLR, fixed(), mask_duplicates=mask, temperature=0.3), host(SimCLR, fixed())
    x1, x2 = views()
    z1, z2 = other.head(other.backbone(torch.cat([x1, x2]))).chunk(2)
    h = other.hallucinator.smooth(torch.cat([z1, 1.04 * z1 - 0.04 * z2], 1))
    rows, images = torch.cat([z1, h, z2, z2]), list(range(5)) * 4
    similar = (cosines(rows, rows) / 0.3).tolist()
    losses = []
    for i in range(20):
        positive = (i + 10) % 20
        others = [j for j in range(20) if j != i and (not mask or images[j] != images[i] or j == positive)]
        losses.append(torch.tensor([similar[i][j] for j in others]).logsumexp(0).item() - similar[i][positive])
    assert found(x1, x2).item() == pytest.approx(sum(losses) / 20, abs=1e-6)


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("unit", [True, False])
def test_hallucinated_moco_by_hand(once, unit):
    found, other = host(MoCo, fixed(), enqueue_once=once, normalize_query=unit), host(MoCo, fixed())
    x1, x2 = views()
    q = other.head(other.backbone(x1))
    other.follow()
    k = other.keys(x2)
    q = functional.normalize(q) if unit else q
    h = other.hallucinator.smooth(torch.cat([q, extrapolate(q, k, 0.04)], 1))
    logits = []
    for query, key in zip(torch.cat([q, h]), torch.cat([k, k]), strict=True):
        query = query / query.norm()
        logits.append(torch.cat([(query @ key)[None], query @ other.queue]) / 0.2)
    expected = functional.cross_entropy(torch.stack(logits), torch.zeros(10, dtype=torch.long))
    loss = found(x1, x2)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert int(found.pointer) == (5 if once else 10)
    entered = k.T if once else torch.cat([k, k]).T
    assert torch.allclose(found.queue[:, : len(entered.T)], entered, atol=1e-12)
    loss.backward()
    assert all(p.grad is None for p in (*found.key_backbone.parameters(), *found.key_head.parameters()))
    assert all(p.grad.any() for p in found.hallucinator.parameters())


def test_hallucinated_simsiam_by_hand():
    found, other = host(SimSiam, fixed()), host(SimSiam, fixed())
    x1, x2 = views()
    z1, z2 = other.projector(other.backbone(x1)), other.projector(other.backbone(x2))
    p1, p2 = other.predictor(z1), other.predictor(z2)
    first = torch.cat([p1, other.hallucinator.smooth(torch.cat([p1, extrapolate(p1, p2, 0.04)], 1))])
    second = torch.cat([p2, other.hallucinator.smooth(torch.cat([p2, extrapolate(p2, p1, 0.04)], 1))])
    one = functional.cosine_similarity(first, torch.cat([z2, z2])).mean()
    two = functional.cosine_similarity(second, torch.cat([z1, z1])).mean()
    assert found(x1, x2).item() == pytest.approx(-(one + two).item() / 2, abs=1e-12)


@pytest.mark.parametrize("kind", HOSTS)
def test_the_hallucinator_is_off_in_evaluation(kind):
    with_it, without = host(kind, fixed()).eval(), host(kind).eval()
    x1, x2 = views()
    assert torch.equal(with_it(x1, x2), without(x1, x2))
    before = copy.deepcopy(with_it.state_dict())
    with_it(x1, x2)
    assert all(torch.equal(value, before[name]) for name, value in with_it.state_dict().items())
    with_it.train()
    without.train()
    assert not torch.equal(with_it(x1, x2), without(x1, x2))


@pytest.mark.parametrize("kind", HOSTS)
def test_it_is_trained_by_the_loss_of_the_host(kind):
    module = host(kind, Hallucinator(DIM))
    optimizer = torch.optim.SGD([p for group in module.parameter_groups() for p in group["params"]], lr=0.05)
    before = [p.clone() for p in module.hallucinator.parameters()]
    losses = []
    for _ in range(30):
        loss = module(*views())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert kind is MoCo or losses[-1] < losses[0]  # a queue that fills makes it harder first
    assert all(not torch.equal(p, old) for p, old in zip(module.hallucinator.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", HOSTS)
def test_embeddings_are_unit_vectors(kind):
    found = host(kind).eval().embed(views()[0])
    assert found.shape == (5, DIM)
    assert torch.allclose(found.norm(dim=1), torch.ones(5, dtype=torch.float64))


def test_the_key_of_simclr_has_a_gradient_and_that_of_moco_none():
    seen = []

    class Watching(Fixed):
        def forward(self, q, k, ratio=None):
            seen.append(k.requires_grad)
            return super().forward(q, k, ratio)

    for kind in (SimCLR, MoCo, SimSiam):
        host(kind, Watching(DIM))(*views())
    assert seen == [True, False, True, True]


def test_key_weights_follow():
    module = host(MoCo)
    with torch.no_grad():
        for parameter in module.backbone.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in module.key_backbone.parameters()]
    module.follow()
    for own, old, query in zip(module.key_backbone.parameters(), before, module.backbone.parameters(), strict=True):
        assert torch.allclose(own, 0.9 * old + 0.1 * query, atol=1e-12)
    still = host(MoCo, momentum=1.0)
    before = [p.clone() for p in still.key_head.parameters()]
    torch.nn.init.ones_(still.head[0].weight)
    still.follow()
    assert all(torch.equal(a, b) for a, b in zip(still.key_head.parameters(), before, strict=True))


def test_the_queue_forgets_the_oldest():
    module = host(MoCo)
    keys = functional.normalize(torch.randn(25, DIM, dtype=torch.float64))
    assert torch.allclose(module.queue.norm(dim=0), torch.ones(20, dtype=torch.float64))
    for part in keys.split(7):  # 20 is no multiple
        module.enqueue(part)
    pointer = int(module.pointer)
    assert pointer == 5
    assert torch.equal(module.queue.roll(-pointer, 1), keys[5:].T)
    assert {"queue", "pointer"} <= set(module.state_dict())
    other = host(MoCo)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.queue, module.queue)
    with pytest.raises(ValueError, match="queue_size must be >= the keys of a batch, 21, got 20"):
        module.enqueue(keys[:21])


def test_keys_of_all_processes_enter_the_queue(monkeypatch):
    module, others = host(MoCo), functional.normalize(torch.randn(3, DIM, dtype=torch.float64))
    own = functional.normalize(torch.randn(3, DIM, dtype=torch.float64))

    def gathered(ids, rows):
        """As process 1 of 2, whose neighbour's rows have the even numbers."""
        assert ids.tolist() == [1, 3, 5]
        order = torch.cat([ids - 1, ids]).argsort()
        return torch.arange(6), torch.cat([others, rows])[order]

    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr("netwright.train.contrastive.hosts.gather_rows", gathered)
    module.enqueue(own)
    assert int(module.pointer) == 6
    assert torch.equal(module.queue[:, :6:2], others.T)
    assert torch.equal(module.queue[:, 1:6:2], own.T)


def test_groups_for_batch_norm():
    """Keys of a group know that group's statistics alone, queries likewise."""
    module, x = host(MoCo, bn_splits=2, momentum=1.0), views(8)[1]
    torch.manual_seed(3)
    found = module.keys(x)
    torch.manual_seed(3)
    order = torch.randperm(8)
    other = host(MoCo)
    for part in order.chunk(2):
        expected = functional.normalize(other.key_head(other.key_backbone(x[part])))
        assert torch.allclose(found[part], expected, atol=1e-12)
    assert not torch.allclose(found, host(MoCo).keys(x), atol=1e-3)
    assert module(*views(8)).isfinite()
    calm = host(MoCo, bn_splits=2).eval()
    assert torch.equal(calm.keys(x), host(MoCo).eval().keys(x))


def test_version_one():
    module = host(MoCo, mlp=False, temperature=0.07)
    assert isinstance(module.head, nn.Linear)
    assert module(*views()).isfinite()


def test_the_mask_of_duplicates():
    mask = duplicates(3)
    for i in range(12):
        for j in range(12):
            same, positive = i % 3 == j % 3, (i - j) % 12 == 6
            assert bool(mask[i, j]) == (same and i != j and not positive)


def test_the_predictor_keeps_its_learning_rate():
    module = host(SimSiam, Hallucinator(DIM))
    rest, own = module.parameter_groups()
    assert own["constant_lr"] is True
    assert {id(p) for p in own["params"]} == {id(p) for p in module.predictor.parameters()}
    assert len(rest["params"]) + len(own["params"]) == len(list(module.parameters()))
    trained = host(MoCo).parameter_groups()[0]["params"]
    assert len(trained) == len(list(host(SimCLR).parameters()))  # nothing of the key's network


def test_a_batch_of_one_trains_no_batch_norm():
    for kind in HOSTS:
        with pytest.raises(ValueError, match="must hold >= 2 images for batch norm"):
            host(kind)(*views(1))
    plain = SimCLR(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), dim=4).double()
    assert plain(*views(1)).item() == 0
    assert host(MoCo).eval()(*views(1)).isfinite()


def test_widths_that_are_not_told():
    assert width_of(backbone()) == 8
    assert width_of(nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten())) == 5
    module = SimCLR(lambda: nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten()), dim=4).double()
    with pytest.raises(
        ValueError, match=r"must give features \(6, 5\), got \(6, 180\): tell their width with features="
    ):
        module(*views(3))
    module = SimCLR(lambda: nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten()), dim=4, features=180).double()
    assert module(*views(3)).isfinite()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SimCLR(backbone, 0), "dim must be >= 1, got 0"),
        (lambda: SimCLR(backbone, 4, temperature=0), "temperature must be > 0 and finite, got 0"),
        (
            lambda: SimCLR(backbone, 4, hallucinator=Hallucinator(5)),
            "hallucinator must have the dim of the host, 4, got 5",
        ),
        (lambda: SimCLR(nn.Flatten, 4), "features must be given for Flatten"),
        (lambda: SimCLR(nn.Flatten, 4, features=0), "features must be >= 1, got 0"),
        (lambda: MoCo(backbone, momentum=1.1), r"momentum must lie in \[0, 1\], got 1.1"),
        (lambda: MoCo(backbone, queue_size=0), "queue_size must be >= 1, got 0"),
        (lambda: MoCo(backbone, temperature=-1), "temperature"),
        (lambda: MoCo(backbone, bn_splits=0), "bn_splits must be >= 1, got 0"),
        (lambda: host(MoCo, queue_size=4)(*views()), "queue_size must be >= the keys of a batch, 5, got 4"),
        (lambda: host(MoCo, bn_splits=3)(*views()), "bn_splits must leave >= 2 images in a group, got 3 for 5 images"),
        (lambda: SimSiam(backbone, 4, 0), "pred_dim must be >= 1, got 0"),
        (lambda: host(SimCLR)(views()[0], views(4)[1]), "x1 and x2 must be batches of one shape"),
        (lambda: host(SimCLR)(views()[0][:0], views()[0][:0]), "at least 1 image"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
