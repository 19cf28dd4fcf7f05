"""Public policies: both layouts, side files and signs, statistics, text; full sizes on the meta device."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from public_head import layer_names
from safetensors.torch import load_file
from small_text import PROMPT_IDS, tokenizer_json, vocabulary_and_merges
from test_pretrained import scramble, write
from weights import uniform, weight

from vlarft.nets.action_head import FlowConfig, FlowHead
from vlarft.nets.dit import DiTConfig, time_features
from vlarft.nets.transformer import TransformerConfig
from vlarft.nets.vit import ViTConfig
from vlarft.nets.vlm import ByteTokenizer
from vlarft.policy import PRESETS, VLAPolicy
from vlarft.pretrained import policy_from_public, public_policy_config, read_statistics, read_text_tokenizer
from vlarft.pretrained.__main__ import main
from vlarft.pretrained.files import load_public
from vlarft.pretrained.policy import HEAD_PARTS, PrismaticForActionPrediction, load_head, to_merged_names

GOLDEN = Path(__file__).parent / "golden"
DINO = ViTConfig(image_size=28, width=8, depth=2, num_heads=2, mlp_dim=12, num_registers=1, output_block=0)
SIGLIP = replace(DINO, class_token=False, num_registers=0, layer_scale=False, attention_pool=True)
PAPER = replace(
    PRESETS["paper"],
    vlm=replace(
        PRESETS["paper"].vlm,
        vision=DINO,
        fused_vision=SIGLIP,
        projector_dim=12,
        language=TransformerConfig(depth=2, width=16, num_heads=2, num_kv_heads=1, ffn_dim=20, qkv_bias=True),
        num_queries=3,
    ),
    flow=FlowConfig(
        context_dim=16,
        embed_dim=6,
        dit=DiTConfig(width=16, depth=3, num_heads=2, mlp_dim=24, cross_attention_blocks=(0, 2)),
    ),
)
LEVELS = {"q01": [-0.5] * 6 + [0.0], "q99": [0.6] * 6 + [1.0]}
STATISTICS = {
    "libero_spatial_no_noops": {
        "action": {**LEVELS, "mask": [True] * 6 + [False], "mean": [0.0] * 7},
        "proprio": {"q01": [-1.0] * 8, "q99": [float(i) for i in range(8)]},
        "num_transitions": 52970,
    }
}
NATIVE = {
    "vision_backbone.featurizer.": ("vision_backbone", "dino_featurizer."),
    "vision_backbone.fused_featurizer.": ("vision_backbone", "siglip_featurizer."),
    "projector.fc1.": ("projector", "projector.0."),
    "projector.fc2.": ("projector", "projector.2."),
    "projector.fc3.": ("projector", "projector.4."),
    "language_model.": ("llm_backbone", "llm."),
}


@pytest.fixture(autouse=True)
def small_paper(monkeypatch, request) -> None:
    """Preset paper at a small size, except where a test is about its real size."""
    if "full_size" not in request.node.name:
        monkeypatch.setitem(PRESETS, "paper", PAPER)


@pytest.fixture
def policy() -> VLAPolicy:
    """The policy that the public files below are made from."""
    torch.manual_seed(0)
    policy = scramble(VLAPolicy(public_policy_config(shift_context=True, text_bytes=len(tokenizer_json().encode()))))
    policy.vlm.fill_text(tokenizer_json().encode())
    table = STATISTICS["libero_spatial_no_noops"]
    columns = [torch.tensor(table[k][q]) for k in ("action", "proprio") for q in ("q01", "q99")]
    policy.normalizer.set_quantiles(columns[0][:6], columns[1][:6], *columns[2:])
    return policy


def merged(policy: VLAPolicy) -> dict[str, torch.Tensor]:
    """Its vision-language model in the merged layout."""
    ours = {
        "vision.": "vision_backbone.featurizer.",
        "fused_vision.": "vision_backbone.fused_featurizer.",
        "projector.": "projector.",
        "embed_tokens.": "language_model.model.embed_tokens.",
        "language_model.": "language_model.model.",
        "action_queries.": "action_queries.",
    }
    tensors = {}
    for name, tensor in policy.vlm.state_dict().items():
        if name.startswith("tokenizer."):
            continue
        part = next(part for part in ours if name.startswith(part))
        name = ours[part] + name.removeprefix(part)
        tensors[name.replace(".gamma", ".scale_factor") if part == "vision." else name] = tensor.clone()
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
    return tensors


def native(policy: VLAPolicy) -> dict[str, dict[str, torch.Tensor]]:
    """Its vision-language model in Prismatic's layout, which has no queries."""
    parts = {"vision_backbone": {}, "projector": {}, "llm_backbone": {}}
    for name, tensor in merged(policy).items():
        if name.startswith("action_queries."):
            continue
        prefix = next(prefix for prefix in NATIVE if name.startswith(prefix))
        part, theirs = NATIVE[prefix]
        parts[part][(theirs + name.removeprefix(prefix)).replace(".scale_factor", ".gamma")] = tensor
    return parts


