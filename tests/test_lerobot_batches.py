"""The plugin's conversion of LeRobot's batches, without lerobot; the rest is tested in integrations/."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from vlarft.data import WindowSampler, load_episodes
from vlarft.policy import VLAPolicy

FOLDER = Path(__file__).parents[1] / "integrations" / "lerobot_policy_vlarft" / "src" / "lerobot_policy_vlarft"
KEY = "observation.images.agentview"


@pytest.fixture(scope="module")
def batches():
    spec = importlib.util.spec_from_file_location("plugin_batches", FOLDER / "batches.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batch_of(rows: int = 3, **entries) -> dict:
    """A batch as lerobot makes it of 8-bit images."""
    images = np.random.default_rng(0).integers(0, 256, (rows, 64, 80, 3), dtype=np.uint8)
    floats = torch.from_numpy(images).movedim(-1, 1).float() / 255
    state = torch.linspace(-1, 1, 8 * rows).reshape(rows, 8)
    return {KEY: floats, "observation.state": state, "task": [f"task {i}" for i in range(rows)], **entries}


def test_the_chunk_is_that_of_act(batches, policy_file):
    policy, batch = VLAPolicy.load(policy_file), batch_of()
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 80, 3), dtype=np.uint8)
    direct = [
        {"agentview": image, "proprio": state, "instruction": task}
        for image, state, task in zip(images, batch["observation.state"].numpy(), batch["task"])
    ]
    seen = batches.observations(batch, policy.cfg.cameras)
    for one, other in zip(seen, direct, strict=True):
        assert one.keys() == other.keys() and np.array_equal(one["agentview"], other["agentview"])
    noise = torch.randn(3, 8, 7)
    assert torch.equal(policy.act(seen, noise=noise), policy.act(direct, noise=noise))


def test_every_8_bit_value_comes_back(batches):
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)
    seen = batches.observations(batch_of(1, **{KEY: levels.movedim(-1, 1).float() / 255}), ["agentview"])
    assert torch.equal(seen[0]["agentview"], levels[0])


def test_cameras_have_the_names_of_other_formats(batches):
    keys = ["observation.state", "observation.images.image", "observation.images.wrist_image", "task"]
    expected = {"agentview": keys[1], "eye_in_hand": keys[2]}
    assert batches.camera_keys(["agentview", "eye_in_hand"], keys) == expected
    assert batches.camera_keys(["agentview"], ["observation.image"]) == {"agentview": "observation.image"}
    assert batches.camera_keys(["front"], ["observation.images.front", "observation.images.front_is_pad"]) == {
        "front": "observation.images.front"
    }
    with pytest.raises(
        ValueError, match=r"no observation.images.top, .*; its images are observation.images.image, .*re"
    ):
        batches.camera_keys(["top"], keys)
    with pytest.raises(ValueError, match="its images are none"):
        batches.camera_keys(["top"], ["observation.state"])


def test_one_instruction_is_for_all_rows(batches):
    assert [o["instruction"] for o in batches.observations(batch_of(task="go"), ["agentview"])] == ["go"] * 3


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {KEY: torch.zeros(3, 64, 80, 3)},
            r"image of agentview is torch.float32 \(3, 64, 80, 3\), expected floats \(B,",
        ),
        ({KEY: torch.zeros(3, 3, 64, 80, dtype=torch.uint8)}, "image of agentview is torch.uint8 .*expected floats"),
        ({KEY: torch.zeros(3, 1, 3, 64, 80)}, r"\(3, 1, 3, 64, 80\), expected floats .* one frame each"),
        ({KEY: np.zeros((3, 3, 64, 80))}, r"image of agentview is float64 \(3, 3, 64, 80\)"),
        ({KEY: torch.full((3, 3, 64, 80), 255.0)}, "has values from 255 to 255, expected 0 to 1"),
        ({KEY: torch.full((3, 3, 64, 80), torch.nan)}, "has values from nan to nan, expected 0 to 1"),
        ({KEY: torch.zeros(2, 3, 64, 80)}, "3 states, and images: agentview 2; expected equal numbers"),
        ({"observation.state": torch.zeros(3, 1, 8)}, r"observation.state is \(3, 1, 8\), expected a tensor \(B, P\)"),
        ({"observation.state": None}, "observation.state is NoneType"),
        ({"task": None}, "task is None, expected 3 instructions"),
        ({"task": ["go"]}, r"task is \['go'\], expected 3 instructions"),
        ({"task": ["go", "go", 1]}, r"1\], expected 3 instructions"),
    ],
)
def test_bad_batches_are_named(batches, entries, message):
    with pytest.raises(ValueError, match=message):
        batches.observations(batch_of(**entries), ["agentview"])


def test_another_robots_state_is_refused(batches, policy_file):
    seen = batches.observations(batch_of(**{"observation.state": torch.zeros(3, 6)}), ["agentview"])
    with pytest.raises(ValueError, match=r"proprio has shape .*6.*, expected \(8,\), raw: another robot's"):
        VLAPolicy.load(policy_file).act(seen)


def test_actions_are_padded_as_in_train_sft(batches, demos):
    episode = load_episodes(demos)[0]
    start = len(episode) - 3
    last = torch.from_numpy(episode.actions[[*range(start, len(episode)), *[-1] * 5]])  # lerobot repeats the last
    pad = torch.arange(8) >= 3
    ours = WindowSampler([episode], num_frames=1, chunk=8).windows(np.array([[0, start]]))
    repeated = torch.from_numpy(episode.repeated)
    assert torch.equal(
        batches.padded_actions({"action": last[None], "action_is_pad": pad[None]}, repeated, 8), ours.actions
    )
    assert torch.equal(batches.padded_actions({"action": last[None]}, repeated, 8), last[None])
    targets = batches.padded_actions({"action": last[None], "action_is_pad": pad[None]}, torch.ones(7, dtype=bool), 8)
    assert torch.equal(targets, last[None])
    for wrong in (last, last[None, :7], last[None, :, :6], None):
        with pytest.raises(ValueError, match=r"action is .*, expected \(B, 8, 7\): another robot's\?"):
            batches.padded_actions({"action": wrong}, repeated, 8)
