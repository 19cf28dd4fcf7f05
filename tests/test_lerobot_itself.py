"""lerobot as the reference, if installed: it reads our files and we read its files, pixel for pixel."""

import numpy as np
import pytest

datasets = pytest.importorskip(
    "lerobot.datasets.lerobot_dataset", reason="lerobot is not installed: pip install lerobot"
)

from test_convert import sources  # noqa: E402

from vlarft.data import load_episodes  # noqa: E402
from vlarft.data.convert import main as convert  # noqa: E402

FPS, SIZE = 10, (96, 128)


def rows(root, *keys):
    """Columns of all frames as lerobot returns them; images as uint8 (N, H, W, 3)."""
    data = datasets.LeRobotDataset("someone/something", root=root, video_backend="pyav")
    frames = [data[i] for i in range(len(data))]
    out = []
    for key in keys:
        values = np.stack([frame[key].numpy() for frame in frames])
        out.append((values.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8) if values.ndim == 4 else values)
    return [*out, [frame["task"] for frame in frames]]


@pytest.mark.parametrize("kind", ["video", "image"])
def test_what_it_writes(tmp_path, kind):
    data = datasets.LeRobotDataset.create(
        "someone/something",
        fps=FPS,
        root=tmp_path / "set",
        use_videos=kind == "video",
        features={
            "observation.images.front": {"dtype": kind, "shape": (*SIZE, 3), "names": ["height", "width", "channel"]},
            "observation.state": {"dtype": "float32", "shape": (8,), "names": None},
            "action": {"dtype": "float32", "shape": (7,), "names": None},
        },
    )
    rng = np.random.default_rng(0)
    for number, steps in enumerate((15, 22, 12)):
        for t in range(steps):
            image = np.full((*SIZE, 3), 30, np.uint8)
            image[10 + t : 30 + t, 20 + 10 * number : 60] = (220, 120, 40)
            action = rng.uniform(-1, 1, 7).astype(np.float32)
            action[6] = -1 if t < steps // 2 else 1
            columns = {"observation.state": rng.normal(size=8).astype(np.float32), "action": action}
            data.add_frame({"observation.images.front": image, **columns, "task": f"task {number % 2}"})
        data.save_episode()
    data.finalize()
    episodes = load_episodes(tmp_path, "front")
    images, states, actions, tasks = rows(tmp_path / "set", "observation.images.front", "observation.state", "action")
    np.testing.assert_array_equal(np.concatenate([np.asarray(e.images) for e in episodes]), images)
    np.testing.assert_array_equal(np.concatenate([e.proprio for e in episodes]), states)
    np.testing.assert_array_equal(np.concatenate([e.actions for e in episodes]), actions)
    assert [e.instruction for e in episodes for _ in range(len(e))] == tasks


@pytest.mark.parametrize("kind", ["video", "png"])
def test_what_it_reads(tmp_path, kind):
    before = sources(tmp_path / "hdf5")
    convert([str(tmp_path / "hdf5"), str(tmp_path / "set"), "--format", "lerobot", "--images", kind])
    images, actions, tasks = rows(tmp_path / "set", "observation.images.image", "action")
    ours = load_episodes(tmp_path / "set", successes_only=False)
    np.testing.assert_array_equal(np.concatenate([np.asarray(e.images) for e in ours]), images)
    np.testing.assert_array_equal(np.concatenate([e.actions for e in before]), actions)
    assert [e.instruction for e in before for _ in range(len(e))] == tasks
    if kind == "png":
        np.testing.assert_array_equal(np.concatenate([np.asarray(e.images) for e in before]), images)
