"""Write a vlarft policy as the folder that lerobot's commands and the Hub expect.

    python -m lerobot_policy_vlarft runs/rft lerobot_rft

The folder has config.json, model.safetensors (which `VLAPolicy.load` reads too) and lerobot's processors.
"""

import argparse
from pathlib import Path

from vlarft.run.checkpoint import new_folder
from vlarft.run.config import Parser
from vlarft.run.script import clear_errors

from .modeling_vlarft import VlarftPolicy
from .processor_vlarft import make_vlarft_pre_post_processors


def main() -> None:
    """Read the command line and write the folder.

    Raises:
        FileExistsError: it exists.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="run folder or model.safetensors of vlarft")
    parser.add_argument("folder", type=Path, help="folder to write")
    options = parser.parse_args()
    with new_folder(options.folder) as folder:
        policy = VlarftPolicy.from_pretrained(options.checkpoint)
        policy.save_pretrained(folder)
        for pipeline in make_vlarft_pre_post_processors(policy.config):
            pipeline.save_pretrained(folder)
    print(f"{options.folder}: " + ", ".join(sorted(path.name for path in options.folder.iterdir())))


if __name__ == "__main__":
    with clear_errors():
        main()
