"""Images of a MuJoCo model without OpenGL: one ray per pixel with `mujoco.mj_multiRay` of mujoco >= 3.5.

Takes any MjModel made of primitives; meshes work too, only slower. Flat shading: ambient light plus one lamp that
casts shadows. Rows run top to bottom, columns left to right, so images are upright.

Most of a frame rarely changes. For a camera fixed in the world, hits and shadows of the geoms that cannot move are
kept, and only pixels and shadows inside the bounding spheres of the others are traced again; the image is the same bit
for bit.

Shapes: N rays, one per pixel, M moving geoms.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import mujoco

_HIDDEN, _FIXED, _MOVING = 5, 0, 1  # geom groups of the private copy of the model


@dataclass(frozen=True)
class RaycastConfig:
    image_size: tuple[int, int] = (64, 64)  # height, width in pixels
    lamp: tuple[float, float, float] = (-0.20, -0.45, 1.5)  # point light, metres, world frame
    ambient: float = 0.55  # share of the colour that needs no light
    shadow: float = 0.45  # lamp light that is left in the shadow, 0..1; 1 traces no shadows
    background: tuple[float, float, float] = (0.70, 0.78, 0.86)  # colour of rays that hit nothing, 0..1
    keep_fixed: bool = True  # keep hits on geoms that cannot move from frame to frame


class _Frame(NamedTuple):
    geom_id: np.ndarray  # (N,) int32, -1 = nothing hit
    distance: np.ndarray  # (N,) metres from the camera, infinite where nothing is hit
    lamp_ray: np.ndarray  # (N, 3) unit vector from the lamp to the point hit
    lamp_distance: np.ndarray  # (N,) metres
    light: np.ndarray  # (N,) lamp light on the point, 0..1, without shadows
    dark: np.ndarray  # (N,) bool, in shadow


class _Kept(NamedTuple):
    rays: np.ndarray  # (N, 3) camera rays
    frame: _Frame  # what they hit of the fixed geoms
    camera_columns: np.ndarray  # (3, N) float32, the camera rays
    lamp_columns: np.ndarray  # (3, N) float32, the lamp rays


class RaycastRenderer:
    """Renders the cameras of one model.

    Args:
        model: compiled MjModel. `geom_rgba` (or the material's colour) is the surface colour, read once; geoms of
            alpha 0 or of group 3 and higher are invisible, as in MuJoCo's viewer.
        config: image size and light.

    Raises:
        ValueError: an image size below one pixel.
    """

    def __init__(self, model: mujoco.MjModel, config: RaycastConfig = RaycastConfig()) -> None:
        import mujoco

        height, width = config.image_size
        if height < 1 or width < 1:
            raise ValueError(f"image_size must be at least one pixel each way, got {config.image_size}")
        self.config = config
        self._multi_ray = mujoco.mj_multiRay
        color = model.geom_rgba[:, :3].copy()
        with_material = model.geom_matid >= 0
        color[with_material] = model.mat_rgba[model.geom_matid[with_material], :3]
        # Last row: geom id -1, nothing hit.
        self._color = np.concatenate([color, [config.background]]).astype(np.float32)
        self._lamp = np.asarray(config.lamp, dtype=np.float64)

        fixed_body = (model.body_weldid == 0) & (model.body_mocapid < 0)
        fixed = fixed_body[model.geom_bodyid]
        shown = model.geom_group < 3
        self._model = copy.copy(model)  # the ray caster selects geoms by group
        self._model.geom_group[:] = np.where(shown, np.where(fixed, _FIXED, _MOVING), _HIDDEN)
        self._fixed_geoms = np.flatnonzero(fixed & shown)
        self._moving_geoms = np.flatnonzero(~fixed & shown)
        reach = model.geom_rbound[self._moving_geoms]
        self._reach = np.where(reach > 0.0, reach, np.inf)  # a plane has no bounding sphere
        self._fixed_camera = fixed_body[model.cam_bodyid]
        self._camera_names = [model.camera(i).name for i in range(model.ncam)]
        self._pixel_rays: dict[int, np.ndarray] = {}
        self._kept: dict[int, tuple[bytes, _Kept]] = {}
        # mj_multiRay's filter for each choice of groups.
        self._filters = {
            groups: np.isin(np.arange(6), groups).astype(np.uint8)
            for groups in ((_FIXED,), (_MOVING,), (_FIXED, _MOVING))
        }

    def render(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        """Render `camera` in the state of `data` (after mj_forward or mj_step).

        Args:
            data: MjData of the renderer's model.
            camera: name of a camera of the model.

        Returns:
            (H, W, 3) uint8, upright.

        Raises:
            ValueError: no camera of that name.
        """
        if camera not in self._camera_names:
            raise ValueError(f"unknown camera {camera!r}; the model has: {', '.join(self._camera_names) or 'none'}")
        camera_id = self._camera_names.index(camera)
        origin = data.cam_xpos[camera_id]
        if self.config.keep_fixed and self._fixed_camera[camera_id]:
            frame = self._add_moving(data, origin, self._fixed(data, camera_id, origin))
        else:
            rays = self._rays(data, camera_id)
            frame = self._trace_all(data, origin, rays, (_FIXED, _MOVING))
        lamp = np.where(frame.dark, self.config.shadow * frame.light, frame.light)
        shade = np.where(frame.geom_id >= 0, self.config.ambient + (1.0 - self.config.ambient) * lamp, 1.0)
        rgb = self._color[frame.geom_id] * shade.astype(np.float32)[:, None]  # (N, 3)
        return (np.minimum(rgb, 1.0) * 255.0 + 0.5).astype(np.uint8).reshape(*self.config.image_size, 3)

    def _trace_all(self, data: mujoco.MjData, origin: np.ndarray, rays: np.ndarray, groups: tuple[int, ...]) -> _Frame:
        geom_id, distance, normal = self._trace(data, origin, rays, groups)
        lamp_ray, lamp_distance, light = self._light(origin, rays, distance, normal)
        return _Frame(
            geom_id, distance, lamp_ray, lamp_distance, light, self._shadow(data, lamp_ray, lamp_distance, groups)
        )

    def _fixed(self, data: mujoco.MjData, camera_id: int, origin: np.ndarray) -> _Kept:
        """Return what a fixed camera sees of the fixed geoms; traced again when one of these was moved."""
        geoms = self._fixed_geoms
        poses = (data.geom_xpos[geoms], data.geom_xmat[geoms], origin, data.cam_xmat[camera_id])
        key = b"".join(pose.tobytes() for pose in poses)
        if camera_id not in self._kept or self._kept[camera_id][0] != key:
            rays = self._rays(data, camera_id)
            frame = self._trace_all(data, origin, rays, (_FIXED,))
            columns = (np.ascontiguousarray(r.T, dtype=np.float32) for r in (rays, frame.lamp_ray))
            self._kept[camera_id] = key, _Kept(rays, frame, *columns)
        return self._kept[camera_id][1]

    def _add_moving(self, data: mujoco.MjData, origin: np.ndarray, kept: _Kept) -> _Frame:
        rays, fixed = kept.rays, kept.frame
        geom_id, light, dark = fixed.geom_id.copy(), fixed.light.copy(), fixed.dark.copy()
        # Shadows that moving geoms cast on fixed ones.
        shadowed = self._near_moving(data, self._lamp, kept.lamp_columns) & (geom_id >= 0) & ~dark
        near = np.flatnonzero(shadowed)
        dark[near] = self._shadow(data, fixed.lamp_ray[near], fixed.lamp_distance[near], (_MOVING,))
        # Moving geoms in front of fixed ones.
        near = np.flatnonzero(self._near_moving(data, origin, kept.camera_columns))
        moving_id, distance, normal = self._trace(data, origin, rays[near], (_MOVING,))
        front = (moving_id >= 0) & (distance < fixed.distance[near])
        pixel, normal = near[front], normal[front]
        lamp_ray, lamp_distance, light[pixel] = self._light(origin, rays[pixel], distance[front], normal)
        geom_id[pixel] = moving_id[front]
        dark[pixel] = self._shadow(data, lamp_ray, lamp_distance, (_FIXED, _MOVING))
        return fixed._replace(geom_id=geom_id, light=light, dark=dark)

    def _near_moving(self, data: mujoco.MjData, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
        """Return (N,) bool: whether a ray (3, N) float32 touches the bounding sphere of a moving geom."""
        to_center = data.geom_xpos[self._moving_geoms] - origin  # (M, 3)
        distance = np.linalg.norm(to_center, axis=-1)
        outside = distance > self._reach
        sine = np.where(outside, self._reach / np.maximum(distance, 1e-12), 1.0)
        # Cosine of the cone's half angle; -2 lets every ray pass. 1e-5 covers float32, which is twice as fast here.
        least = np.where(outside, np.sqrt(1.0 - sine**2) - 1e-5, -2.0).astype(np.float32)
        direction = (to_center / np.maximum(distance, 1e-12)[:, None]).astype(np.float32)
        return (direction @ rays >= least[:, None]).any(axis=0)  # (M, N) -> (N,)

    def _light(
        self, origin: np.ndarray, rays: np.ndarray, distance: np.ndarray, normal: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return direction and distance from the lamp to each point hit, and its light by Lambert's law."""
        reached = np.where(np.isfinite(distance), distance, 0.0)
        lamp_ray = origin + rays * reached[:, None] - self._lamp
        lamp_distance = np.sqrt((lamp_ray**2).sum(axis=-1))
        lamp_ray /= lamp_distance[:, None]
        return lamp_ray, lamp_distance, np.maximum(-(normal * lamp_ray).sum(axis=-1), 0.0)

    def _shadow(
        self, data: mujoco.MjData, lamp_ray: np.ndarray, lamp_distance: np.ndarray, groups: tuple[int, ...]
    ) -> np.ndarray:
        if self.config.shadow >= 1.0:
            return np.zeros(len(lamp_ray), bool)
        return self._trace(data, self._lamp, lamp_ray, groups)[1] < lamp_distance - 2e-3

    def _rays(self, data: mujoco.MjData, camera_id: int) -> np.ndarray:
        """Return (N, 3) unit directions in the world frame."""
        if camera_id not in self._pixel_rays:
            height, width = self.config.image_size
            half = np.tan(np.deg2rad(self._model.cam_fovy[camera_id]) / 2.0)
            up = half * (1.0 - (2.0 * np.arange(height) + 1.0) / height)
            right = half * width / height * ((2.0 * np.arange(width) + 1.0) / width - 1.0)
            # In the camera frame x is right, y up, and it looks along -z.
            grid = np.stack(np.broadcast_arrays(right[None, :], up[:, None], -1.0), axis=-1).reshape(-1, 3)
            self._pixel_rays[camera_id] = grid / np.linalg.norm(grid, axis=-1, keepdims=True)
        return self._pixel_rays[camera_id] @ data.cam_xmat[camera_id].reshape(3, 3).T

    def _trace(
        self, data: mujoco.MjData, origin: np.ndarray, rays: np.ndarray, groups: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the nearest hit of each ray with the geoms of some groups: id (N,), distance (N,), normal (N, 3)."""
        count = len(rays)
        geom_id, distance, normal = np.full(count, -1, np.int32), np.full(count, -1.0), np.zeros(3 * count)
        if count:
            flat = np.ascontiguousarray(rays).reshape(-1)
            self._multi_ray(
                self._model, data, origin, flat, self._filters[groups], 1, -1, geom_id, distance, normal, count, 1e6
            )
        distance[geom_id < 0] = np.inf
        return geom_id, distance, normal.reshape(-1, 3)
