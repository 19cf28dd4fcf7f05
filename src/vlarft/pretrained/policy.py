"""Public policies as ours: the vision-language model in two layouts, the action head's side files, the statistics.

    merged Hugging Face layout    `PrismaticForActionPrediction` below is the map
    native Prismatic .pt          {"model": {"vision_backbone", "projector", "llm_backbone"}}, renamed to the former
    side files                    `FlowMatchingActionHead` and two projectors; `module.` prefixes are dropped

Left out on purpose: the language model's output head, tied to its embedding and not read by a policy; the
cross-attentions of the blocks that have none (1, 3, 5), which the public code builds and does not call.

Three conventions differ. The public head predicts noise - actions, ours actions - noise: the final layer is negated.
The public code reads the context one position early, and its queries and head were trained so: `shift_context` is set
where the file holds them. Its sigma net also takes x_k: `sigma_uses_x` is set for the one to come.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlarft.nets.action_head import ChunkNet
from vlarft.nets.transformer import TransformerConfig
from vlarft.nets.vlm import VLM
from vlarft.policy import PRESETS as POLICIES
from vlarft.policy import PolicyConfig, VLAPolicy
from vlarft.pretrained.files import load_public, read_json, read_pickled, read_weights
from vlarft.pretrained.text import read_text_tokenizer
from vlarft.run.config import differences

OUTPUT_HEAD = "language_model.lm_head.weight"
# native names and ours, which are those of the merged layout
NATIVE = {
    "vision_backbone.dino_featurizer.": "vision_backbone.featurizer.",
    "vision_backbone.siglip_featurizer.": "vision_backbone.fused_featurizer.",
    "projector.projector.0.": "projector.fc1.",
    "projector.projector.2.": "projector.fc2.",
    "projector.projector.4.": "projector.fc3.",
    "llm_backbone.llm.": "language_model.",
}
HEAD_PARTS = ("action_head", "proprio_projector", "noisy_action_projector")


class Statistics(NamedTuple):
    """1 % and 99 % quantiles of the training data: of the actions without the gripper (A - 1,), of the proprio (P,)."""

    action_low: Tensor
    action_high: Tensor
    proprio_low: Tensor
    proprio_high: Tensor


class PrismaticForActionPrediction(nn.Module):
    """The vision-language model under its public names; the parameters are shared, not copied."""

    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        self.vision_backbone = nn.ModuleDict({"featurizer": vlm.vision, "fused_featurizer": vlm.fused_vision})
        self.projector = vlm.projector
        parts = {"embed_tokens": vlm.embed_tokens, "layers": vlm.language_model.layers, "norm": vlm.language_model.norm}
        self.language_model = nn.ModuleDict({"model": nn.ModuleDict(parts)})
        self.action_queries = vlm.action_queries


class FlowMatchingActionHead(nn.Module):
    """The velocity net without its two projectors, under its public names; the parameters are shared."""

    def __init__(self, net: ChunkNet) -> None:
        super().__init__()
        dit = nn.Module()
        dit.register_buffer("temp_embed", net.positions)
        dit.x_embedder, dit.proprio_embedder, dit.context_adapter = net.action_out, net.proprio_out, net.context_out
        dit.t_embedder = nn.ModuleDict({"mlp": nn.ModuleDict({"0": net.time.fc1, "2": net.time.fc2})})
        dit.blocks = nn.ModuleList(self._block(net, i) for i in range(net.cfg.dit.depth))
        modulation = nn.ModuleDict({"1": net.dit.modulation})
        dit.final_layer = nn.ModuleDict({"linear": net.dit.out, "adaLN_modulation": modulation})
        self.flow_predictor = nn.ModuleDict({"dit": dit})

    @staticmethod
    def _block(net: ChunkNet, index: int) -> nn.ModuleDict:
        ours = net.dit.blocks[index]
        modulation = nn.ModuleDict({"1": ours.modulation})
        block = nn.ModuleDict({"attn_temporal": ours.attn, "mlp": ours.mlp, "adaLN_modulation": modulation})
        if ours.cross_attn is not None:
            kv, cross = net.dit.context_kv[str(index)], nn.Module()
            cross.gamma_v = ours.cross_attn.gamma
            cross.layer_norm_v, cross.layer_norm_l = ours.cross_attn.norm, kv.norm
            projections = {"v_proj": ours.cross_attn.q, "l_proj": kv.k, "values_l_proj": kv.v}
            cross.attn = nn.ModuleDict({**projections, "out_v_proj": ours.cross_attn.out})
            block["cross_attn"] = cross
        return block


def public_policy_config(shift_context: bool, text_bytes: int) -> PolicyConfig:
    """Sizes and switches of the public policies.

    Args:
        shift_context: read the context one position early.
        text_bytes: size of the text tokenizer's file.
    """
    paper = POLICIES["paper"]
    vlm = replace(paper.vlm, shift_context=shift_context, text_file_bytes=text_bytes)
    return replace(paper, vlm=vlm, flow=replace(paper.flow, sigma_uses_x=True))


def policy_from_public(
    tensors: Mapping[str, Tensor],
    head: Mapping[str, Mapping[str, Tensor]] | None,
    text: bytes,
    statistics: Statistics | None = None,
    where: str = "the state dict",
) -> VLAPolicy:
    """A policy with public weights, at the sizes of preset paper.

    Args:
        tensors: of the vision-language model, merged or native names, of any floating type.
        head: tensors of the three side files by part (`HEAD_PARTS`); None: a new head.
        text: the text tokenizer's file, of `read_text_tokenizer`.
        statistics: for the normaliser; None leaves it to the data of the coming training.
        where: source of the tensors, for messages.

    Returns:
        The policy, in eval mode, float32. Queries that the file lacks (native layout) are zero, as at the start of the
        paper's fine-tuning.

    Raises:
        ValueError: tensors missing, left over or misshapen; a head without statistics; vision encoders left out.
    """
    if head is not None and statistics is None:
        raise ValueError(
            f"{where} has an action head but no dataset_statistics.json: its actions could not be put into raw units; "
            "download that file too"
        )
    tensors = to_merged_names(tensors)
    if not any(name.startswith("vision_backbone.") for name in tensors):
        raise ValueError(
            f"{where} has no vision_backbone among {', '.join(list(tensors)[:3])}, ...: if the encoders were frozen and"
            " left out, give a merged repository, or a file with all parts"
        )
    # queries and head of the public code were trained on a context that is read one position early
    trained = head is not None or "action_queries.weight" in tensors
    policy = VLAPolicy(public_policy_config(shift_context=trained, text_bytes=len(text)))
    tensors.setdefault("action_queries.weight", torch.zeros_like(policy.vlm.action_queries.weight))
    load_public(PrismaticForActionPrediction(policy.vlm), tensors, "policy", where)
    policy.vlm.fill_text(text)
    if head is not None:
        load_head(policy.head.net, head, where)
    if statistics is not None:
        policy.normalizer.set_quantiles(*statistics)
    return policy.eval()


def to_merged_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of either layout by the names of `PrismaticForActionPrediction`, without the tied output head."""
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, ours in NATIVE.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        if name.startswith("vision_backbone.") and name.endswith(".scale_factor"):
            name = name.removesuffix("scale_factor") + "gamma"
        renamed[name] = tensor
    renamed.pop(OUTPUT_HEAD, None)
    return renamed


