"""The main study: when does fine-tuning inside the world model beat more supervised training? (Tables 2, 3, 4, 10)

    python studies/rft_study.py --suites tabletop_object --seeds 0 1 2
    python studies/rft_study.py --suites tabletop_goal --seeds 0 --arms "extra SFT" "RFT R3"

docs/findings.md says what came out; docs/studies/ has the tables, and the exact command of each.

For each suite: demonstrations, tokenizer and world model, once. For each seed: an early and a long-trained SFT policy,
then every arm from the long-trained one. Arms (study_arms.py):

- RWR, R1, R2 and R3 have one advantage for a whole chunk and a flow-matching weight of 1; "RFT R1 per step" and "RFT
  divergence" have one advantage for every action step and a weight of 0.1.
- "extra SFT" has the wall time of "RFT R3" and goes on at a tenth of the peak learning rate. "regression" has it too
  and trains the action head alone, towards reward R1 by its own gradient.
- The arms of 400 steps are as long as the paper's; "extra SFT, 400 steps" has the wall time of the first of them.
- "on-policy" arms have a world model of their own, trained alike, that also saw `attempts` episodes a task which the
  policy played; "demonstrations only" arms one that saw the experts' episodes alone, without noisy and failed attempts.
- "symmetric" scores each chunk by the mean of its own reward and that of its mirror image about the demonstration's.

"SFT, x_0 = 0" is the long-trained policy played from x_0 = 0, and so are `zero_arms`; "SFT, gripper sampled" samples
x_0 for the gripper alone, and so do `gripper_arms`. "SFT, other x_0" plays other samples of x_0: what chance does. All
policies of a seed play the same starts, plain and perturbed, with the same x_0. Every stage is a command of the
repository, is printed, and is not run again once it is done.

A second round goes on from a policy that has had more supervised training: --start names the arm of the first round
that takes the place of "SFT", say "extra SFT, 400 steps"; it needs an --out of its own.

The JSON file gathers runs: a suite and seed at a time, on any machine, as long as the settings are the same. Under
"runs", for each suite and seed: outcomes start by start (1 = success; tasks in their order, initial states in theirs);
the commit that measured each policy; minutes of each training; true error and standard deviation over x_0 of the chunks
(chunks.py), and how they changed; the trust gate before the first step; that standard deviation in the course of
training. (Runs of commit 5747157 and before have the true error there as well, and their gate ranks by it.)
"""

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from chunks import difference, measure
from outcomes import RESAMPLED, chunk_table, success_table
from records import rounded, write
from stages import Starts, check_known, commit, fine_tuning, machine, read_lines, read_report, run_once, with_attempts
from study_arms import ARMS, EXPERTS_ONLY, EXTRA_ARMS, LONG_ARMS, NO_END, ON_POLICY, OPTIONAL, RFT_ARMS, timed_arm
from study_logs import courses, minutes_of, trust_gates

from vlarft.run.config import opt, parse

MERGED = "minutes", "chunks", "trust_gate", "courses"  # of an entry, from several invocations
SECOND_ROUND = 100  # added to its seeds of supervised training


@dataclass(frozen=True)
class Config:
    out_dir: str = opt("runs/study", "folder for all runs")
    out: str = opt("runs/study.json", "JSON file that gathers the runs")
    suites: tuple[str, ...] = opt(("tabletop_object", "tabletop_spatial"), "suites")
    tasks: tuple[str, ...] = opt(("0", "1", "2", "3"), "tasks of each suite")
    seeds: tuple[int, ...] = opt((0, 1, 2), "seeds of SFT and of the arms")
    start: str | None = opt(None, "arm of a round that is done, to go on from instead of the long-trained policy")
    arms: tuple[str, ...] = opt(tuple(arm for arm in ARMS if arm not in OPTIONAL), "arms to run")
    perturb: tuple[str, ...] = opt(("none", "object:2.5", "robot:20"), "starts to play; none = the plain ones")
    perturbed_arms: tuple[str, ...] = opt(
        tuple(arm for arm in ARMS if arm not in ("RWR", "RFT R1", "RFT R2")),
        "arms that play perturbed starts, beside SFT",
    )
    zero_arms: tuple[str, ...] = opt(LONG_ARMS, "arms that play from x_0 = 0 as well, beside SFT")
    gripper_arms: tuple[str, ...] = opt((), "arms that also play from x_0 = 0 but for the gripper, beside SFT")
    episodes: int = opt(50, "initial states per task")
    error_starts: int = opt(256, "held-out starts of the true error")
    error_samples: int = opt(3, "chunks that the policy samples at each of them")
    stage_preset: str = opt("tiny", "preset of the stages")
    demos_per_task: int = opt(50, "demonstrations per task (LIBERO: 50)")
    action_noise: float | None = opt(None, "the experts' action noise, action units; none: the preset's")
    world_model_steps: int = opt(4500, "steps of the world model")
    attempts: int = opt(40, "episodes of the policy per task, for the world model of its own")
    early_steps: int = opt(800, "steps of the early SFT policy")
    sft_steps: int = opt(2600, "steps of the long-trained SFT policy")
    rft_steps: int = opt(80, "steps of each fine-tuning")
    rft_starts: int = opt(24, "start states of a step")
    rft_group: int = opt(4, "rollouts of each")


