"""What stands on the table: items (free bodies), fixtures (bin, shelf, ...), where they start, and the MuJoCo XML.

Metres, radians, kilograms. The table top is z = 0; seen from the camera x points right, y away from it, z up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Item:
    """A movable thing. `size` holds MuJoCo half sizes; the fingers close along its x axis."""

    name: str
    shape: str  # box, cylinder, sphere
    size: tuple[float, ...]  # metres
    rgb: str  # three numbers, 0..1
    mass: float = 0.05  # kg
    yaw: float = 0.2  # start yaw is uniform in +-yaw, rad
    keep_out: float = 0.045  # start centres of two items are at least the sum of their keep-outs apart, metres

    @property
    def width(self) -> float:
        """Extent between the fingers when grasped, metres."""
        return 2.0 * self.size[0]

    @property
    def half_height(self) -> float:
        return self.size[-1]

    @property
    def elongated(self) -> bool:
        """Whether only one pair of sides fits between the fingers, so that the hand has to turn with it."""
        return self.shape == "box" and self.size[1] > 1.5 * self.size[0]


@dataclass(frozen=True)
class Fixture:
    """A thing bolted to the table, perhaps with a moving part."""

    name: str
    kind: str  # a key of FIXTURE_XML and SURFACES
    half: tuple[float, float]  # half extents of its footprint, which items keep clear of, metres


@dataclass(frozen=True)
class Spot:
    """Start region of one body's origin: a rectangle on the table, or around another body (`beside`, `on`)."""

    body: str
    x: tuple[float, float]  # metres
    y: tuple[float, float]
    beside: str | None = None
    on: str | None = None


@dataclass(frozen=True)
class Scene:
    items: tuple[Item, ...]
    fixtures: tuple[Fixture, ...]
    spots: tuple[Spot, ...]  # in sampling order: whatever others stand on or beside comes first
    travel_height: float = 0.11  # hand height that clears everything with an item in the fingers, metres
    start: tuple[float, float, float] = (0.0, 0.0, 0.16)  # hand position before the start jitter


@dataclass(frozen=True)
class Surface:
    """A body's top, where things are put."""

    height: float  # above the body's origin, metres
    reach: tuple[float, float]  # an item rests on it while its centre is within these half extents, metres
    drop: float  # gap between item and surface at which the expert lets go, metres


BIN_INNER, SMALL_BIN_INNER, BIN_WALL, BIN_RIM = 0.052, 0.045, 0.005, 0.032
PLATE_RADIUS, PLATE_HALF = 0.055, 0.008
DRAWER_TRAVEL, KNOB_TURN = 0.07, 1.1  # metres, radians


def _bin_xml(inner: float) -> str:
    wall, middle = inner + BIN_WALL, BIN_RIM / 2
    sides = [(wall, 0, BIN_WALL, inner + 2 * BIN_WALL), (0, wall, inner, BIN_WALL)]
    return f"""
      <geom type="box" size="{inner} {inner} 0.002" pos="0 0 0.002" rgba="0.42 0.28 0.18 1"/>""" + "".join(
        f"""
      <geom type="box" size="{half_x} {half_y} {middle}" pos="{sign * x} {sign * y} {middle}"
        rgba="0.30 0.19 0.12 1"/>"""
        for x, y, half_x, half_y in sides
        for sign in (1, -1)
    )


