"""demo.py at smoke size: every stage script by its command, the pictures, a second call, and uses of its results."""

import dataclasses
import html
import json
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, get_type_hints

import demos
import numpy as np
import pytest
import stage_tables
import torch
from PIL import Image
from test_readme import blocks

import collect_demos
import demo
import rl_rounds
import train_sft
from vlarft.report.page import write_report
from vlarft.report.runs import KINDS
from vlarft.run.config import parse

ROOT = Path(__file__).parents[1]
CURVES = {kind.script: list(kind.curves) for kind in KINDS}  # that the report shows, by their titles


class Demo(NamedTuple):
    folder: Path  # in which it ran, with its results in runs/demo
    printed: str


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Demo:
    """The demo at smoke size, by its command."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "demo.py"), "--preset", "smoke", "--out-dir", "runs/demo"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return Demo(folder, result.stdout)


@pytest.mark.slow
def test_whole_pipeline(smoke, capfd, monkeypatch):
    out = smoke.folder / "runs" / "demo"
    summary = json.loads((out / "summary.json").read_text())
    names = {"collect", "sft", "tokenizer", "rl", "wm", "rft", "sft_extra", "eval_wm", "eval", "eval_zero"}
    assert set(summary["stages"]) == names
    assert all(s["done"] and s["peak_bytes"] > 2**27 for s in summary["stages"].values())
    rows = summary["evaluation"]
    policies = "SFT", "+ extra SFT", "+ RFT", "+ RL, simulator"
    assert list(rows) == [name + how for name in policies for how in ("", ", x_0 = 0")]
    assert [len(row["outcomes"]) for row in rows.values()] == [2] * 8
    assert {name for name, row in rows.items() if "against_first" not in row} == {"SFT"}
    assert {name for name, row in rows.items() if "against_zero" not in row} == {"SFT", "SFT, x_0 = 0"}
    assert summary["versions"]["torch"] == version("torch") and {"python", "mujoco"} < set(summary["versions"])
    for name in ("demonstrations.png", "curves.png", "before_after.gif", "wm/rollouts.png"):
        with Image.open(out / name) as image:
            assert min(image.size) >= 64, name
    page = (out / "report.html").read_text()
    titles = ["Pipeline: demo", "World model, evaluated: eval_wm", *CURVES["eval_wm.py"], *CURVES["train_rl.py"]]
    titles += [title for name in ("tokenizer", "wm", "sft", "rft") for title in CURVES[f"train_{name}.py"]]
    assert not [title for title in titles if html.escape(title) not in page], "a metric has another name in the log"
    # before and after; two of the world model; the starts that an evaluation filmed
    assert page.count('class="film"') == 3 + 2
    assert (out / "summary.md").read_text() in smoke.printed
    assert "[sft] python train_sft.py --preset smoke --seed 0 --split-seed 0 --demos" in smoke.printed
    assert "+ RFT" in smoke.printed and "SFT, x_0 = 0" in smoke.printed and "its numbers mean nothing" in smoke.printed

    before = json.loads((out / "stages.json").read_text())
    monkeypatch.chdir(smoke.folder)
    demo.main(dataclasses.replace(demo.PRESETS["smoke"], out_dir="runs/demo"))  # nothing is done again
    assert json.loads((out / "stages.json").read_text()) == before
    assert "[eval] done in" in capfd.readouterr().out


@pytest.mark.slow
def test_seeds_of_the_demo_are_gathered(smoke, tmp_path, monkeypatch, capfd):
    called = []

    def call(*words):
        called.append([str(word) for word in words])
        shutil.copytree(smoke.folder / "runs" / "demo", words[-1])

    monkeypatch.setattr(demos, "call", call)
    places = {"out_dir": str(tmp_path / "runs"), "out": str(tmp_path / "demos.json")}
    cfg = dataclasses.replace(demos.PRESETS["smoke"], **places, seeds=(3, 5))
    report = demos.main(cfg)
    assert [words[: words.index("--out-dir")][-2:] for words in called] == [["--seed", "3"], ["--seed", "5"]]
    assert json.loads((tmp_path / "demos.json").read_text()) == report and demos.main(cfg) == report
    assert len(called) == 2  # none runs again
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="holds demos with .*: give another file"):
        patch.setitem(demo.SIZES, "smoke", {"rl": {"steps": 3}})
        demos.main(cfg)
    run = report["runs"]["5"]
    assert set(run["seconds"]) == set(json.loads((smoke.folder / "runs" / "demo" / "stages.json").read_text()))
    assert run["outcomes"]["SFT"] in ("00", "01", "10", "11") and run["frames"]["copy"]["ssim"] <= 1
    assert "| + RL, simulator | " in capfd.readouterr().out
    assert "| SSIM | " in stage_tables.demo_world_model_table(report)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["RFT", "RL"])
def test_steps_of_fine_tuning_are_timed(smoke, load_benchmark, stage):
    """What benchmarks/precision.py needs of a trained policy; the stages that need none are tested beside it."""
    benchmark, out = load_benchmark("precision"), smoke.folder / "runs" / "demo"
    places = {"demos": out / "demos", "world_model": out / "wm", "policy": out / "sft"}
    cfg = dataclasses.replace(benchmark.PRESETS["smoke"], **{name: str(path) for name, path in places.items()})
    assert 0 < benchmark.seconds_per_step(cfg, stage, benchmark.VERSIONS["bf16"]) < 60
    with pytest.raises(ValueError, match="--fine-tuning-steps 2: give 3 at least"):
        dataclasses.replace(cfg, fine_tuning_steps=2)


def test_the_committed_demos_are_of_this_demo():
    report = json.loads((demo.ROOT / "results" / "demo.json").read_text())
    assert report["sizes"] == demo.SIZES["tiny"]
    places = {"out_dir", "demos", "policy", "policies", "init", "tokenizer", "world_model"}
    varies = places | {"preset", "seed", "split_seed", "workers"}
    fixed = {
        stage.name: {
            k: v for k, v in stage.flags.items() if k not in varies | report["sizes"].get(stage.name, {}).keys()
        }
        for stage in demo.stages(demo.Config())
    }
    play = {"batch_size": 50}
    assert {name: flags for name, flags in fixed.items() if flags} == {
        "rl": {"world": "simulator"},
        "rft": {"gate_threshold": "none"},
        "sft_extra": {"lr": pytest.approx(train_sft.PRESETS["tiny"].lr / 10)},
        "eval_wm": {"true_error": True},
        "eval": play,
        "eval_zero": {**play, "noise": "zero", "animate": 2, "animate_failed": 1},
    }


def test_the_gains_of_the_demos_by_hand():
    one = {"SFT": "01", "+ RFT": "11", "+ RL, simulator": "11"}
    other = {**one, "+ RFT": "00", "+ RL, simulator": "01"}
    one, other = (run | {f"{name}, x_0 = 0": "11" for name in run} for run in (one, other))
    text = stage_tables.demo_table({"runs": {"0": {"outcomes": one}, "1": {"outcomes": other}}})
    cells = {row.split(" | ")[0][2:]: row.rstrip(" |").split(" | ")[1:] for row in text.splitlines()[2:]}
    assert list(cells) == [
        "SFT",
        "+ RFT",
        "+ RFT from a sampled x_0, against SFT from x_0 = 0",
        "+ RL, simulator",
    ]
    assert cells["SFT"] == ["50.0 % [50.0, 50.0]: 50.0, 50.0", "100.0 % [100.0, 100.0]: 100.0, 100.0"]
    assert cells["+ RFT"][0] == "+0.0 [-635.5, +635.5]: +50.0, -50.0"  # 12.71 * 50
    assert cells["+ RFT from a sampled x_0, against SFT from x_0 = 0"][0].endswith("]: +0.0, -100.0")
    assert cells["+ RL, simulator"][0].endswith("]: +50.0, +0.0")
    better = {**one, "+ RFT": "11", "SFT": "00"}
    assert "| **+100.0 [+100.0, +100.0]**: +100.0, +100.0 |" in stage_tables.demo_table(
        {"runs": {"0": {"outcomes": better}, "1": {"outcomes": better}}}
    )
    alone = stage_tables.demo_table({"runs": {"0": {"outcomes": one}}})
    assert "| SFT | 50.0 % [9.5, 90.5] | 100.0 % [34.2, 100.0] |" in alone  # over its two starts


@pytest.mark.slow
def test_rounds_go_on_from_the_demo(smoke, tmp_path, capfd, monkeypatch):
    """One round of recording, refresh, judge, closed-loop learning and evaluation; a second call does nothing, and one
    that goes on after an interruption ends in the same bits.
    """
    out = smoke.folder / "runs" / "demo"
    places = {"policy": str(out / "sft"), "world_model": str(out / "wm"), "demos": (str(out / "demos"),)}
    cfg = dataclasses.replace(rl_rounds.PRESETS["smoke"], **places, out_dir=str(tmp_path))
    rows = rl_rounds.main(cfg)
    assert len(rows) == 2 and "against_first" in rows[1]
    stages = json.loads((tmp_path / "stages.json").read_text())
    assert list(stages) == ["own 1", "wm 1", "success 1", "rl 1", "eval 1"] and all(s["done"] for s in stages.values())
    assert "gain" in capfd.readouterr().out
    with monkeypatch.context() as patch:  # the gate may be another: what has ended is not asked again
        patch.setattr(rl_rounds, "run_stage", lambda *_, **__: pytest.fail("a stage of a round that ended"))
        assert rl_rounds.main(dataclasses.replace(cfg, gate_threshold=0.5)) == rows
    write_report([tmp_path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not [title for title in CURVES["train_success.py"] if title not in page]

    parts, run = dataclasses.replace(cfg, out_dir=str(tmp_path / "parts")), rl_rounds.run_stage

    def stops(folder, name, *rest, **flags):
        if name == "success 1":
            raise KeyboardInterrupt
        return run(folder, name, *rest, **flags)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rl_rounds, "run_stage", stops)
        rl_rounds.main(parts)
    monkeypatch.chdir(tmp_path)  # the same folders in other words
    rl_rounds.main(dataclasses.replace(parts, policy=f"{cfg.policy}/model.safetensors", out_dir="parts"))
    assert "[wm 1] done in" in capfd.readouterr().out
    for name in ("wm_1", "success_1", "rl_1"):
        one, other = (tmp_path / where / name / "train_state.pt" for where in ("", "parts"))
        one, other = (torch.load(path, weights_only=True) for path in (one, other))
        one.pop("minutes"), other.pop("minutes")
        assert same_values(one, other), name


def same_values(one, other) -> bool:
    """Whether two states hold the same bits."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_values(value, other[name]) for name, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_values, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_rounds_check_their_inputs_before_anything_is_recorded(tmp_path, monkeypatch):
    cfg = rl_rounds.Config(policy="sft", world_model="wm", demos=("demos",), out_dir=str(tmp_path))
    episodes = [SimpleNamespace(name=f"demo_{i}", images=np.zeros((2, 64, 64, 3), np.uint8)) for i in range(2)]
    monkeypatch.setattr(rl_rounds, "load_episodes", lambda *_, **__: episodes)
    sizes = {"tokenizer": {"image_size": (64, 64)}, "proprio_dim": 8}
    held_out = {"held_out_episodes": ["demo_1"]}
    extra = {"sft": {"image_size": [64, 64]}, "wm": held_out}
    monkeypatch.setattr(rl_rounds, "read_header", lambda path: SimpleNamespace(config=sizes, extra=extra[path]))
    assert rl_rounds.check_inputs(cfg) == 64
    extra["sft"] = {}  # an older one does not say
    assert rl_rounds.check_inputs(cfg) == 64
    for name, value, message in (
        ("cameras", ("agentview", "eye_in_hand"), "policy sft sees 2 cameras"),
        ("proprio_dim", 0, "world model wm does not predict the robot's proprio"),
    ):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
            patch.setitem(sizes, name, value)
            rl_rounds.main(cfg)
    extra["wm"] = {}
    with pytest.raises(ValueError, match="world model wm names no held-out episodes"):
        rl_rounds.main(cfg)
    extra["wm"] = {"held_out_episodes": ["demo_1", "demo_7"]}
    with pytest.raises(ValueError, match="--demos demos lacks 1 episodes that wm holds out, first demo_7"):
        rl_rounds.main(cfg)
    extra["sft"] = {"image_size": [128, 128]}
    with pytest.raises(ValueError, match="sft was trained on images of 128x128, the world model on 64x64"):
        rl_rounds.main(cfg)
    sizes["tokenizer"]["image_size"] = (128, 128)
    with pytest.raises(ValueError, match="world model wm takes images of 128x128, demo_0 has 64x64"):
        rl_rounds.main(cfg)
    assert not list(tmp_path.iterdir())


