"""Vision-language model: the paper's sizes, sequence order, what the context attends to, text, errors."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from weights import weight

from vlarft.nets.lora import LoRAConfig, add_lora
from vlarft.nets.transformer import Decoder, TransformerConfig
from vlarft.nets.vit import ConvEncoderConfig, ViTConfig
from vlarft.nets.vlm import QWEN2_HALF_B, VLM, ByteTokenizer, VLMConfig

LANGUAGE = TransformerConfig(depth=2, width=16, num_heads=2, num_kv_heads=1, ffn_dim=24, qkv_bias=True, init_std=0.2)
DINO = ViTConfig(image_size=28, width=8, depth=2, num_heads=2, mlp_dim=12, num_registers=1, output_block=1)
CFG = VLMConfig(
    vision=DINO,
    fused_vision=replace(DINO, width=12, class_token=False, num_registers=0),
    projector_dim=20,
    language=LANGUAGE,
    vocabulary=259,
    num_queries=3,
    query_init_std=0.5,
)
CONV = replace(
    CFG,
    vision=ConvEncoderConfig(
        image_size=16, channels=(16,), kernels=(7,), strides=(4,), num_keypoints=4, width=8, film_dim=6
    ),
    fused_vision=None,
)


def make(cfg: VLMConfig = CFG) -> VLM:
    torch.manual_seed(0)
    return VLM(cfg)


def images(cfg: VLMConfig = CFG, batch: int = 2) -> torch.Tensor:
    size = cfg.vision.image_size
    return torch.rand(batch, cfg.num_cameras, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_paper_has_the_public_models_parameters():
    with torch.device("meta"):
        model = VLM(VLMConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_252_553_792


@pytest.mark.parametrize("cameras", [1, 2])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("shift", [False, True])
def test_context_against_the_sequence_built_by_hand(cameras, group, shift):
    cfg = replace(CFG, num_cameras=cameras, bytes_per_token=group, shift_context=shift)
    model, texts = make(cfg), ["Push", "open the drawer"]
    out = model(images(cfg), texts)
    for row, text in enumerate(texts):
        ids = [257, *text.lower().encode(), 258]
        ids += [256] * (-len(ids) % group)
        table = model.embed_tokens.weight
        words = torch.stack([sum(table[ids[i + j] + 259 * j] for j in range(group)) for i in range(0, len(ids), group)])
        views = [
            torch.cat([model.vision(view[None]), model.fused_vision(view[None])], dim=-1)[0]
            for view in images(cfg)[row]
        ]
        patches = model.projector(torch.cat(views))  # (P, D)
        sequence = torch.cat([words[:1], patches, words[1:], model.action_queries.weight])
        hidden = model.language_model(sequence[None])[0]
        start, last = 0 if shift else 1, len(sequence) - 3 - (1 if shift else 0)
        expected = torch.cat([hidden[start : start + len(patches)], hidden[last : last + 3]])
        torch.testing.assert_close(out.context[row], expected, atol=1e-5, rtol=1e-5)


def test_language_model_is_qwen2():
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError):  # transformers imports it where it is installed, fit or not
        sys.modules["torchvision"] = None
    transformers = pytest.importorskip("transformers")
    oracle = transformers.Qwen2Model(
        transformers.Qwen2Config(
            vocab_size=259,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            rope_theta=LANGUAGE.rope_theta,
            attn_implementation="eager",
        )
    ).eval()
    model = make()
    oracle.load_state_dict({"embed_tokens.weight": model.embed_tokens.weight, **model.language_model.state_dict()})
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    actual = model.language_model(model.embed_tokens(ids))
    torch.testing.assert_close(actual, oracle(input_ids=ids).last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_public_language_model_at_full_size():
    """Hidden states and the tied head's logits of the public code on the paper's prompt."""
    golden, seen = load_file(Path(__file__).parent / "golden" / "05_qwen.safetensors"), {}
    with torch.device("meta"):
        model = Decoder(QWEN2_HALF_B)
    tensors = {k: torch.from_numpy(weight(f"model.{k}", v.shape)) for k, v in model.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    for i in (0, 22):
        model.layers[i].register_forward_hook(lambda _m, _i, out, i=i: seen.update({i: out[0]}))
    table = torch.from_numpy(weight("model.embed_tokens.weight", (VLMConfig().vocabulary, QWEN2_HALF_B.width)))
    embedded = table[golden["input_ids"].long()]  # (1, 41, D)
    with torch.no_grad():
        hidden = model(embedded)[0]
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(embedded[0, :, :16], golden["hidden_after_embed_head"], **close)
    torch.testing.assert_close(seen[0][:, :64], golden["hidden_after_layer1_head"], **close)
    torch.testing.assert_close(seen[22][:, :64], golden["hidden_before_final_layer_head"], **close)
    torch.testing.assert_close(hidden, golden["last_hidden"], **close)
    torch.testing.assert_close(table[:1024] @ hidden[-1], golden["logits_last_head"], **close)


def test_a_row_does_not_depend_on_the_batch():
    for cfg in (CFG, CONV):
        model = make(cfg)
        texts = ["push the plate", "open the top drawer of the cabinet"]
        both = model(images(cfg), texts)
        alone = model(images(cfg)[:1], texts[:1])
        torch.testing.assert_close(both.context[:1], alone.context, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(both.vision[:1], alone.vision, atol=1e-5, rtol=1e-5)


def test_instruction_modulates_the_conv_encoder_only():
    for cfg, changes in ((CFG, False), (CONV, True)):
        model = make(cfg)
        red, blue = (model(images(cfg, 1), [f"take the {colour} block"]) for colour in ("red", "blue"))
        assert torch.equal(red.vision, blue.vision) != changes
        assert not torch.allclose(red.context, blue.context)


def test_gradient_reaches_every_parameter():
    for cfg in (CFG, CONV):
        model = make(cfg)
        model(images(cfg), ["push the plate", "open the drawer"]).context.square().sum().backward()
        silent = {k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        assert {k for k in silent if not k.endswith(("vision.norm.weight", "vision.norm.bias"))} == set()


def test_gradient_reaches_every_trainable_parameter_and_no_frozen_one():
    cfg = replace(
        CFG, vision=replace(DINO, depth=3), fused_vision=replace(CFG.fused_vision, depth=3, attention_pool=True)
    )
    for adapters in (False, True):
        model = make(cfg)
        if adapters:
            add_lora(model, LoRAConfig(rank=2, alpha=4.0))
            model.action_queries.requires_grad_(True)
        for encoder in (model.vision, model.fused_vision):
            encoder.freeze_unread()
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                torch.nn.init.normal_(parameter)
        model(images(cfg), ["push the plate", "open the drawer"]).context.square().sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None and parameter.grad.any()) == parameter.requires_grad, name
        trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
        assert {"vision", "fused_vision", "projector", "language_model", "action_queries"} <= trained


def test_byte_tokenizer():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("  Pick é ") == [257, 112, 105, 99, 107, 32, 0xC3, 0xA9, 258]
    with pytest.raises(ValueError, match="instruction '  ' is empty"):
        tokenizer.encode("  ")


def test_errors():
    model = make()
    with pytest.raises(ValueError, match=r"got shape \(2, 2, 3, 28, 28\) for 2 instructions, expected \(2, 1 cameras"):
        model(images(replace(CFG, num_cameras=2)), ["a", "b"])
    with pytest.raises(ValueError, match=r"for 1 instructions, expected \(1, 1 cameras"):
        model(images(), ["a"])
    with pytest.raises(ValueError, match=r"has 302 bytes .* the limit \(max_text_bytes\) is 256"):
        model(images(batch=1), ["x" * 300])
    with pytest.raises(ValueError, match="vocabulary 100 is too small for byte tokens"):
        VLM(replace(CFG, vocabulary=100))
    with pytest.raises(ValueError, match="bytes_per_token: got 0"):
        VLM(replace(CFG, bytes_per_token=0))
    with pytest.raises(ValueError, match="vision gives 4 tokens, fused_vision 1;"):
        VLM(replace(CFG, fused_vision=replace(DINO, image_size=14)))