FIXTURE_XML = {
    "bin": _bin_xml(BIN_INNER),
    "small_bin": _bin_xml(SMALL_BIN_INNER),
    "mat": """
      <geom type="box" size="0.045 0.045 0.0008" rgba="0.62 0.25 0.70 1" contype="0" conaffinity="0"/>""",
    "pedestal": """
      <geom type="box" size="0.026 0.026 0.020" pos="0 0 0.020" rgba="0.10 0.45 0.40 1"/>""",
    "shelf": """
      <geom type="box" size="0.055 0.038 0.004" pos="0 0 0.046" rgba="0.85 0.68 0.42 1"/>
      <geom type="box" size="0.004 0.038 0.021" pos="-0.051 0 0.021" rgba="0.72 0.56 0.33 1"/>
      <geom type="box" size="0.004 0.038 0.021" pos="0.051 0 0.021" rgba="0.72 0.56 0.33 1"/>
      <geom type="box" size="0.047 0.003 0.021" pos="0 0.035 0.021" rgba="0.60 0.46 0.27 1"/>""",
    "cabinet": """
      <geom type="box" size="0.055 0.045 0.004" pos="0 0 0.056" rgba="0.25 0.42 0.55 1"/>
      <geom type="box" size="0.004 0.045 0.026" pos="-0.051 0 0.026" rgba="0.20 0.34 0.46 1"/>
      <geom type="box" size="0.004 0.045 0.026" pos="0.051 0 0.026" rgba="0.20 0.34 0.46 1"/>
      <geom type="box" size="0.047 0.003 0.026" pos="0 0.042 0.026" rgba="0.20 0.34 0.46 1"/>
      <body name="drawer" pos="0 -0.068 0.028">
        <joint name="drawer" type="slide" axis="0 -1 0" range="0 0.07" limited="true" frictionloss="0.5" damping="4"/>
        <geom type="box" size="0.007 0.018 0.014" mass="0.02" friction="1.5 0.02 0.001" rgba="0.98 0.75 0.10 1"/>
        <geom type="box" size="0.046 0.003 0.021" pos="0 0.021 -0.003" mass="0.03" rgba="0.70 0.80 0.88 1"/>
        <geom type="box" size="0.044 0.035 0.002" pos="0 0.058 -0.022" mass="0.05" rgba="0.55 0.63 0.70 1"/>
        <geom type="box" size="0.002 0.035 0.010" pos="-0.042 0.058 -0.012" mass="0.02" rgba="0.62 0.70 0.78 1"/>
        <geom type="box" size="0.002 0.035 0.010" pos="0.042 0.058 -0.012" mass="0.02" rgba="0.62 0.70 0.78 1"/>
      </body>""",
    "dial": """
      <geom type="cylinder" size="0.034 0.004" pos="0 0 0.004" rgba="0.12 0.12 0.14 1"/>
      <body name="knob" pos="0 0 0.030">
        <joint name="knob" type="hinge" axis="0 0 1" range="0 1.4" limited="true" frictionloss="0.02" damping="0.01"
          armature="0.0005"/>
        <geom type="cylinder" size="0.006 0.005" pos="0 0 -0.017" mass="0.02" rgba="0.15 0.15 0.17 1"/>
        <geom type="box" size="0.007 0.026 0.014" mass="0.02" friction="1.5 0.02 0.001" rgba="0.95 0.30 0.10 1"/>
      </body>""",
}

SURFACES = {
    "bin": Surface(0.004, (BIN_INNER - 0.008, BIN_INNER - 0.008), 0.024),
    "small_bin": Surface(0.004, (SMALL_BIN_INNER - 0.008, SMALL_BIN_INNER - 0.008), 0.024),
    "mat": Surface(0.0, (0.03, 0.03), 0.004),
    "pedestal": Surface(0.040, (0.020, 0.020), 0.003),
    "shelf": Surface(0.050, (0.045, 0.028), 0.004),
    "cabinet": Surface(0.060, (0.045, 0.035), 0.004),
}


