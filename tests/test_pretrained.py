"""Public checkpoints: every file format, exact key lists, resized position embeddings, the public models' outputs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from weights import uniform, weight

from vlarft.nets.kv_cache import KVCache
from vlarft.nets.transformer import TransformerConfig
from vlarft.pretrained import (
    LIBERO_ACTION_RANGES,
    read_action_ranges,
    read_weights,
    tokenizer_config,
    tokenizer_from_public,
    transformer_config,
    world_model_from_public,
)
from vlarft.pretrained.__main__ import main
from vlarft.run.checkpoint import read_header
from vlarft.tokenizer import PRESETS as TOKENIZERS
from vlarft.tokenizer import FrameTokenizer, TokenizerConfig
from vlarft.world_model import PRESETS, WorldModel, WorldModelConfig

GOLDEN = Path(__file__).parent / "golden"
TOKENIZER = TokenizerConfig(
    image_size=(16, 16),
    block_channels=(8, 16),
    res_blocks=1,
    latent_channels=6,
    future_patch=2,
    norm_groups=4,
)
TOKENIZER_JSON = {
    "_class_name": "CompressiveVQModelFSQ",
    "act_fn": "silu",
    "block_out_channels": [8, 16],
    "context_length": 1,
    "dyn_fsq_levels": 12,
    "latent_channels": 6,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "patch_size": 2,
    "resolution": 16,
    "vq_fsq_levels": 12,
}
LLAMA = TransformerConfig(depth=2, width=32, num_heads=4, num_kv_heads=2, ffn_dim=48, rope_theta=500.0, norm_eps=1e-5)
LLAMA_JSON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "vocab_size": 9008,
}
CONFIG = WorldModelConfig(TOKENIZER, LLAMA)
RANGES = torch.tensor(LIBERO_ACTION_RANGES)


def scramble(model: torch.nn.Module) -> torch.nn.Module:
    """Random values everywhere, so that no zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.fixture
def tokenizer() -> FrameTokenizer:
    return scramble(FrameTokenizer(TOKENIZER))


