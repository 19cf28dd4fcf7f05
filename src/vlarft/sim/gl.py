"""Images of a MuJoCo model by OpenGL without a screen: EGL (a GPU, or Mesa's software) or OSMesa.

Robosuite's own renderer gives the same pixels; this one is made when the first image is rendered, so that physics runs
on machines that cannot render, and its quality can be lowered.

Without a GPU the time of an image depends on its geometry and hardly on its resolution: 256 px of LIBERO take 72 to 115
ms of a core, 35 to 48 ms without antialiasing and reflections, and 18 ms with simplified meshes besides (Mesa). Each
setting changes pixels, see `RenderConfig`: evaluate a policy with the settings of its demonstrations. There is no
setting for shadows: LIBERO's lights cast none.

Shapes: V vertices, F triangles of a mesh.
"""

from __future__ import annotations

import atexit
import copy
import ctypes.util
import importlib
import os
import weakref
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import mujoco

Backend = Literal["egl", "osmesa"]
_LIBRARIES: dict[str, tuple[str, str]] = {
    "egl": ("EGL", "apt-get install libegl1 libgl1 libegl-mesa0 libgl1-mesa-dri"),
    "osmesa": ("OSMesa", "apt-get install libosmesa6"),
}

_open: weakref.WeakSet[GLRenderer] = weakref.WeakSet()


@dataclass(frozen=True)
class RenderConfig:
    """Quality of the images. The defaults are LIBERO's.

    Measured on first frames of libero_spatial, libero_object and libero_10 at 256 px, grey levels of 0..255:
    antialias off changes 3 % of the pixels, those on edges, by more than 8 levels (1.0, 0.7, 0.8 levels on average);
    reflections off changes another 0.5 % where the table reflects (libero_spatial), and nothing in the other two.
    Meshes simplified to cubes of 4 mm, half a pixel of agentview at 128 px, change 2 % of those pixels (0.5 and 0.7
    levels on average in libero_object and libero_spatial), and leave 40 % of 250,000 triangles. At the wrist they are
    several pixels.
    """

    antialias: bool = True  # 4 samples a pixel
    reflections: bool = True
    mesh_cell: float = 0.0  # side of the cubes whose vertices become one, in each mesh [m]; 0: meshes as they are


FULL, FAST = RenderConfig(), RenderConfig(antialias=False, reflections=False, mesh_cell=0.004)


def find_backend() -> Backend:
    """Return the library that renders: the one that MUJOCO_GL names, else EGL if it is installed, else OSMesa.

    Raises:
        RuntimeError: none is installed, or MUJOCO_GL names something else.
    """
    wanted = os.environ.get("MUJOCO_GL", "").strip().lower()
    if wanted and wanted not in _LIBRARIES:
        raise RuntimeError(
            f"MUJOCO_GL={wanted} cannot render without a screen here; set it to egl or osmesa, or unset it"
        )
    for name in (wanted,) if wanted else _LIBRARIES:
        if ctypes.util.find_library(_LIBRARIES[name][0]):
            return name
    fixes = "; or ".join(f"{_LIBRARIES[name][1]}  ({name})" for name in ((wanted,) if wanted else _LIBRARIES))
    raise RuntimeError(f"no OpenGL library that renders without a screen was found. Install one: {fixes}")


def import_mujoco() -> ModuleType:
    """Import mujoco, whatever MUJOCO_GL names.

    Its import loads that renderer and fails with it; physics and ray casting need none, and `GLRenderer` says what is
    missing.

    Raises:
        ImportError: mujoco is not installed.
    """
    wanted = os.environ.get("MUJOCO_GL")
    try:
        return importlib.import_module("mujoco")
    except (AttributeError, OSError, RuntimeError):  # no library, or no renderer of that name
        if wanted is None:
            raise
    os.environ["MUJOCO_GL"] = "disabled"
    try:
        return importlib.import_module("mujoco")
    finally:
        os.environ["MUJOCO_GL"] = wanted


