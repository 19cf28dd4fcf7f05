"""Serve a policy to a robot, over the websocket protocol of openpi's policy server.

    python serve_policy.py --policy runs/rft                                      # for a client on this machine
    python serve_policy.py --policy runs/rft --host 0.0.0.0 --api-key-file key    # for the network, with a key
    python serve_policy.py --policy runs/rft --image-keys front=observation/image

Clients of openpi's policy server, such as its `openpi-client` package, work unchanged: they send the camera images, the
robot's state and an instruction, and get the next chunk of actions, (T, A), raw (src/vlarft/serving.py has the
protocol). By default an observation has the keys of openpi's LIBERO client:

    observation/image         image of camera agentview, uint8 (H, W, 3), RGB, oriented as in training
    observation/wrist_image   image of camera eye_in_hand, if the policy has that camera
    observation/state         proprio (P,), raw, as in the demonstrations
    prompt                    instruction

Preset `droid` has the keys of openpi's DROID client; its example asserts the length of a chunk, which is 8 here. A
state in several entries is put together in the order of `--state-keys`. Other entries are ignored; a missing or
misshapen one is answered by an error that names it.

Reads a policy of train_sft.py, train_rft.py or train_rl.py, on the GPU where there is one. Writes nothing. It stops at
Ctrl+C.
"""

import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch

from vlarft import __version__
from vlarft.flow import X0
from vlarft.policy import VLAPolicy
from vlarft.run.checkpoint import read_header
from vlarft.run.config import Count, Range, Rows, Whole, opt, parse
from vlarft.run.script import clear_errors
from vlarft.serving import Keys, policy_server

if TYPE_CHECKING:
    from websockets.sync.server import Server

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Config:
    """One server; the defaults suit openpi's LIBERO client."""

    image_keys: tuple[str, ...] = opt(
        ("agentview=observation/image", "eye_in_hand=observation/wrist_image"),
        "entries with the images, as CAMERA=KEY; those of cameras that the policy lacks are ignored",
        group="data",
    )
    state_keys: tuple[str, ...] = opt(("observation/state",), "entries that make up the proprio, in this order")
    prompt_key: str = opt("prompt", "entry with the instruction")

    policy: str = opt("runs/rft", "policy to serve: run folder or checkpoint", group="model")
    noise: X0 = opt("sampled", "x_0 of the ODE: sampled, zero, which is often better, or gripper: 0 in all else")
    num_flow_steps: Rows = opt(10, "Euler steps of the ODE (K in Sec. 3.3)")
    compile: bool = opt(False, "compile the head: a minute at the start, then less time a chunk")

    host: str = opt("127.0.0.1", "address to listen at; 0.0.0.0: all of this machine's", group="run")
    port: Annotated[int, Range(0, 65535)] = opt(8000, "port to listen at (openpi: 8000); 0: any that is free")
    api_key_file: str | None = opt(None, "file with the key that clients must send; none: no key")
    max_megabytes: Count = opt(64, "size of the largest message that is read [MB]")
    seed: Whole = opt(0, "seed of x_0")


PRESETS = {
    "libero": Config(),
    "droid": Config(
        image_keys=(
            "exterior_image_1_left=observation/exterior_image_1_left",
            "wrist_image_left=observation/wrist_image_left",
        ),
        state_keys=("observation/joint_position", "observation/gripper_position"),
    ),
}


def client_keys(cfg: Config, cameras: Sequence[str]) -> Keys:
    """Read the keys of the configuration.

    Raises:
        ValueError: an entry that is not CAMERA=KEY, a camera of the policy without key, or a camera or key given twice.
    """
    images = {}
    for entry in cfg.image_keys:
        camera, equals, key = entry.partition("=")
        if not (camera and equals and key):
            raise ValueError(f"--image-keys {entry}: expected CAMERA=KEY, such as agentview=observation/image")
        if camera in images:
            raise ValueError(f"--image-keys gives camera {camera} twice: {images[camera]} and {key}")
        images[camera] = key
    if missing := [camera for camera in cameras if camera not in images]:
        raise ValueError(
            f"--image-keys names no entry for camera {', '.join(missing)} of {cfg.policy}; add "
            + " ".join(f"{camera}=KEY" for camera in missing)
        )
    keys = Keys({camera: images[camera] for camera in cameras}, cfg.state_keys, cfg.prompt_key)
    names = [*keys.images.values(), *keys.state, keys.prompt]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--image-keys, --state-keys, --prompt-key: {', '.join(twice)} is given twice")
    return keys


