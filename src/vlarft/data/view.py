"""Write episodes into a file that the viewer rerun shows: images, actions and proprioception over time.

    python -m vlarft.data.view PATH [--out view.rrd] [--episodes 10]
    rerun view.rrd                       # the viewer, which comes with rerun-sdk

Reads any format that `load_episodes` reads, and takes episodes from all over the data set: the first, the last and
those evenly between. Each has a tab with every camera, curves of actions and proprioception, the instruction and the
outcome, over control steps and, where the files state their fps, over seconds. Curves have the names that a LeRobot set
gives its dimensions; otherwise they are numbered. Images are stored as JPEG: look for artefacts in the data themselves.
Opens no window and sends nothing; the viewer itself tells rerun's makers how it is used, unless `rerun analytics
disable` forbids it.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from vlarft.data.episode import Episode
from vlarft.data.episodes import read_episodes
from vlarft.data.frames import Budget, import_pillow
from vlarft.run.checkpoint import write_atomic
from vlarft.run.config import Count, Parser, reader
from vlarft.run.optional import optional
from vlarft.run.script import clear_errors

JPEG_QUALITY = 90


def import_rerun() -> Any:
    """Import rerun; an ImportError says what installs it."""
    with optional("files for the viewer rerun need rerun-sdk", "view"):
        import rerun
        import rerun.blueprint
    return rerun


def pick(path: str | Path, count: int) -> list[Episode]:
    """Read up to `count` episodes with all cameras, evenly from the whole data set.

    Raises:
        FileNotFoundError: no such path, or no episodes.
        ValueError: see `load_episodes`.
    """
    episodes = list(read_episodes(path, None, lambda *_: True, budget=Budget(0)))
    if not episodes:
        raise FileNotFoundError(f"{path} has no complete demonstrations")
    places = np.linspace(0, len(episodes) - 1, min(count, len(episodes))).round().astype(int)
    return [episodes[i] for i in places]


def outcome(episode: Episode) -> str:
    """Return what is shown of how an episode ended."""
    return "not known" if not episode.outcome_known else "success" if episode.success else "failure"


def curves(episode: Episode) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Return name -> numbers (T, D) and the names of the D curves; `intended_actions` only where they differ."""
    tables = {"actions": (episode.actions, episode.action_names), "proprio": (episode.proprio, episode.proprio_names)}
    if episode.intended is not episode.actions:
        tables["intended_actions"] = episode.intended, episode.action_names
    return {k: (table, list(names) or [str(i) for i in range(table.shape[1])]) for k, (table, names) in tables.items()}


def jpeg(image: np.ndarray) -> bytes:
    """Encode an image (H, W, 3) uint8."""
    file = io.BytesIO()
    import_pillow().fromarray(np.ascontiguousarray(image)).save(file, "jpeg", quality=JPEG_QUALITY)
    return file.getvalue()


def write_rrd(path: str | Path, episodes: Sequence[Episode], title: str) -> None:
    """Write episodes as a recording of rerun; everything of an episode lies below its name.

    Args:
        path: file to write, .rrd.
        episodes: of different names.
        title: name of the recording.

    Raises:
        ImportError: rerun-sdk is not installed.
        ValueError: rerun is turned off by its environment variable.
        OSError: not writable, or no space left.
    """
    rr = import_rerun()
    stream = rr.RecordingStream("vlarft", recording_id=uuid4())
    if not rr.is_enabled(stream):
        raise ValueError("the environment variable RERUN turns recording off; unset it")
    binary = rr.binary_stream(stream)
    stream.send_recording_name(title)
    tabs = []
    for episode in episodes:
        root = rr.new_entity_path(episode.name.split("/"))
        steps = np.arange(len(episode))
        times = [rr.TimeColumn("step", sequence=steps)]
        times += [] if episode.fps is None else [rr.TimeColumn("time", duration=steps / episode.fps)]
        views, plots = [], []
        for name, images in episode.cameras.items():
            place = f"{root}/cameras/{rr.escape_entity_path_part(name)}"
            files = [jpeg(image) for image in np.asarray(images)]
            columns = rr.EncodedImage.columns(blob=files, media_type=["image/jpeg"] * len(files))
            stream.send_columns(place, times, columns, strict=True)
            views.append(rr.blueprint.Spatial2DView(origin=place, name=name))
        for name, (table, names) in curves(episode).items():
            stream.log(f"{root}/{name}", rr.SeriesLines(names=names), static=True, strict=True)
            stream.send_columns(f"{root}/{name}", times, rr.Scalars.columns(scalars=table), strict=True)
            plots.append(rr.blueprint.TimeSeriesView(origin=f"{root}/{name}", name=name))
        texts = {"instruction": episode.instruction, "outcome": outcome(episode), "kind": episode.kind}
        for name, text in texts.items():
            stream.log(f"{root}/{name}", rr.TextDocument(text), static=True, strict=True)
            views.append(rr.blueprint.TextDocumentView(origin=f"{root}/{name}", name=name))
        layout = rr.blueprint.Horizontal(rr.blueprint.Grid(*views), rr.blueprint.Vertical(*plots))
        tabs.append(rr.blueprint.Vertical(layout, name=f"{episode.name}: {outcome(episode)}"))
    stream.send_blueprint(rr.blueprint.Blueprint(rr.blueprint.Tabs(*tabs)))
    content = binary.read()  # at once: each read ends a file; and RecordingStream.save only logs that a disk is full
    write_atomic(path, lambda tmp: tmp.write_bytes(content))


def main(argv: Sequence[str]) -> None:
    """Run the command line; see the module's docstring.

    Raises:
        FileNotFoundError, ValueError, ImportError, OSError: the errors of reading and writing.
    """
    parser = Parser(
        prog="python -m vlarft.data.view", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="folder or file of demonstrations")
    parser.add_argument("--out", type=Path, default=Path("view.rrd"), help="file to write, .rrd")
    parser.add_argument("--episodes", type=reader(Count), default=10, help="episodes to show, from all over PATH")
    args = parser.parse_args(argv)
    if args.out.suffix != ".rrd":
        raise ValueError(f"--out {args.out} must end in .rrd, by which the viewer knows its files")
    import_rerun()  # before anything is read
    episodes = pick(args.path, args.episodes)
    write_rrd(args.out, episodes, args.path)
    print(f"{len(episodes)} episodes -> {args.out}; show them with: rerun {args.out}")


if __name__ == "__main__":
    with clear_errors():
        main(sys.argv[1:])
