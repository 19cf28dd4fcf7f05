"""Report what a folder of demonstrations holds and what would break training on it.

    python -m vlarft.data.check PATH [--picture check.png] [--json check.json]

Reads any format that `load_episodes` reads. Prints episodes, frames, fps, cameras, instructions, ranges of actions and
proprioception, units, gripper, no-ops and image orientation, then warnings and errors. Writes a picture with three
frames of every camera. Goes through all packets of the videos and all headers of images, without decoding them; with
--camera, reads the files of that camera only. Exits with 1 if training would refuse the data, otherwise with 0, even if
there are warnings.

Warnings come from statistics and may be wrong: check them against the picture.
"""

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlarft.data.consistency import (
    begins_at_zero,
    copies,
    gripper_problems,
    other_names,
    same_robot,
    target_positions,
    zero_starts,
)
from vlarft.data.episode import Episode, no_ops
from vlarft.data.episodes import demo_files, read_episodes
from vlarft.data.frames import Budget, Frames
from vlarft.data.video import VideoFrames, scan
from vlarft.run.cameras import CAMERAS
from vlarft.run.checkpoint import write_json
from vlarft.run.config import Parser
from vlarft.run.pictures import grid, save_png
from vlarft.run.script import clear_errors

WINDOW = 9  # frames of a training window
FEW = 10  # fewer episodes are warned about


@dataclass
class Report:
    """facts: JSON-safe; warnings: what may spoil training; errors: what prevents it."""

    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def check(path: str | Path, camera: str | None = None) -> tuple[Report, list[Episode]]:
    """Check a data set; only a sample of its images is decoded.

    Args:
        path: folder or file of demonstrations.
        camera: camera that training will use, the only one whose files are read; None checks all cameras.

    Returns:
        The report, and the episodes that could be read, with the cameras that were checked.
    """
    report, episodes = Report(), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _read(report, episodes, path, camera)
    report.warnings += [str(w.message) for w in caught]
    if not episodes:
        report.errors = report.errors or [f"{path} has no complete demonstrations"]
        return report, []
    if report.errors:
        report.warnings.append(f"only {len(episodes)} episodes can be read: convert with --skip-bad copies these")
    report.warnings += copies(episodes) + other_names(episodes) + zero_starts([begins_at_zero(e) for e in episodes])
    report.errors += same_robot(episodes) or gripper_problems(episodes)
    names = Counter(e.name for e in episodes)
    if twice := [name for name, count in names.items() if count > 1]:
        report.errors.append(f"two episodes have the name {twice[0]!r}, in folders of one name; rename one of them")
    if len(episodes) < 2:
        report.errors.append("1 episode: one is held out and one trained on, so 2 at least are needed")
    if all(len(e) < WINDOW for e in episodes):
        longest = max(map(len, episodes))
        report.errors.append(f"no episode has the {WINDOW} frames of a window; the longest has {longest}")
    _contents(report, episodes)
    if len({(e.actions.shape[1], e.proprio.shape[1]) for e in episodes}) == 1:
        _numbers(report, episodes)
        _grippers(report, episodes)
        _motion(report, episodes)
    try:
        _images(report, episodes)
    except (ValueError, OSError) as error:
        report.errors.append(str(error))
    return report, episodes


def _read(report: Report, episodes: list[Episode], path: str | Path, camera: str | None) -> None:
    """Read into `episodes` those whose files hold all frames; every fault becomes an error."""
    errors: list[Exception] = []
    try:
        report.facts["format"] = demo_files(path)[0]
        for episode in read_episodes(path, camera, lambda *_: True, budget=Budget(64 << 20), bad=errors.append):
            episodes.append(episode)
    except (ValueError, OSError, ImportError) as error:
        errors.append(error)
    report.errors += dict.fromkeys(map(str, errors))  # episodes of one file may share one


