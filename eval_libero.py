"""Success rates of policies in a simulator, on the same starts, with intervals (Tables 2 and 3).

    python eval_libero.py --policies runs/sft                                         # LIBERO, Table 2
    python eval_libero.py --policies runs/sft --perturb object:2.5 --out-dir runs/displaced                  # Table 3
    python eval_libero.py --preset small --policies runs/sft runs/rft --out-dir runs/tabletop
    python eval_libero.py --policies random runs/eval/episodes.jsonl --animate-failed 3 --out-dir runs/replayed

Every policy plays every (suite, task, initial state); the first one is the baseline of a paired comparison. As in the
paper the policy emits chunks of 8 actions that are executed open loop, and actions come from the deterministic ODE with
a random x_0; the sigma net is not used. x_0 is a function of (seed, task, initial state, chunk), so it is the same for
every policy and does not depend on how episodes are distributed over workers.

Suites: libero_spatial, libero_object, libero_goal, libero_10 (LIBERO; `python -m vlarft.sim.check` says what it needs)
and tabletop_spatial, tabletop_object, tabletop_goal, tabletop_long (in this package): 10 tasks x 50 initial states
each, a horizon per suite; in LIBERO ten wait steps first, and images with both axes flipped.

Reads policies: a checkpoint of train_sft.py, train_rft.py or train_rl.py, or its run folder; `random`, uniform actions;
or the episodes.jsonl of an earlier evaluation, whose actions are replayed open loop.
Writes out_dir/episodes.jsonl (one line an episode, appended as they end: the same command resumes an interrupted
evaluation), out_dir/results.json (rates with 95 % Wilson intervals per policy, suite and task; paired differences),
out_dir/*.gif or *.mp4. `--lerobot DIR` plays the recorded actions again at the end, and writes what the cameras of the
policy saw at every step, and the outcomes, as a LeRobot data set, whole or not at all. When a worker process dies,
another plays its episodes again, and the report counts them. Each worker has its own copy of the policy, on the GPU
where there is one.

Differences from the paper: none in the protocol. Options: `--execute 4` plans again after 4 actions; `--noise zero`
starts the ODE at x_0 = 0, `--noise gripper` at 0 except in the gripper's dimension, and `--noise stochastic` samples
the policy with its sigma net's noise; `--plan 8` makes 8 chunks, the first from x_0 as `--noise` says and the others
from random x_0, imagines them and plays the one that a success model scores best; `--fast-rendering` changes pixels
(see vlarft/sim/gl.py). All are recorded in results.json. LIBERO places fixtures by the global random state; here it is
seeded with 0 before every episode, so that an episode does not depend on those before it.
"""

import functools
import json
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from tqdm import tqdm

from vlarft.data.convention import check_same_images, warn_other_contexts
from vlarft.data.lerobot_writer import is_recorded, write_lerobot
from vlarft.data.video import import_av
from vlarft.planning import Planner
from vlarft.policy import VLAPolicy
from vlarft.run.checkpoint import (
    append_line,
    checkpoint_file,
    file_digest,
    json_digest,
    model_digest,
    open_run,
    read_header,
    read_json,
    write_atomic,
    write_json,
)
from vlarft.run.config import Count, Processes, Range, Rows, Side, Whole, opt, to_dict
from vlarft.run.pictures import import_pillow, save_gif, save_mp4
from vlarft.run.script import run_script
from vlarft.sim import LIBERO_SUITES, NUM_INITIAL_STATES, TABLETOP_SUITES, task_names
from vlarft.sim.env import CONTROL_FREQ
from vlarft.sim.evaluate import Actor, PlanningActor, PlayNoise, PolicyActor, RandomActor, ReplayActor, play_episodes
from vlarft.sim.perturb import Perturbation
from vlarft.sim.policy_check import check_policy
from vlarft.sim.replay import replay_episodes, replay_frames
from vlarft.sim.suites import check_rendering, instructions_of, task_indices, visuals_of
from vlarft.sim.workers import one_thread, run_jobs
from vlarft.statistics import paired_difference, wilson_interval
from vlarft.success import SuccessModel, check_judge
from vlarft.world_model import WorldModel


