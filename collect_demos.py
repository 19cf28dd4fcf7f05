"""Collect expert demonstrations of Tabletop's and LIBERO's suites, as HDF5 in LIBERO's layout.

    python collect_demos.py --preset tiny --out-dir demos                  # four tasks of tabletop_object, 64 px
    python collect_demos.py --suites tabletop_goal --tasks 0 open_the_drawer --demos-per-task 10 --out-dir demos
    python collect_demos.py --preset paper --out-dir demos --workers 8     # four suites x ten tasks x 50, 256 px
    python collect_demos.py --preset libero --demos-per-task 20 --out-dir demos     # LIBERO-Object and LIBERO-Spatial
    python collect_demos.py --preset libero --suites libero_goal --out-dir demos    # another suite of LIBERO
    python collect_demos.py --preset tiny --out-dir demos --lerobot demos_lerobot   # the same in LeRobot's layout

Reads nothing but, with `--policy-per-task`, the policy. Writes <out_dir>/<suite>/<task>_demo.hdf5. The same command run
again makes only what is missing: finished demonstrations wait in <task>_demo.parts, each written whole or not at all,
until their task is complete. A worker process that dies is replaced. A task that the expert cannot do is reported at
the end, when all others are made. `--lerobot DIR` then also writes all of them as a LeRobot data set, which appears
once it is whole; it cannot be continued, so that more demonstrations need another folder.

Every frame stores the executed action, which the world model learns from, and the intended one, without the expert's
noise, which a policy imitates. Demonstration i is the first success among the start seeds that belong to i, so the
files do not depend on the number of workers. Further episodes, marked in the attributes `kind` and `success`, serve a
world model only:
- `--keep-failed` keeps the first attempt of each i, success or not;
- `--noisy-per-task` adds attempts of the expert with strong noise;
- `--policy-per-task` adds attempts of `--policy`, which show where that policy goes. They can be added later, as can
  more `--demos-per-task`. With `--demos-per-task 0` they are alone, in a folder to train on beside the demonstrations:
  more of them, of another policy too, go into the same folder, since elsewhere they would get the same names.

Demonstrations of LIBERO start where LIBERO's own sampler places things, not at the benchmark's initial states; their
images are stored upside down and their states are time, positions and velocities, as in LIBERO's own files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from tqdm import tqdm

from vlarft.data.episode import Episode
from vlarft.data.episodes import read_episodes
from vlarft.data.frames import Budget
from vlarft.data.hdf5 import demo_names, import_h5py, open_demo_file, write_demo, write_task_attrs
from vlarft.data.lerobot_writer import is_recorded, write_lerobot
from vlarft.policy import PolicyConfig, VLAPolicy
from vlarft.run.cameras import find_camera
from vlarft.run.checkpoint import check_room, json_digest, read_header, read_json, write_atomic, write_json
from vlarft.run.config import Count, NotNegative, Processes, Range, Share, ShareAbove0, Side, Whole, opt
from vlarft.run.migration import migrate
from vlarft.run.script import run_script
from vlarft.sim import TABLETOP_SUITES, Env, make_env, make_expert, simulator_of, task_names
from vlarft.sim.demonstrator import Demonstrator, NoPlanError
from vlarft.sim.env import CONTROL_FREQ
from vlarft.sim.gl import FAST
from vlarft.sim.policy_check import check_policy
from vlarft.sim.record import PolicyPlayer, record
from vlarft.sim.suites import check_rendering, task_indices, visuals_of
from vlarft.sim.workers import one_thread, run_jobs

FIRST_NOISY = 10_000  # demo_<10000 + j> is noisy attempt j
FIRST_ON_POLICY = 20_000  # demo_<20000 + j> is on-policy attempt j
ATTEMPT_STRIDE = 1_000_000  # start seed = seed + index + attempt * stride
Demos = Annotated[int, Range(0, FIRST_NOISY)]


@dataclass(frozen=True)
class Config:
    """What to collect; the defaults are the sizes of LIBERO's demonstrations."""

    suites: tuple[str, ...] = opt(tuple(TABLETOP_SUITES), "suites to collect", group="data")
    tasks: tuple[str, ...] | None = opt(None, "task numbers or names, in every suite given; none: all")
    demos_per_task: Demos = opt(50, "demonstrations per task (LIBERO: 50); 0: only the extra attempts below")
    image_size: Side = opt(256, "side of the images [px]")
    eye_in_hand: bool = opt(False, "also store the wrist camera")
    fast_rendering: bool = opt(False, "LIBERO without antialiasing and reflections, with simpler meshes, see sim/gl.py")
    action_noise: NotNegative = opt(0.2, "standard deviation of the expert's action noise [action units]")
    min_speed: ShareAbove0 = opt(
        0.4, "lower bound of the expert's speed, uniform per demonstration; 1 is 2 cm a step (LIBERO: 1.2 cm)"
    )
    max_speed: ShareAbove0 = opt(0.6, "upper bound of the expert's speed")
    idle_steps: Whole = opt(8, "steps recorded after success: experts keep still, gripper open; a policy plays on")
    max_attempts: Count = opt(20, "starts tried for one demonstration")
    horizon: Count | None = opt(None, "steps after which an attempt without success ends; none: the suite's limit")
    keep_failed: bool = opt(False, "keep the first attempt even if it failed, marked as failed")
    noisy_per_task: Demos = opt(0, "extra attempts with strong noise per task, marked as noisy")
    noisy_action_noise: NotNegative = opt(0.8, "action noise of the noisy attempts [action units]")
    noisy_gripper_flips: Share = opt(0.15, "share of reversed gripper commands in the noisy attempts")

    policy: str | None = opt(None, "policy that makes further attempts: a run folder or its model.safetensors", "model")
    policy_per_task: Demos = opt(0, "extra attempts of --policy per task, marked as policy")
    policy_noise: NotNegative = opt(0.1, "action noise of these attempts [action units]")
    policy_group: Count = opt(1, "attempts of --policy from each start, with other noise")

    out_dir: str = opt("demos", "folder that receives <suite>/<task>_demo.hdf5", group="run")
    lerobot: str | None = opt(
        None, "new folder for the demonstrations as a LeRobot data set as well, outside --out-dir"
    )
    seed: Annotated[int, Range(0, ATTEMPT_STRIDE - 3 * FIRST_NOISY)] = opt(
        0, "seed of the first demonstration's start; the others follow"
    )
    workers: Processes | None = opt(None, "worker processes; none: one per CPU core")

    @property
    def cameras(self) -> tuple[str, ...] | None:
        """Cameras of the images; None: the simulator's first."""
        return ("agentview", "eye_in_hand") if self.eye_in_hand else None

    def __post_init__(self) -> None:
        if not (self.demos_per_task or self.noisy_per_task or self.policy_per_task):
            raise ValueError("--demos-per-task 0: nothing to collect; give --noisy-per-task or --policy-per-task")
        if self.min_speed > self.max_speed:
            raise ValueError(f"--min-speed {self.min_speed} exceeds --max-speed {self.max_speed}")
        if self.lerobot and Path(self.out_dir).resolve() in (place := Path(self.lerobot).resolve(), *place.parents):
            raise ValueError(f"--lerobot {self.lerobot} lies in --out-dir, whose files are HDF5: give a folder outside")
        if self.policy_per_task and not self.policy:
            raise ValueError(f"policy_per_task {self.policy_per_task} needs a policy: give --policy CHECKPOINT")
        if self.policy and not self.policy_per_task:
            raise ValueError(f"--policy {self.policy} would play nothing: give --policy-per-task")
        for name in () if self.policy_per_task else ("policy_noise", "policy_group"):
            if (value := getattr(self, name)) != getattr(Config, name):
                flag = f"--{name.replace('_', '-')} {value:g}"
                raise ValueError(f"{flag} is for attempts of a policy: give --policy-per-task")
        for suite in self.suites:
            task_indices(suite, self.tasks)
            check_rendering(suite, self.cameras or (), "--eye-in-hand", fast_rendering=self.fast_rendering)


