"""clock: share of a run and its learning rate."""

import pytest

from vlarft.run import clock as run_clock
from vlarft.run.clock import Clock, rate_factor


def test_rate_factor_by_hand():
    assert [rate_factor(step, 0.0, 4, "cosine") for step in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert [rate_factor(step, 0.5, 4, "constant") for step in (0, 1, 3, 99)] == [0.25, 0.5, 1.0, 1.0]
    assert rate_factor(50, 0.5, 4, "cosine") == pytest.approx(0.5)
    assert rate_factor(50, 0.25, 4, "cosine") == pytest.approx(0.5 + 0.25 * 2**0.5)
    assert rate_factor(99, 1.2, 0, "cosine") == 0.0  # the clock may run a little over


def test_clock_counts_steps_or_minutes():
    assert Clock(100, minutes_before=1e9).share(25) == 0.25  # time counts only where it is limited
    assert Clock(100, max_minutes=2.0, minutes_before=1.0).share(25) == pytest.approx(0.5, abs=1e-3)
    assert Clock(100, max_minutes=1e9).share(25) == 0.25
    late = Clock(100, max_minutes=1e-3, minutes_before=1.0)
    assert late.share(0) < 1 <= late.share(1)  # one step at least


def test_paused_time_does_not_count(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(run_clock.time, "monotonic", lambda: now[0])
    clock = Clock(10, max_minutes=2.0, minutes_before=0.5)
    now[0] += 30
    with clock.paused():
        now[0] += 600
    now[0] += 30
    assert clock.minutes == 1.5 and clock.share(0) == 0.75