def _contents(report: Report, episodes: Sequence[Episode]) -> None:
    """Report episodes, lengths, cameras and instructions."""
    lengths, instructions = np.array([len(e) for e in episodes]), Counter(e.instruction for e in episodes)
    sizes: dict[str, set[tuple[int, int]]] = {}
    for e in episodes:
        for name, images in e.cameras.items():
            sizes.setdefault(name, set()).add(tuple(images.shape[1:3]))
    fps = sorted({e.fps for e in episodes if e.fps is not None})
    report.facts |= {
        "episodes": len(episodes),
        "frames": int(lengths.sum()),
        "fps": fps[0] if len(fps) == 1 else fps or None,
        "lengths": {"shortest": int(lengths.min()), "median": float(np.median(lengths)), "longest": int(lengths.max())},
        "cameras": {name: [f"{h} x {w}" for h, w in sorted(s)] for name, s in sizes.items()},
        "instructions": dict(instructions.most_common()),
        "kinds": dict(Counter(e.kind if e.success or e.kind != "expert" else "failed" for e in episodes)),
        "outcomes": dict(Counter(_outcome(e) for e in episodes)),
        "actions of the demonstrator apart from executed ones": any(e.intended is not e.actions for e in episodes),
    }
    warn = report.warnings.append
    if len(episodes) < FEW:
        warn(f"{len(episodes)} episodes: training needs far more")
    if (experts := sum(e.success and e.kind == "expert" for e in episodes)) < 2:
        warn(
            f"{experts} of {len(episodes)} episodes are demonstrations that succeeded: train_sft.py, which learns from "
            "these alone, needs two. Do the files call successes failures?"
        )
    if short := [e for e in episodes if len(e) < WINDOW]:
        warn(f"{len(short)} episodes are shorter than a window of {WINDOW} frames and are left out: {short[0].name}")
    if len(long := [e for e in episodes if len(e) > 4 * np.median(lengths)]):
        warn(f"{len(long)} episodes are more than 4 times as long as the median, first {long[0].name}: do they pause?")
    if not fps:
        warn("the files do not state their control steps per second")
    for name, shapes in sizes.items():
        if len(shapes) > 1:
            report.errors.append(f"camera {name} has images of several sizes: {sorted(shapes)}; convert with --size")
        elif (size := next(iter(shapes)))[0] != size[1]:
            warn(
                f"camera {name} is {size[0]} x {size[1]}; the models take squares: convert with --size (--centre-crop)"
            )
    if missing := [n for n in sizes if any(n not in e.cameras for e in episodes)]:
        warn(f"not every episode has the camera {', '.join(missing)}")
    plain: dict[str, str] = {}
    for text in instructions:
        other = plain.setdefault(" ".join("".join(c if c.isalnum() else " " for c in text.lower()).split()), text)
        if other != text:
            warn(f"instructions {other!r} and {text!r} differ only in spelling; are they one task?")


def _outcome(episode: Episode) -> str:
    if not episode.outcome_known:
        return "not known, taken as success"
    return "success" if episode.success else "failure"


def _numbers(report: Report, episodes: Sequence[Episode]) -> None:
    """Report statistics of actions and proprio; warn of columns that carry no information."""
    for name, values in (("actions", _joined(episodes, "intended")), ("proprio", _joined(episodes, "proprio"))):
        low, high = values.min(0), values.max(0)
        q01, q99 = np.quantile(values, (0.01, 0.99), axis=0)
        rows = {"min": low, "q01": q01, "mean": values.mean(0), "std": values.std(0), "q99": q99, "max": high}
        report.facts[name] = {k: [float(f"{x:.4g}") for x in v] for k, v in rows.items()}
        motion = [i for i in range(values.shape[1]) if name == "proprio" or i not in episodes[0].grippers]
        if constant := [i for i in range(values.shape[1]) if high[i] - low[i] < 1e-6]:
            report.warnings.append(f"{name} {constant} never change: missing columns, or a joint that is not used")
        if narrow := [i for i in motion if q99[i] - q01[i] < 1e-6 < high[i] - low[i]]:
            report.warnings.append(f"{name} {narrow} change in less than 2 % of the steps; the normaliser drops them")
        if name == "actions":
            stuck = [i for i in motion if i not in constant and np.isin(values[:, i], (low[i], high[i])).mean() > 0.2]
            if stuck:
                report.warnings.append(f"actions {stuck} are at their limits in over 20 % of the steps: clipped?")
            outlier = [i for i in motion if high[i] - low[i] > 20 * (q99[i] - q01[i]) > 0]
            if outlier:
                report.warnings.append(f"actions {outlier} have outliers, over 20 times their usual range: glitches?")


