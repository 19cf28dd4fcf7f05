"""README and docs tell the truth: equations, functions, commands and flags exist, and the README's blocks run."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import demo

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "studies").glob("*.md")])


def blocks(text: str, language: str | None = None) -> list[str]:
    """The fenced blocks of a page, of one language or of any, with continued lines joined."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ") for name, block in found if language in (None, name)]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, words after it) of all commands of the project's scripts in the blocks of a page."""
    found = []
    for line in "\n".join(blocks(text)).splitlines():
        words = line.split("#")[0].split()
        for i, word in enumerate(words):
            if word.endswith(".py") and words[0] in ("python", "torchrun", "OMP_NUM_THREADS=1"):
                found.append((word, words[i + 1 :]))
                break
    return found


def test_readme_fits_on_a_few_screens():
    assert len(README.splitlines()) <= 200 and len(README.split()) <= 1800


def test_readme_has_every_equation():
    rows = [line for line in README.splitlines() if line.startswith("| Eq. ")]
    numbers = {int(n) for row in rows for n in re.findall(r"\((\d+)\)", row.split("|")[1])}
    assert numbers == set(range(1, 14))


@pytest.mark.parametrize(
    ("path", "name"),
    re.findall(r"`(src/vlarft/[\w/]+\.py|\w+\.py):([\w.]+)`", README),
    ids=lambda v: v,
)
def test_readme_names_functions_that_exist(path, name):
    value = importlib.import_module(path.removeprefix("src/").removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        value = getattr(value, part)
    assert value.__doc__, f"{path}:{name} has no docstring"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_name_existing_scripts_and_flags(page, load_benchmark):
    for script, words in commands(page.read_text()):
        assert (ROOT / script).is_file(), f"{page.name}: no {script}"
        folder = Path(script).parts[0]
        module = load_benchmark(Path(script).stem) if folder in ("studies", "benchmarks") else None
        module = module or importlib.import_module(script.removesuffix(".py"))
        fields = {"--preset", *("--" + n.replace("_", "-") for n in module.Config.__dataclass_fields__)}
        for word in words:
            if word.startswith("--"):
                assert word.split("=")[0].replace("--no-", "--") in fields, f"{page.name}: {script} has no {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"


@pytest.mark.slow
def test_blocks_of_the_readme_run(tmp_path, monkeypatch, capfd):
    """In order, on the results of a demo, at smoke size: another preset, and nothing else."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    demo.main(demo.PRESETS["smoke"].__class__(out_dir="runs/demo", stage_preset="smoke"))
    lines = [line.split("#")[0] for block in blocks(README, "bash") for line in block.splitlines()]
    ran = []
    for words in filter(None, map(shlex.split, lines)):
        if words[0] in ("make", "source"):  # setting up is what CI does
            continue
        assert words[0] == "python"
        words = ["smoke" if word == "tiny" else word for word in words[1:]]
        script = [*words[:2]] if words[0] == "-m" else [str(ROOT / words[0])]
        result = subprocess.run(
            [sys.executable, *script, *words[len(script) :]], capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, f"{' '.join(words)}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
        ran.append(words[0])
    assert ran == ["eval_libero.py", "train_rft.py", "eval_libero.py", "-m"]

    names = {
        "image": np.zeros((64, 64, 3), np.uint8),
        "proprio": np.zeros(8, np.float32),
        "frames": torch.rand(1, 3, 64, 64),
        "chunks": torch.zeros(1, 2, 8, 7),
    }
    for block in blocks(README, "python"):
        exec(block, names)
    assert names["chunk"].shape == (8, 7) and names["rollout"].frames.shape == (1, 2, 8, 3, 64, 64)
