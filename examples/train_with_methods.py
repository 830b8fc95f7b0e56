"""Four training methods on your own network: in your own loop, and in Lightning's Trainer."""

# %% Data, and a network of yours
import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from netwright.data.indexed import IndexedDataset
from netwright.train import callbacks, gradient_noise, self_distillation, tract, weight_compander

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
x, y = (x - x.mean()) / x.std(), torch.tensor(labels)  # TrAct asks for standardised inputs
train_set, epochs = TensorDataset(x[:1400], y[:1400]), 6
loader = DataLoader(IndexedDataset(train_set), batch_size=64, shuffle=True)  # PS-KD asks for an index


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 10)
    )


def accuracy(net: nn.Module) -> float:
    net.eval()
    with torch.inference_mode():
        return (net(x[1400:]).argmax(1) == y[1400:]).float().mean().item()


# %% In your own loop: layers first, then the optimiser, then the noise; the memory beside the loss
net = network()
tract.apply_tract(net)
weight_compander.apply_weight_compander(net)
optimizer = torch.optim.SGD(weight_compander.param_groups(net, weight_decay=5e-4), lr=0.05, momentum=0.9)
gradient_noise.register_gradient_noise(optimizer, eta=1e-4)
memory, loss_of = self_distillation.PSKDTargets(1400, 10, max_epochs=epochs), self_distillation.PSKDLoss()
for epoch in range(epochs):
    for batch, target, ids in loader:
        logits = net(batch)
        loss = loss_of(logits, memory.soften(ids, target, epoch))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        memory.update(ids, logits)
weight_compander.remove_weight_compander(net)  # plain layers again
tract.remove_tract(net)
print(f"own loop  accuracy {accuracy(net):.3f}")


# %% The same in Lightning: your module does not change
class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.net(batch)

    def training_step(self, batch, batch_idx):
        inputs, target = batch
        return nn.functional.cross_entropy(self(inputs), target)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


module = Digits()
methods = [
    callbacks.TrActCallback(),
    callbacks.WeightCompanderCallback(),
    callbacks.GradientNoiseCallback(eta=1e-4),
    callbacks.PSKDCallback(alpha_T=0.8),
]
trainer = lightning.Trainer(
    max_epochs=epochs, callbacks=methods, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, accelerator="cpu",
)  # fmt: skip
trainer.fit(module, loader)
print(f"Trainer   accuracy {accuracy(module):.3f}")
