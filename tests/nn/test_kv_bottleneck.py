"""The key-value bottleneck beside closed forms, scipy, scikit-learn and an independent implementation."""

import copy
import io
import math
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.cluster.vq import vq
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.nn import functional
from torchvision.models import VisionTransformer

from netwright.nn.kv_bottleneck import DKVBClassifier, KeyValueBottleneck, embeddings, fit_keys, lookup, nearest_keys
from netwright.nn.resnet import resnet18_cifar
from netwright.seeding import seeded, stream


def random(*shape, name="data", dtype=torch.float32):
    return torch.randn(*shape, generator=stream(0, name), dtype=dtype)


def on_a_line(keys, values=None, codebooks=1, **options):
    """Codebooks that all see one number and have the same keys."""
    values = torch.zeros(len(keys), 2) if values is None else torch.tensor(values)
    options = {"projection": "none", "value_dim": values.shape[1]} | options
    layer = KeyValueBottleneck(1, len(keys), codebooks, **options)
    layer.set_keys(torch.tensor(keys).view(1, -1, 1).expand(codebooks, -1, 1))
    with torch.no_grad():
        layer.values.copy_(values.repeat(codebooks, 1))
    return layer


def bottleneck(in_dim=12, pairs=9, codebooks=5, frozen=True, dtype=torch.float32, **options):
    options = {"value_dim": 3, "value_init": "normal", "generator": stream(0, "init")} | options
    layer = KeyValueBottleneck(in_dim, pairs, codebooks, **options).to(dtype)
    layer.init_keys(random(60, in_dim, name="first", dtype=dtype), stream(0, "keys"))
    if frozen:
        layer.freeze_keys()
    return layer


def design_matrix(codes, pairs):
    """phi(z) / C as a scipy matrix."""
    batch, books = codes.shape
    columns = (codes.numpy() + np.arange(books) * pairs).ravel()
    data = np.full(batch * books, 1 / books)
    return sparse.csr_matrix((data, columns, np.arange(0, batch * books + 1, books)), (batch, books * pairs))


def test_the_nearest_key_gives_its_value_and_ties_go_to_the_first():
    layer = on_a_line([0.0, 10.0], [[1.0, 0.0], [0.0, 1.0]])
    out, codes = layer(torch.tensor([[4.0], [6.0], [5.0]]), return_indices=True)
    assert out.tolist() == [[1, 0], [0, 1], [1, 0]]
    assert codes.flatten().tolist() == [0, 1, 0]
    assert on_a_line([3.0, 3.0, 3.0]).encode(torch.tensor([[1.0]])).item() == 0


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_ties_of_whole_numbers_go_to_the_first(seed):
    generator = torch.Generator().manual_seed(seed)
    dim = 1 + seed % 3
    heads, keys = (torch.randint(-20, 40, (3, count, dim), generator=generator) for count in (50, 1 + seed % 40))
    distances = (heads[:, :, None] - keys[:, None]).square().sum(3).numpy()
    assert (nearest_keys(heads.float(), keys.float()).numpy() == distances.argmin(2)).all(), "NumPy's is the first"


def test_a_tie_that_the_mean_of_the_keys_would_break():
    keys = torch.tensor([4.0, 16, 21, 5, 11, 14, 39]).view(1, -1, 1)
    assert nearest_keys(torch.full((1, 1, 1), 8.0), keys).item() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [64, lookup.CACHED])
def test_of_equal_keys_the_first_is_found_in_batches_of_any_size(dtype, limit, monkeypatch):
    monkeypatch.setattr(lookup, "CACHED", limit)
    layer = KeyValueBottleneck(12, 10, 16, generator=stream(0, "init")).to(dtype)
    layer.init_keys(random(5, 12, name="first", dtype=dtype), stream(0, "keys"))
    z = random(100, 12, name="z", dtype=dtype)
    codes = layer.encode(z)
    assert lookup.repeated(layer.keys).any(1).all()
    assert not lookup.repeated(layer.keys).gather(1, codes.T).any()
    assert torch.equal(codes, torch.cat([layer.encode(one[None]) for one in z]))


