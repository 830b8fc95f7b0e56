"""What an architecture is worth: the accuracy of its network after a training from scratch.

Wu et al., "FBNet", CVPR 2019, arXiv:1812.03443, draw architectures from the distribution that was learned, train each
and keep the best; Li and Talwalkar, "Random Search and Reproducibility for Neural Architecture Search", 2019,
arXiv:1902.07638, score random ones so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from netwright.search import spaces

if TYPE_CHECKING:
    from netwright.search.genotype import Genotype
    from netwright.train.fitting import Loader


class ScratchAccuracy:
    """Trains the network of a genotype and tells its accuracy on held-out data, in [0, 1].

    The ``evaluate`` of :class:`~netwright.search.sampling.SampleSelector` and of
    :class:`~netwright.search.random_search.RandomSearch`. All architectures have the same initial seed, batch order and
    budget: stochastic gradient descent with Nesterov's momentum, the learning rate annealed by a cosine.

    Args:
        train: Batches ``(inputs, labels)`` to train on, with ``set_epoch`` and a length, such as
            :class:`netwright.data.Batches`.
        validation: Batches to measure on.
        num_classes: Number of classes.
        epochs: Epochs of each training, >= 1.
        lr: Learning rate at the start, > 0.
        seed: Of the initial weights and of everything random in the training.
        **options: Size of the networks, as ``space.build`` takes it.

    Raises:
        ValueError: If ``epochs`` or ``lr`` is out of range; in a call, if a loader is empty.
        FloatingPointError: In a call, when a loss is no longer finite.

    Example:
        >>> import torch
        >>> from netwright.data import Batches, TensorImages
        >>> from netwright.search import FBNet, SampleSelector
        >>> images = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8)
        >>> batches = Batches(TensorImages(images, torch.arange(16) % 2), 8)
        >>> evaluate = ScratchAccuracy(batches, batches, num_classes=2, epochs=1)
        >>> supernet = spaces.get("micro-chain").supernet(1, 2, seed=0)
        >>> search = FBNet(supernet, warmup_epochs=0, epochs=1, selector=SampleSelector(1, evaluate))
        >>> search.search(batches, batches, seed=0).genotype.space
        'micro-chain'
    """

    def __init__(
        self,
        train: Loader,
        validation: Iterable[Any],
        num_classes: int,
        epochs: int = 10,
        *,
        lr: float = 0.1,
        seed: int = 0,
        **options: Any,
    ):
        if epochs < 1:
            raise ValueError(f"epochs must be >= 1, got {epochs}")
        if not lr > 0:
            raise ValueError(f"lr must be > 0, got {lr}")
        self.train, self.validation, self.num_classes, self.epochs = train, validation, num_classes, epochs
        self.lr, self.seed, self.options = lr, seed, options

    def __call__(self, genotype: Genotype) -> float:
        """The accuracy."""
        from netwright.metrics import accuracy
        from netwright.train.classifier import Classifier, evaluate
        from netwright.train.fitting import fit
        from netwright.train.schedules import CosineProgress

        x, _ = next(iter(self.train))[:2]
        network = spaces.get(genotype.space).build(
            genotype, x.shape[1], self.num_classes, seed=self.seed, **self.options
        )
        fit(
            Classifier(network, lr=self.lr),
            self.train,
            epochs=self.epochs,
            callbacks=[CosineProgress()],
            seed=self.seed,
            description="training of a drawn architecture",
        )
        return accuracy(*evaluate(network, self.validation))
