"""Pictures, films and curves as data URIs."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlarft.data.video import import_av
from vlarft.report.runs import named
from vlarft.run.optional import optional

MOST_POINTS = 400  # of a curve
MOST_FRAMES = 60  # of a film
MOST_PIXELS = 1240  # width of a picture [px]


def decimal(value: float, form: str = ".3g") -> str:
    """Format a number as text; a dash if it is none."""
    return f"{value:{form}}" if math.isfinite(value) else "–"


def span(entry: Mapping[str, float], form: str = ".3g", scale: float = 1.0) -> str:
    """Format the interval of an entry with `low` and `high`."""
    return f"[{decimal(scale * entry['low'], form)}, {decimal(scale * entry['high'], form)}]"


def percent(entry: Mapping[str, float]) -> str:
    """Format the success rate of an entry with its interval."""
    return f"{decimal(100 * entry['rate'], '.1f')} % {span(entry, '.1f', 100)}"


class Picture(NamedTuple):
    """An image as a data URI."""

    caption: str
    alt: str
    uri: str


class Track(NamedTuple):
    """Frames as data URIs, each with a note, and the largest width at which they are shown [px]."""

    label: str
    frames: list[str]
    notes: list[str]
    width: int


class Film(NamedTuple):
    """Tracks that one slider moves; a track that has ended shows its last frame. `interval`: of the frames [ms]."""

    title: str
    tracks: list[Track]
    interval: float

    @property
    def length(self) -> int:
        return max(len(track.frames) for track in self.tracks)

    @property
    def data(self) -> list[list]:
        """What the page's script reads."""
        return [[track.frames, track.notes] for track in self.tracks]


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _encoded(image: Any) -> str:
    """Encode an image of pillow as WebP, at most `MOST_PIXELS` wide."""
    image, buffer = image.convert("RGB"), io.BytesIO()
    image.thumbnail((MOST_PIXELS, 4 * MOST_PIXELS))
    image.save(buffer, "WEBP", quality=80)
    return _uri(buffer.getvalue(), "webp")


def _pillow() -> Any:
    with optional("the pictures of a report need pillow", "plots"):
        from PIL import Image
    return Image


def picture(path: Path, caption: str) -> list[Picture]:
    """Read the picture of a file, if there is one."""
    if not path.is_file():
        return []
    with named(path, "a picture"), _pillow().open(path) as image:
        return [Picture(caption, caption, _encoded(image))]


def _frames(path: Path) -> tuple[list[Any], float]:
    """Read the frames of a GIF or MP4, as images of pillow at equal intervals, and the interval [ms]."""
    image_module, frames = _pillow(), []
    with named(path, "a film"):
        if path.suffix == ".mp4":
            with import_av().open(str(path)) as file:
                frames = [frame.to_image() for frame in file.decode(video=0)]
                return frames, 1000 / float(file.streams.video[0].average_rate)
        with image_module.open(path) as film:
            times = []
            for number in range(film.n_frames):
                film.seek(number)
                frames.append(film.convert("RGB"))
                times.append(film.info.get("duration") or 100)
    interval = min(times)
    times[-1] = interval  # the last one is only held
    # equal frames in a row are stored as one
    return [f for f, time in zip(frames, times) for _ in range(max(1, round(time / interval)))], interval


def track(label: str, frames: Sequence[np.ndarray], notes: Sequence[str] = (), width: int = 256) -> Track:
    """Make a track of a film from frames (H, W, 3), uint8."""
    return Track(label, [_encoded(_pillow().fromarray(frame)) for frame in frames], list(notes), width)


def film(title: str, paths: Mapping[str, Path]) -> Film:
    """Put films side by side, label -> file, with at most `MOST_FRAMES` frames."""
    films = {label: _frames(path) for label, path in paths.items()}
    longest = max(len(frames) for frames, _ in films.values())
    interval = min(interval for _, interval in films.values())
    times = np.linspace(0, longest - 1, min(longest, MOST_FRAMES)).round().astype(int)
    tracks = []
    for label, (frames, _) in films.items():
        shown = [*(frames[t] for t in times if t < len(frames) - 1), frames[-1]]
        width = 256 if len(films) > 1 else max(400, frames[0].width)
        tracks.append(Track(label, [_encoded(frame) for frame in shown], [], width))
    return Film(title, tracks, interval * longest / len(times))


