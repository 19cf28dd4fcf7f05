"""Convert demonstrations to another format, and to the units and image sizes that training expects.

    python -m vlarft.data.convert demos demos_lerobot --format lerobot                    HDF5 -> LeRobot v3.0, mp4
    python -m vlarft.data.convert libero_goal_no_noops libero_goal --format hdf5 --fps 20  RLDS -> HDF5
    python -m vlarft.data.convert my_robot ready --format lerobot --images png --size 256 256 --gripper 100 0
    python -m vlarft.data.convert played attempts --format lerobot --kind policy          for world models only

SRC is anything that `load_episodes` reads; DST appears once it is complete. All cameras are kept, and so are failed and
noisy attempts, with their labels. LeRobot data sets keep no simulator states. HDF5 is for robots with 7 action and 8
proprio dimensions; it gets one file per instruction. Episodes get new names, which changes splits: convert first.
"""

import argparse
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

from vlarft.data.consistency import begins_at_zero, zero_starts
from vlarft.data.episode import Episode, no_ops, pick_camera
from vlarft.data.episodes import demo_files, read_episodes, warn_left_out
from vlarft.data.frames import Budget, import_pillow
from vlarft.data.hdf5 import import_h5py, write_demo, write_task_attrs
from vlarft.data.lerobot_writer import camera_key, write_lerobot
from vlarft.run.cameras import CAMERAS
from vlarft.run.checkpoint import check_room, new_folder
from vlarft.run.config import Parser, Positive, Range, Side, Whole, reader
from vlarft.run.script import clear_errors


def resize(images: np.ndarray, size: tuple[int, int], centre_crop: bool) -> np.ndarray:
    """Resize images with antialiased bicubic interpolation.

    Args:
        images: (T, H, W, 3) uint8.
        size: height and width of the result [px].
        centre_crop: first crop to the aspect ratio of `size`, around the centre; otherwise the ratio may change.

    Returns:
        (T, *size, 3) uint8.
    """
    height, width = images.shape[1:3]
    if centre_crop:
        scale = min(height / size[0], width / size[1])
        cut = round(size[0] * scale), round(size[1] * scale)
        top, left = (height - cut[0]) // 2, (width - cut[1]) // 2
        images = images[:, top : top + cut[0], left : left + cut[1]]
    if images.shape[1:3] == size:
        return images
    pillow = import_pillow()
    small = [pillow.fromarray(np.ascontiguousarray(i)).resize(size[::-1], pillow.Resampling.BICUBIC) for i in images]
    return np.stack([np.asarray(image) for image in small])


def change(
    episode: Episode,
    *,
    gripper: tuple[float, float] | None = None,
    size: tuple[int, int] | None = None,
    centre_crop: bool = False,
    turn: bool = False,
    drop_no_ops: bool = False,
    absolute: bool | None = None,
    kind: str | None = None,
    gripper_dims: Sequence[int] | None = None,
    held_dims: Sequence[int] | None = None,
) -> Episode:
    """Return the episode in other units or image sizes; images that change are loaded into memory.

    Args:
        episode: as read.
        gripper: values of the gripper dimensions that mean open and closed; mapped to -1 and +1, and clipped if they
            lie up to 10 % beyond.
        size: height and width of all images [px].
        centre_crop: see `resize`.
        turn: turn all images by 180 degrees.
        drop_no_ops: leave out steps that neither move nor change the gripper.
        absolute: label actions as target positions (True) or motions (False).
        kind: label of the episode; "noisy" and "policy" train world models, never policies.
        gripper_dims, held_dims: label these action dimensions as `Episode` says; if one is given, the other is empty.

    Raises:
        ValueError: all steps are no-ops, action dimensions that there are not, or a gripper to map and none or in other
            units.
    """
    if gripper_dims is not None or held_dims is not None:
        labels, width = (tuple(gripper_dims or ()), tuple(held_dims or ())), episode.actions.shape[1]
        if wrong := [i for i in (*labels[0], *labels[1]) if not 0 <= i < width or (i in labels[0] and i in labels[1])]:
            raise ValueError(
                f"{episode.name} has action dimensions 0 .. {width - 1}, each a gripper's or held or neither; got "
                f"--gripper-dims {list(labels[0])}, --held-dims {list(labels[1])}: {wrong[0]} does not fit"
            )
        episode = replace(episode, gripper_dims=labels[0], held_dims=labels[1])
    if absolute is not None:
        episode = replace(episode, absolute=absolute)
    if kind is not None:
        episode = replace(episode, kind=kind)
    if gripper is not None:
        if not episode.grippers:
            raise ValueError(f"{episode.name} has no gripper dimension to convert; name it with --gripper-dims")

        def mapped(actions: np.ndarray) -> np.ndarray:
            out, values = actions.copy(), actions[:, (dims := list(episode.grippers))]
            unit = 2 * (values - gripper[0]) / (gripper[1] - gripper[0]) - 1
            if np.abs(unit).max() > 1.2:  # a span is 2
                raise ValueError(
                    f"{episode.name}: the gripper actions lie in [{values.min():g}, {values.max():g}]; got --gripper "
                    f"{gripper[0]:g} {gripper[1]:g}: give the values that mean open and closed in these files"
                )
            out[:, dims] = np.clip(unit, -1, 1)
            return out

        actions = mapped(episode.actions)
        intended = actions if episode.intended is episode.actions else mapped(episode.intended)
        episode = replace(episode, actions=actions, intended=intended)
    cameras = dict(episode.cameras)
    if turn or size:
        for name, images in cameras.items():
            array = np.asarray(images)
            array = array[:, ::-1, ::-1] if turn else array
            cameras[name] = resize(array, size, centre_crop) if size else array
    columns = {name: getattr(episode, name) for name in ("proprio", "actions", "intended", "states")}
    if drop_no_ops:
        kept = ~no_ops(episode)
        if not kept.any():
            raise ValueError(f"{episode.name} has only no-ops; remove it")
        cameras = {name: np.asarray(images)[kept] for name, images in cameras.items()}
        same = episode.intended is episode.actions
        columns = {name: column if column is None else column[kept] for name, column in columns.items()}
        columns["intended"] = columns["actions"] if same else columns["intended"]
    main = next((name for name, images in episode.cameras.items() if images is episode.images), None)
    images = cameras[main] if main else episode.images
    return replace(episode, **columns, cameras=cameras, images=images)