def side_files(policy: VLAPolicy) -> dict[str, dict[str, torch.Tensor]]:
    """Its velocity net as the three side files, one of them from data-parallel training."""
    state, parts = policy.head.net.state_dict(), {part: {} for part in HEAD_PARTS}
    for ours, (part, name) in layer_names(3, (0, 2)).items():
        sign = -1 if ours.startswith("dit.out.") else 1
        parts[part][name] = sign * state[ours]
    unread = "flow_predictor.dit.blocks.1.cross_attn.layer_norm_v.weight"
    parts["action_head"] = {f"module.{k}": v for k, v in (parts["action_head"] | {unread: torch.ones(16)}).items()}
    return parts


def repository(policy: VLAPolicy, folder: Path, step: int | str = 150_000) -> Path:
    """Everything that a public repository holds, in files."""
    write(folder, merged(policy), {"text_config": {"hidden_size": 16, "num_hidden_layers": 2}}, "sharded safetensors")
    for part, tensors in side_files(policy).items():
        torch.save(tensors, folder / f"{part}--{step}_checkpoint.pt")
    (folder / "dataset_statistics.json").write_text(json.dumps(STATISTICS))
    (folder / "tokenizer.json").write_text(tokenizer_json())
    return folder


def convert(folder: Path, *options: object) -> VLAPolicy:
    out = folder.parent / "out.safetensors"
    out.unlink(missing_ok=True)
    main(["policy", str(folder), "--out", str(out), *map(str, options)])
    return VLAPolicy.load(out)


def test_converted_policy_is_the_public_one(policy, tmp_path, capsys):
    again = convert(repository(policy, tmp_path / "public"))
    assert again.cfg == policy.cfg and again.cfg.vlm.shift_context and again.cfg.flow.sigma_uses_x
    assert again.cfg.gripper == "zero_one_open" and again.sigma_net is None
    for name, tensor in policy.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert (
        "text: byte-level BPE in Qwen's prompt, " in (shown := capsys.readouterr().out) and "statistics: set" in shown
    )
    # text, statistics and weights from the file alone
    images, proprio, noise = np.zeros((1, 40, 30, 3), np.uint8), np.zeros((1, 8)), torch.ones(1, 8, 7)
    assert again.vlm.tokenizer.encode("Turn on the stove ") == PROMPT_IDS
    assert torch.equal(
        again.act(images, ["turn on the stove"], proprio, noise=noise),
        policy.act(images, ["turn on the stove"], proprio, noise=noise),
    )
    assert again.normalizer.action_high.tolist() == pytest.approx([0.6] * 6)


def test_native_layout_starts_a_new_head(policy, tmp_path, capsys):
    (folder := tmp_path / "native").mkdir()
    torch.save({"model": native(policy), "optimizer": {"step": 3}}, folder / "latest.pt")
    repository(policy, tmp_path / "text")
    out = tmp_path / "out.safetensors"
    command = ["policy", str(folder / "latest.pt"), "--out", str(out), "--text", str(tmp_path / "text"), "--new-head"]
    with pytest.raises(
        FileNotFoundError, match=r"native/dataset_statistics.json does not exist: .* --statistics bridge"
    ):
        main([*command, "--statistics", "bridge"])
    main(command)
    shown = capsys.readouterr().out
    assert "action head: new, with random weights" in shown and "action queries: not in the file; zero" in shown
    again = VLAPolicy.load(out)
    # nothing in the file was trained with the shifted context, and the queries start at zero
    assert not again.cfg.vlm.shift_context and not again.normalizer.fitted and not again.vlm.action_queries.weight.any()
    expected = {k: v for k, v in policy.vlm.state_dict().items() if k != "action_queries.weight"}
    for name, tensor in expected.items():
        assert torch.equal(again.vlm.state_dict()[name], tensor), name
    assert not again.head.output.weight.any()  # as a new head starts