# may differ in one JSON file
FREE = "out_dir", "out", "suites", "seeds", "arms", "perturbed_arms", "zero_arms", "gripper_arms"
PRESETS = {
    "paper": Config(),
    "smoke": Config(
        suites=("tabletop_object",), tasks=("0",), seeds=(0,), arms=("regression", "RFT R2", "RFT R3"),
        perturb=("none", "robot:20"), perturbed_arms=("RFT R3",), zero_arms=("RFT R3",), episodes=2, error_starts=4,
        error_samples=2, stage_preset="smoke", demos_per_task=6, world_model_steps=10, early_steps=2, sft_steps=4,
        rft_steps=2, rft_starts=2, rft_group=3, attempts=2,
    ),
}  # fmt: skip


def folder_of(cfg: Config, suite: str, seed: int, arm: str = "") -> Path:
    """Return where the runs of a suite and seed lie, or one of them."""
    folder = Path(cfg.out_dir) / suite / f"seed{seed}"
    if cfg.start:
        folder /= f"from_{cfg.start.replace(' ', '_')}"
    return folder / arm.replace(" ", "_")


def start_of(cfg: Config, suite: str, seed: int) -> Path:
    """Return the checkpoint of the arm that a second round goes on from.

    Raises:
        FileNotFoundError: the first round has not trained it.
    """
    path = folder_of(replace(cfg, start=None), suite, seed, cfg.start) / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}: run {suite}, seed {seed} without --start and with --arms {cfg.start!r} first"
        )
    return path


def train(cfg: Config, suite: str, seed: int) -> dict[str, Path]:
    """Train all policies of one suite and seed: name -> checkpoint."""
    folder = Path(cfg.out_dir) / suite
    preset, demos = ["--preset", cfg.stage_preset], ["--demos", folder / "demos"]
    where = ["--suites", suite, "--tasks", *cfg.tasks, "--demos-per-task", cfg.demos_per_task]
    where += [] if cfg.action_noise is None else ["--action-noise", cfg.action_noise]
    run_once(folder / "demos", "collect_demos.py", *preset, *where)

    def trained(out_dir: Path, *words: object) -> Path:
        return run_once(out_dir, *words) / "model.safetensors"

    tokenizer = trained(folder / "tokenizer", "train_tokenizer.py", *preset, *demos)
    wm = ["train_wm.py", *preset, "--pose-dims", 0, "--tokenizer", tokenizer, "--steps", cfg.world_model_steps]
    world_models = dict.fromkeys(RFT_ARMS, trained(folder / "wm", *wm, *demos))
    if any(arm in EXPERTS_ONLY for arm in cfg.arms):
        of_experts = trained(folder / "demonstrations_only", *wm, *demos, "--experts-only")
        world_models |= dict.fromkeys(EXPERTS_ONLY, of_experts)

    def own(arm: str) -> Path:
        return folder_of(cfg, suite, seed, arm)

    sft = ["train_sft.py", *preset, *demos, "--seed", seed]
    if cfg.start:
        policies = {"SFT": start_of(cfg, suite, seed)}
    else:
        policies = {
            "SFT early": trained(own("early"), *sft, "--steps", cfg.early_steps),
            "SFT": trained(own("sft"), *sft, "--steps", cfg.sft_steps),
        }
    if any(arm in ON_POLICY for arm in cfg.arms):
        attempts = ["--policy", policies["SFT"], "--policy-per-task", cfg.attempts]
        seen = with_attempts(folder / "demos", own("attempts_demos"), *preset, *where, *attempts)
        world_models |= dict.fromkeys(ON_POLICY, trained(own("attempts"), *wm, "--demos", seen))
    rft = [*preset, *demos, "--policy", policies["SFT"]]
    rft += ["--seed", seed, "--steps", cfg.rft_steps, "--starts", cfg.rft_starts, "--group", cfg.rft_group]
    rft += ["--gate-threshold", "none"]
    for name, flags in RFT_ARMS.items():
        if name in cfg.arms:
            policies[name] = trained(own(name), fine_tuning(flags), *rft, "--world-model", world_models[name], *flags)
    for name, flags in EXTRA_ARMS.items():
        if name in cfg.arms:
            minutes = f"{minutes_of(own(timed_arm(cfg.arms, name))):.3f}"
            more = ["--init", policies["SFT"], "--warmup", 10, "--steps", NO_END, "--max-minutes", minutes, *flags]
            more += ["--seed", SECOND_ROUND + seed] if cfg.start else []  # not the samples of the arm gone on from
            policies[name] = trained(own(name), *sft, *more)
    return policies


