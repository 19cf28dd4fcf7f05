"""Workers that die are replaced, and their jobs run again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ended

from vlarft.data import load_episodes
from vlarft.run.script import clear_errors
from vlarft.sim.workers import Workers, run_jobs


def square(number, folder):
    """Kills its process the first time that it is asked for 3."""
    mark = Path(folder) / "died"
    if number == 3 and not mark.exists():
        mark.touch()
        os._exit(9)
    return number**2


def die(number):
    os._exit(9)


def fail_as_ours(number):
    exec("raise RuntimeError('no assets')", {"__name__": "vlarft.made_up"})


def fail(number):
    raise ValueError(f"no {number}")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dead_worker_is_replaced(tmp_path, workers):
    results = list(run_jobs(square, [(n, str(tmp_path)) for n in range(5)], workers))
    assert sorted((job[0], result, deaths) for job, result, deaths in results) == [
        (0, 0, 0), (1, 1, 0), (2, 4, 0), (3, 9, 1), (4, 16, 0),
    ]  # fmt: skip


def test_a_worker_that_dies_between_two_calls_is_replaced():
    with Workers(1) as workers:
        ((_, first, _),) = workers.run(os.getpid, [()])
        os.kill(first, signal.SIGKILL)
        time.sleep(0.5)
        ((_, second, deaths),) = workers.run(os.getpid, [()])
        assert second != first and deaths == 0


def test_nothing_is_left_of_a_call_that_fails():
    with Workers(2) as workers:
        with pytest.raises(ValueError, match=r"no \d"):
            list(workers.run(fail, [(1,), (2,), (3,)]))
        assert not workers.running
        assert sorted(result for _, result, _ in workers.run(abs, [(-1,), (-2,)])) == [1, 2]


def test_an_error_says_who_raised_it(capsys):
    with Workers(1) as workers:
        with pytest.raises(ValueError) as of_a_library:
            list(workers.run(fail, [(1,)]))
        with pytest.raises(FileNotFoundError) as of_ours:
            list(workers.run(load_episodes, [("nowhere",)]))
        assert of_ours.value.raised_here and not of_a_library.value.raised_here
        with pytest.raises(SystemExit), clear_errors():
            list(workers.run(load_episodes, [("nowhere",)]))
        said = capsys.readouterr().err
        assert "ERROR: " in said and "nowhere" in said and "--debug" not in said
        with pytest.raises(SystemExit, match="2"), clear_errors():
            list(workers.run(fail_as_ours, [(1,)]))
        assert capsys.readouterr().err == "ERROR: no assets\n"


def test_what_still_runs_is_given_up():
    with Workers(2) as workers:
        results = workers.run(time.sleep, [(0,), (60,)])
        next(results)
        (running,) = (process for one in workers.running.values() for process in one.pool._processes.values())
        results.close()
        assert ended(running.pid) and not workers.running


def test_workers_stay_for_the_next_call():
    with Workers(1) as workers:
        pids = [pid for _ in range(2) for _, pid, _ in workers.run(os.getpid, [()])]
    assert pids[0] == pids[1] != os.getpid()


def test_a_job_that_always_kills_is_given_up():
    with pytest.raises(RuntimeError, match="2 worker processes died over the same job"):
        list(run_jobs(die, [(1,)], 1, max_deaths=2))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_is_no_death(workers):
    with pytest.raises(ValueError, match="no 1"):
        list(run_jobs(fail, [(1,)], workers))


def stop_once(folder):
    """Stops its process, as Ctrl+Z would, the first time."""
    mark = Path(folder) / "stopped"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    return 7


def test_a_stuck_worker_is_replaced(tmp_path, capsys):
    with Workers(1, patience=5) as workers:
        ((_, result, deaths),) = workers.run(stop_once, [(str(tmp_path),)])
    assert (result, deaths) == (7, 1)
    assert "a worker computed nothing for" in capsys.readouterr().err


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """And leave Ctrl+C to it."""
    (tmp_path / "parent.py").write_text(
        "import os, signal, time\nfrom vlarft.sim.workers import Workers\n"
        "if __name__ == '__main__':\n"
        "    with Workers(1) as workers:\n"
        "        ((_, pid, _),) = workers.run(os.getpid, [()])\n"
        "        ((_, handler, _),) = workers.run(signal.getsignal, [(signal.SIGINT,)])\n"
        "        print(pid, handler == signal.SIG_IGN, flush=True)\n"
        "        time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True)
    pid, ignores = parent.stdout.readline().split()
    parent.kill()
    parent.wait()
    assert ignores == "True" and ended(int(pid))
