"""Images of a MuJoCo model without OpenGL: one ray per pixel with `mujoco.mj_multiRay` (mujoco >= 3.5 returns normals).

Takes any MjModel made of primitives (meshes work too, only slower). Flat shading: ambient light plus one lamp with a cast shadow.
Rows run top to bottom, columns left to right, so images are upright.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import mujoco


@dataclass(frozen=True)
class RaycastConfig:
    image_size: tuple[int, int] = (64, 64)  # height, width in pixels
    lamp: tuple[float, float, float] = (-0.20, -0.45, 1.5)  # point light, metres, world frame
    ambient: float = 0.55  # share of the colour that needs no light
    shadow: float = 0.45  # lamp light that is left in the shadow, 0..1
    background: tuple[float, float, float] = (0.70, 0.78, 0.86)  # colour of rays that hit nothing, 0..1


class RaycastRenderer:
    """Renders named cameras of one model.

    Args:
        model: compiled MjModel; `geom_rgba` (or the material's colour) is the surface colour, alpha 0 is invisible.
        config: image size and light.
    """

    def __init__(self, model: mujoco.MjModel, config: RaycastConfig = RaycastConfig()) -> None:
        import mujoco

        height, width = config.image_size
        if height < 1 or width < 1:
            raise ValueError(f"image_size must be positive (height, width), got {config.image_size}")
        self.config = config
        self.model = model
        self._multi_ray = mujoco.mj_multiRay
        num_rays = height * width
        color = model.geom_rgba[:, :3].copy()
        with_material = model.geom_matid >= 0
        color[with_material] = model.mat_rgba[model.geom_matid[with_material], :3]
        self._color = np.concatenate([color, [config.background]]).astype(
            np.float32
        )  # last row: geom id -1, nothing hit
        self._plane_rays: dict[int, np.ndarray] = {}
        self._geom_id = np.empty(num_rays, np.int32)
        self._distance = np.empty(num_rays, np.float64)
        self._normal = np.empty(num_rays * 3, np.float64)
        self._shadow_geom = np.empty(num_rays, np.int32)
        self._shadow_distance = np.empty(num_rays, np.float64)

    def render(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        """One frame of `camera` in the state of `data` (after mj_forward or mj_step).

        Args:
            data: the MjData of the renderer's model.
            camera: name of a camera of the model.

        Returns:
            (H, W, 3) uint8, upright.

        Raises:
            ValueError: no camera of that name.
        """
        camera_id = self._camera_id(camera)
        height, width = self.config.image_size
        origin = data.cam_xpos[camera_id]
        rays = self._rays(camera_id) @ data.cam_xmat[camera_id].reshape(3, 3).T  # (H*W, 3), unit length
        self._trace(data, origin, rays, self._geom_id, self._distance, self._normal)
        hit = self._geom_id >= 0
        normal = self._normal.reshape(-1, 3)
        point = origin + rays * self._distance[:, None]
        to_point = point - np.asarray(self.config.lamp)
        to_point_distance = np.sqrt(np.einsum("nc,nc->n", to_point, to_point))
        to_point /= to_point_distance[:, None]
        facing = -np.einsum("nc,nc->n", normal, to_point)
        light = np.maximum(facing, 0.0)
        if self.config.shadow < 1.0:
            self._trace(data, np.asarray(self.config.lamp), to_point, self._shadow_geom, self._shadow_distance, None)
            light[self._shadow_distance < to_point_distance - 2e-3] *= self.config.shadow
        shade = np.where(hit, self.config.ambient + (1.0 - self.config.ambient) * light, 1.0).astype(np.float32)
        rgb = self._color[self._geom_id] * shade[:, None]
        return (np.minimum(rgb, 1.0) * 255.0 + 0.5).astype(np.uint8).reshape(height, width, 3)

    def _camera_id(self, camera: str) -> int:
        names = [self.model.camera(i).name for i in range(self.model.ncam)]
        if camera not in names:
            raise ValueError(f"unknown camera {camera!r}; the model has: {', '.join(names) or 'none'}")
        return names.index(camera)

    def _rays(self, camera_id: int) -> np.ndarray:
        """(H*W, 3) unit directions in the camera frame (x right, y up, looking along -z), kept per camera."""
        if camera_id not in self._plane_rays:
            height, width = self.config.image_size
            half = np.tan(np.deg2rad(self.model.cam_fovy[camera_id]) / 2.0)
            up = half * (1.0 - (2.0 * np.arange(height) + 1.0) / height)
            right = half * width / height * ((2.0 * np.arange(width) + 1.0) / width - 1.0)
            grid = np.stack(np.broadcast_arrays(right[None, :], up[:, None], -1.0), axis=-1).reshape(-1, 3)
            self._plane_rays[camera_id] = grid / np.linalg.norm(grid, axis=-1, keepdims=True)
        return self._plane_rays[camera_id]

    def _trace(self, data, origin, rays, geom_id, distance, normal) -> None:
        self._multi_ray(
            self.model,
            data,
            origin,
            np.ascontiguousarray(rays).reshape(-1),
            None,
            1,
            -1,
            geom_id,
            distance,
            normal,
            len(rays),
            1e6,
        )
