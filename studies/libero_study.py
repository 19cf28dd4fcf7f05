"""The paper's Tables 1 to 3 in small: two suites of LIBERO on two CPU cores, with controls.

    python studies/libero_study.py --suites libero_object --arms SFT
    python studies/libero_study.py --arms "RFT R3" "extra SFT" --full SFT "RFT R3"
    python studies/libero_study.py --suites libero_object --policy checkpoints/libero_object_sft \
        --world-model checkpoints/libero_object_world_model --arms SFT --out runs/libero_released.json

LIBERO must be installed (docs/libero.md). For each suite: demonstrations of the scripted experts; the SFT policy, and
copies of it along its training, which play `curve_episodes` states a task from x_0 = 0 (the curve); attempts of its
first copy, which fails more often than the policy; a tokenizer and a world model of demonstrations and these attempts,
measured on held-out episodes (Table 1). Then the arms, all from the SFT policy:

- "RFT R3" is the paper's; "RFT R1 per step" uses no world model. Both train whatever the trust gate says.
- "extra SFT" goes on with the demonstrations for the minutes of "RFT R3".
- "filtered cloning" goes on for as long with the demonstrations and the successes among as many attempts of the SFT
  policy. It has another split of the demonstrations: the held-out ones are drawn from all episodes.
- "RL, simulator" is not the paper's: train_rl.py, by the outcome of whole episodes in the simulator.

With `--policy` and `--world-model`, checkpoints of one suite, the arms start from these, which are neither trained nor
measured along their training. The demonstrations are then collected anew, under the names of those that they learned
from, and are split by these names: leave --demos-per-task as it was.

All policies play the same starts: plain ones (Table 2) from x_0 = 0 and a sampled x_0, SFT also with the gripper's x_0
alone sampled; and with objects or the hand displaced (Table 3) from x_0 = 0. Arms that `--full` names then play all 50
initial states from x_0 = 0, and so does SFT. Every stage is a command of the repository, is printed, and is not run
again once it is done; of a model that has been trained again, all is measured again. The JSON file gathers runs:
outcomes start by start (1 = success), digests of the models, minutes and commit of each stage; two processes may work
on two suites. Trainings use OMP_NUM_THREADS threads.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from records import rounded, write
from stage_tables import libero_arms_table
from stages import Starts, check_known, machine, read_lines, read_report, run_once

from vlarft.data import convert, load_episodes
from vlarft.run.checkpoint import checkpoint_file, model_digest, read_json
from vlarft.run.config import opt, parse
from vlarft.sim import NUM_INITIAL_STATES
from vlarft.sim.suites import task_indices

RFT_ARMS = {"RFT R3": ["--reward", "r3"], "RFT R1 per step": ["--reward", "r1", "--per-step"]}
ARMS = (*RFT_ARMS, "extra SFT", "filtered cloning", "RL, simulator")
PERTURBED = {"libero_object": ("object:2.5", "object:5"), "libero_spatial": ("robot:20", "robot:50")}
NO_END = 10**6


@dataclass(frozen=True)
class Config:
    out_dir: str = opt("runs/libero", "folder for all runs")
    out: str = opt("runs/libero.json", "JSON file that gathers the runs")
    suites: tuple[str, ...] = opt(("libero_object", "libero_spatial"), "suites")
    tasks: tuple[str, ...] | None = opt(None, "tasks of each suite; none: all")
    arms: tuple[str, ...] = opt(ARMS, "arms to run beside SFT")
    full: tuple[str, ...] = opt((), "arms that play all initial states, and SFT with them")
    policy: str | None = opt(None, "SFT policy to start from; none: it is trained")
    world_model: str | None = opt(None, "its world model; none: it is trained")
    seed: int = opt(0, "seed of all trainings")
    stage_preset: str = opt("libero", "preset of the stages")
    demos_per_task: int = opt(50, "demonstrations per task")
    attempts: int = opt(10, "attempts per task of a policy")
    sft_steps: int = opt(6000, "steps of the SFT policy")
    copies: int = opt(4, "copies of it along its training")
    tokenizer_steps: int = opt(4000, "steps of the tokenizer")
    model_steps: int = opt(4500, "steps of the world model")
    rft_steps: int = opt(20, "steps of a fine-tuning")
    rl_steps: int = opt(20, "steps of RL in the simulator, 128 episodes each")
    episodes: int = opt(20, "initial states per task")
    curve_episodes: int = opt(5, "initial states per task of the curve")


FREE = "out_dir", "out", "suites", "arms", "full"  # may differ in one JSON file
PRESETS = {
    "paper": Config(),
    "smoke": Config(
        suites=("tabletop_object",), tasks=("0",), full=("extra SFT",), stage_preset="smoke",
        demos_per_task=6, attempts=4, sft_steps=4, copies=2, tokenizer_steps=2, model_steps=2, rft_steps=1, rl_steps=1,
        episodes=2, curve_episodes=1,
    ),
}  # fmt: skip


def folder_name(name: str) -> str:
    """Return the name of an arm's folder, or of an evaluation's."""
    return name.replace(",", "").replace(" ", "_").replace(":", "_")


class Runs:
    """The runs of one suite, each made when it is first asked for."""

    def __init__(self, cfg: Config, suite: str) -> None:
        self.cfg, self.suite, self.folder = cfg, suite, Path(cfg.out_dir) / suite
        self.tasks = tuple(map(str, task_indices(suite, cfg.tasks)))
        self.where = ["--suites", suite, "--tasks", *self.tasks]

    def stage(self, name: str, script: str, *words: object) -> Path:
        return run_once(self.folder / name, script, "--preset", self.cfg.stage_preset, *words)

    def training(self, name: str, script: str, *words: object) -> Path:
        return self.stage(name, script, *words, "--seed", self.cfg.seed)

    def collect(self, name: str, *words: object) -> Path:
        return self.stage(name, "collect_demos.py", *self.where, "--noisy-per-task", 0, *words)

    @property
    def demos(self) -> Path:
        return self.collect("demos", "--demos-per-task", self.cfg.demos_per_task)

    @property
    def policy(self) -> Path:
        if self.cfg.policy:
            return Path(self.cfg.policy)
        words = ["--steps", self.cfg.sft_steps, "--keep-interval", max(1, self.cfg.sft_steps // self.cfg.copies)]
        return self.training("sft", "train_sft.py", "--demos", self.demos, *words)

    @property
    def copies(self) -> list[Path]:
        """The SFT policy along its training."""
        return sorted(self.policy.glob("model_[0-9]*.safetensors"))

    def attempts(self, name: str, policy: Path, seed: int) -> Path:
        words = ["--policy", policy, "--policy-per-task", self.cfg.attempts, "--seed", seed]
        return self.collect(name, "--demos-per-task", 0, *words)

    @property
    def world_model(self) -> Path:
        if self.cfg.world_model:
            return Path(self.cfg.world_model)
        first = next(iter(self.copies), self.policy)
        demos = ["--demos", self.demos, self.attempts("attempts", first, 500_000)]
        tokenizer = self.training("tokenizer", "train_tokenizer.py", *demos, "--steps", self.cfg.tokenizer_steps)
        words = ["--tokenizer", tokenizer, "--steps", self.cfg.model_steps]
        return self.training("wm", "train_wm.py", *demos, *words)

    def place(self, name: str) -> Path:
        """Return where an arm's policy is, or will be."""
        if name == "SFT":
            return Path(self.cfg.policy or self.folder / "sft")
        return self.folder / folder_name(name)

    def arm(self, name: str) -> Path:
        """Return the policy of an arm."""
        if name == "SFT":
            return self.policy
        folder = folder_name(name)
        if name == "RL, simulator":
            words = ["--world", "simulator", "--policy", self.policy, "--demos", self.demos, *self.where]
            return self.training(folder, "train_rl.py", *words, "--steps", self.cfg.rl_steps)
        if name in RFT_ARMS:
            words = ["--policy", self.policy, "--demos", self.demos, *RFT_ARMS[name], "--steps", self.cfg.rft_steps]
            words += [] if "r1" in words else ["--world-model", self.world_model, "--gate-threshold", "none"]
            return self.training(folder, "train_rft.py", *words)
        minutes = f"{max(0.01, read_lines(self.arm('RFT R3') / 'log.jsonl')[-1]['minutes']):.2f}"
        more = ["--init", self.policy, "--lr", 3e-4, "--warmup", 10, "--steps", NO_END, "--max-minutes", minutes]
        return self.training(folder, "train_sft.py", "--demos", *self.data(name), *more)

    def data(self, name: str) -> list[Path]:
        """Return the demonstrations of a supervised arm."""
        if name == "extra SFT":
            return [self.demos]
        attempts, won = self.attempts("own_attempts", self.policy, 600_000), self.folder / "won"
        if not any(episode.success for episode in load_episodes(attempts, successes_only=False)):
            return [self.demos]
        if not won.is_dir():
            convert.main([str(attempts), str(won), "--format", "hdf5", "--kind", "expert"])
        return [self.demos, won]

    def play(self, name: str, policy: Path, perturb: str, x0: str, episodes: int) -> str:
        """Play a policy; return its outcomes, in order of the starts."""
        starts = Starts(self.suite, self.tasks, episodes, self.cfg.stage_preset)
        place = self.folder / "eval" / folder_name(f"{name}_{perturb}_{x0}_{episodes}")
        played = starts.play(place, policy, perturb, "--noise", x0)
        return "".join(str(int(played[start])) for start in sorted(played))

    def curve(self) -> list[dict]:
        """Measure the success of the SFT policy along its training, from x_0 = 0."""
        minutes = {row["step"] + 1: row["minutes"] for row in read_lines(self.policy / "log.jsonl")}
        rows = []
        for copy in self.copies:
            step = int(copy.stem.split("_")[1])
            outcomes = self.play(copy.stem, copy, "none", "zero", self.cfg.curve_episodes)
            rows.append({"step": step, "minutes": minutes.get(step), "outcomes": outcomes})
        return rows

    def frames(self) -> dict:
        """Compute Table 1: what the world model imagines, beside copying the first frame; means over frames."""
        model = self.world_model
        found = self.stage(f"eval/wm_{model_digest(model)}", "eval_wm.py", "--world-model", model)
        frames = json.loads((found / "results.json").read_text())["frames"]["all"]
        return {which: {name: values[-1] for name, values in of.items()} for which, of in frames.items()}


