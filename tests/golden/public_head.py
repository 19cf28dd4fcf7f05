"""The public action head's layer names, written down apart from the code that reads them."""

DIT = "flow_predictor.dit"


def layer_names(depth: int, cross: tuple[int, ...]) -> dict[str, tuple[str, str]]:
    """Our tensors below `head.net.` -> (side file, public name)."""
    layers = {
        "action_fc1": ("noisy_action_projector", "fc1"),
        "action_fc2": ("noisy_action_projector", "fc2"),
        "proprio_fc1": ("proprio_projector", "fc1"),
        "proprio_fc2": ("proprio_projector", "fc2"),
    }
    names = {
        "action_out": "x_embedder",
        "proprio_out": "proprio_embedder",
        "context_out": "context_adapter",
        "time.fc1": "t_embedder.mlp.0",
        "time.fc2": "t_embedder.mlp.2",
        "dit.out": "final_layer.linear",
        "dit.modulation": "final_layer.adaLN_modulation.1",
    }
    for i in range(depth):
        block = f"blocks.{i}"
        names |= {f"dit.{block}.attn.{n}": f"{block}.attn_temporal.{n}" for n in ("qkv", "proj")}
        names |= {f"dit.{block}.mlp.{n}": f"{block}.mlp.{n}" for n in ("fc1", "fc2")}
        names[f"dit.{block}.modulation"] = f"{block}.adaLN_modulation.1"
    for i in cross:
        part = f"blocks.{i}.cross_attn"
        names |= {f"dit.{part}.{a}": f"{part}.attn.{b}" for a, b in (("q", "v_proj"), ("out", "out_v_proj"))}
        names[f"dit.{part}.norm"] = f"{part}.layer_norm_v"
        names |= {f"dit.context_kv.{i}.{a}": f"{part}.attn.{b}" for a, b in (("k", "l_proj"), ("v", "values_l_proj"))}
        names[f"dit.context_kv.{i}.norm"] = f"{part}.layer_norm_l"
    layers |= {ours: ("action_head", f"{DIT}.{theirs}") for ours, theirs in names.items()}
    tensors = {f"{a}.{kind}": (b, f"{c}.{kind}") for a, (b, c) in layers.items() for kind in ("weight", "bias")}
    gammas = {f"dit.blocks.{i}.cross_attn.gamma": f"{DIT}.blocks.{i}.cross_attn.gamma_v" for i in cross}
    tensors |= {ours: ("action_head", theirs) for ours, theirs in gammas.items()}
    return {**tensors, "positions": ("action_head", f"{DIT}.temp_embed")}
