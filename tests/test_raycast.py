"""The renderer against analytic pictures, and its fast path against the full trace."""

import numpy as np
import pytest

from vlarft.sim import make_env
from vlarft.sim.experts import Expert
from vlarft.sim.raycast import RaycastConfig, RaycastRenderer

mujoco = pytest.importorskip("mujoco")

SPHERES = """<mujoco><worldbody>
  <camera name="front" pos="0 0 0" xyaxes="1 0 0 0 0 1" fovy="60"/>
  <geom type="sphere" size="0.3" pos="0 2 0" rgba="1 0 0 1"/>
  <body pos="0.6 2 0.5"><freejoint/><geom type="sphere" size="0.2" rgba="0 1 0 1"/></body>
</worldbody></mujoco>"""


def scene(xml, **config):
    model = mujoco.MjModel.from_xml_string(xml)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data, RaycastRenderer(model, RaycastConfig(**config))


def analytic_sphere(size, center, radius, color, config):
    """(H, W, 3) float of one sphere seen from the origin along +y, without shadows; nan where it is not."""
    height, width = size
    half = np.tan(np.deg2rad(30.0))
    up = half * (1 - (2 * np.arange(height) + 1) / height)[:, None]
    right = half * width / height * ((2 * np.arange(width) + 1) / width - 1)[None, :]
    rays = np.stack(np.broadcast_arrays(right, 1.0, up), -1)
    rays = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    along = rays @ np.array(center)
    under_root = along**2 - (np.dot(center, center) - radius**2)
    point = rays * (along - np.sqrt(np.where(under_root >= 0, under_root, np.nan)))[..., None]
    normal = (point - center) / radius
    to_lamp = np.array(config.lamp) - point
    to_lamp = to_lamp / np.linalg.norm(to_lamp, axis=-1, keepdims=True)
    light = np.maximum((normal * to_lamp).sum(-1), 0)
    return np.array(color) * (config.ambient + (1 - config.ambient) * light)[..., None] * 255


@pytest.mark.parametrize("size", [(48, 64), (31, 17)])
def test_spheres_match_the_analytic_picture(size):
    _, data, renderer = scene(SPHERES, image_size=size, shadow=1.0)
    image = renderer.render(data, "front").astype(float)
    assert image.shape == (*size, 3)
    expected = np.full((*size, 3), np.array(renderer.config.background) * 255)
    for center, radius, color in (((0, 2, 0), 0.3, (1, 0, 0)), ((0.6, 2, 0.5), 0.2, (0, 1, 0))):
        sphere = analytic_sphere(size, np.array(center), radius, color, renderer.config)
        seen = ~np.isnan(sphere[..., 0])
        assert seen.sum() > 10 or size == (31, 17)
        expected[seen] = sphere[seen]
    assert np.abs(image - expected).max() <= 1.0


def test_images_are_upright():
    _, data, renderer = scene(SPHERES, image_size=(64, 64))
    green = renderer.render(data, "front")[..., 1].astype(int) - renderer.render(data, "front")[..., 0]
    rows, columns = np.nonzero(green > 100)  # the green sphere is above and to the right of the middle
    assert rows.mean() < 24 and columns.mean() > 40


def test_lamp_casts_a_shadow_where_geometry_says():
    xml = """<mujoco><worldbody>
      <camera name="top" pos="0 0 3" xyaxes="1 0 0 0 1 0" fovy="60"/>
      <geom type="box" size="2 2 0.05" pos="0 0 -0.05" rgba="0.8 0.8 0.8 1"/>
      <body pos="0.5 0 0.5"><freejoint/><geom type="box" size="0.1 0.1 0.1" rgba="1 0 0 1"/></body>
    </worldbody></mujoco>"""
    _, data, renderer = scene(xml, image_size=(120, 120), lamp=(-0.5, 0.0, 1.5), shadow=0.0)
    image = renderer.render(data, "top").astype(int)

    def at(x, y):  # pixel of a point of the table
        scale = 60 / (3 * np.tan(np.deg2rad(30)))
        return image[int(60 - y * scale), int(60 + x * scale)]

    # The ray from the lamp through the block's centre meets the table at x = -0.5 + 1.0 * 1.5 / (1.5 - 0.5) = 1.0.
    ambient = round(0.8 * renderer.config.ambient * 255)
    assert np.abs(at(1.0, 0.0) - ambient).max() <= 1
    assert at(1.0, 0.4).min() > ambient + 30 and at(0.0, 0.0).min() > ambient + 30


def test_material_colour_group_and_alpha():
    xml = """<mujoco><asset><material name="m" rgba="0 0 1 1"/></asset><worldbody>
      <camera name="front" pos="0 0 0" xyaxes="1 0 0 0 0 1" fovy="60"/>
      <geom type="sphere" size="0.3" pos="0 1 0" rgba="1 0 0 1" group="3"/>
      <geom type="sphere" size="0.3" pos="0 2 0" rgba="1 0 0 0"/>
      <geom type="sphere" size="0.3" pos="0 3 0" material="m"/>
    </worldbody></mujoco>"""
    _, data, renderer = scene(xml, image_size=(11, 11))
    red, green, blue = renderer.render(data, "front")[5, 5]
    assert red == 0 and green == 0 and blue > 100


@pytest.mark.parametrize("suite,task", [("tabletop_goal", 7), ("tabletop_object", 8)])
def test_keeping_the_fixed_geoms_changes_no_pixel(suite, task):
    env = make_env(suite, task, 48)
    full = RaycastRenderer(env.model, RaycastConfig(image_size=(48, 48), keep_fixed=False))
    for seed in (0, 1):  # the fixtures move between the episodes
        env.reset(seed=seed)
        expert = Expert(env, seed=seed, action_noise=0.5, gripper_flips=0.2)
        for _ in range(25):
            env.step(expert.act().executed)
            np.testing.assert_array_equal(env.observe()["agentview"], full.render(env.data, "agentview"))


def test_a_camera_on_a_moving_body_and_a_plane():
    xml = """<mujoco><worldbody>
      <geom type="plane" size="5 5 0.1" rgba="0 1 0 1"/>
      <body name="eye" pos="0 0 1"><freejoint/><geom type="sphere" size="0.05" pos="0 0 0.2"/>
        <camera name="eye" xyaxes="1 0 0 0 1 0" fovy="60"/></body>
      <body pos="0 0 0.2"><freejoint/><geom type="sphere" size="0.1" rgba="1 0 0 1"/></body>
    </worldbody></mujoco>"""
    model, data, renderer = scene(xml, image_size=(21, 21))
    assert renderer.render(data, "eye")[10, 10, 0] > 100
    data.qpos[0] = 1.0
    mujoco.mj_forward(model, data)
    image = renderer.render(data, "eye")
    assert image[10, 10, 0] == 0 and image[10, 10, 1] > 100


def test_errors_name_what_is_wrong():
    model, data, renderer = scene(SPHERES)
    with pytest.raises(ValueError, match="unknown camera 'side'; the model has: front"):
        renderer.render(data, "side")
    with pytest.raises(ValueError, match=r"image_size must be at least one pixel each way, got \(0, 64\)"):
        RaycastRenderer(model, RaycastConfig(image_size=(0, 64)))
