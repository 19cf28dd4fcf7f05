"""The policy: presets, images as given, act, the training loss, checkpoints, the sigma net from SFT to RFT."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from vlarft.flow import chain_log_prob, sample_chain
from vlarft.policy import PRESETS, PolicyConfig, VLAPolicy, center_crop

CFG = PRESETS["smoke"]
TEXTS = ["pick up the red block", "push the plate"]


def make(cfg: PolicyConfig = CFG, fitted: bool = True) -> VLAPolicy:
    torch.manual_seed(0)
    policy = VLAPolicy(cfg).eval()
    torch.nn.init.normal_(policy.head.output.weight, std=0.3)
    if fitted:
        generator = torch.Generator().manual_seed(0)
        actions = torch.rand(200, 7, generator=generator) * 2 - 1
        policy.normalizer.fit(actions * 0.5, torch.randn(200, 8, generator=generator) * 0.1)
    return policy


def observations(batch: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (batch, 64, 64, 3), dtype=np.uint8), rng.normal(size=(batch, 8)).astype(
        np.float32
    ) * 0.1


def loss_inputs(policy: VLAPolicy) -> tuple:
    images, proprio = observations()
    generator = torch.Generator().manual_seed(1)
    actions, key = torch.rand(2, 8, 7, generator=generator) - 0.5, torch.randn(2, 3, generator=generator) * 0.1
    return policy.preprocess(images), TEXTS, torch.from_numpy(proprio), actions, key


def test_act_gives_raw_actions():
    policy = make()
    images, proprio = observations()
    actions = policy.act(images, TEXTS, proprio, generator=torch.Generator().manual_seed(0))
    assert actions.shape == (2, 8, 7) and actions.dtype == torch.float32
    assert actions[..., :6].abs().max() <= 0.5 and set(actions[..., 6].flatten().tolist()) <= {-1.0, 1.0}
    again = policy.act(images, TEXTS, proprio, noise=torch.randn(2, 8, 7, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(actions, again)
    with_camera_axis = policy.act(
        images[:, None], TEXTS, proprio, generator=torch.Generator().manual_seed(0), num_steps=10
    )
    assert torch.equal(actions, with_camera_axis)
    other = policy.act(images, TEXTS, proprio, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(actions, other)


def test_a_row_does_not_depend_on_the_batch():
    policy = make()
    images, proprio = observations()
    noise = torch.randn(2, 8, 7, generator=torch.Generator().manual_seed(0))
    both = policy.act(images, TEXTS, proprio, noise=noise)
    alone = policy.act(images[1:], TEXTS[1:], proprio[1:], noise=noise[1:])
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)


def test_preprocess():
    policy = make()
    images, _ = observations()
    out = policy.preprocess(images)
    assert out.shape == (2, 1, 3, 64, 64)
    assert torch.equal(out[1, 0, 2], torch.from_numpy(images[1, :, :, 2]).float() / 255)
    assert torch.equal(out, policy.preprocess(out)) and torch.equal(out, policy.preprocess(out[:, 0]))
    big = np.full((1, 128, 96, 3), 51, np.uint8)
    torch.testing.assert_close(policy.preprocess(big), torch.full((1, 1, 3, 64, 64), 0.2))
    # the resize is Pillow's, to one of 255 levels, also where bicubic weights leave the range
    pillow = pytest.importorskip("PIL.Image")
    noise = np.random.default_rng(1).integers(0, 2, (256, 256, 3), dtype=np.uint8) * 255
    # (of images that are not square, Pillow 13 turns the order of the two passes round where that is cheaper, which
    # shows where the first pass clips)
    for image in (noise, noise[:150, :150], noise[:40, :40], 90 + noise[:150, :90] // 4):
        expected = np.asarray(pillow.fromarray(image).resize((64, 64), resample=pillow.BICUBIC))
        actual = policy.preprocess(image[None])[0, 0].permute(1, 2, 0).numpy() * 255
        assert np.abs(actual - expected).max() <= 1.001


def test_an_observation_as_a_simulator_gives_it():
    policy = make()
    images, proprio = observations()
    noise = torch.randn(2, 8, 7, generator=torch.Generator().manual_seed(0))
    batch = [
        {"agentview": image, "proprio": row, "instruction": text, "wrist": None}
        for image, row, text in zip(images, proprio, TEXTS, strict=True)
    ]
    expected = policy.act(images, TEXTS, proprio, noise=noise)
    assert torch.equal(policy.act(batch, noise=noise), expected)
    torch.testing.assert_close(policy.act(batch[1], noise=noise[1]), expected[1], atol=1e-5, rtol=1e-5)
    turned = policy.act({**batch[1], "agentview": images[1, ::-1, ::-1].copy()[::-1, ::-1]}, noise=noise[1])
    torch.testing.assert_close(turned, expected[1], atol=1e-5, rtol=1e-5)
    # cameras of any resolution, in the configured order; tensors as well as arrays
    two = make(replace(CFG, cameras=("agentview", "wrist"), vlm=replace(CFG.vlm, num_cameras=2)))
    small = np.full((30, 50, 3), 200, np.uint8)
    pair = {**batch[0], "wrist": small}, {**batch[1], "wrist": torch.from_numpy(images[0])}
    inputs = two.observe(pair)
    assert inputs.images.shape == (2, 2, 3, 64, 64) and inputs.instructions == TEXTS
    assert torch.equal(inputs.images[0, 1], two.preprocess(small[None])[0, 0])
    assert torch.equal(inputs.images[:, 0], two.preprocess(images)[:, 0])
    assert two.act(pair[0]).shape == (8, 7)


def test_observations_that_are_refused():
    policy = make()
    images, proprio = observations()
    good = {"agentview": images[0], "proprio": proprio[0], "instruction": "push the plate"}

    def refuse(message: str, **changes: object) -> None:
        with pytest.raises(ValueError, match=message):
            policy.act({k: v for k, v in {**good, **changes}.items() if v is not None})

    refuse(
        r"no agentview among proprio, instruction, wrist; .* each of its cameras \(agentview\)", agentview=None, wrist=1
    )
    refuse("no proprio among", proprio=None)
    refuse(r"agentview is float32 \(64, 64, 3\), expected uint8 \(H, W, 3\)", agentview=images[0].astype(np.float32))
    refuse(r"agentview is uint8 \(3, 64, 64\), expected", agentview=images[0].transpose(2, 0, 1))
    refuse(r"agentview is uint8 \(0, 64, 3\), expected", agentview=images[0, :0])
    refuse(r"agentview is <class 'list'> \(1, 1, 3\), expected", agentview=[[[0, 0, 0]]])
    refuse("instruction is 3, expected a string", instruction=3)
    refuse("instruction '' is empty", instruction="")
    refuse(r"has 302 bytes .* the limit \(max_text_bytes\) is 256", instruction="x" * 300)
    refuse("proprio has NaN", proprio=proprio[0] * np.nan)
    refuse(r"proprio has shape \(7,\), expected \(8,\), raw: another robot's", proprio=proprio[0, :7])
    with pytest.raises(ValueError, match="act: no observation"):
        policy.act([])
    with pytest.raises(ValueError, match="images come with instructions and proprio"):
        policy.act(images)
    with pytest.raises(ValueError, match=r"cameras \('agentview', 'wrist'\) must name as many as vlm.num_cameras, 1"):
        VLAPolicy(replace(CFG, cameras=("agentview", "wrist")))


def test_center_crop():
    x = torch.arange(100.0).view(10, 10)
    assert center_crop(x, 0.64).tolist() == x[1:9, 1:9].tolist()
    assert torch.equal(center_crop(x, 1.0), x)
    cropped = make(replace(CFG, crop_area=0.64))
    images, _ = observations()
    assert not torch.equal(cropped.preprocess(images), make().preprocess(images))
    assert torch.equal(cropped.preprocess(images, crop=False), make().preprocess(images))


def test_loss_reaches_every_parameter():
    policy = make().train()
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    loss, metrics = policy(*loss_inputs(policy), generator=torch.Generator().manual_seed(0), draws=2, key_weight=3.0)
    assert set(metrics) == {"flow_mse", "key_loss"}
    assert loss.item() == pytest.approx((metrics["flow_mse"] + 3 * metrics["key_loss"]).item(), rel=1e-6)
    loss.backward()
    assert [k for k, p in policy.named_parameters() if p.grad is None or not p.grad.any()] == []
    without, metrics = policy(*loss_inputs(policy), generator=torch.Generator().manual_seed(0), draws=2)
    assert without.item() == metrics["flow_mse"].item() and "key_loss" not in metrics


def test_rows_without_actions_serve_the_key_loss_alone():
    policy = make()
    images, texts, proprio, actions, key = loss_inputs(policy)
    options = {"key_weight": 1.0, "draws": 2}
    _, both = policy(images, texts, proprio, actions, key, generator=torch.Generator().manual_seed(0), **options)
    _, one = policy(images, texts, proprio, actions[:1], key, generator=torch.Generator().manual_seed(0), **options)
    first = (images[:1], texts[:1], proprio[:1], actions[:1], key[:1])
    _, alone = policy(*first, generator=torch.Generator().manual_seed(0), **options)
    torch.testing.assert_close(one["flow_mse"], alone["flow_mse"])
    torch.testing.assert_close(one["key_loss"], both["key_loss"])


def test_key_loss_by_hand():
    policy = make()
    inputs = loss_inputs(policy)
    with torch.no_grad():
        policy.key_head[2].weight.zero_()
        policy.key_head[2].bias.zero_()
    _, metrics = policy(*inputs, key_weight=1.0)
    low, high = policy.normalizer.proprio_low[:3], policy.normalizer.proprio_high[:3]
    target = (2 * (inputs[-1] - low) / (high - low) - 1).clamp(-1, 1)
    by_hand = torch.where(target.abs() < 0.1, target.square() / 0.2, target.abs() - 0.05)
    assert metrics["key_loss"].item() == pytest.approx(by_hand.mean().item(), rel=1e-5)


@pytest.mark.parametrize("width", [1, 2])
def test_key_loss_of_a_robot_with_less_proprio_than_a_position(width):
    policy = make(replace(CFG, flow=replace(CFG.flow, proprio_dim=width)), fitted=False)
    policy.normalizer.fitted.fill_(True)  # quantiles -1 and 1: proprio is its own normalised value
    images, texts, proprio, actions, key = loss_inputs(policy)
    with torch.no_grad():
        policy.key_head[2].weight.zero_()
        policy.key_head[2].bias.copy_(torch.tensor([0.5, 0.3, 9.0]))
    _, metrics = policy(images, texts, proprio[:, :width], actions, key[:, :width], key_weight=1.0)
    error = (torch.tensor([0.5, 0.3])[:width] - key[:, :width]).abs()
    by_hand = torch.where(error < 0.1, error.square() / 0.2, error - 0.05)
    assert metrics["key_loss"].item() == pytest.approx(by_hand.mean().item(), rel=1e-5)


def test_key_token_is_a_whole_share_of_the_mean():
    policy = make()
    images, _ = observations()
    images = policy.preprocess(images)
    context, (plain, vision) = policy.encode(images, TEXTS), policy.vlm(images, TEXTS)
    key = policy.predict_key(vision)
    assert torch.equal(context[:, :-1], plain)
    expected = (plain.sum(1) / context.shape[1]) + policy.key_embed(key)
    torch.testing.assert_close(context.mean(1), expected, atol=1e-5, rtol=1e-5)


def test_checkpoint_round_trip(tmp_path):
    policy = make()
    policy.save(tmp_path / "p.safetensors", {"note": 1})
    images, proprio = observations()
    noise = torch.zeros(2, 8, 7)
    loaded = VLAPolicy.load(tmp_path / "p.safetensors")
    assert loaded.cfg == policy.cfg and not loaded.training
    assert torch.equal(loaded.act(images, TEXTS, proprio, noise=noise), policy.act(images, TEXTS, proprio, noise=noise))


def test_sigma_net_is_added_saved_and_left_out_of_act(tmp_path):
    policy = make()
    images, proprio = observations()
    before = policy.act(images, TEXTS, proprio, noise=torch.zeros(2, 8, 7))
    policy.add_sigma_net(sigma_max=0.3)
    assert policy.head.cfg is policy.head.net.cfg is policy.sigma_net.cfg is policy.cfg.flow
    torch.nn.init.normal_(policy.sigma_net.output.weight)
    policy.save(tmp_path / "p.safetensors")
    loaded = VLAPolicy.load(tmp_path / "p.safetensors")
    assert loaded.cfg.flow.sigma_max == 0.3 and loaded.cfg.has_sigma_net
    assert torch.equal(loaded.act(images, TEXTS, proprio, noise=torch.zeros(2, 8, 7)), before)

    # the context may come from a frozen encoder, once per start
    context = loaded.encode(loaded.preprocess(images), TEXTS).detach()
    frames = torch.from_numpy(images).movedim(-1, 1) / 255
    for at_once in (None, 1):
        found = loaded.encode_frames(frames, TEXTS, at_once=at_once)
        torch.testing.assert_close(found, context, atol=1e-5, rtol=1e-5)
    cond = loaded.condition(context, torch.from_numpy(proprio)).repeat(3)
    chain = sample_chain(loaded.head, loaded.sigma_net, cond, generator=torch.Generator().manual_seed(0))
    score = chain_log_prob(loaded.head, loaded.sigma_net, chain.x, cond)
    torch.testing.assert_close(score.log_prob, chain.log_prob, atol=1e-5, rtol=1e-5)
    assert loaded.normalizer.decode_actions(chain.x[:, -1]).shape == (6, 8, 7)


def test_a_sigma_net_of_other_settings_is_refused():
    policy = make()
    net = policy.add_sigma_net(sigma_max=0.3)
    assert policy.add_sigma_net(sigma_max=0.3) is net  # the same again: kept
    with pytest.raises(ValueError, match=r"other noise: it has sigma_max 0.3, asked 0.2"):
        policy.add_sigma_net()


def test_a_group_of_chains_by_the_random_numbers_of_the_whole_batch():
    policy = make()
    policy.add_sigma_net()
    images, proprio = observations()
    context = policy.encode(policy.preprocess(images), TEXTS).detach()

    def sample(rows, part):
        source = torch.Generator().manual_seed(0)
        return policy.sample_group(context[rows], torch.from_numpy(proprio[rows]), 3, source, part=part)

    whole = sample(slice(0, 2), (0, 1))
    assert whole.x.shape == (6, 11, 8, 7) and len({tuple(x[0, 0].tolist()) for x in whole.x}) == 6
    for rank in range(2):  # start-major: a process's starts come with their whole groups
        own = sample(slice(rank, rank + 1), (rank, 2))
        torch.testing.assert_close(own.x, whole.x[3 * rank : 3 * rank + 3], atol=1e-5, rtol=1e-5)


def test_stochastic_policy_acts_with_given_noise(tmp_path):
    images, proprio = observations()
    x0, steps = torch.zeros(2, 8, 7), torch.randn(2, 10, 8, 7, generator=torch.Generator().manual_seed(0))
    policy = make()
    with pytest.raises(ValueError, match="the policy has no sigma net, so it has no noise; fine-tune it"):
        policy.act(images, TEXTS, proprio, noise=x0, step_noise=steps)
    plain = policy.act(images, TEXTS, proprio, noise=x0)
    policy.add_sigma_net()
    policy.save(tmp_path / "policy.safetensors")
    loaded = VLAPolicy.load(tmp_path / "policy.safetensors")
    assert torch.equal(loaded.act(images, TEXTS, proprio, noise=x0), plain)
    assert (loaded.act(images, TEXTS, proprio, noise=x0, step_noise=steps) - plain).abs().max() > 0.01
    still = loaded.act(images, TEXTS, proprio, noise=x0, step_noise=0 * steps)
    torch.testing.assert_close(still, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_fit_together(name):
    with torch.device("meta"):
        policy = VLAPolicy(PRESETS[name])
    assert policy.cfg.flow.chunk == 8
    paper = name == "paper"
    assert (policy.key_head is None) == paper and (policy.vlm.instruction_encoder is None) == paper


def test_errors(tmp_path):
    policy = make()
    images, proprio = observations()
    with pytest.raises(ValueError, match="normaliser was never fitted"):
        make(fitted=False).act(images, TEXTS, proprio)
    with pytest.raises(ValueError, match="2 images, 1 instructions, 2 proprio rows"):
        policy.act(images, TEXTS[:1], proprio)
    with pytest.raises(ValueError, match=r"noise: got shape \(2, 8, 6\), expected \(2, 8, 7\)"):
        policy.act(images, TEXTS, proprio, noise=torch.zeros(2, 8, 6))
    with pytest.raises(ValueError, match="proprio has NaN"):
        policy.act(images, TEXTS, proprio * np.nan)
    with pytest.raises(ValueError, match=r"got torch.int64 \(2, 64, 64, 3\); expected uint8"):
        policy.preprocess(images.astype(np.int64))
    with pytest.raises(ValueError, match=r"floats from 0 to 255, expected \[0, 1\]"):
        policy.preprocess(torch.tensor([0.0, 255.0]).view(1, 1, 1, 2).expand(1, 3, 64, 2))
    with pytest.raises(ValueError, match=r"expected \(2, 1 cameras, 3, 64, 64\)"):
        policy.act(np.stack([images, images], 1), TEXTS, proprio)
    with pytest.raises(ValueError, match="context_dim 32 must equal vlm.language.width 896"):
        VLAPolicy(replace(CFG, vlm=PolicyConfig().vlm))
    with pytest.raises(ValueError, match="key_token needs a key head; set key_head_dim"):
        VLAPolicy(replace(CFG, key_head_dim=None))
    no_key = make(replace(CFG, key_head_dim=None, key_token=False))
    with pytest.raises(ValueError, match="no key head; set PolicyConfig.key_head_dim"):
        no_key(*loss_inputs(no_key), key_weight=1.0)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        VLAPolicy.load(tmp_path / "none.safetensors")


def test_benchmark(load_benchmark, tmp_path, monkeypatch):
    benchmark = load_benchmark("policy")
    cfg = replace(benchmark.PRESETS["smoke"], out=str(tmp_path / "policy.json"))
    report = benchmark.main(cfg)
    assert json.loads((tmp_path / "policy.json").read_text()) == report
    assert report["config"]["policy"] == "smoke" and report["training step"]["steps_per_s"] > 0
    for name in ("chunk", "batch of chunks", "head step"):
        row = report[name]
        assert row["times_faster"] == pytest.approx(row["straightforward_s"] / row["ours_s"])
        assert row["spread"][0] <= row["times_faster"] <= row["spread"][1]
        assert row["share_of_peak"] == pytest.approx(row["flops"] / row["ours_s"] / report["peak_flops_per_s"])
        assert row["largest_difference"] < 1e-4
    broken = benchmark.straightforward_chunk
    monkeypatch.setattr(benchmark, "straightforward_chunk", lambda *args: broken(*args) + 1)
    with pytest.raises(RuntimeError, match="chunk: the versions differ by 1"):
        benchmark.main(cfg)
    report = json.loads((tmp_path / "policy.json").read_text())
    assert report["chunk"]["largest_difference"] == pytest.approx(1) and report["training step"]["steps_per_s"] > 0


def test_a_policy_made_ready_to_play_acts_the_same_and_saves_as_before(tmp_path):
    policy, (images, proprio), noise = make(), observations(), torch.randn(2, 8, 7)
    args = images, TEXTS, proprio
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    actions = policy.eval().act(*args, noise=noise)
    assert policy.train().for_playing() is policy and not policy.training
    assert not any(p.requires_grad for p in policy.parameters())
    layers = [layer for layer in policy.head.modules() if isinstance(layer, torch.nn.Linear)]
    assert all(layer.weight.t().is_contiguous() for layer in layers) and len(layers) > 5
    torch.testing.assert_close(policy.act(*args, noise=noise), actions, atol=1e-4, rtol=1e-4)
    policy.save(tmp_path / "p.safetensors")
    found = VLAPolicy.load(tmp_path / "p.safetensors").state_dict()
    assert all(torch.equal(found[name], value) and found[name].is_contiguous() for name, value in before.items())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_policy_acts_the_same():
    policy, (images, proprio), noise = make(), observations(), torch.randn(2, 8, 7)
    actions = policy.act(images, TEXTS, proprio, noise=noise)
    compiled = policy.for_playing(compile=True).act(images, TEXTS, proprio, noise=noise)
    assert policy.head.net.dit._compiled_call_impl is not None
    torch.testing.assert_close(compiled, actions, atol=1e-4, rtol=1e-4)