@pytest.fixture
def llama() -> dict[str, torch.Tensor]:
    """A public world model's tensors, its names written down here and not taken from the code."""
    shapes = {"model.embed_tokens.weight": (9008, 32), "model.norm.weight": (32,), "lm_head.weight": (9008, 32)}
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (32, 32) for n in "qo"}
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (16, 32) for n in "kv"}
        shapes |= {f"{layer}.mlp.{n}_proj.weight": (48, 32) for n in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (32, 48)}
        shapes |= {f"{layer}.{n}_layernorm.weight": (32,) for n in ("input", "post_attention")}
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def write(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict | None = None, kind: str = "safetensors"
) -> Path:
    """A downloaded repository; kind is the suffix of its weights, with "sharded " before it for two files and index."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    save = save_file if kind.endswith("safetensors") else torch.save
    if not kind.startswith("sharded "):
        save(tensors, folder / f"weights.{kind}")
        return folder
    suffix, names = kind.removeprefix("sharded "), sorted(tensors)
    parts = {f"weights-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for file, part in parts.items():
        save({name: tensors[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / f"weights.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def test_converted_tokenizer_is_the_public_one(tokenizer, tmp_path, capsys):
    folder = write(tmp_path / "WorldModel-Tokenizer", tokenizer.state_dict(), TOKENIZER_JSON)
    out = tmp_path / "new" / "tokenizer.safetensors"
    main(["tokenizer", str(folder), "--out", str(out)])
    again = FrameTokenizer.load(out)
    assert again.cfg == TOKENIZER and read_header(out).extra == {"source": "WorldModel-Tokenizer"}
    assert capsys.readouterr().out.startswith("FrameTokenizer of ")
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with pytest.raises(FileExistsError, match=r"tokenizer\.safetensors exists: remove it or choose another --out"):
        main(["tokenizer", str(folder), "--out", str(out)])


def convert_world_model(tmp_path: Path, folder: Path, tokenizer: FrameTokenizer, ranges: str = "libero") -> WorldModel:
    """Both commands, one after the other."""
    public, converted, out = (
        tmp_path / name for name in ("public_tokenizer", "tokenizer.safetensors", "wm.safetensors")
    )
    main(["tokenizer", str(write(public, tokenizer.state_dict(), TOKENIZER_JSON)), "--out", str(converted)])
    main(["world-model", str(folder), "--tokenizer", str(converted), "--action-ranges", ranges, "--out", str(out)])
    return WorldModel.load(out)


@pytest.mark.parametrize("kind", ["safetensors", "sharded safetensors", "bin", "sharded bin", "pt"])
def test_converted_world_model_is_the_public_one(kind, tokenizer, llama, tmp_path):
    model = convert_world_model(tmp_path, write(tmp_path / "public", llama, LLAMA_JSON, kind), tokenizer)
    assert model.cfg == CONFIG
    own = model.state_dict()
    for name, tensor in llama.items():
        ours = name.replace("model.layers", "decoder.layers").replace("model.norm", "decoder.norm")
        assert torch.equal(own.pop(ours.replace("model.embed", "embed")), tensor), name
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(own.pop(f"tokenizer.{name}"), tensor), name
    assert torch.equal(own.pop("action_bins.low"), RANGES[:, 0])
    assert torch.equal(own.pop("action_bins.high"), RANGES[:, 1])
    assert not own
    rollout = model.rollout(torch.rand(1, 3, 16, 16), torch.zeros(1, 1, 1, 7), greedy=True)
    assert rollout.frames.shape == (1, 1, 1, 3, 16, 16)


def test_converted_world_model_against_transformers(transformers, tokenizer, tmp_path):
    """Its own configuration file and shards; rope_theta moved within that file in version 5."""
    oracle = scramble(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_JSON, eos_token_id=9007)))
    oracle.save_pretrained(tmp_path / "public", max_shard_size="1MB")
    assert (tmp_path / "public" / "model.safetensors.index.json").is_file()
    model = convert_world_model(tmp_path, tmp_path / "public", tokenizer)
    ids = torch.randint(9008, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(
            model.lm_head(model.decoder(model.embed(ids, model.tables()))), oracle(ids).logits, atol=1e-4, rtol=1e-4
        )


def test_without_config_the_sizes_are_the_papers(tmp_path, tokenizer):
    folder = write(tmp_path / "public", tokenizer.state_dict())
    with pytest.raises(
        ValueError, match="public .no config.json .* paper's sizes. does not fit FrameTokenizer: missing"
    ):
        main(["tokenizer", str(folder), "--out", str(tmp_path / "out.safetensors")])


def test_one_file_stands_for_its_folder(tmp_path, tokenizer):
    folder = write(tmp_path, tokenizer.state_dict(), TOKENIZER_JSON)
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    main(["tokenizer", str(folder / "weights.safetensors"), "--out", str(tmp_path / "ours" / "out.safetensors")])
    assert FrameTokenizer.load(tmp_path / "ours" / "out.safetensors").cfg == TOKENIZER
    with pytest.raises(ValueError, match=r"several files of weights \(other.safetensors, weights.safetensors\)"):
        read_weights(folder)


def test_half_precision_becomes_float32(tokenizer, llama):
    half = {name: tensor.bfloat16() for name, tensor in llama.items()}
    model = world_model_from_public(half, CONFIG, tokenizer, RANGES)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.lm_head.weight, half["lm_head.weight"].float())


def test_recomputed_frequencies_are_the_only_tensors_left_out(tokenizer, llama):
    extra = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    model = world_model_from_public(llama | extra, CONFIG, tokenizer, RANGES)
    assert torch.equal(model.decoder.norm.weight, llama["model.norm.weight"])
    with pytest.raises(ValueError, match="does not fit LlamaForCausalLM: unexpected model.rotary_emb.inv_freq"):
        world_model_from_public(llama | {"model.rotary_emb.inv_freq": torch.ones(4)}, CONFIG, tokenizer, RANGES)


def test_every_tensor_is_accounted_for(tokenizer, llama):
    missing = dict(llama)
    del missing["model.layers.1.mlp.up_proj.weight"], missing["lm_head.weight"]
    message = "missing model.layers.1.mlp.up_proj.weight; missing lm_head.weight; unexpected model.layers.1.mlp.up.bias"
    with pytest.raises(ValueError, match=message):
        world_model_from_public(missing | {"model.layers.1.mlp.up.bias": torch.ones(1)}, CONFIG, tokenizer, RANGES)
    misshapen = llama | {"model.norm.weight": torch.ones(31)}
    with pytest.raises(
        ValueError, match=r"^here does not fit .*: model.norm.weight has shape \(31,\), expected \(32,\)$"
    ):
        world_model_from_public(misshapen, CONFIG, tokenizer, RANGES, "here")
    public = tokenizer.state_dict()
    bias = public.pop("quant_linear.bias")
    with pytest.raises(ValueError, match="missing quant_linear.bias; unexpected quant_linear.offset"):
        tokenizer_from_public(public | {"quant_linear.offset": bias}, TOKENIZER)


def test_weights_of_something_else(tokenizer, llama, tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer: of its 21 tensors \(lm_head.weight, .*none has a name"):
        main(["tokenizer", str(write(tmp_path, llama)), "--out", str(tmp_path / "out.safetensors")])
    with pytest.raises(ValueError, match="the state dict holds no world model"):
        world_model_from_public(tokenizer.state_dict(), CONFIG, tokenizer, RANGES)


def test_positions_of_another_grid_are_resampled_only_when_asked(tokenizer, tmp_path):
    wide = FrameTokenizer(replace(TOKENIZER, image_size=(16, 24))).state_dict()  # grid 8x12 in place of 8x8
    columns = torch.arange(12.0).expand(8, 12)
    name = "cond_decoder.cross_att_blocks.0.q_pos_emb"
    wide[name] = torch.stack([columns, 10 * torch.arange(8.0)[:, None].expand(8, 12)], -1).repeat(1, 1, 8).flatten(0, 1)
    with pytest.raises(
        ValueError, match=r"has 96 positions, image_size 16x16 has 8x8 = 64.*interpolate_positions=\(h, w\)"
    ):
        tokenizer_from_public(wide, TOKENIZER)
    with pytest.raises(ValueError, match="has 96 positions, not the 8x8 of interpolate_positions"):
        tokenizer_from_public(wide, TOKENIZER, (8, 8))
    folder = write(tmp_path / "wide", wide, TOKENIZER_JSON)
    main(
        ["tokenizer", str(folder), "--interpolate-positions", "8", "12", "--out", str(tmp_path / "square.safetensors")]
    )
    got = FrameTokenizer.load(tmp_path / "square.safetensors").state_dict()[name].unflatten(0, (8, 8))
    # cell j of 8 has its centre at 1.5 * j + 0.25 of the 12
    assert_close(got[:, :, 0], (1.5 * torch.arange(8) + 0.25).expand(8, 8))
    assert_close(got[:, :, 1], 10 * torch.arange(8.0)[:, None].expand(8, 8))
    main(["tokenizer", str(folder), "--image-size", "16", "24", "--out", str(tmp_path / "wide.safetensors")])
    kept = FrameTokenizer.load(tmp_path / "wide.safetensors")
    assert kept.cfg.image_size == (16, 24) and torch.equal(kept.state_dict()[name], wide[name])
    same = tokenizer_from_public(tokenizer.state_dict(), TOKENIZER, (8, 8)).state_dict()
    assert torch.equal(same[name], tokenizer.state_dict()[name])


def test_folders_without_readable_weights(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere: give the folder of a downloaded repository"):
        read_weights(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no weights .* but nothing"):
        read_weights(tmp_path / "empty")
    (tmp_path / "empty" / "README.md").touch()
    with pytest.raises(FileNotFoundError, match="holds no weights .* but README.md: download"):
        read_weights(tmp_path / "empty")
    for kind in ("safetensors", "bin"):
        file = write(tmp_path / kind, tokenizer.state_dict(), kind=kind) / f"weights.{kind}"
        content = file.read_bytes()
        for damaged in (content[:-1000], content[:100]):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"weights.{kind} \({len(damaged):,} bytes\) is not a readable file"):
                read_weights(file.parent)
        folder = write(tmp_path / f"sharded_{kind}", tokenizer.state_dict(), kind=f"sharded {kind}")
        (folder / f"weights-00002-of-00002.{kind}").unlink()
        with pytest.raises(FileNotFoundError, match=rf"index.json names weights-00002-of-00002.{kind}, not in"):
            read_weights(folder)
    torch.save({"model": tokenizer.state_dict(), "step": 3}, tmp_path / "train.pt")
    with pytest.raises(ValueError, match="train.pt holds model, step, expected tensors by name"):
        read_weights(tmp_path / "train.pt")
    torch.save(torch.ones(1), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="tensor.pt holds Tensor, expected tensors by name"):
        read_weights(tmp_path / "tensor.pt")
    torch.save({"path": tmp_path}, tmp_path / "code.pt")  # an object that unpickling would have to build
    with pytest.raises(ValueError, match="code.pt .*is not a readable file of tensors .*Weights only"):
        read_weights(tmp_path / "code.pt")


def test_configs_of_something_else(tmp_path):
    with pytest.raises(ValueError, match="not that of a public tokenizer: it lacks block_out_channels, .*hidden_size"):
        tokenizer_config(LLAMA_JSON)
    with pytest.raises(ValueError, match="not that of a public world model: it lacks hidden_size, .*act_fn"):
        transformer_config(TOKENIZER_JSON)
    with pytest.raises(ValueError, match="unsupported tokenizer: context_length=2, expected 1; vq_fsq_levels=14, exp"):
        tokenizer_config(TOKENIZER_JSON | {"vq_fsq_levels": 14, "context_length": 2})
    for key, value in (
        ("model_type", "qwen2"),
        ("tie_word_embeddings", True),
        ("rope_scaling", {"type": "linear"}),
        ("rope_parameters", {"rope_theta": 500.0, "rope_type": "llama3"}),
    ):
        with pytest.raises(ValueError, match="describes an unsupported world model"):
            transformer_config(LLAMA_JSON | {key: value})
    (tmp_path / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(ValueError, match=r"config.json is not readable JSON .*download it again"):
        main(["tokenizer", str(tmp_path), "--out", str(tmp_path / "out.safetensors")])


def test_a_world_model_must_fit_its_tokenizer_and_have_no_other_parts(tokenizer, llama):
    other = replace(TOKENIZER, future_patch=4)
    with pytest.raises(ValueError, match="not the given tokenizer's: future_patch: 4 against 2; use tokenizer.cfg"):
        world_model_from_public(llama, replace(CONFIG, tokenizer=other), tokenizer, RANGES)
    for name in ("slot_embedding", "factored_tokens"):
        with pytest.raises(ValueError, match=f"{name}=True: public world models have no such part"):
            world_model_from_public(llama, replace(CONFIG, **{name: True}), tokenizer, RANGES)
    with pytest.raises(ValueError, match=r"expected action ranges \(7, 2\), got shape \(2, 7\)"):
        world_model_from_public(llama, CONFIG, tokenizer, RANGES.T)


def test_action_ranges(tokenizer, llama, tmp_path, capsys):
    golden = load_file(GOLDEN / "world_model_sequence.safetensors")["action_ranges"]
    assert torch.equal(read_action_ranges("libero"), golden)
    torch.save(golden, tmp_path / "ranges.pth")
    assert torch.equal(read_action_ranges(str(tmp_path / "ranges.pth")), golden)
    (tmp_path / "ranges.json").write_text("[[-1, 0.5], [-2.5, 3]]")
    folder = write(tmp_path / "public", llama, LLAMA_JSON)
    model = convert_world_model(tmp_path, folder, tokenizer, str(tmp_path / "ranges.json"))
    assert model.cfg.action_dim == 2 and model.action_bins.low.tolist() == [-1.0, -2.5]
    assert model.action_bins.high.tolist() == [0.5, 3.0]
    with pytest.raises(SystemExit):
        main(["world-model", str(folder), "--tokenizer", "t", "--out", str(tmp_path / "new.safetensors")])
    assert "action ranges are not among its weights: give --action-ranges libero" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match='no action ranges at nowhere.json: give "libero"'):
        read_action_ranges("nowhere.json")
    for table, message in (('{"low": 0}', "holds no table"), ("[[0, 1], [0]]", "holds no table"), ("[1, 2]", "shape")):
        (tmp_path / "bad.json").write_text(table)
        with pytest.raises(ValueError, match=message):
            read_action_ranges(str(tmp_path / "bad.json"))


def generated(layout: dict, gain: dict[str, float]) -> dict[str, torch.Tensor]:
    """The tensors of a public key listing, values by the rule of `golden/weights.py`."""
    return {k: torch.from_numpy(weight(k, shape, gain.get(k, 0.7))) for k, shape in layout["tensors"].items()}


@pytest.fixture(scope="module")
def public_tokenizer() -> FrameTokenizer:
    """The paper's tokenizer, 128.8 M parameters."""
    layout = json.loads((GOLDEN / "tokenizer_public.json").read_text())
    config = tokenizer_config(layout["config"])
    assert config == TOKENIZERS["paper"]
    return tokenizer_from_public(generated(layout, {"quant_conv.weight": 2.1, "quant_linear.weight": 2.1}), config)


