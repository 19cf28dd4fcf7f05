"""The whole pipeline, from nothing: demonstrations, tokenizer, world model, SFT, RFT, evaluation (Algorithm 1 on a
laptop).

Calls the stage scripts in order, each as the command that a user would type, and prints it. Ends with a table: success
rate of the SFT policy, of the same policy after extra SFT of the wall time that RFT took (at a tenth of the learning
rate, as plain fine-tuning would go on), and after RFT, on the same starts, with 95 % intervals; and the world model's
metrics beside the baseline that copies the last frame.

    python demo.py                     preset tiny: at most 20 minutes on 2 CPU cores
    python demo.py --preset smoke      the same stages at sizes that prove nothing, in about a minute

Writes into out_dir one folder per stage and summary.json, demonstrations.png, curves.png, before_after.gif; further
pictures come from the stages. An interrupted demo goes on with the same command: finished stages are skipped, the one
that was cut short resumes.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vlarft.data import WindowSampler, load_episodes
from vlarft.run.checkpoint import write_json
from vlarft.run.config import opt, parse, to_dict
from vlarft.run.pictures import grid, save_gif, save_png
from vlarft.sim.replay import replay_frames

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Config:
    out_dir: str = opt("runs/demo", "folder that the demo writes")
    stage_preset: Literal["tiny", "smoke"] = opt("tiny", "preset of every stage")


PRESETS = {"tiny": Config(), "smoke": Config("runs/smoke", "smoke")}


class MemoryPeak(threading.Thread):
    """Samples the memory of this process and all its descendants [bytes]: shared pages count once (Linux only)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.over = 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(2.0):
            self.peak = max(self.peak, sum(_memory(pid) for pid in _descendants(os.getpid())))


