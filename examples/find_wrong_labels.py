"""Find wrong labels with your own network in your own loop (ELR), and train without memorising them."""

# %% Data with a fifth of the labels wrong, which yours may have without anyone knowing
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from netwright.data import IndexedDataset, symmetric_noise
from netwright.train import ELRLoss, label_doubts

torch.manual_seed(0)
images, true = (torch.tensor(part) for part in load_digits(return_X_y=True))
x = (images.float() / 16).view(-1, 1, 8, 8)
labels, wrong = symmetric_noise(true[:1400], 0.2, 10, torch.Generator().manual_seed(0), exclude_true=True)
loader = DataLoader(IndexedDataset(TensorDataset(x[:1400], labels)), batch_size=64, shuffle=True)


# %% The same network and loop with cross-entropy and with ELR, whose loss asks for the index of each example
def trained(loss_of) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(25):
        for batch, target, index in loader:
            optimizer.zero_grad()
            loss_of(net(batch), target, index).backward()
            optimizer.step()
    return net.eval()


elr = ELRLoss(1400, 10, lam=3.0)
for name, loss_of in (("cross-entropy", lambda z, y, index: nn.functional.cross_entropy(z, y)), ("ELR", elr)):
    net = trained(loss_of)
    with torch.inference_mode():
        answers = net(x).argmax(1)
    memorised = (answers[:1400] == labels)[wrong].float().mean()
    print(f"{name:14} accuracy {(answers == true)[1400:].float().mean():.3f}  wrong labels learned {memorised:.2f}")

# %% The labels that deserve a look, the most doubtful first
doubts = label_doubts(elr.target, labels)
print(doubts)
found = wrong[list(doubts.index)]
print(f"{found.float().mean():.1%} of them are wrong indeed, {int(found.sum())} of {int(wrong.sum())}")
for place in range(3):
    print(f"image {doubts.index[place]}: {doubts.given[place]} by its label, {doubts.suggested[place]} by the network")
