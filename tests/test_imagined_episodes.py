"""Whole episodes in imagination: ragged lengths, metrics per chunk by hand, intervals, pictures, processes."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import eval_wm
from vlarft.data.episode import Episode
from vlarft.data.episodes import load_episodes
from vlarft.imagined_episodes import ImaginedEpisode, chunk_sums, imagine_episodes, means, summarise_episodes
from vlarft.metrics import perceptual, ssim
from vlarft.statistics import mean_interval
from vlarft.world_model import PRESETS, Rollout, WorldModel

NO_CAST = torch.autocast("cpu", enabled=False)


def episode(name: str, frames: int) -> Episode:
    rng = np.random.default_rng(frames)
    images = rng.integers(0, 256, (frames, 64, 64, 3), dtype=np.uint8)
    actions = rng.uniform(-1, 1, (frames, 7)).astype(np.float32)
    return Episode(name, "push", images, np.zeros((frames, 8), np.float32), actions, actions)


class NumbersItsFrames:
    """A world model whose imagined frame is grey, as light as the sum of all actions so far."""

    cfg = PRESETS["smoke"]

    def __init__(self) -> None:
        self.calls = []

    def parameters(self):
        yield torch.zeros(1)

    def rollout(self, start, actions, **options) -> Rollout:
        self.calls.append((actions.shape, options["greedy"]))
        before = torch.zeros(len(actions)) if start.ndim == 4 else start  # a frame, or the state
        light = before[:, None] + actions[:, 0].sum(-1).cumsum(1)  # (S, T)
        frames = light[:, None, :, None, None, None].expand(-1, -1, -1, 3, 64, 64)
        return Rollout(torch.zeros(0), frames, light[:, -1])


def test_episodes_of_any_length_are_imagined_from_their_first_frame_to_their_last():
    episodes = [episode("long", 20), episode("short", 4), episode("middle", 17)]
    model = NumbersItsFrames()
    found = {f.number: f for f in imagine_episodes(model, episodes, autocast=NO_CAST, batch_size=2)}
    assert list(found) == [1, 2, 0]  # by length, two at a time
    assert [shape[2] for shape, _ in model.calls] == [8, 8, 8, 8, 3] and all(greedy for _, greedy in model.calls)
    for number, imagined in found.items():
        given = episodes[number]
        assert_close(imagined.true, torch.from_numpy(given.images).permute(0, 3, 1, 2) / 255.0)
        assert imagined.imagined.shape == imagined.true.shape
        assert torch.equal(imagined.imagined[0], imagined.true[0])
        want = torch.from_numpy(given.actions[:-1].sum(1).cumsum())
        assert_close(imagined.imagined[1:, 0, 0, 0], want, atol=1e-5, rtol=1e-5)


def test_the_world_model_imagines_an_episode_as_one_rollout():
    torch.manual_seed(0)
    model, given = WorldModel(PRESETS["smoke"]).eval(), episode("a", 12)
    (found,) = imagine_episodes(model, [given], autocast=NO_CAST)
    whole = model.rollout(found.true[:1], torch.from_numpy(given.actions[None, None, :-1]), greedy=True)
    assert_close(found.imagined[1:], whole.frames[0, 0], atol=1e-5, rtol=1e-4)


def hand_made() -> ImaginedEpisode:
    """Three frames after the first, in chunks of 2; one pixel moves in frame 2, the imagination is 0.1 too light."""
    true = torch.zeros(4, 3, 16, 16)
    true[2, :, 0, 0] = 0.5
    imagined = true + 0.1
    imagined[0] = true[0]
    return ImaginedEpisode(0, true, imagined)


def test_metrics_of_chunks_by_hand():
    given = hand_made()
    sums = chunk_sums(given, 2, perceptual("ssim"))
    assert sums.shape == (2, 9, 2) and sums[:, 8].tolist() == [[2, 1], [2, 1]]  # frames
    imagined, copy = means(sums[0]), means(sums[1])
    assert_close(imagined["mse"], torch.full((2,), 0.01, dtype=torch.float64))
    assert_close(copy["mse"], torch.tensor([0.25 / 256 / 2, 0.0], dtype=torch.float64))
    assert imagined["psnr_moving"][0].item() == pytest.approx(20) and imagined["psnr_moving"][1].isnan()
    assert copy["psnr_moving"][0].item() == pytest.approx(-10 * math.log10(0.25))
    assert_close(imagined["still_error"], torch.full((2,), 0.1, dtype=torch.float64))
    assert copy["still_error"].tolist() == [0, 0]
    assert imagined["ssim"][1].item() == pytest.approx(ssim(given.imagined[3:], given.true[3:]).item())
    assert imagined["perceptual"][1].item() == pytest.approx((1 - imagined["ssim"][1].item()) / 2, abs=1e-6)


def test_summary_pools_chunks_and_takes_each_episodes_last():
    sums = torch.zeros(2, 2, 9, 3, dtype=torch.float64)
    sums[0, :, 0, :1], sums[0, :, 8, :1] = 4.0, 8  # one chunk of 8 frames, mse 0.5
    sums[1, :, 0, :], sums[1, :, 8, :] = torch.tensor([8.0, 16.0, 2.0]), torch.tensor([8.0, 8.0, 1.0])
    sums[1, 1, 0, 2] = 5.0  # the copy's last chunk
    found = summarise_episodes(sums)
    assert found["chunks"]["episodes"] == [2, 1, 1]
    assert found["chunks"]["imagined"]["mse"] == [0.75, 2, 2] and found["chunks"]["copy"]["mse"] == [0.75, 2, 5]
    assert found["chunks"]["imagined"]["psnr_moving"] == [None] * 3  # nothing moved
    last = found["last_chunk"]
    assert last["imagined"]["mse"]["value"] == 1.25 and last["copy"]["mse"]["value"] == 2.75
    assert last["difference"]["mse"] == mean_interval([0.0, -3.0])._asdict()
    json.dumps(found)


def test_interval_of_a_mean_by_hand():
    found = mean_interval([1.0, 2.0, 3.0], z=2.0)
    assert found.value == 2 and found.high - found.value == pytest.approx(2 / 3**0.5)
    assert math.isnan(mean_interval([1.0]).low) and mean_interval([1.0]).value == 1 and math.isnan(mean_interval([])[0])


def test_shares_of_the_processes_add_up(demos, monkeypatch):
    torch.manual_seed(0)
    model, episodes = WorldModel(PRESETS["smoke"]).eval(), load_episodes(demos)
    cfg, distance = replace(eval_wm.PRESETS["smoke"], episodes=5), perceptual("ssim")
    whole, films = eval_wm.evaluate_episodes(model, episodes, cfg, distance, NO_CAST)
    assert len(whole["names"]) == 5 and len(films) == 4
    shares = []
    monkeypatch.setattr(eval_wm.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(eval_wm.distributed, "mean_tensor", lambda value: shares.append(value) or value)
    for rank in range(2):
        monkeypatch.setattr(eval_wm.distributed, "rank", lambda rank=rank: rank)
        eval_wm.evaluate_episodes(model, episodes, cfg, distance, NO_CAST)
    found = summarise_episodes(sum(shares))
    assert found["chunks"]["imagined"]["ssim"] == pytest.approx(whole["chunks"]["imagined"]["ssim"], abs=1e-5)


def test_films_show_every_episode(tmp_path):
    from PIL import Image

    one, two = hand_made(), ImaginedEpisode(1, torch.rand(12, 3, 16, 16), torch.rand(12, 3, 16, 16))
    eval_wm.draw_episodes([one, two], 2, tmp_path)
    film, picture = (Image.open(tmp_path / f"episodes.{kind}") for kind in ("gif", "png"))
    assert film.n_frames == 12 and picture.size[1] > picture.size[0] / 4
    text = "\n".join(eval_wm.report_episodes(summarise_episodes(chunk_sums(one, 2, perceptual("none"))[None])))
    assert "PSNR, moving" in text and "0.100" in text
