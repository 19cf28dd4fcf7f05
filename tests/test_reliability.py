"""The tool that breaks files and interrupts runs, at a size that proves little: it runs, and finds nothing."""

import json

import pytest
import reliability


@pytest.mark.slow
def test_nothing_is_lost_at_small_size(tmp_path):
    what = [
        "--files",
        "4",
        "--kills",
        "2",
        "--disks",
        "2",
        "--commands",
        "12",
        "--only",
        "files|s: train_sft|s: convert to H",
    ]
    found = reliability.main([*what, "--torchrun", "0", "--out", str(tmp_path / "found.json")])
    kinds = {
        kind: [v for k, v in found.items() if k.startswith(kind)] for kind in ("files", "kills", "full", "commands")
    }
    assert {kind: len(counts) for kind, counts in kinds.items()} == {"files": 13, "kills": 2, "full": 2, "commands": 1}
    assert all(sum(counts.values()) == 4 for counts in kinds["files"])
    assert all(counts["kills"] == 2 and counts["same"] == counts["runs"] for counts in kinds["kills"])
    assert all(counts["full disks"] == 2 and counts["same"] == counts["runs"] for counts in kinds["full"])
    assert kinds["commands"] == [{"one line": 12}]
    bad = "crash", "hang", "memory", "raw", "unnamed", "orphans", "different", "refused for good"
    assert not any(counts[name] for counts in found.values() for name in bad)
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["machine"] and report["trials"].keys() == found.keys()
    assert all(one["command"].endswith("--torchrun 0") for one in report["trials"].values())
