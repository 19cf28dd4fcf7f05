"""README and docs match the code: equations, functions, commands, flags and links exist."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", *(p for d in ("docs", "studies", "benchmarks") for p in (ROOT / d).rglob("*.md"))])
SCRIPTS = sorted(path for folder in (".", "studies", "benchmarks") for path in (ROOT / folder).glob("*.py"))


def blocks(text: str, language: str | None = None) -> list[str]:
    """The fenced blocks of a page, of one language or of any, with continued lines joined."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ") for name, block in found if language in (None, name)]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, words after it) of all commands of the project's scripts on a page, in blocks and within the text."""
    found, inline = (
        [],
        re.findall(r"`((?:python|torchrun) [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)),
    )
    for line in [*"\n".join(blocks(text)).splitlines(), *inline]:
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
    sorted({pair for page in PAGES for pair in re.findall(r"`([\w/]+\.py):([\w.]+)`", page.read_text())}),
    ids=lambda v: v,
)
def test_pages_name_functions_that_exist(path, name):
    if path.startswith("tests/"):
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path} has no {name}"
        return
    value = importlib.import_module(path.removeprefix("src/").removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        value = getattr(value, part)
    assert value.__doc__, f"{path}:{name} has no docstring"


def test_the_api_has_every_module():
    shown = re.findall(r"^::: ([\w.]+)$", "\n".join(page.read_text() for page in PAGES), re.MULTILINE)
    modules = [".".join(path.relative_to(ROOT / "src").with_suffix("").parts) for path in ROOT.glob("src/**/*.py")]
    assert sorted(shown) == sorted(name for name in modules if not name.endswith("__"))


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_name_existing_scripts_and_flags(page, load_benchmark):
    """Of a page, or of a script's docstring."""
    text = page.read_text()
    for script, words in commands(text if page.suffix == ".md" else f"```\n{ast.get_docstring(ast.parse(text))}\n```"):
        assert (ROOT / script).is_file(), f"{page.name}: no {script}"
        folder = Path(script).parts[0]
        if folder == "tests":
            known = set(re.findall(r'"(--[a-z-]+)"', (ROOT / script).read_text()))
            assert {word for word in words if word.startswith("--")} <= known, f"{page.name}: {script} {words}"
            continue
        module = load_benchmark(Path(script).stem) if folder in ("studies", "benchmarks") else None
        module = module or importlib.import_module(script.removesuffix(".py"))
        fields = {"--preset", "--help", *("--" + n.replace("_", "-") for n in module.Config.__dataclass_fields__)}
        for word in words:
            if word.startswith("--"):
                assert word.split("=")[0].replace("--no-", "--") in fields, f"{page.name}: {script} has no {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"
