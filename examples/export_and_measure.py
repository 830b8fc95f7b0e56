"""Export a network with its preprocessing to ONNX, check the file against torch, and measure it honestly."""

# %% A small trained network
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from netwright.compress import prune
from netwright.data.tensors import Normalise
from netwright.deploy import onnx

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels * 255 / 16, dtype=torch.uint8).view(-1, 1, 8, 8)
y = torch.tensor(labels)
train = images[:1400].float() / 255
normalise = Normalise([train.mean().item()], [train.std().item()])
net = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 10))
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
for _ in range(150):
    batch = torch.randint(0, 1400, (64,))
    loss = nn.functional.cross_entropy(net(normalise(images[batch])), y[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %% Two files: dense, and with 95 % of the weights zero
folder = Path(tempfile.mkdtemp())
for name in ("dense", "sparse"):
    if name == "sparse":
        prune.remove(prune.magnitude(net, 0.95, scope="global"))
    path = onnx.export(
        net, folder / f"{name}.onnx", shape=(1, 8, 8), mean=normalise.mean.tolist(), std=normalise.std.tolist(),
        classes=[str(digit) for digit in range(10)],
    )  # fmt: skip
    agreement = onnx.check(path, net, normalise, images[1400:])
    session = onnx.Session(path, threads=1)
    accuracy = (session.logits(images[1400:]).argmax(1) == labels[1400:]).mean()
    speed = onnx.latency(session, images[1400:], batch=1, rounds=200)
    size = onnx.file_sizes(path)
    print(f"{name:6}  accuracy {accuracy:.3f}  largest difference from torch {agreement.largest:.1e}")
    print(
        f"        {speed.median_ms:.3f} ms a picture, {speed.threads} thread, {size.raw} bytes, {size.gzipped} gzipped"
    )
