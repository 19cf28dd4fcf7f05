"""Convert public policies: the vision-language model in two layouts, the action head's side files, the statistics.

    merged Hugging Face layout    `PrismaticForActionPrediction` below maps the names
    native Prismatic .pt          {"model": {"vision_backbone", "projector", "llm_backbone"}}, renamed to merged names
    side files                    `FlowMatchingActionHead` and two projectors; `module.` prefixes are dropped

Left out on purpose: the language model's output head, which is tied to its embedding and not used by a policy; and the
cross-attentions of blocks 1, 3 and 5, which the public code builds but never calls.

Three conventions differ. The public head predicts noise - actions, this code actions - noise: the last layer is
negated. The public code reads the context one position early, and its queries and head were trained that way:
`shift_context` is set if the file contains them. Its sigma net also takes x_k: `sigma_uses_x` is set for later RFT.
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
# prefixes of the native layout -> prefixes of the merged layout
NATIVE = {
    "vision_backbone.dino_featurizer.": "vision_backbone.featurizer.",
    "vision_backbone.siglip_featurizer.": "vision_backbone.fused_featurizer.",
    "projector.projector.0.": "projector.fc1.",
    "projector.projector.2.": "projector.fc2.",
    "projector.projector.4.": "projector.fc3.",
    "llm_backbone.llm.": "language_model.",
}
HEAD_PARTS = ("action_head", "proprio_projector", "noisy_action_projector")
SIDE_FILE = re.compile(r"(?P<part>\w+)--(?P<step>.+)_checkpoint\.pt")


class Statistics(NamedTuple):
    """1 % and 99 % quantiles of the training data: actions without the gripper (A - 1,), proprio (P,)."""

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
    """The velocity net without its two projectors, under its public names; the parameters are shared, not copied."""

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
        source = net.dit.blocks[index]
        modulation = nn.ModuleDict({"1": source.modulation})
        block = nn.ModuleDict({"attn_temporal": source.attn, "mlp": source.mlp, "adaLN_modulation": modulation})
        if source.cross_attn is not None:
            kv, cross = net.dit.context_kv[str(index)], nn.Module()
            cross.gamma_v = source.cross_attn.gamma
            cross.layer_norm_v, cross.layer_norm_l = source.cross_attn.norm, kv.norm
            projections = {"v_proj": source.cross_attn.q, "l_proj": kv.k, "values_l_proj": kv.v}
            cross.attn = nn.ModuleDict({**projections, "out_v_proj": source.cross_attn.out})
            block["cross_attn"] = cross
        return block


def public_policy_config(shift_context: bool, text_bytes: int) -> PolicyConfig:
    """Return the sizes and options of the public policies.

    Args:
        shift_context: read the context one position early.
        text_bytes: size of the text tokenizer's file [bytes].
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
    """Build a policy with public weights, at the sizes of preset paper.

    Args:
        tensors: the vision-language model's, by merged or native names, of any floating type.
        head: tensors of the three side files by part (`HEAD_PARTS`); None leaves the head untrained.
        text: content of the text tokenizer's file, see `read_text_tokenizer`.
        statistics: for the normaliser; None leaves it to be fitted by training.
        where: source of the tensors, for messages.

    Returns:
        The policy, in eval mode, float32. Action queries that the file lacks (native layout) are zero, as at the start
        of the paper's fine-tuning.

    Raises:
        ValueError: tensors missing, left over or misshapen; a head without statistics or without action queries;
            vision encoders left out.
    """
    if head is not None and statistics is None:
        raise ValueError(
            f"{where} has an action head but no dataset_statistics.json: its actions could not be put into raw units; "
            "download that file too"
        )
    tensors = to_merged_names(tensors)
    if head is not None and "action_queries.weight" not in tensors:
        raise ValueError(
            f"{where} has no action_queries.weight, and its action head was trained with them: give the merged "
            "repository, or train a new head (--new-head), with queries that start at zero"
        )
    if not any(name.startswith("vision_backbone.") for name in tensors):
        raise ValueError(
            f"{where} has no vision_backbone among {', '.join(list(tensors)[:3])}, ...: if the encoders were frozen and"
            " left out, give a merged repository, or a file with all parts"
        )
    # the public queries and head were trained on a context that is read one position early
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
    """Rename tensors of either layout to `PrismaticForActionPrediction`'s names; drop the tied output head."""
    renamed = {}
    for name, tensor in tensors.items():
        for native, merged in NATIVE.items():
            if name.startswith(native):
                name = merged + name.removeprefix(native)
                break
        if name.startswith("vision_backbone.") and name.endswith(".scale_factor"):
            name = name.removesuffix("scale_factor") + "gamma"
        renamed[name] = tensor
    renamed.pop(OUTPUT_HEAD, None)
    return renamed


