"""CDvG as a callback: what the user's step sees, what is added, that the module is left as it was, bad input."""

from __future__ import annotations

import dataclasses

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from netwright import cli
from netwright.console import UserError
from netwright.data import load
from netwright.data.indexed import IndexedDataset
from netwright.data.tensors import Batches
from netwright.seeding import seeded, stream
from netwright.train import Classifier, fit
from netwright.train.callbacks import CDvGCallback, ELRCallback, TrActCallback, WeightCompanderCallback
from netwright.train.contrastive import nt_xent
from netwright.train.debias import BiasTranslator, CDvG, signed_range
from netwright.train.methods import callbacks as by_name
from netwright.train.methods import check_network


@pytest.fixture(scope="module")
def data():
    whole = load("digits")
    return dataclasses.replace(whole, train=whole.train.subset(range(200)))


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """A translator of digits that knows nothing yet."""
    path = tmp_path_factory.mktemp("generator") / "g.safetensors"
    with seeded(0, "t"):
        BiasTranslator(10, 8, channels=1, width=2, n_down=1, n_res=0, n_layers=1).save(path)
    return str(path)


@pytest.fixture(autouse=True)
def the_readers_read_little(monkeypatch):
    monkeypatch.setattr("netwright.train.debias.quality.READER_STEPS", 10)


