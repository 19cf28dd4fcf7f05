"""The speed benchmarks at smoke size: the compared versions are equal, and a difference is reported."""

import json
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from vlarft.policy import PRESETS as SIZES
from vlarft.policy import VLAPolicy


def test_rollout_against_generate(load_benchmark, transformers, tmp_path, monkeypatch):
    benchmark = load_benchmark("rollout")
    cfg = replace(benchmark.PRESETS["smoke"], out=str(tmp_path / "r.json"), figure=str(tmp_path / "figures" / "r.png"))
    report = benchmark.main(cfg)
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(report))
    exact = {"ours", "generate", "generate static", "generate shared"}
    assert set(report["versions"]) == exact | {"ours, bfloat16", "generate static, bfloat16"}
    assert all(report["versions"][name]["equal_tokens"] == 1 for name in exact)
    assert report["versions"]["ours, bfloat16"]["equal_tokens"] > 0.5  # a near tie sends the rest of a row elsewhere
    assert report["versions"]["ours, bfloat16"]["times_as_long_as_bfloat16"] == 1
    assert report["single"]["equal_tokens"] == 1 and set(report["single"]["seconds"]) == {"ours", "generate static"}
    assert [number for number, _ in report["scaling"]["group"]] == [1, 2, 3] and (tmp_path / "figures/r.png").is_file()
    whole = benchmark.Workload.generate
    monkeypatch.setattr(benchmark.Workload, "generate", lambda self, kind: whole(self, kind).roll(1, 0))
    with pytest.raises(RuntimeError, match="generate and ours agree on"):
        benchmark.main(cfg)


def test_each_point_of_the_scaling_is_called_once_before_it_is_timed(load_benchmark, monkeypatch):
    """On a GPU, the first call captures CUDA graphs."""
    benchmark, called = load_benchmark("rollout"), []
    cfg = replace(benchmark.PRESETS["smoke"], repeats=2)
    monkeypatch.setattr(benchmark, "seconds", lambda call, device: called.append("timed") or call() or 1.0)
    found = benchmark.scaling(cfg, Mock(ours=lambda **size: called.append(size)))
    assert found == {"frames": [(1, 1.0), (2, 1.0)], "group": [(1, 1.0), (2, 1.0), (3, 1.0)]}
    assert called[:10] == [{"frames": 1}, *["timed", {"frames": 1}] * 2, {"frames": 2}, *["timed", {"frames": 2}] * 2]


def test_whole_step_against_the_baselines(load_benchmark, transformers, tmp_path, monkeypatch):
    benchmark = load_benchmark("rft_step")
    cfg = replace(benchmark.PRESETS["smoke"], out=str(tmp_path / "s.json"))
    report = benchmark.main(cfg)
    assert json.loads((tmp_path / "s.json").read_text()) == json.loads(json.dumps(report))
    rows = report["versions"]
    for row in rows.values():
        phases = dict(row["phases"])
        assert phases.pop("total") == pytest.approx(sum(phases.values())) and row["flops"] > 0
    assert rows["as released"]["flops"] > rows["straightforward"]["flops"] > rows["ours"]["flops"]
    # but for frames that differ in one precision and not in the other
    assert rows["ours"]["flops"] == pytest.approx(rows["ours, bfloat16"]["flops"], rel=0.05)
    assert rows["straightforward"]["difference"]["rewards"] < 1e-3
    assert rows["as released"]["difference"]["equal_rewards"] == 1
    assert 0 < rows["ours, bfloat16"]["difference"]["actions"] < 0.1  # the frozen context's rounding
    assert set(report["times_faster"]) == {"ours", "ours, bfloat16"}
    assert set(report["times_faster"]["ours"]) == {"straightforward", "as released", "as released, bfloat16"}
    versions = benchmark.rft_versions
    whole = versions.Workload.straightforward
    wrong = lambda work: whole(work)._replace(reward=torch.zeros(6, 1, 8))  # noqa: E731
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="rewards of ours and of straightforward"):
        patch.setattr(versions.Workload, "straightforward", wrong)
        benchmark.main(replace(cfg, versions=("straightforward",)))
    monkeypatch.setattr(versions, "image_reward", lambda frames, *args, **kwargs: torch.zeros(frames.shape[:3]))
    with pytest.raises(RuntimeError, match="ours and as released agree on 0.000 of the rewards"):
        benchmark.main(replace(cfg, versions=("as released",)))


