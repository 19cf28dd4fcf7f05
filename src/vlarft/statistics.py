"""Statistics of rankings and success rates: rank correlation, intervals, paired comparisons."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlarft.run.random import generator


def ranks(values: Tensor) -> Tensor:
    """Return ranks from 0 along the last axis; ties share their mean rank. (..., n) -> (..., n) float64.

    A row with a value that is not a number has no ranks: all are nan.
    """
    values = values.double()
    below = (values[..., None, :] < values[..., :, None]).sum(-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(-1)  # itself included
    return torch.where(values.isnan().any(-1, keepdim=True), torch.nan, below + (equal - 1) / 2)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Return Spearman's rank correlation along the last axis, (..., n) -> (...) float64; nan for an input that is
    constant or has a value that is not a number.
    """
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()


def pair_order(a: Tensor, b: Tensor) -> Tensor:
    """Return the share of pairs along the last axis that a and b put in the same order; 0.5 is chance.

    Pairs that tie in `b` do not count; pairs that tie in `a` alone count half.

    Args:
        a, b: (..., n).

    Returns:
        (...) float64; nan where every pair ties in `b`.
    """
    i, j = torch.triu_indices(a.shape[-1], a.shape[-1], offset=1, device=a.device)
    sign_a = (a[..., i] - a[..., j]).double().sign()
    sign_b = (b[..., i] - b[..., j]).double().sign()
    counts = sign_b != 0
    return ((sign_a * sign_b + 1) / 2 * counts).sum(-1) / counts.sum(-1)  # same order 1, tie in a 0.5, opposite 0


class RankAgreement(NamedTuple):
    """Mean over rows of Spearman's rank correlation, its standard error, and the share of pairs in the right order."""

    spearman: float
    standard_error: float
    pair_order: float


def rank_agreement(score: Tensor, error: Tensor, unit: Tensor | None = None) -> RankAgreement:
    """Measure how well a score (S, n), higher = better, ranks the columns of each row by their error (S, n).

    A constant score ranks nothing: its row counts as a correlation of 0. Rows of constant error do not count; nan if
    no row counts, or where a score is not a number.

    Args:
        score, error: see above.
        unit: (S,), numbers of what was sampled independently, such as the episode of each row; None = the rows. The
            standard error is over these; of a single one over its rows, which is then too small.
    """
    decided = error.amax(-1) > error.amin(-1)  # (S,)
    score, error = score[decided], error[decided]
    constant = score.amax(-1) == score.amin(-1)
    rank, pairs = spearman(score, -error).masked_fill(constant, 0.0), pair_order(score, -error)
    rows = torch.arange(len(rank))
    of = rows if unit is None else unit.cpu()[decided.cpu()].unique(return_inverse=True)[1]
    of = of if of.any() else rows
    count = len(of.unique())
    sums = torch.zeros(count, dtype=rank.dtype).index_add(0, of, (rank - rank.mean()).cpu())  # of each unit
    standard_error = float((sums.square().sum() * count / (count - 1)).sqrt() / len(rank)) if count > 1 else math.nan
    return RankAgreement(float(rank.mean()), standard_error, float(pairs.mean()))


class Interval(NamedTuple):
    """A value with its lower and upper bound."""

    value: float
    low: float
    high: float


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> Interval:
    """Return the share of successes with its Wilson score interval; z = 1.96 for 95 %.

    Raises:
        ValueError: no trials, or successes outside 0..trials.
    """
    if trials <= 0 or not 0 <= successes <= trials:
        raise ValueError(f"expected 0 <= successes <= trials and trials > 0, got {successes} of {trials}")
    share = successes / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Interval(share, min(low, share), max(high, share))  # of all or none, rounding may leave the share outside


def bootstrap_interval(
    rows: Tensor, statistic: Callable[[Tensor], Tensor], resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return a statistic of the rows' mean with its 95 % percentile bootstrap interval.

    Args:
        rows: (N, *D), independent samples, such as one row of sums per episode.
        statistic: function of means (..., *D) -> (...), such as a ratio of two columns.
        resamples: sets of N rows, drawn with replacement.
        seed: seed of the resampling.

    Returns:
        The value for all rows, and bounds; these are nan for a single row.

    Raises:
        ValueError: no rows.
    """
    if not len(rows):
        raise ValueError("a bootstrap needs rows, got none")
    rows = rows.double().cpu()
    value = float(statistic(rows.mean(dim=0)))
    if len(rows) == 1:
        return Interval(value, math.nan, math.nan)
    picks = torch.randint(len(rows), (resamples, len(rows)), generator=generator("cpu", "bootstrap", seed))
    values = statistic(rows[picks].mean(dim=1))  # (resamples,)
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value, low, high)


class PairedDifference(NamedTuple):
    """Difference of two success rates on the same starts: 95 % interval and two-sided exact McNemar p-value."""

    difference: float
    low: float
    high: float
    p_value: float
    only_first: int
    only_second: int


def paired_difference(first: Sequence[bool], second: Sequence[bool], z: float = 1.959964) -> PairedDifference:
    """Compare two success rates, `second` minus `first`, episode by episode on the same starts.

    The interval is Agresti and Min's: Wald on the discordant pairs after adding half a pair to each of the four cells
    of the table. The p-value is McNemar's exact binomial test.

    Args:
        first, second: outcomes, in the same order of starts.
        z: 1.96 for 95 %.

    Raises:
        ValueError: different lengths, or none.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"paired outcomes must be of one length > 0, got {len(first)} and {len(second)}")
    pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    n, b, c = len(pairs) + 2, only_first + 0.5, only_second + 0.5
    centre = (c - b) / n
    half = z * math.sqrt(b + c - (c - b) ** 2 / n) / n
    discordant = only_first + only_second
    # P(X <= the smaller count) for X ~ Binomial(discordant, 1/2)
    tail = sum(math.comb(discordant, k) for k in range(min(only_first, only_second) + 1)) / 2**discordant
    difference = (only_second - only_first) / len(pairs)
    return PairedDifference(
        difference, max(-1.0, centre - half), min(1.0, centre + half), min(1.0, 2 * tail), only_first, only_second
    )
