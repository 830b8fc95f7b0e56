"""The prototype classifier against figures by hand, scipy, invariances and finite differences."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import nn

from netwright import storage
from netwright.data import Batches, Normalise, TensorImages
from netwright.explain import (
    LitPrototypeClassifier,
    PrototypeClassifier,
    PrototypeLayer,
    PrototypeLoss,
    PrototypeOutput,
    explain_by_prototypes,
    find_prototypes,
    mnist_conv_decoder,
    mnist_conv_encoder,
)
from netwright.explain.prototypes import LazyPrototypeLayer, conv_decoder, conv_encoder, squared_distances
from netwright.explain.prototypes.explanation import as_picture
from netwright.page import Page, Section
from netwright.seeding import seeded
from netwright.train import fit

DOUBLE = torch.float64
Z = torch.tensor([[0.0, 0], [3, 4]])
P = torch.tensor([[0.0, 0], [6, 8], [3, 0]])


def drawn(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def output_of(z, prototypes, weight=None, reconstruction=None):
    distances = squared_distances(z, prototypes)
    logits = z.new_zeros(len(z), 2) if weight is None else distances @ weight.T
    return PrototypeOutput(logits, distances, z, reconstruction)


def small(decoder=True, n_prototypes=4, n_classes=3, dtype=torch.float32):
    """A classifier of vectors of 5 numbers with a latent space of 2 x 3."""
    with seeded(0, "small"):
        encoder = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Unflatten(1, (2, 3)))
        back = nn.Sequential(nn.Flatten(), nn.Linear(6, 5))
        network = PrototypeClassifier(encoder, back if decoder else None, n_prototypes, n_classes, input_shape=(5,))
    return network.to(dtype)


# Distances and terms


def test_by_hand():
    output = output_of(Z, P)
    assert torch.allclose(output.distances, torch.tensor([[0.0, 100, 9], [25, 25, 16]]), atol=1e-5)
    terms = PrototypeLoss(lambda_ae=0)(output, Z, torch.tensor([0, 1]))
    assert float(terms.r1) == pytest.approx(34 / 3)
    assert float(terms.r2) == pytest.approx(8)
    assert float(terms.cross_entropy) == pytest.approx(np.log(2))
    assert float(terms.total) == pytest.approx(20 * np.log(2) + 34 / 3 + 8, rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_distances_are_those_of_independent_packages(shift):
    z, p = drawn(60, 17) + shift, 0.5 * drawn(9, 17, seed=1) + shift
    ours = squared_distances(z, p)
    assert np.abs(ours.numpy() - cdist(z, p, "sqeuclidean")).max() < 1e-10 * (1 + shift)
    single = squared_distances(z.float(), p.float())
    assert (single >= 0).all()
    # Far from the origin, too: the expanded square alone would have lost its digits there.
    assert torch.allclose(single.double(), torch.cdist(z, p) ** 2, rtol=1e-4, atol=0)


def test_distances_close_to_prototypes_keep_their_digits_under_autocast():
    z, points = drawn(60, 40, dtype=torch.float32), drawn(15, 40, seed=1, dtype=torch.float32)
    z = points[torch.arange(60) % 15] + 0.1 * z
    exact = torch.cdist(z.double(), points.double()) ** 2
    with torch.autocast("cpu", torch.bfloat16):
        found = squared_distances(z, points)
        lent = squared_distances(z.bfloat16(), points)
    assert found.dtype == lent.dtype == torch.float32
    assert torch.allclose(found.double(), exact, rtol=1e-4)
    assert torch.allclose(lent.double(), torch.cdist(z.bfloat16().double(), points.double()) ** 2, rtol=1e-4)
    half = squared_distances(z.bfloat16(), points.bfloat16())
    assert half.dtype == torch.bfloat16
    rounded = torch.cdist(z.bfloat16().double(), points.bfloat16().double()) ** 2
    assert torch.allclose(half.double(), rounded, rtol=1e-2)


def test_a_first_batch_under_autocast_leaves_prototypes_in_single_precision():
    x = drawn(7, 5, dtype=torch.float32)
    network = PrototypeClassifier(nn.Linear(5, 6), None, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        network(x)
    assert network.prototypes.dtype == torch.float32
    assert network(x).logits.dtype == torch.float32
    half = small(decoder=False).bfloat16()
    assert half(x.bfloat16()).logits.dtype == torch.bfloat16


def test_the_gradient_where_two_points_meet_is_finite_and_zero():
    for dtype in (torch.float32, DOUBLE):
        p = drawn(3, 7, dtype=dtype).requires_grad_()
        z = p.detach()[:1].clone().requires_grad_()
        distances = squared_distances(z, p)
        assert 0 <= float(distances[0, 0].detach()) < 1e-5
        for gradient in torch.autograd.grad(distances[0, 0], (z, p)):
            assert float(gradient.abs().max()) == 0


def test_nearest_prototype_classifier():
    z = drawn(5, 3)
    network = PrototypeClassifier(nn.Identity(), None, 2, 2, input_shape=(3,)).double()
    with torch.no_grad():
        network.prototypes.copy_(z[:2])
        network.linear.weight.copy_(-torch.eye(2))
    output = network(z)
    assert torch.equal(output.logits, -output.distances)
    assert output.logits[:2].argmax(1).tolist() == [0, 1]
    assert torch.equal(network.prototype_classes(), torch.tensor([0, 1]))


def test_translation_rotation_and_permutation():
    z, p, weight = drawn(12, 6), drawn(5, 6, seed=1), drawn(2, 5, seed=2)
    labels = torch.arange(12) % 2
    loss = PrototypeLoss(lambda_ae=0)
    plain = output_of(z, p, weight)
    turn = torch.linalg.qr(drawn(6, 6, seed=3))[0]
    order = torch.tensor([3, 0, 4, 1, 2])
    changed = {
        "moved": output_of(z + 1000, p + 1000, weight),
        "turned": output_of(z @ turn, p @ turn, weight),
        "permuted": output_of(z, p[order], weight[:, order]),
    }
    for name, other in changed.items():
        tolerance = 1e-7 if name == "moved" else 1e-12
        assert torch.allclose(other.logits, plain.logits, rtol=tolerance, atol=tolerance), name
        for a, b in zip(loss(other, z, labels), loss(plain, z, labels), strict=True):
            assert torch.allclose(a, b, rtol=tolerance), name
    assert not torch.allclose(output_of(z + 1, p, weight).logits, plain.logits)


def test_prototypes_on_the_examples_cost_nothing():
    z = drawn(6, 4)
    terms = PrototypeLoss(lambda_ae=0)(output_of(z, z[[3, 0, 5, 1, 4, 2]]), z, torch.zeros(6, dtype=torch.long))
    assert float(terms.r1) < 1e-14
    assert float(terms.r2) < 1e-14


def test_reconstruction_is_summed_over_pixels():
    x = torch.zeros(3, 1, 28, 28)
    output = output_of(torch.zeros(3, 2), P, reconstruction=torch.full_like(x, 0.5))
    assert float(PrototypeLoss()(output, x, torch.tensor([0, 1, 0])).reconstruction) == 196


def test_gradients_of_the_ties_take_one_way_each():
    z, p = drawn(8, 3).requires_grad_(), drawn(4, 3, seed=1).requires_grad_()
    loss, labels = PrototypeLoss(lambda_ae=0), torch.zeros(8, dtype=torch.long)
    terms = loss(output_of(z, p), z, labels)
    nearest_z = squared_distances(z, p).argmin(0)
    nearest_p = squared_distances(z, p).argmin(1)
    r1_z, r1_p = torch.autograd.grad(terms.r1, (z, p), retain_graph=True)
    assert torch.allclose(r1_p, 2 * (p - z[nearest_z]) / 4)
    touched = torch.zeros(8, dtype=torch.bool)
    touched[nearest_z] = True
    assert torch.equal(r1_z.abs().sum(1) > 0, touched)
    (r2_z,) = torch.autograd.grad(terms.r2, z)
    assert torch.allclose(r2_z, 2 * (z - p[nearest_p]) / 8)


def test_gradcheck_of_the_total_loss():
    network, loss = small(dtype=DOUBLE), PrototypeLoss()
    x, labels = drawn(5, 5), torch.arange(5) % 3
    names = [name for name, _ in network.named_parameters()]

    def total(*values):
        output = torch.func.functional_call(network, dict(zip(names, values, strict=True)), (x,))
        return loss(output, x, labels).total

    values = tuple(p.detach().clone().requires_grad_() for p in network.parameters())
    assert torch.autograd.gradcheck(total, values)


def test_every_lambda_weighs_its_own_term():
    network, x, labels = small(), drawn(6, 5, dtype=torch.float32), torch.arange(6) % 3
    output = network(x)
    each = PrototypeLoss(2.0, 3.0, 5.0, 7.0)(output, x, labels)
    expected = 2 * each.cross_entropy + 3 * each.reconstruction + 5 * each.r1 + 7 * each.r2
    assert torch.allclose(each.total, expected)
    assert min(value.item() for value in each) > 0


def test_the_bank_is_what_r1_looks_at_besides_the_batch():
    loss, labels = PrototypeLoss(lambda_ae=0, bank_size=7), torch.zeros(4, dtype=torch.long)
    p = drawn(5, 3, seed=9).requires_grad_()
    batches = [drawn(4, 3, seed=i) for i in range(3)]
    for i, z in enumerate(batches):
        terms = loss(output_of(z, p), z, labels, p)
        seen = torch.cat(batches[: i + 1])[-(4 + 7) :] if i else z
        assert terms.r1.item() == pytest.approx(squared_distances(seen, p).amin(0).mean().item())
        assert terms.r2.item() == pytest.approx(squared_distances(z, p).amin(1).mean().item())
    assert torch.equal(loss.bank, torch.cat(batches)[-7:])
    assert torch.autograd.grad(terms.r1, p)[0].abs().sum() > 0
    other = PrototypeLoss(lambda_ae=0, bank_size=7)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.bank, loss.bank)
    other.eval()
    other(output_of(batches[0], p), batches[0], labels, p)
    assert torch.equal(other.bank, loss.bank)  # evaluation leaves it


# The classifier


def test_sizes_of_the_published_network():
    encoder, sides = mnist_conv_encoder(), []
    x = torch.rand(2, 1, 28, 28)
    for layer in encoder:
        x = layer(x)
        sides.append(tuple(x.shape[1:]))
    assert sides[1::2] == [(32, 14, 14), (32, 7, 7), (32, 4, 4), (10, 2, 2)]
    assert x.flatten(1).shape == (2, 40)
    back = []
    for layer in mnist_conv_decoder():
        x = layer(x)
        back.append(tuple(x.shape[1:]))
    assert back[::2] == [(32, 4, 4), (32, 7, 7), (32, 14, 14), (1, 28, 28)]
    assert x.min() >= 0
    assert x.max() <= 1


@pytest.mark.parametrize("size", [16, 17, (9, 30)])
def test_the_decoder_mirrors_the_encoder_at_any_size(size):
    sides = (size, size) if isinstance(size, int) else size
    x = torch.rand(2, 3, *sides)
    assert conv_decoder(3, (4, 5, 6), size)(conv_encoder(3, (4, 5, 6))(x)).shape == x.shape


def test_initialisations():
    with seeded(0, "init"):
        paper, kaiming = mnist_conv_encoder(init="paper"), mnist_conv_encoder()
    weight = paper[2].weight
    assert weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert kaiming[2].weight.std().item() == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.05)
    # An output of a transposed layer hears 9 weights of each input channel before strides, whatever comes out.
    with seeded(0, "init"):
        back = conv_decoder(64, (64, 10), 28)
    assert back[0].weight.std().item() == pytest.approx((2 / (9 * 10)) ** 0.5, rel=0.05)
    assert back[2].weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    for layer in (*paper, *mnist_conv_decoder()):
        assert getattr(layer, "bias", None) is None or not layer.bias.any()
    network = small(n_prototypes=200)
    for values in (network.prototypes, network.linear.weight):
        assert 0 <= float(values.min()) < 0.05
        assert 0.95 < float(values.max()) < 1


def test_what_the_classifier_gives():
    network, x = small(), drawn(7, 5, dtype=torch.float32)
    output = network(x)
    assert output.z.shape == (7, 6)
    assert torch.allclose(output.distances, torch.cdist(output.z, network.prototypes) ** 2, rtol=1e-4)
    assert torch.equal(output.logits, output.distances @ network.linear.weight.T)
    assert torch.equal(network.logits(x), output.logits)
    assert torch.equal(output.reconstruction, network.decoder(network.encoder(x)))
    assert torch.equal(network.decode_prototypes(), network.decoder(network.prototypes.unflatten(1, (2, 3))))
    assert small(decoder=False)(x).reconstruction is None


def test_sizes_come_from_the_first_batch_or_from_the_weights(tmp_path):
    x = drawn(7, 5, dtype=torch.float32)
    encoder = nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, (2, 3)))
    network = PrototypeClassifier(encoder, nn.Sequential(nn.Flatten(), nn.Linear(6, 5)), 4, 3)
    blank = copy.deepcopy(network)
    assert isinstance(network.prototype_layer, LazyPrototypeLayer)
    with pytest.raises(ValueError, match="give input_shape, or run one batch"):
        network.decode_prototypes()
    with pytest.raises(ValueError, match="network must know its sizes"):
        LitPrototypeClassifier(network)
    expected = network(x).logits
    assert type(network.prototype_layer) is PrototypeLayer
    assert repr(network.prototype_layer) == "PrototypeLayer(4, 6)"
    storage.write_tensors(tmp_path / "model.safetensors", network.state_dict())
    blank.load_state_dict(storage.read_tensors(tmp_path / "model.safetensors"))
    assert torch.equal(blank.decode_prototypes(), network.decode_prototypes())
    assert torch.equal(blank(x).logits, expected)


def images(count=60, seed=0):
    values = torch.randint(0, 256, (count, 1, 5, 1), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return TensorImages(values, torch.arange(count) % 3)


def flat(decoder=True):
    """The small classifier on pictures of 5 x 1 pixels."""
    network = small(decoder)
    network.encoder = nn.Sequential(nn.Flatten(), *network.encoder)
    if decoder:
        network.decoder = nn.Sequential(network.decoder, nn.Unflatten(1, (1, 5, 1)))
    network.input_shape = (1, 5, 1)
    return network


@pytest.mark.parametrize("batch", [7, 60])
def test_nearest_training_is_that_of_all_distances(batch):
    network, data = flat(), images()
    loader = Batches(data, batch, shuffle=False, drop_last=False)
    found = network.nearest_training(loader, k=9)
    x = data.images.float() / 255
    with torch.no_grad():
        z = network.encode(x)
        distances, places = torch.sort(squared_distances(z, network.prototypes).T, stable=True)
    assert torch.equal(found.places, places[:, :9])
    assert torch.allclose(found.distances, distances[:, :9], rtol=1e-5)
    assert torch.equal(found.labels, data.labels[places[:, :9]])
    assert torch.equal(found.inputs, x[places[:, :9]])
    assert torch.allclose(found.encodings, z[places[:, :9]])
    expected = [np.bincount(data.labels[row]).argmax() for row in places[:, :9].numpy()]
    assert found.majority.tolist() == expected
    assert found.agreement == np.mean(network.prototype_classes().numpy() == expected)
    json.dumps(found.to_dict())
    assert "classes of the nearest" in str(found)
    with pytest.raises(ValueError, match="loader must hold at least k = 61 examples, got 60"):
        network.nearest_training(loader, k=61)


def test_projection_makes_prototypes_of_real_cases():
    network, data = flat(), images()
    loader = Batches(data, 16, shuffle=False, drop_last=False)
    before = network.nearest_training(loader)
    network.project(loader)
    after = network.nearest_training(loader)
    assert torch.equal(network.prototypes, before.encodings[:, 0])
    assert isinstance(network.prototypes, nn.Parameter)
    assert float(after.distances.max()) < 1e-6
    assert torch.equal(after.places, before.places)


# Explanations


def test_contributions_sum_to_the_logit():
    network, x = small(), drawn(7, 5, dtype=torch.float32)
    network.train()
    found = network.explain(x, nearest=2, classes=["a", "b", "c"])
    assert network.training
    assert torch.allclose(found.contributions.sum(2), network(x).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.contributions[3, 1], network.linear.weight[1] * found.distances[3])
    assert torch.equal(found.nearest, found.distances.sort(1).indices[:, :2])
    best = found.logits.argmax(1)
    assert found.predicted == tuple("abc"[i] for i in best.tolist())
    case = found.cases(4)[0]
    assert case.prototype == int(found.nearest[4, 0])
    assert case.label == "abc"[int(network.prototype_classes()[case.prototype])]
    assert case.contribution == pytest.approx(float(found.contributions[4, best[4], case.prototype]))
    told = json.loads(json.dumps(found.to_dict()))
    assert told["examples"][4]["nearest"][0]["distance"] == pytest.approx(case.distance)
    assert str(found).count("\n") == 7


def test_the_class_of_a_prototype_is_where_its_weight_is_least():
    network = small()
    with torch.no_grad():
        network.linear.weight.copy_(torch.tensor([[1.0, -2, 0, 3], [0, -1, -1, 2], [-1, 0, 1, 1]]))
    assert network.prototype_classes().tolist() == [2, 0, 1, 2]


def test_a_network_that_holds_prototypes_explains_itself():
    inner = flat()
    whole = nn.Sequential(Normalise([0.4], [0.2]), inner)
    data = images(6).images
    found = explain_by_prototypes(whole, data, nearest=3)
    direct = inner.explain(Normalise([0.4], [0.2])(data))
    assert torch.equal(found.distances, direct.distances)
    assert torch.equal(found.inputs, direct.inputs)
    trained = LitPrototypeClassifier(inner)  # which asks for the logits alone
    assert torch.equal(explain_by_prototypes(trained, direct.inputs).distances, direct.distances)
    assert find_prototypes(trained) is inner
    assert not inner.encoder._forward_hooks
    with pytest.raises(ValueError, match="model must hold a PrototypeClassifier, got Linear without one"):
        explain_by_prototypes(nn.Linear(2, 2), data)


def test_pictures_and_page_blocks():
    network = PrototypeClassifier(mnist_conv_encoder(), mnist_conv_decoder(), 15, 10, input_shape=(1, 28, 28))
    x = torch.rand(30, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    found = network.explain(x, nearest=4, classes=[f"class {i}" for i in range(10)])
    ax = found.plot(example=2)
    assert len(ax.images) == 5
    words = [text.get_text() for text in ax.texts]
    assert words[0] == f"taken for\n{found.predicted[2]}"
    assert words[1] == f"{found.cases(2)[0].label}\nat {found.cases(2)[0].distance:.3g}"
    block = found.images(2)
    assert len(block.items) == 5
    assert f"prototype {found.cases(2)[3].prototype}," in block.items[4].caption
    html = Page("title", "verdict", [Section("section", [block])]).html()
    assert html.count("data:image/png") == 5
    near = network.nearest_training([(x, torch.arange(30) % 10)], k=3)
    assert len(near.plot().images) == 15 * 4
    without = small(decoder=False).explain(drawn(3, 5, dtype=torch.float32))
    assert len(without.plot(example=1).patches) == 3
    with pytest.raises(ValueError, match="decoder must be given to show prototypes"):
        without.images()
    with pytest.raises(IndexError, match=r"example must lie in \[0, 30\), got 30"):
        found.plot(example=30)
    assert as_picture(torch.rand(4, 6)).shape == (1, 4, 6)
    assert small().explain(drawn(2, 5, dtype=torch.float32)).plot() is not None  # vectors are drawn as sequences


# Training


def test_training_lowers_every_term_and_goes_on_bit_for_bit(tmp_path):
    data = images(90)

    def trained(epochs, checkpoint=None):
        network = flat()
        module = LitPrototypeClassifier(network, PrototypeLoss(bank_size=20), lr=1e-2)
        loader = Batches(data, 15, seed=1)
        return network, fit(module, loader, epochs=epochs, seed=1, checkpoint=checkpoint)

    whole, history = trained(12)
    for name in ("train_loss", "reconstruction", "r1", "r2"):
        assert history.column(name)[-1] < history.column(name)[0], name
    trained(5, tmp_path / "c.ckpt")
    resumed, _ = trained(12, tmp_path / "c.ckpt")
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_validation_figures_and_no_decoder():
    network = flat(decoder=False)
    module = LitPrototypeClassifier(network)
    assert module.loss.lambda_ae == 0
    data = Batches(images(), 20)
    history = fit(module, data, epochs=1, validation=data)
    assert {"val_loss", "val_accuracy"} <= set(history.last)
    assert torch.equal(module(torch.zeros(1, 1, 5, 1)), network.logits(torch.zeros(1, 1, 5, 1)))


def test_explaining_needs_no_training_engine():
    code = "import sys, netwright.explain.prototypes as p; p.PrototypeClassifier; print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrototypeLayer(0, 4), "n_prototypes must be >= 1, got 0"),
        (lambda: PrototypeLayer(4, 0), "dim must be >= 1, got 0"),
        (lambda: LazyPrototypeLayer(0), "n_prototypes must be >= 1, got 0"),
        (lambda: PrototypeLayer(4, 3)(torch.zeros(2, 5)), r"z must have shape \(batch, 3\), got \(2, 5\)"),
        (lambda: squared_distances(Z, torch.zeros(3, 5)), r"rows of one length, got \(2, 2\) and \(3, 5\)"),
        (lambda: PrototypeClassifier(nn.Identity(), None, 0, 1), "n_prototypes must be >= 1, got 0"),
        (lambda: PrototypeClassifier(nn.Identity(), None, 2, 0), "n_classes must be >= 1, got 0"),
        (lambda: small()(torch.zeros(0, 5)), "x must hold at least 1 example, got 0"),
        (lambda: small(decoder=False).decode_prototypes(), "decoder must be given to decode, got None"),
        (lambda: small().explain(torch.zeros(1, 5), nearest=5), r"nearest must lie in 1..4, got 5"),
        (lambda: small().explain(torch.zeros(1, 5), classes=["a"]), "classes must be 3 names, got 1"),
        (lambda: small().nearest_training([], k=0), "k must be >= 1, got 0"),
        (lambda: small().project([]), "loader must hold at least k = 1 examples, got 0"),
        (
            lambda: PrototypeClassifier(nn.Identity(), nn.Linear(4, 3), 2, 2, input_shape=(4,)),
            r"decoder must give the input's shape \(1, 4\), got \(1, 3\)",
        ),
        (lambda: PrototypeLoss(lambda_1=-1), "lambda_1 must be >= 0, got -1"),
        (lambda: PrototypeLoss(float("nan")), "lambda_class must be >= 0, got nan"),
        (lambda: PrototypeLoss(bank_size=-1), "bank_size must be >= 0, got -1"),
        (lambda: PrototypeLoss()(output_of(Z, P), Z, torch.tensor([0, 1])), "lambda_ae must be 0 without a decoder"),
        (
            lambda: PrototypeLoss()(output_of(Z, P, reconstruction=Z[:, :1]), Z, torch.tensor([0, 1])),
            r"reconstruction must have the input's shape \(2, 2\), got \(2, 1\)",
        ),
        (lambda: PrototypeLoss()(output_of(Z[:0], P), Z[:0], torch.tensor([])), "at least 1 example, got 0"),
        (
            lambda: PrototypeLoss(lambda_ae=0, bank_size=3)(output_of(Z, P), Z, torch.tensor([0, 1])),
            "prototypes must be given with bank_size > 0, got bank_size 3",
        ),
        (lambda: LitPrototypeClassifier(small(), lr=0), "lr must be > 0, got 0"),
        (lambda: mnist_conv_encoder(0), r"channels and maps must be >= 1.* got 1 and \(32, 32, 32, 0\)"),
        (lambda: mnist_conv_encoder(init="he"), "init must be one of paper, kaiming, got 'he'"),
        (lambda: conv_decoder(1, (4,), 0), "size must be >= 1 on both sides, got 0"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_encodings_of_another_shape_are_refused():
    network = PrototypeClassifier(nn.Identity(), None, 3, 2)
    network(torch.rand(2, 4))
    with pytest.raises(ValueError, match=r"encodings must have shape \(4,\), got \(2, 2\)"):
        network(torch.rand(2, 2, 2))


def test_fewer_prototypes_than_classes_is_warned_of():
    with pytest.warns(UserWarning, match="2 prototypes cannot stand for 3 classes"):
        PrototypeClassifier(nn.Identity(), None, 2, 3)