def write_hdf5(root: Path, episodes: Iterator[Episode], fps: float) -> int:
    """Write LIBERO's layout, <root>/<instruction>_demo.hdf5; the folder appears once it is complete.

    Args:
        root: folder to create.
        episodes: 7 action and 8 proprio dimensions, actions that are motions; consumed one at a time.
        fps: control steps per second.

    Returns:
        The number of episodes.

    Raises:
        FileExistsError: `root` exists.
        ValueError: other dimensions, or absolute actions, which the layout cannot store.
    """
    files: dict[str, Path] = {}
    counts: dict[str, int] = {}
    total = 0
    with new_folder(root) as tmp:
        for episode in episodes:
            widths = episode.actions.shape[1], episode.proprio.shape[1]
            if widths != (7, 8) or episode.absolute or (episode.grippers, episode.held_dims) != ((6,), ()):
                raise ValueError(
                    f"{episode.name} has {widths[0]} action and {widths[1]} proprio dimensions"
                    f"{', absolute actions' * episode.absolute}, grippers {list(episode.grippers)} and held dimensions "
                    f"{list(episode.held_dims)}; LIBERO's HDF5 layout holds 7 and 8, motions, the gripper last: give "
                    "--format lerobot"
                )
            text = episode.instruction
            if text not in files:
                slug = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "task"
                taken = {path.name for path in files.values()}
                names = [f"{slug}_demo.hdf5", *(f"{slug}_{i}_demo.hdf5" for i in range(2, len(files) + 2))]
                files[text] = tmp / next(name for name in names if name not in taken)
            arrays = {_libero_name(name): np.asarray(images) for name, images in episode.cameras.items()}
            check_room(files[text], sum(images.nbytes for images in arrays.values()))
            with import_h5py().File(files[text], "a") as file:
                if "data" not in file:
                    write_task_attrs(file.create_group("data"), text, episode.env_args or {}, fps)
                write_demo(
                    file["data"],
                    counts.get(text, 0),
                    images=arrays,
                    actions=episode.actions,
                    intended_actions=episode.intended,
                    proprio=episode.proprio,
                    states=episode.states,
                    success=episode.success if episode.outcome_known else None,
                    attrs={"kind": episode.kind, "source": episode.name}
                    | ({"start": episode.start} if episode.start else {}),
                )
            counts[text] = counts.get(text, 0) + 1
            total += 1
    return total


def _libero_name(camera: str) -> str:
    return next((name for name, others in CAMERAS.items() if camera in others), camera)


