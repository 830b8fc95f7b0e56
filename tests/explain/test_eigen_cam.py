"""Eigen-CAM against closed forms, scikit-learn's decompositions and the symmetries that it has."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.decomposition import PCA, TruncatedSVD
from torch import nn

from netwright.explain import EigenCAM, eigen, eigen_cam, grid_of_tokens, last_conv
from netwright.explain.eigen import _iterated
from netwright.seeding import seeded, stream


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    """Activations behind a ReLU."""
    return torch.randn(*shape, generator=stream(seed, "features")).relu()


def network() -> nn.Sequential:
    with seeded(0, "init"):
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(12, 5),
        )  # fmt: skip


def hooks(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) for part in model.modules())


class TestMap:
    def test_of_rank_one_it_is_the_pattern_times_the_norm(self):
        a, b = features(16, seed=1) + 0.1, features(5, 7, seed=2)
        activations = a[:, None, None] * b
        assert torch.allclose(eigen_cam(activations, normalize=False), a.norm() * b, atol=1e-5)
        assert torch.allclose(eigen_cam(activations), (b - b.min()) / (b.max() - b.min()), atol=1e-6)

    def test_the_worked_case(self):
        activations = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).mT.reshape(2, 1, 2)
        assert torch.allclose(eigen_cam(activations, normalize=False), torch.tensor([[3.0, 0.0]]))
        assert torch.allclose(eigen_cam(activations), torch.tensor([[1.0, 0.0]]))
        centred = eigen_cam(activations, center=True, normalize=False)
        assert torch.allclose(centred, math.sqrt(2.5) * torch.tensor([[1.0, -1.0]]), atol=1e-6)

    @pytest.mark.parametrize("shape", [(20, 4, 5), (6, 7, 7)])
    def test_the_norm_of_the_map_is_the_singular_value(self, shape):
        activations = features(*shape)
        for component in range(3):
            found = eigen_cam(activations, component=component, normalize=False, return_info=True)
            values = torch.linalg.svdvals(activations.flatten(1).double())
            assert found.map.norm().item() == pytest.approx(values[component].item(), rel=1e-5)
            assert found.singular_values[0].tolist() == pytest.approx(
                values[component : component + 2].tolist(), rel=1e-4
            )
            assert not found.degenerate.any()

    @pytest.mark.parametrize("shape", [(20, 4, 5), (6, 7, 7)])
    def test_it_is_what_scikit_learn_finds_up_to_the_sign(self, shape):
        activations = features(*shape)
        matrix = activations.flatten(1).mT.double().numpy()
        for center, theirs in ((True, PCA(1)), (False, TruncatedSVD(1, algorithm="arpack"))):
            ours = eigen_cam(activations, center=center, normalize=False).flatten().double()
            other = torch.from_numpy(theirs.fit_transform(matrix)[:, 0].copy())
            assert min((ours - other).abs().max(), (ours + other).abs().max()) < 1e-5

    @pytest.mark.parametrize("center", [False, True])
    @pytest.mark.parametrize("shape", [(150, 13, 13), (300, 12, 12)])
    @pytest.mark.parametrize("component", [0, 1])
    def test_many_places_and_channels_are_iterated_to_the_same(self, shape, center, component):
        axis = torch.linspace(-1, 1, shape[1])
        regions = torch.stack([torch.exp(-3 * ((axis[:, None] - a) ** 2 + (axis + a) ** 2)) for a in (-0.6, 0.1, 0.7)])
        weights = features(2, shape[0], 3, seed=1) * torch.tensor([4.0, 2.0, 1.0])
        activations = torch.einsum("bck,khw->bchw", weights, regions) + 0.05 * features(2, *shape)
        matrix = activations.double().flatten(2).mT
        matrix = matrix - matrix.mean(1, keepdim=True) if center else matrix
        _, _, served = _iterated(matrix, component)
        assert served.all()
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        found = eigen_cam(activations, center=center, component=component, normalize=False, return_info=True)
        theirs = (values[:, component, None] * left[:, :, component]).view_as(found.map)
        signs = (theirs * found.map).sum((1, 2)).sign()[:, None, None]
        assert torch.allclose(found.map.double(), signs * theirs, atol=1e-5 * float(values[0, 0]))
        assert torch.allclose(found.singular_values.double(), values[:, component : component + 2], rtol=1e-4)

    def test_what_does_not_converge_is_decomposed(self):
        noise = torch.randn(2, 160, 13, 13, generator=stream(0, "noise"))
        matrix = noise.double().flatten(2).mT
        assert not _iterated(matrix, 0)[2].any()
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        found = eigen_cam(noise, normalize=False).flatten(1).double()
        theirs = values[:, :1] * left[:, :, 0]
        assert torch.allclose(found, (theirs * found).sum(1, keepdim=True).sign() * theirs, atol=1e-4)
        assert not eigen_cam(torch.zeros(1, 160, 13, 13)).any()

    def test_the_iteration_ends_early_where_it_would_not_converge(self, monkeypatch):
        """Of a batch of noise, a bright region, and both in turn; each image's map is its own, whoever is beside it."""
        rounds: list[int] = []
        ritz = eigen._ritz
        monkeypatch.setattr(eigen, "_ritz", lambda *given: rounds.append(len(given[0])) or ritz(*given))
        noise = torch.randn(3, 160, 13, 13, generator=stream(0, "noise"))
        axis = torch.linspace(-1, 1, 13)
        bright = features(160, seed=3)[:, None, None] * torch.exp(-3 * (axis[:, None] ** 2 + axis**2)) + 0.3 * noise
        counts, alone = [], []
        for part in (noise, bright):
            alone.append(eigen_cam(part, center=True, normalize=False))
            assert set(rounds) == {3}
            counts.append(len(rounds))
            rounds.clear()
        hopeless, needed = counts
        assert hopeless == eigen.FIRST_ROUNDS + 1 < needed < eigen.ROUNDS
        mixed = eigen_cam(torch.stack([noise, bright], 1).flatten(0, 1), center=True, normalize=False)
        assert rounds == [6] * needed
        for found, expected in zip(mixed.unflatten(0, (3, 2)).unbind(1), alone, strict=True):
            assert torch.allclose(found, expected, atol=1e-5)

    def test_an_image_s_map_does_not_depend_on_the_pieces_it_is_taken_in(self, monkeypatch):
        activations = features(5, 160, 13, 13)
        whole = eigen_cam(activations, center=True, return_info=True)
        monkeypatch.setattr(eigen, "CACHED", 1)
        pieces = eigen_cam(activations, center=True, return_info=True)
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(whole, pieces, strict=True))
        activations[3, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="must be finite"):
            eigen_cam(activations)

    @pytest.mark.parametrize("size", [1, 2, 5, 140])
    def test_eigenvectors_one_by_one_are_those_of_all(self, size):
        square = torch.randn(2, size, size, dtype=torch.float64, generator=stream(0, "gram"))
        gram = square @ square.mT
        values, vectors = torch.linalg.eigh(gram)
        for component in {0, size // 2, size - 1}:
            found, leading = eigen._eigenpairs(eigen._gram(square), component)
            assert torch.equal(found, eigen._eigenpairs(eigen._gram(square.mT.contiguous().mT), component)[0])
            ends = torch.cat([torch.full((2, 1), math.inf), values.flip(1), torch.zeros(2, 1)], 1)
            three = ends[:, component : component + 3]
            assert torch.allclose(found, three, atol=1e-9 * float(values.max()))
            assert torch.allclose((leading * vectors[:, :, -1 - component]).sum(1).abs(), torch.ones(2).double())

    @pytest.mark.parametrize("shape", [(32, 7, 7), (160, 13, 13)])
    def test_it_agrees_with_the_package_grad_cam(self, shape):
        projection = pytest.importorskip("pytorch_grad_cam.utils.svd_on_activations").get_2d_projection
        activations = features(3, *shape)
        theirs = torch.from_numpy(projection(activations.numpy())).flatten(1)
        ours = eigen_cam(activations, center=True, normalize=False).flatten(1)
        for pair in zip(ours, theirs, strict=True):
            assert abs(torch.corrcoef(torch.stack(pair))[0, 1]) >= 0.9999

    @pytest.mark.parametrize("center", [False, True])
    def test_what_leaves_it_as_it_is(self, center):
        activations = features(12, 5, 6)
        found = eigen_cam(activations, center=center)
        channels = torch.randperm(12, generator=stream(0, "channels"))
        assert torch.allclose(eigen_cam(activations[channels], center=center), found, atol=1e-5)
        assert torch.allclose(eigen_cam(7.5 * activations, center=center), found, atol=1e-5)
        places = torch.randperm(30, generator=stream(0, "places"))
        moved = activations.flatten(1)[:, places].view(12, 5, 6)
        assert torch.allclose(eigen_cam(moved, center=center).flatten(), found.flatten()[places], atol=1e-5)
        mixing = torch.linalg.qr(torch.randn(12, 12, generator=stream(0, "mixing"))).Q
        mixed = (mixing @ activations.flatten(1)).view(12, 5, 6)
        assert torch.allclose(eigen_cam(mixed, center=center), found, atol=1e-4)

    def test_images_of_a_batch_have_nothing_to_do_with_each_other(self):
        batch = features(5, 12, 4, 4)
        for center in (False, True):
            single = torch.stack([eigen_cam(each, center=center) for each in batch])
            assert torch.allclose(eigen_cam(batch, center=center), single, atol=1e-5)

    @pytest.mark.parametrize("center", [False, True])
    def test_the_sign_is_that_of_double_precision_and_of_a_full_decomposition(self, center):
        batch = features(100, 24, 5, 5, seed=3)
        ours = eigen_cam(batch, center=center)
        assert (ours - eigen_cam(batch.double(), center=center)).abs().max() < 1e-4
        matrix = batch.double().flatten(2).mT
        matrix = matrix - matrix.mean(1, keepdim=True) if center else matrix
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        scores = values[:, :1] * left[:, :, 0]
        turn = scores.amax(1) + scores.amin(1) if center else scores.sum(1)
        scores = (scores * turn.sign()[:, None]).clamp_min(0)
        theirs = (scores - scores.amin(1, keepdim=True)) / (scores.amax(1) - scores.amin(1))[:, None]
        assert (ours.flatten(1) - theirs).abs().max() < 1e-4

    def test_rules_of_the_sign(self):
        activations = features(8, 4, 4, seed=5)
        mean = activations.mean(0).flatten()
        found = eigen_cam(activations, center=True, sign="activation", normalize=False).flatten()
        assert torch.corrcoef(torch.stack([found, mean]))[0, 1] > 0
        found = eigen_cam(activations, center=True, sign="minmax", normalize=False)
        assert found.max() >= -found.min()
        assert eigen_cam(activations, sign="sum", normalize=False).sum() > 0

    def test_nothing_and_constants_give_zeros(self):
        batch = torch.stack([torch.zeros(4, 3, 3), features(4, 3, 3)])
        found = eigen_cam(batch, return_info=True)
        assert not found.map[0].any()
        assert found.map[1].max() == 1
        assert found.degenerate.tolist() == [False, False]
        constant = torch.linspace(0, 1, 6)[:, None, None].expand(6, 4, 4)
        assert not eigen_cam(constant, center=True).any()

    @pytest.mark.parametrize("channels", [2, 49, 300])
    def test_constants_of_any_size_give_zeros_when_centred(self, channels):
        levels = 10 * torch.rand(20, channels, generator=stream(0, "levels"))
        constant = levels[:, :, None, None].expand(-1, -1, 7, 7)
        assert not eigen_cam(constant, center=True, normalize=False).any()
        small = constant + 1e-5 * torch.randn(20, channels, 7, 7, generator=stream(0, "small"))
        assert eigen_cam(small, center=True, normalize=False).flatten(1).any(1).all()

    @pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
    def test_the_sign_of_a_tie_is_the_first_places_in_every_precision(self, offset):
        """Two places are opposite after centring, whatever they hold."""
        pairs = offset + torch.rand(200, 5, 1, 2, generator=stream(0, "pairs"))
        for activations in (pairs, pairs.double()):
            found = eigen_cam(activations, center=True, normalize=False)[:, 0]
            assert (found[:, 0] > 0).all()
            assert (found[:, 1] < 0).all()

    def test_two_equal_singular_values_are_told(self):
        square = torch.eye(4).view(4, 2, 2)
        found = eigen_cam(square, return_info=True)
        assert found.degenerate.all()
        assert found.map.isfinite().all()
        wide = torch.diag(torch.tensor([3.0, 3.0, 1.0, 0.5])).view(4, 2, 2)
        degenerate = [bool(eigen_cam(wide, component=c, return_info=True).degenerate) for c in range(4)]
        assert degenerate == [True, True, False, False]

    def test_halves_are_computed_in_single_precision(self):
        activations = features(12, 5, 6)
        found = eigen_cam(activations.half())
        assert found.dtype == torch.float16
        assert torch.allclose(found.float(), eigen_cam(activations.half().float()), atol=1e-3)

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda: eigen_cam(torch.zeros(3, 4)), ValueError, r"must be \(C, h, w\) or \(batch, C, h, w\)"),
            (lambda: eigen_cam(torch.zeros(3, 1, 1)), ValueError, "at least 2 places, got 1 x 1"),
            (lambda: eigen_cam(torch.full((3, 2, 2), torch.nan)), ValueError, "must be finite"),
            (lambda: eigen_cam(torch.ones(3, 2, 2).int()), ValueError, r"floating-point numbers, got torch\.int32"),
            (lambda: eigen_cam(torch.zeros(3, 2, 2), component=3), IndexError, r"must lie in \[0, 3\), got 3"),
            (lambda: eigen_cam(torch.zeros(3, 2, 2), sign="up"), ValueError, "sign must be one of"),
            (lambda: grid_of_tokens(torch.zeros(2, 3, 4)), ValueError, "tokens must be"),
            (lambda: last_conv(nn.Linear(2, 2)), ValueError, "must hold a 2d convolution"),
            (lambda: EigenCAM(network(), []), ValueError, "target_layers must be at least 1"),
            (lambda: eigen_cam(torch.rand(0, 4, 3, 3)), ValueError, r"got shape \(0, 4, 3, 3\)"),
            (lambda: EigenCAM(network(), ["body.9"]), TypeError, "must name parts of the model, got 'body.9'"),
            (lambda: EigenCAM(network(), ["8"])(torch.rand(1, 3, 8, 8)), ValueError, "give a reshape_transform"),
            (lambda: EigenCAM(network(), [nn.ReLU()])(torch.rand(1, 3, 8, 8)), ValueError, "was never called"),
        ],
    )
    def test_what_is_refused(self, call, error, message):
        with pytest.raises(error, match=message):
            call()


