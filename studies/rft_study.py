"""The study: when does fine-tuning inside the world model beat more supervised training? (Tables 2, 3, 4, 10)

    python studies/rft_study.py --suites tabletop_object --seeds 0 1 2                          every arm
    python studies/rft_study.py --suites tabletop_goal --seeds 0 --arms "extra SFT" "RFT R3"

For each suite: demonstrations, tokenizer and world model, once. For each seed: an early and a long-trained SFT policy,
then every arm from the long-trained one. RWR, R1, R2 and R3 have one advantage for a whole chunk, and a flow-matching
weight of 1; "RFT R1 per step" and "RFT divergence" one for every action step, and 0.1 (docs/study.md). "extra SFT" has
the wall time of "RFT R3" and goes on at a tenth of the peak learning rate; "extra SFT head" the same with the flow head
alone, the part that fine-tuning touches; "regression" the head alone, towards reward R1 by its own gradient. The arms
of 400 steps are as long as the paper's; extra SFT of 400 steps, of the head or of all, has the wall time of the first.
The arms named "on-policy" have a world model of their own, trained alike, which also saw `attempts` episodes a task
that the policy played in the simulator; those named "demonstrations only" one that saw the experts' episodes alone,
where the first saw noisy and failed attempts, too. "symmetric" and "averaged" are what those options of `train_rft.py`
(--symmetric, --ema) do, "gripper left out" gives that dimension neither noise nor a log-prob (--noisy-dims), "steady"
that and averaged weights; "whole policy" trains the vision-language model, too, in a fine-tuning with averaged weights
(--vlm-lr). All of these and "extra SFT head" run where --arms names them.
"SFT, x_0 = 0" is the long-trained policy played from the middle of its noise; `zero_arms` are played so, too. "SFT,
gripper drawn" starts there in all dimensions but the gripper's; `gripper_arms`, too. "SFT, other x_0" is the same
policy with other draws. All policies of a seed play the same starts, plain and perturbed, with
the same draws. Every stage is a command of the repository, is printed, and is not run again once it is done.

Rough experts, whose demonstrations, world model and policies are others (docs/study.md):

    python studies/rft_study.py --suites tabletop_spatial --action-noise 0.5 --out-dir runs/study_rough \
        --out results/rft_study_rough.json --figure docs/images/rft_study_rough.png --seeds 0 1 --arms "extra SFT" ...

A second round, from a policy that has had more supervised training: --start names the arm of the first round that
stands for "SFT", say "extra SFT, 400 steps"; it gets a JSON file of its own.

The JSON file gathers runs: a suite and seed at a time, on any machine, as long as the settings are the same. Under
"runs", for each suite and seed: outcomes start by start (1 = success; tasks in their order, initial states in theirs);
the minutes of each training, as far as the other work of the machine lets them mean anything; true error and spread of
the chunks (chunks.py), and how they changed; the trust gate before the first step, and the true error on the way;
success rates while the policies of `curve_seeds` trained. Under "summary", for each suite and for all of them: rates
with 95 % intervals, and paired differences to the long-trained policy and to the controls, pairs of all seeds pooled,
and seed by seed. And a picture of the curves.
"""

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from chunks import difference, measure
from outcomes import REDRAWN, summarise, table
from stages import Panel, Starts, check_known, draw_curves, machine, read_lines, read_report, run_once, with_attempts
from study_arms import ARMS, EXPERTS_ONLY, EXTRA_ARMS, LONG_RIVALS, NO_END, ON_POLICY, OPTIONAL, RFT_ARMS, timed_arm
from study_logs import courses, curves, minutes_of, trust_gates

from vlarft.run.checkpoint import write_json
from vlarft.run.config import opt, parse

MERGED = "minutes", "chunks", "trust_gate", "courses", "curves"  # of an entry, from several invocations
SECOND_ROUND = 100  # added to its seeds of supervised training


@dataclass(frozen=True)
class Config:
    out_dir: str = opt("runs/study", "folder for all runs")
    out: str = opt("results/rft_study.json", "JSON file that gathers the runs")
    figure: str = opt("docs/images/rft_study.png", "picture of the curves to write")
    suites: tuple[str, ...] = opt(("tabletop_object", "tabletop_spatial"), "suites")
    tasks: tuple[str, ...] = opt(("0", "1", "2", "3"), "tasks of each suite")
    seeds: tuple[int, ...] = opt((0, 1, 2), "seeds of SFT and of the arms")
    start: str | None = opt(None, "arm of a round that is done, to go on from instead of the long-trained policy")
    arms: tuple[str, ...] = opt(tuple(arm for arm in ARMS if arm not in OPTIONAL), "arms to run")
    perturb: tuple[str, ...] = opt(("none", "object:2.5", "robot:20"), "starts to play; none = the plain ones")
    perturbed_arms: tuple[str, ...] = opt(
        tuple(arm for arm in ARMS if arm not in ("extra SFT head", "RWR", "RFT R1", "RFT R2")),
        "arms that play perturbed starts, beside SFT",
    )
    zero_arms: tuple[str, ...] = opt(LONG_RIVALS, "arms that play from the middle of their noise, too, beside SFT")
    gripper_arms: tuple[str, ...] = opt((), "arms that play so but for the gripper, whose x_0 is drawn, beside SFT")
    episodes: int = opt(50, "initial states per task")
    error_starts: int = opt(256, "held-out starts of the true error")
    error_draws: int = opt(3, "chunks that the policy samples at each of them")
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
    curve_seeds: tuple[int, ...] = opt((0,), "seeds that play while they train")
    curve_points: int = opt(4, "success rates along a long SFT and along a fine-tuning")
    curve_episodes: int = opt(20, "episodes per task of each of them")


