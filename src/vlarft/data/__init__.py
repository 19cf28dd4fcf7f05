"""Demonstrations: files on disk (`hdf5`), episodes and their split (`episodes`), training windows (`windows`)."""

from vlarft.data.episodes import Episode, load_episodes, split_episodes
from vlarft.data.windows import Batch, WindowSampler

__all__ = ["Batch", "Episode", "WindowSampler", "load_episodes", "split_episodes"]
