"""Decode the frames of a video file at given times, with PyAV.

A read seeks to the keyframe before its first frame, or continues where the last read ended. Each thread has its
decoders. A file is scanned once for the times of its frames.
"""

import functools
import math
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlarft.data.frames import Budget
from vlarft.run.lfs import refuse_pointer
from vlarft.run.optional import optional

OPEN_DECODERS = 8  # per thread


def import_av() -> Any:
    """Import PyAV; an ImportError says what installs it."""
    with optional("reading and writing videos needs PyAV", "formats"):
        import av
    return av


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"video {path} is missing; the data set was copied without it")
    refuse_pointer(path)
    try:
        container = import_av().open(str(path))
    except import_av().FFmpegError as error:
        raise ValueError(f"{path} is not a readable video ({error}); it is truncated or has another format") from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"{path} has no video stream")
    return container


class Stream(NamedTuple):
    """Header of a video: frames per second, (height, width) [px], time of its end [s], and frames, 0 if not stated."""

    fps: float
    size: tuple[int, int]
    end: float
    frames: int


def stamp(path: Path) -> int:
    """Return a file's time of modification [ns], 0 if there is none: a cache key that forgets rewritten files."""
    return path.stat().st_mtime_ns if path.is_file() else 0


def probe(path: Path) -> Stream:
    """Read the header of a video file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, or not a video.
    """
    return _probe(path, stamp(path))


@functools.cache
def _probe(path: Path, written: int) -> Stream:
    with _open(path) as container:
        stream = container.streams.video[0]
        ends = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1e6
        return Stream(float(stream.average_rate or 0), (stream.height, stream.width), float(ends), stream.frames)


class Index(NamedTuple):
    """All frames of a video in order of time.

    pts: (N,) int64, presentation times in the stream's time base
    times: (N,) float64 [s]
    keys: (K,) int64, numbers of the keyframes, at which decoding can start
    """

    pts: np.ndarray
    times: np.ndarray
    keys: np.ndarray


def scan(path: Path) -> Index:
    """Read the times and keyframes of a video file from its packets, without decoding.

    Raises:
        FileNotFoundError, ValueError: as `probe`; or a video without frames.
    """
    return _scan(path, stamp(path))


@functools.cache
def _scan(path: Path, written: int) -> Index:
    with _open(path) as container:
        stream = container.streams.video[0]
        packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None]
        base = float(stream.time_base)
    if not packets:
        raise ValueError(f"{path} has no frames")
    packets.sort()
    pts = np.array([p for p, _ in packets], np.int64)
    keys = np.flatnonzero([key for _, key in packets])
    return Index(pts, pts * base, keys)


class _Decoder:
    """An open video file and the place where its last read ended."""

    def __init__(self, path: Path) -> None:
        self.path, self.index = path, scan(path)
        self.container = _open(path)
        self.stream = self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1  # windows are short: starting frame threads would cost more
        self.frames, self.next = None, -1  # iterator over decoded frames, number of the first

    def read(self, lo: int, hi: int, earliest: int) -> tuple[int, np.ndarray]:
        """Decode frames lo .. hi - 1; also return those from `earliest` on that are decoded on the way."""
        keys = self.index.keys
        start = int(keys[max(0, np.searchsorted(keys, lo, "right") - 1)]) if len(keys) else 0
        if self.frames is None or not start <= self.next <= lo:
            self._seek(start)
        images = self._decode(lo, hi, earliest)
        if not images or images[0][0] > lo or images[-1][0] < hi - 1:
            self._seek(0)  # some frames cannot be decoded from that keyframe: start from the first
            images = self._decode(lo, hi, earliest)
        numbers = [n for n, _ in images]
        if numbers != list(range(numbers[0] if numbers else lo, hi)) or (numbers and numbers[0] > lo):
            raise ValueError(f"{self.path}: frames {lo} .. {hi - 1} cannot be decoded; the file is damaged")
        return numbers[0], np.stack([image for _, image in images])

    def _seek(self, number: int) -> None:
        self.container.seek(int(self.index.pts[number]), stream=self.stream, backward=True)
        self.frames, self.next = self.container.decode(self.stream), number

    def _decode(self, lo: int, hi: int, earliest: int) -> list[tuple[int, np.ndarray]]:
        images = []
        try:
            for frame in self.frames:
                number = int(np.searchsorted(self.index.pts, frame.pts))
                self.next = number + 1
                if number >= min(lo, earliest):
                    images.append((number, frame.to_ndarray(format="rgb24")))
                if number >= hi - 1:
                    return images
        except import_av().FFmpegError as error:
            self.frames = None
            raise ValueError(
                f"{self.path}: frames {lo} .. {hi - 1} cannot be decoded ({error}); damaged file"
            ) from error
        self.frames = None  # the end of the file
        return images


