"""The tool that breaks files and interrupts runs, at a size that proves little: it runs, and finds nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BAD = "crash", "hang", "memory", "raw", "unnamed", "orphans", "different", "refused for good"


@pytest.mark.slow
def test_nothing_is_lost_at_small_size(tmp_path):
    """In a process of its own: the tool forks, and a fork of a process with threads may wait for ever."""
    size = ["--files", "4", "--kills", "2", "--disks", "2", "--commands", "12", "--torchrun", "0"]
    only = ["--only", "files|s: train_sft|s: convert to H", "--out", str(tmp_path / "found.json")]
    command = [sys.executable, str(ROOT / "tests" / "reliability.py"), *size, *only]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-2000:]
    report = json.loads((tmp_path / "found.json").read_text())
    found = report["trials"]
    assert report["machine"] and all("--torchrun 0" in one.pop("command") for one in found.values())
    kinds = {
        kind: [v for k, v in found.items() if k.startswith(kind)] for kind in ("files", "kills", "full", "commands")
    }
    assert {kind: len(counts) for kind, counts in kinds.items()} == {"files": 13, "kills": 2, "full": 2, "commands": 1}
    assert all(sum(counts.values()) == 4 for counts in kinds["files"])
    assert all(counts["kills"] == 2 and counts["same"] == counts["runs"] for counts in kinds["kills"])
    assert all(counts["full disks"] == 2 and counts["same"] == counts["runs"] for counts in kinds["full"])
    assert kinds["commands"] == [{"one line": 12}]
    assert not any(counts.get(name) for counts in found.values() for name in BAD)
