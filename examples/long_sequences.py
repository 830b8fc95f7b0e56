"""A linear state-space layer (LSSL) in a network of your own: trained as a convolution, used one step at a time."""

# %% Sequences in which the answer lies far back: which of four tones sounded at the beginning
import torch
from torch import nn

from netwright.nn import LSSL

torch.manual_seed(0)
LENGTH, START = 300, 40


def sequences(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(4, (count,))
    time = torch.arange(START) / START
    u = 0.1 * torch.randn(count, LENGTH, 1)
    u[:, :START, 0] += torch.sin(2 * torch.pi * (labels[:, None] + 1) * time)
    return u, labels


# %% The network: a layer, and a linear one on what it says in the end
class Tones(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.widen, self.layer, self.head = nn.Linear(1, 16), LSSL(16, d_state=32), nn.Linear(16, 4)

    def forward(self, u: torch.Tensor, rate: float = 1.0) -> torch.Tensor:
        return self.head(self.layer(self.widen(u), rate=rate)[:, -1])


net = Tones()
rest = [*net.widen.parameters(), *net.head.parameters()]
optimizer = torch.optim.AdamW([{"params": rest, "lr": 1e-2}, *net.layer.param_groups(lr=1e-2, weight_decay=0.0)])
for _ in range(100):
    u, labels = sequences(32)
    loss = nn.functional.cross_entropy(net(u), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# %% As it was trained, on every second sample with a step twice as long, and one input at a time
def share(answers: torch.Tensor) -> str:
    return f"{(answers.argmax(1) == labels).float().mean():.3f}"


u, labels = sequences(400)
with torch.inference_mode():
    print("accuracy", share(net(u)), " every second sample", share(net(u[:, ::2], rate=2.0)))
    state = net.layer.initial_state(len(u))
    for u_t in u.unbind(1):
        y_t, state = net.layer.step(net.widen(u_t), state)
    print("largest gap between both ways", f"{(net.head(y_t) - net(u)).abs().max():.1e}")