FOUR_BLOCKS = {"suites": ("tabletop_object",), "tasks": ("0", "1", "2", "3"), "image_size": 64}
PRESETS = {
    "paper": Config(),
    "small": Config(image_size=128),
    # 2 cm a step and little noise: an open-loop chunk then errs by less than a grasp forgives; the noisy attempts show
    # the world model what other actions do
    "tiny": Config(
        **FOUR_BLOCKS, demos_per_task=150, action_noise=0.08, min_speed=0.8, max_speed=1.0, noisy_per_task=20
    ),
    "smoke": Config(**FOUR_BLOCKS, demos_per_task=3, horizon=96, workers=1),
    # the pace of LIBERO's own demonstrations
    "libero": Config(
        suites=("libero_object", "libero_spatial"),
        image_size=128,
        fast_rendering=True,
        action_noise=0.1,
        min_speed=0.7,
        max_speed=1.0,
    ),
}
# Settings that only say how much is made and by whom; a collection can be continued with other values of these.
NOT_CONTENT = (
    "out_dir",
    "lerobot",
    "suites",
    "tasks",
    "demos_per_task",
    "noisy_per_task",
    "policy_per_task",
    "policy",
    "workers",
    "max_attempts",
)


# What collections of older versions, whose files lack these settings, were made with.
OLDER = {"fast_rendering": False, "mesh_cell": 0.0, "policy_noise": 0.1, "policy_group": 1, "horizon": None}


