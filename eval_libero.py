"""Success rates of policies in a simulator, on the same starts, with intervals (Tables 2 and 3).

Every policy plays every (suite, task, initial state); the first one is the baseline of a paired comparison. As in the
paper the policy emits chunks of 8 actions that are executed open loop, and actions come from the deterministic ODE with
a random x0; the sigma net is not used. x0 is drawn per (seed, task, initial state, chunk), so it is the same for every
policy and does not depend on how episodes are spread over workers.

Suites: tabletop_spatial, tabletop_object, tabletop_goal, tabletop_long (the embedded benchmark; LIBERO's interface and
protocol: 10 tasks x 50 initial states, a horizon per suite).

    python eval_libero.py --policies runs/sft/model.safetensors --suites tabletop_object
    python eval_libero.py --policies runs/sft/model.safetensors runs/rft/model.safetensors --tasks 0 1 2 3 --animate 2
    python eval_libero.py --policies runs/sft/model.safetensors --perturb object:2.5

Reads checkpoints of train_sft.py and train_rft.py. Writes out_dir/episodes.jsonl (one line an episode, appended as they
end: an interrupted evaluation resumes with the same command), out_dir/results.json (rates with 95 % Wilson intervals
per policy, suite and task; paired differences), out_dir/*.gif.

Deviations from the paper: none in the protocol. `--execute 4` re-plans earlier, `--noise zero` starts the ODE at 0 and
`--noise stochastic` plays the policy with the noise of its fine-tuning; all are reported in results.json.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from vlarft.checkpoint import open_run, read_header, write_json
from vlarft.config import opt, parse, to_dict
from vlarft.metrics import paired_difference, wilson_interval
from vlarft.pictures import save_gif
from vlarft.policy import VLAPolicy
from vlarft.sim import NUM_INITIAL_STATES, task_index, task_names
from vlarft.sim.evaluate import PlayNoise, play_episodes
from vlarft.sim.perturb import Perturbation
from vlarft.sim.replay import replay_frames


@dataclass(frozen=True)
class Config:
    policies: tuple[str, ...] = opt(("runs/sft/model.safetensors",), "checkpoints; the first is the baseline")
    suites: tuple[str, ...] = opt(
        ("tabletop_spatial", "tabletop_object", "tabletop_goal", "tabletop_long"), "suites to play"
    )
    tasks: tuple[str, ...] | None = opt(None, "task numbers or names of each suite; none plays all")
    episodes: int = opt(NUM_INITIAL_STATES, "initial states per task, from 0 (50 in LIBERO's protocol)")
    perturb: str | None = opt(None, "perturbation of the starts (Table 3), e.g. object:2.5, goal:5, robot:20")
    execute: int = opt(8, "actions of a chunk that are executed before the next is planned (8, the whole chunk)")
    num_flow_steps: int = opt(10, "Euler steps of the ODE (K, Sec. 3.3)")
    noise: PlayNoise = opt("sampled", "x0 of the ODE; or stochastic: the policy that train_rft.py samples")
    seed: int = opt(0, "of x0 and of the perturbations")
    workers: int = opt(os.cpu_count() or 1, "worker processes, one thread each; 0 plays in this process")
    batch_size: int = opt(10, "episodes that a worker plays side by side, one policy call for all")
    animate: int = opt(0, "episodes per policy to write as GIF, the same starts for every policy")
    animate_size: int = opt(160, "side of the animation [px]")
    out_dir: str = opt("runs/eval", "folder that the run writes")


PRESETS = {
    "paper": Config(),
    "small": Config(),
    "tiny": Config(suites=("tabletop_object",), tasks=("0", "1", "2", "3")),
    "smoke": Config(suites=("tabletop_object",), tasks=("0",), episodes=2, batch_size=2),
}


@functools.lru_cache(maxsize=2)
def _policy(path: str, digest: str) -> VLAPolicy:
    return VLAPolicy.load(path).eval()


def _one_thread() -> None:
    torch.set_num_threads(1)


def play(cfg: Config, path: str, digest: str, suite: str, task: int, states: list[int]) -> list[dict]:
    """Records of `play_episodes` for one task and some initial states, with the policy's path and digest."""
    options = {"seed": cfg.seed, "noise": cfg.noise, "execute": cfg.execute, "num_flow_steps": cfg.num_flow_steps}
    records = play_episodes(_policy(path, digest), suite, task, states, **options, perturb=_perturbation(cfg))
    return [{"policy": path, "digest": digest, **record} for record in records]


def _perturbation(cfg: Config) -> Perturbation | None:
    return None if cfg.perturb is None else Perturbation.parse(cfg.perturb)


