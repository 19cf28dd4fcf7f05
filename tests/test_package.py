"""The package: a light import, one-way imports without circles, scripts with few flags."""

import argparse
import ast
import configparser
import dataclasses
import graphlib
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from vlarft.run.config import command_line, from_dict, parse, to_dict

ROOT = Path(__file__).resolve().parents[1]
LOADED = {"VLAPolicy": "tabletop_after", "WorldModel": "tabletop_world_model"}
SCRIPTS = sorted(ROOT.glob("*.py"))
STUDIES = sorted([*ROOT.glob("studies/*.py"), *ROOT.glob("benchmarks/*.py")])
MODULES = {
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "src" / "vlarft").rglob("*.py"))
}
# each room and those that it may import from; the paper's modules stand at the top of src/vlarft
ROOMS = {
    "run": {"run"},
    "nets": {"nets", "run"},
    "data": {"data", "run"},
    "paper": {"paper", "data", "nets", "run"},
    "pretrained": {"pretrained", "paper", "data", "nets", "run"},
    "sim": {"sim", "paper", "data", "nets", "run"},
}


class Import(NamedTuple):
    name: str  # dotted, of the module or of what is taken from it
    at_import: bool  # executed when the file is imported: not in a function, nor for type checkers alone


def imports(path: Path) -> Iterator[Import]:
    """All imports of a file, wherever in the file."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (Import(f"{node.module}.{alias.name}", at_import) for alias in node.names)
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            later = True
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_import and not later)

    return walk(ast.parse(path.read_text()), True)


def module_of(name: str) -> str:
    """The module of vlarft that an imported name is or belongs to."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def imported_modules(path: Path) -> set[str]:
    """The modules of vlarft that a file imports, wherever in the file."""
    return {module_of(name) for name, _ in imports(path) if name.split(".")[0] == "vlarft"}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "paper"


def packages(path: Path, at_import: bool) -> set[str]:
    """Packages that a file imports, neither vlarft nor of Python, nor those that an installation always has."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required = re.findall(r"^(\w+)", config["options"]["install_requires"], re.MULTILINE)
    names = {name.split(".")[0] for name, executed in imports(path) if executed >= at_import}
    return names - {"vlarft", *required} - sys.stdlib_module_names


def test_import_is_light_and_silent():
    code = "import sys, vlarft; print(sorted({'torch', 'mujoco', 'h5py', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_loading_a_model_imports_no_compiler():
    """Which takes seconds: of every evaluation, of every server and of each of their workers."""
    load = "".join(f"vlarft.{name}.load({str(ROOT / 'checkpoints' / folder)!r}); " for name, folder in LOADED.items())
    code = f"import sys, vlarft; {load} print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_skips_fail_in_ci(tmp_path):
    """Unless the reason is listed in conftest.SKIPS."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    for name, status in (("LIBERO's assets are not at x", 0), ("could not import 'lpips'", 1)):
        (tmp_path / "test_one.py").write_text(f"import pytest\n\ndef test():\n    pytest.skip({name!r})\n")
        command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, str(tmp_path)]
        for ci, expected in (("1", status), ("", 0)):
            run = subprocess.run(command, env={**os.environ, "CI": ci}, capture_output=True, text=True, cwd=tmp_path)
            assert run.returncode == expected, run.stdout


def test_public_names_resolve():
    import vlarft

    assert {"VLAPolicy", "WorldModel", "FrameTokenizer", "Normalizer"} <= set(vlarft.__all__) <= set(dir(vlarft))
    for name in vlarft.__all__:
        assert getattr(vlarft, name), name
    with pytest.raises(AttributeError, match="no attribute 'Trainer'; it exports Batch, "):
        vlarft.Trainer  # noqa: B018


def test_the_import_graph_has_no_circle():
    graph = {module: imported_modules(path) - {module} for module, path in MODULES.items()}
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"circle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    for other in imported_modules(MODULES[module]) - {"vlarft"}:
        assert room(other) in ROOMS[room(module)], f"{module}, of {room(module)}, imports {other}"
    names = {name.split(".")[0] for name, _ in imports(MODULES[module])}
    assert not names & {path.stem for path in (*SCRIPTS, *STUDIES)}, "the library imports no script"
    if room(module) != "sim":
        assert not names & {"mujoco", "robosuite", "libero"}, f"{module} imports a simulator"


