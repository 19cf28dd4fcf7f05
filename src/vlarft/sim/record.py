"""Episodes for data sets: an expert or a policy acts in a simulator, and every step is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from vlarft.run.random import generator
from vlarft.sim.experts import ActionNoise, ExpertAction, keep_still
from vlarft.sim.libero_env import LiberoEnv

if TYPE_CHECKING:
    from vlarft.policy import VLAPolicy
    from vlarft.sim.tabletop import TabletopEnv


class Demonstrator(Protocol):
    """Whoever acts in an environment, from its present state."""

    def act(self) -> ExpertAction:
        """The next action; after success one that keeps still."""


class PolicyPlayer:
    """A policy as a demonstrator: chunks from random x_0, played open loop; noise is added to every action.

    Args:
        policy: in eval mode.
        env: the environment, reset before `act`.
        seed: of x_0 and of the noise.
        action_noise: standard deviation of the noise, action units, see `ActionNoise`.
    """

    def __init__(self, policy: VLAPolicy, env: TabletopEnv | LiberoEnv, seed: int, action_noise: float) -> None:
        self.policy, self.env, self.seed = policy, env, seed
        self.noise, self.num_chunks = ActionNoise(seed, action_noise, 0.0, persistence=0.5), 0
        self.left: list[np.ndarray] = []

    @torch.no_grad()
    def act(self) -> ExpertAction:
        """The next action of the chunk; the policy sees the environment again when a chunk has been played."""
        if self.env.success():
            return keep_still()
        if not self.left:
            draws = generator("cpu", "recorded policy", self.seed, self.num_chunks)
            self.left = list(self.policy.act(self.env.observe(), generator=draws).cpu().double().numpy())
            self.num_chunks += 1
        return self.noise.add(self.left.pop(0))


def record(env: TabletopEnv | LiberoEnv, demonstrator: Demonstrator, idle_steps: int) -> tuple[dict, bool]:
    """Plays an episode to success or the horizon, then `idle_steps` more after success.

    Returns:
        Keyword arguments of `write_demo`, one row per control step, each observed before its action; and whether it
        succeeded.
    """
    of_libero = isinstance(env, LiberoEnv)
    names = ("actions", "intended_actions", "proprio", "states", *(("joint_states",) if of_libero else ()))
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
    frames: dict[str, list[np.ndarray]] = {camera: [] for camera in env.cameras}
    success, steps_left = False, env.horizon
    while steps_left:
        obs, action = env.observe(), demonstrator.act()
        for camera in env.cameras:
            frames[camera].append(obs[camera][::-1, ::-1] if of_libero else obs[camera])
        rows["actions"].append(action.executed.astype(np.float32))
        rows["intended_actions"].append(action.intended.astype(np.float32))
        rows["proprio"].append(obs["proprio"])
        rows["states"].append(env.libero_state() if of_libero else env.get_state())
        if of_libero:
            rows["joint_states"].append(env.joint_states())
        # The stored float32 action is what is executed, so that replaying a file repeats the episode bit for bit.
        result = env.step(rows["actions"][-1])
        steps_left -= 1
        if result.success and not success:
            success, steps_left = True, idle_steps
    arrays = {name: np.stack(values) for name, values in rows.items()}
    names = {"agentview": "agentview", "wrist": "eye_in_hand"}  # LIBERO's names
    return {**arrays, "images": {names[camera]: np.stack(images) for camera, images in frames.items()}}, success
