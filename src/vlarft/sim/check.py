"""Check what LIBERO needs on this machine, one thing after the other.

    python -m vlarft.sim.check                              # packages, assets, one episode of each suite, images
    python -m vlarft.sim.check --suites libero_object       # one suite only
    python -m vlarft.sim.check --download-assets FOLDER     # LIBERO's own download, into FOLDER, then the tests

Prints one line per check; for whatever is missing, the command that installs it. Exits with 1 if anything is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata

import numpy as np

from vlarft.run.config import Parser
from vlarft.run.script import clear_errors
from vlarft.sim.gl import find_backend
from vlarft.sim.libero_install import (
    ASSETS_VARIABLE,
    INSTALL,
    assets_folder,
    assets_label,
    import_libero,
    package_folder,
)
from vlarft.sim.libero_tasks import LIBERO_SUITES
from vlarft.sim.suites import make_env

_STEPS = 20  # control steps of the test episode


def check_packages() -> str:
    """Import the simulator's packages; return their names and versions.

    Raises:
        RuntimeError: a MuJoCo that robosuite 1.4.0 does not know.
    """
    package_folder()
    import_libero()
    if tuple(map(int, (found := _version("mujoco")).split(".")[:2])) >= (3, 9):
        raise RuntimeError(f"robosuite 1.4.0 fails with mujoco {found}: pip install 'mujoco<3.9'")
    names = ("hf-libero", "robosuite", "bddl", "mujoco", "numpy", "torch")
    return ", ".join(f"{name} {_version(name)}" for name in names)


def check_assets() -> str:
    """Return where meshes and textures come from."""
    folder = assets_folder()
    return f"{folder} ({assets_label(folder)})"


def check_episode(suite: str) -> str:
    """Play some steps of the suite's first task twice, and compare.

    Raises:
        RuntimeError: the two episodes differ.
    """
    began = time.monotonic()
    env = make_env(suite, 0, 64)
    ends = []
    for _ in range(2):
        env.reset(init_state=0)
        rng = np.random.default_rng(0)
        for _ in range(_STEPS):
            env.step(rng.uniform(-1.0, 1.0, 7))
        ends.append(env.get_state())
    if not np.array_equal(*ends):
        raise RuntimeError(
            f"{suite}: the same start and actions ended differently; install these versions again: {INSTALL}"
        )
    return (
        f"{len(LIBERO_SUITES[suite].tasks)} tasks; {_STEPS} steps repeat bit for bit; {time.monotonic() - began:.0f} s"
    )


def check_rendering(suite: str) -> str:
    """Render an image; return the library and the time that it took."""
    backend = find_backend()
    env = make_env(suite, 0, 64)
    env.reset(init_state=0)
    env.observe()
    began = time.monotonic()
    image = env.observe()["agentview"]
    if image.std() < 1.0:
        raise RuntimeError(f"{backend} renders an image of one colour; update its driver, or set MUJOCO_GL to another")
    return f"{backend}, {1000 * (time.monotonic() - began):.0f} ms an image"


def download_assets(folder: str) -> None:
    """Run LIBERO's own download of meshes and textures, into `folder`.

    Raises:
        ImportError: huggingface_hub is missing.
        RuntimeError: the download failed.
    """
    try:
        import huggingface_hub  # noqa: F401 - LIBERO needs it for the download
    except ImportError as error:
        raise ImportError("LIBERO's download needs: pip install huggingface_hub") from error
    import_libero(need_assets=False)
    from libero.libero.utils.download_utils import download_assets_from_huggingface

    try:
        download_assets_from_huggingface(os.path.abspath(folder))
    except Exception as error:  # whatever the network does
        raise RuntimeError(f"LIBERO's assets could not be downloaded into {folder}: {error}") from error


def report(tests: Sequence[tuple[str, Callable[[], str]]]) -> bool:
    """Run named checks and print a line for each; return whether all passed."""
    good = True
    for name, test in tests:
        try:
            print(f"ok       {name}: {test()}", flush=True)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            good = False
            print(f"MISSING  {name}: {error}", flush=True)
    return good


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    parser = Parser(
        prog="python -m vlarft.sim.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--suites", nargs="+", choices=list(LIBERO_SUITES), default=list(LIBERO_SUITES), help="to start"
    )
    parser.add_argument("--download-assets", metavar="FOLDER", help="first run LIBERO's own download into this folder")
    args = parser.parse_args(argv)
    if args.download_assets:
        if not report([("download", lambda: download_assets(args.download_assets) or args.download_assets)]):
            return 1
        os.environ[ASSETS_VARIABLE] = args.download_assets
        print(f"from now on: export {ASSETS_VARIABLE}={os.path.abspath(args.download_assets)}")
    ready = report([("renderer", find_backend), ("assets", check_assets), ("packages", check_packages)])
    if not ready:
        print(f"not tested: {', '.join(args.suites)}, which need the above")
        return 1
    tests = [(suite, lambda suite=suite: check_episode(suite)) for suite in args.suites]
    return 0 if report([*tests, ("images", lambda: check_rendering(args.suites[0]))]) else 1


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    with clear_errors():
        sys.exit(main(sys.argv[1:]))