class Job(NamedTuple):
    config: Config
    suite: str
    task: int
    index: int  # of the demonstration in its file


class Made(NamedTuple):
    job: Job
    problem: str | None  # why there is no demonstration


def main(config: Config) -> list[Path]:
    """Make what is missing; return the files of all selected tasks.

    Raises:
        ValueError: unknown suite or task, or a file made with other settings.
        FileExistsError: `lerobot` is a folder that does not hold the demonstrations.
        RuntimeError: tasks lack demonstrations, for want of a success in `max_attempts` attempts or of a plan; all
            others have been made and kept.
    """
    suites = dict.fromkeys(config.suites)  # one may stand twice
    chosen = [(suite, task) for suite in suites for task in task_indices(suite, config.tasks)]
    paths = {key: demo_path(config, *key) for key in chosen}
    jobs = {key: _missing(config, *key) for key in chosen}
    todo = [job for key in chosen for job in jobs[key]]
    for suite in dict.fromkeys(job.suite for job in todo if job.index >= FIRST_ON_POLICY):
        _check_policy(config, suite)
    for key in chosen:
        if jobs[key]:
            _begin(config, *key)
    workers = (os.cpu_count() or 1) if config.workers is None else config.workers
    workers = min(workers, max(len(todo), 1))
    left = {key: len(jobs[key]) for key in chosen}
    for key in chosen:
        if not left[key]:
            _merge(config, *key)
    waiting = sum(len(list(_parts(path).glob("demo_*.hdf5"))) for path in paths.values())
    count = sum(map(_count, paths.values())) + waiting + len(todo)
    source = json_digest([_content(config), chosen])
    recorded = not config.lerobot or is_recorded(Path(config.lerobot), count, len(todo), source, config.image_size)
    results = run_jobs(make_demo, [(job,) for job in todo], workers if workers > 1 else 0, start=one_thread)
    problems: dict[tuple[str, int], list[str]] = {}
    for _, (job, problem), _ in tqdm(results, total=len(todo), unit="demo", disable=None, desc="demonstrations"):
        key = (job.suite, job.task)
        if problem:
            problems.setdefault(key, []).append(problem)
            continue
        left[key] -= 1
        if not left[key]:
            _merge(config, *key)
    for key, path in paths.items():
        if not left[key]:
            print(summary(path))
    if problems:
        missing = "\n".join(f"{len(own)} of {demo_path(config, *key).name}: {own[0]}" for key, own in problems.items())
        raise RuntimeError(f"demonstrations are missing; all others are kept:\n{missing}")
    if not recorded:
        write_lerobot(config.lerobot, _episodes(paths.values()), CONTROL_FREQ, source=source)
        print(f"{config.lerobot}: the same as a LeRobot data set")
    return list(paths.values())


def demo_path(config: Config, suite: str, task: int) -> Path:
    """Return the file of one task."""
    return Path(config.out_dir) / suite / f"{task_names(suite)[task]}_demo.hdf5"