def test_training_steps_against_straightforward_ones(load_benchmark, transformers, tmp_path, monkeypatch):
    benchmark = load_benchmark("training")
    cfg = replace(benchmark.PRESETS["smoke"], out=str(tmp_path / "t.json"))
    report = benchmark.main(cfg)
    assert json.loads((tmp_path / "t.json").read_text()) == report
    for name in ("tokenizer step", "tokens", "world-model step"):
        row = report[name]
        assert row["times_faster"] == pytest.approx(row["straightforward_s"] / row["ours_s"]) and row["flops"] > 0
    monkeypatch.setattr(benchmark, "_l1", lambda made, true: made.square().sum())
    with pytest.raises(RuntimeError, match="tokenizer step: the versions differ by"):
        benchmark.main(cfg)


def test_pixels_against_straightforward_versions(load_benchmark, tmp_path, monkeypatch):
    benchmark = load_benchmark("pixels")
    cfg = replace(benchmark.PRESETS["smoke"], out=str(tmp_path / "p.json"))
    report = benchmark.main(cfg)
    assert json.loads((tmp_path / "p.json").read_text()) == json.loads(json.dumps(report))
    assert report["decode"]["ours"]["times_as_long"] == report["reward"]["ours"]["times_as_long"] == 1
    assert 0 < report["decode"]["ours, bfloat16"]["largest_difference"] < 0.2
    assert report["decode"]["ours"]["flops"] <= report["decode"]["straightforward"]["flops"]
    assert 0 < report["reward"]["ours"]["share_of_peak"] < 1
    monkeypatch.setattr(benchmark, "ssim_by_convolutions", lambda x, y: torch.zeros(len(x)))
    with pytest.raises(RuntimeError, match="reward: the versions differ by"):
        benchmark.main(cfg)


def test_whole_episodes(load_benchmark, tmp_path):
    benchmark = load_benchmark("episodes")
    report = benchmark.main(replace(benchmark.PRESETS["smoke"], out=str(tmp_path / "e.json")))
    assert json.loads((tmp_path / "e.json").read_text()) == json.loads(json.dumps(report))
    assert set(report["versions"]) == {"anchored", "anew"}  # `before` is of size tiny
    assert all(row["frames_per_second"] > 0 for row in report["versions"].values())
    sizes = benchmark.SIZES["smoke"]
    context = 2 * sizes.transformer.depth * sizes.transformer.width * sizes.tokenizer.num_context_tokens * 4
    assert report["versions"]["anchored"]["bytes"]["context"] == context
    old = benchmark.before(benchmark.SIZES["tiny"])
    assert not old.tokenizer.compose and old.transformer.width == 192


def test_decoding_each_different_frame_once(load_benchmark, rft_config, tmp_path, monkeypatch):
    benchmark = load_benchmark("distinct")
    files = {name: getattr(rft_config, name) for name in ("policy", "world_model", "demos")}
    cfg = replace(benchmark.PRESETS["smoke"], out=str(tmp_path / "d.json"), **files)
    report = benchmark.main(cfg)
    assert json.loads((tmp_path / "d.json").read_text()) == json.loads(json.dumps(report))
    assert set(report["decode"]) == {"greedy, 3 rollouts", "common, 3 rollouts", "sample, 3 rollouts"}
    assert all(0 < row["distinct"] <= 1 for row in report["decode"].values())
    shown = benchmark.decode_all
    monkeypatch.setattr(benchmark, "decode_all", lambda *parts: shown(*parts) + 1)
    with pytest.raises(RuntimeError, match="3 rollouts: decoding each frame once changes pixels by 1"):
        benchmark.main(cfg)


def test_group_norm_in_float32_is_the_one_in_bfloat16():
    from vlarft.nets.frame_networks import GroupNorm

    norm, plain = (kind(4, 16).bfloat16() for kind in (GroupNorm, torch.nn.GroupNorm))
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
    plain.load_state_dict(norm.state_dict())
    for size in (8, 32):  # the way around, and torch's own
        x = torch.randn(3, 16, size, size).bfloat16().contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(norm(x), plain(x), rtol=2e-2, atol=2e-2)
        assert norm(x).dtype == torch.bfloat16


