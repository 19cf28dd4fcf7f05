"""Stages of a pipeline: order, side by side, what fails or is stopped, what is not run again, the time it takes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlarft.run import stages
from vlarft.run.stages import Stage, peak_bytes, run_stage, run_stages, seconds_left, wall_seconds

SCRIPT = """
import os, sys, time
from pathlib import Path
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(options["--out-dir"])
folder.mkdir(exist_ok=True)
with open(folder / "log", "a") as log:
    print("start", options["--name"], os.environ.get("OMP_NUM_THREADS"), file=log)
other = options.get("--meets")  # wait until another stage has started as well
while other and f"start {other}" not in (folder / "log").read_text():
    time.sleep(0.01)
print("said by", options["--name"])
time.sleep(float(options.get("--wait", 0)))
with open(folder / "log", "a") as log:
    print("end", options["--name"], file=log)
sys.exit(int(options.get("--status", 0)))
"""


@pytest.fixture()
def stage(tmp_path):
    """Makes stages of a script that logs when it starts and ends."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def make(name: str, *after: str, **flags: object) -> Stage:
        return Stage(name, script, {"name": name, **flags, "out_dir": tmp_path}, after)

    return make


def log(folder: Path) -> list[str]:
    return [" ".join(line.split()[:2]) for line in (folder / "log").read_text().splitlines()]


def test_one_after_the_other(stage, tmp_path, capfd, monkeypatch):
    found = run_stages(tmp_path, [stage("a"), stage("b")])
    assert log(tmp_path) == ["start a", "end a", "start b", "end b"] and list(found) == ["a", "b"]
    assert found["a"]["command"] == f"python script.py --name a --out-dir {tmp_path}"
    assert all(one["done"] and one["seconds"] > 0 for one in found.values())
    assert json.loads((tmp_path / "stages.json").read_text()) == found
    assert "said by a\n" in capfd.readouterr().out  # as the stage says it
    assert run_stages(tmp_path, [stage("a"), stage("b")]) == found and len(log(tmp_path)) == 4
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path.parent)  # another spelling of the same folder
        patch.setattr(stages, "Running", None)
        same = Stage("a", tmp_path / "script.py", {"name": "a", "out_dir": tmp_path.name})
        assert run_stages(tmp_path, [same]) == found
    assert "[a] done in 0 s: python script.py --name a" in capfd.readouterr().out
    run_stage(tmp_path, "b", stage("b").script, name="b", more=[1, 2, 3], out_dir=tmp_path)  # another command
    assert (
        len(log(tmp_path)) == 6 and "--more 1 2 3" in json.loads((tmp_path / "stages.json").read_text())["b"]["command"]
    )