class TestNetwork:
    def test_maps_have_the_size_of_the_input_and_nothing_is_left_behind(self):
        net, x = network().train(), torch.rand(3, 3, 16, 16, generator=stream(0, "x"))
        before = {name: value.clone() for name, value in net.state_dict().items()}
        cams = EigenCAM(net)(x)
        assert cams.shape == (3, 16, 16)
        assert (cams.amin((1, 2)) >= 0).all()
        assert (cams.amax((1, 2)) <= 1).all()
        assert net.training
        assert hooks(net) == 0
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        with torch.no_grad():
            assert torch.equal(EigenCAM(net)(x), cams)

    def test_it_looks_at_what_the_next_layer_sees(self):
        net, x = network().eval(), torch.rand(2, 3, 16, 16, generator=stream(0, "x"))
        with torch.no_grad():
            seen = net[:6](x)
        found = EigenCAM(net, ["4"], upsample=False)(x)  # the convolution before a ReLU in place
        assert torch.equal(found, eigen_cam(seen))

    def test_no_class_has_a_part_in_it(self):
        net, x = network(), torch.rand(2, 3, 16, 16, generator=stream(0, "x"))
        before = EigenCAM(net, ["4"])(x)
        nn.init.zeros_(net[8].weight)
        assert torch.equal(EigenCAM(net, ["4"])(x), before)

    def test_several_layers_are_averaged(self):
        net, x = network(), torch.rand(2, 3, 16, 16, generator=stream(0, "x"))
        one, two = (EigenCAM(net, [name])(x) for name in ("2", "4"))
        mean = ((one + two) / 2).flatten(1)
        low, high = mean.amin(1, keepdim=True), mean.amax(1, keepdim=True)
        expected = ((mean - low) / (high - low)).view_as(one)
        assert torch.allclose(EigenCAM(net, ["2", net[4]])(x), expected, atol=1e-6)

    def test_hooks_go_when_a_pass_fails(self):
        net = network()
        cam = EigenCAM(net, ["4"])
        with pytest.raises(RuntimeError), cam:
            cam(torch.rand(1, 2, 8, 8))
        assert hooks(net) == 0

    def test_the_last_convolution_is_the_last_that_runs(self):
        class Backwards(nn.Module):
            def __init__(self):
                super().__init__()
                self.late, self.early = nn.Conv2d(4, 4, 1), nn.Conv2d(1, 4, 1)

            def forward(self, x):
                return self.late(self.early(x))

        net = Backwards()
        assert last_conv(net) is net.early
        assert last_conv(net, torch.zeros(1, 1, 4, 4)) is net.late

    def test_a_shared_layer_counts_where_it_runs_last(self):
        relu = nn.ReLU()
        with seeded(0, "init"):
            net = nn.Sequential(nn.Conv2d(3, 6, 3), relu, nn.Conv2d(6, 8, 3), relu, nn.Flatten(), nn.LazyLinear(2))
        x = torch.rand(2, 3, 12, 12, generator=stream(0, "x"))
        net(x)
        with torch.no_grad():
            expected = eigen_cam(net[:4](x))
        cam = EigenCAM(net, upsample=False)
        assert torch.equal(cam(x), expected)
        assert cam.layers == [relu]
        assert torch.equal(cam.output, net(x))

    def test_maps_of_two_sizes_are_not_averaged(self):
        with pytest.raises(ValueError, match="maps of one size without upsample, got 16 x 16, 8 x 8"):
            EigenCAM(network(), ["2", "4"], upsample=False)(torch.rand(1, 3, 16, 16))

    def test_tokens_become_a_grid(self):
        """A layer of tokens, one for each 4x4 patch behind one that stands for the whole picture."""

        class Tokens(nn.Module):
            def __init__(self):
                super().__init__()
                self.patches = nn.Conv2d(3, 6, 4, stride=4)

            def forward(self, x):
                tokens = self.patches(x).relu().flatten(2).mT
                return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)

        net, x = Tokens(), torch.rand(2, 3, 16, 16, generator=stream(0, "x"))
        cams = EigenCAM(net, [net], reshape_transform=grid_of_tokens, upsample=False)(x)
        assert torch.allclose(cams, eigen_cam(net.patches(x).relu()), atol=1e-6)
