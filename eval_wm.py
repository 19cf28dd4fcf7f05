"""Measure a world model on held-out episodes: frames (Table 1), whole episodes, sensitivity to actions.

    python eval_wm.py --preset tiny --world-model runs/wm --out-dir runs/wm/eval                   one process
    python eval_wm.py --preset tiny --world-model runs/wm --out-dir runs/wm/eval --true-error      with the simulator
    torchrun --nproc-per-node 8 eval_wm.py --world-model runs/wm --out-dir runs/wm/eval            8 GPUs

Reads the world model and the held-out episodes of the demonstrations that it names. Writes out_dir/results.json,
rollouts.png (rows: true, imagined; columns: time), rollouts.gif; of four whole episodes, episodes.png (columns: ends of
chunks) and episodes.gif (left recorded, right imagined).

Frames: MSE, PSNR, SSIM and perceptual distance for each frame index, without the start frame, beside the baseline that
repeats the start frame, over all pixels and over those that move. Where poses drive the world model, it predicts them
of the actions, here and below.

Whole episodes (not in the paper): the recorded actions of an episode are replayed in imagination from its first frame,
the only one that the model sees, to its end. The same metrics per chunk, beside copying the first frame; the mean
absolute error on pixels that never move, which shows drift; and all of them in each episode's last chunk, which may be
shorter, with 95 % intervals over starts (bootstrap), also for the difference from copying. With `--success-model`:
how many imagined and true episodes that model gives their recorded outcome; the films then show the first true and
false success and failure by its verdict on imagined frames.

Sensitivity to actions (not in the paper): each start's recorded action chunk is perturbed (noise, gripper flips), all
chunks are imagined, and the rewards R3 (imagined against imagined frames) and R2 (imagined against recorded frames) are
compared with the action error and, with `--true-error`, with what the chunks really do: the simulator is put into the
recorded state and plays them. Spearman's rank correlation and the share of pairs in the right order, within each start,
mean over starts.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vlarft.data.consistency import check_outcomes, warn_other_contents
from vlarft.data.convention import check_image_size, check_same_images, image_convention, warn_other_contexts
from vlarft.data.episode import RobotState
from vlarft.data.episodes import Episode, load_episodes
from vlarft.data.windows import Batch, WindowSampler
from vlarft.imagined_episodes import ImaginedEpisode, imagined_episodes, spread_episodes
from vlarft.metrics import PerceptualDistance, moving_mask, mse, perceptual, ssim
from vlarft.run import distributed
from vlarft.run.checkpoint import checkpoint_file, read_header, write_json
from vlarft.run.config import Positive, Rows, ShareAbove0, Whole, opt, to_dict
from vlarft.run.pictures import grid, import_pillow, save_gif, save_png
from vlarft.run.precision import Precision, in_bf16
from vlarft.run.random import generator
from vlarft.run.script import run_script
from vlarft.sensitivity import Perturbations, evaluate_sensitivity
from vlarft.sim.replay import TabletopOutcomes, check_replays
from vlarft.statistics import bootstrap_interval, wilson_interval
from vlarft.success import Agreement, SuccessModel, check_judge, compare_outcomes
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
    precision: Precision = opt("bf16", "autocast of the networks; auto: bf16 where the processor or GPU has it")
    greedy: bool = opt(False, "imagine greedily, not sampling, for the metrics of segments and episodes")
    temperature: Positive = opt(1.0, "temperature of sampled rollouts")
    top_p: ShareAbove0 = opt(0.8, "probability kept by nucleus sampling in sampled rollouts (public code)")

    segments: Rows = opt(1024, "held-out segments for the frame metrics, evenly spaced", group="evaluation")
    episodes: Whole = opt(
        64, "held-out episodes replayed whole, evenly spaced over suites, kinds, tasks; 0 leaves it out"
    )
    batch_size: Rows = opt(16, "segments, episodes or starts imagined at once")
    perceptual: Literal["lpips", "ssim", "none"] = opt("lpips", "perceptual distance")
    perceptual_weights: str | None = opt(None, "file of the VGG16 backbone for lpips; none: torchvision's cache")
    success_model: str | None = opt(
        None,
        "judge of the whole episodes, true and imagined as in train_rl.py, with poses that the world model predicts",
    )
    starts: Whole = opt(64, "starts for the sensitivity to actions; 0 leaves it out")
    perturb: Perturbations = field(default_factory=Perturbations)
    true_error: bool = opt(False, "also compare with the simulator's outcome (Tabletop demonstrations)")

    out_dir: str = opt("runs/wm/eval", "folder that the evaluation writes", group="run")
    seed: Whole = opt(0, "seed of perturbations and rollouts")


TINY = Config(segments=128, episodes=32, greedy=True, perceptual="ssim", starts=12, precision="fp32")
PRESETS = {
    "paper": Config(),
    "small": Config(perceptual="ssim"),
    "libero": replace(TINY, precision="auto"),
    "tiny": TINY,
    "smoke": replace(TINY, segments=8, episodes=2, batch_size=4, starts=2, perturb=Perturbations((0.15, 0.4), 2, 1)),
}


def own_rows(total: int, batch_size: int) -> Iterator[slice]:
    """Yield this process's share of the batches of `total` rows, which are the same for any number of processes."""
    rank, world = distributed.rank(), distributed.world_size()
    for i in range(rank * batch_size, total, world * batch_size):
        yield slice(i, min(i + batch_size, total))