def test_repeated_keys():
    keys = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-0.0, 1.0], [0.0, 1.0], [1.0, 1e-30]])
    both = torch.stack([keys, keys.flip(0)])
    expected = [[False, False, True, True, False], [False, False, True, False, True]]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert lookup.repeated(both.to(dtype)).tolist() == expected
    compiled = torch.compile(lookup.repeated, backend="eager", fullgraph=True)
    assert compiled(both).tolist() == expected
    assert not lookup.repeated(both[:, :1]).any()


def test_a_layer_that_has_not_run_is_exported_to_onnx(tmp_path):
    layer, z = bottleneck().eval(), random(7, 12, name="z")
    torch.onnx.export(layer, (z,), tmp_path / "layer.onnx", dynamo=True, verbose=False)
    (found,) = onnxruntime.InferenceSession(tmp_path / "layer.onnx").run(None, {"z": z.numpy()})
    assert np.allclose(found, layer(z).detach(), atol=1e-6)


def test_frozen_keys_some_of_which_are_equal_are_exported_before_they_ran(tmp_path):
    layer = KeyValueBottleneck(12, 10, 16, generator=stream(0, "init"))
    layer.init_keys(random(5, 12, name="first"), stream(0, "keys"))
    with torch.no_grad():
        layer.values.copy_(random(*layer.values.shape, name="values"))
    layer.freeze_keys()
    z = random(100, 12, name="z")
    expected = layer.eval()(z).detach()
    copied = KeyValueBottleneck(12, 10, 16, generator=stream(1, "init")).eval()
    copied.load_state_dict(layer.state_dict())
    torch.onnx.export(copied, (z,), tmp_path / "layer.onnx", dynamo=True, verbose=False)
    stored = map(onnx.numpy_helper.to_array, onnx.load(tmp_path / "layer.onnx").graph.initializer)
    ruled_out = sum(int(np.isneginf(array).sum()) for array in stored if array.dtype == np.float32)
    assert ruled_out == int(lookup.repeated(layer.keys).sum()) > 0
    (found,) = onnxruntime.InferenceSession(tmp_path / "layer.onnx").run(None, {"z": z.numpy()})
    assert np.allclose(found, expected, atol=1e-6)


def test_one_step_moves_what_was_fetched_and_nothing_else():
    for is_sparse in (False, True):
        layer = on_a_line([0.0, 10.0], codebooks=2, sparse=is_sparse)
        layer.freeze_keys()
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        functional.cross_entropy(layer(torch.tensor([[1.0]])), torch.tensor([0])).backward()
        assert layer.values.grad.is_sparse == is_sparse
        assert layer.values.grad.to_dense()[0].tolist() == [-0.25, 0.25]
        optimizer.step()
        assert layer.values.tolist() == [[0.25, -0.25], [0, 0], [0.25, -0.25], [0, 0]]


def test_sparse_adam_takes_the_sparse_gradient():
    layer = on_a_line([0.0, 10.0], codebooks=2, sparse=True)
    layer.freeze_keys()
    optimizer = torch.optim.SparseAdam([layer.values], lr=0.5)
    functional.cross_entropy(layer(torch.tensor([[1.0]])), torch.tensor([0])).backward()
    optimizer.step()
    expected = torch.tensor([[0.5, -0.5], [0, 0], [0.5, -0.5], [0, 0]])
    assert torch.allclose(layer.values, expected, rtol=0, atol=1e-6)


def test_inputs_without_a_common_cell_do_not_interfere():
    layer = on_a_line([0.0, 10.0], [[0.3, 0.1], [0.2, 0.7]], codebooks=3)
    near, far = torch.tensor([[1.0]]), torch.tensor([[9.0]])
    before = layer(far).detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=5.0)
    functional.cross_entropy(layer(near), torch.tensor([0])).backward()
    optimizer.step()
    assert torch.equal(layer(far), before)
    assert layer(near)[0, 0] > 0.4


