"""studies/: the scripts at smoke size, summaries of synthetic runs by hand, tables in docs against the JSON files."""

import dataclasses
import importlib
import json
import math
import re
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import base
import cells
import closed_loop_study
import exploration
import factor_cells
import figures
import findings
import gates
import group_ranking
import h5py
import imagination_study
import labels
import libero_release
import libero_study
import outcomes
import precision_study
import pytest
import records
import rft_factors
import rft_study
import sft_study
import stage_tables
import stages
import study_arms
import study_logs
import table_text
import tables
import torch
import variants
import wm_study
from conftest import files_of, run_in_fork
from PIL import Image

import collect_demos
import eval_libero
import train_rft
import train_sft
import train_tokenizer
import train_wm
from vlarft.data import load_episodes
from vlarft.policy import VLAPolicy
from vlarft.run.checkpoint import model_digest, read_header, save_model
from vlarft.run.config import parse
from vlarft.world_model import WorldModel

ROOT = Path(__file__).parents[1]
# what the study plays beside the arms
REPLAYED = "SFT, x_0 = 0", "SFT, gripper sampled", "RFT R3, x_0 = 0", "SFT, other x_0"
GRID_FILES = "grid", "rough", "perturbed", "second_round"
CELL_FILES = "factors", "few", "few5", "clean", "grid_factors", "grid_factors_seed1", "grid_factors_seed2"
CELL_FILES += ("grid_factors_again",)
INTERVAL = re.compile(r"[+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\]")


@pytest.fixture(scope="module", autouse=True)
def stages_in_forks():
    """The studies' stages in forks of this process: a third of the time of processes that import torch again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "run_python", run_in_fork)
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """rft_study.py at smoke size: its configuration, and what it returned."""
    folder = tmp_path_factory.mktemp("study")
    places = {"out_dir": str(folder / "runs"), "out": str(folder / "study.json")}
    cfg = dataclasses.replace(rft_study.PRESETS["smoke"], **places)
    return cfg, rft_study.main(cfg)


@pytest.fixture
def suite(study) -> Path:
    """Where the smoke study's demonstrations, tokenizer, world model and policies lie."""
    return Path(study[0].out_dir) / "tabletop_object"


@pytest.mark.slow
def test_study_at_smoke_size(study, suite, tmp_path, capfd):
    cfg, report = study
    assert json.loads(Path(cfg.out).read_text()) == report == records.rounded(report)
    entry = report["runs"]["tabletop_object"]["0"]
    summary = outcomes.summarise(report["runs"])
    found = summary["tabletop_object"]["none"]
    assert list(found) == ["SFT early", "SFT", "RFT R2", "RFT R3", "regression", *REPLAYED]
    assert list(summary["tabletop_object"]["robot:20"]) == list(summary["all"]["all"]) == ["SFT", "RFT R3", *REPLAYED]
    assert all(values["all"]["episodes"] == 2 and len(values["runs"]) == 1 for values in found.values())
    assert summary["all"]["all"]["RFT R3"]["all"]["episodes"] == 4
    assert "against SFT" in found["RFT R3"] and "against SFT" not in found["SFT"]
    assert summary["all"] == summary["tabletop_object"]
    assert "gate_policy" in entry["trust_gate"]["RFT R3"] and set(entry["minutes"]) == set(found) - set(REPLAYED)
    assert "change" not in entry["chunks"]["SFT"]["sampled"] and entry["chunks"]["RFT R3"]["zero"]["change"]["mean"]
    assert set(entry["commit"]) == set(found) and entry["machine"]
    success = outcomes.success_table(report["runs"], "tabletop_object").splitlines()
    assert success[0].startswith("| policy | runs | success, plain | gain, plain | gain, hand moved 20 mm | gain, all")
    assert len(success) == len(found) + 2 and all(line.count("|") == 8 for line in success)
    (row,) = [line for line in success if line.startswith("| + R3 | 1 | ")]
    assert f"| {100 * found['RFT R3']['all']['rate']:.1f} % [" in row
    assert " ± " in outcomes.chunk_table(report["runs"]["tabletop_object"]).splitlines()[-1]
    assert entry["courses"]["RFT R3"]["step"][0] == 0 and entry["courses"]["RFT R3"]["std_gripper"][0] > 0
    _, gated = outcomes.gated_runs(report["runs"])
    assert gated[:4] == ("tabletop_object", "0", "RFT R3", entry["trust_gate"]["RFT R3"]["gate"])
    fewer = dataclasses.replace(cfg, arms=("RFT R3",))
    capfd.readouterr()
    assert rft_study.main(fewer) == report  # nothing is trained again, and what is there stays
    printed = capfd.readouterr().out
    assert "train_" not in printed and success[0] in printed
    with pytest.raises(ValueError, match="unknown arm 'PPO'"):
        rft_study.main(dataclasses.replace(cfg, arms=("PPO",)))
    with pytest.raises(ValueError, match="study.json holds runs with rft_group 3, not 4: give another file as --out"):
        rft_study.main(dataclasses.replace(cfg, rft_group=4))
    older = {**report, "settings": {name: value for name, value in report["settings"].items() if name != "start"}}
    (tmp_path / "older.json").write_text(json.dumps(older))
    older = dataclasses.replace(cfg, out=str(tmp_path / "older.json"))
    assert stages.read_report(older, "runs", rft_study.FREE) == report
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json has no runs, it is not of this script: give another file"):
        stages.read_report(dataclasses.replace(cfg, out=str(tmp_path / "other.json")), "runs", rft_study.FREE)


def test_arms_with_the_time_of_another():
    with pytest.raises(ValueError, match="extra SFT takes its wall time from a fine-tuning"):
        study_arms.timed_arm(("extra SFT",), "extra SFT")
    long = "RFT R1 per step, 400 steps", "extra SFT, 400 steps"
    assert study_arms.timed_arm(("RFT R3", *long), long[1]) == long[0]
    assert study_arms.timed_arm(("RFT R2", "RFT R3"), "extra SFT") == "RFT R3"
    with pytest.raises(ValueError, match="extra SFT takes its wall time from a fine-tuning: add one that is as long"):
        study_arms.timed_arm(long, "extra SFT")


@pytest.mark.slow
def test_second_round(study, tmp_path, capfd):
    cfg, report = study
    arms = "RFT R3", "regression"
    again = dataclasses.replace(cfg, arms=arms, start="regression", perturb=("none",))
    with pytest.raises(ValueError, match="holds runs with start None, not regression: give another file as --out"):
        rft_study.main(again)
    again = dataclasses.replace(again, out=str(tmp_path / "again.json"))
    with pytest.raises(
        FileNotFoundError, match="run tabletop_object, seed 1 without --start and with --arms 'regression'"
    ):
        rft_study.main(dataclasses.replace(again, seeds=(1,)))
    capfd.readouterr()
    second = rft_study.main(again)["runs"]["tabletop_object"]["0"]
    entry = report["runs"]["tabletop_object"]["0"]
    assert set(second["outcomes"]["none"]) == {"SFT", *arms, *REPLAYED}
    assert second["outcomes"]["none"]["SFT"] == entry["outcomes"]["none"]["regression"]
    assert second["sft"] != entry["sft"]
    lines = [line for line in capfd.readouterr().out.splitlines() if "--init" in line or "train_rft.py" in line]
    assert all("seed0/regression/model.safetensors" in line for line in lines) and len(lines) == 2
    assert lines[1].index("--seed 100") > lines[1].index("--seed 0")
    assert rft_study.main(cfg) == report  # the first round is as it was


