"""Run the whole pipeline, from nothing: demonstrations, tokenizer, world model, SFT, RFT, evaluation (Algorithm 1 on a
laptop).

    python demo.py                     preset tiny: 11 to 14 minutes on 2 CPU cores with AMX
    python demo.py --seed 1            the same with other demonstrations, splits, weights and noise
    python demo.py --preset smoke      the same stages at sizes that prove nothing, in one or two minutes

Calls the stage scripts, each as the command that a user would type, and prints it; two run side by side where neither
waits for the other. Ends with a table of success rates on the same starts, with 95 % intervals: the SFT policy of 10
demonstrations a task, and what fine-tuning makes of it: extra SFT (at a tenth of the learning rate, as plain
fine-tuning would go on), RFT, with the reward and the sizes that were steadiest (docs/findings.md), and what the
paper's method does not do, go beyond the demonstrations: closed-loop reinforcement learning from outcomes, in the
simulator. All of them are played from a sampled x_0 and from x_0 = 0, which costs no training. And the world model's
metrics beside the baseline that copies the first frame.

Reads no data. Writes into out_dir one folder per stage and summary.json, summary.md, demonstrations.png, curves.png,
before_after.gif and report.html, a page of all results; further pictures come from the stages. The same command resumes
an interrupted demo: finished stages are skipped, the one that was cut short goes on.
"""

import json
import math
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from vlarft.data import WindowSampler, load_episodes
from vlarft.report.page import write_report
from vlarft.report.runs import read_log
from vlarft.run.checkpoint import read_json, write_atomic, write_json
from vlarft.run.config import Range, opt, to_dict
from vlarft.run.pictures import grid, save_gif, save_png
from vlarft.run.script import run_script
from vlarft.run.stages import Stage, peak_bytes, run_stages, wall_seconds
from vlarft.sim.replay import replay_frames
from vlarft.statistics import paired_difference

ROOT = Path(__file__).resolve().parent

# start seeds between the demonstrations of two seeds of the demo: more than it collects per task, so that they share
# none; noisy attempts, 10000 further on, start where demonstrations of the seed 10 higher do
DEMOS_PER_SEED = 1000
MOST_SEED = 970  # collect_demos.py takes start seeds up to 970000


@dataclass(frozen=True)
class Config:
    """One run of the pipeline."""

    out_dir: str = opt("runs/demo", "folder that the demo writes", group="run")
    seed: Annotated[int, Range(0, MOST_SEED)] = opt(0, "seed of every stage")
    stage_preset: Literal["tiny", "smoke"] = opt("tiny", "preset of every stage")


PRESETS = {"tiny": Config(), "smoke": Config(out_dir="runs/smoke", stage_preset="smoke")}
STEADIEST = {"reward": "divergence", "per_step": True}  # docs/findings.md; R3 with one advantage a chunk is the paper's
SIZES = {  # flags of the stages, by preset
    "tiny": {
        "collect": {"demos_per_task": 10},  # few: the policy's mean is then wrong, and outcomes can teach it
        "sft": {"steps": 1000},
        "tokenizer": {"steps": 900},
        "wm": {"steps": 1000},
        "rl": {"steps": 90, "starts": 4},  # many small updates, since time is short
        "rft": {**STEADIEST, "steps": 80, "starts": 12, "group": 4},
        "sft_extra": {"steps": 550},  # about the time of RFT; a run beside it cannot know what RFT will take
        "eval_wm": {"episodes": 16},
        # no success of these tasks takes longer; what fails would go on to step 180
        "eval": {"horizon": 64},
        "eval_zero": {"horizon": 64},
    },
    "smoke": {"rft": STEADIEST},
}
POLICIES = {"SFT": "sft", "+ extra SFT": "sft_extra", "+ RFT": "rft", "+ RL, simulator": "rl"}  # rows, their stages
PLAYED = {"": "", "_zero": ", x_0 = 0"}  # folders of the evaluations, and how their rows are called


def draw_demonstrations(demos: Path, path: Path) -> None:
    """Write a PNG, one row per task: eight frames of its first demonstration."""
    first = {}
    for episode in load_episodes(demos):
        first.setdefault(episode.instruction, episode)
    sampler = WindowSampler(list(first.values()), num_frames=1)
    rows = []
    for number, episode in enumerate(first.values()):
        times = np.linspace(0, len(episode) - 1, 8).round().astype(int)
        rows.append(sampler.windows(np.array([(number, t) for t in times])).frames[:, 0])
    save_png(path, grid(rows))


