import copy
import io

import pytest
import torch
from searches import equal
from torch import nn
from torch.nn.utils import prune

from netwright.data.tensors import Batches, TensorImages
from netwright.nn.sparse import layers, mask_of, sparsity_report, to_dense
from netwright.search import spaces
from netwright.search.bilevel import FirstOrder, SecondOrder
from netwright.search.dass import DASS, DASSStages
from netwright.seeding import stream


def loaders():
    generator = stream(0, "images")
    x, y = torch.rand(24, 1, 8, 8, generator=generator), torch.randint(3, (24,), generator=generator)
    return Batches(TensorImages(x, y), 8, steps=2), Batches(TensorImages(x.flip(0), y.flip(0)), 8, name="validation")


def supernet():
    return spaces.get("micro-darts-2-shared").supernet(1, 3, channels=4, seed=0)


def dass(density=0.1, stages=(1, 2, 1), unrolled=True, **options):
    return DASS(supernet(), density, DASSStages(*stages), unrolled, **options)


def values(searcher, kind):
    net = searcher.supernet
    found = {"alpha": dict(net.arch.items()), "scores": {}, "weights": {}, "masks": {}}
    for name, layer in layers(net):
        mask = mask_of(layer)
        found["scores"][name], found["masks"][name] = mask.scores, mask.mask()
        found["weights"][name] = layer.weight
        if layer.bias is not None:
            found["weights"][f"{name}.bias"] = layer.bias
    return {name: value.detach().clone() for name, value in found[kind].items()}


def same(a, b):
    return [torch.equal(a[name], b[name]) for name in a]


def run(searcher):
    """Snapshots of everything at the end of every epoch."""
    kinds = ("alpha", "scores", "weights", "masks")
    ends = []
    snapshot = lambda: {kind: values(searcher, kind) for kind in kinds}  # noqa: E731
    searcher.prepare(seed=0, steps_per_epoch=2)
    ends.append(snapshot())
    # Entering a stage happens at the end of an epoch: its changes belong to the snapshot before the stage's first step.
    searcher.search(*loaders(), seed=0, on_epoch=lambda end: ends.append(snapshot()))
    return ends


@pytest.mark.parametrize("unrolled", [True, False])
def test_each_stage_changes_only_what_it_trains(unrolled):
    searcher = dass(unrolled=unrolled)
    start, pretrained, *pruned, finetuned = run(searcher)
    assert not any(same(start["weights"], pretrained["weights"]))
    assert not any(same(start["alpha"], pretrained["alpha"]))

    for end in pruned:
        assert all(same(pretrained["weights"], end["weights"])), "stage 2 must leave weights and biases to the bit"
        assert all(same(pretrained["alpha"], end["alpha"]))
    assert not any(same(pretrained["scores"], pruned[0]["scores"]))
    assert not all(same(pretrained["masks"], pruned[-1]["masks"])), "learning must change some mask"

    assert all(same(pruned[-1]["scores"], finetuned["scores"])), "stage 3 must leave scores to the bit"
    assert all(same(pruned[-1]["masks"], finetuned["masks"]))
    assert not all(same(pruned[-1]["weights"], finetuned["weights"]))
    assert not any(same(pruned[-1]["alpha"], finetuned["alpha"]))
    # Momentum is off, so a removed weight moves by weight decay alone; where nothing else moves it, by that exactly.
    lr = searcher.stages[2].lr_at(0.0), searcher.stages[2].lr_at(0.5)
    shrink = (1 - lr[0] * 1e-3) * (1 - lr[1] * 1e-3)
    for name, mask in finetuned["masks"].items():
        gone = mask == 0
        wanted = pruned[-1]["weights"][name][gone] * shrink
        assert torch.allclose(finetuned["weights"][name][gone], wanted, rtol=1e-5, atol=0)


def test_scores_do_not_train_in_the_dense_stage():
    searcher = dass(stages=(2, 1, 1))
    searcher.prepare(seed=0, steps_per_epoch=2)
    start, seen = values(searcher, "scores"), []

    def on_epoch(end):
        seen.append(values(searcher, "scores") if end.epoch == 1 else None)

    searcher.search(*loaders(), seed=0, on_epoch=on_epoch)
    assert all(same(start, seen[0]))


def test_the_first_mask_is_magnitude_pruning():
    searcher = dass(stages=(1, 1, 1), density=0.2)
    masks = []
    searcher.search(
        *loaders(), seed=0, on_epoch=lambda end: masks.append((values(searcher, "masks"), values(searcher, "weights")))
    )
    found, weights = masks[0]
    for name, mask in found.items():
        layer = nn.Linear(1, 1)
        layer.weight = nn.Parameter(weights[name])
        keep = max(1, round(0.2 * mask.numel()))
        prune.l1_unstructured(layer, "weight", amount=mask.numel() - keep)
        assert torch.equal(layer.weight_mask, mask), name


def test_density_follows_the_stages():
    searcher, densities = dass(density=0.05, stages=(1, 1, 1)), []
    searcher.prepare(seed=0, steps_per_epoch=2)
    densities.append({mask_of(layer).density for _, layer in layers(searcher.supernet)})
    searcher.search(
        *loaders(),
        seed=0,
        on_epoch=lambda end: densities.append({mask_of(layer).density for _, layer in layers(searcher.supernet)}),
    )
    assert densities == [{1.0}, {0.05}, {0.05}, {0.05}]
    report = sparsity_report(searcher.supernet)
    for layer in report.values():
        assert layer.kept == max(1, round(0.05 * layer.total))
    names = " ".join(report)
    assert "stem" in names
    assert "classifier" in names
    searcher.supernet.eval()
    x = torch.rand(3, 1, 8, 8)
    assert torch.allclose(to_dense(searcher.supernet)(x), searcher.supernet(x), atol=1e-6)