def test_merged_layout_without_head(policy, tmp_path, capsys):
    folder = repository(policy, tmp_path / "public")
    for file in folder.glob("*.pt"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="has no side files action_head--.*would be random.* --new-head"):
        convert(folder)
    again = convert(folder, "--new-head")
    shown = capsys.readouterr().out
    assert "action head: new, with random weights" in shown and "action queries" not in shown
    assert again.cfg.vlm.shift_context and again.normalizer.fitted  # its queries were trained with the shift
    assert torch.equal(again.vlm.action_queries.weight, policy.vlm.action_queries.weight)


def test_vocabulary_and_merges_make_the_same_text_tokenizer(policy, tmp_path):
    folder = repository(policy, tmp_path / "public")
    (folder / "tokenizer.json").unlink()
    ids, pairs = vocabulary_and_merges()
    # in the public vocabulary the special tokens follow the last piece; here a filler stands for the many in between
    fillers = {f"<{i}>": i for i in set(range(151_643)) - set(ids.values())}
    (folder / "vocab.json").write_text(json.dumps(ids | fillers))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, pairs)) + "\n")
    content = read_text_tokenizer(folder)
    policy.vlm.tokenizer.file = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    policy.vlm.tokenizer.parsed = None
    assert policy.vlm.tokenizer.encode("turn on the stove") == PROMPT_IDS and policy.vlm.tokenizer.pad == 151_643
    (folder / "vocab.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"vocab.json and merges.txt make no byte-pair vocabulary"):
        read_text_tokenizer(folder)
    with pytest.raises(FileNotFoundError, match=r"no text tokenizer at .*expected tokenizer.json, or .*--text"):
        read_text_tokenizer(tmp_path / "nowhere")


def test_text_batches_are_padded_on_the_right(policy):
    ids, lengths = policy.vlm.tokenize(["turn on the stove", "a"], torch.device("cpu"))
    assert ids.shape == (2, 41) and ids[0].tolist() == PROMPT_IDS
    assert lengths.tolist() == [41, 38] and ids[1, 38:].tolist() == [151_643] * 3
    with pytest.raises(ValueError, match="instruction ' ' is empty"):
        policy.vlm.tokenize([" "], torch.device("cpu"))
    with pytest.raises(ValueError, match=r"has 338 tokens with the prompt, the limit \(max_text_bytes\) is 256"):
        policy.vlm.tokenize(["x" * 300], torch.device("cpu"))


def test_text_tokenizers_that_do_not_fit(policy, monkeypatch):
    vlm = policy.vlm
    size = vlm.cfg.text_file_bytes
    with pytest.raises(ValueError, match=rf"has 3 bytes, VLMConfig.text_file_bytes is {size}"):
        vlm.fill_text(b"{} ")
    with pytest.raises(ValueError, match=rf"the text tokenizer \({size:,} bytes\) is no readable tokenizer.json"):
        vlm.fill_text(b" " * size)
    content = tokenizer_json()
    with pytest.raises(ValueError, match=r"lacks <\|im_end\|>: it is not that of a Qwen2 model"):
        vlm.fill_text(content.replace("<|im_end|>", "<|im_END|>").encode())
    with pytest.raises(ValueError, match="has ids up to 951645, the embedding 151936 rows"):
        vlm.fill_text(content.replace("151645", "951645").encode())
    with pytest.raises(ValueError, match="bytes_per_token: got 4, expected 1 with a text tokenizer's file"):
        VLAPolicy(replace(policy.cfg, vlm=replace(policy.cfg.vlm, bytes_per_token=4)))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'read text through `tokenizers`: pip install -e "\.\[public\]"'):
        vlm.fill_text(content.encode())
    assert ByteTokenizer.description == "bytes, 259 tokens"  # needs no package


