"""Simulators. Importing this needs numpy only; making an environment needs mujoco, one of LIBERO needs LIBERO."""

from vlarft.sim.env import NUM_INITIAL_STATES, Env, StepResult
from vlarft.sim.libero_tasks import LIBERO_SUITES
from vlarft.sim.suites import SIMULATORS, make_env, make_expert, simulator_of, task_index, task_names
from vlarft.sim.tasks import TABLETOP_SUITES

__all__ = [
    "LIBERO_SUITES",
    "NUM_INITIAL_STATES",
    "SIMULATORS",
    "TABLETOP_SUITES",
    "Env",
    "StepResult",
    "make_env",
    "make_expert",
    "simulator_of",
    "task_index",
    "task_names",
]