def kinds(cfg: Config, suite: str, name: str) -> dict[str, tuple[str, str, int]]:
    """Return what an arm plays: kind of starts and x_0 -> perturbation, x_0, initial states per task."""
    played = [("none", "zero"), ("none", "sampled"), *((perturb, "zero") for perturb in PERTURBED.get(suite, ()))]
    played += [("none", "gripper")] if name == "SFT" else []
    found = {", ".join(how): (*how, cfg.episodes) for how in played}
    return found | ({"all, zero": ("none", "zero", NUM_INITIAL_STATES)} if name in full(cfg) else {})


def full(cfg: Config) -> tuple[str, ...]:
    """List the arms that play all initial states: SFT too if any does, for the comparison."""
    return ("SFT", *cfg.full) if cfg.full else ()


def holds_another(run: Path, digest: str | None) -> bool:
    """Return whether a run's folder holds another model than that of the digest; one that is not there holds none."""
    return checkpoint_file(run).is_file() and model_digest(run) != digest


def measure(cfg: Config, runs: Runs, name: str, before: dict) -> Iterator[dict]:
    """Play what is missing of an arm: yield, after each kind of starts, its outcomes, kind of starts and x_0 -> a
    string of 0 and 1; minutes of its training, its gate, and the policy's digest. What `before` holds of another policy
    than that of the run's folder, or without a digest, is played again.
    """
    wanted, outcomes = kinds(cfg, runs.suite, name), dict(before.get("outcomes", {}))
    if holds_another(runs.place(name), before.get("digest")):
        outcomes = {}
    if wanted.keys() <= outcomes.keys():
        return
    policy = runs.arm(name)
    log = [{"minutes": None}] if cfg.policy and name == "SFT" else read_lines(policy / "log.jsonl")
    gate = {key: value for key, value in log[0].items() if key.startswith("gate")}
    found = {"minutes": log[-1]["minutes"], "gate": gate, "digest": model_digest(policy)}
    for kind, how in wanted.items():
        if kind not in outcomes:
            outcomes[kind] = runs.play(name, policy, *how)
            yield rounded({"outcomes": outcomes, **found})


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for a file of the same folder."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def stages(folder: Path) -> dict[str, dict]:
    """Read wall time and commit of each stage and evaluation of a suite."""
    files = sorted(folder.rglob("stage.json"))
    return {str(file.parent.relative_to(folder)): read_json(file) for file in files}


