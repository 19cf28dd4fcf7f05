"""docs/your_robot.md at smoke size: another robot than LIBERO's, from its LeRobot folder to actions."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import eval_wm
import train_rft
import train_sft
import train_tokenizer
import train_wm
from vlarft import VLAPolicy
from vlarft.data import load_episodes
from vlarft.data.check import main as check
from vlarft.data.convert import main as convert
from vlarft.run.checkpoint import read_header

ROOT = Path(__file__).parents[1]
FPS, STEPS, JOINTS = 30, 24, 6


def record(root: Path, episodes: int) -> None:
    """v2.1 as a teleoperated arm records it: targets of five joints and a gripper of 0 (closed) to 100 (open)."""
    key, rng = "observation.images.front", np.random.default_rng(0)
    for folder in ("meta", "data/chunk-000", f"videos/chunk-000/{key}"):
        (root / folder).mkdir(parents=True)
    for i in range(episodes):
        state = np.cumsum(rng.uniform(-3, 3, (STEPS + 1, JOINTS)), 0).astype(np.float32)
        state[:, 5] = np.where(np.arange(STEPS + 1) < STEPS // 2, 100, 0)
        columns = {
            "action": [row.tolist() for row in state[1:]],
            "observation.state": [row.tolist() for row in state[:-1]],
            "timestamp": np.float32(np.arange(STEPS) / FPS),
            "frame_index": np.arange(STEPS),
            "episode_index": np.full(STEPS, i),
            "task_index": np.zeros(STEPS, np.int64),
        }
        pq.write_table(pa.table(columns), root / f"data/chunk-000/episode_{i:06d}.parquet")
        with av.open(str(root / f"videos/chunk-000/{key}/episode_{i:06d}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=FPS)
            stream.height, stream.width, stream.pix_fmt = 72, 96, "yuv420p"
            for y, x in state[:-1, :2].astype(int):
                image = np.full((72, 96, 3), 110, np.uint8)
                image[30 + y : 45 + y, 40 + x : 55 + x] = (220, 60, 40)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    info = {
        "codebase_version": "v2.1",
        "fps": FPS,
        "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            "action": {"dtype": "float32", "shape": [JOINTS]},
            "observation.state": {"dtype": "float32", "shape": [JOINTS]},
            key: {"dtype": "video", "shape": [72, 96, 3]},
        },
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "fold the towel"}))
    lines = [{"episode_index": i, "tasks": ["fold the towel"], "length": STEPS} for i in range(episodes)]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))


def read_run(folder: Path) -> dict:
    return read_header(folder / "model.safetensors").extra


@pytest.mark.slow
def test_from_a_lerobot_folder_to_actions(tmp_path, capsys):
    raw, demos, runs = tmp_path / "towel", tmp_path / "data" / "towel_ready", tmp_path / "runs"
    record(raw, 8)
    assert check([str(raw), "--picture", str(tmp_path / "check.png")]) == 1
    text = capsys.readouterr().out
    assert "the gripper action (dimension 5) lies in [0, 100]" in text and "convert with --absolute" in text
    options = ["--size", "64", "64", "--centre-crop", "--gripper", "100", "0", "--absolute"]
    convert([str(raw), str(demos), "--format", "lerobot", *options])
    assert check([str(demos), "--camera", "front", "--picture", str(tmp_path / "check.png")]) == 0

    def run(script, name, **options):
        place = (str(demos),) if script in (train_tokenizer, train_wm, eval_wm) else str(demos)  # or several
        cfg = dataclasses.replace(script.PRESETS["smoke"], out_dir=str(runs / name), demos=place)
        return script.main(dataclasses.replace(cfg, **options))

    run(train_tokenizer, "tokenizer", camera="front", validation_fraction=0.25)
    run(train_wm, "wm", camera="front", tokenizer=str(runs / "tokenizer"), validation_fraction=0.25, pose_dims=5)
    run(eval_wm, "eval", camera="front", world_model=str(runs / "wm"))
    run(train_sft, "sft", camera="front", validation_fraction=0.25)

    record(tmp_path / "played", 3)  # attempts of the policy
    attempts = demos.parent / "towel_attempts"
    convert([str(tmp_path / "played"), str(attempts), "--format", "lerobot", "--kind", "policy", *options])
    seen = {"demos": (str(demos), str(attempts)), "tokenizer": str(runs / "tokenizer")}
    run(train_wm, "wm_own", camera="front", validation_fraction=0.25, pose_dims=5, **seen)
    trained, held_out = read_run(runs / "wm_own"), read_run(runs / "wm")["held_out_episodes"]
    assert sum(name.startswith("towel_attempts") for name in trained["train_episodes"]) == 2
    assert set(held_out) < set(trained["held_out_episodes"])
    files = {"policy": str(runs / "sft/model.safetensors"), "world_model": str(runs / "wm_own/model.safetensors")}
    run(train_rft, "rft", **files)

    policy = VLAPolicy.load(runs / "rft/model.safetensors")
    image = np.asarray(load_episodes(demos, "front")[0].images[3])
    actions = policy.act({"front": image, "proprio": np.zeros(JOINTS), "instruction": "fold the towel"})
    assert actions.shape == (8, JOINTS) and set(actions[:, 5].tolist()) <= {-1.0, 1.0}
    assert policy.cfg.flow.action_dim == JOINTS
    assert policy.cfg.cameras == ("front",) and policy.cfg.flow.proprio_dim == JOINTS


def test_presets_have_the_numbers_of_the_paper():
    assert (train_sft.PRESETS["robot"].steps, train_sft.PRESETS["robot"].batch_size) == (20_000, 16)
    assert (train_wm.PRESETS["robot"].steps, train_wm.PRESETS["robot"].batch_size) == (24_000, 16)
    assert train_rft.PRESETS["robot"].steps == 200
    for script in (train_sft, train_wm, train_rft):
        assert dataclasses.replace(script.PRESETS["robot"], steps=1) == dataclasses.replace(
            script.PRESETS["paper"], steps=1
        )


def test_commands_of_the_page_exist():
    text = "\n".join((ROOT / "docs" / page).read_text() for page in ("your_robot.md", "data.md")).replace("\\\n", " ")
    commands = re.findall(r"^(?:python|torchrun [^.]*?) (?:-m vlarft\.data\.)?(\w+)(?:\.py)?( .*)$", text, re.MULTILINE)
    assert {name for name, _ in commands} >= {
        "check",
        "convert",
        "train_tokenizer",
        "train_wm",
        "train_sft",
        "train_rft",
    }
    for name, rest in commands:
        given = {w.split("=")[0] for w in rest.split("#")[0].split() if w.startswith("--")}
        if (ROOT / f"{name}.py").is_file():
            known = {
                "--preset",
                *("--" + f.replace("_", "-") for f in importlib.import_module(name).Config.__dataclass_fields__),
            }
        else:
            source = (ROOT / f"src/vlarft/data/{name}.py").read_text()
            known = set(re.findall(r'"(--[a-z-]+)"', source))
        assert given <= known, f"{name}: {given - known}"