def test_side_by_side(stage, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    first = [stage("a", meets="b"), stage("b", meets="a"), stage("c", "a", "b"), stage("d", "a")]
    found = run_stages(tmp_path, first, at_once=2, expected=dict.fromkeys("abc", 60.0))
    lines = log(tmp_path)
    assert set(found) == set("abcd") and set(lines[:2]) == {"start a", "start b"}
    assert max(lines.index("end a"), lines.index("end b")) < lines.index("start c")
    said = capfd.readouterr().out
    assert "[a] said by a" in said and "about 0 minutes left" in said
    threads = str(max(1, os.cpu_count() // 2))
    assert (tmp_path / "log").read_text().splitlines()[0].split()[2] == threads
    assert wall_seconds(found) < sum(one["seconds"] for one in found.values())


def test_a_failure_stops_the_others(stage, tmp_path):
    stages = [stage("a", meets="b", status=3), stage("b", wait=60), stage("c", "a")]
    started = time.monotonic()
    with pytest.raises(SystemExit, match=r"\[a\] ended with status 3; the same command goes on from there"):
        run_stages(tmp_path, stages, at_once=2)
    found = json.loads((tmp_path / "stages.json").read_text())
    assert time.monotonic() - started < 30 and "end b" not in log(tmp_path)
    assert not found["a"]["done"] and not found["b"]["done"] and "c" not in found
    again = run_stages(tmp_path, [stage("a", meets="b", status=3)._replace(flags=stage("a").flags)])
    assert again["a"]["done"] and len(again["a"]["spans"]) == 1  # of this command


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_stages(stage, tmp_path, number):
    """A stage that saves when it is told to end is waited for."""
    script = tmp_path / "saves.py"
    script.write_text(
        "import signal, sys, time\n"
        "from pathlib import Path\n"
        "def save(*_):\n"
        "    time.sleep(0.3)\n"
        "    Path(sys.argv[2], 'saved').touch()\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "Path(sys.argv[2], 'started').touch()\n"
        "time.sleep(60)\n"
    )
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # in the background it is ignored
        "from pathlib import Path; from vlarft.run.stages import run_stage; "
        f"run_stage(Path({str(tmp_path)!r}), 's', Path({str(script)!r}), out_dir={str(tmp_path)!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(30) != 0 and (tmp_path / "saved").exists()
    assert json.loads((tmp_path / "stages.json").read_text())["s"]["done"] is False


def test_time_left_by_hand():
    a, b, c, d = (
        Stage(name, Path("x"), {}, after) for name, after in (("a", ()), ("b", ()), ("c", ("a",)), ("d", ("b",)))
    )
    expected = {"a": 10.0, "b": 4.0, "c": 5.0}  # d takes no time
    assert seconds_left([a, b, c, d], (), {}, expected, 2) == 15  # b and d beside a, then c
    assert seconds_left([a, b, c, d], (), {}, expected, 1) == 19
    assert seconds_left([a, b, c, d], ("b",), {"a": 7.0}, expected, 2) == 8
    assert seconds_left([a, b, c, d], ("b", "d"), {"a": 12.0}, expected, 2) == 5  # overdue
    assert seconds_left([], (), {}, expected, 2) == 0


def test_memory_of_stages_side_by_side_by_hand():
    stages = {
        "a": {"spans": [[0, 10], [20, 25]], "peak_bytes": 3},
        "b": {"spans": [[5, 20]], "peak_bytes": 4},
        "c": {"spans": [[21, 22]], "peak_bytes": 5},
    }
    assert peak_bytes(stages) == 8 and peak_bytes({}) == 0  # a and c; b ends as a starts again


def test_a_resumed_stage_counts_with_what_it_took_before(stage, tmp_path, capfd):
    half = {"command": f"python script.py --name a --out-dir {tmp_path}", "seconds": 120.0, "done": False}
    done = {"command": f"python script.py --name b --out-dir {tmp_path}", "seconds": 300.0, "done": True}
    (tmp_path / "stages.json").write_text(json.dumps({"a": half, "b": done}))
    stages = [stage("b"), stage("a", "b"), stage("c", "a")]
    run_stages(tmp_path, stages, expected={"b": 300.0, "a": 240.0, "c": 600.0})
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("about")]
    # at first 120 of a's 240 s, and c; then a took half of what was expected, as c will
    assert said == ["about 12 minutes left", "about 5 minutes left"]


def test_what_followed_another_command_is_not_taken_for_done(stage, tmp_path):
    run_stages(tmp_path, [stage("a"), stage("b", "a"), stage("c", "b")])
    changed = [stage("a", more=1), stage("b", "a"), stage("c", "b")]
    with pytest.raises(SystemExit, match=r"\[a\] has not run as .*--more 1.*, and b, c followed what it was: remove"):
        run_stages(tmp_path, changed)
    assert len(log(tmp_path)) == 6  # nothing ran
    run_stages(tmp_path, [stage("a"), stage("b", "a"), stage("c", "b", more=1)])  # nothing follows it
    assert log(tmp_path)[6:] == ["start c", "end c"]


def test_a_stage_whose_folder_is_gone_runs_again(stage, tmp_path):
    one = stage("a")._replace(flags={"name": "a", "out_dir": tmp_path / "own"})
    for _ in range(2):
        run_stages(tmp_path, [one])
        assert len(log(tmp_path / "own")) == 2
        shutil.rmtree(tmp_path / "own")
        run_stage(tmp_path, "other", tmp_path / "script.py", name="b", out_dir=tmp_path)
    assert log(tmp_path).count("start b") == 1


def test_another_number_of_workers_is_the_same_stage(stage, tmp_path):
    found = run_stages(tmp_path, [stage("a", workers=0), stage("b", "a")])
    assert run_stages(tmp_path, [stage("a", workers=4), stage("b", "a")]) == found and len(log(tmp_path)) == 4


def test_wall_time_by_hand():
    stages = {"a": {"spans": [[0, 10], [20, 25]]}, "b": {"spans": [[5, 12]]}, "older": {"seconds": 3.0}}
    assert wall_seconds(stages) == 17 and wall_seconds({}) == 0


def test_a_damaged_list_is_named(tmp_path):
    (tmp_path / "stages.json").write_text('{"one": ')
    with pytest.raises(ValueError, match=r"stages.json is not readable JSON .* damaged"):
        run_stages(tmp_path, [])