def test_rates_and_optimiser_of_the_table():
    searcher = DASS(supernet())
    assert [(s.name, s.epochs, s.lr, s.lr_min, s.weight_decay, s.alpha_step) for s in searcher.stages] == [
        ("pretrain", 50, 0.025, 1e-3, 1e-3, True),
        ("prune", 50, 0.1, 1e-3, 1e-3, False),
        ("finetune", 50, 0.025, 1e-3, 1e-3, True),
    ]
    assert searcher.density == 0.01
    assert isinstance(searcher.method, SecondOrder)
    assert searcher.w_opt.param_groups[0]["momentum"] == 0.0
    alpha = searcher.a_opt.param_groups[0]
    assert (alpha["lr"], alpha["betas"], alpha["weight_decay"]) == (3e-4, (0.5, 0.999), 1e-3)
    assert not isinstance(dass(unrolled=False).method, SecondOrder)
    assert isinstance(dass(unrolled=False).method, FirstOrder)
    assert searcher.config()["density"] == 0.01


def test_alpha_in_prune():
    _, pretrained, pruned, _ = run(dass(stages=(1, 1, 1), alpha_in_prune=True))
    assert not any(same(pretrained["alpha"], pruned["alpha"]))
    assert all(same(pretrained["weights"], pruned["weights"]))


def test_momentum_does_not_leak_from_stage_to_stage():
    searcher = DASS(supernet(), 0.1, DASSStages(1, 1, 1, momentum=0.9), unrolled=False)
    held = []
    searcher.search(*loaders(), seed=0, on_epoch=lambda end: held.append(len(searcher.w_opt.state)))
    assert held[:2] == [0, 0]  # the next stage has begun
    assert held[2] > 0


@pytest.mark.parametrize("options", [{}, {"alpha_in_prune": True, "unrolled": False}])
def test_a_search_resumed_after_any_epoch_is_bit_equal(options):
    states = []
    whole = dass(stages=(1, 2, 1), **options)
    result = whole.search(*loaders(), seed=0, on_epoch=lambda end: states.append(end.searcher.state_dict()))
    assert [state["stage"] for state in states] == ["prune", "prune", "finetune", "finetune"]
    for state in states:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        torch.manual_seed(len(state["figures"]))
        resumed = dass(stages=(1, 2, 1), **options)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        again = resumed.search(*loaders(), seed=0)
        assert equal(whole.state_dict(), resumed.state_dict())
        assert again.genotype == result.genotype


def test_the_given_supernet_keeps_its_values():
    given = supernet()
    before = copy.deepcopy(given.state_dict())
    searcher = DASS(given, 0.1, DASSStages(1, 1, 1))
    state = torch.get_rng_state()
    searcher.search(*loaders(), seed=0)
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_skipped_layers_stay_dense():
    searcher = dass(skip=["classifier"])
    assert type(searcher.supernet.classifier) is nn.Linear
    assert type(searcher.supernet.classifier) is not type(dass().supernet.classifier)


def test_stage_order():
    searcher = dass()
    searcher.prepare(seed=0, steps_per_epoch=1)
    for name in ("finetune", "pretrain", "polish"):
        with pytest.raises(RuntimeError, match=r"after stage 'pretrain' comes \['prune'\]"):
            searcher.enter(name)
    searcher.enter("prune")
    with pytest.raises(RuntimeError, match=r"after stage 'prune' comes \['finetune'\], got 'pretrain'"):
        searcher.enter("pretrain")
    searcher.enter("finetune")
    with pytest.raises(RuntimeError, match="comes none"):
        searcher.enter("finetune")
    assert [stage.epochs for stage in searcher.stages] == [0, 0, 1]


def test_a_stage_without_epochs_is_still_entered():
    searcher = dass(stages=(1, 0, 1), density=0.2)
    ends = run(searcher)
    weights = ends[1]["weights"]
    for name, mask in ends[1]["masks"].items():
        keep = int(mask.sum())
        assert keep == max(1, round(0.2 * mask.numel()))
        kept, gone = weights[name].abs()[mask == 1], weights[name].abs()[mask == 0]
        assert kept.min() >= gone.max()


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
def test_density_outside_its_range(density):
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
        dass(density=density)


def test_refusals():
    with pytest.raises(ValueError, match="convolution or linear layer"):
        DASS(nn.ReLU())
    with pytest.raises(ValueError, match="lr of stage 'prune'"):
        DASS(supernet(), stages=DASSStages(prune_lr=0.0))
    with pytest.raises(ValueError, match="epochs of stage 'finetune'"):
        DASS(supernet(), stages=DASSStages(finetune=-1))
    searcher = dass(unrolled=False)
    searcher.prepare(seed=0, steps_per_epoch=1)
    searcher.enter("prune")
    mask_of(searcher.supernet.classifier).scores.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="scores must be numbers, got NaN"):
        searcher.step(next(iter(loaders()[0])), None)
