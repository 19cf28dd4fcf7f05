"""The gate of closed-loop learning in imagination: are imagined outcomes the true ones? Not in the paper.

Recorded episodes that neither world model nor success model was trained on, nor the threshold chosen on, are replayed
in imagination, from their first frame with all their actions, and judged. The imagined outcome should be the recorded
one; above all, a failure should not be imagined as a success, which a policy would learn to produce.

Attempts of the policy count alone, where both of their outcomes are held out: a judge that knows a demonstration from a
demonstration says nothing about them.

A replay does not show how an imagination answers other actions than the recorded ones. An evaluation of several
policies does: are their success rates in imagination in the order of those that were played?
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlarft.closed_loop import World
from vlarft.data.episode import Episode
from vlarft.imagined_episodes import imagined_episodes
from vlarft.policy import VLAPolicy
from vlarft.run.checkpoint import file_digest, model_digest
from vlarft.run.random import generator
from vlarft.run.results import reading_results
from vlarft.statistics import spearman, wilson_interval
from vlarft.success import Agreement, SuccessModel, compare_outcomes, own_attempts
from vlarft.world_model import WorldModel

FEWEST_POLICIES = 3  # that have an order worth a correlation; six tell more
# options of eval_libero.py that imagination does not follow, and what it does
IMAGINED = {"perturb": None, "plan": 1, "execute": 8, "num_flow_steps": 10}


@torch.no_grad()
def outcome_gate(
    model: WorldModel,
    judge: SuccessModel,
    episodes: Sequence[Episode],
    autocast: AbstractContextManager,
    **options: Any,
) -> Agreement:
    """Replay held-out episodes in imagination, judge them, compare with the recorded outcomes, and print the result:
    shares with 95 % intervals and, as the calibration, the Brier score of the highest probability that each held.

    Args:
        model, judge: on one device.
        episodes: held out, of both outcomes.
        autocast: context for the forwards.
        options: further arguments of `imagined_episodes`.

    Raises:
        ValueError: episodes of one outcome only.
    """
    own = [e for e in own_attempts(episodes) if len(e) > 1]
    alone = all(e.kind == "policy" for e in own)
    what = "attempts of the policy" if alone else "episodes, too few of them attempts of the policy,"
    starts = len({e.start or e.name for e in own})
    what += "" if starts == len(own) else f" from {starts} starts, so the intervals are too narrow,"
    compare_outcomes([e.success for e in own], [e.success for e in own])  # raises before the work
    highest, true = [], []
    for found in imagined_episodes(model, own, autocast=autocast, **options):
        with autocast:
            highest.append(float(judge.highest(found.imagined, found.episode.instruction)))
        true.append(found.episode.success)
    found = compare_outcomes([value >= judge.cfg.threshold for value in highest], true)

    def counted(number: int, of: int) -> str:
        _, low, high = wilson_interval(number, of)
        return f"{number} of {of} [{100 * low:.0f} %, {100 * high:.0f} %]"

    print(
        f"outcome gate: {100 * found.agreement:.0f} % of {len(own)} held-out {what} have their true outcome in "
        f"imagination; false successes {counted(found.false_successes, found.true_failures)}, false failures "
        f"{counted(found.false_failures, found.true_successes)}; Brier score "
        f"{sum((h - t) ** 2 for h, t in zip(highest, true)) / len(true):.2f}",
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


class Evaluation(NamedTuple):
    """Success rates of policies, by their paths; whether their x_0 was 0; suites and tasks that they played (None =
    all), and after how many actions an episode ended (None = the suite's limit).
    """

    rates: dict[str, float]
    from_zero: bool
    suites: tuple[str, ...]
    tasks: tuple[str, ...] | None
    horizon: int | None


def read_evaluation(path: str | Path) -> Evaluation:
    """Read a results.json of eval_libero.py, or that of a folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is another file; starts were perturbed or chunks planned, which imagination does not repeat; it
            has too few policies; or a policy's file has changed since.
    """
    with reading_results(path) as (file, found):
        settings, rows = found["config"], found["policies"]
        rows = [row for row in rows if row["policy"] != "random" and not row["policy"].endswith(".jsonl")]
        rates = {row["policy"]: float(row["all"]["rate"]) for row in rows}
        digests = {row["policy"]: row["digest"] for row in rows}
        changed = {n: settings[n] for n, usual in IMAGINED.items() if settings.get(n, usual) != usual}
        if settings["noise"] not in ("zero", "sampled"):
            changed["noise"] = settings["noise"]
        from_zero = settings["noise"] == "zero"
    if changed:
        raise ValueError(
            f"{file} was played with {changed}: evaluate with --noise zero or sampled and the other options as they "
            "are by default: imagination plays so"
        )
    if len(rates) < FEWEST_POLICIES:
        raise ValueError(
            f"{file} has {len(rates)} policies, an order needs {FEWEST_POLICIES} at least and better six: evaluate "
            "several of different success, such as the copies of train_sft.py --keep-interval"
        )
    for policy, digest in digests.items():
        if digest not in (model_digest(policy), file_digest(policy)):  # older evaluations took the files' digests
            raise ValueError(f"{policy} has changed since {file} was written: evaluate it again")
    tasks = None if settings["tasks"] is None else tuple(settings["tasks"])
    return Evaluation(rates, from_zero, tuple(settings["suites"]), tasks, settings.get("horizon"))


@torch.no_grad()
def imagined_rate(policy: VLAPolicy, world: World, *numbers: int, from_zero: bool) -> float:
    """Play an episode from each start of a world with the policy's deterministic flow; return the share of successes.

    Args:
        policy: in eval mode.
        world: what it acts in.
        numbers: what starts and x_0 depend on.
        from_zero: begin every chunk at x_0 = 0.
    """
    observations, flow = world.begin(1, *numbers), policy.cfg.flow
    random = generator(policy.device, "imagined policies", *numbers)
    active, success = list(range(len(observations))), 0
    count = len(active)
    while active:
        noise = torch.randn(count, flow.chunk, flow.action_dim, generator=random, device=policy.device)[active]
        answer = world.step(active, policy.act(observations, noise=noise * (not from_zero)))
        success += int(answer.success.sum())
        going = [row for row, done in enumerate(answer.done.tolist()) if not done]
        active, observations = [active[row] for row in going], [answer.observations[row] for row in going]
    return success / count


def rank_policies(evaluation: Evaluation, load: Callable[[str], VLAPolicy], world: World, seed: int) -> float:
    """Play the policies of an evaluation in a world, all from the same starts, and print their rates beside the true.

    Args:
        evaluation: of `read_evaluation`.
        load: path -> policy, checked to belong to this world.
        world: see `imagined_rate`.
        seed: of starts and x_0.

    Returns:
        Spearman's rank correlation of imagined and true rates; 0 if either are all equal.
    """
    imagined = []
    for path, rate in evaluation.rates.items():
        imagined.append(imagined_rate(load(path), world, seed, from_zero=evaluation.from_zero))
        print(
            f"  success {100 * imagined[-1]:.0f} % in imagination, {100 * rate:.0f} % played: {path}", file=sys.stderr
        )
    rank = spearman(torch.tensor(imagined), torch.tensor(list(evaluation.rates.values()))).nan_to_num(0.0).item()
    print(f"outcome gate: {len(imagined)} policies, rank correlation of their success {rank:.2f}", file=sys.stderr)
    return rank
