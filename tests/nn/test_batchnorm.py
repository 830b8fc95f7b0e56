"""Batch norm utilities against torch's own, and two processes against one."""

import copy

import pytest
import torch
from forked import run_ranks
from torch import nn
from torch.nn.utils import parametrize
from torchvision import models

from netwright.nn import sparse
from netwright.nn.batchnorm import SynchronisedBatchNorm, fold, frozen_statistics, recalibrate, synchronise
from netwright.nn.mbconv import mobilenet_v2_32
from netwright.nn.resnet import resnet18_cifar
from netwright.seeding import seeded, stream


@pytest.fixture(autouse=True)
def _seed():
    with seeded(0, "batchnorm"):
        yield


def lived(module: nn.Module) -> nn.Module:
    """Statistics and affine parameters as after some training, so that a fold that drops one of them shows."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
            if part.affine:
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias)
    return module


def network() -> nn.Sequential:
    first = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))
    return nn.Sequential(*first, nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))


def test_recalibrate_is_the_average_over_batches():
    module = network()
    module[1].momentum, module[5].momentum = 0.3, 0.01
    module[2].eval()
    batches = [torch.randn(8, 3, 6, 6) + i for i in range(4)]
    expected = copy.deepcopy(module)
    expected[3] = nn.Identity()  # dropout must not disturb what is measured
    torch.optim.swa_utils.update_bn(batches, expected)
    before = copy.deepcopy(module.state_dict())
    assert recalibrate(module, batches) is module
    for i in (1, 5):
        torch.testing.assert_close(module[i].running_mean, expected[i].running_mean)
        torch.testing.assert_close(module[i].running_var, expected[i].running_var)
    assert [part.training for part in module] == [True, True, False, True, True, True]
    assert (module[1].momentum, module[5].momentum) == (0.3, 0.01)
    assert all(torch.equal(before[name], value) for name, value in module.named_parameters())


def test_recalibrate_takes_labelled_batches_and_refuses_none():
    module = network()
    recalibrate(module, [(torch.ones(2, 3, 6, 6), torch.zeros(2))])
    assert module[1].num_batches_tracked == 1
    with pytest.raises(ValueError, match="batches must hold at least 1 batch, got 0"):
        recalibrate(module, [])
    assert module.training
    plain = nn.Linear(2, 2)
    assert recalibrate(plain, []) is plain


def test_frozen_statistics():
    module = lived(network())
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(4, 3, 6, 6)
    with frozen_statistics(module):
        batch_mean = module[1](module[0](x)).mean((0, 2, 3))
        torch.testing.assert_close(batch_mean, module[1].bias)  # the batch's statistics, not the running ones
        module.eval()
        assert not torch.allclose(module[1](module[0](x)).mean((0, 2, 3)), module[1].bias, atol=1e-2)
        module.train()
        module(x)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    module(x)
    assert not torch.equal(before["1.running_mean"], module[1].running_mean)


def test_statistics_are_tracked_again_after_an_error():
    norm = nn.BatchNorm1d(2)

    def fail():
        with frozen_statistics(norm):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert norm.track_running_stats


@pytest.mark.parametrize("make", [
    resnet18_cifar, mobilenet_v2_32, lambda: models.googlenet(num_classes=4, aux_logits=False, init_weights=False),
    lambda: models.densenet121(num_classes=4), lambda: models.shufflenet_v2_x0_5(num_classes=4),
], ids=["resnet18", "mobilenet_v2", "googlenet", "densenet121", "shufflenet"])  # fmt: skip
def test_folded_networks_compute_the_same(make):
    module = make().double()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):  # what the batch of a random network has, so that nothing explodes
            part.momentum = 1.0
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        module.train()(x)
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_var.mul_(1.5)
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias)
        module.eval()
        folded = fold(module)
        expected = module(x)
        torch.testing.assert_close(folded(x), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    left = sum(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    total = sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())
    assert left == 0 or (isinstance(module, models.DenseNet) and left < total), (
        left
    )  # a DenseNet norms before it convolves
    assert not folded.training


def test_folding_keeps_zeros_masks_and_the_original():
    module = lived(sparse.sparsify(network(), 0.2)).eval()
    before = copy.deepcopy(module.state_dict())
    folded = fold(module)
    for i in (0, 4):
        assert type(folded[i]) is nn.Conv2d
        assert torch.equal(folded[i].weight == 0, module[i].mask() == 0)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(folded(x), module(x))
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("conv", [
    nn.Conv1d(4, 6, 3, groups=2), nn.Conv2d(4, 6, 3, bias=False), nn.Conv3d(4, 6, 2, dtype=torch.float64),
], ids=["1d", "2d", "3d"])  # fmt: skip
def test_folding_each_dimension(conv, affine):
    dimensions = conv.weight.ndim - 2
    kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
    module = lived(nn.Sequential(conv, kind(6, affine=affine))).to(conv.weight).eval()
    x = torch.randn(2, 4, *[5] * dimensions).to(conv.weight)
    assert isinstance(fold(module)[1], nn.Identity)
    torch.testing.assert_close(fold(module)(x), module(x))


class Reused(nn.Module):
    """The convolution's result is also used without the batch norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class Twice(Reused):
    def forward(self, x):
        return self.norm(self.conv(self.norm(self.conv(x))))


