"""The house: a light import, imports that go one way and never in a circle, a README that tells the truth."""

import ast
import configparser
import graphlib
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from vlarft.run.config import command_line

ROOT = Path(__file__).resolve().parents[1]
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


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_have_few_flags(path):
    """The flags that argparse has for the default preset, --preset and dotted ones included."""
    script = importlib.import_module(path.stem)
    parser = command_line(next(iter(script.PRESETS.values())), script.PRESETS, script.__doc__)
    flags = [action.dest for action in parser._actions if action.option_strings and action.dest != "help"]
    assert 2 <= len(flags) <= 35, flags


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_import_no_scripts(path):
    names = {name.split(".")[0] for name, _ in imports(path)}
    assert not names & {p.stem for p in SCRIPTS}, "scripts never import scripts"
    assert not names & {p.stem for p in STUDIES}, "scripts never import studies or benchmarks"


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