def command_lines(path: Path) -> list[argparse.ArgumentParser]:
    """The parsers of a script, one for each preset: a part that a preset leaves out has no flags there."""
    module = importlib.import_module(path.stem)
    return [command_line(preset, module.PRESETS, module.__doc__) for preset in module.PRESETS.values()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_import_no_scripts(path):
    names = {name.split(".")[0] for name, _ in imports(path)}
    assert not names & {p.stem for p in SCRIPTS}, "scripts never import scripts"
    assert not names & {p.stem for p in STUDIES}, "scripts never import studies or benchmarks"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_have_few_flags(path):
    """The flags that argparse has, --preset and dotted ones included."""
    fields = {f.name for f in dataclasses.fields(importlib.import_module(path.stem).Config)}
    for parser in command_lines(path):
        flags = [a.dest for a in parser._actions if a.option_strings and a.dest not in ("help", "debug")]
        assert len(flags) <= 35, flags
        assert {"preset", *fields} == {name.split(".")[0] for name in flags}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_every_number_has_a_range(path, capsys):
    """Stated in its type, held to on the command line; presets are within."""
    module = importlib.import_module(path.stem)
    for name, preset in module.PRESETS.items():
        from_dict(module.Config, to_dict(preset), name)
        for action in command_line(preset, module.PRESETS)._actions:
            if action.metavar in ("INT", "FLOAT"):
                for value in ("-999999999999", "999999999999"):
                    with pytest.raises(SystemExit) as stop:
                        parse(module.Config, module.PRESETS, ["--preset", name, f"{action.option_strings[0]}={value}"])
                    assert stop.value.code == 2
                    assert f": {value}: give a number in " in capsys.readouterr().err, action.dest


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_help_fits_two_screens(path):
    parser = max(command_lines(path), key=lambda parser: parser.format_help().count("\n"))
    lines = parser.format_help().splitlines()
    assert len(lines) <= 110 and max(map(len, lines)) <= 120
    headings = [line[:-1] for line in lines if re.fullmatch(r"[a-z]+:", line)]
    order = ["options", "data", "model", "optimisation", "evaluation", "run"]
    assert headings == [name for name in order if name in headings] and "run" in headings
    flags = [a for a in parser._actions if a.option_strings and a.dest not in ("help", "debug", "preset")]
    for action in flags:
        assert len(action.help.split()) > 2 and not action.help.startswith(("of ", "that ")), action.dest
    summary = importlib.import_module(path.stem).__doc__.split("\n\n")[0]
    assert parser.description == summary and summary.endswith(".")


@pytest.mark.parametrize("path", sorted({*ROOT.glob("train_*.py")} - {ROOT / "train_rl.py"}), ids=lambda p: p.name)
def test_training_needs_no_simulator(path):
    """But for reinforcement learning in one."""
    assert not [name for name, _ in imports(path) if name.startswith("vlarft.sim")]


def test_studies_find_the_scripts():
    """They are no package: a study that imports one, run by its command, has only its own folder on the path."""
    for path in STUDIES:
        names = {name.split(".")[0] for name, executed in imports(path) if executed} & {p.stem for p in SCRIPTS}
        text = path.read_text()
        if names and "__main__" in text:
            assert "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))" in text, f"{path.name}: {names}"


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


@pytest.mark.parametrize("path", [*MODULES.values(), *SCRIPTS], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_optional_packages_are_imported_where_they_are_used(path):
    assert not packages(path, at_import=True)


def test_everything_imports_without_the_optional_packages():
    optional = sorted(set().union(*(packages(path, at_import=False) for path in MODULES.values())))
    assert {"mujoco", "h5py", "lpips", "PIL", "av", "pyarrow"} <= set(optional)
    modules = [name for name in MODULES if not name.endswith("__main__")]
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({optional}))  # importing one of them is an ImportError
import vlarft
for name in vlarft.__all__:
    getattr(vlarft, name)
for name in {modules}:
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
