"""Measure a world model on held-out episodes: frames (Table 1), whole episodes, sensitivity to actions.

    python eval_wm.py --preset tiny --world-model runs/wm --out-dir runs/wm/eval                   one process
    python eval_wm.py --preset tiny --world-model runs/wm --out-dir runs/wm/eval --true-error      with the simulator
    torchrun --nproc-per-node 8 eval_wm.py --world-model runs/wm --out-dir runs/wm/eval            8 GPUs

Reads the world model and the held-out episodes of the demonstrations that it names. Writes out_dir/results.json,
rollouts.png (rows: true, imagined; columns: time) and rollouts.gif of single chunks, episodes.png and episodes.gif of
whole episodes.

Frames: MSE, PSNR, SSIM and perceptual distance for each frame index, without the start frame, beside the baseline that
repeats the start frame, over all pixels and over those that move.

Whole episodes (not in the paper): the recorded actions are played in imagination from the first frame, the context of
them all, to the last. The same metrics for each chunk, beside copies of the first frame; the error on what stands still
in the whole episode; and each episode's last chunk, a mean over episodes with a 95 % interval.

Sensitivity to actions (not in the paper): each start's recorded action chunk is perturbed (noise, gripper flips), all
chunks are imagined, and the rewards R3 (imagined against imagined frames) and R2 (imagined against recorded frames) are
compared with the action error and, with `--true-error`, with what the chunks really do: the simulator is put into the
recorded state and plays them. Spearman's rank correlation and the share of pairs in the right order, within each start,
mean over starts.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vlarft.data.episodes import Episode, load_episodes
from vlarft.data.windows import Batch, WindowSampler
from vlarft.imagined_episodes import ImaginedEpisode, chunk_sums, imagine_episodes, summarise_episodes
from vlarft.metrics import PerceptualDistance, moving_mask, mse, perceptual, ssim
from vlarft.run import distributed
from vlarft.run.checkpoint import checkpoint_file, read_header, write_json
from vlarft.run.config import opt, parse, to_dict
from vlarft.run.pictures import grid, save_gif, save_png
from vlarft.run.random import generator
from vlarft.sensitivity import Perturbations, evaluate_sensitivity
from vlarft.sim.replay import TabletopOutcomes
from vlarft.world_model import WorldModel


@dataclass(frozen=True)
class Config:
    """One evaluation; the defaults are for the paper's sizes."""

    demos: tuple[str, ...] | None = opt(
        None, "folders or files of episodes; none: those that the world model was trained on", group="data"
    )
    camera: str = opt("agentview", "camera of the demonstrations")
    all_episodes: bool = opt(False, "use all episodes of --demos, which the world model must not have seen")

    world_model: str = opt("runs/wm", "world model: a run folder or its model.safetensors", group="model")
    precision: Literal["bf16", "fp32"] = opt("bf16", "autocast of the networks")
    greedy: bool = opt(False, "imagine greedily for the frame metrics, instead of sampling")
    temperature: float = opt(1.0, "temperature of sampled rollouts")
    top_p: float = opt(0.8, "probability kept by nucleus sampling in sampled rollouts (public code)")

    segments: int = opt(1024, "held-out segments for the frame metrics, evenly spaced", group="evaluation")
    episodes: int = opt(64, "held-out episodes imagined from their first frame to their last; 0 leaves it out")
    batch_size: int = opt(16, "segments, starts or episodes imagined at once")
    perceptual: Literal["lpips", "ssim", "none"] = opt("lpips", "perceptual distance")
    perceptual_weights: str | None = opt(None, "file of the VGG16 backbone for lpips; none: torchvision's cache")
    starts: int = opt(64, "starts for the sensitivity to actions; 0 leaves it out")
    perturb: Perturbations = field(default_factory=Perturbations)
    true_error: bool = opt(False, "also compare with the simulator's outcome (Tabletop demonstrations)")

    out_dir: str = opt("runs/wm/eval", "folder that the evaluation writes", group="run")
    seed: int = opt(0, "seed of perturbations and rollouts")


TINY = Config(segments=128, episodes=32, greedy=True, perceptual="ssim", starts=12, precision="fp32")
PRESETS = {
    "paper": Config(),
    "small": Config(perceptual="ssim"),
    "tiny": TINY,
    "smoke": replace(TINY, segments=8, episodes=2, batch_size=4, starts=2, perturb=Perturbations((0.15, 0.4), 2, 1)),
}


