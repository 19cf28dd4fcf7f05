"""Whole episodes in imagination: lengths, actions, shares of processes; metrics per chunk by hand; films."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import ranks
import torch
from torch.testing import assert_close

import eval_wm
from eval_wm import PRESETS, chunk_metrics, chunk_totals, evaluate_episodes, main
from vlarft.data.episode import Episode
from vlarft.data.episodes import load_episodes
from vlarft.imagined_episodes import ImaginedEpisode, imagined_episodes, spread_episodes
from vlarft.metrics import perceptual, pooled_psnr, psnr, ssim
from vlarft.run.checkpoint import save_model
from vlarft.statistics import bootstrap_interval
from vlarft.world_model import PRESETS as MODELS
from vlarft.world_model import Rollout, WorldModel

CFG = PRESETS["smoke"]
NO_CAST = torch.autocast("cpu", enabled=False)


def episode(length: int, name: str = "", **fields) -> Episode:
    """Frames of noise in which the left half stands still."""
    rng = np.random.default_rng(length)
    images = rng.integers(0, 200, (length, 64, 64, 3)).astype(np.uint8)
    images[:, :, :32] = images[:1, :, :32]
    actions = rng.uniform(-1, 1, (length, 7)).astype(np.float32)
    proprio = rng.normal(size=(length, 8)).astype(np.float32)
    return Episode(name or f"suite/file/{length}", "push", images, proprio, actions, actions, **fields)


class Brighter:
    """A world model that imagines the first frame, brighter by 0.01 with every step; it notes what it was asked."""

    def __init__(self) -> None:
        self.cfg, self.asked = MODELS["smoke"], []

    def parameters(self):
        yield torch.zeros(1)

    def rollout(self, start, actions, **options) -> Rollout:
        self.asked.append((start, actions, options))
        steps = torch.arange(1, actions.shape[2] + 1)[:, None, None, None]
        return Rollout(torch.zeros(0), (start[:, None] + 0.01 * steps)[:, None], None)


def frames_of(one: Episode) -> torch.Tensor:
    return torch.from_numpy(one.images).permute(0, 3, 1, 2) / 255


def test_recorded_actions_are_replayed_from_the_first_frame_to_the_last():
    lengths, model = [20, 2, 9, 5], Brighter()
    options = {"autocast": NO_CAST, "batch_size": 2, "recorded_poses": True}
    replayed = list(imagined_episodes(model, [episode(n) for n in lengths], **options))
    assert [len(r.episode) for r in replayed] == [2, 5, 9, 20]
    for one, true, imagined in replayed:
        assert_close(true, frames_of(one))
        want = true[:1] + 0.01 * torch.arange(len(one))[:, None, None, None]
        assert_close(imagined, want)
    for (start, actions, options), batch in zip(model.asked, (replayed[:2], replayed[2:]), strict=True):
        assert actions.shape == (2, 1, len(batch[1].episode) - 1, 7)
        for row, (one, true, _) in enumerate(batch):
            assert torch.equal(start[row], true[0])
            steps = len(one) - 1  # action t leads from frame t to t + 1; the one after the last frame is not played
            assert actions[row, 0, :steps].tolist() == one.actions[:-1].tolist()
            assert (actions[row, 0, steps:] == actions[row, 0, steps - 1]).all()  # padding stays inside the ranges
            after = options["proprio_after"][row, 0]
            assert after[:steps].tolist() == one.proprio[1:].tolist() and (after[steps:] == after[steps - 1]).all()
            assert options["robot"] is None
    (alone,) = imagined_episodes(model, [episode(5)], autocast=NO_CAST)
    robot = model.asked[-1][2]["robot"]  # the model predicts the poses, from rest at the first frame
    assert model.asked[-1][2]["proprio_after"] is None and not robot.motion.any()
    assert robot.proprio.tolist() == [alone.episode.proprio[0].tolist()]


def test_batches_and_random_numbers_do_not_depend_on_the_number_of_processes():
    episodes = [episode(n) for n in (4, 3, 7, 6, 5)]

    def asked(**options):
        model = Brighter()
        names = [r.episode.name for r in imagined_episodes(model, episodes, autocast=NO_CAST, batch_size=2, **options)]
        return names, [(a.shape, o["generator"].initial_seed(), o["greedy"], o["top_p"]) for _, a, o in model.asked]

    names, calls = asked(top_p=0.7)
    shares = [asked(top_p=0.7, part=(rank, 2)) for rank in range(2)]
    assert shares[0][0] == [*names[:2], *names[4:]] and shares[1][0] == names[2:4]
    assert shares[0][1] == calls[::2] and shares[1][1] == calls[1::2]
    assert len({seed for _, seed, *_ in calls}) == 3 and {c[2:] for c in calls} == {(False, 0.7)}
    assert asked(seed=1)[1][0][1] != calls[0][1]


def test_a_replay_is_one_rollout_of_the_world_model(demos, world_model_file):
    model, (one, *_) = WorldModel.load(world_model_file), load_episodes(demos)
    (replayed,) = imagined_episodes(model, [one], autocast=NO_CAST, greedy=True)
    rollout = model.rollout(replayed.true[:1], torch.from_numpy(one.actions[None, None, :13]), greedy=True)
    want = torch.cat([replayed.true[:1], rollout.frames[0, 0]])  # other batches are summed in another order
    assert_close(replayed.imagined, want, atol=1e-3, rtol=0)


def test_episodes_are_spread_over_suites_kinds_and_tasks():
    def made(suite, kind, count):
        return [episode(2, f"{suite}/file/{i}{kind}", kind=kind) for i in range(count)]

    episodes = [e for pair in zip(made("b", "expert", 8), made("a", "noisy", 8)) for e in pair] + made("a", "expert", 8)
    picks = spread_episodes(episodes, 6)
    assert [(e.name[0], e.kind) for e in picks] == [("a", "expert")] * 2 + [("a", "noisy")] * 2 + [("b", "expert")] * 2
    assert len({e.name for e in picks}) == 6 and spread_episodes(episodes[::-1], 6) == picks
    assert len(spread_episodes([*episodes, episode(1)], 99)) == 24  # a single frame cannot be replayed


def test_metrics_of_chunks_by_hand():
    one = episode(12)  # chunks of 8 and 3 frames
    (replayed,) = imagined_episodes(Brighter(), [one], autocast=NO_CAST)
    true, imagined = replayed.true[1:], replayed.imagined[1:]
    copied = replayed.true[:1].expand_as(true)
    metrics = chunk_metrics(chunk_totals(replayed, 8, perceptual("ssim")))
    assert metrics["mse"].shape == (2, 2)
    for j, pred in enumerate((imagined, copied)):
        for k, part in enumerate((slice(0, 8), slice(8, 11))):
            p, t = pred[part], true[part]
            moving = (t - copied[part]).abs().amax(1, keepdim=True) > 0.04
            want = {
                "mse": (p - t).square().mean().item(),
                "psnr": psnr(p, t).mean().item(),
                "ssim": ssim(p, t).mean().item(),
                "perceptual": (1 - ssim(p, t).mean().item()) / 2,
                "psnr_moving": pooled_psnr(p, t, moving),
                # pixels of the right half move within the episode, those of the left half never
                "still_error": (p - t)[..., :32].abs().mean().item(),
            }
            assert {name: v[j, k].item() for name, v in metrics.items()} == pytest.approx(want, rel=1e-5)
    brighter = [0.01 * np.arange(1, 9).mean(), 0.01 * np.arange(9, 12).mean()]
    assert metrics["still_error"].tolist() == [pytest.approx(brighter, rel=1e-5), [0, 0]]


def test_a_pixel_that_moves_once_does_not_count_as_still():
    true = torch.full((10, 3, 16, 16), 0.5)
    true[9, :, 0, 0] = 0.6  # in the second chunk
    imagined = true.clone()
    imagined[1:, :, 0, 0] += 0.2
    metrics = chunk_metrics(chunk_totals(ImaginedEpisode(episode(10), true, imagined), 8, perceptual("none")))
    assert metrics["still_error"].tolist() == [[0, 0], [0, 0]]
    assert metrics["psnr_moving"][:, 1].tolist() == pytest.approx([-20 * math.log10(0.2), 20], rel=1e-5)
    assert metrics["psnr_moving"][:, 0].isnan().all()  # nothing moves in the first chunk


def test_episodes_of_different_lengths_count_with_their_real_frames_only():
    episodes = [episode(n, success=n > 9, kind="noisy" if n == 5 else "expert") for n in (20, 5, 9, 12)]
    distance = perceptual("ssim")
    results = evaluate_episodes(Brighter(), episodes, CFG, distance, NO_CAST)
    assert results["recorded"][1] == {"name": "suite/file/5", "kind": "noisy", "success": False, "frames": 5}
    assert [e["frames"] for e in results["recorded"]] == [20, 5, 9, 12]
    assert results["chunks"]["episodes"] == [4, 2, 1]
    totals = [chunk_totals(r, 8, distance) for r in imagined_episodes(Brighter(), episodes, autocast=NO_CAST)]
    assert [t.shape[1] for t in totals] == [1, 1, 2, 3] and sum(t[0, :, 0].sum() for t in totals) == 4 + 8 + 11 + 19
    both = chunk_metrics(totals[2][:, 1] + totals[3][:, 1])  # pooled over frames, 3 and 8
    last = chunk_metrics(sum(t[:, -1] for t in totals))  # 4, 8, 3 and 3 frames
    for name in ("mse", "psnr", "ssim", "perceptual", "psnr_moving", "still_error"):
        for j, method in enumerate(("imagined", "copy")):
            assert results["chunks"][method][name][1] == pytest.approx(both[name][j].item())
            end = results["last_chunk"][method][name]
            assert end["value"] == pytest.approx(last[name][j].item()) and end["low"] <= end["value"] <= end["high"]
        difference = results["last_chunk"]["difference"][name]
        assert difference["value"] == pytest.approx((last[name][0] - last[name][1]).item())
        assert results["chunks"]["difference"][name][1] == pytest.approx((both[name][0] - both[name][1]).item())
    ends = torch.stack([totals[i][:, -1] for i in (3, 0, 1, 2)])  # by length -> as given
    interval = bootstrap_interval(ends, lambda means: chunk_metrics(means)["ssim"][..., 0])
    assert results["last_chunk"]["imagined"]["ssim"] == interval._asdict()


def test_each_process_imagines_its_share(monkeypatch):
    model, episodes = Brighter(), [episode(n) for n in (4, 3, 7, 6, 5)]
    monkeypatch.setattr(eval_wm.distributed, "part", lambda: (1, 2))
    results = evaluate_episodes(model, episodes, replace(CFG, batch_size=2), perceptual("none"), NO_CAST)
    assert len(model.asked) == 1 and results["chunks"]["episodes"] == [2]


@pytest.fixture(scope="module")
def checkpoint(demos, tmp_path_factory):
    """A world model with random weights that holds out all episodes."""
    folder, episodes = tmp_path_factory.mktemp("wm"), load_episodes(demos)
    torch.manual_seed(0)
    extra = {"held_out_episodes": [e.name for e in episodes], "demos": str(demos), "context_lookback": None}
    save_model(folder / "model.safetensors", WorldModel(MODELS["smoke"]), MODELS["smoke"], extra)
    return folder


def evaluate(checkpoint: str, out_dir: str) -> None:
    main(replace(CFG, world_model=checkpoint, out_dir=out_dir, episodes=6, batch_size=2, segments=4, starts=0))


def test_two_processes_measure_the_same_as_one(checkpoint, tmp_path):
    evaluate(str(checkpoint), str(tmp_path / "1"))
    ranks.run(2, evaluate, str(checkpoint), str(tmp_path / "2"))
    one, two = (json.loads((tmp_path / n / "results.json").read_text())["episodes"] for n in "12")
    assert one == two and len(one["recorded"]) == 6 and one["chunks"]["episodes"] == [6, 6]


def test_main_writes_films_and_a_table(checkpoint, tmp_path, capsys):
    from PIL import Image

    given = {"world_model": str(checkpoint), "out_dir": str(tmp_path), "segments": 4}
    results = main(replace(CFG, **given))
    assert results["episodes"]["chunks"]["episodes"] == [2, 2] and "last chunk of each" in capsys.readouterr().out
    film, picture = Image.open(tmp_path / "episodes.gif"), Image.open(tmp_path / "episodes.png")
    assert film.n_frames == 14 and film.size[1] == 2 * 66 - 2  # two episodes
    assert picture.size[1] == 4 * 66 - 2 and np.asarray(picture)[:, -160:].std() > 5  # frames 0, 8 and 13


def test_chunks_are_imagined_from_their_first_frame_if_the_context_was_any_in_training(
    checkpoint, tmp_path, monkeypatch
):
    contexts = []
    measure = eval_wm.evaluate_frames
    monkeypatch.setattr(
        eval_wm, "evaluate_frames", lambda model, batch, *a: contexts.append(batch) or measure(model, batch, *a)
    )
    evaluate(str(checkpoint), str(tmp_path))
    assert torch.equal(contexts[0].context_frame, contexts[0].frames[:, 0]) and contexts[0].index[:, 1].max() > 0


def test_episodes_can_be_left_out(checkpoint, tmp_path, capsys):
    given = {"world_model": str(checkpoint), "out_dir": str(tmp_path), "segments": 4}
    assert "episodes" not in main(replace(CFG, **given, episodes=0, starts=0))
    assert not list(tmp_path.glob("episodes.*")) and "whole episodes" not in capsys.readouterr().out


def test_long_films_show_every_second_frame(tmp_path):
    from PIL import Image

    episodes = [episode(n) for n in (3, 100, 5)]
    titles = eval_wm.to_film(episodes, [{"name": e.name} for e in episodes], True)
    assert titles == dict.fromkeys([e.name for e in episodes], "imagined")
    eval_wm.draw_episodes(Brighter(), episodes, titles, tmp_path, NO_CAST)
    film = Image.open(tmp_path / "episodes.gif")
    assert film.n_frames == 51 and film.size[1] == 3 * 66 - 2  # and the last


def test_films_of_judged_episodes_show_each_verdict_once():
    verdicts = [(True, True), (False, True), (False, True), (False, False), (True, True)]  # recorded, imagined
    rows = [
        {"name": str(i), "success": recorded, "success_by_imagined": imagined}
        for i, (recorded, imagined) in enumerate(verdicts)
    ]
    assert eval_wm.to_film([], rows, True) == {"0": "true success", "1": "false success", "3": "true failure"}
    assert eval_wm.to_film([], rows, False) == {}  # sampled verdicts: the greedy films would show others