def test_every_tensor_is_accounted_for(policy, tmp_path):
    tensors, head, text = merged(policy), side_files(policy), tokenizer_json().encode()
    statistics = read_statistics(repository(policy, tmp_path / "public") / "dataset_statistics.json")
    tensors["projector.fc4.bias"] = tensors.pop("projector.fc3.bias")
    tensors["language_model.model.norm.weight"] = torch.ones(15)
    with pytest.raises(
        ValueError, match=r"^here does not fit Prism.*missing projector.fc3.bias; unexpected projector.fc4"
    ):
        policy_from_public(tensors, None, text, where="here")
    with pytest.raises(ValueError, match=r"language_model.model.norm.weight has shape \(15,\), expected \(16,\)"):
        policy_from_public(tensors, None, text)
    with pytest.raises(
        ValueError, match=r"has no vision_backbone among projector.fc1.weight, .*: if the encoders were frozen"
    ):
        policy_from_public({k: v for k, v in tensors.items() if "vision" not in k}, None, text)
    with pytest.raises(ValueError, match=r"holds no policy: of its 2 tensors \(vision_backbone.x, action_queries.w"):
        load_public(
            PrismaticForActionPrediction(policy.vlm), {"vision_backbone.x": 0, "action_queries.w": 0}, "policy", "x"
        )
    with pytest.raises(ValueError, match=r"has an action head but no dataset_statistics.json: .*download that file"):
        policy_from_public(merged(policy), head, text)
    for part, name in (("action_head", "flow_predictor.dit.blocks.2.mlp.fc1.bias"), ("proprio_projector", "fc2.bias")):
        damaged = {k: dict(v) for k, v in head.items()}
        damaged[part].pop(name, None) if name in damaged[part] else damaged[part].pop(f"module.{name}")
        with pytest.raises(ValueError, match=rf"{part}\) does not fit .*: missing {name}"):
            policy_from_public(merged(policy), damaged, text, statistics)
    extra = "flow_predictor.dit.blocks.3.cross_attn.gamma_v"  # of a block that is not there
    with pytest.raises(ValueError, match=f"unexpected {extra}"):
        load_head(policy.head.net, head | {"action_head": head["action_head"] | {extra: torch.ones(16)}})


@pytest.mark.parametrize("step", ["latest", "step-150000", "150000-best", "150000"])
def test_side_files_of_any_step_are_read(policy, tmp_path, step, capsys):
    """OpenVLA-OFT writes "latest" when it keeps one checkpoint only; people rename files."""
    again = convert(repository(policy, tmp_path / "public", step))
    for name, tensor in policy.head.state_dict().items():
        assert torch.equal(again.head.state_dict()[name], tensor), name
    assert "random" not in capsys.readouterr().out
    torch.save(side_files(policy)["action_head"], tmp_path / "public" / "action_head--30000_checkpoint.pt")
    with pytest.raises(ValueError, match=r"has side files of the steps .*30000.*; choose one with --step"):
        convert(tmp_path / "public")
    assert convert(tmp_path / "public", "--step", step).normalizer.fitted


@pytest.mark.parametrize(
    "name",
    [
        "action_head.pt",
        "action_head-150000.pt",
        "action_head--150000_checkpoint.pth",
        "proprio_projector--150000_checkpoint.safetensors",
        "vision_backbone--150000_checkpoint.pt",  # with FiLM: the merged weights lack it
    ],
)
def test_side_files_that_would_be_left_unread_are_refused(policy, tmp_path, name):
    folder = repository(policy, tmp_path / "public")
    torch.save({}, folder / name)
    with pytest.raises(ValueError, match=rf"public has {name}: expected side files <part>--<step>_checkpoint.pt of"):
        convert(folder)
    convert(folder, "--new-head")  # asked for


def test_a_trained_head_without_its_queries_is_refused(policy, tmp_path):
    folder = repository(policy, tmp_path / "public")
    with pytest.raises(ValueError, match=r"has no action_queries.weight, and its action head was trained with them"):
        policy_from_public(
            {k: v for k, v in merged(policy).items() if "queries" not in k},
            side_files(policy),
            tokenizer_json().encode(),
            read_statistics(folder / "dataset_statistics.json"),
        )
    with pytest.raises(SystemExit):
        convert(folder, "--step", "150000", "--new-head")


def test_folders_that_lack_a_file(policy, tmp_path):
    folder = repository(policy, tmp_path / "public")
    for part, tensors in side_files(policy).items():
        torch.save(tensors, folder / f"{part}--30000_checkpoint.pt")
    with pytest.raises(ValueError, match=r"side files of the steps 150000, 30000; choose one with --step"):
        convert(folder)
    with pytest.raises(FileNotFoundError, match=r"no side files of step 7; there are 150000, 30000"):
        convert(folder, "--step", 7)
    (folder / "proprio_projector--30000_checkpoint.pt").unlink()
    with pytest.raises(FileNotFoundError, match="lacks proprio_projector--30000_checkpoint.pt: download"):
        convert(folder, "--step", 30000)
    assert convert(folder, "--step", 150000).normalizer.fitted
    (folder / "config.json").write_text('{"text_config": {"hidden_size": 16, "rope_theta": 500.0}}')
    with pytest.raises(ValueError, match="another language model than the paper's: rope_theta: 500.0 against 10000.0"):
        convert(folder, "--step", 150000)