def own_rows(total: int, batch_size: int) -> Iterator[slice]:
    """This process's share of `total` rows, in batches."""
    rank, world = distributed.rank(), distributed.world_size()
    first, last = total * rank // world, total * (rank + 1) // world
    for i in range(first, last, batch_size):
        yield slice(i, min(i + batch_size, last))


def frame_sums(pred: Tensor, true: Tensor, moving: Tensor, distance: PerceptualDistance) -> Tensor:
    """Sums over segments of each metric, per frame index: (B, T, C, H, W) -> (6, T) float64.

    Rows: mse, psnr, ssim, perceptual; squared error on moving pixels, and their number.
    """
    error = mse(pred, true)
    rows = [error, -10 * error.clamp_min(1e-10).log10(), ssim(pred, true), distance(pred, true)]
    squared = ((pred - true).square() * moving).sum(dim=(2, 3, 4))
    rows += [squared, moving.sum(dim=(2, 3, 4)) * pred.shape[2]]
    return torch.stack([row.double().sum(0) for row in rows]).cpu()


def summary(sums: Tensor, count: float) -> dict[str, list[float]]:
    """Metrics per frame index, and their mean over the frames as the last entry; PSNR in dB."""
    names = ("mse", "psnr", "ssim", "perceptual")
    out = {name: (row / count).tolist() for name, row in zip(names, sums, strict=False)}
    out = {name: [*values, float(np.mean(values))] for name, values in out.items()}
    squared, number = (torch.cat([row, row.sum()[None]]) for row in sums[4:])
    out["psnr_moving"] = (-10 * (squared / number).clamp_min(1e-10).log10()).tolist()
    return out


def evaluate_frames(
    model: WorldModel, batch: Batch, suites: list[str], cfg: Config, distance: PerceptualDistance, autocast
) -> dict[str, dict]:
    """Frame metrics of rollouts and of copying the start frame, per suite and over all."""
    device = next(model.parameters()).device
    source = generator(device, "rollouts", cfg.seed, distributed.rank())
    names = sorted(set(suites))
    sums = torch.zeros(len(names), 2, 6, model.cfg.chunk, dtype=torch.float64)
    counts = torch.zeros(len(names), dtype=torch.float64)
    for part in own_rows(len(batch.frames), cfg.batch_size):
        frames = batch.frames[part].to(device)
        with autocast:
            rollout = model.rollout(
                batch.context_frame[part].to(device),
                batch.actions[part, None].to(device),
                greedy=cfg.greedy,
                temperature=cfg.temperature,
                top_p=cfg.top_p,
                generator=source,
                first_frame=frames[:, 0],
            )
        true, copied = frames[:, 1:], frames[:, :1].expand_as(frames[:, 1:])
        moving = moving_mask(true, copied)
        for i, name in enumerate(names):
            rows = [k for k, suite in enumerate(suites[part]) if suite == name]
            counts[i] += len(rows)
            for j, pred in enumerate((rollout.frames[:, 0], copied)):
                if rows:
                    sums[i, j] += frame_sums(pred[rows], true[rows], moving[rows], distance)
    flat = torch.cat([sums.flatten(), counts])
    flat = torch.tensor(list(distributed.mean_across_ranks(dict(enumerate(flat))).values())).double()
    sums, counts = (flat * distributed.world_size()).split([sums.numel(), counts.numel()])
    sums = sums.reshape(len(names), 2, 6, model.cfg.chunk)
    found = {n: {"imagined": summary(s[0], c), "copy": summary(s[1], c)} for n, s, c in zip(names, sums, counts)}
    total = sums.sum(0)
    both = {"imagined": summary(total[0], counts.sum()), "copy": summary(total[1], counts.sum())}
    return {**found, "all": both}


