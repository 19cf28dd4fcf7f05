"""mutate.py: its table, and a run on a project of one function."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mutate import ROOT, Breakage, broken, main, read_table
from mutate import TABLE as TABLE_FILE

TABLE = """
# a comment
module half.py
tests test_half.py

- return x / 2
+ return x / 3

- # unread
+ # unseen
survives: a comment
"""


def test_table_by_hand():
    first, second = read_table(TABLE)
    assert first == Breakage("half.py", "return x / 2", "return x / 3", ("test_half.py",), None)
    assert second.survives == "a comment"
    assert broken("    return x / 2\n", first) == "    return x / 3\n"
    for text in ("", "return x / 2; return x / 2"):
        with pytest.raises(ValueError, match=r"half.py has [02] times the text 'return x / 2', expected once"):
            broken(text, first)
    for text in ("- a\n+ b", "module a.py\n- a", "module a.py\ntests b.py\n- a\n- b", "mutate", "survives: x"):
        with pytest.raises(ValueError, match=r"mutations.txt, line \d: .* is out of place"):
            read_table(text)


def test_the_table_fits_the_code():
    """A change that moves a line must move its breakage along."""
    for breakage in read_table(TABLE_FILE.read_text()):
        broken((ROOT / breakage.path).read_text(), breakage)


def test_unknown_module(capsys):
    with pytest.raises(SystemExit):
        main(["--modules", "flow", "nothing"])
    assert "no breakages of nothing; there are some of ['action_bins'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("test", "code", "shown"),
    [
        ("half(4) == 2", 0, ["caught ", "[test_half]", "survived ", "[a comment]", "   1 of   2 caught"]),
        ("half(0) == 0", 1, ["survived, expected to be caught: half.py: 'return x / 2' -> 'return x / 3'"]),
    ],
)
def test_run_of_a_small_project(tmp_path, test, code, shown):
    (tmp_path / "half.py").write_text("def half(x):  # unread\n    return x / 2\n")
    (tmp_path / "test_half.py").write_text(f"from half import half\n\n\ndef test_half():\n    assert {test}\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "mutate.py").write_text((Path(__file__).parent / "mutate.py").read_text())
    (tmp_path / "tests" / "mutations.txt").write_text(TABLE)
    (tmp_path / "conftest.py").write_text("")  # puts the folder on the path
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "counts.json").write_text('{"modules": {"other.py": {"caught": 3}, "half.py": {"caught": 9}}}')
    command = [sys.executable, "tests/mutate.py", "--out", "counts.json"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == code, found.stdout + found.stderr
    assert all(text in found.stdout for text in shown), found.stdout
    assert (tmp_path / "half.py").read_text().endswith("return x / 2\n")
    modules = json.loads((tmp_path / "counts.json").read_text())["modules"]
    counts = modules["half.py"]
    assert (
        modules["other.py"] == {"caught": 3}
        and counts.get("caught", 0) + counts["survived"] == 2
        and counts["survived"] == code + 1
    )
