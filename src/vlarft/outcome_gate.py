"""The gate of closed-loop learning in imagination: are imagined outcomes the true ones? Not in the paper.

Recorded episodes that neither world model nor success model was trained on, nor the threshold chosen on, are replayed
in imagination, from their first frame with all their actions, and judged. The imagined outcome should be the recorded
one; above all, a failure should not be imagined as a success, which a policy would learn to produce.

Attempts of the policy count alone, where both of their outcomes are held out: a judge that knows a demonstration from a
demonstration says nothing about them.
"""

import sys
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
    """Replay held-out episodes in imagination, judge them, compare with the recorded outcomes, and print the result.

    Args:
        model, judge: on one device.
        episodes: held out, of both outcomes.
        autocast: context for the forwards.
        options: further arguments of `imagined_episodes`.

    Raises:
        ValueError: episodes of one outcome only.
    """
    own = [e for e in episodes if e.kind == "policy"]
    what = "attempts of the policy"
    if len({e.success for e in own}) < 2:
        own, what = list(episodes), "episodes, too few of them attempts of the policy"
    own = [e for e in own if len(e) > 1]
    compare_outcomes([e.success for e in own], [e.success for e in own])  # raises before the work
    judged, true = [], []
    for found in imagined_episodes(model, own, autocast=autocast, **options):
        with autocast:
            judged.append(judge.highest(found.imagined, found.episode.instruction) >= judge.cfg.threshold)
        true.append(found.episode.success)
    found = compare_outcomes(judged, true)
    print(
        f"outcome gate: {100 * found.agreement:.0f} % of {len(own)} held-out {what}, have their true outcome in "
        f"imagination; false successes {found.false_successes} of {found.true_failures}, false failures "
        f"{found.false_failures} of {found.true_successes}",
        file=sys.stderr,
    )
    return found


def check_outcome_gate(found: Agreement, threshold: float | None) -> None:
    """Stop a run whose imagined outcomes cannot be trusted.

    Args:
        found: what `outcome_gate` returned.
        threshold: smallest mean of the two shares that are judged right, of successes and of failures; None = accept
            any.

    Raises:
        RuntimeError: it is below the threshold.
    """
    if threshold is None or found.balanced >= threshold:
        return
    raise RuntimeError(
        f"outcome gate: replayed in imagination, {found.false_successes} of {found.true_failures} failures look like a "
        f"success and {found.false_failures} of {found.true_successes} successes like a failure; the mean share that "
        f"is right is {found.balanced:.2f}, less than --gate-threshold {threshold:g}. Record more attempts of this "
        "policy (collect_demos.py --policy), refresh the world model on them (train_wm.py --init) and train the "
        "success model again (train_success.py), or go on with --gate-threshold none"
    )