def frame_sums(pred: Tensor, true: Tensor, moving: Tensor, distance: PerceptualDistance) -> Tensor:
    """Sum each metric over segments, per frame index: (B, T, C, H, W) -> (6, T) float64.

    Rows: mse, psnr, ssim, perceptual; squared error on moving pixels, and their number.
    """
    error = mse(pred, true)
    rows = [error, -10 * error.clamp_min(1e-10).log10(), ssim(pred, true), distance(pred, true)]
    squared = ((pred - true).square() * moving).sum(dim=(2, 3, 4))
    rows += [squared, moving.sum(dim=(2, 3, 4)) * pred.shape[2]]
    return torch.stack([row.double().sum(0) for row in rows]).cpu()


def summary(sums: Tensor, count: float) -> dict[str, list[float]]:
    """Turn sums into metrics per frame index, and their mean over the frames as the last entry; PSNR in dB."""
    names = ("mse", "psnr", "ssim", "perceptual")
    out = {name: (row / count).tolist() for name, row in zip(names, sums, strict=False)}
    out = {name: [*values, float(np.mean(values))] for name, values in out.items()}
    squared, number = (torch.cat([row, row.sum()[None]]) for row in sums[4:])
    out["psnr_moving"] = (-10 * (squared / number).clamp_min(1e-10).log10()).tolist()
    return out


def evaluate_frames(
    model: WorldModel, batch: Batch, suites: list[str], cfg: Config, distance: PerceptualDistance, autocast
) -> dict[str, dict]:
    """Compute frame metrics of rollouts and of copying the start frame, per suite and over all."""
    device = next(model.parameters()).device
    names = sorted(set(suites))
    sums = torch.zeros(len(names), 2, 6, model.cfg.chunk, dtype=torch.float64)
    counts = torch.zeros(len(names), dtype=torch.float64)
    for part in own_rows(len(batch.frames), cfg.batch_size):
        rows = batch.rows(part).to(device)
        frames = rows.frames
        with autocast:
            rollout = model.rollout(
                rows.context_frame,
                rows.actions[:, None],
                greedy=cfg.greedy,
                temperature=cfg.temperature,
                top_p=cfg.top_p,
                generator=generator(device, "rollouts", cfg.seed, part.start),
                first_frame=frames[:, 0],
                robot=rows.robot,
            )
        true, copied = frames[:, 1:], frames[:, :1].expand_as(frames[:, 1:])
        moving = moving_mask(true, copied)
        for i, name in enumerate(names):
            own = [k for k, suite in enumerate(suites[part]) if suite == name]
            counts[i] += len(own)
            for j, pred in enumerate((rollout.frames[:, 0], copied)):
                if own:
                    sums[i, j] += frame_sums(pred[own], true[own], moving[own], distance)
    flat = torch.cat([sums.flatten(), counts])
    flat = torch.tensor(list(distributed.mean_across_ranks(dict(enumerate(flat))).values())).double()
    sums, counts = (flat * distributed.world_size()).split([sums.numel(), counts.numel()])
    sums = sums.reshape(len(names), 2, 6, model.cfg.chunk)
    found = {n: {"imagined": summary(s[0], c), "copy": summary(s[1], c)} for n, s, c in zip(names, sums, counts)}
    total = sums.sum(0)
    both = {"imagined": summary(total[0], counts.sum()), "copy": summary(total[1], counts.sum())}
    return {**found, "all": both}


