"""A chain that is stopped and goes on."""

import pytest
import torch
from torch import nn

from netwright.compress.chain import Distill, LowRank, Prune, Quantize, Training, compress
from netwright.compress.chain.steps import Applied
from netwright.compress.quantize import baked
from netwright.console import UserError
from netwright.data import Batches, TensorImages
from netwright.data.augment import HorizontalFlip
from netwright.seeding import seeded, stream

X = torch.randn(4, 1, 8, 8, generator=stream(0, "x"))
STEPS = (LowRank(0.6), Prune(0.5), Quantize(3, 32))


def network(seed=0):
    with seeded(seed, "init"):
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2), nn.Flatten(),
            nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 2),
        )  # fmt: skip


def training(**options):
    images = torch.randint(0, 256, (96, 1, 8, 8), dtype=torch.uint8, generator=stream(0, "images"))
    labels = (images[:, 0, :4].float().mean((1, 2)) > images[:, 0, 4:].float().mean((1, 2))).long()
    data = Batches(TensorImages(images, labels), 16, augment=HorizontalFlip())
    return Training(data, **{"epochs": 2, "lr": 0.05} | options)


def run(folder, steps=STEPS, model=None, **options):
    told = []
    net = network() if model is None else model
    small, report = compress(
        net,
        steps,
        example=X,
        training=training(**options),
        folder=folder,
        rounds=1,
        runtime=False,
        progress=told.append,
    )
    return small, report, told


def same(a, b):
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(v, second[k]) for k, v in first.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The chain that was never stopped."""
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("stop", [LowRank, Prune, Quantize])
def test_a_stopped_chain_ends_with_the_same_bits(whole, stop, tmp_path, monkeypatch):
    small, report, told = whole
    assert told == ["low-rank", "prune", "quantize"]
    with monkeypatch.context() as patched:

        def killed(self, network, teacher, how):
            raise KeyboardInterrupt

        patched.setattr(stop, "apply", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    again, other, told = run(tmp_path)
    done = [step.name for step in STEPS][: [type(step) for step in STEPS].index(stop)]
    assert told == [*(f"{name}, kept from before" for name in done), *[step.name for step in STEPS][len(done) :]]
    assert same(again, small)
    assert other.ranks == report.ranks
    assert other.ranks
    assert [s.bytes for s in other.steps] == [s.bytes for s in report.steps]


def test_a_finished_chain_is_read_back_alone(whole, tmp_path):
    small, _, _ = whole
    run(tmp_path)
    again, _, told = run(tmp_path)
    assert all(name.endswith("kept from before") for name in told)
    assert same(again, small)
    assert not again.training


def test_a_file_that_was_half_written_is_not_there(whole, tmp_path, monkeypatch):
    """A kill in the middle of a write leaves no file under the name: the step is made anew."""
    small, _, _ = whole
    with monkeypatch.context() as patched:
        patched.setattr("netwright.storage.os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert same(run(tmp_path)[0], small)


def test_a_student_is_kept(tmp_path):
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))
    steps = [Distill(student), Quantize(4)]
    small, *_ = run(tmp_path, steps)
    again, _, told = run(tmp_path, steps)
    assert told == ["distill, kept from before", "quantize, kept from before"]
    assert same(small, again)


def test_layers_without_any_term_are_kept(tmp_path, monkeypatch):
    def emptied(self, network, teacher, how):
        from netwright.compress import low_rank

        low = low_rank.decompose(network)
        low[6].rank = 0
        return Applied(low_rank.finalize(low), low_rank.factored_ranks(low))

    monkeypatch.setattr(LowRank, "apply", emptied)
    small, report, _ = run(tmp_path, [LowRank(0.9), Quantize(4)])
    again, *_ = run(tmp_path, [LowRank(0.9), Quantize(4)])
    assert report.ranks["6"] == 0
    assert same(small, again)
    assert torch.equal(baked(small)(X), baked(again)(X))


@pytest.mark.parametrize(
    "other",
    [
        {"steps": (LowRank(0.5), *STEPS[1:])},
        {"epochs": 1},
        {"lr": 0.04},
        {"seed": 1},
        {"model": network(1)},
    ],
)
def test_another_chain_is_refused(other, tmp_path):
    run(tmp_path, steps=STEPS[:1])
    options = {"steps": STEPS[:1]} | other
    with pytest.raises(UserError, match="a step of another chain"):
        run(tmp_path, **options)


def test_a_later_step_may_change(tmp_path):
    run(tmp_path, steps=STEPS[:2])
    assert run(tmp_path, steps=(*STEPS[:2], Quantize(5)))[2] == [
        "low-rank, kept from before",
        "prune, kept from before",
        "quantize",
    ]


def test_damage_is_one_line(tmp_path):
    run(tmp_path, steps=STEPS[:1])
    (file,) = tmp_path.glob("*.safetensors")
    content = file.read_bytes()
    for damaged in (b"", content[:100], content[:-5]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged weights file"):
            run(tmp_path, steps=STEPS[:1])


def test_rounding_without_data_is_kept_with_its_ends(tmp_path):
    small, again = (
        compress(network(), [Quantize(2, 32)], example=X, folder=tmp_path, rounds=1, runtime=False)[0] for _ in range(2)
    )
    assert any(name.endswith(".ends") for name in small.state_dict())
    assert same(again, small)
    assert torch.equal(baked(again).eval()(X), small.eval()(X))
