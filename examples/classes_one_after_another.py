"""Classes that come one after another, without forgetting (a key-value bottleneck), beside a linear layer."""

# %% A frozen encoder, a stream of one class at a time
import torch
from torch import nn

from netwright.data import class_incremental_stream, continual_metrics, load
from netwright.nn import DKVBClassifier, KeyValueBottleneck
from netwright.nn.kv_bottleneck import fit_keys

data, order = load("digits"), [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
x, y = data.test.images / 255, data.test.labels
encoder = nn.Flatten()  # in earnest a trained network: DKVBClassifier(network, bottleneck, layer="layer3")


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# %% Keys are fitted to unlabelled images and frozen; values alone are trained
bottleneck = KeyValueBottleneck(64, num_pairs=64, num_codebooks=32, value_dim=10, sparse=True, generator=draws())
fit_keys(bottleneck, encoder, [data.train.images / 255], epochs=10, generator=draws())
bottleneck.freeze_keys()


# %% The same stream for both: what was learned of earlier classes stays where the keys of later ones are others
def streamed(model: nn.Module, lr: float) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    matrix = []
    for step in class_incremental_stream(data.train, order, epochs_per_step=5, generator=draws()):
        for images, labels in step:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        right = model(x).argmax(1) == y
        matrix.append([float(right[y == c].float().mean()) for c in order])
    print({name: round(value, 3) for name, value in continual_metrics(matrix).items() if isinstance(value, float)})


streamed(DKVBClassifier(encoder, bottleneck), lr=8.0)
torch.manual_seed(0)
streamed(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), lr=0.1)
