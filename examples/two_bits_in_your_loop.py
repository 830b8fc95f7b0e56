"""Train a network of your own with weights of two bits, taught by its full-precision self, in a plain PyTorch loop."""

# %% A network and data that know nothing of netwright
import torch
from sklearn.datasets import load_digits
from torch import nn

from netwright.compress.distill import DistillationLoss
from netwright.compress.quantize import baked, pack, post_training_quantize, unpack

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
train, test = slice(0, 1400), slice(1400, None)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def accuracy(net: nn.Module) -> float:
    with torch.inference_mode():
        return (net(x[test]).argmax(1) == y[test]).float().mean().item()


def fit(net: nn.Module, loss, steps: int = 400) -> nn.Module:
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = torch.randint(0, 1400, (64,))
        optimizer.zero_grad()
        loss(net(x[batch]), batch).backward()
        optimizer.step()
    return net


# %% Full precision first
net = fit(network(), lambda logits, batch: nn.functional.cross_entropy(logits, y[batch]))

# %% Rounded to four levels a bucket, and then trained so: the optimiser moves the weights behind the rounding
rounded = post_training_quantize(net, bits=2, ranges="mse")
distilled = post_training_quantize(net, bits=2)
learn = DistillationLoss(temperature=2.0, weight=0.7)
fit(distilled, lambda logits, batch: learn(logits, net(x[batch]), y[batch]))
print(f"full precision {accuracy(net):.3f}, rounded {accuracy(rounded):.3f}, distilled {accuracy(distilled):.3f}")

# %% What is written, and what comes back
blob = pack(distilled)
restored = unpack(blob, network())
assert torch.equal(restored[0].weight, baked(distilled)[0].weight)
print(f"{len(pack(net))} bytes became {len(blob)}")
