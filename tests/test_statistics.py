"""Rank correlations, intervals and paired comparisons, against scipy and by hand."""

import math

import numpy as np
import pytest
import torch

from vlarft.statistics import (
    bootstrap_interval,
    pair_order,
    paired_difference,
    rank_agreement,
    spearman,
    wilson_interval,
)


def test_spearman_matches_scipy_with_ties():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (4, 15)), rng.normal(size=(4, 15))
    got = spearman(torch.tensor(a), torch.tensor(b))
    for i in range(4):
        assert got[i].item() == pytest.approx(stats.spearmanr(a[i], b[i]).statistic)
    assert spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 15.0])).item() == pytest.approx(0.5)
    assert spearman(torch.ones(3), torch.arange(3)).isnan()
    assert spearman(torch.tensor([[1.0, math.nan, 3.0], [1.0, 2.0, 3.0]]), torch.arange(3)).isnan().tolist() == [
        True,
        False,
    ]


def test_pair_order_by_hand():
    truth = torch.tensor([0.0, 1.0, 2.0])
    assert pair_order(torch.tensor([5.0, 6.0, 7.0]), truth) == 1
    assert pair_order(torch.tensor([7.0, 6.0, 5.0]), truth) == 0
    assert pair_order(torch.tensor([0.0, 2.0, 1.0]), truth).item() == pytest.approx(2 / 3)
    assert pair_order(torch.tensor([0.0, 0.0, 1.0]), truth).item() == pytest.approx(2.5 / 3)
    assert pair_order(torch.tensor([0.0, 1.0, 9.0]), torch.tensor([0.0, 0.0, 1.0])) == 1  # the tie does not count
    assert pair_order(torch.rand(3), torch.zeros(3)).isnan()


def test_rank_agreement_leaves_out_rows_of_constant_error():
    error = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [3.0, 3.0, 3.0]])
    got = rank_agreement(torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.0, 1.0], [0.0, 1.0, 2.0]]), error)
    assert got.spearman == pytest.approx((1 + 0.5) / 2)
    assert got.pair_order == pytest.approx((1 + 2 / 3) / 2)
    assert got.standard_error == pytest.approx(0.5 / 2**0.5 / 2**0.5)
    twice = torch.tensor([[2.0, 1.0, 0.0]] * 3 + [[2.0, 0.0, 1.0]] * 3)  # 1, 1, 1, .5, .5, .5
    of = torch.tensor([7, 7, 7, 3, 3, 3])  # two independent rows, each seen three times
    alike = rank_agreement(twice, error[:1].expand(6, 3), of)
    assert (
        alike[:2] == pytest.approx(got[:2])
        and alike.standard_error > 1.5 * rank_agreement(twice, error[:1].expand(6, 3))[1]
    )
    assert alike.standard_error == pytest.approx(0.25)
    assert rank_agreement(twice, error[:1].expand(6, 3), of * 0) == rank_agreement(twice, error[:1].expand(6, 3))
    blind = rank_agreement(torch.tensor([[2.0, 1.0, 0.0], [0.3, 0.3, 0.3]]), error[:2])  # a constant score is no order
    assert blind.spearman == pytest.approx(0.5) and blind.pair_order == pytest.approx(0.75)
    assert math.isnan(rank_agreement(torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, math.nan]]), error[:2]).spearman)


def test_wilson_by_hand():
    # 8 of 10, z = 1.96: centre (0.8 + 0.19207) / 1.38415, half width 0.22645.
    got = wilson_interval(8, 10)
    assert got.value == 0.8
    assert (got.low, got.high) == pytest.approx((0.49016, 0.94330), abs=1e-4)
    assert wilson_interval(0, 20).low == 0 and wilson_interval(0, 20).high == pytest.approx(0.16113, abs=1e-4)
    assert wilson_interval(20, 20).high == 1
    for trials in range(1, 500):  # rounding leaves no share outside, which a chart's error bars would not forgive
        none, every = wilson_interval(0, trials), wilson_interval(trials, trials)
        assert none.low == 0 < none.high and every.low < 1 == every.high
    stats = pytest.importorskip("scipy.stats")
    want = stats.binomtest(37, 200).proportion_ci(method="wilson")
    assert wilson_interval(37, 200)[1:] == pytest.approx((want.low, want.high), abs=1e-6)


def test_paired_difference_by_hand():
    first = [True] * 6 + [False] * 4
    second = [True] * 5 + [False] + [True] * 3 + [False]
    got = paired_difference(first, second)
    assert (got.only_first, got.only_second) == (1, 3)
    assert got.difference == pytest.approx(0.2)
    assert got.p_value == pytest.approx(2 * (1 + 4) / 16)  # of 4 discordant pairs, 0 or 1 on one side, two-sided
    # Agresti and Min: (3.5 - 1.5) / 12 +- 1.96 sqrt(5 - 4 / 12) / 12.
    assert (got.low, got.high) == pytest.approx((2 / 12 - 1.959964 * math.sqrt(5 - 4 / 12) / 12, 0.519503), abs=1e-4)
    same = paired_difference(first, first)
    assert same.difference == 0 and same.p_value == 1 and same.low < 0 < same.high
    stats = pytest.importorskip("scipy.stats")
    a, b = [True] * 12 + [False] * 30, [False] * 12 + [True] * 30
    assert paired_difference(a, b).p_value == pytest.approx(stats.binomtest(12, 42).pvalue)


def test_errors():
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_difference([True, False], [True])


def test_bootstrap_interval_of_a_mean_is_near_the_normal_one():
    rows = torch.randn(400, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 7
    got = bootstrap_interval(rows, lambda means: means[..., 0])
    half = 1.96 * rows.std().item() / 20
    assert got.value == pytest.approx(rows.mean().item())
    assert [got.low, got.high] == pytest.approx([got.value - half, got.value + half], abs=0.1 * half)
    assert got == bootstrap_interval(rows, lambda means: means[..., 0])


def test_bootstrap_of_a_ratio_weighs_rows_by_their_counts():
    rows = torch.tensor([[1.0, 1.0], [0.0, 3.0]])  # sums and counts
    got = bootstrap_interval(rows, lambda means: means[..., 0] / means[..., 1])
    assert got == (0.25, 0.0, 1.0)  # both rows; twice the second; twice the first
    assert bootstrap_interval(rows[:, None], lambda means: (means[..., 0] / means[..., 1])[..., 0]) == got


def test_bootstrap_of_few_rows():
    got = bootstrap_interval(torch.tensor([[2.0]]), lambda means: means[..., 0])
    assert got.value == 2 and math.isnan(got.low) and math.isnan(got.high)
    with pytest.raises(ValueError, match="needs rows, got none"):
        bootstrap_interval(torch.zeros(0, 2), lambda means: means[..., 0])
