"""The tool that breaks files and interrupts runs, at a size that proves little: it runs, and finds nothing."""

import pytest
import reliability


@pytest.mark.slow
def test_damaged_files_crash_nothing():
    found = reliability.main(["--files", "12", "--only", "files"])
    assert len(found) == 6 and all(sum(counts.values()) == 12 for counts in found.values())
    assert not any(counts[bad] for counts in found.values() for bad in ("crash", "hang", "memory", "raw", "unnamed"))


@pytest.mark.slow
def test_a_run_that_is_interrupted_ends_as_one_that_is_not():
    found = reliability.main(["--kills", "2", "--disks", "2", "--only", "train_sft"])
    assert {name: counts["interruptions"] for name, counts in found.items()} == {
        "kills: train_sft.py": 2,
        "full disks: train_sft.py": 2,
    }
    assert all(set(counts) == {"same", "interruptions"} for counts in found.values())