def test_a_round_goes_on_from_the_one_before(tmp_path, monkeypatch):
    stages = {}
    (tmp_path / "eval_1").mkdir()
    (tmp_path / "eval_2").mkdir()
    rate = {"all": {"rate": 0.5, "low": 0.4, "high": 0.6}}
    for number in (1, 2):
        rows = [rate, {**rate, "against_first": {"difference": 0.1 * number, "low": 0.0, "high": 0.3}}]
        (tmp_path / f"eval_{number}" / "results.json").write_text(json.dumps({"policies": rows}))
    monkeypatch.setattr(rl_rounds, "run_stage", lambda folder, name, script, /, **flags: stages.update({name: flags}))
    with pytest.raises(FileNotFoundError, match="demos"):  # before anything is recorded
        rl_rounds.main(rl_rounds.Config(demos=(str(tmp_path / "demos"),), out_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="--rounds 40 of --episodes 32: give 1000 at most together"):
        rl_rounds.Config(rounds=40)
    assert not stages
    monkeypatch.setattr(rl_rounds, "check_inputs", lambda cfg: 48)
    rows = rl_rounds.main(rl_rounds.Config(policy="sft", world_model="wm", demos=("demos",), out_dir=str(tmp_path)))
    assert [row.get("against_first", {}).get("difference") for row in rows] == [None, 0.1, 0.2]
    assert [stages[f"own {n}"]["policy_per_task"] for n in (1, 2)] == [32, 64]
    assert {stages[name]["image_size"] for name in ("own 1", "own 2", "eval 2")} == {48}
    other = rl_rounds.Config(policy="sft", world_model="wm", demos=("demos",), out_dir=str(tmp_path / "other"), seed=1)
    first = stages["own 1"]["seed"]
    shutil.copytree(tmp_path / "eval_1", tmp_path / "other" / "eval_1")
    rl_rounds.main(dataclasses.replace(other, rounds=1))
    assert stages["own 1"]["seed"] >= first + 512  # other starts than any of seed 0
    rl_rounds.main(rl_rounds.Config(policy="sft", world_model="wm", demos=("demos",), out_dir=str(tmp_path)))
    assert [str(stages[f"own {n}"]["policy"]) for n in (1, 2)] == ["sft", str(tmp_path / "rl_1")]
    assert [str(stages[f"wm {n}"]["init"]) for n in (1, 2)] == ["wm", str(tmp_path / "wm_1")]
    assert stages["rl 2"]["world_model"] == stages["success 2"]["world_model"] == tmp_path / "wm_2"
    assert stages["rl 2"]["success_model"] == tmp_path / "success_2" and stages["rl 2"]["gate_threshold"] == 0.9
    assert stages["eval 2"]["policies"] == [Path("sft"), tmp_path / "rl_2"]


@pytest.mark.slow
def test_blocks_of_the_readme_run(smoke):
    """In order, on the results of the demo, at smoke size: another preset, and nothing else."""
    readme = (ROOT / "README.md").read_text()
    lines = [line.split("#")[0] for block in blocks(readme, "bash") for line in block.splitlines()]
    ran = []
    for words in filter(None, map(shlex.split, lines)):
        if words[0] in ("make", "source"):  # setting up is what CI does
            continue
        assert words[0] == "python"
        words = ["smoke" if word == "tiny" else word for word in words[1:]]
        script = words[:2] if words[0] == "-m" else [str(ROOT / words[0])]
        command = [sys.executable, *script, *words[len(script) :]]
        result = subprocess.run(command, cwd=smoke.folder, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{' '.join(words)}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
        ran.append(words[0])
    assert ran == ["eval_libero.py", "train_rft.py", "eval_libero.py", "-m"]

    names = {
        "image": np.zeros((64, 64, 3), np.uint8),
        "proprio": np.zeros(8, np.float32),
        "frames": torch.rand(1, 3, 64, 64),
        "chunks": torch.zeros(1, 2, 8, 7),
        "states": torch.zeros(1, 8),
    }
    for block in blocks(readme, "python"):
        exec(block.replace('"runs/', f'"{smoke.folder}/runs/'), names)
    assert names["chunk"].shape == (8, 7) and names["rollout"].frames.shape == (1, 2, 8, 3, 64, 64)


def test_the_seed_reaches_every_stage():
    stages = {stage.name: stage.flags for stage in demo.stages(demo.Config("x", 2))}
    assert {name: flags["seed"] for name, flags in stages.items()} == {
        name: 2000 if name == "collect" else 2 for name in stages
    }
    assert len(stages) == 10 and [n for n, flags in stages.items() if flags.get("noise")] == ["eval_zero"]
    split = {name for name, flags in stages.items() if flags.get("split_seed") == 2}
    assert split == {"tokenizer", "wm", "sft", "sft_extra"}


def test_two_seeds_of_the_demo_share_no_demonstration():
    """But noisy attempts of one start where demonstrations of the seed 10 higher do."""
    (collect, *_) = demo.stages(demo.Config())
    assert collect.flags["demos_per_task"] < demo.DEMOS_PER_SEED
    assert collect_demos.FIRST_NOISY == 10 * demo.DEMOS_PER_SEED


def test_every_seed_of_the_demo_is_one_that_demonstrations_can_have(capsys):
    seeds = get_type_hints(collect_demos.Config, include_extras=True)["seed"].__metadata__[0]
    assert seeds.high // demo.DEMOS_PER_SEED == demo.MOST_SEED
    assert parse(demo.Config, demo.PRESETS, ["--seed", "970"]).seed == 970
    with pytest.raises(SystemExit):
        parse(demo.Config, demo.PRESETS, ["--seed", "971"])
    assert "argument --seed: 971: give a number in [0, 970]" in capsys.readouterr().err


def test_the_table_is_aligned_and_says_what_costs_nothing():
    rate = {"rate": 0.5, "low": 0.25, "high": 0.75, "episodes": 4}
    found = {"difference": 0.1, "low": -0.2, "high": 0.3}
    rows = {"SFT": {"all": rate}, "+ RFT": {"all": rate, "against_first": found, "against_zero": found}}
    text = demo.success_table(rows)
    assert text.splitlines() == [
        "| policy | success, 95 % interval | against SFT, same starts | against SFT from x_0 = 0 |",
        "| -------|------------------------|--------------------------|------------------------- |",
        "| SFT    | 50.0 % [25.0, 75.0]    |                          |                          |",
        "| + RFT  | 50.0 % [25.0, 75.0]    | +10.0 [-20.0, +30.0]     | +10.0 [-20.0, +30.0]     |",
        "",
        "RFT is not ahead of the SFT policy from x_0 = 0, which costs no training: +10.0 [-20.0, +30.0] points.",
    ]
    rows["+ RFT"]["against_zero"] = {**found, "low": 0.01}
    assert demo.success_table(rows).splitlines()[-1].startswith("RFT is ahead of the SFT policy from x_0 = 0")


def evaluated(folder: Path, **outcomes: str) -> None:
    """An evaluation of some policies, with their outcomes start by start, as eval_libero.py leaves it."""
    folder.mkdir()
    results = [{"policy": policy, "all": won.count("1")} for policy, won in outcomes.items()]
    (folder / "results.json").write_text(json.dumps({"policies": results}))
    starts = [(policy, state, won == "1") for policy, all in outcomes.items() for state, won in enumerate(all)]
    records = [
        {"policy": policy, "suite": "s", "task": 0, "init_state": state, "success": won}
        for policy, state, won in reversed(starts)
    ]
    (folder / "episodes.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))


def test_rows_compare_on_the_same_starts(tmp_path):
    evaluated(tmp_path / "eval", sft="0100", extra="0101", rft="1000", rl="1101")
    evaluated(tmp_path / "eval_zero", sft="1110", extra="0111", rft="1111", rl="0011")
    rows = demo.success_rows(tmp_path)
    assert list(rows)[-2:] == ["+ RL, simulator", "+ RL, simulator, x_0 = 0"] and rows["+ RFT"]["all"] == 1
    assert rows["+ RFT, x_0 = 0"]["outcomes"] == "1111" and rows["+ extra SFT, x_0 = 0"]["policy"] == "extra"
    gains = {
        name: [row.get(f"against_{b}", {}).get("difference") for b in ("first", "zero")] for name, row in rows.items()
    }
    assert gains["SFT"] == [None, None] and gains["SFT, x_0 = 0"] == [0.5, None]
    assert gains["+ RFT"] == [0.0, -0.5] and gains["+ RFT, x_0 = 0"] == [0.75, 0.25]
    assert gains["+ RL, simulator, x_0 = 0"] == [0.25, -0.25] and gains["+ RL, simulator"] == [0.5, 0.0]


def test_films_show_the_first_starts_that_differ():
    wins = {0: (True, True), 1: (True, False), 2: (False, True), 3: (False, True)}
    before, after = ({("s", 0, k): {"success": won[i]} for k, won in reversed(wins.items())} for i in range(2))
    found = demo.first_differences(before, after, ("A", "B"))
    assert found == {"B alone wins": ("s", 0, 2), "A alone wins": ("s", 0, 1)}
    assert demo.first_differences(after, after, ("A", "B")) == {"A and B alike": ("s", 0, 0)}


def test_what_the_demo_expects_to_take(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    assert demo.expected_seconds(demo.Config(), 0.4) == {}  # nothing is known
    runs = {str(pace): {"probe_seconds": 0.1 * pace, "seconds": {"sft": 100.0 + pace}} for pace in (4, 1, 2)}
    (tmp_path / "results" / "demo.json").write_text(json.dumps({"runs": runs}))
    assert demo.expected_seconds(demo.PRESETS["smoke"], 0.4) == {}
    assert demo.expected_seconds(demo.Config(), 0.4) == {"sft": pytest.approx(202)}  # sqrt(4) times 101
