"""log: one line per step, none lost, none twice."""

import json
import os

import pytest

from vlarft.run.log import RunLog, check_finite


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_resumed_log_reads_as_if_never_stopped(tmp_path, capsys):
    log = RunLog(tmp_path, 4, "wm")
    for step in range(3):
        log.log(step, {"loss": 1.0 / (step + 1)})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('[1]\n{"step": "1"}\n{"step": 3, "lo')  # damaged, and cut short by a kill
    log = RunLog(tmp_path, 4, "wm", start_step=2)
    log.log(2, {"loss": 0.5})
    log.close()
    assert lines(tmp_path) == [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]
    said = capsys.readouterr().err
    assert "wm 3/4  loss 0.5" in said and "log.jsonl: 3 lines are no rows" in said


def test_a_run_that_starts_anew_keeps_no_line(tmp_path):
    """Not that of a validation before the first step, either, which it writes again."""
    for loss in (3.0, 2.0):
        log = RunLog(tmp_path, 4, "wm")
        log.log(-1, {"val_loss": loss})
        log.close()
    assert lines(tmp_path) == [{"step": -1, "val_loss": 2.0}]
    RunLog(tmp_path, 4, "wm", start_step=1).close()
    assert lines(tmp_path) == [{"step": -1, "val_loss": 2.0}]


def test_gradient_norm_that_is_no_number():
    with pytest.raises(FloatingPointError, match=r"^gan_grad_norm is inf at step 7 \(grad_norm=1, gan_grad_norm=inf\)"):
        check_finite(0.5, 7, {"grad_norm": 1.0, "gan_grad_norm": float("inf")}, lambda: ["a"])


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_loss_that_is_no_number(loss):
    check_finite(1.0, 0, {}, lambda: pytest.fail("names are for the error alone"))
    with pytest.raises(FloatingPointError, match=r"at step 7 \(lr=0.5\).*is from episodes suite/a, suite/b$"):
        check_finite(loss, 7, {"lr": 0.5}, lambda: ["suite/a", "suite/b"])


def test_nothing_is_lost_where_a_resume_is_killed(tmp_path, monkeypatch):
    """The rows that go on are written beside the old ones, which they then replace."""
    log = RunLog(tmp_path, 4, "wm")
    for step in range(3):
        log.log(step, {"loss": 1.0})
    log.close()
    before = (tmp_path / "log.jsonl").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def killed(*paths):
            raise KeyboardInterrupt

        patch.setattr(os, "replace", killed)
        RunLog(tmp_path, 4, "wm", start_step=2)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    RunLog(tmp_path, 4, "wm", start_step=3).close()  # a finished run: nothing is written
    assert (tmp_path / "log.jsonl").read_bytes() == before and not (tmp_path / "tensorboard").exists()
