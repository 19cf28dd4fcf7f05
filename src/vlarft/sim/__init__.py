"""Simulators. Importing this needs numpy only; making an environment needs mujoco."""

from vlarft.sim.tabletop import NUM_INITIAL_STATES, StepResult, TabletopEnv, make_env, task_index, task_names
from vlarft.sim.tasks import SUITES

__all__ = ["NUM_INITIAL_STATES", "SUITES", "StepResult", "TabletopEnv", "make_env", "task_index", "task_names"]