def test_what_each_optimisation_gives(load_benchmark, transformers, tmp_path, monkeypatch):
    benchmark = load_benchmark("undone")
    cfg = replace(benchmark.PRESETS["smoke"], out=str(tmp_path / "u.json"))
    report = benchmark.main(cfg)
    assert json.loads((tmp_path / "u.json").read_text()) == json.loads(json.dumps(report))
    assert [row["equal_tokens"] for row in report["float32"].values()] == [1] * 5
    assert report["float32"]["ours"]["times_as_long"] == report["bfloat16"]["ours"]["times_as_long"] == 1
    before = benchmark.WorldModel.next_logits
    assert before is benchmark.one_pass  # put back
    monkeypatch.setattr(benchmark, "all_logits", lambda *args: before(*args).roll(1, -1))
    with pytest.raises(RuntimeError, match="logits of all tokens and ours agree on"):
        benchmark.main(cfg)


def test_formats_of_training_steps(load_benchmark, demos, tmp_path, monkeypatch):
    """The scripts themselves are run in turns; what is compared is the time between lines of their logs."""
    benchmark = load_benchmark("precision")
    cfg = replace(benchmark.PRESETS["smoke"], demos=str(demos), stages=("SFT",), out=str(tmp_path / "p.json"))
    found = benchmark.main(cfg)
    assert json.loads((tmp_path / "p.json").read_text()) == found and found["auto"] in ("fp32", "bf16")
    seconds = found["SFT"]["seconds"]
    assert list(seconds) == list(benchmark.VERSIONS) and min(seconds.values()) > 0
    spent = {"fp32": iter([3.0, 4.0, 6.0]), "bf16": iter([1.0, 2.0, 1.5])}
    spent |= {"fp32_threads": iter([2.0, 2.0, 2.0]), "bf16_side_by_side": iter([0.5, 0.5, 1.0])}
    name_of = {version: name for name, version in benchmark.VERSIONS.items()}
    monkeypatch.setattr(benchmark, "seconds_per_step", lambda cfg, stage, version: next(spent[name_of[version]]))
    found = benchmark.main(replace(cfg, repeats=3))["SFT"]
    assert found["seconds"] == {"fp32": 4.0, "bf16": 1.5, "fp32_threads": 2.0, "bf16_side_by_side": 0.5}
    assert found["times_faster"]["bf16"] == {"median": 4 / 1.5, "spread": [1.5, 6.0]}
    assert found["times_faster"]["bf16_side_by_side"] == {"median": 4.0, "spread": [2.0, 4.0]}
    with pytest.raises(ValueError, match="--steps 14: give 15 at least"):
        replace(cfg, steps=14)
    with pytest.raises(ValueError, match="--stages DPO: give some of tokenizer, world model, SFT, RFT, RL"):
        replace(cfg, stages=("SFT", "DPO"))


def test_a_failing_stage_says_why(load_benchmark, tmp_path):
    benchmark = load_benchmark("precision")
    cfg = replace(benchmark.PRESETS["smoke"], demos=str(tmp_path / "none"), out=str(tmp_path / "p.json"))
    with pytest.raises(RuntimeError, match=r"train_tokenizer.py failed: .*none"):
        benchmark.main(cfg)


def test_liberos_evaluation_against_a_plain_loop(load_benchmark, tmp_path, monkeypatch):
    benchmark = load_benchmark("libero_evaluation")
    policy = VLAPolicy(SIZES["smoke"])
    policy.normalizer.fit(torch.rand(50, 7) * 2 - 1, torch.rand(50, 8))
    policy.save(tmp_path / "policy.safetensors")
    places = {"policy": str(tmp_path / "policy.safetensors"), "out": str(tmp_path / "e.json")}
    report = benchmark.main(replace(benchmark.PRESETS["smoke"], **places))
    assert json.loads((tmp_path / "e.json").read_text()) == json.loads(json.dumps(report))
    assert report["episodes"] == report["same_outcome"] == report["same_outcome_and_steps"] == 2
    assert set(report["seconds"]) == set(report["minutes_of_500"])
    monkeypatch.setattr(benchmark, "plain_loop", lambda *_: {(0, 0): (True, 3), (0, 1): (False, 180)})
    assert benchmark.main(replace(benchmark.PRESETS["smoke"], **places))["same_outcome"] == 1