def test_statistics(tmp_path):
    file, own = tmp_path / "dataset_statistics.json", STATISTICS["libero_spatial_no_noops"]

    def read(table: object, dataset: str | None = None) -> object:
        file.write_text(json.dumps(table))
        return read_statistics(file, dataset)

    two = {"a": own, "b": {**own, "action": {"q01": [0.0] * 7, "q99": [2.0] * 7}}}
    assert read(two, "b").action_high.tolist() == [2.0] * 6  # a missing mask is the usual one
    assert read(two, "a").proprio_high.tolist() == list(range(8))
    with pytest.raises(ValueError, match="has statistics of a, b; choose one with --statistics"):
        read(two)
    with pytest.raises(ValueError, match="has no statistics of 'c'; there are a, b"):
        read(two, "c")
    for table in ({"a": {"action": LEVELS}}, {"a": {**own, "action": {"q01": ["x"], "q99": [1]}}}, {"a": 1}):
        with pytest.raises(ValueError, match="a lacks q01 and q99 of action and proprio"):
            read(table)
    with pytest.raises(ValueError, match="holds no statistics by data set"):
        read([])
    with pytest.raises(ValueError, match="normalises other action dimensions than all but the last"):
        read({"a": {**own, "action": {**LEVELS, "mask": [True] * 7}}})


def test_statistics_of_another_robot(policy, tmp_path):
    folder = repository(policy, tmp_path / "public")
    joints = {"q01": [-1.0] * 14, "q99": [1.0] * 14}
    (folder / "dataset_statistics.json").write_text(json.dumps({"aloha": {"action": joints, "proprio": joints}}))
    with pytest.raises(
        ValueError, match=r"action statistics of shape \(13,\) and \(13,\), expected \(6,\): .*another robot"
    ):
        convert(folder)


def listing(name: str) -> dict[str, list[int]]:
    """Names and shapes of a public layout; `*` in the file stands for the numbers of equal layers."""
    table = json.loads((GOLDEN / "policy_public.json").read_text())[name]
    return {key.replace("*", str(i)): shape for key, (count, shape) in table.items() for i in range(count)}


@pytest.mark.parametrize(("layout", "count"), [("prismatic_hf_merged", 983), ("prismatic_native", 982)])
def test_public_names_at_full_size(layout, count):
    with torch.device("meta"):
        policy = VLAPolicy(public_policy_config(shift_context=True, text_bytes=8))
        tensors = {name: torch.empty(shape) for name, shape in listing(layout).items()}
        side = {part: {k: torch.empty(shape) for k, shape in listing(part).items()} for part in HEAD_PARTS}
    assert len(tensors) == count
    named = to_merged_names(tensors)
    if layout == "prismatic_native":
        named["action_queries.weight"] = torch.empty(64, 896, device="meta")
    load_public(PrismaticForActionPrediction(policy.vlm), named, "policy", layout)
    load_head(policy.head.net, side)
    assert sum(tensor.numel() for tensor in named.values()) == sum(p.numel() for p in policy.vlm.parameters())


def test_public_head_at_full_size():
    """The public code's velocities and what leads to them, through the loader; the sign is turned."""
    names = {part: listing(part) for part in HEAD_PARTS}
    tensors = {
        part: {k: torch.from_numpy(weight(f"{part}.{k}", shape)) for k, shape in keys.items()}
        for part, keys in names.items()
    }
    head = FlowHead(PRESETS["paper"].flow)
    load_head(head.net, tensors)
    expected, net = load_file(GOLDEN / "04_action_head.safetensors"), head.net
    close = {"atol": 1e-5, "rtol": 0}
    with torch.no_grad():
        # on the way: time, proprio, and each number of the noisy chunk, embedded
        torch.testing.assert_close(time_features(expected["t"], 256), expected["t_freq"], **close)
        torch.testing.assert_close(net.time(expected["t"]), expected["t_emb"], **close)
        state = net.proprio_fc2(F.gelu(net.proprio_fc1(expected["proprio"])))
        torch.testing.assert_close(state, expected["proprio_features"], **close)
        numbers = net.action_fc2(
            F.gelu(net.action_fc1(expected["noisy_actions"].flatten(1)[..., None]))
        )  # (2, 56, 896)
        torch.testing.assert_close(numbers[..., :64], expected["noisy_action_features_head"], **close)
        embedded = net.action_out(numbers.unflatten(1, (8, 7)).flatten(2))
        torch.testing.assert_close(embedded, expected["x_embedded"], **close)
        context = torch.from_numpy(uniform("input/context", (2, 320, 896), -1.5, 1.5))
        cond = head.prepare(context, expected["proprio"])
        for tau, velocity in zip(expected["t"], expected["velocity"], strict=True):
            actual = head.velocity(expected["noisy_actions"], tau.expand(2), cond)
            torch.testing.assert_close(actual, -velocity, **close)
