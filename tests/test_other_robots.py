"""Robots that are not LIBERO's arm: a hand, a mobile base, a base with an arm; from LeRobot folders to actions."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import eval_wm
import train_rft
import train_sft
import train_tokenizer
import train_wm
from vlarft import VLAPolicy
from vlarft.data import load_episodes
from vlarft.data.check import main as check_command
from vlarft.data.convert import main as convert
from vlarft.run.checkpoint import save_model
from vlarft.world_model import WorldModel

FPS, STEPS, EPISODES = 20, 24, 8
FINGERS = [f"{f}_{j}" for f in ("thumb", "index", "middle", "ring") for j in ("abduction", "mcp", "pip")]
ARM = [f"arm_{j}.pos" for j in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")]
BASE = ["x.vel", "y.vel", "theta.vel"]


class Robot(NamedTuple):
    """names of action and state; `columns(t)`: actions (T, A) and states (T, P) at times t (T,) [steps]."""

    actions: list[str]
    state: list[str]
    columns: object
    options: list[str]  # of the converter
    grippers: tuple[int, ...]
    repeated: list[int]  # dimensions that keep their last value beyond the end of an episode
    pose_dims: int  # leading proprio dimensions that drive the world model's frames; 0: actions do


def hand(t):
    """Target angles [rad] of 12 joints; the hand follows a step later."""
    phase = np.arange(12)
    angle = lambda t: 0.8 + 0.7 * np.sin(t[:, None] / 6 + phase)  # noqa: E731
    return angle(t + 1), angle(t)


def base(t):
    """Velocities [m/s, m/s, rad/s] of an omnidirectional base that measures only its speed and turn."""
    velocity = np.stack([0.4 * np.sin(t / 5), 0.2 * np.cos(t / 7), 1.5 * np.sin(t / 9)], 1)
    return velocity, np.stack([np.hypot(velocity[:, 0], velocity[:, 1]), velocity[:, 2]], 1)


def base_with_arm(t):
    """Target angles [deg] of 5 joints, a gripper of 100 (open) to 0, and velocities of the base."""
    joints = lambda t: 40 * np.sin(t[:, None] / 8 + np.arange(5))  # noqa: E731
    grip = np.where(t % STEPS < 12, 100.0, 0.0)[:, None]
    speed = base(t)[0]
    return np.concatenate([joints(t + 1), grip, speed], 1), np.concatenate([joints(t), grip, speed], 1)


ROBOTS = {
    "hand": Robot(FINGERS, FINGERS, hand, ["--absolute"], (), list(range(12)), 12),
    "base": Robot(BASE, ["speed", "theta.vel"], base, [], (), [], 0),
    "lekiwi": Robot(
        [*ARM, *BASE],
        [*ARM, *BASE],
        base_with_arm,
        ["--gripper", "100", "0", "--gripper-dims", "5", "--held-dims", "0", "1", "2", "3", "4"],
        (5,),
        [0, 1, 2, 3, 4, 5],
        0,
    ),
}


def record(root: Path, robot: Robot) -> Path:
    """A set of v2.1 as lerobot records it, with two cameras."""
    cameras = ["observation.images.front", "observation.images.wrist"]
    for i in range(EPISODES):
        actions, states = (x.astype(np.float32) for x in robot.columns(np.arange(STEPS) + 5.0 * i))
        columns = {
            "action": list(actions),
            "observation.state": list(states),
            "timestamp": np.float32(np.arange(STEPS) / FPS),
            "frame_index": np.arange(STEPS),
            "episode_index": np.full(STEPS, i),
            "index": np.arange(STEPS) + i * STEPS,
            "task_index": np.zeros(STEPS, np.int64),
        }
        file = root / f"data/chunk-000/episode_{i:06d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), file)
        for shift, key in enumerate(cameras):
            video = root / f"videos/chunk-000/{key}/episode_{i:06d}.mp4"
            video.parent.mkdir(parents=True, exist_ok=True)
            with av.open(str(video), "w") as container:
                stream = container.add_stream("libx264", rate=FPS)
                stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
                for t in range(STEPS):
                    image = np.full((64, 64, 3), 60 + 40 * shift, np.uint8)
                    x = int(24 + 20 * np.sin((t + 5 * i) / 5))
                    image[24:40, x : x + 16] = (220, 60, 40)
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                container.mux(stream.encode())
    names = ["height", "width", "channels"]
    about = {"video.fps": float(FPS), "video.codec": "h264", "video.is_depth_map": False, "has_audio": False}
    features = {
        "action": {"dtype": "float32", "shape": [len(robot.actions)], "names": robot.actions},
        "observation.state": {"dtype": "float32", "shape": [len(robot.state)], "names": robot.state},
        **{key: {"dtype": "video", "shape": [64, 64, 3], "names": names, "info": about} for key in cameras},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **{k: {"dtype": "int64", "shape": [1], "names": None} for k in ("frame_index", "episode_index", "task_index")},
    }
    info = {
        "codebase_version": "v2.1",
        "robot_type": "some_robot",
        "total_episodes": EPISODES,
        "total_frames": EPISODES * STEPS,
        "total_tasks": 1,
        "chunks_size": 1000,
        "fps": FPS,
        "splits": {"train": f"0:{EPISODES}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
    }
    (root / "meta").mkdir()
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "do it"}))
    lines = [{"episode_index": i, "tasks": ["do it"], "length": STEPS} for i in range(EPISODES)]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", ROBOTS)
def test_from_a_lerobot_folder_to_actions(tmp_path, name):
    robot = ROBOTS[name]
    raw, demos, runs = record(tmp_path / name, robot), tmp_path / f"{name}_ready", tmp_path / "runs"
    convert([str(raw), str(demos), "--format", "lerobot", "--camera", "front", *robot.options])
    assert check_command([str(demos), "--camera", "front", "--picture", str(tmp_path / "check.png")]) == 0
    first = load_episodes(demos, "front")[0]
    assert first.grippers == robot.grippers and first.repeated.nonzero()[0].tolist() == robot.repeated

    def run(script, name, **options):
        demos_of = (str(demos),) if script in (train_tokenizer, train_wm, eval_wm) else str(demos)
        cfg = dataclasses.replace(script.PRESETS["smoke"], out_dir=str(runs / name), demos=demos_of)
        return script.main(dataclasses.replace(cfg, **options))

    share = {"camera": "front", "validation_fraction": 0.25}
    run(train_tokenizer, "tokenizer", **share)
    run(train_wm, "wm", tokenizer=str(runs / "tokenizer"), pose_dims=robot.pose_dims, **share)
    run(eval_wm, "eval", camera="front", world_model=str(runs / "wm"))
    run(train_sft, "sft", **share)
    run(train_rft, "rft", policy=str(runs / "sft"), world_model=str(runs / "wm"))

    policy = VLAPolicy.load(runs / "rft")
    assert policy.cfg.gripper_dims == robot.grippers and policy.cfg.flow.action_dim == len(robot.actions)
    obs = {"front": np.asarray(first.images[3]), "proprio": first.proprio[3], "instruction": "do it"}
    played = policy.act([obs] * 16, generator=torch.Generator().manual_seed(0)).numpy()  # (16, 8, A)
    recorded = np.concatenate([e.actions for e in load_episodes(demos, "front")])
    motion = [i for i in range(len(robot.actions)) if i not in robot.grippers]
    low, high = recorded.min(0), recorded.max(0)
    assert (played >= low - 1e-4).all() and (played <= high + 1e-4).all()
    for i in motion:  # not only the ends of the range
        inside = (played[..., i] > low[i] + 0.1 * (high - low)[i]) & (played[..., i] < high[i] - 0.1 * (high - low)[i])
        assert inside.mean() > 0.2 and len(np.unique(played[..., i])) > 30
    assert set(played[..., list(robot.grippers)].ravel().tolist()) <= {-1.0, 1.0}


@pytest.mark.slow
def test_mistakes_are_named(tmp_path):
    for name in ("hand", "lekiwi"):
        record(tmp_path / name, ROBOTS[name])
    with pytest.raises(
        ValueError, match=r"gripper action \(dimension 5\) lies in \[0, 100\]; .*convert .* --gripper OPEN CLOSED"
    ):
        load_episodes(tmp_path / "lekiwi", "front")
    out = ["--format", "lerobot", "--camera", "front"]
    for options, message in (
        (
            ["--gripper", "1", "0"],
            "hand/episode_000000 has no gripper dimension to convert; name it with --gripper-dims",
        ),
        (["--held-dims", "12"], r"has action dimensions 0 \.\. 11, .* --held-dims \[12\]: 12 does not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            convert([str(tmp_path / "hand"), str(tmp_path / "out"), *out, *options])
    convert([str(tmp_path / "hand"), str(tmp_path / "hand_ready"), *out, "--absolute"])
    other = VLAPolicy(train_sft.SIZES["smoke"])  # of LIBERO's dimensions
    other.normalizer.fit(torch.sign(torch.randn(50, 7)), torch.randn(50, 8))
    other.save(tmp_path / "other.safetensors")
    cfg = dataclasses.replace(
        train_sft.PRESETS["smoke"], demos=(str(tmp_path / "hand_ready"),), camera="front", out_dir=str(tmp_path / "sft")
    )
    with pytest.raises(
        ValueError, match="12 action and 12 proprio dimensions, the policy 7 and 8: they belong to another"
    ):
        train_sft.main(dataclasses.replace(cfg, init=str(tmp_path / "other.safetensors")))
    train_sft.main(dataclasses.replace(cfg, steps=1))
    world_model = WorldModel(train_wm.SIZES["smoke"])
    world_model.action_bins.set_range(-torch.ones(7), torch.ones(7))
    save_model(tmp_path / "wm.safetensors", world_model, world_model.cfg, {"held_out_episodes": []})
    rft = dataclasses.replace(
        train_rft.PRESETS["smoke"],
        policy=str(tmp_path / "sft"),
        world_model=str(tmp_path / "wm.safetensors"),
        demos=(str(tmp_path / "hand_ready"),),
        out_dir=str(tmp_path / "rft"),
    )
    with pytest.raises(ValueError, match="action dim.* 12.* 7"):
        train_rft.main(rft)
    with pytest.raises(ValueError, match=r"proprio has shape \(8,\), expected \(12,\), raw: another robot's"):
        image = np.zeros((64, 64, 3), np.uint8)
        VLAPolicy.load(tmp_path / "sft").act({"front": image, "proprio": np.zeros(8), "instruction": "do it"})