def draw_curves(out_dir: Path, rows: dict[str, dict], path: Path) -> None:
    """Write a PNG: losses of the stages, reward or success while training, success rates (rows of `success_rows`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    panels = [
        ("tokenizer", "tokenizer: training loss", ("loss",)),
        ("wm", "world model: cross-entropy [nats]", ("loss", "val_loss")),
        ("sft", "SFT: flow-matching loss (Eq. 4)", ("flow_mse", "val_flow_mse")),
        ("rft", "RFT: reward", ("reward",)),
        ("rl", "RL, simulator: success of its episodes", ("success",)),
    ]
    for axis, (stage, title, names) in zip(axes.flat, panels):
        log = read_log(out_dir / stage)
        for name in names:
            if name in log and len(log[name]):
                axis.plot(*log[name].T, label=name, marker="." if len(log[name]) < 30 else None)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.legend()
    axis = axes.flat[-1]
    rates = [row["all"] for row in reversed(rows.values())]
    widths = [100 * r["rate"] for r in rates]
    errors = [[100 * (r["rate"] - r["low"]) for r in rates], [100 * (r["high"] - r["rate"]) for r in rates]]
    colours = ["#79c" if "x_0 = 0" in name else "#9aa" for name in reversed(rows)]
    axis.barh(range(len(rows)), widths, 0.35, xerr=errors, capsize=3, color=colours)
    axis.set_yticks([])
    for height, name in enumerate(reversed(rows)):
        axis.text(1, height + 0.2, name, va="bottom", fontsize=8)  # above its bar
    axis.set_title("success [%], 95 % intervals")
    axis.set_xlim(0, 100)
    axis.set_ylim(-0.5, len(rows))
    figure.savefig(path, dpi=80)


def read_episodes(folder: Path, policy: str) -> dict[tuple, dict]:
    """Read the episodes of a policy from an evaluation's folder: (suite, task, initial state) -> record."""
    records = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    return {(r["suite"], r["task"], r["init_state"]): r for r in records if r["policy"] == policy}


def success_rows(out: Path) -> dict[str, dict]:
    """Make the rows of the table of success rates, two for each policy: from a sampled x_0, and from x_0 = 0.

    Args:
        out: the demo's folder.

    Returns:
        name -> "policy", "outcomes" (start by start, 1 = success), "all" (the rate), and the paired differences
        "against_first" and "against_zero", from the SFT policy played the one and the other way.
    """
    rows, won = {}, {}
    for ending, how in PLAYED.items():
        found = json.loads((out / f"eval{ending}" / "results.json").read_text())["policies"]
        for name, entry in zip(POLICIES, found, strict=True):
            episodes = read_episodes(out / f"eval{ending}", entry["policy"])
            won[name + how] = [bool(episodes[start]["success"]) for start in sorted(episodes)]
            outcomes = "".join(str(int(success)) for success in won[name + how])
            rows[name + how] = {"policy": entry["policy"], "outcomes": outcomes, "all": entry["all"]}
    first, zero = ("SFT" + how for how in PLAYED.values())
    for name, own in won.items():
        if name != first:
            rows[name]["against_first"] = paired_difference(won[first], own)._asdict()
        if name not in (first, zero):
            rows[name]["against_zero"] = paired_difference(won[zero], own)._asdict()
    return {name + how: rows[name + how] for name in POLICIES for how in PLAYED.values()}


def first_differences(before: dict[tuple, dict], after: dict[tuple, dict], names: tuple[str, str]) -> dict[str, tuple]:
    """Find the first start that only the later of two policies wins, and the first that only the earlier one wins, by
    title; without any difference the first start.
    """
    found = {}
    for title, won in ((f"{names[1]} alone wins", (False, True)), (f"{names[0]} alone wins", (True, False))):
        differing = [start for start in before if (before[start]["success"], after[start]["success"]) == won]
        if differing:
            found[title] = min(differing)
    return found or {f"{names[0]} and {names[1]} alike": min(before)}


def draw_before_after(pairs: dict[tuple[str, str], tuple[Path, dict, dict]], path: Path) -> None:
    """Write a GIF: pairs of policies (left the earlier one) from the first starts at which they differ, one row a
    start.

    Args:
        pairs: names of two policies -> folder of the evaluation that played both, and their rows of `success_rows`.
        path: of the GIF.
    """
    rows = {}
    for names, (folder, *policies) in pairs.items():
        both = [read_episodes(folder, row["policy"]) for row in policies]
        for title, start in first_differences(*both, names).items():
            rows[title] = [replay_frames(*start, episodes[start]["actions"], size=128) for episodes in both]
    length = max(len(film) for films in rows.values() for film in films)
    pictures = []
    for t in range(length):  # an episode that has ended shows its last frame
        shown = [
            [torch.from_numpy(film[min(t, len(film) - 1)]).movedim(-1, 0) / 255 for film in films]
            for films in rows.values()
        ]
        pictures.append(grid(shown, list(rows)))
    save_gif(path, pictures, frames_per_second=10, hold_last=1.5)