def load_head(net: ChunkNet, head: Mapping[str, Mapping[str, Tensor]], where: str = "the side files") -> None:
    """Load the three side files into a velocity net and negate its output.

    Args:
        net: velocity net of the policy's flow head, changed in place.
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
    """Read the tensors of a policy's repository or file, those of a native .pt by names `<part>.<name>`.

    Raises:
        FileNotFoundError, ValueError: as in `read_weights`.
    """
    path = Path(path)
    if path.suffix in (".pt", ".pth") and path.is_file():
        content = read_pickled(path)
        parts = content.get("model") if isinstance(content, dict) else None
        if isinstance(parts, dict) and all(isinstance(part, dict) for part in parts.values()):
            return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    return read_weights(path)


def read_head(folder: Path, step: int | str | None = None) -> dict[str, dict[str, Tensor]]:
    """Read the three side files `<part>--<step>_checkpoint.pt` of a folder.

    Args:
        folder: of the repository.
        step: what stands in the names, a number or a word such as "latest"; None if there is only one.

    Raises:
        FileNotFoundError: no side files, one of the three is missing, or `step` has none.
        ValueError: files of several steps, and `step` is None; side files of other names, or of a part that is not
            read (a vision_backbone with FiLM).
    """
    by_step: dict[str, dict[str, Path]] = {}
    strange = []
    for file in sorted(p for p in folder.iterdir() if p.suffix in (".pt", ".pth", ".bin", ".safetensors")):
        if (match := SIDE_FILE.fullmatch(file.name)) and match["part"] in HEAD_PARTS:
            by_step.setdefault(match["step"], {})[match["part"]] = file
        elif match or file.name.startswith(HEAD_PARTS):
            strange.append(file.name)
    if strange:
        raise ValueError(
            f"{folder} has {', '.join(strange)}: expected side files <part>--<step>_checkpoint.pt of the parts "
            f"{', '.join(HEAD_PARTS)}; rename them, or remove what is not one of these"
        )
    steps = ", ".join(sorted(by_step)) or "none"
    if not by_step and step is None:
        raise FileNotFoundError(
            f"{folder} has no side files {', '.join(f'{part}--<step>_checkpoint.pt' for part in HEAD_PARTS)}: the "
            "action head would be random. Download them, or give --new-head to train it with train_sft.py --init"
        )
    if step is None and len(by_step) > 1:
        raise ValueError(f"{folder} has side files of the steps {steps}; choose one with --step")
    step = next(iter(by_step)) if step is None else str(step)
    if step not in by_step:
        raise FileNotFoundError(f"{folder} has no side files of step {step}; there are {steps}")
    if missing := [f"{part}--{step}_checkpoint.pt" for part in HEAD_PARTS if part not in by_step[step]]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: download the side files too")
    return {part: read_weights(file) for part, file in by_step[step].items()}


def read_statistics(path: str | Path, dataset: str | None = None) -> Statistics:
    """Read the quantiles of one entry of a dataset_statistics.json.

    Args:
        path: the file.
        dataset: the entry; None if there is only one.

    Raises:
        ValueError: no such entry, several and none named, or quantiles missing or of other dimensions.
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
    path: Path,
    text: Path | None = None,
    dataset: str | None = None,
    step: int | str | None = None,
    new_head: bool = False,
) -> VLAPolicy:
    """Convert the policy of a downloaded repository.

    Args:
        path: its folder, or its file of weights (native .pt).
        text: tokenizer.json, or a folder with it or with vocab.json and merges.txt; None: the repository's folder.
        dataset: entry of dataset_statistics.json, if it has several.
        step: step in the names of the head's side files, if there are several.
        new_head: read no side files; the action head is random and has to be trained.

    Raises:
        FileNotFoundError, ValueError: as in `policy_from_public` and the functions that read the files.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if (folder / "config.json").is_file():
        check_language(read_json(folder / "config.json").get("text_config"), POLICIES["paper"].vlm.language)
    statistics = folder / "dataset_statistics.json"
    if dataset and not statistics.is_file():
        raise FileNotFoundError(f"{statistics} does not exist: download it, or leave out --statistics {dataset}")
    return policy_from_public(
        read_policy_weights(path),
        None if new_head else read_head(folder, step),
        read_text_tokenizer(text or folder),
        read_statistics(statistics, dataset) if statistics.is_file() else None,
        str(path),
    )


def check_language(public: Mapping[str, Any] | None, language: TransformerConfig) -> None:
    """Check that a config.json, as far as it describes the language model, describes this one.

    Raises:
        ValueError: fields differ; the message lists them.
    """
    expected = {
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
    stated = [k for k in expected if k in public]
    if lines := differences({k: public[k] for k in stated}, {k: expected[k] for k in stated}):
        raise ValueError(f"config.json describes another language model than the paper's: {'; '.join(lines)}")
