"""What stands on the table: items (free bodies), fixtures (bin, shelf, ...), where they may start, and the MuJoCo XML of it all.

Metres, radians, kilograms. The table top is z = 0; seen from the camera x points right, y away from it, z up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RED, GREEN, BLUE, YELLOW = "0.90 0.08 0.08", "0.05 0.70 0.15", "0.10 0.20 0.95", "0.98 0.85 0.05"
ORANGE, PURPLE, CYAN, WHITE = "0.98 0.50 0.05", "0.55 0.15 0.75", "0.05 0.80 0.85", "0.97 0.97 0.97"
PINK, BLACK = "0.98 0.35 0.65", "0.10 0.10 0.12"


@dataclass(frozen=True)
class Item:
    """A movable thing. `size` holds MuJoCo half sizes; `width` is the extent between the fingers when grasped at yaw 0."""

    name: str
    shape: str  # box, cylinder, sphere
    size: tuple[float, ...]  # metres
    rgb: str  # three numbers, 0..1
    mass: float = 0.05  # kg
    yaw: float = 0.2  # start yaw is uniform in +-yaw, rad
    keep_out: float = 0.045  # start centres of two items are at least the sum of their keep-outs apart, metres

    @property
    def width(self) -> float:
        return 2.0 * self.size[0]

    @property
    def half_height(self) -> float:
        return {"box": self.size[-1], "cylinder": self.size[-1], "sphere": self.size[0]}[self.shape]


@dataclass(frozen=True)
class Fixture:
    """A thing bolted to the table, perhaps with a moving part."""

    name: str
    kind: str  # a key of FIXTURE_XML
    half: tuple[float, float]  # footprint that items keep clear of, metres
    height: float  # its highest point, metres


@dataclass(frozen=True)
class Spot:
    """Start region of one body: uniform in a rectangle, or on top of another body (`on`) around its centre."""

    body: str
    x: tuple[float, float]  # metres
    y: tuple[float, float]
    on: str | None = None


@dataclass(frozen=True)
class Scene:
    items: tuple[Item, ...]
    fixtures: tuple[Fixture, ...]
    spots: tuple[Spot, ...]  # in sampling order: fixtures, then items
    travel_height: float = 0.11  # hand height that clears everything with an item in the fingers, metres
    start: tuple[float, float, float] = (0.0, 0.0, 0.16)  # hand position before the start jitter


@dataclass(frozen=True)
class Surface:
    """Where things are put: a body's top."""

    height: float  # of the surface above the body's origin, metres
    reach: tuple[float, float]  # an item rests on it while its centre is within these half extents, metres
    drop: float  # gap between item and surface at which the expert lets go, metres


BIN_INNER, BIN_WALL, BIN_RIM = 0.052, 0.005, 0.032
SHELF_TOP, CABINET_TOP, PEDESTAL_TOP, PLATE_HALF = 0.050, 0.060, 0.040, 0.005
PLATE_RADIUS, DRAWER_TRAVEL, KNOB_TURN = 0.052, 0.08, 1.1

BIN = Fixture("bin", "bin", (BIN_INNER + 2 * BIN_WALL, BIN_INNER + 2 * BIN_WALL), BIN_RIM)

FIXTURE_XML = {
    "bin": f"""
      <geom type="box" size="{BIN_INNER} {BIN_INNER} 0.002" pos="0 0 0.002" rgba="0.42 0.28 0.18 1"/>
      <geom type="box" size="{BIN_WALL} {BIN_INNER + 2 * BIN_WALL} {BIN_RIM / 2}" pos="{BIN_INNER + BIN_WALL} 0 {BIN_RIM / 2}" rgba="0.30 0.19 0.12 1"/>
      <geom type="box" size="{BIN_WALL} {BIN_INNER + 2 * BIN_WALL} {BIN_RIM / 2}" pos="{-BIN_INNER - BIN_WALL} 0 {BIN_RIM / 2}" rgba="0.30 0.19 0.12 1"/>
      <geom type="box" size="{BIN_INNER} {BIN_WALL} {BIN_RIM / 2}" pos="0 {BIN_INNER + BIN_WALL} {BIN_RIM / 2}" rgba="0.30 0.19 0.12 1"/>
      <geom type="box" size="{BIN_INNER} {BIN_WALL} {BIN_RIM / 2}" pos="0 {-BIN_INNER - BIN_WALL} {BIN_RIM / 2}" rgba="0.30 0.19 0.12 1"/>""",
}

SURFACES = {
    "bin": Surface(0.004, (BIN_INNER - 0.008, BIN_INNER - 0.008), 0.024),
}