@dataclass(frozen=True)
class Config:
    """One evaluation; the defaults are LIBERO's protocol."""

    policies: tuple[str, ...] = opt(
        ("runs/sft",), "run folders, checkpoints, episodes.jsonl files, or random; the first is the baseline", "model"
    )
    noise: PlayNoise = opt("sampled", "x_0 of the ODE: sampled, zero, gripper (0 elsewhere); or the stochastic policy")
    num_flow_steps: Rows = opt(10, "Euler steps of the ODE (K in Sec. 3.3)")
    execute: Rows = opt(8, "actions of a chunk that are executed before the next is planned (8: the whole chunk)")
    plan: Rows = opt(1, "chunks of different x_0 that are imagined, the best of which is played; 1: no choice")
    plan_chunks: Rows = opt(2, "chunks that --plan imagines ahead, the candidate included")
    world_model: str | None = opt(None, "world model that --plan imagines with: run folder or file")
    success_model: str | None = opt(None, "success model that --plan chooses by: run folder or file")

    suites: tuple[str, ...] = opt(
        tuple(LIBERO_SUITES),
        "suites to play: libero_spatial, _object, _goal, _10; tabletop_spatial, _object, _goal, _long",
        group="evaluation",
    )
    tasks: tuple[str, ...] | None = opt(None, "task numbers or names in each suite; none: all")
    episodes: Annotated[int, Range(1, NUM_INITIAL_STATES)] = opt(
        NUM_INITIAL_STATES, "initial states per task, from 0 (LIBERO's protocol: 50)"
    )
    horizon: Count | None = opt(
        None, "actions after which an episode ends without success; none: the suite's limit, LIBERO's protocol"
    )
    perturb: str | None = opt(
        None, "perturbed starts (Tables 3, 8), cm and for the robot mm: object:2.5, robot:20, all:5/5/50, object:5:x"
    )
    image_size: Side | None = opt(256, "side of the rendered images, which the policy resizes; none: its own [px]")
    fast_rendering: bool = opt(False, "LIBERO without antialiasing and reflections, with simpler meshes, see sim/gl.py")
    batch_size: Rows = opt(10, "episodes that a worker plays side by side, with one policy call for all")

    out_dir: str = opt("runs/eval", "folder that the run writes", group="run")
    seed: Whole = opt(0, "seed of x_0")
    workers: Processes = opt(os.cpu_count() or 1, "worker processes, one thread each; 0 plays in this process")
    animate: Whole = opt(0, "episodes per policy to film, the same starts for every policy")
    animate_failed: Whole = opt(0, "failed episodes per policy to film")
    animate_starts: tuple[str, ...] = opt((), "episodes to film, as suite/task number/initial state")
    animate_size: Side = opt(160, "side of the films [px]")
    animate_format: Literal["gif", "mp4"] = opt("gif", "format of the films")
    lerobot: str | None = opt(
        None, "new folder for the episodes as a LeRobot data set; with several policies DIR_policy0, DIR_policy1, ..."
    )


TABLETOP = {"suites": tuple(TABLETOP_SUITES), "image_size": None}
PRESETS = {
    "paper": Config(),
    "small": Config(**TABLETOP),
    "libero": Config(suites=("libero_object", "libero_spatial"), image_size=None, fast_rendering=True),
    "tiny": Config(**{**TABLETOP, "suites": ("tabletop_object",)}, tasks=("0", "1", "2", "3")),
    "smoke": Config(
        **{**TABLETOP, "suites": ("tabletop_object",)},
        tasks=("0",),
        episodes=2,
        horizon=64,
        num_flow_steps=2,
        batch_size=2,
        workers=0,
    ),
}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.lru_cache(maxsize=2)
def _policy(path: str, digest: str) -> VLAPolicy:
    return VLAPolicy.load(path, _device()).for_playing()


@functools.lru_cache(maxsize=1)
def _planner(path: str, digest: str, world_model: str, success_model: str, chunks: int) -> Planner:
    models = WorldModel.load(world_model, _device()), SuccessModel.load(success_model, _device())
    return Planner(_policy(path, digest), *(model.requires_grad_(False) for model in models), chunks)