@pytest.mark.slow
def test_public_tokenizer_at_full_size(public_tokenizer):
    """Tokens, what is rounded to them, and pixels before clipping, of one context frame and two future frames."""
    golden, model, seen = load_file(GOLDEN / "tokenizer.safetensors"), public_tokenizer, {}
    coarse = torch.from_numpy(uniform("input/frames_coarse/1", (1, 3, 3, 32, 32), 0, 1))
    fine = torch.from_numpy(uniform("input/frames_fine/1", (1, 3, 3, 256, 256), 0, 1))
    frames = 0.75 * coarse.repeat_interleave(8, -2).repeat_interleave(8, -1) + 0.25 * fine
    for name in ("quant_conv", "quant_linear", "cond_decoder"):
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        context = model.encode_context(frames[:, 0])
        tokens = model.encode_future(frames[:, 1:], context)
        rebuilt = model.context_from_tokens(golden["ctx_indices"][:, 0].long())
        decoded = model.decode(golden["dyn_indices"].long(), rebuilt, frames_at_once=2)
        unclipped = torch.cat([model.decoder.image(rebuilt.features)[0], seen["cond_decoder"][0]])[
            None
        ]  # (1, 3, 3, H, W)
    assert torch.equal(context.tokens.int(), golden["ctx_indices"][:, 0])
    assert torch.equal(tokens.int(), golden["dyn_indices"])
    # GroupNorm over channels-last images rounds more coarsely on the CPU: 4e-5 here against 6e-6
    assert_close(seen["quant_conv"], golden["ctx_prequant"], atol=1e-4, rtol=0)
    assert_close(seen["quant_linear"], golden["dyn_prequant"], atol=1e-4, rtol=0)
    assert_close(unclipped[..., ::8, ::8], golden["decoded_grid"], atol=3e-4, rtol=0)
    assert_close(unclipped[..., 120:124, :], golden["decoded_band"], atol=3e-4, rtol=0)
    assert torch.equal(decoded, unclipped[:, 1:].clamp(0, 1))