def load_head(net: ChunkNet, head: Mapping[str, Mapping[str, Tensor]], where: str = "the side files") -> None:
    """Load the three side files into a velocity net and turn the sign of its output.

    Args:
        net: of the policy's flow head, changed in place.
        head: tensors by part (`HEAD_PARTS`), with or without the `module.` of data-parallel training.
        where: source of the tensors, for messages.

    Raises:
        ValueError: tensors missing, left over or misshapen.
    """
    parts = {part: {k.removeprefix("module."): v for k, v in head[part].items()} for part in HEAD_PARTS}
    unread = "|".join(str(i) for i in range(net.cfg.dit.depth) if i not in net.cfg.dit.cross_attention_blocks)
    cross = re.compile(rf"flow_predictor\.dit\.blocks\.({unread})\.cross_attn\..*")
    body = {k: v for k, v in parts["action_head"].items() if not (unread and cross.fullmatch(k))}
    load_public(FlowMatchingActionHead(net), body, "action head", f"{where} (action_head)")
    for part, layers in (
        ("proprio_projector", {"fc1": net.proprio_fc1, "fc2": net.proprio_fc2}),
        ("noisy_action_projector", {"fc1": net.action_fc1, "fc2": net.action_fc2}),
    ):
        load_public(nn.ModuleDict(layers), parts[part], part.replace("_", " "), f"{where} ({part})")
    with torch.no_grad():
        net.dit.out.weight.neg_()
        net.dit.out.bias.neg_()


