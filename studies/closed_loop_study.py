"""Beyond the demonstrator: what do whole episodes and their outcomes give, from few demonstrations?

    python studies/closed_loop_study.py --suites tabletop_object --seeds 0
    python studies/closed_loop_study.py --arms "RL, simulator" "filtered cloning"

The setting: 10 demonstrations a task, so that the SFT policy's mean is wrong, and x_0 = 0, which removes what the noise
of x_0 adds, gains nothing. For each suite: demonstrations, once. For each seed: the SFT policy; `attempts` real
episodes of it a task, with their outcomes, and `copy_attempts` of each copy along its training, which fail otherwise; a
tokenizer and a world model of all, from nothing (a tokenizer of demonstrations alone does not show what a hand carries
elsewhere), both with the episode's first frame as context, and a success model. Then the arms, all from the SFT policy:

- "RL, imagination": train_rl.py in that world model, judged by the success model; its gate also ranks copies of the SFT
  policy along its training. The success model learns from imagined frames too, with the true outcome; a "judge of true
  frames" does not. Poses drive the world model; in "actions", the raw actions do, as in the paper, with any earlier
  frame as context, which "RFT R3" needs in the same model. "two rounds" records as many episodes again with that
  policy, refreshes both models and goes on.
- "planning" and "planning after RL" play the SFT policy, or that of "RL, imagination", choosing among 8 chunks.
- "RL, simulator" is the ceiling: the same update with true dynamics and outcomes. "RL, simulator, judged" has the true
  dynamics, and as the judge a success model of true frames alone. Their episodes are not counted as real ones.
  "after filtered cloning" goes on from the policy of that arm, which knows more ways to succeed.
- "filtered cloning" is the control: SFT from the start on the demonstrations and the successes among the same attempts.
- "extra SFT" goes on with the demonstrations alone, for the time of "RL, imagination". "RFT R3" is the paper's.

All policies of a seed play the same starts, plain and with objects displaced, from x_0 = 0 and from sampled x_0. Every
stage is a command of the repository, is printed, and is not run again once it is done. The JSON file gathers runs: for
each suite and seed, outcomes start by start (1 = success), minutes of each training, and what the gate found.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from records import rounded, write
from stage_tables import closed_loop_table
from stages import Starts, call, check_known, commit, machine, read_lines, read_report, run_once, with_attempts

from vlarft.data import convert
from vlarft.run.config import opt, parse

ARMS = (
    "extra SFT", "filtered cloning", "RFT R3", "RL, simulator", "RL, simulator, after filtered cloning",
    "RL, simulator, judged", "RL, imagination", "RL, imagination, judge of true frames", "RL, imagination, two rounds",
    "RL, imagination, actions", "planning", "planning after RL",
)  # fmt: skip
NO_END = 10**6
POSE_DIMS = 6  # position and axis-angle
FALSE_SUCCESSES = 0.15  # the share that a threshold allows: of some dozen held-out failures one or two
COPIES = 8  # of the SFT policy along its training


@dataclass(frozen=True)
class Config:
    out_dir: str = opt("runs/closed_loop", "folder for all runs")
    out: str = opt("runs/closed_loop.json", "JSON file that gathers the runs")
    suites: tuple[str, ...] = opt(("tabletop_object", "tabletop_spatial"), "suites")
    tasks: tuple[str, ...] = opt(("0", "1", "2", "3"), "tasks of each suite")
    seeds: tuple[int, ...] = opt((0, 1, 2), "seeds of SFT and of the arms")
    arms: tuple[str, ...] = opt(ARMS, "arms to run")
    perturb: tuple[str, ...] = opt(("none", "object:2.5"), "starts to play; none = the plain ones")
    episodes: int = opt(50, "initial states per task")
    stage_preset: str = opt("tiny", "preset of the stages")
    demos_per_task: int = opt(10, "demonstrations per task")
    attempts: int = opt(32, "real episodes of the policy per task and round")
    attempt_group: int = opt(1, "real episodes from each start")
    copy_attempts: int = opt(0, "real episodes per task of each copy of the SFT policy along its training, before")
    horizon: int = opt(56, "steps after which an attempt that is recorded or learned from ends; demonstrations take 55")
    sft_steps: int = opt(1600, "steps of the SFT policy, and of filtered cloning")
    tokenizer_steps: int = opt(3000, "steps of the tokenizer")
    model_steps: int = opt(6000, "steps of the world model")
    refresh_steps: int = opt(2500, "steps of a refresh of the world model")
    judge_steps: int = opt(1000, "steps of the success model")
    judge_episodes: int = opt(200, "episodes of each kind and outcome that it learns from, at most")
    rl_steps: int = opt(40, "steps of reinforcement learning in imagination")
    simulator_steps: int = opt(200, "steps of reinforcement learning in the simulator")
    rl_starts: int = opt(16, "starts per step of either, with 8 episodes from each")
    candidates: int = opt(8, "chunks that planning chooses from")
    played: int = opt(64, "steps after which an evaluated episode ends; no success of these tasks takes longer")


FREE = "out_dir", "out", "suites", "seeds", "arms"  # may differ in one JSON file
PRESETS = {
    "paper": Config(),
    "smoke": Config(
        suites=("tabletop_object",), tasks=("0",), seeds=(0,), perturb=("none",), episodes=2, stage_preset="smoke",
        demos_per_task=6, attempts=8, tokenizer_steps=2, model_steps=2, sft_steps=4, refresh_steps=2, rl_steps=1,
        judge_steps=2, simulator_steps=1, rl_starts=1, candidates=2,
    ),
}  # fmt: skip


class Models(NamedTuple):
    """A world model and its success model, run folders."""

    world_model: Path
    success_model: Path

    @property
    def flags(self) -> list[object]:
        return ["--world-model", self.world_model, "--success-model", self.success_model]


class Runs:
    """The runs of one suite and seed, each made when it is first asked for."""

    def __init__(self, cfg: Config, suite: str, seed: int) -> None:
        self.cfg, self.suite, self.seed = cfg, suite, seed
        self.shared, self.own = Path(cfg.out_dir) / suite, Path(cfg.out_dir) / suite / f"seed{seed}"
        self.preset = ["--preset", cfg.stage_preset]
        self.where = ["--suites", suite, "--tasks", *cfg.tasks]

    def stage(self, out_dir: Path, script: str, *words: object) -> Path:
        return run_once(out_dir, script, *self.preset, *words)

    @property
    def demos(self) -> Path:
        words = ["--demos-per-task", self.cfg.demos_per_task, "--horizon", self.cfg.horizon]
        return self.stage(self.shared / "demos", "collect_demos.py", *self.where, *words)

    def sft(self, name: str, *words: object) -> Path:
        return self.stage(self.own / name, "train_sft.py", "--demos", self.demos, *words, "--seed", self.seed)

    @property
    def policy(self) -> Path:
        copies = max(1, self.cfg.sft_steps // COPIES)
        return self.sft("sft", "--steps", self.cfg.sft_steps, "--keep-interval", copies)

    @property
    def copies(self) -> list[Path]:
        """The SFT policy along its training."""
        return sorted(self.policy.glob("model_[0-9]*.safetensors"))

    @property
    def evaluation(self) -> Path:
        """The copies of the SFT policy, played from x_0 = 0."""
        words = [*self.where, "--policies", *self.copies, "--episodes", self.cfg.episodes, "--noise", "zero"]
        words += ["--horizon", self.cfg.horizon]
        return self.stage(self.own / "eval" / "copies", "eval_libero.py", *words)

    def attempts(self, policy: Path, rounds: int = 1) -> Path:
        """Collect real episodes of the policies: those of the round before in a copy, and as many of `policy`."""
        copies = self.copies[:-1] if self.cfg.copy_attempts else []  # the last one is the policy
        first = len(copies) * self.cfg.copy_attempts
        words = [*self.preset, *self.where, "--demos-per-task", 0, "--noisy-per-task", 0, "--horizon", self.cfg.horizon]
        words += ["--seed", 500_000 + 1000 * self.seed, "--policy-group", self.cfg.attempt_group]
        own = [*words, "--policy", policy, "--policy-per-task", first + rounds * self.cfg.attempts]
        place = self.own / f"attempts_{rounds}"
        if rounds > 1:
            return with_attempts(self.own / f"attempts_{rounds - 1}", place, *own)
        for number, copy in enumerate(() if (place / "done").is_file() else copies, 1):
            total = number * self.cfg.copy_attempts
            call("collect_demos.py", *words, "--policy", copy, "--policy-per-task", total, "--out-dir", place)
        return run_once(place, "collect_demos.py", *own)

    def models(self, rounds: int, attempts: Path, pose_dims: int = POSE_DIMS) -> Models:
        """Train a world model and its success model on demonstrations and attempts; after round 1, refresh them."""
        demos, own, of = ["--demos", self.demos, attempts], self.own, "" if pose_dims else "_actions"
        if rounds == 1:
            words = [*demos, "--validation-fraction", 0.2, "--context-lookback", -1 if pose_dims else "none"]
            own_words = ["--augment", "symmetries", "--steps", self.cfg.tokenizer_steps]
            tokenizer = self.stage(own / f"tokenizer{of}", "train_tokenizer.py", *words, *own_words)
            words += ["--tokenizer", tokenizer, "--steps", self.cfg.model_steps, "--pose-dims", pose_dims]
        else:
            words = [*demos, "--init", own / f"wm_{rounds - 1}", "--validation-fraction", 0.25]
            words += ["--context-lookback", -1 if pose_dims else "none"]
            words += ["--steps", self.cfg.refresh_steps, "--lr", 5e-4]
        model = self.stage(own / f"wm_{rounds}{of}", "train_wm.py", *words)
        return Models(model, self.judge(f"success_{rounds}{of}", *demos, "--world-model", model))

    def judge(self, name: str, *words: object) -> Path:
        sizes = ["--steps", self.cfg.judge_steps, "--episodes", self.cfg.judge_episodes]
        sizes += ["--false-successes", FALSE_SUCCESSES]
        return self.stage(self.own / name, "train_success.py", *words, *sizes)

    @property
    def judge_of_true_frames(self) -> Path:
        """A success model of the first round's episodes as recorded, with a threshold for such frames."""
        demos = ["--demos", self.demos, self.attempts(self.policy), "--validation-fraction", 0.2]
        return self.judge("success_true", *demos, "--world-model", "none")

    def first_round(self, pose_dims: int = POSE_DIMS) -> tuple[Path, Models]:
        attempts = self.attempts(self.policy)
        return attempts, self.models(1, attempts, pose_dims)

    def rl(self, name: str, *words: object) -> Path:
        more = ["--seed", self.seed, "--horizon", self.cfg.horizon, "--starts", self.cfg.rl_starts]
        more += ["--gate-threshold", 0]  # measure, and go on
        return self.stage(self.own / name.replace(" ", "_").replace(",", ""), "train_rl.py", *words, *more)

    def imagination(
        self, name: str = "RL, imagination", pose_dims: int = POSE_DIMS, *, true_frames: bool = False
    ) -> Path:
        attempts, models = self.first_round(pose_dims)
        if true_frames:
            models = models._replace(success_model=self.judge_of_true_frames)
        words = ["--policy", self.policy, "--demos", self.demos, attempts, *models.flags, "--steps", self.cfg.rl_steps]
        return self.rl(name, *words, "--gate-evaluation", self.evaluation)

    def two_rounds(self) -> Path:
        policy = self.imagination()
        again = self.attempts(policy, 2)
        models = self.models(2, again)
        words = ["--policy", policy, "--demos", self.demos, again, *models.flags, "--steps", self.cfg.rl_steps]
        return self.rl("RL, imagination, two rounds", *words)

    def simulator(self, name: str, policy: Path, *words: object) -> Path:
        words = ["--world", "simulator", "--policy", policy, "--demos", self.demos, *self.where, *words]
        return self.rl(name, *words, "--steps", self.cfg.simulator_steps)

    def filtered(self) -> Path:
        won = self.own / "won"
        if not won.is_dir():
            convert.main([str(self.attempts(self.policy)), str(won), "--format", "hdf5", "--kind", "expert"])
        return self.sft("filtered", won, "--steps", self.cfg.sft_steps)

    def extra(self) -> Path:
        minutes = f"{read_lines(self.imagination() / 'log.jsonl')[-1]['minutes']:.2f}"
        more = ["--lr", 3e-4, "--warmup", 10, "--steps", NO_END, "--max-minutes", minutes]
        return self.sft("extra_SFT", "--init", self.policy, *more)

    def rft(self) -> Path:
        words = ["--policy", self.policy, "--demos", self.demos, "--world-model", self.first_round(0)[1].world_model]
        return self.stage(self.own / "RFT_R3", "train_rft.py", *words, "--gate-threshold", "none", "--seed", self.seed)

    def planning(self, policy: Path) -> tuple[Path, list[object]]:
        return policy, ["--plan", self.cfg.candidates, *self.first_round()[1].flags]

    def arm(self, name: str) -> tuple[Path, list[object]]:
        """Return the policy of an arm, and flags with which eval_libero.py plays it."""
        made: dict[str, Callable[[], Path]] = {
            "SFT": lambda: self.policy,
            "extra SFT": self.extra,
            "filtered cloning": self.filtered,
            "RFT R3": self.rft,
            "RL, simulator": lambda: self.simulator(name, self.policy),
            "RL, simulator, after filtered cloning": lambda: self.simulator(name, self.filtered()),
            "RL, simulator, judged": lambda: self.simulator(
                name, self.policy, "--success-model", self.judge_of_true_frames
            ),
            "RL, imagination": self.imagination,
            "RL, imagination, judge of true frames": lambda: self.imagination(name, true_frames=True),
            "RL, imagination, two rounds": self.two_rounds,
            "RL, imagination, actions": lambda: self.imagination(name, 0),
        }
        if name == "planning":
            return self.planning(self.policy)
        if name == "planning after RL":
            return self.planning(self.imagination())
        return made[name](), []