@pytest.mark.parametrize("loss", ["cross-entropy", "squared error"])
def test_a_single_cell_learns_the_frequencies(loss):
    """Closed form: softmax(v) are the class frequencies; under squared error v is the mean target."""
    layer = on_a_line([0.0], [[0.0, 0.0, 0.0]])
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2])
    z = random(10, 1)
    target = functional.one_hot(labels, 3).float()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        out = layer(z)
        value = (
            functional.cross_entropy(out, labels)
            if loss == "cross-entropy"
            else (out - target).square().sum(1).mean() / 4
        )
        value.backward()
        optimizer.step()
    found = layer.values.softmax(1) if loss == "cross-entropy" else layer.values
    assert torch.allclose(found[0], torch.tensor([0.5, 0.3, 0.2]), atol=1e-4)


def test_the_loss_is_convex_in_the_values():
    """Full batch from two starts: the same training loss, and the same outputs."""
    z, labels = random(40, 12, name="z"), torch.arange(40) % 3
    losses, outputs = [], []
    for init in ("zeros", "normal"):
        layer = bottleneck(pairs=4, codebooks=3, value_init=init)
        codes = layer.encode(z)
        optimizer = torch.optim.SGD(layer.parameters(), lr=9.0)
        for _ in range(2000):
            optimizer.zero_grad()
            loss = functional.cross_entropy(layer.fetch(codes), labels)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        outputs.append(layer(z).softmax(1).detach())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] < 0.95 * math.log(3)
    assert torch.allclose(*outputs, atol=1e-3)


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("positions", [None, 4])
def test_it_is_a_linear_model_of_one_hot_codes(is_sparse, positions):
    layer = bottleneck(sparse=is_sparse)
    z = random(7, *([] if positions is None else [positions]), 12, name="z")
    out, codes = layer(z, return_indices=True)
    rows = design_matrix(codes.flatten(0, -2), layer.num_pairs)
    values = layer.values.detach().numpy().astype(np.float64)
    expected = (rows @ values).reshape(7, -1, 3).mean(1)
    assert np.allclose(out.detach().numpy(), expected, rtol=0, atol=1e-6)
    upstream = random(7, 3, name="upstream")
    (gradient,) = torch.autograd.grad(out, layer.values, upstream)
    spread = upstream.double().numpy().repeat(positions or 1, 0) / (positions or 1)
    assert np.allclose(gradient.to_dense().numpy(), rows.T @ spread, rtol=0, atol=1e-6)


def test_codebooks_apart_average_to_the_pooled_output():
    z = random(7, 4, 12, name="z")
    apart = bottleneck(pool=None)
    found = apart(z)
    assert found.shape == (7, 5, 3)
    assert torch.allclose(found.mean(1), bottleneck()(z), atol=1e-6)
    assert torch.allclose(apart(z[:, :1]), apart(z[:, 0]))
    book, code = 3, int(apart.encode(z[:, 0])[2, 3])
    assert torch.equal(apart(z[:, 0])[2, book], apart.values[book * 9 + code])


def test_codes_are_those_of_scipy_and_scikit_learn():
    layer = bottleneck(in_dim=20, pairs=50, codebooks=6, dtype=torch.float64)
    z = random(300, 20, name="z", dtype=torch.float64)
    codes = layer.encode(z)
    assert codes.dtype == torch.int64
    for book in range(6):
        heads, keys = (z @ layer.projections[book].T).numpy(), layer.keys[book].numpy()
        assert np.array_equal(codes[:, book], vq(heads, keys)[0])
        assert np.array_equal(codes[:, book], NearestNeighbors(n_neighbors=1).fit(keys).kneighbors(heads)[1][:, 0])


@pytest.mark.parametrize("limit", [1, 40, 10_000])
def test_blocks_of_the_lookup_do_not_change_it(limit, monkeypatch):
    heads, keys = random(5, 30, 3, name="heads"), random(5, 8, 3, name="keys")
    expected = torch.cdist(heads, keys).argmin(2)
    monkeypatch.setattr(lookup, "CACHED", limit)
    assert torch.equal(nearest_keys(heads, keys), expected)
    assert nearest_keys(heads[:, :0], keys).shape == (5, 0)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_numbering_and_place_do_not_matter(seed):
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 7, 3, generator=generator), torch.randn(2, 7, 4, generator=generator)
    z = torch.randn(9, 6, generator=generator)

    def output(keys, values, z):
        layer = KeyValueBottleneck(6, 7, 2, value_dim=4, projection="split")
        layer.set_keys(keys)
        with torch.no_grad():
            layer.values.copy_(values.flatten(0, 1))
        return layer(z).detach()

    before = output(keys, values, z)
    order = torch.randperm(7, generator=generator)
    assert torch.equal(output(keys[:, order], values[:, order], z), before)
    shift = 3 * torch.randn(2, 3, generator=generator)
    assert torch.equal(output(keys + shift[:, None], values, z + shift.flatten()), before)