@functools.lru_cache(maxsize=2)
def _recording(path: str, digest: str) -> dict[tuple[str, int], dict[int, list]]:
    """Read the actions of an episodes.jsonl: (suite, task) -> initial state -> actions; a later line replaces an
    earlier one.

    Raises:
        ValueError: a line is no record of an episode, or the records are of several policies.
    """
    found: dict[tuple[str, int], dict[int, list]] = {}
    policies = set()
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            r = json.loads(line)
            found.setdefault((r["suite"], r["task"]), {})[r["init_state"]] = r["actions"]
            policies.add(r.get("policy"))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a record of an episode ({error!r})") from error
    if len(policies) > 1:
        names = ", ".join(sorted(map(str, policies)))
        raise ValueError(f"{path} holds episodes of {len(policies)} policies, {names}: keep the lines of one")
    return found


def play(cfg: Config, path: str, digest: str, suite: str, task: int, states: list[int]) -> list[dict]:
    """Play one task from some initial states: the records of `play_episodes`, with the policy's path and digest."""
    actor: Actor
    size = cfg.image_size or 64
    if path == "random":
        actor = RandomActor(suite, task, seed=cfg.seed)
    elif path.endswith(".jsonl"):
        actor = ReplayActor(_recording(path, digest)[suite, task], cfg.execute)
    else:
        policy = _policy(path, digest)
        size = cfg.image_size or policy.vlm.image_size
        options = {"seed": cfg.seed, "noise": cfg.noise, "num_flow_steps": cfg.num_flow_steps}
        actor = PolicyActor(policy, suite, task, **options)
        if cfg.plan > 1:
            planner = _planner(path, digest, cfg.world_model, cfg.success_model, cfg.plan_chunks)
            actor = PlanningActor(planner, cfg.plan, suite, task, cfg.execute, **options)
    options = {"image_size": size, "execute": cfg.execute, "horizon": cfg.horizon, **_starts_and_pixels(cfg)}
    return [{"policy": path, "digest": digest, **r} for r in play_episodes(actor, suite, task, states, **options)]


def _perturbation(cfg: Config) -> Perturbation | None:
    return None if cfg.perturb is None else Perturbation.parse(cfg.perturb)


def _starts_and_pixels(cfg: Config) -> dict:
    return {"perturb": _perturbation(cfg), "fast_rendering": cfg.fast_rendering}


def summarise(cfg: Config, records: list[dict], digests: dict[str, str]) -> dict:
    """Compute rates with Wilson intervals per policy, suite and task, and differences to the first policy on the same
    starts.
    """
    outcome = {(r["policy"], r["suite"], r["task"], r["init_state"]): r["success"] for r in records}
    starts = sorted({k[1:] for k in outcome})

    def rate(policy: str, chosen: list) -> dict:
        wins = sum(outcome[(policy, *s)] for s in chosen)
        _, low, high = wilson_interval(wins, len(chosen))
        return {"success": wins, "episodes": len(chosen), "rate": wins / len(chosen), "low": low, "high": high}

    def against_first(policy: str, chosen: list) -> dict:
        baseline, own = ([outcome[(p, *s)] for s in chosen] for p in (cfg.policies[0], policy))
        return paired_difference(baseline, own)._asdict()

    policies = []
    for path in cfg.policies:
        suites = {}
        for suite in cfg.suites:
            of_suite = [s for s in starts if s[0] == suite]
            tasks = {
                task_names(suite)[t]: rate(path, [s for s in of_suite if s[1] == t])
                for t in task_indices(suite, cfg.tasks)
            }
            suites[suite] = {"all": rate(path, of_suite), "tasks": tasks}
        own = [r["chunk_ms"] for r in records if r["policy"] == path and "chunk_ms" in r]
        entry = {"policy": path, "digest": digests[path], "all": rate(path, starts), "suites": suites}
        if own:
            entry["chunk_ms"] = sum(own) / len(own)
        if path != cfg.policies[0]:
            entry["against_first"] = against_first(path, starts)
            for name, part in suites.items():
                part["against_first"] = against_first(path, [s for s in starts if s[0] == name])
        policies.append(entry)
    notes = {
        "tasks": {suite: task_indices(suite, cfg.tasks) for suite in cfg.suites},
        "visuals": sorted({f"{r['suite']}: {r['visuals']}" for r in records if "visuals" in r}),
        "rejected_starts": sum(r["rejected_starts"] for r in records if r["policy"] == cfg.policies[0]),
        "played_again": sum(r["worker_deaths"] > 0 for r in records),
    }
    return {"config": to_dict(cfg), "torch": torch.__version__, **notes, "policies": policies}


