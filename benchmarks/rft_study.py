"""The study: when does fine-tuning inside the world model beat more supervised training? (Tables 2, 3, 4, 10)

    python benchmarks/rft_study.py                                               two suites, three seeds, every arm
    python benchmarks/rft_study.py --suites tabletop_goal tabletop_long --seeds 0 --arms "extra SFT" "RFT R3"

For each suite: demonstrations, tokenizer and world model, once. For each seed: an early and a long-trained SFT policy,
then every arm from the long-trained one. RWR, R1, R2 and R3 have one advantage for a whole chunk, and a flow-matching
weight of 1; "RFT R1 per step" and "RFT divergence" one for every action step, and 0.1 (docs/study.md). "extra SFT" has
the wall time of "RFT R3" and goes on at a tenth of the peak learning rate; "extra SFT head" the same with the flow head
alone, the part that fine-tuning touches; "regression" the head alone, towards reward R1 by its own gradient.
"SFT, x_0 = 0" is the long-trained policy played from the middle of its noise. All policies of a seed play the same
starts, plain and perturbed. Every stage is a command of the repository, is printed, and is not run again once it is
done.

Writes one JSON: success rates with 95 % intervals per suite and perturbation, and over all suites, all seeds together
and apart; paired differences to the long-trained policy and to the controls "extra SFT" and "regression" (pairs of all
seeds pooled); success rates while the policies trained; the trust gate before the first step of "RFT R3". And a
picture of the curves of the first seed, against minutes and GRPO steps.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from stages import Panel, Starts, check_known, draw_curves, machine, rate, read_lines, run_once, show_rate

from vlarft.checkpoint import write_json
from vlarft.config import opt, parse, to_dict
from vlarft.metrics import paired_difference

HELD = ["--mse-weight", 1]  # what docs/study.md found from the plateau; per step, the policy's term is 8 times smaller
PER_STEP = ["--credit", "frame", "--ratio-per", "step"]
RFT_ARMS = {
    "RWR": ["--algorithm", "rwr", *HELD],
    "RFT R1": ["--reward", "r1", *HELD],
    "RFT R2": ["--reward", "r2", *HELD],
    "RFT R3": ["--reward", "r3", *HELD],
    "RFT R1 per step": ["--reward", "r1", *PER_STEP],
    "RFT divergence": ["--reward", "divergence", *PER_STEP],
}
HEAD = ["--train", "head", "--key-batch", 0]
EXTRA_ARMS = {
    "extra SFT": ["--lr", 3e-4],
    "extra SFT head": ["--lr", 3e-4, *HEAD],
    "regression": ["--lr", 1e-4, *HEAD, "--objective", "regression", "--draws", 3],
}
ARMS = (*EXTRA_ARMS, *RFT_ARMS)
RIVALS = "SFT", "extra SFT", "regression"  # that the others are compared with


@dataclass(frozen=True)
class Config:
    out_dir: str = opt("runs/study", "folder for all runs")
    out: str = opt("results/rft_study.json", "JSON file to write")
    figure: str = opt("docs/images/rft_study.png", "picture of the curves to write")
    suites: tuple[str, ...] = opt(("tabletop_object", "tabletop_spatial"), "suites")
    tasks: tuple[str, ...] = opt(tuple(map(str, range(10))), "tasks of each suite")
    seeds: tuple[int, ...] = opt((0, 1, 2), "seeds of SFT and of the arms")
    arms: tuple[str, ...] = opt(tuple(arm for arm in ARMS if arm != "extra SFT head"), "arms to run")
    perturb: tuple[str, ...] = opt(("none", "object:2.5", "robot:20"), "starts to play; none = the plain ones")
    perturbed_arms: tuple[str, ...] = opt(
        ("extra SFT", "regression", "RFT R3", "RFT R1 per step", "RFT divergence"),
        "arms that play perturbed starts, beside SFT",
    )
    episodes: int = opt(50, "initial states per task")
    stage_preset: str = opt("tiny", "preset of the stages")
    demos_per_task: int = opt(50, "demonstrations per task (LIBERO: 50)")
    world_model_steps: int = opt(4500, "steps of the world model")
    early_steps: int = opt(800, "steps of the early SFT policy")
    sft_steps: int = opt(5000, "steps of the long-trained SFT policy")
    rft_steps: int = opt(80, "steps of each fine-tuning")
    curve_points: int = opt(8, "success rates along a long SFT and along a fine-tuning, of the first seed")
    curve_episodes: int = opt(20, "episodes per task of each of them")


PRESETS = {
    "paper": Config(),
    "smoke": Config(
        suites=("tabletop_object",), tasks=("0",), seeds=(0,), arms=("extra SFT head", "RWR", "RFT R3"),
        perturb=("none", "robot:20"), perturbed_arms=("RFT R3",), episodes=2, stage_preset="smoke", demos_per_task=6,
        world_model_steps=10, early_steps=2, sft_steps=4, rft_steps=2, curve_points=2, curve_episodes=1,
    ),
}  # fmt: skip


def rft_minutes(run: Path) -> float:
    """Wall time that the steps of a fine-tuning took, without gates and diagnostics [min]."""
    rows = read_lines(run / "log.jsonl")
    return sum(row[name] for row in rows for name in ("policy_s", "world_model_s", "update_s")) / 60


def train(cfg: Config, suite: str, seed: int) -> dict[str, Path]:
    """All policies of one suite and seed: name -> checkpoint."""
    folder = Path(cfg.out_dir) / suite
    own, preset, demos = folder / f"seed{seed}", ["--preset", cfg.stage_preset], ["--demos", folder / "demos"]
    where = ["--suites", suite, "--tasks", *cfg.tasks, "--demos-per-task", cfg.demos_per_task]
    run_once(folder / "demos", "collect_demos.py", *preset, *where)

    def trained(out_dir: Path, *words: object) -> Path:
        return run_once(out_dir, *words) / "model.safetensors"

    tokenizer = trained(folder / "tokenizer", "train_tokenizer.py", *preset, *demos)
    world_model = trained(
        folder / "wm", "train_wm.py", *preset, *demos, "--tokenizer", tokenizer, "--steps", cfg.world_model_steps
    )

    def curve(steps: int) -> list[object]:
        if seed != cfg.seeds[0]:
            return []
        where = ["--success-suite", suite, "--success-tasks", *cfg.tasks, "--success-episodes", cfg.curve_episodes]
        return [*where, "--success-interval", max(1, steps // cfg.curve_points)]

    sft = ["train_sft.py", *preset, *demos, "--seed", seed]
    long = ["--steps", cfg.sft_steps, *curve(cfg.sft_steps)]
    policies = {
        "SFT early": trained(own / "early", *sft, "--steps", cfg.early_steps),
        "SFT": trained(own / "sft", *sft, *long),
    }
    rft = ["train_rft.py", *preset, *demos, "--policy", policies["SFT"], "--world-model", world_model]
    rft += ["--seed", seed, "--steps", cfg.rft_steps, "--no-gate-stop"]
    rft += curve(cfg.rft_steps)
    for name, flags in RFT_ARMS.items():
        if name in cfg.arms:
            policies[name] = trained(own / name.replace(" ", "_"), *rft, *flags)
    for name, flags in EXTRA_ARMS.items():
        if name in cfg.arms:
            minutes = f"{rft_minutes(own / timed_arm(cfg).replace(' ', '_')):.3f}"
            more = ["--init", policies["SFT"], "--warmup", 10, "--max-minutes", minutes, *flags]
            more += curve(cfg.sft_steps // 10)
            policies[name] = trained(own / name.replace(" ", "_"), *sft, *more)
    return policies


def timed_arm(cfg: Config) -> str:
    """The fine-tuning that extra SFT takes its wall time from: "RFT R3", or the first arm where that is not run.

    Raises:
        ValueError: there is none.
    """
    for name in ("RFT R3", *cfg.arms):
        if name in RFT_ARMS and name in cfg.arms:
            return name
    raise ValueError('extra SFT takes its wall time from a fine-tuning: add "RFT R3" or another one to --arms')


def curves(cfg: Config, suite: str, seed: int) -> dict[str, list[dict[str, float]]]:
    """Success rates while the policies trained: name -> [{step, minutes, success_rate}]."""
    found = {}
    for folder in sorted((Path(cfg.out_dir) / suite / f"seed{seed}").iterdir()):
        log = folder / "log.jsonl"
        rows = read_lines(log) if log.is_file() else []
        names = "step", "minutes", "success_rate"
        if rows := [{name: row[name] for name in names} for row in rows if "success_rate" in row]:
            found[folder.name] = rows
    return found


def play(cfg: Config, suite: str, seed: int, perturb: str, policies: dict[str, Path]) -> dict[str, dict[tuple, bool]]:
    """Outcomes of the policies of a seed that play such starts: name -> (task, initial state) -> success."""
    starts = Starts(suite, cfg.tasks, cfg.episodes, cfg.stage_preset)
    kind = f"eval_{perturb.replace(':', '_')}"
    playing = policies
    if perturb != "none":
        playing = {name: path for name, path in policies.items() if name in ("SFT", *cfg.perturbed_arms)}
    found = {name: starts.play(path.parent / kind, path, perturb) for name, path in playing.items()}
    path = policies["SFT"]
    found["SFT, x_0 = 0"] = starts.play(path.parent / f"{kind}_zero", path, perturb, "--noise", "zero")
    return found


def compare(runs: list[dict[str, dict[tuple, bool]]]) -> dict[str, dict]:
    """Rates of each policy, and paired differences to `RIVALS`, over the outcomes of several runs (seeds, suites)."""
    found = {}
    for name in runs[0]:
        starts = [(run, start) for run, outcomes in enumerate(runs) for start in sorted(outcomes[name])]
        outcomes = {
            other: [runs[run][other][start] for run, start in starts] for other in (*RIVALS, name) if other in runs[0]
        }
        found[name] = {"all": rate(outcomes[name]), "runs": [rate(list(run[name].values())) for run in runs]}
        for rival in RIVALS:
            if rival in outcomes and rival != name:
                found[name][f"against {rival}"] = paired_difference(outcomes[rival], outcomes[name])._asdict()
    return found


def trust_gate(cfg: Config, suite: str, seed: int) -> dict[str, float]:
    """What the gate said before the first step of "RFT R3"; empty where that arm is not run."""
    log = Path(cfg.out_dir) / suite / f"seed{seed}" / "RFT_R3" / "log.jsonl"
    first = json.loads(log.read_text().splitlines()[0]) if log.is_file() else {}
    return {name: value for name, value in first.items() if name.startswith("gate")}


def table(report: dict) -> str:
    """One row per policy, suite and perturbation."""
    lines = []
    for suite, starts in {**{k: v["starts"] for k, v in report["suites"].items()}, "all": report["all"]}.items():
        for perturb, found in starts.items():
            lines.append(f"{suite}, starts: {perturb}")
            for name, values in found.items():
                lines.append(f"  {name:<16} {show_rate(values['all'], values.get('against SFT'))}")
    return "\n".join(lines)


def panels(report: dict) -> list[Panel]:
    """Curves of each suite's first seed: all trainings against minutes, fine-tunings against steps as well."""
    fine_tunings = {name.replace(" ", "_") for name in RFT_ARMS}
    found = []
    for suite, entry in report["suites"].items():
        series = {name: rows for name, rows in entry["curves"][0].items() if name != "sft"}
        for x, label in ("minutes", "minutes of training"), ("step", "GRPO steps"):
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
        ValueError: an unknown arm.
    """
    check_known((*cfg.arms, *cfg.perturbed_arms), ARMS, "arm")
    report = {
        "command": "python benchmarks/rft_study.py",
        "config": to_dict(cfg),
        "machine": machine(),
        "suites": {},
        "all": {},
    }
    played: dict[str, list] = {perturb: [] for perturb in cfg.perturb}
    for suite in cfg.suites:
        policies = {seed: train(cfg, suite, seed) for seed in cfg.seeds}
        starts = {}
        for perturb in cfg.perturb:
            runs = [play(cfg, suite, seed, perturb, policies[seed]) for seed in cfg.seeds]
            starts[perturb] = compare(runs)
            played[perturb] += runs
            report["all"][perturb] = compare(played[perturb])
        report["suites"][suite] = {
            "starts": starts,
            "trust_gate": [trust_gate(cfg, suite, seed) for seed in cfg.seeds],
            "curves": [curves(cfg, suite, seed) for seed in cfg.seeds],
        }
        write_json(cfg.out, report)
    draw_curves(panels(report), Path(cfg.figure))
    print("\n" + table(report))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__.splitlines()[0]))