def test_far_from_the_origin_no_digits_are_lost():
    """Without centring, |k|^2 / 2 would have an error of about 30 here."""
    keys = torch.tensor([[[0.0], [1.0], [2.0]]]) + 2.0**14
    assert nearest_keys(torch.tensor([[[0.4], [0.6], [1.6]]]) + 2.0**14, keys).tolist() == [[0, 1, 2]]


def test_projections_have_xaviers_deviation_and_stay():
    layer = KeyValueBottleneck(200, 4, 50, key_dim=8, generator=stream(0, "init"))
    assert layer.projections.std().item() == pytest.approx(math.sqrt(2 / 208), rel=0.02)
    z = random(5, 200)
    assert torch.allclose(layer.heads(z)[7], z @ layer.projections[7].T, atol=1e-5)
    assert "projections" not in dict(layer.named_parameters())
    assert (layer.values == 0).all()
    assert KeyValueBottleneck(8, 64, 8, value_init="normal").values.std().item() == pytest.approx(1, rel=0.1)


def test_split_heads_are_parts_and_whole_heads_are_all():
    z = random(5, 12)
    assert torch.equal(KeyValueBottleneck(12, 4, 3, projection="split").heads(z)[1], z[:, 4:8])
    whole = KeyValueBottleneck(12, 4, 3, projection="none").heads(z)
    assert whole.shape == (3, 5, 12)
    assert all(torch.equal(head, z) for head in whole)


def test_without_decay_a_step_is_one_of_lloyds():
    z, keys = random(200, 4, name="z", dtype=torch.float64), random(15, 4, name="keys", dtype=torch.float64)
    layer = KeyValueBottleneck(4, 15, 1, projection="none", decay=0.0, epsilon=0.0, dead_threshold=0.0).double()
    layer.set_keys(keys[None])
    distance = layer.update_keys(z)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one iteration does not converge
        peer = KMeans(15, init=keys.numpy(), n_init=1, max_iter=1, algorithm="lloyd").fit(z.numpy())
    used = np.unique(vq(z.numpy(), keys.numpy())[0])
    assert np.allclose(layer.keys[0].numpy()[used], peer.cluster_centers_[used], atol=1e-5)
    assert float(distance) == pytest.approx(float((vq(z.numpy(), keys.numpy())[1] ** 2).mean()))


def test_a_key_without_heads_stays_without_decay():
    layer = on_a_line([0.0, 100.0], decay=0.0, dead_threshold=0.0)
    layer.update_keys(torch.tensor([[1.0], [3.0]]))
    assert layer.keys.flatten().tolist() == pytest.approx([2, 100], rel=1e-4)


def test_moving_averages_by_hand():
    layer = on_a_line([2.0], decay=0.5)
    layer.update_keys(torch.tensor([[4.0], [6.0]]))
    assert (layer.key_counts.item(), layer.key_sums.item(), layer.keys.item()) == (1.5, 6.0, 4.0)


def test_smoothing_by_hand():
    """N = (1.5, 0.5), M = (3, 5) after a step; Laplace smoothing with epsilon 0.1 over two keys."""
    layer = on_a_line([2.0, 10.0], decay=0.5, epsilon=0.1, dead_threshold=0.0)
    layer.update_keys(torch.tensor([[1.0], [3.0]]))
    assert layer.key_counts.flatten().tolist() == [1.5, 0.5]
    assert layer.key_sums.flatten().tolist() == [3.0, 5.0]
    expected = [m / ((n + 0.1) / (2 + 0.2) * 2) for m, n in ((3.0, 1.5), (5.0, 0.5))]
    assert layer.keys.flatten().tolist() == pytest.approx(expected)