class GLRenderer:
    """Renders the cameras of one model.

    Args:
        model: compiled MuJoCo model.
        size: (height, width) in pixels.
        config: quality.

    Raises:
        RuntimeError: no OpenGL library, or one that gives no context.
    """

    def __init__(self, model: mujoco.MjModel, size: tuple[int, int], config: RenderConfig = FULL) -> None:
        import mujoco

        backend = find_backend()
        self._mujoco, self._model = mujoco, model
        self.size = size
        height, width = size
        model.vis.global_.offheight, model.vis.global_.offwidth = height, width
        model.vis.quality.offsamples = 4 if config.antialias else 0
        try:
            self._gl = importlib.import_module(f"mujoco.{backend}").GLContext(width, height)
            self._gl.make_current()
            drawn = with_simple_meshes(model, config.mesh_cell) if config.mesh_cell else model
            self._context = mujoco.MjrContext(drawn, mujoco.mjtFontScale.mjFONTSCALE_150)  # a copy of its meshes
        except (ImportError, AttributeError, RuntimeError, mujoco.FatalError) as error:
            raise RuntimeError(
                f"{backend} gives no OpenGL context ({error}). Its drivers: {_LIBRARIES[backend][1]}; "
                "or set MUJOCO_GL to another of egl, osmesa"
            ) from error
        if not _open:
            atexit.register(_close_all)  # after the library's own, so that it runs before
        _open.add(self)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=2000)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = config.reflections
        self._options = mujoco.MjvOption()
        self._options.geomgroup[:2] = 0, 1  # visual meshes, not those of collisions
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def render(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        """Render a camera: (H, W, 3) uint8, first row at the bottom, as OpenGL reads it and LIBERO stores it."""
        mj, (height, width) = self._mujoco, self.size
        self._gl.make_current()  # several renderers may live in one process
        self._camera.fixedcamid = self._model.camera(camera).id
        mj.mjv_updateScene(self._model, data, self._options, None, self._camera, mj.mjtCatBit.mjCAT_ALL, self._scene)
        view = mj.MjrRect(0, 0, width, height)
        mj.mjr_render(view, self._scene, self._context)
        image = np.empty((height, width, 3), np.uint8)
        mj.mjr_readPixels(image, None, view, self._context)
        return image

    def close(self) -> None:
        """Free the context; the renderer cannot be used afterwards."""
        _open.discard(self)
        self._gl.make_current()
        self._context.free()
        self._gl.free()


def with_simple_meshes(model: mujoco.MjModel, cell: float) -> mujoco.MjModel:
    """Return a copy of a model, to be drawn only, whose meshes have fewer triangles (vertex clustering).

    The vertices of a mesh within one cube of side `cell` [m] become the first of them. Triangles that this makes flat,
    or the same as another, are left out; the others keep their normals and texture coordinates.
    """
    simple = copy.deepcopy(model)
    for mesh in range(model.nmesh):
        start, faces = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
        first = model.mesh_vertadr[mesh]
        vertices = model.mesh_vert[first : first + model.mesh_vertnum[mesh]]  # (V, 3)
        _, kept, cluster = np.unique(np.floor(vertices / cell), axis=0, return_index=True, return_inverse=True)
        corners = cluster.reshape(-1)[model.mesh_face[start : start + faces]]  # (F, 3), clusters
        solid = np.flatnonzero((corners != np.roll(corners, 1, axis=1)).all(axis=1))
        # the lowest corner first, so that equal triangles are equal rows; the order of corners says which side is front
        turn = corners[solid].argmin(axis=1)[:, None] + np.arange(3)
        _, index = np.unique(np.take_along_axis(corners[solid], turn % 3, axis=1), axis=0, return_index=True)
        chosen = solid[np.sort(index)]
        rows = slice(start, start + len(chosen))
        simple.mesh_face[rows] = kept[corners[chosen]]
        simple.mesh_facenormal[rows] = model.mesh_facenormal[start + chosen]
        simple.mesh_facetexcoord[rows] = model.mesh_facetexcoord[start + chosen]
        simple.mesh_facenum[mesh] = len(chosen)
    return simple


def _close_all() -> None:
    for renderer in list(_open):
        renderer.close()
