"""Search an architecture in a training loop of your own, then train what was found."""

# %% Data: two halves to search with, in memory
import torch
from sklearn.datasets import load_digits
from torch import nn

from netwright.data.tensors import Batches, TensorImages
from netwright.search.darts import DARTS
from netwright.search.searcher import Pairs
from netwright.search.spaces import get

images, labels = load_digits(return_X_y=True)
pixels = torch.tensor(images * 255 / 16, dtype=torch.uint8).view(-1, 1, 8, 8)
data = TensorImages(pixels, torch.tensor(labels))
train = Batches(data.subset(range(600)), 32, seed=0, name="train")
val = Batches(data.subset(range(600, 1200)), 32, seed=0, name="val")

# %% The space, its supernet, and a searcher over it
space = get("micro-darts")
supernet = space.supernet(in_channels=1, num_classes=10, channels=4, cells=3, seed=0)
searcher = DARTS(supernet, epochs=3)

# %% The loop is yours; one step updates architecture parameters and weights
searcher.prepare(seed=0, steps_per_epoch=len(train))
while not searcher.finished:
    for train_batch, val_batch in Pairs(train, val, searcher):
        searcher.step(train_batch, val_batch)
    ended = searcher.end_epoch()
    print(f"epoch {ended.epoch}: validation loss {ended.figures['val_loss']:.2f}")
genotype = searcher.result().genotype
print(genotype.to_json())

# %% The found network is built from the genotype alone and trained as any other
net = space.build(genotype, in_channels=1, num_classes=10, channels=8, seed=0)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
both = Batches(data.subset(range(1200)), 64, seed=0)
for epoch in range(6):
    both.set_epoch(epoch)
    for x, y in both:
        loss = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
net.eval()
test = data.subset(range(1200, len(data)))
with torch.inference_mode():
    accuracy = (net(test.images / 255).argmax(1) == test.labels).float().mean().item()
print(f"{sum(p.numel() for p in net.parameters())} parameters, accuracy {accuracy:.3f}")