def chunk_totals(replayed: ImaginedEpisode, chunk: int, distance: PerceptualDistance) -> Tensor:
    """Sum each metric over the frames of each chunk of an episode, for `imagined` and `copy`: (2, chunks, 9) float64.

    Columns: number of frames; the rows of `frame_sums`; absolute error on pixels that never move, and their number.
    """
    true, first = replayed.true[1:], replayed.true[:1]
    moving = moving_mask(true, first)  # (T, 1, H, W)
    still = ~moving.any(dim=0)  # (1, H, W)
    methods = []
    for pred in (replayed.imagined[1:], first.expand_as(true)):
        columns = []
        for p, t, m in zip(*(frames.split(chunk) for frames in (pred, true, moving)), strict=True):
            sums = frame_sums(p[None], t[None], m[None], distance).sum(dim=1)  # (6,)
            absolute, number = ((p - t).abs() * still).double().sum().item(), still.sum().item() * p.shape[:2].numel()
            columns.append(torch.tensor([len(p), *sums.tolist(), absolute, number], dtype=torch.float64))
        methods.append(torch.stack(columns))
    return torch.stack(methods)


def chunk_metrics(totals: Tensor) -> dict[str, Tensor]:
    """Turn totals of frames (..., 9), columns as in `chunk_totals`, or their means into metrics (...); PSNR in dB."""
    frames, error, psnr, similarity, distance, squared, moving, absolute, still = totals.unbind(-1)
    out = {"mse": error / frames, "psnr": psnr / frames, "ssim": similarity / frames, "perceptual": distance / frames}
    out["psnr_moving"] = -10 * (squared / moving).clamp_min(1e-10).log10()
    return {**out, "still_error": absolute / still}


