"""Chains of methods on a small network of the handwritten digits."""

import pytest
import torch
from torch import nn

from netwright import deploy
from netwright.compress import prune
from netwright.compress.chain import (
    Alternate,
    Distill,
    LearnLevels,
    LowRank,
    Maestro,
    Prune,
    Quantize,
    Training,
    compress,
    packed,
    unpacked,
)
from netwright.compress.quantize import baked
from netwright.console import UserError
from netwright.cost import count
from netwright.data import Batches, load
from netwright.deploy import onnx
from netwright.metrics import accuracy
from netwright.seeding import seeded, stream
from netwright.train import Classifier, evaluate, fit
from netwright.train.weight_compander import apply_weight_compander

X = torch.randn(4, 1, 8, 8, generator=stream(0, "x"))


def network(width=64):
    with seeded(0, "init"):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(128, width), nn.ReLU(), nn.Linear(width, 10),
        )  # fmt: skip


def same(a, b):
    """Whether two networks are the same, bit for bit."""
    first, second = (baked(n).state_dict() for n in (a, b))
    return list(first) == list(second) and all(torch.equal(v, second[k]) for k, v in first.items())


@pytest.fixture(scope="module")
def digits():
    data = load("digits")
    train = Batches(data.train, 32, normalise=data.normalise())
    test = Batches(data.test, 500, shuffle=False, drop_last=False, normalise=data.normalise())
    net = network()
    fit(Classifier(net, lr=0.05), train, epochs=5)
    return net.eval(), train, test


@pytest.fixture(scope="module")
def chained(digits):
    net, train, test = digits
    steps = [LowRank(0.5), Prune(0.8), Quantize(4)]
    return compress(net, steps, example=X, training=Training(train, epochs=2), test=test, runtime=False)


def test_the_chain_keeps_the_accuracy_and_loses_the_weight(digits, chained):
    net, _, test = digits
    small, report = chained
    assert [s.step for s in report.steps] == ["as given", "low-rank", "prune", "quantize"]
    first, low, pruned, last = report.steps
    assert first.accuracy > 0.93
    assert last.accuracy > first.accuracy - 0.05
    assert last.accuracy == accuracy(*evaluate(baked(small), test))
    assert low.parameters <= 0.5 * first.parameters
    assert pruned.parameters == low.parameters
    assert pruned.sparse_macs < 0.6 * low.macs
    assert first.bytes > low.bytes > pruned.bytes > last.bytes
    assert last.bytes == pytest.approx(len(packed(small, report)), abs=200)
    assert report.ratio > 10
    assert prune.sparsity(baked(small)).sparsity == pytest.approx(0.8, abs=0.01)
    assert first.macs == count(net, (1, 8, 8)).macs
    assert "times smaller" in str(report)
    report.plot()


def test_the_result_is_an_ordinary_module(chained, tmp_path):
    small, _ = chained
    expected = small(X).detach()
    facts = {"shape": (1, 8, 8), "mean": [0.0], "std": [1.0], "classes": "0123456789", "scale": None}
    session = onnx.Session(onnx.export(small, tmp_path / "net.onnx", **facts))
    assert session.logits(X.numpy()) == pytest.approx(expected.numpy(), abs=1e-4)
    fast = deploy.compile(small, X[:1])
    assert torch.allclose(torch.as_tensor(fast(X[:1])), expected[:1], atol=1e-4)
    again = deploy.load(fast.save(tmp_path / "sparse"))
    assert torch.allclose(torch.as_tensor(again(X[:1])), expected[:1], atol=1e-4)
    assert type(baked(small)[0]) in (nn.Conv2d, nn.Sequential)


def test_it_is_read_back_bit_for_bit(digits, chained):
    net, _, _ = digits
    small, report = chained
    again = unpacked(packed(small, report), network())
    assert report.ranks
    assert same(again, small)
    assert same(unpacked(packed(small, report), net), small)
    with pytest.raises(UserError, match="do not fit the network"):
        unpacked(packed(small, report), nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(UserError, match="damaged"):
        unpacked(b"nothing", network())


def test_a_student_takes_the_place(digits):
    net, train, test = digits
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    before = {k: v.clone() for k, v in student.state_dict().items()}
    small, report = compress(
        net,
        [Distill(student), Quantize(3)],
        example=X,
        training=Training(train, epochs=4, lr=0.05),
        test=test,
        runtime=False,
    )
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert report.steps[-1].accuracy > 0.85
    assert same(unpacked(packed(small, report), student), small)


def test_without_data_weights_are_cut_and_rounded(digits):
    net, _, test = digits
    before = {k: v.clone() for k, v in net.state_dict().items()}
    small, report = compress(net, [LowRank(0.9), Prune(0.3), Quantize(8)], example=X, test=test, runtime=False)
    assert report.steps[-1].accuracy > 0.8
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert same(unpacked(packed(small, report), net), small)


class Text(nn.Module):
    """Takes whole numbers, and its classifier has the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embedding, self.middle, self.out = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50)
        self.out.weight = self.embedding.weight

    def forward(self, tokens):
        return self.out(self.middle(self.embedding(tokens).mean(1)).relu())


class Two(nn.Module):
    """Takes two inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 3)

    def forward(self, x, gate):
        return self.last((self.first(x) * gate).relu())