def _grippers(report: Report, episodes: Sequence[Episode]) -> None:
    """Report which dimensions are grippers, and their commands; warn of those that look otherwise."""
    first, actions = episodes[0], _joined(episodes, "intended")
    dims = ", ".join(map(str, first.grippers)) or "none"
    source = "assumed: the files do not say" if first.gripper_dims is None else "as the files say"
    report.facts["gripper dimensions"] = f"{dims} ({source})"
    report.facts |= {"held dimensions": ", ".join(map(str, first.held_dims))} if first.held_dims else {}
    for dim, column in enumerate(actions.T):
        values = np.unique(column.round(4))
        if dim not in first.grippers:
            if np.isin(values, (-1, 1)).all() and dim not in first.held_dims:
                report.warnings.append(
                    f"action {dim} is only ever -1 or +1, but no gripper command: is it one? (convert --gripper-dims)"
                )
            continue
        report.facts[f"gripper, action {dim}"] = {
            "range": [float(column.min()), float(column.max())],
            "values": values.tolist() if len(values) <= 6 else f"{len(values)} different ones",
            "closed in": f"{(column > 0).mean():.0%} of the steps",
        }
        if len(values) == 1:
            report.warnings.append(f"the gripper command is always {values[0]:g}")
    if first.grippers == (actions.shape[1] - 1,) and _is_liberos(episodes):
        _fingers(report, episodes)


def _is_liberos(episodes: Sequence[Episode]) -> bool:
    """Return whether proprio ends with two fingers' positions that mirror each other, as LIBERO's eight numbers do."""
    if any(e.proprio.shape[1] != 8 for e in episodes):
        return False
    fingers = _joined(episodes, "proprio")[:, 6:]  # [m]
    return bool(np.abs(fingers).max() < 0.1 and np.abs(fingers.sum(1)).mean() < 0.01)


def _fingers(report: Report, episodes: Sequence[Episode]) -> None:
    """Warn if LIBERO's fingers open when +1 (close) is commanded."""
    steady = 5  # steps after which the fingers have followed a command
    width, closed = [], []
    for e in episodes:
        command = e.actions[:, -1] > 0
        settled = [t for t in range(steady, len(e)) if (command[t - steady : t] == command[t]).all()]
        width.append(np.abs(e.proprio[settled, 6:]).sum(1))
        closed.append(command[settled])
    width, closed = np.concatenate(width), np.concatenate(closed)
    if min(closed.sum(), (~closed).sum()) >= 50:
        means = {"open": float(width[~closed].mean()), "closed": float(width[closed].mean())}
        report.facts["mean finger opening (proprio 6, 7) with the command"] = {
            k: float(f"{v:.4g}") for k, v in means.items()
        }
        if means["closed"] > 1.05 * means["open"]:
            report.warnings.append(
                "the fingers are further apart when the gripper command is positive: the sign looks inverted; "
                "convert with --gripper 1 -1"
            )


def _motion(report: Report, episodes: Sequence[Episode]) -> None:
    """Report no-ops, the effect and delay of a unit of action, and whether actions are target positions."""
    idle = [no_ops(e) for e in episodes]
    share = np.concatenate(idle).mean()
    report.facts["no-ops"] = f"{int(sum(i.sum() for i in idle))} ({share:.1%} of the steps)"
    if share > 0.05:
        report.warnings.append(
            f"{share:.0%} of the steps are no-ops; a policy learns to stop: convert with --drop-no-ops"
        )
    dims = range(min(episodes[0].actions.shape[1], episodes[0].proprio.shape[1]))
    dims = [i for i in dims if i not in episodes[0].grippers]
    long = [e for e in episodes if len(e) > 12]
    if not long:
        return
    report.facts["units"], positions = {}, target_positions(long)
    for i in dims:
        action, place = (np.concatenate([getattr(e, n)[:, i] for e in long]) for n in ("actions", "proprio"))
        if action.std() < 1e-6 or place.std() < 1e-6:
            continue
        lags = {lag: _lagged(long, i, lag) for lag in range(-3, 5)}
        best = max(lags, key=lambda lag: abs(lags[lag][0]))
        r, slope = lags[best]
        if abs(r) > max(0.3, 5 / len(action) ** 0.5):
            effect = f"moves proprio {i} by {slope:.3g} per unit and step (r {r:.2f}, delay {best} steps)"
            report.facts["units"][f"action {i}"] = effect
        if i < 3 and abs(r) > 0.5 and best < 0 and abs(r) > abs(lags[0][0]) + 0.1 and not positions:
            report.warnings.append(f"proprio {i} moves {-best} steps before action {i}: are the two columns shifted?")
        if i < 3 and r < -0.5 and not positions:
            report.warnings.append(f"proprio {i} moves against action {i} (r {r:.2f}): other axes or sign?")
    if positions and not episodes[0].absolute:
        report.warnings.append(
            f"actions {positions} are close to proprio {positions}: target positions rather than motions? If so, "
            "convert with --absolute, so that holding still repeats them"
        )
    report.facts["actions are"] = "target positions" if episodes[0].absolute else "motions"


