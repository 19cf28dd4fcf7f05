"""The wheel: what it holds, and that it works without the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {path.name for path in ROOT.glob("*.py")}
FILES = {
    path.relative_to(ROOT / "src").as_posix()
    for path in (ROOT / "src" / "vlarft").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, since setuptools leaves files beside the sources; without network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", *SCRIPTS):
        shutil.copy(ROOT / name, source)
    for name in ("src", "tests", "studies", "benchmarks", "integrations"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [*PIP, "wheel", "--no-index", "--no-build-isolation", "--no-deps", "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory) -> Callable:
    """Runs Python in another folder with the installed wheel as the only vlarft; returns what it printed."""
    target, elsewhere = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("elsewhere")
    subprocess.run([*PIP, "install", "--no-index", "--no-deps", "--target", str(target), str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert Path(run("-c", "import vlarft; print(vlarft.__file__)").strip()).parents[1] == target
    return run


def test_it_holds_the_package_the_stages_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == FILES | {f"vlarft/stages/{script}" for script in SCRIPTS}
    assert "train_rft.py" in SCRIPTS and "vlarft/run/stages.py" in FILES


@pytest.mark.slow
def test_stages_run_from_it(run):
    """Recording, a training on it, and stages that a stage calls by their files."""
    run("-m", "vlarft.stages.collect_demos", "--preset", "smoke", "--out-dir", "demos")
    run("-m", "vlarft.stages.train_sft", "--preset", "smoke", "--demos", "demos", "--out-dir", "sft")
    code = """
from pathlib import Path
from vlarft.run.stages import run_stage
from vlarft.stages.rl_rounds import ROOT
flags = {"preset": "smoke", "policies": "sft", "out_dir": "eval"}
run_stage(Path(), "eval", ROOT / "eval_libero.py", **flags)
print(open("stages.json").read())
"""
    printed = run("-c", code)
    assert "[eval] python -m vlarft.stages.eval_libero --preset smoke --policies sft --out-dir eval" in printed
    assert '"done": true' in printed