@pytest.mark.slow
def test_world_models_of_other_episodes(study, suite, tmp_path, monkeypatch, capfd):
    cfg, report = study
    entry = report["runs"]["tabletop_object"]["0"]
    attempts = dataclasses.replace(cfg, arms=("RFT R3, on-policy",), out=str(tmp_path / "attempts.json"))
    capfd.readouterr()
    gate = rft_study.main(attempts)["runs"]["tabletop_object"]["0"]["trust_gate"]
    assert set(gate) == {"RFT R3, on-policy"} and gate["RFT R3, on-policy"] != entry["trust_gate"]["RFT R3"]
    kinds = Counter(e.kind for e in load_episodes(suite / "seed0" / "attempts_demos", successes_only=False))
    assert kinds == Counter(e.kind for e in load_episodes(suite / "demos", successes_only=False)) + Counter(policy=2)
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "train_rft.py" in line]
    assert "--world-model" in line and "seed0/attempts/model.safetensors" in line
    rft_study.main(attempts)
    assert "python " not in capfd.readouterr().out  # attempts and world model are there

    experts = dataclasses.replace(cfg, arms=("RFT R3, demonstrations only",), out=str(tmp_path / "experts.json"))
    rft_study.main(experts)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("python train_")]
    assert "train_wm.py" in lines[0] and "--experts-only" in lines[0] and len(lines) == 2
    assert "--pose-dims 0" in lines[0]  # whatever the preset has
    assert "train_rft.py" in lines[1] and f"--world-model {suite / 'demonstrations_only'}" in lines[1]

    monkeypatch.setitem(
        rft_factors.WORLD_MODELS,
        "demonstrations only",
        factor_cells.Training(cfg.world_model_steps, ("--experts-only",)),
    )
    cells = rft_factors.Config(demos=str(suite / "demos"), world_models=str(suite), stage_preset=cfg.stage_preset)
    assert rft_factors.world_model(cells, "demonstrations only").parent == suite / "demonstrations_only"
    assert "python " not in capfd.readouterr().out  # it is this one

    places = {"runs": cfg.out_dir, "out": str(tmp_path / "gates.json")}
    sizes = dataclasses.replace(gates.PRESETS["smoke"], **places)
    found, worlds = gates.main(sizes), ("wm", "demonstrations_only", "attempts")
    names = [f"tabletop_object/seed0/{model}/{reward}" for model in worlds for reward in sizes.rewards]
    assert list(found["runs"]) == names and gates.main(sizes)["runs"] == found["runs"]
    correlations = [run["gate_policy_true"] for run in found["runs"].values()]
    assert len(set(correlations)) > 1 and all(-1 <= value <= 1 for value in correlations)
    assert all(0 <= run["odd_share"] <= 1 and len(run["pull"]) == 6 for run in found["runs"].values())
    assert found["runs"]["tabletop_object/seed0/wm/r1"]["odd_share"] < 0.1  # but for clipped actions
    shown = capfd.readouterr().out
    assert shown.count("attempts/r3: ") == 1
    assert f"| R3 | demonstrations, noisy attempts | 0 | {correlations[1]:.2f} ± " in shown
    with pytest.raises(ValueError, match="figures of other sizes than {'starts': 5, 'samples': 3}: give another file"):
        gates.main(dataclasses.replace(sizes, starts=5))
    with pytest.raises(FileNotFoundError, match="no policy at .*seed3/sft.*: run rft_study.py for this suite"):
        gates.main(dataclasses.replace(sizes, seeds=(3,)))


@pytest.mark.slow
def test_studies_of_one_stage(suite, tmp_path, capfd):
    made = tmp_path / "base"  # as base.py leaves it
    made.mkdir()
    for name, path in (
        ("demos", suite / "demos"),
        ("tokenizer", suite / "tokenizer"),
        ("sft", suite / "seed0" / "sft"),
    ):
        (made / name).symlink_to(path)
    places = {"base": str(made), "runs": str(tmp_path / "arms"), "out": str(tmp_path / "wm.json")}
    report = wm_study.main(dataclasses.replace(wm_study.PRESETS["smoke"], **places))
    assert json.loads((tmp_path / "wm.json").read_text()) == report == records.rounded(report)
    arm = report["arms"]["default"]
    assert arm["steps"] == 20 and set(arm["order"]) == {"action", "true frames", "true state"}
    assert {"R3 greedy", "decoded frames", "true frames"} <= set(arm["order"]["true state"])
    assert set(arm["near_policy"]) == {"greedy", "common", "sample"}
    assert -1 <= arm["near_policy"]["greedy"]["gate_policy_true"] <= 1
    shown = capfd.readouterr().out
    assert "| ceiling: decoded frames |" in shown and f"| {arm['psnr_moving']:.1f} dB |" in shown
    with pytest.raises(ValueError, match="unknown arm 'none'; there are: default"):
        wm_study.main(dataclasses.replace(wm_study.PRESETS["smoke"], arms=("none",)))

    places = {"base": str(made), "runs": str(tmp_path / "imagination"), "out": str(tmp_path / "imagination.json")}
    cfg = dataclasses.replace(imagination_study.PRESETS["smoke"], minutes=(0.03, 0.03), **places)
    sizes = dict(imagination_study.train_wm.SIZES)
    report = imagination_study.main(cfg)
    assert json.loads((tmp_path / "imagination.json").read_text()) == json.loads(json.dumps(report))
    (found,) = report["runs"].values()
    assert found["steps"][0] > 1 and found["codes"] >= 1 and len(found["psnr_moving"]) == 2
    assert -1 <= found["r3_policy"]["gate_policy_true"] <= 1 and found["last_chunk"]["copy"]["still_error"] >= 0
    assert sizes == imagination_study.train_wm.SIZES  # an arm's sizes are gone after it
    (stored,) = (tmp_path / "imagination").rglob("wm/config.json")
    assert json.loads(stored.read_text())["pose_dims"] == 0  # whatever the preset has
    decoded, copied = report["runs"]["tabletop_object/actions drive the frames/0"]["carried_error"]
    assert 0 < decoded < 1 and 0.15 < copied < 0.5  # a block's colour against what was there before
    report = imagination_study.main(dataclasses.replace(cfg, arms=("no composition",)))
    assert list(report["runs"]) == ["tabletop_object/actions drive the frames/0", "tabletop_object/no composition/0"]
    one, other = report["runs"].values()
    seeds = {"s/actions drive the frames/0": one, "s/actions drive the frames/1": other, "s/no composition/0": other}
    text = stage_tables.imagination_arms_table(
        {"runs": seeds}, ("before", "no composition", "actions drive the frames")
    )
    rows = text.splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == ["no composition", "actions drive the frames", "first frame copied"]
    assert f"| {table_text.over_seeds([one['ssim'][0], other['ssim'][0]], 3)} |" in rows[1]
    assert f"| {one['ssim'][1]:.3f} |" in rows[2]
    assert table_text.over_seeds([1.0, 2.0, 3.0], 2) == "2.00 [-0.48, 4.48]"  # 4.303 / sqrt(3)
    assert "| first frame copied |" in capfd.readouterr().out

    places = {"demos": str(made / "demos"), "out_dir": str(tmp_path / "formats"), "out": str(tmp_path / "formats.json")}
    cfg = dataclasses.replace(precision_study.PRESETS["smoke"], **places)
    report = precision_study.main(cfg)
    assert json.loads((tmp_path / "formats.json").read_text()) == report
    assert list(report["runs"]["0"]) == ["float32", "bfloat16"] and len(report["runs"]["0"]["float32"]["outcomes"]) == 2
    models = [tmp_path / "formats" / "seed0" / name / "wm" / "config.json" for name in report["runs"]["0"]]
    assert [json.loads(path.read_text())["precision"] for path in models] == ["fp32", "bf16"]
    shown = capfd.readouterr().out
    assert "| SSIM |" in shown and shown.count("train_sft.py") == 2
    assert precision_study.main(cfg) == report and "train_sft.py" not in capfd.readouterr().out

    places = {"demos": str(made / "demos"), "runs": str(tmp_path / "sft_arms"), "out": str(tmp_path / "sft.json")}
    report = sft_study.main(dataclasses.replace(sft_study.PRESETS["smoke"], **places))
    assert json.loads((tmp_path / "sft.json").read_text()) == report
    first, other = report["arms"].values()
    assert first["success"]["episodes"] == 2 and set(first["success"]) == {"won", "episodes"}
    assert other["success"]["won"] - first["success"]["won"] == (
        other["success"]["only_this"] - other["success"]["only_first"]
    )
    assert "| no key-position loss |" in capfd.readouterr().out
    with pytest.raises(ValueError, match="unknown arm 'none'; there are: default"):
        sft_study.main(dataclasses.replace(sft_study.PRESETS["smoke"], arms=("none",)))