class Branching(nn.Module):
    """Cannot be traced as a whole."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.mixed = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Stubborn())

    def forward(self, x):
        return self.mixed(self.block(x)) if x.sum() > 0 else self.block(x)


class Stubborn(nn.Module):
    def forward(self, x):
        return x if float(x.detach().max()) < 1e9 else -x


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return self._conv_forward(x, weight, self.bias)


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Unmeasured(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))


@pytest.mark.parametrize(("make", "left"), [
    (Reused, 1), (Twice, 1), (Branching, 0), (lambda: nn.Sequential(Standardised(3, 3, 1), nn.BatchNorm2d(3)), 1),
    (lambda: nn.Sequential(Padded(3, 3, 3), nn.BatchNorm2d(3)), 0),
    (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), NormAct(3)), 1),
    (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)), 1),
], ids=["reused", "twice", "branching", "standardised", "padded", "norm-act", "relu-between"])  # fmt: skip
def test_folding_only_where_it_is_the_same_function(make, left):
    module = lived(make()).eval()
    folded = fold(module)
    x = torch.rand(2, 3, 5, 5)
    torch.testing.assert_close(folded(x), module(x))
    assert sum(isinstance(part, nn.BatchNorm2d) for part in folded.modules()) == left


def test_folding_leaves_batch_norms_without_statistics_and_other_parametrizations():
    folded = fold(Unmeasured())
    assert isinstance(folded[1], nn.BatchNorm2d)
    module = lived(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))).eval()
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(fold(module)(x), module(x))
    assert parametrize.is_parametrized(module[0])


# --- synchronised statistics


def make_pair(**options) -> tuple[nn.Module, nn.Module]:
    reference = nn.BatchNorm2d(3, **options)
    if reference.affine:
        with torch.no_grad():
            reference.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
            reference.bias.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    return reference, synchronise(copy.deepcopy(reference))


def whole_batch() -> tuple[torch.Tensor, torch.Tensor]:
    x = 3 + torch.randn(6, 3, 4, 5, generator=stream(0, "x"))
    return x, torch.randn(6, 3, 4, 5, generator=stream(0, "weights"))


OPTIONS = ({}, {"affine": False}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-2}, {"track_running_stats": False})


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x, weights = whole_batch()
    share = slice(0, 4) if rank == 0 else slice(4, 6)  # unequal on purpose
    results = []
    for options in OPTIONS:
        _, norm = make_pair(**options)
        for _ in range(2):
            mine = x[share].clone().requires_grad_()
            y = norm(mine)
            (y**2 * weights[share]).sum().backward()
        with frozen_statistics(norm):
            norm(x[share] + 1)
        results.append({
            "y": y.detach(), "gx": mine.grad, "state": norm.state_dict(),
            "gw": None if norm.weight is None else norm.weight.grad, "eval": norm.eval()(x[share]).detach(),
        })  # fmt: skip
    far = (x[share] + 100).requires_grad_()
    y = make_pair()[1](far)
    (y**2 * weights[share]).sum().backward()
    results.append({"y": y.detach(), "gx": far.grad})
    double = x[share].double().requires_grad_()
    _, norm = make_pair()
    (first,) = torch.autograd.grad((norm.double()(double) ** 3).sum(), double, create_graph=True)
    results.append(torch.autograd.grad((first**2).sum(), double)[0])
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def assert_no_less_exact_than_torch(x, weights, ranks):
    """Far from zero float32 itself is coarse, and a variance from a sum of squares would be lost."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        whole = x.detach().to(dtype, copy=True).requires_grad_()
        y = make_pair()[0].to(dtype)(whole)
        (y**2 * weights.to(dtype)).sum().backward()
        found[dtype] = {"y": y.detach(), "gx": whole.grad}
    for name, exact in found[torch.float64].items():
        ours = torch.cat([rank[-2][name] for rank in ranks])
        assert (ours - exact).abs().max() <= 1.5 * (found[torch.float32][name] - exact).abs().max()