def print_table(results: dict) -> None:
    """Print, per policy, a line per suite and task with rate and interval, and the difference to the first policy."""
    for line in results["visuals"]:
        print(line)
    if results["config"]["perturb"]:
        print(f"perturbed starts {results['config']['perturb']}: {results['rejected_starts']} samples rejected")
    if results["config"]["horizon"]:
        print(f"an episode ends after {results['config']['horizon']} actions, if the suite's limit is not below")
    if results["played_again"]:
        print(f"{results['played_again']} episodes were played again, since a worker process died over them")
    for entry in results["policies"]:
        took = f"  ({entry['chunk_ms']:.0f} ms a chunk)" if "chunk_ms" in entry else ""
        print(f"{entry['policy']}{took}")
        rows = []
        for suite, part in entry["suites"].items():
            rows += [(suite, part["all"], part), *((f"  {t}", rate, {}) for t, rate in part["tasks"].items())]
        for name, r, found in [*rows, ("all", entry["all"], entry)]:
            shown = f"{100 * r['rate']:5.1f} %  [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"
            print(f"  {name:<60} {shown}  {r['success']}/{r['episodes']}")
            if d := found.get("against_first"):
                print(
                    f"    against the first policy, same starts: {100 * d['difference']:+.1f} points "
                    f"[{100 * d['low']:+.1f}, {100 * d['high']:+.1f}], McNemar p = {d['p_value']:.3g}"
                )


def film(cfg: Config, records: list[dict]) -> None:
    """Write films of the chosen episodes: the recorded actions played again."""
    for number, path in enumerate(cfg.policies):
        # starts spread over tasks: state 0 of each task, then state 1, ...
        own = sorted(
            (r for r in records if r["policy"] == path), key=lambda r: (r["init_state"], r["suite"], r["task"])
        )
        chosen = {id(r): r for r in own[: cfg.animate]}
        chosen |= {id(r): r for r in [r for r in own if not r["success"]][: cfg.animate_failed]}
        chosen |= {id(r): r for r in own if f"{r['suite']}/{r['task']}/{r['init_state']}" in cfg.animate_starts}
        for r in chosen.values():
            start = (r["suite"], r["task"], r["init_state"])
            options = {"size": cfg.animate_size, **_starts_and_pixels(cfg)}
            frames = replay_frames(*start, r["actions"], **options)
            end = "success" if r["success"] else "failure"
            name = Path(cfg.out_dir) / f"policy{number}_{r['suite']}_{r['task']}_{r['init_state']}_{end}"
            if cfg.animate_format == "mp4":
                save_mp4(f"{name}.mp4", frames, frames_per_second=10)
            else:
                save_gif(f"{name}.gif", frames, frames_per_second=10, hold_last=1.5)


def recordings(cfg: Config, records: list[dict]) -> dict[str, Path]:
    """List the LeRobot data sets that are still to be written: policy -> folder, none of which exists."""
    found = {}
    for number, path in enumerate(cfg.policies if cfg.lerobot else ()):
        root = Path(cfg.lerobot if len(cfg.policies) == 1 else f"{cfg.lerobot}_policy{number}")
        total = cfg.episodes * sum(len(task_indices(suite, cfg.tasks)) for suite in cfg.suites)
        own = [r for r in records if r["policy"] == path]
        if not is_recorded(root, total, total - len(own), _source(cfg, own), cfg.image_size):
            found[path] = root
    return found


def _source(cfg: Config, records: list[dict]) -> str:
    played = sorted((r["suite"], r["task"], r["init_state"], r["actions"]) for r in records)
    return json_digest([cfg.image_size, cfg.fast_rendering, cfg.perturb, played])


