"""Small fixtures: demonstrations, a world model and a policy that fit together, all untrained."""

import dataclasses
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

# The tests are many small computations: threads only get in each other's way. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # what they expect is a CPU's; benchmarks/gpu_check.py is a GPU's

import numpy as np
import pytest
import torch

from vlarft.closed_loop import Attempts, play
from vlarft.data import WindowSampler, load_episodes
from vlarft.data.episodes import Episode, read_episodes
from vlarft.data.hdf5 import import_h5py, write_demo, write_task_attrs
from vlarft.run.script import run_script

# Words of the reasons for which a test may be skipped where CI is set; the test extra brings all else.
SKIPS = {
    "LIBERO": "installed by hand, with gigabytes of assets",
    "renderer": "OpenGL on a server without a display",
    "OpenGL library": "of the machine, one of two that are tested",
    "robomimic": "a reference with old dependencies",
    "lerobot": "a reference that pins other versions of torch",
    "openpi-client": "a client that pins numpy below 2",
    "C++ compiler": "of the machine, not of Python",
    "rerun-sdk": "500 MB installed, viewer included",
    "Chromium": "a browser of the machine, and playwright to drive it",
}
# Some tests send Ctrl+C, which what a shell runs in the background ignores, and so do the processes that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
SIZE = 64  # px, the image size of the smoke presets