def surface_of(scene: Scene, body: str) -> Surface:
    """Return where to put things on a fixture or an item of the scene; a plate takes more than a block."""
    for fixture in scene.fixtures:
        if fixture.name == body:
            return SURFACES[fixture.kind]
    item = next(item for item in scene.items if item.name == body)
    reach = 0.8 * item.size[0] if item.size[0] < 0.03 else item.size[0] - 0.018
    return Surface(item.half_height, (reach, reach), 0.004)


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
      <camera name="eye_in_hand" pos="0 -0.075 0.075" xyaxes="1 0 0 0 0.79 0.61" fovy="75"/>
      <body name="finger_left" gravcomp="1">
        <joint name="finger_left" type="slide" axis="-1 0 0" range="0 0.04" limited="true" damping="40"/>
        <geom name="finger_left" type="box" size="0.008 0.010 0.033" pos="-0.008 0 0.021" mass="0.05"
          friction="1.5 0.02 0.001" condim="4" rgba="0.95 0.95 0.96 1"/>
      </body>
      <body name="finger_right" gravcomp="1">
        <joint name="finger_right" type="slide" axis="1 0 0" range="0 0.04" limited="true" damping="40"/>
        <geom name="finger_right" type="box" size="0.008 0.010 0.033" pos="0.008 0 0.021" mass="0.05"
          friction="1.5 0.02 0.001" condim="4" rgba="0.95 0.95 0.96 1"/>
      </body>
    </body>"""

# Critically damped at 20 rad/s for 1 kg of hand and 0.02 kg m2 about each axis.
# Fingers: 8 N against 40 N s/m closes 4 cm in 0.2 s.
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
    """Return MuJoCo XML of a scene: table, hand, fixtures, items, cameras `agentview` and, on the hand, `eye_in_hand`.

    Args:
        scene: what stands on the table.
        timestep: physics step, seconds.
    """
    fixtures = "".join(f'\n    <body name="{f.name}">{FIXTURE_XML[f.kind]}\n    </body>' for f in scene.fixtures)
    return f"""<mujoco model="tabletop">
  <compiler angle="radian"/>
  <option timestep="{timestep}" integrator="implicitfast" cone="elliptic" impratio="10" iterations="30">
    <flag multiccd="enable"/>
  </option>
  <worldbody>
    <geom name="table" type="box" size="0.36 0.30 0.02" pos="0 0.02 -0.02" rgba="0.52 0.54 0.56 1"/>
    <camera name="agentview" pos="0 -0.62 0.64" xyaxes="1 0 0 0 0.68 0.73" fovy="30.5"/>{HAND_XML}{fixtures}
    {"".join(map(_item_xml, scene.items))}
  </worldbody>
  <actuator>{ACTUATOR_XML}
  </actuator>
</mujoco>"""


def _item_xml(item: Item) -> str:
    contact = 'condim="6" friction="1 0.01 0.003"' if item.shape == "sphere" else 'condim="4" friction="1 0.01 0.0005"'
    return f"""
    <body name="{item.name}">
      <freejoint name="{item.name}"/>
      <geom name="{item.name}" type="{item.shape}" size="{" ".join(map(str, item.size))}" mass="{item.mass}" {contact}
        rgba="{item.rgb} 1"/>
    </body>"""


def sample_layout(scene: Scene, rng: np.random.Generator, max_tries: int = 5000) -> dict[str, np.ndarray]:
    """Sample a start layout without overlaps.

    Args:
        scene: the scene.
        rng: source of random numbers.
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
        anchor = spot.on or spot.beside
        if anchor is not None:
            xy += layout[anchor][:2]
        if spot.body in fixtures:
            layout[spot.body] = np.array([*xy, 0.0, 0.0])
            continue
        item = items[spot.body]
        base = layout[spot.on][2] + surface_of(scene, spot.on).height if spot.on is not None else 0.0
        for other, pose in layout.items():
            gap = np.abs(pose[:2] - xy)
            if other == spot.on:
                continue
            if other in items and np.hypot(*gap) < item.keep_out + items[other].keep_out:
                return None
            # The open fingers reach 5.6 cm to either side of an item in x and 1 cm in y.
            if other in fixtures and np.all(gap < np.add(fixtures[other].half, (0.066, 0.032))):
                return None
        layout[item.name] = np.array([*xy, base + item.half_height + 5e-4, rng.uniform(-item.yaw, item.yaw)])
    return layout
