"""Where failed episodes of Tabletop's pick-and-place tasks ended: with open fingers, without a grasp, or with one.

    python studies/failures.py --episodes runs/study/tabletop_spatial/seed0/sft/eval_none/episodes.jsonl \
        runs/study/tabletop_spatial/seed0/sft/eval_none_zero/episodes.jsonl

Every recorded episode (episodes.jsonl of `eval_libero.py`) is played again. An episode that failed is counted by how
far it got: the gripper was never told to close; it was, and no item rose; one rose, and did not reach its goal.
"closes" is how often the gripper was told to close, and "late_motion" how far the hand got in the last three seconds of
a failure [m], next to nothing where the policy waits; medians over those episodes.

Writes one JSON: for each file, counts and these medians.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from records import rounded, write
from stage_tables import ENDS, failures_table
from stages import commit, machine, read_lines

from vlarft.run.config import opt, parse
from vlarft.sim import make_env
from vlarft.sim.perturb import Perturbation
from vlarft.sim.tabletop import TabletopEnv

RISE = 0.02  # m above its start, from which an item counts as lifted
LATE = 60  # control steps, 3 s


@dataclass(frozen=True)
class Config:
    episodes: tuple[str, ...] = opt((), "episodes.jsonl files, of evaluations with one policy each")
    out: str = opt("runs/failures.json", "JSON file to write")


PRESETS = {"paper": Config()}


def ended(env: TabletopEnv, record: dict, perturb: Perturbation | None) -> tuple[str, int, float]:
    """Play one recorded episode again.

    Returns:
        One of `ENDS`, how often the gripper was told to close, and how far the hand is from where it was `LATE` steps
        before the end [m].

    Raises:
        ValueError: it does not end as it did.
    """
    env.reset(init_state=record["init_state"], perturb=perturb)
    actions = np.asarray(record["actions"], dtype=np.float32)
    before = {name: env.position(name)[2] for name in env.items}
    places, rise, success = [env.hand_position.copy()], 0.0, False
    for action in actions:
        success = env.step(action).success
        places.append(env.hand_position.copy())
        rise = max(rise, *(env.position(name)[2] - height for name, height in before.items()))
    if success != record["success"]:
        raise ValueError(
            f"task {record['task']}, initial state {record['init_state']}: success {success} when played again, "
            f"{record['success']} on record: these actions are of another version or another start"
        )
    closed = actions[:, 6] > 0
    closes = int(closed[0]) + int((closed[1:] & ~closed[:-1]).sum())
    kind = ENDS[0] if success else ENDS[1] if not closes else ENDS[2] if rise < RISE else ENDS[3]
    return kind, closes, float(np.linalg.norm(places[-1] - places[max(0, len(places) - 1 - LATE)]))


def failures(records: Sequence[dict], perturb: Perturbation | None) -> dict:
    """Compute counts and medians of one evaluation.

    Raises:
        ValueError: of another simulator, of several policies, or an episode ends otherwise.
    """
    if other := [record["suite"] for record in records if not record["suite"].startswith("tabletop")]:
        raise ValueError(f"episodes of {other[0]}: only Tabletop's can be looked into, give files of its suites")
    if len(policies := sorted({record["policy"] for record in records})) > 1:
        raise ValueError(f"episodes of {len(policies)} policies, {policies[0]} and {policies[1]}: evaluate them apart")
    envs: dict[tuple[str, int], TabletopEnv] = {}
    found = []
    for record in records:
        key = record["suite"], record["task"]
        if key not in envs:
            envs[key] = make_env(*key, image_size=16)  # nothing is rendered
        found.append(ended(envs[key], record, perturb))
    counts = Counter(kind for kind, _, _ in found)
    failed = [row for row in found if row[0] != ENDS[0]]
    return {
        "episodes": len(found),
        "counts": {kind: counts[kind] for kind in ENDS},
        "closes": median(closes for _, closes, _ in failed) if failed else None,
        "late_motion": median(motion for *_, motion in failed) if failed else None,
    }


def main(cfg: Config) -> dict:
    """Play everything again; return what the JSON file holds.

    Raises:
        ValueError: no file given, or one that `failures` refuses.
        FileNotFoundError: a file, or the config.json of its evaluation, is not there.
    """
    if not cfg.episodes:
        raise ValueError("no --episodes: give episodes.jsonl files that eval_libero.py wrote")
    report = {"command": "python studies/failures.py", "machine": machine(), "files": {}}
    for name in cfg.episodes:
        perturb = json.loads(Path(name).with_name("config.json").read_text())["perturb"]
        parsed = Perturbation.parse(perturb) if perturb else None
        report["files"][name] = {"commit": commit(), **rounded(failures(read_lines(Path(name)), parsed))}
        write(cfg.out, report)
    print(failures_table(report["files"]))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
