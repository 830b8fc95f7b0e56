"""Does a linear state-space layer with a HiPPO matrix remember long inputs, and beat recurrent networks of its size?

Gu, Johnson, Goel, Saab, Dao, Rudra and Ré, "Combining Recurrent, Convolutional, and Continuous-time Models with Linear
State-Space Layers", NeurIPS 2021, arXiv:2110.13985.

Memory: a state of 32 numbers, step 1/100, is driven by noise below 0.05 cycles a sample; ridge regression reads the
input of d samples ago off the state, with a thousandth of noise on it; LegT, LegS, a random and a diagonal matrix.

Accuracy: Fashion-MNIST, pooled to 14x14 and read pixel by pixel, 4,000 training images, 2,000 test images, 4 epochs of
Adam with one cosine, batch 64. Arms of equal size (within a tenth) with the same batches: LSSL and LSSL-f (48 features,
states of 32, two layers), LSSL with a random matrix, a GRU of two layers, a causal dilated convolutional network. Each
learning rate is the better of two on 1,000 held-out images, with a seed of its own. The random matrix itself stays
fixed, since a trained one without structure would have more parameters; all else of that arm is trained. The trained
networks then read every second pixel, with the step doubled and without.

MNIST-1D: LSSL with and without a fixed shuffling, against logistic regression and a perceptron 40-100-100-10; reported
only. Not tested: speech of length 16,000, BIDMC, and the absolute accuracies after 200 epochs.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers import classification
from netwright.papers.evidence import Evidence, Verdict, decide, mean, paired_difference, standard_error
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run
from netwright.papers.tuning import best

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from netwright.data import Normalise, TensorImages

CARD = Paper(
    slug="lssl",
    title=("Combining Recurrent, Convolutional, and Continuous-time Models with Linear State-Space Layers"),
    authors=(
        "Albert Gu",
        "Isys Johnson",
        "Karan Goel",
        "Khaled Saab",
        "Tri Dao",
        "Atri Rudra",
        "Christopher Ré",
    ),
    year=2021,
    venue="Advances in Neural Information Processing Systems",
    kind="inproceedings",
    arxiv="2110.13985",
    summary=(
        "A sequence layer that simulates a linear state-space system: one long convolution for training, a recurrence "
        "of constant memory for use, and a step that is rescaled for data sampled at another rate."
    ),
    method="netwright.nn.lssl:LSSL",
    covers=("netwright.nn.lssl", "netwright.nn.lssl.layer", "netwright.nn.lssl.model"),
    claims=(
        Claim(
            "memory", "A HiPPO state tells the input of 75 samples ago (R2 >= 0.99), a random one does not (<= 0.4)."
        ),
        Claim("accuracy", "LSSL and LSSL-f are at least 3 points more accurate than a GRU of their size."),
        Claim("baselines", "LSSL is at most a point below a random matrix and below a convolutional network."),
        Claim("rate", "At half the rate it loses at most 5 points when the step is doubled, and at least 10 if not."),
        Claim("mnist1d", "On MNIST-1D it is above logistic regression and a perceptron.", gated=False),
    ),
    metric="accuracy",
    seeds=5,
    fast_seeds=1,
)

RATES = (1e-3, 4e-3)
BATCH = 64
IMAGE_SEEDS = 3  # of the five; all are for the memory
ARMS = ("LSSL", "LSSL-f", "random A", "GRU", "CNN")
DIGITS_ARMS = ("LSSL", "LSSL, shuffled", "logistic regression", "MLP")
SYSTEMS = ("LegT", "LegS", "random A", "diagonal A")
DELAYS = (5, 25, 50, 75, 95, 150)
SHUFFLE_SEED = 0


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    recalled = {name: mean(arms[f"memory, {name}"]["R2 at 75"]) for name in SYSTEMS}
    least = min(recalled["LegT"], recalled["LegS"])
    absent = decide(None, reason="Fashion-MNIST was not run")
    found = {
        "memory": decide(
            least >= 0.99 and recalled["random A"] <= 0.4,
            least,
            "R2 at 75 samples: " + ", ".join(f"{name} {value:.3g}" for name, value in recalled.items()),
        )
    }
    if "GRU" not in arms:
        found |= dict.fromkeys(("accuracy", "baselines", "rate"), absent)
    else:
        found |= {"accuracy": _above_gru(arms), "baselines": _not_below(arms), "rate": _rate(arms)}
    return found | {"mnist1d": _digits(arms)}


def _above_gru(arms: Arms) -> Verdict:
    told: list[str] = []
    errors: list[float] = []
    least = math.inf
    gru = arms["GRU"]["accuracy"]
    for name in ("LSSL", "LSSL-f"):
        gap = paired_difference(arms[name]["accuracy"], gru).mean
        error = standard_error(arms[name]["accuracy"]) + standard_error(gru)
        told.append(f"{name} {gap:.4g} (summed s.e. {error:.2g})")
        least, errors = min(least, gap), [*errors, gap - error]
    if any(math.isnan(value) for value in errors):
        return decide(None, least, "a single seed has no standard error")
    reason = f"above the GRU: {', '.join(told)}; claimed >= 0.03 and above the summed s.e."
    return decide(least >= 0.03 and min(errors) > 0, least, reason)


def _not_below(arms: Arms) -> Verdict:
    gaps = {name: paired_difference(arms["LSSL"]["accuracy"], arms[name]["accuracy"]) for name in ("random A", "CNN")}
    told = [f"{name} {gap.mean:.4g} (s.e. {gap.standard_error:.2g})" for name, gap in gaps.items()]
    least = min(gap.mean for gap in gaps.values())
    return decide(least >= -0.01, least, f"LSSL above {', '.join(told)}; claimed >= -0.01")


def _rate(arms: Arms) -> Verdict:
    full = mean(arms["LSSL"]["accuracy"])
    drops = {rate: full - mean(arms["LSSL"][f"accuracy at half the rate, {rate}"]) for rate in ("step 2", "step 1")}
    told = f"points lost with the step doubled {100 * drops['step 2']:.3g}, claimed <= 5; without "
    return decide(
        drops["step 2"] <= 0.05 and drops["step 1"] >= 0.1, drops["step 2"], f"{told}{100 * drops['step 1']:.3g}, >= 10"
    )


def _digits(arms: Arms) -> Verdict:
    ours = mean(arms["MNIST-1D, LSSL"]["accuracy"])
    others = {
        name.removeprefix("MNIST-1D, "): mean(figures["accuracy"])
        for name, figures in arms.items()
        if name in ("MNIST-1D, logistic regression", "MNIST-1D, MLP")
    }
    if len(others) < 2:
        return decide(None, ours, "not all baselines were run")
    gap = ours - max(others.values())
    told = ", ".join(f"{name} {value:.3g}" for name, value in others.items())
    if "MNIST-1D, LSSL, shuffled" in arms:
        told += f"; with the samples shuffled LSSL {mean(arms['MNIST-1D, LSSL, shuffled']['accuracy']):.3g}"
    return decide(gap > 0, gap, f"LSSL {ours:.3g}, {told}")


def reproduce(run: Run) -> Evidence:
    """Measures the memory, then tunes and trains every arm on both data sets."""
    samples = run.size("samples of the memory", full=6000, fast=6000, scaled=False)
    arms = run.arms({f"memory, {name}": [name, samples] for name in SYSTEMS}, _memory)
    sizes = [
        run.size("features", full=48, fast=16, scaled=False),
        run.size("state", full=32, fast=16, scaled=False),
        run.size("layers", full=2, fast=1, scaled=False),
    ]
    digits = [
        run.size("MNIST-1D training sequences", full=3600, fast=1500, scaled=False),
        run.size("MNIST-1D validation sequences", full=400, fast=400, scaled=False),
        run.size("MNIST-1D test sequences", full=1000, fast=1000, scaled=False),
        run.size("MNIST-1D epochs", full=20, fast=2),
    ]
    names = DIGITS_ARMS[::2] if run.fast else DIGITS_ARMS
    arms |= _tuned(run, "mnist1d", names, sizes, digits)
    if not run.fast:
        images = [
            run.size("training images", full=4000, fast=1),
            run.size("validation images", full=1000, fast=1, scaled=False),
            run.size("test images", full=2000, fast=1, scaled=False),
            run.size("epochs", full=4, fast=1),
        ]
        arms |= _tuned(run, "fashion-mnist", ARMS, sizes, images)
    return run.evidence(arms, judge(arms))


def _tuned(run: Run, data: str, names: Sequence[str], sizes: Sequence[int], images: Sequence[int]) -> Arms:
    """Every arm at the learning rate that is best for it on held-out images."""
    prefix = "MNIST-1D, " if data == "mnist1d" else ""
    arms: Arms = {}
    chosen = {}
    for name in names:
        trials = {lr: [data, name, lr, sizes, images, True] for lr in RATES}
        lr, tried = best(run, f"{prefix}{name}, lr", trials, _train)
        arms |= tried
        chosen[f"{prefix}{name}"] = [data, name, lr, sizes, images, False]
    return arms | run.arms(chosen, _train, seeds=run.seeds[:IMAGE_SEEDS])


def _train(
    seed: int, data: str, arm: str, lr: float, sizes: Sequence[int], images: Sequence[int], tuning: bool
) -> dict[str, Any]:
    import torch

    from netwright.nn.lssl import LSSLModel
    from netwright.seeding import seeded

    parts = _sequences(data, arm, seed, images[:3])
    with seeded(seed, "init"):
        network = _network(arm, sizes, parts[0]["train"].images.shape[3], seed)

    def optimizer(params: Sequence[Any]) -> torch.optim.Optimizer:
        return torch.optim.Adam(network.param_groups(lr) if isinstance(network, LSSLModel) else params, lr=lr)

    last = classification.train(
        network, parts, epochs=images[3], batch=BATCH, lr=lr, seed=seed, optimizer=optimizer
    )  # fmt: skip
    if tuning:
        return {"validation accuracy": classification.measured(network, parts, "validation")["accuracy"]}
    figures = {
        "accuracy": classification.measured(network, parts, "test")["accuracy"],
        "training loss": last["train_loss"],
        "learning rate": lr,
        "parameters": _size(network),
    }
    return figures | (_at_half_the_rate(network, parts) if data == "fashion-mnist" else {})


def _sequences(data: str, arm: str, seed: int, images: Sequence[int]) -> tuple[dict[str, TensorImages], Normalise]:
    from netwright.data.sequences import pixel_rows

    parts, normalise = classification.parts(data, seed, *images)
    shuffled = SHUFFLE_SEED if arm.endswith("shuffled") else None
    pool = 2 if data == "fashion-mnist" else 1
    return {name: pixel_rows(part, pool=pool, permutation_seed=shuffled) for name, part in parts.items()}, normalise


def _at_half_the_rate(network: nn.Module, parts: tuple[dict[str, TensorImages], Normalise]) -> dict[str, float]:
    """Test accuracy on every second value, with the step doubled where there is one."""
    from torch import nn

    from netwright.data import TensorImages
    from netwright.nn.lssl import LSSLModel

    class AtRate(nn.Module):
        def __init__(self, rate: float):
            super().__init__()
            self.network, self.rate = network, rate

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x, self.rate)

    test = parts[0]["test"]
    coarse = {"test": TensorImages(test.images[..., ::2].contiguous(), test.labels)}, parts[1]
    if not isinstance(network, LSSLModel):
        found = classification.measured(network, coarse, "test")
        return {"accuracy at half the rate, step 1": found["accuracy"]}
    return {
        f"accuracy at half the rate, step {rate}": classification.measured(AtRate(rate), coarse, "test")["accuracy"]
        for rate in (1, 2)
    }


def _network(arm: str, sizes: Sequence[int], length: int, seed: int) -> nn.Module:
    """The network of an arm; others than LSSL are as wide as makes them its size. The seed draws the random matrix."""
    import torch
    from torch import nn

    from netwright.nn.convnet import MLP
    from netwright.nn.lssl import LSSLModel
    from netwright.seeding import stream

    features, state, layers = sizes

    def ours(**options: Any) -> LSSLModel:
        return LSSLModel(1, 10, d_model=features, n_layers=layers, d_state=state, **options)

    if arm in ("LSSL", "LSSL, shuffled"):
        return ours()
    if arm == "LSSL-f":
        return ours(learn=0)
    if arm == "random A":
        drawn = torch.randn(state, state, generator=stream(seed, "random A"))
        A = drawn / math.sqrt(state) - 1.5 * torch.eye(state)
        model = ours(measure=(A, torch.ones(state)))
        for block in model.blocks:
            block.layer.A.requires_grad_(False)  # type: ignore[union-attr]
        return model
    if arm == "logistic regression":
        return nn.Sequential(nn.Flatten(), nn.Linear(length, 10))
    if arm == "MLP":
        return nn.Sequential(nn.Flatten(), MLP(length, [100, 100, 10]))
    make = _gru if arm == "GRU" else _cnn
    return make(_width(make, _size(ours())))


def _size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def _width(make: Callable[[int], nn.Module], wanted: int) -> int:
    """The width with which a network has nearest to ``wanted`` parameters; nothing is drawn for it."""
    import torch

    def size(width: int) -> int:
        with torch.device("meta"):
            return _size(make(width))

    above = bisect.bisect_left(range(1000), wanted, lo=2, key=size)
    return min(above - 1, above, key=lambda width: abs(size(width) - wanted))


def _gru(width: int, layers: int = 2) -> nn.Module:
    """A GRU whose outputs are averaged over time."""
    from torch import nn

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.GRU(1, width, layers, batch_first=True)
            self.decoder = nn.Linear(width, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.layers(x.flatten(2).mT)[0].mean(1))

    return Recurrent()


def _cnn(width: int, kernel: int = 3, layers: int = 7) -> nn.Module:
    """Causal convolutions with dilations 1, 2, 4, ..., which see 255 values, in residual blocks."""
    from torch import nn
    from torch.nn import functional

    class Convolutional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(1, width), nn.Linear(width, 10)
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
            self.convolutions = nn.ModuleList(nn.Conv1d(width, width, kernel, dilation=2**i) for i in range(layers))

        def forward(self, x: Tensor) -> Tensor:
            x = self.encoder(x.flatten(2).mT)
            for i, (norm, convolution) in enumerate(zip(self.norms, self.convolutions, strict=True)):
                past = functional.pad(norm(x).mT, ((kernel - 1) * 2**i, 0))
                x = x + functional.gelu(convolution(past)).mT
            return self.decoder(x.mean(1))

    return Convolutional()


def _memory(seed: int, system: str, samples: int) -> dict[str, float]:
    """R2 of the input of some samples ago, read off the state by ridge regression."""
    import numpy as np

    from netwright.seeding import numpy_stream

    A_bar, B_bar = _system(seed, system)
    u = _noise(seed, samples)
    states = np.zeros((samples, len(B_bar)))
    x = np.zeros(len(B_bar))
    for k in range(samples):
        x = A_bar @ x + B_bar * u[k]
        states[k] = x
    random = numpy_stream(seed, "noise of states", system)
    states += 1e-3 * states.std(0) * random.standard_normal(states.shape)
    return {f"R2 at {delay}": _recalled(states, u, delay) for delay in DELAYS}


def _system(seed: int, name: str, N: int = 32, dt: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    import torch

    from netwright.nn.lssl import discretize_gbt, hippo
    from netwright.seeding import stream

    one = torch.ones(N, dtype=torch.float64)
    if name == "random A":
        drawn = torch.randn(N, N, generator=stream(seed, "random A"), dtype=torch.float64)
        A, B = drawn / math.sqrt(N) - 1.5 * torch.eye(N, dtype=torch.float64), one
    elif name == "diagonal A":
        A, B = -torch.diag(torch.arange(1.0, N + 1, dtype=torch.float64)), one
    else:
        A, B = hippo("legt" if name == "LegT" else "legs", N)
    A_bar, B_bar = discretize_gbt(A, B, torch.tensor(dt, dtype=torch.float64))
    return A_bar.numpy(), B_bar.numpy()


def _noise(seed: int, samples: int, highest: float = 0.05) -> np.ndarray:
    """Gaussian noise without frequencies above ``highest`` cycles a sample, of unit variance."""
    import numpy as np

    from netwright.seeding import numpy_stream

    white = np.fft.rfft(numpy_stream(seed, "input").standard_normal(samples))
    white[np.fft.rfftfreq(samples) > highest] = 0
    low = np.fft.irfft(white, samples)
    return low / low.std()


def _recalled(states: np.ndarray, u: np.ndarray, delay: int, burn_in: int = 500, training: int = 3500) -> float:
    from sklearn.linear_model import Ridge

    x, y = states[burn_in:], u[burn_in - delay : len(u) - delay]
    model = Ridge(alpha=1e-6).fit(x[:training], y[:training])
    return float(model.score(x[training:], y[training:]))
