"""A suite of vlarft for LeRobot's EnvHub: upload this file as env.py, and LeRobot's Python API makes it.

    lerobot.envs.make_env("user/name", n_envs=4, trust_remote_code=True)

For `lerobot-eval`, whose --env.type takes no repository, the plugin lerobot_policy_vlarft has --env.type=vlarft.

Every episode starts from one of the 50 evaluation states of its task: seed s from state s modulo 50, so that 50
consecutive seeds play each once. Images are observation.images.agentview, the state is observation.state.
"""

from typing import Any

from vlarft.sim.gym import vector_envs

SUITE = "tabletop_object"  # or tabletop_spatial, _goal, _long; libero_spatial, _object, _goal, _10
TASKS = None  # numbers or names; None: all ten
OPTIONS: dict[
    str, Any
] = {}  # of vlarft.sim.gym.task_env: image_size, 64 (LIBERO 256) unless given, fast_rendering, ...


def make_env(n_envs: int = 1, use_async_envs: bool = False, cfg: Any = None) -> dict[str, dict[int, Any]]:
    """Make {suite: {task: vector environment}}, as LeRobot calls it; `cfg` is LeRobot's and not needed here."""
    return vector_envs(SUITE, TASKS, n_envs=n_envs, use_async_envs=use_async_envs, **OPTIONS)
