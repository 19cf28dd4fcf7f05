"""Break the code one line at a time and check that the module's tests notice: a developer's tool, takes minutes.

    python tests/mutate.py                     all breakages of tests/mutations.txt
    python tests/mutate.py --modules flow dit  those of src/vlarft/flow.py and src/vlarft/nets/dit.py
    python tests/mutate.py --out results/mutations.json    gathers counts and seconds, module by module

Each line says which test noticed.

The table is plain text. A `module` line names a file, the `tests` line after it the tests that guard it; then, for each
breakage, the old text, which must occur exactly once in the file, and the new one; a third line may give the reason why
this breakage is known to survive.

    module src/vlarft/flow.py
    tests tests/test_flow.py

    - shape = torch.tensor([alpha, beta]
    + shape = torch.tensor([beta, alpha]

    - epsilon = 1e-8
    + epsilon = 1e-9
    survives: too small a change to matter

Works in a temporary copy of the files that git lists. Each breakage runs `pytest -x -q` in a fork of this process, so
that torch is imported once. Exits with 1 where a breakage survives without a reason, or one with a reason is caught.
Breakages of the viewer and the page need what their tests need: rerun-sdk, Chromium and playwright.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

# what every test imports: before the forks. The package itself is imported in them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import h5py  # noqa: F401
import pytest
import torch

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tests" / "mutations.txt"
TIMEOUT = 300  # seconds; a breakage may make a loop endless


class Breakage(NamedTuple):
    """One line of the table: `old` becomes `new` in `path`, which `tests` should notice."""

    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    survives: str | None


def read_table(text: str) -> list[Breakage]:
    """The breakages of a table.

    Raises:
        ValueError: a line that is none of the kinds above, or one out of place; the message gives its number.
    """
    path, tests, old, out = "", (), None, []
    for number, line in enumerate(text.splitlines(), 1):
        word, _, rest = line.partition(" ")
        if not line.strip() or word.startswith("#"):
            continue
        if word == "module":
            path, tests = rest, ()
        elif word == "tests" and path:
            tests = tuple(rest.split())
        elif word == "-" and tests and old is None:
            old = rest
        elif word == "+" and old is not None:
            out.append(Breakage(path, old, rest, tests, None))
            old = None
        elif word == "survives:" and out and old is None:
            out[-1] = out[-1]._replace(survives=rest)
        else:
            raise ValueError(f"{TABLE.name}, line {number}: {line!r} is out of place; see the start of tests/mutate.py")
    return out


def broken(text: str, breakage: Breakage) -> str:
    """A file's text with the breakage.

    Raises:
        ValueError: the old text does not occur exactly once.
    """
    if (count := text.count(breakage.old)) != 1:
        raise ValueError(f"{breakage.path} has {count} times the text {breakage.old!r}, expected once; mend the table")
    return text.replace(breakage.old, breakage.new)


def copy_tree(folder: Path) -> None:
    """Copy all files that git lists, tracked or not, to a folder."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def _pytest(folder: Path, tests: tuple[str, ...], output: Path) -> None:
    """In a fork: pytest on the copy, its code as the exit status."""
    os.chdir(folder)
    sys.path[:0] = [str(folder / "src")]
    os.environ["PYTHONPATH"] = str(folder / "src")  # of what the tests start
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"  # two breakages within a second
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    arguments = ["-x", "-q", "-p", "no:xdist", "--tb=short", "--basetemp", str(output.parent / "pytest"), *tests]
    code = pytest.main(arguments)
    sys.stdout.flush()
    os._exit(int(code))


def run(folder: Path, tests: tuple[str, ...], timeout: float | None = TIMEOUT) -> tuple[int | None, str, float]:
    """Exit code of pytest in the copy (None: out of time), its output, and seconds."""
    output, started = folder.parent / "output.txt", time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(folder, tests, output))
    process.start()
    process.join(timeout)
    if in_time := process.exitcode is not None:
        code = process.exitcode
    else:
        process.kill()
        process.join()
    return code if in_time else None, output.read_text(), time.monotonic() - started


def first_failure(output: str) -> str:
    """Name of the test that pytest's summary lists first."""
    lines = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return lines[0].split("::")[-1].split(" - ")[0] if lines else ""


def gathered(path: Path, module: str, counts: Counter[str]) -> None:
    """Put the counts of a module into a JSON file, in place of what it has of the same one."""
    report = json.loads(path.read_text()) if path.is_file() else {"modules": {}}
    report["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    report["modules"] = dict(sorted((report["modules"] | {module: counts}).items()))
    path.write_text(json.dumps(report, indent=1) + "\n")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="+", help="names of files, such as flow or train_wm")
    parser.add_argument("--out", type=Path, help="JSON file that gathers the counts, also of several runs")
    options = parser.parse_args(arguments)
    table = read_table(TABLE.read_text())
    known = {Path(b.path).stem for b in table}
    if unknown := set(options.modules or ()) - known:
        parser.error(f"no breakages of {', '.join(sorted(unknown))}; there are some of {sorted(known)}")
    chosen = sorted((b for b in table if Path(b.path).stem in (options.modules or known)), key=lambda b: b.path)
    for breakage in chosen:  # before anything runs
        broken((ROOT / breakage.path).read_text(), breakage)
    counts: dict[str, Counter[str]] = {}  # verdicts by module
    wrong: list[tuple[Breakage, str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tree"
        copy_tree(folder)
        code, output, seconds = run(folder, tuple(dict.fromkeys(test for b in chosen for test in b.tests)), None)
        if code != 0:
            print(f"the tests fail before anything is broken\n{output[-3000:]}")
            return 1
        skipped = re.search(r"\d+ skipped", output)
        note = f"; {skipped[0]}, so that what these tests guard survives: install what they need" if skipped else ""
        print(f"unbroken  {seconds:5.1f} s{note}", flush=True)
        for breakage, following in zip(chosen, [*chosen[1:], None], strict=True):
            path = folder / breakage.path
            text = path.read_text()
            path.write_text(broken(text, breakage))
            code, output, seconds = run(folder, breakage.tests)
            path.write_text(text)
            if code == 0:
                verdict, detail = "survived", breakage.survives or ""
            elif code == 1 or code is None:
                verdict, detail = "caught", first_failure(output) if code else "out of time"
            else:  # the tests cannot even be collected: such a breakage says nothing about them
                verdict, detail = "no tests", output.strip()[-200:]
            if (verdict == "survived", verdict == "caught") != (bool(breakage.survives), not breakage.survives):
                wrong.append((breakage, verdict))
            module = counts.setdefault(breakage.path, Counter())
            module.update({verdict: 1, "seconds": round(seconds)})
            print(f"{verdict:9} {seconds:5.1f} s  {breakage.path}: {breakage.new.strip()}  [{detail}]", flush=True)
            if options.out and (following is None or following.path != breakage.path):
                gathered(options.out, breakage.path, module)
    print()
    for path, module in (*counts.items(), ("all", sum(counts.values(), Counter()))):
        total = module["caught"] + module["survived"] + module["no tests"]
        print(f"{path:36} {module['caught']:4} of {total:3} caught, {module['seconds'] / 60:5.1f} minutes")
    for breakage, verdict in wrong:
        expected = "to survive" if breakage.survives else "to be caught"
        print(
            f"  {verdict}, expected {expected}: {breakage.path}: {breakage.old.strip()!r} -> {breakage.new.strip()!r}"
        )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
