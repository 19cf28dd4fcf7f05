"""The clock of a run, its learning rate, its seeds."""

import pytest
import torch

from vlarft.run import clock as schedule
from vlarft.run.clock import Clock, generator, rate_factor, seed_of


def test_rate_factor_by_hand():
    assert [rate_factor(step, 0.0, 4, "cosine") for step in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert [rate_factor(step, 0.5, 4, "constant") for step in (0, 1, 3, 99)] == [0.25, 0.5, 1.0, 1.0]
    assert rate_factor(50, 0.5, 4, "cosine", final=0.1) == pytest.approx(0.55)
    assert rate_factor(99, 1.2, 0, "cosine", final=0.1) == pytest.approx(0.1)  # the clock may run a little over


def test_clock_counts_steps_or_minutes():
    assert Clock(100, minutes_before=1e9).share(25) == 0.25  # time counts only where it is limited
    assert Clock(100, max_minutes=2.0, minutes_before=1.0).share(25) == pytest.approx(0.5, abs=1e-3)
    assert Clock(100, max_minutes=1e9).share(25) == 0.25


def test_seeds_depend_on_every_part_and_their_order():
    seeds = {seed_of(0), seed_of(0, 0), seed_of(0, 1), seed_of(1, 0), seed_of(1)}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    draws = [torch.rand(3, generator=generator("cpu", *parts)) for parts in ((3, 4), (3, 4), (4, 3))]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_paused_time_does_not_count(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(schedule.time, "monotonic", lambda: now[0])
    clock = Clock(10, max_minutes=2.0, minutes_before=0.5)
    now[0] += 30
    with clock.paused():
        now[0] += 600
    now[0] += 30
    assert clock.minutes == 1.5 and clock.share(0) == 0.75
