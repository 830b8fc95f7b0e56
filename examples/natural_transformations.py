"""Train against natural variation (NaTra): a decoder of yours, directions in its codes, the worst of eight."""

# %% Data, and a decoder: here an auto-encoder of your own, trained on images without labels
import torch
from torch import nn

from netwright.data import Batches, load
from netwright.train import NaTraTraining, fit
from netwright.train.natra import (
    BatchInverter,
    DecoderGenerator,
    NaturalTransform,
    filter_directions,
    latent_directions,
)

torch.manual_seed(0)
data = load("digits")
train = data.train.subset(range(400))
images, everything = train.images / 255, data.train.images / 255
encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
for _ in range(300):
    batch = everything[torch.randint(len(everything), (128,))]
    codes = encoder(batch)
    loss = (decoder(codes) - batch).square().mean() + 1e-3 * codes.square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"squared error of the auto-encoder {loss.item():.4f}")


# %% A classifier, as it would be without the method; it says which directions leave the class alone
def classifier() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


reference = classifier()
fit(reference, Batches(train, 32, indexed=False), epochs=15)

# %% Codes of the training images, directions in them, and what stays after the filter
generator = DecoderGenerator(decoder, latent_dim=8)
codes = BatchInverter(generator, lambda x: encoder(x)[:, None], steps=20).invert(images)
candidates = latent_directions(generator, "weights", k=8)
kept = filter_directions(candidates, generator, reference, codes, max_flip=0.35, min_change=0.005, step=1.0)
print(f"{len(kept)} of {len(candidates)} directions change the image and hardly ever the class")
transform = NaturalTransform(generator, codes, kept, images)

# %% Training on the worst of eight transformations of each image, beside the image itself
net = classifier()
method = NaTraTraining(transform.grid(eps_max=1.0), k=8)
fit(net, Batches(train, 32, indexed=True), epochs=15, callbacks=[method])
moved = transform.at(torch.arange(400), torch.randint(len(kept), (400,)), torch.full((400,), 1.0))
for name, each in (("plain", reference), ("NaTra", net)):
    with torch.inference_mode():
        test = (each.eval()(data.test.images / 255).argmax(1) == data.test.labels).float().mean()
        held = (each(moved).argmax(1) == train.labels).float().mean()
    print(f"{name}  accuracy {test:.3f}, on moved training images {held:.3f}")
