"""Prune a network of your own to 95 % sparsity while it trains, in a plain PyTorch loop."""

# %% A network and data that know nothing of netwright
import torch
from sklearn.datasets import load_digits
from torch import nn

from netwright.compress import prune

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
y = torch.tensor(labels)
train, test = slice(0, 1400), slice(1400, None)

net = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(256, 10),
)  # fmt: skip
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def accuracy() -> float:
    net.eval()
    with torch.inference_mode():
        return (net(x[test]).argmax(1) == y[test]).float().mean().item()


# %% Train: dense for 100 steps, then a little sparser every 10 steps until step 300, then at the final sparsity
prune.magnitude(net, 0.0)  # masks that keep everything: the optimiser made before keeps its parameters
for step in range(500):
    if step % 10 == 0 and 100 <= step <= 300:
        prune.update(net, prune.cubic_sparsity(step, begin=100, end=300, final=0.95), scope="global")
    if step == 100:
        print(f"dense, after {step} steps:   accuracy {accuracy():.3f}")
    net.train()
    batch = torch.randint(0, 1400, (64,))
    loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %% Bake the masks in: ordinary layers with zeros
before = accuracy()
prune.remove(net)
found = prune.sparsity(net)
print(f"sparse, after {step + 1} steps:  accuracy {accuracy():.3f}")
print(f"{found.kept} of {found.total} weights are kept: sparsity {found.sparsity:.3f}")
assert accuracy() == before
