"""Suites and tasks: a scene, an instruction, and the goals that together are success."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlarft.sim.scenes import BIN, BLUE, GREEN, RED, YELLOW, Item, Scene, Spot


@dataclass(frozen=True)
class Goal:
    """One thing to achieve.

    kind: place (item on or in target), open (drawer), turn (knob), push (item onto target along +y).
    """

    kind: Literal["place", "open", "turn", "push"]
    item: str = ""
    target: str = ""
    offset: tuple[float, float] = (0.0, 0.0)  # where on the target the expert aims, metres


@dataclass(frozen=True)
class Task:
    instruction: str
    scene: Scene
    goals: tuple[Goal, ...]

    @property
    def name(self) -> str:
        return self.instruction.replace(" ", "_")


@dataclass(frozen=True)
class Suite:
    horizon: int  # control steps
    tasks: tuple[Task, ...]


def _block(color: str, rgb: str) -> Item:
    return Item(f"{color}_block", "box", (0.02, 0.02, 0.02), rgb)


def _object_scene(items: tuple[Item, ...]) -> Scene:
    spots = (Spot("bin", (0.145, 0.165), (-0.05, 0.05)), *(Spot(i.name, (-0.18, 0.03), (-0.13, 0.13)) for i in items))
    return Scene(items, (BIN,), spots)


def _object_tasks(items: tuple[Item, ...]) -> tuple[Task, ...]:
    scene = _object_scene(items)
    return tuple(
        Task(f"pick up the {i.name.replace('_', ' ')} and place it in the bin", scene, (Goal("place", i.name, "bin"),))
        for i in items
    )


BLOCKS = (_block("red", RED), _block("green", GREEN), _block("blue", BLUE), _block("yellow", YELLOW))

SUITES: dict[str, Suite] = {
    "tabletop_object": Suite(180, _object_tasks(BLOCKS)),
}
