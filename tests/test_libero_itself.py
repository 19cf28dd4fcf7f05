"""LIBERO's and robomimic's readers as the reference, if installed: they read the HDF5 files that we write."""

import importlib.util

import numpy as np
import pytest
from test_convert import sources

from vlarft.sim.libero_install import package_folder


def _reader():
    """LIBERO's dataset_utils, by its file: importing the package would ask questions on the terminal."""
    try:
        path = package_folder() / "utils" / "dataset_utils.py"
    except (ImportError, FileNotFoundError) as error:
        pytest.skip(str(error))
    spec = importlib.util.spec_from_file_location("libero_dataset_utils", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_libero_describes_our_demonstrations(tmp_path, capsys):
    reader = _reader()
    episodes = [e for e in sources(tmp_path) if "lift" in e.name]
    reader.get_dataset_info(str(tmp_path / "suite" / "lift_demo.hdf5"))
    text = capsys.readouterr().out
    actions = np.concatenate([e.actions for e in episodes])
    assert f"total transitions: {len(actions)}\n" in text and "total trajectories: 3\n" in text
    assert f"action min: {actions.min()}\n" in text and f"action max: {actions.max()}\n" in text
    assert "language instruction: lift the cup\n" in text and "no filter keys" in text
    for episode, name in zip(episodes, ("demo_0", "demo_1", "demo_2")):
        assert f"episode {name} with {len(episode)} transitions" in text
        for camera in ("agentview_rgb", "eye_in_hand_rgb"):
            assert f"observation key {camera} with shape ({len(episode)}, 32, 48, 3)" in text


def test_robomimic_reads_our_demonstrations(tmp_path):
    """As LIBERO's lifelong/datasets.py opens them."""
    robomimic = pytest.importorskip(
        "robomimic.utils.dataset", reason="robomimic is not installed: pip install robomimic"
    )
    from robomimic.utils import obs_utils

    episodes = [e for e in sources(tmp_path) if "push" in e.name]
    path = tmp_path / "suite" / "push_demo.hdf5"
    keys = {"rgb": ["agentview_rgb", "eye_in_hand_rgb"], "depth": [], "low_dim": ["gripper_states", "joint_states"]}
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": keys})
    names = [name for group in keys.values() for name in group]
    data = robomimic.SequenceDataset(
        hdf5_path=str(path),
        obs_keys=names,
        dataset_keys=["actions"],
        load_next_obs=False,
        frame_stack=1,
        seq_length=9,
        pad_frame_stack=True,
        pad_seq_length=True,
        get_pad_mask=False,
        goal_mode=None,
        hdf5_cache_mode="low_dim",
        hdf5_use_swmr=False,
    )
    assert data.n_demos == 3 and len(data) == sum(map(len, episodes))
    window = data[len(episodes[0])]  # the first of the second demonstration
    np.testing.assert_array_equal(window["actions"], episodes[1].actions[:9])
    np.testing.assert_allclose(window["obs"]["gripper_states"], episodes[1].proprio[:9, 6:], atol=1e-7)
    for name, camera in (("agentview_rgb", "agentview"), ("eye_in_hand_rgb", "eye_in_hand")):
        np.testing.assert_array_equal(window["obs"][name], episodes[1].cameras[camera][:9])