def test_dead_keys_move_to_heads_of_the_batch():
    layer = on_a_line([0.0, 1000.0], decay=0.5, dead_threshold=0.9)
    z = torch.tensor([[1.0], [3.0], [5.0]])
    layer.update_keys(z, stream(0, "dead"))
    counts, keys = layer.key_counts.flatten().tolist(), layer.keys.flatten().tolist()
    assert counts == pytest.approx([2.0, 0.9])
    assert keys[1] in (1.0, 3.0, 5.0)
    assert layer.key_sums.flatten().tolist() == pytest.approx([4.5, 0.9 * keys[1]])
    assert keys[0] == pytest.approx(2.25, rel=1e-4)


def test_a_key_that_no_head_is_near_is_found_by_default():
    layer = on_a_line([0.0, 1000.0])
    z = random(50, 1)
    for step in range(80):
        layer.update_keys(z, stream(0, "dead", step))
    assert layer.keys.abs().max() < 10
    assert (layer.perplexity() > 1.3).all()


def test_keys_start_where_they_are_told():
    sample = bottleneck(frozen=False)
    first = sample.heads(random(60, 12, name="first"))
    for book in range(5):
        assert (sample.keys[book][:, None] == first[book]).all(2).any(1).all()
        assert len(sample.keys[book].unique(dim=0)) == 9
    means = bottleneck(key_init="kmeans", frozen=False)
    error = [torch.cdist(first, layer.keys).amin(2).square().mean() for layer in (sample, means)]
    assert error[1] < 0.8 * error[0]
    many = KeyValueBottleneck(12, 4000, 1, key_dim=3, key_init="normal", generator=stream(0, "init"))
    batch = 5 + 2 * random(500, 12)
    many.init_keys(batch, stream(0, "keys"))
    seen = many.heads(batch)
    assert torch.allclose(many.keys.mean(1), seen.mean(1), atol=0.3)
    assert torch.allclose(many.keys.std(1), seen.std(1), rtol=0.1)


def test_too_few_embeddings_are_drawn_again_with_a_warning(capsys):
    layer = KeyValueBottleneck(6, 10, 2, key_dim=3)
    layer.init_keys(random(4, 6))
    assert "10 keys start from 4 embeddings" in capsys.readouterr().err
    assert all(len(keys.unique(dim=0)) <= 4 for keys in layer.keys)


def frozen_state(layer):
    return {k: v.clone() for k, v in layer.state_dict().items() if k != "values"}


def test_frozen_keys_stay_whatever_the_mode_and_after_a_state_dict():
    layer = bottleneck()
    other = KeyValueBottleneck(12, 9, 5, value_dim=3)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for each in (layer, other, copy.deepcopy(layer)):
        assert each.keys_frozen
        before, values = frozen_state(each), each.values.detach().clone()
        each.train()
        optimizer = torch.optim.SGD(each.parameters(), lr=1.0)
        for step in range(100):
            optimizer.zero_grad()
            z = random(8, 12, name=f"step {step}")
            functional.cross_entropy(each(z), torch.arange(8) % 3).backward()
            optimizer.step()
        assert all(torch.equal(v, before[k]) for k, v in frozen_state(each).items())
        assert not torch.equal(each.values, values)
        for change, argument in ((each.update_keys, z), (each.init_keys, z), (each.set_keys, each.keys)):
            with pytest.raises(RuntimeError, match="frozen"):
                change(argument)


def test_a_lookup_that_was_prepared_is_forgotten_when_keys_are_loaded_or_cast():
    layer, other = bottleneck(), bottleneck(in_dim=12, generator=stream(5, "init"))
    z = random(30, 12, name="z")
    layer(z)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(z), other(z))
    assert torch.equal(layer.double().encode(z.double()), other.double().encode(z.double()))


def test_usage_and_perplexity():
    layer = on_a_line([0.0, 10.0, 20.0], codebooks=2)
    codes = layer.encode(torch.tensor([[1.0], [11.0], [9.0], [-5.0]]))
    assert layer.usage(codes).tolist() == [[0.5, 0.5, 0]] * 2
    assert layer.perplexity(codes).tolist() == pytest.approx([2, 2])
    assert layer.perplexity().tolist() == pytest.approx([3, 3])