def network(norm: bool = True) -> nn.Module:
    with seeded(0, "init"):
        norms = [nn.BatchNorm2d(4)] if norm else []
        return nn.Sequential(nn.Conv2d(1, 4, 3), *norms, nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def batches(data, count=64):
    return Batches(data.train, 32, normalise=data.normalise(), indexed=True, steps=count // 32)


class Seen(Classifier):
    """Keeps what its step is given."""

    def training_step(self, batch, batch_idx):
        self.given = batch
        return super().training_step(batch, batch_idx)


def prepared(data, generator, **options) -> CDvGCallback:
    method = CDvGCallback(generator=generator, **options)
    method.prepare(data, augment=False)
    return method


@pytest.mark.parametrize("norm", [True, False])
def test_the_step_sees_views_with_their_own_labels(data, generator, norm):
    module, method = Seen(network(norm)), prepared(data, generator)
    loader = batches(data, 32)
    fit(module, loader, epochs=1, callbacks=[method])
    loader.set_epoch(0)
    x, y, index = next(iter(loader))
    first, second = torch.randint(10, (2, 32), generator=stream(0, "views", 0, 0, 0))
    views = [data.normalise()(method.cache.pick(index, targets)) for targets in (first, second)]
    given, labels = module.given
    assert torch.allclose(given, torch.cat(views), atol=1e-6)
    assert labels.tolist() == y.tolist() * 2
    if norm:  # whose statistics are those of the images, then those of their views
        with seeded(0, "init"):
            layer = nn.Conv2d(1, 4, 3)  # as it was before the step
        real, seen = (layer(images).mean((0, 2, 3)) for images in (x, torch.cat(views)))
        assert torch.allclose(module.network[1].running_mean, 0.9 * 0.1 * real + 0.1 * seen, atol=1e-5)


def test_the_image_as_a_view_is_what_it_is_in_the_module_of_its_own(data, generator):
    """Blurred and noisy as the translation is."""
    treated = {"views": "original+transformed", "view_noise": 0.3, "view_blur": 0.7}
    module, method = Seen(network(False)), prepared(data, generator, **treated)
    fit(module, batches(data, 32), epochs=1, callbacks=[method])
    encoder, seen = nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), []
    encoder.register_forward_pre_hook(lambda encoder, args: seen.append(args[0]))
    own = CDvG(encoder, 10, method.translator, cache=method.cache, **treated)
    signed = Batches(data.train, 32, normalise=signed_range(1), indexed=True, steps=1)
    fit(own, signed, epochs=1)
    expected = data.normalise()((seen[-1] + 1) / 2)
    assert torch.allclose(module.given[0], expected, atol=1e-5)
    loader = batches(data, 32)
    loader.set_epoch(0)
    x, _, _ = next(iter(loader))
    assert float((expected[:32] - x).std()) > 0.1


class Focal(lightning.LightningModule):
    """A loss and a metric of a user's own, which know of no label to be left out."""

    def __init__(self, net):
        super().__init__()
        self.net, self.right = net, []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        picked = logits.log_softmax(1).gather(1, batch[1][:, None])[:, 0]
        self.right.append(float((logits.argmax(1) == batch[1]).float().mean()))
        return -((1 - picked.exp()) ** 2 * picked).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_loss_and_a_metric_of_ones_own(data, generator, weight):
    module = Focal(network())
    fit(module, batches(data), epochs=2, callbacks=[prepared(data, generator, lambda_con=weight)])
    assert len(module.right) == 4


def test_images_that_find_no_way_are_told(data, generator):
    class Around(lightning.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def training_step(self, batch, batch_idx):
            return functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(RuntimeError, match="real_images=False"):
        fit(Around(network()), batches(data), epochs=1, callbacks=[prepared(data, generator, lambda_con=0.0)])
    method = prepared(data, generator, lambda_con=0.0, real_images=False)
    fit(Around(network()), batches(data), epochs=1, callbacks=[method])
    named = prepared(data, generator, logits="net")
    assert "contrast" in fit(Around(network()), batches(data), epochs=1, callbacks=[named]).last


def test_hooks_see_the_views_alone(data, generator):
    module, seen = Classifier(network()), []
    handle = module.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    fit(module, batches(data, 32), epochs=1, callbacks=[prepared(data, generator)])
    handle.remove()
    assert seen == [64]


def test_the_loss_by_hand(data, generator):
    net = network(False)
    method = prepared(data, generator, lambda_con=0.5, temperature=0.2)
    found = {}

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            _, y, index = batch
            picks = torch.randint(10, (2, 32), generator=stream(0, "views", 0, 0, 0))
            h = [net[:-1](data.normalise()(method.cache.pick(index, t))) for t in picks]
            ce = functional.cross_entropy(net[-1](torch.cat(h)), y.repeat(2))
            found["expected"] = (ce + 0.5 * nt_xent(*(pl_module.debias_projection(f) for f in h), 0.2)).item()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            found["loss"] = outputs["loss"].item()

    fit(Classifier(net), batches(data, 32), epochs=1, callbacks=[method, Watch()])
    assert found["loss"] == pytest.approx(found["expected"], rel=1e-5)


def test_the_module_is_left_as_it_was(data, generator):
    net = network()
    module = Classifier(net)
    names = set(module.state_dict())
    method = prepared(data, generator)
    projection = []

    class Watch(lightning.Callback):
        def on_train_start(self, trainer, pl_module):
            projection.extend(p.clone() for p in pl_module.debias_projection.parameters())

        def on_train_end(self, trainer, pl_module):
            assert not any(
                torch.equal(a, b) for a, b in zip(projection, pl_module.debias_projection.parameters(), strict=True)
            )

    history = fit(module, batches(data), epochs=1, callbacks=[method, Watch()])
    assert len(projection) == 4
    assert "contrast" in history.last
    assert set(module.state_dict()) == names
    assert "training_step" not in vars(module)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())


def test_after_an_exception_too(data, generator):
    module = Classifier(network())

    class Stop(lightning.Callback):
        def on_train_batch_end(self, *args):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(module, batches(data), epochs=1, callbacks=[prepared(data, generator), Stop()])
    assert not hasattr(module, "debias_projection")
    assert "training_step" not in vars(module)


def test_a_stopped_run_goes_on_bit_for_bit(data, generator, tmp_path):
    def run(**options):
        net = network()
        fit(Classifier(net), batches(data), callbacks=[prepared(data, generator, view_noise=0.2)], **options)
        return net.state_dict()

    whole = run(epochs=2)
    run(epochs=1, checkpoint=tmp_path / "c.ckpt")
    assert all(torch.equal(whole[name], value) for name, value in run(epochs=2, checkpoint=tmp_path / "c.ckpt").items())


def test_a_checkpoint_that_holds_the_projection_among_the_weights_goes_on_too(data, generator, tmp_path):
    """As those of before did."""

    def run(**options):
        net = network()
        fit(Classifier(net), batches(data), callbacks=[prepared(data, generator)], **options)
        return net.state_dict()

    whole = run(epochs=2)
    run(epochs=1, checkpoint=tmp_path / "c.ckpt")
    kept = torch.load(tmp_path / "c.ckpt", weights_only=True)
    projection = kept["callbacks"].pop("CDvGCallback")["projection"]
    assert len(projection) == 4
    kept["state_dict"] |= {f"debias_projection.{name}": value for name, value in projection.items()}
    torch.save(kept, tmp_path / "c.ckpt")
    assert all(torch.equal(whole[name], value) for name, value in run(epochs=2, checkpoint=tmp_path / "c.ckpt").items())


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_are_those_of_the_module_itself(data, generator, weights_only, tmp_path):
    class Tested(Classifier):
        def test_step(self, batch, batch_idx):
            self.log("right", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    loader = DataLoader(IndexedDataset(data.train), 50)
    best = ModelCheckpoint(tmp_path, monitor="contrast", save_weights_only=weights_only)
    callbacks = [prepared(data, generator), best]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=2, callbacks=callbacks, **quiet)
    module = Tested(network())
    trainer.fit(module, loader)
    loaded = Tested.load_from_checkpoint(best.best_model_path, network=network())
    assert set(loaded.state_dict()) == set(module.state_dict())
    (told,) = trainer.test(module, loader, ckpt_path=best.best_model_path, verbose=False)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in loaded.state_dict().items())
    fresh = lightning.Trainer(callbacks=[CDvGCallback()], **quiet)
    assert fresh.test(Tested(network()), loader, ckpt_path=best.best_model_path, verbose=False) == [told]


