"""benchmarks/scaling.py: its model by hand, and the tables of docs/scaling.md."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from vlarft.tokenizer import PRESETS, FrameTokenizer

SMOKE = PRESETS["smoke"]
ROOT = Path(__file__).parents[1]


def test_prediction_by_hand(load_benchmark):
    scaling = load_benchmark("scaling")
    units = {"shard": (100, 60, 40), "replicate": (100, 0, 20)}
    stage = scaling.Stage(8, units, trained=120, frozen=80, flops=1000.0, activations=(10.0, 5.0))
    cfg = scaling.Config(
        flops=1e3, share=0.5, memory_bandwidth=28.0, node_bandwidth=8.0, network_bandwidth=2.0, latency=0.0
    )
    found = scaling.predict(cfg, stage, 4, 2, "shard")
    # forward and backward: 160 numbers of 2 bytes, 40 of 4; gradients: 120 of 4; three quarters of it come from others
    volume = 0.75 * (2 * (160 * 2 + 40 * 4) + 120 * 4)
    assert found["received_gib"] * 2**30 == pytest.approx(volume)
    assert found["compute_s"] == 2 * 1000 / 500 and found["messages_s"] == pytest.approx(volume / 8)
    assert found["update_s"] == 28 * 120 / 4 / 28
    assert found["step_s_hidden"] == pytest.approx(volume / 8 + 30)
    assert found["step_s_exposed"] == pytest.approx(volume / 8 + 30 + 4)
    assert found["weights_gib"] * 2**30 == 4 * 200 / 4 and found["training_gib"] * 2**30 == 12 * 120 / 4
    assert found["activations_gib"] * 2**30 == 10 + 2 * 5 + 200
    whole = scaling.predict(cfg, stage, 16, 2, "replicate")
    assert whole["weights_gib"] * 2**30 == 4 * (120 / 16 + 80)
    assert whole["messages_s"] == pytest.approx(15 / 16 * (2 * (100 * 2 + 20 * 4) + 120 * 4) / 2)
    assert [scaling.predict(cfg, stage, 1, 8, "shard")[k] for k in ("messages_s", "gpus", "batch")] == [0, 1, 8]
    assert list(scaling.batches(stage, 8)) == [("same batch", 1), ("batch grows", 8)]
    assert list(scaling.batches(stage, 16)) == [("batch grows", 8)]


def test_counts_of_small_models(load_benchmark, tmp_path):
    scaling = load_benchmark("scaling")
    cfg = scaling.PRESETS["smoke"]
    report = scaling.main(type(cfg)(presets=("smoke",), out=str(tmp_path / "scaling.json")))
    assert json.loads((tmp_path / "scaling.json").read_text())["stages"].keys() == report["stages"].keys()
    tokenizer, sft = (report["stages"][f"smoke, {name}"] for name in ("tokenizer", "sft"))
    size = sum(p.numel() for p in FrameTokenizer(SMOKE).parameters())
    assert tokenizer["trained"] == sum(tokenizer["units"]["shard"]) == size
    assert tokenizer["frozen"] == 0 < tokenizer["activations"][1] and list(tokenizer["units"]) == ["shard"]
    # adapters: the frozen rest is in the units, or it is not
    assert sum(sft["units"]["shard"]) == sft["trained"] + sft["frozen"]
    assert sum(sft["units"]["replicate"]) == sft["trained"] < sft["frozen"]
    assert sft["flops"] > 0


def test_flops_by_hand(load_benchmark):
    scaling = load_benchmark("scaling")
    with scaling.without_data():
        linear, x = nn.Linear(3, 5), torch.rand(7, 3)
        assert scaling.count_flops(lambda: linear(x), backward=False) == 2 * 7 * 3 * 5
        assert scaling.count_flops(lambda: linear(x).sum()) == 2 * 2 * 7 * 3 * 5  # the input needs no gradient


def test_the_document_shows_the_results(load_benchmark):
    scaling = load_benchmark("scaling")
    text = (ROOT / "docs" / "scaling.md").read_text()
    stages = json.loads((ROOT / "results" / "scaling.json").read_text())["stages"]
    assert [name for name in stages if scaling.show(name, stages[name]) not in text] == [] != stages
    paper = {name.removeprefix("paper, "): s for name, s in stages.items() if name.startswith("paper")}
    assert paper["tokenizer"]["trained"] == paper["world model"]["frozen"] == 128_792_656
    assert paper["world model"]["trained"] == 127_101_696
    assert 16 * paper["rft"]["flops"] == pytest.approx(1160e12, rel=0.02)  # the least that a step must do, by hand


def test_batches_are_those_of_the_scripts(load_benchmark):
    import train_rft
    import train_sft
    import train_tokenizer
    import train_wm

    stages = json.loads((ROOT / "results" / "scaling.json").read_text())["stages"]
    for preset in ("paper", "small"):
        batches = [s["batch"] for name, s in stages.items() if name.startswith(preset)]
        scripts = (train_tokenizer, train_wm, train_sft)
        expected = [module.PRESETS[preset].batch_size for module in scripts]
        assert batches == [*expected, train_rft.PRESETS[preset].starts]
    sft = {name: train_sft.PRESETS[name] for name in ("paper", "small")}
    assert [(c.noise_samples, c.lora_rank) for c in sft.values()] == [(1, 64), (4, None)]