def make_demo(job: Job) -> Made:
    """Make one demonstration (in a worker) and write it to the parts of its task, or say why there is none."""
    config = job.config
    kind = "policy" if job.index >= FIRST_ON_POLICY else "noisy" if job.index >= FIRST_NOISY else "expert"
    env = _environment(job.suite, job.task, config.image_size, config.cameras, config.fast_rendering, config.horizon)
    for attempt in range(config.max_attempts):
        # the number of its start: attempts of a policy are in groups from one start each
        first = (
            job.index if kind != "policy" else FIRST_ON_POLICY + (job.index - FIRST_ON_POLICY) // config.policy_group
        )
        start_seed = config.seed + first + attempt * ATTEMPT_STRIDE
        env.reset(seed=start_seed)
        speed = np.random.default_rng([start_seed, 1]).uniform(config.min_speed, config.max_speed)
        try:
            demonstrator = _demonstrator(config, env, kind, start_seed + job.index - first, speed)
        except NoPlanError as error:
            return Made(job, str(error))
        arrays, success = record(env, demonstrator, config.idle_steps)
        if success or kind != "expert" or config.keep_failed:
            break
    else:
        return Made(
            job,
            f"{job.suite}/{env.task_name}: no success in {config.max_attempts} attempts from seed "
            f"{config.seed + job.index}; lower action_noise (now {config.action_noise}) or raise max_attempts",
        )
    kind = "failed" if kind == "expert" and not success else kind
    part = _parts(demo_path(config, job.suite, job.task)) / f"demo_{job.index}.hdf5"
    # in memory, since HDF5 crashes where a disk is full
    with import_h5py().File("part", "w", driver="core", backing_store=False) as file:
        attrs = {"seed": start_seed, "attempt": attempt, "kind": kind}
        attrs |= {"policy": config.policy} if kind == "policy" else {"speed": speed}
        # LIBERO's own loader opens them; a hand without an arm has none
        arrays.setdefault("joint_states", np.zeros((len(arrays["actions"]), 7)))
        write_demo(file.create_group("data"), job.index, **arrays, success=success, attrs=attrs)
        file.flush()
        content = file.id.get_file_image()
    write_atomic(part, lambda tmp: tmp.write_bytes(content))
    return Made(job, None)


def _count(path: Path) -> int:
    if not path.exists():
        return 0
    with open_demo_file(path) as file:
        return len(demo_names(file["data"]))


def _episodes(paths: Iterable[Path]) -> Iterator[Episode]:
    for path in paths:
        yield from read_episodes(path, None, lambda *_: True, budget=Budget(0))


def summary(path: Path) -> str:
    """Describe a file in one line."""
    with open_demo_file(path) as file:
        data = file["data"]
        names = demo_names(data)
        kinds = [data[name].attrs["kind"] for name in names]
        steps = [int(data[name].attrs["num_samples"]) for name in names]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    return f"{path}: {counts}; {np.mean(steps):.0f} steps on average, {path.stat().st_size / 2**20:.1f} MiB"


def _demonstrator(config: Config, env: Env, kind: str, seed: int, speed: float) -> Demonstrator:
    if kind == "policy":
        return PolicyPlayer(_policy(config.policy), env, seed, config.policy_noise)
    return make_expert(
        env,
        seed,
        action_noise=config.noisy_action_noise if kind == "noisy" else config.action_noise,
        gripper_flips=config.noisy_gripper_flips if kind == "noisy" else 0.0,
        speed=speed,
    )


@lru_cache(maxsize=1)
def _policy(path: str) -> VLAPolicy:
    return VLAPolicy.load(path).for_playing()


@lru_cache(maxsize=2)
def _environment(
    suite: str, task: int, image_size: int, cameras: tuple[str, ...] | None, fast: bool, horizon: int | None
) -> Env:
    return make_env(suite, task, image_size, cameras=cameras, horizon=horizon, fast_rendering=fast)


def _content(config: Config) -> dict:
    cell = FAST.mesh_cell if config.fast_rendering else 0.0  # fast rendering once left the meshes as they are
    return {**{k: v for k, v in asdict(config).items() if k not in NOT_CONTENT}, "mesh_cell": cell}


def _parts(path: Path) -> Path:
    return path.with_suffix(".parts")


def _collection(path: Path) -> tuple[dict, set[str]]:
    """Read the settings of a task's file, and the names of its demonstrations."""
    with open_demo_file(path) as file:
        return json.loads(file["data"].attrs["env_args"]).get("collection", {}), set(demo_names(file["data"]))


def _missing(config: Config, suite: str, task: int) -> list[Job]:
    """Find the jobs of one task that neither its file nor its parts hold; check that both have the same settings."""
    path = demo_path(config, suite, task)
    settings, parts = _parts(path) / "settings.json", set(_parts(path).glob("demo_*.hdf5"))
    found = {path: _collection(path)} if path.exists() else {}
    found |= {settings: (read_json(settings), {part.stem for part in parts})} if parts else {}
    for where, (collection, _) in found.items():
        _check_settings(_content(config), collection, where)
    counts = {0: config.demos_per_task, FIRST_NOISY: config.noisy_per_task, FIRST_ON_POLICY: config.policy_per_task}
    indices = [first + i for first, count in counts.items() for i in range(count)]
    done = {name for _, names in found.values() for name in names}
    jobs = [Job(config, suite, task, i) for i in indices if f"demo_{i}" not in done]
    if jobs:
        visuals, attempts = visuals_of(suite), jobs[-1].index >= FIRST_ON_POLICY
        for where, (collection, names) in found.items():
            _check_additions(where, collection, names, visuals, attempts)
    return jobs