def evaluate_episodes(
    model: WorldModel,
    episodes: list[Episode],
    cfg: Config,
    distance: PerceptualDistance,
    autocast,
    judge: SuccessModel | None = None,
) -> dict:
    """Compute metrics of whole imagined episodes and of copying their first frames, per chunk and in each one's last
    chunk; with a judge, also how its verdicts on imagined and on true frames agree with the recorded outcomes.
    """
    chunk, true, verdicts = model.cfg.chunk, [e.success for e in episodes], torch.zeros(len(episodes), 2)
    numbers, chunks = {e.name: i for i, e in enumerate(episodes)}, [-(-(len(e) - 1) // chunk) for e in episodes]
    totals = torch.zeros(len(episodes), 2, max(chunks), 9, dtype=torch.float64)
    for replayed in imagined_episodes(
        model,
        episodes,
        autocast=autocast,
        batch_size=cfg.batch_size,
        greedy=cfg.greedy,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        seed=cfg.seed,
        part=distributed.part(),
    ):
        i = numbers[replayed.episode.name]
        totals[i, :, : chunks[i]] = chunk_totals(replayed, chunk, distance)
        if judge is not None:
            with autocast:
                text, both = replayed.episode.instruction, (replayed.imagined, replayed.true)
                verdicts[i] = torch.tensor([judge.highest(frames, text) for frames in both])
    totals = distributed.mean_tensor(totals) * distributed.world_size()  # one process has an episode, the others zeros
    verdicts = distributed.mean_tensor(verdicts) * distributed.world_size()
    last = totals[torch.arange(len(episodes)), :, torch.tensor(chunks) - 1]  # (episodes, 2, 9)
    starts = list(dict.fromkeys(e.start or e.name for e in episodes))  # attempts of one start are no independent ones
    of_start = torch.tensor([starts.index(e.start or e.name) for e in episodes])
    last = last.new_zeros(len(starts), *last.shape[1:]).index_add(0, of_start, last)
    per_chunk = chunk_metrics(totals.sum(dim=0))  # name -> (2, chunks)
    methods = {"imagined": lambda both: both[..., 0], "copy": lambda both: both[..., 1]}
    methods["difference"] = lambda both: both[..., 0] - both[..., 1]
    outcomes = {}
    recorded = [{"name": e.name, "kind": e.kind, "success": e.success, "frames": len(e)} for e in episodes]
    for name, highest in zip(("imagined", "true"), verdicts.T) if judge is not None else ():
        judged = (highest >= judge.cfg.threshold).tolist()
        for row, verdict in zip(recorded, judged, strict=True):
            row[f"success_by_{name}"] = verdict
        found = compare_outcomes(judged, true)
        brier = (highest - torch.tensor(true).float()).square().mean().item()
        outcomes[name] = {**found._asdict(), **rate_of(found), "balanced": found.balanced, "brier": brier}
    return {
        "outcomes": outcomes,
        "recorded": recorded,
        "chunks": {"episodes": (totals[:, 0, :, 0] > 0).sum(dim=0).tolist()}
        | {
            method: {name: of(values.T).tolist() for name, values in per_chunk.items()}
            for method, of in methods.items()
        },
        "last_chunk": {
            method: {
                name: bootstrap_interval(last, lambda means, of=of, name=name: of(chunk_metrics(means)[name]))._asdict()
                for name in per_chunk
            }
            for method, of in methods.items()
        },
    }


def rate_of(found: Agreement) -> dict[str, float]:
    """Compute the share of episodes that were judged right, with its 95 % Wilson interval."""
    episodes = found.true_successes + found.true_failures
    wrong = found.false_successes + found.false_failures
    return dict(zip(("agreement", "low", "high"), wilson_interval(episodes - wrong, episodes), strict=True))


def report_episodes(results: dict) -> list[str]:
    """Format a table of whole episodes: chunks 1, 2, 4, ... and the last one of each episode."""
    chunks, last = results["chunks"], results["last_chunk"]
    names = [n for n in ("psnr_moving", "psnr", "ssim", "perceptual", "still_error") if n in last["imagined"]]
    rows = {"": names}  # title -> cells
    for k in (2**i - 1 for i in range(len(chunks["episodes"]).bit_length())):
        cells = [f"{chunks['imagined'][n][k]:6.3f} ({chunks['copy'][n][k]:6.3f})" for n in names]
        rows[f"chunk {k + 1} of {chunks['episodes'][k]} episodes"] = cells
    rows["last chunk of each"] = [
        f"{last['imagined'][n]['value']:6.3f} ({last['copy'][n]['value']:6.3f})" for n in names
    ]
    for method in ("imagined", "difference"):
        rows[f"95 %, {method}"] = [f"[{last[method][n]['low']:.3f}, {last[method][n]['high']:.3f}]" for n in names]
    title = "whole episodes: imagined (first frame copied)"
    judged = [
        f"judged by the success model, {name} frames: {100 * one['agreement']:.0f} % [{100 * one['low']:.0f}, "
        f"{100 * one['high']:.0f}] have their recorded outcome; false successes {one['false_successes']} of "
        f"{one['true_failures']}, false failures {one['false_failures']} of {one['true_successes']}"
        for name, one in results["outcomes"].items()
    ]
    return [
        *judged,
        title,
        *(f"{name:>24} " + " ".join(f"{cell:>16}" for cell in cells) for name, cells in rows.items()),
    ]


def report(results: dict) -> str:
    """Format the tables as text."""
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
    """Draw greedy rollouts of up to four segments as a picture and as an animation."""
    device = next(model.parameters()).device
    picks = torch.linspace(0, len(batch.frames) - 1, min(4, len(batch.frames))).round().long()
    frames = batch.frames[picks].to(device)
    with autocast:
        context = batch.context_frame[picks].to(device)
        robot = RobotState(*(v[picks].to(device) for v in batch.robot))
        actions = batch.actions[picks, None].to(device)
        rollout = model.rollout(context, actions, greedy=True, first_frame=frames[:, 0], robot=robot)
    imagined = torch.cat([frames[:, :1], rollout.frames[:, 0]], dim=1)
    rows = [row for pair in zip(frames, imagined, strict=True) for row in pair]
    save_png(out_dir / "rollouts.png", grid(rows, ["true", "imagined"] * len(picks)))
    times = [grid([frames[:, t], imagined[:, t]], ["true", "imagined"]) for t in range(frames.shape[1])]
    save_gif(out_dir / "rollouts.gif", times + times[-1:] * 3)


def to_film(episodes: list[Episode], recorded: list[dict], greedy: bool) -> dict[str, str]:
    """Choose up to four whole episodes, name -> title: spread over kinds and tasks or, where they were judged, the
    first of each verdict on the imagined frames; films are greedy, so the verdicts have to be.
    """
    if "success_by_imagined" not in recorded[0] or not greedy:
        return {e.name: "imagined" for e in spread_episodes(episodes, 4)}
    first = {}
    for row in recorded:
        right = "true" if row["success_by_imagined"] == row["success"] else "false"
        first.setdefault(f"{right} {'success' if row['success_by_imagined'] else 'failure'}", row["name"])
    return {name: title for title, name in first.items()}


def draw_episodes(
    model: WorldModel,
    episodes: list[Episode],
    titles: dict[str, str],
    out_dir: Path,
    autocast,
) -> None:
    """Draw greedy imaginations of whole episodes, those of `titles`, as a picture and as an animation."""
    chosen = [e for e in episodes if e.name in titles]
    films = list(imagined_episodes(model, chosen, autocast=autocast, greedy=True))
    rows = []
    for _, true, imagined in films:
        borders = [*range(0, len(true) - 1, model.cfg.chunk), len(true) - 1]
        rows += [true[borders], imagined[borders]]
    labels = [label for film in films for label in ("recorded", titles[film.episode.name])]
    save_png(out_dir / "episodes.png", grid(rows, labels, min_side=64))
    longest = max(len(film.true) for film in films)
    pictures = []
    # about 90 pictures at most; an episode that has ended shows its last frame
    for t in (*range(0, longest - 1, -(-longest // 90)), longest - 1):
        pairs = [[frames[min(t, len(frames) - 1)] for frames in (film.true, film.imagined)] for film in films]
        pictures.append(grid(pairs, labels[1::2], min_side=64))
    save_gif(out_dir / "episodes.gif", pictures, frames_per_second=10, hold_last=1, colors=128)


def held_out_episodes(cfg: Config, path: Path) -> list[Episode]:
    """Load the episodes to measure on, none of which the world model was trained on.

    Raises:
        ValueError: the checkpoint names no held-out episodes and --all-episodes is not given; or --all-episodes with
            episodes that it was trained on.
    """
    extra, states = read_header(path).extra, cfg.true_error and cfg.starts > 0
    options = {"successes_only": False, "with_states": states}
    if not cfg.all_episodes:
        if "held_out_episodes" not in extra:
            raise ValueError(
                f"{path} names no held-out episodes (it was not written by train_wm.py): give --all-episodes and "
                "--demos with demonstrations that it was not trained on"
            )
        demos, names = cfg.demos or extra["demos"], extra["held_out_episodes"]
        episodes = load_episodes(demos, cfg.camera, names=names, **options)
        warn_other_contents(extra, f"world model {path}", episodes)
        return episodes
    if cfg.demos is None:
        raise ValueError("--all-episodes needs --demos, with demonstrations that the world model was not trained on")
    episodes = load_episodes(cfg.demos, cfg.camera, **options)
    if seen := {e.name for e in episodes} & set(extra.get("train_episodes", [])):
        raise ValueError(
            f"--all-episodes: {path} was trained on {len(seen)} of the {len(episodes)} episodes of "
            f"{' + '.join(cfg.demos)} (first {min(seen)}); leave the option out, or give other demonstrations"
        )
    return episodes


def check_judged(path: str, episodes: list[Episode]) -> None:
    """Check, before the work, that episodes tell something about a success model.

    Raises:
        ValueError: their outcomes are not known, or all the same; or it was trained on some of them.

    Warns if its threshold was chosen on some of them.
    """
    where = f"--success-model {path}"
    check_outcomes(episodes, where)
    successes = sum(e.success for e in episodes)
    if not 0 < successes < len(episodes):
        raise ValueError(
            f"{where}: {successes} of the {len(episodes)} episodes to judge succeeded, both outcomes are needed: give "
            "more --episodes, or --demos with attempts of a policy"
        )
    facts = read_header(path).extra
    seen, chose = (set(facts.get(name, [])) for name in ("train_episodes", "threshold_episodes"))
    if trained := [e.name for e in episodes if e.name in seen]:
        raise ValueError(
            f"{where} was trained on {len(trained)} of the {len(episodes)} episodes to judge, first {trained[0]}: "
            "train it with the world model that is measured (train_success.py --world-model), whose held-out episodes "
            "it then holds out, or give other --demos and --all-episodes"
        )
    if chosen := sum(e.name in chose for e in episodes):
        warnings.warn(
            f"{where} chose its threshold on {chosen} of the {len(episodes)} episodes to judge: its agreement is "
            "flattered",
            stacklevel=2,
        )


def main(cfg: Config) -> dict:
    """Evaluate; return what results.json holds."""
    import_pillow()  # the pictures come after the work
    device = distributed.setup()
    path = checkpoint_file(cfg.world_model)
    if cfg.success_model is not None and not cfg.episodes:
        raise ValueError("--success-model judges whole episodes: give --episodes too")
    model, extra = WorldModel.load(path, device).requires_grad_(False), read_header(path).extra
    distance = perceptual(cfg.perceptual, cfg.perceptual_weights).to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(cfg.precision, device))
    episodes = held_out_episodes(cfg, path)
    # None: trained on contexts from anywhere before the segment; these imaginations begin at their context, as in RFT
    lookback = extra.get("context_lookback") or 0
    check_image_size(model.cfg.tokenizer.image_size, str(path), episodes[0])
    check_same_images(
        extra, f"world model {path}", image_convention(episodes, cfg.camera), "the episodes to measure on"
    )
    for episode in episodes if cfg.starts and cfg.true_error else ():
        check_replays(episode)
    sampler = WindowSampler(episodes, model.cfg.chunk + 1, model.cfg.chunk, lookback)
    batch = sampler.spread(cfg.segments)
    suites = [episodes[i].name.split("/")[0] for i in batch.index[:, 0].tolist()]

    whole, judge = spread_episodes(episodes, cfg.episodes), None
    if cfg.episodes and cfg.success_model is not None:
        check_judged(cfg.success_model, whole)
        texts, size = [e.instruction for e in whole], model.cfg.tokenizer.image_size[0]
        check_judge(cfg.success_model, texts, extra, f"world model {path}", size, path)
        judge = SuccessModel.load(cfg.success_model, device)
    results = {"config": to_dict(cfg), "held_out_episodes": len(episodes), "segments": len(batch.frames)}
    results["frames"] = evaluate_frames(model, batch, suites, cfg, distance, autocast)
    if cfg.episodes:
        warn_other_contexts(extra, f"imagining whole episodes: {path}", -1)
        results["episodes"] = evaluate_episodes(model, whole, cfg, distance, autocast, judge)
    if cfg.perceptual == "none":  # the distance is then 0, which would read as perfect
        tables = [
            *results["frames"].values(),
            *(results["episodes"][part] for part in ("chunks", "last_chunk") if whole),
        ]
        for methods in tables:
            for name in ("imagined", "copy", "difference"):
                methods.get(name, {}).pop("perceptual", None)
    if distributed.is_main():
        if cfg.starts:
            results["sensitivity"] = evaluate_sensitivity(
                model,
                WindowSampler(episodes, model.cfg.chunk + 1, model.cfg.chunk).spread(cfg.starts),  # as the rewards
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
        for name in ("episodes.gif", "episodes.png"):
            (out_dir / name).unlink(missing_ok=True)  # of the command before
        if cfg.episodes:
            titles = to_film(whole, results["episodes"]["recorded"], cfg.greedy)
            draw_episodes(model, whole, titles, out_dir, autocast)
        print(report(results))
    distributed.cleanup()
    return results


if __name__ == "__main__":
    run_script(main, Config, PRESETS, __doc__)
