"""The house: a light import, imports that go one way, scripts of one screenful each, a README that tells the truth."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts(path):
    assert len(path.read_text().splitlines()) <= 320
    others = {p.stem for p in SCRIPTS}
    assert not imports(path) & others, "scripts never import scripts"


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