def _begin(config: Config, suite: str, task: int) -> None:
    """Write the settings of a task's parts, if there are no parts yet."""
    parts = _parts(demo_path(config, suite, task))
    if not any(parts.glob("demo_*.hdf5")):
        parts.mkdir(parents=True, exist_ok=True)
        about = {**_content(config), "visuals": visuals_of(suite), "policy_plays_on": True}
        write_json(parts / "settings.json", about)


def _check_policy(config: Config, suite: str) -> None:
    """Check, before anything is written, that `config.policy` can play a suite as it is rendered here."""
    header = read_header(config.policy)
    tasks = task_indices(suite, config.tasks)
    check_policy(config.policy, header, suite, tasks, config.image_size, config.fast_rendering)
    rendered = config.cameras or simulator_of(suite).env.available_cameras[:1]
    for camera in header.config.get("cameras", PolicyConfig.cameras):
        if find_camera(rendered, camera) is None:
            raise ValueError(f"{config.policy} sees camera {camera}, which is not rendered: give --eye-in-hand")


def _check_settings(content: dict, found: dict, where: Path) -> None:
    expected = json.loads(json.dumps(content))
    found = migrate(found, {"wrist": "eye_in_hand"}, {}, str(where))
    found = {**OLDER, **found}
    wrong = [f"{k}: {found.get(k)!r} there, {v!r} now" for k, v in expected.items() if found.get(k) != v]
    if wrong:
        raise ValueError(f"{where} was collected with other settings ({'; '.join(wrong)}); give another --out-dir")


def _check_additions(where: Path, found: dict, names: set[str], visuals: str | None, attempts: bool) -> None:
    """Check that new demonstrations look like those that are there; older files do not tell their visuals."""
    if found.get("visuals") not in (None, visuals):
        raise ValueError(
            f"{where} was collected with other settings (visuals: {found['visuals']!r} there, {visuals!r} now); give "
            "another --out-dir"
        )
    if attempts and not found.get("policy_plays_on") and any(_number(name) >= FIRST_ON_POLICY for name in names):
        raise ValueError(
            f"{where} holds attempts of an older version, in which a policy rested after success; now it plays on, so "
            "that a hand at rest is no sign of success: give another --out-dir"
        )


def _number(name: str) -> int:
    return int(name.split("_")[1])


def _merge(config: Config, suite: str, task: int) -> None:
    """Move the parts of a complete task into its file: a new file is written beside it and replaces it."""
    path = demo_path(config, suite, task)
    parts = sorted(_parts(path).glob("demo_*.hdf5"), key=lambda part: _number(part.stem))
    if parts:
        sources = [path, *parts] if path.exists() else parts
        first = _collection(path)[0] if path.exists() else read_json(_parts(path) / "settings.json")
        collection = {**_content(config), "visuals": first.get("visuals"), "policy_plays_on": True}
        check_room(path, sum(source.stat().st_size for source in sources))
        write_atomic(path, lambda tmp: _write_task(tmp, sources, collection, suite, task))
    for part in parts:  # before their settings, without which a part is of no use
        part.unlink()
    shutil.rmtree(_parts(path), ignore_errors=True)


def _write_task(path: Path, sources: list[Path], collection: dict, suite: str, task: int) -> None:
    with import_h5py().File(path, "w") as file:
        data = file.create_group("data")
        args = {"suite": suite, "task": task, "task_name": task_names(suite)[task], "collection": collection}
        simulator = simulator_of(suite)
        described = simulator.suites[suite].tasks[task]
        write_task_attrs(data, described.instruction, args, **simulator.env.demo_attrs(suite, described))
        for source in sources:
            with open_demo_file(source) as other:
                # a part that is in the file already: a kill came between moving the file and removing its parts
                for name in (name for name in demo_names(other["data"]) if name not in data):
                    other.copy(f"data/{name}", data)
        names = demo_names(data)
        data.attrs["num_demos"] = len(names)
        data.attrs["total"] = sum(int(data[name].attrs["num_samples"]) for name in names)


if __name__ == "__main__":
    run_script(main, Config, PRESETS, __doc__)
