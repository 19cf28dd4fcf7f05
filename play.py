"""See what training changed: two policies play the same starts, and a world model imagines what they do.

    python play.py                   with the checkpoints of this repository: a minute on two cores; or `make play`
    python play.py --policies runs/demo/sft runs/demo/rft --world-model runs/demo/wm --out-dir runs/play_demo

Both policies play the first `episodes` evaluation states of some tasks (eval_libero.py). Of each task, the page films
the first start that one policy alone wins, or else the first one: what happened, and beside it what the world model
imagines of the same actions, from the first frame alone to the episode's end.

Reads checkpoints. Writes to out_dir the evaluation (eval/) and play.html, one file with its pictures; opens nothing.
The same command plays no episode twice.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vlarft.data.convention import check_same_images
from vlarft.data.episode import RobotState
from vlarft.policy import VLAPolicy
from vlarft.report.figures import Film, track
from vlarft.report.page import Section, sections, write_page
from vlarft.reward import check_same_robot
from vlarft.run.checkpoint import checkpoint_file, read_header
from vlarft.run.config import Count, Side, opt
from vlarft.run.pixels import to_bytes, to_floats
from vlarft.run.script import run_script
from vlarft.run.stages import Stage
from vlarft.sim import make_env
from vlarft.sim.replay import replay_frames
from vlarft.sim.suites import task_names
from vlarft.world_model import WorldModel

ROOT = Path(__file__).parent
CHECKPOINTS = os.path.relpath(ROOT / "checkpoints")  # from wherever the command is given
NAMES = "before", "after"


@dataclass(frozen=True)
class Config:
    """Two policies, a world model, and what they play."""

    policies: tuple[str, str] = opt(
        tuple(f"{CHECKPOINTS}/tabletop_{name}" for name in NAMES), "the earlier policy and the later one", group="model"
    )
    world_model: str = opt(f"{CHECKPOINTS}/tabletop_world_model", "its file, or a run of train_wm.py")

    suite: str = opt("tabletop_object", "suite that all three were trained on", group="evaluation")
    tasks: tuple[str, ...] = opt(("0", "1", "2", "3"), "tasks, by number or name")
    episodes: Count = opt(6, "evaluation states of each task")
    noise: Literal["zero", "sampled"] = opt("zero", "x_0 of the policies")

    out_dir: str = opt("runs/play", "folder to write", group="run")
    size: Side = opt(160, "side of the films [px]")


PRESETS = {"tiny": Config(), "smoke": Config(tasks=("0",), episodes=1)}


def chosen_starts(episodes: Sequence[Mapping[tuple, dict]]) -> list[tuple]:
    """Choose of each task the first start at which the policies' outcomes differ, or else its first."""
    chosen = {}
    for start in sorted(
        episodes[0], key=lambda start: (len({played[start]["success"] for played in episodes}) < 2, start)
    ):
        chosen.setdefault(start[:2], start)
    return sorted(chosen.values())


def imagine(model: WorldModel, camera: str, start: tuple, actions: np.ndarray, fast_rendering: bool) -> np.ndarray:
    """Imagine a whole episode from its first frame.

    Args:
        model: the world model.
        camera: that it saw.
        start: suite, task, initial state.
        actions: (L, A) raw.
        fast_rendering: whether the frames that it was trained on were rendered fast, see `make_env`.

    Returns:
        Frames (1 + L, H, W, 3), uint8; the first is the given one.
    """
    suite, task, init_state = start
    size = model.cfg.tokenizer.image_size[0]
    env = make_env(suite, task, image_size=size, cameras=(camera,), fast_rendering=fast_rendering)
    env.reset(init_state=init_state)
    seen = env.observe()
    first, proprio = seen[camera], torch.from_numpy(seen["proprio"])[None]
    robot = RobotState(proprio, torch.zeros_like(proprio))  # at rest
    frame = to_floats(first)[None]  # (1, C, H, W)
    rows = torch.from_numpy(actions)[None, None]  # (1, 1, L, A)
    frames: Tensor = model.rollout(frame, rows, greedy=True, robot=robot).frames[0, 0]  # (L, C, H, W)
    return np.concatenate([first[None], to_bytes(frames).numpy()])


def films(
    cfg: Config, model: WorldModel, camera: str, episodes: Sequence[Mapping[tuple, dict]], fast_rendering: bool
) -> list[Film]:
    """Make films of the chosen starts: each policy's episode, and the same in imagination."""
    found, names = [], task_names(cfg.suite)
    for start in chosen_starts(episodes):
        tracks = []
        for name, played in zip(NAMES, episodes, strict=True):
            record = played[start]
            actions, outcome = np.array(record["actions"], np.float32), "success" if record["success"] else "failure"
            frames = replay_frames(*start, actions, size=cfg.size, fast_rendering=fast_rendering)
            tracks.append(track(f"{name}: {outcome}", frames))
            shown = imagine(model, camera, start, actions, fast_rendering)
            kept = [*range(0, len(shown) - 1, 2), len(shown) - 1]  # every second frame, as the films of what happened
            tracks.append(track(f"{name}, imagined", shown[kept]))
        found.append(Film(f"{names[start[1]].replace('_', ' ')}, start {start[2]}", tracks, 100))
    return found


def main(cfg: Config) -> Path:
    """Play, imagine and write the page; return its path."""
    out = Path(cfg.out_dir)
    model = WorldModel.load(cfg.world_model)
    imagined = read_header(cfg.world_model).extra
    for path in cfg.policies:
        check_same_robot(VLAPolicy.load(path), model)
        check_same_images(read_header(path).extra, f"policy {path}", imagined, f"world model {cfg.world_model}")
    fast = bool(read_header(cfg.policies[0]).extra.get("fast_rendering"))  # as in training
    flags = {"suites": [cfg.suite], "tasks": cfg.tasks, "episodes": cfg.episodes, "noise": cfg.noise}
    flags["fast_rendering"] = fast
    # given again, it plays the episodes of a policy that has been replaced since, and no others
    words = Stage("eval", ROOT / "eval_libero.py", {"preset": "tiny", "policies": cfg.policies, **flags}).words()
    evaluate = [sys.executable, str(ROOT / "eval_libero.py"), *words, "--out-dir", str(out / "eval")]
    if status := subprocess.run(evaluate).returncode:
        raise SystemExit(status)  # it has said why
    records = [json.loads(line) for line in (out / "eval" / "episodes.jsonl").read_text().splitlines()]
    episodes = [
        {
            (r["suite"], r["task"], r["init_state"]): r
            for r in records
            if Path(r["policy"]) in (Path(p), checkpoint_file(p))
        }
        for p in cfg.policies
    ]
    seen = Section(
        "What happened, and what the world model imagines",
        films=films(cfg, model, imagined.get("camera", "agentview"), episodes, fast),
    )
    seen.facts = {"policies": ", ".join(cfg.policies), "world model": cfg.world_model}
    write_page("before and after", [seen, *sections([out / "eval"])], out / "play.html")
    print(f"the page, to open in a browser: {out / 'play.html'}")
    return out / "play.html"


if __name__ == "__main__":
    run_script(main, Config, PRESETS, __doc__)
