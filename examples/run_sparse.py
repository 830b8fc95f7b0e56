"""Prune a network, run it in the sparse runtime, see where its time goes, and keep it in a file a tenth the size."""

# %% A network that was trained, then pruned to 95 % zeros and trained on
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from netwright import deploy
from netwright.compress import prune
from netwright.cost import compare_times

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
x = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
y = torch.tensor(labels)
net = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
    nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
    nn.Flatten(), nn.Linear(1024, 10),
)  # fmt: skip
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
for step in range(300):
    if step == 150:
        prune.magnitude(net, 0.95, scope="lamp")
    batch = torch.randint(0, 1400, (64,))
    loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
prune.remove(net).eval()

# %% One line makes it fast: for inputs of the example's shape, on one thread
image = x[1400:1401]
fast = deploy.compile(net, image)
print(fast)
with torch.inference_mode():
    print(f"largest difference from PyTorch {(fast(image) - net(image)).abs().max():.1e}")
    print(compare_times({"PyTorch": lambda: net(image), "netwright": lambda: fast(image)}, rounds=50, threads=1))

# %% Where the time goes
print(fast.profile())

# %% Files without the zeros; int8 is smaller still, and just as fast
folder = Path(tempfile.mkdtemp())
dense = 4 * sum(p.numel() for p in net.parameters())
for quantize in (None, "int8"):
    path = fast.save(folder / f"digits-{quantize or 'float32'}", quantize=quantize)
    size = sum(file.stat().st_size for file in path.iterdir())
    loaded = deploy.load(path)
    right = sum(int(loaded(x[i : i + 1]).argmax() == y[i]) for i in range(1400, len(x)))
    print(f"{path.name}: {size} bytes, {size / dense:.3f} of dense, accuracy {right / (len(x) - 1400):.3f}")
