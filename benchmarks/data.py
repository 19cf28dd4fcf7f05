"""Windows per second that one worker reads from each format, against a plain loop over the underlying library.

    python benchmarks/data.py
    python benchmarks/data.py --preset smoke --out /tmp/data.json

`WindowSampler` runs without threads and with an empty cache: every window is read and decoded anew. The plain loops
read the same windows and make the same float tensors:

hdf5            h5py, the file kept open, a slice of the gzip data set that `collect_demos.py` writes
hdf5 original   h5py, a slice of the uncompressed data set of LIBERO's own files, 128 px, turned
lerobot mp4     PyAV, the container kept open, a seek to the window's time, frames decoded up to its end
lerobot png     pyarrow and pillow, the row groups of the window read, its images decoded
rlds            pillow alone, on JPEG bytes that are in memory already

Both run in turns and must give the same frames; the median of the repeats counts. `cached` is `WindowSampler` with all
decoded frames in memory. `ahead` is the share of the decoding time that a caller still waits with two threads, if it
computes for as long as a batch takes to decode. Mapped files have neither. Absolute numbers depend on the machine and
its load: the ratios are the result.
"""

import io
import shutil
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import h5py
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from vlarft.data import Batch, WindowSampler, load_episodes
from vlarft.data.convert import main as convert
from vlarft.data.hdf5 import write_demo, write_task_attrs
from vlarft.data.tfrecord import masked_crc
from vlarft.run.checkpoint import write_json
from vlarft.run.config import opt, parse


@dataclass(frozen=True)
class Config:
    out: str = opt("runs/benchmarks/data.json", "JSON file to write")
    size: int = opt(256, "side of the images [px]")
    episodes: int = opt(6, "episodes")
    steps: int = opt(150, "frames per episode")
    batch_size: int = opt(16, "windows per batch")
    repeats: int = opt(7, "timed batches of each version")


PRESETS = {"full": Config(), "smoke": Config(size=64, episodes=2, steps=30, batch_size=2, repeats=1)}
KEY = "observation.images.image"