def _axis(height: float = 2.9) -> Any:
    with optional("the curves of a report need matplotlib", "plots"):
        from matplotlib.figure import Figure
    axis = Figure(figsize=(5, height), layout="constrained").add_subplot()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    return axis


def _drawn(axis: Any, caption: str, alt: str) -> Picture:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "vlarft"}):  # the same runs make the same file
        axis.figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Picture(caption, alt, _uri(buffer.getvalue(), "svg+xml"))


def plot(
    title: str, series: Mapping[str, np.ndarray], x_label: str = "step", others: Sequence[np.ndarray] = ()
) -> list[Picture]:
    """Plot curves, label -> rows (x, y), above `others`, which have no label; none if they have no number.

    At most `MOST_POINTS` points of each are shown.
    """
    series = {label: rows for label, rows in series.items() if np.isfinite(rows[:, 1]).any()}
    if not series:
        return []
    axis = _axis()
    for rows in others:
        axis.plot(*rows.T, color="0.75", linewidth=1)
    for label, rows in series.items():
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), MOST_POINTS)).round().astype(int)]
        axis.plot(*rows.T, label=label, marker="." if len(rows) < 30 else None)
    axis.set_xlabel(x_label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if len(series) > 1:
        axis.legend(fontsize="small")
    ends = [
        f"{label} from {decimal(first[1])} at {first[0]:g} to {decimal(last[1])} at {last[0]:g}"
        for label, first, last in ((label, rows[0], rows[-1]) for label, rows in series.items())
    ]
    return [_drawn(axis, title, f"{title} by {x_label}: {'; '.join(ends)}")]


def rate_plot(rates: Mapping[str, Mapping[str, float]]) -> list[Picture]:
    """Plot success rates with their intervals."""
    axis = _axis(0.9 + 0.36 * len(rates))
    values = 100 * np.array([[rate[name] for name in ("rate", "low", "high")] for rate in rates.values()])  # (n, 3)
    errors = [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]
    axis.errorbar(values[:, 0], range(len(rates)), xerr=errors, fmt="o", capsize=4)
    axis.set(xlim=(0, 100), ylim=(len(rates) - 0.5, -0.5), xlabel="success [%]")
    axis.set_yticks(range(len(rates)), [name.replace("$", r"\$") for name in rates])  # no formulae
    shown = "; ".join(f"{name} {percent(rate)}" for name, rate in rates.items())
    return [_drawn(axis, "success rates, 95 % intervals", f"success rates: {shown}")]


def group_film(path: Path) -> tuple[Film, list[Picture]]:
    """Show the group that train_rft.py wrote: its best and worst rollout beside their reference, and all rewards."""
    with named(path, "a group of train_rft.py"), np.load(path) as file:
        reward, instruction = file["reward"], str(file["instruction"])  # (G, T), the best rollout first
        frames = {name: file[name] for name in ("reference", "best", "worst")}  # (T, H, W, C)
        title, rows = f"A group of {len(reward)} rollouts: “{instruction}”", [by_number(row) for row in reward]
    tracks = [track("reference", frames["reference"])]
    for name, values in (("best", reward[0]), ("worst", reward[-1])):
        notes = [f"this frame: {decimal(value, '.3f')}" for value in values]
        tracks.append(track(f"{name}, reward {decimal(values.sum(), '.2f')}", frames[name], notes))
    curves = plot("reward of each frame in a group", {"best": rows[0], "worst": rows[-1]}, "frame", rows[1:-1])
    return Film(title, tracks, 300), curves


def by_number(values: Sequence[float]) -> np.ndarray:
    """Number values from 1: rows for `plot`."""
    return np.stack([np.arange(1, len(values) + 1), values], axis=1)