def write_recordings(cfg: Config, records: list[dict], folders: dict[str, Path]) -> None:
    """Play episodes again and write what the policies saw and did, in the order of suite, task and initial state."""
    for path, root in folders.items():
        own = [r for r in records if r["policy"] == path]
        own.sort(key=lambda r: (cfg.suites.index(r["suite"]), r["task"], r["init_state"]))
        options = {"size": cfg.image_size or 64, **_starts_and_pixels(cfg)}
        if not path.endswith(".jsonl"):
            policy = _policy(path, own[0]["digest"])
            options |= {"size": cfg.image_size or policy.vlm.image_size, "cameras": policy.cfg.cameras}
        episodes = tqdm(replay_episodes(own, **options), total=len(own), desc=f"recording {root}", disable=None)
        print(f"{write_lerobot(root, episodes, CONTROL_FREQ, source=_source(cfg, own))} episodes -> {root}")


def check(cfg: Config) -> dict[str, str]:
    """Find what is wrong before the first episode; return path -> digest of each checkpoint."""
    if cfg.animate or cfg.animate_failed or cfg.animate_starts:  # the films come after the work
        (import_pillow if cfg.animate_format == "gif" else import_av)()
    if twice := [suite for suite in set(cfg.suites) if cfg.suites.count(suite) > 1]:
        raise ValueError(f"suites names {twice[0]} twice")
    for suite in cfg.suites:
        task_indices(suite, cfg.tasks)
        check_rendering(suite, (), fast_rendering=cfg.fast_rendering)
    if len({checkpoint_file(path).resolve() for path in cfg.policies}) < len(cfg.policies):
        raise ValueError(f"policies name a checkpoint twice: {', '.join(cfg.policies)}")
    if cfg.execute > 8 and "random" in cfg.policies:
        raise ValueError(f"execute must lie in 1..8, the chunk of policy random; got {cfg.execute}")
    if cfg.lerobot and "random" in cfg.policies:
        raise ValueError("--lerobot: the random policy's gripper neither opens nor closes, which training refuses")
    known = {
        f"{s}/{t}/{state}" for s in cfg.suites for t in task_indices(s, cfg.tasks) for state in range(cfg.episodes)
    }
    if missing := [start for start in cfg.animate_starts if start not in known]:
        raise ValueError(f"animate_starts: no episode {', '.join(missing)} is played; give suite/task number/state")
    _perturbation(cfg)
    check_plan(cfg)
    digests = {}
    for path in cfg.policies:
        if path == "random":
            digests[path] = "random"
            continue
        if path.endswith(".jsonl"):
            if not Path(path).is_file():
                raise FileNotFoundError(f"no recorded episodes at {path}")
            warn_other_starts(cfg, path)
            digests[path] = digest = file_digest(path)
            for suite, task in ((s, t) for s in cfg.suites for t in task_indices(s, cfg.tasks)):
                if lost := set(range(cfg.episodes)) - set(_recording(path, digest).get((suite, task), {})):
                    raise ValueError(
                        f"{path} has no episode of {suite}, task {task}, initial state {min(lost)}; "
                        "choose --suites, --tasks and --episodes that it holds"
                    )
            continue
        header = read_header(path)
        if header.cls != VLAPolicy.__name__:
            raise ValueError(
                f"{path} holds a {header.cls}, expected a VLAPolicy, as train_sft.py and train_rft.py write it"
            )
        for suite in cfg.suites:
            check_policy(path, header, suite, task_indices(suite, cfg.tasks), cfg.image_size, cfg.fast_rendering)
        chunk = header.config["flow"]["chunk"]
        if cfg.execute > chunk:
            raise ValueError(f"execute must lie in 1..{chunk}, the chunk of {path}; got {cfg.execute}")
        if cfg.noise == "stochastic" and not header.config["has_sigma_net"]:
            raise ValueError(f"noise stochastic: {path} has no sigma net, which train_rft.py adds")
        steps = header.config["flow"].get("num_steps", cfg.num_flow_steps)
        if cfg.noise == "stochastic" and steps != cfg.num_flow_steps:
            raise ValueError(
                f"noise stochastic: {path} was fine-tuned with {steps} flow steps, --num-flow-steps is "
                f"{cfg.num_flow_steps}; its sigma net knows no other number"
            )
        if cfg.noise == "stochastic" and header.extra.get("rft", {}).get("variant") == "flow_sde":
            raise ValueError(f"noise stochastic: {path} was fine-tuned with flow_sde; its sigma net never trained")
        digests[path] = "+".join(map(model_digest, players(cfg, path)))
    return digests


