"""vlarft's simulators for `lerobot-eval --env.type=vlarft --env.task=tabletop_object`."""

from dataclasses import dataclass, field
from typing import Any

import gymnasium
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig

from vlarft.sim.gym import vector_envs
from vlarft.sim.suites import simulator_of


@EnvConfig.register_subclass("vlarft")
@dataclass
class VlarftEnv(EnvConfig):
    """A suite; every episode starts from one of the 50 evaluation states of its task, seed s from state s modulo 50.

    task: name of the suite: tabletop_object, tabletop_spatial, ..., libero_goal, ...
    task_ids: numbers of its tasks; None: all
    image_size: side of the images [px]; None: 64, and 256 in LIBERO
    cameras: those that the policy sees, agentview or eye_in_hand or both; None: agentview
    fast_rendering: as `eval_libero.py --fast-rendering`; LIBERO alone
    """

    task: str | None = "tabletop_object"
    task_ids: list[int] | None = None
    image_size: int | None = None
    cameras: list[str] | None = None
    fast_rendering: bool = False
    fps: int = 20
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        simulator = simulator_of(self.task)
        size, cameras = self.image_size or simulator.image_size, self.cameras or simulator.env.available_cameras[:1]
        image = PolicyFeature(FeatureType.VISUAL, (size, size, 3))
        self.features = {
            **{f"pixels/{camera}": image for camera in cameras},
            "agent_pos": PolicyFeature(FeatureType.STATE, (8,)),
            "action": PolicyFeature(FeatureType.ACTION, (7,)),
        }
        keys = (*(f"observation.images.{camera}" for camera in cameras), "observation.state", "action")
        self.features_map = dict(zip(self.features, keys, strict=True))

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Not used: `create_envs` makes them."""
        return {}

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, gymnasium.vector.VectorEnv]]:
        """Make {suite: {task: vector environment}}; errors as in `vlarft.sim.gym.vector_envs`."""
        options = {"image_size": self.image_size, "cameras": self.cameras, "fast_rendering": self.fast_rendering}
        return vector_envs(self.task, self.task_ids, n_envs=n_envs, use_async_envs=use_async_envs, **options)