def stages(cfg: Config) -> list[Stage]:
    """List the stages in the order in which they start, side by side where they do not wait for each other."""
    out = Path(cfg.out_dir)
    demos, sizes = out / "demos", SIZES[cfg.stage_preset]
    common = {"preset": cfg.stage_preset, "seed": cfg.seed}

    def stage(name: str, script: str, after: tuple[str, ...], **flags: object) -> Stage:
        return Stage(name, ROOT / script, {**common, **flags, **sizes.get(name, {}), "out_dir": out / name}, after)

    collect = {**common, "seed": cfg.seed * DEMOS_PER_SEED, **sizes.get("collect", {}), "out_dir": demos}
    # each of two stages side by side has half of the cores; a worker alone would cost more than it gives
    share = (os.cpu_count() or 1) // 2
    workers = share if share > 1 else 0
    data, tuned = {"split_seed": cfg.seed, "demos": demos}, {"demos": demos, "policy": out / "sft"}
    play = {"policies": [out / name for name in POLICIES.values()], "workers": workers, "batch_size": 50}
    played = ("sft_extra", "rft", "rl")
    return [
        Stage("collect", ROOT / "collect_demos.py", collect),
        stage("sft", "train_sft.py", ("collect",), **data),
        stage("tokenizer", "train_tokenizer.py", ("collect",), **data),
        stage("rl", "train_rl.py", ("sft",), **tuned, world="simulator", workers=workers),
        stage("wm", "train_wm.py", ("tokenizer",), **data, tokenizer=out / "tokenizer"),
        # a demo goes on whatever the trust gate finds, and prints it
        stage("rft", "train_rft.py", ("sft", "wm"), **tuned, world_model=out / "wm", gate_threshold="none"),
        # a tenth of the peak: a restart at the peak would first undo what the first run learnt
        stage("sft_extra", "train_sft.py", ("sft",), **data, init=out / "sft", lr=3e-4),
        stage("eval_wm", "eval_wm.py", ("wm",), demos=demos, world_model=out / "wm", true_error=True),
        stage("eval", "eval_libero.py", played, **play),
        stage("eval_zero", "eval_libero.py", played, **play, noise="zero", animate=2, animate_failed=1),
    ]


