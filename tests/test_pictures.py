"""Pictures: animations with one palette, and what a script says that cannot draw any."""

import importlib
import sys

import numpy as np
import pytest

from vlarft.run.pictures import save_gif

image_module = pytest.importorskip("PIL.Image")


def test_one_palette_keeps_colours_and_makes_files_of_still_scenes_smaller(tmp_path):
    rng = np.random.default_rng(0)
    scene = rng.choice(np.array([[10, 20, 30], [200, 40, 40], [90, 160, 220]], np.uint8), (64, 64))
    noise = rng.integers(0, 256, (64, 64, 3), np.uint8)
    pictures = []
    for t in range(12):
        picture = np.concatenate([scene, noise])
        picture[0, t], picture[-1, t] = 255 - picture[0, t], 0
        pictures.append(picture)
    for colors in (None, 64):
        save_gif(tmp_path / f"{colors}.gif", pictures, 10, hold_last=1, colors=colors)
    film = image_module.open(tmp_path / "64.gif")
    assert film.n_frames == 12
    for t, picture in enumerate(pictures):
        film.seek(t)
        shown = np.asarray(film.convert("RGB")).astype(int)
        assert np.abs(shown - picture)[1:64].max() < 16 and film.info["duration"] == (1100 if t == 11 else 100)
    assert (tmp_path / "64.gif").stat().st_size < 0.5 * (tmp_path / "None.gif").stat().st_size


@pytest.mark.parametrize("name", ["train_tokenizer", "train_wm", "train_rft", "eval_wm"])
def test_a_script_that_draws_asks_for_pillow_before_its_work(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.chdir(tmp_path)  # there is nothing to read here
    script = importlib.import_module(name)
    with pytest.raises(ImportError, match=r'pictures need pillow: pip install -e ".\[plots\]"'):
        script.main(script.PRESETS["smoke"])
