"""Learn which weights to keep (HYDRA): train dense, learn a score for each weight, train the weights that are left."""

# %% Data and a network
import torch
from sklearn.datasets import load_digits
from torch import nn

from netwright.compress import prune

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
y = torch.tensor(labels)
net = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(256, 10),
)  # fmt: skip


# %% Your own training loop, called once for each stage with what is to be trained switched on
def train(net: nn.Module, stage: str) -> None:
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr={"pretrain": 0.1, "prune": 0.1, "finetune": 0.05}[stage], momentum=0.9)
    for _ in range(200):
        batch = torch.randint(0, 1400, (64,))
        loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        accuracy = (net(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
    print(f"{stage:9} sparsity {prune.sparsity(net).sparsity:.3f}  accuracy {accuracy:.3f}")


# %% Three stages at 90 % sparsity, then plain layers
prune.HydraPruner(0.9).run(net, train)
prune.remove(net)
