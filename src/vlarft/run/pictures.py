"""Grids of frames, histograms and animations as files. Needs pillow.

Images: float (C, H, W) in [0, 1] with 3 channels; L columns or time steps, R rows.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from vlarft.run.checkpoint import write_atomic
from vlarft.run.optional import optional
from vlarft.run.pixels import to_bytes


def import_pillow() -> tuple[ModuleType, ModuleType]:
    """Import PIL.Image and PIL.ImageDraw; an ImportError says what installs them.

    Scripts call it before their work, whose pictures come late.
    """
    with optional("pictures need pillow", "plots"):
        from PIL import Image, ImageDraw
    return Image, ImageDraw


def _to_uint8(image: Tensor, scale: int) -> np.ndarray:
    """Convert (3, H, W) float to (H * scale, W * scale, 3) uint8, every pixel repeated."""
    pixels = to_bytes(image.detach()).cpu().numpy()
    return pixels.repeat(scale, 0).repeat(scale, 1)


def grid(rows: Sequence[Sequence[Tensor]], labels: Sequence[str] | None = None, min_side: int = 96) -> np.ndarray:
    """Arrange rows of images of one size as one picture.

    Args:
        rows: R sequences of images (3, H, W); shorter rows are white on the right.
        labels: R row titles, on the left.
        min_side: small images are enlarged by an integer factor to at least this many pixels.

    Returns:
        uint8 (height, width, 3).
    """
    image_module, draw_module = import_pillow()
    scale = max(1, -(-min_side // max(rows[0][0].shape[-2:])))
    height, width = (side * scale for side in rows[0][0].shape[-2:])
    gap, margin = 2, 0 if labels is None else 12 + 7 * max(len(label) for label in labels)
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (height + gap) - gap, margin + columns * (width + gap) - gap, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = r * (height + gap), margin + c * (width + gap)
            canvas[top : top + height, left : left + width] = _to_uint8(image, scale)
    if labels is None:
        return canvas
    picture = image_module.fromarray(canvas)
    draw = draw_module.Draw(picture)
    for r, label in enumerate(labels):
        draw.text((6, r * (height + gap) + height // 2 - 6), label, fill=(0, 0, 0))
    return np.asarray(picture)


def histograms(
    panels: Mapping[str, Mapping[str, Tensor]], bins: int = 40, size: tuple[int, int] = (360, 240)
) -> np.ndarray:
    """Plot histograms as one picture: panels side by side, the series of a panel overlaid.

    Args:
        panels: title -> {label: values (N,)}, up to four series; each is normalised by its own N, over the range of all
            series of the panel.
        bins: number of bins of each histogram.
        size: width and height of a panel [px].

    Returns:
        uint8 (height, width, 3).
    """
    image_module, draw_module = import_pillow()
    colours = ((120, 140, 160), (200, 110, 70), (80, 140, 90), (130, 100, 170))
    width, height = size
    left, right, top, bottom = 12, width - 12, 40, height - 24
    canvas = image_module.new("RGB", (width * len(panels), height), (255, 255, 255))
    draw = draw_module.Draw(canvas)
    for number, (title, series) in enumerate(panels.items()):
        x0 = number * width
        values = {label: v.detach().double().cpu() for label, v in series.items()}
        low = min(float(v.min()) for v in values.values())
        high = max(float(v.max()) for v in values.values())
        high = max(high, low + 1e-6)
        shares = {label: torch.histc(v, bins, low, high) / len(v) for label, v in values.items()}
        peak = max(float(s.max()) for s in shares.values())
        draw.text((x0 + left, 4), title, fill=(0, 0, 0))
        for i, (label, share) in enumerate(shares.items()):
            steps = [(x0 + left, bottom)]
            for b, value in enumerate(share.tolist()):
                y = bottom - (bottom - top) * value / peak
                steps += [(x0 + left + (right - left) * (b + d) / bins, y) for d in (0, 1)]
            draw.line([*steps, (x0 + right, bottom)], fill=colours[i], width=2)
            draw.text((x0 + left + 90 * i, 20), label, fill=colours[i])
        draw.line([(x0 + left, bottom), (x0 + right, bottom)], fill=(0, 0, 0))
        draw.text((x0 + left, bottom + 6), f"{low:.3g}", fill=(0, 0, 0))
        draw.text((x0 + right - 36, bottom + 6), f"{high:.3g}", fill=(0, 0, 0))
    return np.asarray(canvas)


def save_png(path: str | Path, picture: np.ndarray) -> None:
    """Write a picture of `grid` (height, width, 3) as PNG."""
    image_module, _ = import_pillow()
    image, options = image_module.fromarray(picture), {"compress_level": 3}  # 10 % larger, written ten times as fast
    write_atomic(path, lambda tmp: image.save(tmp, format="PNG", **options))


def save_gif(
    path: str | Path,
    pictures: Sequence[np.ndarray],
    frames_per_second: float = 5.0,
    hold_last: float = 0.0,
    colors: int | None = None,
) -> None:
    """Write pictures of one size as a looping GIF.

    Args:
        path: the file.
        pictures: (height, width, 3) uint8 each.
        frames_per_second: speed.
        hold_last: seconds that the last picture is shown longer.
        colors: size of one palette for all pictures, of which pixels that stand still then take no space; None: each
            picture has its own, of 256 colours.
    """
    image_module, _ = import_pillow()
    images = [image_module.fromarray(picture) for picture in pictures]
    if colors is not None:
        some = [pictures[i] for i in np.linspace(0, len(pictures) - 1, 5).astype(int)]
        palette = image_module.fromarray(np.concatenate(some)).quantize(colors)
        images = [image.quantize(palette=palette, dither=image_module.Dither.NONE) for image in images]
    first, *rest = images
    duration = [round(1000 / frames_per_second)] * len(pictures)
    duration[-1] += round(1000 * hold_last)
    options = {"save_all": True, "append_images": rest, "duration": duration, "loop": 0}
    write_atomic(path, lambda tmp: first.save(tmp, format="GIF", **options))


def save_mp4(path: str | Path, pictures: Sequence[np.ndarray], frames_per_second: int = 10) -> None:
    """Write pictures of one size, (H, W, 3) uint8, as H.264 video; an odd last row or column is cropped.

    Raises:
        ImportError: PyAV is missing.
    """
    with optional("mp4 films need PyAV, gif ones do not", "video"):
        import av
    height, width = (side - side % 2 for side in pictures[0].shape[:2])

    def write(tmp: Path) -> None:
        with av.open(str(tmp), "w", format="mp4") as file:
            stream = file.add_stream("libx264", rate=frames_per_second)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for picture in pictures:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
                file.mux(stream.encode(frame))
            file.mux(stream.encode())

    write_atomic(path, write)