def study(cfg: Config, suite: str) -> None:
    """Run what is missing of a suite, and keep what is found in the JSON file."""
    runs, report = Runs(cfg, suite), read_report(cfg, "runs", free=FREE)
    entry = report["runs"].get(suite, {"arms": {}})

    def save() -> None:
        entry["stages"] = stages(runs.folder)
        facts = {"command": "python studies/libero_study.py", "machine": machine()}
        with alone(Path(cfg.out)):  # another process may work on another suite
            latest = {**facts, **read_report(cfg, "runs", free=FREE)}
            write(cfg.out, {**latest, "runs": {**latest["runs"], suite: entry}})

    def describe(part: str, make: Callable[[], object], run: str) -> None:
        if part not in entry or holds_another(runs.folder / run, entry[part].get("digest")):
            found = rounded(make())
            entry[part] = {"found": found, "digest": model_digest(runs.folder / run)}
            save()

    def play(names: tuple[str, ...]) -> None:
        arms = {name: measure(cfg, runs, name, entry["arms"].get(name, {})) for name in names}
        while arms:  # all arms on the first kind of starts, then all on the next
            for name in list(arms):
                if found := next(arms[name], None):
                    entry["arms"][name] = found
                    save()
                else:
                    del arms[name]

    if cfg.policy is None:
        describe("curve", runs.curve, "sft")
        play(("SFT",))  # before the world model takes an hour
    if cfg.world_model is None:
        describe("frames", runs.frames, "wm")
    play(("SFT", *cfg.arms, *full(cfg)))


def main(cfg: Config) -> dict:
    """Run what is missing; return what the JSON file holds.

    Raises:
        ValueError: an unknown arm, or checkpoints to start from and several suites.
    """
    check_known((*cfg.arms, *cfg.full), ("SFT", *ARMS), "arm")
    if (cfg.policy or cfg.world_model) and len(cfg.suites) != 1:
        raise ValueError("--policy and --world-model are of one suite: name it by --suites")
    for suite in cfg.suites:
        study(cfg, suite)
    report = read_report(cfg, "runs", free=FREE)
    print("\n" + libero_arms_table(report))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