def warn_other_starts(cfg: Config, path: str) -> None:
    """Warn if the evaluation that a recording is of, where its config.json is there, perturbed the starts otherwise."""
    place = Path(path).with_name("config.json")
    before = read_json(place).get("perturb") if place.is_file() else cfg.perturb
    if before != cfg.perturb:
        warnings.warn(
            f"{path} was recorded with --perturb {before or 'none'}, this run has {cfg.perturb or 'none'}: its actions "
            "are of other starts",
            stacklevel=2,
        )


def players(cfg: Config, path: str) -> list[str]:
    """List what plays: the policy and, with a choice, the models that choose."""
    return [path] if cfg.plan == 1 else [path, cfg.world_model, cfg.success_model]


NEEDED = "suite", "task", "init_state", "success", "rejected_starts", "worker_deaths"  # of a record, to go on with it


def earlier_records(cfg: Config, digests: dict[str, str]) -> list[dict]:
    """Return what an interrupted evaluation already played, by policies that have not changed since. Say what is left
    out, and take it and a line that a kill cut short out of episodes.jsonl.
    """
    log = Path(cfg.out_dir) / "episodes.jsonl"
    text, records, others, damaged = log.read_text(errors="replace") if log.is_file() else "", [], 0, 0
    changed: set[str] = set()
    places = {checkpoint_file(path).resolve(): path for path in cfg.policies}
    known = {path: {digest} for path, digest in digests.items()}
    for path in (path for path in known if text and Path(path).exists()):  # older versions took the files' digests
        known[path].add("+".join(map(file_digest, players(cfg, path))))
    for line in text.splitlines():
        try:
            record = json.loads(line)
            path = places.get(checkpoint_file(record["policy"]).resolve())  # its spelling may have been another one
            digest, *_ = (record[key] for key in ("digest", *NEEDED))
        except (ValueError, LookupError, TypeError, RecursionError):
            damaged += 1
            continue
        if digest in known.get(path, ()):
            records.append({**record, "policy": path, "digest": digests[path]})
        else:
            others += 1
            changed |= {path} - {None}
    if others:
        print(f"{log}: {others} episodes of policies that have changed since are played again", file=sys.stderr)
        for name in ("results.json", *(f"policy{cfg.policies.index(path)}_*" for path in changed)):
            for stale in Path(cfg.out_dir).glob(name):
                stale.unlink()
    if damaged:
        print(
            f"{log}: {damaged} lines are no episodes, as one that a kill cut short, and are left out", file=sys.stderr
        )
    kept = "".join(json.dumps(r) + "\n" for r in records)
    if kept != text:
        write_atomic(log, lambda tmp: tmp.write_text(kept))
    return records


def check_visuals(cfg: Config, records: list[dict], suite: str) -> None:
    """Check that the episodes of a suite that are left to play look like those that have been played.

    Raises:
        ValueError: those were rendered with other meshes or textures.
    """
    now = visuals_of(suite, fast_rendering=cfg.fast_rendering)
    if other := {r["visuals"] for r in records if r["suite"] == suite and r.get("visuals", now) != now}:
        raise ValueError(
            f"{cfg.out_dir} holds episodes of {suite} with {min(other)}, the others would be played with {now}: give "
            "another --out-dir"
        )


CUDA_CONTEXT = 1 << 30  # bytes of a process that uses a GPU, before any model


