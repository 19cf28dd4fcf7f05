"""Vision encoders: against timm, shapes, gradients, errors."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file
from weights import integers, weight

from vlarft.nets.vit import DINOV2_LARGE, SIGLIP_SO400M, ConvEncoder, ConvEncoderConfig, ViT, ViTConfig, coordinates

DINO_LIKE = ViTConfig(image_size=28, width=24, depth=3, num_heads=2, mlp_dim=40, num_registers=2, output_block=1)
SIGLIP_LIKE = replace(
    DINO_LIKE,
    class_token=False,
    num_registers=0,
    layer_scale=False,
    attention_pool=True,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
)
CONV = ConvEncoderConfig(image_size=16, channels=(16, 16), strides=(2, 1), num_keypoints=3, width=8, film_dim=4)


def scramble(module: torch.nn.Module) -> None:
    """Random values everywhere, so that no zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def import_vision_transformer(monkeypatch):
    """timm's ViT. timm imports torchvision, which a ViT does not use: one built for another torch is replaced."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        for name in ("", ".datasets", ".models", ".models.feature_extraction", ".ops", ".ops.misc", ".transforms"):
            monkeypatch.setitem(sys.modules, f"torchvision{name}", MagicMock())
        monkeypatch.setitem(sys.modules, "torchvision.transforms.functional", MagicMock())
    return pytest.importorskip("timm.models.vision_transformer").VisionTransformer


@pytest.mark.parametrize("cfg", [DINO_LIKE, SIGLIP_LIKE], ids=["dinov2", "siglip"])
def test_equals_timm_at_a_small_size(cfg, monkeypatch):
    oracle = import_vision_transformer(monkeypatch)(
        img_size=cfg.image_size,
        patch_size=cfg.patch_size,
        embed_dim=cfg.width,
        depth=cfg.depth,
        num_heads=cfg.num_heads,
        mlp_ratio=cfg.mlp_dim / cfg.width,
        class_token=cfg.class_token,
        reg_tokens=cfg.num_registers,
        no_embed_class=True,
        init_values=1e-5 if cfg.layer_scale else None,
        global_pool="map" if cfg.attention_pool else "token",
        num_classes=0,
        norm_layer=partial(torch.nn.LayerNorm, eps=cfg.norm_eps),
    ).eval()
    model = ViT(cfg)
    scramble(model)
    oracle.load_state_dict(model.state_dict())  # strict: the names are timm's
    images = torch.rand(2, 3, 28, 28)
    normalised = (images - torch.tensor(cfg.mean).view(3, 1, 1)) / torch.tensor(cfg.std).view(3, 1, 1)
    expected = oracle.get_intermediate_layers(normalised, n={cfg.output_block})[0]
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    if cfg.attention_pool:
        tokens = torch.randn(2, 4, cfg.width)
        torch.testing.assert_close(model.attn_pool(tokens), oracle.attn_pool(tokens), atol=1e-5, rtol=1e-5)


def test_paper_sizes():
    with torch.device("meta"):
        dino, siglip = ViT(DINOV2_LARGE), ViT(SIGLIP_SO400M)
    assert dino(torch.rand(1, 3, 224, 224, device="meta")).shape == (1, 256, 1024)
    assert siglip(torch.rand(1, 3, 224, 224, device="meta")).shape == (1, 256, 1152)


@pytest.mark.slow
@pytest.mark.parametrize(("cfg", "name"), [(DINOV2_LARGE, "dino"), (SIGLIP_SO400M, "siglip")], ids=["dinov2", "siglip"])
def test_public_sizes_at_full_size(cfg, name):
    """Patch tokens of the second-to-last block, as the public code takes them; later parts are not built."""
    golden = load_file(Path(__file__).parent / "golden" / "06_vision.safetensors")
    with torch.device("meta"):
        model = ViT(replace(cfg, depth=cfg.output_block + 1, attention_pool=False))
    used = {k: v for k, v in model.state_dict().items() if not k.startswith("norm.")}  # the final norm is not read
    tensors = {k: torch.from_numpy(weight(f"{name}_featurizer.{k}", v.shape)) for k, v in used.items()}
    assert model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys == []
    coarse = integers("input/image_coarse", (28, 28, 3), 192).repeat(8, axis=0).repeat(8, axis=1)
    image = torch.from_numpy(coarse + integers("input/image_fine", (224, 224, 3), 64))  # (H, W, 3)
    assert torch.equal(image[0], golden["image_row0"].long())
    with torch.no_grad():
        tokens = model(image.float().permute(2, 0, 1)[None] / 255)[0]  # (256, D)
    torch.testing.assert_close(tokens[::16], golden[f"{name}_patches_every16"], atol=5e-5, rtol=0)
    torch.testing.assert_close(tokens[:, :8], golden[f"{name}_all_patches_head"], atol=5e-5, rtol=0)


def test_gradient_reaches_the_used_blocks_only():
    model = ViT(DINO_LIKE)
    scramble(model)
    model(torch.rand(2, 3, 28, 28)).square().sum().backward()
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert unused == {name for name, _ in model.named_parameters() if name.startswith(("blocks.2.", "norm."))}


def test_keypoints_find_a_blob():
    # with features = the input's brightness and a sharp softmax, the token's first two numbers are the blob's place
    cfg = replace(
        CONV, channels=(16,), kernels=(3,), strides=(1,), film_dim=None, num_keypoints=1, coordinate_gain=8.0, width=2
    )
    model = ConvEncoder(cfg)
    with torch.no_grad():
        model.norms[0] = torch.nn.Identity()
        model.convs[0].weight.zero_()
        model.convs[0].bias.zero_()
        model.convs[0].weight[0, 0, 1, 1] = 1.0  # feature 0 = red
        model.attend.weight.zero_()
        model.attend.weight[0, 0] = 200.0
        model.embed.weight.zero_()
        model.embed.weight[0, 0] = model.embed.weight[1, 1] = 1.0
        model.embed.bias.zero_()
        model.slot.zero_()
    images = torch.zeros(1, 3, 16, 16)
    images[0, 0, 4, 11] = 1.0  # row 4, column 11
    x, y = model(images)[0, 0].tolist()
    assert (x / 8, y / 8) == pytest.approx(((11 + 0.5) / 8 - 1, (4 + 0.5) / 8 - 1), abs=1e-4)


def test_coordinates_are_pixel_centres():
    xy = coordinates(torch.zeros(1, 3, 2, 4))
    assert xy[0, 0, 0].tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert xy[0, 1, :, 0].tolist() == [-0.5, 0.5]


def test_conv_encoder_gradients_and_film():
    model = ConvEncoder(CONV)
    images, language = torch.rand(2, 3, 16, 16), torch.randn(2, 4)
    tokens = model(images, language)
    assert tokens.shape == (2, 3, 8)
    tokens.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert not torch.allclose(tokens, model(images, -language))


def test_errors():
    with pytest.raises(ValueError, match=r"image_size 30 is not a multiple of patch_size 14; use 28"):
        ViT(replace(DINO_LIKE, image_size=30))
    with pytest.raises(ValueError, match=r"output_block 3 must lie in 0\.\.2"):
        ViT(replace(DINO_LIKE, output_block=3))
    with pytest.raises(ValueError, match=r"images: got shape \(1, 3, 14, 14\), .* \(B, 3, 28, 28\)"):
        ViT(DINO_LIKE)(torch.rand(1, 3, 14, 14))
    with pytest.raises(ValueError, match="2 channels, 2 kernels, 3 strides"):
        ConvEncoder(replace(CONV, strides=(1, 1, 1)))
    with pytest.raises(ValueError, match="film_dim is 4 but an instruction embedding was not given"):
        ConvEncoder(CONV)(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="film_dim is None but an instruction embedding was given"):
        ConvEncoder(replace(CONV, film_dim=None))(torch.rand(1, 3, 16, 16), torch.randn(1, 4))