def measure(cfg: Config, runs: Runs, name: str) -> dict:
    """Collect the outcomes of an arm's policy on all starts: kind of starts, x_0 -> a string of 0 and 1, in order of
    the starts; minutes of its training, and what the gate found before.
    """
    policy, flags = runs.arm(name)
    starts, found = Starts(runs.suite, cfg.tasks, cfg.episodes, cfg.stage_preset), {}
    for perturb in cfg.perturb:
        for x0 in ("zero", "sampled"):
            kind = f"{name}_{perturb}_{x0}".translate(str.maketrans(" ,:", "___"))
            more = "--noise", x0, "--horizon", str(cfg.played), *map(str, flags)
            outcomes = starts.play(runs.own / "eval" / kind, policy, perturb, *more)
            found[f"{perturb}, {x0}"] = "".join(str(int(outcomes[start])) for start in sorted(outcomes))
    log = read_lines(policy / "log.jsonl")
    gate = {key: value for key, value in log[0].items() if key.startswith("gate")}
    return {"commit": commit(), "outcomes": found, "minutes": log[-1]["minutes"], "gate": gate}


def main(cfg: Config) -> dict:
    """Run what is missing; return what the JSON file holds.

    Raises:
        ValueError: an unknown arm, or the arms of one seed would start from two SFT policies.
    """
    check_known(cfg.arms, ARMS, "arm")
    report = read_report(cfg, "runs", free=FREE)
    report = {"command": "python studies/closed_loop_study.py", "machine": machine(), **report}
    for seed in cfg.seeds:
        for suite in cfg.suites:
            runs = Runs(cfg, suite, seed)
            for name in ("SFT", *cfg.arms):
                entry = report["runs"].setdefault(f"{suite}/{seed}", {})
                found, before = rounded(measure(cfg, runs, name)), entry.get(name)
                if before is not None and before["outcomes"] == found["outcomes"]:
                    continue  # it keeps its commit
                if before is not None and name == "SFT":
                    raise ValueError(
                        f"{cfg.out} has arms of {suite}, seed {seed}, from another SFT policy than that of "
                        f"{runs.policy}: give another --out, or --out-dir with the runs of those arms"
                    )
                entry[name] = found
                write(cfg.out, report)
    print("\n" + closed_loop_table(report))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