def test_two_processes_equal_one(tmp_path):
    run_ranks(_rank, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    x, weights = whole_batch()
    close = {"rtol": 1e-5, "atol": 1e-5}
    for i, options in enumerate(OPTIONS):
        norm, _ = make_pair(**options)
        for _ in range(2):
            whole = x.clone().requires_grad_()
            y = norm(whole)
            (y**2 * weights).sum().backward()
        torch.testing.assert_close(torch.cat([rank[i]["y"] for rank in ranks]), y.detach(), **close)
        torch.testing.assert_close(torch.cat([rank[i]["gx"] for rank in ranks]), whole.grad, **close)
        state = norm.state_dict()
        for rank in ranks:
            assert set(rank[i]["state"]) == set(state)
            for key, value in state.items():
                torch.testing.assert_close(rank[i]["state"][key], value, **close)
        if norm.affine:
            torch.testing.assert_close(ranks[0][i]["gw"] + ranks[1][i]["gw"], norm.weight.grad, rtol=1e-4, atol=1e-4)
        if norm.track_running_stats:
            torch.testing.assert_close(torch.cat([rank[i]["eval"] for rank in ranks]), norm.eval()(x).detach(), **close)
    assert_no_less_exact_than_torch(x + 100, weights, ranks)
    double = x.double().requires_grad_()
    norm, _ = make_pair()
    (first,) = torch.autograd.grad((norm.double()(double) ** 3).sum(), double, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), double)
    torch.testing.assert_close(torch.cat([rank[-1] for rank in ranks]), second, rtol=1e-5, atol=1e-5)


def test_synchronise_keeps_parameters_buffers_and_names():
    module = lived(network())
    module[1].eval()
    before, tensors = list(module.state_dict()), {name: p for name, p in module.named_parameters()}
    x = torch.randn(2, 3, 6, 6)
    expected = copy.deepcopy(module).eval()(x)
    assert synchronise(module) is module
    assert list(module.state_dict()) == before
    assert all(tensors[name] is p for name, p in module.named_parameters())
    assert (type(module[1]), module[1].training, module[5].training) == (SynchronisedBatchNorm, False, True)
    assert torch.equal(module.eval()(x), expected)
    again = synchronise(module)
    assert again[1] is module[1]
    folded = fold(module)
    torch.testing.assert_close(folded(x), expected)
    assert not any(isinstance(part, SynchronisedBatchNorm) for part in folded.modules())


def test_synchronise_one_layer_and_refuse_strangers():
    norm = nn.BatchNorm1d(3, affine=False, track_running_stats=False, momentum=None)
    ours = synchronise(norm)
    x = torch.randn(5, 3)
    assert torch.equal(ours(x), norm(x))
    with pytest.raises(ValueError, match="synchronise knows torch's own batch norms, got NormAct"):
        synchronise(nn.Sequential(NormAct(3)))
    with pytest.raises(ValueError, match="x must have at least 2 dimensions"):
        ours(torch.randn(3))
