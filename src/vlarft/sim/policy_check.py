"""What must fit between a policy's checkpoint and the simulator that it plays in: asked before the first episode.

Not in the paper. A policy that sees other cameras, another rendering or another image size than in its training, or is
told what it has never been told, plays without an error, and fails.
"""

import warnings
from collections.abc import Sequence

from vlarft.policy import PolicyConfig
from vlarft.run.checkpoint import Header
from vlarft.sim.libero_tasks import LIBERO_SUITES
from vlarft.sim.suites import check_rendering, simulator_of, visuals_of


def check_policy(
    path: str, header: Header, suite: str, tasks: Sequence[int], image_size: int | None, fast_rendering: bool
) -> None:
    """Check that a policy was trained for tasks of a suite, as they are rendered.

    What its file does not state, as older files and public weights do not, is not compared.

    Args:
        path: of the policy, for the messages.
        header: of its file.
        suite: that is played.
        tasks: their numbers.
        image_size: side of the rendered images [px]; None = the policy's own.
        fast_rendering: see `suites.make_env`.

    Raises:
        ValueError: a camera that is not rendered in this way, or no demonstrations of this suite.
        ImportError, FileNotFoundError: see `suites.visuals_of`.

    Warns of single tasks without demonstrations, and of another rendering, other meshes or another image size than in
    its training.
    """
    trained, cameras = header.extra, header.config.get("cameras", PolicyConfig.cameras)
    check_rendering(suite, cameras, path, fast_rendering=fast_rendering)
    known = {text.strip().lower() for text in trained.get("instructions") or ()}
    texts = [task.instruction for task in simulator_of(suite).suites[suite].tasks]
    if known and known.isdisjoint(text.lower() for text in texts):
        raise ValueError(
            f"{path} was trained on no demonstrations of {suite}, for example not on {texts[0]!r}: choose --suites "
            "that it knows"
        )
    if known and (unknown := [texts[task] for task in tasks if texts[task].lower() not in known]):
        warnings.warn(
            f"{path} was not trained on {len(unknown)} of the tasks of {suite}, for example {unknown[0]!r}",
            stacklevel=2,
        )
    visuals, fast, side = (trained.get(name) for name in ("visuals", "fast_rendering", "image_size"))
    if visuals is not None and (here := visuals_of(suite)) not in (None, visuals):
        warnings.warn(f"{path} was trained on images of {visuals}, and plays with {here}", stacklevel=2)
    if fast not in (None, fast_rendering) and suite in LIBERO_SUITES:
        words = ("full", "fast")
        warnings.warn(
            f"{path} was trained on images of {words[fast]} rendering and plays with {words[fast_rendering]}: give "
            f"--{'' if fast else 'no-'}fast-rendering",
            stacklevel=2,
        )
    image_size = image_size or header.config["vlm"]["vision"]["image_size"]
    if side is not None and list(side) != [image_size] * 2:
        warnings.warn(
            f"{path} was trained on images of {side[0]}x{side[1]} and plays with {image_size}x{image_size}, which it "
            f"resizes otherwise{f': give --image-size {side[0]}' if side[0] == side[1] else ''}",
            stacklevel=2,
        )
