"""How commands end: one line for what the user can mend, one writer a folder, no stage without its parent."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ended

from vlarft.run.script import clear_errors, only_writer

SCRIPT = """
import dataclasses, os, signal, sys, time, warnings
from vlarft.run.config import Count, opt
from vlarft.run.script import run_script

@dataclasses.dataclass(frozen=True)
class Config:
    out_dir: str = opt("run", "folder of the run")
    fail: str = opt("", "what to raise")
    steps: Count = opt(1, "how many")

def main(cfg):
    if cfg.fail:
        exec(cfg.fail)
    print("ready", os.getpid(), flush=True)
    time.sleep(60)

run_script(main, Config, {"only": Config()}, "A script.")
"""


def start(folder, *words, **options):
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(folder / "script.py"), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, **pipes, **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fail", "raise ValueError('one\\n  two')"], "ERROR: one; two\n"),
        (["--fail", "open('missing')"], "ERROR: [Errno 2] No such file or directory: 'missing'\n"),
        (["--fail", "import nothing_of_this_name"], "ERROR: No module named 'nothing_of_this_name'\n"),
        (["--fail", "int('x')"], "ERROR: invalid literal for int() with base 10: 'x'\n"),
        (["--steps", "0"], "ERROR: argument --steps: 0: give a number in [1, 1e+09] (--help lists what there is)\n"),
        (["--out-dir", "script.py"], "ERROR: --out-dir script.py is a file, not a folder\n"),
    ],
)
def test_a_mistake_takes_one_line(tmp_path, words, message):
    process = start(tmp_path, *words)
    assert process.communicate() == ("", message) and process.returncode == 2


def test_debug_shows_the_traceback(tmp_path):
    process = start(tmp_path, "--debug", "--fail", "raise ValueError('it')")
    assert "Traceback" in process.communicate()[1] and process.returncode == 1


def test_the_place_is_hinted_at_where_the_message_is_of_a_library(capsys):
    with pytest.raises(SystemExit), clear_errors():
        os.fspath(list(subprocess.Popen(["/missing"])))
    assert capsys.readouterr().err == "ERROR: [Errno 2] No such file or directory: '/missing' (--debug shows where)\n"


def test_faults_of_the_program_keep_their_traceback():
    for error in (RuntimeError, KeyError, AssertionError):
        with pytest.raises(error), clear_errors():
            raise error("of the program")  # this module is none of vlarft's


def test_one_process_writes_a_folder(tmp_path):
    first = start(tmp_path)
    pid = first.stdout.readline().split()[1]
    second = start(tmp_path)
    assert f"ERROR: run is being written by process {pid} on " in second.communicate()[1] and second.returncode == 2
    first.kill()
    first.wait()
    third = start(tmp_path)  # the lock is gone with its process
    assert third.stdout.readline().startswith("ready")
    third.send_signal(signal.SIGTERM)
    assert third.communicate()[1] == "told to stop; the same command goes on from there\n"
    assert third.returncode == 128 + signal.SIGTERM


def test_left_overs_are_removed(tmp_path):
    for name in ("model.safetensors.tmp", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.of.tmp").mkdir()
    with only_writer(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "notes.txt", "folder.of.tmp"}


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="link is a link to nothing"), only_writer(tmp_path / "link"):
        pass


def test_a_stage_ends_with_its_parent(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    code = (
        "import pathlib; from vlarft.run.stages import Stage, run_stages; here = pathlib.Path('.'); "
        "run_stages(here, [Stage('one', here / 'script.py', {})])"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    line = ""
    while not line.startswith("ready"):
        line = parent.stdout.readline()
    pid = int(line.split()[1])
    parent.kill()
    parent.wait()
    assert ended(pid)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vlarft.data.convert", "nothing", "new", "--format", "hdf5"], "nothing does not exist"),
        (["vlarft.pretrained", "tokenizer", "nothing", "--out", "new"], "nothing"),
        (["vlarft.data.check"], "the following arguments are required: path"),
        (["vlarft.sim.check", "--suites", "moon"], "invalid choice: 'moon'"),
    ],
)
def test_tools_say_a_mistake_in_one_line(tmp_path, words, message):
    done = subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("ERROR: ") and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