def test_codes_are_kept_small_and_give_the_same():
    layer = bottleneck()
    z = random(6, 2, 12, name="z")
    codes = layer.encode(z)
    assert layer.code_dtype == torch.int16
    assert torch.equal(layer.fetch(codes.to(torch.int16)), layer(z))
    assert KeyValueBottleneck(2, 40_000, 1, key_dim=1).code_dtype == torch.int32


def test_nothing_of_the_keys_depends_on_autocast():
    def moved():
        layer = bottleneck(in_dim=64, pairs=200, codebooks=4, frozen=False)
        layer.update_keys(z, stream(0, "dead"))
        return layer.encode(z), layer.keys

    z = random(200, 64, name="z")
    expected = moved()
    with torch.autocast("cpu", torch.bfloat16):
        found = moved()
        assert (z @ z.T).dtype == torch.bfloat16
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_an_independent_implementation_gives_the_same():
    peer = pytest.importorskip("discrete_key_value_bottleneck_pytorch")
    theirs = peer.DiscreteKeyValueBottleneck(
        8, dim_embed=20, num_memories=16, num_memory_codebooks=4, dim_memory=5, codebook_dim=8
    ).eval()
    layer = KeyValueBottleneck(20, 16, 4, value_dim=5, key_dim=8)
    layer.set_keys(random(4, 16, 8, name="keys"))
    theirs.rand_proj.copy_(layer.projections.mT)
    theirs.vq._codebook.embed.data.copy_(layer.keys)
    theirs.vq._codebook.initted.fill_(True)
    with torch.no_grad():
        layer.values.copy_(theirs.values.flatten(0, 1))
        z = random(30, 1, 20, name="z")
        assert torch.allclose(layer(z), theirs(z)[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_dim": 0}, "in_dim must be >= 1, got 0"),
        ({"num_pairs": 0}, "num_pairs must be >= 1, got 0"),
        ({"num_codebooks": -1}, "num_codebooks must be >= 1, got -1"),
        ({"value_dim": 0}, "value_dim must be >= 1, got 0"),
        ({"key_dim": 0}, "key_dim must be >= 1, got 0"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), got 1.0"),
        ({"decay": float("nan")}, "decay must lie"),
        ({"dead_threshold": -1.0}, "dead_threshold must be >= 0"),
        ({"epsilon": -1.0}, "epsilon must be >= 0"),
        ({"projection": "split", "num_codebooks": 5}, r"multiple of num_codebooks \(5\) to be split, got 12"),
        ({"projection": "split", "num_codebooks": 4, "key_dim": 4}, "key_dim must be 3 with projection='split', got 4"),
        ({"projection": "linear"}, "projection must be one of random, split, none, got 'linear'"),
        ({"pool": "max"}, "pool must be 'mean' or None, got 'max'"),
        ({"value_init": "ones"}, "value_init must be one of"),
        ({"key_init": "ones"}, "key_init must be one of"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        KeyValueBottleneck(**{"in_dim": 12, "num_pairs": 4, "num_codebooks": 3} | options)


def test_bad_calls():
    layer = KeyValueBottleneck(12, 4, 3)
    z = random(5, 12)
    for call in (layer, layer.update_keys, lambda _: layer.freeze_keys(), lambda _: layer.usage()):
        with pytest.raises(RuntimeError, match="no places yet"):
            call(z)
    with pytest.raises(ValueError, match="at least 1 embedding"):
        layer.init_keys(z[:0])
    layer.init_keys(z)
    with pytest.raises(ValueError, match=r"\(batch, \[positions,\] 12\), got \(5, 11\)"):
        layer(z[:, :11])
    with pytest.raises(ValueError, match="z must be finite, got 2 numbers"):
        layer(z.index_put((torch.tensor([0, 1]), torch.tensor([3, 3])), torch.tensor(float("nan"))))
    with pytest.raises(ValueError, match=r"codes must have shape \(batch, \[positions,\] 3\)"):
        layer.fetch(torch.zeros(5, 4, dtype=torch.long))
    for wrong, found in ((4, r"0\.\.4"), (-1, r"-1\.\.0"), (2**32, r"0\.\.4294967296")):
        with pytest.raises(ValueError, match=rf"codes must lie in 0\.\.3, got {found}"):
            layer.fetch(torch.tensor([[0, 0, 0], [0, wrong, 0]]))
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"codes must hold integers, got {dtype}"):
            layer.fetch(torch.zeros(5, 3, dtype=dtype))
    assert layer.fetch(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 10)
    with pytest.raises(ValueError, match="keys must be finite and of shape"):
        layer.set_keys(torch.zeros(3, 4, 7))


def encoder():
    return nn.Sequential(nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU())


def test_the_encoder_is_frozen_whatever_the_mode():
    model = DKVBClassifier(encoder(), bottleneck(value_dim=3))
    before = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    x = random(6, 1, 6, 6, name="x").requires_grad_()
    model.train()
    out = model(x)
    functional.cross_entropy(out, torch.arange(6) % 3).backward()
    assert x.grad is None
    assert all(torch.equal(v, before[k]) for k, v in model.encoder.state_dict().items())
    assert not model.encoder[1].training
    assert model.bottleneck.training
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["bottleneck.values"]


def test_maps_become_positions_and_layers_are_named():
    net, x = encoder().eval(), random(2, 1, 6, 6, name="x")
    z = embeddings(net, x)
    assert z.shape == (2, 16, 12)
    assert torch.equal(z[1, 5], net(x)[1, :, 1, 1])
    assert torch.equal(embeddings(net, x, "0"), net[0](x).flatten(2).mT)
    assert not net[0]._forward_hooks
    with pytest.raises(ValueError, match="layer must name a part of the encoder, got 'nine'"):
        embeddings(net, x, "nine")
    with pytest.raises(ValueError, match="encoder must give"):
        embeddings(nn.Identity(), x[0, 0, 0])


@pytest.mark.parametrize(
    ("make", "layer", "shape"),
    [
        (lambda: resnet18_cifar(num_classes=10), "layer3", (2, 16, 256)),
        (lambda: resnet18_cifar(num_classes=10), "avgpool", (2, 1, 512)),
        (lambda: resnet18_cifar(num_classes=10), None, (2, 10)),
        (lambda: VisionTransformer(16, 8, 1, 2, 16, 16), "encoder", (2, 5, 16)),
    ],
)
def test_convolutional_networks_and_transformers_are_encoders(make, layer, shape):
    with seeded(0, "init"):
        net = make().train()
    x = random(2, 3, 16, 16, name="x")
    z = embeddings(net, x, layer)
    assert z.shape == shape
    assert net.training
    assert not z.requires_grad
    model = DKVBClassifier(net, bottleneck(in_dim=shape[-1]), layer=layer)
    assert torch.equal(model(x), model.bottleneck(z))
    assert torch.equal(model(x[1:])[0], model(x)[1]), "evaluation mode: examples do not see each other"


def test_kept_codes_train_as_the_inputs_do():
    def trained(cached):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = DKVBClassifier(encoder(), bottleneck(value_init="zeros"))
        x, labels = random(20, 1, 6, 6, name="x"), torch.arange(20) % 3
        codes, found = model.codes([(x[:13], labels[:13]), (x[13:], labels[13:])])
        assert torch.equal(found, labels)
        optimizer = torch.optim.SGD(model.bottleneck.parameters(), lr=1.0)
        for _ in range(5):
            optimizer.zero_grad()
            functional.cross_entropy(model.decode(codes) if cached else model(x), labels).backward()
            optimizer.step()
        return model.bottleneck.values.detach()

    assert torch.equal(trained(True), trained(False))


def test_a_decoder_is_trained_until_it_is_frozen():
    decoder = nn.Sequential(nn.Dropout(0.5), nn.Linear(15, 4))
    model = DKVBClassifier(encoder(), bottleneck(pool=None), decoder)
    x, labels = random(8, 1, 6, 6, name="x"), torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def step():
        before = decoder[1].weight.detach().clone(), model.bottleneck.values.detach().clone()
        optimizer.zero_grad()
        functional.cross_entropy(model.train()(x), labels).backward()
        optimizer.step()
        return [
            not torch.equal(a, b) for a, b in zip(before, (decoder[1].weight, model.bottleneck.values), strict=True)
        ]

    assert step() == [True, True]
    before = model.state_dict()
    model.freeze_decoder()
    assert step() == [False, True]
    assert not decoder[0].training
    model.load_state_dict(before)
    assert step() == [False, True], "for good"
    with pytest.raises(RuntimeError, match="no decoder"):
        DKVBClassifier(encoder(), bottleneck()).freeze_decoder()
    with pytest.raises(ValueError, match="decoder must be given for a bottleneck with pool=None"):
        DKVBClassifier(encoder(), bottleneck(pool=None))


def test_a_decoder_is_frozen_after_a_state_dict_too():
    def made():
        return DKVBClassifier(encoder(), bottleneck(pool=None), nn.Sequential(nn.Dropout(0.5), nn.Linear(15, 4)))

    def loaded(state):
        file, other = io.BytesIO(), nn.ModuleDict({"model": made()})
        torch.save({f"model.{name}": value for name, value in state.items()}, file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        return other["model"].train()

    model = made()
    free = model.state_dict()
    old = {name: value for name, value in free.items() if name != "decoder_frozen"}
    for state in (free, old):
        assert all(p.requires_grad for p in loaded(state).decoder.parameters())
    model.freeze_decoder()
    for other in (loaded(model.state_dict()), copy.deepcopy(model).train()):
        assert [n for n, p in other.named_parameters() if p.requires_grad] == ["bottleneck.values"]
        assert not other.decoder[0].training
        assert torch.equal(other.state_dict()["decoder_frozen"], torch.tensor(1, dtype=torch.uint8))
    assert "decoder_frozen" not in DKVBClassifier(encoder(), bottleneck()).state_dict()


def test_keys_are_fitted_without_labels_to_where_the_data_are():
    """Two clusters a codebook's two keys must find; values and encoder stay."""
    centres = torch.tensor([[-5.0], [7.0]])
    data = centres.repeat(50, 1) + 0.1 * random(100, 1)
    layer = KeyValueBottleneck(1, 2, 1, projection="none", value_init="normal", decay=0.5, key_init="kmeans")
    values = layer.values.detach().clone()
    order = torch.randperm(100, generator=stream(0, "order"))
    loader = [(x, torch.zeros(len(x))) for x in data[order].split(25)]
    history = fit_keys(layer, nn.Identity(), loader, 20, generator=stream(0, "keys"))
    assert layer.keys.flatten().sort().values.tolist() == pytest.approx([-5, 7], abs=0.1)
    assert history.last["squared_distance"] == pytest.approx(0.01, rel=0.5)
    assert history.last["perplexity"] == pytest.approx(2, rel=0.1)
    assert torch.equal(layer.values, values)
    assert not layer.keys_frozen
    first = layer.keys.clone()
    fit_keys(layer, nn.Identity(), [100 + data], 1)
    assert not torch.equal(layer.keys, first)
    assert layer.keys.min() < 60, "it goes on from where the keys are"


def test_fitting_refuses_and_warns(capsys):
    layer = KeyValueBottleneck(2, 100, 1, projection="none")
    with pytest.raises(ValueError, match="epochs must be >= 1, got 0"):
        fit_keys(layer, nn.Identity(), [random(9, 2)], 0)
    with pytest.raises(ValueError, match="at least 1 batch, got 0 in pass 1"):
        fit_keys(layer, nn.Identity(), [])
    with pytest.raises(ValueError, match="in pass 2"):
        fit_keys(layer, nn.Identity(), iter([random(400, 2)] * 2), 2)
    layer = KeyValueBottleneck(2, 100, 1, projection="none", epsilon=0.0)
    fit_keys(layer, nn.Identity(), [torch.ones(100, 2)] * 100, 2)
    assert "the keys have collapsed: on average 2." in capsys.readouterr().err
    layer.freeze_keys()
    with pytest.raises(RuntimeError, match="frozen"):
        fit_keys(layer, nn.Identity(), [random(9, 2)])