def _lagged(episodes: Sequence[Episode], dim: int, lag: int) -> tuple[float, float]:
    """Return correlation and regression slope of proprio's motion at step t + lag on the action at step t."""
    action, motion = [], []
    for e in episodes:
        step = np.diff(e.proprio[:, dim])  # step[t]: the effect of action t, if there is no delay
        lo, hi = max(0, -lag), min(len(step), len(step) - lag)
        action.append(e.actions[lo:hi, dim])
        motion.append(step[lo + lag : hi + lag])
    action, motion = np.concatenate(action), np.concatenate(motion)
    variance = action.var()
    if variance < 1e-12 or motion.std() < 1e-12:
        return 0.0, 0.0
    return _correlation(action, motion), float(((action - action.mean()) * (motion - motion.mean())).mean() / variance)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def _images(report: Report, episodes: Sequence[Episode]) -> None:
    """Report which way is up; warn of black or frozen frames and of videos with few keyframes. Decodes a sample."""
    picked = [episodes[i] for i in np.linspace(0, len(episodes) - 1, min(12, len(episodes))).round().astype(int)]
    known = _is_liberos(episodes)  # then proprio 2 is the hand's height
    report.facts["orientation"] = {}
    for name in dict.fromkeys(n for e in picked for n in e.cameras):
        rows, hands, frozen, black, seen = [], [], 0, 0, 0
        for e in (e for e in picked if name in e.cameras):
            images = e.cameras[name]
            gap, idle = max(1, min(4, len(e) // 4)), no_ops(e, 1e-3)
            for t in np.linspace(0, len(e) - 1 - gap, 12).astype(int) if len(e) > gap else ():
                frames = images[t : t + gap + 1]
                one, two = frames[0].astype(np.int16), frames[-1].astype(np.int16)
                seen, black = seen + 1, black + (one.max() < 16)
                frozen += not idle[t : t + gap].all() and (one == two).all()
                moving = np.abs(two - one).max(-1) > 24  # what moves is mostly the hand: higher up, in a lower row
                if moving.sum() > 0.0005 * moving.size and known:
                    rows.append(np.flatnonzero(moving.any(1)).mean() / moving.shape[0])
                    hands.append(e.proprio[t, :3])
        if seen and black > 0.1 * seen:
            report.warnings.append(f"camera {name}: {black / seen:.0%} of the sampled frames are black")
        if seen and frozen > 0.2 * seen:
            report.warnings.append(
                f"camera {name}: {frozen / seen:.0%} of the frames stand still while the robot moves"
            )
        images = next(e.cameras[name] for e in picked if name in e.cameras)
        source = images.source if isinstance(images, Frames) else None
        if isinstance(source, VideoFrames):
            index = scan(source.path)
            if (apart := len(index.pts) / max(1, len(index.keys))) > 30:
                report.warnings.append(
                    f"camera {name}: a keyframe every {apart:.0f} frames makes random windows slow; convert it "
                    "(--format lerobot writes one every second frame)"
                )
        moves = name in ("eye_in_hand", *CAMERAS["eye_in_hand"])
        r = _partial_correlation(np.array(rows), np.array(hands)) if len(rows) >= 20 and not moves else None
        if r is None:
            reason = "too little motion to tell" if known else "not judged: proprio is not LIBERO's; see the picture"
            reason = "not judged: it moves with the hand; see the picture" if moves else reason
            report.facts["orientation"][name] = reason
            continue
        verdict = "upright" if r < -0.3 else "upside down?" if r > 0.3 else "no clear sign"
        report.facts["orientation"][name] = f"{verdict} (row of motion against the hand's height: r {r:.2f})"
        if r > 0.3:
            report.warnings.append(
                f"camera {name}: motion is lower in the image when the hand is higher (r {r:.2f}): upside down? Look "
                "at the picture; convert with --turn"
            )


def _partial_correlation(rows: np.ndarray, hands: np.ndarray) -> float | None:
    """Correlate rows (N,) with the height hands[:, 2], controlling for hands[:, :2] (N, 2); None without variation.

    A camera that looks down at an angle sees nearer objects in lower rows, whatever their height.
    """
    given = np.concatenate([np.ones((len(rows), 1)), hands[:, :2]], 1)
    residuals = [v - given @ np.linalg.lstsq(given, v, rcond=None)[0] for v in (rows, hands[:, 2])]
    return None if min(v.std() for v in residuals) < 1e-6 else _correlation(*residuals)


def _joined(episodes: Sequence[Episode], name: str) -> np.ndarray:
    return np.concatenate([getattr(e, name) for e in episodes])


def sample_picture(episodes: Sequence[Episode]) -> np.ndarray:
    """Show three frames per camera: the start of the first episode, the middle of another, the end of the last.

    Returns:
        uint8 (height, width, 3), one row per camera, with its name; blank where an episode has no such camera.
    """
    places = (episodes[0], 0.0), (episodes[len(episodes) // 2], 0.5), (episodes[-1], 1.0)
    rows, names = [], list(dict.fromkeys(n for e, _ in places for n in e.cameras))
    height, width = (max(v.shape[k] for e, _ in places for v in e.cameras.values()) for k in (1, 2))
    for name in names:
        row = []
        for e, share in places:
            canvas = torch.ones(3, height, width)
            if name in e.cameras:
                image = torch.from_numpy(np.array(e.cameras[name][round(share * (len(e) - 1))]))
                canvas[:, : image.shape[0], : image.shape[1]] = image.permute(2, 0, 1) / 255
            row.append(canvas)
        rows.append(row)
    return grid(rows, names)


def _picture(report: Report, episodes: Sequence[Episode], path: Path) -> None:
    """Write the picture; only frames that cannot be read are errors."""
    try:
        picture = sample_picture(episodes)
    except (ValueError, OSError) as error:
        report.errors.append(str(error))
        return
    except ImportError as error:
        report.warnings.append(f"no picture: {error}")
        return
    try:
        save_png(path, picture)
        report.facts["picture"] = str(path)
    except OSError as error:
        report.warnings.append(f"no picture: {error}")


def render(report: Report) -> str:
    """Return the report as text."""
    lines = []
    for key, value in report.facts.items():
        if key in ("actions", "proprio"):
            lines.append(f"{key}:")
            lines += [f"  {k:>5} " + " ".join(f"{x:>10.4g}" for x in row) for k, row in value.items()]
        elif isinstance(value, dict):
            lines.append(f"{key}:")
            lines += [f"  {k}: {v}" for k, v in list(value.items())[:20]]
            lines += [f"  ... and {len(value) - 20} more"] if len(value) > 20 else []
        else:
            lines.append(f"{key}: {value}")
    lines += [f"warning: {text}" for text in report.warnings] + [f"ERROR: {text}" for text in report.errors]
    if not report.warnings and not report.errors:
        lines.append("no warnings")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run the command line and return the exit status: 1 if there are errors, else 0."""
    parser = Parser(
        prog="python -m vlarft.data.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="folder or file of demonstrations")
    parser.add_argument("--camera", help="camera that training will use; the others are not read")
    parser.add_argument("--picture", type=Path, default=Path("data_check.png"), help="PNG of sample frames to write")
    parser.add_argument("--json", type=Path, help="JSON file of the report to write")
    args = parser.parse_args(argv)
    report, episodes = check(args.path, args.camera)
    if episodes:
        _picture(report, episodes, args.picture)
    if args.json:
        write_json(args.json, vars(report))
    print(render(report))
    return int(bool(report.errors))


if __name__ == "__main__":
    with clear_errors():
        sys.exit(main(sys.argv[1:]))
