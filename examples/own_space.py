"""Turn a residual network of your own into a search space, and search it on a folder of images."""

# %% A folder of class folders, as yours may be; here small digits written out as pictures
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from netwright.data import Batches, load, split_train
from netwright.search import DARTS, ChoiceSpace, spaces

folder = tempfile.TemporaryDirectory()
digits = load_digits()
for number, (picture, label) in enumerate(zip(digits.images[:600], digits.target[:600], strict=True)):
    place = Path(folder.name) / f"class-{label}"
    place.mkdir(exist_ok=True)
    Image.fromarray(np.uint8(picture * 255 / 16)).save(place / f"{number}.png")


# %% The network: kernel size, width and which blocks to leave out are to be chosen
class Block(nn.Module):
    def __init__(self, width, kernel, inside):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, inside, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(inside), nn.ReLU(),
            nn.Conv2d(inside, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x):
        return nn.functional.relu(x + self.body(x))


def resnet(choose, in_channels, num_classes, width=16, blocks=3):
    options = {f"k{k}_w{w}": lambda k=k, w=w: Block(width, k, w) for k in (3, 5) for w in (8, 32)}
    body = [choose(f"block_{i}", {**options, "skip": nn.Identity}, kind="block") for i in range(blocks)]
    stem = nn.Conv2d(in_channels, width, 3, padding=1)
    return nn.Sequential(stem, nn.ReLU(), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


space = spaces.register(ChoiceSpace("my-resnet", resnet, shape=(8, 8)))
print(f"{space.size} networks: {space.choices()}")

# %% The search: one half of the training images for the weights, the other for the architecture
data = load(folder.name)
halves = [
    Batches(data.train.subset(half), 32, seed=0, normalise=data.normalise(), name=name)
    for half, name in zip(split_train(data.train.labels, 0.5, seed=0), ("weights", "architecture"), strict=True)
]
supernet = space.supernet(data.shape[0], len(data.classes), seed=0)
result = DARTS(supernet, epochs=4, lr=0.1, alpha_lr=3e-3).search(*halves, seed=0)
print(result.genotype.to_json())

# %% The network that was found, to be trained from scratch
network = result.genotype.build(data.shape[0], len(data.classes), seed=0)
print(sum(p.numel() for p in network.parameters()), "parameters")
folder.cleanup()
