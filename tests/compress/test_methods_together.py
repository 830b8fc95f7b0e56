"""Callbacks of compression in whatever else a Trainer does."""

import lightning
import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.compress.callbacks import MaestroCallback, QuantizedDistillationCallback
from netwright.compress.low_rank import decompose, low_rank_layers
from netwright.compress.quantize import post_training_quantize
from netwright.compress.quantize.placing import quantizers
from netwright.data.tensors import Batches, TensorImages
from netwright.seeding import seeded
from netwright.train import Classifier, fit

EXAMPLES, BATCH, EPOCHS = 64, 16, 3
pytestmark = pytest.mark.filterwarnings("ignore")


def network(low: bool) -> nn.Module:
    with seeded(0, "init"):
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)
        )
    return decompose(net) if low else net


MAKE = {
    "maestro": (True, lambda: [MaestroCallback(3e-2, 0.4)]),
    "quantised": (False, lambda: [QuantizedDistillationCallback(2, 32)]),
    "both": (True, lambda: [MaestroCallback(1e-2, 0.0), QuantizedDistillationCallback(4, 32, quantize="all")]),
}


class Plain(lightning.LightningModule):
    def __init__(self, low: bool):
        super().__init__()
        self.net = network(low)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class TwoOptimizers(Plain):
    def __init__(self, low: bool):
        super().__init__(low)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        both = self.optimizers()
        for optimizer in both:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in both:
            optimizer.step()
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[:4].parameters(), lr=0.05), torch.optim.Adam(self.net[4:].parameters())


def data() -> Batches:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (EXAMPLES, 1, 6, 6), dtype=torch.uint8, generator=generator)
    return Batches(TensorImages(images, torch.randint(3, (EXAMPLES,), generator=generator)), BATCH, seed=1)


def train(name: str, kind=Plain, compiled=False, **options):
    low, make = MAKE[name]
    module = kind(low)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, callbacks=make(), logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, **options,
    )  # fmt: skip
    with seeded(3, "dropout"):
        trainer.fit(torch.compile(module, backend="eager") if compiled else module, data())
    return module


def output(module: nn.Module) -> torch.Tensor:
    x = torch.linspace(0, 1, 3 * 36).view(3, 1, 6, 6)
    with torch.no_grad():
        return module.eval().net(x)


SETTINGS = {
    "alone": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.5},
    "bf16": {"precision": "bf16-mixed"},
    "two optimisers": {"kind": TwoOptimizers},
    "compile": {"compiled": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MAKE)
def test_matrix(name, setting):
    module = train(name, **SETTINGS[setting])
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert not torch.allclose(output(module), output(Plain(MAKE[name][0])), atol=1e-3)
    if MAKE[name][0]:
        layers = low_rank_layers(module).values()
        assert all(layer.used == layer.rank for layer in layers)
        if name == "maestro" and setting in ("alone", "clipping", "compile"):
            assert any(layer.rank < layer.max_rank for layer in layers)
        first, norm = module.net[0], module.net[1]
        with torch.no_grad():
            mean = torch.stack([first(x).mean((0, 2, 3)) for x, _ in data()]).mean(0)
        assert torch.allclose(norm.running_mean, mean, atol=1e-2)
    if name != "maestro":
        assert any(True for _ in quantizers(module))
        for _, layer, own, quantizer in quantizers(module):
            levels = getattr(layer, own).unique().numel()
            assert levels <= 2**quantizer.bits * quantizer.scaler.shape(getattr(layer, own).numel())[0]
            assert layer.parametrizations[own].original.unique().numel() >= levels
    if setting == "compile":
        assert torch.allclose(output(module), output(train(name)), atol=1e-4)
        torch.compiler.reset()


@pytest.mark.parametrize("name", MAKE)
def test_resumed_run_is_bit_equal(name, tmp_path):
    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (2, 1):
                raise RuntimeError("killed")

    low, make = MAKE[name]

    def run(*more, checkpoint=None):
        module = Classifier(network(low), lr=0.05)
        fit(module, data(), epochs=4, callbacks=[*make(), *more], seed=5, checkpoint=checkpoint)
        return module.state_dict()

    whole = run()
    with pytest.raises(RuntimeError, match="killed"):
        run(Stop(), checkpoint=tmp_path / "a.ckpt")
    again = run(checkpoint=tmp_path / "a.ckpt")
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


def test_inductor_computes_the_same():
    """Forward and backward of a quantised layer in the code that torch.compile writes."""
    with seeded(0, "init"):
        net = post_training_quantize(nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)), 3, 16)
    x, compiled = torch.linspace(-1, 1, 60).view(5, 12), torch.compile(net)
    outputs, gradients = [], []
    for model in (net, compiled):
        net.zero_grad()
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))
    torch.compiler.reset()
