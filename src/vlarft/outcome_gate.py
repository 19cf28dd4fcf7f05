"""The gate of closed-loop learning in imagination: are imagined outcomes the true ones? Not in the paper.

Recorded episodes that neither world model nor success model was trained on are replayed in imagination, from their
first frame with all their actions, and judged. The imagined outcome should be the recorded one; above all, a failure
should not be imagined as a success, which a policy would learn to produce.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from vlarft.data.episode import Episode
from vlarft.imagined_episodes import imagined_episodes
from vlarft.success import Agreement, SuccessModel, compare_outcomes
from vlarft.world_model import WorldModel


@torch.no_grad()
def outcome_gate(
    model: WorldModel,
    judge: SuccessModel,
    episodes: Sequence[Episode],
    autocast: AbstractContextManager,
    **options: Any,
) -> Agreement:
    """Replay held-out episodes in imagination, judge them, and compare with the recorded outcomes.

    Args:
        model, judge: on one device.
        episodes: held out, of both outcomes.
        autocast: context for the forwards.
        options: further arguments of `imagined_episodes`.

    Raises:
        ValueError: episodes of one outcome only.
    """
    judged, true = [], []
    for found in imagined_episodes(model, episodes, autocast=autocast, **options):
        with autocast:
            values = judge.judge(found.imagined[None], found.true[:1], [found.episode.instruction]).success
        judged.append(bool(judge.solved(values).any()))
        true.append(found.episode.success)
    return compare_outcomes(judged, true)


def check_outcome_gate(found: Agreement, threshold: float | None) -> None:
    """Stop a run whose imagined outcomes cannot be trusted.

    Args:
        found: what `outcome_gate` returned.
        threshold: smallest agreement to accept; None = accept any.

    Raises:
        RuntimeError: the agreement is below the threshold.
    """
    if threshold is None or found.agreement >= threshold:
        return
    raise RuntimeError(
        f"outcome gate: of {found.true_successes + found.true_failures} held-out episodes, replayed in imagination and "
        f"judged by the success model, {100 * found.agreement:.0f} % have their true outcome, less than "
        f"--gate-threshold {threshold:g}: {found.false_successes} of {found.true_failures} failures look like a "
        f"success, {found.false_failures} of {found.true_successes} successes like a failure. Record more attempts of "
        "this policy (collect_demos.py --policy), refresh the world model on them (train_wm.py --init) and train the "
        "success model again (train_success.py), or go on with --gate-threshold none"
    )