def _descendants(root: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):  # the process ended meanwhile
            continue
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def _memory(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # the process ended meanwhile
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def run_stage(folder: Path, name: str, script: str, /, **flags: object) -> dict:
    """Run one stage script unless it already ended well; returns {"command", "seconds", "peak_bytes"}."""
    done = folder / "stages.json"
    stages = json.loads(done.read_text()) if done.is_file() else {}
    words = ["python", script]
    for flag, value in flags.items():
        values = [] if isinstance(value, bool) else value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{'no-' if value is False else ''}{flag.replace('_', '-')}", *map(str, values)]
    command = shlex.join(words)
    stage = stages.get(name, {})
    if stage.get("command") == command and stage.get("done"):
        print(f"\n[{name}] done in {stage['seconds']:.0f} s: {command}", flush=True)
        return stage
    print(f"\n[{name}] {command}", flush=True)
    memory, started = MemoryPeak(), time.monotonic()
    memory.start()
    status = subprocess.run([sys.executable, str(ROOT / script), *words[2:]]).returncode
    memory.over.set()
    before = stage if stage.get("command") == command else {}
    stages[name] = {
        "command": command,
        "seconds": before.get("seconds", 0.0) + time.monotonic() - started,
        "peak_bytes": max(before.get("peak_bytes", 0), memory.peak),
        "done": status == 0,
    }
    write_json(done, stages)
    if status:
        raise SystemExit(f"[{name}] ended with status {status}; the same command goes on from there")
    return stages[name]


def read_log(folder: Path) -> dict[str, np.ndarray]:
    """log.jsonl of a run as one array per metric (steps that lack it are left out)."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = dict.fromkeys(k for row in rows for k in row)
    return {
        name: np.array([[row["step"], row[name]] for row in rows if name in row]) for name in names if name != "step"
    }


def draw_demonstrations(demos: Path, path: Path) -> None:
    """PNG, one row per task: eight frames of its first demonstration."""
    first = {}
    for episode in load_episodes(demos):
        first.setdefault(episode.instruction, episode)
    sampler = WindowSampler(list(first.values()), num_frames=1)
    rows = []
    for number, episode in enumerate(first.values()):
        times = np.linspace(0, len(episode) - 1, 8).round().astype(int)
        rows.append(sampler.windows(np.array([(number, t) for t in times])).frames[:, 0])
    save_png(path, grid(rows))


def draw_curves(out_dir: Path, evaluation: dict, path: Path) -> None:
    """PNG: losses of the stages, RFT's reward, success rates with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    panels = [
        ("tokenizer", "tokenizer: training loss", ("loss",)),
        ("wm", "world model: cross-entropy [nats]", ("loss", "val_loss")),
        ("sft", "SFT: flow-matching loss (Eq. 4)", ("flow_mse", "val_flow_mse")),
        ("rft", "RFT: verified reward (Eq. 11)", ("reward",)),
        ("rft", "RFT: spread of the reward within groups", ("reward_std",)),
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
    labels = ["SFT", "+ extra SFT", "+ RFT"]
    rates = [p["all"] for p in evaluation["policies"]]
    heights = [100 * r["rate"] for r in rates]
    errors = [[100 * (r["rate"] - r["low"]) for r in rates], [100 * (r["high"] - r["rate"]) for r in rates]]
    axis.bar(labels, heights, yerr=errors, capsize=6, color=["#9aa", "#79c", "#c75"])
    axis.set_title("success [%], 95 % intervals")
    axis.set_ylim(0, 100)
    figure.savefig(path, dpi=80)


def draw_before_after(evaluation_dir: Path, policies: list[str], path: Path) -> None:
    """GIF: SFT policy (left) and RFT policy (right) from the same start, one that RFT alone wins if there is one."""
    records = [json.loads(line) for line in (evaluation_dir / "episodes.jsonl").read_text().splitlines()]
    episodes = {p: {(r["suite"], r["task"], r["init_state"]): r for r in records if r["policy"] == p} for p in policies}
    before, after = (episodes[p] for p in policies)

    def interest(start: tuple) -> tuple:
        won = (before[start]["success"], after[start]["success"])
        return {(False, True): 0, (True, True): 1, (True, False): 2, (False, False): 3}[won], start

    start = min(before, key=interest)
    films = [replay_frames(*start, e[start]["actions"]) for e in (before, after)]
    length = max(map(len, films))
    films = [f + [f[-1]] * (length - len(f)) for f in films]
    save_gif(path, [np.concatenate(pair, 1) for pair in zip(*films)], frames_per_second=10, hold_last=1.5)


def main(cfg: Config) -> dict:
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    preset, demos = cfg.stage_preset, out / "demos"
    model = {name: out / name / "model.safetensors" for name in ("tokenizer", "wm", "sft", "rft", "sft_extra")}

    run_stage(out, "collect", "collect_demos.py", preset=preset, out_dir=demos)
    run_stage(out, "tokenizer", "train_tokenizer.py", preset=preset, demos=demos, out_dir=out / "tokenizer")
    run_stage(out, "wm", "train_wm.py", preset=preset, demos=demos, tokenizer=model["tokenizer"], out_dir=out / "wm")
    run_stage(
        out,
        "eval_wm",
        "eval_wm.py",
        preset=preset,
        demos=demos,
        world_model=model["wm"],
        true_error=True,
        out_dir=out / "eval_wm",
    )
    run_stage(out, "sft", "train_sft.py", preset=preset, demos=demos, out_dir=out / "sft")
    run_stage(
        out,
        "rft",
        "train_rft.py",
        preset=preset,
        demos=demos,
        policy=model["sft"],
        world_model=model["wm"],
        gate_stop=False,  # a demo goes on and shows the trust gate's figure
        out_dir=out / "rft",
    )
    log = read_log(out / "rft")
    rft_minutes = sum(log[k][:, 1].sum() for k in ("policy_s", "world_model_s", "update_s")) / 60
    run_stage(
        out,
        "sft_extra",
        "train_sft.py",
        preset=preset,
        demos=demos,
        init=model["sft"],
        max_minutes=f"{rft_minutes:.2f}",
        lr=3e-4,  # a tenth of the peak: a restart at the peak would first undo what the first run learnt
        out_dir=out / "sft_extra",
    )
    policies = [str(model[name]) for name in ("sft", "sft_extra", "rft")]
    run_stage(out, "eval", "eval_libero.py", preset=preset, policies=policies, out_dir=out / "eval")

    evaluation = json.loads((out / "eval" / "results.json").read_text())
    world_model = json.loads((out / "eval_wm" / "results.json").read_text())
    stages = json.loads((out / "stages.json").read_text())
    draw_demonstrations(demos, out / "demonstrations.png")
    draw_curves(out, evaluation, out / "curves.png")
    draw_before_after(out / "eval", [policies[0], policies[2]], out / "before_after.gif")
    summary = {
        "config": to_dict(cfg),
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "stages": stages,
        "minutes": sum(s["seconds"] for s in stages.values()) / 60,
        "peak_gib": max(s["peak_bytes"] for s in stages.values()) / 2**30,
        "evaluation": evaluation["policies"],
        "world_model": world_model,
        "trust_gate": {name: rows[0, 1] for name, rows in log.items() if name.startswith("gate")},
    }
    write_json(out / "summary.json", summary)
    print_summary(summary, out)
    return summary


def print_world_model(results: dict) -> None:
    """Frame metrics beside the copy-last baseline, and how well the rewards order perturbed action chunks."""
    imagined, copied = (results["frames"]["all"][name] for name in ("imagined", "copy"))
    print("\nworld model, held-out episodes    imagined   last frame copied")
    for name, label in (
        ("psnr_moving", "PSNR, moving pixels [dB]"),
        ("psnr", "PSNR, all pixels [dB]"),
        ("ssim", "SSIM"),
    ):
        print(f"  {label:<30} {imagined[name][-1]:9.2f}   {copied[name][-1]:9.2f}")
    print("order of perturbed chunks, Spearman with   true frames   true state   (within a start, mean over starts)")
    for reward in ("R3 greedy", "R3 common", "R2 greedy"):
        found = [results["sensitivity"][truth][reward]["all"]["spearman"] for truth in ("true frames", "true state")]
        print(f"  {reward:<38} {found[0]:13.2f} {found[1]:12.2f}")


def print_summary(summary: dict, out: Path) -> None:
    """The demo's last words."""
    print("\nstage            minutes   peak memory")
    for name, stage in summary["stages"].items():
        print(f"  {name:<14} {stage['seconds'] / 60:7.1f}   {stage['peak_bytes'] / 2**30:6.2f} GiB")
    print(f"  {'all':<14} {summary['minutes']:7.1f}   {summary['peak_gib']:6.2f} GiB")
    print("\npolicy           success   95 % interval     episodes   against SFT on the same starts")
    for name, entry in zip(("SFT", "+ extra SFT", "+ RFT"), summary["evaluation"]):
        r = entry["all"]
        interval = f"[{100 * r['low']:.1f}, {100 * r['high']:.1f}] %"
        line = f"  {name:<14} {100 * r['rate']:5.1f} %   {interval:<17} {r['episodes']:8d}"
        if d := entry.get("against_first"):
            line += f"   {100 * d['difference']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}] points"
        print(line)
    print_world_model(summary["world_model"])
    gate = summary["trust_gate"]
    print(
        f"trust gate: R3 orders chunks around the policy's own actions with {gate['gate_policy']:.2f} by action error",
        end="",
    )
    print(f", {gate['gate_policy_true']:.2f} by the simulator's outcome" if "gate_policy_true" in gate else "")
    print(f"\npictures in {out}: demonstrations.png, curves.png, before_after.gif, eval_wm/, rft/rollouts.png")


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__.splitlines()[0]))