# may differ in one JSON file
FREE = "out_dir", "out", "figure", "suites", "seeds", "arms", "perturbed_arms", "zero_arms"
FREE += "gripper_arms", "curve_seeds", "curve_points", "curve_episodes"
PRESETS = {
    "paper": Config(),
    "smoke": Config(
        suites=("tabletop_object",), tasks=("0",), seeds=(0,), arms=("extra SFT head", "RWR", "RFT R3"),
        perturb=("none", "robot:20"), perturbed_arms=("RFT R3",), zero_arms=("RFT R3",), episodes=2, error_starts=4,
        error_draws=2, stage_preset="smoke", demos_per_task=6, world_model_steps=10, early_steps=2, sft_steps=4,
        rft_steps=2, rft_starts=2, rft_group=3, attempts=2, curve_points=2, curve_episodes=1,
    ),
}  # fmt: skip


def folder_of(cfg: Config, suite: str, seed: int, arm: str = "") -> Path:
    """Where the runs of a suite and seed lie, or one of them."""
    folder = Path(cfg.out_dir) / suite / f"seed{seed}"
    if cfg.start:
        folder /= f"from_{cfg.start.replace(' ', '_')}"
    return folder / arm.replace(" ", "_")


def start_of(cfg: Config, suite: str, seed: int) -> Path:
    """The checkpoint of the arm that a second round goes on from.

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
    """All policies of one suite and seed: name -> checkpoint."""
    folder = Path(cfg.out_dir) / suite
    preset, demos = ["--preset", cfg.stage_preset], ["--demos", folder / "demos"]
    where = ["--suites", suite, "--tasks", *cfg.tasks, "--demos-per-task", cfg.demos_per_task]
    where += [] if cfg.action_noise is None else ["--action-noise", cfg.action_noise]
    run_once(folder / "demos", "collect_demos.py", *preset, *where)

    def trained(out_dir: Path, *words: object) -> Path:
        return run_once(out_dir, *words) / "model.safetensors"

    tokenizer = trained(folder / "tokenizer", "train_tokenizer.py", *preset, *demos)
    wm = ["train_wm.py", *preset, "--tokenizer", tokenizer, "--steps", cfg.world_model_steps]
    world_models = dict.fromkeys(RFT_ARMS, trained(folder / "wm", *wm, *demos))
    if any(arm in EXPERTS_ONLY for arm in cfg.arms):
        of_experts = trained(folder / "demonstrations_only", *wm, *demos, "--experts-only")
        world_models |= dict.fromkeys(EXPERTS_ONLY, of_experts)

    def own(arm: str) -> Path:
        return folder_of(cfg, suite, seed, arm)

    def curve(steps: int) -> list[object]:
        if seed not in cfg.curve_seeds:
            return []
        where = ["--success-suite", suite, "--success-tasks", *cfg.tasks, "--success-episodes", cfg.curve_episodes]
        return [*where, "--success-interval", max(1, steps // cfg.curve_points)]

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
    rft = ["train_rft.py", *preset, *demos, "--policy", policies["SFT"]]
    rft += ["--seed", seed, "--steps", cfg.rft_steps, "--starts", cfg.rft_starts, "--group", cfg.rft_group]
    rft += ["--no-gate-stop", *curve(cfg.rft_steps)]
    for name, flags in RFT_ARMS.items():
        if name in cfg.arms:
            policies[name] = trained(own(name), *rft, "--world-model", world_models[name], *flags)
    for name, flags in EXTRA_ARMS.items():
        if name in cfg.arms:
            minutes = f"{minutes_of(own(timed_arm(cfg.arms, name))):.3f}"
            more = ["--init", policies["SFT"], "--warmup", 10, "--steps", NO_END, "--max-minutes", minutes, *flags]
            more += ["--seed", SECOND_ROUND + seed] if cfg.start else []  # not the draws of the arm gone on from
            policies[name] = trained(own(name), *sft, *more, *curve(cfg.sft_steps // 10))
    return policies


def play(cfg: Config, suite: str, perturb: str, policies: dict[str, Path]) -> dict[str, dict[tuple, bool]]:
    """Outcomes of the policies of a seed that play such starts: name -> (task, initial state) -> success."""
    starts = Starts(suite, cfg.tasks, cfg.episodes, cfg.stage_preset)
    kind = f"eval_{re.sub('[:/]', '_', perturb)}"
    playing = policies
    if perturb != "none":
        playing = {name: path for name, path in policies.items() if name in ("SFT", *cfg.perturbed_arms)}
    found = {name: starts.play(path.parent / kind, path, perturb) for name, path in playing.items()}
    for name, path in policies.items():
        for label, arms, x0 in (("x_0 = 0", cfg.zero_arms, "zero"), ("gripper drawn", cfg.gripper_arms, "gripper")):
            if name in ("SFT", *arms):
                found[f"{name}, {label}"] = starts.play(path.parent / f"{kind}_{x0}", path, perturb, "--noise", x0)
    path = policies["SFT"]
    found[REDRAWN] = starts.play(path.parent / f"{kind}_redrawn", path, perturb, "--seed", "1")
    return found


def chunk_errors(cfg: Config, suite: str, policies: dict[str, Path]) -> dict[str, dict]:
    """What chunks.py measures of each policy, and how it differs from the long-trained one."""
    where = Path(cfg.out_dir) / suite / "demos"
    found = {
        name: measure(path.parent / "chunks.json", path, where, cfg.error_starts, cfg.error_draws)
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
    """Train and play what is missing of one suite and seed; returns its entry."""
    policies = train(cfg, suite, seed)
    played = {perturb: play(cfg, suite, perturb, policies) for perturb in cfg.perturb}
    outcomes = {
        perturb: {name: "".join(str(int(won)) for _, won in sorted(starts.items())) for name, starts in found.items()}
        for perturb, found in played.items()
    }
    first = read_lines(policies["SFT"].parent / "eval_none" / "episodes.jsonl")[0]
    return {
        "sft": first["digest"],
        "outcomes": outcomes,
        "minutes": {name: minutes_of(path.parent) for name, path in policies.items()},
        "chunks": chunk_errors(cfg, suite, policies),
        "trust_gate": trust_gates(policies),
        "courses": courses(policies),
        "curves": curves(folder_of(cfg, suite, seed)),
        "machine": machine(),
    }


def same_policy(before: dict, entry: dict) -> bool:
    """Whether two entries are of one long-trained policy: of the same file, or of two trainings with the same chunks at
    all held-out starts, to the last digit. The file also holds its configuration, which later versions add to.
    """
    return before["sft"] == entry["sft"] or before["chunks"]["SFT"] == entry["chunks"]["SFT"]


def gather(cfg: Config, runs: dict, suite: str, seed: int, entry: dict) -> None:
    """Add an entry to the runs of a JSON file: to one of the same long-trained policy, or in place of another's."""
    seeds = runs.setdefault(suite, {})
    before = seeds.get(str(seed), entry)
    if same_policy(before, entry):  # arms of another invocation stay
        outcomes = {kind: before["outcomes"].get(kind, {}) | found for kind, found in entry["outcomes"].items()}
        merged = {name: before.get(name, {}) | entry[name] for name in MERGED}
        entry = {**entry, **merged, "outcomes": outcomes}
    else:
        print(f"{suite}, seed {seed}: the entry of {cfg.out} is of another long-trained policy and is replaced")
    seeds[str(seed)] = entry
    runs[suite] = {name: seeds[name] for name in sorted(seeds, key=int)}