HAND_XML = """
    <body name="hand" gravcomp="1">
      <joint name="hand_x" type="slide" axis="1 0 0"/>
      <joint name="hand_y" type="slide" axis="0 1 0"/>
      <joint name="hand_z" type="slide" axis="0 0 1"/>
      <joint name="hand_yaw" type="hinge" axis="0 0 1" armature="0.02"/>
      <joint name="hand_pitch" type="hinge" axis="0 1 0" armature="0.02"/>
      <joint name="hand_roll" type="hinge" axis="1 0 0" armature="0.02"/>
      <geom name="palm" type="box" size="0.050 0.015 0.011" pos="0 0 0.064" mass="0.8" rgba="0.20 0.21 0.24 1"/>
      <geom name="flange" type="cylinder" size="0.020 0.030" pos="0 0 0.105" mass="0.1" contype="0" conaffinity="0"
        rgba="0.33 0.34 0.38 1"/>
      <camera name="wrist" pos="0 -0.075 0.075" xyaxes="1 0 0 0 0.79 0.61" fovy="75"/>
      <body name="finger_left" gravcomp="1">
        <joint name="finger_left" type="slide" axis="-1 0 0" range="0 0.04" limited="true" damping="40"/>
        <geom name="finger_left" type="box" size="0.008 0.010 0.033" pos="-0.008 0 0.021" mass="0.05" friction="1.5 0.02 0.001"
          condim="4" rgba="0.95 0.95 0.96 1"/>
      </body>
      <body name="finger_right" gravcomp="1">
        <joint name="finger_right" type="slide" axis="1 0 0" range="0 0.04" limited="true" damping="40"/>
        <geom name="finger_right" type="box" size="0.008 0.010 0.033" pos="0.008 0 0.021" mass="0.05" friction="1.5 0.02 0.001"
          condim="4" rgba="0.95 0.95 0.96 1"/>
      </body>
    </body>"""

# Critically damped at 20 rad/s: 1 kg of hand, 0.02 kg m2 about each axis. Fingers: 8 N against 40 N s/m closes 4 cm in 0.2 s.
ACTUATOR_XML = """
    <position name="hand_x" joint="hand_x" kp="400" kv="40" forcerange="-40 40"/>
    <position name="hand_y" joint="hand_y" kp="400" kv="40" forcerange="-40 40"/>
    <position name="hand_z" joint="hand_z" kp="400" kv="40" forcerange="-40 40"/>
    <position name="hand_yaw" joint="hand_yaw" kp="9" kv="0.9" forcerange="-4 4"/>
    <position name="hand_pitch" joint="hand_pitch" kp="9" kv="0.9" forcerange="-4 4"/>
    <position name="hand_roll" joint="hand_roll" kp="9" kv="0.9" forcerange="-4 4"/>
    <position name="finger_left" joint="finger_left" kp="2000" forcerange="-8 8"/>
    <position name="finger_right" joint="finger_right" kp="2000" forcerange="-8 8"/>"""


def scene_xml(scene: Scene, timestep: float) -> str:
    """MuJoCo XML of a scene: table, hand, fixtures, items, camera `agentview` and, on the hand, `wrist`.

    Args:
        scene: what stands on the table.
        timestep: physics step, seconds.
    """
    fixtures = "".join(f'\n    <body name="{f.name}">{FIXTURE_XML[f.kind]}\n    </body>' for f in scene.fixtures)
    items = "".join(
        f'\n    <body name="{item.name}">\n      <freejoint name="{item.name}"/>\n      <geom name="{item.name}" type="{item.shape}"'
        f' size="{" ".join(map(str, item.size))}" mass="{item.mass}" rgba="{item.rgb} 1" condim="4" friction="1 0.01 0.0005"/>'
        f"\n    </body>"
        for item in scene.items
    )
    return f"""<mujoco model="tabletop">
  <compiler angle="radian"/>
  <option timestep="{timestep}" integrator="implicitfast" cone="elliptic" impratio="10" iterations="30"/>
  <worldbody>
    <geom name="table" type="box" size="0.36 0.30 0.02" pos="0 0.02 -0.02" rgba="0.52 0.54 0.56 1"/>
    <camera name="agentview" pos="0 -0.62 0.64" xyaxes="1 0 0 0 0.68 0.73" fovy="30.5"/>{HAND_XML}{fixtures}{items}
  </worldbody>
  <actuator>{ACTUATOR_XML}
  </actuator>
</mujoco>"""


def sample_layout(scene: Scene, rng: np.random.Generator, max_tries: int = 2000) -> dict[str, np.ndarray]:
    """A start layout without overlaps.

    Args:
        scene: the scene.
        rng: source of randomness.
        max_tries: whole layouts tried before giving up.

    Returns:
        body name -> (x, y, z, yaw) of its origin, metres and radians.

    Raises:
        RuntimeError: the regions are too crowded for the keep-outs.
    """
    for _ in range(max_tries):
        layout = _try_layout(scene, rng)
        if layout is not None:
            return layout
    raise RuntimeError(f"no layout without overlap in {max_tries} tries; widen the spots of the scene")


def _try_layout(scene: Scene, rng: np.random.Generator) -> dict[str, np.ndarray] | None:
    items = {item.name: item for item in scene.items}
    fixtures = {fixture.name: fixture for fixture in scene.fixtures}
    layout: dict[str, np.ndarray] = {}
    for spot in scene.spots:
        xy = np.array([rng.uniform(*spot.x), rng.uniform(*spot.y)])
        if spot.body in fixtures:
            layout[spot.body] = np.array([*xy, 0.0, 0.0])
            continue
        item = items[spot.body]
        base = 0.0
        if spot.on is not None:
            xy += layout[spot.on][:2]
            base = layout[spot.on][2] + SURFACES[spot.on].height
        for other, pose in layout.items():
            gap = np.abs(pose[:2] - xy)
            if other == spot.on:
                continue
            if other in items and np.hypot(*gap) < item.keep_out + items[other].keep_out:
                return None
            # The open fingers reach 5.6 cm to either side of an item in x and 1 cm in y.
            if (
                other in fixtures
                and gap[0] < fixtures[other].half[0] + 0.066
                and gap[1] < fixtures[other].half[1] + 0.032
            ):
                return None
        layout[item.name] = np.array([*xy, base + item.half_height + 5e-4, rng.uniform(-item.yaw, item.yaw)])
    return layout
