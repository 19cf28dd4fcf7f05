"""Animations of recorded episodes: actions played again from their start, bit for bit, at any resolution."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlarft.checkpoint import write_atomic
from vlarft.sim.perturb import Perturbation
from vlarft.sim.tabletop import make_env


def replay_frames(
    suite: str,
    task: int,
    init_state: int,
    actions: np.ndarray,
    *,
    size: int = 160,
    every: int = 2,
    perturb: Perturbation | None = None,
) -> list[np.ndarray]:
    """Play recorded actions from an evaluation state and look at every n-th step.

    Args:
        suite, task, init_state: the start.
        actions: (T, 7) raw actions.
        size: side of the frames [px].
        every: control steps between frames; the last step is always seen.
        perturb: as in the recorded episode.

    Returns:
        Frames, each (size, size, 3) uint8.
    """
    env = make_env(suite, task, image_size=size)
    env.reset(init_state=init_state, perturb=perturb)
    frames = [env.observe()["agentview"]]
    for step, action in enumerate(actions, 1):
        env.step(np.asarray(action))
        if step % every == 0 or step == len(actions):
            frames.append(env.observe()["agentview"])
    return frames


def write_gif(path: str | Path, frames: Sequence[np.ndarray], frame_ms: int = 100, hold_ms: int = 1500) -> None:
    """Write frames (H, W, 3) uint8 as a looping GIF that holds its last frame.

    Raises:
        ImportError: pillow is missing; the message says which extra brings it.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('animations need pillow: pip install "vlarft[plots]"') from error
    images = [Image.fromarray(f) for f in frames]
    durations = [frame_ms] * (len(images) - 1) + [hold_ms]
    write_atomic(
        path,
        lambda tmp: images[0].save(
            tmp, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0
        ),
    )
