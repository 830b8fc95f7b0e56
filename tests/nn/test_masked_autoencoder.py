"""Masked autoencoders: layout, independence of what is dropped, an independent encoder, the authors' files."""

import functools
import math

import pytest
import torch
from torch import nn

from netwright.console import UserError
from netwright.data.condense import drop_patches, restore
from netwright.nn.masked_autoencoder import MaskedAutoencoder, published, sine_places
from netwright.seeding import seeded, stream

SMALL = {"dim": 16, "depth": 2, "heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
IMAGES = torch.rand(3, 3, 12, 8, generator=stream(0, "images"))


def network(shape=(3, 12, 8), patch=4, **options):
    with seeded(0, "init"):
        return MaskedAutoencoder(shape, patch, **SMALL | {"top": 1.0} | options).eval()


def kept(number=6, drop=2):
    order = torch.rand(3, number, generator=stream(0, "mask")).argsort(1)
    return order >= drop


def test_patches_are_put_together_again():
    net = network()
    patches = net.patches(IMAGES)
    assert patches.shape == (3, 6, 48)
    corner = IMAGES[:, :, 4:8, 4:8].permute(0, 2, 3, 1).flatten(1)  # second row, second column
    assert torch.equal(patches[:, 3], corner)
    assert torch.equal(net.images(patches), IMAGES)


def test_what_is_dropped_has_no_influence():
    net, mask = network(), kept()
    standard = net.standardised(IMAGES)
    other = net.patches(standard).clone()
    other[~mask] = 7.0
    with torch.no_grad():
        assert torch.equal(net.predict(standard, mask), net.predict(net.images(other), mask))
        other[mask] += 1.0
        assert not torch.allclose(net.predict(standard, mask), net.predict(net.images(other), mask), atol=1e-3)


def test_images_of_a_batch_do_not_look_at_each_other():
    net, mask = network(), kept()
    with torch.no_grad():
        together = net.predict(IMAGES, mask)
        alone = torch.cat([net.predict(IMAGES[[i]], mask[[i]]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_gaps_know_where_they_are():
    """Without places every gap of an image would be drawn alike."""
    net, mask = network(), kept()
    with torch.no_grad():
        drawn = net.predict(IMAGES, mask)
    assert not torch.allclose(drawn[0][~mask[0]][0], drawn[0][~mask[0]][1], atol=1e-4)


def test_it_fills_dropped_patches_and_leaves_the_others():
    images = (IMAGES * 255).to(torch.uint8)
    patched = drop_patches(images, torch.rand(3, 6, generator=stream(0, "importance")), 0.4, 4)
    net = network(top=255.0)
    filled = restore(patched, net)
    _, mask = patched.canvas()
    assert torch.equal(filled[mask.expand_as(filled)], images[mask.expand_as(images)])
    whole, _ = patched.canvas()
    with torch.no_grad():
        standard = net.standardised(torch.where(mask, whole, 0) / 255)
        drawn = net.images(net.predict(standard, mask[:, 0, ::4, ::4].flatten(1))) * net.std + net.mean
    expected = (drawn.clamp(0, 1) * 255).round().to(torch.uint8)
    gaps = ~mask.expand_as(filled)
    assert torch.equal(filled[gaps], expected[gaps])


def test_the_encoder_is_timms_vision_transformer():
    timm = pytest.importorskip("timm")
    with seeded(0, "init"):
        peer = timm.models.VisionTransformer(
            img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0, global_pool="token",
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        ).eval()  # fmt: skip
    net = network((3, 8, 8))
    for part in ("patch_embed", "cls_token", "pos_embed", "blocks", "norm"):
        for name, value in net.state_dict().items():
            if name == part or name.startswith(f"{part}."):
                peer.state_dict()[name].copy_(value)
    seen = []
    net.norm.register_forward_hook(lambda module, given, out: seen.append(out))
    x = torch.randn(2, 3, 8, 8, generator=stream(0, "x"))
    with torch.no_grad():
        net.predict(x, torch.ones(2, 4, dtype=torch.bool))
        assert torch.allclose(seen[0], peer.forward_features(x), atol=1e-5)


def test_places_by_hand():
    places = sine_places(8, 2, 3)[0]
    assert not places[0].any()
    row, column = 1, 2
    angles = [column, column / 100, row, row / 100]
    expected = [f(a) for pair in (angles[:2], angles[2:]) for f in (math.sin, math.cos) for a in pair]
    assert places[1 + row * 3 + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_authors_files_are_read(tmp_path):
    with seeded(0, "init"):
        net = MaskedAutoencoder(
            (3, 16, 16), 8, dim=64, depth=2, heads=1, decoder_dim=32, decoder_depth=1, decoder_heads=16,
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
        ).eval()  # fmt: skip
    torch.save({"model": net.state_dict()}, tmp_path / "mae.pth")
    found = published(tmp_path / "mae.pth")
    images = torch.rand(2, 3, 16, 16, generator=stream(0, "x")) * 255
    mask = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    mask[:, :, :8, 8:] = False
    with torch.no_grad():
        assert torch.equal(found(images, mask), net(images, mask))
    names = set(net.state_dict())
    assert {"blocks.1.attn.qkv.weight", "decoder_blocks.0.mlp.fc2.bias", "decoder_pred.bias", "mask_token"} <= names
    torch.save({"model": {k: v for k, v in net.state_dict().items() if "decoder" not in k}}, tmp_path / "encoder.pth")
    with pytest.raises(UserError, match="no masked autoencoder with its decoder"):
        published(tmp_path / "encoder.pth")
    (tmp_path / "damaged.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        published(tmp_path / "damaged.pth")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: network(patch=5), "patch must divide"),
        (lambda: network(heads=3), "dim must be a multiple of 4 and of its 3 heads, got 16"),
        (lambda: network(decoder_dim=6), "decoder_dim must be a multiple"),
        (lambda: network(depth=0), "depth must be >= 1"),
        (lambda: network(mean=(0.5,)), "mean and std must be 3 numbers"),
        (lambda: network(std=(0.0, 1.0, 1.0)), "std > 0"),
        (lambda: network(top=0.0), "top must be > 0"),
        (lambda: network()(torch.rand(1, 3, 8, 8), torch.ones(1, 1, 8, 8, dtype=torch.bool)), "images must have shape"),
        (lambda: network()(IMAGES, torch.rand(3, 1, 12, 8) > 0.5), "whole patches"),
        (lambda: network().predict(IMAGES, torch.zeros(3, 6, dtype=torch.bool)), "at least 1"),
        (lambda: network().predict(IMAGES, torch.ones(3, 6, dtype=torch.bool).tril(2)), "as many patches"),
        (lambda: network().predict(IMAGES, torch.ones(3, 5, dtype=torch.bool)), "kept must have shape"),
    ],
)
def test_bad_input(call, told):
    with pytest.raises(ValueError, match=told):
        call()