def versions() -> dict[str, str]:
    """Return what the numbers of a run may depend on besides its seed."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy", "mujoco")}}


def probe_seconds() -> float:
    """Repeat a small training step on one thread for a second; return the shortest [s]: how fast this machine is."""
    network = torch.nn.Sequential(torch.nn.Conv2d(32, 64, 3), torch.nn.Flatten(), torch.nn.Linear(64 * 30 * 30, 128))
    images, threads, times = torch.zeros(16, 32, 32, 32), torch.get_num_threads(), []
    torch.set_num_threads(1)
    until = time.perf_counter() + 1
    while (started := time.perf_counter()) < until:
        network(images).sum().backward()
        times.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return min(times)


def expected_seconds(cfg: Config, probe: float) -> dict[str, float]:
    """Expect of each stage the time that it took in the committed run whose probe was fastest; {} if unknown.

    On a slower machine it is more, by the square root of the probes' ratio: other load slows a probe more than stages.
    """
    path = ROOT / "results" / "demo.json"
    if cfg.stage_preset != "tiny" or not path.is_file():
        return {}
    run = min(json.loads(path.read_text())["runs"].values(), key=lambda run: run["probe_seconds"])
    slower = math.sqrt(probe / run["probe_seconds"])
    return {name: slower * seconds for name, seconds in run["seconds"].items()}


def main(cfg: Config) -> dict:
    """Run what is missing; return what summary.json holds."""
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "summary.json"
    probe = read_json(path)["probe_seconds"] if path.is_file() else probe_seconds()
    ran = run_stages(out, stages(cfg), at_once=min(2, os.cpu_count() or 1), expected=expected_seconds(cfg, probe))
    rows, log = success_rows(out), read_log(out / "rft")
    draw_demonstrations(out / "demos", out / "demonstrations.png")
    draw_curves(out, rows, out / "curves.png")
    pairs = {
        ("SFT", "RFT"): (out / "eval", rows["SFT"], rows["+ RFT"]),
        ("SFT, x_0 = 0", "RL, x_0 = 0"): (out / "eval_zero", rows["SFT, x_0 = 0"], rows["+ RL, simulator, x_0 = 0"]),
    }
    draw_before_after(pairs, out / "before_after.gif")
    summary = {
        "config": to_dict(cfg),
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine()},
        "versions": versions(),
        "probe_seconds": probe,
        "stages": ran,
        "minutes": wall_seconds(ran) / 60,
        "peak_gib": peak_bytes(ran) / 2**30,
        "evaluation": rows,
        "world_model": json.loads((out / "eval_wm" / "results.json").read_text()),
        "trust_gate": {name: values[0, 1] for name, values in log.items() if name.startswith("gate")},
    }
    write_json(path, summary)
    write_report([out], out / "report.html")
    print_summary(summary, out)
    return summary


def print_world_model(results: dict) -> None:
    """Print frame metrics beside those of copying the first frame, and how well the rewards rank perturbed action
    chunks.
    """
    imagined, copied = (results["frames"]["all"][name] for name in ("imagined", "copy"))
    print("\nworld model, held-out episodes    imagined   first frame copied")
    for name, label in (
        ("psnr_moving", "PSNR, moving pixels [dB]"),
        ("psnr", "PSNR, all pixels [dB]"),
        ("ssim", "SSIM"),
    ):
        print(f"  {label:<30} {imagined[name][-1]:9.2f}   {copied[name][-1]:9.2f}")
    print("perturbed chunks, rank correlation with    true frames   true state   (within a start, mean over starts)")
    for reward in ("R3 greedy", "R3 common", "R2 greedy"):
        found = [results["sensitivity"][truth][reward]["all"]["spearman"] for truth in ("true frames", "true state")]
        print(f"  {reward:<38} {found[0]:13.2f} {found[1]:12.2f}")


def success_table(evaluation: dict[str, dict]) -> str:
    """Format the rows of `success_rows` as an aligned Markdown table, with a sentence on what x_0 = 0 does for free."""
    cells = [["policy", "success, 95 % interval", "against SFT, same starts", "against SFT from x_0 = 0"]]
    for name, entry in evaluation.items():
        rate = entry["all"]
        interval = f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
        cells.append([name, interval, *(gain(entry.get(base)) for base in ("against_first", "against_zero"))])
    widths = [max(map(len, column)) for column in zip(*cells)]
    rows = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in cells]
    rows.insert(1, "-|-".join("-" * width for width in widths))
    text, found = "".join(f"| {row} |\n" for row in rows), evaluation["+ RFT"]["against_zero"]
    ahead = "is ahead of" if found["low"] > 0 else "is not ahead of"
    return f"{text}\nRFT {ahead} the SFT policy from x_0 = 0, which costs no training: {gain(found)} points.\n"


def gain(found: dict | None) -> str:
    """Format a paired difference in percentage points; empty where there is none."""
    if found is None:
        return ""
    return f"{100 * found['difference']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def print_summary(summary: dict, out: Path) -> None:
    """Print the tables."""
    print("\nstage            minutes   peak memory")
    for name, stage in summary["stages"].items():
        print(f"  {name:<14} {stage['seconds'] / 60:7.1f}   {stage['peak_bytes'] / 2**30:6.2f} GiB")
    print(f"  {'all':<14} {summary['minutes']:7.1f}   {summary['peak_gib']:6.2f} GiB")
    text = success_table(summary["evaluation"])
    write_atomic(out / "summary.md", lambda tmp: tmp.write_text(text))
    print(f"\n{text}")
    print_world_model(summary["world_model"])
    gate = summary["trust_gate"]
    ranks = [f"{gate[f'gate_{family}']:.2f} ± {gate[f'gate_{family}_se']:.2f}" for family in ("policy", "dataset")]
    print(
        f"trust gate, rank correlation of the reward and action error: {ranks[0]} among chunks sampled from the policy,"
    )
    print(f"{ranks[1]} around the demonstrations' actions (± standard error; --gate-threshold is 0.25 by default)")
    print(f"\nall of it as one page: {out / 'report.html'}")
    print(f"pictures in {out}: demonstrations.png, curves.png, eval_wm/, and before_after.gif:")
    print("the first starts that one policy alone wins (left the earlier policy), in both directions")
    if summary["config"]["stage_preset"] == "smoke":
        print("preset smoke only shows that the stages run; its numbers mean nothing")
    else:
        print(f"one seed ({summary['config']['seed']}); --seed 1 with another --out-dir is a second one")


if __name__ == "__main__":
    run_script(main, Config, PRESETS, __doc__)