def unlisted_skips(reports: list[pytest.TestReport]) -> list[str]:
    """Reasons of skipped tests that contain no word of SKIPS."""
    reasons = {r.longrepr[2] if isinstance(r.longrepr, tuple) else str(r.longrepr) for r in reports}
    return sorted(reason for reason in reasons if not any(word in reason for word in SKIPS))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run of CI that skips tests for a reason that is not listed: a skipped test notices nothing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter and (reasons := unlisted_skips(reporter.stats.get("skipped", []))):
        reporter.write_line("skipped for reasons that conftest.SKIPS does not list: " + "; ".join(reasons), red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def write_moving_square(path: Path, demos: int, steps: int, seed: int, instruction: str, low: float = -1.0) -> None:
    """A file of demonstrations in which actions 0 and 1 push a square over a plain background."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with import_h5py().File(path, "w") as file:
        data = file.create_group("data")
        write_task_attrs(data, instruction, {"suite": path.parent.name})
        for i in range(demos):
            actions = rng.uniform(low, -low, (steps, 7)).astype(np.float32)
            actions[:, 6] = np.where(np.arange(steps) < steps // 2, -1, 1)
            position = SIZE / 2 + np.cumsum(2 * actions[:, :2] / -low, 0)
            images = np.full((steps, SIZE, SIZE, 3), 120, np.uint8)
            for t, (y, x) in enumerate(np.clip(position, 0, SIZE - 12).astype(int)):
                images[t, y : y + 12, x : x + 12] = (200, 40, 40)
            proprio = np.concatenate([position / SIZE, rng.normal(size=(steps, 6))], 1).astype(np.float32)
            write_demo(
                data,
                i,
                images={"agentview": images},
                actions=actions,
                intended_actions=np.clip(actions * 0.9, -1, 1) if low == -1.0 else actions,
                proprio=proprio,
                states=np.zeros((steps, 3)),
            )


def ended(pid: int) -> bool:
    """Whether a process of another parent has ended, or does so within ten seconds."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":  # nobody here takes note of it
            return True
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    return False


def files_of(folder: Path | str) -> dict[str, bytes]:
    """All files of a run folder, to see whether a command changes any."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def interrupted(monkeypatch: pytest.MonkeyPatch, script: ModuleType, last: int, start: Callable[[], object]) -> None:
    """Start a run of a training script that is interrupted in step `last`, before that step's update."""
    check = script.check_finite

    def interrupt(loss, step, *rest):
        if step == last:
            raise KeyboardInterrupt
        check(loss, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "check_finite", interrupt)
        start()


def refused_with_converted_episodes(
    monkeypatch: pytest.MonkeyPatch, script: ModuleType, start: Callable[[], object]
) -> None:
    """Start a run again, with episodes of the names of before and of other actions: it does not go on."""
    load = script.load_episodes

    def converted(*args, **options):
        return [dataclasses.replace(e, actions=0.99 * e.actions) for e in load(*args, **options)]

    with monkeypatch.context() as patch:
        patch.setattr(script, "load_episodes", converted)
        with pytest.raises(ValueError, match="was begun with other contents of these episodes"):
            start()


def run_in_fork(command: Sequence[str]) -> None:
    """Run a script of the repository with its options, as a process of its own would, in a fork of this one.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    # once, not in every fork: the script, on the path of pyproject.toml, and what is imported late, in seconds
    script = importlib.import_module(Path(command[0]).stem)
    for late in ("torch._dynamo", "mujoco"):
        importlib.import_module(late)
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        if status := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise subprocess.CalledProcessError(status, command)
        return
    status = 1
    try:
        torch.set_num_threads(1)  # a fork has none of the threads that computed before
        sys.argv = list(command)
        run_script(script.main, script.Config, script.PRESETS, script.__doc__)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:  # without what this process would clean up at its end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def every_other_succeeds(*arguments: object, **options: object) -> Attempts:
    """`closed_loop.play`, but every other attempt of a group succeeds, whatever it did: an untrained policy always
    fails, which teaches nothing.
    """
    attempts = play(*arguments, **options)
    numbers = torch.arange(attempts.success.shape[1], device=attempts.success.device)
    return attempts._replace(success=(numbers % 2 == 0).expand_as(attempts.success))


def every_camera(path: Path) -> list[Episode]:
    """All episodes of a place with all of their cameras; `load_episodes` reads one."""
    return list(read_episodes(path, None, lambda *_: True))


def libero_missing() -> str:
    """Why tests that need LIBERO and its assets are skipped; empty where both are here."""
    from vlarft.sim.libero_install import assets_folder, package_folder

    try:
        package_folder()
        assets_folder()
    except (ImportError, FileNotFoundError) as error:
        return str(error)
    return ""


@pytest.fixture(scope="session")
def demos(tmp_path_factory) -> Path:
    """Folder of 2 tasks x 3 demonstrations of 14 steps."""
    folder = tmp_path_factory.mktemp("demos")
    for k, colour in enumerate(("red", "blue")):
        write_moving_square(folder / "squares" / f"push_{colour}_demo.hdf5", 3, 14, k, f"push the {colour} square")
    return folder


@pytest.fixture(scope="module")
def both_outcomes(tmp_path_factory) -> Path:
    """Folder of 12 episodes of 14 steps, half of them failures of a policy."""
    folder = tmp_path_factory.mktemp("episodes")
    for k, kind in enumerate(("expert", "policy")):
        path = folder / kind / "push_red_demo.hdf5"
        write_moving_square(path, 6, 14, k, "push the red square")
        with import_h5py().File(path, "r+") as file:
            for demo in file["data"].values():
                demo.attrs.update(kind=kind, success=kind == "expert")
    return folder


@pytest.fixture
def load_benchmark(monkeypatch) -> Callable[[str], ModuleType]:
    """Import a script of benchmarks/ or studies/, which are no packages."""

    def load(name: str) -> ModuleType:
        root = Path(__file__).parents[1]
        path = next(p for d in ("benchmarks", "studies") if (p := root / d / f"{name}.py").is_file())
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
        benchmark = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, benchmark)  # where dataclasses look up annotations
        spec.loader.exec_module(benchmark)
        return benchmark

    return load


@pytest.fixture(scope="session")
def world_model_file(demos, tmp_path_factory) -> Path:
    """A world model of smoke size with random weights and the action ranges of `demos`."""
    from vlarft.run.checkpoint import save_model
    from vlarft.world_model import PRESETS, WorldModel

    torch.manual_seed(0)
    config = PRESETS["smoke"]
    model = WorldModel(config)
    actions = torch.cat([torch.from_numpy(e.actions) for e in load_episodes(demos)])
    model.action_bins.set_range(actions.amin(0), actions.amax(0))
    path = tmp_path_factory.mktemp("wm") / "model.safetensors"
    save_model(path, model, config, {"held_out_episodes": []})
    return path


@pytest.fixture(scope="session")
def policy_file(demos, tmp_path_factory) -> Path:
    """A policy of smoke size with random weights, its normaliser fitted on `demos`."""
    from vlarft.policy import PRESETS, VLAPolicy

    torch.manual_seed(1)
    policy = VLAPolicy(PRESETS["smoke"])
    episodes = load_episodes(demos)
    policy.normalizer.fit(
        torch.cat([torch.from_numpy(e.intended) for e in episodes]),
        torch.cat([torch.from_numpy(e.proprio) for e in episodes]),
    )
    # the output layer starts at zero, which would hide what the tests look for
    torch.nn.init.normal_(policy.head.output.weight, std=0.5)
    path = tmp_path_factory.mktemp("policy") / "model.safetensors"
    names = [e.name for e in episodes]
    policy.save(path, {"train_episodes": names[:-2], "held_out_episodes": names[-2:]})
    return path


@pytest.fixture
def rft_config(demos, policy_file, world_model_file, tmp_path):
    """Config of train_rft.py at smoke size."""
    import train_rft

    return dataclasses.replace(
        train_rft.PRESETS["smoke"],
        policy=str(policy_file),
        world_model=str(world_model_file),
        demos=(str(demos),),
        out_dir=str(tmp_path / "rft"),
    )


@pytest.fixture
def rft_parts(rft_config):
    """Policy with a fresh sigma net, its vision-language model frozen, world model and a batch of starts."""
    from vlarft.policy import VLAPolicy
    from vlarft.world_model import WorldModel

    policy = VLAPolicy.load(rft_config.policy)
    torch.manual_seed(0)
    policy.add_sigma_net()
    policy.eval()
    policy.vlm.requires_grad_(False)
    sampler = WindowSampler(load_episodes(rft_config.demos), 9, 8)
    return policy, WorldModel.load(rft_config.world_model), sampler.batch(rft_config.starts, 0, 0)


@pytest.fixture
def transformers():
    """The oracle. It imports torchvision when installed; one built for another torch fails, so that one is hidden."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        sys.modules["torchvision"] = None
    return pytest.importorskip("transformers")
