"""Convert public checkpoints of the frame tokenizer, the world model and the policy.

    python -m vlarft.pretrained tokenizer WorldModel-Tokenizer --out runs/public/tokenizer.safetensors
    python -m vlarft.pretrained world-model WorldModel-Libero-Spatial --out runs/public/world_model.safetensors \\
        --tokenizer runs/public/tokenizer.safetensors --action-ranges libero
    python -m vlarft.pretrained policy POLICY --out runs/public/policy.safetensors

Reads the folder of a downloaded repository, or downloads one of the Hugging Face Hub, `hf:user/name[/path][@revision]`,
its weights and tables and no code: its config.json (without one, the paper's sizes) and its weights: one
safetensors file, safetensors with an index, or a .bin / .pt of tensors. Writes one float32 file that
`FrameTokenizer.load`, `WorldModel.load` or `VLAPolicy.load` reads.

Every tensor must fit: one that is missing, left over or of another shape is an error that names it.

The public world models take raw environment actions, cut into bins. The ranges of the bins are not among the weights:
give `--action-ranges`. A policy's folder also contains the action head's three side files, dataset_statistics.json,
whose quantiles the normaliser takes, and the text tokenizer (tokenizer.json, or vocab.json and merges.txt), unless
`--text` names another place. Without side files the action head would be random: `--new-head` asks for that, to train
it with `train_sft.py --init`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from vlarft.pretrained.policy import convert_policy
from vlarft.pretrained.world_model import convert_tokenizer, convert_world_model, read_action_ranges
from vlarft.run.checkpoint import save_model
from vlarft.run.config import Parser, Side, reader
from vlarft.run.hub import is_hub_name, weights_folder
from vlarft.run.script import clear_errors
from vlarft.tokenizer import FrameTokenizer


def main(argv: Sequence[str]) -> None:
    """Run the command line; see the module's docstring.

    Raises:
        FileExistsError: `--out` exists; and the errors of the functions that convert.
    """
    parser = Parser(
        prog="python -m vlarft.pretrained", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    commands = {kind: kinds.add_parser(kind, allow_abbrev=False) for kind in ("tokenizer", "world-model", "policy")}
    for command in commands.values():
        command.add_argument(
            "path",
            metavar="FOLDER",
            help="downloaded repository, its file of weights, or hf:user/name[/path][@revision]",
        )
        command.add_argument("--out", type=Path, required=True, help="file to write, by convention *.safetensors")
    size = {"type": reader(Side), "nargs": 2, "metavar": ("H", "W")}
    commands["tokenizer"].add_argument("--image-size", **size, help="image size [px]; default: that of config.json")
    commands["tokenizer"].add_argument("--interpolate-positions", **size, help="resample positions from this grid")
    commands["world-model"].add_argument(
        "--tokenizer", required=True, help="converted tokenizer that it was trained with"
    )
    commands["world-model"].add_argument(
        "--action-ranges", help='"libero", or a .json / .pth file: [low, high] per dimension, in raw units'
    )
    commands["policy"].add_argument("--text", help="tokenizer.json, or a folder with it or vocab and merges")
    commands["policy"].add_argument("--statistics", help="entry of dataset_statistics.json, if it has several")
    head = commands["policy"].add_mutually_exclusive_group()
    head.add_argument("--step", help="step in the names of the head's side files, if there are several")
    head.add_argument("--new-head", action="store_true", help="read no side files: random action head, to be trained")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise FileExistsError(f"{args.out} exists: remove it or choose another --out")
    path = _place(args.path)
    if args.kind == "tokenizer":
        sizes = (args.image_size, args.interpolate_positions)
        model = convert_tokenizer(path, *(tuple(size) if size else None for size in sizes))
    elif args.kind == "policy":
        torch.manual_seed(0)  # for the weights of an untrained head
        model = convert_policy(path, args.text and _place(args.text), args.statistics, args.step, args.new_head)
    elif args.action_ranges is None:
        parser.error("a world model's action ranges are not among its weights: give --action-ranges libero, or a file")
    else:
        model = convert_world_model(path, FrameTokenizer.load(args.tokenizer), read_action_ranges(args.action_ranges))
    source = args.path if is_hub_name(args.path) else path.resolve().name
    save_model(args.out, model, model.cfg, {"source": source})
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__} of {count:,} parameters -> {args.out}")
    if args.kind == "policy":
        if args.new_head:
            print("action head: new, with random weights; train it with train_sft.py --init")
        if not model.vlm.action_queries.weight.any():
            print("action queries: not in the file; zero, as at the start of fine-tuning")
        print(
            f"text: {model.vlm.tokenizer.description}; statistics: {'set' if model.normalizer.fitted else 'none yet'}"
        )


def _place(given: str) -> Path:
    """Return the local file or folder that an argument names, downloaded if it is on the Hub."""
    return weights_folder(given) if is_hub_name(given) else Path(given)


if __name__ == "__main__":
    with clear_errors():
        main(sys.argv[1:])
