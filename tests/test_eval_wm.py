"""eval_wm.py: frame metrics of hand-made rollouts, perturbations, agreement, the simulator's outcome, errors."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import eval_wm
from eval_wm import PRESETS, evaluate_frames, frame_sums, held_out_episodes, main, own_rows, summary
from vlarft import imagined_episodes, sensitivity
from vlarft.data.episodes import load_episodes, split_episodes
from vlarft.data.windows import WindowSampler
from vlarft.metrics import perceptual, psnr
from vlarft.report.page import write_report
from vlarft.run.checkpoint import read_header, save_model
from vlarft.run.random import generator
from vlarft.world_model import PRESETS as MODELS
from vlarft.world_model import Rollout, WorldModel

CFG = PRESETS["smoke"]
NO_CAST = torch.autocast("cpu", enabled=False)


@pytest.fixture(scope="module")
def checkpoint(demos, tmp_path_factory):
    """Run folder of an untrained world model that names its held-out episodes."""
    folder = tmp_path_factory.mktemp("wm")
    torch.manual_seed(0)
    model = WorldModel(MODELS["smoke"])
    train, held_out = split_episodes(load_episodes(demos), 0.34, 0)
    names = {"train_episodes": [e.name for e in train], "held_out_episodes": [e.name for e in held_out]}
    extra = {**names, "demos": str(demos), "context_lookback": 0}
    save_model(folder / "model.safetensors", model, MODELS["smoke"], extra)
    return folder


def test_main_measures_held_out_episodes_and_writes_files(checkpoint, tmp_path, capsys):
    results = main(replace(CFG, world_model=str(checkpoint), out_dir=str(tmp_path)))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["held_out_episodes"] == 2 and results["segments"] == 8
    assert set(results["frames"]) == {"squares", "all"} and set(results["sensitivity"]) == {"action"}
    assert len(results["frames"]["all"]["imagined"]["ssim"]) == 8 + 1
    text = capsys.readouterr().out
    assert "psnr_moving" in text and "R3 independent" in text
    from PIL import Image

    assert Image.open(tmp_path / "rollouts.gif").n_frames >= 9
    assert np.asarray(Image.open(tmp_path / "rollouts.png")).std() > 5


def test_what_is_not_measured_is_not_reported(checkpoint, tmp_path, capsys):
    sizes = {"segments": 4, "episodes": 1, "perceptual": "none", "out_dir": str(tmp_path)}
    cfg = replace(CFG, world_model=str(checkpoint), true_error=True, starts=0, **sizes)  # needs no states: no starts
    results, text = main(cfg), capsys.readouterr().out
    assert (
        "perceptual" not in json.dumps({k: v for k, v in results.items() if k != "config"}) and "perceptual" not in text
    )
    assert "psnr_moving" in text and (tmp_path / "episodes.gif").exists()
    write_report([tmp_path], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "SSIM" in page and "perceptual distance" not in page
    main(replace(cfg, episodes=0))
    assert not (tmp_path / "episodes.gif").exists()


def test_frames_episodes_and_sensitivity_have_random_numbers_of_their_own(checkpoint, tmp_path, monkeypatch):
    asked = {}
    for module in (eval_wm, imagined_episodes, sensitivity):

        def noted(device, stream, *numbers, module=module):
            asked.setdefault(module, set()).add((stream, *numbers))
            return generator(device, stream, *numbers)

        monkeypatch.setattr(module, "generator", noted)
    main(replace(CFG, world_model=str(checkpoint), out_dir=str(tmp_path)))
    assert len(asked) == 3 and len(set().union(*asked.values())) == sum(map(len, asked.values()))


class FrameLater:
    """A world model whose rollouts are the true frames, one step late: it copies the start, then lags."""

    def __init__(self, frames: torch.Tensor) -> None:
        self.frames, self.cfg, self.used = frames, MODELS["smoke"], 0

    def parameters(self):
        yield torch.zeros(1)

    def rollout(self, context_frame, actions, **options) -> Rollout:
        rows = slice(self.used, self.used + len(actions))
        self.used += len(actions)
        return Rollout(torch.zeros(0), self.frames[rows, None, :-1], None)


def test_frame_metrics_by_hand(demos):
    batch = WindowSampler(load_episodes(demos), 9, 8).spread(6)
    found = evaluate_frames(FrameLater(batch.frames), batch, ["a", "b"] * 3, CFG, perceptual("none"), NO_CAST)
    true, late = batch.frames[:, 1:], batch.frames[:, :-1]
    error = (true - late).square().mean(dim=(2, 3, 4))
    assert found["all"]["imagined"]["mse"] == pytest.approx([*error.mean(0).tolist(), error.mean().item()], rel=1e-5)
    assert found["a"]["imagined"]["mse"][:8] == pytest.approx(error[::2].mean(0).tolist(), rel=1e-5)
    assert found["all"]["imagined"]["psnr"][8] == pytest.approx(psnr(late, true).clamp_max(100).mean().item(), rel=1e-5)
    copy = batch.frames[:, :1]
    moving = ((true - copy).abs().amax(2, keepdim=True) > 0.04).expand_as(true)
    moved = -10 * np.log10((true - copy)[moving].square().mean().item())
    assert found["all"]["copy"]["psnr_moving"][8] == pytest.approx(moved, rel=1e-4)
    assert found["all"]["imagined"]["psnr_moving"][0] == pytest.approx(found["all"]["copy"]["psnr_moving"][0])
    assert found["all"]["imagined"]["psnr_moving"][7] > found["all"]["copy"]["psnr_moving"][7] + 1


def test_identical_frames_count_as_100_db():
    frames = torch.rand(2, 1, 3, 16, 16)
    found = summary(frame_sums(frames, frames, torch.ones(2, 1, 1, 16, 16), perceptual("ssim")), 2.0)
    assert found["psnr"] == pytest.approx([100, 100]) and found["ssim"] == pytest.approx([1, 1])
    assert found["psnr_moving"] == pytest.approx([100, 100])


def test_shares_of_the_processes(monkeypatch):
    """The same batches for any number of processes: each has its own random numbers."""
    alone = list(own_rows(9, 2))
    assert alone == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8), slice(8, 9)]
    monkeypatch.setattr(eval_wm.distributed, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(eval_wm.distributed, "rank", lambda rank=rank: rank)
        shares.append(list(own_rows(9, 2)))
    assert shares == [alone[0::3], alone[1::3], alone[2::3]]


def test_sampled_rollouts_do_not_depend_on_the_processes(checkpoint, demos, monkeypatch):
    model = WorldModel.load(checkpoint)
    batch = WindowSampler(load_episodes(demos), 9, 8).spread(8)
    cfg = replace(CFG, batch_size=2, greedy=False, top_p=1.0)

    def measure(cfg=cfg):
        return evaluate_frames(model, batch, ["a"] * 8, cfg, perceptual("ssim"), NO_CAST)["all"]["imagined"]["mse"]

    whole = measure()
    assert measure(replace(cfg, seed=1)) != whole
    parts = []
    monkeypatch.setattr(eval_wm.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(eval_wm.distributed, "mean_across_ranks", lambda found: parts.append(found) or found)
    for rank in (0, 1):
        monkeypatch.setattr(eval_wm.distributed, "rank", lambda rank=rank: rank)
        measure()
    monkeypatch.setattr(
        eval_wm.distributed, "mean_across_ranks", lambda _: {k: (parts[0][k] + parts[1][k]) / 2 for k in parts[0]}
    )
    assert measure() == pytest.approx(whole, rel=1e-6)


def test_errors(checkpoint, demos, tmp_path):
    given = {"out_dir": str(tmp_path), "world_model": str(checkpoint)}
    with pytest.raises(ValueError, match="true errors need Tabletop demonstrations with states"):
        main(replace(CFG, true_error=True, **given))
    header, model = read_header(checkpoint), WorldModel.load(checkpoint)
    save_model(tmp_path / "other.safetensors", model, model.cfg, {**header.extra, "camera": "eye_in_hand"})
    with pytest.raises(
        ValueError, match="image conventions differ: world model .* has camera 'eye_in_hand', the episodes"
    ):
        main(replace(CFG, **{**given, "world_model": str(tmp_path / "other.safetensors")}))
    digests = dict.fromkeys(header.extra["held_out_episodes"], "of before")
    save_model(tmp_path / "anew.safetensors", model, model.cfg, {**header.extra, "episode_digests": digests})
    with pytest.warns(UserWarning, match="world model .*anew.safetensors knows 2 of 2 episodes by name"):
        held_out_episodes(CFG, tmp_path / "anew.safetensors")
    with pytest.raises(ValueError, match="--success-model judges whole episodes: give --episodes too"):
        main(replace(CFG, success_model="runs/success", episodes=0, **given))
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        main(replace(CFG, world_model=str(tmp_path / "none.safetensors"), out_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="lacks 1 of 2 named episodes"):
        main(replace(CFG, demos=str(next((demos / "squares").glob("*red*"))), **given))
    save_model(tmp_path / "model.safetensors", WorldModel(MODELS["smoke"]), MODELS["smoke"])
    given = {"world_model": str(tmp_path), "out_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="names no held-out episodes.*give --all-episodes and --demos"):
        main(replace(CFG, **given))
    with pytest.raises(ValueError, match="--all-episodes needs --demos"):
        main(replace(CFG, all_episodes=True, **given))


def test_all_episodes_are_for_models_that_have_not_seen_them(checkpoint, demos, tmp_path):
    given = {"demos": str(demos), "all_episodes": True, "out_dir": str(tmp_path / "out"), "starts": 0}
    with pytest.raises(ValueError, match=r"was trained on 4 of the 6 episodes of .*leave the option out"):
        main(replace(CFG, world_model=str(checkpoint), **given))
    save_model(tmp_path / "model.safetensors", WorldModel(MODELS["smoke"]), MODELS["smoke"])  # as a public one
    assert main(replace(CFG, world_model=str(tmp_path), **given))["held_out_episodes"] == 6
