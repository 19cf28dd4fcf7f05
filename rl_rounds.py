"""Rounds of closed-loop reinforcement learning: record the policy, learn from what it does, fine-tune, record again.

    python rl_rounds.py --policy runs/sft --world-model runs/wm --demos demos --out-dir runs/rounds
    python rl_rounds.py --policy runs/sft --world-model runs/wm --demos demos --rounds 2 --out-dir runs/rounds

A policy that has improved gets into states that neither world model nor success model has seen, so their judgements
get worse the better it becomes (WoVR: .710 without a refresh, .815 with one). Each round calls the stage scripts, each
as the command that a user would type, and prints it:

    collect_demos.py    real episodes of the present policy, with their outcomes, added to those of earlier rounds
    train_wm.py --init  the world model, refreshed on all of them
    train_success.py    the judge
    train_rl.py         the policy, in imagination
    eval_libero.py      the first policy and the present one, from x_0 = 0, on the same starts

Episodes are recorded in the simulator here. On a robot, give the same commands by hand with your recordings in place of
the first one (docs/closed_loop.md).

Reads a policy of train_sft.py, a world model of train_wm.py and the demonstrations of both. Writes one folder per stage
and round into out_dir, and stages.json. The same command resumes: finished stages are skipped, the one that was cut
short goes on; with a larger `--rounds` it adds rounds, and `--gate-threshold` may change. Other options need another
folder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from vlarft.data import load_episodes
from vlarft.data.convention import check_image_size
from vlarft.run import migration
from vlarft.run.checkpoint import open_run, read_header, read_json
from vlarft.run.config import Count, ProperShare, Range, Rate, Share, opt
from vlarft.run.script import run_script
from vlarft.run.stages import run_stage
from vlarft.sim import task_index

ROOT = Path(__file__).resolve().parent

FIRST_SEED, SEEDS_APART = 500_000, 1000  # of the starts that are recorded: none of a demonstration or another seed


@dataclass(frozen=True)
class Config:
    """Some rounds from one policy."""

    policy: str = opt("runs/sft", "policy to fine-tune: run folder or file", group="data")
    world_model: str = opt("runs/wm", "world model of its demonstrations: run folder or file")
    demos: tuple[str, ...] = opt(("demos",), "demonstrations of both")
    suites: tuple[str, ...] = opt(("tabletop_object",), "suites to record and to evaluate")
    tasks: tuple[str, ...] = opt(("0", "1", "2", "3"), "task numbers or names in each suite")
    rounds: Count = opt(2, "rounds of recording and learning", group="optimisation")
    episodes: Count = opt(32, "episodes recorded per task and round")
    horizon: Count = opt(56, "steps after which an attempt ends, recorded or imagined")
    refresh_steps: Count = opt(1000, "optimizer steps of each refresh of the world model")
    refresh_lr: Rate = opt(5e-4, "peak learning rate of the refresh")
    validation_fraction: ProperShare = opt(0.25, "share of the new episodes that both models hold out, for the gate")
    gate_threshold: Share | None = opt(
        0.9,
        "least mean of the shares of held-out successes and failures that imagination tells; none: not measured",
        group="evaluation",
    )
    out_dir: str = opt("runs/rounds", "folder that the rounds write", group="run")
    seed: Annotated[int, Range(0, 400)] = opt(0, "seed of every stage")
    stage_preset: Literal["tiny", "libero", "smoke"] = opt("tiny", "preset of every stage")

    def __post_init__(self) -> None:
        if self.rounds * self.episodes > SEEDS_APART:
            raise ValueError(
                f"--rounds {self.rounds} of --episodes {self.episodes}: give {SEEDS_APART} at most together, "
                "after which come the starts of the next --seed"
            )
        for suite in self.suites:
            for task in self.tasks:
                task_index(suite, task)  # raises


PRESETS = {
    "tiny": Config(),
    "libero": Config(
        suites=("libero_object",), tasks=tuple(map(str, range(10))), episodes=10, horizon=220, stage_preset="libero"
    ),
    "smoke": Config(tasks=("0",), rounds=1, episodes=8, refresh_steps=2, gate_threshold=None, stage_preset="smoke"),
}


def check_inputs(cfg: Config) -> int:
    """Check that the rounds can go on from these models and demonstrations, before anything is recorded.

    Returns:
        The side of the images, as which attempts are recorded [px].

    Raises:
        ValueError: the policy sees several cameras; the world model has images of another size, predicts no proprio,
            or holds out no episodes or some that are not among the demonstrations.
    """
    episodes, policy, model = (
        load_episodes(cfg.demos, successes_only=False),
        read_header(cfg.policy),
        read_header(cfg.world_model),
    )
    check_image_size(model.config["tokenizer"]["image_size"], f"world model {cfg.world_model}", episodes[0])
    side = episodes[0].images.shape[1]
    if (trained := policy.extra.get("image_size", [side, side])) != [side, side]:
        raise ValueError(
            f"policy {cfg.policy} was trained on images of {trained[0]}x{trained[1]}, the world model on {side}x{side}"
        )
    if len(cameras := policy.config.get("cameras", ())) > 1:
        raise ValueError(f"policy {cfg.policy} sees {len(cameras)} cameras ({', '.join(cameras)}), a world model one")
    if not model.config.get("proprio_dim"):
        raise ValueError(
            f"world model {cfg.world_model} does not predict the robot's proprio: train it with train_wm.py"
        )
    if not (names := set(model.extra.get("held_out_episodes", []))):
        raise ValueError(f"world model {cfg.world_model} names no held-out episodes: give one that train_wm.py wrote")
    if missing := names - {e.name for e in episodes}:
        raise ValueError(
            f"--demos {' '.join(cfg.demos)} lacks {len(missing)} episodes that {cfg.world_model} holds out, first "
            f"{min(missing)}: give the demonstrations of its training"
        )
    return side


def run_round(cfg: Config, number: int, policy: Path, world_model: Path, side: int) -> tuple[Path, Path]:
    """Run what is missing of round `number`, from 1, that starts with these two; return its policy and world model.
    `side`: of the images [px]. Of a round that ended nothing is asked: the attempts of later ones lie with its own.
    """
    out, own, preset = Path(cfg.out_dir), Path(cfg.out_dir) / "own", cfg.stage_preset
    refreshed, judge, learned = (out / f"{name}_{number}" for name in ("wm", "success", "rl"))
    tasks = {"suites": cfg.suites, "tasks": cfg.tasks}
    demos, stages = [*map(Path, cfg.demos), own], out / "stages.json"
    if stages.is_file() and read_json(stages).get(f"eval {number}", {}).get("done"):
        return learned, refreshed

    def stage(name: str, script: str, **flags: object) -> None:
        run_stage(out, f"{name} {number}", ROOT / script, preset=preset, **flags)

    none = {"demos_per_task": 0, "noisy_per_task": 0}
    stage(
        "own",
        "collect_demos.py",
        **tasks,
        **none,
        policy=policy,
        policy_per_task=number * cfg.episodes,
        horizon=cfg.horizon,
        image_size=side,
        seed=FIRST_SEED + SEEDS_APART * cfg.seed,
        out_dir=own,
    )
    stage(
        "wm",
        "train_wm.py",
        init=world_model,
        demos=demos,
        steps=cfg.refresh_steps,
        lr=cfg.refresh_lr,
        validation_fraction=cfg.validation_fraction,
        seed=cfg.seed,
        out_dir=refreshed,
    )
    stage("success", "train_success.py", demos=demos, world_model=refreshed, seed=cfg.seed, out_dir=judge)
    gate = "none" if cfg.gate_threshold is None else cfg.gate_threshold
    models = {"world_model": refreshed, "success_model": judge}
    stage(
        "rl",
        "train_rl.py",
        policy=policy,
        demos=demos,
        **models,
        gate_threshold=gate,
        horizon=cfg.horizon,
        seed=cfg.seed,
        out_dir=learned,
    )
    played = {"policies": [Path(cfg.policy), learned], "image_size": side, "noise": "zero"}
    stage("eval", "eval_libero.py", **played, **tasks, out_dir=out / f"eval_{number}")
    return learned, refreshed


def main(cfg: Config) -> list[dict]:
    """Run what is missing; return eval_libero.py's row of the first policy, and of each round's."""
    side = check_inputs(cfg)
    models = ("policy", "world_model")
    open_run(cfg.out_dir, cfg, ignore=("rounds", "gate_threshold"), older=migration.rl_rounds, models=models)
    policy, world_model, rows = Path(cfg.policy), Path(cfg.world_model), []
    for number in range(1, cfg.rounds + 1):
        policy, world_model = run_round(cfg, number, policy, world_model, side)
        results = read_json(Path(cfg.out_dir) / f"eval_{number}" / "results.json")
        rows += results["policies"][len(rows) > 0 :]
    for number, row in enumerate(rows):
        gain, rate = row.get("against_first"), row["all"]
        line = f"{f'round {number}' if number else 'before':>10}  {percent(rate['rate'], rate['low'], rate['high'])}"
        print(line + (f"  gain {percent(gain['difference'], gain['low'], gain['high'])}" if gain else ""))
    return rows


def percent(value: float, low: float, high: float) -> str:
    """Format a share and its interval as text."""
    return f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


if __name__ == "__main__":
    run_script(main, Config, PRESETS, __doc__)