def main(argv: Sequence[str]) -> None:
    """Run the command line; see the module's docstring.

    Raises:
        FileExistsError: DST exists.
        FileNotFoundError, ValueError: no demonstrations, unknown fps, and the errors of reading and writing.
    """
    parser = Parser(
        prog="python -m vlarft.data.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("src", type=Path, help="folder or file of demonstrations, any format")
    add("dst", type=Path, help="folder to create")
    add("--format", choices=("lerobot", "hdf5"), required=True, help="LeRobotDataset v3.0, or LIBERO's HDF5")
    add("--camera", nargs="+", help="cameras to keep; default all")
    add("--images", choices=("video", "png"), help="images of a LeRobot set: mp4 (default), or lossless PNG")
    add("--codec", choices=("h264", "av1"), help="video codec [h264]")
    add("--crf", type=reader(Annotated[int, Range(0, 51)]), help="video quality; lower is better and larger [18]")
    add("--fps", type=reader(Positive), help="control steps per second, if SRC does not state them (RLDS; LIBERO: 20)")
    add("--size", type=reader(Side), nargs=2, metavar=("H", "W"), help="resize all images [px]")
    add("--centre-crop", action="store_true", help="before --size, crop the centre to its aspect ratio")
    add("--turn", action="store_true", help="turn all images by 180 degrees")
    add(
        "--gripper",
        type=reader(float),
        nargs=2,
        metavar=("OPEN", "CLOSED"),
        help="gripper actions that mean open and closed",
    )
    add("--gripper-dims", type=reader(Whole), nargs="*", metavar="DIM", help="binary gripper dimensions, or none")
    add("--held-dims", type=reader(Whole), nargs="*", metavar="DIM", help="continuous grippers, other target positions")
    add("--drop-no-ops", action="store_true", help="leave out steps of no motion, while the robot rests")
    add("--absolute", action=argparse.BooleanOptionalAction, help="label actions as target positions or motions")
    add("--skip-bad", action="store_true", help="leave out episodes that cannot be read, and list them")
    add("--kind", choices=("expert", "noisy", "policy"), help="label all episodes; policies learn from expert only")
    args = parser.parse_args(argv)
    if args.centre_crop and not args.size:
        parser.error("--centre-crop needs --size")
    writing = {k: v for k in ("images", "codec", "crf") if (v := getattr(args, k)) is not None}
    if args.format == "hdf5" and writing:
        parser.error(f"--{next(iter(writing))} needs --format lerobot")
    if args.images == "png" and len(writing) > 1:
        parser.error(f"--{list(writing)[1]} is of videos: leave out --images png")
    if args.gripper and args.gripper[0] == args.gripper[1]:
        parser.error(f"--gripper: open and closed are both {args.gripper[0]:g}")
    changes = {
        "gripper": args.gripper,
        "size": tuple(args.size) if args.size else None,
        "centre_crop": args.centre_crop,
        "turn": args.turn,
        "drop_no_ops": args.drop_no_ops,
        "absolute": args.absolute,
        "kind": args.kind,
        "gripper_dims": args.gripper_dims,
        "held_dims": args.held_dims,
    }
    if args.src.resolve() in args.dst.resolve().parents:
        raise ValueError(f"{args.dst} lies in {args.src}, whose files would be mixed with it: give a folder outside")
    emptied = Path(f"{args.dst}.tmp").resolve()  # by `new_folder`
    if emptied in (args.src.resolve(), *args.src.resolve().parents):
        raise ValueError(f"{args.dst} is first written as {emptied}, which holds {args.src}: give another DST")
    with_states = None if args.format == "hdf5" and demo_files(args.src)[0] == "hdf5" else False
    camera = args.camera[0] if args.camera and len(args.camera) == 1 else None  # one or all: not which is the first
    errors: list[Exception] = []
    options = {"with_states": with_states, "budget": Budget(0), "bad": errors.append if args.skip_bad else None}
    source = read_episodes(args.src, camera, lambda *_: True, **options)
    first, zero = next(source, None), []
    if first is None:
        warn_left_out(errors)
        raise FileNotFoundError(f"{args.src} has no demonstrations")
    fps = args.fps or first.fps
    if fps is None:
        raise ValueError(f"{args.src} does not state its control steps per second: give --fps (LIBERO: 20)")

    def changed() -> Iterator[Episode]:
        yield from (one(episode) for episode in [first])
        yield from (one(episode) for episode in source)

    def one(episode: Episode) -> Episode:
        if episode.fps not in (None, fps):
            of = "--fps is" if args.fps else f"{first.name} has"
            raise ValueError(f"{episode.name} has {episode.fps:g} fps, {of} {fps:g}, and nothing is resampled")
        if args.camera:
            names = [pick_camera(episode.cameras, name, episode.name) for name in args.camera]
            episode = replace(episode, cameras={name: episode.cameras[name] for name in names})
        keys: dict[str, str] = {}
        for name in episode.cameras:
            other = keys.setdefault(camera_key(name), name)
            if other != name:
                raise ValueError(
                    f"{episode.name}: cameras {other} and {name} would both be written as {camera_key(name)}: choose "
                    "with --camera"
                )
        zero.append(begins_at_zero(episode))
        return change(episode, **changes)

    episodes = tqdm(changed(), unit="episode", disable=not sys.stderr.isatty())
    if args.format == "hdf5":
        count = write_hdf5(args.dst, episodes, fps)
    else:
        count = write_lerobot(args.dst, episodes, fps, **writing)
    warn_left_out(errors)
    for text in [] if args.drop_no_ops else zero_starts(zero):
        warnings.warn(text, stacklevel=2)
    print(f"{count} episodes -> {args.dst}")


if __name__ == "__main__":
    with clear_errors():
        main(sys.argv[1:])