def read_policy_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a policy's repository or file; those of a native .pt as `<part>.<name>`.

    Raises:
        FileNotFoundError, ValueError: as `read_weights`.
    """
    path = Path(path)
    if path.suffix in (".pt", ".pth") and path.is_file():
        content = read_pickled(path)
        parts = content.get("model") if isinstance(content, dict) else None
        if isinstance(parts, dict) and all(isinstance(part, dict) for part in parts.values()):
            return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    return read_weights(path)


def read_head(folder: Path, step: int | None = None) -> dict[str, dict[str, Tensor]] | None:
    """The side files `<part>--<step>_checkpoint.pt` of a folder; None where there are none.

    Raises:
        FileNotFoundError: some of the three are missing, or all those of `step`.
        ValueError: files of several steps and no `step`.
    """
    found: dict[int, dict[str, Path]] = {}
    for file in sorted(folder.glob("*--*_checkpoint.pt")):
        part, _, rest = file.name.partition("--")
        number = rest.removesuffix("_checkpoint.pt")
        if part in HEAD_PARTS and number.isdecimal():
            found.setdefault(int(number), {})[part] = file
    if step is not None and step not in found:
        raise FileNotFoundError(f"{folder} has no side files of step {step}; there are {sorted(found) or 'none'}")
    if not found:
        return None
    if step is None and len(found) > 1:
        raise ValueError(f"{folder} has side files of the steps {sorted(found)}; choose one with --step")
    step = next(iter(found)) if step is None else step
    if missing := [f"{part}--{step}_checkpoint.pt" for part in HEAD_PARTS if part not in found[step]]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: download the side files too")
    return {part: read_weights(file) for part, file in found[step].items()}


def read_statistics(path: str | Path, dataset: str | None = None) -> Statistics:
    """Quantiles of one entry of a dataset_statistics.json.

    Args:
        path: the file.
        dataset: the entry; None where there is only one.

    Raises:
        ValueError: no such entry, several and none named, or one without what the policy's normaliser needs.
    """
    table = read_json(Path(path))
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{path} holds no statistics by data set")
    if dataset is None and len(table) > 1:
        raise ValueError(f"{path} has statistics of {', '.join(sorted(table))}; choose one with --statistics")
    dataset = next(iter(table)) if dataset is None else dataset
    if dataset not in table:
        raise ValueError(f"{path} has no statistics of {dataset!r}; there are {', '.join(sorted(table))}")
    try:
        columns = [table[dataset][kind][level] for kind in ("action", "proprio") for level in ("q01", "q99")]
        tensors = [torch.tensor(column, dtype=torch.float32) for column in columns]
        mask = table[dataset]["action"].get("mask", [True] * (len(tensors[0]) - 1) + [False])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: {dataset} lacks q01 and q99 of action and proprio, as numbers ({error!r})"
        ) from error
    if any(tensor.ndim != 1 for tensor in tensors) or mask != [True] * (len(tensors[0]) - 1) + [False]:
        raise ValueError(f"{path}: {dataset} normalises other action dimensions than all but the last (mask {mask})")
    low, high, *proprio = tensors
    return Statistics(low[:-1], high[:-1], *proprio)


def convert_policy(
    path: Path, text: Path | None = None, dataset: str | None = None, step: int | None = None
) -> VLAPolicy:
    """The policy of a downloaded repository.

    Args:
        path: its folder, or its file of weights (native .pt).
        text: tokenizer.json, or a folder with it or with vocab.json and merges.txt; None: the repository's own.
        dataset: entry of dataset_statistics.json, where it has several.
        step: of the head's side files, where there are several.

    Raises:
        FileNotFoundError, ValueError: as `policy_from_public` and the functions that read the files.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if (folder / "config.json").is_file():
        check_language(read_json(folder / "config.json").get("text_config"), POLICIES["paper"].vlm.language)
    statistics = folder / "dataset_statistics.json"
    return policy_from_public(
        read_policy_weights(path),
        read_head(folder, step),
        read_text_tokenizer(text or folder),
        read_statistics(statistics, dataset) if statistics.is_file() else None,
        str(path),
    )


def check_language(public: Mapping[str, Any] | None, language: TransformerConfig) -> None:
    """Compare what a config.json says of its language model, if anything, with ours.

    Raises:
        ValueError: it computes something else; the message lists the fields.
    """
    ours = {
        "hidden_size": language.width,
        "intermediate_size": language.ffn_dim,
        "num_hidden_layers": language.depth,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads,
        "rms_norm_eps": language.norm_eps,
        "rope_theta": language.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    }
    public = public or {}
    if lines := differences({k: public[k] for k in ours if k in public}, {k: ours[k] for k in ours if k in public}):
        raise ValueError(f"config.json describes another language model than the paper's: {'; '.join(lines)}")
