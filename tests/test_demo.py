"""The demo at smoke size: every stage script through its command line, the pictures, the second call."""

import dataclasses
import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import collect_demos
import demo
from vlarft.data import load_episodes

ROOT = Path(__file__).parents[1]
# what the study plays otherwise, too
REPLAYED = "SFT, x_0 = 0", "SFT, gripper drawn", "RFT R3, x_0 = 0", "SFT, other x_0"


def run_notebook(name: str) -> dict:
    """Run the code cells of a notebook in order; returns their variables."""
    path, names = ROOT / "notebooks" / name, {"__name__": "notebook"}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(path), "exec"), names)
    return names


@pytest.mark.slow
def test_whole_pipeline(tmp_path, capfd, load_benchmark, monkeypatch):
    cfg = dataclasses.replace(demo.PRESETS["smoke"], out_dir=str(tmp_path))
    summary = demo.main(cfg)
    names = ["collect", "tokenizer", "wm", "eval_wm", "sft", "rft", "sft_extra", "eval", "eval_zero"]
    assert list(summary["stages"]) == names
    assert all(s["done"] and s["peak_bytes"] > 2**27 for s in summary["stages"].values())
    rows = summary["evaluation"]
    assert list(rows) == ["SFT", "SFT, x_0 = 0", "+ extra SFT", "+ RFT"]
    assert [row["all"]["episodes"] for row in rows.values()] == [2, 2, 2, 2]
    assert ["against_first" in row for row in rows.values()] == [False, True, True, True]
    assert summary["versions"]["torch"] == version("torch") and {"python", "mujoco"} < set(summary["versions"])
    for name in ("demonstrations.png", "curves.png", "before_after.gif", "rft/rollouts.png", "wm/rollouts.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) >= 64, name
    printed = capfd.readouterr().out
    assert "[sft] python train_sft.py --preset smoke --seed 0 --split-seed 0 --demos" in printed
    assert "+ RFT" in printed and "SFT, x_0 = 0" in printed and "its numbers mean nothing" in printed

    before = json.loads((tmp_path / "stages.json").read_text())
    demo.main(cfg)  # nothing is done again
    assert json.loads((tmp_path / "stages.json").read_text()) == before
    assert "[eval] done in" in capfd.readouterr().out

    monkeypatch.setenv("DEMO", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    cells = run_notebook("imagination.ipynb")
    assert len(cells["imagined"]) == 9 and cells["rollout"].frames.shape[:3] == (1, 4, 8)
    cells = run_notebook("rft_step.ipynb")
    assert cells["reward"].reward.shape == cells["advantage"].shape == (4, 8) and cells["loss"].isfinite()

    study = load_benchmark("wm_study")
    places = {"demo": str(tmp_path), "runs": str(tmp_path / "arms"), "out": str(tmp_path / "study.json")}
    report = study.main(dataclasses.replace(study.PRESETS["smoke"], **places))
    assert json.loads((tmp_path / "study.json").read_text()) == report
    arm = report["arms"]["default"]
    assert arm["steps"] == 20 and set(arm["order"]) == {"action", "true frames", "true state"}
    assert {"R3 greedy", "decoded frames", "true frames"} <= set(arm["order"]["true state"])
    assert set(arm["near_policy"]) == {"greedy", "common", "sample"}
    assert -1 <= arm["near_policy"]["greedy"]["gate_policy_true"] <= 1
    assert "moving PSNR" in capfd.readouterr().out
    monkeypatch.setitem(study.ARMS, "attempts", study.Arm([], attempts=1))
    study.main(dataclasses.replace(study.PRESETS["smoke"], **places, arms=("attempts",)))
    seen = load_episodes(tmp_path / "arms" / "attempts" / "demos", successes_only=False)
    assert Counter(e.kind for e in seen)["policy"] == 4  # one a task
    assert not any(e.kind == "policy" for e in load_episodes(tmp_path / "demos", successes_only=False))
    with pytest.raises(ValueError, match="unknown arm 'none'; there are: default"):
        study.main(dataclasses.replace(study.PRESETS["smoke"], arms=("none",)))

    study = load_benchmark("sft_study")
    places = {"demos": str(tmp_path / "demos"), "runs": str(tmp_path / "sft_arms"), "out": str(tmp_path / "sft.json")}
    places["figure"] = str(tmp_path / "figures" / "sft.png")
    report = study.main(dataclasses.replace(study.PRESETS["smoke"], **places))
    assert json.loads((tmp_path / "sft.json").read_text()) == report
    first, other = report["arms"].values()
    assert first["success"]["episodes"] == 2 and [point["step"] for point in first["curve"]] == [1, 3]
    assert "against_first" in other and "against_first" not in first
    with Image.open(places["figure"]) as image:
        assert image.size == (480, 320)
    assert "no key-position loss" in capfd.readouterr().out
    with pytest.raises(ValueError, match="unknown arm 'none'; there are: default"):
        study.main(dataclasses.replace(study.PRESETS["smoke"], arms=("none",)))

    study = load_benchmark("rft_factors")
    arms = {"world_models": str(tmp_path / "arms"), "policies": str(tmp_path / "sft_arms")}
    places = {"demos": str(tmp_path / "demos"), "runs": str(tmp_path / "cells"), "out": str(tmp_path / "cells.json")}
    cfg = dataclasses.replace(study.PRESETS["smoke"], **arms, **places)
    with pytest.raises(FileNotFoundError, match="run the study that trains the arm 'twice as long' first"):
        study.main(cfg)
    cells = load_benchmark("factor_cells")
    monkeypatch.setitem(study.CELLS, "R3", cells.Cell(world_model="default"))
    monkeypatch.setitem(study.CELLS, "extra SFT head", cells.sft("--steps", "1", *cells.HEAD))
    true = cells.Cell(("--reward", "simulator"), world_model="default")
    monkeypatch.setitem(study.CELLS, "simulator's true error", true)
    more = "simulator's true error", "plateau, x_0 = 0", "study, gripper drawn"
    cfg = dataclasses.replace(cfg, cells=(*cfg.cells, *more), start="default")
    cfg = dataclasses.replace(cfg, rival="plateau, x_0 = 0")
    report = study.main(cfg)
    assert json.loads((tmp_path / "cells.json").read_text()) == report
    assert all(cell["true_error_change"]["starts"] == 4 for cell in report["cells"].values())
    assert report["cells"]["simulator's true error"]["reward"]["first"] < 0
    for cell in report["cells"].values():
        assert cell["success"]["all"]["against_base"]["only_first"] <= 2
        assert {kind: found["episodes"] for kind, found in cell["success"].items()} == {
            "none": 1,
            "robot:20": 1,
            "all": 2,
        }
    assert "gate_policy" in report["cells"]["R3"]["gate"] and report["cells"]["extra SFT head"]["gate"] == {}
    alone = report["cells"]["plateau, x_0 = 0"]
    assert "against_rival" not in alone
    for cell in report["cells"].values():
        if cell is not alone:
            own, base = cell["success"]["all"]["rate"], alone["success"]["all"]["rate"]
            assert cell["against_rival"]["difference"] == pytest.approx(own - base)
    assert alone["minutes"] is None and alone["spread_change"]["mean"] == 0 < alone["spread_change"]["before"]
    assert alone["true_error_change"]["mean"] != 0 == alone["true_error_change_from_zero"]["mean"]
    drawn = report["cells"]["study, gripper drawn"]["true_error_change"]["mean"]
    assert drawn not in (0, alone["true_error_change"]["mean"])
    ungated = dataclasses.replace(cfg, cells=("R3",), rival=None, gate=False, runs=str(tmp_path / "ungated"))
    with pytest.raises(
        ValueError, match=r"cells.json holds cells with gate True, not False: give another file as --out"
    ):
        study.main(ungated)
    elsewhere = study.main(dataclasses.replace(ungated, out=str(tmp_path / "ungated.json")))
    assert elsewhere["cells"]["R3"]["gate"] == {}
    assert set(report["base"]) == {"default"} and "extra SFT head" in capfd.readouterr().out
    alike = report["cells"].pop("R3")["outcomes"]  # the file gathers cells, one of before without its outcomes
    del report["cells"]["extra SFT head"]["outcomes"], report["cells"]["extra SFT head"]["against_rival"]
    (tmp_path / "cells.json").write_text(json.dumps(report))
    again = study.main(dataclasses.replace(cfg, cells=("R3",)))
    assert again["cells"]["R3"]["outcomes"] == alike and set(alike) == {"none", "robot:20"}
    assert again["cells"]["extra SFT head"] == report["cells"]["extra SFT head"]
    assert again["cells"]["R3"]["against_rival"]["rival"] == "plateau, x_0 = 0"
    with pytest.raises(ValueError, match="unknown rival among the cells 'extra SFT head'"):
        study.main(dataclasses.replace(cfg, cells=("R3",), rival="extra SFT head"))
    report["base"]["default"]["none"]["rate"] = 0.5
    (tmp_path / "cells.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="cells.json holds cells of another policy 'default'"):
        study.main(dataclasses.replace(cfg, cells=("R3",)))
    with pytest.raises(ValueError, match="unknown rival among the cells 'R1'"):
        study.main(dataclasses.replace(cfg, rival="R1"))
    with pytest.raises(ValueError, match="unknown cell 'none'; there are: R3"):
        study.main(dataclasses.replace(cfg, cells=("none",)))


def test_the_seed_reaches_every_stage(tmp_path, monkeypatch):
    stages = {}
    monkeypatch.setattr(demo, "run_stage", lambda folder, name, script, /, **flags: stages.setdefault(name, flags))
    seconds = {f"{phase}_s": np.array([[0, 60.0], [1, 60.0]]) for phase in ("policy", "world_model", "update")}
    monkeypatch.setattr(demo, "read_log", lambda folder: seconds)
    demo.run_stages(demo.Config(out_dir=str(tmp_path), seed=2))
    assert {name: flags["seed"] for name, flags in stages.items()} == {
        name: 2000 if name == "collect" else 2 for name in stages
    }
    assert len(stages) == 9 and stages["eval_zero"]["noise"] == "zero" and stages["sft_extra"]["max_minutes"] == "6.00"
    assert [name for name, flags in stages.items() if flags.get("split_seed") == 2] == [
        "tokenizer",
        "wm",
        "sft",
        "sft_extra",
    ]
    # no start seed serves two seeds of the demo
    assert collect_demos.PRESETS["tiny"].demos_per_task < demo.DEMOS_PER_SEED


def test_a_stage_that_fails_stops_the_demo(tmp_path):
    with pytest.raises(SystemExit, match=r"\[rft\] ended with status 1; the same command goes on from there"):
        demo.run_stage(tmp_path, "rft", "train_rft.py", preset="smoke", policy=tmp_path / "none", out_dir=tmp_path)
    assert json.loads((tmp_path / "stages.json").read_text())["rft"]["done"] is False


@pytest.mark.slow
def test_study_at_smoke_size(tmp_path, load_benchmark, monkeypatch, capfd):
    study = load_benchmark("rft_study")
    cfg = dataclasses.replace(study.PRESETS["smoke"], out_dir=str(tmp_path / "runs"), out=str(tmp_path / "study.json"))
    cfg = dataclasses.replace(cfg, figure=str(tmp_path / "curves.png"))
    report = study.main(cfg)
    assert json.loads((tmp_path / "study.json").read_text()) == report
    summary, entry = report["summary"]["tabletop_object"], report["runs"]["tabletop_object"]["0"]
    found = summary["none"]
    assert list(found) == ["SFT early", "SFT", "RWR", "RFT R3", "extra SFT head", *REPLAYED]
    assert list(summary["robot:20"]) == list(summary["all"]) == ["SFT", "RFT R3", *REPLAYED]
    assert all(values["all"]["episodes"] == 2 and len(values["runs"]) == 1 for values in found.values())
    assert summary["all"]["RFT R3"]["all"]["episodes"] == 4
    assert "against SFT" in found["RFT R3"] and "against SFT" not in found["SFT"]
    assert report["summary"]["all"] == summary
    assert "gate_policy" in entry["trust_gate"]["RFT R3"] and set(entry["minutes"]) == set(found) - set(REPLAYED)
    assert "change" not in entry["chunks"]["SFT"]["sampled"] and entry["chunks"]["RFT R3"]["zero"]["change"]["mean"]
    outcomes = load_benchmark("outcomes")
    lines = outcomes.markdown(report, "tabletop_object").splitlines()
    assert lines[0] == "| policy | plain starts | difference | seeds | robot:20 | all starts |"
    success, chunks = (lines[: len(found) + 2], lines[len(found) + 3 :])
    assert all(line.count("|") == 7 for line in success) and all(line.count("|") == 7 for line in chunks)
    assert success[5].startswith(f"| + R3 | {100 * found['RFT R3']['all']['rate']:.1f} % [") and "mm" in chunks[-1]
    (gated,) = outcomes.gated_runs(report)
    assert gated[:4] == ("tabletop_object", "0", "RFT R3", entry["trust_gate"]["RFT R3"]["gate"])
    outcomes.draw_gates([gated], tmp_path / "gates.png")
    with Image.open(tmp_path / "gates.png") as image:
        assert image.size == (720, 320)
    curves = dict(entry["curves"])
    assert len(curves.pop("extra_SFT_head")) >= 1
    assert {name: len(rows) for name, rows in curves.items()} == {"RFT_R3": 2, "RWR": 2}
    with Image.open(cfg.figure) as image:
        assert image.size == (960, 320)
    assert [row["step"] for row in curves["RFT_R3"]] == [0, 1] and curves["RFT_R3"][1]["minutes"] > 0
    assert "tabletop_object, starts: none" in capfd.readouterr().out
    with pytest.raises(ValueError, match="extra SFT takes its wall time from a fine-tuning"):
        study.timed_arm(("extra SFT",), "extra SFT")
    long = "RFT divergence, 400 steps", "extra SFT, 400 steps"
    assert study.timed_arm(("RFT R3", *long), long[1]) == long[0]
    with pytest.raises(ValueError, match="extra SFT takes its wall time from a fine-tuning: add one that is as long"):
        study.timed_arm(long, "extra SFT")
    fewer = dataclasses.replace(cfg, arms=("RFT R3",))
    assert study.main(fewer) == report  # nothing is trained again, and what is there stays
    assert "train_" not in capfd.readouterr().out
    with pytest.raises(ValueError, match="unknown arm 'PPO'"):
        study.main(dataclasses.replace(cfg, arms=("PPO",)))
    with pytest.raises(ValueError, match="study.json holds runs with rft_group 3, not 4: give another file as --out"):
        study.main(dataclasses.replace(cfg, rft_group=4))
    older = {**report, "settings": {name: value for name, value in report["settings"].items() if name != "start"}}
    (tmp_path / "older.json").write_text(json.dumps(older))
    older = dataclasses.replace(cfg, out=str(tmp_path / "older.json"))
    assert study.read_report(older, "runs", study.FREE) == report
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json has no runs, it is not of this script: give another file"):
        study.read_report(dataclasses.replace(cfg, out=str(tmp_path / "other.json")), "runs", study.FREE)

    again = dataclasses.replace(fewer, arms=("RFT R3", "extra SFT head"), start="extra SFT head", perturb=("none",))
    with pytest.raises(ValueError, match="holds runs with start None, not extra SFT head: give another file as --out"):
        study.main(again)
    again = dataclasses.replace(again, out=str(tmp_path / "again.json"))
    with pytest.raises(
        FileNotFoundError, match="run tabletop_object, seed 1 without --start and with --arms 'extra SF"
    ):
        study.main(dataclasses.replace(again, seeds=(1,)))
    second = study.main(again)["runs"]["tabletop_object"]["0"]
    assert set(second["outcomes"]["none"]) == {"SFT", "RFT R3", "extra SFT head", *REPLAYED}
    assert second["outcomes"]["none"]["SFT"] == entry["outcomes"]["none"]["extra SFT head"]
    assert second["sft"] != entry["sft"]
    lines = [line for line in capfd.readouterr().out.splitlines() if "--init" in line or "train_rft.py" in line]
    assert all("seed0/extra_SFT_head/model.safetensors" in line for line in lines) and len(lines) == 2
    assert lines[1].index("--seed 100") > lines[1].index("--seed 0")
    assert study.main(cfg) == report  # the first round is as it was

    suite = tmp_path / "runs" / "tabletop_object"
    own = dataclasses.replace(fewer, arms=("RFT R3, on-policy",), out=str(tmp_path / "own.json"))
    gate = study.main(own)["runs"]["tabletop_object"]["0"]["trust_gate"]
    assert set(gate) == {"RFT R3, on-policy"} and gate["RFT R3, on-policy"] != entry["trust_gate"]["RFT R3"]
    kinds = Counter(e.kind for e in load_episodes(suite / "seed0" / "attempts_demos", successes_only=False))
    assert kinds == Counter(e.kind for e in load_episodes(suite / "demos", successes_only=False)) + Counter(policy=2)
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "train_rft.py" in line]
    assert "--world-model" in line and "seed0/attempts/model.safetensors" in line
    study.main(own)
    assert "python " not in capfd.readouterr().out  # attempts and world model are there

    own = dataclasses.replace(fewer, arms=("RFT R3, demonstrations only",), out=str(tmp_path / "experts.json"))
    study.main(own)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("python train_")]
    assert "train_wm.py" in lines[0] and "--experts-only" in lines[0] and len(lines) == 2
    assert "train_rft.py" in lines[1] and f"--world-model {suite / 'demonstrations_only'}" in lines[1]

    gates = load_benchmark("gates")
    places = {"runs": str(tmp_path / "runs"), "out": str(tmp_path / "gates.json")}
    sizes = dataclasses.replace(gates.PRESETS["smoke"], **places)
    found, worlds = gates.main(sizes), ("wm", "demonstrations_only", "attempts")
    names = [f"tabletop_object/seed0/{model}/{reward}" for model in worlds for reward in sizes.rewards]
    assert list(found["runs"]) == names and gates.main(sizes)["runs"] == found["runs"]
    own = [run["gate_policy_true"] for run in found["runs"].values()]
    assert len(set(own)) > 1 and all(-1 <= value <= 1 for value in own)
    assert all(0 <= run["odd_share"] <= 1 and len(run["pull"]) == 6 for run in found["runs"].values())
    assert found["runs"]["tabletop_object/seed0/wm/r1"]["odd_share"] < 0.1  # but for clipped actions
    shown = capfd.readouterr().out
    assert shown.count("attempts/r3: ") == 1 and f"| r3 | tabletop_object | 0 | wm | {own[1]:.2f} ± " in shown
    with pytest.raises(ValueError, match="figures of other sizes than {'starts': 5, 'samples': 3}: give another file"):
        gates.main(dataclasses.replace(sizes, starts=5))
    with pytest.raises(FileNotFoundError, match="no policy at .*seed3/sft.*: run rft_study.py for this suite"):
        gates.main(dataclasses.replace(sizes, seeds=(3,)))

    factors, cells = (load_benchmark(name) for name in ("rft_factors", "factor_cells"))
    monkeypatch.setitem(factors.CELLS, "R3", cells.study("--steps", "1", "--starts", "2", world_model="short"))
    monkeypatch.setitem(factors.WORLD_MODELS, "short", cells.Training(10))
    places = {"demos": suite / "demos", "policies": suite / "seed0", "world_models": suite, "runs": suite / "factors"}
    places = {name: str(path) for name, path in places.items()} | {"out": str(tmp_path / "factors.json")}
    cfg = dataclasses.replace(factors.PRESETS["smoke"], cells=("R3",), **places)
    report = factors.main(cfg)
    (cell,) = report["cells"].values()
    assert report["world_models"]["short"]["step"] == 9 and "val_loss" in report["world_models"]["short"]
    assert (cell["policy"], cell["world_model"]) == ("sft", "short") and "gate_policy" in cell["gate"]
    assert factors.main(cfg)["cells"]["R3"] == cell and capfd.readouterr().out.count("train_wm.py") == 1


def test_cells_with_several_seeds(load_benchmark):
    factors = load_benchmark("rft_factors")
    base = {"sft": {"outcomes": {"none": "10", "robot:20": "00"}}, "early": {}}
    won = {"R3": "1100", "R3, seed 1": "1010", "R1": "1000", "R1, seed 2": "0000", "alone": "1111"}
    cells = {name: {"policy": "sft", "outcomes": {"none": of[:2], "robot:20": of[2:]}} for name, of in won.items()}
    found = factors.repeated(base, cells | {"older": {"policy": "sft"}, "older, seed 1": {"policy": "sft"}})
    assert set(found) == {"R3", "R1"} and found["R3"]["runs"] == [0.25, 0.25] and found["R1"]["runs"] == [0, -0.25]
    gain = found["R3"]["against_base"]  # 0, 0.5, 0.5, 0: a standard deviation of 0.289 over four starts
    assert gain["difference"] == 0.25 and gain["high"] - 0.25 == pytest.approx(1.96 * 0.28868 / 2, rel=1e-4)
    assert set(found["R1"]["against"]) == {"R3"} and found["R1"]["against"]["R3"]["difference"] == -0.375


def test_study_gathers_runs(load_benchmark, capsys):
    study = load_benchmark("rft_study")
    cfg, runs = study.PRESETS["smoke"], {}
    parts = {"minutes": {}, "chunks": {"SFT": 0.1}, "trust_gate": {}, "courses": {}, "curves": {}}
    first = {"sft": "a", "outcomes": {"none": {"SFT": "10", "RWR": "11"}}, **parts}
    study.gather(cfg, runs, "tabletop_object", 0, first)
    again = {"sft": "a", "outcomes": {"none": {"SFT": "10", "RFT R3": "01"}}, **parts, "trust_gate": {"gate": 0.5}}
    study.gather(cfg, runs, "tabletop_object", 0, again)
    kept = runs["tabletop_object"]["0"]
    assert kept["outcomes"] == {"none": {"SFT": "10", "RWR": "11", "RFT R3": "01"}}
    assert kept["trust_gate"] == {"gate": 0.5} and capsys.readouterr().out == ""
    for seed in (10, 2):
        study.gather(cfg, runs, "tabletop_object", seed, first)
    assert list(runs["tabletop_object"]) == ["0", "2", "10"]
    study.gather(cfg, runs, "tabletop_object", 0, {**again, "sft": "b"})  # a later version's file of the same chunks
    assert set(runs["tabletop_object"]["0"]["outcomes"]["none"]) == {"SFT", "RWR", "RFT R3"}
    assert capsys.readouterr().out == ""
    study.gather(cfg, runs, "tabletop_object", 0, {**first, "sft": "c", "chunks": {"SFT": 0.2}})
    assert set(runs["tabletop_object"]["0"]["outcomes"]["none"]) == {"SFT", "RWR"}
    assert "is of another long-trained policy and is replaced" in capsys.readouterr().out


def test_study_reads_logs(load_benchmark, tmp_path):
    logs = load_benchmark("study_logs")
    looked = {"true_error": 0.01, "true_error_mean_action": 0.008, "spread_x": 0.2, "spread_gripper": 0.4}
    rows = {
        "RFT R3": [
            {"step": 0, "gate": 0.4, "policy_s": 10, "world_model_s": 20, "update_s": 30, "minutes": 7, **looked},
            {"step": 1, "policy_s": 20, "world_model_s": 20, "update_s": 20, "minutes": 9},
        ],
        "extra SFT": [{"step": 10, "minutes": 2.5}],
    }
    policies = {}
    for name, lines in rows.items():
        policies[name] = tmp_path / name / "model.safetensors"
        policies[name].parent.mkdir()
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert logs.trust_gates(policies) == {"RFT R3": {"gate": 0.4}}
    assert logs.courses(policies) == {"RFT R3": [{"step": 0, **looked}]}
    assert [logs.minutes_of(tmp_path / name) for name in rows] == [2.0, 2.5]


def test_study_pools_pairs_of_all_runs(load_benchmark):
    outcomes = load_benchmark("outcomes")
    first = {"none": {"SFT": "10", "RWR": "11", "extra SFT": "11"}, "robot:20": {"SFT": "11", "RWR": "10"}}
    second = {"none": {"SFT": "00", "RWR": "01", "extra SFT": "11"}}
    seeds = {"0": {"outcomes": first}, "1": {"outcomes": second}}
    report = outcomes.summarise({"tabletop_object": seeds})
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
    assert report["all"]["all"]["extra SFT"]["all"] == outcomes.rate([True, True])


def test_fates_of_starts(load_benchmark):
    """By what SFT did from the drawn x_0 and from 0; runs that lack either are left out."""
    outcomes = load_benchmark("outcomes")
    run = {"SFT": "0001110", "SFT, x_0 = 0": "1100011", "RWR": "0111001", "SFT, other x_0": "1100011"}
    found = outcomes.fates([run, {"SFT": "1", "RWR": "1"}, {"SFT": "1", "SFT, x_0 = 0": "1", "RFT R3": "1"}])
    assert set(found) == {"RWR", "SFT, other x_0"}  # R3 has no start that SFT lost
    groups = {"lost by the draw": "011", "lost either way": "1", "won by the draw": "10", "won either way": "0"}
    assert found["RWR"] == {
        fate: outcomes.rate([won == "1" for won in groups[name]]) for fate, name in outcomes.FATES.items()
    }
    report = {"runs": {"tabletop_object": {"0": {"outcomes": {"none": run}}}}}
    rows = outcomes.fates_table(report).splitlines()
    assert rows[0] == "| policy | lost by the draw | lost either way | won by the draw | won either way |"
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| + RWR", "| SFT, other x_0"] and " of 3 | " in rows[2]


def test_table_of_all_suites_has_what_more_than_one_has(load_benchmark):
    outcomes = load_benchmark("outcomes")
    played = [{"SFT": "10", "RWR": "11"}, {"SFT": "10", "RFT R3": "11"}, {"SFT": "10", "RWR": "01"}]
    runs = {
        suite: {"0": {"outcomes": {"none": found}, "chunks": {}, "trust_gate": {}, "minutes": {}}}
        for suite, found in zip(("tabletop_goal", "tabletop_long", "tabletop_object"), played)
    }
    report = {"runs": runs, "summary": outcomes.summarise(runs)}
    rows = {suite: outcomes.markdown(report, suite).splitlines()[2:] for suite in report["summary"]}
    assert [row.split(" | ")[0] for row in rows["all"]] == ["| SFT", "| + RWR"]
    assert [row.split(" | ")[0] for row in rows["tabletop_long"]] == ["| SFT", "| + R3"]