def test_manual_optimisation_and_no_contrast(data, generator):
    class Manual(Seen):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.given = batch
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    for weight in (1.0, 0.0):
        module = Manual(network())
        history = fit(module, batches(data), epochs=1, callbacks=[prepared(data, generator, lambda_con=weight)])
        assert ("contrast" in history.last) == bool(weight)
        assert len(module.given[0]) == 64


def test_with_methods_that_change_layers(data, generator):
    methods = [TrActCallback(), WeightCompanderCallback(), prepared(data, generator)]
    module = Classifier(network())
    module.example_input_array = torch.zeros(2, 1, 8, 8)
    assert "contrast" in fit(module, batches(data), epochs=1, callbacks=methods).last


@pytest.mark.parametrize("last", [True, False])
def test_not_with_methods_that_remember_examples(data, generator, last):
    ours, other = prepared(data, generator), ELRCallback()
    with pytest.raises(ValueError, match="no other method may remember"):
        fit(Classifier(network()), batches(data), epochs=1, callbacks=[other, ours] if last else [ours, other])


def test_training_the_translator_leaves_a_file_and_goes_on_from_it(data, tmp_path):
    options = {"steps": 4, "translator_batch": 4}
    method = CDvGCallback(**options)
    method.prepare(data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["generator.safetensors"]
    assert len(method.cache) == len(data.train)
    before = (tmp_path / "generator.safetensors").read_bytes()
    again = CDvGCallback(**options)
    again.prepare(data, tmp_path)
    assert (tmp_path / "generator.safetensors").read_bytes() == before
    assert torch.equal(method.cache.views, again.cache.views)
    other = CDvGCallback(**options, seed=1)
    other.prepare(data)
    assert not torch.equal(method.cache.views, other.cache.views)


def test_a_translator_that_is_not_ready_is_told(data, capsys):
    CDvGCallback(steps=1, translator_batch=2).prepare(data)
    found = capsys.readouterr().err
    assert "cdvg: the translator is not ready: the bias hardly changes" in " ".join(found.split())
    assert "more steps" in found


def test_views_as_they_are_made(data, generator):
    method = prepared(data, generator, round_views=False, view_blur=0.5)
    assert method.cache.views.dtype == torch.float32
    assert "contrast" in fit(Classifier(network()), batches(data), epochs=1, callbacks=[method]).last


def test_by_name():
    (method,) = by_name(["cdvg:steps=500,lambda_con=0.5,supervised=true,views=original+transformed"])
    assert (method.steps, method.lambda_con, method.supervised) == (500, 0.5, True)
    assert method.kind == "original+transformed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cdvg:steps=0", "steps must be a whole number >= 1, got 0"),
        ("cdvg:steps=1.5", "steps must be a whole number"),
        ("cdvg:steps=many", "steps must be a whole number"),
        ("cdvg:translator_batch=1", "translator_batch must be a whole number >= 2"),
        ("cdvg:lambda_con=-1", "lambda_con must be >= 0"),
        ("cdvg:temperature=0", "temperature must be > 0"),
        ("cdvg:lambda_rec=-1", "lambda_rec must be >= 0"),
        ("cdvg:n_critic=0", "n_critic must be >= 1"),
        ("cdvg:n_critic=2.5", "n_critic must be a whole number >= 1, got 2.5"),
        ("cdvg:translator_lr=0", "translator_lr must be > 0"),
        ("cdvg:steps=true", "steps must be a whole number"),
        ("cdvg:supervised=no", "supervised must be one of True, False, got 'no'"),
        ("cdvg:real_images=off", "real_images must be one of True, False, got 'off'"),
        ("cdvg:ce_on_original=no", "ce_on_original must be one of True, False, got 'no'"),
        ("cdvg:round_views=no", "round_views must be one of True, False, got 'no'"),
        ("cdvg:features=3", "features must be the name of a linear layer, got 3"),
        ("cdvg:view_noise=-0.1", "view_noise must be >= 0"),
        ("cdvg:view_blur=-0.1", "view_blur must be >= 0"),
        ("cdvg:views=some", "views must be"),
        ("cdvg:projection=0", "projection must be >= 1"),
        ("cdvg:lamda_con=1", "did you mean lambda_con"),
        ("cdvg:seed=-1", "seed must be an integer >= 0"),
        ("cdgv", "did you mean cdvg"),
        ("cdvg:lambda_con=much", "cdvg:"),
    ],
)
def test_bad_arguments(text, message):
    with pytest.raises(UserError, match=message):
        by_name([text])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("cdvg:features=network.9", "features must name a linear layer, got 'network.9': did you mean network.4?"),
        ("cdvg:features=network.0", "features must name a linear layer, got 'network.0'"),
        ("cdvg:logits=network.9", "logits must name a submodule, got 'network.9'"),
    ],
)
def test_layers_that_are_none_are_refused_before_anything_is_made(method, message):
    with pytest.raises(UserError, match=message):
        check_network(by_name([method]), network())


