"""Images of an episode that stay on disk, compressed, until they are accessed.

`Frames` is indexed like a uint8 array (T, H, W, 3). Decoded frames are kept while the `Budget` of their data set has
room: a small data set is decoded once, a large one window by window.

A source has a method `read(lo, hi) -> (first, images)`. It returns frames lo .. hi - 1 together with frames that had
to be decoded before or after them; images[0] is frame `first` <= lo. A second one, `check`, finds missing frames.
"""

import io
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from vlarft.run.optional import optional


class Source(Protocol):
    """Decoder of frames from a file."""

    def read(self, lo: int, hi: int) -> tuple[int, np.ndarray]:
        """Return (first, uint8 (N, H, W, 3)), which contains frames lo .. hi - 1."""
        ...

    def check(self, shape: tuple[int, ...], thorough: bool) -> None:
        """See `Frames.check`; shape is (T, H, W, 3)."""
        ...


class Budget:
    """Bytes of decoded frames that a data set may keep in memory."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self.lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Reserve `size` bytes if they are left; return whether they were."""
        with self.lock:
            if self.used + size > self.limit:
                return False
            self.used += size
            return True


class Frames:
    """Frames of an episode, decoded on access; any index that numpy accepts returns an array.

    Args:
        source: see above.
        shape: (T, H, W, 3).
        budget: limit on the decoded frames that are kept.
        where: file and field, for errors.
    """

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, source: Source, shape: Sequence[int], budget: Budget, where: str) -> None:
        self.source, self.budget, self.where = source, budget, where
        self.shape = tuple(int(n) for n in shape)
        # one array: a copy per frame, between decoders' buffers, leaves the heap in pieces that are never given back
        self._frames: np.ndarray | None = None
        self._kept: set[int] = set()  # the rows of it that are decoded

    def __len__(self) -> int:
        return self.shape[0]

    def check(self, thorough: bool = False) -> None:
        """Check that the file has all frames, without decoding them.

        Args:
            thorough: go through every packet of a video, every image's header and every chunk, which reads the whole
                file; otherwise only through what is known from the file's header.

        Raises:
            FileNotFoundError, ValueError: no such file; frames that are missing or not as `shape` says, damaged.
        """
        self.source.check(self.shape, thorough)

    def __getitem__(self, key: Any) -> np.ndarray:
        if isinstance(key, slice):
            lo, hi, step = key.indices(len(self))
            if step == 1:
                return self._range(lo, max(lo, hi))
        elif isinstance(key, int | np.integer):
            t = int(key) + len(self) * (key < 0)
            if not 0 <= t < len(self):
                raise IndexError(f"frame {key} of {len(self)}")
            return self._range(t, t + 1)[0]
        return np.asarray(self)[key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._range(0, len(self)).astype(dtype or self.dtype, copy=False)

    def _range(self, lo: int, hi: int) -> np.ndarray:
        if hi == lo:
            return np.zeros((0, *self.shape[1:]), self.dtype)
        if self._kept.issuperset(range(lo, hi)):
            return self._frames[lo:hi].copy()
        first, images = self.source.read(lo, hi)
        if images.shape[1:] != self.shape[1:] or len(images) < hi - first:
            raise ValueError(
                f"{self.where}: {len(images)} frames of {images.shape[1]} x {images.shape[2]} from frame {first} on, "
                f"expected up to frame {hi - 1} of {self.shape[1]} x {self.shape[2]}; the file is damaged, or its "
                "metadata belongs to another file"
            )
        for t, image in enumerate(images[: len(self) - first], first):  # the last chunk may be longer
            if t not in self._kept and self.budget.take(image.nbytes):
                with self.budget.lock:
                    if self._frames is None:
                        self._frames = np.empty(self.shape, self.dtype)  # takes no memory where it is not written
                self._frames[t] = image
                self._kept.add(t)
        return images[lo - first : hi - first]


def import_pillow() -> Any:
    """Import PIL.Image; an ImportError says what installs it."""
    with optional("reading PNG and JPEG images needs pillow", "formats"):
        from PIL import Image
    return Image


def map_file(path: Path) -> np.ndarray:
    """Map a file into memory as (N,) uint8: bytes are read on access and shared between processes."""
    if not (size := path.stat().st_size):
        return np.zeros(0, np.uint8)
    try:  # not np.memmap, which keeps the file open: a process may open 1024, and data sets have more
        content = torch.from_file(str(path), size=size, dtype=torch.uint8).numpy()
    except RuntimeError:  # torch's mapping could be written to, so that it must fit into memory
        content = np.asarray(np.memmap(path, np.uint8, "r"))  # a plain array: slices of np.memmap are slower
    content.flags.writeable = False
    return content


def decode_image(blob: Any, where: str) -> np.ndarray:
    """Decode the content of an image file (PNG, JPEG, ...) to uint8 (H, W, 3).

    Raises:
        ValueError: not an image, damaged, or of more pixels than Pillow opens (179 million).
    """
    pillow = import_pillow()
    try:
        with pillow.open(io.BytesIO(blob)) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, pillow.DecompressionBombError) as error:
        raise ValueError(f"{where} is not a readable image ({error}); the file is damaged") from error


def image_size(blob: Any, where: str) -> tuple[int, int]:
    """Read (height, width) from the header of an image file, without decoding its pixels.

    Raises:
        ValueError: empty, not an image, or (PNG) damaged.
    """
    pillow = import_pillow()
    try:
        with pillow.open(io.BytesIO(blob)) as picture:
            width, height = picture.size
            picture.verify()
            return height, width
    except (OSError, SyntaxError, pillow.DecompressionBombError) as error:
        raise ValueError(
            f"{where} is not a readable image ({len(blob)} bytes, {error}); the file is damaged"
        ) from error


class EncodedImages:
    """Source with one image file (PNG, JPEG) per frame.

    Args:
        blobs: (lo, hi) -> the files' contents for frames lo .. hi - 1.
        where: file and field, for errors.
    """

    def __init__(self, blobs: Callable[[int, int], Sequence[Any]], where: str) -> None:
        self.blobs, self.where = blobs, where

    def read(self, lo: int, hi: int) -> tuple[int, np.ndarray]:
        pictures = [decode_image(b, f"{self.where}, frame {t}") for t, b in enumerate(self.blobs(lo, hi), lo)]
        if len({p.shape for p in pictures}) > 1:
            raise ValueError(f"{self.where}: frames {lo} .. {hi - 1} differ in size: {[p.shape for p in pictures]}")
        return lo, np.stack(pictures)

    def check(self, shape: tuple[int, ...], thorough: bool) -> None:
        for lo in range(0, shape[0], 64) if thorough else ():
            for t, blob in enumerate(self.blobs(lo, min(lo + 64, shape[0])), lo):
                size = image_size(blob, f"{self.where}, frame {t}")
                if size != shape[1:3]:
                    raise ValueError(
                        f"{self.where}, frame {t} is {size[0]} x {size[1]}, expected {shape[1]} x {shape[2]}"
                    )
