"""Image conventions: what is recorded, which differences are refused and which pass."""

import warnings
from dataclasses import replace

import numpy as np
import pytest

from vlarft.data.convention import VIEWS, check_image_size, check_same_images, image_convention, warn_other_contexts
from vlarft.data.episode import Episode


def episode(images: np.ndarray, name: str = "e") -> Episode:
    steps = len(images)
    numbers = np.zeros((steps, 8), np.float32)
    return Episode(name, "text", images, numbers, numbers[:, :7], numbers[:, :7])


@pytest.fixture
def scene() -> np.ndarray:
    """Five uint8 frames of 24 x 32 pixels: dark, red at the upper left."""
    images = np.full((5, 24, 32, 3), 40, np.uint8)
    images[:, :6, :12, 0] = 240
    return images


def test_record(scene):
    record = image_convention([episode(scene), episode(scene)], "wrist")
    mean = np.array(record["mean_frame"])
    assert record["camera"] == "wrist" and mean.shape == (8, 8, 3)
    np.testing.assert_allclose(mean[:2, :3, 0], 240 / 255, atol=1e-4)
    np.testing.assert_allclose(mean[2:], 40 / 255, atol=1e-4)


@pytest.mark.parametrize("name", VIEWS)
def test_another_view_is_refused(scene, name):
    other = np.stack([VIEWS[name](frame) for frame in scene])
    ours, theirs = (image_convention([episode(images)], "agentview") for images in (scene, other))
    with pytest.raises(ValueError, match=f"images of WM look like those of POLICY {name} .*difference 0.000, as they"):
        check_same_images(ours, "POLICY", theirs, "WM")


def test_another_rendering_is_refused(scene):
    unknown = episode(scene)
    fast, full = (replace(unknown, env_args={"collection": {"fast_rendering": is_fast}}) for is_fast in (True, False))
    records = [image_convention(of, "agentview") for of in ([fast], [full], [fast, full], [unknown])]
    assert [record["fast_rendering"] for record in records] == [True, False, None, None]
    for ours, theirs in ((0, 1), (1, 0)):
        names = ["FULL", "FAST"][:: 1 if ours else -1]
        with pytest.raises(ValueError, match="FAST has images of fast rendering, FULL not; render both"):
            check_same_images(records[ours], names[0], records[theirs], names[1])
    for known in records:
        check_same_images(known, "a", records[2], "b")
        check_same_images(records[3], "a", known, "b")


def test_other_meshes_and_another_size_are_named(scene):
    own, stand_in = (
        image_convention([replace(episode(scene), env_args={"collection": {"visuals": name}})], "agentview")
        for name in ("own visuals", "stand-in visuals")
    )
    with pytest.raises(ValueError, match="A has images of LIBERO's own visuals, B of stand-in visuals; render"):
        check_same_images(own, "A", stand_in, "B")
    check_same_images(own, "A", image_convention([episode(scene)], "agentview"), "B")  # which does not tell
    with pytest.warns(UserWarning, match="goes on with other images: A has images of LIBERO's own visuals, B of stand"):
        check_same_images(own, "A", stand_in, "B", adapts=True)
    assert own["image_size"] == [24, 32]
    check_image_size((24, 32), "WM", episode(scene))
    with pytest.raises(ValueError, match="WM takes images of 64x64, e has 24x32: resize .* --size 64 64, or train"):
        check_image_size((64, 64), "WM", episode(scene))


def test_other_scenes_of_the_same_convention_pass(scene):
    moved = scene.copy()
    moved[:, 10:16, 20:26, 1] = 200
    ours, theirs = (image_convention([episode(images)], "agentview") for images in (scene, moved))
    check_same_images(ours, "a", theirs, "b")
    check_same_images({}, "a", theirs, "b")  # public weights have no record
    with pytest.raises(ValueError, match="a has camera 'agentview', b has 'wrist'"):
        check_same_images(ours, "a", {"camera": "wrist"}, "b")
    with pytest.warns(UserWarning, match="a was trained on images of 24x32, b has 48x64: resized, they look otherwise"):
        check_same_images(ours, "a", {**theirs, "image_size": (48, 64)}, "b")


def test_the_first_frame_is_among_all_earlier_ones():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_other_contexts({"context_lookback": None}, "world model", -1)
        warn_other_contexts({"context_lookback": -1}, "world model", -1)
        warn_other_contexts({}, "world model", -1)
        warn_other_contexts({"context_lookback": 15}, "world model", 0)
        warn_other_contexts({"context_lookback": None}, "world model", 15)
    with pytest.warns(UserWarning, match="world model was trained with --context-lookback -1, this run has none"):
        warn_other_contexts({"context_lookback": -1}, "world model", None)
    for trained, lookback in ((-1, 0), (0, 15), (15, -1), (15, None)):
        with pytest.warns(UserWarning, match=f"with --context-lookback {trained}, this run has"):
            warn_other_contexts({"context_lookback": trained}, "world model", lookback)