def play(cfg: Config, suite: str, perturb: str, policies: dict[str, Path]) -> dict[str, dict[tuple, bool]]:
    """Return the outcomes of the policies of a seed that play such starts: name -> (task, initial state) -> success."""
    starts = Starts(suite, cfg.tasks, cfg.episodes, cfg.stage_preset)
    kind = f"eval_{re.sub('[:/]', '_', perturb)}"
    playing = policies
    if perturb != "none":
        playing = {name: path for name, path in policies.items() if name in ("SFT", *cfg.perturbed_arms)}
    found = {name: starts.play(path.parent / kind, path, perturb) for name, path in playing.items()}
    for name, path in policies.items():
        for label, arms, x0 in (("x_0 = 0", cfg.zero_arms, "zero"), ("gripper sampled", cfg.gripper_arms, "gripper")):
            if name in ("SFT", *arms):
                found[f"{name}, {label}"] = starts.play(path.parent / f"{kind}_{x0}", path, perturb, "--noise", x0)
    path = policies["SFT"]
    found[RESAMPLED] = starts.play(path.parent / f"{kind}_resampled", path, perturb, "--seed", "1")
    return found


def chunk_errors(cfg: Config, suite: str, policies: dict[str, Path]) -> dict[str, dict]:
    """Return what chunks.py measures of each policy, and how it differs from the long-trained one."""
    where = Path(cfg.out_dir) / suite / "demos"
    found = {
        name: measure(path.parent / "chunks.json", path, where, cfg.error_starts, cfg.error_samples)
        for name, path in policies.items()
    }
    return {
        name: {
            kind: {"mean": mean(own), **({} if name == "SFT" else {"change": difference(found["SFT"][kind], own)})}
            for kind, own in values.items()
        }
        for name, values in found.items()
    }


def run(cfg: Config, suite: str, seed: int) -> dict:
    """Train and play what is missing of one suite and seed; return its entry."""
    policies = train(cfg, suite, seed)
    played = {perturb: play(cfg, suite, perturb, policies) for perturb in cfg.perturb}
    outcomes = {
        perturb: {name: "".join(str(int(won)) for _, won in sorted(starts.items())) for name, starts in found.items()}
        for perturb, found in played.items()
    }
    first = read_lines(policies["SFT"].parent / "eval_none" / "episodes.jsonl")[0]
    entry = {
        "sft": first["digest"],
        "machine": machine(),
        "commit": dict.fromkeys(next(iter(outcomes.values())), commit()),
        "outcomes": outcomes,
        "minutes": {name: minutes_of(path.parent) for name, path in policies.items()},
        "chunks": chunk_errors(cfg, suite, policies),
        "trust_gate": trust_gates(policies),
        "courses": courses(policies),
    }
    return rounded(entry)


def same_policy(before: dict, entry: dict) -> bool:
    """Return whether two entries are of one long-trained policy: of the same file, or of two trainings whose chunks
    have the same errors at the held-out starts. The file also holds its configuration, which later versions add to.
    """
    return before["sft"] == entry["sft"] or before["chunks"]["SFT"] == entry["chunks"]["SFT"]


def gather(cfg: Config, runs: dict, suite: str, seed: int, entry: dict) -> None:
    """Add an entry to the runs of a JSON file: to one of the same long-trained policy, or in place of another's."""
    seeds = runs.setdefault(suite, {})
    before = seeds.get(str(seed), entry)
    if same_policy(before, entry):  # arms of another invocation stay
        outcomes = {kind: before["outcomes"].get(kind, {}) | found for kind, found in entry["outcomes"].items()}
        merged = {name: before.get(name, {}) | entry[name] for name in MERGED}
        commits = entry["commit"] | before["commit"]  # of the invocation that measured a policy first
        entry = {**entry, **merged, "outcomes": outcomes, "commit": commits}
    else:
        print(f"{suite}, seed {seed}: the entry of {cfg.out} is of another long-trained policy and is replaced")
    seeds[str(seed)] = entry
    runs[suite] = {name: seeds[name] for name in sorted(seeds, key=int)}


def main(cfg: Config) -> dict:
    """Run what is missing; return what the JSON file holds.

    Raises:
        ValueError: an unknown arm, or a JSON file of other settings.
        FileNotFoundError: no policy to start the second round from.
    """
    named = *cfg.arms, *cfg.perturbed_arms, *cfg.zero_arms, *cfg.gripper_arms
    check_known((*named, *([cfg.start] if cfg.start else [])), ARMS, "arm")
    report = {"command": "python studies/rft_study.py"} | read_report(cfg, "runs", FREE)
    for suite in cfg.suites:
        for seed in cfg.seeds:
            gather(cfg, report["runs"], suite, seed, run(cfg, suite, seed))
            write(cfg.out, report)
    for suite in report["runs"]:
        print(f"\n{suite}\n\n{success_table(report['runs'], suite)}\n\n{chunk_table(report['runs'][suite])}")
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
