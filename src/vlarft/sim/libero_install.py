"""Find and import LIBERO without its side effects: no prompt, no file in the home folder, no log, no download.

LIBERO's own import asks a question on the terminal and writes ~/.libero; robosuite's writes /tmp/robosuite.log and
requires EGL even where nothing is rendered. Here LIBERO gets its configuration in a temporary folder that lasts as long
as the process, and images come from `vlarft.sim.gl`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from vlarft.sim.gl import import_mujoco

ASSETS_VARIABLE = "LIBERO_ASSETS"
INSTALL = 'pip install -e ".[libero]" && pip install --no-deps hf-libero==0.1.4 robosuite==1.4.0 bddl==1.0.1'
DOWNLOAD = "python -m vlarft.sim.check --download-assets FOLDER"
ASSET_FOLDERS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "textures")
# The bowl of a set of assets that circulates for tests: 15 of its meshes and textures are plain stand-ins.
_STAND_IN = {"stable_scanned_objects/akita_black_bowl/visual/akita_black_bowl_vis.msh": "af3cbfdb049fd101d3139bc"}

_config_folder: tempfile.TemporaryDirectory | None = None  # lives as long as the process


def package_folder() -> Path:
    """Return the folder of LIBERO's package, which holds its task and initial-state files, without importing it.

    Raises:
        ImportError: LIBERO or robosuite is not installed; the message holds the line that installs them.
    """
    folders = {}
    for name in ("libero", "robosuite", "bddl"):
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"the libero suites need LIBERO, and the package {name} is missing: {INSTALL}")
        folders[name] = Path(spec.submodule_search_locations[0])
    return folders["libero"] / "libero"


def assets_folder() -> Path:
    """Return the folder of meshes and textures: the environment variable LIBERO_ASSETS, else LIBERO's own.

    Raises:
        FileNotFoundError: neither is there, or a part is missing.
    """
    given = os.environ.get(ASSETS_VARIABLE)
    folder = Path(given) if given else package_folder() / "assets"
    missing = [name for name in ASSET_FOLDERS if not (folder / name).is_dir()]
    if missing:
        where = f"{ASSETS_VARIABLE}={given}" if given else str(folder)
        raise FileNotFoundError(
            f"LIBERO's assets are not at {where}: no folder {', '.join(missing)}. Unpack them anywhere and set "
            f"{ASSETS_VARIABLE} to the folder that holds articulated_objects, or let LIBERO download them: {DOWNLOAD}"
        )
    return folder.resolve()


@functools.cache
def assets_label(folder: Path) -> str:
    """Return what reports call the visuals: "stand-in visuals" for a known set of replacements, else "own visuals"."""
    for name, digest in _STAND_IN.items():
        file = folder / name
        if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest().startswith(digest):
            return "stand-in visuals"
    return "own visuals"


def import_libero(need_assets: bool = True) -> ModuleType:
    """Import the module `libero.libero.envs.env_wrapper`, ready to make environments.

    Args:
        need_assets: False to import LIBERO only for its download of them.

    Raises:
        ImportError: LIBERO, robosuite or something they import is missing.
        FileNotFoundError: no assets.
    """
    global _config_folder
    root = package_folder()
    assets = assets_folder() if need_assets else root / "assets"
    if _config_folder is None:
        _config_folder = tempfile.TemporaryDirectory(prefix="vlarft_libero_")
    folder = Path(_config_folder.name)
    variables = {"LIBERO_CONFIG_PATH": str(folder)}
    if "MPLCONFIGDIR" not in os.environ:
        variables["MPLCONFIGDIR"] = str(folder)  # matplotlib, which LIBERO imports, would make a folder at home
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        if "robosuite" not in sys.modules:
            _import_robosuite()
        if "libero.libero" not in sys.modules:
            paths = {"benchmark_root": root, "bddl_files": root / "bddl_files", "init_states": root / "init_files"}
            paths |= {"datasets": folder / "datasets", "assets": assets}
            config = json.dumps({key: str(path) for key, path in paths.items()})  # JSON is YAML
            (folder / "config.yaml").write_text(config)
            _import("libero.libero")
        sys.modules["libero.libero"]._assets_path_cache = str(assets)
        return _import("libero.libero.envs.env_wrapper")
    finally:
        for name, value in before.items():
            _restore(name, value)


def _import_robosuite() -> None:
    """Import robosuite with its log file off and without a renderer: its macros have to be set before it reads them."""
    folder = Path(importlib.util.find_spec("robosuite").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("robosuite.macros", folder / "macros.py")
    macros = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(macros)
    macros.FILE_LOGGING_LEVEL, macros.CONSOLE_LOGGING_LEVEL, macros.MUJOCO_GPU_RENDERING = None, "ERROR", False
    sys.modules["robosuite.macros"] = macros
    before = os.environ.get("MUJOCO_GL")
    import_mujoco()  # reads MUJOCO_GL at its import, so before the variable is changed for robosuite
    os.environ["MUJOCO_GL"] = "disabled"
    try:
        _import("robosuite").macros = macros
    finally:
        _restore("MUJOCO_GL", before)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is installed but cannot be imported ({error}): {INSTALL}") from error


def _restore(variable: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value