@pytest.mark.slow
def test_liberos_study_at_smoke_size(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(libero_study, "NUM_INITIAL_STATES", 3)
    monkeypatch.setitem(libero_study.PERTURBED, "tabletop_object", ("object:2.5",))
    places = {"out_dir": str(tmp_path / "libero"), "out": str(tmp_path / "libero.json")}
    cfg = dataclasses.replace(libero_study.PRESETS["smoke"], **places)
    report = libero_study.main(cfg)
    assert json.loads((tmp_path / "libero.json").read_text()) == report
    run = report["runs"]["tabletop_object"]
    assert [row["step"] for row in run["curve"]["found"]] == [2, 4]
    assert all(len(row["outcomes"]) == 1 for row in run["curve"]["found"])
    assert 0 < run["frames"]["found"]["imagined"]["ssim"] <= 1
    assert list(run["arms"]) == ["SFT", *libero_study.ARMS]
    kinds = ["none, zero", "none, sampled", "object:2.5, zero", "none, gripper", "all, zero"]
    assert list(run["arms"]["SFT"]["outcomes"]) == kinds  # all initial states too, since another arm plays them
    full = run["arms"]["extra SFT"]["outcomes"]
    assert (
        list(full) == ["none, zero", "none, sampled", "object:2.5, zero", "all, zero"] and len(full["all, zero"]) == 3
    )
    assert run["stages"].keys() >= {
        "demos",
        "sft",
        "attempts",
        "wm",
        "RFT_R3",
        "own_attempts",
        "filtered_cloning",
    }
    shown = capfd.readouterr().out
    rft = [line for line in shown.splitlines() if line.startswith("python train_rft.py")]
    assert ["--world-model" in line for line in rft] == [True, False]  # R1 needs none
    plain = stage_tables.libero_arms_table(report, perturbed=False)
    assert "| extra SFT |" in plain and "displaced" not in plain
    assert "objects displaced by 2.5 cm" in stage_tables.libero_arms_table(report, perturbed=True)
    assert "| 4 |" in stage_tables.libero_curve_table(report)
    assert "| first frame copied |" in stage_tables.libero_frames_table(report)
    assert "| RFT_R3 |" in stage_tables.libero_minutes_table(report) and "eval" not in report["settings"]
    assert libero_study.main(cfg) == report and "train_" not in capfd.readouterr().out
    with pytest.raises(ValueError, match="unknown arm 'none'"):
        libero_study.main(dataclasses.replace(cfg, full=("none",)))
    policy = tmp_path / "libero" / "tabletop_object" / "extra_SFT"  # trained again, it is played again
    other = VLAPolicy.load(policy)
    torch.nn.init.normal_(other.head.output.bias)
    other.save(policy / "model.safetensors", read_header(policy).extra)
    again = dataclasses.replace(cfg, arms=("extra SFT",), full=(), out=str(tmp_path / "again.json"))
    assert libero_study.main(again)["runs"]["tabletop_object"]["arms"].keys() == {"SFT", "extra SFT"}
    shown = capfd.readouterr().out
    played = [line for line in shown.splitlines() if line.startswith("python eval_libero.py")]
    assert len(played) == 3 and all("extra_SFT" in line for line in played) and "python train_" not in shown

    checkpoints = {
        name: str(tmp_path / "libero" / "tabletop_object" / run)
        for name, run in (("policy", "sft"), ("world_model", "wm"))
    }
    places = {"out_dir": str(tmp_path / "from"), "out": str(tmp_path / "from.json")}
    later = dataclasses.replace(cfg, arms=("RFT R3",), full=(), **checkpoints, **places)
    report = libero_study.main(later)
    run = report["runs"]["tabletop_object"]
    assert run.keys() == {"arms", "stages"} and run["arms"]["RFT R3"]["gate"]
    trainings = [line for line in capfd.readouterr().out.splitlines() if line.startswith("python train_")]
    assert len(trainings) == 1 and all(place in trainings[0] for place in checkpoints.values())
    assert "| SFT |  | 0" in stage_tables.libero_arms_table(report, perturbed=False)
    with pytest.raises(ValueError, match="--policy and --world-model are of one suite"):
        libero_study.main(dataclasses.replace(later, suites=("tabletop_object", "tabletop_spatial")))

    places = {"runs": cfg.out_dir, "checkpoints": str(tmp_path / "checkpoints")}
    libero_release.main(dataclasses.replace(libero_release.PRESETS["smoke"], **places))
    policy, model = (tmp_path / "checkpoints" / f"tabletop_object_{name}" for name in ("sft", "world_model"))
    card = (policy / "README.md").read_text()
    assert (
        card.count("| tabletop_object | 10 | 0.0 % [0.0, 27.8] | 10 |") == 2
        and "stand-ins for some of its meshes" in card
    )
    assert "train_wm.py" in (model / "README.md").read_text()
    ours, whole = (
        VLAPolicy.load(path).head.output.weight for path in (policy, tmp_path / "libero/tabletop_object/sft")
    )
    assert torch.equal(ours, whole.bfloat16().float()) and not torch.equal(ours, whole)
    assert "train_rft.py" in (tmp_path / "checkpoints" / "tabletop_object_rft_r3" / "README.md").read_text()
    missing = dataclasses.replace(libero_release.PRESETS["smoke"], **places, suites=("tabletop_object", "libero_goal"))
    before = files_of(tmp_path / "checkpoints")
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*libero_goal"):
        libero_release.main(missing)
    assert files_of(tmp_path / "checkpoints") == before
    with pytest.raises(ValueError, match="unknown arm 'RFT'"):
        libero_release.main(dataclasses.replace(missing, arms=("RFT",)))


def test_liberos_study_measures_again_what_was_trained_again(tmp_path, policy_file, world_model_file, monkeypatch):
    folder, done = tmp_path / "libero" / "tabletop_object", []
    for run, file in (("sft", policy_file), ("wm", world_model_file)):
        (folder / run).mkdir(parents=True)
        shutil.copy(file, folder / run / "model.safetensors")
    (folder / "sft" / "model_000002.safetensors").touch()
    (folder / "sft" / "log.jsonl").write_text('{"step": 1, "minutes": 0.5}\n')

    def stage(runs, name, *words):
        place = runs.folder / name
        if name.startswith("eval/wm") and not place.is_dir():  # as `run_once`
            done.append("frames")
            place.mkdir(parents=True)
            means = {name: [0.5] for name in ("mse", "psnr", "ssim", "psnr_moving")}
            (place / "results.json").write_text(json.dumps({"frames": {"all": {"imagined": means, "copy": means}}}))
        return place

    def play(runs, name, *how):
        done.append(name)
        return "1"

    monkeypatch.setattr(libero_study.Runs, "stage", stage)
    monkeypatch.setattr(libero_study.Runs, "play", play)
    out = tmp_path / "libero.json"
    cfg = dataclasses.replace(
        libero_study.PRESETS["smoke"], out_dir=str(tmp_path / "libero"), out=str(out), arms=(), full=()
    )

    def measured():
        done.clear()
        libero_study.main(cfg)
        return done

    def train(run):
        model = (VLAPolicy if run == "sft" else WorldModel).load(folder / run)
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        save_model(folder / run / "model.safetensors", model, model.cfg)

    everything = ["model_000002", "SFT", "SFT", "SFT", "frames"]
    assert measured() == everything and measured() == []
    train("wm")
    assert measured() == ["frames"] and measured() == []
    train("sft")
    assert measured() == ["model_000002", "SFT", "SFT", "SFT"] and measured() == []
    report = json.loads(out.read_text())
    run = report["runs"]["tabletop_object"]
    for part in (run["curve"], run["arms"]["SFT"]):  # of an older version, which does not tell the policy
        del part["digest"]
    out.write_text(json.dumps(report))
    assert measured() == ["model_000002", "SFT", "SFT", "SFT"]
    out.write_text(json.dumps(report))
    shutil.rmtree(folder)
    assert measured() == []  # nothing there tells otherwise


@pytest.mark.slow
def test_cells_at_smoke_size(suite, tmp_path, capfd, monkeypatch):
    places = {"demos": suite / "demos", "policies": suite / "seed0", "world_models": suite, "runs": suite / "cells"}
    places = {name: str(path) for name, path in places.items()} | {"out": str(tmp_path / "cells.json")}
    cfg = dataclasses.replace(rft_factors.PRESETS["smoke"], **places)
    with pytest.raises(FileNotFoundError, match="run the study that trains the arm 'twice as long' first"):
        rft_factors.main(cfg)
    monkeypatch.setitem(factor_cells.CELLS, "R3", factor_cells.study("--starts", "2", "--steps", "1"))
    monkeypatch.setitem(factor_cells.CELLS, "extra SFT head", factor_cells.sft("--steps", "1", *factor_cells.HEAD))
    true = factor_cells.Cell(("--variant", "simulator"), world_model="wm")
    monkeypatch.setitem(factor_cells.CELLS, "simulator's true error", true)
    more = "simulator's true error", "plateau, x_0 = 0", "study, gripper sampled"
    cfg = dataclasses.replace(cfg, cells=(*cfg.cells, *more), start="sft")
    report = rft_factors.main(cfg)
    assert json.loads((tmp_path / "cells.json").read_text()) == report == records.rounded(report)
    found = report["cells"]
    assert all(cell["chunks"]["played"]["starts"] == 4 and "commit" in cell for cell in found.values())
    assert found["R3"]["reward"]["first"] < 0
    for cell in found.values():
        gains = cells.success(report["base"]["sft"], cell)
        assert gains["all"]["against"]["only_first"] <= 2
        assert {kind: of["episodes"] for kind, of in gains.items()} == {"none": 1, "robot:20": 1, "all": 2}
    assert "gate_policy" in found["R3"]["gate"] and found["extra SFT head"]["gate"] == {}
    alone = found["plateau, x_0 = 0"]
    assert alone["minutes"] is None and alone["chunks"]["std"]["mean"] == 0 < alone["chunks"]["std"]["before"]
    assert alone["chunks"]["played"]["mean"] != 0 == alone["chunks"]["zero"]["mean"]
    gripper = found["study, gripper sampled"]["chunks"]["played"]["mean"]
    assert gripper not in (0, alone["chunks"]["played"]["mean"])
    assert set(report["base"]) == {"sft"} and "| extra SFT of the action head |" in capfd.readouterr().out
    ungated = dataclasses.replace(cfg, cells=("R3",), gate=False, runs=str(tmp_path / "ungated"))
    with pytest.raises(ValueError, match=r"cells.json holds cells with gate True, not False: give another file as"):
        rft_factors.main(ungated)
    elsewhere = rft_factors.main(dataclasses.replace(ungated, out=str(tmp_path / "ungated.json")))
    assert elsewhere["cells"]["R3"]["gate"] == {}

    alike = found.pop("R3")  # the file gathers cells: those of other invocations stay, and keep their commit
    found["extra SFT head"]["commit"] = "0000000"
    (tmp_path / "cells.json").write_text(json.dumps(report))
    again = rft_factors.main(dataclasses.replace(cfg, cells=("R3", "extra SFT head")))["cells"]
    assert again["R3"] == alike and set(alike["outcomes"]) == {"none", "robot:20"}
    assert again["extra SFT head"] == found["extra SFT head"]
    report["base"]["sft"]["chunks"]["zero"] = 0.5
    (tmp_path / "cells.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="cells.json holds cells of another policy 'sft'"):
        rft_factors.main(dataclasses.replace(cfg, cells=("R3",)))
    with pytest.raises(ValueError, match="unknown cell 'none'; there are: R3"):
        rft_factors.main(dataclasses.replace(cfg, cells=("none",)))


@pytest.mark.slow
def test_a_cell_trains_its_world_model(suite, tmp_path, capfd, monkeypatch):
    cell = factor_cells.study("--steps", "1", "--starts", "2", world_model="short")
    name = "study, R3, short world model"
    monkeypatch.setitem(factor_cells.CELLS, name, cell)
    monkeypatch.setitem(factor_cells.WORLD_MODELS, "short", factor_cells.Training(10))
    places = {"demos": suite / "demos", "policies": suite / "seed0", "world_models": suite, "runs": suite / "cells"}
    places = {name: str(path) for name, path in places.items()} | {"out": str(tmp_path / "factors.json")}
    cfg = dataclasses.replace(rft_factors.PRESETS["smoke"], cells=(name,), **places)
    report = rft_factors.main(cfg)
    (cell,) = report["cells"].values()
    assert report["world_models"]["short"]["step"] == 9 and "val_loss" in report["world_models"]["short"]
    assert (cell["policy"], cell["world_model"]) == ("sft", "short") and "gate_policy" in cell["gate"]
    assert rft_factors.main(cfg)["cells"][name] == cell and capfd.readouterr().out.count("train_wm.py") == 1


def test_cells_with_several_seeds():
    base = {"sft": {"outcomes": {"none": "10", "robot:20": "00"}}, "early": {}}
    won = {"R3": "1100", "R3, seed 1": "1010", "R1": "1000", "R1, seed 2": "0000", "alone": "1111"}
    runs = {name: {"policy": "sft", "outcomes": {"none": of[:2], "robot:20": of[2:]}} for name, of in won.items()}
    found = cells.repeated(base, runs | {"older": {"policy": "sft"}, "older, seed 1": {"policy": "sft"}})
    assert set(found) == {"R3", "R1"} and found["R3"]["runs"] == [0.25, 0.25] and found["R1"]["runs"] == [0, -0.25]
    gain = found["R3"]["against_base"]  # 0, 0.5, 0.5, 0: a standard deviation of 0.289 over four starts
    assert gain["difference"] == 0.25 and gain["high"] - 0.25 == pytest.approx(1.96 * 0.28868 / 2, rel=1e-4)
    assert set(found["R1"]["against"]) == {"R3"} and found["R1"]["against"]["R3"]["difference"] == -0.375


def test_cells_of_counts_and_of_outcomes_say_the_same():
    before = {"outcomes": {"none": "1100", "robot:20": "10"}}
    after = {"outcomes": {"none": "1011", "robot:20": "11"}}
    counted = {
        "success": {
            "none": {"won": 3, "episodes": 4, "only_before": 1, "only_after": 2},
            "robot:20": {"won": 2, "episodes": 2, "only_before": 0, "only_after": 1},
        },
        "against": {"rival": [1, 3]},
    }
    found = cells.success(before, after)
    assert cells.success(before, counted) == found
    assert found["all"]["rate"] == 5 / 6 and found["all"]["against"]["difference"] == 2 / 6
    assert cells.base_rates(before)["all"]["rate"] == 0.5
    assert cells.base_rates({"success": {"none": {"won": 2, "episodes": 4}}}) == {
        kind: table_text.share(2, 4) for kind in ("none", "all")
    }
    rival = {"outcomes": {"none": "1000", "robot:20": "00"}}
    apart = cells.against({"rival": rival, "cell": after}, "rival", "cell")
    assert apart == outcomes.paired("100000", "101111") and apart["difference"] == 4 / 6
    assert cells.against({"rival": {}, "cell": counted}, "rival", "cell")["difference"] == 2 / 6
    assert cells.against({"rival": rival, "cell": {"success": {}}}, "rival", "cell") is None


def test_study_gathers_runs(capsys):
    cfg, runs = rft_study.PRESETS["smoke"], {}
    parts = {"minutes": {}, "chunks": {"SFT": 0.1}, "trust_gate": {}, "courses": {}}
    first = {"sft": "a", "commit": {"SFT": "1", "RWR": "1"}, "outcomes": {"none": {"SFT": "10", "RWR": "11"}}, **parts}
    rft_study.gather(cfg, runs, "tabletop_object", 0, first)
    again = {"sft": "a", "commit": {"SFT": "2", "RFT R3": "2"}, "outcomes": {"none": {"SFT": "10", "RFT R3": "01"}}}
    again |= {**parts, "trust_gate": {"gate": 0.5}}
    rft_study.gather(cfg, runs, "tabletop_object", 0, again)
    kept = runs["tabletop_object"]["0"]
    assert kept["outcomes"] == {"none": {"SFT": "10", "RWR": "11", "RFT R3": "01"}}
    assert kept["commit"] == {"SFT": "1", "RWR": "1", "RFT R3": "2"}  # of the first that measured each
    assert kept["trust_gate"] == {"gate": 0.5} and capsys.readouterr().out == ""
    for seed in (10, 2):
        rft_study.gather(cfg, runs, "tabletop_object", seed, first)
    assert list(runs["tabletop_object"]) == ["0", "2", "10"]
    rft_study.gather(cfg, runs, "tabletop_object", 0, {**again, "sft": "b"})  # a later version's file, the same chunks
    assert set(runs["tabletop_object"]["0"]["outcomes"]["none"]) == {"SFT", "RWR", "RFT R3"}
    assert capsys.readouterr().out == ""
    rft_study.gather(cfg, runs, "tabletop_object", 0, {**first, "sft": "c", "chunks": {"SFT": 0.2}})
    assert set(runs["tabletop_object"]["0"]["outcomes"]["none"]) == {"SFT", "RWR"}
    assert "is of another long-trained policy and is replaced" in capsys.readouterr().out


def test_study_reads_logs(tmp_path):
    seen = {"x": 0.2, "y": 0.3, "z": 0.1, "gripper": 0.4}
    row = {f"std_{name}": value for name, value in seen.items()}
    rows = {
        "RFT R3": [
            {"step": 0, "gate": 0.4, "policy_s": 10, "world_model_s": 20, "update_s": 30, "minutes": 7, **row},
            {"step": 1, "policy_s": 20, "world_model_s": 20, "update_s": 20, "minutes": 9},
        ],
        "extra SFT": [{"step": 10, "minutes": 2.5}],
    }
    policies = {}
    for name, lines in rows.items():
        policies[name] = tmp_path / name / "model.safetensors"
        policies[name].parent.mkdir()
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert study_logs.trust_gates(policies) == {"RFT R3": {"gate": 0.4}}
    assert study_logs.courses(policies) == {
        "RFT R3": {"step": [0], **{f"std_{name}": [of] for name, of in seen.items()}}
    }
    assert [study_logs.minutes_of(tmp_path / name) for name in rows] == [2.0, 2.5]


def test_study_pools_pairs_of_all_runs():
    first = {"none": {"SFT": "10", "RWR": "11", "extra SFT": "11"}, "robot:20": {"SFT": "11", "RWR": "10"}}
    second = {"none": {"SFT": "00", "RWR": "01", "extra SFT": "11"}}
    seeds = {"0": {"outcomes": first}, "1": {"outcomes": second}}
    report = outcomes.summarise({"tabletop_object": seeds}, ("SFT", "extra SFT", "RWR"))
    assert report["all"] == report["tabletop_object"]
    found = report["all"]["none"]
    assert found["RWR"]["all"]["rate"] == 0.75 and [s["rate"] for s in found["RWR"]["runs"]] == [1.0, 0.5]
    against = found["RWR"]["against SFT"]
    assert against["difference"] == 0.5 and against["only_second"] == 2 and against["runs"] == [0.5, 0.5]
    assert found["RWR"]["against extra SFT"]["difference"] == -0.25
    assert set(found["SFT"]) == {"all", "runs", "against extra SFT", "against RWR"}
    assert set(found["extra SFT"]) == {"all", "runs", "against SFT", "against RWR"}
    # a policy is compared over the runs that have it, and over all kinds where it played all of them
    assert report["all"]["robot:20"]["RWR"]["against SFT"]["difference"] == -0.5
    assert report["all"]["all"]["RWR"]["all"]["episodes"] == 6 and "extra SFT" not in outcomes.compare([{"SFT": "1"}])
    assert report["all"]["all"]["extra SFT"]["all"] == outcomes.rate("11")
    rows = outcomes.rivals_table({"tabletop_object": seeds}, [("RWR", "extra SFT")]).splitlines()
    assert rows[0] == "| compared | runs | difference | by run |"  # over all kinds, which extra SFT played in one run
    assert rows[2].startswith("| RWR against extra SFT, time of R3 | 1 | -50.0 [") and rows[2].endswith(" | -50.0 |")


def test_starts_by_what_sft_wins():
    """From the sampled x_0 and from 0; runs that lack either are left out."""
    run = {"SFT": "0001110", "SFT, x_0 = 0": "1100011", "RWR": "0111001", "SFT, other x_0": "1100011"}
    found = outcomes.fates([run, {"SFT": "1", "RWR": "1"}, {"SFT": "1", "SFT, x_0 = 0": "1", "RFT R3": "1"}])
    assert set(found) == {"RWR", "SFT, other x_0"}  # R3 has no start that SFT lost
    groups = {"01": "011", "00": "1", "10": "10", "11": "0"}
    assert found["RWR"] == {fate: outcomes.rate(groups[fate]) for fate in outcomes.FATES}
    rows = outcomes.fates_table({"tabletop_object": {"0": {"outcomes": {"none": run}}}}).splitlines()
    assert rows[0].startswith("| policy | SFT wins from x_0 = 0 alone | SFT wins from neither |")
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| SFT, other samples of x_0", "| + RWR"]
    assert " of 3 | " in rows[3]


def test_table_of_all_suites_has_what_more_than_one_has():
    played = [{"SFT": "10", "RWR": "11"}, {"SFT": "10", "RFT R3": "11"}, {"SFT": "10", "RWR": "01"}]
    runs = {
        suite: {"0": {"outcomes": {"none": found}, "chunks": {}, "trust_gate": {}, "minutes": {}}}
        for suite, found in zip(("tabletop_goal", "tabletop_long", "tabletop_object"), played)
    }
    rows = {suite: outcomes.success_table(runs, suite).splitlines()[2:] for suite in ("all", "tabletop_long")}
    assert [row.split(" | ")[0] for row in rows["all"]] == ["| SFT", "| + RWR"]
    assert [row.split(" | ")[0] for row in rows["tabletop_long"]] == ["| SFT", "| + R3"]


def test_courses_and_dimensions_by_hand():
    course = {"step": [0, 5, 10], "true_error": [0.010, 0.008, 0.009], "std_gripper": [0.4, 0.4, 0.3]}
    course |= {f"std_{axis}": [0.2, 0.1, 0.1] for axis in "xyz"}
    entry = {"outcomes": {"none": {"SFT": "10", "RFT R3": "11"}}, "courses": {"RFT R3": course}}
    (row,) = outcomes.course_table({"suite": {"1": entry}}, "suite", ["RFT R3"]).splitlines()[2:]
    assert row.startswith("| + R3 | 1 | 10.0 (step 0) | 8.0 (step 5) | 9.0 (step 10) | +50.0 [")
    (row,) = outcomes.dimension_table({"suite": {"1": entry}}, "suite").splitlines()[2:]
    assert row == "| + R3 | 1 | -50 % | -50 % | -50 % | -25 % |"


def test_gates_and_gains_by_hand():
    entry = {
        "outcomes": {"none": {"SFT": "10", "RFT R3": "11", "RFT R2": "00", "RWR": "11"}},
        "trust_gate": {name: {"gate": gate} for name, gate in (("RFT R3", 0.3), ("RFT R2", 0.1), ("RWR", 0.3))},
    }
    runs = outcomes.gated_runs({"suite": {"0": entry}})
    assert [(run.arm, run.gate, run.against_sft["difference"]) for run in runs] == [
        ("RFT R3", 0.3, 0.5),
        ("RFT R2", 0.1, -0.5),
    ]
    order, chance = outcomes.gate_correlation(runs)
    assert order == 1 and chance == pytest.approx(0.5, abs=0.02)  # one of two orders


def test_records_are_short_and_read_back(tmp_path):
    report = {"runs": {"0": {"outcomes": "01" * 200, "course": [0.1] * 60, "minutes": 1.25}}, "empty": {}, "x": None}
    records.write(tmp_path / "out.json", report)
    text = (tmp_path / "out.json").read_text()
    assert json.loads(text) == report and text.endswith("}\n")
    assert [line.strip()[:9] for line in text.splitlines()] == [
        *(
            "{",
            '"runs": {',
            '"0": {"ou'[:6],
            '"outcomes',
            '"course":',
            '"minutes"',
            "}",
            "},",
            '"empty": ',
            '"x": null',
            "}",
        )
    ]
    assert records.rounded({"a": [0.123456789, 7, True, "x", 2.0]}) == {"a": [0.12346, 7, True, "x", 2.0]}
    assert records.columns([{"a": 1}, {"a": 2, "b": 3}]) == {"a": [1, 2], "b": [None, 3]}


def test_counts_give_the_intervals_of_outcomes():
    first, second = "1101000110", "1111010010"
    alone = Counter(zip(first, second))
    counted = table_text.difference(alone["1", "0"], alone["0", "1"], len(first))
    assert counted == outcomes.paired(first, second) and counted["difference"] == pytest.approx(0.1)
    assert table_text.share(3, 10) == outcomes.rate("1110000000")


def test_flags_of_arms_and_cells_are_those_of_the_scripts():
    """What a study would run parses: renamed and removed options are found without running anything."""
    scripts = {"train_rft.py": train_rft, "studies/variants.py": variants, "train_sft.py": train_sft}
    scripts |= {"train_wm.py": train_wm, "train_tokenizer.py": train_tokenizer}
    commands = [(stages.fine_tuning(flags), flags) for flags in study_arms.RFT_ARMS.values()]
    commands += [("train_sft.py", flags) for flags in (*study_arms.EXTRA_ARMS.values(), *sft_study.ARMS.values())]
    for cell in factor_cells.CELLS.values():
        if cell.script is not None:
            tunes = cell.script == "train_rft.py"
            commands.append((stages.fine_tuning(cell.flags) if tunes else cell.script, cell.flags))
    commands += [("train_wm.py", training.flags) for training in factor_cells.WORLD_MODELS.values()]
    for trained in wm_study.ARMS.values():
        commands += [("train_wm.py", trained.world_model), ("train_tokenizer.py", trained.tokenizer or [])]
    found = Counter()
    for script, flags in commands:
        module = scripts[script]
        cfg = parse(module.Config, module.PRESETS, ["--preset", "tiny", *map(str, flags)])
        found[getattr(cfg, "variant", None)] += 1
        if module is variants and cfg.variant in ("rwr", "flow_sde", "gripper_x0"):  # the others read files
            assert variants.VARIANTS[cfg.variant](cfg)
    assert set(found) == {None, "rwr", "symmetric", "simulator", "flow_sde", "gripper_x0", "kl"}


def test_gains_of_imagination_by_hand():
    def run(value):
        last = {"imagined": {"ssim": value, "psnr_moving": value}}
        figures = {"psnr_moving": [value, 0], "ssim": [value, 0], "r3": {"spearman": value}, "last_chunk": last}
        return {**figures, "r3_policy": {"gate_policy_true": value}, "minutes": [value, value]}

    runs = {
        "a/actions drive the frames/0": run(2.0),
        "a/before/0": run(1.0),
        "b/actions drive the frames/0": run(5.0),
        "b/before/0": run(2.0),
        "b/actions drive the frames/1": run(9.0),
    }
    rows = stage_tables.imagination_gains_table({"runs": runs}, "actions drive the frames", "before").splitlines()
    # differences 1 and 3, and of minutes 2 and 6; 12.71 is Student's quantile for two values
    assert (
        rows[2].startswith("| 2 | 2.0 [-10.7, 14.7] | 2.000 [-10.710, 14.710] |") and "| 4.0 [-21.4, 29.4] |" in rows[2]
    )


def test_closed_loop_arms(tmp_path, monkeypatch, capfd):
    """Every command parses, each stage has its inputs, and the JSON file holds outcomes that the summary counts."""
    commands = {}

    def note(place, script, *words):
        commands[str(place.relative_to(tmp_path))] = script, [str(word) for word in words]
        place.mkdir(parents=True, exist_ok=True)
        gate = {"gate": 0.9, "gate_false_successes": 1.0} if "--world-model" in words else {}
        (place / "log.jsonl").write_text(json.dumps({"minutes": 1.0, **gate}) + '\n{"minutes": 2.0}\n')
        if "--keep-interval" in words:
            for step in range(200, 1800, 200):
                (place / f"model_{step:06d}.safetensors").touch()
        return place

    def add(before, place, *words):
        assert str(before.relative_to(tmp_path)) in commands
        return note(place, "collect_demos.py", *words)

    def play(self, place, policy, perturb="none", *more):
        name = place.name.split("_none")[0].split("_object")[0]
        note(
            place, "eval_libero.py", "--policies", policy, *([] if perturb == "none" else ["--perturb", perturb]), *more
        )
        return {(task, state): state < (2 if name == "RL__simulator" else 1) for task in (0, 1) for state in (0, 1)}

    monkeypatch.setattr(closed_loop_study, "run_once", note)
    monkeypatch.setattr(closed_loop_study, "with_attempts", add)
    monkeypatch.setattr(closed_loop_study.Starts, "play", play)
    monkeypatch.setattr(closed_loop_study.convert, "main", lambda words: note(Path(words[1]), "convert", *words))
    cfg = closed_loop_study.Config(out_dir=str(tmp_path), out=str(tmp_path / "out.json"), suites=("tabletop_object",))
    report = closed_loop_study.main(dataclasses.replace(cfg, seeds=(0, 3)))
    assert list(report["runs"]) == ["tabletop_object/0", "tabletop_object/3"]
    assert list(report["runs"]["tabletop_object/0"]) == ["SFT", *closed_loop_study.ARMS]
    arms = report["runs"]["tabletop_object/0"]
    assert arms["RL, imagination"]["gate"] == {"gate": 0.9, "gate_false_successes": 1.0} and not arms["SFT"]["gate"]
    assert arms["RL, simulator"]["minutes"] == 2.0
    rows = {row.split(" | ")[1]: row.split(" | ")[2:] for row in capfd.readouterr().out.splitlines() if " | " in row}
    assert rows["arm"][2] == "plain, x_0 = 0" and rows["SFT"][:3] == ["2", "2", "50.0 % [21.5, 78.5]"]
    seeds, minutes, gain = rows["RL, simulator"][:3]
    assert (seeds, minutes) == ("2", "2") and gain.startswith("**+50.0 [") and gain.endswith("]**: +50.0, +50.0")
    assert rows["RL, imagination"][2].startswith("+0.0 [") and "**" not in rows["RL, imagination"][2]
    for place, (script, words) in commands.items():
        if script == "convert":
            assert words[0].endswith("attempts_1") and "seed" in place
            continue
        module = importlib.import_module(Path(script).stem)
        words = words if "--preset" in words else ["--preset", "tiny", *words]
        found = parse(module.Config, module.PRESETS, words)
        for field in ("policy", "world_model", "success_model", "init", "tokenizer"):
            value = getattr(found, field, None)
            if value and f"--{field.replace('_', '-')}" in words and value != "none":
                assert str(Path(value).relative_to(tmp_path)) in commands, (place, field)
        if hasattr(found, "seed") and script in ("train_sft.py", "train_rl.py", "train_rft.py"):
            assert f"seed{found.seed}/" in place
    assert len([c for c in commands.values() if c[0] == "train_rl.py"]) == 2 * 7
    _, words = commands["tabletop_object/seed3/RL_imagination_judge_of_true_frames"]
    assert words[words.index("--success-model") + 1].endswith("seed3/success_true")
    assert words[words.index("--world-model") + 1].endswith("seed3/wm_1")
    _, words = commands["tabletop_object/seed3/RL_simulator_after_filtered_cloning"]
    assert words[words.index("--policy") + 1].endswith("seed3/filtered")
    _, words = commands["tabletop_object/seed3/eval/copies"]
    copies = parse(eval_libero.Config, eval_libero.PRESETS, words).policies
    assert len(copies) == 8 and all(Path(copy).parent == tmp_path / "tabletop_object/seed3/sft" for copy in copies)
    for name, dims in (("wm_1", "6"), ("wm_1_actions", "0")):
        _, words = commands[f"tabletop_object/seed3/{name}"]
        assert words[words.index("--pose-dims") + 1] == dims
    _, words = commands["tabletop_object/seed3/RL_imagination_actions"]
    assert words[words.index("--world-model") + 1].endswith("seed3/wm_1_actions")
    _, words = commands["tabletop_object/seed3/RL_imagination"]
    assert words[words.index("--gate-evaluation") + 1] == str(tmp_path / "tabletop_object/seed3/eval/copies")
    _, words = commands["tabletop_object/seed3/attempts_2"]
    found = parse(collect_demos.Config, collect_demos.PRESETS, words)
    assert found.policy_per_task == 64 and found.policy.endswith("seed3/RL_imagination")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="from another SFT policy than that of"):
        patch.setattr(closed_loop_study.Starts, "play", lambda *_: {(0, 0): True})
        closed_loop_study.main(cfg)

    called = []
    monkeypatch.setattr(closed_loop_study, "call", lambda script, *words: called.append((script, *map(str, words))))
    runs = closed_loop_study.Runs(dataclasses.replace(cfg, copy_attempts=5), "tabletop_object", 3)
    runs.attempts(runs.policy)
    totals = [words[words.index("--policy-per-task") + 1] for words in called]
    assert totals == [str(5 * number) for number in range(1, 8)]
    places = {(words[0], words[-1]) for words in called}
    assert places == {("collect_demos.py", str(tmp_path / "tabletop_object/seed3/attempts_1"))}
    assert [Path(words[words.index("--policy") + 1]).stem[-4:] for words in called][::6] == ["0200", "1400"]
    _, words = commands["tabletop_object/seed3/attempts_1"]
    assert words[words.index("--policy-per-task") + 1] == "67" and words[words.index("--policy") + 1].endswith("/sft")


def test_arms_and_cells_are_those_that_were_run():
    """What can be run has been, and what can no longer be run says so."""
    arms = {
        name
        for file in GRID_FILES
        for seeds in records.read(file)["runs"].values()
        for entry in seeds.values()
        for name in entry["minutes"]
        if not name.startswith("SFT")
    } | {name for name in records.read("ten_tasks")["starts"]["none"] if not name.startswith("SFT")}
    run = {name for file in CELL_FILES for name in records.read(file)["cells"]}
    assert arms - labels.GONE == set(study_arms.ARMS) and run - labels.GONE == set(factor_cells.CELLS)
    trained = set(records.read("sft")["arms"]) | set(records.read("world_model")["arms"])
    assert trained - labels.GONE == {*sft_study.ARMS, *wm_study.ARMS}
    assert arms | run | trained >= labels.GONE
    assert set(labels.CELLS) == run
    assert set(labels.ARMS) == arms | {"SFT early", "SFT", "SFT, other x_0"}
    for file in GRID_FILES:
        for seeds in records.read(file)["runs"].values():
            for entry in seeds.values():
                assert set(entry["commit"]) == set(entry["outcomes"]["none"])


def test_documents_show_the_results():
    """Every table of README.md, docs/ and studies/README.md is what `python studies/tables.py` writes."""
    shown = []
    for page in tables.pages():
        text = page.read_text()
        assert tables.render(text) == text, f"{page.name}: run python studies/tables.py"
        shown += tables.BLOCK.findall(text)
    assert Counter(name for _, name, _ in shown) == Counter(list(tables.TABLES)), "each table is shown once"


def test_intervals_in_prose_are_those_of_a_table():
    """A difference with its interval, wherever the findings and the studies' pages quote one, stands in a table."""
    in_tables = {
        found
        for page in tables.pages()
        for table in tables.tables_in(page.read_text())
        for found in INTERVAL.findall(table)
    }
    pages = [page for page in tables.pages() if page.parent.name == "studies" or page.name == "findings.md"]
    quoted = {page.name: INTERVAL.findall(" ".join(tables.BLOCK.sub("", page.read_text()).split())) for page in pages}
    assert sum(map(len, quoted.values())) > 20
    assert {
        name: wrong for name, of in quoted.items() if (wrong := [found for found in of if found not in in_tables])
    } == {}


def test_pages_name_tables_that_exist():
    text = "before\n<!-- table: clean -->\nold\n<!-- end -->\nafter\n"
    new = tables.render(text)
    assert new.startswith("before\n<!-- table: clean -->\n| cell |") and new.endswith("|\n<!-- end -->\nafter\n")
    assert tables.render(new) == new and "old" not in new
    with pytest.raises(ValueError, match="no table 'cleaner'; there are: findings"):
        tables.render(text.replace("clean", "cleaner"))
    with pytest.raises(ValueError, match="1 tables begin, 0 end"):
        tables.render(text.replace("<!-- end -->", ""))


def test_findings_are_eight_rows():
    found = {of.label: of for of in findings.gains(records.read("grid")["runs"])}
    assert len(found) == 8 and found["SFT alone"].sampled is None
    assert found["SFT alone"].zero["difference"] > found["RFT, R3 (the paper's reward), 80 steps"].sampled["difference"]
    assert "| SFT alone | 8 | 14 | 85.1 % [84.1, 86.1] | +7.1 [+6.2, +8.0] |" in tables.TABLES["findings"]()
    assert "| +6.7 [+5.7, +7.7] (7 runs) |" in tables.TABLES["findings"]()  # of the row's 8


def test_figures_are_drawn(tmp_path):
    runs = records.read("grid")["runs"]
    figures.draw_findings(runs, tmp_path / "findings.png")
    figures.draw_gates(outcomes.gated_runs(runs), 0.25, tmp_path / "gates.png")
    sizes = {}
    for name in ("findings", "gates"):
        with Image.open(tmp_path / f"{name}.png") as image:
            sizes[name] = image.size
            assert len(image.convert("RGB").getcolors(1_000_000)) > 50
    assert sizes == {"findings": (800, 400), "gates": (800, 450)}


def test_results_are_small():
    """Runs only: summaries are computed, and a study's file is short enough to read in a diff."""
    files = [path for path in (ROOT / "results").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1.5e6
    for path in (ROOT / "results" / "studies").iterdir():
        report = json.loads(path.read_text())
        assert not {"summary", "repeated"} & set(report) and report == records.rounded(report), path.name
        text = records._text(report, 0) + "\n"
        assert path.read_text() == text, path.name


def test_what_studies_begin_from(tmp_path, monkeypatch):
    asked = {}

    def run(folder, script, *words):
        module = importlib.import_module(Path(script).stem)
        asked[folder.name] = parse(module.Config, module.PRESETS, list(map(str, words)))
        return folder

    monkeypatch.setattr(base, "run_once", run)
    base.main(base.Config(out_dir=str(tmp_path)))
    assert list(asked) == ["demos", "sft", "tokenizer"] and asked["demos"].suites == ("tabletop_object",)
    assert asked["demos"].demos_per_task == 150
    assert {str(asked[name].demos).strip("()',") for name in ("sft", "tokenizer")} == {str(tmp_path / "demos")}


def test_exploration(tmp_path, monkeypatch):
    """The stages' flags are read by their scripts, but nothing runs."""
    asked = {}

    def run(folder, stages, at_once):
        for stage in stages:
            assert set(stage.after) <= set(asked)
            script = importlib.import_module(stage.script.stem)
            asked[stage.name] = cfg = parse(script.Config, script.PRESETS, stage.words())
            out = Path(cfg.out_dir)
            out.mkdir(parents=True)
            starts = [{"suite": "s", "task": 0, "init_state": i, "success": i == 1} for i in (1, 0)]
            rows = starts if stage.name.startswith("seed0 eval") else [{"success": 0.5}]
            name = "episodes.jsonl" if rows is starts else "log.jsonl"
            (out / name).write_text("\n".join(map(json.dumps, rows)))
        return {name: {"seconds": 90.0} for name in asked}

    monkeypatch.setattr(exploration, "run_stages", run)
    places = {"out_dir": str(tmp_path / "runs"), "out": str(tmp_path / "exploration.json")}
    report = exploration.main(dataclasses.replace(exploration.PRESETS["smoke"], **places))
    assert json.loads((tmp_path / "exploration.json").read_text()) == report
    one, other = list(exploration.ARMS)[:2]
    run = report["runs"]["0"]
    found = {"minutes": 1.5, "while_training": 0.5, "outcomes": "01"}
    assert run["SFT"] == "01" and run["arms"] == {one: found, other: found}
    settings = [asked[f"seed0 rl {arm}"] for arm in (one, other)]
    assert [(cfg.sigma_min, cfg.sigma_max) for cfg in settings] == [(0.08, 0.2), (0.16, 0.4)]
    assert {(cfg.policy, cfg.world) for cfg in settings} == {(str(tmp_path / "runs/seed0/sft"), "simulator")}
    assert asked[f"seed0 eval rl {one}"].policies == (str(tmp_path / f"runs/seed0/rl {one}"),)
    by_hand = {"minutes": 2.0, "while_training": 0.5, "outcomes": "0111"}
    run |= {"SFT": "0011", "arms": {other: by_hand, one: by_hand}}  # the second seed has not run the other arm
    report["runs"]["1"] = {"SFT": "0000", "arms": {one: {"minutes": 4.0, "while_training": 0.7, "outcomes": "1000"}}}
    sft, rl = stage_tables.exploration_table(report).splitlines()[2:]
    assert sft.startswith("| SFT |  |  | 25.0 % [")
    assert rl.startswith(f"| {one} | 3 | 60 % | +25.0 [") and rl.endswith("]: +25.0, +25.0 |")
    with pytest.raises(ValueError, match="unknown arm 'none'; there are: sigma 0.08"):
        exploration.Config(arms=("none",))


@pytest.mark.slow
def test_ranking_within_groups_at_smoke_size(suite, tmp_path, capfd):
    demos, own, models = suite / "demos", tmp_path / "own", [tmp_path / "wm", tmp_path / "success"]
    given = {"suites": ("tabletop_object",), "tasks": ("0",), "demos_per_task": 0}
    given |= {"policy": str(suite / "seed0" / "sft"), "seed": 500_000, "out_dir": str(own)}
    given |= {"policy_per_task": 6, "policy_group": 2, "horizon": 9}
    collect_demos.main(dataclasses.replace(collect_demos.PRESETS["smoke"], **given))
    words = ["--preset", "smoke", "--demos", demos, own]
    train = [*words, "--validation-fraction", 0.5, "--steps", 2]
    stages.call("train_tokenizer.py", *train, "--out-dir", tmp_path / "tokenizer")
    stages.call("train_wm.py", *train, "--tokenizer", tmp_path / "tokenizer", "--out-dir", models[0])
    stages.call("train_success.py", *words, "--world-model", models[0], "--steps", 2, "--out-dir", models[1])
    cfg = dataclasses.replace(
        group_ranking.PRESETS["smoke"], demos=(str(own),), world_model=str(models[0]), success_model=str(models[1]),
        out=str(tmp_path / "ranking.json"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"none of 3 starts has a success and a failure"):
        group_ranking.main(cfg)  # no attempt of nine steps succeeds
    with h5py.File(next(own.rglob("*_demo.hdf5")), "r+") as file:
        for number, demo in enumerate(file["data"].values()):
            demo.attrs["success"] = number % 2 == 0
    report = group_ranking.main(cfg)
    assert json.loads((tmp_path / "ranking.json").read_text())["judged"] == report["judged"]
    assert report["outcomes"] == ["10", "10"]  # two starts of three
    kinds = ["recorded", "decoded", "imagined, recorded poses", "imagined"]
    assert list(report["judged"]) == kinds and all(0 <= v <= 1 for row in report["judged"]["imagined"] for v in row)
    assert "| recorded | decoded |" in capfd.readouterr().out
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "ranking_failures_judged_high.png", "ranking_successes_judged_low.png"
    }  # fmt: skip


def test_pictures_of_groups(tmp_path):
    """Four episodes at most, of different lengths: frames at 0, 6, ... and the last one."""
    frames = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8)
    shown = [(frames[:length], frames[:length]) for length in (5, 13, 20, 8, 8, 8)]
    group_ranking.draw(tmp_path / "all.png", shown)
    group_ranking.draw(tmp_path / "two.png", shown[:2])
    group_ranking.draw(tmp_path / "none.png", [])
    heights = [Image.open(tmp_path / f"{name}.png").size[1] for name in ("all", "two")]
    assert heights[0] > 1.8 * heights[1] and not (tmp_path / "none.png").exists()


def test_a_finished_run_of_another_command_is_refused(tmp_path, monkeypatch):
    called = []

    def call(*words: object) -> None:
        called.append(words)
        if len(called) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(stages, "call", call)
    (tmp_path / "stage.json").write_text('{"minutes": 2.0, "commit": "abc"}')
    with pytest.raises(KeyboardInterrupt):
        stages.run_once(tmp_path, "train_sft.py", "--steps", 5)
    for _ in range(2):
        stages.run_once(tmp_path, "train_sft.py", "--steps", 5)
    assert len(called) == 2
    facts = json.loads((tmp_path / "stage.json").read_text())
    assert facts["minutes"] >= 2.0 and facts["commit"] == stages.commit()  # of all starts, and of the last
    with pytest.raises(ValueError, match="is of another command, train_sft.py --steps 5; now it would be .*--steps 6"):
        stages.run_once(tmp_path, "train_sft.py", "--steps", 6)


def test_an_arm_of_a_policy_that_was_trained_again_is_refused(tmp_path, policy_file):
    arm, policy = tmp_path / "arm", tmp_path / "sft.safetensors"
    shutil.copy(policy_file, policy)
    arm.mkdir()
    (arm / "done").write_text("train_rft.py --steps 5")
    (arm / "config.json").write_text(json.dumps({"policy": str(policy), "world_model": "gone"}))
    (arm / "inputs.json").write_text(json.dumps({"policy": model_digest(policy), "world_model": "abc"}))
    assert stages.run_once(arm, "train_rft.py", "--steps", 5) == arm
    (arm / "inputs.json").write_text(json.dumps({"policy": "abc"}))
    with pytest.raises(ValueError, match=r"arm began with another policy than .*sft.safetensors is today: remove"):
        stages.run_once(arm, "train_rft.py", "--steps", 5)


def test_two_processes_on_two_suites_add_to_one_file(tmp_path, monkeypatch):
    def write(*words):
        time.sleep(0.2)  # the other one reads meanwhile, if it can
        records.write(*words)

    made = {"write": write, "model_digest": lambda _: "abc", "measure": lambda *_: iter(()), "libero_arms_table": str}
    for name, of in made.items():
        monkeypatch.setattr(libero_study, name, of)
    for name in ("curve", "frames"):
        monkeypatch.setattr(libero_study.Runs, name, lambda _: [])
    places = {"out_dir": str(tmp_path), "out": str(tmp_path / "new" / "libero.json")}
    cfg = dataclasses.replace(libero_study.PRESETS["smoke"], **places)
    cfgs = [dataclasses.replace(cfg, suites=(suite,)) for suite in ("tabletop_object", "tabletop_spatial")]
    with ThreadPoolExecutor(2) as both:
        list(both.map(libero_study.main, cfgs))
    runs = json.loads(Path(cfg.out).read_text())["runs"]
    assert set(runs) == {"tabletop_object", "tabletop_spatial"} and all("frames" in run for run in runs.values())


def test_students_quantiles_have_19_of_20_between_them():
    assert sorted(table_text.STUDENT) == list(range(2, 32))
    for count, quantile in table_text.STUDENT.items():
        n, x = count - 1, torch.linspace(0.0, quantile, 100_001, dtype=torch.float64)
        peak = math.gamma((n + 1) / 2) / math.gamma(n / 2) / math.sqrt(math.pi * n)
        half = torch.trapezoid(peak * (1 + x**2 / n) ** (-(n + 1) / 2), x)
        assert half.item() == pytest.approx(0.475, abs=5e-5), count


def test_ranking_within_groups_by_hand():
    """Pairs of one start alone count, equal judgements half."""
    found = stage_tables.ranked_right([[0.9, 0.1, 0.5], [0.2, 0.2, 0.2], [0.0, 1.0, 0.0]], ["100", "011", "110"])
    assert found.value == pytest.approx((2 + 1 + 1.5) / 6) and found.low < found.value < found.high
    report = {"outcomes": ["10"], "judged": {"recorded": [[1.0, 0.0]], "imagined": [[0.3, 0.4]]}}
    other = {"outcomes": ["10"], "judged": {"recorded": [[1.0, 0.0]]}}
    shown = stage_tables.ranking_table({"wm": report, "other": other})
    assert (
        "| wm | 1 | 2 | 1.00 [nan, nan] | 0.00 [nan, nan] |" in shown and "| other | 1 | 2 | 1.00 [nan, nan] |" in shown
    )
