"""preemption: signals are noted until the step is over; a second Ctrl+C does not wait."""

import os
import signal

import pytest

from vlarft.run import preemption


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_signal_waits_for_the_end_of_the_step(number):
    before = signal.getsignal(number)
    with preemption.deferred():
        assert not preemption.requested()
        os.kill(os.getpid(), number)
        assert preemption.requested()
    assert signal.getsignal(number) is before and not preemption.requested()


def test_a_second_ctrl_c_stops_at_once(capsys):
    with pytest.raises(KeyboardInterrupt), preemption.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert "stopping after this step; Ctrl+C again stops at once" in capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stays_ignored_in_the_background():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with preemption.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            assert not preemption.requested()
    finally:
        signal.signal(signal.SIGINT, before)
