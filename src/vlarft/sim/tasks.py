"""Suites and tasks: a scene, an instruction, and the goals that together are success.

Four suites of ten tasks as in LIBERO: `tabletop_spatial` (the same two blocks, told apart by where they are),
`tabletop_object` (told apart by what they are), `tabletop_goal` (one scene, ten goals), `tabletop_long` (two goals).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from vlarft.sim.env import Suite, Task
from vlarft.sim.scenes import (
    BIN_INNER,
    BIN_WALL,
    PLATE_HALF,
    PLATE_RADIUS,
    SMALL_BIN_INNER,
    Fixture,
    Item,
    Scene,
    Spot,
)


@dataclass(frozen=True)
class Goal:
    """One thing to achieve.

    kind: place (item on or in target), open (drawer), turn (knob), push (item onto target, away from the camera).
    """

    kind: Literal["place", "open", "turn", "push"]
    item: str = ""
    target: str = ""


@dataclass(frozen=True)
class TabletopTask(Task):
    scene: Scene
    goals: tuple[Goal, ...]


def _task(instruction: str, scene: Scene, *goals: Goal) -> TabletopTask:
    return TabletopTask(instruction.replace(" ", "_"), instruction, scene, goals)


def _block(name: str, rgb: str) -> Item:
    return Item(name, "box", (0.02, 0.02, 0.02), rgb)


RED, GREEN, BLUE, YELLOW = "0.90 0.08 0.08", "0.05 0.70 0.15", "0.10 0.20 0.95", "0.98 0.85 0.05"
RED_BLOCK, BLUE_BLOCK = _block("red_block", RED), _block("blue_block", BLUE)
BLOCKS = (RED_BLOCK, _block("green_block", GREEN), BLUE_BLOCK, _block("yellow_block", YELLOW))
CAN = Item("orange_can", "cylinder", (0.02, 0.03), "0.98 0.50 0.05")
PILLAR = Item("cyan_pillar", "box", (0.016, 0.016, 0.035), "0.05 0.80 0.85")
BRICK = Item("white_brick", "box", (0.015, 0.03, 0.018), "0.97 0.97 0.97")
PUCK = Item("purple_puck", "cylinder", (0.024, 0.012), "0.55 0.15 0.75")
BALL = Item("pink_ball", "sphere", (0.021,), "0.98 0.40 0.70")
BAR = Item("black_bar", "box", (0.012, 0.04, 0.012), "0.10 0.10 0.12")
PLATE = Item("plate", "cylinder", (PLATE_RADIUS, PLATE_HALF), "0.96 0.96 0.90", mass=0.2, yaw=0.0, keep_out=0.075)

BIN = Fixture("bin", "bin", (BIN_INNER + 2 * BIN_WALL, BIN_INNER + 2 * BIN_WALL))
SMALL_BIN = Fixture("bin", "small_bin", (SMALL_BIN_INNER + 2 * BIN_WALL, SMALL_BIN_INNER + 2 * BIN_WALL))
MAT, PEDESTAL = Fixture("mat", "mat", (0.045, 0.045)), Fixture("pedestal", "pedestal", (0.026, 0.026))
SHELF, CABINET = Fixture("shelf", "shelf", (0.055, 0.038)), Fixture("cabinet", "cabinet", (0.055, 0.09))
DIAL = Fixture("dial", "dial", (0.034, 0.034))


def _object_tasks(items: tuple[Item, ...], wanted: tuple[Item, ...], travel_height: float) -> tuple[TabletopTask, ...]:
    spots = (Spot("bin", (0.145, 0.165), (-0.05, 0.05)), *(Spot(i.name, (-0.18, 0.03), (-0.13, 0.13)) for i in items))
    scene = Scene(items, (BIN,), spots, travel_height)
    return tuple(
        _task(f"pick up the {i.name.replace('_', ' ')} and place it in the bin", scene, Goal("place", i.name, "bin"))
        for i in wanted
    )


def _spatial_tasks() -> tuple[TabletopTask, ...]:
    one, two = _block("block_1", RED), _block("block_2", RED)
    plate = Spot("plate", (0.14, 0.16), (-0.05, 0.05))
    anywhere = (-0.13, 0.13)
    on_top = ((-0.004, 0.004), (-0.004, 0.004))
    left_right = Scene(
        (PLATE, one, two),
        (),
        (plate, Spot("block_1", (-0.18, -0.11), anywhere), Spot("block_2", (-0.04, 0.02), anywhere)),
    )
    front_back = Scene(
        (PLATE, one, two),
        (),
        (plate, Spot("block_1", (-0.17, 0.02), (-0.13, -0.05)), Spot("block_2", (-0.17, 0.02), (0.04, 0.12))),
    )
    beside = Scene(
        (PLATE, one, two, replace(CAN, keep_out=0.03), replace(PILLAR, keep_out=0.03)),
        (),
        (
            plate,
            Spot("orange_can", (-0.17, -0.11), (-0.03, 0.13)),
            Spot("cyan_pillar", (-0.03, 0.01), (-0.03, 0.13)),
            Spot("block_1", (-0.01, 0.01), (-0.095, -0.078), beside="orange_can"),
            Spot("block_2", (-0.01, 0.01), (-0.095, -0.078), beside="cyan_pillar"),
        ),
        0.12,
    )
    shelf_mat = Scene(
        (PLATE, one, two),
        (SHELF, MAT),
        (
            plate,
            Spot("shelf", (-0.13, -0.09), (0.08, 0.13)),
            Spot("mat", (-0.13, 0.0), (-0.10, -0.06)),
            Spot("block_1", (-0.02, 0.02), (-0.01, 0.01), on="shelf"),
            Spot("block_2", (-0.01, 0.01), (-0.01, 0.01), on="mat"),
        ),
        0.12,
    )
    pedestal = Scene(
        (PLATE, one, two),
        (PEDESTAL,),
        (
            plate,
            Spot("pedestal", (-0.15, 0.02), (-0.02, 0.12)),
            Spot("block_1", *on_top, on="pedestal"),
            Spot("block_2", (-0.02, 0.02), (-0.11, -0.085), beside="pedestal"),
        ),
        0.12,
    )
    wanted = (
        ("left", left_right, "block_1"),
        ("right", left_right, "block_2"),
        ("front", front_back, "block_1"),
        ("back", front_back, "block_2"),
        ("the orange can", beside, "block_1"),
        ("the cyan pillar", beside, "block_2"),
        ("on the shelf", shelf_mat, "block_1"),
        ("on the mat", shelf_mat, "block_2"),
        ("on the pedestal", pedestal, "block_1"),
        ("in front of the pedestal", pedestal, "block_2"),
    )
    tasks = []
    for where, scene, block in wanted:
        which = (
            f"{where} block"
            if " " not in where
            else f"block next to {where}"
            if where[:3] == "the"
            else f"block {where}"
        )
        tasks.append(_task(f"pick up the {which} and place it on the plate", scene, Goal("place", block, "plate")))
    return tuple(tasks)


# Open drawer, knob, plate on its way to the mat, and two blocks each have room for the open fingers.
WORKBENCH = Scene(
    (PLATE, RED_BLOCK, BLUE_BLOCK),
    (SMALL_BIN, SHELF, CABINET, DIAL, MAT),
    (
        Spot("bin", (0.155, 0.165), (-0.125, -0.115)),
        Spot("shelf", (-0.14, -0.13), (0.135, 0.145)),
        Spot("cabinet", (0.095, 0.105), (0.13, 0.14)),
        Spot("dial", (-0.035, -0.025), (0.045, 0.055)),
        Spot("plate", (-0.145, -0.135), (-0.085, -0.075)),
        Spot("mat", (-0.005, 0.005), (0.115, 0.125), beside="plate"),
        Spot("red_block", (-0.02, 0.05), (-0.155, -0.03)),
        Spot("blue_block", (-0.02, 0.05), (-0.155, -0.03)),
    ),
    0.13,
)

OPEN, TURN, PUSH = Goal("open"), Goal("turn"), Goal("push", "plate", "mat")


def _put(item: Item, target: str) -> Goal:
    return Goal("place", item.name, target)


def _workbench_tasks(goals: dict[str, tuple[Goal, ...]]) -> tuple[TabletopTask, ...]:
    return tuple(_task(instruction, WORKBENCH, *goal) for instruction, goal in goals.items())


TABLETOP_SUITES: dict[str, Suite] = {
    "tabletop_spatial": Suite(180, _spatial_tasks()),
    "tabletop_object": Suite(
        180,
        _object_tasks(BLOCKS, BLOCKS, 0.11)
        + _object_tasks((CAN, PILLAR, BRICK, PUCK), (CAN, PILLAR, BRICK, PUCK), 0.12)
        + _object_tasks((BALL, BAR, RED_BLOCK, BLUE_BLOCK), (BALL, BAR), 0.11),
    ),
    "tabletop_goal": Suite(
        200,
        _workbench_tasks(
            {
                "put the red block on the plate": (_put(RED_BLOCK, "plate"),),
                "put the blue block on the plate": (_put(BLUE_BLOCK, "plate"),),
                "put the red block in the bin": (_put(RED_BLOCK, "bin"),),
                "put the blue block in the bin": (_put(BLUE_BLOCK, "bin"),),
                "put the red block on the shelf": (_put(RED_BLOCK, "shelf"),),
                "put the blue block on top of the cabinet": (_put(BLUE_BLOCK, "cabinet"),),
                "stack the blue block on the red block": (_put(BLUE_BLOCK, "red_block"),),
                "open the drawer": (OPEN,),
                "turn the knob": (TURN,),
                "push the plate onto the mat": (PUSH,),
            }
        ),
    ),
    "tabletop_long": Suite(
        360,
        _workbench_tasks(
            {
                "put the red block in the bin and the blue block on the plate": (
                    _put(RED_BLOCK, "bin"),
                    _put(BLUE_BLOCK, "plate"),
                ),
                "put the blue block in the bin and the red block on the plate": (
                    _put(BLUE_BLOCK, "bin"),
                    _put(RED_BLOCK, "plate"),
                ),
                "put the red block on the shelf and the blue block in the bin": (
                    _put(RED_BLOCK, "shelf"),
                    _put(BLUE_BLOCK, "bin"),
                ),
                "put the blue block on the shelf and the red block on top of the cabinet": (
                    _put(BLUE_BLOCK, "shelf"),
                    _put(RED_BLOCK, "cabinet"),
                ),
                "open the drawer and put the red block on the plate": (OPEN, _put(RED_BLOCK, "plate")),
                "turn the knob and put the blue block on the shelf": (TURN, _put(BLUE_BLOCK, "shelf")),
                "open the drawer and turn the knob": (OPEN, TURN),
                "push the plate onto the mat and put the red block in the bin": (PUSH, _put(RED_BLOCK, "bin")),
                "push the plate onto the mat and put the blue block on it": (PUSH, _put(BLUE_BLOCK, "plate")),
                "stack the blue block on the red block and turn the knob": (_put(BLUE_BLOCK, "red_block"), TURN),
            }
        ),
    ),
}