@pytest.mark.slow
def test_public_world_model_at_full_size(public_tokenizer):
    """Logits and log-probabilities of one sequence, through the KV cache; action bins; the loss, without the cache."""
    golden, sequence = (load_file(GOLDEN / f"world_model{n}.safetensors") for n in ("", "_sequence"))
    layout = json.loads((GOLDEN / "world_model_public.json").read_text())
    config = WorldModelConfig(public_tokenizer.cfg, transformer_config(layout["config"]))
    assert config == PRESETS["paper"]
    model = world_model_from_public(generated(layout, {}), config, public_tokenizer, RANGES)
    ids, prefix = sequence["input_ids"].long(), model.layout.prefix_length
    cache = KVCache(1, prefix)
    with torch.no_grad():
        x = model.embed(ids[:1], model.tables())
        start = model.decoder(x[:, :prefix], cache)
        cache = cache.expand(1, ids.shape[1] - prefix)
        hidden = torch.cat([start, model.decoder(x[:, prefix:], cache)], dim=1)[0]  # (N, D)
        logits = model.lm_head(hidden)  # (N, vocabulary)
    log_prob = logits.log_softmax(-1)
    positions, full = golden["positions"].long(), golden["full_positions"].long()
    close = {"atol": 2e-5, "rtol": 0}
    assert_close(hidden[positions, :128], golden["last_hidden_head"], **close)
    assert_close(logits[positions, :256], golden["logits_head"], **close)
    assert_close(logits[full], golden["logits_full"], **close)
    assert_close(log_prob[:-1].gather(1, ids[0, 1:, None])[:, 0], golden["logprob_next"], **close)
    assert_close(-(log_prob.exp() * log_prob).sum(-1), golden["entropy"], **close)
    clear = golden["argmax_gap"] > 1e-4
    assert clear.sum() > 1600 and torch.equal(logits.argmax(-1).int()[clear], golden["argmax"][clear])

    context, future = sequence["ctx_tokens"][:, 0].long(), sequence["dyn_tokens"].long()
    bins = model.action_bins.encode(sequence["actions"])
    num_tokens = model.layout.length(8)  # the published sequence has one more copy of the last action
    assert torch.equal(model.layout.sequence(context, future, bins), ids[:, :num_tokens])
    with torch.no_grad():
        loss, _ = model.token_loss(context[:1], future[:1], sequence["actions"][:1])
    targets = model.layout.frame_positions(8).flatten()
    assert_close(loss, -golden["logprob_next"][targets - 1].mean(), **close)