def play_all(cfg: Config, jobs: list[tuple]) -> Iterator[list[dict]]:
    """Results of `play` for each job as they come, from worker processes (from this one when `workers` is 0).

    Raises:
        RuntimeError: a worker died; what came before has been yielded.
    """
    if cfg.workers == 0:
        yield from (play(cfg, *job) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(cfg.workers, max(1, len(jobs))), context, _one_thread) as pool:
        futures = [pool.submit(play, cfg, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died (out of memory?); finished episodes are kept: run the same command again to go "
                "on, with fewer --workers if memory is short"
            ) from error
        finally:  # also when the caller is interrupted
            pool.shutdown(wait=False, cancel_futures=True)


def summarise(cfg: Config, records: list[dict], digests: dict[str, str]) -> dict:
    """Rates with Wilson intervals per policy, suite and task; differences to the first policy on the same starts."""
    outcome = {(r["policy"], r["suite"], r["task"], r["init_state"]): r["success"] for r in records}
    starts = sorted({k[1:] for k in outcome})

    def rate(policy: str, chosen: list) -> dict:
        wins = sum(outcome[(policy, *s)] for s in chosen)
        _, low, high = wilson_interval(wins, len(chosen))
        return {"success": wins, "episodes": len(chosen), "rate": wins / len(chosen), "low": low, "high": high}

    policies = []
    for path in cfg.policies:
        suites = {}
        for suite in cfg.suites:
            of_suite = [s for s in starts if s[0] == suite]
            tasks = {task_names(suite)[t]: rate(path, [s for s in of_suite if s[1] == t]) for t in _tasks(cfg, suite)}
            suites[suite] = {"all": rate(path, of_suite), "tasks": tasks}
        entry = {"policy": path, "digest": digests[path], "all": rate(path, starts), "suites": suites}
        if path != cfg.policies[0]:
            baseline, own = ([outcome[(p, *s)] for s in starts] for p in (cfg.policies[0], path))
            entry["against_first"] = paired_difference(baseline, own)._asdict()
        policies.append(entry)
    return {"config": to_dict(cfg), "torch": torch.__version__, "policies": policies}


def print_table(results: dict) -> None:
    """One line per policy and suite: success rate with its interval."""
    for entry in results["policies"]:
        print(entry["policy"])
        rows = [(suite, s["all"]) for suite, s in entry["suites"].items()]
        rows += [(f"  {t}", r) for s in entry["suites"].values() for t, r in s["tasks"].items()]
        for name, r in [*rows, ("all", entry["all"])]:
            shown = f"{100 * r['rate']:5.1f} %  [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"
            print(f"  {name:<60} {shown}  {r['success']}/{r['episodes']}")
        if d := entry.get("against_first"):
            print(
                f"  against the first policy, same starts: {100 * d['difference']:+.1f} points "
                f"[{100 * d['low']:+.1f}, {100 * d['high']:+.1f}], McNemar p = {d['p_value']:.3g}"
            )


def _tasks(cfg: Config, suite: str) -> list[int]:
    return [task_index(suite, t) for t in (cfg.tasks if cfg.tasks is not None else range(len(task_names(suite))))]


def check(cfg: Config) -> dict[str, str]:
    """Everything that can be wrong, before the first episode; returns path -> digest of each checkpoint."""
    for suite in cfg.suites:
        _tasks(cfg, suite)
    if not 1 <= cfg.episodes <= NUM_INITIAL_STATES:
        raise ValueError(f"episodes must lie in 1..{NUM_INITIAL_STATES}, got {cfg.episodes}")
    if len(set(cfg.policies)) < len(cfg.policies):
        raise ValueError(f"policies name a checkpoint twice: {', '.join(cfg.policies)}")
    _perturbation(cfg)
    digests = {}
    for path in cfg.policies:
        header = read_header(path)
        if header.cls != VLAPolicy.__name__:
            raise ValueError(
                f"{path} holds a {header.cls}, expected a VLAPolicy, as train_sft.py and train_rft.py write it"
            )
        chunk = header.config["flow"]["chunk"]
        if not 1 <= cfg.execute <= chunk:
            raise ValueError(f"execute must lie in 1..{chunk}, the chunk of {path}; got {cfg.execute}")
        flow = header.config["flow"]
        if cfg.noise == "stochastic" and not (header.config["has_sigma_net"] or flow.get("noise") == "flow_sde"):
            raise ValueError(f"noise stochastic: {path} was never fine-tuned by train_rft.py, so it has no noise")
        digests[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    return digests


def main(cfg: Config) -> dict:
    digests = check(cfg)
    out_dir = Path(cfg.out_dir)
    open_run(out_dir, cfg, ignore=("workers", "animate", "animate_size"))
    log = out_dir / "episodes.jsonl"

    # what an interrupted evaluation already played, by checkpoints that have not changed since
    lines = log.read_text().splitlines() if log.is_file() else []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the line that a kill cut short
            continue
        if digests.get(record["policy"]) == record["digest"]:
            records.append(record)
    done = {(r["policy"], r["suite"], r["task"], r["init_state"]) for r in records}
    log.write_text("".join(json.dumps(r) + "\n" for r in records))

    jobs = []
    for path in cfg.policies:
        for suite in cfg.suites:
            for task in _tasks(cfg, suite):
                todo = [s for s in range(cfg.episodes) if (path, suite, task, s) not in done]
                for k in range(0, len(todo), cfg.batch_size):
                    jobs.append((path, digests[path], suite, task, todo[k : k + cfg.batch_size]))

    total = sum(len(j[-1]) for j in jobs) + len(done)
    with (
        log.open("a", buffering=1) as file,
        tqdm(total=total, initial=len(done), desc="episodes", mininterval=1) as bar,
    ):
        for played in play_all(cfg, jobs):
            for record in played:
                records.append(record)
                file.write(json.dumps(record) + "\n")
                bar.update()

    results = summarise(cfg, records, digests)
    write_json(out_dir / "results.json", results)
    for number, path in enumerate(cfg.policies):
        # starts spread over tasks: state 0 of each task, then state 1, ...
        own = sorted(
            (r for r in records if r["policy"] == path), key=lambda r: (r["init_state"], r["suite"], r["task"])
        )
        for r in own[: cfg.animate]:
            end = "success" if r["success"] else "failure"
            start = (r["suite"], r["task"], r["init_state"])
            frames = replay_frames(*start, r["actions"], size=cfg.animate_size, perturb=_perturbation(cfg))
            name = f"policy{number}_{r['suite']}_{r['task']}_{r['init_state']}_{end}.gif"
            save_gif(out_dir / name, frames, frames_per_second=10, hold_last=1.5)
    print_table(results)
    return results


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__.splitlines()[0]))