def test_networks_without_a_linear_layer_are_refused_before_anything_is_made():
    convolutional = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
    with pytest.raises(UserError, match="needs a linear layer"):
        check_network(by_name(["cdvg"]), convolutional)
    for method in ("cdvg:lambda_con=0", "cdvg:lambda_con=0,features=none"):  # where nothing enters the contrast
        check_network(by_name([method]), convolutional)
    for method in ("cdvg", "cdvg:features=network.4"):
        check_network(by_name([method]), network())


def test_a_layer_that_is_none_writes_nothing(tmp_path):
    arguments = ["train", "digits", "--method", "cdvg:steps=1,features=head", "--out", str(tmp_path / "run")]
    found = CliRunner().invoke(cli.app, arguments)
    assert found.exit_code == 2
    assert "features must name a linear layer, got 'head'" in found.stderr
    assert not (tmp_path / "run").exists()


def test_bad_use(data, generator, tmp_path):
    with pytest.raises(ValueError, match="must be prepared"):
        fit(Classifier(network()), batches(data), epochs=1, callbacks=[CDvGCallback()])
    plain = Batches(data.train, 32, normalise=data.normalise())
    with pytest.raises(ValueError, match="indexed=True"):
        fit(Classifier(network()), plain, epochs=1, callbacks=[prepared(data, generator)])
    fewer = Batches(data.validation, 32, normalise=data.normalise(), indexed=True)
    with pytest.raises(ValueError, match="images of prepare"):
        fit(Classifier(network()), fewer, epochs=1, callbacks=[prepared(data, generator)])
    convolutional = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
    with pytest.raises(ValueError, match="linear layer"):
        fit(Classifier(convolutional), batches(data), epochs=1, callbacks=[prepared(data, generator)])
    with pytest.raises(ValueError, match="features must name a linear layer, got 'net'"):
        fit(Classifier(network()), batches(data), epochs=1, callbacks=[prepared(data, generator, features="net")])
    with pytest.raises(UserError, match="no such file"):
        CDvGCallback(generator=str(tmp_path / "none")).check_data(data)
    with seeded(0, "t"):
        BiasTranslator(3, 8, channels=1, width=2, n_down=1, n_res=0, n_layers=1).save(tmp_path / "three")
    with pytest.raises(UserError, match="the generator is for 3 classes"):
        CDvGCallback(generator=str(tmp_path / "three")).check_data(data)


def test_optimisers_must_know_of_the_projection(data, generator):
    class Own(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.network.parameters(), lr=0.1)

    with pytest.raises(ValueError, match=r"made from self.parameters\(\)"):
        fit(Own(network()), batches(data), epochs=1, callbacks=[prepared(data, generator)])
