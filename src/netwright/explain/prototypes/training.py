"""Training of the prototype classifier of Li et al., AAAI 2018, arXiv:1710.04806, under Lightning."""

from __future__ import annotations

import lightning
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from netwright.explain.prototypes.loss import PrototypeLoss, PrototypeTerms
from netwright.explain.prototypes.model import PrototypeClassifier, PrototypeOutput
from netwright.train import channels_last


class LitPrototypeClassifier(lightning.LightningModule):
    """Trains a prototype classifier with Adam; called, it gives logits.

    Inputs are what the decoder is to give back, in [0, 1] where that ends in a sigmoid: do not standardise them.
    Convolutions are laid out channels last.

    Args:
        network: The classifier, whose sizes are known.
        loss: Loss; that of the published MNIST run by default, or without reconstruction where there is no decoder.
        lr: Learning rate, > 0; the paper uses 0.002 with batches of 250.

    Raises:
        ValueError: If ``lr`` is not positive, or the prototypes have no size yet.

    Example:
        >>> from netwright.data import Batches, TensorImages
        >>> from netwright.explain.prototypes import mnist_conv_decoder, mnist_conv_encoder
        >>> from netwright.train import fit
        >>> images = TensorImages(torch.zeros(20, 1, 28, 28, dtype=torch.uint8), torch.arange(20) % 10)
        >>> network = PrototypeClassifier(mnist_conv_encoder(), mnist_conv_decoder(), 15, 10, input_shape=(1, 28, 28))
        >>> history = fit(LitPrototypeClassifier(network), Batches(images, 10), epochs=1)
        >>> sorted(history.last)
        ['cross_entropy', 'lr', 'r1', 'r2', 'reconstruction', 'seconds', 'train_loss']
    """

    def __init__(self, network: PrototypeClassifier, loss: PrototypeLoss | None = None, *, lr: float = 2e-3):
        super().__init__()
        if not lr > 0:
            raise ValueError(f"lr must be > 0, got {lr}")
        if any(isinstance(parameter, UninitializedParameter) for parameter in network.parameters()):
            raise ValueError("network must know its sizes to be trained: give input_shape, or run one batch")
        self.network = network.to(memory_format=torch.channels_last)
        without = PrototypeLoss(lambda_ae=0.0) if network.decoder is None else PrototypeLoss()
        self.loss, self.lr = without if loss is None else loss, lr

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.network.logits(x)

    def terms(self, batch: tuple[Tensor, ...]) -> tuple[PrototypeOutput, PrototypeTerms]:
        """What the classifier gives for a batch, and its loss."""
        x, labels = channels_last(batch[0]), batch[1]
        output: PrototypeOutput = self.network(x)
        return output, self.loss(output, x, labels, self.network.prototypes if self.loss.bank_size else None)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """The loss of a batch; its terms are recorded."""
        _, terms = self.terms(batch)
        named = {"train_loss": terms.total} | {n: v for n, v in terms._asdict().items() if n != "total"}
        figures = {name: value.detach() for name, value in named.items()}
        self.log_dict(figures, on_step=False, on_epoch=True, batch_size=len(batch[1]))
        return terms.total

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Loss and accuracy of a validation batch."""
        output, terms = self.terms(batch)
        accuracy = (output.logits.argmax(1) == batch[1]).float().mean()
        figures = {"val_loss": terms.total, "val_accuracy": accuracy}
        self.log_dict(figures, on_epoch=True, batch_size=len(batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on every parameter."""
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=self.lr)
