"""Episodes for data sets: an expert or a policy acts in a simulator, and every step is kept."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch

from vlarft.policy import VLAPolicy
from vlarft.run.cameras import find_camera
from vlarft.run.random import generator
from vlarft.sim.demonstrator import ActionNoise, Demonstrator, ExpertAction
from vlarft.sim.env import Env


class PolicyPlayer:
    """A policy as a demonstrator: chunks from random x_0, played open loop; noise is added to every action. It plays on
    after success, so that nothing but what is seen tells a success from a failure.

    Args:
        policy: in eval mode.
        env: the environment, reset before `act`; it renders the policy's cameras.
        seed: seed of x_0 and of the noise.
        action_noise: standard deviation of the noise, action units, see `ActionNoise`.

    Raises:
        ValueError: the environment does not render a camera of the policy.
    """

    def __init__(self, policy: VLAPolicy, env: Env, seed: int, action_noise: float) -> None:
        self.views = {camera: find_camera(env.cameras, camera) for camera in policy.cfg.cameras}
        if missing := [camera for camera, view in self.views.items() if view is None]:
            raise ValueError(
                f"the policy sees camera {', '.join(missing)}, the environment renders "
                f"{', '.join(env.cameras) or 'none'}: make it with cameras={policy.cfg.cameras}"
            )
        self.policy, self.env, self.seed = policy, env, seed
        self.noise, self.num_chunks = ActionNoise(seed, action_noise), 0
        self.left: list[np.ndarray] = []

    @torch.no_grad()
    def act(self) -> ExpertAction:
        """Return the next action of the chunk; the policy observes again when a chunk has been played."""
        if not self.left:
            random_numbers = generator("cpu", "recorded policy", self.seed, self.num_chunks)
            obs = self.env.observe()
            obs = {**obs, **{camera: obs[view] for camera, view in self.views.items()}}
            self.left = list(self.policy.act(obs, generator=random_numbers).cpu().double().numpy())
            self.num_chunks += 1
        return self.noise.add(self.left.pop(0))


def record(env: Env, demonstrator: Demonstrator, idle_steps: int) -> tuple[dict[str, Any], bool]:
    """Play an episode to success or the horizon, then `idle_steps` more after success.

    Returns:
        Keyword arguments of `data.hdf5.write_demo`, one row per control step, each observed before its action; and
        whether the episode succeeded.
    """
    columns: dict[str, list[np.ndarray]] = defaultdict(list)
    images: dict[str, list[np.ndarray]] = defaultdict(list)
    success, steps_left = False, env.horizon
    while steps_left:
        obs = env.observe()
        action = demonstrator.act()
        row = env.recorded(obs)
        for camera, image in row.pop("images").items():
            images[camera].append(image)
        row["actions"], row["intended_actions"] = (part.astype(np.float32) for part in action)
        for name, value in row.items():
            columns[name].append(value)
        # The stored float32 action is what is executed, so that replaying a file repeats the episode bit for bit.
        result = env.step(row["actions"])
        steps_left -= 1
        if result.success and not success:
            success, steps_left = True, idle_steps
    arrays = {name: np.stack(values) for name, values in columns.items()}
    return {**arrays, "images": {camera: np.stack(frames) for camera, frames in images.items()}}, success