def read_key(cfg: Config) -> str | None:
    """Read the key that clients must send.

    Raises:
        ValueError: the file is empty.
    """
    if cfg.api_key_file is None:
        return None
    if key := Path(cfg.api_key_file).read_text().strip():
        return key
    raise ValueError(f"--api-key-file {cfg.api_key_file} is empty; write the key into it")


def make_server(cfg: Config) -> "Server":
    """Load the policy, have it make a chunk, and open the server; see `serving.policy_server`."""
    key = read_key(cfg)
    policy = VLAPolicy.load(cfg.policy, "cuda" if torch.cuda.is_available() else "cpu").for_playing(cfg.compile)
    flow, keys = policy.cfg.flow, client_keys(cfg, policy.cfg.cameras)
    generator = torch.Generator(policy.device).manual_seed(cfg.seed)
    trained = read_header(cfg.policy).extra
    known = {text.strip().lower() for text in trained.get("instructions") or ()}

    @functools.lru_cache(maxsize=1000)
    def say_once(text: str) -> None:
        print(f"{cfg.policy} {text}", file=sys.stderr, flush=True)

    def infer(message: Any) -> np.ndarray:
        obs = keys.read(message, flow.proprio_dim)
        if known and obs["instruction"].strip().lower() not in known:
            say_once(f"was trained on {len(known)} instructions, and not on {obs['instruction']!r}")
        for camera in keys.images if "image_size" in trained else ():
            (height, width), side = trained["image_size"], obs[camera].shape[:2]
            if side != (height, width):
                size = f"{side[0]}x{side[1]}, which are resized otherwise"
                say_once(f"was trained on images of {height}x{width}; those of {camera} have {size}")
        noise = policy.initial_noise(cfg.noise, generator=generator)
        return policy.act(obs, noise=noise, num_steps=cfg.num_flow_steps).cpu().numpy()  # (T, A)

    # the first chunks take longer than the others, with --compile a minute: make them before a robot waits
    blank = np.zeros((policy.vlm.image_size, policy.vlm.image_size, 3), np.uint8)
    obs = {**dict.fromkeys(policy.cfg.cameras, blank), "proprio": np.zeros(flow.proprio_dim), "instruction": "warm up"}
    for _ in range(3):
        started = time.perf_counter()
        policy.act(obs, noise=torch.zeros(flow.chunk, flow.action_dim), num_steps=cfg.num_flow_steps).cpu()
    milliseconds = 1000 * (time.perf_counter() - started)

    metadata = {
        "server": f"vlarft {__version__}",
        "observation": keys.describe(flow.proprio_dim),
        "action_horizon": flow.chunk,
        "action_dim": flow.action_dim,
    }
    limit = cfg.max_megabytes * 1_000_000
    server = policy_server(infer, metadata, host=cfg.host, port=cfg.port, api_key=key, max_bytes=limit)
    port = server.socket.getsockname()[1]
    print(f"{cfg.policy} at ws://{cfg.host}:{port}: {flow.chunk} actions in {milliseconds:.1f} ms", flush=True)
    for name, what in metadata["observation"].items():
        print(f"  {name}: {what}", flush=True)
    if key is None and cfg.host not in LOOPBACK:
        print(f"whoever reaches port {port} can use the policy: --api-key-file asks for a key", file=sys.stderr)
    return server


def main(cfg: Config) -> None:
    """Serve until Ctrl+C."""
    with make_server(cfg) as server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)


if __name__ == "__main__":
    with clear_errors():
        main(parse(Config, PRESETS, sys.argv[1:], __doc__))