class _Decoders(threading.local):
    """The decoders of a thread; the least recently used ones are closed."""

    def __init__(self) -> None:
        self.open: OrderedDict[tuple[Path, int, int], _Decoder] = OrderedDict()

    def get(self, path: Path) -> _Decoder:
        key = path, stamp(path), os.getpid()  # an open file must not cross a fork: both would move its place
        if key not in self.open:
            self.open[key] = _Decoder(path)
            if len(self.open) > OPEN_DECODERS:
                self.open.popitem(last=False)[1].container.close()
        self.open.move_to_end(key)
        return self.open[key]


_decoders = _Decoders()


class VideoFrames:
    """Source of the frames of a part of a video.

    Args:
        path: the file.
        times: (T,) times of the frames [s].
        end: time at which the next part begins [s].
        fps: frames per second; a frame may be 0.4 / fps from its time.
        budget: while it has room, frames decoded on the way from a keyframe are returned as well.
        where: file and field, for errors.
    """

    def __init__(self, path: Path, times: np.ndarray, end: float, fps: float, budget: Budget, where: str) -> None:
        self.path, self.times, self.end, self.fps, self.budget, self.where = path, times, end, fps, budget, where
        self.tolerance = 0.4 / fps

    @functools.cached_property
    def first(self) -> int:
        """Number in the file of the part's first frame.

        Raises:
            ValueError: the file's frames are not at `times`.
        """
        stored = scan(self.path).times
        stored = stored[: np.searchsorted(stored, self.end - self.tolerance)]  # the rest shows the next episode
        count = int((stored > self.times[0] - self.tolerance).sum())
        if count < len(self.times):
            raise ValueError(
                f"{self.where}: {len(self.times)} rows, but {count} frames in the video: it is truncated, or the "
                "camera stopped early; copy the file again, or remove the episode"
            )
        first = int(np.abs(stored - self.times[0]).argmin())
        part = stored[first : first + len(self.times)]
        off = np.abs(part - self.times)
        if off.max() > self.tolerance:
            t = int((off > self.tolerance).argmax())
            raise ValueError(
                f"{self.where}: frame {t} should be at {self.times[t]:.4f} s, the video has one at {part[t]:.4f} s; "
                "video and data differ in fps or start"
            )
        return first

    def check(self, shape: tuple[int, ...], thorough: bool) -> None:
        stream, size = probe(self.path), shape[1:3]
        if not math.isclose(stream.fps, self.fps, rel_tol=0.01):
            raise ValueError(
                f"{self.where} has {stream.fps:g} fps, meta/info.json says {self.fps:g}; re-encode one of them"
            )
        if stream.size != size:
            raise ValueError(
                f"{self.where} is {stream.size[0]} x {stream.size[1]}, meta/info.json says {size[0]} x {size[1]}"
            )
        last = round(self.times[-1] * self.fps)
        gapless = stream.frames == round(stream.end * self.fps)
        if thorough or not gapless or last >= stream.frames or self.times[-1] > self.end - self.tolerance:
            self.first  # noqa: B018 (raises if frames are missing)

    def read(self, lo: int, hi: int) -> tuple[int, np.ndarray]:
        start = self.first
        room = self.budget.used < self.budget.limit
        first, images = _decoders.get(self.path).read(start + lo, start + hi, start if room else start + lo)
        return first - start, images
