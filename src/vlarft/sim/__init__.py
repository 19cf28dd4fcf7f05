"""Simulators. Importing this needs numpy only; making an environment needs mujoco, those of LIBERO need LIBERO."""

from vlarft.sim.libero_tasks import LIBERO_SUITES
from vlarft.sim.suites import NUM_INITIAL_STATES, SUITES, StepResult, make_env, task_index, task_names
from vlarft.sim.tasks import TABLETOP_SUITES

__all__ = [
    "LIBERO_SUITES",
    "NUM_INITIAL_STATES",
    "SUITES",
    "TABLETOP_SUITES",
    "StepResult",
    "make_env",
    "task_index",
    "task_names",
]