def evaluate_episodes(
    model: WorldModel, episodes: list[Episode], cfg: Config, distance: PerceptualDistance, autocast, shown: int = 4
) -> tuple[dict, list[ImaginedEpisode]]:
    """Measure `cfg.episodes` whole episodes, evenly spaced among those given.

    Returns:
        As `summarise_episodes`, with the episodes' names; and up to `shown` episodes of this process.
    """
    device = next(model.parameters()).device
    picks = np.linspace(0, len(episodes) - 1, min(cfg.episodes, len(episodes))).round().astype(int).tolist()
    chosen = [episodes[i] for i in picks]
    chunk = model.cfg.chunk
    longest = -(-(max(len(e) for e in chosen) - 1) // chunk)  # chunks
    sums = torch.zeros(len(chosen), 2, 9, longest, dtype=torch.float64)
    mine = range(len(chosen))[distributed.rank() :: distributed.world_size()]
    films = []
    for found in imagine_episodes(
        model,
        [chosen[i] for i in mine],
        autocast=autocast,
        batch_size=cfg.batch_size,
        generator=generator(device, "episodes", cfg.seed, distributed.rank()),
        greedy=cfg.greedy,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
    ):
        of_episode = chunk_sums(found, chunk, distance)
        sums[mine[found.number], :, :, : of_episode.shape[-1]] = of_episode
        if found.number in np.linspace(0, len(mine) - 1, min(shown, len(mine))).round():
            films.append(found)
    sums = distributed.mean_tensor(sums.to(device)).cpu() * distributed.world_size()
    films.sort(key=lambda film: film.number)
    return {"names": [e.name for e in chosen], **summarise_episodes(sums)}, films


def report_episodes(found: dict) -> list[str]:
    """The table of whole episodes as lines of text."""
    chunks, last = found["chunks"], found["last_chunk"]
    names = {"psnr_moving": "PSNR, moving [dB]", "ssim": "SSIM", "still_error": "error of still pixels"}
    lines = [
        "whole episodes   chunk " + " ".join(f"{k + 1:>6}" for k in range(len(chunks["episodes"]))) + "  last chunk",
        f"{'episodes':>22} " + " ".join(f"{n:>6}" for n in chunks["episodes"]),
    ]
    for metric, label in names.items():
        for method in ("imagined", "copy"):
            row = " ".join("     -" if v is None else f"{v:6.3f}" for v in chunks[method][metric])
            end = last[method][metric]
            interval = f"{end['value']:.3f} [{end['low']:.3f}, {end['high']:.3f}]"
            lines.append(f"{label[:17]:>17} {method[:4]} {row}  {interval}")
    return lines


def report(results: dict) -> str:
    """The tables as text."""
    lines = [
        f"{'frame':>24} " + " ".join(f"{t + 1:>7}" for t in range(len(results["frames"]["all"]["copy"]["mse"]) - 1))
    ]
    lines[0] += "    mean"
    single = len(results["frames"]) == 2  # one suite, which is then all there is
    for suite, methods in list(results["frames"].items())[single:]:
        for metric in methods["copy"]:
            for method, values in methods.items():
                row = " ".join(f"{v:7.4f}" if metric == "mse" else f"{v:7.3f}" for v in values[metric])
                lines.append(f"{suite[-8:]:>8} {metric:>11} {method[:4]} {row}")
    if "episodes" in results:
        lines += report_episodes(results["episodes"])
    for against, found in results.get("sensitivity", {}).items():
        lines.append(f"perturbed chunks ranked by reward and by {against} error: Spearman (share of pairs in order)")
        for name, groups in found.items():
            cells = [f"{g} {v['spearman']:.2f} ({v['pair_order']:.2f})" for g, v in groups.items()]
            lines.append(f"{name:>16}  " + "  ".join(cells))
    return "\n".join(lines)


def draw_rollouts(model: WorldModel, batch: Batch, out_dir: Path, autocast) -> None:
    """Greedy rollouts of up to four segments as a picture and as an animation."""
    device = next(model.parameters()).device
    picks = torch.linspace(0, len(batch.frames) - 1, min(4, len(batch.frames))).round().long()
    frames = batch.frames[picks].to(device)
    with autocast:
        context = batch.context_frame[picks].to(device)
        rollout = model.rollout(context, batch.actions[picks, None].to(device), greedy=True, first_frame=frames[:, 0])
    imagined = torch.cat([frames[:, :1], rollout.frames[:, 0]], dim=1)
    rows = [row for pair in zip(frames, imagined, strict=True) for row in pair]
    save_png(out_dir / "rollouts.png", grid(rows, ["true", "imagined"] * len(picks)))
    times = [grid([frames[:, t], imagined[:, t]], ["true", "imagined"]) for t in range(frames.shape[1])]
    save_gif(out_dir / "rollouts.gif", times + times[-1:] * 3)


def draw_episodes(films: list[ImaginedEpisode], chunk: int, out_dir: Path) -> None:
    """Whole episodes: a picture of the borders of chunks, up to 12 of each, and an animation, true above imagined."""
    rows = []
    for film in films:
        times = np.unique(np.r_[0 : len(film.true) : chunk, len(film.true) - 1])
        times = times[np.linspace(0, len(times) - 1, min(12, len(times))).round().astype(int)]
        rows += [film.true[times], film.imagined[times]]
    save_png(out_dir / "episodes.png", grid(rows, ["true", "imagined"] * len(films), min_side=64))
    length = max(len(film.true) for film in films)
    # a shorter episode waits at its last frame
    times = [[min(t, len(film.true) - 1) for film in films] for t in range(length)]
    pictures = []
    for at in times:
        rows = [[film.true[t] for film, t in zip(films, at)], [film.imagined[t] for film, t in zip(films, at)]]
        pictures.append(grid(rows, ["true", "imagined"], min_side=64))
    save_gif(out_dir / "episodes.gif", pictures, frames_per_second=10, hold_last=1.5)


def held_out_episodes(cfg: Config, path: Path) -> list[Episode]:
    """The episodes to measure on, none of which the world model was trained on.

    Raises:
        ValueError: the checkpoint names no held-out episodes and --all-episodes is not given; or --all-episodes with
            episodes that it was trained on.
    """
    extra, options = read_header(path).extra, {"successes_only": False, "with_states": cfg.true_error}
    if not cfg.all_episodes:
        if "held_out_episodes" not in extra:
            raise ValueError(
                f"{path} names no held-out episodes (it was not written by train_wm.py): give --all-episodes and "
                "--demos with demonstrations that it was not trained on"
            )
        return load_episodes(cfg.demos or extra["demos"], cfg.camera, names=extra["held_out_episodes"], **options)
    if cfg.demos is None:
        raise ValueError("--all-episodes needs --demos, with demonstrations that the world model was not trained on")
    episodes = load_episodes(cfg.demos, cfg.camera, **options)
    if seen := {e.name for e in episodes} & set(extra.get("train_episodes", [])):
        raise ValueError(
            f"--all-episodes: {path} was trained on {len(seen)} of the {len(episodes)} episodes of "
            f"{' + '.join(cfg.demos)} (first {min(seen)}); leave the option out, or give other demonstrations"
        )
    return episodes


def main(cfg: Config) -> dict:
    """Evaluate; return what results.json holds."""
    device = distributed.setup()
    path = checkpoint_file(cfg.world_model)
    model, extra = WorldModel.load(path, device), read_header(path).extra
    distance = perceptual(cfg.perceptual, cfg.perceptual_weights).to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")
    episodes = held_out_episodes(cfg, path)
    # a model that was trained with contexts from anywhere (None) is measured on imaginations that begin with the chunk
    lookback = extra.get("context_lookback") or 0
    sampler = WindowSampler(episodes, model.cfg.chunk + 1, model.cfg.chunk, lookback)
    batch = sampler.spread(cfg.segments)
    suites = [episodes[i].name.split("/")[0] for i in batch.index[:, 0].tolist()]

    results = {"config": to_dict(cfg), "held_out_episodes": len(episodes), "segments": len(batch.frames)}
    results["frames"] = evaluate_frames(model, batch, suites, cfg, distance, autocast)
    films = []
    if cfg.episodes:
        results["episodes"], films = evaluate_episodes(model, episodes, cfg, distance, autocast)
    if distributed.is_main():
        if cfg.starts:
            results["sensitivity"] = evaluate_sensitivity(
                model,
                sampler.spread(cfg.starts),
                episodes,
                cfg.perturb,
                distance,
                autocast=autocast,
                outcomes=TabletopOutcomes() if cfg.true_error else None,
                batch_size=cfg.batch_size,
                temperature=cfg.temperature,
                top_p=cfg.top_p,
                seed=cfg.seed,
            )
        out_dir = Path(cfg.out_dir)
        write_json(out_dir / "results.json", results)
        draw_rollouts(model, batch, out_dir, autocast)
        if films:
            draw_episodes(films, model.cfg.chunk, out_dir)
        print(report(results))
    distributed.cleanup()
    return results


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