def workers_of(cfg: Config) -> int:
    """Return how many workers play: on a GPU, no more than its memory has room for their copies of the models."""
    policies = [path for path in cfg.policies if path != "random" and not path.endswith(".jsonl")]
    if not torch.cuda.is_available() or not policies:
        return cfg.workers
    judges = players(cfg, "")[1:]
    # twice a file, which may be bfloat16; of the policies, as many as `_policy` keeps
    sizes = sorted(2 * checkpoint_file(path).stat().st_size for path in policies)[-2:]
    each = CUDA_CONTEXT + sum(sizes) + sum(2 * checkpoint_file(path).stat().st_size for path in judges)
    room = max(1, int(torch.cuda.mem_get_info()[0] // each))
    if room < cfg.workers:
        print(f"{room} workers in place of {cfg.workers}: the GPU has no room for more copies", file=sys.stderr)
    return min(cfg.workers, room)


def check_plan(cfg: Config) -> None:
    """Find what is wrong with --plan before the first episode."""
    if cfg.plan == 1:
        if cfg.world_model is not None or cfg.success_model is not None:
            raise ValueError("--world-model and --success-model choose among chunks, but --plan is 1: say how many")
        return
    if cfg.world_model is None or cfg.success_model is None:
        raise ValueError(f"--plan {cfg.plan} imagines and judges: give --world-model and --success-model")
    if cfg.noise == "stochastic":
        raise ValueError("--plan chooses among chunks of the deterministic flow: give --noise sampled or zero")
    if others := [path for path in cfg.policies if path == "random" or path.endswith(".jsonl")]:
        raise ValueError(f"--plan chooses among a policy's chunks; {', '.join(others)} has none: evaluate it alone")
    model, judge = WorldModel.load(cfg.world_model), SuccessModel.load(cfg.success_model)
    facts = read_header(cfg.world_model).extra
    size = model.cfg.tokenizer.image_size
    texts = [text for suite in cfg.suites for text in instructions_of(suite, cfg.tasks)]
    check_judge(cfg.success_model, texts, facts, f"world model {cfg.world_model}", size[0], cfg.world_model)
    warn_other_contexts(facts, f"world model {cfg.world_model}", -1)
    for path in cfg.policies:
        policy = VLAPolicy.load(path)
        Planner(policy, model, judge, cfg.plan_chunks)  # raises if they do not fit together
        side = cfg.image_size or policy.vlm.image_size
        if size != (side, side):
            raise ValueError(
                f"{cfg.world_model} imagines images of {size[0]}x{size[1]}, {path} is played with {side}x{side}: give "
                f"--image-size {size[0]}"
            )
        check_same_images(read_header(path).extra, f"policy {path}", facts, f"world model {cfg.world_model}")


def main(cfg: Config) -> dict:
    """Play what is missing; return what results.json holds."""
    digests = check(cfg)
    out_dir = Path(cfg.out_dir)
    for suite in cfg.suites if not (out_dir / "config.json").is_file() else ():
        visuals_of(suite)  # raises if LIBERO is missing, before anything is written
    films = (f"animate_{k}" for k in ("failed", "starts", "size", "format"))
    open_run(out_dir, cfg, ignore=("workers", "animate", *films, "lerobot"))
    records = earlier_records(cfg, digests)
    folders = recordings(cfg, records)
    done = {(r["policy"], r["suite"], r["task"], r["init_state"]) for r in records}

    jobs = []
    for path in cfg.policies:
        for suite in cfg.suites:
            for task in task_indices(suite, cfg.tasks):
                todo = [s for s in range(cfg.episodes) if (path, suite, task, s) not in done]
                for k in range(0, len(todo), cfg.batch_size):
                    jobs.append((cfg, path, digests[path], suite, task, todo[k : k + cfg.batch_size]))

    for suite in dict.fromkeys(job[3] for job in jobs):
        check_visuals(cfg, records, suite)

    total = sum(len(j[-1]) for j in jobs) + len(done)
    with (
        (out_dir / "episodes.jsonl").open("ab", buffering=0) as file,
        tqdm(total=total, initial=len(done), desc="episodes", mininterval=1) as bar,
    ):
        for _, played, deaths in run_jobs(play, jobs, workers_of(cfg), start=one_thread):
            for record in played:
                record["worker_deaths"] = deaths
                records.append(record)
                append_line(file, json.dumps(record))
                bar.update()

    results = summarise(cfg, records, digests)
    write_json(out_dir / "results.json", results)
    print_table(results)
    film(cfg, records)
    write_recordings(cfg, records, folders)
    return results


if __name__ == "__main__":
    run_script(main, Config, PRESETS, __doc__)
