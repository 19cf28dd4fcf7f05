"""The report: what the page says of each kind of run, errors that name a file, and the page in a browser."""

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_libero
import eval_wm
import train_rft
import train_sft
import train_wm
from vlarft.report.figures import MOST_FRAMES, film, plot
from vlarft.report.page import write_report
from vlarft.report.runs import KINDS, read_log
from vlarft.reward import Imagined
from vlarft.run.checkpoint import write_json
from vlarft.run.config import to_dict
from vlarft.run.pictures import save_gif, save_mp4, save_png

ROOT = Path(__file__).resolve().parents[1]
EVIL = 'push </script><script>alert("1")</script> & <b>'


def write_log(folder: Path, *names: str, steps: int = 12) -> None:
    rows = [{"step": t, **dict.fromkeys(names, 2.0 / (t + 1)), "minutes": 0.5 * t} for t in range(steps)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def moving_film(length: int, size: int = 48) -> list[np.ndarray]:
    pictures = [np.full((size, size, 3), 40, np.uint8) for _ in range(length)]
    for t, picture in enumerate(pictures):
        picture[t % size] = 250
    return pictures


def group_of(reward: torch.Tensor) -> tuple[list[str], torch.Tensor, Imagined]:
    """Arguments of `train_rft.save_group`: two starts, of which the second has the rewards (G, T) and the first has
    nearly equal ones. The frames of rollout g are of the grey value (g + 1) / 10, those of the reference black.
    """
    group, length = reward.shape
    frames = torch.arange(1, group + 1)[None, :, None, None, None, None] / 10
    frames = frames.expand(2, group, length, 3, 16, 16)
    return ["lift", EVIL], torch.stack([0.01 * reward, reward]), Imagined(frames, torch.zeros(2, length, 3, 16, 16))


def eval_results(policies: tuple[str, ...]) -> dict:
    cfg = dataclasses.replace(eval_libero.PRESETS["tiny"], policies=policies, tasks=("0", "1"))
    starts = [(task, state) for task in (0, 1) for state in range(4)]
    record = {"suite": "tabletop_object", "rejected_starts": 0, "worker_deaths": 0}
    records = [
        {**record, "policy": path, "task": task, "init_state": state, "success": state < 2 + number}
        for number, path in enumerate(policies)
        for task, state in starts
    ]
    return eval_libero.summarise(cfg, records, dict.fromkeys(policies, "0"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a world model, its evaluation, two policies and their evaluation."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    for name, script in (("wm", train_wm), ("sft", train_sft), ("rft", train_rft)):
        write_json(folder / name / "config.json", to_dict(script.PRESETS["smoke"]))
    write_log(folder / "wm", "loss", "rollout_psnr_moving", "copy_psnr_moving")
    write_log(folder / "sft", "flow_mse")
    write_log(folder / "rft", "reward", "reward_std")
    train_rft.save_group(folder / "rft", *group_of(torch.tensor([[-0.1, -0.2], [-0.5, -0.25], [0.0, -0.125]])))

    cfg = to_dict(eval_wm.PRESETS["smoke"])
    values = {name: [0.5, 0.25, 0.375] for name in ("mse", "psnr", "ssim", "perceptual", "psnr_moving")}
    frames = {"all": {"imagined": values, "copy": {name: [0.125] * 3 for name in values}}}
    ranked = {"all": {"spearman": 0.25, "standard_error": 0.0625, "pair_order": 0.75}}
    sensitivity = {"action": {"R3 greedy": ranked, "true frames": ranked}, "true frames": {"R3 greedy": ranked}}
    results = {"config": cfg, "held_out_episodes": 7, "frames": frames, "sensitivity": sensitivity}
    write_json(folder / "eval_wm" / "results.json", results)
    save_gif(folder / "eval_wm" / "rollouts.gif", moving_film(9))

    policies = (f"runs/{EVIL}/sft/model.safetensors", "runs/rft")
    write_json(folder / "eval" / "results.json", eval_results(policies))
    for name, length in (("policy0_tabletop_object_1_3_failure", 150), ("policy1_tabletop_object_1_3_success", 40)):
        save_gif(folder / "eval" / f"{name}.gif", moving_film(length), hold_last=1)
    summary = {
        "evaluation": {"SFT": eval_results(policies)["policies"][0]},
        "minutes": 41.4,
        "versions": {"torch": "2"},
    }
    write_json(folder / "summary.json", summary)
    write_json(folder / "stages.json", {"sft": {"seconds": 90.0, "peak_bytes": 2**30, "done": True}})
    save_png(folder / "demonstrations.png", moving_film(1)[0])
    return folder


@pytest.fixture(scope="module")
def page(runs) -> Path:
    write_report([runs], runs / "report.html")
    return runs / "report.html"


def test_what_the_page_says(page, runs):
    text = page.read_text()
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
    assert headings == [
        "Pipeline: demo", "World model: wm", "World model, evaluated: eval_wm", "Policy, SFT: sft", "Policy, RFT: rft",
        "Policies, evaluated: eval",
    ]  # fmt: skip
    for shown in (
        "<td>50.0 % [21.5, 78.5]</td><td>8</td>",  # 4 of 8, Wilson
        "<td>75.0 % [40.9, 92.9]</td><td>8</td><td>+25.0 [-11.6, +51.6]</td><td>0.5</td>",
        '<th scope="row">pick up the green block and place it in the bin</th><td>50.0 % [15.0, 85.0]</td>',
        '<th scope="row">PSNR [dB]</th><td>0.375</td><td>0.125</td>',
        '<th scope="row">R3 greedy</th><td>0.25 ± 0.06</td><td>0.25 ± 0.06</td>',
        '<th scope="row">true frames</th><td>0.25 ± 0.06</td><td>–</td>',
        '<th scope="row">sft</th><td>1.5</td><td>1.00</td>',
        "<dt>steps done</dt><dd>12</dd>",
        "<dt>minutes</dt><dd>5.5</dd>",
        "<dt>held-out episodes</dt><dd>7</dd>",
        'alt="cross-entropy [nats] by step: loss from 2 at 1 to 0.167 at 12"',
        'alt="reward of each frame in a group by frame: best from 0 at 1 to -0.125 at 2; worst ',
        "<div>best, reward -0.12</div>",
        '"this frame: -0.125"',
        "<div>sft: failure</div>",
        "<div>rft: success</div>",
        "pick up the green block and place it in the bin, start 3",
    ):
        assert shown in text, shown
    assert text.count('class="film"') == 3 and "No film" not in text
    assert len(text) < 10 * 2**20


def test_the_page_loads_nothing_and_escapes_what_comes_from_data(page):
    text = page.read_text()
    assert not re.search('(src|href)="(?!data:|#)', text) and "default-src 'none'" in text
    for raw in ("<script>alert", "& <b>"):
        assert raw not in text
    assert "push &lt;/script&gt;&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt; &amp; &lt;b&gt;" in text


def test_the_same_runs_make_the_same_page(page, runs, tmp_path):
    write_report([runs, runs / "sft"], tmp_path / "again.html")  # a run is shown once
    again = (tmp_path / "again.html").read_text()
    assert again.replace(f"{runs}, {runs}/sft", str(runs)) == page.read_text()


def test_parts_that_a_run_lacks_are_left_out(runs, tmp_path):
    write_report([runs / "sft"], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert re.findall(r"<h[123][^>]*>(.*?)</h", text)[1:] == ["Policy, SFT: sft", "Plots"]
    assert text.count("<figure") == 1 and "<table" not in text and "<nav" not in text
    shutil.copytree(runs / "wm", tmp_path / "wm")
    save_png(tmp_path / "wm" / "rollouts.png", moving_film(1)[0])
    write_report([tmp_path / "wm"], tmp_path / "page.html")
    assert "No film: eval_wm.py writes films" in (tmp_path / "page.html").read_text()
    (tmp_path / "wm" / "log.jsonl").unlink()
    write_report([tmp_path / "wm"], tmp_path / "page.html")
    assert "Nothing is logged yet." in (tmp_path / "page.html").read_text()


def test_each_kind_is_told_by_an_option_of_its_script_alone():
    scripts = {path.name for path in ROOT.glob("*.py")} - {"demo.py", "play.py", "collect_demos.py", "serve_policy.py"}
    assert {kind.script for kind in KINDS} == scripts
    fields = {name: importlib.import_module(Path(name).stem).Config.__dataclass_fields__ for name in scripts}
    for kind in KINDS:
        assert [name for name, own in fields.items() if kind.field in own] == [kind.script]
        assert set(kind.options) <= set(fields[kind.script])


def test_a_group_is_ordered_by_its_rewards(tmp_path):
    reward = torch.tensor([[-0.1, -0.2], [-0.5, -0.25], [0.0, -0.125]])
    train_rft.save_group(tmp_path, *group_of(reward))
    with np.load(tmp_path / "rollouts.npz") as file:
        assert np.array_equal(file["reward"], reward[[2, 0, 1]]) and str(file["instruction"]) == EVIL
        for name, grey in (("reference", 0), ("best", round(0.3 * 255)), ("worst", round(0.2 * 255))):
            assert file[name].shape == (2, 16, 16, 3) and file[name].dtype == np.uint8 and (file[name] == grey).all()


def test_films_keep_their_time_and_their_size(tmp_path):
    long, still = moving_film(150), [moving_film(1)[0]] * 10 + moving_film(20)
    save_gif(tmp_path / "long.gif", long, frames_per_second=10, hold_last=2)
    save_gif(tmp_path / "still.gif", still, frames_per_second=10)  # the first ten become one, shown ten times as long
    both = film("t", {"a": tmp_path / "long.gif", "b": tmp_path / "still.gif"})
    assert [len(track.frames) for track in both.tracks] == [MOST_FRAMES, 13] and both.interval == 250
    assert film("t", {"": tmp_path / "still.gif"}).length == 30
    pytest.importorskip("av")
    save_mp4(tmp_path / "film.mp4", moving_film(6), frames_per_second=5)
    shown = film("t", {"": tmp_path / "film.mp4"})
    assert shown.length == 6 and shown.interval == 200


def test_curves_of_nothing_are_left_out():
    assert plot("loss", {}) == [] and plot("loss", {"loss": np.array([[0, np.nan]])}) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sft/log.jsonl", '{"step": 0, "loss": 1}\n{"step": 1, "lo', r"log.jsonl, line 2 is no line of a log .*remove"),
        ("sft/log.jsonl", '{"loss": 1}\n', r"log.jsonl, line 1 is no line of a log \(KeyError: 'step'"),
        ("sft/log.jsonl", '{"step": 0, "loss": "x"}\n', r"log.jsonl, line 1 .*could not convert"),
        ("sft/log.jsonl", "[]\n", r"log.jsonl, line 1 is no line"),
        ("sft/config.json", "{", r"config.json is not a JSON object"),
        ("sft/config.json", "[1]", r"config.json is not a JSON object .*found a list"),
        ("sft/config.json", '{"a": 1}', r"sft has a log.jsonl, but no configuration of a script.*train_sft.py"),
        ("eval/results.json", '{"policies": []}', r"eval has a results.json, but no configuration"),
        ("eval_wm/results.json", json.dumps({"config": {"segments": 3}}), r"not a result of eval_wm.py .*'frames'"),
        ("eval_wm/rollouts.gif", "GIF89a", r"rollouts.gif is not a film"),
        ("eval/results.json", json.dumps({"config": {"num_flow_steps": 3}}), r"not a result of eval_libero.py"),
        ("rft/rollouts.npz", "PK", r"rollouts.npz is not a group of train_rft.py"),
        ("summary.json", '{"evaluation": {"SFT": {}}}', r"summary.json is not a summary of demo.py .*'all'"),
        ("stages.json", '{"sft": {"done": true}}', r"stages.json is not a record of stages"),
        ("demonstrations.png", "PNG", r"demonstrations.png is not a picture"),
        ("wm/model.safetensors", "x", r"model.safetensors is not a readable safetensors file"),
    ],
)
def test_damaged_files_are_named(runs, tmp_path, name, content, message):
    shutil.copytree(runs, tmp_path / "demo")
    (tmp_path / "demo" / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        write_report([tmp_path / "demo"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_folders_without_a_run_are_refused(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run folder .*gone: give one of a stage"):
        write_report([tmp_path / "gone"], tmp_path / "page.html")
    with pytest.raises(FileNotFoundError, match=r"config.json \(it is a file\)"):
        write_report([runs / "sft" / "config.json"], tmp_path / "page.html")
    with pytest.raises(ValueError, match=r"holds no run: .*found nothing"):
        write_report([tmp_path], tmp_path / "page.html")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')  # of another program
    with pytest.raises(ValueError, match=r"holds no run: .*found config.json"):
        write_report([tmp_path], tmp_path / "page.html")
    with pytest.raises(FileNotFoundError, match="log.jsonl"):
        read_log(tmp_path)


def test_the_command(runs, tmp_path):
    command = [sys.executable, "-m", "vlarft.report"]
    shutil.copytree(runs / "sft", tmp_path / "sft")
    done = subprocess.run([*command, str(tmp_path / "sft")], capture_output=True, text=True)
    assert done.returncode == 0 and re.fullmatch(r".*sft/report.html: 0\.\d MiB\n", done.stdout), done.stderr
    assert (tmp_path / "sft" / "report.html").is_file()
    wrong = subprocess.run([*command, "gone", "--out", "x.html"], capture_output=True, text=True, cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr) == (2, "ERROR: no run folder gone: give one of a stage\n")


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium of the machine, driven by playwright."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    driver = pytest.importorskip("playwright.sync_api", reason="nothing drives Chromium: pip install playwright")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # root may have no sandbox
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(chromium, page, width):
    """Everything is shown, nothing is loaded, sliders and buttons work, and nothing is wider than the screen."""
    view, problems, requests = chromium.new_page(viewport={"width": width, "height": 800}), [], []
    view.on("console", lambda message: problems.append(message.text))
    view.on("pageerror", lambda error: problems.append(str(error)))
    view.on("request", lambda request: requests.append(request.url))
    view.goto(page.as_uri())
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    # the widths of all images, once they are decoded
    loaded = "Promise.all([...document.images].map(image => image.decode().then(() => image.naturalWidth)))"
    assert len(view.evaluate(loaded)) == page.read_text().count("<img ") == 16

    for number, shown in enumerate((9, 2, MOST_FRAMES)):  # the world model's, the group's, the evaluation's film
        one = view.locator(".film").nth(number)
        slider, image = one.locator("input"), one.locator("img").last
        seen = set()
        for t in range(shown):
            slider.fill(str(t))
            assert one.locator(".controls output").text_content() == f"{t + 1} of {shown}"
            seen.add(image.get_attribute("src"))
            assert min(view.evaluate(loaded)) > 0
        assert slider.get_attribute("max") == str(shown - 1)
        assert len(seen) == {9: 9, 2: 1, MOST_FRAMES: 17}[shown]  # the group's frames are grey; a film ends before
    notes = view.locator(".film").nth(1).locator(".tracks output")
    assert notes.all_text_contents() == ["", "this frame: -0.125", "this frame: -0.250"]
    view.locator(".film").nth(0).locator("input").fill("0")
    view.locator(".film button").first.click()
    for _ in range(50):
        view.wait_for_timeout(100)
        if (value := int(view.locator(".film input").first.input_value())) > 1:
            break
    assert value > 1
    assert not problems and [url for url in requests if not url.startswith("data:")] == [page.as_uri()]
    view.close()
