"""A classifier that does not go by a bias of its training images (CDvG), with a change of the bias of your own."""

# %% Digits in colours: in training every digit wears the colour of its class, in the test any colour
import torch
from torch import nn

from netwright.data import Batches, colored_mnist, load
from netwright.data.biased import PALETTE, recolored
from netwright.train import CDvG, Classifier, bias_metrics, fit
from netwright.train.debias import signed_range

digits, signed = load("digits"), signed_range(3)
train = colored_mnist(digits.train.images, digits.train.labels, ratio=1.0)
test = colored_mnist(digits.test.images, digits.test.labels, ratio=0.1)


def features() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
    )  # fmt: skip


# %% What turns an image into one of another class's bias: here known; BiasTranslator learns it from biased images alone
class Recolour:
    num_classes, shape = 10, train.shape

    def translate(self, x: torch.Tensor, y_target: torch.Tensor) -> torch.Tensor:
        pixels = ((x + 1) * 127.5).round().byte()
        return signed(recolored(pixels, torch.tensor(PALETTE)[y_target]))


# %% Plain training, and training on two views of each image that are drawn together
def told(name: str, network: nn.Module) -> None:
    pred = network.eval()(signed(test.images)).argmax(1)
    found = bias_metrics(pred, test.labels, test.bias)
    print(f"{name:6} unbiased {found['unbiased']:.3f}  in its own colour {found['aligned']:.3f}")


plain = Classifier(nn.Sequential(features(), nn.Linear(128, 10)))
fit(plain, Batches(train, 64, normalise=signed), epochs=5)
told("plain", plain)
module = CDvG(features(), 10, Recolour(), lambda_con=0.5)
fit(module, Batches(train, 64, normalise=signed), epochs=5)
told("CDvG", module)