def plain(*layers):
    return lambda: nn.Sequential(*layers, nn.ReLU(), nn.Linear(32, 3))


TOKENS = torch.randint(0, 50, (4, 7), generator=stream(0, "tokens"))
ROWS = torch.randn(2, 8, generator=stream(0, "rows"))
WEIGHT_NORM = nn.utils.parametrizations.weight_norm


LAYERS = 8 * 32 + 32 * 3


@pytest.mark.parametrize(
    ("make", "example", "macs", "runtime"),
    [
        (Text, TOKENS, 16 * 16 + 16 * 50, True),
        (Text, TOKENS, 16 * 16 + 16 * 50, False),
        (Two, (ROWS, torch.ones(2, 32)), LAYERS, True),
        (lambda: plain(nn.Linear(8, 32))().bfloat16(), ROWS.bfloat16(), LAYERS, True),
        (lambda: plain(nn.Linear(8, 32))().double(), ROWS.double(), LAYERS, True),
        (plain(WEIGHT_NORM(nn.Linear(8, 32))), ROWS, LAYERS, False),
        (lambda: apply_weight_compander(plain(nn.Linear(8, 32))()), ROWS, LAYERS, False),
    ],
    ids=["tokens", "tokens, no runtime", "two inputs", "bfloat16", "float64", "weight norm", "companded"],
)
def test_networks_of_every_kind(make, example, macs, runtime):
    with seeded(0, "init"):
        net = make().eval()
    inputs = example if isinstance(example, tuple) else (example,)
    steps = [LowRank(0.9), Prune(0.5), Quantize(4)]
    small, report = compress(net, steps, example=example, rounds=1, runtime=runtime)
    assert report.steps[0].macs == macs
    assert report.steps[-1].nonzeros < 0.7 * report.steps[0].nonzeros
    again = unpacked(packed(small, report), net)
    assert same(again, small)
    assert torch.allclose(again(*inputs), small(*inputs), atol=1e-5)
    if make is Text:
        assert again.out.weight is again.embedding.weight


@pytest.mark.parametrize("step", [Maestro(0.9), LearnLevels(3), Alternate(2, points_lr=1e-4)])
def test_steps_that_need_data(digits, step, tmp_path, monkeypatch):
    net, train, _ = digits
    training = Training(train, epochs=2)
    options = {"example": X, "training": training, "runtime": False, "rounds": 1}
    small, report = compress(net, [step], folder=tmp_path, **options)
    assert accuracy(*evaluate(small, train)) > 0.6
    assert same(unpacked(packed(small, report), net), small)
    monkeypatch.setattr(type(step), "apply", None)  # it is read back, not made again
    assert same(compress(net, [step], folder=tmp_path, **options)[0], small)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"{step.name} needs training data, got none"):
        compress(net, [step], example=X)


def test_the_paper_orders_terms_otherwise(digits):
    net, train, _ = digits
    options = {"example": X, "training": Training(train, epochs=1), "runtime": False, "rounds": 1}
    ours, papers = (compress(net, [kind(0.5)], **options)[1].ranks for kind in (LowRank, Maestro))
    assert ours != papers


def test_an_operator_that_the_runtime_lacks_leaves_a_gap():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Softshrink(), nn.Linear(16, 4))
    _, report = compress(net, [Quantize(4)], example=X, rounds=2)
    assert report.steps[0].runtime_ms is None
    assert report.steps[0].accuracy is None


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: compress(network(), [], example=X), "in this order, got none"),
        (lambda: compress(network(), [Quantize(4), Prune(0.5)], example=X), "in this order, got quantize, prune"),
        (lambda: compress(network(), [Prune(0.5), Prune(0.6)], example=X), "in this order"),
        (lambda: compress(network(), [Distill(network())], example=X), "needs training data"),
        (lambda: compress(network(), [LowRank(0.001)], example=X), "params must be >="),
        (lambda: Prune(1.0), r"must lie in \[0, 1\)"),
        (lambda: LowRank(1.0), r"share must lie in \(0, 1\)"),
        (lambda: Quantize(0), "bits must lie in"),
        (lambda: Quantize(4, 0), "bucket_size must be"),
        (lambda: LearnLevels(4, points_lr=0.0), "points_lr must be > 0"),
        (lambda: Training(epochs=0), "epochs must be >= 1"),
        (lambda: Training(lr=-1), "lr must be > 0"),
    ],
)
def test_bad_input(call, told):
    with pytest.raises(ValueError, match=told):
        call()
