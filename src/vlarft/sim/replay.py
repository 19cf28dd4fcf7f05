"""Recorded episodes played again from their start, bit for bit, and seen at any resolution."""

import numpy as np

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