def scene(cfg: Config, size: int, seed: int) -> np.ndarray:
    """Make frames (T, H, W, 3): a static textured ground with squares that move over it."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(60, 200, (size // 8, size // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    ground = np.clip(coarse + rng.integers(-8, 9, coarse.shape), 0, 255).astype(np.uint8)
    images = np.repeat(ground[None], cfg.steps, 0)
    place = np.cumsum(rng.normal(0, 2, (cfg.steps, 4, 2)), 0) + rng.uniform(0.2, 0.7, (4, 2)) * size
    for t, spots in enumerate(place.clip(0, size - size // 8).astype(int)):
        for colour, (y, x) in zip(((220, 40, 40), (40, 60, 220), (240, 240, 240), (30, 30, 30)), spots):
            images[t, y : y + size // 8, x : x + size // 8] = colour
    return images


def numbers(cfg: Config, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (cfg.steps, 7)).astype(np.float32)
    actions[:, 6] = np.where(np.arange(cfg.steps) < cfg.steps // 2, -1, 1)
    return {"actions": actions, "proprio": rng.normal(size=(cfg.steps, 8)).astype(np.float32)}


def make_hdf5(root: Path, cfg: Config, original: bool) -> Path:
    """Write an HDF5 file in this package's layout, or in that of LIBERO's original files."""
    path = root / "suite" / "task_demo.hdf5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        write_task_attrs(data, "a task", {}, 20)
        for i in range(cfg.episodes):
            columns = numbers(cfg, i)
            images = {"agentview": scene(cfg, 128 if original else cfg.size, i)}
            intended = {"intended_actions": columns["actions"]}
            write_demo(data, i, images=images, **columns, **intended)
            if original:
                del data[f"demo_{i}/obs/agentview_rgb"]
                data[f"demo_{i}/obs/agentview_rgb"] = images["agentview"]
        if original:
            del data.attrs["image_convention"]
    return path


def make_rlds(root: Path, cfg: Config) -> list[list[bytes]]:
    """Write one TFRecord file; return the JPEG images of every episode."""

    def varint(n: int) -> bytes:
        return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])

    def part(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2]) + varint(len(content)) + content

    def crc(content: bytes) -> bytes:
        return struct.pack("<I", masked_crc(np.frombuffer(content, np.uint8)))

    root.mkdir(parents=True)
    jpegs, out = [], b""
    for i in range(cfg.episodes):
        files = [io.BytesIO() for _ in range(cfg.steps)]
        for image, file in zip(scene(cfg, cfg.size, i), files):
            Image.fromarray(image).save(file, "jpeg", quality=95)
        jpegs.append([file.getvalue() for file in files])
        columns = numbers(cfg, i)
        features = {
            "steps/observation/image": part(1, b"".join(part(1, b) for b in jpegs[-1])),
            "steps/language_instruction": part(1, part(1, b"a task") * cfg.steps),
            "steps/action": part(2, part(1, columns["actions"].tobytes())),
            "steps/observation/state": part(2, part(1, columns["proprio"].tobytes())),
        }
        record = part(1, b"".join(part(1, part(1, k.encode()) + part(2, v)) for k, v in features.items()))
        length = struct.pack("<Q", len(record))
        out += length + crc(length) + record + crc(record)
    (root / "a-train.tfrecord-00000-of-00001").write_bytes(out)
    return jpegs


Plain = Callable[[int, int, int], np.ndarray]  # episode, first frame, end -> (L, H, W, 3)


def plain_hdf5(path: Path, turned: bool) -> Plain:
    data = h5py.File(path, "r")["data"]
    step = -1 if turned else 1
    return lambda i, lo, hi: data[f"demo_{i}/obs/agentview_rgb"][lo:hi][:, ::step, ::step]


def plain_video(root: Path, cfg: Config) -> Plain:
    container = av.open(str(root / f"videos/{KEY}/chunk-000/file-000.mp4"))
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1

    def read(i: int, lo: int, hi: int) -> np.ndarray:
        start = (i * cfg.steps + lo) / 20
        container.seek(round(start / stream.time_base), stream=stream, backward=True)
        frames = []
        for frame in container.decode(stream):
            if frame.time > start - 0.01:
                frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == hi - lo:
                break
        return np.stack(frames)

    return read


def plain_png(root: Path, cfg: Config) -> Plain:
    file = pq.ParquetFile(root / "data/chunk-000/file-000.parquet", memory_map=True)
    starts = np.cumsum([0] + [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)])

    def read(i: int, lo: int, hi: int) -> np.ndarray:
        lo, hi = i * cfg.steps + lo, i * cfg.steps + hi
        first = np.searchsorted(starts, lo, "right") - 1
        groups = range(first, np.searchsorted(starts, hi, "left"))
        rows = file.read_row_groups(list(groups), columns=[KEY])[KEY].combine_chunks()
        rows = rows.slice(lo - starts[first], hi - lo).field("bytes").to_pylist()
        return np.stack([np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in rows])

    return read


def plain_jpeg(jpegs: list[list[bytes]]) -> Plain:
    return lambda i, lo, hi: np.stack([np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in jpegs[i][lo:hi]])


def timed(call: Callable[[], object]) -> tuple[float, object]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def compare(cfg: Config, path: Path, plain: Plain) -> dict[str, float]:
    """Measure the windows per second of both versions, and their ratio."""
    episodes = load_episodes(path, cache_bytes=0)
    ours = WindowSampler(episodes, num_workers=0)
    # the plain loop's arrays go through the same collation, so that reading and decoding are all that differs
    seconds: tuple[list[float], list[float]] = [], []
    rng = np.random.default_rng(0)

    def loop(starts: np.ndarray) -> Batch:
        images = [plain(int(i), int(t), int(t) + ours.num_frames) for i, t in starts]
        return ours._collate(starts, [(frames, frames[0]) for frames in images])

    for repeat in range(cfg.repeats + 1):
        starts = ours.starts[rng.integers(len(ours), size=cfg.batch_size)]
        versions = [(ours.windows, seconds[0]), (loop, seconds[1])]
        batches = {}
        for version, times in versions if repeat % 2 else versions[::-1]:
            spent, batches[version] = timed(lambda v=version, s=starts: v(s))
            if repeat:
                times.append(spent)
        one, two = batches.values()
        assert (one.frames == two.frames).all(), f"{path}: the plain loop reads other frames"
    mine, theirs = (cfg.batch_size / statistics.median(times) for times in seconds)
    result = {"windows_per_s": mine, "plain_windows_per_s": theirs, "times_faster": mine / theirs}
    if isinstance(episodes[0].images, np.ndarray):  # mapped into memory: nothing to cache or prefetch
        return result
    cached = WindowSampler(load_episodes(path), num_workers=0)
    for e in cached.episodes:
        e.images[:]
    pairs = [[timed(lambda f=f: f(starts))[0] for f in (loop, cached.windows)] for _ in range(cfg.repeats)]
    result["cached_times_faster"] = statistics.median(a / b for a, b in pairs)
    return result | {"ahead_waits": waiting(cfg, episodes)}


def waiting(cfg: Config, episodes: list) -> float:
    """Return waiting time over decoding time of a batch, for a caller that computes as long as the decoding takes."""
    alone, ahead = WindowSampler(episodes, num_workers=0), WindowSampler(episodes, num_workers=2)
    decode = statistics.median(timed(lambda s=s: alone.batch(cfg.batch_size, 0, s))[0] for s in range(cfg.repeats))
    waited = []
    for step in range(cfg.repeats + 1):
        waited.append(timed(lambda s=step: ahead.batch(cfg.batch_size, 0, s))[0])
        time.sleep(decode)
    return statistics.median(waited[1:]) / decode


def main(cfg: Config) -> dict:
    """Time all formats, write and return the results."""
    root = Path(tempfile.mkdtemp())
    try:
        ours, original = make_hdf5(root / "ours", cfg, False), make_hdf5(root / "original", cfg, True)
        for kind in ("video", "png"):
            convert([str(root / "ours"), str(root / kind), "--format", "lerobot", "--images", kind])
        jpegs = make_rlds(root / "rlds", cfg)
        formats = {
            "hdf5": (ours, plain_hdf5(ours, False)),
            "hdf5 original": (original, plain_hdf5(original, True)),
            "lerobot mp4": (root / "video", plain_video(root / "video", cfg)),
            "lerobot png": (root / "png", plain_png(root / "png", cfg)),
            "rlds": (root / "rlds", plain_jpeg(jpegs)),
        }
        results = {"size": cfg.size, "window": "9 frames, 8 actions", "batch_size": cfg.batch_size}
        for name, (path, plain) in formats.items():
            results[name] = compare(cfg, path, plain)
            print(f"{name:14}" + "".join(f"  {k} {v:.2f}" for k, v in results[name].items()))
    finally:
        shutil.rmtree(root)
    write_json(Path(cfg.out), results)
    return results


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
