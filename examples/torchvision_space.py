"""Turn torchvision's ResNet-18 into a search space (kernels, widths, which blocks to leave out); search it on a folder.

The same file serves the command line: netwright search FOLDER --space torchvision_space.py:space --method proxylessnas
"""

# %% The space: the network as torchvision builds it, with a choice in the place of every block
# --8<-- [start:space]
import copy
from functools import partial

from torch import nn
from torchvision.models import resnet18

from netwright.search import ChoiceSpace


def block(old, kernel, width):
    """A copy of a basic block with another kernel and another width between its convolutions."""
    new = copy.deepcopy(old)
    if (kernel, width) != (3, old.conv1.out_channels):  # the original keeps its weights
        new.conv1 = nn.Conv2d(old.conv1.in_channels, width, kernel, old.stride, kernel // 2, bias=False)
        new.bn1 = nn.BatchNorm2d(width)
        new.conv2 = nn.Conv2d(width, old.conv2.out_channels, kernel, 1, kernel // 2, bias=False)
    return new


def network(choose, in_channels, num_classes):
    net = resnet18(num_classes=num_classes)
    net.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)  # a small stem for small images
    net.maxpool = nn.Identity()
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for number, old in enumerate(stage):
            width = old.conv1.out_channels
            options = {f"k{k}_w{w}": partial(block, old, k, w) for k in (3, 5) for w in (width // 4, width)}
            if old.downsample is None:  # width and resolution stay: the block may be left out
                options["skip"] = nn.Identity
            stage[number] = choose(f"width{width}_{number}", options, stride=old.stride, kind="basic block")
    return net


space = ChoiceSpace("resnet18", network, shape=(32, 32))
# --8<-- [end:space]


def main():
    # %% A folder with one folder of pictures a class: digits, as an example
    import tempfile
    from pathlib import Path

    import torch
    from PIL import Image

    from netwright.data import Batches, load
    from netwright.search import ProxylessNAS

    print(f"{space.size} networks: {space.choices()}")
    digits = load("digits")
    folder = tempfile.TemporaryDirectory()
    for number, (picture, label) in enumerate(zip(digits.train.images, digits.train.labels, strict=True)):
        if label < 3 and number < 600:
            at = Path(folder.name) / f"digit-{int(label)}"
            at.mkdir(exist_ok=True)
            Image.fromarray(picture[0].numpy()).convert("RGB").save(at / f"{number}.png")
    data = load(folder.name)

    # %% The search, one path at a time, so that the supernet needs no more memory than a network
    supernet = space.supernet(data.shape[0], len(data.classes), seed=0)
    searcher = ProxylessNAS(supernet, warmup_epochs=1, epochs=2, settle_epochs=0, arch_every=1, alpha_lr=3e-2)
    parts = searcher.split(data.train.labels, seed=0)
    halves = [
        Batches(data.train.subset(part), 32, seed=0, normalise=data.normalise(), name=name)
        for part, name in zip(parts, ("weights", "architecture"), strict=True)
    ]
    result = searcher.search(*halves, seed=0)
    print(result.genotype.to_json())
    print(f"accuracy of the most probable path: {result.epochs[-1]['argmax_accuracy']:.2f}")

    # %% The network that was found, an ordinary ResNet, to be trained from scratch
    found = space.build(result.genotype, data.shape[0], len(data.classes), seed=0)
    print(sum(p.numel() for p in found.parameters()), "parameters,", type(found).__name__)
    with torch.inference_mode():
        print(found.eval()(torch.rand(1, *data.shape)).shape)
    folder.cleanup()


if __name__ == "__main__":
    main()
