"""Judge a claim of your own the way netwright judges a paper's: paired seeds, an interval, a computed verdict.

The claim: weight decay makes a small network better calibrated on the digits and costs no accuracy.
"""

# %% One arm for one seed: the arms share initialisation and batch order, so that they differ in the claim alone
import torch
from sklearn.datasets import load_digits
from torch import nn

from netwright.metrics import accuracy, expected_calibration_error
from netwright.papers.evidence import all_of, compare
from netwright.seeding import seeded, stream

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def arm(seed: int, weight_decay: float) -> tuple[float, float]:
    with seeded(seed, "init"):
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    order = stream(seed, "order")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay)
    for _ in range(400):
        batch = torch.randint(0, 200, (32,), generator=order)
        loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        probabilities = net(x[200:]).softmax(1)
    return accuracy(probabilities, y[200:]), expected_calibration_error(probabilities, y[200:])


# %% Five seeds an arm, then the verdict from the figures
plain = [arm(seed, 0.0) for seed in range(5)]
decayed = [arm(seed, 5e-3) for seed in range(5)]
better = compare([ece for _, ece in decayed], [ece for _, ece in plain], direction="less")
# "Not worse" is a claim too: no more than one point below.
as_good = compare([a for a, _ in decayed], [a for a, _ in plain], margin=-0.01)
for text, verdict in (("calibration error is smaller", better), ("accuracy is not lower by 0.01", as_good)):
    print(f"{text}: {verdict.verdict}\n  {verdict.reason}")
print(f"both together: {all_of(better, as_good).verdict}")
