"""Demonstrations: file formats (`hdf5`, `lerobot`, `rlds`), episodes and their split, and training `windows`."""

from vlarft.data.episode import Episode, RobotState
from vlarft.data.episodes import load_episodes, split_episodes
from vlarft.data.windows import Batch, WindowSampler

__all__ = ["Batch", "Episode", "RobotState", "WindowSampler", "load_episodes", "split_episodes"]
