"""Classify the nodes of a graph of your own from few labels (DAGNN), each of which chooses how far it looks."""

# %% A graph: digits, each joined with its ten nearest; twenty labels a class
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch import nn

from netwright.nn import DAGNN

torch.manual_seed(0)
features, labels = load_digits(return_X_y=True)
ends = kneighbors_graph(features, 10).tocoo()
edge_index = torch.stack([torch.from_numpy(part).long() for part in (ends.row, ends.col)])
edge_index = torch.cat([edge_index, edge_index.flip(0)], 1).unique(dim=1)  # both ways
x, y = torch.tensor(features, dtype=torch.float32) / 16, torch.tensor(labels)
train = torch.cat([(y == c).nonzero()[:20, 0] for c in range(10)])
test = torch.ones(len(y), dtype=torch.bool)
test[train] = False

# %% Your own loop; the graph is normalised once and kept
for hops in (0, 10):
    net = DAGNN(64, 10, K=hops, dropout=0.5) if hops else nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=5e-4)
    for _ in range(60):
        logits = net.train()(x, edge_index) if hops else net(x)
        loss = nn.functional.cross_entropy(logits[train], y[train])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        answers = (net.eval()(x, edge_index) if hops else net(x)).argmax(1)
    print(f"{'DAGNN, 10 hops' if hops else 'no graph'}: accuracy {(answers == y)[test].float().mean():.3f}")