def panels(runs: dict[str, dict[str, dict]]) -> list[Panel]:
    """Curves of each suite's first seed that has any: all trainings against minutes, fine-tunings against steps."""
    fine_tunings = {name.replace(" ", "_") for name in RFT_ARMS}
    found = []
    for suite, seeds in runs.items():
        series = next((dict(entry["curves"]) for entry in seeds.values() if entry["curves"]), {})
        series.pop("sft", None)
        for x, label in (("minutes", "minutes of training"), ("step", "GRPO steps")) if series else ():
            curves = {
                name.replace("_", " "): [(row[x], row["success_rate"]) for row in rows]
                for name, rows in series.items()
                if x == "minutes" or name in fine_tunings
            }
            found.append(Panel(suite, label, curves))
    return found


def main(cfg: Config) -> dict:
    """Run what is missing; returns what the JSON file holds.

    Raises:
        ValueError: an unknown arm, or a JSON file of other settings.
        FileNotFoundError: no policy to start the second round from.
    """
    named = *cfg.arms, *cfg.perturbed_arms, *cfg.zero_arms, *cfg.gripper_arms
    check_known((*named, *([cfg.start] if cfg.start else [])), ARMS, "arm")
    report = {"command": "python studies/rft_study.py", "summary": {}} | read_report(cfg, "runs", FREE)
    for suite in cfg.suites:
        for seed in cfg.seeds:
            gather(cfg, report["runs"], suite, seed, run(cfg, suite, seed))
            report["summary"] = summarise(report["runs"])
            write_json(cfg.out, report)
    if found := panels(report["runs"]):
        draw_curves(found, Path(cfg.figure))
    print("\n" + table(report["summary"]))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__.splitlines()[0]))
