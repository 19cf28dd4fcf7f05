"""The house: a light import, imports that go one way, scripts with few flags, a README that tells the truth."""

import argparse
import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vlarft.run.config import command_line

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(ROOT.glob("*.py"))
MODULES = sorted((ROOT / "src" / "vlarft").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


def test_import_is_light_and_silent():
    code = "import sys, vlarft; print(sorted({'torch', 'mujoco', 'h5py', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_public_names_resolve():
    import vlarft

    for name in vlarft.__all__:
        assert getattr(vlarft, name), name
    with pytest.raises(AttributeError, match="no attribute 'Trainer'; it exports FrameTokenizer"):
        vlarft.Trainer  # noqa: B018


def command_lines(path: Path) -> list[argparse.ArgumentParser]:
    """The parsers of a script, one for each preset: a part that a preset leaves out has no flags there."""
    module = importlib.import_module(path.stem)
    return [command_line(preset, module.PRESETS, module.__doc__) for preset in module.PRESETS.values()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_never_import_scripts(path):
    assert not imports(path) & {p.stem for p in SCRIPTS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_have_few_flags(path):
    """The flags that argparse has, --preset and dotted ones included."""
    fields = {f.name for f in dataclasses.fields(importlib.import_module(path.stem).Config)}
    for parser in command_lines(path):
        flags = [a.dest for a in parser._actions if a.option_strings and a.dest != "help"]
        assert len(flags) <= 35, flags
        assert {"preset", *fields} == {name.split(".")[0] for name in flags}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_help_fits_two_screens(path):
    parser = max(command_lines(path), key=lambda parser: parser.format_help().count("\n"))
    lines = parser.format_help().splitlines()
    assert len(lines) <= 110 and max(map(len, lines)) <= 120
    headings = [line[:-1] for line in lines if re.fullmatch(r"[a-z]+:", line)]
    order = ["options", "data", "model", "optimisation", "evaluation", "run"]
    assert headings == [name for name in order if name in headings] and "run" in headings
    flags = [a for a in parser._actions if a.option_strings and a.dest not in ("help", "preset")]
    for action in flags:
        assert len(action.help.split()) > 2 and not action.help.startswith(("of ", "that ")), action.dest
    summary = importlib.import_module(path.stem).__doc__.split("\n\n")[0]
    assert parser.description == summary and summary.endswith(".")


@pytest.mark.parametrize("path", sorted(ROOT.glob("train_*.py")), ids=lambda p: p.name)
def test_training_needs_no_simulator(path):
    assert not [name for name in imports(path) if name.startswith("vlarft.sim")]


def test_scripts_share_names():
    """One idea has one name, whatever the script."""
    fields = {p.stem: importlib.import_module(p.stem).Config.__dataclass_fields__ for p in SCRIPTS}
    old = {"save_every", "log_every", "validate_every", "val_every", "val_batch", "bf16", "decay", "wrist"}
    for script, names in fields.items():
        assert not old & set(names), script
    shared = {
        "demos",
        "camera",
        "split_seed",
        "validation_fraction",
        "validation_interval",
        "log_interval",
        "precision",
    }
    shared |= {"out_dir", "seed", "steps", "max_minutes", "batch_size", "accumulate", "lr", "warmup", "clip_norm"}
    shared |= {"save_interval", "keep_interval", "async_save", "size"}
    for script in ("train_tokenizer", "train_wm", "train_sft"):
        assert shared <= set(fields[script])


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_imports_go_one_way(path):
    name = path.relative_to(ROOT / "src" / "vlarft").as_posix()
    layers = {"base": 0, "network": 1, "room": 2}
    networks = {"action_bins", "discriminator", "dit", "flow", "flow_networks", "frame_networks", "lora", "normalizer"}
    networks |= {"reconstruction", "tokenizer", "transformer", "vit", "vlm"}
    base = {"checkpoint", "config", "distributed", "kv_cache", "memory", "metrics", "runlog"}

    def layer(module: str) -> int:
        head = module.split(".")[0]
        return layers["network" if head in networks else "base" if head in base else "room"]

    own = layer(name.removesuffix(".py").replace("/", "."))
    for module in imports(path):
        if module.startswith("vlarft."):
            assert layer(module.removeprefix("vlarft.")) <= own, f"{name} imports {module}"
        if module.split(".")[0] in ("mujoco", "robosuite", "libero"):
            assert name.startswith("sim/"), f"{name} imports {module}"


def readme_functions() -> list[tuple[str, str]]:
    return re.findall(r"`(src/vlarft/[\w/]+\.py|\w+\.py):([\w.]+)`", (ROOT / "README.md").read_text())


def test_readme_has_every_equation():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| Eq. ")]
    numbers = {int(n) for row in rows for n in re.findall(r"\((\d+)\)", row.split("|")[1])}
    assert numbers == set(range(1, 14))


@pytest.mark.parametrize(("path", "name"), readme_functions(), ids=lambda v: v)
def test_readme_names_functions_that_exist(path, name):
    module = path.removeprefix("src/").removesuffix(".py").replace("/", ".")
    value = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    assert value.__doc__, f"{path}:{name} has no docstring"


def test_readme_commands_name_existing_scripts_and_flags():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^(?:python|torchrun .*?) ?(\w+\.py)(.*)$", text, re.MULTILINE)
    assert commands
    for script, flags in commands:
        module = importlib.import_module(script.removesuffix(".py"))
        arguments = [w for w in flags.split("#")[0].split() if w.startswith("--")]
        fields = {"--preset", *("--" + n.replace("_", "-") for n in module.Config.__dataclass_fields__)}
        for argument in arguments:
            assert argument.split("=")[0].replace("--no-", "--") in fields, f"{script} has no {argument}"
